//! A backend: the product's [`Role`] with a small client around it that carries
//! out what it says.
//!
//! | module | noun |
//! |---|---|
//! | [`link`] | one connection, and the queue on it |
//! | `connections` | what is heard on all of them, and how they come and go |

mod connections;
mod link;

use baton_protocol::handoff::role::{Asked, Input, Order, Output, Standing};
use baton_protocol::handoff::{Ask, HandoffRequest, Open, Proof, Role, Try};
use baton_protocol::{QueueId, Seq, SessionId, VolumeId};

use crate::agenda::{MS, Time};
use crate::bug::Bug;
use crate::fault::Point;
use crate::server::owner_name;
use crate::stage::{Event, Stage, ToServer, note};
use crate::vm::Vm;
use link::{Grant, Link, Pending, Queue, State};

/// One volume of the VM.
#[derive(Debug)]
struct Member {
    control: Link,
    queues: Vec<Queue>,
    /// Incarnation of the server and version of the record last heard of.
    known: (u64, u64),
    asks: Vec<(Try, Asked)>,
    open: Option<(Try, Proof)>,
    grant: Option<Grant>,
    /// The VMM's rings run.
    running: bool,
    /// The VMM waits for the rings to drain.
    stopping: bool,
    /// [`Bug::NoReclaim`]: goes on without asking.
    rogue: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Backend {
    number: usize,
    pub(crate) host: usize,
    /// Where its machine is among the world's.
    pub(crate) place: usize,
    pub(crate) session: SessionId,
    pub(crate) alive: bool,
    pub(crate) frozen_until: Time,
    role: Role,
    /// Claims the volumes; a standby waits for them.
    pub(crate) claims: bool,
    members: Vec<Member>,
    /// Its VMM has started rings: it may have activated.
    pub(crate) ever_ran: bool,
}

impl Backend {
    /// A new process, whose VMM connects at once. It claims the volumes, or stands
    /// by for a try.
    pub(crate) fn start(
        stage: &mut Stage,
        number: usize,
        host: usize,
        stands_by: Option<Try>,
        vm: &Vm,
    ) -> Self {
        let claims = stands_by.is_none();
        let session = SessionId(stage.rng.u64(1..));
        let volumes: Vec<VolumeId> =
            (0..stage.setting.volumes).map(|volume| VolumeId(volume as u64 + 1)).collect();
        let member = |_: &VolumeId| Member {
            control: Link::default(),
            queues: (0..stage.setting.queues).map(|_| Queue::new()).collect(),
            known: (0, 0),
            asks: Vec::new(),
            open: None,
            grant: None,
            running: false,
            stopping: false,
            rogue: false,
        };
        let role = Role::new(&owner_name(host), session, &volumes);
        let role = match stands_by {
            Some(attempt) if !stage.has(Bug::StandbyTakesAnyTry) => role.only_for(attempt),
            _ => role,
        };
        let backend = Self {
            number,
            host,
            place: host,
            session,
            alive: true,
            frozen_until: 0,
            role,
            claims,
            members: volumes.iter().map(member).collect(),
            ever_ran: false,
        };
        note!(stage, "backend {number} starts on host {host}, claims {claims}");
        if !claims {
            stage.reached(Point::StandbyStarted);
        }
        for member in 0..backend.members.len() {
            stage.after(10, Event::Connect { backend: number, member, link: 0 });
            for link in 1..=stage.setting.queues {
                if !claims {
                    stage.after(20, Event::Connect { backend: number, member, link });
                }
            }
            if vm.running {
                stage.after(50, Event::Rings { backend: number, member, on: true });
            }
        }
        stage.after(5 * MS, Event::Check { backend: number });
        backend
    }

    /// The process is gone; the kernel ends its connections.
    pub(crate) fn kill(&mut self, stage: &mut Stage) {
        self.alive = false;
        for member in &mut self.members {
            let queues = member.queues.iter_mut().map(|queue| &mut queue.link);
            for link in queues.chain([&mut member.control]) {
                if let Some(connection) = link.connection.take() {
                    stage.hang_up(connection);
                }
            }
        }
        note!(stage, "backend {} is gone", self.number);
    }

    /// Its host has lost its power: nobody is told that the connections are over.
    pub(crate) fn vanish(&mut self, stage: &mut Stage) {
        self.alive = false;
        for member in &mut self.members {
            let queues = member.queues.iter_mut().map(|queue| &mut queue.link);
            for link in queues.chain([&mut member.control]) {
                if let Some(connection) = link.connection.take() {
                    stage.network.connections[connection].is_cut = true;
                    stage.network.connections[connection].client_open = false;
                }
            }
        }
        note!(stage, "backend {} has vanished", self.number);
    }

    pub(crate) fn standing(&self) -> Standing {
        self.role.standing()
    }

    /// It would not take the next handoff to its host for its own.
    pub(crate) fn is_bound(&self) -> bool {
        self.role.is_bound()
    }

    /// It has seen this try before anything could be decided.
    pub(crate) fn has_witnessed(&self, attempt: Try) -> bool {
        self.role.has_witnessed(attempt)
    }

    /// An agent's order.
    pub(crate) fn order(&mut self, stage: &mut Stage, vm: &mut Vm, order: Order) {
        self.tell(stage, vm, Input::Order(order));
    }

    /// The VMM starts or stops the rings of a member.
    pub(crate) fn rings(&mut self, stage: &mut Stage, vm: &mut Vm, at: usize, on: bool) {
        let member = &mut self.members[at];
        if on {
            if !member.running {
                // What an earlier process had taken is done again, in order.
                self.take_over(vm, at, stage.now);
            }
            let member = &mut self.members[at];
            member.running = true;
            member.stopping = false;
            self.ever_ran = true;
            stage.reached(Point::RingsStarted);
            if stage.has(Bug::NoReclaim) && self.role.is_held(at) && member.grant.is_some() {
                member.rogue = true;
            } else {
                self.tell(stage, vm, Input::Started { member: at });
            }
            self.take(stage, vm);
        } else if member.running {
            member.running = false;
            member.stopping = true;
            member.rogue = false;
            stage.reached(Point::RingsStopped);
            self.tell(stage, vm, Input::Stopped { member: at, migrating: vm.migrating });
            self.look_at_drain(vm, at);
        } else if vm.image.as_ref().is_none_or(|image| image.is_drained(at)) {
            vm.drained[at] = true;
        }
    }

    fn take_over(&mut self, vm: &Vm, at: usize, now: Time) {
        let Some(image) = &vm.image else { return };
        for (ring, queue) in image.rings[at].iter().zip(&mut self.members[at].queues) {
            for (place, request) in &ring.taken {
                if queue.pending.values().all(|pending| pending.place != *place) {
                    let pending =
                        Pending { place: *place, kind: request.kind, sent: None, since: now };
                    queue.pending.insert(queue.next, pending);
                    queue.next += 1;
                }
            }
        }
    }

    fn look_at_drain(&mut self, vm: &mut Vm, at: usize) {
        let member = &self.members[at];
        let stopping = member.stopping && !vm.running;
        if stopping && member.queues.iter().all(|queue| queue.pending.is_empty()) {
            vm.drained[at] = true;
        }
    }

    /// Takes what the guest made available, as far as it may, and sends it.
    pub(crate) fn take(&mut self, stage: &mut Stage, vm: &mut Vm) {
        let Some(image) = &mut vm.image else { return };
        for at in 0..self.members.len() {
            let held = self.role.is_held(at);
            let member = &mut self.members[at];
            if member.running && (!held || member.rogue) {
                for (ring, queue) in image.rings[at].iter_mut().zip(&mut member.queues) {
                    while let Some((place, request)) = ring.take() {
                        let kind = request.kind;
                        let pending = Pending { place, kind, sent: None, since: stage.now };
                        queue.pending.insert(queue.next, pending);
                        queue.next += 1;
                    }
                }
            }
            for queue in 0..self.members[at].queues.len() {
                self.send(stage, at, queue);
            }
        }
    }

    fn send(&mut self, stage: &mut Stage, at: usize, queue: usize) {
        let queue = &mut self.members[at].queues[queue];
        let (State::Owner | State::Opening) = queue.link.state else { return };
        let (Some(connection), Some(epoch)) = (queue.link.connection, queue.epoch) else { return };
        for (seq, pending) in &mut queue.pending {
            // What was refused on this connection under this epoch waits for another.
            if pending.sent != Some((connection, epoch)) {
                let fresh = pending.sent.is_none_or(|(sent, _)| sent != connection);
                if !fresh {
                    continue;
                }
                pending.sent = Some((connection, epoch));
                let kind = pending.kind;
                stage.send_to_server(connection, ToServer::Io { seq: Seq(*seq), epoch, kind });
            }
        }
    }

    fn tell(&mut self, stage: &mut Stage, vm: &mut Vm, input: Input) {
        stage.coverage.told(self.role.standing(), &input);
        let outputs = self.role.step(input);
        for output in outputs {
            self.obey(stage, output);
        }
        self.take(stage, vm);
    }

    fn obey(&mut self, stage: &mut Stage, output: Output) {
        let number = self.number;
        match output {
            Output::Ask { member, attempt, ask } => {
                note!(stage, "backend {number} asks volume {member} to {ask:?}");
                if stage.has(Bug::NoReclaim) && ask == Asked::Reclaim {
                    return;
                }
                self.members[member].asks.push((attempt, ask));
                self.send_ask(stage, member, (attempt, ask));
            }
            Output::Open { member, attempt, proof } => {
                note!(stage, "backend {number} opens volume {member} for {:?}", proof.side);
                self.members[member].open = Some((attempt, proof));
                self.send_open(stage, member);
            }
            Output::Hold { member } => {
                note!(stage, "backend {number} holds volume {member}");
            }
            Output::Go { member, epoch, open } => {
                note!(stage, "backend {number} goes on with volume {member}, epoch {epoch}");
                self.members[member].grant = Some(Grant { epoch, open });
                for queue in 0..self.members[member].queues.len() {
                    self.go(stage, member, queue);
                }
            }
            Output::Park(why) => note!(stage, "backend {number} parks: {why:?}"),
        }
    }

    /// A queue goes on under the member's grant, as far as its connection allows.
    fn go(&mut self, stage: &mut Stage, at: usize, number: usize) {
        let Some(grant) = self.members[at].grant else { return };
        let queue = &mut self.members[at].queues[number];
        let Some(connection) = queue.link.connection else { return };
        match (queue.link.state, grant.open) {
            (State::Standby | State::Opening, Some((attempt, proof))) => {
                queue.link.state = State::Opening;
                queue.link.since = stage.now;
                stage.send_to_server(connection, ToServer::Open(Open { attempt, proof }));
            }
            (State::Standby, None) => {
                queue.link.stands_by = false;
                return self.reconnect(stage, at, number + 1, 0);
            }
            (State::Owner, _) => {}
            _ => return,
        }
        queue.epoch = Some(grant.epoch);
        Self::forget_refused(queue);
        self.send(stage, at, number);
    }

    /// What was refused is sent again.
    fn forget_refused(queue: &mut Queue) {
        let epoch = queue.epoch;
        for pending in queue.pending.values_mut() {
            if pending.sent.is_some_and(|(_, sent)| sent.0 == 0 && epoch.is_some()) {
                pending.sent = None;
            }
        }
    }

    fn send_ask(&mut self, stage: &mut Stage, at: usize, (attempt, asked): (Try, Asked)) {
        let member = &mut self.members[at];
        let (State::Standby | State::Owner, Some(connection)) =
            (member.control.state, member.control.connection)
        else {
            return;
        };
        member.control.since = stage.now;
        let ask = match asked {
            Asked::Seal => Ask::Seal(
                (0u16..).zip(&member.queues).map(|(id, queue)| queue.count(QueueId(id))).collect(),
            ),
            Asked::Activate => Ask::Activate,
            Asked::Reclaim => Ask::Reclaim,
            Asked::Abdicate => Ask::Abdicate,
            Asked::Unfreeze { boot_id } => Ask::Unfreeze { boot_id },
        };
        let request = HandoffRequest { attempt, ask };
        stage.send_to_server(connection, ToServer::Handoff { asked, request });
    }

    fn send_open(&mut self, stage: &mut Stage, at: usize) {
        let control = &mut self.members[at].control;
        if let (State::Standby | State::Owner, Some(connection), Some((attempt, proof))) =
            (control.state, control.connection, self.members[at].open)
        {
            self.members[at].control.since = stage.now;
            stage.send_to_server(connection, ToServer::Open(Open { attempt, proof }));
        }
    }
}
