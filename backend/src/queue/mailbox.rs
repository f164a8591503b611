//! How the control thread tells a queue what to do, and waits for the answer.
//!
//! Between two batches the queue takes over what it is told, which is the grace
//! period that swapping a dirty log or a memory table needs.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::polling::Polling;
use super::thread::{QueueThread, Source};
use super::{Disk, RingSetup, RingStart};

/// What the control thread tells a queue.
#[derive(Debug)]
pub(super) enum Command {
    Start(Box<RingStart>, mpsc::SyncSender<io::Result<()>>),
    /// Connect to the storage for this many requests; no ring runs yet.
    Prepare(usize),
    Apply(Box<RingSetup>, mpsc::SyncSender<()>),
    /// Take no more requests; answer when none is in flight.
    Drain(mpsc::SyncSender<Option<u16>>),
    /// Answer now; what is in flight stays in the in-flight table.
    Abandon(mpsc::SyncSender<Option<u16>>),
    Exit,
}

#[derive(Debug)]
pub(super) struct Mailbox {
    pub(super) commands: Mutex<VecDeque<Command>>,
    pub(super) wake: EventFd,
}

/// The control thread's end of a queue. Dropping it ends the queue, and with the last of a thread's queues
/// that.
#[derive(Debug)]
pub struct QueueHandle {
    mailbox: Arc<Mailbox>,
    // Goes after the queue was told.
    _thread: Arc<Joined>,
}

/// A thread that is waited for.
#[derive(Debug)]
struct Joined(Option<JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }
}

/// A drain under way.
#[derive(Debug)]
pub struct Draining {
    answer: mpsc::Receiver<Option<u16>>,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainState {
    /// Requests are in flight.
    Pending,
    /// The ring has stopped; the number is the next available entry. `None`
    /// when it was not running.
    Stopped(Option<u16>),
}

impl Draining {
    /// Waits for the end of the drain, at most `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> DrainState {
        match self.answer.recv_timeout(timeout) {
            Ok(next_avail) => DrainState::Stopped(next_avail),
            Err(mpsc::RecvTimeoutError::Timeout) => DrainState::Pending,
            Err(mpsc::RecvTimeoutError::Disconnected) => DrainState::Stopped(None),
        }
    }
}

impl QueueHandle {
    /// Starts the threads of a disk's queues, `threads` or as many as there are
    /// queues; each looks up to `poll_us` for more work before it sleeps.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn spawn_all(
        disk: &Arc<Disk>,
        queues: u16,
        threads: usize,
        poll_us: u64,
    ) -> io::Result<Vec<Self>> {
        let threads = threads.clamp(1, usize::from(queues).max(1));
        let mut handles = Vec::new();
        for first in 0..threads {
            let indices = (0..queues).skip(first).step_by(threads).collect();
            handles.extend(Self::spawn(disk, indices, poll_us)?);
        }
        handles.sort_by_key(|(index, _)| *index);
        Ok(handles.into_iter().map(|(_, handle)| handle).collect())
    }

    /// Starts one thread for these queues.
    fn spawn(disk: &Arc<Disk>, indices: Vec<u16>, poll_us: u64) -> io::Result<Vec<(u16, Self)>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut mailboxes = Vec::new();
        for (slot, _) in indices.iter().enumerate() {
            let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            let data = Source::Mailbox.token(slot);
            epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, data))?;
            mailboxes.push(Arc::new(Mailbox { commands: Mutex::default(), wake }));
        }
        let queues = indices.iter().copied().zip(mailboxes.iter().cloned()).collect();
        let polling = Polling::new(poll_us, Instant::now);
        let theirs = Arc::clone(disk);
        let thread = thread::Builder::new()
            .name(format!("{}-q{}", disk.name, indices.first().copied().unwrap_or_default()))
            .stack_size(256 << 10)
            .spawn(move || QueueThread::new(&theirs, queues, epoll, polling).run())?;
        let thread = Arc::new(Joined(Some(thread)));
        let handle = |mailbox| Self { mailbox, _thread: Arc::clone(&thread) };
        Ok(indices.into_iter().zip(mailboxes.into_iter().map(handle)).collect())
    }

    /// Starts the ring. Requests found in the in-flight table are done first.
    ///
    /// # Errors
    /// When the volume's queue cannot be opened.
    pub fn start(&self, start: RingStart) -> io::Result<()> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.send(Command::Start(Box::new(start), sender));
        answer.recv().unwrap_or_else(|_| Err(io::Error::other("the queue thread has ended")))
    }

    /// Connects to the storage before any ring runs, so that it need not when one
    /// starts. Does not wait.
    pub fn prepare(&self, depth: usize) {
        self.send(Command::Prepare(depth));
    }

    /// Changes a running ring; a stopped one is left alone. When this returns,
    /// the queue uses nothing of the old set-up except the memory that requests
    /// in flight point into.
    pub fn apply(&self, setup: RingSetup) {
        let (sender, answer) = mpsc::sync_channel(1);
        self.send(Command::Apply(Box::new(setup), sender));
        let _ = answer.recv();
    }

    /// Begins to stop the ring.
    #[must_use]
    pub fn drain(&self) -> Draining {
        let (sender, answer) = mpsc::sync_channel(1);
        self.send(Command::Drain(sender));
        Draining { answer }
    }

    /// Stops the ring at once: drops the volume's queue with what is in flight,
    /// so that nothing touches guest memory any more.
    #[must_use]
    pub fn abandon(&self) -> Option<u16> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.send(Command::Abandon(sender));
        answer.recv().ok().flatten()
    }

    fn send(&self, command: Command) {
        self.mailbox.commands.lock().expect("no panic while held").push_back(command);
        // EAGAIN would mean 2^64 - 2 wake-ups are pending: woken all the same.
        let _ = self.mailbox.wake.write(1);
    }
}

impl Drop for QueueHandle {
    fn drop(&mut self) {
        self.send(Command::Exit);
    }
}
