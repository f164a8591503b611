//! One thread per queue: it owns the ring, the volume queue and everything in
//! between, so a request meets no lock, no channel and no second thread.
//!
//! ```text
//!   kick ----\
//!   answers --+--> epoll --> complete --> take --> submit --> send
//!   mailbox -/                  |
//!                     data, dirty bits, used ring, call
//! ```
//!
//! The control thread talks to it through a mailbox and waits for the answer;
//! between two batches the queue takes over what it is told, which is the grace
//! period that swapping a dirty log or a memory table needs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_remote_client::{Completion, Op, Tag, Volume, VolumeQueue};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::dirty_log::DirtyLog;
use crate::inflight::InflightRing;
use crate::iovecs;
use crate::log_limit::LogLimit;
use crate::memory::GuestMemory;
use crate::virtio_blk::request::{
    Decision, HEADER_BYTES, ID_BYTES, Limits, SEGMENT_BYTES, Shape, Status, decide,
};
use crate::virtqueue::{Chain, RingAddresses, RingError, Virtqueue};

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

/// What the control thread tells a queue.
#[derive(Debug)]
enum Command {
    Start(Box<RingStart>, mpsc::Sender<io::Result<()>>),
    Apply(Box<RingSetup>, mpsc::Sender<()>),
    /// Take no more requests; answer when none is in flight.
    Drain(mpsc::Sender<Option<u16>>),
    /// Answer now; what is in flight stays in the in-flight table.
    Abandon(mpsc::Sender<Option<u16>>),
    Exit,
}

#[derive(Debug)]
struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    wake: EventFd,
}

/// The control thread's end of a queue. Dropping it ends the thread.
#[derive(Debug)]
pub struct QueueHandle {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
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
    /// Starts the thread.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn spawn(index: u16, disk: Arc<Disk>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let mailbox = Arc::new(Mailbox { commands: Mutex::default(), wake });
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&mailbox.wake, EpollEvent::new(EpollFlags::EPOLLIN, Source::Mailbox as u64))?;
        let theirs = Arc::clone(&mailbox);
        let thread = thread::Builder::new()
            .name(format!("{}-q{index}", disk.name))
            .stack_size(256 << 10)
            .spawn(move || Worker::new(index, disk, theirs, epoll).run())?;
        Ok(Self { mailbox, thread: Some(thread) })
    }

    /// Starts the ring. Requests found in the in-flight table are done first.
    ///
    /// # Errors
    /// When the volume's queue cannot be opened.
    pub fn start(&self, start: RingStart) -> io::Result<()> {
        let (sender, answer) = mpsc::channel();
        self.send(Command::Start(Box::new(start), sender));
        answer.recv().unwrap_or_else(|_| Err(io::Error::other("the queue thread has ended")))
    }

    /// Changes a running ring; a stopped one is left alone. When this returns,
    /// the queue uses nothing of the old set-up except the memory that requests
    /// in flight point into.
    pub fn apply(&self, setup: RingSetup) {
        let (sender, answer) = mpsc::channel();
        self.send(Command::Apply(Box::new(setup), sender));
        let _ = answer.recv();
    }

    /// Begins to stop the ring.
    #[must_use]
    pub fn drain(&self) -> Draining {
        let (sender, answer) = mpsc::channel();
        self.send(Command::Drain(sender));
        Draining { answer }
    }

    /// Stops the ring at once: drops the volume's queue with what is in flight,
    /// so that nothing touches guest memory any more.
    #[must_use]
    pub fn abandon(&self) -> Option<u16> {
        let (sender, answer) = mpsc::channel();
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
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What woke the thread.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Mailbox = 0,
    Kick = 1,
    Volume = 2,
}

/// What completes a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// No request uses this head.
    #[default]
    Idle,
    /// The completion of its operation.
    Last,
    /// The completion of its write is followed by a flush.
    ThenFlush,
}

/// A memory table as one queue holds it. Requests share it by a count that no
/// other thread touches; the table's own count is touched once per table.
#[derive(Debug)]
struct Held(Arc<GuestMemory>);

/// A request in flight, found by its head.
#[derive(Debug, Default)]
struct Pending {
    stage: Stage,
    /// READ: what the storage fills, kept to be marked in the dirty log.
    data: Vec<libc::iovec>,
    /// Bytes the device writes, status included.
    written: u32,
    status: Option<*mut u8>,
    /// Keeps what `data` and `status` point into.
    memory: Option<Rc<Held>>,
}

#[derive(Debug)]
struct Running {
    queue: Virtqueue,
    setup: RingSetup,
    kick: Arc<OwnedFd>,
    inflight: Option<InflightRing>,
    memory: Rc<Held>,
    /// The guest broke the ring: nothing more is taken from it.
    broken: bool,
    /// Set while the ring is being stopped.
    draining: Option<mpsc::Sender<Option<u16>>>,
}

struct Worker {
    index: u16,
    disk: Arc<Disk>,
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    ring: Option<Running>,
    io: Option<Box<dyn VolumeQueue>>,
    pending: Vec<Pending>,
    in_flight: usize,
    /// Something was submitted and not yet sent.
    unsent: bool,
    chain: Chain,
    completions: Vec<Completion>,
    /// Heads put into the used ring and not yet published.
    batch: Vec<u16>,
    guest_errors: LogLimit,
    /// Apart, so that a flood of bad requests does not hide the end of a ring.
    breaks: LogLimit,
    exit: bool,
}

impl Worker {
    fn new(index: u16, disk: Arc<Disk>, mailbox: Arc<Mailbox>, epoll: Epoll) -> Self {
        Self {
            index,
            disk,
            mailbox,
            epoll,
            ring: None,
            io: None,
            pending: Vec::new(),
            in_flight: 0,
            unsent: false,
            chain: Chain::default(),
            completions: Vec::new(),
            batch: Vec::new(),
            guest_errors: LogLimit::default(),
            breaks: LogLimit::default(),
            exit: false,
        }
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 4];
        let mut more = false;
        while !self.exit {
            // With more to do only look at what else is there.
            let timeout = if more { EpollTimeout::ZERO } else { EpollTimeout::NONE };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                // The descriptor is ours and valid: nothing else can happen.
                Err(error) => panic!("epoll_wait on the queue's own descriptor: {error}"),
            };
            let woken_by =
                |source: Source| events[..count].iter().any(|e| e.data() == source as u64);
            if woken_by(Source::Mailbox) {
                self.read_mailbox();
            }
            if woken_by(Source::Volume) {
                self.poll_volume();
            }
            more = self.work();
        }
    }

    fn read_mailbox(&mut self) {
        let _ = self.mailbox.wake.read();
        loop {
            let command = self.mailbox.commands.lock().expect("no panic while held").pop_front();
            match command {
                None => return,
                Some(Command::Start(start, answer)) => {
                    let _ = answer.send(self.start(*start));
                }
                Some(Command::Apply(setup, answer)) => {
                    self.apply(*setup);
                    let _ = answer.send(());
                }
                Some(Command::Drain(answer)) => match &mut self.ring {
                    Some(ring) => {
                        ring.draining = Some(answer);
                        self.finish_drain();
                    }
                    None => drop(answer.send(None)),
                },
                Some(Command::Abandon(answer)) => {
                    self.io = None;
                    self.mark_abandoned();
                    self.in_flight = 0;
                    self.pending.iter_mut().for_each(|pending| *pending = Pending::default());
                    let _ = answer.send(self.stop_ring());
                }
                Some(Command::Exit) => self.exit = true,
            }
        }
    }

    fn start(&mut self, start: RingStart) -> io::Result<()> {
        let RingStart { setup, kick, base, mut inflight } = start;
        // A ring that is still there was never stopped by the front-end.
        self.stop_ring();
        let size = setup.addresses.size();
        if self.in_flight > 0 || self.pending.len() != usize::from(size) {
            self.io = None;
            self.in_flight = 0;
            self.pending.clear();
            self.pending.resize_with(usize::from(size), Pending::default);
        }
        if self.io.is_none() {
            let io = self
                .disk
                .volume
                .open_queue(self.index, usize::from(size))
                .map_err(io::Error::other)?;
            self.epoll
                .add(io.wake_fd(), EpollEvent::new(EpollFlags::EPOLLIN, Source::Volume as u64))?;
            self.io = Some(io);
        }
        // Edge-triggered: a kick need not be read to be forgotten.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll.add(kick.as_fd(), EpollEvent::new(flags, Source::Kick as u64))?;
        let used_idx = setup.addresses.used_idx();
        let mut again = inflight.as_mut().map(|table| table.resume(used_idx)).unwrap_or_default();
        again.retain(|head| *head < size);
        // What was taken is what is done plus what is in flight. The front-end's
        // own idea of it is only right for a ring that completed in order.
        let next_avail = match &inflight {
            Some(_) => {
                used_idx.wrapping_add(u16::try_from(again.len()).expect("at most the ring's size"))
            }
            None => base,
        };
        if !again.is_empty() {
            tracing::info!(
                disk = self.disk.name,
                queue = self.index,
                requests = again.len(),
                "doing requests again that an earlier process left in flight"
            );
        }
        // An earlier process may have been killed between publishing completions
        // and telling the guest of them; one call too many does no harm.
        if let Some(call) = &setup.call {
            signal(call);
        }
        let memory = Rc::new(Held(Arc::clone(setup.addresses.memory())));
        let queue = Virtqueue::new(setup.addresses.clone(), setup.event_idx, next_avail);
        self.ring =
            Some(Running { queue, setup, kick, inflight, memory, broken: false, draining: None });
        for head in again {
            self.take(head);
        }
        Ok(())
    }

    fn apply(&mut self, setup: RingSetup) {
        let Some(ring) = &mut self.ring else { return };
        ring.queue.relocate(setup.addresses.clone(), setup.event_idx);
        if !Arc::ptr_eq(&ring.memory.0, setup.addresses.memory()) {
            ring.memory = Rc::new(Held(Arc::clone(setup.addresses.memory())));
        }
        // What the old event was told, nobody may have heard.
        if let Some(call) = &setup.call
            && ring.setup.call.as_ref().is_none_or(|old| !Arc::ptr_eq(old, call))
        {
            signal(call);
        }
        ring.setup = setup;
    }

    /// Ends the ring; the number is the next available entry.
    fn stop_ring(&mut self) -> Option<u16> {
        // Requests answered since the last look at the ring.
        self.publish();
        let ring = self.ring.take()?;
        // Gone already if the front-end closed the last copy of the event.
        let _ = self.epoll.delete(ring.kick.as_fd());
        Some(ring.queue.next_avail())
    }

    fn finish_drain(&mut self) {
        if self.in_flight > 0 {
            return;
        }
        if let Some(ring) = &mut self.ring
            && let Some(answer) = ring.draining.take()
        {
            let _ = answer.send(self.stop_ring());
        }
    }

    /// Takes and sends requests, one ring full at most, then asks for a kick.
    /// True: there are more, which no kick will tell of. They have to wait for a
    /// look at answers and commands, or a guest that refills the ring as fast as
    /// it is emptied could keep those waiting for ever.
    fn work(&mut self) -> bool {
        self.take_all();
        self.send();
        let Some(ring) = &mut self.ring else { return false };
        if ring.broken || ring.draining.is_some() {
            return false;
        }
        let more = ring.queue.enable_kicks();
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            let (offset, len) = ring.queue.kick_wish_range();
            log.mark(used.wrapping_add(offset), len);
        }
        more
    }

    /// Sends what was submitted; a driver that answers at once may make a
    /// flush follow, which is to be sent too.
    fn send(&mut self) {
        while std::mem::take(&mut self.unsent) {
            if let Some(io) = &mut self.io {
                io.send(&mut self.completions);
            }
            self.complete_all();
        }
        // Requests that were answered without the storage.
        self.publish();
    }

    fn take_all(&mut self) {
        let Some(ring) = &self.ring else { return };
        ring.queue.disable_kicks();
        for _ in 0..ring.queue.size() {
            let Some(ring) = &mut self.ring else { return };
            if ring.broken || ring.draining.is_some() {
                return;
            }
            match ring.queue.pop() {
                Ok(None) => return,
                Ok(Some(head)) if self.pending[usize::from(head)].stage != Stage::Idle => {
                    self.break_ring(&format!("the guest offered descriptor {head} twice"));
                }
                Ok(Some(head)) => {
                    if let Some(table) = &mut ring.inflight {
                        table.take(head);
                    }
                    self.take(head);
                }
                Err(error @ (RingError::AvailJump { .. } | RingError::BadHead { .. })) => {
                    self.break_ring(&error.to_string());
                }
            }
        }
    }

    /// Nothing on the ring can be trusted any more: leave it alone until the
    /// front-end stops and starts it.
    fn break_ring(&mut self, why: &str) {
        let Some(ring) = &mut self.ring else { return };
        ring.broken = true;
        if let Some(err) = &ring.setup.err {
            signal(err);
        }
        if let Some(suppressed) = self.breaks.permit() {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "{why}; this queue stops until the guest resets the device"
            );
        }
    }

    /// Reads the request at `head` and hands it on or answers it.
    fn take(&mut self, head: u16) {
        let Some(ring) = &mut self.ring else { return };
        let chain = &mut self.chain;
        if let Err(error) = ring.queue.read_chain(head, chain) {
            self.complain(&error.to_string());
            return self.finish(head, None, 0);
        }
        let status = iovecs::take_last_byte(&mut chain.writable);
        let mut header = [0; HEADER_BYTES];
        let header_bytes = iovecs::take_front(&mut chain.readable, &mut header);
        let mut segment = [0; SEGMENT_BYTES];
        // Only discard and write-zeroes have one; they carry no other data.
        let readable_bytes = iovecs::total(&chain.readable);
        if readable_bytes <= 2 * SEGMENT_BYTES as u64 {
            iovecs::peek_front(&chain.readable, &mut segment);
        }
        let writable_bytes = iovecs::total(&chain.writable);
        let Some(status) = status.filter(|_| !chain.tail_missing) else {
            self.complain("a request has no room for its status");
            return self.finish(head, None, 0);
        };
        if chain.faulty || header_bytes < HEADER_BYTES {
            self.complain("a request has a short header or a buffer outside the guest's memory");
            return self.answer(head, status, Status::IoErr, 0);
        }
        let limits = Limits {
            size_bytes: self.disk.size_bytes.load(Ordering::Relaxed),
            read_only: self.disk.read_only,
        };
        let shape = Shape { header, readable_bytes, writable_bytes, segment };
        match decide(&shape, limits) {
            Decision::Storage(op) => self.submit(head, status, op, writable_bytes),
            Decision::GetId => {
                let written = iovecs::fill(&self.chain.writable, &self.disk.id);
                self.mark_chain();
                self.answer(head, status, Status::Ok, written);
            }
            Decision::Answer(answer) => {
                if answer != Status::Ok {
                    self.complain("a request is off the disk, malformed or not supported");
                }
                self.answer(head, status, answer, 0);
            }
        }
    }

    fn submit(&mut self, head: u16, status: *mut u8, op: Op, writable_bytes: u64) {
        let (Some(ring), Some(io)) = (&mut self.ring, &mut self.io) else { return };
        let pending = &mut self.pending[usize::from(head)];
        let data = match op {
            Op::Read { .. } => &mut self.chain.writable,
            Op::Write { .. } => &mut self.chain.readable,
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => {
                self.chain.readable.clear();
                &mut self.chain.readable
            }
        };
        let mutation = matches!(op, Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. });
        pending.stage =
            if mutation && ring.setup.write_through { Stage::ThenFlush } else { Stage::Last };
        let read_bytes = if matches!(op, Op::Read { .. }) { writable_bytes } else { 0 };
        pending.written = u32::try_from(read_bytes).unwrap_or(u32::MAX - 1).saturating_add(1);
        pending.status = Some(status);
        pending.memory = Some(Rc::clone(&ring.memory));
        // SAFETY: the buffers lie in guest memory that `pending.memory` keeps
        // mapped until the completion, or until the volume's queue is dropped.
        unsafe { io.submit(Tag(u32::from(head)), op, data) };
        pending.data.clear();
        if matches!(op, Op::Read { .. }) {
            std::mem::swap(&mut pending.data, data);
        }
        self.in_flight += 1;
        self.unsent = true;
    }

    fn poll_volume(&mut self) {
        if let Some(io) = &mut self.io {
            io.poll(&mut self.completions);
        }
        self.complete_all();
    }

    /// Completes what the storage has answered and shows the guest all of it
    /// at once.
    fn complete_all(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        self.publish();
        self.finish_drain();
    }

    fn complete(&mut self, completion: Completion) {
        let Ok(head) = u16::try_from(completion.tag.0) else { return };
        let Some(pending) = self.pending.get_mut(usize::from(head)) else { return };
        if pending.stage == Stage::ThenFlush && completion.result.is_ok() {
            pending.stage = Stage::Last;
            if let Some(io) = &mut self.io {
                // SAFETY: a flush has no buffers.
                unsafe { io.submit(completion.tag, Op::Flush, &[]) };
                self.unsent = true;
            }
            return;
        }
        let Pending { stage, data, written, status, memory } = std::mem::take(pending);
        if stage == Stage::Idle {
            return;
        }
        self.in_flight -= 1;
        if let Err(error) = completion.result
            && let Some(suppressed) = self.guest_errors.permit()
        {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "a guest request failed: {error}"
            );
        }
        let log = self.ring.as_ref().and_then(|ring| ring.setup.log.clone());
        if let (Some(log), Some(memory)) = (&log, &memory) {
            mark(log, &memory.0, &data);
        }
        if let Some(status) = status {
            write_status(status, completion.result.into());
            if let (Some(log), Some(memory)) = (&log, &memory)
                && let Some(addr) = memory.0.guest_addr_of(status)
            {
                log.mark(addr, 1);
            }
        }
        // Keep the buffer's capacity for the next request of this head.
        self.pending[usize::from(head)].data = data;
        self.put_used(head, written);
    }

    /// Answers a request that never reached the storage.
    fn answer(&mut self, head: u16, status: *mut u8, answer: Status, data_bytes: u32) {
        write_status(status, answer);
        if let Some(ring) = &self.ring
            && let Some(log) = &ring.setup.log
            && let Some(addr) = ring.memory.0.guest_addr_of(status)
        {
            log.mark(addr, 1);
        }
        self.finish(head, Some(answer), data_bytes);
    }

    /// Gives a request back; without an answer nothing could be written.
    fn finish(&mut self, head: u16, answer: Option<Status>, data_bytes: u32) {
        let written = if answer.is_some() { data_bytes.saturating_add(1) } else { 0 };
        self.put_used(head, written);
    }

    fn put_used(&mut self, head: u16, written: u32) {
        let Some(ring) = &mut self.ring else { return };
        ring.queue.put_used(head, written);
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            let (offset, len) = ring.queue.last_used_range();
            log.mark(used.wrapping_add(offset), len);
        }
        if let Some(table) = &mut ring.inflight {
            table.link(head);
        }
        self.batch.push(head);
    }

    fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let Some(ring) = &mut self.ring else {
            self.batch.clear();
            return;
        };
        ring.queue.publish();
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            log.mark(used, 4);
        }
        if let Some(table) = &mut ring.inflight {
            table.published(self.batch.iter().copied(), ring.queue.next_used());
        }
        self.batch.clear();
        if ring.queue.wants_signal()
            && let Some(call) = &ring.setup.call
        {
            signal(call);
        }
    }

    /// The storage may have filled a part of any buffer it was given.
    fn mark_abandoned(&self) {
        let Some(log) = self.ring.as_ref().and_then(|ring| ring.setup.log.as_ref()) else { return };
        for pending in &self.pending {
            if let (true, Some(memory)) = (pending.stage != Stage::Idle, &pending.memory) {
                mark(log, &memory.0, &pending.data);
            }
        }
    }

    /// Marks the writable buffers of the current chain.
    fn mark_chain(&self) {
        if let Some(ring) = &self.ring
            && let Some(log) = &ring.setup.log
        {
            mark(log, &ring.memory.0, &self.chain.writable);
        }
    }

    fn complain(&mut self, why: &str) {
        if let Some(suppressed) = self.guest_errors.permit() {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "refused a request of the guest: {why}"
            );
        }
    }
}

fn mark(log: &DirtyLog, memory: &GuestMemory, buffers: &[libc::iovec]) {
    for buffer in buffers {
        if let Some(addr) = memory.guest_addr_of(buffer.iov_base.cast()) {
            log.mark(addr, buffer.iov_len as u64);
        }
    }
}

fn write_status(status: *mut u8, value: Status) {
    // SAFETY: points into guest memory that the caller holds mapped; volatile
    // because the guest may read or write it meanwhile.
    unsafe { status.write_volatile(value as u8) };
}

/// Adds to an eventfd. It may be non-blocking and full, which is as good as
/// signalled, or gone, which is the front-end's matter.
fn signal(event: &OwnedFd) {
    let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
}
