//! What a backend hears on its connections, and how these come and go.

use baton_protocol::access::Phase;
use baton_protocol::handoff::Answer;
use baton_protocol::handoff::role::Input;
use baton_protocol::{Epoch, QueueId, Seq};

use super::Backend;
use super::link::{Grant, Link, State};
use crate::agenda::{MS, Time};
use crate::bug::Bug;
use crate::server::owner_name;
use crate::stage::{Event, Greeting, Refused, Stage, ToClient, ToServer};
use crate::vm::Vm;

/// How long a request may stay unanswered before its connection is given up.
const TIMEOUT: Time = 30 * MS;

impl Backend {
    fn link(&mut self, at: usize, link: usize) -> &mut Link {
        let member = &mut self.members[at];
        match link.checked_sub(1) {
            None => &mut member.control,
            Some(queue) => &mut member.queues[queue].link,
        }
    }

    pub(super) fn reconnect(&mut self, stage: &mut Stage, member: usize, link: usize, delay: Time) {
        let slot = self.link(member, link);
        slot.state = State::Down;
        if let Some(connection) = slot.connection.take() {
            stage.hang_up(connection);
        }
        let pause = stage.between(200, MS) + delay;
        stage.after(pause, Event::Connect { backend: self.number, member, link });
    }

    /// A connection is tried.
    pub(crate) fn connect(&mut self, stage: &mut Stage, member: usize, link: usize) {
        let granted = self.role.granted(member);
        let claims = self.claims;
        let (number, host, session) = (self.number, self.host, self.session);
        let resume_from = match link.checked_sub(1) {
            None => Seq(1),
            Some(queue) => self.members[member].queues[queue].lowest(),
        };
        let slot = self.link(member, link);
        if slot.connection.is_some() {
            return;
        }
        let greeting = match granted {
            Some(epoch) if !slot.stands_by => Greeting::Rejoin(epoch),
            None if link == 0 && claims && !slot.stands_by => Greeting::Claim,
            _ => Greeting::Standby,
        };
        let queue = link
            .checked_sub(1)
            .map_or(QueueId::CONTROL, |queue| QueueId(u16::try_from(queue).expect("few queues")));
        let connection = stage.connect((number, host, session), member, queue);
        slot.connection = Some(connection);
        slot.state = State::Greeting;
        slot.since = stage.now;
        stage.send_to_server(connection, ToServer::Hello { greeting, resume_from });
    }

    /// A message arrives on one of its connections.
    pub(crate) fn hear(
        &mut self,
        stage: &mut Stage,
        vm: &mut Vm,
        connection: usize,
        message: ToClient,
    ) {
        let known = &stage.network.connections[connection];
        let (at, queue) = (known.volume, known.queue);
        let link = if queue == QueueId::CONTROL { 0 } else { usize::from(queue.0) + 1 };
        if self.link(at, link).connection != Some(connection) {
            return;
        }
        match message {
            ToClient::End => self.reconnect(stage, at, link, 0),
            ToClient::Refused(why) => self.refused(stage, at, link, why),
            ToClient::Welcome { epoch, owner } => {
                self.welcomed(stage, vm, (at, link), epoch, owner)
            }
            ToClient::Done { seq, read } => self.done(stage, vm, (at, link - 1), seq, read),
            ToClient::Stale { seq } => {
                let queue = &mut self.members[at].queues[link - 1];
                let epoch = queue.epoch;
                let Some(pending) = queue.pending.get_mut(&seq.0) else { return };
                let old = pending.sent.is_some_and(|(_, sent)| Some(sent) != epoch);
                pending.sent = if old { None } else { Some((connection, Epoch(0))) };
                self.tell(stage, vm, Input::Stuck { member: at });
            }
            ToClient::Access(answer) => {
                let Answer { boot_id, record, .. } = *answer;
                self.members[at].known = (boot_id, record.version);
                let version = record.version;
                let mut record = Box::new(record);
                if stage.has(Bug::AnchorSealOnly)
                    && record.phase == Phase::Armed
                    && let Some(handoff) = &record.handoff
                    && handoff.plan.anchor != record.volume
                    && handoff.plan.to == owner_name(self.host)
                {
                    record.phase = Phase::Sealed;
                }
                stage.send_to_server(connection, ToServer::Access { boot_id, version });
                self.tell(stage, vm, Input::View { member: at, boot_id, record });
            }
            ToClient::Handoff { asked, attempt, answer } => {
                let asks = &mut self.members[at].asks;
                let Some(place) = asks.iter().position(|ask| *ask == (attempt, asked)) else {
                    return;
                };
                asks.remove(place);
                self.tell(stage, vm, Input::Answered { member: at, attempt, ask: asked, answer });
            }
            ToClient::Opened(epoch) => self.opened(stage, vm, (at, link), epoch),
        }
    }

    fn refused(&mut self, stage: &mut Stage, at: usize, link: usize, why: Refused) {
        match why {
            Refused::StaleEpoch => self.link(at, link).stands_by = true,
            Refused::InHandoff => {
                self.link(at, link).stands_by = true;
                for queue in 1..=self.members[at].queues.len() {
                    let event = Event::Connect { backend: self.number, member: at, link: queue };
                    stage.after(10, event);
                }
            }
            Refused::Busy | Refused::NotOwner => {}
        }
        self.reconnect(stage, at, link, MS / 2);
    }

    fn welcomed(
        &mut self,
        stage: &mut Stage,
        vm: &mut Vm,
        (at, link): (usize, usize),
        epoch: Epoch,
        owner: bool,
    ) {
        let slot = self.link(at, link);
        slot.state = if owner { State::Owner } else { State::Standby };
        slot.stands_by &= !owner;
        if let Some(queue) = link.checked_sub(1) {
            if owner {
                self.members[at].queues[queue].epoch = Some(epoch);
                self.send(stage, at, queue);
            } else if self.members[at].grant.is_some_and(|grant| grant.open.is_some()) {
                self.go(stage, at, queue);
            }
            return;
        }
        let member = &self.members[at];
        let (Some(connection), (boot_id, version)) = (member.control.connection, member.known)
        else {
            return;
        };
        stage.send_to_server(connection, ToServer::Access { boot_id, version });
        for ask in self.members[at].asks.clone() {
            self.send_ask(stage, at, ask);
        }
        self.send_open(stage, at);
        if owner && self.role.granted(at).is_none() {
            self.members[at].grant = Some(Grant { epoch, open: None });
            for queue in 1..=self.members[at].queues.len() {
                self.reconnect(stage, at, queue, 0);
            }
            self.tell(stage, vm, Input::Claimed { member: at, epoch });
        }
    }

    fn done(
        &mut self,
        stage: &mut Stage,
        vm: &mut Vm,
        (at, queue): (usize, usize),
        seq: Seq,
        read: u64,
    ) {
        let Some(pending) = self.members[at].queues[queue].pending.remove(&seq.0) else { return };
        vm.complete(stage, (at, queue, pending.place), read);
        self.look_at_drain(vm, at);
        self.take(stage, vm);
    }

    fn opened(
        &mut self,
        stage: &mut Stage,
        vm: &mut Vm,
        (at, link): (usize, usize),
        epoch: Option<Epoch>,
    ) {
        let slot = self.link(at, link);
        if epoch.is_some() {
            slot.state = State::Owner;
            slot.stands_by = false;
        } else if slot.state == State::Opening {
            slot.state = State::Standby;
            slot.since = stage.now;
        }
        if let Some(queue) = link.checked_sub(1) {
            let queue_state = &mut self.members[at].queues[queue];
            match epoch {
                Some(_) => {
                    queue_state.epoch = epoch;
                    Self::forget_refused(queue_state);
                    self.send(stage, at, queue);
                }
                None => queue_state.pending.values_mut().for_each(|pending| pending.sent = None),
            }
        } else if self.members[at].open.take().is_some() {
            self.tell(stage, vm, Input::Opened { member: at, epoch });
        }
    }

    /// From time to time: gives up connections on which nothing comes back.
    pub(crate) fn check(&mut self, stage: &mut Stage, vm: &mut Vm) {
        for at in 0..self.members.len() {
            let now = stage.now;
            let held = self.role.is_held(at);
            let granted = self.role.granted(at).is_some();
            let member = &self.members[at];
            let late = |since: Time| now.saturating_sub(since) > TIMEOUT;
            let asks = !member.asks.is_empty() || member.open.is_some();
            let control = member.control.connection.is_some()
                && late(member.control.since)
                && (member.control.state == State::Greeting || asks);
            let mut tired: Vec<usize> = Vec::new();
            if control {
                tired.push(0);
            }
            for (number, queue) in (1..).zip(&member.queues) {
                let oldest = queue.pending.values().map(|pending| pending.since).min();
                let waits = match queue.link.state {
                    State::Down => false,
                    State::Greeting | State::Opening => late(queue.link.since),
                    State::Standby => {
                        granted && !held && now.saturating_sub(queue.link.since) > 5 * MS
                    }
                    State::Owner => !held && oldest.is_some_and(late),
                };
                if waits && queue.link.connection.is_some() {
                    tired.push(number);
                }
            }
            for link in tired {
                if let Some(queue) = link.checked_sub(1) {
                    let queue = &mut self.members[at].queues[queue];
                    queue.pending.values_mut().for_each(|pending| pending.since = now);
                    queue.link.stands_by = false;
                }
                self.reconnect(stage, at, link, 0);
            }
        }
        self.take(stage, vm);
        stage.after(5 * MS, Event::Check { backend: self.number });
    }

    /// Ends connections: all that `chosen` names, with or without the server's
    /// knowing.
    pub(crate) fn lose_connections(&mut self, stage: &mut Stage, cut: bool) {
        for at in 0..self.members.len() {
            for link in 0..=self.members[at].queues.len() {
                let Some(connection) = self.link(at, link).connection else { continue };
                if stage.chance(0.7) {
                    stage.network.connections[connection].is_cut = cut;
                    self.reconnect(stage, at, link, 0);
                }
            }
        }
    }
}
