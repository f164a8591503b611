//! What the library's threads and a queue's thread share: pieces come back
//! here, from whichever thread the library completes them on.
//!
//! ```text
//!   queue ---Flight::send---> librbd ---completed()---> Inbox ---take---> queue
//!     |                         ^            |            ^ eventfd wakes it
//!     |                         |            +--> Volume's end (fenced, lost)
//!     +--send_to--> object --not there            |
//!                      +------came_from_object()--+
//! ```
//!
//! A flight owns everything the library touches, so a queue may go while its
//! flights are out: guest memory is read only inside of `send` (the library
//! copies what is written) and written only by the queue's own thread.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::image::{Image, check};
use super::library::{Handle, Rbd, ZEROES_KEEP_SPACE};
use super::objects::{Objects, Place, Way};
use super::request::Piece;
use super::volume::Shared;
use crate::socket::Wake;
use crate::volume::{IoError, Op};

/// The most that may be out at the cluster for one volume, bytes: what a
/// process needs for it at most, twice over for what librbd copies. Below the
/// 100 MiB at which the library's own limit would hold everybody up.
pub(super) const OUT_BYTES_MAX: usize = 32 << 20;

/// What is out, bytes.
#[derive(Debug, Default)]
pub(super) struct Budget {
    out: AtomicUsize,
    /// Somebody found no room.
    wanted: AtomicBool,
}

impl Budget {
    /// Whether there is room; taken if so. If not, the caller hears when there may be.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let add = |out: usize| out.checked_add(bytes).filter(|sum| *sum <= OUT_BYTES_MAX);
        let take = || self.out.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).is_ok();
        if take() {
            return true;
        }
        self.wanted.store(true, Ordering::SeqCst);
        // It may have come back just before that was said.
        take()
    }

    /// True: somebody waits for it.
    fn give(&self, bytes: usize) -> bool {
        self.out.fetch_sub(bytes, Ordering::SeqCst);
        self.wanted.load(Ordering::SeqCst) && self.wanted.swap(false, Ordering::SeqCst)
    }
}

/// A piece on its way. Owned by the library between `send` and `completed`.
#[derive(Debug)]
pub(super) struct Flight {
    inbox: Arc<Inbox>,
    /// Of the request, in its queue.
    pub(super) slot: usize,
    pub(super) piece: Piece,
    /// READ: where the library puts it.
    pub(super) read: Vec<u8>,
    rbd: &'static Rbd,
    /// A READ that was sent to this object.
    direct: Option<(Arc<Way>, u64)>,
    /// As the library has it: bytes, or a negative error number.
    result: isize,
}

// SAFETY: the buffers of a WRITE are followed inside of `send` only.
unsafe impl Send for Flight {}

impl Flight {
    pub(super) fn new(inbox: &Arc<Inbox>, slot: usize, piece: Piece, image: &Image) -> Box<Self> {
        let read = match piece.op {
            Op::Read { .. } => vec![0; usize::try_from(piece.len).expect("a piece is small")],
            _ => Vec::new(),
        };
        let (inbox, rbd) = (Arc::clone(inbox), image.rbd());
        Box::new(Self { inbox, slot, piece, read, rbd, direct: None, result: 0 })
    }

    /// Gives it to librbd. An error: it is not on its way.
    ///
    /// # Safety
    /// Buffers of a WRITE are valid.
    pub(super) unsafe fn send(self: Box<Self>, image: &Image) -> io::Result<()> {
        self.inbox.volume.sent();
        // SAFETY: the caller's to vouch for.
        unsafe { self.give(image.handle()) }.map_err(Self::turned_back)
    }

    /// Asks an object for what a READ wants, and librbd if the object does not
    /// have it. An error: it is not on its way.
    pub(super) fn send_to(mut self: Box<Self>, objects: &Objects, place: Place) -> io::Result<()> {
        self.inbox.volume.sent();
        let way = objects.enter();
        let (rados, image) = (way.rados, way.image);
        self.direct = Some((way, place.object));
        let to = &raw mut *self.read;
        let flight = Box::into_raw(self);
        let mut completion = std::ptr::null_mut();
        // SAFETY: the library hands the address back to `came_from_object`, once.
        let made = check(unsafe {
            (rados.rados_aio_create_completion2)(
                flight.cast(),
                came_from_object,
                &raw mut completion,
            )
        });
        let sent = made.and_then(|()| {
            // SAFETY: the flight keeps its buffer where it is until it is back.
            let begun = unsafe { objects.read(place, to, completion) };
            check(begun).inspect_err(|_| {
                // SAFETY: a completion that nothing was begun with.
                unsafe { (rados.rados_aio_release)(completion) };
            })
        });
        if sent.is_ok() {
            return Ok(());
        }
        // SAFETY: the library does not have it.
        let mut flight = unsafe { Box::from_raw(flight) };
        let direct = flight.direct.take();
        // SAFETY: a READ has no buffers but its own.
        let sent = unsafe { flight.give(image) }.map_err(Self::turned_back);
        if let Some((way, _)) = direct {
            way.leave();
        }
        sent
    }

    /// It is not on its way after all.
    fn turned_back((flight, error): (Box<Self>, io::Error)) -> io::Error {
        flight.inbox.volume.came_back();
        flight.inbox.volume.give(flight.piece.cost());
        error
    }

    /// # Safety
    /// Buffers of a WRITE are valid; the image is open.
    unsafe fn give(self: Box<Self>, image: Handle) -> Result<(), (Box<Self>, io::Error)> {
        let rbd = self.rbd;
        let flight = Box::into_raw(self);
        let mut completion = std::ptr::null_mut();
        // SAFETY: the library hands the address back to `completed`, once.
        let made = check(unsafe {
            (rbd.rbd_aio_create_completion)(flight.cast(), completed, &raw mut completion)
        });
        let sent = made.and_then(|()| {
            // SAFETY: nobody else has the flight before it is sent.
            let begun = unsafe { begin(&mut *flight, image, completion) };
            check(begun).inspect_err(|_| {
                // SAFETY: a completion that nothing was begun with.
                unsafe { (rbd.rbd_aio_release)(completion) };
            })
        });
        // SAFETY: the library does not have it.
        sent.map_err(|error| (unsafe { Box::from_raw(flight) }, error))
    }

    /// What became of it.
    pub(super) fn outcome(&self) -> Result<(), IoError> {
        match self.result {
            bytes @ 0.. => match self.piece.op {
                // Cut short: the image became smaller.
                Op::Read { .. } if bytes.cast_unsigned() < self.read.len() => Err(IoError::Io),
                _ => Ok(()),
            },
            error => Err(io_error(&os_error(error))),
        }
    }
}

/// # Safety
/// Buffers of a WRITE are valid; everything else is the flight's own and stays
/// where it is until the completion.
unsafe fn begin(flight: &mut Flight, image: Handle, completion: Handle) -> libc::c_int {
    let (rbd, piece) = (flight.rbd, &flight.piece);
    let (buffers, read) = (&piece.buffers, &mut flight.read);
    let count = libc::c_int::try_from(buffers.len()).expect("bounded by IOV_MAX");
    // SAFETY: the caller's to vouch for. The library copies what is written
    // before it returns, since zero-copy writes are off (`opening::SETTINGS`).
    unsafe {
        match piece.op {
            Op::Read { offset } => {
                let to = read.as_mut_ptr().cast();
                (rbd.rbd_aio_read)(image, offset, read.len(), to, completion)
            }
            Op::Write { offset } => {
                (rbd.rbd_aio_writev)(image, buffers.as_ptr(), count, offset, completion)
            }
            Op::Flush => (rbd.rbd_aio_flush)(image, completion),
            Op::Discard { offset, len } => (rbd.rbd_aio_discard)(image, offset, len, completion),
            // Never a discard, which may leave old data where it is not aligned.
            Op::WriteZeroes { offset, len, unmap } => {
                let len = usize::try_from(len).expect("a piece is small");
                let flags = if unmap { 0 } else { ZEROES_KEEP_SPACE };
                (rbd.rbd_aio_write_zeroes)(image, offset, len, completion, flags, 0)
            }
        }
    }
}

/// Called by the library, from one of its threads, once per flight.
unsafe extern "C" fn completed(completion: Handle, flight: *mut c_void) {
    // SAFETY: what `send` gave away, given back.
    let mut flight = *unsafe { Box::from_raw(flight.cast::<Flight>()) };
    // SAFETY: the completion is ours to look at and to release.
    unsafe {
        flight.result = (flight.rbd.rbd_aio_get_return_value)(completion);
        (flight.rbd.rbd_aio_release)(completion);
    }
    let inbox = Arc::clone(&flight.inbox);
    inbox.put(flight);
}

/// Called by librados, from one of its threads, once per flight to an object.
unsafe extern "C" fn came_from_object(completion: Handle, flight: *mut c_void) {
    // SAFETY: what `send_to` gave away, given back.
    let mut flight = unsafe { Box::from_raw(flight.cast::<Flight>()) };
    let (way, object) = flight.direct.take().expect("it was sent to an object");
    // SAFETY: the completion is ours to look at and to release.
    let result = unsafe {
        let result = (way.rados.rados_aio_get_return_value)(completion);
        (way.rados.rados_aio_release)(completion);
        result
    };
    let answered = match way.outcome(object, result, flight.read.len()) {
        Some(result) => Some((flight, result)),
        // SAFETY: a READ has no buffers but its own, and the image is open as long as we are on the way.
        None => unsafe { flight.give(way.image) }.err().map(|(flight, error)| {
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            (flight, -isize::try_from(number).unwrap_or(libc::EIO as isize))
        }),
    };
    way.leave();
    if let Some((mut flight, result)) = answered {
        flight.result = result;
        let inbox = Arc::clone(&flight.inbox);
        inbox.put(*flight);
    }
}

fn os_error(result: isize) -> io::Error {
    io::Error::from_raw_os_error(libc::c_int::try_from(-result).unwrap_or(libc::EIO))
}

/// The one place where Ceph's error becomes a request's outcome.
pub(super) fn io_error(error: &io::Error) -> IoError {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => IoError::NoSpace,
        Some(libc::EINVAL) => IoError::OutOfRange,
        Some(libc::EROFS | libc::EPERM) => IoError::ReadOnly,
        Some(libc::EOPNOTSUPP) => IoError::Unsupported,
        _ => IoError::Io,
    }
}

/// Where a queue's flights come back.
#[derive(Debug)]
pub(super) struct Inbox {
    volume: Arc<Shared>,
    back: Mutex<Back>,
    wake: Wake,
}

#[derive(Debug, Default)]
struct Back {
    flights: Vec<Flight>,
    /// The queue is gone.
    closed: bool,
}

impl Inbox {
    pub(super) fn new(volume: &Arc<Shared>) -> io::Result<Self> {
        Ok(Self { volume: Arc::clone(volume), back: Mutex::default(), wake: Wake::new()? })
    }

    fn back(&self) -> MutexGuard<'_, Back> {
        // Nothing in a critical section can leave it half changed.
        self.back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn put(&self, flight: Flight) {
        // Before anybody can take the result for an answer.
        if flight.result < 0 {
            self.volume.judge(&os_error(flight.result));
        }
        let cost = flight.piece.cost();
        let mut back = self.back();
        if !back.closed {
            back.flights.push(flight);
        }
        drop(back);
        self.volume.came_back();
        self.volume.give(cost);
        // Last, and without the lock: whoever is woken on this CPU runs at once, and would wait for it.
        self.notify();
    }

    /// Has the queue look.
    pub(super) fn notify(&self) {
        self.wake.notify();
    }

    /// Appends what came back.
    pub(super) fn take(&self, flights: &mut Vec<Flight>) {
        if self.wake.take() {
            flights.append(&mut self.back().flights);
        }
    }

    /// Nobody takes anything from here any more.
    pub(super) fn close(&self) {
        let mut back = self.back();
        back.closed = true;
        back.flights.clear();
    }
}

impl Shared {
    /// Bytes that are not out any more.
    fn give(&self, bytes: usize) {
        if self.budget().give(bytes) {
            self.wake_queues();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_bounded_and_whoever_waits_is_told() {
        let budget = Budget::default();
        assert!(budget.take(OUT_BYTES_MAX - 1));
        assert!(!budget.give(0));
        assert!(!budget.take(2));
        assert!(budget.take(1));
        assert!(!budget.take(1));
        assert!(budget.give(1), "somebody waits");
        assert!(!budget.give(OUT_BYTES_MAX - 1), "told once");
        assert!(!budget.take(usize::MAX));
        assert!(budget.take(OUT_BYTES_MAX));
    }

    #[test]
    fn errors_of_ceph_are_told_apart() {
        for (number, error) in [
            (libc::ENOSPC, IoError::NoSpace),
            (libc::EDQUOT, IoError::NoSpace),
            (libc::EINVAL, IoError::OutOfRange),
            (libc::EROFS, IoError::ReadOnly),
            (libc::EOPNOTSUPP, IoError::Unsupported),
            (libc::EIO, IoError::Io),
        ] {
            assert_eq!(io_error(&os_error(-isize::try_from(number).unwrap())), error);
        }
        assert_eq!(io_error(&os_error(isize::MIN + 1)), IoError::Io);
    }
}
