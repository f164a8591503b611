//! Connections between backends and servers: in order, as late as they like,
//! cut off in one direction for a while, or gone without the other end knowing.
//!
//! What was sent before a partition still arrives; what is sent into one
//! arrives after it has healed, like TCP's retransmissions, even if the sender
//! has given the connection up by then.

use baton_protocol::{QueueId, SessionId};

use crate::agenda::Time;

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Number of the backend, in the order in which they were started.
    pub(crate) backend: usize,
    pub(crate) host: usize,
    pub(crate) server: usize,
    pub(crate) volume: usize,
    pub(crate) queue: QueueId,
    pub(crate) session: SessionId,
    pub(crate) client_open: bool,
    pub(crate) server_open: bool,
    /// Nothing of what is sent from now on arrives, not even the end.
    pub(crate) is_cut: bool,
    /// No later message arrives before these.
    pub(crate) at_server: Time,
    pub(crate) at_client: Time,
}

/// One direction between a host and a server does not work for a while.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) host: usize,
    pub(crate) server: usize,
    pub(crate) to_server: bool,
    pub(crate) until: Time,
}

/// All connections there ever were, and what does not work.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) connections: Vec<Connection>,
    pub(crate) partitions: Vec<Partition>,
}

impl Network {
    /// When a message leaves the network that enters it now.
    pub(crate) fn passes(&self, host: usize, server: usize, to_server: bool, now: Time) -> Time {
        let blocked = self.partitions.iter().filter(|partition| {
            partition.host == host && partition.server == server && partition.to_server == to_server
        });
        blocked.map(|partition| partition.until).fold(now, Time::max)
    }
}
