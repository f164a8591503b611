//! How evenly a disk's queues are served while all of them are full.
//!
//! Backends that serve a ring until it is empty let the others wait: the median stays short, and one request in a
//! thousand takes a hundred times as long. One thread of the front-end serves all queues in turn, so it is not its doing.

use crate::bench::compare::{pinned_stack, quiet};
use crate::bench::cpu::{hold_cpus_awake, on_own_thread, pin_this_thread};
use crate::bench::load::{Job, Pattern};
use crate::bench::outcome::{Outcome, QueueOutcome};
use crate::bench::stack::{Kind, Stack};
use crate::bench::stats::Spread;
use crate::bench::targets::Target;
use anyhow::{Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::Duration;

/// Of the worst queue, between its median and what one request in a thousand exceeds.
pub const TAIL: Target = Target::AtMost(10.0);
/// Requests of the queue that had the fewest, of the mean of all queues.
pub const SHARE: Target = Target::AtLeast(0.8);

const QUEUES: u16 = 4;
const DEPTH: u16 = 32;

/// All that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Fair {
    /// What serves the disk.
    pub kind: Kind,
    /// Whether idle CPUs were kept awake.
    pub awake: bool,
    /// Whether front-end and stack had a CPU each.
    pub pinned: bool,
    /// Each round's run of random reads.
    pub reads: Vec<Outcome>,
    /// Each round's run of random writes.
    pub writes: Vec<Outcome>,
}

/// Starts the stack anew in each round, and fills all its queues.
pub fn measure(
    kind: Kind,
    rounds: u32,
    time: Duration,
    bytes: u64,
    progress: impl FnMut(&str) + Send,
) -> Result<Fair> {
    on_own_thread(|| measure_here(kind, rounds, time, bytes, progress))
}

fn measure_here(
    kind: Kind,
    rounds: u32,
    time: Duration,
    bytes: u64,
    mut progress: impl FnMut(&str),
) -> Result<Fair> {
    if rounds == 0 {
        bail!("nothing to measure: --rounds must be at least 1");
    }
    let awake = hold_cpus_awake();
    let pinned = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    if pinned {
        pin_this_thread(0)?;
    }
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        progress(&format!("round {} of {rounds}", round + 1));
        let stack = pinned_stack(kind, bytes, pinned, None)?;
        reads.push(full(&stack, Pattern::RandRead, time, round)?);
        writes.push(full(&stack, Pattern::RandWrite, time, round)?);
    }
    Ok(Fair { kind, awake: awake.is_some(), pinned, reads, writes })
}

fn full(stack: &Stack, pattern: Pattern, time: Duration, round: u32) -> Result<Outcome> {
    let single = Job::single(stack.socket(), stack.pids(), pattern, time);
    quiet(&Job { depth: DEPTH, queues: QUEUES, seed: u64::from(round) + 1, ..single })
}

/// The worst queue's p99.9 in its medians. Infinite when a queue completed nothing: it waits still.
#[must_use]
pub fn tail(queues: &[QueueOutcome]) -> f64 {
    let of = |queue: &QueueOutcome| {
        if queue.ios == 0 { f64::INFINITY } else { queue.p999_us / queue.p50_us }
    };
    queues.iter().map(of).fold(0.0, f64::max)
}

/// Requests of the queue that had the fewest, as a part of the mean; NaN when no queue had any.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "counts of a short measurement")]
pub fn smallest_share(queues: &[QueueOutcome]) -> f64 {
    let all: u64 = queues.iter().map(|queue| queue.ios).sum();
    let fewest = queues.iter().map(|queue| queue.ios).min().unwrap_or(0);
    fewest as f64 * queues.len() as f64 / all as f64
}

/// For people, and for docs/performance.md.
#[must_use]
pub fn table(fair: &Fair) -> String {
    let mut text = format!(
        "{}: {QUEUES} queues, {DEPTH} requests of 4 KiB in flight on each, {} rounds; {}. Median [lowest and highest round].\n\n\
         | work | p99.9 / p50 of the worst queue | fewest requests of a queue, of the mean | p50, us | longest request, ms | noisy rounds |\n\
         |---|---|---|---|---|---|\n",
        fair.kind,
        fair.reads.len(),
        if fair.pinned { "front-end on CPU 0, stack on CPU 1" } else { "unpinned" },
    );
    for (name, outcomes) in [("random reads", &fair.reads), ("random writes", &fair.writes)] {
        let spread = |figure: &dyn Fn(&Outcome) -> f64| {
            let figures: Vec<(u32, f64)> = (0..).zip(outcomes.iter().map(figure)).collect();
            Spread::of(&figures)
        };
        let judged = |target: Target, figure: Spread| {
            format!("{}; {target}: {}", figure.text(2), target.judge(figure))
        };
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} of {} |",
            judged(TAIL, spread(&|o| tail(&o.by_queue))),
            judged(SHARE, spread(&|o| smallest_share(&o.by_queue))),
            spread(&|o| o.p50_us).text(0),
            spread(&|o| o.max_us / 1000.0).text(1),
            outcomes.iter().filter(|o| o.usage.is_noisy()).count(),
            outcomes.len(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(ios: u64, p50_us: f64, p999_us: f64) -> QueueOutcome {
        QueueOutcome { ios, p50_us, p999_us, ..QueueOutcome::default() }
    }

    #[test]
    fn the_worst_queue_counts() {
        let queues = [queue(100, 10.0, 20.0), queue(60, 10.0, 90.0), queue(140, 100.0, 400.0)];
        assert!((tail(&queues) - 9.0).abs() < 1e-9);
        assert!((smallest_share(&queues) - 0.6).abs() < 1e-9);
    }

    #[test]
    fn a_queue_that_was_never_served_is_the_worst_of_all() {
        let queues = [queue(100, 10.0, 20.0), queue(0, 0.0, 0.0)];
        assert!(tail(&queues).is_infinite());
        assert!(smallest_share(&queues).abs() < 1e-9);
        assert!(smallest_share(&[]).is_nan(), "nothing was measured");
    }

    #[test]
    fn reads_and_writes_are_judged_apart() {
        let outcome = |ios| Outcome {
            p50_us: 10.0,
            max_us: 1500.0,
            by_queue: vec![queue(100, 10.0, 50.0), queue(ios, 10.0, 20.0)],
            ..Outcome::default()
        };
        let fair = Fair {
            kind: Kind::Baton,
            awake: true,
            pinned: true,
            reads: vec![outcome(100)],
            writes: vec![outcome(40)],
        };
        let text = table(&fair);
        let line = |name: &str| text.lines().find(|l| l.contains(name)).unwrap().to_owned();
        assert!(line("random reads").contains("5.00 [5.00 5.00]; at most 10: met"), "{text}");
        assert!(line("random reads").contains("1.00 [1.00 1.00]; at least 0.8: met"), "{text}");
        assert!(
            line("random writes").contains("0.57 [0.57 0.57]; at least 0.8: **missed**"),
            "{text}"
        );
        assert!(line("random writes").contains("| 1.5 [1.5 1.5] |"), "{text}");
    }
}
