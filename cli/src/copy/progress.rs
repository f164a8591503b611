//! How far a copy is, for a person's terminal or for a machine.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::json;

/// The rate is that of so much of the past.
const WINDOW: Duration = Duration::from_secs(5);
const TERMINAL_PAUSE: Duration = Duration::from_millis(250);
const MACHINE_PAUSE: Duration = Duration::from_secs(1);

/// Where progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    /// A line that is written over and over, on standard error.
    Terminal,
    /// An object a line, on standard output.
    Machine,
    Nobody,
}

impl Audience {
    pub(super) fn new(json: bool) -> Self {
        match (json, io::stderr().is_terminal()) {
            (true, _) => Self::Machine,
            (false, true) => Self::Terminal,
            (false, false) => Self::Nobody,
        }
    }
}

/// Bytes a second, from what was seen lately. Pure.
#[derive(Debug)]
struct Rate {
    seen: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn new(now: Instant, bytes: u64) -> Self {
        Self { seen: VecDeque::from([(now, bytes)]) }
    }

    fn see(&mut self, now: Instant, bytes: u64) {
        self.seen.push_back((now, bytes));
        while self.seen.len() > 2 && now.saturating_duration_since(self.seen[1].0) >= WINDOW {
            self.seen.pop_front();
        }
    }

    /// Zero until there is something to tell.
    fn per_second(&self) -> u64 {
        let (Some((from, before)), Some((to, now))) = (self.seen.front(), self.seen.back()) else {
            return 0;
        };
        let us = to.saturating_duration_since(*from).as_micros().max(1);
        let bytes = u128::from(now.saturating_sub(*before)) * 1_000_000 / us;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Progress {
    audience: Audience,
    phase: &'static str,
    total: u64,
    done: u64,
    rate: Rate,
    told: Option<Instant>,
    line: bool,
}

impl Progress {
    /// `done` bytes of `total` were done before.
    pub(super) fn new(audience: Audience, phase: &'static str, total: u64, done: u64) -> Self {
        let rate = Rate::new(Instant::now(), done);
        Self { audience, phase, total, done, rate, told: None, line: false }
    }

    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
    }

    pub(super) fn percent(&self) -> u64 {
        percent(self.done, self.total)
    }

    /// Tells, if it is time; `away` is the end that does not answer.
    pub(super) fn tell(&mut self, away: Option<&str>) -> io::Result<()> {
        let pause = match self.audience {
            Audience::Terminal => TERMINAL_PAUSE,
            Audience::Machine => MACHINE_PAUSE,
            Audience::Nobody => return Ok(()),
        };
        let now = Instant::now();
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < pause) {
            return Ok(());
        }
        self.told = Some(now);
        self.rate.see(now, self.done);
        let rate = self.rate.per_second();
        let left_s = (rate > 0).then(|| self.total.saturating_sub(self.done).div_ceil(rate.max(1)));
        match self.audience {
            Audience::Machine => {
                let line = json!({
                    "event": "progress", "phase": self.phase, "done_bytes": self.done,
                    "total_bytes": self.total, "percent": self.percent(),
                    "bytes_per_second": rate, "left_seconds": left_s, "waits_for": away,
                });
                let mut out = io::stdout().lock();
                writeln!(out, "{line}")?;
                out.flush()
            }
            _ => {
                let text = line(self.phase, self.done, self.total, rate, left_s, away);
                self.line = true;
                let mut err = io::stderr().lock();
                write!(err, "\r{text}\x1b[K")?;
                err.flush()
            }
        }
    }

    /// Leaves the terminal's line.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.line) {
            eprint!("\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn percent(done: u64, total: u64) -> u64 {
    u64::try_from(u128::from(done) * 100 / u128::from(total.max(1))).unwrap_or(100).min(100)
}

fn line(
    phase: &str,
    done: u64,
    total: u64,
    rate: u64,
    left_s: Option<u64>,
    away: Option<&str>,
) -> String {
    let (percent, done, total) = (percent(done, total), size(done), size(total));
    let what = match (away, left_s) {
        (Some(away), _) => format!("waiting for the {away}"),
        (None, Some(left)) => format!("{}/s  {} left", size(rate), time(left)),
        (None, None) => String::new(),
    };
    format!("{phase} {percent:>3}%  {done} of {total}  {what}").trim_end().to_owned()
}

/// `1.5 GiB`: three digits at most.
pub(super) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut whole = bytes;
    let mut tenths = 0;
    while whole >= 1024 && unit + 1 < units.len() {
        tenths = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    match unit {
        1.. if whole < 100 => format!("{whole}.{tenths} {}", units[unit]),
        _ => format!("{whole} {}", units[unit]),
    }
}

/// `2h 5m`, `1m 30s`, `12s`.
pub(super) fn time(seconds: u64) -> String {
    match seconds {
        3600.. => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        60.. => format!("{}m {}s", seconds / 60, seconds % 60),
        _ => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_bytes_percent_rate_and_time_left() {
        let gib = 1 << 30;
        assert_eq!(
            line("copying", 5 * gib / 2, 10 * gib, 150 << 20, Some(51), None),
            "copying  25%  2.5 GiB of 10.0 GiB  150 MiB/s  51s left"
        );
        assert_eq!(
            line("verifying", gib, gib, 0, None, Some("source")),
            "verifying 100%  1.0 GiB of 1.0 GiB  waiting for the source"
        );
        assert_eq!(line("copying", 0, 512, 0, None, None), "copying   0%  0 B of 512 B");
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
        assert_eq!(
            [size(1023), size(100 << 10), size(u64::MAX)],
            ["1023 B", "100 KiB", "15.9 EiB"]
        );
        assert_eq!([time(59), time(90), time(7500)], ["59s", "1m 30s", "2h 5m"]);
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        // What a copy before had done is not this one's speed.
        let mut rate = Rate::new(start, 1 << 40);
        assert_eq!(rate.per_second(), 0);
        for second in 1..=20u64 {
            rate.see(at(second * 1000), (1 << 40) + second * 1000);
        }
        assert_eq!(rate.per_second(), 1000);
        for second in 21..=30u64 {
            rate.see(at(second * 1000), (1 << 40) + 20_000 + (second - 20) * 10);
        }
        assert_eq!(rate.per_second(), 10);
    }
}
