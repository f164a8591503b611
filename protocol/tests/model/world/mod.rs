//! The world that the model explores: servers, backends, VMs, a network and a
//! coordinator, around the real [`AccessRecord`] and the real [`Role`].
//!
//! One member per server, so that members crash apart. Every member holds one
//! cell; a write puts a number into it that says who wrote it and in which
//! order, so a write that appears where it must not makes the number fall.
//!
//! | module | noun |
//! |---|---|
//! | `action` | what can happen next |
//! | `happen` | what the world is then |
//! | `server` | a member: record, gate, and what is carried out |
//! | `backend` | what a backend hears, says and does |

mod action;
mod backend;
mod happen;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use baton_protocol::access::{AccessRecord, Input};
use baton_protocol::handoff::role::{self, Asked};
use baton_protocol::handoff::{Answer, Proof, Role, Side, Try};
use baton_protocol::{Epoch, SessionId};

use crate::scope::{ANCHOR, D, FIRST_OF_D, NAMES, S, Scope};

pub(crate) use action::Action;

/// Orders of agents in a run: enough to contradict themselves.
const ORDERS: u8 = 2;

/// What must never be seen; the numbers are those of `docs/handoff.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Broken {
    /// I1: one principal at a time, epochs never fall.
    TwoPrincipals,
    /// I2: an acknowledged write is gone.
    Lost,
    /// I3: a read sees less than what was acknowledged before.
    StaleRead,
    /// I4: an old write came back.
    Resurrected,
    /// I5: the destination runs and a request of the source is not done.
    Undone,
    /// I6: a decision was undone, or a handoff that had ended began again.
    DecisionUndone,
    /// I7: a member follows another winner than the anchor decided.
    Divided,
    /// I8: a standby wrote.
    StandbyWrote,
}

impl Broken {
    pub(crate) const ALL: [Self; 8] = [
        Self::TwoPrincipals,
        Self::Lost,
        Self::StaleRead,
        Self::Resurrected,
        Self::Undone,
        Self::DecisionUndone,
        Self::Divided,
        Self::StandbyWrote,
    ];
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
    /// Handoffs that have ended here.
    over: BTreeSet<Try>,
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
    /// What a destination that reads ahead has read of each member.
    cached: Vec<Option<u8>>,
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
    /// Every ARM that was sent: member, attempt's number, planned next epoch.
    arms: BTreeSet<(usize, u32, Epoch)>,
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
    /// Next epochs of the members when the try was planned.
    planned: Vec<Epoch>,
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
    pub late_arms: u8,
    pub stops: u8,
    pub starts: u8,
    orders: u8,
    rogue: u8,
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
                over: BTreeSet::new(),
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
                Arc::new(Actor::new(scope, S, session(0), None)),
                Arc::new(Actor::new(scope, D, session(1), Some(scope.plan(1).attempt))),
            ],
            vms: [vm(true, 0), vm(false, FIRST_OF_D)],
            net: BTreeSet::new(),
            requests: BTreeSet::new(),
            coordinator: Coordinator {
                attempt: 1,
                armed: 0,
                planned: Vec::new(),
                reclaimed: false,
                abdicated: false,
                proof: None,
            },
            arms: BTreeSet::new(),
            winners: BTreeMap::new(),
            d_wrote: false,
            left: Left {
                server_crashes: scope.server_crashes,
                backend_crashes: scope.backend_crashes,
                net_faults: scope.net_faults,
                late_arms: scope.late_arms,
                stops: scope.stops,
                starts: scope.starts,
                orders: if scope.orders { ORDERS } else { 0 },
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

    /// How the anchor decided the last try.
    pub(crate) fn is_won_by_destination(&self, scope: &Scope) -> bool {
        self.servers[ANCHOR].record.winner(self.attempt(scope)) == Some(Side::Destination)
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.servers.iter().any(|server| server.fenced)
    }

    pub(super) fn attempt(&self, scope: &Scope) -> Try {
        scope.plan(self.coordinator.attempt).attempt
    }

    pub(super) fn server(&mut self, at: usize) -> &mut Server {
        Arc::make_mut(&mut self.servers[at])
    }

    pub(super) fn actor(&mut self, at: usize) -> &mut Actor {
        Arc::make_mut(&mut self.actors[at])
    }

    /// What dead processes said is lost.
    pub(crate) fn forget_the_dead(&mut self) {
        let actors = self.actors.clone();
        self.net.retain(|message| actors[message.actor].alive);
        self.requests.retain(|request| actors[request.actor].alive);
    }
}

impl Actor {
    /// Whoever stands by as the destination was told its try.
    fn new(scope: &Scope, side: usize, session: SessionId, only_for: Option<Try>) -> Self {
        let role = Role::new(NAMES[side], session, &scope.volumes());
        Self {
            side,
            alive: true,
            role: match only_for {
                Some(attempt) => role.only_for(attempt),
                None => role,
            },
            slots: vec![None; scope.members],
            seen: vec![None; scope.members],
            opens: vec![None; scope.members],
            cached: vec![None; scope.members],
        }
    }
}

/// The incarnation that is the process at this position.
fn session(at: usize) -> SessionId {
    SessionId(at as u64 + 1)
}
