//! The bodies of ACCESS, HANDOFF and OPEN; byte tables in `docs/wire.md`.
//!
//! A client asks with a HANDOFF request and is answered with an outcome, the
//! record as it stands, and, if it won at the anchor, the proof. ACCESS is
//! answered with the record as soon as it differs from the one the client
//! knows. OPEN turns a connection over to the winner's epoch.

use crate::access::{AccessRecord, RECORD_BYTES_MAX, RecordError, Refusal};
use crate::cursor::{Cursor, Short};
use crate::units::{QueueId, Seq};

use super::proof::{MAC_BYTES, Proof, Side};
use super::{HandoffId, Try};

/// Longest HANDOFF request body, bytes: a SEAL of 512 queues.
pub const ASK_BYTES_MAX: usize = ASK_FIXED_BYTES + COUNTS_MAX * COUNT_BYTES;
/// Most queues a SEAL can name.
pub const COUNTS_MAX: usize = 512;
/// An OPEN request body, bytes.
pub const OPEN_BYTES: usize = ATTEMPT_BYTES + PROOF_BYTES;
/// Longest HANDOFF or ACCESS reply body, bytes.
pub const ANSWER_BYTES_MAX: usize = ANSWER_FIXED_BYTES + PROOF_BYTES + RECORD_BYTES_MAX;

const ATTEMPT_BYTES: usize = 24;
const ASK_FIXED_BYTES: usize = 8 + ATTEMPT_BYTES + 8;
const COUNT_BYTES: usize = 24;
const PROOF_BYTES: usize = 16 + MAC_BYTES;
const ANSWER_FIXED_BYTES: usize = 16;

/// What a source sent on one queue before it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// The queue.
    pub queue: QueueId,
    /// The last sequence number it used; zero: none.
    pub last: Seq,
    /// The lowest number whose answer it does not have. Above `last` nothing is
    /// in flight: the drain certificate.
    pub lowest: Seq,
}

impl Count {
    /// Whether a server that has carried out everything up to `arrived` on this
    /// queue has all of it.
    #[must_use]
    pub fn is_reached(&self, arrived: Seq) -> bool {
        self.lowest > self.last || arrived >= self.last
    }
}

/// What a backend asks of one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Source: I have stopped, and this is what I sent.
    Seal(Vec<Count>),
    /// Destination, at the anchor: all members are sealed and I run.
    Activate,
    /// Source, at the anchor: I go on.
    Reclaim,
    /// Destination, at the anchor: I never activated and never will.
    Abdicate,
    /// Source: I never sealed, and I mean this incarnation of the server.
    Unfreeze {
        /// Which.
        boot_id: u64,
    },
}

/// A HANDOFF request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoffRequest {
    /// Which handoff.
    pub attempt: Try,
    /// What is asked.
    pub ask: Ask,
}

/// How a HANDOFF request ended. Numbers are for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Outcome {
    /// Done: sealed, activated, reclaimed, abdicated, unfrozen.
    Granted = 0,
    /// The other side won. Final.
    Lost = 1,
    /// The source has not sealed this member.
    NotSealed = 2,
    /// The server restarted and cannot know; the destination has to speak first.
    Unknown = 3,
    /// The handoff, or this try of it, is not or no longer known here. Final
    /// unless the record names it again.
    NoSuchHandoff = 4,
    /// The sender is no side of it. Final.
    NotNominated = 5,
    /// The request comes too late or may not be made now.
    Refused = 6,
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Granted,
        Self::Lost,
        Self::NotSealed,
        Self::Unknown,
        Self::NoSuchHandoff,
        Self::NotNominated,
        Self::Refused,
    ];

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// The one table from a refusal of the record to the wire.
impl From<&Refusal> for Outcome {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Lost { .. } => Self::Lost,
            Refusal::NotSealed => Self::NotSealed,
            Refusal::UnknownFrozen => Self::Unknown,
            Refusal::NoSuchHandoff(_) => Self::NoSuchHandoff,
            Refusal::NotNominated => Self::NotNominated,
            Refusal::NotOwner { .. }
            | Refusal::Barred { .. }
            | Refusal::StaleEpoch { .. }
            | Refusal::StaleTerm { .. }
            | Refusal::BadName
            | Refusal::BadPlan(_)
            | Refusal::InHandoff(_)
            | Refusal::HandoffInProgress(_)
            | Refusal::StalePlan { .. }
            | Refusal::StaleFence { .. }
            | Refusal::NotAnchor { .. }
            | Refusal::TooLate
            | Refusal::Undecided
            | Refusal::BadProof
            | Refusal::CannotUnfreeze
            | Refusal::CannotDisarm(_) => Self::Refused,
        }
    }
}

/// Body of a HANDOFF or ACCESS reply.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// How it ended; granted in ACCESS replies.
    pub outcome: Outcome,
    /// The server's incarnation.
    pub boot_id: u64,
    /// For the winner, at the anchor.
    pub proof: Option<Proof>,
    /// As it stands now, without keys.
    pub record: AccessRecord,
}

/// Body of an OPEN request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Which handoff.
    pub attempt: Try,
    /// The anchor's decision.
    pub proof: Proof,
}

/// Why bytes are not such a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the body of a handoff message is malformed")]
pub struct HandoffBodyError;

impl From<Short> for HandoffBodyError {
    fn from(_: Short) -> Self {
        Self
    }
}

impl From<RecordError> for HandoffBodyError {
    fn from(_: RecordError) -> Self {
        Self
    }
}

fn put_attempt(out: &mut Vec<u8>, attempt: Try) {
    out.extend_from_slice(&attempt.id.0.to_le_bytes());
    out.extend_from_slice(&attempt.attempt.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
}

fn zero<const N: usize>(b: &mut Cursor<'_>) -> Result<(), HandoffBodyError> {
    if b.array::<N>()? == [0; N] { Ok(()) } else { Err(HandoffBodyError) }
}

fn take_attempt(b: &mut Cursor<'_>) -> Result<Try, HandoffBodyError> {
    let attempt = Try { id: HandoffId(b.u128()?), attempt: b.u32()? };
    zero::<4>(b)?;
    Ok(attempt)
}

fn put_proof(out: &mut Vec<u8>, proof: &Proof) {
    out.extend_from_slice(&[proof.side as u8, 0, 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&proof.grant.to_le_bytes());
    out.extend_from_slice(&proof.mac);
}

fn take_proof(b: &mut Cursor<'_>) -> Result<Proof, HandoffBodyError> {
    let side = Side::from_number(b.u8()?).ok_or(HandoffBodyError)?;
    zero::<7>(b)?;
    Ok(Proof { side, grant: b.u64()?, mac: b.array()? })
}

impl HandoffRequest {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (number, counts, boot_id): (u8, &[Count], u64) = match &self.ask {
            Ask::Seal(counts) => (1, counts, 0),
            Ask::Activate => (2, &[], 0),
            Ask::Reclaim => (3, &[], 0),
            Ask::Abdicate => (4, &[], 0),
            Ask::Unfreeze { boot_id } => (5, &[], *boot_id),
        };
        let counts = &counts[..counts.len().min(COUNTS_MAX)];
        let mut b = Vec::with_capacity(ASK_FIXED_BYTES + counts.len() * COUNT_BYTES);
        let len = u16::try_from(counts.len()).expect("at most COUNTS_MAX");
        b.extend_from_slice(&[number, 0]);
        b.extend_from_slice(&len.to_le_bytes());
        b.extend_from_slice(&[0; 4]);
        put_attempt(&mut b, self.attempt);
        b.extend_from_slice(&boot_id.to_le_bytes());
        for count in counts {
            b.extend_from_slice(&count.queue.0.to_le_bytes());
            b.extend_from_slice(&[0; 6]);
            b.extend_from_slice(&count.last.0.to_le_bytes());
            b.extend_from_slice(&count.lowest.0.to_le_bytes());
        }
        b
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`HandoffBodyError`] when it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, HandoffBodyError> {
        let mut b = Cursor::new(bytes);
        let number = b.u8()?;
        zero::<1>(&mut b)?;
        let len = usize::from(b.u16()?);
        zero::<4>(&mut b)?;
        let attempt = take_attempt(&mut b)?;
        let boot_id = b.u64()?;
        if len > COUNTS_MAX || (number != 1 && len != 0) || (number != 5 && boot_id != 0) {
            return Err(HandoffBodyError);
        }
        let mut counts = Vec::with_capacity(len);
        for _ in 0..len {
            let queue = QueueId(b.u16()?);
            zero::<6>(&mut b)?;
            counts.push(Count { queue, last: Seq(b.u64()?), lowest: Seq(b.u64()?) });
        }
        let ask = match number {
            1 => Ask::Seal(counts),
            2 => Ask::Activate,
            3 => Ask::Reclaim,
            4 => Ask::Abdicate,
            5 => Ask::Unfreeze { boot_id },
            _ => return Err(HandoffBodyError),
        };
        if b.is_empty() { Ok(Self { attempt, ask }) } else { Err(HandoffBodyError) }
    }
}

impl Answer {
    /// The bytes on the wire; the record's keys are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(ANSWER_FIXED_BYTES + PROOF_BYTES + 512);
        b.extend_from_slice(&(self.outcome as u16).to_le_bytes());
        b.extend_from_slice(&[u8::from(self.proof.is_some()), 0, 0, 0, 0, 0]);
        b.extend_from_slice(&self.boot_id.to_le_bytes());
        if let Some(proof) = &self.proof {
            put_proof(&mut b, proof);
        }
        b.extend_from_slice(&self.record.without_keys().encode());
        b
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`HandoffBodyError`] when it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, HandoffBodyError> {
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(HandoffBodyError);
        }
        let mut b = Cursor::new(bytes);
        let outcome = Outcome::from_number(b.u16()?).ok_or(HandoffBodyError)?;
        let has_proof = match b.u8()? {
            0 => false,
            1 => true,
            _ => return Err(HandoffBodyError),
        };
        zero::<5>(&mut b)?;
        let boot_id = b.u64()?;
        let proof = has_proof.then(|| take_proof(&mut b)).transpose()?;
        let record = AccessRecord::decode(b.rest())?;
        Ok(Self { outcome, boot_id, proof, record })
    }
}

impl Open {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(OPEN_BYTES);
        put_attempt(&mut b, self.attempt);
        put_proof(&mut b, &self.proof);
        b
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`HandoffBodyError`] when it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, HandoffBodyError> {
        let mut b = Cursor::new(bytes);
        let open = Self { attempt: take_attempt(&mut b)?, proof: take_proof(&mut b)? };
        if b.is_empty() { Ok(open) } else { Err(HandoffBodyError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{SessionId, VolumeId};
    use proptest::prelude::*;

    const TRY: Try = Try { id: HandoffId(0x0102), attempt: 3 };

    #[test]
    fn bodies_survive_the_wire() {
        let count = Count { queue: QueueId(2), last: Seq(9), lowest: Seq(5) };
        for ask in [
            Ask::Seal(vec![]),
            Ask::Seal(vec![count; COUNTS_MAX]),
            Ask::Activate,
            Ask::Reclaim,
            Ask::Abdicate,
            Ask::Unfreeze { boot_id: 7 },
        ] {
            let request = HandoffRequest { attempt: TRY, ask };
            let bytes = request.encode();
            assert!(bytes.len() <= ASK_BYTES_MAX);
            assert_eq!(HandoffRequest::decode(&bytes), Ok(request));
        }
        let proof = Proof { side: Side::Destination, grant: 4, mac: [5; 32] };
        let open = Open { attempt: TRY, proof };
        assert_eq!(open.encode().len(), OPEN_BYTES);
        assert_eq!(Open::decode(&open.encode()), Ok(open));
        for proof in [None, Some(proof)] {
            let record = AccessRecord::new(VolumeId(6));
            let answer = Answer { outcome: Outcome::Lost, boot_id: 8, proof, record };
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn a_count_is_reached_by_arrival_or_by_answers() {
        let count =
            |last, lowest| Count { queue: QueueId(0), last: Seq(last), lowest: Seq(lowest) };
        assert!(!count(5, 3).is_reached(Seq(4)));
        assert!(count(5, 3).is_reached(Seq(5)));
        assert!(count(5, 6).is_reached(Seq(0)), "all answered, whatever the server remembers");
        assert!(count(0, 1).is_reached(Seq(0)), "nothing sent");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_back(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = HandoffRequest::decode(&bytes) {
                prop_assert_eq!(request.encode(), &bytes[..]);
            }
            if let Ok(open) = Open::decode(&bytes) {
                prop_assert_eq!(open.encode(), &bytes[..]);
            }
            let _ = Answer::decode(&bytes);
        }
    }

    #[test]
    fn a_proof_on_the_wire_still_holds() {
        let key = super::super::Key([3; 32]);
        let proof = Proof::new(&key, TRY, Side::Source, 2, SessionId(1));
        let open = Open::decode(&Open { attempt: TRY, proof }.encode()).expect("decodes");
        assert!(open.proof.holds(&key, TRY, SessionId(1)));
    }
}
