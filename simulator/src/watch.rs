//! The rules that can be judged at once, whenever something happens: who was
//! let in, what took effect, what was decided, whose guest went on. The first
//! broken rule is kept. What only a whole history shows is the checker's.
//!
//! The rules are those of `docs/handoff.md`, by their numbers there.

use std::collections::BTreeMap;
use std::fmt;

use baton_protocol::handoff::{Side, Try};
use baton_protocol::{Epoch, SessionId};

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the rule.
    pub rule: &'static str,
    /// How it was broken.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} broken: {}", self.rule, self.what)
    }
}

/// Watches one world.
#[derive(Debug)]
pub(crate) struct Watch {
    found: Option<Violation>,
    volumes: Vec<Seen>,
    decided: BTreeMap<Try, Side>,
    /// The host whose backend may be let in, as told by the anchor last.
    owner: usize,
    /// How many answers the one true VM has got while it ran.
    trunk: u64,
}

#[derive(Debug, Default)]
struct Seen {
    holders: BTreeMap<Epoch, SessionId>,
    /// Everything up to here is fenced, and somebody was told so.
    closed: Epoch,
    /// It was fenced for this host, and others of the VM's are not yet.
    nominee: Option<usize>,
}

impl Watch {
    pub(crate) fn new(volumes: usize) -> Self {
        Self {
            found: None,
            volumes: (0..volumes).map(|_| Seen::default()).collect(),
            decided: BTreeMap::new(),
            owner: 0,
            trunk: 0,
        }
    }

    pub(crate) fn found(&self) -> Option<&Violation> {
        self.found.as_ref()
    }

    pub(crate) fn owner(&self) -> usize {
        self.owner
    }

    pub(crate) fn broken(&mut self, rule: &'static str, what: String) {
        self.found.get_or_insert(Violation { rule, what });
    }

    /// A request is let in while requests of `running` are carried out.
    pub(crate) fn admitted(
        &mut self,
        (volume, host): (usize, usize),
        epoch: Epoch,
        session: SessionId,
        mut running: impl Iterator<Item = SessionId>,
    ) {
        let seen = &mut self.volumes[volume];
        let holder = *seen.holders.entry(epoch).or_insert(session);
        let highest = seen.holders.last_key_value().map_or(epoch, |(epoch, _)| *epoch);
        if running.any(|other| other != session) {
            self.broken("I1", format!("two sessions inside the gate of volume {volume}"));
        } else if highest > epoch {
            self.broken("I1", format!("volume {volume} went from epoch {highest} to {epoch}"));
        } else if holder != session {
            self.broken("I1", format!("epoch {epoch} of volume {volume} has two holders"));
        } else if let Some(nominee) = seen.nominee.take().filter(|nominee| *nominee != host) {
            let what = format!("host {host} let in at volume {volume}, fenced for host {nominee}");
            self.broken("I7", what);
        } else if self.owner != host {
            let owner = self.owner;
            let what = format!("host {host} let in at volume {volume}; host {owner} won");
            self.broken("I7", what);
        }
    }

    /// A request is carried out.
    pub(crate) fn took_effect(&mut self, volume: usize, epoch: Epoch) {
        let closed = self.volumes[volume].closed;
        if epoch <= closed {
            let what = format!("a request of epoch {epoch} of volume {volume}, closed to {closed}");
            self.broken("I4", what);
        }
    }

    /// A standby's request was let in.
    pub(crate) fn standby_admitted(&mut self, volume: usize) {
        self.broken("I8", format!("a standby was let in at volume {volume}"));
    }

    /// Requests up to `epoch` are fenced and this is about to be told.
    pub(crate) fn closed(&mut self, volume: usize, epoch: Epoch) {
        let seen = &mut self.volumes[volume];
        seen.closed = seen.closed.max(epoch);
    }

    /// Somebody is told how the anchor decided.
    pub(crate) fn told(&mut self, attempt: Try, winner: Side, hosts: [usize; 2]) {
        let first = *self.decided.entry(attempt).or_insert_with(|| {
            self.owner = hosts[winner as usize];
            winner
        });
        if first != winner {
            let number = attempt.attempt;
            self.broken("I6", format!("try {number} was decided for {first:?}, then {winner:?}"));
        }
    }

    /// A volume is fenced for a host.
    pub(crate) fn fenced(&mut self, volume: usize, host: usize) {
        self.volumes[volume].nominee = Some(host);
    }

    /// All volumes are fenced for a host: the VM goes on there and nowhere else.
    pub(crate) fn given(&mut self, host: usize) {
        self.owner = host;
        self.volumes.iter_mut().for_each(|volume| volume.nominee = None);
    }

    /// How many answers the one true VM has got while it ran.
    pub(crate) fn trunk(&self) -> u64 {
        self.trunk
    }

    /// A running guest with this much behind it gets an answer. Returns what it
    /// has behind it then.
    pub(crate) fn guest_goes_on(&mut self, host: usize, base: u64) -> u64 {
        if base != self.trunk {
            let behind = self.trunk.saturating_sub(base);
            let what = format!("the guest on host {host} goes on {behind} answers in the past");
            self.broken("I6", what);
        }
        self.trunk += 1;
        self.trunk
    }
}
