//! How often the daemon logs what peers and guests can cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of one kind: a guest can make thousands of failures a second.
const PAUSE: Duration = Duration::from_secs(1);

/// One kind of line, as a `static` at its place.
#[derive(Debug)]
pub struct Sometimes(Mutex<(Option<Instant>, u64)>);

impl Sometimes {
    /// Nothing said yet.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made in statics only")]
    pub const fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }

    /// Logs at most once a second; `line` is told how many lines were left out.
    pub fn say(&self, line: impl FnOnce(u64)) {
        let missed = {
            let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            if last.0.is_some_and(|at| now.duration_since(at) < PAUSE) {
                last.1 += 1;
                return;
            }
            last.0 = Some(now);
            std::mem::take(&mut last.1)
        };
        line(missed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line() {
        let kind = Sometimes::new();
        let mut lines = 0;
        for _ in 0..1000 {
            kind.say(|_| lines += 1);
        }
        assert!(lines <= 2, "{lines}");
    }
}
