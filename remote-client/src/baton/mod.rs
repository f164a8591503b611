//! The driver for Baton's own protocol.
//!
//! ```text
//!  BatonVolume --- control thread --- Link --- Session     claims, watches, gives back
//!      | open_queue
//!      +---------- BatonQueue ------- Link --- Session     one per virtqueue thread
//!                                      |          |
//!                         socket, timer, epoll    bytes and events in, bytes out:
//!                                                 no socket, no clock
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`claim`] | how a volume is found |
//! | [`control`] | the thread that attends to the control links of all volumes |
//! | [`handover`] | what all links of a volume know of a handoff |
//! | [`ledger`] | what was acknowledged and not flushed, and whether it was lost |
//! | [`session`] | one conversation over any number of connections, sans-IO |
//! | [`link`] | what gives a session a socket, a clock and a descriptor to wait on |
//! | [`queue`] | a virtqueue's link |
//! | [`volume`] | the control link, and what all links of a volume share |

pub(crate) mod claim;
mod control;
pub(crate) mod handover;
pub(crate) mod ledger;
pub(crate) mod link;
pub(crate) mod queue;
pub(crate) mod session;
pub(crate) mod volume;

pub use session::Timing;

use crate::engine::{Capabilities, Support};
use crate::fence::Fence;

/// What this driver can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    fence: Fence::Storage,
    handoff: true,
    queues: Support::Yes,
    discard: Support::Yes,
    growth: Support::Yes,
    waits: Support::Yes,
    encrypted: Support::No,
};
