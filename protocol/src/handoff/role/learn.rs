//! What a fact changes in what the machine knows.

use super::{Ask, Asked, Input, Kind, Order, Parked, Role};
use crate::access::{AccessRecord, Phase};
use crate::handoff::message::{Answer, Outcome};
use crate::handoff::{Side, Try};
use crate::units::Epoch;

impl Role {
    pub(super) fn learn(&mut self, input: Input) {
        match input {
            Input::View { member, boot_id, record } => self.see(member, boot_id, *record),
            Input::Claimed { member, epoch } => {
                let heard = self.heard(member);
                if let Some(member) = self.members.get_mut(member)
                    && self.parked.is_none()
                {
                    member.granted = Some(epoch);
                    member.heard_at_grant = heard;
                    member.held = false;
                }
            }
            Input::Started { member: at } => {
                let Some(member) = self.members.get_mut(at) else { return };
                member.running = true;
                member.ran = true;
                member.stopped = false;
                self.seal_ordered = false;
            }
            Input::Stopped { member, migrating } => {
                let Some(member) = self.members.get_mut(member) else { return };
                member.running = false;
                member.stopped = migrating || self.seal_ordered;
            }
            Input::Answered { member, attempt, ask, answer } => {
                self.answered(member, attempt, ask, *answer);
            }
            Input::Opened { member, epoch } => self.opened(member, epoch),
            Input::Stuck { member } => {
                let sealed = self.members.get(member).is_some_and(|m| m.seal_sent.is_some());
                self.wants_back |= sealed && self.is_held(member);
            }
            Input::Order(order) => self.ordered(order),
        }
    }

    fn ordered(&mut self, order: Order) {
        match order {
            Order::Seal => {
                self.seal_ordered = true;
                // A process whose machine never came cannot speak for the one before
                // it, which may have died with requests of the guest in flight. A
                // disk that the guest never used has none.
                let came = self.members.iter().any(|member| member.ran);
                for member in &mut self.members {
                    member.stopped |= came && !member.running;
                }
            }
            Order::Activate => self.ordered = true,
            Order::Abdicate => {
                if let Some(focus) = self.focus
                    && focus.side == Side::Destination
                    && self.activate_sent != Some(focus.attempt)
                {
                    self.abdicated = Some(focus.attempt);
                }
            }
            Order::Reclaim => {
                let focus = self.focus.or(self.last);
                self.wants_back |= focus.is_some_and(|focus| focus.side == Side::Source);
            }
        }
    }

    fn see(&mut self, at: usize, boot_id: u64, record: AccessRecord) {
        let Some(member) = self.members.get_mut(at) else { return };
        if record.volume != member.volume {
            return;
        }
        // Answers and pushes of one incarnation, out of order.
        let known = self.views[at].as_ref().map(|view| (view.boot_id, view.record.version));
        if known.is_some_and(|(boot, version)| boot == boot_id && record.version < version) {
            return;
        }
        if let Some(handoff) = &record.handoff {
            let anchor = handoff.plan.anchor == record.volume;
            if record.phase == Phase::Armed || (anchor && record.phase == Phase::Sealed) {
                self.witnessed = Some(handoff.plan.attempt);
            }
            let sealed = match record.phase {
                Phase::Sealed | Phase::Active => true,
                Phase::Frozen => handoff.sealed,
                _ => false,
            };
            let numbered = (handoff.plan.attempt, handoff.e_to);
            if sealed {
                member.sealed = Some(numbered);
            } else if member.sealed.is_some_and(|seen| seen != numbered) {
                // Another try, or the source was replaced before it sealed.
                member.sealed = None;
            }
        }
        self.views[at] = Some(self.view(boot_id, record));
        self.focus = self.find_focus();
    }

    fn answered(&mut self, at: usize, attempt: Try, ask: Asked, answer: Answer) {
        let Answer { outcome, boot_id, proof, record } = answer;
        if at >= self.members.len() {
            return;
        }
        // An answer about another incarnation than is there now settles nothing.
        let misdirected = matches!(ask, Asked::Unfreeze { boot_id: meant } if meant != boot_id);
        let stamp = (!misdirected).then_some((attempt, boot_id, record.version));
        let owned = record.owner.as_ref().is_some_and(|owner| owner.session == self.session);
        let epoch = record.epoch;
        let winner = record.winner(attempt);
        self.see(at, boot_id, record);
        self.members[at].asks[Kind::from(ask) as usize] =
            Ask { outstanding: None, answered_at: stamp };
        match (ask, outcome) {
            (Asked::Activate | Asked::Reclaim, Outcome::Granted) => {
                let side = if ask == Asked::Activate { Side::Destination } else { Side::Source };
                if let Some(proof) = proof
                    && winner == Some(side)
                    && owned
                {
                    self.won = Some((attempt, proof));
                    self.wants_back = false;
                    self.go(at, epoch);
                }
            }
            (Asked::Activate | Asked::Reclaim, Outcome::Lost) => self.park(Parked::Lost),
            (Asked::Activate | Asked::Reclaim, Outcome::NoSuchHandoff | Outcome::NotNominated)
                if !owned =>
            {
                self.park(Parked::Over)
            }
            (Asked::Abdicate, Outcome::Granted) if self.abdicated == Some(attempt) => {
                self.park(Parked::Abdicated);
            }
            // It can never be reached any more: finish as the owner.
            (Asked::Seal, Outcome::NotSealed) => {
                self.wants_back |= self.members[at].seal_sent == Some(attempt);
            }
            _ => {}
        }
    }

    fn opened(&mut self, at: usize, epoch: Option<Epoch>) {
        let Some(member) = self.members.get_mut(at) else { return };
        let heard = self.views[at].as_ref().map(|view| (view.boot_id, view.record.version));
        let ask = &mut member.asks[Kind::Open as usize];
        let asked = ask.outstanding.zip(heard);
        let answered_at = asked.map(|(attempt, (boot, version))| (attempt, boot, version));
        *ask = Ask { outstanding: None, answered_at };
        if let Some(epoch) = epoch
            && self.won.is_some()
        {
            self.go(at, epoch);
            self.members[at].heard_at_grant = heard;
        }
    }
}
