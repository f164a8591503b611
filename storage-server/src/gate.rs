//! The admission gate of one volume: no request of an old epoch is inside once
//! [`Gate::close`] has returned (`docs/wire.md`, fencing).
//!
//! ```text
//!   admit                              close
//!   1 inflight[slot] += 1   (RMW)      1 words = CLOSED
//!   2 look at the word                 2 inflight[slot] += 0   (RMW), each slot
//!   3 no match: inflight -= 1, refuse  3 wait until every slot was seen at zero
//! ```
//!
//! Why no request slips through: the two read-modify-writes of a slot have an
//! order. If the admission's comes first, close sees it and waits. If close's
//! comes first, the admission reads what close wrote and by that synchronizes
//! with it, so it sees the closed word. That is the store-load order which the
//! textbook version gets from two SeqCst fences; here the admission, which runs
//! for every batch of requests, pays for one locked instruction and no fence.
//! The loom tests prove it, and prove that they would see a mistake.
//!
//! [`Gate::try_close`] is steps 1 and 2 without the wait: when each slot was seen
//! at zero, the argument above holds and the close is done; when not, the gate is
//! closed already, and a close does the waiting.
//!
//! Two words, because the owner gives the volume back without a new epoch while
//! read-only sessions of that epoch go on.
//!
//! Does not know sessions, the record or why an epoch ends.

use std::marker::PhantomData;
use std::ops::Deref;
use std::time::Duration;

use baton_protocol::Epoch;

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, atomic};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, atomic};

use atomic::{AtomicU64, AtomicUsize, Ordering};

/// No request carries it: [`Gate::admit`] refuses it whatever the word says.
const CLOSED: u64 = u64::MAX;

/// How often a close that has to wait says so.
const SLOW_CLOSE: Duration = Duration::from_secs(5);

/// Who asks to be admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// A session that owns the volume.
    Owner,
    /// A read-only session.
    Reader,
}

/// The order of steps, as a type, so that the tests can break it.
pub trait Rules {
    /// Look at the word before being counted. Wrong: a close may come between.
    const CHECK_FIRST: bool = false;
    /// Look at the slots without a read-modify-write. Wrong: may see old zeros.
    const PLAIN_LOOK: bool = false;
}

/// The right order.
#[derive(Debug)]
pub struct Real;
impl Rules for Real {}

/// Keeps neighbours off each other's cache lines (two lines: the prefetcher
/// takes pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Padded<T>(T);

/// The gate of one volume. Closed when new.
#[derive(Debug)]
pub struct Gate<R: Rules = Real> {
    owner: AtomicU64,
    reader: AtomicU64,
    /// Requests inside, one counter for each thread that admits.
    inflight: Box<[Padded<AtomicUsize>]>,
    /// Closers that wait; guards look at it when they bring a slot to zero.
    waiting: AtomicUsize,
    parked: Mutex<()>,
    drained: Condvar,
    rules: PhantomData<R>,
}

/// A request, or a batch of requests of one epoch, is inside while this lives.
#[derive(Debug)]
pub struct Pass<G: Deref<Target = Gate<R>>, R: Rules = Real> {
    gate: G,
    slot: usize,
}

impl<R: Rules> Gate<R> {
    /// A closed gate with a counter for each of `slots` threads.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            owner: AtomicU64::new(CLOSED),
            reader: AtomicU64::new(CLOSED),
            inflight: (0..slots.max(1)).map(|_| Padded(AtomicUsize::new(0))).collect(),
            waiting: AtomicUsize::new(0),
            parked: Mutex::new(()),
            drained: Condvar::new(),
            rules: PhantomData,
        }
    }

    /// Lets a request of `epoch` in, or refuses it. `slot` is the calling
    /// thread's number (any number works; threads that share one are slower).
    pub fn admit<G: Deref<Target = Self>>(
        gate: G,
        slot: usize,
        principal: Principal,
        epoch: Epoch,
    ) -> Option<Pass<G, R>> {
        let slot = slot % gate.inflight.len();
        // `BATON_NO_EPOCH_CHECK=1` (build.rs) makes the control that a fencing test must
        // see fail: a server that lets everybody in.
        let opens = |gate: &Self| {
            cfg!(baton_no_epoch_check) || epoch.0 != CLOSED && gate.word(principal) == epoch.0
        };
        if R::CHECK_FIRST {
            let open = opens(&gate);
            gate.inflight[slot].0.fetch_add(1, Ordering::AcqRel);
            let pass = Pass { gate, slot };
            return open.then_some(pass);
        }
        gate.inflight[slot].0.fetch_add(1, Ordering::AcqRel);
        // From here the pass counts; dropping it takes the count back.
        let pass = Pass { gate, slot };
        opens(&pass.gate).then_some(pass)
    }

    /// Closes admission. Says whether nothing is inside, so that a
    /// [`Gate::close`] would return at once; if not, the gate is closed and that
    /// wait is still to be done.
    pub fn try_close(&self) -> bool {
        self.shut();
        self.inflight.iter().all(|slot| self.look(&slot.0) == 0)
    }

    /// Closes admission and waits until everything admitted is done. Blocks as
    /// long as that takes: it never returns early. `slow` is told every five
    /// seconds how many requests are still inside.
    pub fn close(&self, mut slow: impl FnMut(usize)) {
        self.shut();
        let mut parked = self.parked.lock().unwrap_or_else(|e| e.into_inner());
        self.waiting.fetch_add(1, Ordering::AcqRel);
        for slot in &self.inflight {
            // Zero once is enough: whoever comes later is refused.
            while self.look(&slot.0) != 0 {
                let (guard, timed_out) = wait(&self.drained, parked);
                parked = guard;
                if timed_out {
                    slow(self.inside());
                }
            }
        }
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        drop(parked);
    }

    fn shut(&self) {
        self.owner.store(CLOSED, Ordering::Release);
        self.reader.store(CLOSED, Ordering::Release);
    }

    /// Opens the gate for exactly these epochs. Only after [`Gate::close`], by
    /// whoever serializes changes of the volume's access record.
    pub fn open(&self, owner: Option<Epoch>, reader: Option<Epoch>) {
        self.owner.store(owner.map_or(CLOSED, |epoch| epoch.0), Ordering::Release);
        self.reader.store(reader.map_or(CLOSED, |epoch| epoch.0), Ordering::Release);
    }

    /// Requests, or batches of them, that are inside now.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.inflight.iter().map(|slot| slot.0.load(Ordering::Relaxed)).sum()
    }

    fn word(&self, principal: Principal) -> u64 {
        match principal {
            Principal::Owner => self.owner.load(Ordering::Acquire),
            Principal::Reader => self.reader.load(Ordering::Acquire),
        }
    }

    fn look(&self, slot: &AtomicUsize) -> usize {
        if R::PLAIN_LOOK {
            return slot.load(Ordering::Acquire);
        }
        slot.fetch_add(0, Ordering::AcqRel)
    }
}

impl<G: Deref<Target = Gate<R>>, R: Rules> Pass<G, R> {
    /// Another pass for the same admission, for work that goes on elsewhere.
    pub fn share<H: Deref<Target = Gate<R>>>(&self, gate: H) -> Pass<H, R> {
        debug_assert!(std::ptr::eq(&raw const *gate, &raw const *self.gate), "the same gate");
        // No check: while we are inside, no close has returned.
        gate.inflight[self.slot].0.fetch_add(1, Ordering::AcqRel);
        Pass { gate, slot: self.slot }
    }
}

impl<G: Deref<Target = Gate<R>>, R: Rules> Drop for Pass<G, R> {
    fn drop(&mut self) {
        let gate = &*self.gate;
        let before = gate.inflight[self.slot].0.fetch_sub(1, Ordering::AcqRel);
        // Same argument as above: a closer that saw us did its RMW before ours,
        // so we see that it waits.
        if before == 1 && gate.waiting.load(Ordering::Acquire) != 0 {
            drop(gate.parked.lock().unwrap_or_else(|e| e.into_inner()));
            gate.drained.notify_all();
        }
    }
}

#[cfg(not(loom))]
fn wait<'a>(
    condvar: &Condvar,
    guard: std::sync::MutexGuard<'a, ()>,
) -> (std::sync::MutexGuard<'a, ()>, bool) {
    let (guard, timeout) =
        condvar.wait_timeout(guard, SLOW_CLOSE).unwrap_or_else(|e| e.into_inner());
    (guard, timeout.timed_out())
}

#[cfg(loom)]
fn wait<'a>(
    condvar: &Condvar,
    guard: loom::sync::MutexGuard<'a, ()>,
) -> (loom::sync::MutexGuard<'a, ()>, bool) {
    // A model has no clock: a wake-up that is lost is a deadlock, and found.
    let _ = SLOW_CLOSE;
    (condvar.wait(guard).unwrap_or_else(|e| e.into_inner()), false)
}

#[cfg(test)]
mod tests;
