//! How long a thread that ran out of work looks for more before it sleeps.
//!
//! A wake-up costs both sides several microseconds, and a thread that is still
//! looking needs none. Looking pays where the next piece of work is near and costs a
//! core where it is not, so the window follows what it brings:
//!
//! | what happened | next window |
//! |---|---|
//! | work came within it | twice as long, at most the limit |
//! | it passed in vain | half as long; under [`WINDOW_MIN`] none at all |
//! | none, and work came sooner than the limit | after some more of those, twice as long as that took |
//! | none, and work came later | none |
//!
//! A window that was given up is tried again later and later, up to every
//! [`PAUSE_MAX`]th short wait: where it cannot help, as when who has the work needs
//! this very core, trying costs next to nothing.
//!
//! The option is one number, the limit in microseconds, 0 for never: see
//! [`POLL_US_MAX`]. Does not know clocks, threads or what work is.

use std::time::{Duration, Instant};

/// Most that the option may ask for: an idle thread gives the core back within this.
pub const POLL_US_MAX: u64 = 100;

/// A shorter window costs as much as it can save.
const WINDOW_MIN: Duration = Duration::from_micros(5);

/// Short waits between two tries of a window that was given up again and again.
const PAUSE_MAX: u32 = 1024;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct BusyPoll {
    limit: Duration,
    /// Zero: go to sleep at once.
    window: Duration,
    /// When the thread ran out of work; `None` while it has some.
    idle_since: Option<Instant>,
    /// Short waits until a window is tried again.
    pause: u32,
    /// What `pause` will be after the next window that is given up.
    next_pause: u32,
}

impl BusyPoll {
    /// For a limit of so many microseconds; `None` for 0, which is off. More than
    /// [`POLL_US_MAX`] is cut to it.
    #[must_use]
    pub fn new(limit_us: u64) -> Option<Self> {
        let limit = Duration::from_micros(limit_us.min(POLL_US_MAX));
        let off = limit.is_zero();
        (!off).then_some(Self {
            limit,
            window: Duration::ZERO,
            idle_since: None,
            pause: 0,
            next_pause: 1,
        })
    }

    /// There is nothing to do: true, look once more; false, sleep. The first of
    /// these calls after [`BusyPoll::found`] begins the window.
    #[must_use]
    pub fn look_again(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        if self.window.is_zero() {
            return false;
        }
        let looking = now.saturating_duration_since(since) < self.window;
        if !looking {
            self.window /= 2;
            if self.window < WINDOW_MIN.min(self.limit) {
                self.give_up();
            }
        }
        looking
    }

    /// There is work, found at `now` by a look (`slept` false) or a wake-up.
    pub fn found(&mut self, now: Instant, slept: bool) {
        let Some(since) = self.idle_since.take() else { return };
        let waited = now.saturating_duration_since(since);
        if !slept {
            self.window = (self.window * 2).min(self.limit);
            if self.window == self.limit {
                self.next_pause = 1;
            }
        } else if waited > self.limit {
            self.window = Duration::ZERO;
        } else if self.window.is_zero() {
            self.pause = self.pause.saturating_sub(1);
            if self.pause == 0 {
                self.window = (waited * 2).max(WINDOW_MIN).min(self.limit);
            }
        }
    }

    fn give_up(&mut self) {
        self.window = Duration::ZERO;
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A thread whose looks take a microsecond each, and what it does with its time.
    struct Thread {
        poll: BusyPoll,
        now: Instant,
        slept: u32,
        looked_us: u32,
    }

    impl Thread {
        fn new(limit_us: u64) -> Self {
            let poll = BusyPoll::new(limit_us).expect("on");
            Self { poll, now: Instant::now(), slept: 0, looked_us: 0 }
        }

        /// Work comes `after_us` after the last of it was done. How long the thread
        /// looked before it slept, in us, if it did.
        fn wait(&mut self, after_us: u32) -> Option<u32> {
            let comes = self.now + after_us * US;
            let began = self.now;
            while self.poll.look_again(self.now) {
                self.now += US;
                self.looked_us += 1;
                assert!(self.looked_us < 10_000_000, "the thread does not give the core back");
                if self.now >= comes {
                    self.poll.found(self.now, false);
                    return None;
                }
            }
            let looked = self.now.saturating_duration_since(began);
            self.slept += 1;
            self.now = self.now.max(comes);
            self.poll.found(self.now, true);
            Some(u32::try_from(looked.as_micros()).expect("short"))
        }
    }

    #[test]
    fn zero_is_off_and_the_limit_is_a_limit() {
        assert!(BusyPoll::new(0).is_none());
        assert_eq!(BusyPoll::new(u64::MAX).expect("on").limit, Duration::from_micros(POLL_US_MAX));
    }

    #[test]
    fn near_work_is_found_by_looking_and_far_work_by_sleeping() {
        let mut thread = Thread::new(100);
        for _ in 0..1000 {
            thread.wait(15);
        }
        assert!(thread.slept <= 2, "slept {} times", thread.slept);
        thread.looked_us = 0;
        for _ in 0..1000 {
            thread.wait(5000);
        }
        assert!(thread.looked_us <= 200, "looked for {} us in 5 s", thread.looked_us);
        // And near again.
        thread.slept = 0;
        for _ in 0..1000 {
            thread.wait(60);
        }
        assert!(thread.slept <= 4, "slept {} times", thread.slept);
    }

    #[test]
    fn whatever_came_before_the_core_is_given_back_within_the_limit() {
        for limit_us in [1, 7, 50, 100] {
            let mut thread = Thread::new(limit_us);
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for _ in 0..20_000 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let after_us = match state % 4 {
                    0 => 1,
                    1 => u32::try_from(state >> 60).expect("4 bits"),
                    2 => u32::try_from(state >> 57).expect("7 bits"),
                    _ => u32::try_from(state >> 52).expect("12 bits"),
                };
                if let Some(looked_us) = thread.wait(after_us) {
                    assert!(u64::from(looked_us) <= limit_us, "{looked_us} of {limit_us} us");
                }
            }
            assert!(thread.looked_us > 0 && thread.slept > 0);
        }
    }

    /// As when the one who has the work runs on this core: it comes only once the
    /// thread sleeps.
    #[test]
    fn work_that_never_comes_while_looking_is_hardly_looked_for() {
        let mut poll = BusyPoll::new(100).expect("on");
        let (mut now, mut looked) = (Instant::now(), Duration::ZERO);
        for _ in 0..100_000 {
            while poll.look_again(now) {
                now += US;
                looked += US;
                assert!(looked < 100_000 * US / 10, "{looked:?} in a second of waiting");
            }
            now += 10 * US;
            poll.found(now, true);
        }
    }
}
