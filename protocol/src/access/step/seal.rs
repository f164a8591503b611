//! The source has stopped, or says that it never did.

use crate::handoff::{Mode, Try};
use crate::units::SessionId;

use super::super::{AccessRecord, Phase, Refusal, Step, Store};

impl AccessRecord {
    pub(super) fn seal(&self, attempt: Try, session: SessionId) -> Result<Step, Refusal> {
        let handoff = self.handoff(attempt)?;
        self.is_source(session)?;
        match self.phase {
            Phase::Armed | Phase::Frozen if !handoff.seal_seen => {
                let mut next = self.clone();
                next.with_handoff(|handoff| handoff.seal_seen = true);
                Ok(self.to(next, Store::Never, false))
            }
            Phase::Armed | Phase::Frozen | Phase::Sealed => Ok(self.same()),
            _ => Err(Refusal::TooLate),
        }
    }

    pub(super) fn sealed(&self, attempt: Try, session: SessionId) -> Result<Step, Refusal> {
        let handoff = self.handoff(attempt)?;
        self.is_source(session)?;
        let mut next = self.clone();
        next.with_handoff(|handoff| handoff.sealed = true);
        match self.phase {
            Phase::Armed => {
                next.phase = Phase::Sealed;
                let store = match handoff.plan.mode {
                    Mode::Base => Store::First,
                    Mode::Fast => Store::Never,
                };
                Ok(self.to(next, store, false))
            }
            Phase::Frozen if !handoff.sealed => Ok(self.to(next, Store::Never, false)),
            Phase::Frozen | Phase::Sealed => Ok(self.same()),
            _ => Err(Refusal::TooLate),
        }
    }

    pub(super) fn unfreeze(
        &self,
        attempt: Try,
        session: SessionId,
        this_boot: bool,
    ) -> Result<Step, Refusal> {
        let handoff = self.handoff(attempt)?;
        self.is_source(session)?;
        match self.phase {
            Phase::Armed => Ok(self.same()),
            Phase::Frozen if this_boot && !handoff.seal_seen && !handoff.sealed => {
                let mut next = self.clone();
                next.phase = Phase::Armed;
                Ok(self.to(next, Store::Never, true))
            }
            Phase::Frozen | Phase::Sealed => Err(Refusal::CannotUnfreeze),
            _ => Err(Refusal::TooLate),
        }
    }
}
