//! A `meta.redb` older than what was acknowledged is refused; a mark that lags or is damaged refuses nothing.

use std::os::unix::fs::FileExt;

use super::*;
use crate::store::layout::{MARK_BYTES, MARK_OFFSETS, META_FILE, POOL_FILE, PoolHeader};
use crate::store::mark::Mark;
use crate::store::meta::Meta;
use crate::store::{MetaError, OpenError};

/// How often the tests change the pool: an even and an odd number, for the mark's two places.
const CHANGES: [u64; 2] = [4, 5];

type Change = fn(&Store);

/// A killed server's files after so many access records, and `meta.redb` as it was before `last`.
fn before_and_after(changes: u64, last: Change) -> (TempDir, Vec<u8>) {
    let (dir, store, volume) = with_volume(8, MIB);
    for n in 0..changes {
        store.put_access(volume.id(), &n.to_le_bytes()).unwrap();
    }
    let before = fs::read(dir.path().join(META_FILE)).unwrap();
    last(&store);
    (snapshot(dir.path()), before)
}

fn pool_file(dir: &Path) -> fs::File {
    fs::File::options().read(true).write(true).open(dir.join(POOL_FILE)).unwrap()
}

fn mark_in(dir: &Path) -> u64 {
    let pool = pool_file(dir);
    let mut header = [0; 64];
    pool.read_exact_at(&mut header, 0).unwrap();
    Mark::read(pool, PoolHeader::decode(&header).unwrap().pool_id).unwrap().change()
}

#[test]
fn the_file_as_it_was_before_any_change_is_refused() {
    let kinds: [(&str, Change); 5] = [
        ("an access record", |store| {
            let id = store.list()[0].id;
            store.put_access(id, b"new").unwrap();
        }),
        ("a new volume", |store| {
            store.create_volume("w", MIB).unwrap();
        }),
        ("a larger volume", |store| {
            store.resize_volume("v", 2 * MIB).unwrap();
        }),
        ("a deleted volume", |store| store.delete_volume("v").unwrap()),
        ("a clean close", |store| store.close().unwrap()),
    ];
    for (what, change) in kinds {
        for changes in CHANGES {
            let (dir, before) = before_and_after(changes, change);
            drop(open(snapshot(dir.path()).path(), 8));
            fs::write(dir.path().join(META_FILE), before).unwrap();
            let error = Store::open(dir.path(), config(8)).expect_err(what);
            let OpenError::RolledBack { path, found, acknowledged } = &error else {
                panic!("{what}: {error}");
            };
            assert!(path.ends_with(META_FILE) && found < acknowledged, "{what}: {error}");
            assert!(error.to_string().contains("restore all files"), "{error}");
        }
    }
}

/// A power loss can leave a mark of earlier, or none, beside a `meta.redb` that has everything.
#[test]
fn a_mark_that_lags_or_is_damaged_refuses_nothing() {
    for changes in CHANGES {
        let (dir, _) = before_and_after(changes, |_| {});
        let harms: [&[u64]; 3] = [&MARK_OFFSETS[..1], &MARK_OFFSETS[1..], &MARK_OFFSETS];
        for (offsets, fill) in harms.into_iter().flat_map(|at| [(at, 0), (at, 0xA5)]) {
            let copy = snapshot(dir.path());
            for at in offsets {
                pool_file(copy.path()).write_all_at(&[fill; MARK_BYTES], *at).unwrap();
            }
            let store = open(copy.path(), 8);
            let id = store.list()[0].id;
            assert_eq!(store.access(id).unwrap(), (changes - 1).to_le_bytes());
            store.put_access(id, b"later").unwrap();
            drop(store);
            assert!(mark_in(copy.path()) > mark_in(dir.path()), "it goes on");
        }
    }
}

/// Killed after the engine's commit and before the mark: nobody was told, both are fine.
#[test]
fn a_change_that_nobody_was_told_of_may_be_there() {
    for changes in CHANGES {
        let (dir, store, volume) = with_volume(8, MIB);
        for n in 0..changes {
            store.put_access(volume.id(), &n.to_le_bytes()).unwrap();
        }
        let before = fs::read(dir.path().join(POOL_FILE)).unwrap();
        store.put_access(volume.id(), b"new").unwrap();
        let copy = snapshot(dir.path());
        fs::write(copy.path().join(POOL_FILE), before).unwrap();
        assert_eq!(mark_in(copy.path()) + 1, mark_in(dir.path()));
        assert_eq!(open(copy.path(), 8).access(volume.id()).unwrap(), b"new");
    }
}

#[test]
fn a_pool_of_an_older_server_gets_a_mark_with_its_first_change() {
    let (dir, store, _volume) = with_volume(8, MIB);
    store.core.meta.forget_changes();
    let copy = snapshot(dir.path());
    for at in MARK_OFFSETS {
        pool_file(copy.path()).write_all_at(&[0; MARK_BYTES], at).unwrap();
    }
    assert_eq!(mark_in(copy.path()), 0);
    let old = fs::read(copy.path().join(META_FILE)).unwrap();
    drop(open(copy.path(), 8));
    assert!(mark_in(copy.path()) > 0);
    drop(open(copy.path(), 8));
    fs::write(copy.path().join(META_FILE), old).unwrap();
    let error = Store::open(copy.path(), config(8)).unwrap_err();
    assert!(matches!(error, OpenError::RolledBack { found: 0, .. }), "{error}");
}

/// Changes end in any order on their threads; the mark is the highest of them.
#[test]
fn changes_at_once_leave_the_highest_mark() {
    let (dir, store, volume) = with_volume(8, MIB);
    std::thread::scope(|scope| {
        for n in 0..4u8 {
            let (store, volume) = (&store, &volume);
            scope.spawn(move || {
                for _ in 0..25 {
                    store.core.meta.put_access(volume.id().0, &[n]).unwrap();
                }
            });
        }
    });
    assert_eq!(mark_in(dir.path()), store.core.meta.last_change().unwrap());
}

/// The mark is never ahead: it is written when the change is durable, and who cannot write it says so.
#[test]
fn a_mark_that_cannot_be_written_fails_a_change_that_is_durable() {
    let (dir, store, volume) = with_volume(8, MIB);
    let mut header = [0; 64];
    pool_file(dir.path()).read_exact_at(&mut header, 0).unwrap();
    let id = PoolHeader::decode(&header).unwrap().pool_id;
    let copy = snapshot(dir.path());
    let read_only = fs::File::open(copy.path().join(POOL_FILE)).unwrap();
    let mut meta = Meta::open(&copy.path().join(META_FILE)).unwrap();
    meta.keep_mark(Mark::read(read_only, id).unwrap());
    let before = meta.last_change().unwrap();
    let error = meta.put_access(volume.id().0, b"new").unwrap_err();
    assert!(matches!(error, MetaError::Mark(_)), "{error}");
    assert_eq!(meta.last_change().unwrap(), before + 1);
    drop((meta, store));
    assert_eq!(open(copy.path(), 8).access(volume.id()).unwrap(), b"new");
}

#[test]
fn a_lower_number_never_covers_a_higher_one() {
    let (dir, store, _volume) = with_volume(8, MIB);
    drop(store);
    let mut header = [0; 64];
    pool_file(dir.path()).read_exact_at(&mut header, 0).unwrap();
    let id = PoolHeader::decode(&header).unwrap().pool_id;
    let mark = Mark::read(pool_file(dir.path()), id).unwrap();
    for change in [100, 102, 101, 98] {
        mark.durable(change).unwrap();
    }
    assert_eq!(mark_in(dir.path()), 102);
}
