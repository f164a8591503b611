//! Who wins a handoff, and how the members hear of it.

use crate::handoff::{Decided, Key, Mode, Proof, Side, Try};
use crate::units::SessionId;

use super::super::{AccessRecord, By, Owner, Phase, Refusal, Step, Store};

impl AccessRecord {
    pub(super) fn activate(
        &self,
        attempt: Try,
        name: &str,
        session: SessionId,
    ) -> Result<Step, Refusal> {
        if session.0 == 0 {
            return Err(Refusal::NotNominated);
        }
        if let Some(winner) = self.over(attempt) {
            return self.repeated(winner == Side::Destination, name, session);
        }
        let handoff = self.anchored(attempt)?;
        if handoff.plan.to != name {
            return Err(Refusal::NotNominated);
        }
        let mut next = self.clone();
        let owner = Owner { name: name.to_owned(), session };
        match self.phase {
            Phase::Armed => Err(Refusal::NotSealed),
            Phase::Sealed | Phase::Frozen if handoff.abdicated => {
                Err(Refusal::Lost { owner: handoff.plan.from.clone() })
            }
            Phase::Sealed => {
                next.grant(Phase::Active, handoff.e_to, owner);
                let store = match handoff.plan.mode {
                    Mode::Base => Store::First,
                    Mode::Fast => Store::Later,
                };
                Ok(self.to(next, store, true))
            }
            // An earlier grant may have been lost with the server's memory, to
            // whatever incarnation: this one gets a number that nobody had.
            Phase::Frozen => {
                let epoch = next.fresh();
                next.grant(Phase::Active, epoch, owner);
                Ok(self.to(next, Store::First, true))
            }
            Phase::Active => self.another_incarnation(owner),
            _ => Err(self.lost()),
        }
    }

    pub(super) fn reclaim(&self, attempt: Try, by: By<'_>) -> Result<Step, Refusal> {
        let mut next = self.clone();
        let session = match by {
            By::Coordinator { term } => {
                next.take_term(term)?;
                self.owner.as_ref().map_or(SessionId(0), |owner| owner.session)
            }
            By::Backend { session, .. } => session,
        };
        if let Some(winner) = self.over(attempt) {
            let name = match by {
                By::Backend { name, .. } => name,
                By::Coordinator { .. } => self.owner.as_ref().map_or("", |owner| &owner.name),
            };
            return self.repeated(winner == Side::Source, name, session);
        }
        let handoff = self.anchored(attempt)?;
        if let By::Backend { name, session } = by
            && (handoff.plan.from != name || session.0 == 0)
        {
            return Err(Refusal::NotNominated);
        }
        let owner = Owner { name: handoff.plan.from.clone(), session };
        let same_session = self.owner.as_ref() == Some(&owner);
        match self.phase {
            // It never stopped: it keeps its epoch, and nothing is interrupted.
            Phase::Armed if same_session => {
                next.grant(Phase::Reclaimed, self.epoch, owner);
                Ok(self.to(next, Store::First, false))
            }
            Phase::Armed | Phase::Sealed => {
                next.grant(Phase::Reclaimed, handoff.e_back, owner);
                Ok(self.to(next, Store::First, true))
            }
            // Abdicated before the restart: nobody can have activated.
            Phase::Frozen if handoff.abdicated => {
                let epoch = next.fresh();
                next.grant(Phase::Reclaimed, epoch, owner);
                Ok(self.to(next, Store::First, true))
            }
            Phase::Frozen if handoff.wanted_back => Err(Refusal::UnknownFrozen),
            // Granted, but not yet won: the destination learns that it is asked.
            Phase::Frozen => {
                next.with_handoff(|handoff| handoff.wanted_back = true);
                Ok(self.to(next, Store::Never, false))
            }
            Phase::Reclaimed => self.another_incarnation(owner),
            _ => Err(self.lost()),
        }
    }

    pub(super) fn abdicate(&self, attempt: Try, by: By<'_>) -> Result<Step, Refusal> {
        let mut next = self.clone();
        if let By::Coordinator { term } = by {
            next.take_term(term)?;
        }
        if let Some(winner) = self.over(attempt) {
            return if winner == Side::Source { Ok(self.same()) } else { Err(Refusal::TooLate) };
        }
        let handoff = self.anchored(attempt)?;
        if let By::Backend { name, .. } = by
            && handoff.plan.to != name
        {
            return Err(Refusal::NotNominated);
        }
        match (self.phase, by) {
            // That the destination is dead now does not say that it had not
            // activated before the restart.
            (Phase::Frozen, By::Coordinator { .. }) if !handoff.abdicated => {
                return Err(Refusal::UnknownFrozen);
            }
            _ => {}
        }
        match self.phase {
            Phase::Active => Err(Refusal::TooLate),
            Phase::Reclaimed => Ok(self.same()),
            _ if handoff.abdicated => Ok(self.same()),
            Phase::Frozen => {
                // Nobody can activate any more, so it does not matter whether the
                // source had sealed: it may reclaim.
                next.phase = Phase::Sealed;
                next.with_handoff(|handoff| handoff.abdicated = true);
                Ok(self.to(next, Store::First, false))
            }
            _ => {
                next.with_handoff(|handoff| handoff.abdicated = true);
                // A seal that was in memory becomes durable with it.
                Ok(self.to(next, Store::First, false))
            }
        }
    }

    pub(super) fn open(
        &self,
        attempt: Try,
        session: SessionId,
        proof: &Proof,
    ) -> Result<Step, Refusal> {
        if let Some(decided) = self.decided.as_ref().filter(|d| d.attempt == attempt) {
            return self.open_settled(decided, session, proof);
        }
        let handoff = self.handoff(attempt)?;
        if session.0 == 0 || !proof.holds(&handoff.plan.key, attempt, session) {
            return Err(Refusal::BadProof);
        }
        let (phase, name, reserved) = match proof.side {
            Side::Source => (Phase::Reclaimed, &handoff.plan.from, handoff.e_back),
            Side::Destination => (Phase::Active, &handoff.plan.to, handoff.e_to),
        };
        let owner = Owner { name: name.clone(), session };
        let same_session = self.owner.as_ref() == Some(&owner);
        let mut next = self.clone();
        match self.phase {
            // The source that comes back before this member was sealed.
            Phase::Armed if same_session => {
                next.grant(phase, self.epoch, owner);
                next.with_handoff(|handoff| handoff.grant = proof.grant);
                Ok(self.to(next, Store::Later, false))
            }
            // Forgotten, the server would let in the session that was replaced.
            Phase::Armed => {
                next.grant(phase, reserved, owner);
                next.with_handoff(|handoff| handoff.grant = proof.grant);
                Ok(self.to(next, Store::First, true))
            }
            Phase::Sealed => {
                next.grant(phase, reserved, owner);
                next.with_handoff(|handoff| handoff.grant = proof.grant);
                // Forgotten, in base mode the next incarnation would be granted
                // the same number; in fast mode a frozen member takes a new one.
                let store = match handoff.plan.mode {
                    Mode::Base => Store::First,
                    Mode::Fast => Store::Later,
                };
                Ok(self.to(next, store, true))
            }
            Phase::Frozen => {
                let epoch = next.fresh();
                next.grant(phase, epoch, owner);
                next.with_handoff(|handoff| handoff.grant = proof.grant);
                Ok(self.to(next, Store::First, true))
            }
            now if now != phase || proof.grant < handoff.grant => Err(Refusal::BadProof),
            _ if same_session && proof.grant == handoff.grant => Ok(self.same()),
            // The same grant for two sessions is none that an anchor made.
            _ if proof.grant == handoff.grant => Err(Refusal::BadProof),
            _ => {
                // A later incarnation of the winner.
                if !same_session {
                    next.epoch = next.fresh();
                }
                next.owner = Some(owner);
                next.with_handoff(|handoff| handoff.grant = proof.grant);
                Ok(self.to(next, Store::First, !same_session))
            }
        }
    }

    /// An OPEN after the handoff is over here: the winner again, or its next
    /// incarnation.
    fn open_settled(
        &self,
        decided: &Decided,
        session: SessionId,
        proof: &Proof,
    ) -> Result<Step, Refusal> {
        let good = session.0 != 0
            && decided.key != Key::default()
            && proof.side == decided.winner
            && proof.holds(&decided.key, decided.attempt, session);
        let Some(owner) = self.owner.as_ref().filter(|_| good) else {
            return Err(Refusal::BadProof);
        };
        if owner.session == session {
            return Ok(self.same());
        }
        if proof.grant <= decided.grant {
            return Err(Refusal::BadProof);
        }
        let mut next = self.clone();
        next.epoch = next.fresh();
        next.owner = Some(Owner { name: owner.name.clone(), session });
        next.decided = Some(Decided { grant: proof.grant, ..decided.clone() });
        Ok(self.to(next, Store::First, true))
    }

    fn lost(&self) -> Refusal {
        let owner = self.owner.as_ref().map_or_else(|| "nobody".to_owned(), |o| o.name.clone());
        Refusal::Lost { owner }
    }

    /// A message of a handoff that is over comes again.
    fn repeated(&self, won: bool, name: &str, session: SessionId) -> Result<Step, Refusal> {
        let owner = self.owner.as_ref().filter(|owner| won && owner.name == name);
        match owner {
            None => Err(self.lost()),
            Some(owner) if owner.session == session => Ok(self.same()),
            // The winner's next incarnation may take over where it was decided,
            // just as it may claim the volume.
            Some(_) if self.decided.as_ref().is_some_and(|decided| decided.anchor) => {
                self.claim(name, session)
            }
            Some(_) => Err(self.lost()),
        }
    }

    /// The winner asks again, as the same process or as the one after it.
    fn another_incarnation(&self, owner: Owner) -> Result<Step, Refusal> {
        if self.owner.as_ref() == Some(&owner) {
            return Ok(self.same());
        }
        let mut next = self.clone();
        let epoch = next.fresh();
        next.grant(self.phase, epoch, owner);
        Ok(self.to(next, Store::First, true))
    }
}
