//! Changes of a volume's access record, one after the other: judged, stored,
//! drained, put in force, told.

use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal, Seen, Step, Store};
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Ask, HandoffRequest, Open, Outcome, Side, Try};
use baton_protocol::{Epoch, QueueId, Seq, SessionId};

use super::{Server, Volume, WaitingSeal, answer, host_of, owner_name};
use crate::agenda::MS;
use crate::bug::Bug;
use crate::coordinator::place;
use crate::fault::Point;
use crate::stage::{Call, DecidedBy, Event, Greeting, Refused, Reply, Stage, ToClient, note};

/// What somebody wants of the record.
#[derive(Clone, Debug)]
pub(super) enum Job {
    Greet { connection: usize, greeting: Greeting },
    Ask { connection: usize, asked: Asked, request: HandoffRequest },
    Sealed { connection: usize, attempt: Try, session: SessionId },
    Open { connection: usize, open: Open },
    Call { coordinator: usize, term: u64, call: Call },
}

/// A job that was granted and is not in force yet.
#[derive(Debug)]
pub(super) struct Current {
    job: Job,
    step: Step,
    is_stored: bool,
    /// It is to be stored, and that has not begun: a seal, which is stored when
    /// everything has drained. What is durable then is that nothing comes any more.
    stores_later: bool,
    /// The gate must be empty before the change is in force.
    drains: bool,
}

/// Notes that a question has arrived.
pub(super) fn arrived(stage: &mut Stage, asked: Asked) {
    stage.reached(match asked {
        Asked::Seal => Point::SealArrived,
        Asked::Activate => Point::ActivateArrived,
        Asked::Reclaim => Point::ReclaimArrived,
        Asked::Abdicate => Point::AbdicateArrived,
        Asked::Unfreeze { .. } => Point::UnfreezeArrived,
    });
}

fn reached_by(input: &Input<'_>) -> Option<Point> {
    match input {
        Input::Arm { .. } => Some(Point::Armed),
        Input::Sealed { .. } => Some(Point::Sealed),
        Input::Activate { .. } => Some(Point::Activated),
        Input::Abdicate { .. } => Some(Point::Abdicated),
        Input::Open { .. } => Some(Point::Opened),
        Input::Settle { .. } => Some(Point::Settled),
        Input::Fence { .. } => Some(Point::Fenced),
        Input::Disarm { .. } => Some(Point::Disarmed),
        _ => None,
    }
}

impl Volume {
    /// A coordinator's message arrives.
    pub(crate) fn call(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        coordinator: usize,
        term: u64,
        call: Call,
    ) {
        match &call {
            Call::Arm { .. } => stage.reached(Point::ArmArrived),
            Call::Reclaim(_) => stage.reached(Point::ReclaimArrived),
            Call::Abdicate(_) => stage.reached(Point::AbdicateArrived),
            Call::Settle(..) => stage.reached(Point::SettleArrived),
            Call::Fence { .. } => stage.reached(Point::FenceArrived),
            Call::Disarm(_) => stage.reached(Point::DisarmArrived),
            Call::View | Call::Ask { .. } => {}
        }
        self.jobs.push_back(Job::Call { coordinator, term, call });
        self.work(stage, server);
    }

    /// The change under way is durable.
    pub(crate) fn stored(&mut self, stage: &mut Stage, server: &Server) {
        if let Some(current) = &mut self.current {
            self.durable = current.step.record.clone();
            current.is_stored = true;
        }
        self.work(stage, server);
    }

    /// Writes back what was not stored first.
    pub(crate) fn persist(&mut self, stage: &mut Stage, boot: u64) {
        if self.current.is_some() {
            stage.after(MS / 2, Event::Persist { volume: self.number, boot });
        } else {
            self.durable = self.record.clone();
        }
    }

    /// Goes on as far as it can.
    pub(super) fn work(&mut self, stage: &mut Stage, server: &Server) {
        loop {
            if let Some(current) = &mut self.current {
                if current.drains && !self.running.is_empty() && !stage.has(Bug::NoDrain) {
                    self.gate = None;
                    stage.reached(Point::SealWaits);
                    return;
                }
                if current.drains && !current.is_stored && current.step.store == Store::First {
                    self.gate = None;
                }
                if std::mem::take(&mut current.stores_later) {
                    self.store(stage, server);
                    return;
                }
                if current.step.store == Store::First && !current.is_stored {
                    return;
                }
                self.put_in_force(stage, server);
            } else if let Some(job) = self.jobs.pop_front() {
                self.begin(stage, server, job);
            } else if !self.seat_arriving(stage, server) && !self.look_at_seals(stage, server) {
                return;
            }
        }
    }

    fn begin(&mut self, stage: &mut Stage, server: &Server, job: Job) {
        let (result, point) = self.judge(stage, server, &job);
        let mut step = match result {
            Ok(Some(step)) => step,
            Ok(None) => return self.finish(stage, server, &job, None),
            Err(refusal) => return self.finish(stage, server, &job, Some(&refusal)),
        };
        if let Some(point) = point
            && step.changed
        {
            stage.reached(point);
        }
        if stage.has(Bug::EpochsKept)
            && self.record.phase == Phase::Armed
            && let (Some(kept), Some(next)) = (&self.record.handoff, &mut step.record.handoff)
        {
            (next.e_to, next.e_back) = (kept.e_to, kept.e_back);
        }
        let seals = step.changed && matches!(job, Job::Sealed { .. });
        let stores = step.store == Store::First && step.changed;
        if stores && !seals {
            self.store(stage, server);
        }
        if step.store == Store::Later {
            // A change that was lost with the memory is what fast mode must bear.
            let delay = if stage.chance(0.3) { 60 * MS } else { stage.between(MS, 10 * MS) };
            let (volume, boot) = (self.number, server.boot);
            stage.after(delay, Event::Persist { volume, boot });
        }
        if seals {
            self.gate = None;
        }
        let is_stored = !step.changed;
        let drains = step.reopen || seals;
        let stores_later = stores && seals;
        self.current = Some(Current { job, step, is_stored, stores_later, drains });
    }

    fn store(&self, stage: &mut Stage, server: &Server) {
        let delay = stage.between(200, 3 * MS);
        let (volume, boot) = (self.number, server.boot);
        stage.after(delay, Event::Stored { volume, boot });
    }

    /// What the record says. `None`: it has no say.
    fn judge(
        &self,
        stage: &mut Stage,
        server: &Server,
        job: &Job,
    ) -> (Result<Option<Step>, Refusal>, Option<Point>) {
        let has = |bug| stage.bug == Some(bug);
        let (late_fence, late_arm) = (has(Bug::LateFence), has(Bug::LateArm));
        let disarm_sealed = has(Bug::DisarmSealed);
        let mut step = |input: Input<'_>| {
            stage.coverage.asked(self.record.phase, &input);
            if disarm_sealed && matches!(input, Input::Disarm { .. }) {
                let as_armed = AccessRecord { phase: Phase::Armed, ..self.record.clone() };
                return (as_armed.step(input).map(Some), reached_by(&input));
            }
            (self.record.step(input).map(Some), reached_by(&input))
        };
        match job {
            Job::Greet { connection, greeting } => {
                let Some(peer) = self.peers.get(connection) else { return (Ok(None), None) };
                let (name, session) = (owner_name(peer.host), peer.session);
                match *greeting {
                    Greeting::Claim => step(Input::Claim { name: &name, session }),
                    Greeting::Rejoin(epoch) => step(Input::Rejoin { session, epoch }),
                    Greeting::Standby => (Ok(None), None),
                }
            }
            Job::Ask { connection, request, .. } => {
                let Some(peer) = self.peers.get(connection) else { return (Ok(None), None) };
                let (name, session) = (owner_name(peer.host), peer.session);
                let (attempt, name) = (request.attempt, name.as_str());
                let by = By::Backend { name, session };
                step(match &request.ask {
                    Ask::Seal(_) => Input::Seal { attempt, session },
                    Ask::Activate => Input::Activate { attempt, name, session },
                    Ask::Reclaim => Input::Reclaim { attempt, by },
                    Ask::Abdicate => Input::Abdicate { attempt, by },
                    Ask::Unfreeze { boot_id } => {
                        let boot_id_now = server.boot;
                        Input::Unfreeze { attempt, session, boot_id: *boot_id, boot_id_now }
                    }
                })
            }
            Job::Sealed { attempt, session, .. } => {
                step(Input::Sealed { attempt: *attempt, session: *session })
            }
            Job::Open { connection, open } => {
                let Some(peer) = self.peers.get(connection) else { return (Ok(None), None) };
                let (attempt, proof) = (open.attempt, open.proof);
                step(Input::Open { attempt, session: peer.session, proof })
            }
            Job::Call { term, call, .. } => {
                let (term, by) = (*term, By::Coordinator { term: *term });
                match call {
                    Call::View | Call::Ask { .. } => (Ok(None), None),
                    Call::Disarm(attempt) => step(Input::Disarm { attempt: *attempt, term }),
                    Call::Fence { nominee, seen: (owner, next_epoch) } => {
                        let seen = Seen { owner: owner.as_deref(), next_epoch: *next_epoch };
                        let seen = (!late_fence).then_some(seen);
                        step(Input::Fence { term: None, nominee: Some(nominee), seen })
                    }
                    Call::Arm { plan, next_epoch } => {
                        let planned = if late_arm { self.record.next_epoch } else { *next_epoch };
                        step(Input::Arm { plan, term, next_epoch: planned, generation: 0 })
                    }
                    Call::Reclaim(attempt) => step(Input::Reclaim { attempt: *attempt, by }),
                    Call::Abdicate(attempt) => step(Input::Abdicate { attempt: *attempt, by }),
                    Call::Settle(attempt, proof) => {
                        step(Input::Settle { attempt: *attempt, term, proof: *proof })
                    }
                }
            }
        }
    }

    fn put_in_force(&mut self, stage: &mut Stage, server: &Server) {
        let Some(Current { job, step, .. }) = self.current.take() else { return };
        if step.changed {
            let old = self.record.owner.as_ref().map(|owner| owner.session);
            let new = step.record.owner.as_ref().map(|owner| owner.session);
            if old != new {
                self.seats.clear();
                self.arriving.clear();
            }
            let (was, is) = (self.record.phase, step.record.phase);
            self.record = step.record;
            if is == Phase::Reclaimed && was != is {
                stage.reached(Point::Reclaimed);
            }
            if was != is && matches!(is, Phase::Active | Phase::Reclaimed) && self.is_anchor() {
                stage.by = match job {
                    Job::Call { .. } => DecidedBy::Coordinator,
                    _ => DecidedBy::Rings,
                };
            }
            if let Job::Call { call: Call::Fence { nominee, .. }, .. } = &job {
                stage.watch.fenced(self.number, host_of(nominee));
            }
            self.watch(stage);
            let (number, record) = (self.number, &self.record);
            note!(
                stage,
                "volume {number} is {} at epoch {}, version {} of session {:?}",
                record.phase.name(),
                record.epoch,
                record.version,
                new,
            );
        }
        self.gate = self.record.admits().owner;
        self.finish(stage, server, &job, None);
        self.tell(stage, server);
    }

    fn is_anchor(&self) -> bool {
        let volume = self.record.volume;
        self.record.handoff.as_ref().is_some_and(|handoff| handoff.plan.anchor == volume)
    }

    /// What is about to be told.
    fn watch(&self, stage: &mut Stage) {
        let sealed = match self.record.phase {
            Phase::Sealed => true,
            Phase::Frozen => self.record.handoff.as_ref().is_some_and(|handoff| handoff.sealed),
            _ => false,
        };
        let below = if sealed { 0 } else { 1 };
        stage.watch.closed(self.number, Epoch(self.record.epoch.0.saturating_sub(below)));
        let Some(handoff) = &self.record.handoff else { return };
        let plan = &handoff.plan;
        if plan.anchor == self.record.volume
            && let Some(winner) = self.record.winner(plan.attempt)
        {
            let hosts = [host_of(&plan.from), host_of(&plan.to)];
            if winner == Side::Destination && stage.watch.owner() != hosts[1] {
                stage.activated = Some(hosts);
            }
            stage.watch.told(plan.attempt, winner, hosts);
        }
    }

    /// Tells who asked.
    fn finish(&mut self, stage: &mut Stage, server: &Server, job: &Job, refusal: Option<&Refusal>) {
        match job {
            Job::Greet { connection, greeting } => {
                self.greeted(stage, *connection, *greeting, refusal);
            }
            Job::Ask { connection, asked, request } => {
                if refusal.is_none() && *asked == Asked::Seal {
                    self.seal_asked(stage, server, *connection, request);
                } else {
                    self.answer(stage, server, *connection, (*asked, request.attempt), refusal);
                }
            }
            Job::Sealed { connection, attempt, .. } => {
                self.answer(stage, server, *connection, (Asked::Seal, *attempt), refusal);
            }
            Job::Open { connection, .. } => {
                if refusal.is_none() {
                    self.arriving.push(*connection);
                } else if let Some(peer) = self.peers.get_mut(connection) {
                    let behind = peer.behind_open.take().unwrap_or_default();
                    stage.send_to_client(*connection, ToClient::Opened(None));
                    self.run_behind(stage, server, *connection, behind);
                }
            }
            Job::Call { coordinator, call, .. } => {
                let attempt = match call {
                    Call::Arm { plan, .. } => Some(plan.attempt),
                    Call::Reclaim(attempt)
                    | Call::Abdicate(attempt)
                    | Call::Settle(attempt, _)
                    | Call::Ask { attempt, .. }
                    | Call::Disarm(attempt) => Some(*attempt),
                    Call::View | Call::Fence { .. } => None,
                };
                let attempt = attempt.or(self.record.handoff.as_ref().map(|h| h.plan.attempt));
                let decided = attempt.and_then(|attempt| {
                    let session = self.record.owner.as_ref()?.session;
                    Some((self.record.winner(attempt)?, session, self.record.proof(attempt)))
                });
                let reply = Reply {
                    volume: self.number,
                    call: call.clone(),
                    refused: refusal.cloned(),
                    decided,
                    armed: self.record.handoff.as_ref().map(|handoff| handoff.plan.attempt),
                    anchor: self.record.handoff.as_ref().map(|handoff| place(handoff.plan.anchor)),
                };
                stage.reply(*coordinator, reply);
            }
        }
    }

    fn greeted(
        &mut self,
        stage: &mut Stage,
        connection: usize,
        greeting: Greeting,
        refusal: Option<&Refusal>,
    ) {
        let Some(peer) = self.peers.get(&connection) else { return };
        let frozen = self.record.phase == Phase::Frozen && peer.queue != QueueId::CONTROL;
        let refused = match refusal {
            Some(Refusal::StaleEpoch { .. }) => Some(Refused::StaleEpoch),
            Some(Refusal::InHandoff(_)) => Some(Refused::InHandoff),
            Some(_) => Some(Refused::NotOwner),
            None if frozen && greeting != Greeting::Standby => Some(Refused::Busy),
            None => None,
        };
        if let Some(refused) = refused {
            self.peers.remove(&connection);
            stage.send_to_client(connection, ToClient::Refused(refused));
            stage.network.connections[connection].server_open = false;
        } else if greeting == Greeting::Standby {
            let epoch = self.record.epoch;
            stage.send_to_client(connection, ToClient::Welcome { epoch, owner: false });
        } else {
            self.arriving.push(connection);
        }
    }

    fn answer(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        (asked, attempt): (Asked, Try),
        refusal: Option<&Refusal>,
    ) {
        let Some(peer) = self.peers.get(&connection) else { return };
        let winner = self.record.winner(attempt);
        let mine = self.record.owner.as_ref().is_some_and(|owner| owner.session == peer.session);
        let (outcome, proof) = match (asked, refusal) {
            (_, Some(refusal)) => (Outcome::from(refusal), None),
            (Asked::Reclaim, None) if winner != Some(Side::Source) => (Outcome::Unknown, None),
            (Asked::Reclaim | Asked::Activate, None) if mine => {
                (Outcome::Granted, self.record.proof(attempt))
            }
            (_, None) => (Outcome::Granted, None),
        };
        self.send(stage, server, connection, (asked, attempt), outcome, proof);
    }

    fn send(
        &self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        (asked, attempt): (Asked, Try),
        outcome: Outcome,
        proof: Option<baton_protocol::handoff::Proof>,
    ) {
        note!(stage, "volume {} answers {asked:?}: {outcome:?}", self.number);
        let answer = Box::new(answer(server.boot, &self.record, outcome, proof));
        stage.send_to_client(connection, ToClient::Handoff { asked, attempt, answer });
    }

    fn seal_asked(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        request: &HandoffRequest,
    ) {
        let Some(peer) = self.peers.get(&connection) else { return };
        let Ask::Seal(counts) = &request.ask else { return };
        let (attempt, session) = (request.attempt, peer.session);
        let seal = WaitingSeal { connection, attempt, session, counts: counts.clone() };
        let is_sealed = self.record.handoff.as_ref().is_some_and(|handoff| handoff.sealed);
        let is_frozen = self.record.phase == Phase::Frozen;
        if is_frozen && !is_sealed && !self.is_reached(stage, &seal) {
            // Nothing more can arrive.
            let ask = (Asked::Seal, attempt);
            self.send(stage, server, connection, ask, Outcome::NotSealed, None);
        } else {
            self.seals.push(seal);
        }
    }

    fn is_reached(&self, stage: &Stage, seal: &WaitingSeal) -> bool {
        stage.has(Bug::CountsIgnored)
            || self.record.phase == Phase::Sealed
            || seal.counts.iter().all(|count| {
                let seat = self.seats.get(&count.queue).filter(|s| s.session == seal.session);
                count.is_reached(seat.map_or(Seq(0), |seat| seat.arrived))
            })
    }

    /// Goes on with seals whose counts are reached or that are out of date.
    fn look_at_seals(&mut self, stage: &mut Stage, server: &Server) -> bool {
        let waiting = std::mem::take(&mut self.seals);
        let before = waiting.len();
        for seal in waiting {
            let WaitingSeal { connection, attempt, session, .. } = seal;
            match self.record.step(Input::Sealed { attempt, session }) {
                Err(refusal) => {
                    self.answer(stage, server, connection, (Asked::Seal, attempt), Some(&refusal));
                }
                Ok(_) if self.is_reached(stage, &seal) => {
                    self.jobs.push_back(Job::Sealed { connection, attempt, session });
                }
                Ok(_) => self.seals.push(seal),
            }
        }
        if !self.seals.is_empty() {
            stage.reached(Point::SealWaits);
        }
        self.seals.len() != before
    }
}
