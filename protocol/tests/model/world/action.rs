//! What can happen next.

use std::sync::Arc;

use baton_protocol::Epoch;
use baton_protocol::handoff::role::{Order, Standing};
use baton_protocol::handoff::{Mode, Side, Try};

use super::{Message, Request, Server, Stage, World};
use crate::mutant::Mutant;
use crate::scope::{ANCHOR, D, FIRST_OF_D, OF_THIRD, S, Scope};

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Arm,
    /// One that was sent before arrives again.
    LateArm {
        member: usize,
        attempt: u32,
        next_epoch: Epoch,
    },
    Write {
        side: usize,
        member: usize,
    },
    Carry(Request),
    Finish(Request),
    Ack(Request),
    Deliver {
        message: Message,
        again: bool,
    },
    FinishSeal {
        member: usize,
    },
    Hear {
        actor: usize,
        member: usize,
    },
    LoseAnswer {
        actor: usize,
        member: usize,
    },
    Look {
        actor: usize,
        member: usize,
    },
    Stuck {
        actor: usize,
        member: usize,
    },
    Crash {
        member: usize,
        stored: bool,
    },
    CrashBackend {
        side: usize,
    },
    /// A new process of a side; in standby it claims nothing.
    RestartBackend {
        side: usize,
        standby: bool,
    },
    /// The same while the old process only hangs.
    Replace {
        side: usize,
        standby: bool,
    },
    StopSource,
    StartSource,
    StartDestination,
    Order {
        side: usize,
        order: Order,
    },
    CoordinatorReclaims,
    CoordinatorAbdicates,
    TakeProof,
    Settle {
        member: usize,
    },
    Disarm {
        member: usize,
        attempt: Try,
    },
    Fence {
        member: usize,
    },
    ThirdWrites {
        member: usize,
    },
    Rogue {
        member: usize,
    },
}

impl Action {
    /// What happens rarely against messages and requests.
    pub(crate) fn is_rare(&self) -> bool {
        !matches!(
            self,
            Self::Write { .. }
                | Self::Carry(_)
                | Self::Finish(_)
                | Self::Ack(_)
                | Self::Deliver { again: false, .. }
                | Self::FinishSeal { .. }
                | Self::Hear { .. }
                | Self::Look { .. }
                | Self::Arm
        )
    }
}

impl World {
    /// What can happen next.
    pub(crate) fn actions(&self, scope: &Scope, out: &mut Vec<Action>) {
        if self.broken.is_some() {
            return;
        }
        self.data_actions(scope, out);
        self.message_actions(out);
        self.accidents(scope, out);
        self.orders(scope, out);
        self.coordinator_actions(scope, out);
    }

    pub(super) fn data_actions(&self, scope: &Scope, out: &mut Vec<Action>) {
        for side in [S, D] {
            let Some(at) = self.live(side) else { continue };
            let (vm, role) = (&self.vms[side], &self.actors[at].role);
            if !vm.running || role.parked().is_some() {
                continue;
            }
            for member in 0..scope.members {
                let most = scope.writes[side] + if side == D { FIRST_OF_D } else { 0 };
                let idle = vm.issued[member] == vm.acked[member] && vm.issued[member] < most;
                if idle && !role.is_held(member) && role.granted(member).is_some() {
                    out.push(Action::Write { side, member });
                }
            }
        }
        for request in &self.requests {
            match request.stage {
                Stage::Sent => out.push(Action::Carry(*request)),
                Stage::Inside => out.push(Action::Finish(*request)),
                Stage::Done => out.push(Action::Ack(*request)),
            }
        }
    }

    pub(super) fn message_actions(&self, out: &mut Vec<Action>) {
        for message in &self.net {
            let actor = &self.actors[message.actor];
            if actor.alive && actor.slots[message.member].is_some() {
                continue;
            }
            out.push(Action::Deliver { message: *message, again: false });
            if self.left.net_faults > 0 {
                out.push(Action::Deliver { message: *message, again: true });
            }
        }
        for (at, actor) in self.actors.iter().enumerate().filter(|(_, actor)| actor.alive) {
            for (member, slot) in actor.slots.iter().enumerate() {
                if slot.is_some() {
                    out.push(Action::Hear { actor: at, member });
                    if self.left.net_faults > 0 {
                        out.push(Action::LoseAnswer { actor: at, member });
                    }
                    continue;
                }
                let server = &self.servers[member];
                if actor.seen[member] != Some((server.boot, server.record.version)) {
                    out.push(Action::Look { actor: at, member });
                }
                let vm = &self.vms[actor.side];
                if actor.role.is_held(member)
                    && vm.issued[member] > vm.acked[member]
                    && actor.role.granted(member).is_some()
                    && actor.role.granted(member) != server.record.admits().owner
                {
                    out.push(Action::Stuck { actor: at, member });
                }
            }
        }
        for (member, server) in self.servers.iter().enumerate() {
            if server.sealing.is_some() {
                out.push(Action::FinishSeal { member });
            }
        }
    }

    pub(super) fn accidents(&self, scope: &Scope, out: &mut Vec<Action>) {
        if self.left.server_crashes > 0 && self.coordinator.armed > 0 {
            for (member, server) in self.servers.iter().enumerate() {
                out.push(Action::Crash { member, stored: false });
                if server.later.is_some() {
                    out.push(Action::Crash { member, stored: true });
                }
            }
        }
        for side in [S, D] {
            match self.live(side) {
                Some(_) if self.left.backend_crashes[side] > 0 => {
                    out.push(Action::CrashBackend { side });
                    // Of two living destinations one could abdicate for the other
                    // at a frozen anchor: whoever starts the second has to know
                    // that the first is dead.
                    if scope.zombies && (side == S || scope.mode == Mode::Base) {
                        out.push(Action::Replace { side, standby: false });
                        out.push(Action::Replace { side, standby: true });
                    }
                }
                // A new try needs a new destination.
                Some(at)
                    if side == D
                        && self.actors[at].role.parked().is_some()
                        && self.coordinator.attempt > 1
                        && self.actors.len() < 4 =>
                {
                    out.push(Action::RestartBackend { side, standby: false });
                }
                Some(_) => {}
                None => {
                    out.push(Action::RestartBackend { side, standby: false });
                    if self.servers.iter().any(|server| server.record.handoff.is_some()) {
                        out.push(Action::RestartBackend { side, standby: true });
                    }
                }
            }
        }
        if self.left.rogue > 0 {
            out.extend((0..scope.members).map(|member| Action::Rogue { member }));
        }
    }

    pub(super) fn orders(&self, scope: &Scope, out: &mut Vec<Action>) {
        if self.vms[S].running {
            let ready =
                self.live(D).is_some_and(|at| self.actors[at].role.standing() == Standing::Ready);
            if self.left.stops > 0 && (ready || !scope.waits) {
                out.push(Action::StopSource);
            }
        } else if self.left.starts > 0 {
            out.push(Action::StartSource);
        }
        if scope.start_d && !self.vms[D].running {
            out.push(Action::StartDestination);
        }
        if self.left.orders > 0 {
            out.push(Action::Order { side: D, order: Order::Activate });
            out.push(Action::Order { side: D, order: Order::Abdicate });
            out.push(Action::Order { side: S, order: Order::Seal });
            out.push(Action::Order { side: S, order: Order::Reclaim });
        }
    }

    pub(super) fn coordinator_actions(&self, scope: &Scope, out: &mut Vec<Action>) {
        let coordinator = &self.coordinator;
        if coordinator.armed < scope.members {
            out.push(Action::Arm);
        }
        if self.left.late_arms > 0 {
            let late = |&(member, attempt, next_epoch): &(usize, u32, Epoch)| Action::LateArm {
                member,
                attempt,
                next_epoch,
            };
            out.extend(self.arms.iter().map(late));
        }
        if coordinator.armed > 0 && scope.coordinator {
            if !coordinator.reclaimed {
                out.push(Action::CoordinatorReclaims);
            }
            if !coordinator.abdicated && self.live(D).is_none() {
                out.push(Action::CoordinatorAbdicates);
            }
            if coordinator.proof.is_none() {
                out.push(Action::TakeProof);
            }
            for (member, server) in self.servers.iter().enumerate() {
                if server.record.handoff.is_some() {
                    out.push(Action::Settle { member });
                }
            }
            self.disarm_actions(scope, out);
            let decided = self.winners.get(&scope.plan(coordinator.attempt).attempt);
            // A source that stands still seals as soon as it is armed again; one
            // that waits lets it run first.
            if coordinator.attempt < scope.attempts
                && (self.vms[S].running || !scope.waits)
                && decided == Some(&Side::Source)
                && self.is_free_for_another(scope)
            {
                out.push(Action::Arm);
            }
        }
        if scope.fence && coordinator.armed > 0 {
            let all = self.servers.iter().all(|server| server.fenced);
            for (member, server) in self.servers.iter().enumerate() {
                if !server.fenced {
                    out.push(Action::Fence { member });
                } else if all && server.cell != OF_THIRD {
                    out.push(Action::ThirdWrites { member });
                }
            }
        }
    }

    fn disarm_actions(&self, scope: &Scope, out: &mut Vec<Action>) {
        for (member, server) in self.servers.iter().enumerate() {
            let Some(handoff) = &server.record.handoff else { continue };
            let attempt = handoff.plan.attempt;
            let forgotten = scope.forgets && self.is_forgotten(member);
            if scope.disarms || (forgotten && !scope.is(Mutant::NeverDisarms)) {
                out.push(Action::Disarm { member, attempt });
            }
        }
    }

    fn is_free_for_another(&self, scope: &Scope) -> bool {
        let free = |server: &Arc<Server>| server.record.handoff.is_none();
        free(&self.servers[ANCHOR]) && (scope.forgets || self.servers.iter().all(free))
    }

    /// The member is in a handoff that the anchor does not know any more.
    pub(crate) fn is_forgotten(&self, member: usize) -> bool {
        let Some(handoff) = &self.servers[member].record.handoff else { return false };
        let (attempt, anchor) = (handoff.plan.attempt, &self.servers[ANCHOR].record);
        let knows = anchor.handoff.as_ref().is_some_and(|h| h.plan.attempt == attempt)
            || anchor.decided.as_ref().is_some_and(|d| d.attempt == attempt);
        member != ANCHOR && !knows
    }
}
