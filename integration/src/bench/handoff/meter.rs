//! What else happened in the times that are measured: who used the processors, and whether these ran at all.

use crate::bench::cpu::Snapshot;
use crate::bench::programs::Programs;
use crate::bench::standstill::Standstills;
use anyhow::Result;
use std::time::{Duration, Instant};

/// More than this of the processors for other programs, and a run is made again.
const DISTURBED: Duration = Duration::from_millis(1);

/// Over the times of one run.
pub(super) struct Meter<'a> {
    watch: Option<&'a Standstills>,
    /// CPU time of the measured, in microseconds.
    used_us: f64,
    others: Duration,
    stood_still: bool,
}

impl<'a> Meter<'a> {
    pub(super) fn new(watch: Option<&'a Standstills>) -> Self {
        Self { watch, used_us: 0.0, others: Duration::ZERO, stood_still: false }
    }

    /// Does something measured, in which these processes and this one take part.
    pub(super) fn during<T>(&mut self, pids: &[u32], work: impl FnOnce() -> T) -> Result<T> {
        let programs = Programs::look()?;
        let before = Snapshot::take(pids)?;
        let from = Instant::now();
        let done = work();
        self.stood_still |= self.watch.is_some_and(|watch| watch.any_in(from, Instant::now()));
        let used = Snapshot::take(pids)?.since(&before);
        let ours = [pids, &[std::process::id()]].concat();
        self.others += Programs::look()?.others_since(&programs, &ours);
        self.used_us += used.processes_s.iter().sum::<f64>() * 1e6;
        Ok(done)
    }

    /// CPU time of the processes that were named, since the last call; in microseconds.
    pub(super) fn take_used_us(&mut self) -> f64 {
        std::mem::take(&mut self.used_us)
    }

    /// Whether other programs had so much of the processors that the run says little.
    pub(super) fn is_disturbed(&self) -> bool {
        self.others > DISTURBED
    }

    /// Whether no CPU stood still. False where nobody may watch that.
    pub(super) fn ran_all_the_time(&self) -> bool {
        self.watch.is_some() && !self.stood_still
    }
}
