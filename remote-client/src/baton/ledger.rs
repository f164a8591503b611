//! What the storage acknowledged, how much of it a FLUSH has covered, and whether
//! a power loss at the server took the rest.
//!
//! ```text
//!   queue 0: Account -- count --+
//!   queue 1: Account -- count --+--> Ledger { covered, losses, told, newest generation }
//!   control: Account -- 0 ------+
//! ```
//!
//! A count is the number of changes whose answer the queue took in. Only its own
//! queue writes it. The sum over all queues is a position in the volume's history:
//! a FLUSH remembers the sum at its submission, and its success raises `covered`
//! to it. When a WELCOME names a higher durability generation and the sum is above
//! `covered`, acknowledged changes may be gone: a loss. Pure but for the memory
//! that queues share; does not know connections, requests or logs.
//!
//! # Why a FLUSH that succeeds does not lie
//!
//! Say change W was answered by the server before its power loss, no FLUSH made it
//! durable, and then FLUSH F, submitted after the guest saw W complete, is answered
//! with success. The guest must see F, or a FLUSH between the loss and F, fail.
//!
//! 1. F was answered after the loss, so on a connection that was welcomed under the
//!    new generation: F's queue called [`Account::welcomed`] before. Some queue was
//!    the first to do so, and judged the sum (the *first look*).
//! 2. W's queue stored its count before the guest saw W complete. If the first look
//!    saw that count, the sum was above `covered`: no successful FLUSH has W in its
//!    sum. (Counts only grow, and who reads `covered` reads counts at least as new
//!    as those in the sum it holds. So an equal sum means equal counts.) A loss.
//! 3. If it did not, W's answer was still in the old connection's buffer, or its
//!    count on its way between processors. Then W's queue has not been welcomed
//!    since: it *straggles*. For each straggler the first look noted the count it
//!    saw. Whatever a straggler counts beyond that came from before the loss:
//!    - the straggler finds it at its own WELCOME, or when it is closed;
//!    - F finds it when it is answered, if that comes first: F's queue saw W, as the
//!      guest submitted F after it saw W complete.
//! 4. A loss found by 2 or 3 is found before F is answered, and F's verdict looks at
//!    `losses` last. F fails if it was submitted before the loss was found, or if no
//!    other FLUSH has failed since then.
//!
//! The reverse is not exact, on purpose: if a queue takes in the answer of a FLUSH
//! from before the power loss only after another queue was welcomed by the server's
//! next life, the covered changes count as lost. That takes a thread that slept
//! through a reboot of the server. A guest told in vain is better than one not told.
//!
//! A lower generation than the newest is an old connection's late WELCOME, or files
//! put back from a copy; either way nothing answered there can be trusted, so that
//! queue straggles until it hears the newest. Zero says nothing and changes nothing.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::volume::IoError;

/// Changes whose answers one queue took in. Aligned to two cache lines, which
/// processors fetch in pairs, so that no queue slows another down.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Count(AtomicU64);

impl Count {
    /// Relaxed: what makes a change visible to a later FLUSH is the guest, which
    /// saw the one complete before it submitted the other.
    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Row {
    count: Arc<Count>,
    /// `Some` while the queue straggles: the count as far as losses were judged.
    judged: Option<u64>,
}

impl Row {
    /// Changes of a straggler that were not judged; they are now.
    fn judge(&mut self) -> u64 {
        let Some(judged) = &mut self.judged else {
            return 0;
        };
        let count = self.count.read();
        count - std::mem::replace(judged, count)
    }
}

#[derive(Debug, Default)]
struct Rows {
    /// Highest generation heard; zero before any.
    newest: u64,
    open: Vec<Row>,
    /// Sum of the counts of closed queues.
    closed: u64,
}

impl Rows {
    fn sum(&self) -> u64 {
        self.open.iter().fold(self.closed, |sum, row| sum + row.count.read())
    }

    fn row(&mut self, count: &Arc<Count>) -> usize {
        let at = self.open.iter().position(|row| Arc::ptr_eq(&row.count, count));
        at.expect("a row lives as long as its account")
    }
}

/// See the module's documentation. One per volume.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Written at a WELCOME, at opening and closing, and by FLUSHes while a queue
    /// straggles; else only read, so that FLUSHes do not wait for each other.
    rows: RwLock<Rows>,
    /// Everything up to this sum is durable or was judged lost.
    covered: AtomicU64,
    /// Losses found.
    losses: AtomicU64,
    /// Of these, how many a failed FLUSH has told the guest.
    told: AtomicU64,
    /// Whether any queue straggles.
    stragglers: AtomicBool,
    /// Changes lost that nobody has reported yet.
    unreported: AtomicU64,
}

impl Ledger {
    pub(crate) fn open(self: &Arc<Self>) -> Account {
        let count = Arc::<Count>::default();
        self.write().open.push(Row { count: Arc::clone(&count), judged: None });
        Account { ledger: Arc::clone(self), count, acknowledged: 0 }
    }

    /// Somebody else has written, under the server's `generation` or later, and
    /// perhaps not flushed: that counts as one change of ours. Zero: under an
    /// unknown one.
    pub(crate) fn inherit(&self, generation: u64) {
        let mut rows = self.write();
        rows.closed += 1;
        let lost = generation != 0 && rows.newest > generation;
        if lost {
            self.covered.fetch_max(rows.sum(), Ordering::AcqRel);
        }
        self.conclude(&rows, u64::from(lost));
    }

    fn read(&self) -> RwLockReadGuard<'_, Rows> {
        // Nothing in a critical section can leave the rows half changed.
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Rows> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a judgement. The loss is there before the stragglers are not.
    fn conclude(&self, rows: &Rows, lost: u64) {
        if lost > 0 {
            self.unreported.fetch_add(lost, Ordering::Relaxed);
            self.losses.fetch_add(1, Ordering::Release);
        }
        let stragglers = rows.open.iter().any(|row| row.judged.is_some());
        self.stragglers.store(stragglers, Ordering::Release);
    }
}

/// What a FLUSH remembers from its submission.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mark {
    sum: u64,
    losses: u64,
}

/// One queue's part of a [`Ledger`].
#[derive(Debug)]
pub(crate) struct Account {
    ledger: Arc<Ledger>,
    count: Arc<Count>,
    /// What `count` says.
    acknowledged: u64,
}

impl Account {
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// A change was answered with success. Comes before its completion is told.
    pub(crate) fn acknowledged(&mut self) {
        self.acknowledged += 1;
        self.count.0.store(self.acknowledged, Ordering::Relaxed);
    }

    /// A FLUSH was submitted.
    pub(crate) fn flush_begins(&self) -> Mark {
        // Losses first: one found meanwhile then counts as found after us.
        let losses = self.ledger.losses.load(Ordering::Acquire);
        Mark { sum: self.ledger.read().sum(), losses }
    }

    /// The server answered the FLUSH with success: what the guest is told.
    pub(crate) fn flush_answered(&self, mark: Mark) -> Result<(), IoError> {
        let ledger = &*self.ledger;
        if ledger.stragglers.load(Ordering::Acquire) {
            let mut rows = ledger.write();
            let lost = rows.open.iter_mut().map(Row::judge).sum();
            ledger.conclude(&rows, lost);
        }
        let losses = ledger.losses.load(Ordering::Acquire);
        let told = ledger.told.fetch_max(losses, Ordering::AcqRel);
        if mark.losses < losses || told < losses {
            return Err(IoError::Io);
        }
        ledger.covered.fetch_max(mark.sum, Ordering::AcqRel);
        Ok(())
    }

    /// The queue's new connection was welcomed; nothing was answered on it yet.
    pub(crate) fn welcomed(&self, generation: u64) {
        if generation == 0 {
            return;
        }
        let ledger = &*self.ledger;
        let mut rows = ledger.write();
        let mut lost = 0;
        if rows.newest == 0 {
            rows.newest = generation;
        } else if generation > rows.newest {
            rows.newest = generation;
            let covered = ledger.covered.load(Ordering::Acquire);
            for row in &mut rows.open {
                row.judged = Some(row.count.read());
            }
            let judged =
                rows.open.iter().fold(rows.closed, |sum, row| sum + row.judged.unwrap_or_default());
            lost = judged.saturating_sub(covered);
            // Judged once: not lost again by the next power loss.
            ledger.covered.fetch_max(judged, Ordering::AcqRel);
        }
        let (at, newest) = (rows.row(&self.count), rows.newest);
        let row = &mut rows.open[at];
        if generation == newest {
            lost += row.judge();
            row.judged = None;
        } else {
            row.judged.get_or_insert(self.acknowledged);
        }
        ledger.conclude(&rows, lost);
    }

    /// Changes that were found lost since somebody asked last.
    pub(crate) fn take_lost(&self) -> u64 {
        self.ledger.unreported.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut rows = self.ledger.write();
        let at = rows.row(&self.count);
        let lost = rows.open.swap_remove(at).judge();
        rows.closed += self.acknowledged;
        self.ledger.conclude(&rows, lost);
    }
}
