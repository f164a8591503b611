//! Each queue is of one thread: it owns the ring, the volume queue and everything
//! in between, so a request meets no lock, no channel and no second thread. There
//! are as many threads as queues, or as CPUs for the process if those are fewer.
//!
//! ```text
//!   kick ----\
//!   answers --+--> epoll --> complete --> take --> submit --> send
//!   mailbox -/                  |
//!                     data, dirty bits, used ring, call
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`mailbox`] | how the control thread tells a queue what to do |
//! | `thread` | what wakes a thread, and in which order it serves its queues |
//! | `worker` | a queue on its thread: the life of its ring |
//! | `intake` | from the ring to the storage |
//! | `completion` | from the storage to the used ring |
//! | `order` | in which order completions are shown while a migration runs |
//! | `pending` | a request in flight |
//! | `polling` | what the thread looks for before it sleeps, where that is switched on |

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use baton_remote_client::Volume;

use crate::dirty_log::DirtyLog;
use crate::handoff::MemberHandle;
use crate::inflight::{InflightRing, MadeHere};
use crate::status::DiskStatus;
use crate::virtio_blk::request::ID_BYTES;
use crate::virtqueue::RingAddresses;

pub mod mailbox;

mod completion;
mod intake;
mod order;
mod pending;
mod polling;
mod thread;
mod worker;

/// What all queues of a disk share.
#[derive(Debug)]
pub struct Disk {
    /// Names the disk in the log.
    pub name: String,
    /// Where the data is.
    pub volume: Arc<dyn Volume>,
    /// Size as the guest knows it or is about to, bytes; only grows.
    pub size_bytes: AtomicU64,
    /// Changes are refused.
    pub read_only: bool,
    /// Device ID string.
    pub id: [u8; ID_BYTES],
    /// In-flight regions that front-ends got from this process.
    pub inflight_made: MadeHere,
    /// For who only looks.
    pub status: DiskStatus,
    /// Its place in the VM's handoff, if the volume can be handed over.
    pub member: Option<MemberHandle>,
}

/// Everything about a ring that may change while it runs. Always sent whole.
#[derive(Clone, Debug)]
pub struct RingSetup {
    /// Where the ring is.
    pub addresses: RingAddresses,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// A write is complete only when it is on stable storage.
    pub write_through: bool,
    /// Tells the guest of completions.
    pub call: Option<Arc<OwnedFd>>,
    /// Tells the front-end of a broken ring.
    pub err: Option<Arc<OwnedFd>>,
    /// Log of writes to guest memory, while a migration runs.
    pub log: Option<Arc<DirtyLog>>,
    /// Guest address of the used ring, when writes to it are to be logged.
    pub log_used_at: Option<u64>,
}

/// Where a ring begins.
#[derive(Debug)]
pub struct RingStart {
    /// The ring.
    pub setup: RingSetup,
    /// Tells of new requests.
    pub kick: Arc<OwnedFd>,
    /// Next available entry, where no in-flight table says better.
    pub base: u16,
    /// Table of requests in flight.
    pub inflight: Option<InflightRing>,
}
