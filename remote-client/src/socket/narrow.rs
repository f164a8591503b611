//! For tests: sockets that take as little at a time, and in all, as the test says.
//! The kernel takes short of what it is offered only where it likes; a test has to
//! meet every byte. Holds for the thread that says so.

use std::cell::Cell;

use nix::errno::Errno;

thread_local! {
    /// Bytes that one call takes at most.
    static STEP: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Bytes that are taken before there is no room any more.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    /// The last call took less than it was offered: the next finds no room.
    static FULL: Cell<bool> = const { Cell::new(false) };
}

pub(crate) fn set(step: usize, left: usize) {
    STEP.set(step);
    LEFT.set(left);
    FULL.set(false);
}

/// What of `iov` there is room for.
pub(super) fn cut(iov: &mut [libc::iovec]) -> nix::Result<&mut [libc::iovec]> {
    let mut room = STEP.get().min(LEFT.get());
    if FULL.take() || room == 0 {
        return Err(Errno::EAGAIN);
    }
    FULL.set(iov.iter().map(|part| part.iov_len).sum::<usize>() > room);
    let mut parts = 0;
    for part in iov.iter_mut() {
        if room == 0 {
            break;
        }
        part.iov_len = part.iov_len.min(room);
        room -= part.iov_len;
        parts += 1;
    }
    Ok(&mut iov[..parts])
}

pub(super) fn count(sent: &nix::Result<usize>) {
    LEFT.set(LEFT.get() - sent.unwrap_or(0));
}
