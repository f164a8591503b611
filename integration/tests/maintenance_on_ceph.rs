//! What other clients do with an image while a guest writes it. This client has the image's lock, so that Ceph's tools ask
//! it to take the snapshots and to change the size; with its one thread for answers (`librados_thread_count`), nothing
//! that librbd does there may wait for another answer.

use baton_remote_client::{Op, Tag, VolumeQueue};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use completions::collect;
use image::{IMAGE_BYTES, MIB, SOON, cluster, opened, parts, run};

#[path = "support/completions.rs"]
mod completions;
#[path = "support/image.rs"]
mod image;

const BLOCK: usize = 4096;
/// Two in each object of the image's first half.
const BLOCKS: u64 = IMAGE_BYTES / (4 * MIB);

fn at(block: u64) -> u64 {
    block * 2 * MIB
}

/// A guest that writes every block again and again, with a number that rises.
struct Writer<'a> {
    /// Of each block: the number that was answered last.
    answered: &'a [AtomicU64],
    /// Of each block: the number that was sent last.
    sent: &'a [AtomicU64],
}

impl Writer<'_> {
    /// One number to every block, all under way together.
    fn round(&self, queue: &mut dyn VolumeQueue, number: u64) {
        let mut data: Vec<_> = (0..BLOCKS)
            .map(|block| (number << 16 | block).to_le_bytes().repeat(BLOCK / 8))
            .collect();
        for (block, data) in (0..BLOCKS).zip(&mut data) {
            self.sent[usize::try_from(block).unwrap()].store(number, Ordering::SeqCst);
            let op = Op::Write { offset: at(block) };
            // SAFETY: the data lives to the end of the round, which waits for all answers.
            unsafe { queue.submit(Tag(u32::try_from(block).unwrap()), op, &parts(data)) };
        }
        let mut left = data.len();
        while left > 0 {
            let done = collect(queue, 1, SOON);
            assert!(!done.is_empty(), "{left} writes were not answered");
            for one in &done {
                assert_eq!(one.result, Ok(()));
                let block = usize::try_from(one.tag.0).unwrap();
                self.answered[block].store(number, Ordering::SeqCst);
            }
            left -= done.len();
        }
    }
}

fn numbers(of: &[AtomicU64]) -> Vec<u64> {
    of.iter().map(|number| number.load(Ordering::SeqCst)).collect()
}

#[test]
fn snapshots_clones_and_growth_go_on_beside_writes_and_lose_none() {
    let name = "snapshots_clones_and_growth_go_on_beside_writes_and_lose_none";
    let Some((_dir, ceph)) = cluster(name) else { return };
    let volume = opened(&ceph.uri("v"));
    let zeros = || (0..BLOCKS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (answered, sent) = (zeros(), zeros());
    let writer = Writer { answered: &answered, sent: &sent };
    let stop = AtomicBool::new(false);
    let mut queue = volume.open_queue(0, 64).unwrap();
    writer.round(&mut *queue, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 1;
            while !stop.load(Ordering::SeqCst) {
                number += 1;
                writer.round(&mut *queue, number);
            }
        });
        // Also when something here fails: nobody is to write for ever.
        let stop = StopLater(&stop);
        for step in 0..3_u64 {
            let snapshot = format!("rbd/v@s{step}");
            let before = numbers(&answered);
            ceph.rbd(&["snap", "create", &snapshot]).unwrap();
            let after = numbers(&sent);
            // What the snapshot has was answered before it, or under way beside it.
            let has = ceph.export(&format!("v@s{step}")).unwrap();
            for block in 0..BLOCKS {
                let from = usize::try_from(at(block)).unwrap();
                let words: Vec<_> = has[from..from + BLOCK]
                    .chunks(8)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                    .collect();
                assert!(words.iter().all(|word| *word == words[0]), "{snapshot}: block {block}");
                let (number, whose) = (words[0] >> 16, words[0] & 0xffff);
                let n = usize::try_from(block).unwrap();
                assert_eq!(whose, block);
                let may = before[n]..=after[n];
                assert!(may.contains(&number), "{snapshot}: block {block}: {number} of {may:?}");
            }
            ceph.rbd(&["snap", "protect", &snapshot]).unwrap();
            let clone = format!("rbd/c{step}");
            ceph.rbd(&["clone", &snapshot, &clone]).unwrap();
            ceph.grow_image("v", IMAGE_BYTES * (step + 2)).unwrap();
            ceph.rbd(&["flatten", "--no-progress", &clone]).unwrap();
            ceph.rbd(&["snap", "unprotect", &snapshot]).unwrap();
            ceph.rbd(&["snap", "rm", "--no-progress", &snapshot]).unwrap();
        }
        drop(stop);
    });
    run(&mut *queue, Op::Flush, &mut []).unwrap();
    let last = numbers(&answered);
    assert!(last.iter().all(|number| *number > 3), "hardly any writes: {last:?}");
    for block in 0..BLOCKS {
        let mut back = vec![0; BLOCK];
        run(&mut *queue, Op::Read { offset: at(block) }, &mut back).unwrap();
        let word = last[usize::try_from(block).unwrap()] << 16 | block;
        assert!(back == word.to_le_bytes().repeat(BLOCK / 8), "block {block}");
    }
}

/// Says stop when it goes.
struct StopLater<'a>(&'a AtomicBool);

impl Drop for StopLater<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
