//! What each input does to the record in each phase.
//!
//! | module | noun |
//! |---|---|
//! | `ownership` | claim, rejoin, release, fence |
//! | `plan` | arm, settle, disarm |
//! | `seal` | seal, sealed, unfreeze |
//! | `decision` | activate, reclaim, abdicate, open |

mod decision;
mod ownership;
mod plan;
mod seal;

use crate::handoff::{Decided, Handoff, Side, Try};
use crate::message::OWNER_BYTES_MAX;
use crate::units::{Epoch, SessionId};

use super::{AccessRecord, Input, Owner, Phase, Refusal, Step, Store};

impl AccessRecord {
    /// Judges an input. Pure: the caller persists and enforces.
    ///
    /// # Errors
    /// [`Refusal`] when the record stays as it is.
    pub fn step(&self, input: Input<'_>) -> Result<Step, Refusal> {
        match input {
            Input::Claim { name, session } => self.claim(name, session),
            Input::Rejoin { session, epoch } => {
                self.rejoins(session, epoch)?;
                Ok(self.same())
            }
            Input::Release { session, epoch } => self.release(session, epoch),
            Input::Fence { term, nominee, seen } => self.fence(term, nominee, seen),
            Input::Arm { plan, term, next_epoch, generation } => {
                self.arm(plan, term, next_epoch, generation)
            }
            Input::Seal { attempt, session } => self.seal(attempt, session),
            Input::Sealed { attempt, session } => self.sealed(attempt, session),
            Input::Activate { attempt, name, session } => self.activate(attempt, name, session),
            Input::Reclaim { attempt, by } => self.reclaim(attempt, by),
            Input::Abdicate { attempt, by } => self.abdicate(attempt, by),
            Input::Open { attempt, session, proof } => self.open(attempt, session, &proof),
            Input::Unfreeze { attempt, session, boot_id, boot_id_now } => {
                self.unfreeze(attempt, session, boot_id == boot_id_now)
            }
            Input::Settle { attempt, term, proof } => self.settle(attempt, term, proof),
            Input::Disarm { attempt, term } => self.disarm(attempt, term),
        }
    }

    /// The handoff `attempt` ended here and this is how.
    fn over(&self, attempt: Try) -> Option<Side> {
        let decided = self.decided.as_ref().filter(|decided| decided.attempt == attempt)?;
        Some(decided.winner)
    }

    fn handoff(&self, attempt: Try) -> Result<&Handoff, Refusal> {
        let handoff = self.handoff.as_ref().filter(|handoff| handoff.plan.attempt == attempt);
        handoff.ok_or(Refusal::NoSuchHandoff(attempt))
    }

    fn anchored(&self, attempt: Try) -> Result<&Handoff, Refusal> {
        let handoff = self.handoff(attempt)?;
        if handoff.plan.anchor == self.volume {
            Ok(handoff)
        } else {
            Err(Refusal::NotAnchor { anchor: handoff.plan.anchor })
        }
    }

    fn is_source(&self, session: SessionId) -> Result<(), Refusal> {
        let owner = self.owner.as_ref().map(|owner| owner.session);
        if session.0 != 0 && owner == Some(session) { Ok(()) } else { Err(Refusal::NotNominated) }
    }

    fn grant(&mut self, phase: Phase, epoch: Epoch, owner: Owner) {
        self.phase = phase;
        self.epoch = epoch;
        self.owner = Some(owner);
        self.with_handoff(|handoff| handoff.grant = epoch.0);
    }

    /// The handoff is over; its outcome is kept.
    fn retire(&mut self) {
        let Some(handoff) = self.handoff.take() else { return };
        let winner = match self.phase {
            Phase::Active => Side::Destination,
            _ => Side::Source,
        };
        self.decided = Some(Decided {
            attempt: handoff.plan.attempt,
            winner,
            grant: handoff.grant,
            anchor: handoff.plan.anchor == self.volume,
            key: handoff.plan.key,
        });
    }

    fn renumber(&mut self) {
        let (e_to, e_back) = (self.fresh(), self.fresh());
        self.with_handoff(|handoff| (handoff.e_to, handoff.e_back) = (e_to, e_back));
    }

    fn with_handoff(&mut self, change: impl FnOnce(&mut Handoff)) {
        if let Some(handoff) = &mut self.handoff {
            change(handoff);
        }
    }

    /// A number that nobody had.
    fn fresh(&mut self) -> Epoch {
        let epoch = self.next_epoch;
        self.next_epoch = epoch.next();
        epoch
    }

    fn take_term(&mut self, term: u64) -> Result<(), Refusal> {
        let current = self.coordinator_term;
        if term < current {
            return Err(Refusal::StaleTerm { term, current });
        }
        self.coordinator_term = term;
        Ok(())
    }

    fn same(&self) -> Step {
        Step { record: self.clone(), changed: false, store: Store::Never, reopen: false }
    }

    fn to(&self, mut record: Self, store: Store, reopen: bool) -> Step {
        if record == *self {
            return self.same();
        }
        record.version = self.version + 1;
        // An older coordinator must be refused after a restart too.
        let newer = record.coordinator_term != self.coordinator_term;
        let store = if newer { Store::First } else { store };
        Step { record, changed: true, store, reopen }
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > OWNER_BYTES_MAX { Err(Refusal::BadName) } else { Ok(()) }
}
