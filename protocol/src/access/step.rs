//! What each input does to the record in each phase.

use crate::handoff::{
    Decided, Handoff, HandoffId, Key, Mode, Plan, Proof, Side, Try, VM_BYTES_MAX,
};
use crate::message::OWNER_BYTES_MAX;
use crate::units::{Epoch, SessionId};

use super::{AccessRecord, By, Input, Owner, Phase, Refusal, Step, Store};

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
            Input::Fence { term, nominee } => self.fence(term, nominee),
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
        }
    }

    fn claim(&self, name: &str, session: SessionId) -> Result<Step, Refusal> {
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
    fn rejoins(&self, session: SessionId, epoch: Epoch) -> Result<(), Refusal> {
        let current = self.owner.as_ref().map(|owner| owner.session);
        let mine = session.0 != 0 && current == Some(session);
        if mine && epoch.0 != 0 && epoch <= self.epoch {
            Ok(())
        } else {
            Err(Refusal::StaleEpoch { current: self.epoch })
        }
    }

    fn release(&self, session: SessionId, epoch: Epoch) -> Result<Step, Refusal> {
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

    fn fence(&self, term: Option<u64>, nominee: Option<&str>) -> Result<Step, Refusal> {
        if let Some(name) = nominee {
            check_name(name)?;
        }
        let mut next = self.clone();
        if let Some(term) = term {
            next.take_term(term)?;
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

    fn arm(
        &self,
        plan: &Plan,
        term: u64,
        planned: Epoch,
        generation: u64,
    ) -> Result<Step, Refusal> {
        check_plan(plan)?;
        let mut next = self.clone();
        next.take_term(term)?;
        if let Some(handoff) = &self.handoff {
            return if handoff.plan == *plan && matches!(self.phase, Phase::Armed) {
                // The same request again; the term may be a new coordinator's.
                Ok(self.to(next, Store::First, false))
            } else {
                Err(Refusal::HandoffInProgress(handoff.plan.attempt))
            };
        }
        if let Some(decided) = &self.decided
            && decided.attempt.id == plan.attempt.id
            && decided.attempt.attempt >= plan.attempt.attempt
        {
            return Err(Refusal::NoSuchHandoff(plan.attempt));
        }
        let owner = self.owner.as_ref().filter(|owner| owner.session.0 != 0);
        match owner {
            Some(owner) if owner.name == plan.from => {}
            Some(owner) => {
                return Err(Refusal::NotOwner { owner: owner.name.clone(), epoch: self.epoch });
            }
            None => return Err(Refusal::NotOwner { owner: "nobody".into(), epoch: self.epoch }),
        }
        // The epoch would not do: a source that never stopped keeps it, and the
        // record remembers only its last handoff.
        if planned != self.next_epoch {
            return Err(Refusal::StalePlan {
                planned,
                current: self.next_epoch,
                owner: plan.from.clone(),
            });
        }
        let (e_to, e_back) = (next.fresh(), next.fresh());
        next.phase = Phase::Armed;
        next.decided = None;
        next.handoff = Some(Handoff {
            plan: plan.clone(),
            e_to,
            e_back,
            generation,
            sealed: false,
            seal_seen: false,
            abdicated: false,
            wanted_back: false,
            grant: 0,
        });
        Ok(self.to(next, Store::First, false))
    }

    fn seal(&self, attempt: Try, session: SessionId) -> Result<Step, Refusal> {
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

    fn sealed(&self, attempt: Try, session: SessionId) -> Result<Step, Refusal> {
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

    fn activate(&self, attempt: Try, name: &str, session: SessionId) -> Result<Step, Refusal> {
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

    fn reclaim(&self, attempt: Try, by: By<'_>) -> Result<Step, Refusal> {
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

    fn abdicate(&self, attempt: Try, by: By<'_>) -> Result<Step, Refusal> {
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

    fn open(&self, attempt: Try, session: SessionId, proof: &Proof) -> Result<Step, Refusal> {
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

    fn unfreeze(&self, attempt: Try, session: SessionId, this_boot: bool) -> Result<Step, Refusal> {
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

    fn settle(
        &self,
        attempt: Try,
        term: u64,
        proof: Option<(SessionId, Proof)>,
    ) -> Result<Step, Refusal> {
        let mut next = self.clone();
        next.take_term(term)?;
        if self.over(attempt).is_some() {
            return Ok(self.same());
        }
        self.handoff(attempt)?;
        let mut reopen = false;
        if !matches!(self.phase, Phase::Active | Phase::Reclaimed) {
            let (session, proof) = proof.ok_or(Refusal::Undecided)?;
            let owner = self.owner.clone().ok_or(Refusal::BadProof)?;
            if proof.side == Side::Source && owner.session != session {
                reopen = self.phase != Phase::Armed;
                next.come_back(attempt, session, owner, &proof)?;
            } else {
                let opened = next.open(attempt, session, &proof)?;
                next = opened.record;
                reopen = opened.reopen;
            }
        }
        next.retire();
        next.phase = Phase::Owned;
        Ok(self.to(next, Store::First, reopen))
    }

    /// The source won, as an incarnation that is not the owner here. Which of
    /// the two is the later one the coordinator's proof does not say, so the
    /// owner stays and gives way to whoever shows a proof of its own.
    fn come_back(
        &mut self,
        attempt: Try,
        session: SessionId,
        owner: Owner,
        proof: &Proof,
    ) -> Result<(), Refusal> {
        let handoff = self.handoff(attempt)?;
        if !proof.holds(&handoff.plan.key, attempt, session) {
            return Err(Refusal::BadProof);
        }
        let epoch = match self.phase {
            Phase::Armed => self.epoch,
            Phase::Sealed => handoff.e_back,
            _ => self.fresh(),
        };
        self.grant(Phase::Reclaimed, epoch, owner);
        self.with_handoff(|handoff| handoff.grant = 0);
        Ok(())
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

fn check_plan(plan: &Plan) -> Result<(), Refusal> {
    check_name(&plan.from)?;
    check_name(&plan.to)?;
    let wrong = |why| Err(Refusal::BadPlan(why));
    if plan.from == plan.to {
        return wrong("source and destination have the same owner name");
    }
    if plan.vm.is_empty() || plan.vm.len() > VM_BYTES_MAX {
        return wrong("a VM's name must have 1 to 255 bytes");
    }
    if plan.members.count == 0 || plan.anchor.0 == 0 {
        return wrong("it names no volume");
    }
    if plan.attempt.attempt == 0 || plan.attempt.id == HandoffId(0) {
        return wrong("it has no id or no attempt");
    }
    if plan.key == Key::default() {
        return wrong("it has no key");
    }
    Ok(())
}
