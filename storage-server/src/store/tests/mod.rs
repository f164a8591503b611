//! The store's promises, one file each.

mod access_record;
mod durability;
mod model;
mod opening;
mod power_loss;
mod races;
mod rollback;
mod space;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;

use super::{EXTENT_BYTES, PoolConfig, Store, Volume};

const MIB: u64 = EXTENT_BYTES;

/// A pool of so many extents. Tests leave the machine's disk alone: no reserve.
fn config(extents: u64) -> PoolConfig {
    PoolConfig { capacity_bytes: Some(extents * EXTENT_BYTES), reserve_bytes: 0 }
}

fn open(dir: &Path, extents: u64) -> Arc<Store> {
    Store::open(dir, config(extents)).unwrap()
}

fn with_volume(extents: u64, size_bytes: u64) -> (TempDir, Arc<Store>, Arc<Volume>) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), extents);
    store.create_volume("v", size_bytes).unwrap();
    let volume = store.volume("v").unwrap();
    (dir, store, volume)
}

fn read(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    volume.read(offset, &mut bytes).unwrap();
    bytes
}

/// What a kill of the process at this moment leaves: the files as the page cache has them.
fn snapshot(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}
