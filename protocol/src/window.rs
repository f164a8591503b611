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
//!   floor (all below: the client has the answer)
//!     |  done bits, WINDOW_REQUESTS wide
//!     v
//! ----[x x . x . . . . ]---->  seq
//! ```
//!
//! Only the client knows which answers arrived, so only what it says moves the
//! floor: its `resume_from` when it comes back, and each new number, because a
//! client keeps its unanswered requests within [`WINDOW_REQUESTS`]. That the
//! server completed a request does not: its answer may have been lost.

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
    /// Further ahead than any client that keeps its limit can be.
    TooNew,
}

/// The window of one queue of one session.
#[derive(Clone, Debug)]
pub struct Window {
    /// The client has the answer of every sequence number below this one.
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
    /// A window in which everything below `first` is answered.
    #[must_use]
    pub fn starting_at(first: Seq) -> Self {
        Self { floor: first.0.max(1), done: [0; WORDS] }
    }

    /// The lowest sequence number that the client may still send.
    #[must_use]
    pub fn floor(&self) -> Seq {
        Seq(self.floor)
    }

    /// Judges a sequence number, and moves the floor to where this number says
    /// it must be.
    pub fn arrive(&mut self, seq: Seq) -> Arrival {
        match seq.0.checked_sub(self.floor) {
            None => Arrival::TooOld,
            // The newest number seen is below floor + WINDOW_REQUESTS and the
            // next one at most WINDOW_REQUESTS above it.
            Some(ahead) if ahead >= 2 * WINDOW_REQUESTS => Arrival::TooNew,
            Some(ahead) if ahead >= WINDOW_REQUESTS => {
                self.forget_below(Seq(seq.0 - (WINDOW_REQUESTS - 1)));
                Arrival::New
            }
            Some(_) if self.is_done(seq.0) => Arrival::Done,
            Some(_) => Arrival::New,
        }
    }

    /// Records that `seq` took effect. A request that failed is not recorded:
    /// sent again, it runs again. Numbers outside the window are ignored.
    pub fn complete(&mut self, seq: Seq) {
        if seq.0.checked_sub(self.floor).is_some_and(|ahead| ahead < WINDOW_REQUESTS) {
            self.set(seq.0, true);
        }
    }

    /// The client has the answers of everything below `first` (it says so when
    /// it comes back); nothing below is sent again.
    pub fn forget_below(&mut self, first: Seq) {
        let target = first.0.min(self.floor.saturating_add(WINDOW_REQUESTS));
        for seq in self.floor..target {
            self.set(seq, false);
        }
        self.floor = self.floor.max(first.0);
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
        // Both answers may be lost: both may come again.
        assert_eq!(window.arrive(Seq(1)), Arrival::Done);
        assert_eq!(window.arrive(Seq(2)), Arrival::Done);
        window.forget_below(Seq(2));
        assert_eq!(window.arrive(Seq(1)), Arrival::TooOld);
        assert_eq!(window.arrive(Seq(2)), Arrival::Done);
    }

    #[test]
    fn a_new_number_says_that_old_ones_were_answered() {
        let mut window = Window::default();
        assert_eq!(window.arrive(Seq(1 + 2 * WINDOW_REQUESTS)), Arrival::TooNew);
        assert_eq!(window.arrive(Seq(WINDOW_REQUESTS)), Arrival::New);
        assert_eq!(window.floor(), Seq(1));
        assert_eq!(window.arrive(Seq(WINDOW_REQUESTS + 1)), Arrival::New);
        assert_eq!(window.floor(), Seq(2));
        assert_eq!(window.arrive(Seq(1)), Arrival::TooOld);
    }

    #[test]
    fn the_ends_of_the_numbers_are_harmless() {
        let mut window = Window::starting_at(Seq(u64::MAX));
        assert_eq!(window.arrive(Seq(u64::MAX)), Arrival::New);
        window.complete(Seq(u64::MAX));
        window.forget_below(Seq(u64::MAX));
        assert_eq!(window.arrive(Seq(u64::MAX)), Arrival::Done);
    }

    /// The slow, obviously right one.
    #[derive(Default)]
    struct Oracle {
        floor: u64,
        done: BTreeSet<u64>,
    }

    impl Oracle {
        fn forget(&mut self, first: u64) {
            self.floor = self.floor.max(first);
            self.done.retain(|seq| *seq >= first);
        }
        fn arrive(&mut self, seq: u64) -> Arrival {
            if seq < self.floor {
                return Arrival::TooOld;
            }
            if seq >= self.floor + 2 * WINDOW_REQUESTS {
                return Arrival::TooNew;
            }
            self.forget((seq + 1).saturating_sub(WINDOW_REQUESTS));
            if self.done.contains(&seq) { Arrival::Done } else { Arrival::New }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_oracle(steps in prop::collection::vec((0u64..3000, prop::bool::weighted(0.05)), 1..600)) {
            let mut window = Window::default();
            let mut oracle = Oracle { floor: 1, ..Oracle::default() };
            for (ahead, forget) in steps {
                let seq = oracle.floor.saturating_sub(5) + ahead;
                let arrival = oracle.arrive(seq);
                prop_assert_eq!(window.arrive(Seq(seq)), arrival);
                if forget {
                    window.forget_below(Seq(seq));
                    oracle.forget(seq);
                } else if arrival == Arrival::New {
                    window.complete(Seq(seq));
                    oracle.done.insert(seq);
                }
                prop_assert_eq!(window.floor(), Seq(oracle.floor));
            }
        }
    }
}
