//! What there is.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use baton_protocol::handoff::cooperative::Standing;
use baton_protocol::handoff::{Cooperative, HandoffId, Try};

use super::mutant::Mutant;
use crate::agent::ledger::{Note, Turn};
use crate::coordinator::plan::Row;

/// Where the VM is at first.
pub(super) const HOME: usize = 0;
/// Names of the hosts.
pub(super) const NAMES: [&str; 2] = ["a", "b"];

/// The try of this number.
pub(super) fn turn(number: u8) -> Turn {
    Turn {
        number: u64::from(number),
        attempt: Try { id: HandoffId(u128::from(number)), attempt: 1 },
    }
}

/// A write that the server has not done yet. The disk is one block; each write of the
/// guest is the number after the last that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Request {
    pub(super) host: usize,
    /// Of this process.
    pub(super) process: u8,
    pub(super) value: u8,
    /// Nobody waits for it any more.
    pub(super) given_up: bool,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Backend {
    pub(super) process: u8,
    pub(super) vm: Cooperative,
    /// Taken from the ring: its value, and whether it was sent.
    pub(super) taken: Option<(u8, bool)>,
}

/// What a machine's CPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Run {
    Running,
    /// `true`: while its memory was being copied.
    Stopped(bool),
    /// A copy that has not run yet.
    Incoming,
}

/// A machine and what its memory knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Machine {
    pub(super) run: Run,
    /// The last write that was answered.
    pub(super) known: u8,
    /// Asked for, and not answered.
    pub(super) wants: Option<u8>,
    /// Its rings were started at the backend that is there.
    pub(super) at: bool,
    /// A backend's agent has seen it.
    pub(super) seen: bool,
}

/// How a backend is started the next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Launch {
    Owner,
    Standby(Try),
}

/// A host: its agent's note and backend, and the VM's machine there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub(super) note: Option<Note>,
    pub(super) launch: Option<Launch>,
    pub(super) backend: Option<Backend>,
    pub(super) machine: Option<Machine>,
    /// A mutant has looked at the note and not acted yet.
    pub(super) claims: bool,
    pub(super) dead: bool,
}

impl Host {
    pub(super) fn standing(&self) -> Option<Standing> {
        self.backend.as_ref().map(|backend| backend.vm.standing())
    }

    pub(super) fn serves(&self) -> bool {
        self.standing() == Some(Standing::Serving)
    }
}

/// What is asked of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum What {
    Stand,
    /// Whether a person took the proof's place.
    Permit {
        forced: bool,
    },
    Dismiss,
    /// With the source's process, and how often rings had been started in it.
    End {
        process: u8,
        starts: u32,
    },
    Keep,
}

/// An order on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Order {
    pub(super) number: u8,
    pub(super) to: usize,
    pub(super) what: What,
}

/// The handoff under way, or the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) row: Arc<Row>,
    /// What the journal has.
    pub(super) journal: Arc<Row>,
}

impl Hash for Kept {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        for row in [&self.row, &self.journal] {
            let c = &row.cooperation;
            (&row.id, &row.from, row.state, row.standing, row.stood, row.winner).hash(hasher);
            (row.back.is_some(), row.loser_gone, c.end_asked, c.proof.is_some()).hash(hasher);
            (c.forced.is_some(), c.permitted, c.restored).hash(hasher);
        }
    }
}

/// A promise that was not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Broken {
    /// A write that was answered is not on the disk any more.
    Lost,
    /// A request of the loser was done after the winner's first, or of a host that the
    /// volumes never came to.
    Loser,
    /// A machine was let write whose memory is out of date.
    OldMemory,
    /// Two backends that may send.
    TwoServe,
    /// When nothing goes wrong any more: no host can run the VM.
    NobodyRuns,
    /// Nor can it be moved.
    Stuck,
}

/// How much of each may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub(super) tries: u8,
    pub(super) writes: u8,
    pub(super) crashes: u8,
    pub(super) doubles: u8,
    pub(super) stops: u8,
    pub(super) copies: u8,
    pub(super) claims: u8,
    pub(super) deaths: u8,
    /// Force is said although the source's host is not gone.
    pub(super) rash: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) hosts: [Host; 2],
    /// Sorted.
    pub(super) server: Vec<Request>,
    pub(super) disk: u8,
    /// The last write that any guest was told is done.
    pub(super) answered: u8,
    /// Nothing of this host may be done any more: the volumes went, and did not come back.
    pub(super) closed: [bool; 2],
    pub(super) kept: Option<Kept>,
    pub(super) number: u8,
    /// Sorted.
    pub(super) orders: Vec<Order>,
    pub(super) processes: u8,
    pub(super) budget: Budget,
    pub(super) mutant: Option<Mutant>,
    pub(super) broken: Option<Broken>,
}

impl World {
    /// The VM runs at home.
    pub(super) fn new(budget: Budget, mutant: Option<Mutant>) -> Self {
        let mut world = Self {
            hosts: Default::default(),
            server: Vec::new(),
            disk: 0,
            answered: 0,
            closed: [false, true],
            kept: None,
            number: 0,
            orders: Vec::new(),
            processes: 0,
            budget,
            mutant,
            broken: None,
        };
        world.serve(HOME);
        world.boot(HOME);
        world
    }

    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(super) fn breaks(&mut self, broken: Broken) {
        self.broken.get_or_insert(broken);
    }

    pub(super) fn row(&self) -> Option<&Arc<Row>> {
        self.kept.as_ref().map(|kept| &kept.row)
    }
}
