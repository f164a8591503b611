//! Sequence numbers of one queue: each request takes effect once.
//!
//! A client whose connection broke does not know which of its unanswered
//! requests took effect, so it sends all of them again with their old sequence
//! numbers. The server remembers in a window which of them were completed and
//! answers those without running them again. Without it a write that was done,
//! and whose answer was lost, would be done a second time and could cover a
//! later write that a reader has already seen.
//!
//! ```text
//!   floor (all below: answered, the client said so or the window moved)
//!     |  done bits, WINDOW_REQUESTS wide
//!     v
//! ----[x x . x . . . . ]---->  seq
//! ```

use crate::frame::WINDOW_REQUESTS;
use crate::units::Seq;

const WORDS: usize = (WINDOW_REQUESTS / 64) as usize;

/// What a sequence number means on arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Not seen, or seen and not completed: run it.
    New,
    /// Completed before; answer without running it again.
    Done,
    /// Below the window: the client had its answer, so it must not send it.
    TooOld,
    /// Further ahead than the window is wide: the client broke its limit.
    TooNew,
}

/// The window of one queue of one session.
#[derive(Clone, Debug)]
pub struct Window {
    /// Every sequence number below this one is completed.
    floor: u64,
    /// Bit `seq % WINDOW_REQUESTS`, valid for `floor..floor + WINDOW_REQUESTS`.
    done: [u64; WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self::starting_at(Seq(1))
    }
}

impl Window {
    /// A window in which everything below `first` is completed.
    #[must_use]
    pub fn starting_at(first: Seq) -> Self {
        Self { floor: first.0.max(1), done: [0; WORDS] }
    }

    /// The lowest sequence number that is not known to be completed.
    #[must_use]
    pub fn floor(&self) -> Seq {
        Seq(self.floor)
    }

    /// Judges a sequence number.
    #[must_use]
    pub fn arrive(&self, seq: Seq) -> Arrival {
        match seq.0.checked_sub(self.floor) {
            None => Arrival::TooOld,
            Some(ahead) if ahead >= WINDOW_REQUESTS => Arrival::TooNew,
            Some(_) if self.is_done(seq.0) => Arrival::Done,
            Some(_) => Arrival::New,
        }
    }

    /// Records that `seq` was completed. Numbers outside the window are ignored:
    /// they are judged by [`Window::arrive`] first.
    pub fn complete(&mut self, seq: Seq) {
        if !matches!(self.arrive(seq), Arrival::New) {
            return;
        }
        self.set(seq.0, true);
        while self.is_done(self.floor) {
            self.set(self.floor, false);
            self.floor += 1;
        }
    }

    /// The client has the answers of everything below `first` (it says so when
    /// it comes back); nothing below is sent again.
    pub fn forget_below(&mut self, first: Seq) {
        let target = first.0.min(self.floor.saturating_add(WINDOW_REQUESTS));
        while self.floor < target {
            self.set(self.floor, false);
            self.floor += 1;
        }
        if first.0 > self.floor {
            self.floor = first.0;
        }
        while self.is_done(self.floor) {
            self.set(self.floor, false);
            self.floor += 1;
        }
    }

    fn is_done(&self, seq: u64) -> bool {
        let (word, bit) = Self::place(seq);
        self.done[word] >> bit & 1 == 1
    }

    fn set(&mut self, seq: u64, done: bool) {
        let (word, bit) = Self::place(seq);
        if done {
            self.done[word] |= 1 << bit;
        } else {
            self.done[word] &= !(1 << bit);
        }
    }

    fn place(seq: u64) -> (usize, u32) {
        let slot = seq % WINDOW_REQUESTS;
        #[allow(clippy::cast_possible_truncation, reason = "slot is below WINDOW_REQUESTS")]
        let place = ((slot / 64) as usize, (slot % 64) as u32);
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_completed_request_is_not_run_again() {
        let mut window = Window::default();
        assert_eq!(window.arrive(Seq(0)), Arrival::TooOld);
        assert_eq!(window.arrive(Seq(2)), Arrival::New);
        window.complete(Seq(2));
        assert_eq!(window.arrive(Seq(2)), Arrival::Done);
        assert_eq!(window.arrive(Seq(1)), Arrival::New);
        window.complete(Seq(1));
        assert_eq!(window.floor(), Seq(3));
        assert_eq!(window.arrive(Seq(2)), Arrival::TooOld);
        assert_eq!(window.arrive(Seq(3 + WINDOW_REQUESTS)), Arrival::TooNew);
        assert_eq!(window.arrive(Seq(2 + WINDOW_REQUESTS)), Arrival::New);
    }

    /// The slow, obviously right one.
    #[derive(Default)]
    struct Oracle {
        floor: u64,
        done: BTreeSet<u64>,
    }

    impl Oracle {
        fn settle(&mut self) {
            while self.done.remove(&self.floor) {
                self.floor += 1;
            }
        }
        fn arrive(&self, seq: u64) -> Arrival {
            if seq < self.floor {
                Arrival::TooOld
            } else if seq >= self.floor + WINDOW_REQUESTS {
                Arrival::TooNew
            } else if self.done.contains(&seq) {
                Arrival::Done
            } else {
                Arrival::New
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_oracle(steps in prop::collection::vec((0u64..3000, prop::bool::weighted(0.05)), 1..600)) {
            let mut window = Window::default();
            let mut oracle = Oracle { floor: 1, ..Oracle::default() };
            for (ahead, forget) in steps {
                let seq = oracle.floor.saturating_sub(5) + ahead;
                prop_assert_eq!(window.arrive(Seq(seq)), oracle.arrive(seq));
                if forget {
                    window.forget_below(Seq(seq));
                    oracle.done.retain(|s| *s >= seq);
                    oracle.floor = oracle.floor.max(seq);
                    oracle.settle();
                } else if oracle.arrive(seq) == Arrival::New {
                    window.complete(Seq(seq));
                    oracle.done.insert(seq);
                    oracle.settle();
                }
                prop_assert_eq!(window.floor(), Seq(oracle.floor));
            }
        }
    }
}
