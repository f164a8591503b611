//! One connection of a backend to a member, and the queue on it.

use std::collections::BTreeMap;

use baton_protocol::handoff::{Count, Proof, Try};
use baton_protocol::{Epoch, QueueId, Seq};

use crate::agenda::Time;
use crate::history::Kind;

/// How a connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Down,
    /// HELLO is on its way.
    Greeting,
    Standby,
    /// OPEN is on its way.
    Opening,
    Owner,
}

/// A connection and the attempts to have one.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) connection: Option<usize>,
    pub(super) state: State,
    /// It was refused as the owner's: next time it stands by.
    pub(super) stands_by: bool,
    /// Since when it waits for something.
    pub(super) since: Time,
}

/// A request that is not answered.
#[derive(Debug)]
pub(super) struct Pending {
    /// Its place in the ring.
    pub(super) place: u64,
    pub(super) kind: Kind,
    /// The connection and the epoch under which it is on its way.
    pub(super) sent: Option<(usize, Epoch)>,
    pub(super) since: Time,
}

/// One queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) link: Link,
    pub(super) epoch: Option<Epoch>,
    pub(super) next: u64,
    pub(super) pending: BTreeMap<u64, Pending>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self { link: Link::default(), epoch: None, next: 1, pending: BTreeMap::new() }
    }

    pub(super) fn lowest(&self) -> Seq {
        Seq(self.pending.first_key_value().map_or(self.next, |(seq, _)| *seq))
    }

    pub(super) fn count(&self, queue: QueueId) -> Count {
        Count { queue, last: Seq(self.next - 1), lowest: self.lowest() }
    }
}

/// What the machine last said of a member's data path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub(super) epoch: Epoch,
    pub(super) open: Option<(Try, Proof)>,
}
