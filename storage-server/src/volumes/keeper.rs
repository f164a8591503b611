//! Access records on disk: at once, or soon.
//!
//! What is to be durable *at once* is written by whoever comes first to the disk,
//! for all who wait with it: a thousand handoffs that are armed together take a few
//! transactions. What is kept *soon* is written by one task for the whole server, which takes
//! what has gathered in one transaction. It writes the very records that were
//! given for it, never whatever is current by then: in fast mode a SEALED record
//! must not reach the disk, because a server that finds it there would let the
//! source reclaim although the destination may have activated since.
//!
//! An older record never covers a newer one: versions are compared under the
//! lock of the volume's [`Kept`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::VolumeId;
use baton_protocol::access::{AccessRecord, Phase};
use baton_protocol::handoff::Mode;

use crate::metrics::AccessMetrics;
use crate::store::{Store, VolumeError};

/// The version of a volume's record that is on disk. Held while one is written.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<u64>);

impl Kept {
    fn lock(&self) -> MutexGuard<'_, u64> {
        lock(&self.0)
    }
}

#[derive(Debug)]
pub(crate) struct Keeper {
    store: Arc<Store>,
    metrics: Arc<AccessMetrics>,
    soon: Mutex<Soon>,
    first: Mutex<Vec<First>>,
    /// Held while records are written.
    at_it: Mutex<()>,
}

/// A change that waits for the disk.
#[derive(Debug)]
struct First {
    kept: Arc<Kept>,
    record: AccessRecord,
    /// How it went, once it is written.
    done: Arc<Mutex<Option<Result<(), VolumeError>>>>,
}

#[derive(Debug, Default)]
struct Soon {
    /// The latest given of each volume.
    records: BTreeMap<VolumeId, (Arc<Kept>, AccessRecord)>,
    /// A task is at it.
    writing: bool,
}

impl Keeper {
    pub(super) fn new(store: Arc<Store>, metrics: Arc<AccessMetrics>) -> Self {
        Self {
            store,
            metrics,
            soon: Mutex::default(),
            first: Mutex::default(),
            at_it: Mutex::default(),
        }
    }

    /// Durable when this returns. Blocks. Changes of several volumes that wait for
    /// the disk at the same time share a transaction: whoever gets to it first
    /// writes for all.
    pub(super) fn now(&self, kept: &Arc<Kept>, record: &AccessRecord) -> Result<(), VolumeError> {
        check(record);
        let done = Arc::new(Mutex::new(None));
        let waiting =
            First { kept: Arc::clone(kept), record: record.clone(), done: Arc::clone(&done) };
        lock(&self.first).push(waiting);
        let at_it = lock(&self.at_it);
        if lock(&done).is_none() {
            // Not written by another: so it is still in the list.
            let all = std::mem::take(&mut *lock(&self.first));
            self.write_first(&all);
        }
        drop(at_it);
        let result = lock(&done).take();
        // Only if another panicked while it wrote for this one.
        result.unwrap_or_else(|| self.write_one(kept, record))
    }

    fn write_first(&self, all: &[First]) {
        if let [one] = all {
            *lock(&one.done) = Some(self.write_one(&one.kept, &one.record));
            return;
        }
        // A volume has one change at a time, so each is in the list once.
        let by_id = all.iter().map(|first| (first.record.volume, (&first.kept, &first.record)));
        if self.write_together(by_id.collect()).is_ok() {
            for first in all {
                self.metrics.stored_first();
                *lock(&first.done) = Some(Ok(()));
            }
            return;
        }
        // Each is told its own reason.
        for first in all {
            *lock(&first.done) = Some(self.write_one(&first.kept, &first.record));
        }
    }

    fn write_one(&self, kept: &Kept, record: &AccessRecord) -> Result<(), VolumeError> {
        let mut version = kept.lock();
        if record.version > *version {
            self.store.put_access(record.volume, &record.encode())?;
            self.metrics.stored_first();
            *version = record.version;
        }
        Ok(())
    }

    /// Durable some time after this has returned. Does not block. Inside a
    /// runtime.
    pub(super) fn soon(self: &Arc<Self>, kept: &Arc<Kept>, record: AccessRecord) {
        check(&record);
        let mut soon = lock(&self.soon);
        soon.records.insert(record.volume, (Arc::clone(kept), record));
        if !soon.writing {
            soon.writing = true;
            let keeper = Arc::clone(self);
            tokio::task::spawn_blocking(move || keeper.write_all());
        }
    }

    /// Everything that was to be written soon is written when this returns. Blocks.
    pub(super) fn drain(&self) {
        let records = std::mem::take(&mut lock(&self.soon).records);
        self.write(records);
    }

    fn write_all(&self) {
        loop {
            let records = {
                let mut soon = lock(&self.soon);
                if soon.records.is_empty() {
                    soon.writing = false;
                    return;
                }
                std::mem::take(&mut soon.records)
            };
            self.write(records);
        }
    }

    fn write(&self, records: BTreeMap<VolumeId, (Arc<Kept>, AccessRecord)>) {
        let _at_it = lock(&self.at_it);
        let rows = records.iter().map(|(id, (kept, record))| (*id, (kept, record)));
        match self.write_together(rows.collect()) {
            Ok(0) => {}
            Ok(_) => self.metrics.stored_later(),
            // Memory is right; only a restart would notice, and then the volumes
            // are frozen until their winners say so.
            Err(error) => tracing::error!(
                volumes = records.len(),
                error = &error as &dyn std::error::Error,
                "decided handoffs could not be stored; do not restart this server before they are settled"
            ),
        }
    }

    /// In one transaction, but for those that are covered by a newer one. How many
    /// were written. Only by who is at it.
    fn write_together(
        &self,
        records: BTreeMap<VolumeId, (&Arc<Kept>, &AccessRecord)>,
    ) -> Result<usize, VolumeError> {
        // In the order of ids; nobody else holds two of these locks.
        let mut versions = Vec::new();
        let mut rows = Vec::new();
        for (id, (kept, record)) in records {
            let version = kept.lock();
            if record.version > *version {
                rows.push((id, record.encode()));
                versions.push((version, record.version));
            }
        }
        if !rows.is_empty() {
            self.store.put_accesses(&rows)?;
        }
        for (version, now) in &mut versions {
            **version = *now;
        }
        Ok(rows.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(record: &AccessRecord) {
    debug_assert!(
        record.phase != Phase::Sealed
            || record
                .handoff
                .as_ref()
                .is_some_and(|handoff| handoff.plan.mode == Mode::Base || handoff.abdicated),
        "a seal of fast mode is in memory only"
    );
}
