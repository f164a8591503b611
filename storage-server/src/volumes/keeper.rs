//! Access records on disk: at once, or soon.
//!
//! What is to be durable *at once* is written by whoever comes first to the disk,
//! for all who wait with it: a thousand handoffs that are armed together take a few
//! transactions. What is kept *soon* is written by one task for the whole server, which waits
//! until the guest's first requests are past ([`SOON`]) and takes what has gathered in one
//! transaction. It writes the very records that were
//! given for it, never whatever is current by then: in fast mode a SEALED record
//! must not reach the disk, because a server that finds it there would let the
//! source reclaim although the destination may have activated since.
//!
//! An older record never covers a newer one: versions are compared under the
//! lock of the volume's [`Kept`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_protocol::VolumeId;
use baton_protocol::access::{AccessRecord, Phase};
use baton_protocol::handoff::Mode;

use crate::metrics::AccessMetrics;
use crate::store::{Store, VolumeError};

/// How long a decision waits for the disk, so that its syncs do not stand in the way of the first
/// requests of the guest that was just handed over. Nobody waits for it: until it is stored a
/// crash of this server freezes the volume, and its winner says so; SETTLE stores all the same.
const SOON: Duration = Duration::from_millis(200);

/// The version of a volume's record that is on disk. Held while one is written.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<u64>);

impl Kept {
    fn lock(&self) -> MutexGuard<'_, u64> {
        lock(&self.0)
    }
}

/// Where records are written; the store, or in tests one that fails.
pub(super) trait Shelf: Send + Sync + std::fmt::Debug {
    /// One record, durably.
    fn put(&self, volume: VolumeId, record: &[u8]) -> Result<(), VolumeError>;
    /// All or none, durably.
    fn put_all(&self, rows: &[(VolumeId, Vec<u8>)]) -> Result<(), VolumeError>;
}

impl Shelf for Store {
    fn put(&self, volume: VolumeId, record: &[u8]) -> Result<(), VolumeError> {
        self.put_access(volume, record)
    }

    fn put_all(&self, rows: &[(VolumeId, Vec<u8>)]) -> Result<(), VolumeError> {
        self.put_accesses(rows)
    }
}

#[derive(Debug)]
pub(crate) struct Keeper {
    store: Arc<dyn Shelf>,
    metrics: Arc<AccessMetrics>,
    /// Changes are made on threads that are not the runtime's, too.
    runtime: tokio::runtime::Handle,
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
    /// Inside a runtime.
    pub(super) fn new(store: Arc<dyn Shelf>, metrics: Arc<AccessMetrics>) -> Self {
        Self {
            store,
            metrics,
            runtime: tokio::runtime::Handle::current(),
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
            self.store.put(record.volume, &record.encode())?;
            self.metrics.stored_first();
            *version = record.version;
        }
        Ok(())
    }

    /// Durable some time after this has returned. Does not block.
    pub(super) fn soon(self: &Arc<Self>, kept: &Arc<Kept>, record: AccessRecord) {
        check(&record);
        let mut soon = lock(&self.soon);
        soon.records.insert(record.volume, (Arc::clone(kept), record));
        if !soon.writing {
            soon.writing = true;
            let keeper = Arc::clone(self);
            self.runtime.spawn(async move {
                tokio::time::sleep(SOON).await;
                tokio::task::spawn_blocking(move || keeper.write_all());
            });
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
            self.store.put_all(&rows)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Takes everything but the records of one volume, and notes what it was given.
    #[derive(Debug, Default)]
    struct Torn {
        bad: VolumeId,
        given: Mutex<Vec<Vec<VolumeId>>>,
    }

    impl Shelf for Torn {
        fn put(&self, volume: VolumeId, record: &[u8]) -> Result<(), VolumeError> {
            self.put_all(&[(volume, record.to_vec())])
        }

        fn put_all(&self, rows: &[(VolumeId, Vec<u8>)]) -> Result<(), VolumeError> {
            lock(&self.given).push(rows.iter().map(|(id, _)| *id).collect());
            if rows.iter().any(|(id, _)| *id == self.bad) {
                return Err(VolumeError::NotFound { name: self.bad.to_string() });
            }
            Ok(())
        }
    }

    fn record(volume: u64, version: u64) -> AccessRecord {
        AccessRecord { version, ..AccessRecord::new(VolumeId(volume)) }
    }

    /// Changes of volumes 1 to 3 that wait for the disk together, and how they went.
    fn together(keeper: &Keeper) -> Vec<(bool, u64)> {
        let kept: Vec<Arc<Kept>> = (0..3).map(|_| Arc::default()).collect();
        let busy = lock(&keeper.at_it);
        thread::scope(|scope| {
            let changes: Vec<_> = (1..=3)
                .zip(&kept)
                .map(|(id, kept)| scope.spawn(move || keeper.now(kept, &record(id, 7)).is_ok()))
                .collect();
            while lock(&keeper.first).len() < 3 {
                thread::yield_now();
            }
            drop(busy);
            let results = changes.into_iter().map(|change| change.join().expect("no panic"));
            results.zip(&kept).map(|(is_ok, kept)| (is_ok, *kept.lock())).collect()
        })
    }

    #[tokio::test]
    async fn changes_that_wait_together_share_a_transaction() {
        let shelf = Arc::new(Torn::default());
        let keeper = Keeper::new(Arc::<Torn>::clone(&shelf), Arc::default());
        assert_eq!(together(&keeper), [(true, 7); 3]);
        assert_eq!(*lock(&shelf.given), [[1, 2, 3].map(VolumeId)]);
    }

    #[tokio::test]
    async fn when_the_shared_transaction_fails_each_is_written_and_told_for_itself() {
        let shelf = Arc::new(Torn { bad: VolumeId(2), ..Torn::default() });
        let keeper = Keeper::new(Arc::<Torn>::clone(&shelf), Arc::default());
        // What was not written is not taken for written: version 0.
        assert_eq!(together(&keeper), [(true, 7), (false, 0), (true, 7)]);
        let given = lock(&shelf.given);
        assert_eq!(given[0].len(), 3, "tried together first");
        let mut alone = given[1..].to_vec();
        alone.sort();
        assert_eq!(alone, [[1], [2], [3]].map(|one| one.map(VolumeId).to_vec()));
    }
}
