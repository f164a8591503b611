//! A request in flight, found by its head.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::memory::GuestMemory;

/// What completes a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// No request uses this head.
    #[default]
    Idle,
    /// The completion of its operation.
    Last,
    /// The completion of its write is followed by a flush.
    ThenFlush,
    /// Nothing: it is complete and waits to be shown behind an older one.
    HeldBack,
}

/// A memory table as one queue holds it. Requests share it by a count that no
/// other thread touches; the table's own count is touched once per table.
#[derive(Debug)]
pub(super) struct Held(pub(super) Arc<GuestMemory>);

/// A request in flight, found by its head.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) stage: Stage,
    /// Rises with every request taken; says which is older.
    pub(super) taken: u64,
    /// When it was taken, while somebody watches the latency.
    pub(super) begun: Option<Instant>,
    /// READ: what the storage fills, kept to be marked in the dirty log.
    pub(super) data: Vec<libc::iovec>,
    /// Bytes the device writes, status included.
    pub(super) written: u32,
    pub(super) status: Option<*mut u8>,
    /// Keeps what `data` and `status` point into.
    pub(super) memory: Option<Rc<Held>>,
}

impl Pending {
    /// The storage has it.
    pub(super) fn is_at_storage(&self) -> bool {
        matches!(self.stage, Stage::Last | Stage::ThenFlush)
    }
}
