//! Images of a Ceph cluster as volumes, through the host's own librbd.
//!
//! ```text
//!   opening --claim--> volume ---- control thread: size, close
//!                        |
//!      queue, queue, ... +---- image ---- librbd, its threads
//!        ^                +---- objects -- librados: reads only
//!        |                                   |
//!        +------------- inbox <--------------+
//!
//!      access thread --- register --- note on the image: record, clients
//! ```
//!
//! One image is open once for all queues. A queue's thread submits and takes
//! what came back; it never calls anything that could wait for the cluster.

mod claim;
mod error;
mod handover;
mod image;
mod inbox;
mod library;
mod objects;
mod opening;
mod queue;
mod record;
mod register;
mod request;
mod seat;
mod volume;
mod watch;

pub use error::RbdError;
pub use record::{ImageRecord, RecordError};
pub use seat::{Former, Seat};
pub(crate) use volume::RbdVolume;

use crate::engine::{Capabilities, Support};
use crate::fence::Fence;

/// What this driver can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    fence: Fence::Blocklist,
    handoff: true,
    queues: Support::Yes,
    discard: Support::If("64 KiB and more"),
    growth: Support::Yes,
    waits: Support::Yes,
    encrypted: Support::If("as Ceph's configuration says"),
};
