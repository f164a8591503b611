//! Counters of the data path. Each worker has its own, so counting shares no
//! cache line; sums are made when somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
        assert_eq!(all.len(), 9 * 13);
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
