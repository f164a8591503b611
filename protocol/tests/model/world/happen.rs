//! What the world is after something has happened.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_protocol::access::{By, Input};
use baton_protocol::handoff::role;
use baton_protocol::handoff::{Proof, Side};

use super::{Action, Actor, Body, Broken, Coordinator, Request, Stage, World, session};
use crate::mutant::Mutant;
use crate::scope::{
    ANCHOR, D, NAMES, OF_ROGUE, OF_THE_DEAD, OF_THIRD, S, Scope, TERM, THIRD, THIRD_SESSION,
};

impl World {
    /// What the world is after an action; `None` when it cannot happen now.
    pub(crate) fn after(&self, scope: &Scope, action: &Action) -> Option<Self> {
        let mut next = self.clone();
        next.act(scope, action)?;
        (next != *self).then_some(next)
    }

    pub(super) fn act(&mut self, scope: &Scope, action: &Action) -> Option<()> {
        match *action {
            Action::Arm => self.arm(scope)?,
            Action::LateArm { member, attempt, next_epoch } => {
                self.left.late_arms -= 1;
                let plan = scope.plan(attempt);
                let arm = Input::Arm { plan: &plan, term: TERM, next_epoch, generation: 1 };
                self.judge(scope, member, arm)?.ok()?;
            }
            Action::Write { side, member } => {
                let at = self.live(side)?;
                let actor = &self.actors[at];
                let value = self.vms[side].issued[member] + 1;
                let epoch = actor.role.granted(member)?;
                let open = actor.opens[member];
                self.vms[side].issued[member] = value;
                self.send(at, member, value, epoch, open);
            }
            Action::Carry(request) => self.carry(scope, request)?,
            Action::Finish(request) => {
                self.requests.remove(&request);
                self.apply(request);
            }
            Action::Ack(request) => {
                self.requests.remove(&request);
                // Sent again under a later epoch: the connection on which this answer
                // comes has been given up.
                let sent_again = |r: &Request| {
                    (r.member, r.actor, r.value) == (request.member, request.actor, request.value)
                        && r.epoch > request.epoch
                };
                if self.requests.iter().any(sent_again) {
                    return Some(());
                }
                let actor = &self.actors[request.actor];
                if self.live(actor.side) != Some(request.actor) {
                    return Some(());
                }
                let acked = &mut self.vms[actor.side].acked[request.member];
                if actor.alive && actor.role.parked().is_none() && *acked < request.value {
                    *acked = request.value;
                }
            }
            Action::Deliver { message, again } => {
                if again {
                    self.left.net_faults -= 1;
                } else {
                    self.net.remove(&message);
                }
                self.deliver(scope, message)?;
                if !scope.slow_answers && !again {
                    self.hear_at_once(scope, message);
                }
            }
            Action::FinishSeal { member } => {
                let message = self.servers[member].sealing.as_ref()?.message;
                self.finish_seal(scope, member)?;
                if !scope.slow_answers {
                    self.hear_at_once(scope, message);
                }
            }
            Action::Hear { actor, member } => {
                let (message, reply) = self.actor(actor).slots[member].take()?;
                self.hear(scope, message, reply);
            }
            Action::LoseAnswer { actor, member } => {
                self.left.net_faults -= 1;
                let (message, _) = self.actor(actor).slots[member].take()?;
                self.net.insert(message);
            }
            Action::Look { actor, member } => {
                let server = &self.servers[member];
                let boot_id = server.boot;
                let mut record = Box::new(server.record.without_keys());
                scope.show(self.actors[actor].side, &self.servers[ANCHOR].record, &mut record);
                let seen = Some((boot_id, record.version));
                self.actor(actor).seen[member] = seen;
                if scope.is(Mutant::DestinationCaches) && self.actors[actor].side == D {
                    let cell = self.servers[member].cell;
                    self.actor(actor).cached[member].get_or_insert(cell);
                }
                self.tell(scope, actor, role::Input::View { member, boot_id, record });
            }
            Action::Stuck { actor, member } => {
                self.tell(scope, actor, role::Input::Stuck { member });
            }
            Action::Crash { member, stored } => self.crash(scope, member, stored),
            Action::CrashBackend { side } => {
                let at = self.live(side)?;
                self.left.backend_crashes[side] -= 1;
                self.kill(at);
            }
            Action::RestartBackend { side, standby } => {
                if let Some(parked) = self.live(side) {
                    self.kill(parked);
                }
                self.restart(scope, side, standby)?;
            }
            Action::Replace { side, standby } => {
                self.left.backend_crashes[side] -= 1;
                self.restart(scope, side, standby)?;
            }
            Action::StopSource => {
                self.left.stops -= 1;
                self.vms[S].running = false;
                self.vms[S].at_stop = Some(self.vms[S].issued.clone());
                if let Some(at) = self.live(S) {
                    for member in 0..scope.members {
                        let stopped = role::Input::Stopped { member, migrating: true };
                        self.tell(scope, at, stopped);
                    }
                }
            }
            Action::StartSource => {
                self.left.starts -= 1;
                self.start(scope, S);
            }
            Action::StartDestination => self.start(scope, D),
            Action::Order { side, order } => {
                self.left.orders -= 1;
                let at = self.live(side)?;
                self.tell(scope, at, role::Input::Order(order));
            }
            Action::CoordinatorReclaims => {
                self.coordinator.reclaimed = true;
                let attempt = self.attempt(scope);
                let by = By::Coordinator { term: TERM };
                self.judge(scope, ANCHOR, Input::Reclaim { attempt, by })?.ok()?;
            }
            Action::CoordinatorAbdicates => {
                self.coordinator.abdicated = true;
                let attempt = self.attempt(scope);
                let by = By::Coordinator { term: TERM };
                self.judge(scope, ANCHOR, Input::Abdicate { attempt, by })?.ok()?;
            }
            Action::TakeProof => {
                let record = &self.servers[ANCHOR].record;
                let proof = record.proof(self.attempt(scope))?;
                self.coordinator.proof = Some((record.owner.as_ref()?.session, proof));
            }
            Action::Settle { member } => {
                let attempt = self.attempt(scope);
                let proof = self.coordinator.proof;
                self.judge(scope, member, Input::Settle { attempt, term: TERM, proof })?.ok()?;
            }
            Action::Disarm { member, attempt } => {
                let disarm = Input::Disarm { attempt, term: TERM };
                self.judge(scope, member, disarm)?.ok()?;
            }
            Action::Fence { member } => {
                let fence = Input::Fence { term: Some(TERM), nominee: Some(THIRD), seen: None };
                self.judge(scope, member, fence)?.ok()?;
                self.server(member).fenced = true;
            }
            Action::ThirdWrites { member } => {
                let claim = Input::Claim { name: THIRD, session: THIRD_SESSION };
                if self.judge(scope, member, claim)?.is_err() {
                    self.broken = Some(Broken::TwoPrincipals);
                }
                self.put(member, OF_THIRD);
            }
            Action::Rogue { member } => {
                self.left.rogue -= 1;
                let attempt = self.attempt(scope);
                let handoff = self.servers[member].record.handoff.as_ref()?;
                let proof = Proof { side: Side::Destination, grant: 9, mac: [0; 32] };
                let (epoch, open) = if scope.is(Mutant::StandbyLetIn) {
                    (self.servers[member].record.epoch, None)
                } else {
                    (handoff.e_to, Some((attempt, proof)))
                };
                self.send(1, member, OF_ROGUE, epoch, open);
            }
        }
        Some(())
    }

    pub(super) fn arm(&mut self, scope: &Scope) -> Option<()> {
        if self.coordinator.armed == scope.members {
            self.coordinator = Coordinator {
                attempt: self.coordinator.attempt + 1,
                armed: 0,
                planned: Vec::new(),
                reclaimed: true,
                abdicated: true,
                proof: None,
            };
        }
        let plan = scope.plan(self.coordinator.attempt);
        let member = self.coordinator.armed;
        self.coordinator.armed += 1;
        // Refused when the source is gone from here; the try is then stillborn.
        if member == 0 {
            let planned = self.servers.iter().map(|server| server.record.next_epoch);
            self.coordinator.planned = planned.collect();
        }
        let next_epoch = self.coordinator.planned[member];
        if scope.late_arms > 0 {
            self.arms.insert((member, self.coordinator.attempt, next_epoch));
        }
        let arm = Input::Arm { plan: &plan, term: TERM, next_epoch, generation: 1 };
        let _ = self.judge(scope, member, arm)?;
        Some(())
    }

    pub(super) fn start(&mut self, scope: &Scope, side: usize) {
        self.vms[side].running = true;
        if let Some(at) = self.live(side) {
            for member in 0..scope.members {
                self.tell(scope, at, role::Input::Started { member });
            }
        }
    }

    pub(super) fn crash(&mut self, scope: &Scope, member: usize, stored: bool) {
        self.left.server_crashes -= 1;
        let actors = self.actors.clone();
        let vms = self.vms.clone();
        let live = [self.live(S), self.live(D)];
        let (here, mut kept): (BTreeSet<Request>, BTreeSet<Request>) =
            self.requests.iter().partition(|request| request.member == member);
        for request in here {
            let actor = &actors[request.actor];
            // What waits in the network and answers die with the connections;
            // what its sender still wants done is sent again.
            let zombie = Some(request.actor) != live[actor.side];
            let again = actor.alive
                && (zombie || request.value > vms[actor.side].acked[member])
                && actor.role.granted(member) == Some(request.epoch);
            if request.stage == Stage::Inside && scope.is(Mutant::KernelIoOutlivesServer) {
                kept.insert(Request { boot: OF_THE_DEAD, ..request });
            }
            if again {
                kept.insert(Request { stage: Stage::Sent, ..request });
            }
        }
        self.requests = kept;
        let server = self.server(member);
        if let (true, Some(later)) = (stored, server.later.take()) {
            server.disk = later;
        }
        server.later = None;
        server.boot += 1;
        server.record = scope.restart(&server.disk);
        server.arrived = (0, 0);
        if scope.is(Mutant::ForgetsWrites) {
            server.cell = 0;
        }
        let unanswered = server.sealing.take();
        // Its client asks again.
        if let Some(sealing) = unanswered
            && self.actors[sealing.message.actor].alive
        {
            self.net.insert(sealing.message);
        }
        self.check_decision(scope, member);
        if self.servers[member].cell < self.acknowledged(member) {
            self.broken.get_or_insert(Broken::Lost);
        }
    }

    pub(super) fn kill(&mut self, at: usize) {
        let actor = self.actor(at);
        actor.alive = false;
        actor.slots.iter_mut().for_each(|slot| *slot = None);
        self.requests.retain(|r| r.actor != at || r.stage != Stage::Done);
    }

    /// A new process of a side: it claims what it can, or nothing.
    pub(super) fn restart(&mut self, scope: &Scope, side: usize, standby: bool) -> Option<()> {
        if !scope.ghosts {
            let actors = &self.actors;
            self.net.retain(|message| {
                let destination = |proof: Proof| proof.side == Side::Destination;
                let open = matches!(message.body, Body::Open(proof) if destination(proof));
                actors[message.actor].side != side || open
            });
            self.requests
                .retain(|request| actors[request.actor].side != side || request.open.is_none());
        }
        let at = self.actors.len();
        let attempt = scope.plan(self.coordinator.attempt).attempt;
        let only_for = (standby && side == D).then_some(attempt);
        let actor = Actor::new(scope, side, session(at), only_for);
        self.actors.push(Arc::new(actor));
        for member in 0..scope.members {
            let claim = Input::Claim { name: NAMES[side], session: session(at) };
            if standby {
                continue;
            }
            if self.judge(scope, member, claim)?.is_ok() {
                let epoch = self.servers[member].record.epoch;
                self.tell(scope, at, role::Input::Claimed { member, epoch });
                let vm = &self.vms[side];
                if vm.issued[member] > vm.acked[member] {
                    self.send(at, member, vm.issued[member], epoch, None);
                }
            }
        }
        if self.vms[side].running {
            for member in 0..scope.members {
                self.tell(scope, at, role::Input::Started { member });
            }
        }
        Some(())
    }
}
