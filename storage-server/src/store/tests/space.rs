//! Slots: who gets them, when, and what they hold then.

use std::sync::{Arc, Mutex};

use super::*;
use crate::store::probe::Step;
use crate::store::{IoError, Segment, VolumeError};

#[test]
fn a_full_pool_refuses_new_extents_and_nothing_else() {
    let (_dir, store, volume) = with_volume(4, 8 * MIB);
    volume.write(0, &vec![1; 4 << 20]).unwrap();
    assert_eq!(store.usage().free_bytes, 0);
    assert!(matches!(volume.write(5 * MIB, &[1]), Err(IoError::NoSpace)));
    volume.write(3 * MIB, &[2; 100]).unwrap();
    volume.write_zeroes(6 * MIB, MIB, false).unwrap();
    assert_eq!(read(&volume, 5 * MIB, 10), [0; 10]);
    volume.write_zeroes(10, 100, true).unwrap();
    volume.discard(MIB, MIB).unwrap();
    assert_eq!(store.usage().free_bytes, MIB);
    assert_eq!(store.usage().dirty_free_bytes, MIB);
    volume.write(5 * MIB, &[3]).unwrap();
    assert!(matches!(volume.write(MIB, &[1]), Err(IoError::NoSpace)));
    store.check().unwrap();
    // Across a start, too.
    store.delete_volume("v").unwrap();
    store.create_volume("w", 4 * MIB).unwrap();
    let other = store.volume("w").unwrap();
    other.write(0, &vec![1; 4 << 20]).unwrap();
    store.check().unwrap();
}

#[test]
fn a_full_filesystem_gets_a_second_chance_after_a_sync() {
    let (_dir, store, volume) = with_volume(8, 8 * MIB);
    volume.write(0, &[1]).unwrap();
    volume.discard(0, MIB).unwrap();
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    let mut full = true;
    store.core.probe.watch(move |step| {
        seen.lock().unwrap().push(step);
        if step == Step::Space && full {
            return Err(std::io::Error::from_raw_os_error(libc::ENOSPC));
        }
        full &= step != Step::SyncPool;
        Ok(())
    });
    volume.write(0, &[2]).unwrap();
    let at = |step| steps.lock().unwrap().iter().position(|s| *s == step);
    assert!(at(Step::Space) < at(Step::SyncPool) && at(Step::SyncPool).is_some());
    store.check().unwrap();
    // Nothing freed, nothing to wait for.
    store.core.probe.watch(|step| match step {
        Step::Space => Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
        _ => Ok(()),
    });
    assert!(matches!(volume.write(MIB, &[2]), Err(IoError::NoSpace)));
    store.check().unwrap();
}

#[test]
fn the_filesystems_reserve_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let config = PoolConfig { capacity_bytes: None, reserve_bytes: u64::MAX };
    let store = Store::open(dir.path(), config).unwrap();
    store.create_volume("v", MIB).unwrap();
    let volume = store.volume("v").unwrap();
    assert!(matches!(volume.write(0, &[1]), Err(IoError::NoSpace)));
    assert_eq!(store.usage().free_bytes, 0);
    assert_eq!(volume.info().allocated_bytes, 0);
    store.check().unwrap();
}

#[test]
fn a_slot_is_zeroed_and_synced_before_another_volume_gets_it() {
    let (_dir, store, volume) = with_volume(2, 2 * MIB);
    store.create_volume("other", 2 * MIB).unwrap();
    let other = store.volume("other").unwrap();
    volume.write(0, &vec![0xAA; 2 << 20]).unwrap();
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    store.core.probe.watch(move |step| {
        seen.lock().unwrap().push(step);
        Ok(())
    });
    volume.discard(0, MIB).unwrap();
    other.write(512, &[0xBB]).unwrap();
    assert_eq!(
        *steps.lock().unwrap(),
        [Step::Journal, Step::Punch, Step::SyncPool, Step::SyncJournal, Step::Space, Step::Journal]
    );
    let mut expected = vec![0; 1 << 20];
    expected[512] = 0xBB;
    assert!(read(&other, 0, 1 << 20) == expected);
    // Deletion needs no journal: it is durable before the slots are touched.
    steps.lock().unwrap().clear();
    store.delete_volume("v").unwrap();
    other.write(MIB, &[0xBB]).unwrap();
    assert_eq!(
        *steps.lock().unwrap(),
        [
            Step::VolumeDeleted,
            Step::Punch,
            Step::SyncPool,
            Step::SyncJournal,
            Step::Space,
            Step::Journal
        ]
    );
    assert!(read(&other, MIB + 1, (1 << 20) - 1) == vec![0; (1 << 20) - 1]);
    store.check().unwrap();
}

#[test]
fn what_no_map_names_at_open_is_zeroed() {
    let (dir, store, volume) = with_volume(4, 4 * MIB);
    volume.write(0, &vec![0xAA; 2 << 20]).unwrap();
    drop((store, volume));
    // As if the records of both writes had been lost with the power.
    for name in crate::store::layout::JOURNAL_FILES {
        fs::write(dir.path().join(name), []).unwrap();
    }
    let store = open(dir.path(), 4);
    assert_eq!(store.usage().dirty_free_bytes, 2 * MIB);
    let volume = store.volume("v").unwrap();
    assert_eq!(volume.info().allocated_bytes, 0);
    for extent in 0..4 {
        volume.write(extent * MIB, &[1]).unwrap();
        let rest = read(&volume, extent * MIB + 1, (1 << 20) - 1);
        assert!(rest.iter().all(|b| *b == 0), "extent {extent}");
    }
    store.check().unwrap();
}

#[test]
fn an_extent_in_use_is_zeroed_in_place() {
    let (_dir, store, volume) = with_volume(2, 2 * MIB);
    volume.write(0, &vec![7; 2 << 20]).unwrap();
    let plan = volume.plan_read(MIB - 8192, 16384).unwrap();
    let segments: Vec<Segment> = plan.segments().collect();
    assert_eq!(segments.iter().map(Segment::len).sum::<usize>(), 16384);
    volume.discard(0, 2 * MIB).unwrap();
    assert!(read(&volume, 0, 2 << 20).iter().all(|b| *b == 0));
    assert_eq!(volume.info().allocated_bytes, 2 * MIB, "both are in use");
    volume.write(0, &[5]).unwrap();
    assert_eq!(plan.segments().collect::<Vec<_>>(), segments);
    assert!(store.check().is_err(), "pins show");
    drop(plan);
    store.check().unwrap();
    volume.discard(0, 2 * MIB).unwrap();
    assert_eq!(volume.info().allocated_bytes, 0);
}

#[test]
fn a_failed_punch_keeps_the_slot_out_of_use_until_the_next_start() {
    let (dir, store, volume) = with_volume(1, 2 * MIB);
    volume.write(0, &vec![7; 1 << 20]).unwrap();
    let mut fail = true;
    store.core.probe.watch(move |step| {
        if step == Step::Punch && std::mem::take(&mut fail) {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    });
    assert!(matches!(volume.discard(0, MIB), Err(IoError::Io(_))));
    assert!(matches!(volume.write(MIB, &[1]), Err(IoError::NoSpace)));
    drop((store, volume));
    let store = open(dir.path(), 1);
    let volume = store.volume("v").unwrap();
    volume.write(MIB, &[1]).unwrap();
    assert!(read(&volume, MIB + 1, 4096).iter().all(|b| *b == 0));
    store.check().unwrap();
}

#[test]
fn huge_volumes_cost_little() {
    let (_dir, store, volume) = with_volume(4, crate::store::MAX_VOLUME_BYTES);
    let end = crate::store::MAX_VOLUME_BYTES;
    let begun = std::time::Instant::now();
    volume.write(end - 1, &[1]).unwrap();
    volume.discard(0, end).unwrap();
    volume.write_zeroes(0, end, false).unwrap();
    volume.write_zeroes(0, end, true).unwrap();
    assert!(begun.elapsed().as_secs() < 5, "bounded by what is mapped");
    assert_eq!(volume.info().allocated_bytes, 0);
    store.check().unwrap();
}

#[test]
fn ranges_outside_are_refused() {
    let (_dir, _store, volume) = with_volume(4, MIB + 512);
    let outside = |r: Result<(), IoError>| assert!(matches!(r, Err(IoError::OutOfRange { .. })));
    for (offset, len) in [(MIB + 512, 1), (u64::MAX, 1), (0, MIB + 513), (u64::MAX, u64::MAX)] {
        outside(volume.discard(offset, len));
        outside(volume.write_zeroes(offset, len, true));
        if len < 2 * MIB {
            let mut buf = vec![0; usize::try_from(len).unwrap()];
            outside(volume.write(offset, &buf));
            outside(volume.read(offset, &mut buf));
            outside(volume.try_read(offset, &mut buf).map(|_| ()));
            outside(volume.plan_read(offset, buf.len()).map(|_| ()));
        }
    }
    volume.write(MIB + 512, &[]).unwrap();
    volume.discard(MIB + 512, 0).unwrap();
    volume.write_zeroes(MIB + 512, 0, false).unwrap();
    volume.read(MIB + 512, &mut []).unwrap();
}

#[test]
fn deletion_frees_everything_when_the_last_user_is_done() {
    let (dir, store, volume) = with_volume(40, 40 * MIB);
    let id = volume.id();
    store.put_access(id, b"record").unwrap();
    for extent in 0..40 {
        volume.write(extent * MIB, &[1]).unwrap();
    }
    store.close().unwrap();
    let plan = volume.plan_read(7 * MIB, 10).unwrap();
    let path = dir.path().to_owned();
    let killed = Arc::new(Mutex::new(None));
    let copy = Arc::clone(&killed);
    store.core.probe.watch(move |step| {
        if step == Step::VolumeDeleted {
            *copy.lock().unwrap() = Some(snapshot(&path));
        }
        Ok(())
    });
    store.delete_volume("v").unwrap();
    assert!(matches!(volume.write(0, &[1]), Err(IoError::Deleted)));
    assert!(matches!(volume.read(0, &mut [1]), Err(IoError::Deleted)));
    assert!(matches!(store.delete_volume("v"), Err(VolumeError::NotFound { .. })));
    assert!(matches!(store.put_access(id, b"x"), Err(VolumeError::UnknownId { .. })));
    assert_eq!(store.access(id), None);
    assert_eq!(store.usage().allocated_bytes, MIB, "one extent is in use");
    drop(plan);
    assert_eq!(store.usage().allocated_bytes, 0);
    store.check().unwrap();
    // Killed right after the deletion became durable.
    let killed = killed.lock().unwrap().take().unwrap();
    for path in [killed.path(), dir.path()] {
        let copy = snapshot(path);
        let store = open(copy.path(), 40);
        assert_eq!(store.list(), []);
        assert_eq!(store.usage().allocated_bytes, 0);
        assert!(store.core.meta.load().unwrap().deleting.is_empty());
        let mut rows = 0;
        store.core.meta.for_each_extent(|_, _, _| rows += 1).unwrap();
        assert_eq!(rows, 0, "purged");
        let info = store.create_volume("v", MIB).unwrap();
        assert_ne!(info.id, id);
        assert_eq!(read(&store.volume("v").unwrap(), 0, 4), [0; 4]);
        store.check().unwrap();
    }
}

#[test]
fn journaled_extents_of_a_deleted_volume_never_reach_the_metadata() {
    let (dir, store, volume) = with_volume(8, 8 * MIB);
    volume.write(0, &vec![1; 8 << 20]).unwrap();
    store.delete_volume("v").unwrap();
    store.create_volume("w", 8 * MIB).unwrap();
    store.volume("w").unwrap().write(0, &[2]).unwrap();
    let killed = snapshot(dir.path());
    store.close().unwrap();
    let rows = |store: &Store| {
        let mut rows = 0;
        store.core.meta.for_each_extent(|_, _, _| rows += 1).unwrap();
        rows
    };
    assert_eq!(rows(&store), 1);
    let store = open(killed.path(), 8);
    store.check().unwrap();
    assert_eq!(read(&store.volume("w").unwrap(), 0, 2), [2, 0]);
    store.close().unwrap();
    assert_eq!(rows(&store), 1);
}
