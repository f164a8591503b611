//! What every process of the world shares: time, chance, the network, and those
//! who watch.

use std::collections::HashSet;

use baton_protocol::access::Refusal;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, HandoffRequest, Open, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, QueueId, Seq, SessionId};

use crate::agenda::{Agenda, MS, Time};
use crate::bug::Bug;
use crate::coverage::Coverage;
use crate::fault::{Fault, Hits, Point, Trap};
use crate::history::{History, Kind, Value};
use crate::network::{Connection, Network};
use crate::trace::Trace;
use crate::vm::Image;
use crate::watch::Watch;

/// Writes a line of the trace.
macro_rules! note {
    ($stage:expr, $($what:tt)*) => {
        $stage.trace.line($stage.now, format_args!($($what)*))
    };
}
pub(crate) use note;

/// As which coordinator an operator calls and is answered.
pub(crate) const BY_OPERATOR: usize = usize::MAX;

/// As what a connection introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    Claim,
    Rejoin(Epoch),
    Standby,
}

/// From a backend to a server.
#[derive(Clone, Debug)]
pub(crate) enum ToServer {
    Hello { greeting: Greeting, resume_from: Seq },
    Io { seq: Seq, epoch: Epoch, kind: Kind },
    Access { boot_id: u64, version: u64 },
    Handoff { asked: Asked, request: HandoffRequest },
    Open(Open),
    End,
}

/// From a server to a backend.
#[derive(Clone, Debug)]
pub(crate) enum ToClient {
    Welcome { epoch: Epoch, owner: bool },
    Refused(Refused),
    Done { seq: Seq, read: u64 },
    Stale { seq: Seq },
    Access(Box<Answer>),
    Handoff { asked: Asked, attempt: Try, answer: Box<Answer> },
    Opened(Option<Epoch>),
    End,
}

/// Why a server does not welcome a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    StaleEpoch,
    InHandoff,
    Busy,
    NotOwner,
}

/// What a coordinator asks of a member.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    /// With the member's next epoch when it was planned.
    Arm {
        plan: Box<Plan>,
        next_epoch: Epoch,
    },
    View,
    Reclaim(Try),
    Abdicate(Try),
    Settle(Try, Option<(SessionId, Proof)>),
    /// Whether the volume knows this try, and how it was decided: for a member that is
    /// still in it.
    Ask {
        attempt: Try,
        member: usize,
    },
    Disarm(Try),
    /// An operator gives the volume to this owner name, by force.
    Fence {
        nominee: String,
        seen: (Option<String>, Epoch),
    },
}

/// What it is answered.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) volume: usize,
    pub(crate) call: Call,
    pub(crate) refused: Option<Refusal>,
    /// How the try that was asked for was decided, and what shows it.
    pub(crate) decided: Option<(Side, SessionId, Option<Proof>)>,
    /// In a handoff, of this try.
    pub(crate) armed: Option<Try>,
    /// Where that is decided.
    pub(crate) anchor: Option<usize>,
}

/// Something that happens to one process.
#[derive(Debug)]
pub(crate) enum Event {
    ToServer {
        connection: usize,
        message: ToServer,
    },
    ToClient {
        connection: usize,
        message: ToClient,
    },
    Executed {
        volume: usize,
        boot: u64,
        token: u64,
    },
    Stored {
        volume: usize,
        boot: u64,
    },
    Persist {
        volume: usize,
        boot: u64,
    },
    ServerStarts {
        server: usize,
    },
    Call {
        coordinator: usize,
        term: u64,
        volume: usize,
        call: Call,
    },
    Reply {
        coordinator: usize,
        reply: Reply,
    },
    CoordinatorTick {
        coordinator: usize,
    },
    CoordinatorStarts {
        coordinator: usize,
    },
    Connect {
        backend: usize,
        member: usize,
        link: usize,
    },
    Check {
        backend: usize,
    },
    BackendStarts {
        host: usize,
    },
    Rings {
        backend: usize,
        member: usize,
        on: bool,
    },
    Image {
        round: u64,
        image: Image,
    },
    /// The guest at a place does something.
    Guest {
        place: usize,
    },
    Orchestrator,
    Fault(Fault),
}

/// What is drawn once per world.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) servers: usize,
    pub(crate) volumes: usize,
    pub(crate) queues: usize,
    pub(crate) sectors: usize,
    /// Guests write a sector again while a write of it is under way. Only in
    /// worlds where no process forgets what it carried out: otherwise both
    /// outcomes are right.
    pub(crate) overlaps: bool,
    /// What a VMM does whose backend is dead when the rings stop.
    pub(crate) dead_backend: DeadBackend,
    pub(crate) loss: f64,
}

/// What a VMM does whose backend is dead when it stops the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeadBackend {
    /// Waits for the next one.
    Waits,
    /// Takes what was not completed for not taken (base from the used ring).
    TakesForUndone,
    /// Takes what was taken for completed (base from the available ring).
    TakesForDone,
}

/// Who had the anchor decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecidedBy {
    Nobody,
    /// A backend whose rings ran, or that had to.
    Rings,
    /// A destination that an agent had ordered to.
    Order,
    Coordinator,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) now: Time,
    pub(crate) agenda: Agenda<Event>,
    pub(crate) rng: fastrand::Rng,
    pub(crate) trace: Trace,
    pub(crate) watch: Watch,
    pub(crate) history: History,
    pub(crate) network: Network,
    pub(crate) hits: Hits,
    pub(crate) coverage: Coverage,
    pub(crate) traps: Vec<Trap>,
    pub(crate) bug: Option<Bug>,
    pub(crate) setting: Setting,
    /// Values whose write a server has carried out.
    pub(crate) carried: HashSet<Value>,
    /// By whom the handoff was decided.
    pub(crate) by: DecidedBy,
    /// The destination has just won: hosts of source and destination.
    pub(crate) activated: Option<[usize; 2]>,
    /// The coordinators' next messages are lost, or doubled.
    pub(crate) losing: u32,
    pub(crate) doubling: u32,
}

impl Stage {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        self.rng.f64() < probability
    }

    /// From `low` to `high` inclusive.
    pub(crate) fn between(&mut self, low: Time, high: Time) -> Time {
        self.rng.u64(low..=high)
    }

    pub(crate) fn after(&mut self, delay: Time, event: Event) {
        self.agenda.put(self.now + delay, event);
    }

    /// A step of the protocol happens: springs the traps set for it.
    pub(crate) fn reached(&mut self, point: Point) {
        let at = Point::ALL.iter().position(|other| *other == point).unwrap_or_default();
        self.hits.points[at] += 1;
        let mut sprung = Vec::new();
        self.traps.retain_mut(|trap| {
            if trap.point != point {
                return true;
            }
            let springs = trap.passes == 0;
            if springs {
                sprung.push(trap.fault);
            }
            trap.passes = trap.passes.saturating_sub(1);
            !springs
        });
        for fault in sprung {
            self.hits.sprung[at] += 1;
            self.after(0, Event::Fault(fault));
        }
    }

    pub(crate) fn carried_out(&mut self, kind: Kind) {
        if let Kind::Write { value, .. } = kind {
            self.carried.insert(value);
        }
    }

    /// A coordinator's message: may be lost, doubled or overtaken.
    pub(crate) fn call(&mut self, coordinator: usize, term: u64, volume: usize, call: Call) {
        let loss = self.setting.loss;
        if self.losing > 0 {
            self.losing -= 1;
            return;
        }
        if self.chance(loss) {
            return;
        }
        let delay = self.between(50, 2 * MS);
        // An operator's client repeats what is not answered soon.
        let again = matches!(call, Call::Fence { .. }) && self.chance(0.1);
        let doubled = self.doubling > 0 && !matches!(call, Call::View);
        if doubled || again {
            self.doubling = self.doubling.saturating_sub(u32::from(doubled));
            // As late as in the handoffs after this one.
            let late = if self.chance(0.5) {
                self.between(0, 600 * MS)
            } else {
                self.between(MS, 80 * MS)
            };
            let call = call.clone();
            self.after(late, Event::Call { coordinator, term, volume, call });
        }
        self.after(delay, Event::Call { coordinator, term, volume, call });
    }

    pub(crate) fn reply(&mut self, coordinator: usize, reply: Reply) {
        let loss = self.setting.loss;
        if !self.chance(loss) {
            let delay = self.between(50, 2 * MS);
            self.after(delay, Event::Reply { coordinator, reply });
        }
    }

    /// One way, without partitions: mostly short, now and then long.
    fn hop(&mut self) -> Time {
        if self.chance(0.02) { self.between(MS, 8 * MS) } else { self.between(20, 150) }
    }

    pub(crate) fn connect(
        &mut self,
        (backend, host, session): (usize, usize, SessionId),
        volume: usize,
        queue: QueueId,
    ) -> usize {
        let server = volume % self.setting.servers;
        let now = self.now;
        self.network.connections.push(Connection {
            backend,
            host,
            server,
            volume,
            queue,
            session,
            client_open: true,
            server_open: true,
            is_cut: false,
            at_server: now,
            at_client: now,
        });
        self.network.connections.len() - 1
    }

    pub(crate) fn send_to_server(&mut self, connection: usize, message: ToServer) {
        let hop = self.hop();
        let known = &self.network.connections[connection];
        if !known.client_open || known.is_cut {
            return;
        }
        let free = self.network.passes(known.host, known.server, true, self.now);
        let at = (free + hop).max(known.at_server);
        self.network.connections[connection].at_server = at;
        self.agenda.put(at, Event::ToServer { connection, message });
    }

    pub(crate) fn send_to_client(&mut self, connection: usize, message: ToClient) {
        let hop = self.hop();
        let known = &self.network.connections[connection];
        if known.is_cut {
            return;
        }
        let free = self.network.passes(known.host, known.server, false, self.now);
        let at = (free + hop).max(known.at_client);
        self.network.connections[connection].at_client = at;
        self.agenda.put(at, Event::ToClient { connection, message });
    }

    /// The client's end is over; the server hears of it, unless it is cut.
    pub(crate) fn hang_up(&mut self, connection: usize) {
        self.send_to_server(connection, ToServer::End);
        self.network.connections[connection].client_open = false;
    }
}
