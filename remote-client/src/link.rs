//! What gives a conversation with a server a socket, a clock and one descriptor to
//! wait on: for Baton's own protocol and for NBD.
//!
//! The descriptor is an epoll instance that holds the socket of the moment, a
//! timer and a notification, so it stays the same over reconnects. Whoever has an
//! epoll instance anyway lets the three be watched in that one. It is never
//! asked which of the three it was: `poll` tries what may be due, which in
//! steady state is one `sendmsg` and one `recv` per batch and nothing else.
//! Decides nothing; the conversation does.
//!
//! Which conversation it is, and whether anything can be between it and the socket,
//! is known when this is compiled: Baton's link has no trace of a [`Seal`].

mod seal;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::file::IOV_MAX;
use crate::socket::{Endpoint, Timer, Wake, connect_outcome, recvmsg, sendmsg};
use crate::volume::Completion;
pub(crate) use seal::Seal;

/// One receive takes a batch of small answers: 62 READs of 4 KiB. Only what was
/// used of it is resident.
const BATCH_BYTES: usize = 256 << 10;

/// While a large payload is on its way little is read into the buffer, so that
/// most of the payload goes straight to guest memory: a header, and answers
/// that came between.
const TAIL_BYTES: usize = 4 << 10;

const IN: EpollFlags = EpollFlags::EPOLLIN;
const IN_OUT: EpollFlags = IN.union(EpollFlags::EPOLLOUT);

/// Longest farewell, bytes.
pub(crate) const GOODBYE_BYTES_MAX: usize = 32;

/// How a connection, or the attempt at one, ended.
#[derive(Debug)]
pub(crate) enum End {
    Connect(io::Error),
    Closed,
    Broken(io::Error),
}

/// A conversation over any number of connections, sans-IO: what a link drives.
pub(crate) trait Conversation: std::fmt::Debug {
    /// What may be between it and the socket.
    type Seal: Seal;
    type State: PartialEq;

    fn state(&self) -> Self::State;
    fn is_connecting(&self) -> bool;
    /// Requests can be exchanged.
    fn is_ready(&self) -> bool;
    /// Bytes can be exchanged.
    fn is_open(&self) -> bool;
    fn has_socket(&self) -> bool;
    /// It will never have a socket again.
    fn is_over(&self) -> bool;
    fn in_flight(&self) -> usize;
    fn take_completions(&mut self, completions: &mut Vec<Completion>);

    fn wants_connect(&self, now: Instant) -> bool;
    fn connecting(&mut self, now: Instant);
    fn connected(&mut self, now: Instant);
    fn ended(&mut self, now: Instant, end: End);

    fn deadline(&self) -> Option<Instant>;
    fn on_timer(&mut self, now: Instant);

    fn has_unsent(&self) -> bool;
    /// Appends what is to be sent to `iov`, up to `max` entries; how many bytes.
    fn gather(&mut self, now: Instant, iov: &mut Vec<libc::iovec>, max: usize) -> usize;
    fn sent(&mut self, now: Instant, n: usize);
    /// The socket takes no more for now.
    fn blocked(&mut self);

    /// Appends where the next bytes belong; how many, and whether that is all of them.
    fn payload_target(&self, iov: &mut Vec<libc::iovec>, max: usize) -> (usize, bool);
    fn payload_received(&mut self, now: Instant, n: usize);
    fn prefers_direct(&self) -> bool;
    fn ingest(&mut self, now: Instant, bytes: &[u8]);
    /// When the next bytes arrive is of interest.
    fn times_answers(&self) -> bool {
        false
    }

    /// From here on everything is sealed; said once.
    fn take_seal(&mut self) -> bool {
        false
    }
    /// The seal is there.
    fn sealed(&mut self) {}
    /// There is no seal, and nothing more to say.
    fn unsealed(&mut self, now: Instant, why: <Self::Seal as Seal>::Error);

    /// What ends the connection politely, and how many bytes of it count.
    fn goodbye(&self) -> Option<([u8; GOODBYE_BYTES_MAX], usize)> {
        None
    }
}

struct Socket<S> {
    fd: OwnedFd,
    /// The epoll instance also waits for room to send.
    wants_out: bool,
    seal: Option<S>,
}

/// Where the descriptors of a link are watched.
struct Watch {
    epoll: Epoll,
    /// What the events carry.
    data: u64,
}

impl Watch {
    fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, data: 0 })
    }

    fn event(&self, flags: EpollFlags) -> EpollEvent {
        EpollEvent::new(flags, self.data)
    }

    fn add(&self, fd: impl AsFd, flags: EpollFlags) -> nix::Result<()> {
        self.epoll.add(fd, self.event(flags))
    }

    fn modify(&self, fd: impl AsFd, flags: EpollFlags) -> nix::Result<()> {
        self.epoll.modify(fd, &mut self.event(flags))
    }
}

/// See the module's documentation.
pub(crate) struct Link<C: Conversation> {
    session: C,
    endpoint: Arc<Endpoint>,
    settings: Option<Arc<<C::Seal as Seal>::Settings>>,
    attempt: usize,
    socket: Option<Socket<C::Seal>>,
    watch: Watch,
    timer: Timer,
    wake: Arc<Wake>,
    iov: Vec<libc::iovec>,
    buffer: Box<[u8]>,
}

// SAFETY: `iov` is scratch that is filled and used within one call; the pointers
// left in it are never followed. The rest can be sent.
unsafe impl<C: Conversation + Send> Send for Link<C> where C::Seal: Send {}

impl<C: Conversation> std::fmt::Debug for Link<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("session", &self.session).finish_non_exhaustive()
    }
}

impl<C: Conversation> Link<C> {
    /// A link for `session`; `batch` is false for one that carries no I/O.
    pub(crate) fn new(session: C, endpoint: Arc<Endpoint>, batch: bool) -> io::Result<Self> {
        let watch = Watch::new()?;
        let (timer, wake) = (Timer::new()?, Arc::new(Wake::new()?));
        watch.add(timer.as_fd(), IN)?;
        watch.add(wake.as_fd(), IN)?;
        let bytes = if batch { BATCH_BYTES } else { TAIL_BYTES };
        Ok(Self {
            session,
            endpoint,
            settings: None,
            attempt: 0,
            socket: None,
            watch,
            timer,
            wake,
            iov: Vec::with_capacity(IOV_MAX),
            buffer: vec![0; bytes].into_boxed_slice(),
        })
    }

    /// With what is sealed, if the session asks for it.
    pub(crate) fn with(mut self, settings: Option<Arc<<C::Seal as Seal>::Settings>>) -> Self {
        self.settings = settings;
        self
    }

    pub(crate) fn settings(&self) -> Option<&Arc<<C::Seal as Seal>::Settings>> {
        self.settings.as_ref()
    }

    pub(crate) fn session(&mut self) -> &mut C {
        &mut self.session
    }

    pub(crate) fn session_ref(&self) -> &C {
        &self.session
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    pub(crate) fn wake(&self) -> &Arc<Wake> {
        &self.wake
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.watch.epoll.0.as_fd()
    }

    /// Has everything watched in this epoll instance, with these data in its events, instead of in one of its own that
    /// would be watched there: the kernel looks into each on every wake-up.
    pub(crate) fn watch_in(&mut self, epoll: &Epoll, data: u64) -> io::Result<()> {
        self.watch_through(Watch { epoll: Epoll(epoll.0.try_clone()?), data })
    }

    /// Undoes [`Self::watch_in`].
    pub(crate) fn watch_alone(&mut self) -> io::Result<()> {
        self.watch_through(Watch::new()?)
    }

    fn watch_through(&mut self, watch: Watch) -> io::Result<()> {
        if let Err(error) = self.enter(&watch) {
            self.leave(&watch);
            return Err(error.into());
        }
        let before = std::mem::replace(&mut self.watch, watch);
        self.leave(&before);
        Ok(())
    }

    fn enter(&self, watch: &Watch) -> nix::Result<()> {
        watch.add(self.timer.as_fd(), IN)?;
        watch.add(self.wake.as_fd(), IN)?;
        let Some(socket) = &self.socket else { return Ok(()) };
        watch.add(&socket.fd, if socket.wants_out { IN_OUT } else { IN })
    }

    /// Takes everything out of an epoll instance that may be another's.
    fn leave(&self, watch: &Watch) {
        let fds = [self.timer.as_fd(), self.wake.as_fd()];
        for fd in fds.into_iter().chain(self.socket.as_ref().map(|socket| socket.fd.as_fd())) {
            let _ = watch.epoll.delete(fd);
        }
    }

    /// Closes the connection, if there is one, with a goodbye.
    pub(crate) fn disconnect(&mut self) {
        // Nobody looks at it until there is a connection again.
        self.timer.disarm();
        if self.session.has_socket() {
            self.say_goodbye();
            self.session.ended(Instant::now(), End::Closed);
            self.socket = None;
        }
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
        if self.timer.is_due(now) {
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
                self.watch.add(&fd, IN_OUT)?;
                Ok(fd)
            });
            match opened {
                Ok(fd) => self.socket = Some(Socket { fd, wants_out: true, seal: None }),
                Err(error) => self.session.ended(now, End::Connect(error.into())),
            }
        }
    }

    fn finish_connect(&mut self, now: Instant) {
        let (true, Some(socket)) = (self.session.is_connecting(), &self.socket) else { return };
        let Some(outcome) = connect_outcome(&socket.fd) else { return };
        match outcome {
            Ok(()) => self.session.connected(now),
            Err(error) => {
                self.session.ended(now, End::Connect(error.into()));
                self.socket = None;
            }
        }
    }

    /// Sends what is queued and takes in what arrived.
    fn exchange(&mut self, now: Instant) {
        let failed = self.send_queued(now);
        let times = self.session.times_answers();
        self.receive(if times { Instant::now() } else { now });
        // Answers made room, or are questions of the handshake.
        if failed.is_none()
            && self.session.is_open()
            && (self.session.has_unsent() || self.has_sealed())
        {
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
            self.session.ended(now, End::Broken(error.into()));
        }
    }

    /// Sends what it can; returns why the connection is of no use any more.
    fn send_queued(&mut self, now: Instant) -> Option<Errno> {
        let socket = self.socket.as_mut()?;
        if socket.seal.is_some() {
            return self.send_sealed(now);
        }
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
        self.want_room(blocked)
    }

    /// Waits for room to send, or does not any more.
    fn want_room(&mut self, blocked: bool) -> Option<Errno> {
        let socket = self.socket.as_mut()?;
        if blocked {
            self.session.blocked();
        }
        if blocked != socket.wants_out {
            let flags = if blocked { IN_OUT } else { IN };
            if let Err(error) = self.watch.modify(&socket.fd, flags) {
                return Some(error);
            }
            socket.wants_out = blocked;
        }
        None
    }

    fn receive(&mut self, now: Instant) {
        if self.socket.as_ref().is_some_and(|socket| socket.seal.is_some()) {
            return self.receive_sealed(now);
        }
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
                Ok(0) => return self.session.ended(now, End::Closed),
                Ok(n) => {
                    let to_guest = n.min(direct);
                    if to_guest > 0 {
                        self.session.payload_received(now, to_guest);
                    }
                    self.session.ingest(now, &self.buffer[..n - to_guest]);
                    if self.session.take_seal() {
                        return self.begin_seal(now);
                    }
                    // A short read emptied the socket; what comes later wakes us.
                    if n < direct + room {
                        return;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => return self.session.ended(now, End::Broken(error.into())),
            }
        }
    }

    fn arm(&mut self, now: Instant) {
        match self.session.deadline() {
            Some(deadline) => self.timer.arm(now, deadline),
            None if self.session.is_over() => self.timer.disarm(),
            None => {}
        }
    }
}

impl<C: Conversation> Link<C> {
    /// A courtesy: some servers complain of a client that just goes.
    fn say_goodbye(&mut self) {
        if let (Some((mut bytes, len)), Some(socket)) = (self.session.goodbye(), &mut self.socket) {
            let iov_base = bytes.as_mut_ptr().cast();
            let mut iov = [libc::iovec { iov_base, iov_len: len }];
            let Some(seal) = &mut socket.seal else {
                let _ = sendmsg(&socket.fd, &mut iov);
                return;
            };
            let _ = seal.seal(&iov, len);
            seal.close();
            let _ = seal.flush(&socket.fd);
        }
    }
}

impl<C: Conversation> Drop for Link<C> {
    fn drop(&mut self) {
        self.say_goodbye();
        // Who notifies keeps a descriptor open, and the epoll instance may be another's.
        self.leave(&self.watch);
    }
}
