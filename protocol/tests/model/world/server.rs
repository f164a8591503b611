//! A member at its server: the record, the gate, and what is carried out.

use baton_protocol::access::{By, Input, Phase, Refusal, Step, Store};
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Count, Outcome, Proof, Side, Try};
use baton_protocol::{Epoch, QueueId, Seq};

use super::{Action, Body, Broken, Message, Reply, Request, Sealing, Stage, World, session};
use crate::mutant::Mutant;
use crate::scope::{ANCHOR, D, FIRST_OF_D, NAMES, OF_ROGUE, OF_THE_DEAD, S, Scope};

impl World {
    pub(super) fn is_inside(&self, member: usize) -> bool {
        let inside = |r: &Request| r.member == member && r.stage == Stage::Inside;
        self.requests.iter().any(|r| inside(r) && r.boot != OF_THE_DEAD)
    }

    /// A record judges an input, and the server does what the step says. `None`
    /// while the gate has to drain first.
    pub(super) fn judge(
        &mut self,
        scope: &Scope,
        member: usize,
        input: Input<'_>,
    ) -> Option<Result<(), Refusal>> {
        let step = match scope.judge(&self.servers[member].record, input) {
            Ok(step) => step,
            Err(refusal) => return Some(Err(refusal)),
        };
        let drains = step.reopen || matches!(input, Input::Sealed { .. });
        if drains && self.is_inside(member) && !scope.is(Mutant::NoDrain) {
            return None;
        }
        let Step { record, store, .. } = step;
        let server = self.server(member);
        match store {
            Store::Never => {}
            Store::Later => server.later = Some(record.clone()),
            Store::First => {
                server.later = None;
                server.disk = record.clone();
            }
        }
        // A handoff that ended here does not begin again.
        let was = server.record.handoff.as_ref().map(|handoff| handoff.plan.attempt);
        let is = record.handoff.as_ref().map(|handoff| handoff.plan.attempt);
        if let Some(was) = was.filter(|_| was != is) {
            server.over.insert(was);
        }
        let again = is.is_some_and(|is| server.over.contains(&is));
        server.record = record;
        if again {
            self.broken.get_or_insert(Broken::DecisionUndone);
        }
        self.check_decision(scope, member);
        Some(Ok(()))
    }

    pub(super) fn check_decision(&mut self, scope: &Scope, member: usize) {
        let attempt = self.attempt(scope);
        let Some(winner) = self.servers[member].record.winner(attempt) else { return };
        match self.winners.get(&attempt) {
            Some(known) if *known != winner => {
                let broken =
                    if member == ANCHOR { Broken::DecisionUndone } else { Broken::Divided };
                self.broken.get_or_insert(broken);
            }
            Some(_) => {}
            None if member == ANCHOR => {
                self.winners.insert(attempt, winner);
            }
            None => {
                self.broken.get_or_insert(Broken::Divided);
            }
        }
    }

    pub(super) fn send(
        &mut self,
        actor: usize,
        member: usize,
        value: u8,
        epoch: Epoch,
        open: Option<(Try, Proof)>,
    ) {
        let boot = self.servers[member].boot;
        let stage = Stage::Sent;
        self.requests.insert(Request { member, actor, value, epoch, boot, open, stage });
    }

    pub(super) fn carry(&mut self, scope: &Scope, request: Request) -> Option<()> {
        let member = request.member;
        let from = session(request.actor);
        if let Some((attempt, proof)) = request.open
            && self.servers[member].record.admits().owner != Some(request.epoch)
        {
            let open = Input::Open { attempt, session: from, proof };
            self.judge(scope, member, open)?.ok()?;
        }
        let server = &self.servers[member];
        // After a restart of the server only the owner's session is let in again.
        let owner = server.record.owner.as_ref().map(|owner| owner.session);
        // A connection in standby carries nothing before its OPEN was granted.
        let seated = request.open.is_none() && request.boot == server.boot;
        let connected = seated || owner == Some(from);
        if server.record.admits().owner != Some(request.epoch) || !connected {
            return None;
        }
        self.requests.remove(&request);
        if request.value != OF_ROGUE {
            self.read(request);
        }
        let (epoch, holder) = (request.epoch.0, from.0);
        let holders = &mut self.server(member).holders;
        let top = holders.last_key_value().map_or(0, |(epoch, _)| *epoch);
        if epoch < top || *holders.entry(epoch).or_insert(holder) != holder {
            self.broken = Some(Broken::TwoPrincipals);
        }
        let arrived = self.servers[member].arrived;
        if arrived.0 == holder && request.value <= arrived.1 && request.value != OF_ROGUE {
            // Done before: the window answers it.
            if request.value > self.vms[self.actors[request.actor].side].acked[member] {
                self.requests.insert(Request { stage: Stage::Done, ..request });
            }
        } else if scope.slow_io {
            self.requests.insert(Request { stage: Stage::Inside, ..request });
        } else {
            self.apply(request);
            // No guest hears of what it did not write.
            if request.value == OF_ROGUE {
                return Some(());
            }
            let done = Request { stage: Stage::Done, ..request };
            self.act(scope, &Action::Ack(done))?;
        }
        Some(())
    }

    /// Whoever is let in reads what is there, too.
    fn read(&mut self, request: Request) {
        let member = request.member;
        let cached = self.actors[request.actor].cached[member];
        let read = cached.unwrap_or(self.servers[member].cell);
        if read < self.acknowledged(member) {
            self.broken = Some(Broken::StaleRead);
        }
    }

    /// The highest number that some guest was told is written.
    pub(super) fn acknowledged(&self, member: usize) -> u8 {
        let of = |side: usize| self.vms[side].acked[member];
        // What D begins with is nobody's write.
        if of(D) > FIRST_OF_D { of(D) } else { of(S) }
    }

    pub(super) fn apply(&mut self, request: Request) {
        let d = self.actors[request.actor].side == D;
        let other_won = self.winners.values().all(|winner| *winner == Side::Source);
        if request.value == OF_ROGUE {
            if other_won {
                self.broken = Some(Broken::StandbyWrote);
            }
            return;
        }
        if d && other_won {
            self.broken = Some(Broken::StandbyWrote);
        }
        if !d && self.d_wrote {
            self.broken = Some(Broken::Resurrected);
        }
        self.d_wrote |= d;
        self.server(request.member).arrived = (session(request.actor).0, request.value);
        self.put(request.member, request.value);
        self.requests.insert(Request { stage: Stage::Done, ..request });
    }

    pub(super) fn put(&mut self, member: usize, value: u8) {
        if value < self.servers[member].cell {
            self.broken = Some(Broken::Resurrected);
        }
        self.server(member).cell = value;
    }

    /// A server handles a message and puts the answer on its way.
    pub(super) fn deliver(&mut self, scope: &Scope, message: Message) -> Option<()> {
        let Message { actor, member, attempt, body } = message;
        let (from, name) = (session(actor), NAMES[self.actors[actor].side]);
        let boot_id_now = self.servers[member].boot;
        let input = match body {
            Body::Seal(last, lowest) => return self.seal(scope, message, (last, lowest)),
            Body::Open(proof) => {
                let open = Input::Open { attempt, session: from, proof };
                let granted = self.judge(scope, member, open)?.is_ok();
                let epoch = granted.then(|| self.servers[member].record.epoch);
                self.reply(message, Reply::Opened(epoch));
                return Some(());
            }
            Body::Ask(Asked::Activate) => Input::Activate { attempt, name, session: from },
            Body::Ask(Asked::Reclaim) => {
                Input::Reclaim { attempt, by: By::Backend { name, session: from } }
            }
            Body::Ask(Asked::Abdicate) => {
                Input::Abdicate { attempt, by: By::Backend { name, session: from } }
            }
            Body::Ask(Asked::Unfreeze { boot_id }) => {
                Input::Unfreeze { attempt, session: from, boot_id, boot_id_now }
            }
            Body::Ask(Asked::Seal) => return None,
        };
        let outcome = match self.judge(scope, member, input)? {
            Err(refusal) => Outcome::from(&refusal),
            Ok(()) => match body {
                Body::Ask(Asked::Reclaim)
                    if self.servers[member].record.winner(attempt) != Some(Side::Source) =>
                {
                    Outcome::Unknown
                }
                _ => Outcome::Granted,
            },
        };
        self.answer(message, outcome);
        Some(())
    }

    pub(super) fn seal(&mut self, scope: &Scope, message: Message, count: (u8, u8)) -> Option<()> {
        let Message { actor, member, attempt, .. } = message;
        let seal = Input::Seal { attempt, session: session(actor) };
        if let Err(refusal) = self.judge(scope, member, seal)? {
            self.answer(message, Outcome::from(&refusal));
            return Some(());
        }
        self.server(member).sealing = Some(Sealing { message, count });
        Some(())
    }

    pub(super) fn finish_seal(&mut self, scope: &Scope, member: usize) -> Option<()> {
        let server = &self.servers[member];
        let Sealing { message, count: (last, lowest) } = server.sealing.clone()?;
        let actor = &self.actors[message.actor];
        if actor.alive && actor.slots[member].is_some() {
            return None;
        }
        let from = session(message.actor);
        let arrived = if server.arrived.0 == from.0 { server.arrived.1 } else { 0 };
        let count =
            Count { queue: QueueId(0), last: Seq(u64::from(last)), lowest: Seq(u64::from(lowest)) };
        let frozen = server.record.phase == Phase::Frozen;
        let reached = count.is_reached(Seq(u64::from(arrived)))
            || scope.is(Mutant::SealSkipsCount)
            || (frozen && scope.is(Mutant::NoFsyncBlindSeal));
        let outcome = if reached {
            let sealed = Input::Sealed { attempt: message.attempt, session: from };
            match self.judge(scope, member, sealed)? {
                Ok(()) => Outcome::Granted,
                Err(refusal) => Outcome::from(&refusal),
            }
        } else if frozen {
            Outcome::NotSealed
        } else {
            let sealed = Input::Sealed { attempt: message.attempt, session: from };
            match server.record.step(sealed) {
                // It may still be reached.
                Ok(_) => return None,
                Err(refusal) => Outcome::from(&refusal),
            }
        };
        self.server(member).sealing = None;
        self.answer(message, outcome);
        Some(())
    }

    pub(super) fn answer(&mut self, message: Message, outcome: Outcome) {
        let server = &self.servers[message.member];
        let record = &server.record;
        let mine = record.owner.as_ref().is_some_and(|o| o.session == session(message.actor));
        let proof =
            if mine && message.member == ANCHOR { record.proof(message.attempt) } else { None };
        let answer = Answer { outcome, boot_id: server.boot, proof, record: record.without_keys() };
        self.reply(message, Reply::Answer(Box::new(answer)));
    }

    pub(super) fn reply(&mut self, message: Message, reply: Reply) {
        if self.actors[message.actor].alive {
            self.actor(message.actor).slots[message.member] = Some((message, reply));
        }
    }
}
