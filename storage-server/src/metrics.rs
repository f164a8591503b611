//! Counters of the data path. Each worker has its own, so counting shares no
//! cache line; sums are made when somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_protocol::{Opcode, Status};

/// Opcodes are numbered from 1.
const OPCODES: usize = 13;
const STATUSES: usize = 14;

/// Upper bounds of the flush histogram's buckets, microseconds.
pub const FLUSH_BUCKETS_US: [u64; 12] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000, 5_000_000];

/// What one worker counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerMetrics {
    answers: [[AtomicU64; STATUSES]; OPCODES],
    /// Payload bytes of READ answers.
    pub read_bytes: AtomicU64,
    /// Payload bytes of WRITEs that were run.
    pub written_bytes: AtomicU64,
    /// Reads that were sent from the page cache without a copy in between.
    pub mapped_reads: AtomicU64,
    /// Writes that went from the socket to the file without a copy in between.
    pub piped_writes: AtomicU64,
    /// Reads that had to wait for the disk.
    pub cold_reads: AtomicU64,
    /// Connections closed because the peer broke the protocol.
    pub violations: AtomicU64,
    /// Connections now.
    pub connections: AtomicU64,
    /// Requests handed to another thread or the kernel and not answered yet.
    pub inflight: AtomicU64,
}

/// Adds to a counter that only its own worker writes.
pub fn add(counter: &AtomicU64, n: u64) {
    // Not fetch_add: one writer, so no locked instruction is needed.
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Takes from a gauge that only its own worker writes.
pub fn sub(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_sub(n), Ordering::Relaxed);
}

impl WorkerMetrics {
    /// Counts an answer.
    pub fn answered(&self, opcode: Opcode, status: Status) {
        add(&self.answers[opcode as usize][status as usize], 1);
    }
}

/// What the flusher counts.
#[derive(Debug, Default)]
pub struct FlushMetrics {
    buckets: [AtomicU64; FLUSH_BUCKETS_US.len()],
    /// Syncs done.
    pub syncs: AtomicU64,
    /// FLUSH requests they answered.
    pub requests: AtomicU64,
    /// Time they took together, microseconds.
    pub total_us: AtomicU64,
}

impl FlushMetrics {
    /// Counts one sync that answered `requests` FLUSHes.
    pub fn synced(&self, took: Duration, requests: usize) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(at) = FLUSH_BUCKETS_US.iter().position(|bound| us <= *bound) {
            add(&self.buckets[at], 1);
        }
        add(&self.syncs, 1);
        add(&self.requests, requests as u64);
        add(&self.total_us, us);
    }

    /// Syncs that took at most the bound of each bucket.
    #[must_use]
    pub fn cumulative(&self) -> [u64; FLUSH_BUCKETS_US.len()] {
        let mut sum = 0;
        std::array::from_fn(|at| {
            sum += self.buckets[at].load(Ordering::Relaxed);
            sum
        })
    }
}

/// What may be asked of an access record. Numbers are places in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names of the record's inputs")]
pub enum AccessStep {
    Claim,
    Rejoin,
    Release,
    Fence,
    Arm,
    Seal,
    Sealed,
    Activate,
    Reclaim,
    Abdicate,
    Open,
    Unfreeze,
    Settle,
    Disarm,
}

impl AccessStep {
    const ALL: [Self; 14] = [
        Self::Claim,
        Self::Rejoin,
        Self::Release,
        Self::Fence,
        Self::Arm,
        Self::Seal,
        Self::Sealed,
        Self::Activate,
        Self::Reclaim,
        Self::Abdicate,
        Self::Open,
        Self::Unfreeze,
        Self::Settle,
        Self::Disarm,
    ];

    /// As people and programs read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Rejoin => "rejoin",
            Self::Release => "release",
            Self::Fence => "fence",
            Self::Arm => "arm",
            Self::Seal => "seal",
            Self::Sealed => "sealed",
            Self::Activate => "activate",
            Self::Reclaim => "reclaim",
            Self::Abdicate => "abdicate",
            Self::Open => "open",
            Self::Unfreeze => "unfreeze",
            Self::Settle => "settle",
            Self::Disarm => "disarm",
        }
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepResult {
    /// The record changed.
    Changed,
    /// It was so already.
    Same,
    /// The record says no.
    Refused,
}

impl StepResult {
    const ALL: [Self; 3] = [Self::Changed, Self::Same, Self::Refused];

    /// As people and programs read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Same => "same",
            Self::Refused => "refused",
        }
    }
}

/// What is asked of access records, and how often they are stored.
#[derive(Debug, Default)]
pub struct AccessMetrics {
    steps: [[AtomicU64; StepResult::ALL.len()]; AccessStep::ALL.len()],
    /// Records made durable before anybody was told.
    pub stored_first: AtomicU64,
    /// Transactions in the background, each with what had gathered.
    pub stored_later: AtomicU64,
    /// Time that changes waited for their record to be durable, microseconds.
    pub storing_us: AtomicU64,
    /// Time that changes waited for requests inside the gate, microseconds.
    pub draining_us: AtomicU64,
}

impl AccessMetrics {
    /// Counts what a change waited, for the disk or for requests inside.
    pub(crate) fn waited(total: &AtomicU64, since: Instant) {
        let us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        total.fetch_add(us, Ordering::Relaxed);
    }

    pub(crate) fn stepped(&self, step: AccessStep, result: StepResult) {
        self.steps[step as usize][result as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stored_first(&self) {
        self.stored_first.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stored_later(&self) {
        self.stored_later.fetch_add(1, Ordering::Relaxed);
    }

    /// All counts that are not zero.
    #[must_use]
    pub fn steps(&self) -> Vec<(AccessStep, StepResult, u64)> {
        let mut out = Vec::new();
        for step in AccessStep::ALL {
            for result in StepResult::ALL {
                let count = self.steps[step as usize][result as usize].load(Ordering::Relaxed);
                if count != 0 {
                    out.push((step, result, count));
                }
            }
        }
        out
    }
}

/// What the listeners and the handshake count.
#[derive(Debug, Default)]
pub struct AcceptMetrics {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections welcomed.
    pub welcomed: AtomicU64,
    /// HELLOs refused with a reply.
    pub refused: AtomicU64,
    /// Connections that said nothing sensible in time.
    pub silent: AtomicU64,
}

/// Answers by opcode and status, summed over workers; zeros are left out.
#[must_use]
pub fn answers<'a>(workers: impl Iterator<Item = &'a WorkerMetrics>) -> Vec<(Opcode, Status, u64)> {
    let mut sums = [[0u64; STATUSES]; OPCODES];
    for worker in workers {
        for (row, counts) in sums.iter_mut().zip(&worker.answers) {
            for (sum, count) in row.iter_mut().zip(counts) {
                *sum += count.load(Ordering::Relaxed);
            }
        }
    }
    let mut out = Vec::new();
    for (opcode, row) in (0u8..).zip(&sums) {
        for (status, count) in (0u16..).zip(row) {
            let named = Opcode::from_number(opcode).zip(Status::from_number(status));
            if let Some((opcode, status)) = named.filter(|_| *count != 0) {
                out.push((opcode, status, *count));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_and_status_has_a_counter() {
        let metrics = WorkerMetrics::default();
        for opcode in (0u8..=255).filter_map(Opcode::from_number) {
            for status in (0u16..100).filter_map(Status::from_number) {
                metrics.answered(opcode, status);
            }
        }
        let all = answers(std::iter::once(&metrics));
        assert_eq!(all.len(), 12 * 14);
        assert!(all.iter().all(|(_, _, count)| *count == 1));
    }

    #[test]
    fn every_step_and_result_has_a_counter_of_its_own() {
        let metrics = AccessMetrics::default();
        for step in AccessStep::ALL {
            for result in StepResult::ALL {
                metrics.stepped(step, result);
            }
        }
        let all = metrics.steps();
        assert_eq!(all.len(), 14 * 3);
        assert!(all.iter().all(|(_, _, count)| *count == 1));
    }

    #[test]
    fn buckets_are_cumulative() {
        let flush = FlushMetrics::default();
        flush.synced(Duration::from_micros(60), 2);
        flush.synced(Duration::from_micros(100), 1);
        flush.synced(Duration::from_secs(60), 1);
        assert_eq!(flush.cumulative()[..3], [0, 2, 2]);
        assert_eq!(flush.cumulative().last(), Some(&2));
        assert_eq!(flush.syncs.load(Ordering::Relaxed), 3);
        assert_eq!(flush.requests.load(Ordering::Relaxed), 4);
    }
}
