//! `meta.redb`: volumes, access records, the extent map as of the last checkpoint, and what the pool is.
//!
//! Every change is one durable transaction with a number, which `mark` keeps outside this file. Does not know the journal's files, slots' contents or running I/O.
//!
//! A change that finds the disk full is not made, and the next one opens the file anew, because the engine does nothing
//! after a failure. So a disk that has room again is all that is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};

use super::error::MetaError;
use super::generation::DurabilityRow;
use super::layout::{EXTENT_BYTES, FORMAT_VERSION, PoolId};
use super::mark::Mark;
use super::meta_file::MetaFile;

/// Names and numbers: see the keys below.
const FORMAT: TableDefinition<'_, &str, u64> = TableDefinition::new("format");
/// id -> (name, size in bytes, creation time in seconds of Unix time)
const VOLUMES: TableDefinition<'_, u64, (&str, u64, u64)> = TableDefinition::new("volumes");
/// id -> access record, opaque here
const ACCESS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("access");
/// (id, extent) -> slot
const EXTENTS: TableDefinition<'_, (u64, u32), u32> = TableDefinition::new("extents");
/// ids of deleted volumes whose extents are still in the table above
const DELETING: TableDefinition<'_, u64, ()> = TableDefinition::new("deleting");

/// (durability generation, kernel boot id, clean); one row, see `generation`. Pools made before it have no such table.
const DURABILITY: TableDefinition<'_, (), (u64, u128, bool)> = TableDefinition::new("durability");

const KEY_VERSION: &str = "format_version";
const KEY_EXTENT_BYTES: &str = "extent_bytes";
const KEY_POOL_ID_LOW: &str = "pool_id_low";
const KEY_POOL_ID_HIGH: &str = "pool_id_high";
/// All journal records up to this one are in the extents table.
const KEY_APPLIED_SEQ: &str = "applied_seq";
/// A checkpoint in several transactions is under way: the journal must still reach this record.
const KEY_CHECKPOINT_SEQ: &str = "checkpoint_seq";
/// Number of the last change of this file. Absent in pools made before there was one, until their first change.
const KEY_CHANGE: &str = "change";

/// Rows per transaction of long work: about 10 ms, so that an access record never waits long for its turn.
pub(super) const ROWS_PER_TXN: usize = if cfg!(test) { 16 } else { 4096 };
/// The engine's page cache. Its default of 1 GiB is for databases read at random; ours is read once at open.
const CACHE_BYTES: usize = 16 << 20;

#[derive(Debug)]
pub(super) struct Meta {
    path: PathBuf,
    /// `None` between a change that found the disk full and the next one. Held while a change is made.
    db: Mutex<Option<Database>>,
    /// `None` until `keep_mark`: while a pool is made, there is nothing that was acknowledged.
    mark: Option<Mark>,
}

/// What the format table says, before anything else is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) version: u64,
    pub(super) extent_bytes: u64,
    pub(super) pool_id: PoolId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VolumeRow {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) created_unix_s: u64,
    pub(super) access: Option<Vec<u8>>,
}

/// Everything but the extents.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) volumes: BTreeMap<u64, VolumeRow>,
    pub(super) deleting: BTreeSet<u64>,
    pub(super) applied_seq: u64,
    pub(super) checkpoint_seq: u64,
}

impl Meta {
    /// Makes a new database with nothing but the format in it.
    pub(super) fn create(path: &Path, pool_id: &PoolId) -> Result<Self, MetaError> {
        let meta = Self::with(builder().create(path)?, path);
        let (low, high) = halves(pool_id);
        meta.change(|txn| {
            let mut format = txn.open_table(FORMAT)?;
            format.insert(KEY_VERSION, u64::from(FORMAT_VERSION))?;
            format.insert(KEY_EXTENT_BYTES, EXTENT_BYTES)?;
            format.insert(KEY_POOL_ID_LOW, low)?;
            format.insert(KEY_POOL_ID_HIGH, high)?;
            txn.open_table(VOLUMES)?;
            txn.open_table(ACCESS)?;
            txn.open_table(EXTENTS)?;
            txn.open_table(DELETING)?;
            Ok(())
        })?;
        Ok(meta)
    }

    pub(super) fn open(path: &Path) -> Result<Self, MetaError> {
        Ok(Self::with(open(path)?, path))
    }

    fn with(db: Database, path: &Path) -> Self {
        Self { path: path.to_owned(), db: Mutex::new(Some(db)), mark: None }
    }

    /// From now on every change is noted in `mark`.
    pub(super) fn keep_mark(&mut self, mark: Mark) {
        self.mark = Some(mark);
    }

    /// Number of the last change; 0 in a pool of an older server.
    pub(super) fn last_change(&self) -> Result<u64, MetaError> {
        change_of(&self.begin_read()?)
    }

    /// `None` if the database is sound but not ours.
    pub(super) fn format(&self) -> Result<Option<Format>, MetaError> {
        let txn = self.begin_read()?;
        let table = match txn.open_table(FORMAT) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        let number = |key| -> Result<Option<u64>, MetaError> {
            Ok(table.get(key)?.map(|value| value.value()))
        };
        let (Some(version), Some(extent_bytes), Some(low), Some(high)) = (
            number(KEY_VERSION)?,
            number(KEY_EXTENT_BYTES)?,
            number(KEY_POOL_ID_LOW)?,
            number(KEY_POOL_ID_HIGH)?,
        ) else {
            return Ok(None);
        };
        let mut pool_id = PoolId::default();
        pool_id[..8].copy_from_slice(&low.to_le_bytes());
        pool_id[8..].copy_from_slice(&high.to_le_bytes());
        Ok(Some(Format { version, extent_bytes, pool_id }))
    }

    pub(super) fn load(&self) -> Result<Loaded, MetaError> {
        let txn = self.begin_read()?;
        let access = txn.open_table(ACCESS)?;
        let mut loaded = Loaded::default();
        for row in txn.open_table(VOLUMES)?.iter()? {
            let (id, value) = row?;
            let (name, size_bytes, created_unix_s) = value.value();
            let access = access.get(id.value())?.map(|record| record.value().to_vec());
            let row = VolumeRow { name: name.to_owned(), size_bytes, created_unix_s, access };
            loaded.volumes.insert(id.value(), row);
        }
        for row in txn.open_table(DELETING)?.iter()? {
            loaded.deleting.insert(row?.0.value());
        }
        let format = txn.open_table(FORMAT)?;
        let number = |key| -> Result<u64, MetaError> {
            Ok(format.get(key)?.map_or(0, |value| value.value()))
        };
        loaded.applied_seq = number(KEY_APPLIED_SEQ)?;
        loaded.checkpoint_seq = number(KEY_CHECKPOINT_SEQ)?;
        Ok(loaded)
    }

    /// Visits (volume id, extent, slot) of every row, also of volumes that are gone.
    pub(super) fn for_each_extent(
        &self,
        mut visit: impl FnMut(u64, u32, u32),
    ) -> Result<(), MetaError> {
        let txn = self.begin_read()?;
        for row in txn.open_table(EXTENTS)?.iter()? {
            let (key, slot) = row?;
            let (volume, extent) = key.value();
            visit(volume, extent, slot.value());
        }
        Ok(())
    }

    pub(super) fn put_volume(
        &self,
        id: u64,
        name: &str,
        size_bytes: u64,
        created_unix_s: u64,
    ) -> Result<(), MetaError> {
        self.change(|txn| {
            let mut volumes = txn.open_table(VOLUMES)?;
            volumes.insert(id, (name, size_bytes, created_unix_s))?;
            Ok(())
        })
    }

    pub(super) fn put_access(&self, id: u64, record: &[u8]) -> Result<(), MetaError> {
        self.put_accesses(&[(id, record)])
    }

    /// All or none.
    pub(super) fn put_accesses(&self, rows: &[(u64, &[u8])]) -> Result<(), MetaError> {
        self.change(|txn| {
            let mut access = txn.open_table(ACCESS)?;
            for (id, record) in rows {
                access.insert(id, record)?;
            }
            Ok(())
        })
    }

    pub(super) fn durability(&self) -> Result<Option<DurabilityRow>, MetaError> {
        let txn = self.begin_read()?;
        let table = match txn.open_table(DURABILITY) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        Ok(table.get(())?.map(|row| DurabilityRow::from_columns(row.value())))
    }

    /// Written even if it says what is there already: a killed server may have left that in the page cache only.
    pub(super) fn put_durability(&self, row: DurabilityRow) -> Result<(), MetaError> {
        self.change(|txn| {
            txn.open_table(DURABILITY)?.insert((), row.to_columns())?;
            Ok(())
        })
    }

    /// Makes it look like a pool of an older server.
    #[cfg(test)]
    pub(super) fn forget_durability(&self) {
        let forgotten = self.change(|txn| {
            assert!(txn.delete_table(DURABILITY)?);
            Ok(())
        });
        forgotten.unwrap();
    }

    /// Makes it look like a pool of a server that did not number its changes.
    #[cfg(test)]
    pub(super) fn forget_changes(&self) {
        let db = self.lock();
        let txn = db.as_ref().unwrap().begin_write().unwrap();
        txn.open_table(FORMAT).unwrap().remove(KEY_CHANGE).unwrap();
        txn.commit().unwrap();
    }

    /// After this the volume does not exist; its rows in the extents table mean nothing and wait for `purge`.
    pub(super) fn delete_volume(&self, id: u64) -> Result<(), MetaError> {
        self.change(|txn| {
            txn.open_table(VOLUMES)?.remove(id)?;
            txn.open_table(ACCESS)?.remove(id)?;
            txn.open_table(DELETING)?.insert(id, ())?;
            Ok(())
        })
    }

    /// Removes what `delete_volume` left, a bounded piece per transaction.
    pub(super) fn purge(&self, id: u64) -> Result<(), MetaError> {
        loop {
            let mut more = false;
            self.change(|txn| {
                let mut extents = txn.open_table(EXTENTS)?;
                let keys = extents
                    .range((id, 0)..=(id, u32::MAX))?
                    .take(ROWS_PER_TXN)
                    .map(|row| row.map(|(key, _)| key.value()))
                    .collect::<Result<Vec<_>, _>>()?;
                for key in &keys {
                    extents.remove(key)?;
                }
                more = keys.len() == ROWS_PER_TXN;
                if !more {
                    txn.open_table(DELETING)?.remove(id)?;
                }
                Ok(())
            })?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Applies the net effect of journal records up to `last_seq`: (volume, extent) -> slot, 0 for a hole.
    /// The records must be durable: if this stops half way, the next open applies them again from the journal.
    /// `between` runs before each transaction.
    pub(super) fn checkpoint(
        &self,
        changes: &BTreeMap<(u64, u32), u32>,
        last_seq: u64,
        mut between: impl FnMut() -> Result<(), MetaError>,
    ) -> Result<(), MetaError> {
        let mut left = changes.iter().peekable();
        loop {
            between()?;
            self.change(|txn| {
                let volumes = txn.open_table(VOLUMES)?;
                let mut extents = txn.open_table(EXTENTS)?;
                // The map is sorted by volume: one look-up per volume.
                let mut known = (0, false);
                for (&(volume, extent), &slot) in left.by_ref().take(ROWS_PER_TXN) {
                    if known.0 != volume {
                        known = (volume, volumes.get(volume)?.is_some());
                    }
                    if slot == 0 {
                        extents.remove((volume, extent))?;
                    } else if known.1 {
                        extents.insert((volume, extent), slot)?;
                    }
                }
                let mut format = txn.open_table(FORMAT)?;
                if left.peek().is_none() {
                    format.insert(KEY_APPLIED_SEQ, last_seq)?;
                    format.remove(KEY_CHECKPOINT_SEQ)?;
                } else {
                    format.insert(KEY_CHECKPOINT_SEQ, last_seq)?;
                }
                Ok(())
            })?;
            if left.peek().is_none() {
                return Ok(());
            }
        }
    }

    /// One durable transaction, and then the mark, so that who is told of it can rely on finding it again.
    fn change(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<(), MetaError>,
    ) -> Result<(), MetaError> {
        let mut db = self.lock();
        let open = db.take().map_or_else(|| self.reopen(), Ok)?;
        let done = self.commit(&open, work);
        if !done.as_ref().is_err_and(MetaError::is_full) {
            *db = Some(open);
        }
        done
    }

    fn commit(
        &self,
        db: &Database,
        work: impl FnOnce(&WriteTransaction) -> Result<(), MetaError>,
    ) -> Result<(), MetaError> {
        let txn = db.begin_write()?;
        work(&txn)?;
        let number = {
            let mut format = txn.open_table(FORMAT)?;
            let last = format.get(KEY_CHANGE)?.map_or(0, |value| value.value());
            format.insert(KEY_CHANGE, last + 1)?;
            last + 1
        };
        txn.commit()?;
        self.mark.as_ref().map_or(Ok(()), |mark| mark.durable(number)).map_err(MetaError::Mark)
    }

    /// After a full disk: what was committed before is there, and nothing less.
    fn reopen(&self) -> Result<Database, MetaError> {
        let db = open(&self.path)?;
        let found = change_of(&db.begin_read()?)?;
        let acknowledged = self.mark.as_ref().map_or(0, Mark::change);
        if found < acknowledged {
            return Err(MetaError::Behind { found, acknowledged });
        }
        tracing::info!("the metadata is open again after its disk was full");
        Ok(db)
    }

    fn begin_read(&self) -> Result<ReadTransaction, MetaError> {
        let db = self.lock();
        Ok(db.as_ref().ok_or(MetaError::Closed)?.begin_read()?)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Database>> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine would make a new database in an empty file.
fn open(path: &Path) -> Result<Database, MetaError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(redb::Error::Io)?;
    if file.metadata().map_err(redb::Error::Io)?.len() == 0 {
        return Err(redb::Error::Corrupted("it is empty".to_owned()).into());
    }
    Ok(builder().create_with_backend(MetaFile::new(file)?)?)
}

fn change_of(txn: &ReadTransaction) -> Result<u64, MetaError> {
    let format = txn.open_table(FORMAT)?;
    Ok(format.get(KEY_CHANGE)?.map_or(0, |value| value.value()))
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    // Verifies every page's checksum. We read the whole map at open anyway, a wrong slot would show one tenant's bytes
    // to another, and without this the engine panics on some damage instead of saying so.
    builder.set_check_integrity_on_open(true);
    builder
}

fn halves(pool_id: &PoolId) -> (u64, u64) {
    let whole = u128::from_le_bytes(*pool_id);
    #[allow(clippy::cast_possible_truncation, reason = "the low half is wanted")]
    let low = whole as u64;
    #[allow(clippy::cast_possible_truncation, reason = "64 bits are left")]
    let high = (whole >> 64) as u64;
    (low, high)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// A file that came back shorter of a change than it was is not gone on with.
    #[test]
    fn after_a_full_disk_it_is_opened_again_and_not_behind_its_mark() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("meta.redb");
        let pool = dir.path().join("pool.dat");
        File::create(&pool).expect("made").set_len(1 << 20).expect("long");
        let id = [7; 16];
        let mut meta = Meta::create(&path, &id).expect("made");
        let mark = || {
            let file = File::options().read(true).write(true).open(&pool).expect("open");
            Mark::read(file, id).expect("read")
        };
        meta.keep_mark(mark());
        meta.put_access(1, b"one").expect("written");
        assert!(meta.lock().take().is_some(), "as a full disk leaves it");
        assert!(matches!(meta.load(), Err(MetaError::Closed)));
        meta.put_access(2, b"two").expect("opened and written");
        assert_eq!(meta.last_change().expect("read"), mark().change());

        drop(meta.lock().take());
        mark().durable(99).expect("noted");
        meta.keep_mark(mark());
        for _ in 0..2 {
            let refused = meta.put_access(3, b"three");
            assert!(matches!(refused, Err(MetaError::Behind { acknowledged: 99, .. })));
        }
    }
}
