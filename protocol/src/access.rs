//! The access record: who may touch a volume.
//!
//! One record per volume, durable at the storage server, changed only by
//! [`AccessRecord::step`]. It is the one place that decides; the server's gate
//! enforces what it says on every request.
//!
//! ```text
//!            claim                 claim by the same name (a restarted client)
//!   FREE ------------> OWNED(e) ------------------------------> OWNED(e+1)
//!    ^                    |
//!    |      release       |  fence (forced, by an operator or coordinator)
//!    +--------------------+-----> FREE(e+1), old owner barred; or OWNED(e+1) by
//!                                 the nominee, who still has to claim
//! ```
//!
//! Rules, and why:
//! - Every grant to a new session takes a new epoch, so a request says by its
//!   epoch which process sent it; a process that was replaced is refused
//!   whenever its requests arrive.
//! - There is no way back to an old epoch: numbers only grow.
//! - A fence bars the old owner's *name* until somebody else has claimed:
//!   otherwise a supervisor on the fenced host that restarts the client would
//!   take the volume straight back.
//! - A change is durable before anybody is told of it, and the gate is closed
//!   and drained before the new holder is welcomed (that is the caller's part:
//!   see [`Step::changed`]).

use serde::Serialize;

use crate::message::OWNER_BYTES_MAX;
use crate::units::{Epoch, SessionId, VolumeId};

/// Where the record stands. Numbers are for ever; 2 and up are kept for the
/// phases of a handoff (armed, sealed, active, reclaimed, frozen).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Phase {
    /// Nobody may touch the volume's data except read-only sessions.
    Free = 0,
    /// One owner may.
    Owned = 1,
}

/// Who owns the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// Stable name: host and VM.
    pub name: String,
    /// The incarnation that was granted the epoch; zero while a nominee of a
    /// fence has not claimed yet.
    pub session: SessionId,
}

/// The durable record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AccessRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Counts changes; lets a writer notice that another was faster.
    pub version: u64,
    /// Only requests with this epoch are admitted.
    pub epoch: Epoch,
    /// Where the record stands.
    pub phase: Phase,
    /// The owner, in phase owned.
    pub owner: Option<Owner>,
    /// Name that may not claim until somebody else has (after a fence).
    pub barred: Option<String>,
    /// Highest coordinator term seen; a fence of a lower term is refused.
    pub coordinator_term: u64,
}

/// What somebody asks of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input<'a> {
    /// A client that holds nothing wants to become the owner.
    Claim {
        /// Its name.
        name: &'a str,
        /// Its incarnation.
        session: SessionId,
    },
    /// A connection of a session that was granted an epoch comes (back).
    Rejoin {
        /// Its incarnation.
        session: SessionId,
        /// What it was granted.
        epoch: Epoch,
    },
    /// The owner gives the volume back.
    Release {
        /// Its incarnation.
        session: SessionId,
        /// What it was granted.
        epoch: Epoch,
    },
    /// The owner loses the volume, asked or not.
    Fence {
        /// Term of the coordinator that says so; `None` for an operator.
        term: Option<u64>,
        /// The only name that may claim afterwards; `None` for anybody but the
        /// old owner.
        nominee: Option<&'a str>,
    },
}

/// Why the record stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody else owns the volume.
    #[error(
        "the volume belongs to `{owner}` (epoch {epoch}); fence it first if that client is gone for good"
    )]
    NotOwner {
        /// Who.
        owner: String,
        /// Since which epoch.
        epoch: Epoch,
    },
    /// The claimant was fenced and nobody has claimed since.
    #[error(
        "`{name}` was fenced at epoch {epoch}; another owner must claim the volume first, or fence it again naming this one"
    )]
    Barred {
        /// The claimant.
        name: String,
        /// The epoch of the fence.
        epoch: Epoch,
    },
    /// The session's grant is over.
    #[error("the grant is over: the volume is at epoch {current}")]
    StaleEpoch {
        /// The volume's epoch.
        current: Epoch,
    },
    /// A newer coordinator has spoken.
    #[error("coordinator term {term} is over: term {current} has spoken")]
    StaleTerm {
        /// The term refused.
        term: u64,
        /// The highest seen.
        current: u64,
    },
    /// A name that no record can hold.
    #[error("an owner's name must have 1 to {OWNER_BYTES_MAX} bytes")]
    BadName,
}

/// A granted input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The record afterwards.
    pub record: AccessRecord,
    /// The record changed: make it durable, close the gate to lower epochs and
    /// wait until it has drained, and only then answer.
    pub changed: bool,
}

impl AccessRecord {
    /// The record of a new volume.
    #[must_use]
    pub const fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            version: 0,
            epoch: Epoch(0),
            phase: Phase::Free,
            owner: None,
            barred: None,
            coordinator_term: 0,
        }
    }

    /// Judges an input. Pure: the caller persists and enforces.
    ///
    /// # Errors
    /// [`Refusal`] when the record stays as it is.
    pub fn step(&self, input: Input<'_>) -> Result<Step, Refusal> {
        match input {
            Input::Claim { name, session } => self.claim(name, session),
            Input::Rejoin { session, epoch } => {
                self.holds(session, epoch)?;
                Ok(Step { record: self.clone(), changed: false })
            }
            Input::Release { session, epoch } => {
                self.holds(session, epoch)?;
                Ok(self.changed(Self { phase: Phase::Free, owner: None, ..self.clone() }))
            }
            Input::Fence { term, nominee } => self.fence(term, nominee),
        }
    }

    fn claim(&self, name: &str, session: SessionId) -> Result<Step, Refusal> {
        check_name(name)?;
        if self.barred.as_deref() == Some(name) {
            return Err(Refusal::Barred { name: name.to_owned(), epoch: self.epoch });
        }
        if let Some(owner) = &self.owner {
            if owner.name != name {
                return Err(Refusal::NotOwner { owner: owner.name.clone(), epoch: self.epoch });
            }
            // The same process asks again: it lost our answer.
            if owner.session == session {
                return Ok(Step { record: self.clone(), changed: false });
            }
        }
        Ok(self.changed(Self {
            epoch: self.epoch.next(),
            phase: Phase::Owned,
            owner: Some(Owner { name: name.to_owned(), session }),
            barred: None,
            ..self.clone()
        }))
    }

    fn fence(&self, term: Option<u64>, nominee: Option<&str>) -> Result<Step, Refusal> {
        if let Some(name) = nominee {
            check_name(name)?;
        }
        let current = self.coordinator_term;
        if let Some(term) = term
            && term < current
        {
            return Err(Refusal::StaleTerm { term, current });
        }
        let old_owner =
            self.owner.as_ref().map(|owner| owner.name.clone()).or_else(|| self.barred.clone());
        Ok(self.changed(Self {
            epoch: self.epoch.next(),
            phase: if nominee.is_some() { Phase::Owned } else { Phase::Free },
            owner: nominee.map(|name| Owner { name: name.to_owned(), session: SessionId(0) }),
            barred: old_owner.filter(|name| Some(name.as_str()) != nominee),
            coordinator_term: term.unwrap_or(current),
            ..self.clone()
        }))
    }

    fn holds(&self, session: SessionId, epoch: Epoch) -> Result<(), Refusal> {
        let current = self.owner.as_ref().map(|owner| owner.session);
        if epoch == self.epoch && session.0 != 0 && current == Some(session) {
            Ok(())
        } else {
            Err(Refusal::StaleEpoch { current: self.epoch })
        }
    }

    fn changed(&self, record: Self) -> Step {
        Step { record: Self { version: self.version + 1, ..record }, changed: true }
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > OWNER_BYTES_MAX { Err(Refusal::BadName) } else { Ok(()) }
}

/// Format of the stored bytes; see `docs/on-disk.md`.
const FORMAT: u8 = 1;
const FIXED_BYTES: usize = 48;

/// Why stored bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored access record is damaged or of a newer format")]
pub struct RecordError;

impl AccessRecord {
    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let name_len =
            |name: Option<&str>| u16::try_from(name.map_or(0, str::len)).unwrap_or(u16::MAX);
        let owner = self.owner.as_ref().map(|owner| owner.name.as_str());
        let barred = self.barred.as_deref();
        let mut b = Vec::with_capacity(FIXED_BYTES + 64);
        b.extend_from_slice(&[FORMAT, self.phase as u8, 0, 0]);
        b.extend_from_slice(&name_len(owner).to_le_bytes());
        b.extend_from_slice(&name_len(barred).to_le_bytes());
        for number in [
            self.volume.0,
            self.version,
            self.epoch.0,
            self.coordinator_term,
            self.owner.as_ref().map_or(0, |owner| owner.session.0),
        ] {
            b.extend_from_slice(&number.to_le_bytes());
        }
        debug_assert_eq!(b.len(), FIXED_BYTES);
        b.extend_from_slice(owner.unwrap_or_default().as_bytes());
        b.extend_from_slice(barred.unwrap_or_default().as_bytes());
        b
    }

    /// Reads stored bytes.
    ///
    /// # Errors
    /// [`RecordError`] when they are not a record of this format.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let fixed = bytes.get(..FIXED_BYTES).ok_or(RecordError)?;
        let number = |at: usize| {
            fixed[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let len = |at: usize| usize::from(u16::from_le_bytes([fixed[at], fixed[at + 1]]));
        if fixed[0] != FORMAT || bytes.len() != FIXED_BYTES + len(4) + len(6) {
            return Err(RecordError);
        }
        let text = |from: usize, len: usize| -> Result<Option<String>, RecordError> {
            let bytes = bytes.get(from..from + len).ok_or(RecordError)?;
            let text = std::str::from_utf8(bytes).map_err(|_| RecordError)?;
            Ok((!text.is_empty()).then(|| text.to_owned()))
        };
        let name = text(FIXED_BYTES, len(4))?;
        let phase = match (fixed[1], &name) {
            (0, None) => Phase::Free,
            (1, Some(_)) => Phase::Owned,
            _ => return Err(RecordError),
        };
        Ok(Self {
            volume: VolumeId(number(8)),
            version: number(16),
            epoch: Epoch(number(24)),
            phase,
            owner: name.map(|name| Owner { name, session: SessionId(number(40)) }),
            barred: text(FIXED_BYTES + len(4), len(6))?,
            coordinator_term: number(32),
        })
    }
}

#[cfg(test)]
mod tests;
