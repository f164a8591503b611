//! What all volumes of a pool share: slots, the journal, syncs and checkpoints.
//!
//! Holds the durability rules of `docs/on-disk.md`. Does not know names, sizes' limits or byte ranges of volumes.
//!
//! Lock order: `sync_done`, then `state`. No file is synced and no space is had or given back under `state`; journal
//! records are written under it, so that their order is the order of the map's changes.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::{CheckpointError, IoError, MetaError, PoolError};
use super::extent_map::Unmapped;
use super::generation::DurabilityRow;
use super::journal::{FILE_RECORDS, Journal, SWAP_RECORDS};
use super::layout::{EXTENT_BYTES, Record};
use super::meta::Meta;
use super::pool_file::{PoolFile, slot_offset};
use super::probe::{Probe, Step};
use super::slots::{Slots, Take};
use super::volume::Volume;

/// Between two attempts to write the journal's changes to a metadata file that had no room.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(1);

/// Extents unmapped per journal write and hold of the state lock.
pub(super) const UNMAP_BATCH: usize = if cfg!(test) { 32 } else { 256 };
// A batch finds room once a checkpoint has ended.
const _: () = assert!(UNMAP_BATCH <= SWAP_RECORDS as usize);

#[derive(Debug)]
pub(super) struct Core {
    pub(super) pool: PoolFile,
    pub(super) meta: Meta,
    pub(super) probe: Probe,
    journal: Journal,
    state: Mutex<State>,
    /// Signalled when a checkpoint ends, well or badly.
    checkpoint_ended: Condvar,
    /// Number of syncs begun. A sync numbered above what a caller saw on entry covers that caller.
    sync_begun: AtomicU64,
    /// Number of the last sync that succeeded; held while one runs.
    sync_done: Mutex<u64>,
    failed: OnceLock<String>,
    /// What `meta.redb` says, or would say if the pool's failure could be written.
    durability: Mutex<DurabilityRow>,
    /// Whether it says that the pool is clean: looked at before every change.
    noted_clean: AtomicBool,
    reserve_bytes: u64,
    /// Holds the lock on the directory.
    _lock: File,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) slots: Slots,
    pub(super) log: LogCursor,
    checkpoint_thread: Option<JoinHandle<()>>,
}

/// Where the journal stands.
#[derive(Debug)]
pub(super) struct LogCursor {
    /// The file that takes records.
    pub(super) current: usize,
    /// Records in it.
    pub(super) used: u32,
    pub(super) next_seq: u64,
    /// Which files hold records that no sync has covered yet.
    pub(super) unsynced: [bool; 2],
    /// The other file, until it is applied.
    pub(super) draining: Option<Drain>,
    /// The last attempt to apply it found no room for the metadata, and when the next one may begin.
    pub(super) no_room_until: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Drain {
    pub(super) file: usize,
    pub(super) records: u32,
    pub(super) last_seq: u64,
}

impl LogCursor {
    fn swap(&mut self) {
        debug_assert!(self.draining.is_none() && self.used > 0);
        self.draining =
            Some(Drain { file: self.current, records: self.used, last_seq: self.next_seq - 1 });
        self.current = 1 - self.current;
        self.used = 0;
    }

    /// A checkpoint waits for room in the metadata's filesystem, and it is time to try again.
    fn is_retry_due(&self) -> bool {
        self.no_room_until.is_some_and(|until| until <= Instant::now())
    }
}

impl Core {
    pub(super) fn new(
        (pool, meta, journal): (PoolFile, Meta, Journal),
        slots: Slots,
        log: LogCursor,
        durability: DurabilityRow,
        reserve_bytes: u64,
        lock: File,
    ) -> Arc<Self> {
        let unfinished = log.draining.is_some();
        let state = State { slots, log, checkpoint_thread: None };
        let core = Arc::new(Self {
            pool,
            meta,
            probe: Probe::new(),
            journal,
            state: Mutex::new(state),
            checkpoint_ended: Condvar::new(),
            sync_begun: AtomicU64::new(0),
            sync_done: Mutex::new(0),
            failed: OnceLock::new(),
            durability: Mutex::new(durability),
            noted_clean: AtomicBool::new(false),
            reserve_bytes,
            _lock: lock,
        });
        if unfinished {
            let mut state = core.state();
            if core.spawn_checkpoint(&mut state).is_err() {
                drop(state);
                core.run_checkpoint();
            }
        }
        core
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under the state lock")
    }

    pub(super) fn reserve_bytes(&self) -> u64 {
        self.reserve_bytes
    }

    /// Refuses once the pool has failed.
    pub(super) fn check_alive(&self) -> Result<(), PoolError> {
        match self.failed.get() {
            None => Ok(()),
            Some(reason) => Err(PoolError::Failed { reason: reason.clone() }),
        }
    }

    /// Latches the pool as failed; the first reason stays.
    fn fail(&self, what: &str, source: &dyn Error) -> PoolError {
        let mut reason = format!("{what}: {source}");
        let mut cause = source.source();
        while let Some(source) = cause {
            reason = format!("{reason}: {source}");
            cause = source.source();
        }
        if self.failed.set(reason.clone()).is_ok() {
            tracing::error!(reason, "the extent pool has failed and refuses writes");
            self.note_failed();
        }
        // Under the lock, so that nobody checks before and waits after.
        let _state = self.state();
        self.checkpoint_ended.notify_all();
        PoolError::Failed { reason }
    }

    pub(super) fn durability_generation(&self) -> u64 {
        self.durability().generation
    }

    /// Everything acknowledged is synced and no change is under way.
    pub(super) fn note_clean(&self) -> Result<(), PoolError> {
        let mut row = self.durability();
        self.check_alive()?;
        let closed = row.closed();
        let noted = self.meta.put_durability(closed);
        if let Err(e) = noted {
            drop(row);
            return Err(self.fail("cannot note the clean close", &e));
        }
        *row = closed;
        self.noted_clean.store(true, Ordering::Release);
        Ok(())
    }

    /// Comes before every change: after a clean close the pool must not be taken for clean any more.
    /// It is refused where that cannot be noted.
    pub(super) fn change_begins(&self) -> Result<(), IoError> {
        self.check_alive()?;
        if !self.noted_clean.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut row = self.durability();
        let in_use = row.in_use();
        let noted = self.meta.put_durability(in_use);
        match noted {
            Err(e) if e.is_full() => return Err(IoError::NoSpace),
            Err(e) => {
                drop(row);
                return Err(self.fail("cannot note that the pool is in use again", &e).into());
            }
            Ok(()) => {}
        }
        *row = in_use;
        self.noted_clean.store(false, Ordering::Release);
        Ok(())
    }

    /// The kernel forgets pages that it could not write, so a restart on the same boot must not believe the page cache.
    fn note_failed(&self) {
        let mut row = self.durability();
        *row = row.failed();
        if let Err(error) = self.meta.put_durability(*row) {
            tracing::error!(
                %error,
                "the pool's failure cannot be noted either: check the disk and its filesystem before the storage server is started again"
            );
        }
    }

    fn durability(&self) -> MutexGuard<'_, DurabilityRow> {
        self.durability.lock().expect("nothing panics under this lock")
    }

    /// Makes everything acknowledged before the call durable. Calls that wait for the same disk share one sync.
    pub(super) fn sync(&self) -> Result<(), PoolError> {
        let seen = self.sync_begun.load(Ordering::SeqCst);
        let mut done = self.sync_done.lock().expect("nothing panics in a sync");
        self.check_alive()?;
        if *done > seen {
            return Ok(());
        }
        let number = self.sync_begun.fetch_add(1, Ordering::SeqCst) + 1;
        self.sync_files().map_err(|(file, source)| self.fail(file, &source))?;
        *done = number;
        Ok(())
    }

    /// Data first: a durable map entry never points at data that is not.
    fn sync_files(&self) -> Result<(), (&'static str, io::Error)> {
        let zeroed = self.state().slots.sync_begins();
        let pool = self.probe.at(Step::SyncPool).and_then(|()| self.pool.sync());
        pool.map_err(|e| ("cannot sync pool.dat", e))?;
        // Taken after the pool's sync: newer records may become durable too, their slots are zero or hold newer data.
        let unsynced = std::mem::take(&mut self.state().log.unsynced);
        for file in (0..unsynced.len()).filter(|file| unsynced[*file]) {
            let journal = self.probe.at(Step::SyncJournal);
            let journal = journal.and_then(|()| self.journal.sync(file));
            journal.map_err(|e| ("cannot sync the journal", e))?;
        }
        self.state().slots.sync_done(&zeroed);
        Ok(())
    }

    /// Puts a slot behind a hole, or finds that somebody else just did. Returns the slot, pinned once for the caller.
    pub(super) fn map_extent(
        self: &Arc<Self>,
        volume: &Volume,
        extent: u32,
    ) -> Result<u32, IoError> {
        loop {
            let (slot, has_space) = match self.take_slot(volume, extent)? {
                Taken::Mapped(slot) => return Ok(slot),
                Taken::Free { slot, has_space } => (slot, has_space),
                Taken::NeedsSync => {
                    self.sync()?;
                    continue;
                }
            };
            if !has_space && let Err(e) = self.have_space(slot) {
                let mut state = self.state();
                state.slots.give_back(slot, false);
                // Space that was punched may only be usable after a sync.
                let retry = matches!(e, IoError::NoSpace) && state.slots.has_unsynced();
                drop(state);
                if !retry {
                    return Err(e);
                }
                self.sync()?;
                continue;
            }
            return self.publish(volume, extent, slot);
        }
    }

    fn take_slot(&self, volume: &Volume, extent: u32) -> Result<Taken, IoError> {
        let mut state = self.state();
        volume.check_alive()?;
        if let Some(slot) = volume.map.pin(extent) {
            return Ok(Taken::Mapped(slot));
        }
        match state.slots.take() {
            Take::Ready(slot) => Ok(Taken::Free { slot, has_space: true }),
            Take::Bare(slot) => Ok(Taken::Free { slot, has_space: false }),
            Take::NeedsSync => Ok(Taken::NeedsSync),
            Take::Full => Err(IoError::NoSpace),
        }
    }

    fn have_space(&self, slot: u32) -> Result<(), IoError> {
        self.probe.at(Step::Space)?;
        if self.pool.available_bytes()? < self.reserve_bytes.saturating_add(EXTENT_BYTES) {
            return Err(IoError::NoSpace);
        }
        Ok(self.pool.allocate(slot)?)
    }

    fn publish(self: &Arc<Self>, volume: &Volume, extent: u32, slot: u32) -> Result<u32, IoError> {
        let mut state = match self.room(1) {
            Ok(state) => state,
            Err(e) => {
                self.state().slots.give_back(slot, true);
                return Err(e);
            }
        };
        let alive = volume.check_alive();
        let winner = volume.map.pin(extent);
        if winner.is_some() || alive.is_err() {
            state.slots.give_back(slot, true);
            drop(state);
            alive.inspect_err(|_| {
                if winner.is_some() {
                    volume.unpin(extent);
                }
            })?;
            return Ok(winner.expect("alive and not ours to map"));
        }
        if let Err(e) = self.append(&mut state, volume, &[(extent, slot)]) {
            state.slots.give_back(slot, true);
            drop(state);
            return Err(self.fail("cannot write the journal", &e).into());
        }
        volume.map.map(extent, slot, 1);
        volume.allocated.fetch_add(1, Ordering::Relaxed);
        Ok(slot)
    }

    /// Makes holes of mapped extents (at most `UNMAP_BATCH`) and frees their slots. Returns those in use, which stay.
    /// All stay if the volume grew since the caller read `size_seen`: the last extent may have new data then.
    pub(super) fn unmap(
        self: &Arc<Self>,
        volume: &Volume,
        extents: &[u32],
        size_seen: u64,
    ) -> Result<Vec<u32>, IoError> {
        let mut state = self.room(extents.len())?;
        volume.check_alive()?;
        if volume.size_bytes() != size_seen {
            return Ok(extents.to_vec());
        }
        let (freed, in_use) = make_holes(volume, extents);
        let changes: Vec<(u32, u32)> = freed.iter().map(|(extent, _)| (*extent, 0)).collect();
        if let Err(e) = self.append(&mut state, volume, &changes) {
            for (extent, slot) in freed {
                volume.map.map(extent, slot, 0);
            }
            drop(state);
            return Err(self.fail("cannot write the journal", &e).into());
        }
        drop(state);
        self.retire(volume, &freed)?;
        Ok(in_use)
    }

    /// Frees what a deleted volume holds and nobody uses. No journal: the durable deletion made its map void.
    pub(super) fn unmap_deleted(&self, volume: &Volume, extents: &[u32]) -> Result<(), IoError> {
        let state = self.state();
        let (freed, _in_use) = make_holes(volume, extents);
        drop(state);
        self.retire(volume, &freed)
    }

    /// Zeros slots that no map names any more; then they wait for a sync. If zeroing fails they are not used again
    /// before the next open tries it again.
    fn retire(&self, volume: &Volume, freed: &[(u32, u32)]) -> Result<(), IoError> {
        let mut slots: Vec<u32> = freed.iter().map(|(_, slot)| *slot).collect();
        volume.allocated.fetch_sub(slots.len() as u64, Ordering::Relaxed);
        slots.sort_unstable();
        for run in slots.chunk_by(|a, b| a + 1 == *b) {
            self.probe.at(Step::Punch)?;
            self.pool.punch(slot_offset(run[0]), run.len() as u64 * EXTENT_BYTES)?;
            self.state().slots.freed(run);
        }
        Ok(())
    }

    /// The state lock, with room for `records` in the journal. Starts checkpoints, waits for one if it must. No space
    /// when the journal is full and the metadata has no room to take its records.
    fn room(self: &Arc<Self>, records: usize) -> Result<MutexGuard<'_, State>, IoError> {
        let mut state = self.state();
        loop {
            self.check_alive()?;
            let is_half_full = state.log.draining.is_none() && state.log.used >= SWAP_RECORDS;
            if is_half_full || state.log.is_retry_due() {
                if is_half_full {
                    state.log.swap();
                }
                state.log.no_room_until = None;
                if self.spawn_checkpoint(&mut state).is_err() {
                    drop(state);
                    self.run_checkpoint();
                    state = self.state();
                }
            } else if state.log.used as usize + records <= FILE_RECORDS as usize {
                return Ok(state);
            } else if state.log.no_room_until.is_some() {
                return Err(IoError::NoSpace);
            } else {
                let waited = self.checkpoint_ended.wait(state);
                state = waited.expect("nothing panics under the state lock");
            }
        }
    }

    /// Writes records for (extent, slot) changes; the caller has made room.
    fn append(&self, state: &mut State, volume: &Volume, changes: &[(u32, u32)]) -> io::Result<()> {
        let log = &mut state.log;
        let record = |(seq, &(extent, slot))| Record { seq, volume: volume.id().0, extent, slot };
        self.probe.at(Step::Journal)?;
        let count = u32::try_from(changes.len()).expect("a batch is small");
        if let [change] = changes {
            let record = record((log.next_seq, change));
            self.journal.write(log.current, log.used, &[record])?;
        } else {
            let records: Vec<Record> = (log.next_seq..).zip(changes).map(record).collect();
            self.journal.write(log.current, log.used, &records)?;
        }
        log.used += count;
        log.next_seq += u64::from(count);
        log.unsynced[log.current] |= count > 0;
        Ok(())
    }

    fn spawn_checkpoint(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let before = state.checkpoint_thread.take();
        let core = Arc::clone(self);
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        state.checkpoint_thread = Some(thread.spawn(move || {
            if let Some(before) = before {
                let _ended = before.join();
            }
            core.run_checkpoint();
        })?);
        Ok(())
    }

    /// Applies the file that is swapped out, or leaves it for later where the metadata has no room. Whoever swapped it
    /// out, or cleared `no_room_until`, calls this, once. Any other failure fails the pool.
    fn run_checkpoint(&self) {
        let Some(drain) = self.state().log.draining else {
            return;
        };
        let until = match self.apply(drain) {
            Ok(()) => None,
            Err(e) if e.is_full() => {
                tracing::warn!(
                    "the disk under the data directory is full: the map's changes stay in the journal until there is room; make room"
                );
                Some(Instant::now() + NO_ROOM_PAUSE)
            }
            // Syncs are refused from here on.
            Err(e) => {
                self.fail("cannot checkpoint the extent map", &e);
                return;
            }
        };
        let mut state = self.state();
        state.log.no_room_until = until;
        if until.is_none() {
            // Nothing needs the file's records any more.
            state.log.draining = None;
            state.log.unsynced[drain.file] = false;
        }
        self.checkpoint_ended.notify_all();
    }

    fn apply(&self, drain: Drain) -> Result<(), CheckpointError> {
        let step = |step| self.probe.at(step).map_err(MetaError::from);
        step(Step::CheckpointSwapped)?;
        // Data and records first: the commits below may become durable one by one.
        self.sync()?;
        let run = self.journal.read(drain.file).map_err(CheckpointError::Journal)?;
        let records = run.records.get(..drain.records as usize);
        let Some(records) = records.filter(|r| r.last().map(|r| r.seq) == Some(drain.last_seq))
        else {
            return Err(CheckpointError::Journal(io::ErrorKind::InvalidData.into()));
        };
        self.meta
            .checkpoint(&net_effect(records), drain.last_seq, || step(Step::CheckpointCommit))?;
        Ok(step(Step::CheckpointCommitted)?)
    }

    /// Applies the whole journal, so that the next open has nothing to replay. What finds no room stays there for it.
    pub(super) fn checkpoint(&self) -> Result<(), PoolError> {
        self.sync()?;
        let mut tried_again = false;
        loop {
            let mut state = self.state();
            self.check_alive()?;
            if state.log.no_room_until.is_some() {
                if tried_again {
                    return Err(PoolError::NoRoom);
                }
                tried_again = true;
                state.log.no_room_until = None;
            } else if state.log.draining.is_some() {
                let waited = self.checkpoint_ended.wait(state);
                drop(waited.expect("nothing panics under the state lock"));
                continue;
            } else if state.log.used > 0 {
                state.log.swap();
            } else {
                return Ok(());
            }
            drop(state);
            self.run_checkpoint();
        }
    }

    /// Waits for a background checkpoint, whose thread holds the files open.
    pub(super) fn join_checkpoint(&self) {
        let thread = self.state().checkpoint_thread.take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the checkpoint thread panicked");
        }
    }
}

enum Taken {
    Mapped(u32),
    Free { slot: u32, has_space: bool },
    NeedsSync,
}

type Freed = Vec<(u32, u32)>;

/// (extent, slot) of what became a hole, and the extents in use. Under the state lock.
fn make_holes(volume: &Volume, extents: &[u32]) -> (Freed, Vec<u32>) {
    let (mut freed, mut in_use) = (Vec::new(), Vec::new());
    for &extent in extents {
        match volume.map.unmap(extent) {
            Unmapped::Slot(slot) => freed.push((extent, slot)),
            Unmapped::Pinned => in_use.push(extent),
            Unmapped::Hole => {}
        }
    }
    (freed, in_use)
}

/// (volume, extent) -> slot after all records, 0 for a hole.
pub(super) fn net_effect(records: &[Record]) -> BTreeMap<(u64, u32), u32> {
    let effect = |r: &Record| ((r.volume, r.extent), r.slot);
    records.iter().map(effect).collect()
}
