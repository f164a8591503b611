//! Bounds what a guest can make a daemon write: one line a second, and how
//! many were left out.

use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// State of one source of log lines.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// `Some(lines left out since the last one)` when a line may be written.
    pub fn permit(&mut self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_a_count() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.permit_at(start), Some(0));
        for _ in 0..500 {
            assert_eq!(limit.permit_at(start + Duration::from_millis(999)), None);
        }
        assert_eq!(limit.permit_at(start + Duration::from_secs(1)), Some(500));
        assert_eq!(limit.permit_at(start + Duration::from_secs(2)), Some(0));
    }
}
