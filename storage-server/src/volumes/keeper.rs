//! Access records on disk: at once, or soon.
//!
//! What is kept *soon* is written by one task for the whole server, which takes
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(crate) struct Keeper {
    store: Arc<Store>,
    metrics: Arc<AccessMetrics>,
    soon: Mutex<Soon>,
    /// Held while records are written that were to be written soon.
    at_it: Mutex<()>,
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
        Self { store, metrics, soon: Mutex::default(), at_it: Mutex::default() }
    }

    /// Durable when this returns. Blocks.
    pub(super) fn now(&self, kept: &Kept, record: &AccessRecord) -> Result<(), VolumeError> {
        check(record);
        let mut version = kept.lock();
        if record.version <= *version {
            return Ok(());
        }
        self.store.put_access(record.volume, &record.encode())?;
        self.metrics.stored_first();
        *version = record.version;
        Ok(())
    }

    /// Durable some time after this has returned. Does not block. Inside a
    /// runtime.
    pub(super) fn soon(self: &Arc<Self>, kept: &Arc<Kept>, record: AccessRecord) {
        check(&record);
        let mut soon = self.lock();
        soon.records.insert(record.volume, (Arc::clone(kept), record));
        if !soon.writing {
            soon.writing = true;
            let keeper = Arc::clone(self);
            tokio::task::spawn_blocking(move || keeper.write_all());
        }
    }

    /// Everything that was to be written soon is written when this returns. Blocks.
    pub(super) fn drain(&self) {
        let records = std::mem::take(&mut self.lock().records);
        self.write(records);
    }

    fn write_all(&self) {
        loop {
            let records = {
                let mut soon = self.lock();
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
        let _at_it = self.at_it.lock().unwrap_or_else(PoisonError::into_inner);
        // In the order of ids; nobody else holds two of these locks.
        let mut versions = Vec::new();
        let mut rows = Vec::new();
        for (id, (kept, record)) in &records {
            let version = kept.lock();
            if record.version > *version {
                rows.push((*id, record.encode()));
                versions.push((version, record.version));
            }
        }
        if rows.is_empty() {
            return;
        }
        match self.store.put_accesses(&rows) {
            Ok(()) => {
                self.metrics.stored_later();
                for (version, now) in &mut versions {
                    **version = *now;
                }
            }
            // Memory is right; only a restart would notice, and then the volumes
            // are frozen until their winners say so.
            Err(error) => tracing::error!(
                volumes = rows.len(),
                error = &error as &dyn std::error::Error,
                "decided handoffs could not be stored; do not restart this server before they are settled"
            ),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Soon> {
        self.soon.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
