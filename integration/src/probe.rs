//! The probe in a guest, as the host sees it: a serial line with commands, answers and reports.
//!
//! The line is a socket of the QEMU that runs the guest at the time. After a migration the probe is found on the other
//! QEMU's socket, with [`Probe::resynchronise`].

use anyhow::{Context, Result, bail};
use baton_probe::load::Totals;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// For one command to the probe.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// In a line of the probe's counters.
const TOTALS_COUNTERS: usize = 6;

/// Lines that the probe said, and those that were looked at already.
#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Ear {
    heard: Mutex<Heard>,
    news: Condvar,
}

/// One end of the serial line.
#[derive(Debug)]
pub struct Probe {
    line: UnixStream,
    ear: Arc<Ear>,
}

impl Probe {
    /// Connects to the socket at `path`, and keeps what is heard in the file `log`.
    pub fn connect(path: &Path, log: &Path) -> Result<Self> {
        let line =
            UnixStream::connect(path).context("cannot connect to the guest's serial line")?;
        let ear = Arc::new(Ear::default());
        let (listening, from) = (Arc::clone(&ear), line.try_clone()?);
        let mut log = fs::File::create(log)?;
        std::thread::spawn(move || listen(from, &mut log, &listening));
        Ok(Self { line, ear })
    }

    /// Waits for the first word of a guest that boots.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        self.wait_for(timeout, 0, |line| line == "ready").map(drop)
    }

    /// Gives the probe one command and returns its answer without the "ok"; an "err" is an error.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.ask_within(command, ASK_TIMEOUT)
    }

    /// [`Self::ask`] for a command that takes long, or must not.
    pub fn ask_within(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let from = self.heard_so_far();
        self.line
            .write_all(format!("{command}\n").as_bytes())
            .context("cannot write to the guest's serial line")?;
        let is_answer =
            |line: &str| line == "ok" || line.starts_with("ok ") || line.starts_with("err ");
        let answer = self
            .wait_for(timeout, from, is_answer)
            .with_context(|| format!("asked the guest: {command}"))?;
        match answer.strip_prefix("err ") {
            Some(why) => bail!("{command}: {why}"),
            None => Ok(answer.trim_start_matches("ok").trim().to_owned()),
        }
    }

    /// Number of lines heard from the probe; a later [`Self::wait_for`] can start there.
    #[must_use]
    pub fn heard_so_far(&self) -> usize {
        self.ear.heard.lock().expect("the listener does not panic").lines.len()
    }

    /// Waits for a line of the probe, of those from number `from` on.
    pub fn wait_for(
        &self,
        timeout: Duration,
        from: usize,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut heard = self.ear.heard.lock().expect("the listener does not panic");
        let mut next = from;
        loop {
            if let Some(line) =
                heard.lines[next.min(heard.lines.len())..].iter().find(|l| wanted(l))
            {
                return Ok(line.clone());
            }
            next = heard.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || heard.closed {
                let last = heard.lines.last().map_or("nothing", String::as_str);
                let why = if heard.closed {
                    "QEMU is gone".to_owned()
                } else {
                    format!("{timeout:?} are over")
                };
                bail!("the line did not come: {why}; the probe last said: {last}");
            }
            heard = self.ear.news.wait_timeout(heard, left).expect("the listener does not panic").0;
        }
    }

    /// The probe's complaints so far ("bad ..." lines).
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let heard = self.ear.heard.lock().expect("the listener does not panic");
        heard.lines.iter().filter(|l| l.starts_with("bad ")).cloned().collect()
    }

    /// Waits until the running load has completed `more` requests from now on, and returns its counters.
    pub fn wait_progress(&self, more: u64, timeout: Duration) -> Result<Totals> {
        // Not from the beginning: an earlier load may have counted further.
        let from = self.heard_so_far();
        let first = self.wait_for(timeout, from, |l| l.starts_with("io "))?;
        let goal = parse_totals(&first)?.ops + more;
        let reached =
            |l: &str| l.starts_with("io ") && parse_totals(l).is_ok_and(|t| t.ops >= goal);
        parse_totals(&self.wait_for(timeout, from, reached)?)
    }

    /// The counters of the load as reported from line number `from` on.
    #[must_use]
    pub fn reports(&self, from: usize) -> Vec<Totals> {
        let heard = self.ear.heard.lock().expect("the listener does not panic");
        let lines = heard.lines.iter().skip(from).filter(|l| l.starts_with("io "));
        lines.filter_map(|line| parse_totals(line).ok()).collect()
    }

    /// Goes on with a probe whose serial line moved here from another QEMU: what was on its way may have lost its
    /// beginning, so everything up to the answer to a ping of our own is skipped.
    pub fn resynchronise(&mut self) -> Result<()> {
        static TOKEN: AtomicU64 = AtomicU64::new(1);
        let token = TOKEN.fetch_add(1, Ordering::Relaxed);
        let from = self.heard_so_far();
        // The first line end closes half a command of before, which is then answered as unknown.
        self.line
            .write_all(format!("\nping token={token}\n").as_bytes())
            .context("cannot write to the guest's serial line")?;
        self.wait_for(ASK_TIMEOUT, from, |line| line == format!("ok token={token}"))
            .context("the probe does not answer on its new serial line")?;
        Ok(())
    }

    /// Stops the load and returns its counters, good or bad.
    pub fn end_load(&mut self) -> Result<Totals> {
        parse_totals(&self.ask("stop")?)
    }

    /// Stops the load and returns its counters, or an error with what it found if it found anything bad.
    pub fn stop_load(&mut self) -> Result<Totals> {
        let totals = self.end_load()?;
        if totals.errs + totals.stale + totals.corrupt > 0 {
            bail!("the load found bad data: {totals}\n{}", self.complaints().join("\n"));
        }
        Ok(totals)
    }
}

/// Reads a line of counters, as [`Totals`] prints them, with or without a word before.
fn parse_totals(line: &str) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut counters = 0;
    for (name, value) in line.split_whitespace().filter_map(|w| w.split_once('=')) {
        let value =
            value.parse().with_context(|| format!("{name}={value} in '{line}' is not a number"))?;
        match name {
            "ops" => totals.ops = value,
            "writes" => totals.writes = value,
            "errs" => totals.errs = value,
            "stale" => totals.stale = value,
            "corrupt" => totals.corrupt = value,
            "max_gap_ms" => totals.max_gap_ms = value,
            _ => bail!("unknown counter {name} in '{line}'"),
        }
        counters += 1;
    }
    // The line may have been cut by a migration.
    if counters != TOTALS_COUNTERS {
        bail!("'{line}' is not a whole line of counters");
    }
    Ok(totals)
}

fn listen(from: UnixStream, log: &mut fs::File, ear: &Ear) {
    for line in BufReader::new(from).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
        // The log is for people; the test goes on without it.
        let _ = writeln!(log, "{line}");
        ear.heard.lock().expect("nobody panics with the lines").lines.push(line);
        ear.news.notify_all();
    }
    ear.heard.lock().expect("nobody panics with the lines").closed = true;
    ear.news.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_survive_the_serial_line() {
        let totals = Totals { ops: 10, writes: 4, errs: 1, stale: 2, corrupt: 3, max_gap_ms: 40 };
        assert_eq!(parse_totals(&format!("io {totals}")).unwrap(), totals);
        assert!(parse_totals("io ops=x").is_err());
        let cut = format!("io {totals}").replace(" max_gap_ms=40", "");
        assert!(parse_totals(&cut).is_err(), "{cut}");
    }
}
