//! The data path: worker threads, each with an epoll loop over its connections.
//!
//! ```text
//!   socket --recv--> input --front/judge--> gate --> store --> output --send--> socket
//!                                             |  (would wait for the disk)
//!                                             +--> io_uring / pool / flusher --> mailbox
//! ```
//!
//! One recv takes many requests, all of them are served, one send answers them.
//! A connection belongs to one worker for its life, so its state has no lock.
//! A turn (what one recv brought) is admitted by the gate once per epoch.
//! Large reads go from the page cache to the socket without passing the output.
//!
//! Memory of one connection: 32 KiB busy with small reads, up to 0.5 MiB with a
//! stream of writes, and nothing idle;
//! at most 1 MiB + 64 bytes received, 1 MiB + 32 bytes to send and 3 MiB of read
//! answers that came late.

mod ask;
mod broom;
mod buffers;
mod conn;
mod flusher;
mod large_writes;
mod mailbox;
mod pool;
mod ring;
mod rounds;
mod serve;
mod slice;

pub use slice::ask_for_short as ask_for_short_slice;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_protocol::{BusyPoll, VolumeId};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::metrics::{self, WorkerMetrics};
use crate::store::Store;

pub(crate) use conn::{Newcomer, Place, Presence};
pub(crate) use flusher::Flusher;
pub(crate) use mailbox::{Mailbox, Message};
pub(crate) use pool::Pool;

use broom::Broom;
use conn::{Conn, Life};
use ring::{Back, Ring};
use rounds::Rounds;

const EVENTS: usize = 128;
/// epoll data of what is not a connection.
const MAILBOX: u64 = u64::MAX;
const RING: u64 = u64::MAX - 1;
const BROOM: u64 = u64::MAX - 2;
/// How often large buffers of idle connections are given back, while there are any.
const SWEEP: Duration = Duration::from_secs(1);
/// Sweeps that a peer gets to read the reply to its violation and close.
const LINGER_SWEEPS: u32 = 2;
/// How long a stop waits for clients to take their last answers.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What a worker is made with.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Its number, and its slot at every gate.
    pub(crate) number: usize,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) store: Arc<Store>,
    pub(crate) flusher: Arc<Flusher>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) runtime: tokio::runtime::Handle,
    /// Use io_uring where the kernel allows it.
    pub(crate) io_uring: bool,
    /// Treat every read as one that would wait for the disk.
    pub(crate) cold_reads: bool,
    /// Send large reads that are in memory from where they are.
    pub(crate) mapped_reads: bool,
    /// Pass large writes from the socket to the file through a pipe.
    pub(crate) piped_writes: bool,
    /// Ask for a short time slice.
    pub(crate) short_slice: bool,
    /// Longest time to look for more work before sleeping, in us; 0: not at all.
    pub(crate) poll_us: u64,
}

/// Everything of a worker except its connections.
struct Context {
    setup: Setup,
    epoll: Epoll,
    ring: Option<Ring>,
    /// Connections to look at before waiting again.
    ready: Vec<usize>,
    rounds: Rounds,
}

struct Worker {
    context: Context,
    // A box for each, so that a large table moves cheaply.
    conns: Vec<Option<Box<Conn>>>,
    free: Vec<usize>,
    by_id: HashMap<u64, usize>,
    stop_at: Option<Instant>,
    /// Asked to come when some connection holds a large buffer or lingers.
    broom: Broom,
    /// `None`: sleeps at once when there is nothing to do.
    polling: Option<BusyPoll>,
}

/// Whether this kernel lets us use io_uring, and if not, why.
pub(crate) fn probe_io_uring(store: &Store) -> std::io::Result<()> {
    Ring::new(store.pool_fd()).map(drop)
}

/// Starts a worker.
pub(crate) fn start(setup: Setup) -> std::io::Result<JoinHandle<()>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(setup.mailbox.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, MAILBOX))?;
    let ring = if setup.io_uring { Some(Ring::new(setup.store.pool_fd())?) } else { None };
    if let Some(ring) = &ring {
        // SAFETY: the ring is open and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, RING))?;
    }
    let broom = Broom::new(SWEEP)?;
    epoll.add(broom.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, BROOM))?;
    let name = format!("worker-{}", setup.number);
    let polling = BusyPoll::new(setup.poll_us);
    let context = Context { setup, epoll, ring, ready: Vec::new(), rounds: Rounds::default() };
    let mut worker = Worker {
        context,
        conns: Vec::new(),
        free: Vec::new(),
        by_id: HashMap::new(),
        stop_at: None,
        broom,
        polling,
    };
    std::thread::Builder::new().name(name).spawn(move || worker.run())
}

impl Worker {
    fn run(&mut self) {
        self.context.setup.mailbox.bind_here();
        if self.context.setup.short_slice
            && let Err(error) = slice::ask_for_short()
        {
            tracing::warn!(%error, "workers have no shorter time slice than other threads");
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut messages = Vec::new();
        let mut back = Vec::new();
        let mut now = Vec::new();
        while !self.is_finished() {
            if let Some(ring) = &mut self.context.ring {
                ring.submit();
            }
            let timeout = self.timeout();
            let n = match self.context.epoll.wait(&mut events, timeout) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    // Cannot happen with a valid epoll; do not spin if it does.
                    tracing::error!(%error, "epoll failed");
                    std::thread::sleep(Duration::from_millis(100));
                    0
                }
            };
            if n > 0
                && let Some(polling) = &mut self.polling
            {
                polling.found(Instant::now());
            }
            let (mut mail, mut sweep) = (false, false);
            for event in &events[..n] {
                match event.data() {
                    MAILBOX => mail = true,
                    RING => self.reap(&mut back),
                    BROOM => sweep = self.broom.take(),
                    index => {
                        let index = usize::try_from(index).unwrap_or(usize::MAX);
                        self.on_socket(index, event.events());
                    }
                }
            }
            // Newcomers last: an event above may belong to a connection whose
            // place in the table they take.
            if mail {
                self.take_mail(&mut messages);
            }
            std::mem::swap(&mut now, &mut self.context.ready);
            for index in now.drain(..) {
                self.look(index, false);
            }
            if let Some(index) = self.context.rounds.next() {
                self.next_turn(index);
            }
            if sweep {
                self.sweep();
            }
            // What was done above is news to other connections of this worker. Last: nobody else wakes it for that.
            while self.context.setup.mailbox.has_own() {
                self.take_mail(&mut messages);
            }
        }
    }

    fn take_mail(&mut self, messages: &mut Vec<Message>) {
        self.context.setup.mailbox.take(messages);
        for message in messages.drain(..) {
            self.on_message(message);
        }
    }

    fn timeout(&mut self) -> EpollTimeout {
        let busy = !self.context.ready.is_empty()
            || self.context.rounds.is_anyone_waiting()
            || self.context.ring.as_ref().is_some_and(Ring::has_unsubmitted);
        if busy {
            return EpollTimeout::ZERO;
        }
        if let Some(polling) = &mut self.polling
            && polling.look_again(Instant::now())
        {
            return EpollTimeout::ZERO;
        }
        if self.stop_at.is_some() { EpollTimeout::from(1000u16) } else { EpollTimeout::NONE }
    }

    fn is_finished(&self) -> bool {
        let Some(stop_at) = self.stop_at else { return false };
        self.by_id.is_empty() || Instant::now() >= stop_at
    }

    fn on_socket(&mut self, index: usize, flags: EpollFlags) {
        let Some(Some(conn)) = self.conns.get_mut(index) else { return };
        if flags.contains(EpollFlags::EPOLLERR) {
            conn.life = Life::Dead;
        }
        if flags.intersects(EpollFlags::EPOLLHUP) && !flags.intersects(EpollFlags::EPOLLIN) {
            conn.life = Life::Dead;
        }
        let readable = flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP);
        self.look(index, readable);
    }

    /// There is something new about a connection. One that waits for its turn does so with that, too.
    fn look(&mut self, index: usize, readable: bool) {
        match self.conns.get_mut(index) {
            Some(Some(conn)) if conn.waits && conn.life == Life::Open => {
                conn.queued = false;
                conn.readable |= readable;
            }
            _ => self.turn(index, readable),
        }
    }

    /// It is the turn of one that waited.
    fn next_turn(&mut self, index: usize) {
        let Some(Some(conn)) = self.conns.get_mut(index) else { return };
        conn.waits = false;
        let readable = std::mem::take(&mut conn.readable);
        self.turn(index, readable);
    }

    /// Serves a connection: receive if there is something, run what is there,
    /// send the answers.
    fn turn(&mut self, index: usize, readable: bool) {
        let Some(Some(conn)) = self.conns.get_mut(index) else { return };
        conn.queued = false;
        match conn.life {
            Life::Open => self.context.serve(index, conn, readable),
            Life::Lingering if readable => conn.discard_input(),
            Life::Lingering | Life::Closing => conn.send(),
            Life::Dead => {}
        }
        self.settle(index);
    }

    /// After every change: gone if over, else watched for the right things.
    fn settle(&mut self, index: usize) {
        let Some(Some(conn)) = self.conns.get_mut(index) else { return };
        if conn.is_over() {
            return self.remove(index);
        }
        let read = match conn.life {
            Life::Open => !conn.blocked && !conn.is_throttled(),
            Life::Lingering => true,
            Life::Closing | Life::Dead => false,
        };
        let write = conn.blocked && conn.life != Life::Dead;
        if conn.holds_much() || conn.life == Life::Lingering {
            self.broom.ask();
        }
        let Some(watching) = conn.watching else { return };
        if conn.life == Life::Dead {
            // Errors are always reported; nobody would listen.
            let _ = self.context.epoll.delete(&conn.socket);
            conn.watching = None;
        } else if watching != (read, write) {
            let mut flags = EpollFlags::empty();
            flags.set(EpollFlags::EPOLLIN, read);
            flags.set(EpollFlags::EPOLLOUT, write);
            let mut event = EpollEvent::new(flags, index as u64);
            if self.context.epoll.modify(&conn.socket, &mut event).is_ok() {
                conn.watching = Some((read, write));
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(conn) = self.conns.get_mut(index).and_then(Option::take) else { return };
        self.by_id.remove(&conn.presence.id);
        self.free.push(index);
        metrics::sub(&self.context.setup.metrics.connections, 1);
        // Dropping closes the socket, which also ends its epoll entry, and then
        // frees the seat.
        drop(conn);
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::New(newcomer) => self.add(*newcomer),
            Message::Kill(id) => {
                if let Some(&index) = self.by_id.get(&id) {
                    self.kill(index);
                }
            }
            Message::Done(done) => {
                let index = done.conn;
                if let Some(Some(conn)) = self.conns.get_mut(index) {
                    let spare = conn.finish(done, &self.context.setup.metrics);
                    if let (Some(ring), Some(buffer)) = (&mut self.context.ring, spare) {
                        ring.recycle(buffer);
                    }
                    self.context.queue(index, conn);
                }
            }
            Message::Asked(asked) => {
                let Some(&index) = self.by_id.get(&asked.conn) else { return };
                let point = asked.answered_point();
                if let Some(Some(conn)) = self.conns.get_mut(index) {
                    conn.hear(*asked, &self.context.setup.metrics);
                    self.turn(index, false);
                }
                baton_fault_point::at(point);
            }
            Message::News(volume) => self.tell_news(volume),
            Message::Stop => {
                self.stop_at = Some(Instant::now() + STOP_PATIENCE);
                for index in 0..self.conns.len() {
                    if let Some(Some(conn)) = self.conns.get_mut(index) {
                        if conn.life == Life::Open || conn.life == Life::Lingering {
                            conn.life = Life::Closing;
                        }
                        conn.forget_parked();
                        self.turn(index, false);
                    }
                }
            }
        }
    }

    fn add(&mut self, newcomer: Newcomer) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() - 1
        });
        let id = newcomer.presence.id;
        let piped_writes = self.context.setup.piped_writes && large_writes::gain(&newcomer.socket);
        let mut conn = Box::new(Conn::new(newcomer, piped_writes));
        let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        if let Err(error) = self.context.epoll.add(&conn.socket, event) {
            tracing::error!(%error, "a connection cannot be watched and is closed");
            self.free.push(index);
            return;
        }
        metrics::add(&self.context.setup.metrics.connections, 1);
        if self.stop_at.is_some() {
            conn.life = Life::Closing;
        }
        conn.send();
        // Its place says what the client has the answers of.
        conn.volume().arrivals.look();
        self.conns[index] = Some(conn);
        self.by_id.insert(id, index);
        self.settle(index);
    }

    fn kill(&mut self, index: usize) {
        if let Some(Some(conn)) = self.conns.get_mut(index) {
            conn.life = Life::Dead;
            conn.forget_parked();
            // The peer learns at once, even if work elsewhere keeps the place.
            let fd: RawFd = std::os::fd::AsRawFd::as_raw_fd(&conn.socket);
            let _ = nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Both);
            self.settle(index);
        }
    }

    fn tell_news(&mut self, volume: VolumeId) {
        for index in 0..self.conns.len() {
            let Some(Some(conn)) = self.conns.get_mut(index) else { continue };
            if conn.volume().id() == volume {
                conn.answer_parked(&self.context.setup.metrics);
                self.turn(index, false);
            }
        }
    }

    fn reap(&mut self, back: &mut Vec<Back>) {
        let Some(ring) = &mut self.context.ring else { return };
        ring.reap(back);
        for read in back.drain(..) {
            match read {
                Back::Done(done) => self.on_message(Message::Done(done)),
                Back::Again(read) => {
                    let Some(Some(conn)) = self.conns.get(read.conn) else { continue };
                    self.context.read_in_pool(conn, read);
                }
            }
        }
    }

    fn sweep(&mut self) {
        for index in 0..self.conns.len() {
            let Some(Some(conn)) = self.conns.get_mut(index) else { continue };
            if conn.life == Life::Lingering {
                conn.sweeps += 1;
                if conn.sweeps > LINGER_SWEEPS {
                    conn.life = Life::Dead;
                }
            }
            if !std::mem::take(&mut conn.active) {
                conn.input.shrink();
                conn.output.shrink();
                conn.large.shrink();
            }
            self.settle(index);
        }
    }
}
