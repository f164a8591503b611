//! How long a thread that ran out of work looks for more before it sleeps.
//!
//! A wake-up costs both sides several microseconds, and a thread that is still
//! looking needs none. Looking pays where the next piece of work is near and the core
//! is the thread's own, so the window follows what it brings:
//!
//! | what happened | next window |
//! |---|---|
//! | work came within it | twice as long, at most the limit |
//! | it passed in vain, and nothing came for long | none: the thread is idle |
//! | it passed in vain, and work came as soon as the thread slept | none: given up |
//! | the thread was kept from looking for longer than the limit | none: given up |
//! | there was none, and work came sooner than the limit | twice as long as that took |
//!
//! The two that give up are what a core looks like that others need, among them who
//! has the work. It is tried again after 1, 2, 4 and at most [`PAUSE_MAX`] near pieces
//! of work, and at once when looking went well for [`RUN`] times: where it cannot
//! help, trying costs little. Asking the scheduler instead (`sched_yield`) gives the
//! core away for milliseconds where another thread is busy.
//!
//! The option is one number, the limit in microseconds, 0 for never: see
//! [`POLL_US_MAX`]. Does not know clocks, threads or what work is.

use std::time::{Duration, Instant};

/// Most that the option may ask for: an idle thread gives the core back within this.
pub const POLL_US_MAX: u64 = 100;

/// The first window is not shorter than what it can save.
const WINDOW_MIN: Duration = Duration::from_micros(5);

/// Near pieces of work between two tries of a window that was given up again and again.
const PAUSE_MAX: u32 = 1024;

/// Finds in a row that make up for what was given up before. Where two processes take
/// turns on one core, looking brings something four times out of five.
const RUN: u32 = 32;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct BusyPoll {
    limit: Duration,
    /// Zero: go to sleep at once.
    window: Duration,
    /// When the thread ran out of work; `None` while it has some.
    idle_since: Option<Instant>,
    /// The window has not passed.
    looking: bool,
    /// Finds in a row.
    run: u32,
    /// Near pieces of work until a window is tried again.
    pause: u32,
    /// What `pause` will be when the next window is given up.
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
            looking: false,
            run: 0,
            pause: 0,
            next_pause: 1,
        })
    }

    /// There is nothing to do: true, look once more; false, sleep. The first of
    /// these calls after [`BusyPoll::found`] begins the window.
    #[must_use]
    pub fn look_again(&mut self, now: Instant) -> bool {
        let Some(since) = self.idle_since else {
            self.idle_since = Some(now);
            self.looking = !self.window.is_zero();
            return self.looking;
        };
        if self.looking {
            let waited = now.saturating_duration_since(since);
            self.looking = waited < self.window;
            if waited > 2 * self.limit {
                self.give_up();
            }
        }
        self.looking
    }

    /// There is work, found at `now` by a look or a wake-up.
    pub fn found(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        let waited = now.saturating_duration_since(since);
        let far = waited > 2 * self.limit;
        if self.looking && !far {
            self.window = (2 * self.window).min(self.limit);
            self.run += 1;
            if self.run >= RUN {
                self.next_pause = 1;
            }
        } else if !self.window.is_zero() {
            if self.looking || !far {
                self.give_up();
            }
            self.window = Duration::ZERO;
        } else if waited <= self.limit {
            self.pause = self.pause.saturating_sub(1);
            if self.pause == 0 {
                self.window = (2 * waited).max(WINDOW_MIN).min(self.limit);
            }
        }
    }

    fn give_up(&mut self) {
        self.window = Duration::ZERO;
        self.run = 0;
        self.pause = self.next_pause;
        self.next_pause = (2 * self.next_pause).min(PAUSE_MAX);
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
                    self.poll.found(self.now);
                    return None;
                }
            }
            let looked = self.now.saturating_duration_since(began);
            self.slept += 1;
            self.now = self.now.max(comes);
            self.poll.found(self.now);
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

    /// As when another thread has the core in turn with this one, for milliseconds.
    #[test]
    fn a_thread_that_is_kept_from_looking_stops_to_look() {
        let mut thread = Thread::new(100);
        let mut kept = 0;
        for _ in 0..10_000 {
            let looked = thread.poll.look_again(thread.now);
            thread.now += if looked { 4000 * US } else { 15 * US };
            kept += u32::from(looked);
            // Found by this look, or by the next after it.
            if kept % 2 == 0 {
                assert!(!looked || !thread.poll.look_again(thread.now), "longer than the limit");
            }
            thread.poll.found(thread.now);
        }
        assert!((2..30).contains(&kept), "{kept} times");
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
            poll.found(now);
        }
    }
}
