//! Makes the digests of pieces on threads of its own, while the pieces are on their way.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::{io, thread};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::piece::{Digest, digest};

/// SHA-256 is the slowest part of a copy in memory: one thread makes some 2 GB/s.
const THREADS: usize = 2;

/// The bytes of a piece, and the slot that they are in.
struct Work {
    slot: usize,
    bytes: *const [u8],
}

// SAFETY: who asks for a digest vouches that the bytes stay, wherever they are read.
unsafe impl Send for Work {}

/// See the module's documentation. Dropped, it waits for the digests under way.
#[derive(Debug)]
pub(super) struct Digests {
    /// `None` only while it is dropped.
    ask: Option<Sender<Work>>,
    made: Receiver<(usize, Digest)>,
    wake: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Digests {
    pub(super) fn new() -> io::Result<Self> {
        let (ask, asked) = channel();
        let (tell, made) = channel();
        let asked = Arc::new(Mutex::new(asked));
        let wake = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(wake)?);
        let mut digests = Self { ask: Some(ask), made, wake, threads: Vec::new() };
        for _ in 0..THREADS {
            let (asked, tell, wake) = (Arc::clone(&asked), tell.clone(), Arc::clone(&digests.wake));
            let work = move || work(&asked, &tell, &wake);
            let thread = thread::Builder::new().name("digest".to_owned()).spawn(work)?;
            digests.threads.push(thread);
        }
        Ok(digests)
    }

    /// Begins with the digest of what is in a slot.
    ///
    /// # Safety
    /// `bytes` must stay valid and unchanged until the slot's digest was taken, or this was dropped.
    pub(super) unsafe fn ask(&self, slot: usize, bytes: &[u8]) {
        let work = Work { slot, bytes };
        // The threads end only when this is dropped.
        let _ = self.ask.as_ref().map(|ask| ask.send(work));
    }

    /// One that was made, and of which slot.
    pub(super) fn take(&self) -> Option<(usize, Digest)> {
        let made = self.made.try_recv().ok();
        if made.is_none() {
            // Those who come later wake again; whoever came between is found now.
            let _ = self.wake.read();
            return self.made.try_recv().ok();
        }
        made
    }

    /// Readable when there may be one to take.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Drop for Digests {
    fn drop(&mut self) {
        self.ask = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(asked: &Mutex<Receiver<Work>>, tell: &Sender<(usize, Digest)>, wake: &EventFd) {
    loop {
        // Held while waiting: the others wait for this lock instead.
        let next = asked.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { slot, bytes }) = next else { return };
        // SAFETY: vouched for by who asked.
        let digest = digest(unsafe { &*bytes });
        if tell.send((slot, digest)).is_err() || wake.write(1).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn each_slot_has_the_digest_of_its_bytes() {
        let pieces: Vec<Vec<u8>> = (0..50).map(|n: u8| vec![n; 10_000 + usize::from(n)]).collect();
        let digests = Digests::new().expect("threads");
        for (slot, piece) in pieces.iter().enumerate() {
            // SAFETY: the pieces outlive the digests.
            unsafe { digests.ask(slot, piece) };
        }
        let mut left = pieces.len();
        while left > 0 {
            let mut fds = [PollFd::new(digests.wake_fd(), PollFlags::POLLIN)];
            let woken = poll(&mut fds, PollTimeout::from(10_000_u16)).expect("poll");
            assert_eq!(woken, 1, "{left} are missing, and nobody wakes");
            while let Some((slot, made)) = digests.take() {
                assert_eq!(made, digest(&pieces[slot]), "slot {slot}");
                left -= 1;
            }
        }
        assert_eq!(digests.take(), None);
    }

    #[test]
    fn what_was_asked_for_is_waited_for() {
        let piece = vec![7; 1 << 20];
        let digests = Digests::new().expect("threads");
        for slot in 0..20 {
            // SAFETY: the piece outlives the digests.
            unsafe { digests.ask(slot, &piece) };
        }
        let of_threads = Arc::clone(&digests.wake);
        drop(digests);
        assert_eq!(Arc::strong_count(&of_threads), 1, "a thread may still read the piece");
    }
}
