//! Decides when a backend is hung: a function of observations and the time that
//! is passed in.
//!
//! A hung source backend blocks QEMU's main loop for as long as it hangs, and
//! nothing in QEMU times out. Killing it is safe at any moment: what was in
//! flight is done again by its successor, and storage decides who may write.
//!
//! The one who looks may have been frozen itself. A long pause between two
//! observations says nothing about the backend and starts the count anew.

use std::time::{Duration, Instant};

/// Probes in a row that must fail, however long they took.
const FAILED_MIN: u32 = 3;

/// How a probe of the control socket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// It answered, whatever it said.
    Answered,
    /// It took the connection and said nothing, or took no connection in time.
    Silent,
    /// Nobody listens: it starts or ends, which others watch.
    Absent,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Look again later.
    Wait,
    /// It is hung.
    Kill {
        /// For how long at least.
        silent: Duration,
    },
}

/// Watches one incarnation of a backend.
#[derive(Clone, Copy, Debug)]
pub struct Watchdog {
    hang: Duration,
    pause_max: Duration,
    /// It has answered once, or ran before this agent did; before that it may still be opening its volumes.
    up: bool,
    last: Option<Instant>,
    silence: Option<(Instant, u32)>,
    killed: bool,
}

impl Watchdog {
    /// `hang` is the silence that ends a backend; it is looked at every
    /// [`Self::period`].
    #[must_use]
    pub fn new(hang: Duration) -> Self {
        Self { hang, pause_max: hang, up: false, last: None, silence: None, killed: false }
    }

    /// Of one that ran before this agent did, and may have hung before that. One that
    /// was still opening its volumes is started again for that, which harms nothing.
    #[must_use]
    pub fn of_adopted(hang: Duration) -> Self {
        Self { up: true, ..Self::new(hang) }
    }

    /// Time between probes, and the limit of each.
    #[must_use]
    pub fn period(hang: Duration) -> Duration {
        hang / 8
    }

    /// Takes one probe that began at `began` and ended at `ended`.
    pub fn on_probe(&mut self, began: Instant, ended: Instant, seen: Observation) -> Decision {
        let before = self.last.replace(ended);
        let slept = before.is_some_and(|before| began.duration_since(before) > self.pause_max)
            || ended.duration_since(began) > self.pause_max;
        match seen {
            Observation::Answered => {
                self.up = true;
                self.silence = None;
            }
            Observation::Absent => self.silence = None,
            Observation::Silent if !self.up || self.killed => {}
            Observation::Silent if slept => self.silence = Some((ended, 1)),
            Observation::Silent => {
                let (since, failed) = self.silence.unwrap_or((began, 0));
                self.silence = Some((since, failed + 1));
                let silent = ended.duration_since(since);
                if silent >= self.hang && failed + 1 >= FAILED_MIN {
                    self.killed = true;
                    return Decision::Kill { silent };
                }
            }
        }
        Decision::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HANG: Duration = Duration::from_secs(5);

    /// Probes of one second each, one after the other, from an answer at zero.
    fn run(seen: &[(u64, u64, Observation)]) -> Vec<Decision> {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut dog = Watchdog::new(HANG);
        seen.iter().map(|&(began, ended, seen)| dog.on_probe(at(began), at(ended), seen)).collect()
    }

    fn seconds(seen: &[Observation]) -> Vec<(u64, u64, Observation)> {
        (0..).zip(seen).map(|(s, seen)| (s * 1000, (s + 1) * 1000, *seen)).collect()
    }

    use Observation::{Absent, Answered, Silent};

    #[test]
    fn one_that_hung_before_its_agent_came_is_ended() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut dog = Watchdog::of_adopted(HANG);
        let mut probe = |s| dog.on_probe(at(s), at(s + 1), Silent);
        assert_eq!([0, 1, 2, 3].map(&mut probe), [Decision::Wait; 4]);
        assert_eq!(probe(4), Decision::Kill { silent: HANG });
    }

    #[test]
    fn five_seconds_of_silence_end_it_once() {
        let decisions = run(&seconds(&[Answered, Silent, Silent, Silent, Silent, Silent, Silent]));
        assert_eq!(decisions[..5], [Decision::Wait; 5]);
        assert_eq!(decisions[5], Decision::Kill { silent: HANG });
        assert_eq!(decisions[6], Decision::Wait, "it is killed once");
    }

    #[test]
    fn one_answer_or_absence_starts_anew() {
        for other in [Answered, Absent] {
            let seen = [Answered, Silent, Silent, Silent, Silent, other, Silent, Silent, Silent];
            assert!(run(&seconds(&seen)).iter().all(|d| *d == Decision::Wait), "{other:?}");
        }
    }

    #[test]
    fn one_that_starts_slowly_is_not_hung() {
        assert!(run(&seconds(&[Silent; 60])).iter().all(|d| *d == Decision::Wait));
    }

    #[test]
    fn a_frozen_watcher_kills_nobody() {
        // Frozen between two probes, and within one.
        let between = [(0, 1000, Answered), (1000, 2000, Silent), (60_000, 61_000, Silent)];
        assert_eq!(run(&between), [Decision::Wait; 3]);
        let within = [(0, 1000, Answered), (1000, 61_000, Silent), (61_000, 62_000, Silent)];
        assert_eq!(run(&within), [Decision::Wait; 3]);
        // And finds one that is hung all the same.
        let mut hung = within.to_vec();
        hung.extend((62..70).map(|s| (s * 1000, (s + 1) * 1000, Silent)));
        assert!(run(&hung).iter().any(|d| matches!(d, Decision::Kill { .. })));
    }

    proptest! {
        /// No kill without `HANG` of nothing but silence, at least three probes of it.
        #[test]
        fn no_kill_without_silence(seen in prop::collection::vec((0_u64..8000, 0_u64..8000, 0_usize..3), 1..60)) {
            let mut now = 0;
            let mut probes = Vec::new();
            for (pause, took, kind) in seen {
                let began = now + pause;
                now = began + took;
                probes.push((began, now, [Answered, Silent, Absent][kind]));
            }
            for (at, decision) in run(&probes).iter().enumerate() {
                let Decision::Kill { silent } = decision else { continue };
                prop_assert!(*silent >= HANG);
                let run = probes[..=at].iter().rev().take_while(|p| p.2 == Silent).count();
                prop_assert!(run >= 3);
                let first = probes[at + 1 - run].0;
                prop_assert!(probes[at].1 - first >= 5000);
                prop_assert!(probes[..at].iter().any(|p| p.2 == Answered));
            }
        }
    }
}
