//! What a load showed: latencies of each queue, and what was wrong.

use crate::bench::cpu::Usage;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// A latency beyond this counts as this.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Requests completed in the time measured.
    pub ios: u64,
    /// Requests that the device failed.
    pub errors: u64,
    /// Reads whose data was not what it had to be; the first few are in `findings`.
    pub bad_reads: u64,
    /// Reads whose data was checked.
    pub checked: u64,
    /// What was wrong, in words.
    pub findings: Vec<String>,
    /// Requests per second.
    pub iops: f64,
    /// From submission to completion, in us.
    pub p50_us: f64,
    /// From submission to completion, in us.
    pub p99_us: f64,
    /// From submission to completion, in us.
    pub p999_us: f64,
    /// The longest request, in us.
    pub max_us: f64,
    /// With a dirty log, the pages that were marked; all that had to be are among them.
    pub dirty_pages: Option<u64>,
    /// Each queue by itself.
    pub by_queue: Vec<QueueOutcome>,
    /// CPU time and noise meanwhile.
    pub usage: Usage,
}

/// What one queue had of a measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct QueueOutcome {
    /// Requests completed in the time measured.
    pub ios: u64,
    /// From submission to completion, in us.
    pub p50_us: f64,
    /// From submission to completion, in us.
    pub p99_us: f64,
    /// From submission to completion, in us.
    pub p999_us: f64,
    /// The longest request, in us.
    pub max_us: f64,
}

impl Outcome {
    /// CPU time per request of the process number `index` of [`Job::pids`], in us.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a count of requests of a short measurement")]
    pub fn cpu_us_per_io(&self, index: usize) -> f64 {
        self.usage.processes_s.get(index).map_or(0.0, |s| 1e6 * s / self.ios.max(1) as f64)
    }

    /// CPU time per request of all processes of [`Job::pids`] together, in us.
    #[must_use]
    pub fn cpu_us_per_io_of_all(&self) -> f64 {
        (0..self.usage.processes_s.len()).map(|index| self.cpu_us_per_io(index)).sum()
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of a short measurement")]
pub(super) fn summary(tallies: Vec<Tally>, usage: Usage) -> Outcome {
    let mut all = histogram();
    let mut outcome = Outcome::default();
    for tally in tallies {
        for latency in &tally.latency {
            all.add(latency).expect("equal histograms add");
            outcome.by_queue.push(of_queue(latency));
        }
        outcome.errors += tally.errors;
        outcome.bad_reads += tally.bad_reads;
        outcome.checked += tally.checked;
        outcome.findings.extend(tally.findings);
    }
    let QueueOutcome { ios, p50_us, p99_us, p999_us, max_us } = of_queue(&all);
    let iops = ios as f64 / usage.seconds;
    Outcome { ios, iops, p50_us, p99_us, p999_us, max_us, usage, ..outcome }
}

#[allow(clippy::cast_precision_loss, reason = "nanoseconds of a short measurement")]
fn of_queue(latency: &Histogram<u64>) -> QueueOutcome {
    let us = |quantile: f64| latency.value_at_quantile(quantile) as f64 / 1000.0;
    QueueOutcome {
        ios: latency.len(),
        p50_us: us(0.5),
        p99_us: us(0.99),
        p999_us: us(0.999),
        max_us: latency.max() as f64 / 1000.0,
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("bounds and digits are in range")
}

/// Counters of one thread.
pub(super) struct Tally {
    /// Of each of its queues.
    latency: Vec<Histogram<u64>>,
    pub(super) errors: u64,
    pub(super) bad_reads: u64,
    pub(super) checked: u64,
    findings: Vec<String>,
}

impl Tally {
    pub(super) fn new(queues: usize) -> Self {
        let latency = (0..queues).map(|_| histogram()).collect();
        Self { latency, errors: 0, bad_reads: 0, checked: 0, findings: Vec::new() }
    }

    /// A request of the queue at this place took so long.
    pub(super) fn record(&mut self, at: usize, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_MAX_NS);
        self.latency[at].saturating_record(ns.max(1));
    }

    pub(super) fn find(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < 10 {
            self.findings.push(text());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_is_by_itself_and_in_the_whole() {
        // Two threads, of two queues and of one.
        let (mut first, mut second) = (Tally::new(2), Tally::new(1));
        for us in 1..=1000 {
            first.record(0, Duration::from_micros(us));
            second.record(0, Duration::from_micros(10 * us));
        }
        first.record(1, Duration::from_secs(3600));
        second.errors = 2;
        let usage = Usage { seconds: 0.5, ..Usage::default() };
        let all = summary(vec![first, second], usage);
        assert_eq!((all.ios, all.errors), (2001, 2));
        assert!((all.iops - 4002.0).abs() < 1e-9);
        let [a, b, c] = &all.by_queue[..] else { panic!("three queues: {all:?}") };
        assert_eq!((a.ios, b.ios, c.ios), (1000, 1, 1000));
        let near = |is: f64, wanted: f64| (is / wanted - 1.0).abs() < 0.002;
        assert!(near(a.p50_us, 500.0) && near(a.p999_us, 999.0) && near(c.p50_us, 5000.0));
        assert!(near(b.max_us, 60e6) && near(all.max_us, 60e6), "as long as is counted: {b:?}");
    }
}
