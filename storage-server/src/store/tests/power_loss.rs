//! The durability generation: what an open says of the time before it.

use std::io;

use super::*;
use crate::store::generation::DurabilityRow;
use crate::store::probe::Step;
use crate::store::{BootId, IoError};

fn boot(number: u32) -> BootId {
    BootId::parse(&format!("{number:032x}"))
}

fn opened(dir: &Path, boot: BootId) -> (Arc<Store>, Arc<Volume>) {
    let store = Store::open_on(dir, config(8), boot).unwrap();
    let volume = store.volume("v").unwrap_or_else(|| {
        store.create_volume("v", 8 * MIB).unwrap();
        store.volume("v").unwrap()
    });
    (store, volume)
}

/// The generation that another open of the same files gives, on this boot and on another.
fn generations(dir: &Path) -> (u64, u64) {
    let of = |boot| opened(snapshot(dir).path(), boot).0.durability_generation();
    (of(boot(1)), of(boot(2)))
}

#[test]
fn a_kill_leaves_the_generation_and_a_power_loss_raises_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, volume) = opened(dir.path(), boot(1));
    assert_eq!(store.durability_generation(), 1);
    assert_eq!(generations(dir.path()), (1, 2), "before the first change");
    volume.write(0, &[1; 512]).unwrap();
    assert_eq!(generations(dir.path()), (1, 2));
    store.sync().unwrap();
    assert_eq!(generations(dir.path()), (1, 2), "who knows what came after the sync");
    drop((store, volume));
    for (number, generation) in [(1, 1), (2, 2), (2, 2), (3, 3), (1, 4)] {
        let (store, _volume) = opened(dir.path(), boot(number));
        assert_eq!(store.durability_generation(), generation);
    }
}

#[test]
fn a_clean_close_leaves_the_generation_whatever_happens_to_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (store, volume) = opened(dir.path(), boot(1));
    volume.write(0, &[1; 512]).unwrap();
    store.close().unwrap();
    assert_eq!(generations(dir.path()), (1, 1));
    // It is the open that ends this, not the first change: whoever opened may have acknowledged something.
    drop((store, volume));
    let (_store, _volume) = opened(dir.path(), boot(2));
    let after = opened(snapshot(dir.path()).path(), boot(3)).0;
    assert_eq!(after.durability_generation(), 2);
}

#[test]
fn the_clean_note_comes_after_the_last_sync_and_ends_before_the_next_change() {
    let dir = tempfile::tempdir().unwrap();
    let (store, volume) = opened(dir.path(), boot(1));
    volume.write(0, &[1; 512]).unwrap();
    let path = dir.path().to_owned();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    store.core.probe.watch(move |step| {
        sink.lock().unwrap().push((step, snapshot(&path)));
        Ok(())
    });
    store.close().unwrap();
    let killed = std::mem::take(&mut *seen.lock().unwrap());
    assert!(killed.iter().any(|k| k.0 == Step::CheckpointCommitted));
    for (step, copy) in killed {
        assert_eq!(generations(copy.path()), (1, 2), "{step:?}");
    }
    for change in [
        |v: &Volume| v.write(5 * MIB, &[2]),
        |v: &Volume| v.write(0, &[2]),
        |v: &Volume| v.discard(0, MIB),
        |v: &Volume| v.write_zeroes(0, 512, false),
    ] {
        store.close().unwrap();
        assert_eq!(generations(dir.path()), (1, 1));
        change(&volume).unwrap();
        assert_eq!(generations(dir.path()), (1, 2));
        seen.lock().unwrap().clear();
    }
    // The first thing that a change does to the pool finds the note gone.
    store.close().unwrap();
    seen.lock().unwrap().clear();
    volume.write(6 * MIB, &[3]).unwrap();
    let killed = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(generations(killed[0].1.path()), (1, 2), "{:?}", killed[0].0);
}

/// The kernel forgets pages it could not write: the page cache shows what no disk has.
#[test]
fn a_failed_sync_raises_the_generation_at_the_next_open_even_on_the_same_boot() {
    let dir = tempfile::tempdir().unwrap();
    let (store, volume) = opened(dir.path(), boot(1));
    volume.write(0, &[1; 512]).unwrap();
    store.core.probe.watch(|step| match step {
        Step::SyncPool => Err(io::Error::from_raw_os_error(libc::EIO)),
        _ => Ok(()),
    });
    store.sync().unwrap_err();
    assert!(store.close().is_err());
    assert!(matches!(volume.write(0, &[2]), Err(IoError::PoolFailed(_))));
    assert_eq!(store.durability_generation(), 1, "this server goes on saying what it said");
    assert_eq!(generations(dir.path()), (2, 2));
    drop((store, volume));
    let (_store, _volume) = opened(dir.path(), boot(1));
    assert_eq!(generations(dir.path()), (2, 3), "once");
}

#[test]
fn a_pool_from_before_there_were_generations_begins_with_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = opened(dir.path(), boot(1));
    store.core.meta.forget_durability();
    drop(store);
    let (store, _volume) = opened(dir.path(), boot(2));
    assert_eq!(store.durability_generation(), 1);
    let row = store.core.meta.durability().unwrap();
    assert_eq!(row, Some(DurabilityRow { generation: 1, boot: boot(2), clean: false }));
}

#[test]
fn the_server_opens_on_the_boot_of_its_kernel() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), 8));
    let store = open(dir.path(), 8);
    assert_eq!(store.durability_generation(), 1);
    drop(store);
    drop(opened(dir.path(), boot(1)));
    assert_eq!(open(dir.path(), 8).durability_generation(), 3, "there and back");
}
