//! Data directories that are in use, new, half made, damaged, foreign or from the future.

use std::os::unix::fs::FileExt;

use super::*;
use crate::store::layout::{META_FILE, META_FILE_NEW, POOL_FILE, PoolHeader};
use crate::store::{OpenError, VolumeError};

fn refused(dir: &Path) -> OpenError {
    match Store::open(dir, config(8)) {
        Ok(_) => panic!("opened"),
        Err(e) => e,
    }
}

fn closed_pool() -> TempDir {
    let (dir, store, volume) = with_volume(8, 8 * MIB);
    volume.write(0, &[1; 4096]).unwrap();
    store.close().unwrap();
    dir
}

#[test]
fn one_server_per_directory() {
    let (dir, store, volume) = with_volume(8, MIB);
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(dir.path().to_str().unwrap()));
    // A volume still in use, say by I/O in flight, is a server still alive.
    drop(store);
    assert!(matches!(refused(dir.path()), OpenError::InUse { .. }));
    drop(volume);
    open(dir.path(), 8);
    // The pool's file alone is enough: the lock file may have been removed.
    let store = open(dir.path(), 8);
    fs::remove_file(dir.path().join("lock")).unwrap();
    assert!(matches!(refused(dir.path()), OpenError::InUse { .. }));
    drop(store);
}

#[test]
fn places_that_are_no_directories() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b");
    assert!(matches!(refused(&deep), OpenError::CreateDir { .. }));
    assert!(!dir.path().join("a").exists());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(refused(&file), OpenError::NotADirectory { .. }));
    open(&dir.path().join("new"), 8);
}

#[test]
fn a_creation_that_was_cut_off_starts_anew() {
    let dir = closed_pool();
    let done = fs::read_dir(dir.path()).unwrap().count();
    for kept in ["", "lock", "pool.dat", "extents.0.log", "extents.1.log"] {
        let half = tempfile::tempdir().unwrap();
        fs::write(half.path().join(META_FILE_NEW), "half").unwrap();
        if kept == "pool.dat" {
            fs::write(half.path().join(kept), [0; 10]).unwrap();
        } else if !kept.is_empty() {
            fs::copy(dir.path().join(kept), half.path().join(kept)).unwrap();
        }
        let store = open(half.path(), 8);
        assert_eq!(store.list(), []);
        assert_eq!(fs::read_dir(half.path()).unwrap().count(), done);
    }
}

#[test]
fn missing_files_are_named() {
    for name in ["pool.dat", "meta.redb", "extents.0.log", "extents.1.log"] {
        let dir = closed_pool();
        fs::remove_file(dir.path().join(name)).unwrap();
        let error = refused(dir.path());
        let OpenError::Missing { path } = &error else {
            panic!("{name}: {error}");
        };
        assert!(path.ends_with(name));
        assert!(!dir.path().join(name).exists(), "{name} is not half made");
    }
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let error_after = |break_it: &dyn Fn(&Path)| {
        let dir = closed_pool();
        break_it(dir.path());
        refused(dir.path())
    };
    let at = |name, offset, bytes: &'static [u8]| {
        move |dir: &Path| {
            let file = fs::File::options().write(true).open(dir.join(name));
            file.unwrap().write_all_at(bytes, offset).unwrap();
        }
    };
    let error = error_after(&at(POOL_FILE, 20, &[0xFF; 4]));
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    let error = error_after(&at(META_FILE, 0, &[0xFF; 4096]));
    assert!(matches!(error, OpenError::Metadata { .. }), "{error}");
    let error = error_after(&|dir| fs::write(dir.join(META_FILE), [7; 100]).unwrap());
    assert!(matches!(error, OpenError::Metadata { .. }), "{error}");
    let error = error_after(&|dir| fs::write(dir.join(META_FILE), []).unwrap());
    assert!(matches!(error, OpenError::Metadata { .. } | OpenError::Corrupt { .. }), "{error}");
    let error = error_after(&|dir| {
        let pool = fs::File::options().write(true).open(dir.join(POOL_FILE));
        pool.unwrap().set_len(MIB).unwrap();
    });
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    let other = closed_pool();
    let error = error_after(&|dir| {
        fs::copy(other.path().join(META_FILE), dir.join(META_FILE)).unwrap();
    });
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
}

#[test]
fn other_formats_are_refused_before_anything_else() {
    let dir = closed_pool();
    let mut options = fs::File::options();
    let pool = options.read(true).write(true);
    let pool = pool.open(dir.path().join(POOL_FILE)).unwrap();
    let mut bytes = [0; 64];
    pool.read_exact_at(&mut bytes, 0).unwrap();
    let header = PoolHeader::decode(&bytes).unwrap();
    let newer = PoolHeader { version: 2, ..header };
    pool.write_all_at(&newer.encode(), 0).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::NewerFormat { found: 2, known: 1, .. }), "{error}");
    let other = PoolHeader { extent_bytes: 4096, ..header };
    pool.write_all_at(&other.encode(), 0).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::ExtentSize { found: 4096, .. }), "{error}");
    pool.write_all_at(&header.encode(), 0).unwrap();
    open(dir.path(), 8).check().unwrap();
}

/// Any single damaged page of the metadata gives an error or a sound pool, never a panic.
#[test]
fn garbage_in_the_metadata_never_panics() {
    let whole = closed_pool();
    let bytes = fs::read(whole.path().join(META_FILE)).unwrap();
    let pages = bytes.chunks(4096).enumerate();
    let used = pages.filter(|(_, page)| page.iter().any(|b| *b != 0));
    for (page, _) in used {
        for fill in [0x00, 0xFF, 0x5A] {
            let dir = snapshot(whole.path());
            let mut bad = bytes.clone();
            bad[page * 4096..][..4096].fill(fill);
            fs::write(dir.path().join(META_FILE), bad).unwrap();
            if let Ok(store) = Store::open(dir.path(), config(8)) {
                store.check().unwrap();
            }
        }
    }
}

#[test]
fn a_lost_checkpoint_journal_is_noticed() {
    use crate::store::layout::JOURNAL_FILES;
    use crate::store::probe::Step;
    let (dir, store, volume) = with_volume(40, 40 * MIB);
    for extent in 0..40 {
        volume.write(extent * MIB, &[1]).unwrap();
    }
    let mut commits = 0;
    store.core.probe.watch(move |step| {
        commits += u32::from(step == Step::CheckpointCommit);
        if commits == 2 {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    });
    assert!(store.close().is_err(), "stopped between two transactions");
    drop((store, volume));
    fs::write(dir.path().join(JOURNAL_FILES[0]), []).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
}

#[test]
fn names_and_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 8);
    let long = "a".repeat(65);
    for bad in ["", ".a", "-a", "_a", "a/b", "a b", "ä", "a\n", &long] {
        let error = store.create_volume(bad, MIB).unwrap_err();
        assert!(matches!(error, VolumeError::BadName { .. }), "{bad:?}");
    }
    for bad in [0, 1, 511, 513, MIB + 1, crate::store::MAX_VOLUME_BYTES + 512, u64::MAX] {
        let error = store.create_volume("v", bad).unwrap_err();
        assert!(matches!(error, VolumeError::BadSize { .. }), "{bad}");
    }
    for good in ["a", "0", "A.b_c-d", &long[1..]] {
        let info = store.create_volume(good, 512).unwrap();
        let again = store.create_volume(good, 512).unwrap_err();
        assert!(matches!(again, VolumeError::Exists { .. }));
        store.put_access(info.id, good.as_bytes()).unwrap();
    }
    store.resize_volume("a", MIB).unwrap();
    let list = store.list();
    assert_eq!(list.len(), 4);
    let killed = snapshot(dir.path());
    let again = open(killed.path(), 8);
    assert_eq!(again.list(), list);
    for info in list {
        assert_eq!(again.access(info.id).unwrap(), info.name.as_bytes());
    }
}

#[test]
fn a_slot_with_two_extents_is_refused() {
    use crate::store::layout::{JOURNAL_FILES, Record};
    for (second_slot, sound) in [(1, false), (2, true)] {
        let (dir, store, volume) = with_volume(8, 8 * MIB);
        let id = volume.id().0;
        drop((store, volume));
        let pool = fs::read(dir.path().join(POOL_FILE)).unwrap();
        let header = PoolHeader::decode(pool[..64].try_into().unwrap()).unwrap();
        let path = dir.path().join(JOURNAL_FILES[0]);
        let journal = fs::File::options().write(true).open(path).unwrap();
        for (n, (extent, slot)) in (0..).zip([(0, 1), (5, second_slot)]) {
            let record = Record { seq: n + 1, volume: id, extent, slot };
            let bytes = record.encode(&header.pool_id);
            journal.write_all_at(&bytes, n * 32).unwrap();
        }
        if sound {
            open(dir.path(), 8).check().unwrap();
        } else {
            let error = refused(dir.path());
            assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains("another user"), "{error}");
        }
    }
}
