//! When to try the next connection: at once, then after pauses that double,
//! with jitter so that the clients of a restarted server do not come in step.

use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    /// Attempts since the last progress.
    attempt: u32,
    random: fastrand::Rng,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration, seed: u64) -> Self {
        Self { min, max, attempt: 0, random: fastrand::Rng::with_seed(seed) }
    }

    /// The server did something useful: the next attempt may be at once.
    pub(crate) fn reset(&mut self) {
        self.attempt = 0;
    }

    /// The pause before the next attempt. `polite`: even the first one pauses,
    /// because the server asked for it.
    pub(crate) fn next(&mut self, polite: bool) -> Duration {
        if polite {
            self.attempt = self.attempt.max(1);
        }
        let attempt = self.attempt;
        self.attempt = attempt.saturating_add(1);
        let Some(doublings) = attempt.checked_sub(1) else {
            return Duration::ZERO;
        };
        let full = self.min.saturating_mul(1 << doublings.min(20)).min(self.max);
        // Between half and all of it.
        let half = full / 2;
        let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).max(1);
        half + Duration::from_nanos(self.random.u64(..nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_doubling_with_jitter_up_to_the_limit() {
        let (min, max) = (Duration::from_millis(10), Duration::from_secs(1));
        let mut backoff = Backoff::new(min, max, 42);
        assert_eq!(backoff.next(false), Duration::ZERO);
        for full in [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000] {
            let full = Duration::from_millis(full);
            let pause = backoff.next(false);
            assert!(pause >= full / 2 && pause <= full, "{pause:?} for {full:?}");
        }
        backoff.reset();
        assert_eq!(backoff.next(false), Duration::ZERO);
        backoff.reset();
        assert!(backoff.next(true) >= min / 2);
        for _ in 0..100 {
            assert!(backoff.next(false) <= max);
        }
    }

    #[test]
    fn two_clients_do_not_come_in_step() {
        let (min, max) = (Duration::from_millis(10), Duration::from_secs(1));
        let (mut a, mut b) = (Backoff::new(min, max, 2), Backoff::new(min, max, 77));
        let same = (0..20).filter(|_| a.next(true) == b.next(true)).count();
        assert!(same <= 1, "{same} of 20 pauses were equal");
    }
}
