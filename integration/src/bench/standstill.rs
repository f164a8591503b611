//! When the whole machine stood still: a hypervisor may take all of its processors away for milliseconds, and tells
//! nobody. A run in which it did says nothing of the programs in it.
//!
//! ```text
//!   a thread on each CPU, before all others:  sleep 0.5 ms, look at the clock, sleep 0.5 ms, ...
//!                                             woken 1 ms late or more: no ordinary program ran there meanwhile
//! ```
//!
//! Real-time priority, before every program with an ordinary one, so that none of the measured can be why it is late;
//! the kernel itself can.

use crate::bench::cpu::pin_this_thread;
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Between two looks at the clock.
const BEAT: Duration = Duration::from_micros(500);
/// Later than this is a standstill.
const LATE: Duration = Duration::from_millis(1);

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Standstills {
    seen: Arc<Mutex<Vec<(Instant, Instant)>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Standstills {
    /// Begins to watch these CPUs. An error where this process may not have the priority.
    pub fn watch(cpus: usize) -> Result<Self> {
        let mut watch = Self { seen: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        for cpu in 0..cpus {
            let (seen, stop) = (Arc::clone(&watch.seen), Arc::clone(&watch.stop));
            let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
            watch.threads.push(thread::spawn(move || {
                let prepared = pin_this_thread(cpu).and_then(|()| before_all_others());
                let goes = prepared.is_ok();
                let _ = ready.send(prepared);
                while goes && !stop.load(Ordering::Relaxed) {
                    let due = Instant::now() + BEAT;
                    thread::sleep(BEAT);
                    let woken = Instant::now();
                    if woken.duration_since(due) > LATE {
                        seen.lock().unwrap_or_else(PoisonError::into_inner).push((due, woken));
                    }
                }
            }));
            is_ready.recv().context("the watching thread has ended")??;
        }
        Ok(watch)
    }

    /// Whether any CPU stood still for a part of this time.
    #[must_use]
    pub fn any_in(&self, from: Instant, to: Instant) -> bool {
        // The thread that woke last may not have said so yet; it is before everybody, this one too.
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().any(|(begin, end)| *begin < to && *end > from)
    }
}

impl Drop for Standstills {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn before_all_others() -> Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: a system call on the calling thread, with parameters that outlive it.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("no real-time priority");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standstill_counts_where_it_overlaps() {
        let watch = Standstills { seen: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        let at = |ms| Instant::now() + Duration::from_secs(3600) + Duration::from_millis(ms);
        let zero = at(0);
        let after = |ms| zero + Duration::from_millis(ms);
        watch.seen.lock().unwrap().push((after(10), after(20)));
        assert!(watch.any_in(after(0), after(11)) && watch.any_in(after(19), after(30)));
        assert!(watch.any_in(after(12), after(13)) && watch.any_in(after(0), after(30)));
        assert!(!watch.any_in(after(0), after(10)) && !watch.any_in(after(20), after(30)));
    }

    #[test]
    fn who_watches_comes_before_all_others() {
        let policy = crate::bench::cpu::on_own_thread(|| {
            let before = before_all_others();
            // SAFETY: asks for a number.
            before.map(|()| unsafe { libc::sched_getscheduler(0) })
        });
        match policy {
            Ok(policy) => assert_eq!(policy, libc::SCHED_FIFO),
            Err(error) => assert!(error.to_string().contains("no real-time priority")),
        }
    }
}
