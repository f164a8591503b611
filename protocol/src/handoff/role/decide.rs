//! What is to be asked and done, from what the machine knows.

use super::{Asked, Focus, Kind, Member, Output, Parked, Role};
use crate::access::Phase;
use crate::handoff::Side;

impl Role {
    pub(super) fn decide(&mut self) {
        let focus = self.focus;
        self.bind(focus);
        self.look_for_losses(focus);
        if self.parked.is_some() {
            return;
        }
        let rings_run = self.members.iter().any(|member| member.running);
        for at in 0..self.members.len() {
            self.follow(at);
            self.decide_source(at, rings_run);
        }
        self.last = focus.or(self.last);
        if let Some(focus) = self.last
            && let Some(anchor) = focus.anchor
        {
            match focus.side {
                Side::Source => self.decide_reclaim(focus, anchor),
                Side::Destination => self.decide_destination(focus, anchor),
            }
        }
        self.decide_open();
    }

    /// A destination is good for one try only. A VMM that was given up in an
    /// earlier one may still start its rings, with memory that is out of date.
    fn bind(&mut self, focus: Option<Focus>) {
        let Some(focus) = focus else { return };
        if focus.side == Side::Destination {
            match self.bound {
                None => self.bound = Some(focus.attempt),
                Some(bound) if bound != focus.attempt => self.park(Parked::OtherTry),
                Some(_) => {}
            }
        } else if self.bound.is_some_and(|bound| bound != focus.attempt) && !self.had_any() {
            // It hung until its host is the source of another handoff, and may not
            // even have heard of its own try: the owner there is not this process,
            // and its machine never began. Or its host has won, and the process that
            // had the volumes died under the machine before anybody saw that it had.
            self.park(Parked::OtherTry);
        }
    }

    /// This process has had a volume.
    pub(super) fn had_any(&self) -> bool {
        self.members.iter().any(|member| member.granted.is_some())
    }

    fn look_for_losses(&mut self, focus: Option<Focus>) {
        let attempt = self.bound.or(focus.map(|focus| focus.attempt));
        for at in 0..self.members.len() {
            let Some(view) = &self.views[at] else { continue };
            let record = &view.record;
            let mine = record.owner.as_ref().is_some_and(|o| o.session == self.session);
            let decided = match record.phase {
                Phase::Sealed | Phase::Frozen => false,
                // The source is the owner: another incarnation of this one.
                Phase::Armed => view.side == Some(Side::Source),
                _ => true,
            };
            // It was ours and is somebody else's.
            let member = &self.members[at];
            // Epochs only grow: whatever the phase, and even if it is this host's
            // turn again, another process has had the volume since. This one hung
            // all the while, and its machine's memory is out of date.
            let superseded = member.granted.is_some_and(|granted| record.epoch > granted);
            if superseded && !mine {
                return self.park(Parked::Lost);
            }
            let older = member.asks[Kind::Open as usize].outstanding.is_some()
                || (member.heard_at_grant.is_some() && member.heard_at_grant == self.heard(at));
            if decided && !mine && member.granted.is_some() && !older {
                return self.park(Parked::Lost);
            }
            let winner = attempt.and_then(|attempt| record.winner(attempt));
            let side = if attempt == self.bound { Side::Destination } else { Side::Source };
            if winner.is_some_and(|winner| winner != side) {
                return self.park(Parked::Lost);
            }
        }
    }

    /// The storage says that a volume this process had is its own still, under a
    /// later epoch or after its seal: a coordinator has settled it. Or it was held
    /// for a seal that did not come, since its rings run again.
    fn follow(&mut self, at: usize) {
        let Some(view) = &self.views[at] else { return };
        let record = &view.record;
        let mine = record.owner.as_ref().is_some_and(|owner| owner.session == self.session);
        let (Some(epoch), Some(granted)) = (record.admits().owner, self.members[at].granted) else {
            return;
        };
        let settled = matches!(record.phase, Phase::Owned | Phase::Reclaimed | Phase::Active);
        let Member { held, running, .. } = self.members[at];
        let attempt = record.handoff.as_ref().map(|handoff| handoff.plan.attempt);
        let unsealed = running && self.members[at].seal_sent != attempt;
        if mine && ((held && (settled || unsealed)) || (!held && epoch > granted)) {
            self.go(at, epoch);
        }
    }

    /// Seal, or say that there was none. A seal leaves when no ring of the VM runs any more, for all volumes at once:
    /// before that it would end nothing, and a guest that resets one of its disks goes on without.
    fn decide_source(&mut self, at: usize, rings_run: bool) {
        let Some(view) = &self.views[at] else { return };
        let Some(handoff) = &view.record.handoff else { return };
        let attempt = handoff.plan.attempt;
        let owner = view.record.owner.as_ref().map(|owner| owner.session);
        if view.side != Some(Side::Source) || owner != Some(self.session) {
            return;
        }
        // It is decided, though this member does not know yet.
        if self.won.is_some_and(|(won, _)| won == attempt) {
            return;
        }
        let (phase, boot_id, sealed) = (view.record.phase, view.boot_id, handoff.sealed);
        let stopped =
            matches!(phase, Phase::Armed | Phase::Frozen) && self.members[at].stopped && !sealed;
        let member = &mut self.members[at];
        if stopped && !member.held {
            member.held = true;
            self.out.push(Output::Hold { member: at });
        }
        let sent = member.seal_sent == Some(attempt);
        if stopped && (sent || !rings_run) {
            member.seal_sent = Some(attempt);
            self.ask(at, attempt, Asked::Seal);
        } else if phase == Phase::Frozen && !sent {
            self.ask(at, attempt, Asked::Unfreeze { boot_id });
        } else if phase == Phase::Sealed && !sent {
            // The destination abdicated while this was frozen: only to reclaim
            // brings it back.
            self.wants_back = true;
        }
    }

    fn decide_reclaim(&mut self, focus: Focus, anchor: usize) {
        // Somebody else reclaimed for us: fetch the proof.
        let decided = self.views[anchor]
            .as_ref()
            .is_some_and(|view| view.record.winner(focus.attempt) == Some(Side::Source));
        let back = self.is_coming_back() || (decided && self.is_any_held());
        if back && self.won.is_none_or(|(attempt, _)| attempt != focus.attempt) {
            self.ask(anchor, focus.attempt, Asked::Reclaim);
        }
    }

    fn decide_destination(&mut self, focus: Focus, anchor: usize) {
        let attempt = focus.attempt;
        let frozen = self.views[anchor].as_ref().is_some_and(|v| v.record.phase == Phase::Frozen);
        if self.won.is_some_and(|(won, _)| won == attempt) {
            // The anchor forgot its decision: only this process can remind it.
            if frozen {
                self.ask(anchor, attempt, Asked::Activate);
            }
            return;
        }
        let witnessed = self.witnessed == Some(attempt);
        let asked_back = self.handoff_of(anchor).is_some_and(|handoff| handoff.wanted_back);
        if asked_back && witnessed && self.activate_sent != Some(attempt) {
            self.abdicated = Some(attempt);
        }
        if self.abdicated == Some(attempt) {
            // The promise is kept here whether or not it may be made there; and
            // it must be heard, so asking goes on until it is granted.
            if witnessed {
                self.ask(anchor, attempt, Asked::Abdicate);
            }
            return;
        }
        let runs = self.ordered || self.members.iter().any(|member| member.running);
        // A member that was opened for the destination says what the anchor
        // decided, for an earlier incarnation.
        let decided = self
            .views
            .iter()
            .flatten()
            .any(|view| view.record.winner(attempt) == Some(Side::Destination));
        let sealed = self.all_sealed(attempt) && self.is_complete(focus);
        if runs && (decided || sealed) {
            self.activate_sent = Some(attempt);
            self.ask(anchor, attempt, Asked::Activate);
        }
    }

    /// The winner shows the decision to the members that do not know it, or
    /// have not heard it from this incarnation.
    fn decide_open(&mut self) {
        let Some((attempt, proof)) = self.won else { return };
        for at in 0..self.members.len() {
            let Some(view) = &self.views[at] else { continue };
            let record = &view.record;
            let handoff = record.handoff.as_ref().filter(|h| h.plan.attempt == attempt);
            let over = record.decided.as_ref().is_some_and(|d| d.attempt == attempt);
            if handoff.is_none() && !over {
                continue;
            }
            let undecided = matches!(record.phase, Phase::Armed | Phase::Sealed | Phase::Frozen);
            let is_anchor = handoff.is_some_and(|h| h.plan.anchor == self.members[at].volume);
            if is_anchor || !(self.members[at].held || undecided) {
                continue;
            }
            // The destination's first requests follow its OPEN on the same
            // connection, so they need not wait for its answer; the epoch is
            // known while the member is sealed.
            let ahead = handoff
                .filter(|_| proof.side == Side::Destination && record.phase == Phase::Sealed)
                .map(|handoff| handoff.e_to);
            if self.open(at, attempt, proof)
                && let Some(epoch) = ahead
            {
                self.go(at, epoch);
            }
        }
    }
}
