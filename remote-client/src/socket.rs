//! What every driver with a socket needs of the system: where its server is, a
//! connection to it, a way to be woken from another thread, and a timer that is a
//! descriptor. Knows no protocol.

#[cfg(test)]
pub(crate) mod narrow;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect,
    getpeername, getsockname, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::uri::HostPort;

/// Room for requests on their way through a Unix socket, whose buffer does not
/// grow by itself; the kernel cuts it to its limit.
const UNIX_BUFFER_BYTES: usize = 4 << 20;

/// The kernel probes an idle connection after this, so that a dead server is
/// noticed without waking this process for a live one.
const KEEPALIVE_IDLE_S: u32 = 10;
const KEEPALIVE_INTERVAL_S: u32 = 3;
const KEEPALIVE_PROBES: u32 = 3;

/// Where a storage server is.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Tcp {
        server: HostPort,
        /// What the name resolved to last; never empty.
        addresses: Mutex<Vec<SocketAddr>>,
        /// Sent data that nobody acknowledges for this long ends the connection,
        /// milliseconds; zero: when the kernel has given up.
        user_timeout_ms: u32,
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
    pub(crate) fn resolve(server: &HostPort, user_timeout_ms: u32) -> io::Result<Self> {
        let addresses = Mutex::new(lookup(server)?);
        Ok(Self::Tcp { server: server.clone(), addresses, user_timeout_ms })
    }

    /// Whether there is a name to resolve.
    pub(crate) fn has_name(&self) -> bool {
        matches!(self, Self::Tcp { server, .. } if server.host.parse::<std::net::IpAddr>().is_err())
    }

    /// Resolves the name again, which may block. A name that does not resolve
    /// any more leaves the old addresses.
    pub(crate) fn refresh(&self) {
        if let Self::Tcp { server, addresses, .. } = self
            && self.has_name()
            && let Ok(found) = lookup(server)
        {
            *addresses.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
    }

    /// Begins connection number `attempt`.
    pub(crate) fn connect(&self, attempt: usize) -> nix::Result<OwnedFd> {
        match self {
            Self::Tcp { addresses, user_timeout_ms, .. } => {
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
                setsockopt(&fd, sockopt::TcpUserTimeout, user_timeout_ms)?;
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

/// Wakes whoever waits for a descriptor, from another thread.
#[derive(Debug)]
pub(crate) struct Wake {
    fd: EventFd,
    /// Set before the descriptor is written, so that the owner asks the kernel
    /// only when there is something.
    flag: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { fd, flag: AtomicBool::new(false) })
    }

    /// Readable after a notification that was not taken.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

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
        if self.fd.read().is_err() {
            // One that has set the flag is about to write. Without the flag nobody
            // would read that, and the descriptor would wake us for ever.
            return true;
        }
        self.flag.swap(false, Ordering::AcqRel)
    }
}

/// How an attempt to connect has ended, if it has.
pub(crate) fn connect_outcome(fd: &OwnedFd) -> Option<nix::Result<()>> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(0) | Err(_) => return None,
        Ok(_) => {}
    }
    let error = getsockopt(fd, sockopt::SocketError);
    Some(match error.map(Errno::from_raw) {
        Err(error) => Err(error),
        Ok(error) if error != Errno::UnknownErrno => Err(error),
        Ok(_) if is_to_itself(fd) => Err(Errno::ECONNREFUSED),
        Ok(_) => Ok(()),
    })
}

/// A timer that is a descriptor and costs no system call while it need not be
/// moved to an earlier time.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: TimerFd,
    /// When it fires; it may be earlier than anything needs.
    armed: Option<Instant>,
}

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self { fd: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, armed: None })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether it is going to fire, or has and nobody looked.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed.is_some()
    }

    /// Whether its time has come, in which case something may be due.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.armed.is_some_and(|armed| armed <= now);
        // Clears the descriptor; an early read leaves it for the next call.
        let mut count = [0u8; 8];
        if due && nix::unistd::read(&self.fd, &mut count).is_ok() {
            self.armed = None;
        }
        due
    }

    /// Sets the timer when something is due before it fires. It is never set to
    /// a later time: that would cost a system call per request to save one
    /// wake-up per period.
    pub(crate) fn arm(&mut self, now: Instant, deadline: Instant) {
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        let wait = deadline.saturating_duration_since(now).max(Duration::from_micros(1));
        let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
        match self.fd.set(expiration, TimerSetTimeFlags::empty()) {
            Ok(()) => self.armed = Some(deadline.max(now)),
            Err(error) => tracing::error!(%error, "cannot set a timer"),
        }
    }

    /// Nothing will be due any more. Unsetting also forgets a timer that has
    /// fired.
    pub(crate) fn disarm(&mut self) {
        if self.armed.take().is_some() {
            let _ = self.fd.unset();
        }
    }
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

pub(crate) fn sendmsg(fd: &OwnedFd, iov: &mut [libc::iovec]) -> nix::Result<usize> {
    #[cfg(test)]
    let iov = narrow::cut(iov)?;
    let flags = (MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).bits();
    // SAFETY: the call is given `iov` and nothing else; the memory behind it is
    // the session's own or vouched for by the submitter, and the kernel checks it.
    let n = unsafe {
        if let [one] = iov {
            libc::send(fd.as_raw_fd(), one.iov_base, one.iov_len, flags)
        } else {
            let message = message(iov);
            libc::sendmsg(fd.as_raw_fd(), &raw const message, flags)
        }
    };
    let sent = Errno::result(n).map(|n| usize::try_from(n).expect("not negative"));
    #[cfg(test)]
    narrow::count(&sent);
    sent
}

pub(crate) fn recvmsg(fd: &OwnedFd, iov: &mut [libc::iovec]) -> nix::Result<usize> {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn wakes(wake: &Wake) -> bool {
        let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll") > 0
    }

    #[test]
    fn what_is_taken_before_it_is_written_wakes_once_more_and_not_for_ever() {
        let wake = Wake::new().expect("eventfd");
        // As `notify` stands when its thread loses the processor in the middle.
        wake.flag.store(true, Ordering::Release);
        assert!(wake.take());
        wake.fd.write(1).expect("written");
        assert!(wakes(&wake) && wake.take());
        assert!(!wakes(&wake) && !wake.take());
        wake.notify();
        assert!(wakes(&wake) && wake.take() && !wakes(&wake));
    }

    #[test]
    fn no_notification_is_lost_and_none_stays() {
        const EACH: u64 = 20_000;
        let (wake, told) = (Wake::new().expect("eventfd"), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..EACH {
                        told.fetch_add(1, Ordering::Relaxed);
                        wake.notify();
                    }
                });
            }
            let mut seen = 0;
            while seen < 2 * EACH {
                let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
                assert!(poll(&mut fds, PollTimeout::from(10_000_u16)).expect("poll") > 0, "lost");
                if wake.take() {
                    seen = told.load(Ordering::Relaxed);
                }
            }
        });
        // The last notifier may have come behind what was seen.
        wake.take();
        assert!(!wakes(&wake), "nobody would take it");
    }
}
