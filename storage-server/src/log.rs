//! How the daemon logs, and how often.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between two lines about requests that fail: a guest can make thousands.
const PAUSE: Duration = Duration::from_secs(1);

static LAST: Mutex<(Option<Instant>, u64)> = Mutex::new((None, 0));

/// Logs at most once a second; `line` is told how many lines were left out.
pub fn sometimes(line: impl FnOnce(u64)) {
    let missed = {
        let mut last = LAST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
