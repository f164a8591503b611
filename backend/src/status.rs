//! What a disk is doing, kept where somebody may look who must not disturb it.
//!
//! A queue's thread stores one number per round of its loop, on a cache line
//! of its own; the rest is written by the front-end's thread, message by
//! message.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use crate::latency::Latency;

/// The rings of a disk, as the front-end that is (or was last) connected left
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingsStatus {
    /// Rings from which requests are taken.
    pub running: usize,
    /// A dirty log is kept: a migration runs.
    pub logging: bool,
    /// On this connection all rings were stopped while a dirty log was kept,
    /// each stop is answered (or is in this moment), and no request was given
    /// up. False again once a ring runs or when an answer could not be sent.
    pub drained: bool,
}

/// One number on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Gauge(AtomicUsize);

/// What a disk is doing.
#[derive(Debug)]
pub struct DiskStatus {
    rings: Mutex<RingsStatus>,
    /// Process of the front-end that is connected; 0: none, or none that this process can see.
    front_end: AtomicI32,
    in_flight: Box<[Gauge]>,
    /// How long requests take, while somebody watches.
    pub latency: Latency,
}

impl DiskStatus {
    /// Of a disk with `queues` queues to which nobody is connected.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        Self {
            rings: Mutex::default(),
            front_end: AtomicI32::new(0),
            in_flight: (0..queues).map(|_| Gauge::default()).collect(),
            latency: Latency::new(queues),
        }
    }

    /// Queues the disk has.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.in_flight.len()
    }

    /// The rings.
    #[must_use]
    pub fn rings(&self) -> RingsStatus {
        *self.rings.lock().expect("no panic while held")
    }

    /// Process that made the connection of the front-end, while it stands.
    #[must_use]
    pub fn front_end(&self) -> Option<i32> {
        Some(self.front_end.load(Ordering::Relaxed)).filter(|pid| *pid > 0)
    }

    pub(crate) fn set_front_end(&self, pid: Option<i32>) {
        self.front_end.store(pid.unwrap_or(0), Ordering::Relaxed);
    }

    /// Requests that the storage has not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().map(|gauge| gauge.0.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn set_rings(&self, rings: RingsStatus) {
        *self.rings.lock().expect("no panic while held") = rings;
    }

    pub(crate) fn set_in_flight(&self, queue: u16, requests: usize) {
        self.in_flight[usize::from(queue)].0.store(requests, Ordering::Relaxed);
    }
}
