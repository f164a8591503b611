//! A handoff begins and is over.

use crate::handoff::{Handoff, HandoffId, Key, Plan, Proof, Side, Try, VM_BYTES_MAX};
use crate::units::{Epoch, SessionId};

use super::super::{AccessRecord, Owner, Phase, Refusal, Step, Store};
use super::check_name;

impl AccessRecord {
    pub(super) fn arm(
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

    pub(super) fn settle(
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

    /// The handoff ends here without a decision. The destination activates only
    /// when it has seen every member sealed, and what was sealed is never armed
    /// again: so while this is armed it has not won, and once it is disarmed it
    /// cannot. A late ARM is a stale plan, a late proof is of no handoff.
    pub(super) fn disarm(&self, attempt: Try, term: u64) -> Result<Step, Refusal> {
        let mut next = self.clone();
        next.take_term(term)?;
        let handoff = self.handoff(attempt)?;
        if handoff.plan.anchor == self.volume {
            return Err(Refusal::CannotDisarm("its handoff is decided here; reclaim it"));
        }
        match self.phase {
            Phase::Armed => {}
            Phase::Active | Phase::Reclaimed => return Err(Refusal::TooLate),
            Phase::Free | Phase::Owned | Phase::Sealed | Phase::Frozen => {
                return Err(Refusal::CannotDisarm(
                    "its source may have sealed it, and the destination may have won",
                ));
            }
        }
        // No outcome is kept: there was none.
        next.handoff = None;
        next.phase = Phase::Owned;
        // The owner keeps its epoch, so nothing is interrupted.
        Ok(self.to(next, Store::First, false))
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
