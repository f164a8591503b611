//! What gives a [`Session`] a socket, a clock and one descriptor to wait on.
//!
//! The descriptor is an epoll instance that holds the socket of the moment, a
//! timer and a notification, so it stays the same over reconnects. It is never
//! asked which of the three it was: `poll` tries what may be due, which in
//! steady state is one `sendmsg` and one `recv` per batch and nothing else.
//! Decides nothing; the session does.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect,
    getpeername, getsockname, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::session::{DropReason, Session, State};
use crate::file::IOV_MAX;
use crate::uri::HostPort;
use crate::volume::Completion;

/// One receive takes a batch of small answers: 62 READs of 4 KiB. Only what was
/// used of it is resident.
const BATCH_BYTES: usize = 256 << 10;

/// While a large payload is on its way little is read into the buffer, so that
/// most of the payload goes straight to guest memory: a header, and answers
/// that came between.
const TAIL_BYTES: usize = 4 << 10;

/// Room for requests on their way through a Unix socket, whose buffer does not
/// grow by itself; the kernel cuts it to its limit.
const UNIX_BUFFER_BYTES: usize = 4 << 20;

/// The kernel probes an idle connection after this, so that a dead server is
/// noticed without waking this process for a live one.
const KEEPALIVE_IDLE_S: u32 = 10;
const KEEPALIVE_INTERVAL_S: u32 = 3;
const KEEPALIVE_PROBES: u32 = 3;
/// Sent data that nobody acknowledges for this long ends the connection.
const USER_TIMEOUT_MS: u32 = 15_000;

/// Where a storage server is.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Tcp {
        server: HostPort,
        /// What the name resolved to last; never empty.
        addresses: Mutex<Vec<SocketAddr>>,
    },
    Unix(PathBuf),
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { server, .. } => write!(f, "{server}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Endpoint {
    /// Resolves the server's name, which may block.
    pub(crate) fn resolve(server: &HostPort) -> io::Result<Self> {
        let addresses = Mutex::new(lookup(server)?);
        Ok(Self::Tcp { server: server.clone(), addresses })
    }

    /// Resolves the name again, which may block. A name that does not resolve
    /// any more leaves the old addresses.
    pub(crate) fn refresh(&self) {
        if let Self::Tcp { server, addresses } = self
            && server.host.parse::<std::net::IpAddr>().is_err()
            && let Ok(found) = lookup(server)
        {
            *addresses.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
    }

    /// Begins connection number `attempt`.
    fn connect(&self, attempt: usize) -> nix::Result<OwnedFd> {
        match self {
            Self::Tcp { addresses, .. } => {
                let address = {
                    let list = addresses.lock().unwrap_or_else(PoisonError::into_inner);
                    list[attempt % list.len()]
                };
                let family =
                    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
                let fd = new_socket(family)?;
                setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
                setsockopt(&fd, sockopt::KeepAlive, &true)?;
                setsockopt(&fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
                setsockopt(&fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
                setsockopt(&fd, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
                setsockopt(&fd, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
                begin(&fd, &SockaddrStorage::from(address))?;
                Ok(fd)
            }
            Self::Unix(path) => {
                let fd = new_socket(AddressFamily::Unix)?;
                setsockopt(&fd, sockopt::SndBuf, &UNIX_BUFFER_BYTES)?;
                begin(&fd, &UnixAddr::new(path)?)?;
                Ok(fd)
            }
        }
    }
}

fn lookup(server: &HostPort) -> io::Result<Vec<SocketAddr>> {
    let found: Vec<_> = (server.host.as_str(), server.port).to_socket_addrs()?.collect();
    if found.is_empty() {
        return Err(io::Error::other("the name has no address"));
    }
    Ok(found)
}

fn new_socket(family: AddressFamily) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socket(family, SockType::Stream, flags, None)
}

fn begin(fd: &OwnedFd, address: &dyn SockaddrLike) -> nix::Result<()> {
    match connect(fd.as_raw_fd(), address) {
        Err(Errno::EINPROGRESS | Errno::EINTR) | Ok(()) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Wakes whoever waits for a link, from another thread.
#[derive(Debug)]
pub(crate) struct Wake {
    fd: EventFd,
    /// Set before the descriptor is written, so that the owner asks the kernel
    /// only when there is something.
    flag: AtomicBool,
}

impl Wake {
    pub(crate) fn notify(&self) {
        if !self.flag.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is at its limit, and then it is readable.
            let _ = self.fd.write(1);
        }
    }

    /// Whether there was a notification since the last call. What the notifier
    /// changed before is visible afterwards.
    pub(crate) fn take(&self) -> bool {
        if !self.flag.load(Ordering::Acquire) {
            return false;
        }
        // First the descriptor, then the flag: a notifier in between finds the
        // flag set and writes nothing, and its change is seen by our caller.
        let _ = self.fd.read();
        self.flag.swap(false, Ordering::AcqRel)
    }
}

const SOCKET: EpollEvent = EpollEvent::new(EpollFlags::EPOLLIN, 0);
const SOCKET_OUT: EpollEvent = EpollEvent::new(EpollFlags::EPOLLIN.union(EpollFlags::EPOLLOUT), 0);

struct Socket {
    fd: OwnedFd,
    /// The epoll instance also waits for room to send.
    wants_out: bool,
}

/// See the module's documentation.
pub(crate) struct Link {
    session: Session,
    endpoint: Arc<Endpoint>,
    attempt: usize,
    socket: Option<Socket>,
    epoll: Epoll,
    timer: TimerFd,
    /// When the timer fires; it may be earlier than anything needs.
    armed: Option<Instant>,
    wake: Arc<Wake>,
    iov: Vec<libc::iovec>,
    buffer: Box<[u8]>,
}

// SAFETY: `iov` is scratch that is filled and used within one call; the pointers
// left in it are never followed.
unsafe impl Send for Link {}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("session", &self.session).finish_non_exhaustive()
    }
}

impl Link {
    /// A link for `session`; `batch` is false for one that carries no I/O.
    pub(crate) fn new(session: Session, endpoint: Arc<Endpoint>, batch: bool) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        epoll.add(&timer, SOCKET)?;
        epoll.add(&fd, SOCKET)?;
        let bytes = if batch { BATCH_BYTES } else { TAIL_BYTES };
        Ok(Self {
            session,
            endpoint,
            attempt: 0,
            socket: None,
            epoll,
            timer,
            armed: None,
            wake: Arc::new(Wake { fd, flag: AtomicBool::new(false) }),
            iov: Vec::with_capacity(IOV_MAX),
            buffer: vec![0; bytes].into_boxed_slice(),
        })
    }

    pub(crate) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    pub(crate) fn wake(&self) -> &Arc<Wake> {
        &self.wake
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.session.in_flight()
    }

    /// Sends, for a caller that knows of nothing that could have arrived.
    pub(crate) fn send(&mut self, completions: &mut Vec<Completion>) {
        let now = Instant::now();
        if self.session.is_ready() {
            if let Some(error) = self.send_queued(now) {
                // The server's last words may explain it.
                self.receive(now);
                self.fail(now, Some(error));
                return self.poll(completions);
            }
            self.arm(now);
        }
        // Not connected: that is under way, and its end wakes the caller.
        self.session.take_completions(completions);
    }

    /// Does what is due: timer, connection, sending, receiving.
    pub(crate) fn poll(&mut self, completions: &mut Vec<Completion>) {
        let now = Instant::now();
        if self.armed.is_some_and(|armed| armed <= now) {
            // Clears the descriptor; an early read leaves it for the next call.
            if read_timer(&self.timer) {
                self.armed = None;
            }
            self.session.on_timer(now);
        }
        // A connection that breaks is replaced at once when the session says
        // so; the session's pauses end this loop.
        loop {
            self.match_socket(now);
            self.finish_connect(now);
            if !self.session.is_open() {
                if !self.session.wants_connect(now) {
                    break;
                }
                continue;
            }
            let before = self.session.state();
            self.exchange(now);
            if self.session.state() == before {
                break;
            }
        }
        self.arm(now);
        self.session.take_completions(completions);
    }

    /// Makes the socket be there exactly when the session wants one.
    fn match_socket(&mut self, now: Instant) {
        if !self.session.has_socket() {
            // Closing takes it out of the epoll instance.
            self.socket = None;
        }
        if self.session.wants_connect(now) {
            self.session.connecting(now);
            self.attempt = self.attempt.wrapping_add(1);
            let opened = self.endpoint.connect(self.attempt - 1).and_then(|fd| {
                self.epoll.add(&fd, SOCKET_OUT)?;
                Ok(fd)
            });
            match opened {
                Ok(fd) => self.socket = Some(Socket { fd, wants_out: true }),
                Err(error) => self.session.dropped(now, DropReason::Connect(error.into())),
            }
        }
    }

    fn finish_connect(&mut self, now: Instant) {
        let (State::Connecting { .. }, Some(socket)) = (self.session.state(), &self.socket) else {
            return;
        };
        let mut fds = [PollFd::new(socket.fd.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let error = nix::sys::socket::getsockopt(&socket.fd, sockopt::SocketError);
        let outcome = match error.map(Errno::from_raw) {
            Err(error) => Err(error),
            Ok(error) if error != Errno::UnknownErrno => Err(error),
            Ok(_) if is_to_itself(&socket.fd) => Err(Errno::ECONNREFUSED),
            Ok(_) => Ok(()),
        };
        match outcome {
            Ok(()) => self.session.connected(now),
            Err(error) => {
                self.session.dropped(now, DropReason::Connect(error.into()));
                self.socket = None;
            }
        }
    }

    /// Sends what is queued and takes in what arrived.
    fn exchange(&mut self, now: Instant) {
        let failed = self.send_queued(now);
        // A near server's WELCOME may be there already, and how long it took is of interest.
        let is_hello = matches!(self.session.state(), State::Hello { .. });
        self.receive(if is_hello { Instant::now() } else { now });
        // Answers made room in the window.
        if failed.is_none() && self.session.is_open() && self.session.has_unsent() {
            let failed = self.send_queued(now);
            self.fail(now, failed);
        }
        self.fail(now, failed);
    }

    /// What could still be received was; now the failed send counts.
    fn fail(&mut self, now: Instant, failed: Option<Errno>) {
        if let Some(error) = failed
            && self.session.is_open()
        {
            self.session.dropped(now, DropReason::Broken(error.into()));
        }
    }

    /// Sends what it can; returns why the connection is of no use any more.
    fn send_queued(&mut self, now: Instant) -> Option<Errno> {
        let socket = self.socket.as_mut()?;
        let mut blocked = false;
        loop {
            self.iov.clear();
            let bytes = self.session.gather(now, &mut self.iov, IOV_MAX);
            if bytes == 0 {
                break;
            }
            match sendmsg(&socket.fd, &mut self.iov) {
                Ok(n) => {
                    self.session.sent(now, n);
                    if n < bytes {
                        blocked = true;
                        break;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    blocked = true;
                    break;
                }
                Err(error) => return Some(error),
            }
        }
        if blocked {
            self.session.blocked();
        }
        if blocked != socket.wants_out {
            let mut event = if blocked { SOCKET_OUT } else { SOCKET };
            if let Err(error) = self.epoll.modify(&socket.fd, &mut event) {
                return Some(error);
            }
            socket.wants_out = blocked;
        }
        None
    }

    fn receive(&mut self, now: Instant) {
        while let (true, Some(socket)) = (self.session.is_open(), &self.socket) {
            self.iov.clear();
            let (direct, whole) = self.session.payload_target(&mut self.iov, IOV_MAX - 1);
            let room = match (whole, self.session.prefers_direct()) {
                (false, _) => 0,
                (true, true) => TAIL_BYTES,
                (true, false) => self.buffer.len(),
            };
            if room > 0 {
                let iov_base = self.buffer.as_mut_ptr().cast();
                self.iov.push(libc::iovec { iov_base, iov_len: room });
            }
            match recvmsg(&socket.fd, &mut self.iov) {
                Ok(0) => return self.session.dropped(now, DropReason::Closed),
                Ok(n) => {
                    let to_guest = n.min(direct);
                    if to_guest > 0 {
                        self.session.payload_received(now, to_guest);
                    }
                    self.session.ingest(now, &self.buffer[..n - to_guest]);
                    // A short read emptied the socket; what comes later wakes us.
                    if n < direct + room {
                        return;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => return self.session.dropped(now, DropReason::Broken(error.into())),
            }
        }
    }

    /// Sets the timer when something is due before it fires. It is never set to
    /// a later time: that would cost a system call per request to save one
    /// wake-up per period.
    fn arm(&mut self, now: Instant) {
        let Some(deadline) = self.session.deadline() else {
            let is_final = matches!(self.session.state(), State::Fenced | State::Lost);
            // Nothing will ever be due again. Unsetting also forgets a timer
            // that has fired.
            if is_final && self.armed.take().is_some() {
                let _ = self.timer.unset();
            }
            return;
        };
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        let wait = deadline.saturating_duration_since(now).max(Duration::from_micros(1));
        let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
        match self.timer.set(expiration, TimerSetTimeFlags::empty()) {
            Ok(()) => self.armed = Some(deadline.max(now)),
            Err(error) => tracing::error!(%error, "cannot set a timer"),
        }
    }
}

fn read_timer(timer: &TimerFd) -> bool {
    let mut count = [0u8; 8];
    nix::unistd::read(timer, &mut count).is_ok()
}

/// A connection to a free port of this host may meet itself (RFC 9293 3.5,
/// simultaneous open), and then keep the server from binding the port.
fn is_to_itself(fd: &OwnedFd) -> bool {
    let ends = (
        getsockname::<SockaddrStorage>(fd.as_raw_fd()),
        getpeername::<SockaddrStorage>(fd.as_raw_fd()),
    );
    matches!(ends, (Ok(a), Ok(b)) if a == b && a.as_unix_addr().is_none())
}

fn message(iov: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a valid, empty message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len();
    message
}

fn sendmsg(fd: &OwnedFd, iov: &mut [libc::iovec]) -> nix::Result<usize> {
    let flags = (MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).bits();
    let message = message(iov);
    // SAFETY: the header names `iov` and nothing else; the memory behind it is
    // the session's own or vouched for by the submitter, and the kernel checks it.
    Errno::result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
        .map(|n| usize::try_from(n).expect("not negative"))
}

fn recvmsg(fd: &OwnedFd, iov: &mut [libc::iovec]) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT.bits();
    // SAFETY: as in `sendmsg`; each buffer may be written for its whole length.
    let n = unsafe {
        if let [one] = iov {
            libc::recv(fd.as_raw_fd(), one.iov_base, one.iov_len, flags)
        } else {
            let mut message = message(iov);
            libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags)
        }
    };
    Errno::result(n).map(|n| usize::try_from(n).expect("not negative"))
}
