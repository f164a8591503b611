//! The trait pair that carries the whole data path: [`Volume`], a factory that
//! is shared, and [`VolumeQueue`], owned by one thread, with submit and poll.
//!
//! ```text
//!   Volume ---open_queue(i)---> VolumeQueue ---submit/poll---> completions
//!     |  shared by all threads      | owned by the thread of virtqueue i
//!     |  size, state, events        | never blocks, no lock, no allocation
//! ```
//!
//! A queue never reports a lost connection as an error: requests wait until the
//! storage answers. What it does report is final.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use crate::gate::Gate;
use crate::handoff::HandoffPort;

/// What the volume is. `size_bytes` may grow; the rest is fixed while open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Identity, as text of at most 20 bytes, padded with zeros: what the guest
    /// reads with GET_ID (virtio 1.2 5.2.6).
    pub id: [u8; 20],
    /// Size, bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size, bytes.
    pub block_bytes: u32,
    /// Discards of this size and alignment give space back, bytes.
    pub discard_bytes: u32,
    /// The volume, or this access to it, refuses changes.
    pub read_only: bool,
}

/// What is asked of a queue. Offsets and lengths are bytes, multiples of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from `offset`.
    Read {
        /// First byte.
        offset: u64,
    },
    /// Store the buffers at `offset`.
    Write {
        /// First byte.
        offset: u64,
    },
    /// Complete when everything completed before is on stable storage.
    Flush,
    /// The range's contents are no longer needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeros.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Space may be given back.
        unmap: bool,
    },
}

/// Chosen by the submitter; comes back in the completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

/// What is known of a part of a volume: see [`VolumeQueue::submit_map`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Extent {
    /// Bytes, from where the extent before it ends; zero behind the last one.
    pub len: u64,
    /// Zero: it may hold data. Else: it reads as zeros.
    pub zeros: u64,
}

const _: () = assert!(size_of::<Extent>() == 16);

/// Final outcome of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IoError {
    /// The range is not on the volume.
    #[error("the range is not on the volume")]
    OutOfRange,
    /// No space left for this write.
    #[error("the storage is full")]
    NoSpace,
    /// The volume or the access is read-only.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The storage failed the request.
    #[error("the storage failed the request")]
    Io,
    /// The storage cannot do this.
    #[error("the storage does not support the request")]
    Unsupported,
}

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As submitted.
    pub tag: Tag,
    /// Outcome.
    pub result: Result<(), IoError>,
}

/// How a volume stands with its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VolumeState {
    /// Served.
    Connected,
    /// The storage does not answer; requests wait.
    Reconnecting,
    /// The storage gave the volume to somebody else: requests wait for ever and
    /// are never answered, so that the guest of a lost race sees no error.
    Fenced,
    /// The volume is gone or is no longer the one that was opened; requests
    /// wait for ever, a person must look.
    Lost,
}

/// News about a volume, told from a thread of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeEvent {
    /// [`Geometry::size_bytes`] grew to this.
    Resized(u64),
    /// [`Volume::state`] changed to this.
    State(VolumeState),
}

/// Called on each event; must return soon and not call back into the volume.
pub type EventListener = Arc<dyn Fn(VolumeEvent) + Send + Sync>;

/// Why a queue could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A descriptor or thread could not be made.
    #[error("cannot open an I/O queue")]
    System(#[from] std::io::Error),
}

/// A volume that can be opened for I/O. Shared between threads.
pub trait Volume: Send + Sync + Debug {
    /// What it is now.
    fn geometry(&self) -> Geometry;

    /// How it stands.
    fn state(&self) -> VolumeState;

    /// How many queues the storage can serve at once; the index of each is below.
    fn queues_max(&self) -> u16 {
        u16::MAX
    }

    /// Opens queue `index` for up to `depth` requests in flight. An index that
    /// was dropped may be opened again. Does not wait for the storage.
    ///
    /// # Errors
    /// [`QueueError`] when the process is out of descriptors or memory.
    fn open_queue(&self, index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError>;

    /// Sets who is told of events (one listener; a later call replaces it).
    fn set_listener(&self, listener: EventListener);

    /// A request may hold up the thread that submits it, so that each queue wants
    /// one of its own.
    fn blocks(&self) -> bool {
        false
    }

    /// The way to hand the volume over to another host, where the storage can
    /// and [`crate::OpenOptions::handoff`] asked for it.
    fn handoff(&self) -> Option<&dyn HandoffPort> {
        None
    }

    /// What keeps this host's requests back, where the storage cannot.
    fn gate(&self) -> Option<&dyn Gate> {
        None
    }

    /// Ends the access. With `give_back` nobody owns the volume afterwards;
    /// without, it stays with this owner's name, for the process that replaces
    /// this one. All queues are dropped before. Waits a bounded time.
    fn close(&self, give_back: bool);
}

/// One queue of a volume. Owned by one thread; nothing in it blocks.
pub trait VolumeQueue: Send {
    /// Takes a request. The iovec array is copied; the memory it names is not.
    /// Submitting more than `depth` requests at once is a bug of the caller.
    /// Nothing need be sent before [`VolumeQueue::poll`].
    ///
    /// Lengths need not be bounded by anything but `usize`: the driver splits.
    ///
    /// # Safety
    /// The memory in `data` must stay valid until the request's completion was
    /// returned by `poll`, or the queue was dropped. It may be shared with a
    /// guest that changes it at will: the driver reads and writes it only
    /// through raw pointers or the kernel.
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]);

    /// Asks what is known to read as zeros in `len` bytes from `offset`: multiples
    /// of the block, on the volume. `into` begins with at least one extent when the
    /// request has succeeded. They may cover less than was asked for, or more.
    ///
    /// False: the storage cannot tell, and nothing was submitted. NBD tells when
    /// [`crate::OpenOptions::map`] asked for it.
    ///
    /// # Safety
    /// As [`VolumeQueue::submit`], for the memory of `into`.
    unsafe fn submit_map(&mut self, tag: Tag, offset: u64, len: u64, into: &mut [Extent]) -> bool {
        let _ = (tag, offset, len, into);
        false
    }

    /// Sends what was submitted, and no more: for a caller that knows of
    /// nothing that could have arrived. Saves the system call that would find
    /// that out. Completes what the driver can answer at once.
    fn send(&mut self, completions: &mut Vec<Completion>) {
        self.poll(completions);
    }

    /// Sends what was submitted, takes in what arrived, and appends finished
    /// requests to `completions`. Never blocks, never fails: trouble with the
    /// storage is the driver's to overcome.
    fn poll(&mut self, completions: &mut Vec<Completion>);

    /// The caller submits nothing until its ring starts again, which it says by
    /// submitting. Lets a [`HandoffPort::hold`] take effect.
    fn rest(&mut self) {}

    /// Readable (poll, epoll) whenever [`VolumeQueue::poll`] should be called,
    /// for whatever reason: answers, room to send, a timer. The same descriptor
    /// for the life of the queue. Quiet while nothing is in flight.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// Has what is behind [`VolumeQueue::wake_fd`] watched in an epoll instance of the
    /// caller, whose events carry `data` then; nobody waits for that descriptor itself
    /// from then on. Where it is an epoll instance, too, the kernel need not look into
    /// one through the other for each event.
    ///
    /// # Errors
    /// When the process is out of descriptors or memory.
    fn watch_in(&mut self, epoll: &Epoll, data: u64) -> std::io::Result<()> {
        Ok(epoll.add(self.wake_fd(), EpollEvent::new(EpollFlags::EPOLLIN, data))?)
    }

    /// Requests submitted and not completed.
    fn in_flight(&self) -> usize;
}
