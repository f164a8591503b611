//! What gives a [`Session`] a socket, a clock and one descriptor to wait on. As the
//! Baton driver's link it tries what may be due, and decides nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::session::{DropReason, Session, State};
use crate::file::IOV_MAX;
use crate::socket::{Endpoint, Timer, connect_outcome, recvmsg, sendmsg};
use crate::volume::Completion;

/// One receive takes a batch of small answers.
const BATCH_BYTES: usize = 256 << 10;
/// While a large payload is on its way little is read into the buffer, so that
/// most of the payload goes straight to guest memory.
const TAIL_BYTES: usize = 4 << 10;

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
    timer: Timer,
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
    pub(crate) fn new(session: Session, endpoint: Arc<Endpoint>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = Timer::new()?;
        epoll.add(timer.as_fd(), SOCKET)?;
        Ok(Self {
            session,
            endpoint,
            attempt: 0,
            socket: None,
            epoll,
            timer,
            iov: Vec::with_capacity(IOV_MAX),
            buffer: vec![0; BATCH_BYTES].into_boxed_slice(),
        })
    }

    pub(crate) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Connected, and nothing is under way.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.session.is_at_rest()
    }

    /// Requests may reach so far.
    pub(crate) fn has_size(&self, size_bytes: u64) -> bool {
        self.session.has_size(size_bytes)
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// [`Self::wake_fd`] is readable whenever this one is.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.epoll.add(fd, SOCKET)?)
    }

    /// Closes the connection, if there is one, with a goodbye.
    pub(crate) fn disconnect(&mut self) {
        // Nobody looks at it until there is a connection again.
        self.timer.disarm();
        if self.session.has_socket() {
            self.say_goodbye();
            self.session.dropped(Instant::now(), DropReason::Closed);
            self.socket = None;
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.session.in_flight()
    }

    /// Sends, for a caller that knows of nothing that could have arrived.
    pub(crate) fn send(&mut self, completions: &mut Vec<Completion>) {
        if self.session.is_ready()
            && let Some(error) = self.send_queued()
        {
            let now = Instant::now();
            // The server's last words may explain it.
            self.receive(now);
            self.fail(now, Some(error));
            return self.poll(completions);
        }
        self.session.take_completions(completions);
    }

    /// Does what is due: timer, connection, sending, receiving.
    pub(crate) fn poll(&mut self, completions: &mut Vec<Completion>) {
        let now = Instant::now();
        if self.timer.is_due(now) {
            self.session.on_timer(now);
        }
        // The session's pauses end this loop.
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
        match self.session.deadline() {
            Some(deadline) => self.timer.arm(now, deadline),
            None if self.session.state() == State::Lost => self.timer.disarm(),
            None => {}
        }
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
        match connect_outcome(&socket.fd) {
            None => {}
            Some(Ok(())) => self.session.connected(now),
            Some(Err(error)) => {
                self.session.dropped(now, DropReason::Connect(error.into()));
                self.socket = None;
            }
        }
    }

    /// Sends what is queued and takes in what arrived.
    fn exchange(&mut self, now: Instant) {
        let failed = self.send_queued();
        self.receive(now);
        // Answers made room, or are questions of the handshake.
        if failed.is_none() && self.session.is_open() && self.session.has_unsent() {
            let failed = self.send_queued();
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
    fn send_queued(&mut self) -> Option<Errno> {
        let socket = self.socket.as_mut()?;
        let mut blocked = false;
        loop {
            self.iov.clear();
            let bytes = self.session.gather(&mut self.iov, IOV_MAX);
            if bytes == 0 {
                break;
            }
            match sendmsg(&socket.fd, &mut self.iov) {
                Ok(n) => {
                    self.session.sent(n);
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
                    if to_guest > 0
                        && let Err(reason) = self.session.payload_received(to_guest)
                    {
                        return self.session.dropped(now, reason);
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
}

impl Link {
    /// A courtesy: some servers complain of a client that just goes.
    fn say_goodbye(&mut self) {
        if let (Some((mut bytes, len)), Some(socket)) = (self.session.goodbye(), &self.socket) {
            let iov_base = bytes.as_mut_ptr().cast();
            let _ = sendmsg(&socket.fd, &mut [libc::iovec { iov_base, iov_len: len }]);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.say_goodbye();
    }
}
