//! The server of the session's tests on real sockets, one thread a connection.
//! It can be killed, started again on its address, and frozen.

#![allow(dead_code, reason = "each test binary uses its part")]

#[path = "../../src/baton/session/tests/server.rs"]
mod server;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use baton_remote_client::{
    Completion, IoError, Op, OpenError, OpenOptions, Tag, Timing, Volume, VolumeQueue, open,
};
pub(crate) use server::{Connection, Server};

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn try_clone(&self) -> Self {
        match self {
            Self::Tcp(s) => Self::Tcp(s.try_clone().expect("clone")),
            Self::Unix(s) => Self::Unix(s.try_clone().expect("clone")),
        }
    }
    fn shutdown(&self) {
        // Fails when the peer was faster.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
            Self::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Tcp(s) => s.read(buffer),
            Self::Unix(s) => s.read(buffer),
        }
        .unwrap_or(0)
    }
    fn write_all(&mut self, bytes: &[u8]) -> bool {
        match self {
            Self::Tcp(s) => s.write_all(bytes),
            Self::Unix(s) => s.write_all(bytes),
        }
        .is_ok()
    }
}

struct Live {
    connection: Connection,
    stream: Stream,
    /// Accepts bytes and does nothing with them, as behind a broken network.
    frozen: bool,
}

pub(crate) struct State {
    pub(crate) server: Server,
    live: HashMap<usize, Live>,
    accepted: usize,
    /// Bytes that frozen connections took, from their freezing on.
    pub(crate) swallowed: usize,
}

impl State {
    /// Tells the control connection: at once, or when it asks.
    pub(crate) fn tell(&mut self, event: baton_protocol::Event) {
        self.server.last_event = event.id;
        self.server.latest = Some(event);
        for live in self.live.values_mut() {
            if live.connection.parked.is_some() {
                self.server.tell_event(&mut live.connection, event);
                for reply in live.connection.replies.drain(..) {
                    live.stream.write_all(&reply);
                }
            }
        }
    }

    /// The connections of now go silent; later ones work.
    pub(crate) fn freeze(&mut self) {
        self.live.values_mut().for_each(|live| live.frozen = true);
    }

    /// Breaks the connections that `which` says by queue number.
    pub(crate) fn cut(&mut self, which: impl Fn(u16) -> bool) {
        for live in self.live.values() {
            if live.connection.queue().is_some_and(|queue| which(queue.0)) {
                live.stream.shutdown();
            }
        }
    }

    pub(crate) fn connections(&self) -> usize {
        self.live.len()
    }

    pub(crate) fn accepted(&self) -> usize {
        self.accepted
    }
}

/// A server process, as far as a client can tell.
pub(crate) struct TinyServer {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub(crate) uri: String,
    address: Address,
}

#[derive(Clone)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> Option<Stream> {
        match self {
            Self::Tcp(l) => l.accept().ok().map(|(s, _)| {
                s.set_nodelay(true).expect("nodelay");
                s.set_nonblocking(false).expect("blocking");
                Stream::Tcp(s)
            }),
            Self::Unix(l) => l.accept().ok().map(|(s, _)| {
                s.set_nonblocking(false).expect("blocking");
                Stream::Unix(s)
            }),
        }
    }
}

impl TinyServer {
    pub(crate) fn tcp(server: Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        Self::new(server, Address::Tcp(address), Listener::Tcp(listener))
    }

    pub(crate) fn unix(server: Server, path: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).expect("bind");
        Self::new(server, Address::Unix(path), Listener::Unix(listener))
    }

    fn new(server: Server, address: Address, listener: Listener) -> Self {
        let uri = match &address {
            Address::Tcp(address) => format!("baton://{address}/vol"),
            Address::Unix(path) => format!("baton+unix:///vol?socket={}", path.display()),
        };
        let state = State { server, live: HashMap::new(), accepted: 0, swallowed: 0 };
        let mut this = Self {
            state: Arc::new(Mutex::new(state)),
            stop: Arc::default(),
            thread: None,
            uri,
            address,
        };
        this.serve(listener);
        this
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test thread panicked")
    }

    fn serve(&mut self, listener: Listener) {
        match &listener {
            Listener::Tcp(l) => l.set_nonblocking(true),
            Listener::Unix(l) => l.set_nonblocking(true),
        }
        .expect("non-blocking");
        let stop = Arc::new(AtomicBool::new(false));
        self.stop = Arc::clone(&stop);
        let state = Arc::clone(&self.state);
        self.thread = Some(thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                match listener.accept() {
                    Some(stream) => serve_connection(&state, stream),
                    None => thread::sleep(Duration::from_millis(1)),
                }
            }
        }));
    }

    /// kill -9: the listener and all connections end at once.
    pub(crate) fn kill(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("acceptor");
        }
        self.state().live.drain().for_each(|(_, live)| live.stream.shutdown());
        if let Address::Unix(path) = &self.address {
            std::fs::remove_file(path).expect("socket");
        }
    }

    /// Starts again on the same address, with the same disk.
    pub(crate) fn start(&mut self) {
        self.state().server.restart();
        let listener = match self.address.clone() {
            Address::Tcp(address) => Listener::Tcp(TcpListener::bind(address).expect("bind")),
            Address::Unix(path) => Listener::Unix(UnixListener::bind(path).expect("bind")),
        };
        self.serve(listener);
    }
}

impl Drop for TinyServer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.kill();
        }
    }
}

fn serve_connection(state: &Arc<Mutex<State>>, stream: Stream) {
    let mut reader = stream.try_clone();
    let id = {
        let mut state = state.lock().expect("state");
        state.accepted += 1;
        let id = state.accepted;
        state.live.insert(id, Live { connection: Connection::default(), stream, frozen: false });
        id
    };
    let state = Arc::clone(state);
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = reader.read(&mut buffer);
            let mut state = state.lock().expect("state");
            let state = &mut *state;
            let Some(live) = state.live.get_mut(&id) else { return };
            if n == 0 {
                state.live.remove(&id);
                return;
            }
            if live.frozen {
                state.swallowed += n;
                continue;
            }
            state.server.feed(&mut live.connection, &buffer[..n]);
            // Out of order on purpose.
            while let Some(last) = live.connection.replies.len().checked_sub(1) {
                let reply = live.connection.take_reply(last);
                live.stream.write_all(&reply);
            }
            if live.connection.closed {
                live.stream.shutdown();
            }
            // The old connection of a queue is dead before its new one works.
            if let Some(queue) = live.connection.queue() {
                state.live.retain(|other, live| {
                    let dead = *other != id && live.connection.queue() == Some(queue);
                    if dead {
                        live.stream.shutdown();
                    }
                    !dead
                });
            }
        }
    });
}

pub(crate) fn options() -> OpenOptions {
    OpenOptions { timing: quick(), ..OpenOptions::new("host/vm") }
}

/// Times that a test can wait for.
pub(crate) fn quick() -> Timing {
    Timing {
        connect: Duration::from_millis(500),
        hello: Duration::from_millis(500),
        ping_after: Duration::from_millis(100),
        dead_after: Duration::from_millis(100),
        ..Timing::default()
    }
}

pub(crate) fn opened(uri: &str) -> Arc<dyn Volume> {
    open(uri, &options()).unwrap_or_else(|e| panic!("{e}: {:?}", std::error::Error::source(&e)))
}

pub(crate) fn refused(uri: &str, timeout: Duration) -> OpenError {
    let options = OpenOptions { connect_timeout: timeout, ..options() };
    open(uri, &options).expect_err("refused")
}

/// Waits until the queue says that it should be polled; false after `limit`.
pub(crate) fn wait(queue: &dyn VolumeQueue, limit: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout = PollTimeout::try_from(limit).expect("short");
    poll(&mut [PollFd::new(queue.wake_fd(), PollFlags::POLLIN)], timeout).expect("poll") > 0
}

/// Polls until `count` requests are done or `limit` has passed.
pub(crate) fn collect(
    queue: &mut dyn VolumeQueue,
    count: usize,
    limit: Duration,
) -> Vec<Completion> {
    let until = Instant::now() + limit;
    let mut done = Vec::new();
    queue.poll(&mut done);
    while done.len() < count && Instant::now() < until {
        wait(queue, until.saturating_duration_since(Instant::now()));
        queue.poll(&mut done);
    }
    done
}

/// A buffer that a request may use while nobody else does.
pub(crate) struct Buffer(pub(crate) Vec<u8>);

impl Buffer {
    pub(crate) fn iov(&mut self) -> [libc::iovec; 2] {
        let half = self.0.len() / 2;
        let (a, b) = self.0.split_at_mut(half);
        [a, b].map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
    }
}

/// One request from beginning to end.
pub(crate) fn run(queue: &mut dyn VolumeQueue, op: Op, data: &mut Buffer) -> Result<(), IoError> {
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Tag(1), op, &data.iov()) };
    let done = collect(queue, 1, Duration::from_secs(20));
    assert_eq!(done.len(), 1, "no answer");
    done[0].result
}

/// Waits until `met`, at most 10 s.
pub(crate) fn eventually(what: &str, mut met: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !met() {
        assert!(Instant::now() < until, "not within 10 s: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Requests in flight of each queue of a [`stamped_load`].
const STAMPED_SLOTS: u32 = 16;
const STAMPED_BYTES: usize = 20 << 10;

/// Writes stamps and reads them back, with a thread for each of so many queues, until the deadline; every request has
/// to succeed. The queues come back with their rounds.
pub(crate) fn stamped_load(
    volume: &Arc<dyn Volume>,
    queues: u16,
    deadline: Instant,
) -> Vec<JoinHandle<(Box<dyn VolumeQueue>, u32)>> {
    let queue = |index| {
        let volume = Arc::clone(volume);
        thread::spawn(move || {
            let mut queue = volume.open_queue(index, STAMPED_SLOTS as usize).expect("queue");
            let rounds = stamp_until(&mut *queue, index, deadline);
            (queue, rounds)
        })
    };
    (0..queues).map(queue).collect()
}

fn stamp_until(queue: &mut dyn VolumeQueue, index: u16, deadline: Instant) -> u32 {
    let base = u64::from(index) * u64::from(STAMPED_SLOTS) * STAMPED_BYTES as u64;
    let mut buffers: Vec<_> = (0..STAMPED_SLOTS).map(|_| Buffer(vec![0; STAMPED_BYTES])).collect();
    let mut stamps: Vec<u8> = (0..16).map(|slot| slot * 16).collect();
    let mut rounds = 0u32;
    while Instant::now() < deadline {
        rounds += 1;
        let write = rounds % 2 == 1;
        for (slot, buffer) in (0u32..).zip(&mut buffers) {
            let offset = base + u64::from(slot) * STAMPED_BYTES as u64;
            let stamp = &mut stamps[slot as usize];
            if write {
                *stamp = stamp.wrapping_add(1);
                buffer.0.fill(*stamp);
            } else {
                buffer.0.fill(0xee);
            }
            let op = if write { Op::Write { offset } } else { Op::Read { offset } };
            // SAFETY: the buffers live until all are collected.
            unsafe { queue.submit(Tag(slot), op, &buffer.iov()) };
        }
        let done = collect(queue, STAMPED_SLOTS as usize, Duration::from_secs(20));
        let mut tags: Vec<_> = done.iter().map(|c| (c.tag.0, c.result)).collect();
        tags.sort_by_key(|t| t.0);
        let want: Vec<_> = (0..STAMPED_SLOTS).map(|t| (t, Ok(()))).collect();
        assert_eq!(tags, want);
        for (slot, buffer) in buffers.iter().enumerate() {
            assert!(buffer.0.iter().all(|b| *b == stamps[slot]), "queue {index}");
        }
    }
    rounds
}
