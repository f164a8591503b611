//! The extent pool: thin volumes on the slots of one file.
//!
//! A volume is a map from extent (1 MiB) to slot. `docs/on-disk.md` has the files, the byte tables and the rules.
//! In one breath: a write is acknowledged when it survives a kill of the process, `sync` makes everything acknowledged
//! survive a power loss, and a slot changes hands only when it reads as zeros even after a power loss.
//! Does not know sessions, epochs, the wire or what an access record says.
//!
//! | file | decides or does |
//! |---|---|
//! | `layout` | bytes of the header and of journal records, limits |
//! | `extent_map` | extent -> slot with pins, without locks |
//! | `slots` | which slots are free and may be handed out |
//! | `journal` | map changes since the last checkpoint |
//! | `meta` | redb: volumes, access records, checkpointed map |
//! | `mark` | whether redb is as new as it was |
//! | `pool_file` | bytes and space of `pool.dat` |
//! | `pool_map` | `pool.dat` as memory, for sending from the page cache |
//! | `core` | what volumes share: mapping, unmapping, sync, checkpoint |
//! | `volume`, `read_plan` | byte ranges of one volume |
//! | `recovery` | opening a directory |
//! | `generation` | whether unsynced changes were lost |
//! | `check` | the pool's invariants as a function |

mod check;
mod core;
mod error;
mod extent_map;
mod generation;
mod journal;
mod layout;
mod lock;
mod mark;
mod meta;
mod meta_file;
mod pool_file;
mod pool_map;
mod probe;
mod read_plan;
mod recovery;
mod slots;
#[cfg(test)]
mod tests;
mod volume;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use baton_protocol::VolumeId;
use serde::Serialize;

pub use check::{CheckError, CheckReport};
pub use error::{IoError, MetaError, OpenError, PoolError, VolumeError};
pub use generation::BootId;
pub use layout::{EXTENT_BYTES, MAX_VOLUME_BYTES, SECTOR_BYTES};
pub use read_plan::{ReadPlan, Segment};
pub use volume::{Volume, VolumeInfo};

use self::core::Core;
use self::extent_map::ExtentMap;
use self::meta::VolumeRow;
use self::probe::Step;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Most bytes that extents may take, rounded down to whole extents. `None`: as much as the filesystem has.
    pub capacity_bytes: Option<u64>,
    /// Bytes of the filesystem that extents leave free, so that metadata can always be written.
    pub reserve_bytes: u64,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { capacity_bytes: None, reserve_bytes: 64 << 20 }
    }
}

/// How full the pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PoolUsage {
    /// Bytes that extents can take at most.
    pub capacity_bytes: u64,
    pub allocated_bytes: u64,
    /// Bytes that new extents can take now.
    pub free_bytes: u64,
    /// Freed extents that wait for a sync before they are used again. Part of `free_bytes`.
    pub dirty_free_bytes: u64,
    /// Journal records since the last checkpoint.
    pub log_records: u64,
    /// They wait for room in the metadata's filesystem.
    pub log_waits_for_room: bool,
}

/// An open data directory.
#[derive(Debug)]
pub struct Store {
    core: Arc<Core>,
    volumes: RwLock<BTreeMap<String, Arc<Volume>>>,
    /// Held by whoever changes volumes or access records, so that memory and disk change in the same order.
    changes: Mutex<()>,
}

impl Store {
    /// Opens a data directory, makes it if it is missing, and recovers what a killed server left.
    pub fn open(dir: &Path, config: PoolConfig) -> Result<Arc<Self>, OpenError> {
        Self::open_on(dir, config, BootId::of_this_kernel())
    }

    /// `open` on a named boot of the kernel. For who plays another machine, or a machine that was switched off.
    pub fn open_on(dir: &Path, config: PoolConfig, boot: BootId) -> Result<Arc<Self>, OpenError> {
        let (core, volumes) = recovery::open(dir, &config, boot)?;
        let by_name = |v: Volume| (v.name().to_owned(), Arc::new(v));
        Ok(Arc::new(Self {
            core,
            volumes: RwLock::new(volumes.into_iter().map(by_name).collect()),
            changes: Mutex::new(()),
        }))
    }

    pub fn create_volume(&self, name: &str, size_bytes: u64) -> Result<VolumeInfo, VolumeError> {
        check_name(name)?;
        check_size(size_bytes)?;
        let _changes = self.changes();
        if self.volume(name).is_some() {
            return Err(VolumeError::Exists { name: name.to_owned() });
        }
        let mut id = 0;
        while id == 0 || self.volume_by_id(VolumeId(id)).is_some() {
            let mut bytes = [0; 8];
            random(&mut bytes).map_err(VolumeError::Random)?;
            id = u64::from_le_bytes(bytes);
        }
        let created_unix_s =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let meta = &self.core.meta;
        meta.put_volume(id, name, size_bytes, created_unix_s)?;
        let row = VolumeRow { name: name.to_owned(), size_bytes, created_unix_s, access: None };
        let volume = Volume::new(Arc::clone(&self.core), id, row, ExtentMap::new());
        let info = volume.info();
        self.write_volumes().insert(name.to_owned(), Arc::new(volume));
        Ok(info)
    }

    /// All volumes, sorted by name.
    pub fn list(&self) -> Vec<VolumeInfo> {
        self.read_volumes().values().map(|v| v.info()).collect()
    }

    pub fn volume(&self, name: &str) -> Option<Arc<Volume>> {
        self.read_volumes().get(name).cloned()
    }

    pub fn volume_by_id(&self, id: VolumeId) -> Option<Arc<Volume>> {
        let volumes = self.read_volumes();
        volumes.values().find(|v| v.id() == id).cloned()
    }

    /// Grows a volume; the same size again is fine.
    pub fn resize_volume(&self, name: &str, size_bytes: u64) -> Result<VolumeInfo, VolumeError> {
        check_size(size_bytes)?;
        let _changes = self.changes();
        let volume = self.named(name)?;
        let now = volume.info();
        if size_bytes < now.size_bytes {
            return Err(VolumeError::ShrinkRefused { current: now.size_bytes, asked: size_bytes });
        }
        if size_bytes > now.size_bytes {
            let meta = &self.core.meta;
            meta.put_volume(now.id.0, name, size_bytes, now.created_unix_s)?;
            volume.set_size(size_bytes);
        }
        Ok(volume.info())
    }

    /// Deletes a volume and frees its extents; those under running I/O follow when that ends. I/O that starts later
    /// on a handle still held gives `IoError::Deleted`. If this is killed half way the next open goes on.
    pub fn delete_volume(&self, name: &str) -> Result<(), VolumeError> {
        let volume = {
            let _changes = self.changes();
            let volume = self.named(name)?;
            self.core.meta.delete_volume(volume.id().0)?;
            volume.set_deleted();
            self.write_volumes().remove(name);
            volume
        };
        let step = self.core.probe.at(Step::VolumeDeleted).map_err(IoError::from);
        let freed = step.and_then(|()| volume.free_all());
        let freed = freed.map_err(VolumeError::Reclaim);
        let purged = self.core.meta.purge(volume.id().0);
        freed?;
        Ok(purged?)
    }

    /// Replaces a volume's access record; durable when this returns.
    pub fn put_access(&self, id: VolumeId, record: &[u8]) -> Result<(), VolumeError> {
        let _changes = self.changes();
        let volume = self.volume_by_id(id).ok_or(VolumeError::UnknownId { id: id.0 })?;
        self.core.meta.put_access(id.0, record)?;
        volume.set_access(record);
        Ok(())
    }

    /// Replaces the access records of several volumes at once; durable when this returns. Those of volumes that are
    /// gone are left out.
    pub fn put_accesses(&self, records: &[(VolumeId, Vec<u8>)]) -> Result<(), VolumeError> {
        let _changes = self.changes();
        let volumes: BTreeMap<_, _> = {
            let volumes = self.read_volumes();
            volumes.values().map(|volume| (volume.id(), Arc::clone(volume))).collect()
        };
        let found: Vec<_> =
            records.iter().filter_map(|(id, record)| Some((volumes.get(id)?, record))).collect();
        let rows: Vec<_> =
            found.iter().map(|(volume, record)| (volume.id().0, record.as_slice())).collect();
        self.core.meta.put_accesses(&rows)?;
        for (volume, record) in found {
            volume.set_access(record);
        }
        Ok(())
    }

    /// The volume's last durable access record.
    pub fn access(&self, id: VolumeId) -> Option<Vec<u8>> {
        Some(self.volume_by_id(id)?.access()?.to_vec())
    }

    /// Makes everything acknowledged before the call survive a power loss. After one failure every later call fails.
    pub fn sync(&self) -> Result<(), PoolError> {
        self.core.sync()
    }

    pub fn usage(&self) -> PoolUsage {
        let (slots, log_records, log_waits_for_room) = {
            let state = self.core.state();
            let draining = state.log.draining.map_or(0, |drain| drain.records);
            let records = u64::from(state.log.used) + u64::from(draining);
            (state.slots.counts(), records, state.log.no_room_until.is_some())
        };
        let bytes = |slots: u32| u64::from(slots) * EXTENT_BYTES;
        let by_capacity = bytes(slots.capacity.saturating_sub(slots.used));
        // A filesystem that cannot say how full it is does not limit what is shown.
        let available = self.core.pool.available_bytes().unwrap_or(u64::MAX);
        let by_disk = available.saturating_sub(self.core.reserve_bytes());
        let free_bytes = by_capacity.min(by_disk / EXTENT_BYTES * EXTENT_BYTES);
        PoolUsage {
            capacity_bytes: bytes(slots.capacity).min(bytes(slots.used) + free_bytes),
            allocated_bytes: bytes(slots.used),
            free_bytes,
            dirty_free_bytes: bytes(slots.dirty).min(free_bytes),
            log_records,
            log_waits_for_room,
        }
    }

    /// Rises, from open to open, when changes that were acknowledged and never synced may have been lost; never zero.
    pub fn durability_generation(&self) -> u64 {
        self.core.durability_generation()
    }

    /// Makes everything durable and applies the journal, so that the next open is quick, and notes that this was done,
    /// so that a power loss from now on loses nothing. The store stays usable, but no change may be under way.
    pub fn close(&self) -> Result<(), PoolError> {
        self.core.checkpoint()?;
        self.core.note_clean()
    }

    /// Whether `Volume::write_with` may write to the file by splice(2).
    pub fn takes_pipes(&self) -> bool {
        self.core.pool.takes_pipes()
    }

    /// `pool.dat`, for reads planned by `Volume::plan_read`.
    pub fn pool_fd(&self) -> BorrowedFd<'_> {
        self.core.pool.fd()
    }

    /// Checks that every slot is mapped at most once or free, and that counts agree. Only while nothing else runs.
    pub fn check(&self) -> Result<CheckReport, CheckError> {
        check::check(&self.core, self.read_volumes().values())
    }

    fn named(&self, name: &str) -> Result<Arc<Volume>, VolumeError> {
        self.volume(name).ok_or_else(|| VolumeError::NotFound { name: name.to_owned() })
    }

    fn changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_volumes(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Volume>>> {
        self.volumes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_volumes(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Volume>>> {
        self.volumes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Store {
    /// A background checkpoint holds the directory's lock; whoever drops the store may open it again at once.
    fn drop(&mut self) {
        self.core.join_checkpoint();
    }
}

/// `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`
fn check_name(name: &str) -> Result<(), VolumeError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if first && name.len() <= 64 && name.bytes().all(rest) {
        return Ok(());
    }
    // A name from outside may be of any length; the error shows a piece.
    let name = name.chars().take(80).collect();
    Err(VolumeError::BadName { name })
}

fn check_size(size_bytes: u64) -> Result<(), VolumeError> {
    let fits = (SECTOR_BYTES..=MAX_VOLUME_BYTES).contains(&size_bytes);
    if fits && size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Ok(());
    }
    Err(VolumeError::BadSize { size_bytes })
}

fn random(buf: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and length are those of an exclusively borrowed buffer.
    let n = unsafe { libc::getrandom(buf.as_mut_ptr().cast(), buf.len(), 0) };
    if usize::try_from(n) == Ok(buf.len()) {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
