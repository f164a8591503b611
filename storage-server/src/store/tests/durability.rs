//! What survives a kill of the process, and what a sync puts in which order.

use std::io;
use std::sync::{Arc, Mutex};

use super::*;
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
        [Step::Journal, Step::SyncPool, Step::SyncJournal]
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
        assert!(
            store.sync().is_err(),
            "the disk works again, the pool does not"
        );
        assert!(store.close().is_err());
        let refused = |result| assert!(matches!(result, Err(IoError::PoolFailed(_))), "{result:?}");
        refused(volume.write(0, &[1]));
        refused(volume.write(3 * MIB, &[1]));
        refused(volume.discard(0, MIB));
        refused(volume.write_zeroes(0, 512, false));
        assert_eq!(read(&volume, 0, 1), [1], "reads go on");
    }
}
