//! Who owns the volume outside of handoffs: claimed, given back, taken away.

use crate::handoff::Key;
use crate::units::{Epoch, SessionId};

use super::super::{AccessRecord, Owner, Phase, Refusal, Seen, Step, Store};
use super::check_name;

impl AccessRecord {
    pub(super) fn claim(&self, name: &str, session: SessionId) -> Result<Step, Refusal> {
        check_name(name)?;
        if self.barred.as_deref() == Some(name) {
            return Err(Refusal::Barred { name: name.to_owned(), epoch: self.epoch });
        }
        let undecided = matches!(self.phase, Phase::Sealed | Phase::Frozen);
        if let (true, Some(handoff)) = (undecided, &self.handoff)
            && [&handoff.plan.from, &handoff.plan.to].iter().any(|side| *side == name)
        {
            return Err(Refusal::InHandoff(handoff.plan.attempt));
        }
        if let Some(owner) = &self.owner {
            if owner.name != name {
                // The destination of a handoff that has not begun stands by.
                if let (Phase::Armed, Some(handoff)) = (self.phase, &self.handoff)
                    && handoff.plan.to == name
                {
                    return Err(Refusal::InHandoff(handoff.plan.attempt));
                }
                return Err(Refusal::NotOwner { owner: owner.name.clone(), epoch: self.epoch });
            }
            // The same process asks again: it lost our answer.
            if owner.session == session {
                return Ok(self.same());
            }
        }
        let mut next = self.clone();
        next.epoch = next.fresh();
        next.owner = Some(Owner { name: name.to_owned(), session });
        next.barred = None;
        match self.phase {
            // The numbers that were reserved are lower than the new epoch.
            Phase::Armed => next.renumber(),
            Phase::Active | Phase::Reclaimed => {
                // The anchor numbers the winner's incarnations; the others follow.
                let (volume, grant) = (self.volume, next.epoch.0);
                next.with_handoff(|handoff| {
                    if handoff.plan.anchor == volume {
                        handoff.grant = grant;
                    }
                });
            }
            Phase::Free => {
                next.phase = Phase::Owned;
                // Whoever won it gave it back: the outcome stays, so that the
                // try is not armed again, but opens nothing any more.
                if let Some(decided) = &mut next.decided {
                    (decided.anchor, decided.key) = (false, Key::default());
                }
            }
            Phase::Owned | Phase::Sealed | Phase::Frozen => {
                next.phase = Phase::Owned;
                let grant = next.epoch.0;
                if let Some(decided) = next.decided.as_mut().filter(|decided| decided.anchor) {
                    decided.grant = grant;
                }
            }
        }
        Ok(self.to(next, Store::First, true))
    }

    /// The session that owns the volume, whatever epoch it remembers: each of
    /// its epochs was its own.
    pub(super) fn rejoins(&self, session: SessionId, epoch: Epoch) -> Result<(), Refusal> {
        let current = self.owner.as_ref().map(|owner| owner.session);
        let mine = session.0 != 0 && current == Some(session);
        if mine && epoch.0 != 0 && epoch <= self.epoch {
            Ok(())
        } else {
            Err(Refusal::StaleEpoch { current: self.epoch })
        }
    }

    pub(super) fn release(&self, session: SessionId, epoch: Epoch) -> Result<Step, Refusal> {
        let undecided = matches!(self.phase, Phase::Sealed | Phase::Frozen);
        if undecided || epoch != self.epoch {
            return Err(Refusal::StaleEpoch { current: self.epoch });
        }
        self.rejoins(session, epoch)?;
        let mut next = self.clone();
        next.retire();
        next.phase = Phase::Free;
        next.owner = None;
        Ok(self.to(next, Store::First, true))
    }

    pub(super) fn fence(
        &self,
        term: Option<u64>,
        nominee: Option<&str>,
        seen: Option<Seen<'_>>,
    ) -> Result<Step, Refusal> {
        if let Some(name) = nominee {
            check_name(name)?;
        }
        let mut next = self.clone();
        if let Some(term) = term {
            next.take_term(term)?;
        }
        let owner = self.owner.as_ref().map(|owner| owner.name.as_str());
        // Not the epoch: an activation takes a number that was given out before.
        if seen.is_some_and(|seen| (seen.owner, seen.next_epoch) != (owner, self.next_epoch)) {
            let owner = owner.unwrap_or("nobody").to_owned();
            return Err(Refusal::StaleFence { owner, epoch: self.epoch });
        }
        let old_owner =
            self.owner.as_ref().map(|owner| owner.name.clone()).or_else(|| self.barred.clone());
        next.epoch = next.fresh();
        next.phase = if nominee.is_some() { Phase::Owned } else { Phase::Free };
        next.owner = nominee.map(|name| Owner { name: name.to_owned(), session: SessionId(0) });
        next.barred = old_owner.filter(|name| Some(name.as_str()) != nominee);
        // Whatever was decided or not: neither side has the volume any more.
        next.handoff = None;
        next.decided = None;
        Ok(self.to(next, Store::First, true))
    }
}
