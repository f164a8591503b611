//! How long the guest's requests took, in slices of 100 ms, around a handoff.
//!
//! Off, it costs one look at a flag per request. It is switched on for a time
//! and switches itself off; the slices stay until the next time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Length of a slice.
pub const SLICE: Duration = Duration::from_millis(100);
/// Slices kept of each queue: two minutes.
const SLICES_MAX: usize = 1200;
/// Buckets of a slice: four to a doubling, from 1 us to 67 s.
const BUCKETS: usize = 4 * 26 + 1;

/// A slice of one disk, all queues together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Slice {
    /// Its beginning, us of Unix time.
    pub at_unix_us: u64,
    /// Requests that ended in it.
    pub ops: u64,
    /// Half of them took no longer, us; the upper end of a bucket 19 % wide.
    pub p50_us: u64,
    /// 99 in 100 took no longer, us.
    pub p99_us: u64,
    /// The longest, us.
    pub max_us: u64,
}

#[derive(Clone, Debug)]
struct Counts {
    /// Slices since `started`.
    number: u64,
    max_us: u64,
    buckets: [u32; BUCKETS],
}

/// The slices of one disk.
#[derive(Debug)]
pub struct Latency {
    started: Instant,
    started_unix_us: u64,
    /// Microseconds after `started` until which requests are timed.
    until_us: AtomicU64,
    queues: Box<[Mutex<Vec<Counts>>]>,
}

impl Latency {
    /// Of a disk with `queues` queues; off.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            started: Instant::now(),
            started_unix_us: micros(unix),
            until_us: AtomicU64::new(0),
            queues: (0..queues).map(|_| Mutex::default()).collect(),
        }
    }

    /// Times requests for so long from now, or longer if it was asked to before.
    pub fn watch(&self, time: Duration) {
        let until = micros(self.started.elapsed().saturating_add(time));
        self.until_us.fetch_max(until, Ordering::Relaxed);
    }

    /// When a request begins; `None` while nobody watches.
    #[must_use]
    pub fn begin(&self) -> Option<Instant> {
        let until = self.until_us.load(Ordering::Relaxed);
        if until == 0 {
            return None;
        }
        let now = Instant::now();
        if micros(now.duration_since(self.started)) > until {
            // Over. A watch that begins in this moment is not undone.
            let _ = self.until_us.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
            return None;
        }
        Some(now)
    }

    /// A request of `queue` that began at `begun` ends now.
    pub fn end(&self, queue: u16, begun: Instant) {
        let now = Instant::now();
        let took_us = micros(now.duration_since(begun));
        let number = micros(now.duration_since(self.started)) / micros(SLICE);
        let Some(queue) = self.queues.get(usize::from(queue)) else { return };
        let mut slices = queue.lock().expect("no panic while held");
        if slices.last().is_none_or(|last| last.number != number) {
            if slices.len() >= SLICES_MAX {
                // The oldest half goes at once, so that this is rare.
                slices.drain(..SLICES_MAX / 2);
            }
            slices.push(Counts { number, max_us: 0, buckets: [0; BUCKETS] });
        }
        if let Some(counts) = slices.last_mut() {
            counts.max_us = counts.max_us.max(took_us);
            counts.buckets[bucket(took_us)] += 1;
        }
    }

    /// All slices with requests in them, oldest first.
    #[must_use]
    pub fn slices(&self) -> Vec<Slice> {
        let mut all: Vec<Counts> = Vec::new();
        for queue in &self.queues {
            let slices = queue.lock().expect("no panic while held").clone();
            for counts in slices {
                match all.binary_search_by_key(&counts.number, |other| other.number) {
                    Ok(at) => all[at].add(&counts),
                    Err(at) => all.insert(at, counts),
                }
            }
        }
        let at = |number: u64| self.started_unix_us + number * micros(SLICE);
        all.iter().map(|counts| counts.summary(at(counts.number))).collect()
    }
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.max_us = self.max_us.max(other.max_us);
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    fn summary(&self, at_unix_us: u64) -> Slice {
        let ops: u64 = self.buckets.iter().map(|n| u64::from(*n)).sum();
        let below = |share: u64| {
            let wanted = (ops * share).div_ceil(100);
            let mut seen = 0;
            let found = self.buckets.iter().position(|n| {
                seen += u64::from(*n);
                seen >= wanted
            });
            found.map_or(0, upper_us).min(self.max_us)
        };
        Slice { at_unix_us, ops, p50_us: below(50), p99_us: below(99), max_us: self.max_us }
    }
}

/// Bucket of a time: the octave, and which quarter of it.
fn bucket(us: u64) -> usize {
    let us = us.max(1);
    let octave = us.ilog2();
    let quarter = if octave >= 2 { us >> (octave - 2) & 3 } else { us << (2 - octave) & 3 };
    let place = 4 * u64::from(octave) + quarter;
    usize::try_from(place).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The longest time that falls into a bucket, us.
fn upper_us(bucket: usize) -> u64 {
    let (octave, quarter) = (bucket / 4, bucket as u64 % 4);
    let next = (5 + quarter) << octave;
    (next.div_ceil(4)).saturating_sub(1).max(1)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_timed_until_somebody_watches_and_after_the_time_is_over() {
        let latency = Latency::new(2);
        assert_eq!(latency.begin(), None);
        latency.watch(Duration::from_secs(60));
        let begun = latency.begin().expect("watched");
        latency.end(1, begun);
        latency.end(7, begun);
        assert_eq!(latency.slices().iter().map(|slice| slice.ops).sum::<u64>(), 1);
        let over = Latency::new(1);
        over.watch(Duration::ZERO);
        while over.begin().is_some() {}
        assert_eq!(over.until_us.load(Ordering::Relaxed), 0, "off again by itself");
    }

    #[test]
    fn a_time_falls_into_a_bucket_that_is_at_most_a_quarter_too_long() {
        let mut last = 0;
        for us in (1..5000).chain([1 << 20, 60_000_000]) {
            let at = bucket(us);
            assert!(at >= last, "{us}");
            last = at;
            let upper = upper_us(at);
            assert!(upper >= us && upper <= us + us / 4 + 1, "{us}: {upper}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn queues_are_added_up_and_the_percentiles_are_of_all() {
        let mut counts = Counts { number: 3, max_us: 0, buckets: [0; BUCKETS] };
        for us in [10, 10, 10, 1000] {
            counts.max_us = counts.max_us.max(us);
            counts.buckets[bucket(us)] += 1;
        }
        let twice = {
            let mut twice = counts.clone();
            twice.add(&counts);
            twice
        };
        let Slice { ops, p50_us, p99_us, max_us, .. } = twice.summary(0);
        assert_eq!((ops, max_us, p99_us), (8, 1000, 1000));
        assert!((10..13).contains(&p50_us), "{p50_us}");
    }

    #[test]
    fn the_memory_is_bounded() {
        let latency = Latency::new(1);
        latency.watch(Duration::from_secs(60));
        let begun = latency.begin().expect("watched");
        latency.end(0, begun);
        {
            let mut slices = latency.queues[0].lock().expect("free");
            let one = slices[0].clone();
            *slices = (0..SLICES_MAX as u64)
                .map(|n| Counts { number: 1 << 40 | n, ..one.clone() })
                .collect();
        }
        latency.end(0, begun);
        assert!(latency.queues[0].lock().expect("free").len() <= SLICES_MAX);
    }
}
