//! The access record: who may touch a volume.
//!
//! One record per volume, at the storage server, changed only by
//! [`AccessRecord::step`]. It is the one place that decides; the server's gate
//! enforces what [`AccessRecord::admits`] says on every request.
//!
//! ```text
//!            claim                claim by the same name (a restarted client)
//!   FREE ------------> OWNED(e) ------------------------------> OWNED(e')
//!    ^                  |   ^
//!    | release, fence   |   | settle
//!    +------------------+   +-----------------------------------------+
//!                       | arm (back: disarm, where the anchor forgot)  |
//!                       v         seal              activate          |
//!                     ARMED(e) ----------> SEALED ----------> ACTIVE(e_to)
//!                       |  ^                  |
//!        server restart |  | unfreeze         | reclaim
//!          (fast mode)  v  |                  v
//!                     FROZEN              RECLAIMED(e_back) <--reclaim-- ARMED(e)
//! ```
//!
//! Rules, and why:
//! - Every grant to a new session takes a new epoch, so a request says by its
//!   epoch which process sent it; a process that was replaced is refused
//!   whenever its requests arrive.
//! - There is no way back to an old epoch: numbers only grow.
//! - A handoff is decided once, at the anchor's record: ACTIVATE and RECLAIM
//!   race there. The other members follow the anchor's proof (OPEN).
//! - A fence bars the old owner's *name* until somebody else has claimed:
//!   otherwise a supervisor on the fenced host that restarts the client would
//!   take the volume straight back.
//! - Nobody is told of a change before it is as durable as [`Step::store`] says,
//!   and nobody is welcomed under a new epoch before the gate has drained
//!   ([`Step::reopen`]): the caller's part.
//!
//! | module | noun |
//! |---|---|
//! | `words` | inputs, refusals, steps |
//! | `step` | what each input does in each phase |
//! | `codec` | the stored bytes |

mod codec;
#[cfg(test)]
mod matrix;
mod step;
#[cfg(test)]
mod tests;
mod words;

use serde::Serialize;

use crate::handoff::{Decided, Handoff, Key, Mode, Proof, Side, Try};
use crate::units::{Epoch, SessionId, VolumeId};

pub use codec::{RECORD_BYTES_MAX, RecordError};
pub use words::{By, Input, Refusal, Seen, Step, Store};

/// Where the record stands. Numbers are for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Phase {
    /// Nobody may touch the volume's data except read-only sessions.
    Free = 0,
    /// One owner may.
    Owned = 1,
    /// The owner may, and a handoff from it to another is planned.
    Armed = 2,
    /// The source has stopped and everything it sent is done: nobody may.
    Sealed = 3,
    /// The destination won and may.
    Active = 4,
    /// The source came back and may.
    Reclaimed = 5,
    /// The server restarted during a handoff in fast mode and cannot know how it
    /// stood: nobody may until source or destination say so.
    Frozen = 6,
}

impl Phase {
    const ALL: [Self; 7] = [
        Self::Free,
        Self::Owned,
        Self::Armed,
        Self::Sealed,
        Self::Active,
        Self::Reclaimed,
        Self::Frozen,
    ];

    /// As people and programs read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Owned => "owned",
            Self::Armed => "armed",
            Self::Sealed => "sealed",
            Self::Active => "active",
            Self::Reclaimed => "reclaimed",
            Self::Frozen => "frozen",
        }
    }

    /// The phase with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// Who owns the volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Owner {
    /// Stable name: host and VM.
    pub name: String,
    /// The incarnation that was granted the epoch; zero while a nominee of a
    /// fence has not claimed yet.
    pub session: SessionId,
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct AccessRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Counts changes since the record was made; those that were not durable
    /// are counted again after a restart of the server.
    pub version: u64,
    /// Only requests with this epoch are admitted.
    pub epoch: Epoch,
    /// The next epoch that nobody had; only grows.
    pub next_epoch: Epoch,
    /// Where the record stands.
    pub phase: Phase,
    /// The owner, in all phases but free. While a handoff is not decided this
    /// is the source.
    pub owner: Option<Owner>,
    /// Name that may not claim until somebody else has (after a fence).
    pub barred: Option<String>,
    /// Highest coordinator term seen; what a lower term says is refused.
    pub coordinator_term: u64,
    /// In phases armed, sealed, active, reclaimed and frozen.
    pub handoff: Option<Handoff>,
    /// The last handoff that is over.
    pub decided: Option<Decided>,
}

/// Which requests the gate lets in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admits {
    /// From the owner.
    pub owner: Option<Epoch>,
    /// From read-only sessions.
    pub reader: Option<Epoch>,
}

impl AccessRecord {
    /// The record of a new volume.
    #[must_use]
    pub const fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            version: 0,
            epoch: Epoch(0),
            next_epoch: Epoch(1),
            phase: Phase::Free,
            owner: None,
            barred: None,
            coordinator_term: 0,
            handoff: None,
            decided: None,
        }
    }

    /// What a server believes that starts with this record on its disk. In fast
    /// mode it cannot know whether the source sealed or even the destination
    /// activated since.
    #[must_use]
    pub fn after_restart(mut self) -> Self {
        if let Some(handoff) = &mut self.handoff {
            match self.phase {
                Phase::Armed if handoff.plan.mode == Mode::Fast => {
                    self.phase = Phase::Frozen;
                    handoff.sealed = false;
                }
                // Who has abdicated has not activated; anybody else may have.
                Phase::Sealed if handoff.plan.mode == Mode::Fast && !handoff.abdicated => {
                    self.phase = Phase::Frozen;
                    handoff.sealed = true;
                }
                _ => {}
            }
            handoff.seal_seen = false;
            handoff.wanted_back = false;
        }
        self
    }

    /// Whom the gate lets in.
    #[must_use]
    pub fn admits(&self) -> Admits {
        // A nominee of a fence has session zero until it claims.
        let claimed = self.owner.as_ref().is_some_and(|owner| owner.session.0 != 0);
        let owner = match self.phase {
            Phase::Free | Phase::Sealed | Phase::Frozen => false,
            Phase::Owned | Phase::Armed | Phase::Active | Phase::Reclaimed => claimed,
        };
        // Who only reads changes nothing, whoever owns the volume.
        Admits { owner: owner.then_some(self.epoch), reader: Some(self.epoch) }
    }

    /// How the handoff `attempt` was decided, if this record knows.
    #[must_use]
    pub fn winner(&self, attempt: Try) -> Option<Side> {
        match (&self.handoff, &self.decided) {
            (Some(handoff), _) if handoff.plan.attempt == attempt => match self.phase {
                Phase::Active => Some(Side::Destination),
                Phase::Reclaimed => Some(Side::Source),
                _ => None,
            },
            (_, Some(decided)) if decided.attempt == attempt => Some(decided.winner),
            _ => None,
        }
    }

    /// What the winner of `attempt` shows to the other members; only an anchor's
    /// record is asked.
    #[must_use]
    pub fn proof(&self, attempt: Try) -> Option<Proof> {
        let winner = self.winner(attempt)?;
        let (key, grant) = match (&self.handoff, &self.decided) {
            (Some(handoff), _) if handoff.plan.attempt == attempt => {
                (&handoff.plan.key, handoff.grant)
            }
            (_, Some(decided)) => (&decided.key, decided.grant),
            _ => return None,
        };
        if *key == Key::default() {
            return None;
        }
        let session = self.owner.as_ref()?.session;
        Some(Proof::new(key, attempt, winner, grant, session))
    }

    /// A copy that may be shown: without keys.
    #[must_use]
    pub fn without_keys(&self) -> Self {
        let mut record = self.clone();
        if let Some(handoff) = &mut record.handoff {
            handoff.plan.key = Default::default();
        }
        if let Some(decided) = &mut record.decided {
            decided.key = Default::default();
        }
        record
    }
}
