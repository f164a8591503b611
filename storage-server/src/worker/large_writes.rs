//! Large writes of one connection: past our memory, from the socket to the file.
//!
//! `recv` copies a payload into a buffer and `pwrite` from there into the page cache. Through a pipe it is copied once:
//! splice(2) moves references to what the socket received. For that nothing of the payload may be in the buffer, or a
//! sector could be half written by each of the two ways; so after a large write no more is received than the header of
//! what follows.
//!
//! The payload waits in the pipe until all of it is there, as it does in the buffer: half a write of somebody who is gone
//! or fenced changes nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use baton_protocol::frame::{PAYLOAD_BYTES_MAX, REQUEST_HEADER_BYTES};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use nix::unistd::{pipe2, read};

/// Payloads from this size on. What the pipe gains was measured at 128 KiB; where it stops to pay was not.
const LARGE_BYTES: usize = 64 << 10;
/// What a pipe is asked to have room for. It has so many 4 KiB slots, and a piece of what a socket received takes one
/// whatever its size.
#[allow(clippy::cast_possible_wrap, reason = "1 MiB")]
const PIPE_BYTES: i32 = PAYLOAD_BYTES_MAX as i32;

/// Whether a pipe saves anything behind this socket. What a Unix socket received is copied into the pipe, too: 128 KiB
/// writes had 28 thousand IOPS that way and 34 through the buffer.
pub(super) fn gain(socket: &impl AsFd) -> bool {
    let name = getsockname::<SockaddrStorage>(socket.as_fd().as_raw_fd());
    name.is_ok_and(|name| name.family() != Some(AddressFamily::Unix))
}

/// How far the payload at the front has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// All of it is there.
    Whole,
    /// So many bytes, maybe none; the socket has no more.
    Part(usize),
    /// The peer has closed.
    End,
    /// Goes another way: what came so far is to be taken out.
    Unfit,
}

#[derive(Debug, Default)]
pub(super) struct LargeWrites {
    /// Such as the last request was.
    expected: bool,
    /// This connection's do not fit.
    unfit: bool,
    pipe: Option<Pipe>,
}

#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    /// Bytes in it.
    held: usize,
}

impl LargeWrites {
    /// For a connection whose large writes take the usual way.
    pub(super) fn unused() -> Self {
        Self { unfit: true, ..Self::default() }
    }

    /// A request came, of so many bytes with its header and its payload: what follows is likely to be of its kind.
    pub(super) fn expect_another(&mut self, bytes: usize) {
        self.expected = self.take(bytes);
    }

    /// Whether nothing is to be received behind the request at the front.
    pub(super) fn are_expected(&self) -> bool {
        self.expected
    }

    /// Whether the payload of a request goes this way, of so many bytes with its header. No other requests have large
    /// ones.
    pub(super) fn take(&self, bytes: usize) -> bool {
        !self.unfit && bytes >= REQUEST_HEADER_BYTES + LARGE_BYTES
    }

    /// Bytes of the request at the front that are not in the buffer.
    pub(super) fn held(&self) -> usize {
        self.pipe.as_ref().map_or(0, |pipe| pipe.held)
    }

    /// Takes up to `missing` bytes that the socket has. It must be one that does not wait.
    pub(super) fn fill(&mut self, socket: &impl AsFd, missing: usize) -> nix::Result<Filled> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            None => match Pipe::new() {
                Ok(pipe) => self.pipe.insert(pipe),
                // No more files, most likely.
                Err(_) => return Ok(Filled::Unfit),
            },
        };
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(socket, None, &pipe.into, None, missing, flags) {
            Ok(0) => Ok(Filled::End),
            Ok(n) => {
                pipe.held += n;
                Ok(if n == missing { Filled::Whole } else { Filled::Part(n) })
            }
            Err(Errno::EAGAIN) if pipe.is_full()? => Ok(Filled::Unfit),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Filled::Part(0)),
            Err(Errno::EINVAL) => Ok(Filled::Unfit),
            Err(error) => Err(error),
        }
    }

    /// Moves the next `len` bytes of the payload to a place in a file.
    pub(super) fn pour(&mut self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        let mut offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
        let mut left = len;
        while left > 0 {
            match splice(&pipe.out, None, file, Some(&mut offset), left, SpliceFFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    left -= n;
                    pipe.held -= n;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The request at the front is done, with its payload or without.
    pub(super) fn end(&mut self) {
        if self.held() > 0 {
            self.pipe = None;
        }
    }

    /// Takes out what is held, into `room`, which is large enough. From now on this connection's go another way.
    pub(super) fn give_up(&mut self, room: &mut [u8]) -> nix::Result<usize> {
        (self.unfit, self.expected) = (true, false);
        let Some(pipe) = self.pipe.take() else { return Ok(0) };
        let mut done = 0;
        while done < pipe.held {
            match read(&pipe.out, &mut room[done..pipe.held]) {
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    pub(super) fn has_pipe(&self) -> bool {
        self.pipe.is_some()
    }

    /// Gives the pipe back if nothing is in it.
    pub(super) fn shrink(&mut self) {
        if self.held() == 0 {
            self.pipe = None;
        }
    }
}

impl Pipe {
    fn new() -> nix::Result<Self> {
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // A user may have only so much in pipes. With a small one more of them turn out unfit.
        let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        Ok(Self { out, into, held: 0 })
    }

    fn is_full(&self) -> nix::Result<bool> {
        let mut ask = [PollFd::new(self.into.as_fd(), PollFlags::POLLOUT)];
        Ok(poll(&mut ask, PollTimeout::ZERO)? == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::net::UnixStream;

    const REQUEST: usize = REQUEST_HEADER_BYTES + LARGE_BYTES;

    fn pair() -> (UnixStream, UnixStream) {
        let (here, there) = UnixStream::pair().expect("a pair");
        there.set_nonblocking(true).expect("an option");
        (here, there)
    }

    #[test]
    fn what_was_filled_in_is_poured_out() {
        let (mut here, there) = pair();
        let mut large = LargeWrites::default();
        assert!(large.take(REQUEST) && !large.take(REQUEST - 1));
        assert_eq!(large.fill(&there, LARGE_BYTES), Ok(Filled::Part(0)));
        let data: Vec<u8> = (0..LARGE_BYTES).map(|n| (n / 512).to_le_bytes()[0]).collect();
        here.write_all(&data[..1000]).expect("sent");
        assert_eq!(large.fill(&there, LARGE_BYTES), Ok(Filled::Part(1000)));
        here.write_all(&data[1000..]).expect("sent");
        // What belongs to the next request stays in the socket.
        here.write_all(b"next").expect("sent");
        let mut filled = Ok(Filled::Part(0));
        while let Ok(Filled::Part(_)) = filled {
            filled = large.fill(&there, LARGE_BYTES - large.held());
        }
        assert_eq!((filled, large.held()), (Ok(Filled::Whole), LARGE_BYTES));
        let file = tempfile::tempfile().expect("a file");
        large.pour(&file, 4096, 1024).expect("poured");
        large.pour(&file, 9000, LARGE_BYTES - 1024).expect("poured");
        assert!(large.pour(&file, 0, 1).is_err(), "no more is there");
        let mut seen = vec![0; LARGE_BYTES];
        file.read_exact_at(&mut seen[..1024], 4096).expect("there");
        file.read_exact_at(&mut seen[1024..], 9000).expect("there");
        assert!(seen == data);
        drop(here);
        assert_eq!(large.fill(&there, 4), Ok(Filled::Whole));
        assert_eq!(large.fill(&there, 4), Ok(Filled::End));
    }

    /// Each piece takes one place in the pipe, however small it is.
    #[test]
    fn what_does_not_fit_comes_out_again_and_nothing_else_goes_in() {
        let (mut here, there) = pair();
        let mut large = LargeWrites::default();
        large.expect_another(REQUEST);
        assert!(large.are_expected());
        let mut sent = Vec::new();
        let last = loop {
            let piece = [sent.len().to_le_bytes()[0]; 7];
            here.write_all(&piece).expect("sent");
            match large.fill(&there, LARGE_BYTES - large.held()) {
                Ok(Filled::Part(7)) => sent.extend(piece),
                other => break other,
            }
        };
        assert_eq!(last, Ok(Filled::Unfit));
        assert!(sent.len() < LARGE_BYTES && large.held() == sent.len());
        let mut room = vec![0; LARGE_BYTES];
        let n = large.give_up(&mut room).expect("taken out");
        assert!(room[..n] == sent);
        assert_eq!((large.held(), large.has_pipe()), (0, false));
        large.expect_another(REQUEST);
        assert!(!large.are_expected() && !large.take(REQUEST));
    }

    #[test]
    fn nothing_of_an_abandoned_one_is_left() {
        let (mut here, there) = pair();
        let mut large = LargeWrites::default();
        here.write_all(&[1; 100]).expect("sent");
        assert_eq!(large.fill(&there, LARGE_BYTES), Ok(Filled::Part(100)));
        large.shrink();
        assert_eq!(large.held(), 100, "in use");
        large.end();
        assert_eq!(large.held(), 0);
        here.write_all(&[2; 50]).expect("sent");
        assert_eq!(large.fill(&there, 50), Ok(Filled::Whole));
        let file = tempfile::tempfile().expect("a file");
        large.pour(&file, 0, 50).expect("poured");
        let mut seen = [0; 50];
        file.read_exact_at(&mut seen, 0).expect("there");
        assert_eq!(seen, [2; 50]);
        large.end();
        assert!(large.has_pipe(), "kept for the next");
        large.shrink();
        assert!(!large.has_pipe());
    }
}
