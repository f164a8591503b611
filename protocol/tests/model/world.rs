//! The world that the model explores: servers, backends, VMs, a network and a
//! coordinator, around the real [`AccessRecord`] and the real [`Role`].
//!
//! One member per server, so that members crash apart. Every member holds one
//! cell; a write puts a number into it that says who wrote it and in which
//! order, so a write that appears where it must not makes the number fall.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal, Step, Store};
use baton_protocol::handoff::role::{self, Asked, Order, Output, Standing};
use baton_protocol::handoff::{
    Answer, Count, HandoffId, Key, Members, Mode, Outcome, Plan, Proof, Role, Side, Try,
};
use baton_protocol::{Epoch, QueueId, Seq, SessionId, VolumeId};

use crate::mutant::Mutant;

pub(crate) const S: usize = 0;
pub(crate) const D: usize = 1;
const NAMES: [&str; 2] = ["s", "d"];
/// Who gets the volumes by force.
const THIRD: &str = "x";
const THIRD_SESSION: SessionId = SessionId(99);
/// Numbers written by S count from 1; these say whose the others are.
const FIRST_OF_D: u8 = 10;
const OF_ROGUE: u8 = 30;
const OF_THIRD: u8 = 40;
const TERM: u64 = 1;
/// In the kernel of a server that was killed: no gate knows of it.
const OF_THE_DEAD: u64 = 0;

/// What a run explores.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    pub name: &'static str,
    pub members: usize,
    pub mode: Mode,
    /// How often servers may crash, all together.
    pub server_crashes: u8,
    /// How often the backends of each side may crash.
    pub backend_crashes: [u8; 2],
    /// How many answers may be lost or messages be delivered twice.
    pub net_faults: u8,
    /// How often the source VM may stop under a migration.
    pub stops: u8,
    /// How often its rings may start again.
    pub starts: u8,
    /// The destination VM may be started.
    pub start_d: bool,
    /// Writes of each VM to each member.
    pub writes: [u8; 2],
    /// Tries of the handoff.
    pub attempts: u32,
    /// The coordinator may reclaim, abdicate for a dead destination, settle.
    pub coordinator: bool,
    /// Agents may order to abdicate and to reclaim.
    pub orders: bool,
    /// The members may be fenced for somebody else.
    pub fence: bool,
    /// The destination's host shows decisions that it made up.
    pub rogue: bool,
    /// The handoff is armed and both sides know when the run begins.
    pub armed: bool,
    /// Requests spend time inside the gate, and their answers on the way.
    pub slow_io: bool,
    /// Answers of the members spend time on the way.
    pub slow_answers: bool,
    /// What a dead process said is still heard after its successor has
    /// introduced itself. A server that listens to the newest incarnation only
    /// does not; safety must hold even so.
    pub ghosts: bool,
    /// The orchestrator waits until the destination is ready.
    pub waits: bool,
    /// A backend may be replaced while it only hangs, and go on later.
    pub zombies: bool,
    pub mutant: Option<Mutant>,
}

impl Scope {
    pub(crate) fn new(name: &'static str, mode: Mode) -> Self {
        Self {
            name,
            members: 2,
            mode,
            server_crashes: 1,
            backend_crashes: [0, 0],
            net_faults: 0,
            stops: 1,
            starts: 1,
            start_d: true,
            writes: [1, 1],
            attempts: 1,
            coordinator: false,
            orders: false,
            fence: false,
            rogue: false,
            armed: true,
            slow_io: false,
            slow_answers: false,
            ghosts: false,
            waits: false,
            zombies: false,
            mutant: None,
        }
    }

    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(crate) fn volume(at: usize) -> VolumeId {
        VolumeId(at as u64 + 1)
    }

    fn volumes(&self) -> Vec<VolumeId> {
        (0..self.members).map(Self::volume).collect()
    }

    pub(crate) fn plan(&self, attempt: u32) -> Plan {
        Plan {
            attempt: Try { id: HandoffId(1), attempt },
            vm: "v".to_owned(),
            from: NAMES[S].to_owned(),
            to: NAMES[D].to_owned(),
            anchor: Self::volume(ANCHOR),
            members: Members::of(self.volumes()),
            mode: self.mode,
            key: Key([7; 32]),
        }
    }
}

/// Position of the anchor.
pub(crate) const ANCHOR: usize = 0;

/// What must never be seen; the numbers are those of `docs/handoff.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Broken {
    /// I1: one principal at a time, epochs never fall.
    TwoPrincipals,
    /// I2, I4: an acknowledged write is gone, or an old one came back.
    LostOrResurrected,
    /// I5: the destination runs and a request of the source is not done.
    Undone,
    /// I6: a decision was undone.
    DecisionUndone,
    /// I7: a member follows another winner than the anchor decided.
    Divided,
    /// I8: a standby wrote.
    StandbyWrote,
}

/// One member and its server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Server {
    pub disk: AccessRecord,
    /// What is on its way to the disk.
    later: Option<AccessRecord>,
    pub record: AccessRecord,
    pub boot: u64,
    sealing: Option<Sealing>,
    cell: u8,
    /// Highest number carried in for a session in this boot.
    arrived: (u64, u8),
    /// To whom each epoch was admitted.
    holders: BTreeMap<u64, u64>,
    fenced: bool,
}

/// A SEAL that waits for what the source sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Sealing {
    message: Message,
    count: (u8, u8),
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Actor {
    pub side: usize,
    pub alive: bool,
    pub role: Role,
    /// Answer on the way, and what was asked; one at a time on each connection.
    slots: Vec<Option<(Message, Reply)>>,
    seen: Vec<Option<(u64, u64)>>,
    opens: Vec<Option<(Try, Proof)>>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Reply {
    Answer(Box<Answer>),
    Opened(Option<Epoch>),
}

/// What the VMM of one side and its guest know; survives the backend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Vm {
    pub running: bool,
    issued: Vec<u8>,
    acked: Vec<u8>,
    /// What it had issued when it stopped last: what the other side's memory
    /// knows of.
    at_stop: Option<Vec<u8>>,
}

/// What a backend says to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Body {
    /// With the last number sent and the lowest not answered.
    Seal(u8, u8),
    Ask(Asked),
    Open(Proof),
}

/// Of an ask or an OPEN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Message {
    pub actor: usize,
    pub member: usize,
    pub attempt: Try,
    pub body: Body,
}

/// A write on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Request {
    pub member: usize,
    pub actor: usize,
    pub value: u8,
    pub epoch: Epoch,
    /// The server's incarnation that it was sent to.
    pub boot: u64,
    pub open: Option<(Try, Proof)>,
    pub stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Stage {
    Sent,
    /// Admitted, not done.
    Inside,
    /// Done; the answer is on its way.
    Done,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub servers: Vec<Arc<Server>>,
    pub actors: Vec<Arc<Actor>>,
    pub vms: [Vm; 2],
    net: BTreeSet<Message>,
    requests: BTreeSet<Request>,
    coordinator: Coordinator,
    /// How each try was decided, once anybody could know.
    winners: BTreeMap<Try, Side>,
    d_wrote: bool,
    pub left: Left,
    pub broken: Option<Broken>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Coordinator {
    attempt: u32,
    armed: usize,
    reclaimed: bool,
    abdicated: bool,
    proof: Option<(SessionId, Proof)>,
}

/// What may still go wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Left {
    pub server_crashes: u8,
    pub backend_crashes: [u8; 2],
    pub net_faults: u8,
    pub stops: u8,
    pub starts: u8,
    orders: u8,
    rogue: u8,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Arm,
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
    pub(crate) fn new(scope: &Scope) -> Self {
        let mut servers = Vec::new();
        for at in 0..scope.members {
            let record = AccessRecord::new(Scope::volume(at));
            let claim = Input::Claim { name: NAMES[S], session: session(0) };
            let record = record.step(claim).expect("free").record;
            servers.push(Arc::new(Server {
                disk: record.clone(),
                later: None,
                record,
                boot: 1,
                sealing: None,
                cell: 0,
                arrived: (0, 0),
                holders: BTreeMap::new(),
                fenced: false,
            }));
        }
        let vm = |running, from: u8| Vm {
            running,
            issued: vec![from; scope.members],
            acked: vec![from; scope.members],
            at_stop: None,
        };
        let mut world = Self {
            servers,
            actors: vec![
                Arc::new(Actor::new(scope, S, session(0))),
                Arc::new(Actor::new(scope, D, session(1))),
            ],
            vms: [vm(true, 0), vm(false, FIRST_OF_D)],
            net: BTreeSet::new(),
            requests: BTreeSet::new(),
            coordinator: Coordinator {
                attempt: 1,
                armed: 0,
                reclaimed: false,
                abdicated: false,
                proof: None,
            },
            winners: BTreeMap::new(),
            d_wrote: false,
            left: Left {
                server_crashes: scope.server_crashes,
                backend_crashes: scope.backend_crashes,
                net_faults: scope.net_faults,
                stops: scope.stops,
                starts: scope.starts,
                orders: u8::from(scope.orders),
                rogue: u8::from(scope.rogue),
            },
            broken: None,
        };
        for member in 0..scope.members {
            let epoch = world.servers[member].record.epoch;
            world.tell(scope, 0, role::Input::Claimed { member, epoch });
            world.tell(scope, 0, role::Input::Started { member });
        }
        if scope.armed {
            for _ in 0..scope.members {
                world.arm(scope).expect("free to arm");
            }
            for (actor, member) in (0..scope.members).flat_map(|member| [(0, member), (1, member)])
            {
                let look = Action::Look { actor, member };
                world.act(scope, &look).expect("there is a view");
            }
        }
        world
    }

    /// The live process of a side.
    pub(crate) fn live(&self, side: usize) -> Option<usize> {
        self.actors.iter().rposition(|actor| actor.side == side && actor.alive)
    }

    /// Whether a side's VM does I/O on all members.
    pub(crate) fn is_up(&self, side: usize) -> bool {
        let Some(at) = self.live(side) else { return false };
        let role = &self.actors[at].role;
        self.vms[side].running
            && role.parked().is_none()
            && self.servers.iter().enumerate().all(|(member, server)| {
                !role.is_held(member)
                    && role.granted(member).is_some()
                    && role.granted(member) == server.record.admits().owner
            })
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.servers.iter().any(|server| server.fenced)
    }

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

    fn data_actions(&self, scope: &Scope, out: &mut Vec<Action>) {
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

    fn message_actions(&self, out: &mut Vec<Action>) {
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

    fn accidents(&self, scope: &Scope, out: &mut Vec<Action>) {
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

    fn orders(&self, scope: &Scope, out: &mut Vec<Action>) {
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
            out.push(Action::Order { side: D, order: Order::Abdicate });
            out.push(Action::Order { side: S, order: Order::Reclaim });
        }
    }

    fn coordinator_actions(&self, scope: &Scope, out: &mut Vec<Action>) {
        let coordinator = &self.coordinator;
        if coordinator.armed < scope.members {
            out.push(Action::Arm);
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
            let decided = self.winners.get(&scope.plan(coordinator.attempt).attempt);
            // A source that stands still seals as soon as it is armed again; one
            // that waits lets it run first.
            if coordinator.attempt < scope.attempts
                && (self.vms[S].running || !scope.waits)
                && decided == Some(&Side::Source)
                && self.servers.iter().all(|server| server.record.handoff.is_none())
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

    /// What the world is after an action; `None` when it cannot happen now.
    pub(crate) fn after(&self, scope: &Scope, action: &Action) -> Option<Self> {
        let mut next = self.clone();
        next.act(scope, action)?;
        (next != *self).then_some(next)
    }

    fn act(&mut self, scope: &Scope, action: &Action) -> Option<()> {
        match *action {
            Action::Arm => self.arm(scope)?,
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
            Action::Fence { member } => {
                let fence = Input::Fence { term: Some(TERM), nominee: Some(THIRD) };
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
                let epoch = handoff.e_to;
                self.send(1, member, OF_ROGUE, epoch, Some((attempt, proof)));
            }
        }
        Some(())
    }

    fn attempt(&self, scope: &Scope) -> Try {
        scope.plan(self.coordinator.attempt).attempt
    }

    fn arm(&mut self, scope: &Scope) -> Option<()> {
        if self.coordinator.armed == scope.members {
            self.coordinator = Coordinator {
                attempt: self.coordinator.attempt + 1,
                armed: 0,
                reclaimed: true,
                abdicated: true,
                proof: None,
            };
        }
        let plan = scope.plan(self.coordinator.attempt);
        let member = self.coordinator.armed;
        self.coordinator.armed += 1;
        // Refused when the source is gone from here; the try is then stillborn.
        let next_epoch = self.servers[member].record.next_epoch;
        let arm = Input::Arm { plan: &plan, term: TERM, next_epoch, generation: 1 };
        let _ = self.judge(scope, member, arm)?;
        Some(())
    }

    fn server(&mut self, at: usize) -> &mut Server {
        Arc::make_mut(&mut self.servers[at])
    }

    fn actor(&mut self, at: usize) -> &mut Actor {
        Arc::make_mut(&mut self.actors[at])
    }

    fn is_inside(&self, member: usize) -> bool {
        let inside = |r: &Request| r.member == member && r.stage == Stage::Inside;
        self.requests.iter().any(|r| inside(r) && r.boot != OF_THE_DEAD)
    }

    /// A record judges an input, and the server does what the step says. `None`
    /// while the gate has to drain first.
    fn judge(
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
        server.record = record;
        self.check_decision(scope, member);
        Some(Ok(()))
    }

    fn check_decision(&mut self, scope: &Scope, member: usize) {
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

    fn send(
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

    fn carry(&mut self, scope: &Scope, request: Request) -> Option<()> {
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
            let done = Request { stage: Stage::Done, ..request };
            self.act(scope, &Action::Ack(done))?;
        }
        Some(())
    }

    fn apply(&mut self, request: Request) {
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
            self.broken = Some(Broken::LostOrResurrected);
        }
        self.d_wrote |= d;
        self.server(request.member).arrived = (session(request.actor).0, request.value);
        self.put(request.member, request.value);
        self.requests.insert(Request { stage: Stage::Done, ..request });
    }

    fn put(&mut self, member: usize, value: u8) {
        if value < self.servers[member].cell {
            self.broken = Some(Broken::LostOrResurrected);
        }
        self.server(member).cell = value;
    }

    /// A server handles a message and puts the answer on its way.
    fn deliver(&mut self, scope: &Scope, message: Message) -> Option<()> {
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

    fn seal(&mut self, scope: &Scope, message: Message, count: (u8, u8)) -> Option<()> {
        let Message { actor, member, attempt, .. } = message;
        let seal = Input::Seal { attempt, session: session(actor) };
        if let Err(refusal) = self.judge(scope, member, seal)? {
            self.answer(message, Outcome::from(&refusal));
            return Some(());
        }
        self.server(member).sealing = Some(Sealing { message, count });
        Some(())
    }

    fn finish_seal(&mut self, scope: &Scope, member: usize) -> Option<()> {
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

    fn answer(&mut self, message: Message, outcome: Outcome) {
        let server = &self.servers[message.member];
        let record = &server.record;
        let mine = record.owner.as_ref().is_some_and(|o| o.session == session(message.actor));
        let proof =
            if mine && message.member == ANCHOR { record.proof(message.attempt) } else { None };
        let answer = Answer { outcome, boot_id: server.boot, proof, record: record.without_keys() };
        self.reply(message, Reply::Answer(Box::new(answer)));
    }

    fn reply(&mut self, message: Message, reply: Reply) {
        if self.actors[message.actor].alive {
            self.actor(message.actor).slots[message.member] = Some((message, reply));
        }
    }

    fn hear_at_once(&mut self, scope: &Scope, message: Message) {
        if let Some((message, reply)) = self.actor(message.actor).slots[message.member].take() {
            self.hear(scope, message, reply);
        }
    }

    fn hear(&mut self, scope: &Scope, message: Message, reply: Reply) {
        let Message { actor, member, attempt, body } = message;
        let input = match (body, reply) {
            (_, Reply::Opened(epoch)) => role::Input::Opened { member, epoch },
            (Body::Seal(..), Reply::Answer(answer)) => {
                role::Input::Answered { member, attempt, ask: Asked::Seal, answer }
            }
            (Body::Ask(ask), Reply::Answer(answer)) => {
                role::Input::Answered { member, attempt, ask, answer }
            }
            (Body::Open(_), Reply::Answer(_)) => return,
        };
        if let role::Input::Answered { answer, .. } = &input {
            let seen = Some((answer.boot_id, answer.record.version));
            self.actor(actor).seen[member] = seen;
        }
        self.tell(scope, actor, input);
    }

    /// A backend hears something and does what its role says.
    fn tell(&mut self, scope: &Scope, at: usize, input: role::Input) {
        let anchor = self.servers[ANCHOR].record.clone();
        let side = self.actors[at].side;
        let input = scope.hear(side, &anchor, input);
        let mut outputs = self.actor(at).role.step(input.clone());
        scope.say(side, &input, &self.actors[at].role, &mut outputs);
        for output in outputs {
            match output {
                Output::Ask { member, attempt, ask } => {
                    let vm = &self.vms[side];
                    let body = match ask {
                        Asked::Seal => Body::Seal(vm.issued[member], vm.acked[member] + 1),
                        ask => Body::Ask(ask),
                    };
                    self.net.insert(Message { actor: at, member, attempt, body });
                }
                Output::Open { member, attempt, proof } => {
                    let body = Body::Open(proof);
                    self.net.insert(Message { actor: at, member, attempt, body });
                }
                Output::Go { member, epoch, open } => self.go(at, member, epoch, open),
                Output::Hold { .. } | Output::Park(_) => {}
            }
        }
    }

    fn go(&mut self, at: usize, member: usize, epoch: Epoch, open: Option<(Try, Proof)>) {
        let side = self.actors[at].side;
        self.actor(at).opens[member] = open;
        if side == D {
            let undone = |(server, issued): (&Arc<Server>, &u8)| server.cell < *issued;
            let source = &self.vms[S];
            let taken = source.at_stop.as_ref().unwrap_or(&source.issued);
            if self.servers.iter().zip(taken).any(undone) {
                self.broken = Some(Broken::Undone);
            }
        }
        let vm = &self.vms[side];
        let value = vm.issued[member];
        let waits = self
            .requests
            .iter()
            .any(|r| (r.member, r.actor, r.value, r.epoch) == (member, at, value, epoch));
        if value > vm.acked[member] && !waits {
            self.send(at, member, value, epoch, open);
        }
    }

    fn start(&mut self, scope: &Scope, side: usize) {
        self.vms[side].running = true;
        if let Some(at) = self.live(side) {
            for member in 0..scope.members {
                self.tell(scope, at, role::Input::Started { member });
            }
        }
    }

    fn crash(&mut self, scope: &Scope, member: usize, stored: bool) {
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
        let unanswered = server.sealing.take();
        // Its client asks again.
        if let Some(sealing) = unanswered
            && self.actors[sealing.message.actor].alive
        {
            self.net.insert(sealing.message);
        }
        self.check_decision(scope, member);
    }

    fn kill(&mut self, at: usize) {
        let actor = self.actor(at);
        actor.alive = false;
        actor.slots.iter_mut().for_each(|slot| *slot = None);
        self.requests.retain(|r| r.actor != at || r.stage != Stage::Done);
    }

    /// A new process of a side: it claims what it can, or nothing.
    fn restart(&mut self, scope: &Scope, side: usize, standby: bool) -> Option<()> {
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
        let actor = Actor::new(scope, side, session(at));
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

    /// What dead processes said is lost.
    pub(crate) fn forget_the_dead(&mut self) {
        let actors = self.actors.clone();
        self.net.retain(|message| actors[message.actor].alive);
        self.requests.retain(|request| actors[request.actor].alive);
    }
}

impl Actor {
    fn new(scope: &Scope, side: usize, session: SessionId) -> Self {
        Self {
            side,
            alive: true,
            role: Role::new(NAMES[side], session, &scope.volumes()),
            slots: vec![None; scope.members],
            seen: vec![None; scope.members],
            opens: vec![None; scope.members],
        }
    }
}

/// The incarnation that is the process at this position.
fn session(at: usize) -> SessionId {
    SessionId(at as u64 + 1)
}
