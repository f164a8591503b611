//! How long to wait before a backend that died is started again.

use std::time::Duration;

/// A guest waits for its disk meanwhile.
const FIRST: Duration = Duration::from_millis(100);
/// One that dies at once must not fill the log.
const LAST: Duration = Duration::from_secs(10);
/// One that ran this long has not died of its start.
const HEALTHY: Duration = Duration::from_secs(30);

/// Doubles from 100 ms to 10 s.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// The pause after one that ran for `ran`.
    pub(super) fn on_death(&mut self, ran: Duration) -> Duration {
        if ran >= HEALTHY {
            self.deaths = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.deaths.min(16)).min(LAST);
        self.deaths = self.deaths.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_to_a_bound_and_forgets() {
        let mut backoff = Backoff::default();
        let ms: Vec<_> = (0..9).map(|_| backoff.on_death(Duration::ZERO).as_millis()).collect();
        assert_eq!(ms, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        for _ in 0..100 {
            assert!(backoff.on_death(Duration::ZERO) <= LAST);
        }
        assert_eq!(backoff.on_death(HEALTHY), FIRST);
    }
}
