//! Messages from other threads to a worker.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_protocol::{Opcode, RequestHeader, Seq, Status, VolumeId};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ask::Asked;
use super::conn::Newcomer;

/// What other threads tell a worker.
#[derive(Debug)]
pub(crate) enum Message {
    /// A welcomed connection.
    New(Box<Newcomer>),
    /// End the connection of this id, at once.
    Kill(u64),
    /// Work done elsewhere.
    Done(Done),
    /// The answer of the access record.
    Asked(Box<Asked>),
    /// There is news of this volume.
    News(VolumeId),
    /// Answer what is running, then end.
    Stop,
}

/// Outcome of a request that was handed to another thread.
#[derive(Debug)]
pub(crate) struct Done {
    /// The worker's number of the connection.
    pub(super) conn: usize,
    pub(super) opcode: Opcode,
    pub(super) seq: Seq,
    pub(super) status: Status,
    /// READ: room for the reply's header, then the data.
    pub(super) reply: Option<Vec<u8>>,
}

impl Done {
    pub(super) fn new(conn: usize, header: &RequestHeader, status: Status) -> Self {
        Self { conn, opcode: header.opcode, seq: header.seq, status, reply: None }
    }
}

/// A queue of messages with an eventfd that wakes the worker. Who puts the first one
/// into an empty queue sees to it that the worker looks: others write the eventfd, the
/// worker itself notes that it has to.
#[derive(Debug)]
pub(crate) struct Mailbox {
    messages: Mutex<Vec<Message>>,
    wake: EventFd,
    /// Written and read by the worker only.
    own: AtomicBool,
}

thread_local! {
    /// The mailbox of the worker that this thread is; compared, never followed.
    static MINE: Cell<*const Mailbox> = const { Cell::new(std::ptr::null()) };
}

impl Mailbox {
    pub(crate) fn new() -> nix::Result<Arc<Self>> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { messages: Mutex::default(), wake, own: AtomicBool::new(false) }))
    }

    /// The calling thread is the worker that takes the messages.
    pub(super) fn bind_here(&self) {
        MINE.set(self);
    }

    /// Whether the worker itself put a message into the empty queue.
    pub(super) fn has_own(&self) -> bool {
        self.own.load(Ordering::Relaxed)
    }

    pub(crate) fn send(&self, message: Message) {
        let first = {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            messages.push(message);
            messages.len() == 1
        };
        if first && std::ptr::eq(MINE.get(), self) {
            self.own.store(true, Ordering::Relaxed);
        } else if first {
            // Fails only when the counter is full, and then the worker wakes anyway.
            let _ = self.wake.write(1);
        }
    }

    /// An answer of the access record.
    pub(super) fn answer(&self, asked: Asked) {
        self.send(Message::Asked(Box::new(asked)));
    }

    /// Swaps the waiting messages for an empty vector.
    pub(super) fn take(&self, into: &mut Vec<Message>) {
        debug_assert!(into.is_empty());
        // First the eventfd, then the queue: a message in between wakes again.
        if self.has_own() {
            self.own.store(false, Ordering::Relaxed);
        } else {
            let _ = self.wake.read();
        }
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *messages, into);
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
