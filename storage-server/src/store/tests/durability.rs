//! What survives a kill of the process, and what a sync puts in which order.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::store::journal::{FILE_RECORDS, SWAP_RECORDS};
use crate::store::probe::Step;
use crate::store::{IoError, PoolError};

/// Runs the store's steps into a list.
fn trace(store: &Store) -> Arc<Mutex<Vec<Step>>> {
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    store.core.probe.watch(move |step| {
        seen.lock().unwrap().push(step);
        Ok(())
    });
    steps
}

#[test]
fn acknowledged_writes_survive_a_kill() {
    let (dir, store, volume) = with_volume(8, 8 * MIB);
    volume.write(MIB - 3, b"abcdef").unwrap();
    volume.write(5 * MIB, &[7; 4096]).unwrap();
    volume.discard(5 * MIB, MIB).unwrap();
    let killed = snapshot(dir.path());
    let reopened = open(killed.path(), 8);
    let again = reopened.volume("v").unwrap();
    assert_eq!(read(&again, MIB - 3, 6), b"abcdef");
    assert_eq!(read(&again, 5 * MIB, 4096), [0; 4096]);
    assert_eq!(again.info().allocated_bytes, 2 * MIB);
    reopened.check().unwrap();
    let steps = trace(&reopened);
    reopened.sync().unwrap();
    assert_eq!(
        *steps.lock().unwrap(),
        [Step::SyncPool, Step::SyncJournal],
        "the killed server did not sync its records"
    );
    store.check().unwrap();
}

#[test]
fn sync_does_data_before_journal() {
    let (_dir, store, volume) = with_volume(8, 8 * MIB);
    let steps = trace(&store);
    volume.write(0, &[1]).unwrap();
    store.sync().unwrap();
    assert_eq!(
        *steps.lock().unwrap(),
        [Step::Space, Step::Journal, Step::SyncPool, Step::SyncJournal]
    );
    steps.lock().unwrap().clear();
    volume.write(0, &[2]).unwrap();
    store.sync().unwrap();
    assert_eq!(*steps.lock().unwrap(), [Step::SyncPool], "no new records");
}

#[test]
fn a_failed_sync_is_final() {
    for failing in [Step::SyncPool, Step::SyncJournal, Step::Journal] {
        let (_dir, store, volume) = with_volume(8, 8 * MIB);
        volume.write(0, &[1]).unwrap();
        let mut fail = true;
        store.core.probe.watch(move |step| {
            if step == failing && std::mem::take(&mut fail) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(())
        });
        let first = if failing == Step::Journal {
            let failed = volume.write(MIB, &[1]);
            assert!(matches!(failed, Err(IoError::PoolFailed(_))), "{failed:?}");
            store.sync()
        } else {
            store.sync()
        };
        assert!(matches!(first, Err(PoolError::Failed { .. })));
        assert!(store.sync().is_err(), "the disk works again, the pool does not");
        assert!(store.close().is_err());
        let refused = |result| assert!(matches!(result, Err(IoError::PoolFailed(_))), "{result:?}");
        refused(volume.write(0, &[1]));
        refused(volume.write(3 * MIB, &[1]));
        refused(volume.discard(0, MIB));
        refused(volume.write_zeroes(0, 512, false));
        assert_eq!(read(&volume, 0, 1), [1], "reads go on");
    }
}

#[test]
fn a_checkpoint_may_be_killed_at_any_step() {
    let (dir, store, volume) = with_volume(64, 64 * MIB);
    // More rows than one transaction takes, with overwritten, freed and reused extents.
    for extent in 0..40 {
        volume.write(extent * MIB, &[1]).unwrap();
    }
    volume.discard(3 * MIB, 9 * MIB).unwrap();
    store.sync().unwrap();
    for extent in 5..8 {
        volume.write(extent * MIB, &[2]).unwrap();
    }
    let expected: Vec<u8> = (0..64).map(|e| read(&volume, e * MIB, 1)[0]).collect();
    let path = dir.path().to_owned();
    let killed = Arc::new(Mutex::new(Vec::new()));
    let copies = Arc::clone(&killed);
    store.core.probe.watch(move |step| {
        copies.lock().unwrap().push((step, snapshot(&path)));
        Ok(())
    });
    store.close().unwrap();
    let killed = std::mem::take(&mut *killed.lock().unwrap());
    let commits = killed.iter().filter(|k| k.0 == Step::CheckpointCommit);
    assert!(commits.count() >= 3, "several transactions");
    assert_eq!(killed.last().unwrap().0, Step::CheckpointCommitted);
    for (n, (step, copy)) in killed.iter().enumerate() {
        for round in 0..2 {
            let store = open(copy.path(), 64);
            let volume = store.volume("v").unwrap();
            for (extent, byte) in (0..64).zip(&expected) {
                let context = format!("step {n} {step:?} round {round} extent {extent}");
                assert_eq!(read(&volume, extent * MIB, 1)[0], *byte, "{context}");
            }
            store.check().unwrap();
            store.close().unwrap();
        }
    }
}

#[test]
fn a_failing_checkpoint_fails_the_pool_and_the_next_start_repeats_it() {
    for failing in [Step::CheckpointSwapped, Step::CheckpointCommit] {
        let (dir, store, volume) = with_volume(40, 40 * MIB);
        for extent in 0..40 {
            volume.write(extent * MIB, &[9]).unwrap();
        }
        let mut passed = 0;
        store.core.probe.watch(move |step| {
            passed += u32::from(step == failing);
            // The second transaction, or the first step.
            if step == failing && (passed == 2 || step == Step::CheckpointSwapped) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(())
        });
        assert!(store.close().is_err());
        assert!(matches!(volume.write(0, &[1]), Err(IoError::PoolFailed(_))));
        drop((store, volume));
        let store = open(dir.path(), 40);
        let volume = store.volume("v").unwrap();
        for extent in 0..40 {
            assert_eq!(read(&volume, extent * MIB, 1), [9]);
        }
        store.check().unwrap();
    }
}

/// The metadata's second transaction finds no room, while the switch is on.
fn without_room(store: &Store) -> Arc<AtomicBool> {
    let full = Arc::new(AtomicBool::new(true));
    let (is_full, mut passed) = (Arc::clone(&full), 0);
    store.core.probe.watch(move |step| {
        passed = if step == Step::CheckpointSwapped { 0 } else { passed };
        passed += u32::from(step == Step::CheckpointCommit);
        if step == Step::CheckpointCommit && passed == 2 && is_full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    });
    full
}

/// As if the pause between two attempts had passed.
fn try_again_now(store: &Store) {
    store.core.state().log.no_room_until = Some(Instant::now());
}

#[test]
fn a_checkpoint_without_room_waits_in_the_journal_and_loses_nothing() {
    // So many records that the metadata takes them in several transactions.
    let (dir, store, volume) = with_volume(400, 400 * MIB);
    let full = without_room(&store);
    let is_waiting = |store: &Store| {
        store.core.join_checkpoint();
        store.core.state().log.no_room_until.is_some()
    };
    let mut written = 0;
    let refused = loop {
        match volume.write(written * MIB, &[9]) {
            Ok(()) => written += 1,
            Err(refused) => break refused,
        }
        if written == u64::from(SWAP_RECORDS) + 1 {
            assert!(is_waiting(&store), "half a journal is full and cannot be applied");
        }
    };
    assert!(matches!(refused, IoError::NoSpace), "{refused}");
    assert_eq!(written, u64::from(SWAP_RECORDS + FILE_RECORDS), "all of the journal was used");
    // Neither is the rest: what has its place is written, read and synced, and a discard is refused for the moment.
    volume.write(MIB, &[7]).unwrap();
    store.sync().unwrap();
    assert!(matches!(volume.discard(2 * MIB, MIB), Err(IoError::NoSpace)));
    let killed = snapshot(dir.path());
    for attempt in 0..2 {
        try_again_now(&store);
        assert!(matches!(volume.write(written * MIB, &[9]), Err(IoError::NoSpace)), "{attempt}");
        assert!(matches!(store.close(), Err(PoolError::NoRoom)), "{attempt}");
    }
    let expected = mapping(&volume);
    for copy in [killed, snapshot(dir.path())] {
        let store = open(copy.path(), 400);
        assert_eq!(mapping(&store.volume("v").unwrap()), expected);
        store.check().unwrap();
    }

    full.store(false, Ordering::SeqCst);
    // The pause is not over, however slow this machine is.
    store.core.state().log.no_room_until = Some(Instant::now() + Duration::from_secs(3600));
    assert!(matches!(volume.write(written * MIB, &[9]), Err(IoError::NoSpace)), "not yet");
    try_again_now(&store);
    volume.write(written * MIB, &[9]).unwrap();
    volume.discard(2 * MIB, MIB).unwrap();
    store.close().unwrap();
    assert_eq!(store.usage().log_records, 0);
    let expected = mapping(&volume);
    drop((store, volume));
    let store = open(dir.path(), 400);
    assert_eq!(mapping(&store.volume("v").unwrap()), expected);
    store.check().unwrap();
}

#[test]
fn a_full_disk_at_a_sync_is_a_failed_one() {
    for failing in [Step::SyncPool, Step::SyncJournal] {
        let (_dir, store, volume) = with_volume(128, 128 * MIB);
        store.core.probe.watch(move |step| {
            if step == failing {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Ok(())
        });
        for extent in 0..=u64::from(SWAP_RECORDS) {
            let _fails_once_it_is_known = volume.write(extent * MIB, &[1]);
        }
        store.core.join_checkpoint();
        assert!(matches!(volume.write(0, &[1]), Err(IoError::PoolFailed(_))), "{failing:?}");
    }
}

#[test]
fn a_checkpoint_syncs_before_it_commits() {
    let (_dir, store, volume) = with_volume(70, 70 * MIB);
    let steps = trace(&store);
    for extent in 0..66 {
        volume.write(extent * MIB, &[1]).unwrap();
    }
    store.core.join_checkpoint();
    let steps = steps.lock().unwrap();
    let at = |step| steps.iter().position(|s| *s == step).unwrap();
    assert!(at(Step::CheckpointSwapped) < at(Step::SyncPool));
    assert!(at(Step::SyncPool) < at(Step::SyncJournal));
    assert!(at(Step::SyncJournal) < at(Step::CheckpointCommit));
}

/// extent -> slot of a volume
fn mapping(volume: &Volume) -> Vec<(u32, u32)> {
    let mut all = Vec::new();
    volume.map.for_each(|extent, slot, _| all.push((extent, slot)));
    all
}

#[test]
fn a_torn_journal_leaves_a_prefix() {
    use crate::store::layout::{JOURNAL_FILES, RECORD_BYTES};
    let (dir, store, volume) = with_volume(16, 16 * MIB);
    let mut prefixes = vec![mapping(&volume)];
    let steps: [(u64, bool); 14] = [
        (0, true),
        (1, true),
        (2, true),
        (1, false),
        (3, true),
        (1, true),
        (0, false),
        (4, true),
        (2, false),
        (2, true),
        (0, true),
        (3, false),
        (5, true),
        (5, false),
    ];
    for (extent, write) in steps {
        if write {
            volume.write(extent * MIB, &[0xCC; 8192]).unwrap();
        } else {
            volume.discard(extent * MIB, MIB).unwrap();
            store.sync().unwrap();
        }
        prefixes.push(mapping(&volume));
    }
    assert_eq!(store.usage().log_records, 14, "one record each");
    let whole = snapshot(dir.path());
    for at in (0..14 * RECORD_BYTES).step_by(RECORD_BYTES / 2) {
        for cut in [false, true] {
            let torn = snapshot(whole.path());
            let journal = torn.path().join(JOURNAL_FILES[0]);
            let mut bytes = fs::read(&journal).unwrap();
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= 0xFF;
            }
            fs::write(&journal, bytes).unwrap();
            let store = open(torn.path(), 16);
            let volume = store.volume("v").unwrap();
            let expected = &prefixes[at / RECORD_BYTES];
            assert_eq!(mapping(&volume), *expected, "byte {at} cut {cut}");
            store.check().unwrap();
            // What was lost must not come back behind what is written now.
            volume.write(9 * MIB, &[5]).unwrap();
            volume.write(10 * MIB + 77, &[6]).unwrap();
            let now = mapping(&volume);
            let killed = snapshot(torn.path());
            let store = open(killed.path(), 16);
            let volume = store.volume("v").unwrap();
            assert_eq!(mapping(&volume), now, "byte {at} cut {cut}, second kill");
            assert_eq!(read(&volume, 10 * MIB + 76, 3), [0, 6, 0]);
            store.check().unwrap();
        }
    }
}

#[test]
fn a_kill_during_a_checkpoint_leaves_records_in_both_files() {
    use crate::store::layout::{JOURNAL_FILES, RECORD_BYTES};
    let (dir, store, volume) = with_volume(16, 16 * MIB);
    for extent in [0, 1, 2, 3] {
        volume.write(extent * MIB, &[1]).unwrap();
        volume.discard((extent / 2) * MIB, MIB).unwrap();
    }
    let records = store.usage().log_records;
    let expected = mapping(&volume);
    let whole = fs::read(dir.path().join(JOURNAL_FILES[0])).unwrap();
    for split in 1..usize::try_from(records).unwrap() {
        for (older, newer) in [(0, 1), (1, 0)] {
            // As if the files had been swapped after `split` records.
            let killed = snapshot(dir.path());
            let mut files = [vec![0; whole.len()], vec![0; whole.len()]];
            let (at, end) = (split * RECORD_BYTES, whole.len());
            files[older][..at].copy_from_slice(&whole[..at]);
            files[newer][..end - at].copy_from_slice(&whole[at..]);
            for (name, bytes) in JOURNAL_FILES.iter().zip(files) {
                fs::write(killed.path().join(name), bytes).unwrap();
            }
            let store = open(killed.path(), 16);
            let volume = store.volume("v").unwrap();
            assert_eq!(mapping(&volume), expected, "split {split}");
            volume.write(9 * MIB, &[5]).unwrap();
            store.core.join_checkpoint();
            volume.write(10 * MIB, &[6]).unwrap();
            let left = u64::try_from(split).unwrap();
            assert_eq!(store.usage().log_records, records - left + 2, "the older is applied");
            let now = mapping(&volume);
            let again = snapshot(killed.path());
            let store = open(again.path(), 16);
            assert_eq!(mapping(&store.volume("v").unwrap()), now, "split {split}");
            store.close().unwrap();
            store.check().unwrap();
        }
    }
}

#[test]
fn background_checkpoints_keep_up_with_endless_changes() {
    let (dir, store, volume) = with_volume(4, 4 * MIB);
    for round in 0..400u64 {
        volume.write(round % 4 * MIB, &round.to_le_bytes()).unwrap();
        volume.discard((round + 1) % 4 * MIB, MIB).unwrap();
        assert!(store.usage().log_records <= 256, "two files of 128");
    }
    let last = read(&volume, 399 % 4 * MIB, 8);
    let killed = snapshot(dir.path());
    drop((store, volume));
    for path in [killed.path(), dir.path()] {
        let store = open(path, 4);
        assert_eq!(read(&store.volume("v").unwrap(), 399 % 4 * MIB, 8), last);
        store.check().unwrap();
    }
}

/// Whoever checks a store while it syncs: the sync has freed slots in its hands, and they are neither lost nor free.
#[test]
fn a_slot_in_a_running_sync_is_not_lost() {
    let (_dir, store, volume) = with_volume(2, 2 * MIB);
    volume.write(0, &[9]).unwrap();
    volume.discard(0, MIB).unwrap();
    let syncing = store.core.state().slots.sync_begins();
    assert_eq!(syncing.len(), 1);
    store.check().unwrap();
    store.core.state().slots.sync_done(&syncing);
    store.check().unwrap();
}
