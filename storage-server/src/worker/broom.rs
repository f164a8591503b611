//! Says when it is time to tidy up: once, an interval after it was asked, as an
//! event of the worker's epoll instance.
//!
//! Not as the longest wait of `epoll_wait`: that has the kernel set and cancel a
//! timer of its own with each request, 1.3 % of a single read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

#[derive(Debug)]
pub(super) struct Broom {
    timer: TimerFd,
    asked: bool,
    after: Duration,
}

impl Broom {
    /// One that comes so long after it was asked.
    pub(super) fn new(after: Duration) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Self { timer, asked: false, after })
    }

    /// Readable when it is time.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Asks for it, unless somebody has.
    #[inline]
    pub(super) fn ask(&mut self) {
        if !self.asked {
            self.set();
        }
    }

    #[cold]
    fn set(&mut self) {
        let once = Expiration::OneShot(TimeSpec::from_duration(self.after));
        match self.timer.set(once, TimerSetTimeFlags::empty()) {
            Ok(()) => self.asked = true,
            // Cannot happen with a timer and a time that are our own; the next one asks again.
            Err(error) => tracing::error!(%error, "cannot set a timer"),
        }
    }

    /// Whether it is time, which is said once.
    pub(super) fn take(&mut self) -> bool {
        let mut count = [0; 8];
        match nix::unistd::read(&self.timer, &mut count) {
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            _ => std::mem::take(&mut self.asked),
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn comes(broom: &Broom, within: PollTimeout) -> bool {
        poll(&mut [PollFd::new(broom.as_fd(), PollFlags::POLLIN)], within).expect("poll") > 0
    }

    #[test]
    fn comes_once_each_time_it_was_asked() {
        let mut broom = Broom::new(Duration::from_millis(20)).expect("timer");
        assert!(!comes(&broom, PollTimeout::from(50_u16)) && !broom.take());
        for _ in 0..2 {
            broom.ask();
            broom.ask();
            assert!(comes(&broom, PollTimeout::from(10_000_u16)));
            assert!(broom.take() && !broom.take());
            assert!(!comes(&broom, PollTimeout::from(50_u16)));
        }
    }

    #[test]
    fn is_not_put_off_by_who_asks_again() {
        let mut broom = Broom::new(Duration::from_millis(50)).expect("timer");
        let give_up = std::time::Instant::now() + Duration::from_secs(10);
        while !comes(&broom, PollTimeout::from(1_u16)) {
            assert!(std::time::Instant::now() < give_up, "never came");
            broom.ask();
        }
        assert!(broom.take());
    }
}
