//! Many threads on the same extents.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::store::{IoError, Segment};

/// Small deterministic generator; a failure names its seed through the thread number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

#[test]
fn racing_first_writes_allocate_one_slot() {
    let (_dir, store, volume) = with_volume(64, 16 * MIB);
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for lane in 0..4u64 {
            let (volume, barrier) = (&volume, &barrier);
            scope.spawn(move || {
                for extent in 0..16 {
                    barrier.wait();
                    volume.write(extent * MIB + lane * 4096, &[9; 4096]).unwrap();
                }
            });
        }
    });
    assert_eq!(store.usage().allocated_bytes, 16 * MIB);
    for extent in 0..16 {
        assert!(read(&volume, extent * MIB, 4 * 4096).iter().all(|b| *b == 9));
    }
    store.check().unwrap();
}

/// Two volumes fight for too few slots. Nobody may ever see a byte of the other volume, and nothing may leak.
#[test]
fn volumes_never_see_each_others_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 6);
    let size = 5 * MIB;
    thread::scope(|scope| {
        for thread in 0..6u64 {
            let tag = u8::try_from(thread % 2 + 1).unwrap();
            let name = format!("v{tag}");
            let _exists = store.create_volume(&name, size);
            let volume = store.volume(&name).unwrap();
            let store = &store;
            scope.spawn(move || {
                let mut dice = Dice(thread);
                let file = fs::File::from(store.pool_fd().try_clone_to_owned().unwrap());
                for _ in 0..600 {
                    let offset = dice.roll(size / 4096) * 4096;
                    let len = (dice.roll(600) + 1) * 4096;
                    let len = len.min(size - offset);
                    let mut buf = vec![tag; usize::try_from(len).unwrap()];
                    let done = match dice.roll(12) {
                        0..4 => volume.write(offset, &buf),
                        4..6 => volume.discard(offset, len),
                        6 => volume.discard(0, size),
                        7 => volume.write_zeroes(offset, len, true),
                        8 => volume.write_zeroes(offset, len, false),
                        9 if dice.roll(8) == 0 => store.sync().map_err(IoError::from),
                        10 => volume.plan_read(offset, buf.len()).map(|plan| {
                            use std::os::unix::fs::FileExt;
                            let mut at = 0;
                            for segment in plan.segments() {
                                let part = &mut buf[at..at + segment.len()];
                                at += segment.len();
                                match segment {
                                    Segment::Zero { .. } => part.fill(0),
                                    Segment::Data { pool_offset, .. } => {
                                        file.read_exact_at(part, pool_offset).unwrap();
                                    }
                                }
                            }
                        }),
                        _ => volume.read(offset, &mut buf),
                    };
                    assert!(matches!(done, Ok(()) | Err(IoError::NoSpace)), "{done:?}");
                    assert!(buf.iter().all(|b| *b == 0 || *b == tag), "thread {thread}");
                }
            });
        }
    });
    store.check().unwrap();
    let killed = snapshot(dir.path());
    let again = open(killed.path(), 6);
    again.check().unwrap();
    for name in ["v1", "v2"] {
        let (old, new) = (store.volume(name).unwrap(), again.volume(name).unwrap());
        assert!(read(&old, 0, 5 << 20) == read(&new, 0, 5 << 20), "{name}");
    }
}

#[test]
fn a_volume_deleted_under_load_leaves_nothing() {
    let (_dir, store, volume) = with_volume(16, 16 * MIB);
    let begun = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let (volume, begun) = (&volume, &begun);
            scope.spawn(move || {
                let mut dice = Dice(thread);
                begun.wait();
                loop {
                    let offset = dice.roll(16) * MIB;
                    let done = match dice.roll(3) {
                        0 => volume.discard(offset, MIB),
                        _ => volume.write(offset, &[1; 512]),
                    };
                    match done {
                        Ok(()) => {}
                        Err(IoError::Deleted) => return,
                        Err(e) => panic!("{e}"),
                    }
                }
            });
        }
        begun.wait();
        store.delete_volume("v").unwrap();
    });
    assert_eq!(store.usage().allocated_bytes, 0);
    store.check().unwrap();
}

#[test]
fn growth_beside_discards_of_the_last_extent_loses_nothing() {
    let (_dir, store, volume) = with_volume(4, MIB + 512);
    thread::scope(|scope| {
        let discarding = scope.spawn(|| {
            for _ in 0..400 {
                volume.discard(MIB, 512).unwrap();
            }
        });
        for sectors in 2..100u64 {
            store.resize_volume("v", MIB + sectors * 512).unwrap();
            volume.write(MIB + (sectors - 1) * 512, &[1; 512]).unwrap();
        }
        discarding.join().unwrap();
    });
    for sectors in 2..100u64 {
        let there = read(&volume, MIB + (sectors - 1) * 512, 512);
        assert!(there.iter().all(|b| *b == 1), "sector {sectors}");
    }
    // The same without luck: a discard that saw the size before the growth.
    let kept = store.core.unmap(&volume, &[1], MIB + 512).unwrap();
    assert_eq!(kept, [1], "an extent that may have new data stays");
    assert_eq!(read(&volume, MIB + 512, 1), [1]);
    store.check().unwrap();
}

/// Writers that each sync after every write: whoever returns has a sync that began after its write.
#[test]
fn syncs_are_shared_but_never_too_early() {
    use crate::store::probe::Step;
    use std::sync::atomic::{AtomicU64, Ordering};
    let (_dir, store, volume) = with_volume(8, 8 * MIB);
    volume.write(0, &[1]).unwrap();
    let begun = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&begun);
    store.core.probe.watch(move |step| {
        if step == Step::SyncPool {
            count.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    });
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let before = begun.load(Ordering::SeqCst);
                    store.sync().unwrap();
                    assert!(begun.load(Ordering::SeqCst) > before);
                }
            });
        }
    });
    assert!(begun.load(Ordering::SeqCst) <= 200);
}
