//! A guest that writes anything into its rings, while another queue of the same disk works on.

use crate::support::{Random, SOON, Stack, say, seed};
use baton_integration::blk::{OK, Request};
use baton_integration::memory::GuestMemory;
use baton_integration::raw_frontend::{Options, Queue, RawFrontend};
use baton_integration::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_secs(8);
const QUEUE_SIZE: u16 = 64;
/// The other queue's sectors begin here. No header that can be read from the arena below names one of them.
const VERIFIED: u64 = 500_000;
const ARENA_BYTES: u64 = 64 << 10;

/// Memory of the hostile queue. Headers lie at every 16 bytes of `headers`, which the device only reads; it writes
/// only to `sink`. Lengths that can be part of a header are multiples of four, so that fields mix and bytes do not.
struct Arena {
    memory: Arc<GuestMemory>,
    headers: u64,
    sink: u64,
    tables: u64,
}

impl Arena {
    fn new(memory: &Arc<GuestMemory>, random: &mut Random) -> Self {
        let size = usize::try_from(ARENA_BYTES).unwrap();
        let alloc = || memory.alloc(size, 4096).unwrap();
        let this =
            Self { memory: Arc::clone(memory), headers: alloc(), sink: alloc(), tables: alloc() };
        for at in (0..ARENA_BYTES).step_by(16) {
            let kind = random.pick(&[0_u32, 0, 1, 1, 4, 8, 11, 13, 2, 99]);
            let sector = random.below(1 << 16);
            memory.write(this.headers + at, &baton_integration::blk::header(kind, sector));
        }
        this
    }

    fn descriptor(&self, random: &mut Random, indirect: bool) -> Descriptor {
        let slot = |random: &mut Random, base: u64| base + 16 * random.below(ARENA_BYTES / 16);
        let len = |random: &mut Random| {
            random.pick(&[0_u32, 4, 8, 12, 16, 16, 16, 32, 512, 4096, 1 << 16, 1 << 20, !3])
        };
        let next = u16::try_from(random.below(u64::from(QUEUE_SIZE) + 2)).unwrap();
        let chained = if random.below(4) != 0 { NEXT } else { 0 };
        match random.below(12) {
            0 => Descriptor { addr: random.next(), len: len(random), flags: chained, next },
            1 => Descriptor { addr: random.next(), len: len(random), flags: WRITE | chained, next },
            2 if indirect => {
                let entries = u32::try_from(random.below(40)).unwrap();
                let flags = INDIRECT | if random.below(4) == 0 { chained } else { 0 };
                Descriptor { addr: slot(random, self.tables), len: 16 * entries, flags, next }
            }
            3..=6 => {
                let len = random.pick(&[0_u32, 1, 1, 1, 3, 512, 513, 1000, 4096]);
                // The last pages are out of reach, so that nothing runs out of the sink.
                let addr = self.sink + random.below(ARENA_BYTES - 4096);
                Descriptor { addr, len, flags: WRITE | chained, next }
            }
            _ => Descriptor {
                addr: slot(random, self.headers),
                len: len(random),
                flags: chained,
                next,
            },
        }
    }

    fn refill_tables(&self, random: &mut Random) {
        for at in (0..ARENA_BYTES).step_by(16) {
            let mut descriptor = self.descriptor(random, random.0 & 0xf00 == 0);
            descriptor.next %= 40;
            self.memory.write(self.tables + at, &descriptor.bytes());
        }
    }
}

/// Writes blocks and reads them back until told to stop; returns how many.
fn verified(queue: &mut Queue, stop: &AtomicBool) -> u64 {
    let mut rounds = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let value = u8::try_from(rounds % 251).unwrap();
        let sector = VERIFIED + rounds % 16 * 8;
        queue.write(sector, &[value; 4096]).unwrap();
        let done = queue.request(&Request::Read { sector, len: 4096 }).unwrap();
        assert_eq!((done.status, done.data == [value; 4096]), (OK, true), "round {rounds}");
        rounds += 1;
    }
    rounds
}

fn reset(front_end: &mut RawFrontend) {
    front_end.get_vring_base(0).unwrap();
    front_end.queue(0).ring.reset();
    let _ = front_end.queue(0).err.read();
    front_end.set_up_queue(0, 0).unwrap();
    front_end.enable(0, true).unwrap();
}

#[test]
fn a_hostile_queue_hurts_nobody_else() {
    let mut random = Random(seed());
    let mut stack = Stack::start(&["--num-queues", "2"]);
    let options = Options { queues: 2, queue_size: QUEUE_SIZE, ..Options::default() };
    let mut front_end = stack.connect(options);
    let arena = Arena::new(&front_end.memory().clone(), &mut random);
    let headers = arena.memory.read(arena.headers, usize::try_from(ARENA_BYTES).unwrap());
    let mut good = front_end.take_queue(1);
    let stop = AtomicBool::new(false);
    let (mut offered, mut broken) = (0_u64, 0_u64);
    let rounds = std::thread::scope(|scope| {
        let load = scope.spawn(|| verified(&mut good, &stop));
        let end = Instant::now() + TIME;
        while Instant::now() < end && !load.is_finished() {
            arena.refill_tables(&mut random);
            for index in 0..QUEUE_SIZE {
                let descriptor = arena.descriptor(&mut random, true);
                front_end.queue(0).ring.write_descriptor(index, descriptor);
            }
            let count = random.below(64);
            let ring = &mut front_end.queue(0).ring;
            for _ in 0..count {
                ring.stage(u16::try_from(random.below(u64::from(QUEUE_SIZE))).unwrap());
            }
            ring.commit();
            offered += count;
            match random.below(200) {
                0 => ring.jump_avail_index(u16::try_from(random.below(1 << 16)).unwrap()),
                1 => ring.publish(u16::try_from(random.below(1 << 16)).unwrap()),
                _ => {}
            }
            front_end.queue(0).kick_anyway().unwrap();
            // The device works on the ring while it is overwritten, now and then; else it is waited for.
            if random.below(3) != 0 {
                let target = front_end.queue(0).ring.avail_index();
                let patience = Instant::now() + SOON;
                while front_end.queue(0).ring.used_index() != target {
                    if front_end.queue(0).err.read().is_ok() {
                        broken += 1;
                        reset(&mut front_end);
                        break;
                    }
                    assert!(Instant::now() < patience, "the device stopped without a word");
                    std::thread::yield_now();
                }
            } else if front_end.queue(0).err.read().is_ok() {
                broken += 1;
                reset(&mut front_end);
            }
        }
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    assert!(stack.backend.daemon.is_running().unwrap());
    assert!(
        offered > 1000 && broken > 0 && rounds > 10,
        "{offered} offered, {broken} broken, {rounds} rounds"
    );
    assert_eq!(
        arena.memory.read(arena.headers, headers.len()),
        headers,
        "written to read-only buffers"
    );
    let lines = stack.backend.daemon.log().lines().count();
    assert!(lines < 100, "{lines} lines in the log");
    reset(&mut front_end);
    front_end.queue(0).read(0, 512).unwrap();
    say(&format!("{offered} chains offered, {broken} broken rings, {rounds} verified rounds"));
}
