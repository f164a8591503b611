//! What is noted on an image of who may write it. Pure: facts in, a note out.
//!
//! The access record is the one that a storage server keeps for a volume of
//! Baton's own, and [`AccessRecord::step`] is the only thing that changes it.
//! Beside it stand the Ceph clients: the one that the record's owner writes
//! with, and those that had the image before it and must be kept out.
//!
//! ```text
//!             owner's session changes              on the blocklist
//!   client --------------------------> former -------------------------> former, listed
//!                                        | sealed: it had stopped and        |
//!                                        v nothing of it was under way       | its process
//!                                      former, sealed                        v is dead
//!                                        +------------------------------> forgotten
//! ```

use std::fmt;
use std::str::FromStr;

use baton_protocol::VolumeId;
use baton_protocol::access::{AccessRecord, Input, Phase, Refusal};
use serde::{Deserialize, Serialize};

/// The note's name on the image: `rbd image-meta ls` shows it.
pub(super) const SEAT_NOTE: &str = "baton.access";
const FORMAT: u32 = 1;
/// Former clients that are kept in mind. Older ones that are on the blocklist
/// stay there.
const FORMER_MAX: usize = 16;

/// A Ceph client that had the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    /// Address and nonce.
    pub client: String,
    /// Owner name it had the image under.
    pub owner: String,
    /// It said itself that it had stopped, and nothing of it was under way.
    pub sealed: bool,
    /// It is on the blocklist.
    pub listed: bool,
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Who may write.
    pub record: AccessRecord,
    /// The Ceph client of the record's owner; `None`: it has not written yet.
    pub client: Option<String>,
    /// Those before it, oldest first.
    pub former: Vec<Former>,
}

/// The note as text.
#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    /// For people, like the phase: `record` says it.
    owner: Option<String>,
    phase: String,
    client: Option<String>,
    former: Vec<Former>,
    /// The record's bytes, hexadecimal.
    record: String,
}

/// Why a note cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadNote;

impl Seat {
    /// Of an image that nobody has had.
    #[must_use]
    pub(super) fn new(volume: VolumeId) -> Self {
        Self { record: AccessRecord::new(volume), client: None, former: Vec::new() }
    }

    /// Judges an input as a storage server would. `client` is the one that
    /// speaks, if a backend does. One that has a successor is not heard: it hung,
    /// and would take the image from the process that goes on with the machine.
    ///
    /// # Errors
    /// [`Refusal`] when the record stays as it is.
    pub fn step(&self, input: Input<'_>, client: Option<&str>) -> Result<Self, Refusal> {
        if self.former.iter().any(|former| Some(former.client.as_str()) == client) {
            return Err(Refusal::NotNominated);
        }
        let record = self.record.step(input)?.record;
        let session = |record: &AccessRecord| record.owner.as_ref().map(|owner| owner.session);
        let mut next = Self { record, ..self.clone() };
        if session(&next.record) == session(&self.record) {
            return Ok(next);
        }
        // Who gives the image back has closed it.
        let released = matches!(input, Input::Release { .. });
        if let (Some(client), false) = (next.client.take(), released) {
            let owner = self.record.owner.as_ref().map_or_else(String::new, |o| o.name.clone());
            // A fence believes nobody.
            let fenced = matches!(input, Input::Fence { .. });
            let sealed = self.record.phase == Phase::Sealed && !fenced;
            next.former.push(Former { client, owner, sealed, listed: false });
        }
        next.client = client.filter(|_| next.record.owner.is_some()).map(str::to_owned);
        Ok(next)
    }

    /// The clients that could still write what they have kept, and have to be on
    /// the blocklist before anybody else writes.
    pub fn loose(&self) -> impl Iterator<Item = &str> {
        self.former.iter().filter(|f| !f.sealed && !f.listed).map(|f| f.client.as_str())
    }

    /// The same, and those that have sealed.
    pub fn unlisted(&self) -> impl Iterator<Item = &str> {
        self.former.iter().filter(|former| !former.listed).map(|f| f.client.as_str())
    }

    /// After `clients` were put on the blocklist.
    #[must_use]
    pub fn with_listed(mut self, clients: &[String]) -> Self {
        for former in &mut self.former {
            former.listed |= clients.contains(&former.client);
        }
        while self.former.len() > FORMER_MAX
            && let Some(oldest) = self.former.iter().position(|former| former.listed)
        {
            self.former.remove(oldest);
        }
        self
    }

    /// The former client of a host whose last process is dead, if it had stopped
    /// before it died: nothing of it can come any more. What another one had sent
    /// may still be in the network, and of those before it nobody has seen the end.
    #[must_use]
    pub fn buried(&self, owner: &str) -> Option<&Former> {
        let last = self.former.iter().rev().find(|former| former.owner == owner);
        last.filter(|former| former.sealed)
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        let hex = self.record.encode().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let note = Note {
            version: FORMAT,
            owner: self.record.owner.as_ref().map(|owner| owner.name.clone()),
            phase: self.record.phase.name().to_owned(),
            client: self.client.clone(),
            former: self.former.clone(),
            record: hex,
        };
        f.write_str(&serde_json::to_string(&note).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Seat {
    type Err = BadNote;

    fn from_str(text: &str) -> Result<Self, BadNote> {
        let Note { version, client, former, record, .. } =
            serde_json::from_str(text).map_err(|_| BadNote)?;
        if version != FORMAT || !record.is_ascii() || record.len() % 2 != 0 {
            return Err(BadNote);
        }
        let byte = |at| u8::from_str_radix(&record[at..at + 2], 16).map_err(|_| BadNote);
        let bytes: Result<Vec<u8>, BadNote> = (0..record.len()).step_by(2).map(byte).collect();
        let record = AccessRecord::decode(&bytes?).map_err(|_| BadNote)?;
        Ok(Self { record, client, former })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::access::By;
    use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Try};
    use baton_protocol::{Epoch, SessionId};
    use proptest::prelude::*;

    const ATTEMPT: Try = Try { id: HandoffId(5), attempt: 1 };

    fn claimed(seat: &Seat, name: &str, session: u64, client: &str) -> Seat {
        seat.step(Input::Claim { name, session: SessionId(session) }, Some(client)).unwrap()
    }

    fn armed(seat: &Seat) -> Seat {
        let volume = seat.record.volume;
        let plan = Plan {
            attempt: ATTEMPT,
            vm: "vm".to_owned(),
            from: seat.record.owner.as_ref().unwrap().name.clone(),
            to: "b/vm".to_owned(),
            anchor: volume,
            members: Members::of([volume]),
            mode: Mode::Fast,
            key: Key([1; 32]),
        };
        let next_epoch = seat.record.next_epoch;
        let arm = Input::Arm { plan: &plan, term: 1, next_epoch, generation: 0 };
        seat.step(arm, None).unwrap()
    }

    fn sealed(seat: &Seat, session: u64) -> Seat {
        let input = Input::Sealed { attempt: ATTEMPT, session: SessionId(session) };
        seat.step(input, None).unwrap()
    }

    #[test]
    fn a_killed_backend_is_loose_until_it_is_listed() {
        let first = claimed(&Seat::new(VolumeId(1)), "a/vm", 1, "one");
        assert_eq!((first.client.as_deref(), first.loose().count()), (Some("one"), 0));
        let second = claimed(&first, "a/vm", 2, "two");
        assert_eq!(second.client.as_deref(), Some("two"));
        assert_eq!(second.loose().collect::<Vec<_>>(), ["one"]);
        let listed = second.with_listed(&["one".to_owned()]);
        assert_eq!(listed.loose().count(), 0);
        // Whatever it had sent may still come: no proof of death removes its entry.
        assert_eq!(listed.buried("a/vm"), None);
        // The same process again changes nothing.
        assert_eq!(claimed(&listed, "a/vm", 2, "two"), listed);
    }

    #[test]
    fn a_source_that_sealed_is_not_loose_and_a_destination_is_noted() {
        let seat = sealed(&armed(&claimed(&Seat::new(VolumeId(1)), "a/vm", 1, "one")), 1);
        let activate = Input::Activate { attempt: ATTEMPT, name: "b/vm", session: SessionId(9) };
        let active = seat.step(activate, Some("nine")).unwrap();
        assert_eq!(active.client.as_deref(), Some("nine"));
        assert_eq!((active.loose().count(), active.unlisted().count()), (0, 1));
        assert_eq!(active.buried("a/vm").map(|former| &*former.client), Some("one"));
        assert_eq!(active.buried("b/vm"), None);
    }

    #[test]
    fn the_end_of_one_process_buries_no_earlier_one() {
        let former = |client: &str, owner: &str, sealed| Former {
            client: client.to_owned(),
            owner: owner.to_owned(),
            sealed,
            listed: true,
        };
        let mut seat = Seat::new(VolumeId(1));
        // It had sealed, and nobody saw its end.
        seat.former.push(former("one", "a/vm", true));
        seat.former.push(former("two", "b/vm", true));
        seat.former.push(former("three", "a/vm", true));
        assert_eq!(seat.buried("a/vm").map(|former| &*former.client), Some("three"));
        // This one had not: the word of the first is not its.
        seat.former.push(former("four", "a/vm", false));
        assert_eq!(seat.buried("a/vm"), None);
    }

    #[test]
    fn who_has_a_successor_is_not_heard() {
        let seat = sealed(&armed(&claimed(&Seat::new(VolumeId(1)), "a/vm", 1, "one")), 1);
        let reclaim = |seat: &Seat, session, client| {
            let by = By::Backend { name: "a/vm", session: SessionId(session) };
            seat.step(Input::Reclaim { attempt: ATTEMPT, by }, Some(client))
        };
        let back = reclaim(&seat, 2, "two").unwrap();
        assert_eq!((back.client.as_deref(), back.former.len()), (Some("two"), 1));
        // The first one hung with its RECLAIM in its hands.
        assert_eq!(reclaim(&back, 1, "one"), Err(Refusal::NotNominated));
        assert_eq!(reclaim(&back, 2, "two"), Ok(back.clone()));
    }

    #[test]
    fn a_fence_makes_the_owner_loose_whatever_the_phase() {
        let owned = claimed(&Seat::new(VolumeId(1)), "a/vm", 1, "one");
        for seat in [owned.clone(), armed(&owned), sealed(&armed(&owned), 1)] {
            let fence = Input::Fence { term: Some(1), nominee: Some("b/vm"), seen: None };
            let fenced = seat.step(fence, None).unwrap();
            assert_eq!((fenced.client.clone(), fenced.loose().collect()), (None, vec!["one"]));
            let next = claimed(&fenced, "b/vm", 7, "seven");
            assert_eq!(next.loose().collect::<Vec<_>>(), ["one"], "still to be kept out");
        }
    }

    #[test]
    fn who_gives_the_image_back_is_forgotten() {
        let owned = claimed(&Seat::new(VolumeId(1)), "a/vm", 1, "one");
        let epoch = owned.record.epoch;
        let free = owned.step(Input::Release { session: SessionId(1), epoch }, None).unwrap();
        assert_eq!((free.client, free.former), (None, Vec::new()));
        assert_eq!(free.record.next_epoch, Epoch(2), "numbers are not used again");
    }

    #[test]
    fn only_listed_clients_are_forgotten_when_there_are_many() {
        let mut seat = Seat::new(VolumeId(1));
        for n in 0..40u64 {
            seat = claimed(&seat, "a/vm", n + 1, &format!("c{n}"));
        }
        assert_eq!(seat.loose().count(), 39);
        let first: Vec<String> = (0..30).map(|n| format!("c{n}")).collect();
        let seat = seat.with_listed(&first);
        assert_eq!((seat.former.len(), seat.loose().count()), (16, 9));
    }

    #[test]
    fn a_note_reads_as_it_was_written() {
        let seat = sealed(&armed(&claimed(&Seat::new(VolumeId(7)), "host 1/vm", 1, "x:0/1")), 1);
        assert_eq!(seat.to_string().parse(), Ok(seat.clone()));
        assert!(seat.to_string().contains("\"owner\":\"host 1/vm\""));
        for wrong in ["", "{}", "1 2 3", "{\"version\":1}"] {
            assert_eq!(wrong.parse::<Seat>(), Err(BadNote), "{wrong:?}");
        }
        let later = seat.to_string().replace("\"version\":1", "\"version\":2");
        assert_eq!(later.parse::<Seat>(), Err(BadNote));
    }

    proptest! {
        #[test]
        fn any_text_is_a_note_or_not(text: String, hex in "[0-9a-zé]{0,300}") {
            let _ = text.parse::<Seat>();
            let note = format!(
                "{{\"version\":1,\"owner\":null,\"phase\":\"\",\"client\":null,\"former\":[],\"record\":\"{hex}\"}}"
            );
            let _ = note.parse::<Seat>();
        }
    }
}
