//! A guest that breaks the rules gets the status the specification says, or loses its queue: nothing more happens.

use crate::support::{A_WHILE, SECTORS, SOON, Stack};
use baton_integration::blk::{IOERR, OK, Request, UNSUPP, UNTOUCHED, header};
use baton_integration::memory::GuestMemory;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use std::sync::Arc;
use std::time::Instant;

/// No region is there.
const NOWHERE: u64 = 1 << 45;

fn two_queues(stack: &Stack) -> RawFrontend {
    stack.connect(Options { queues: 2, ..Options::default() })
}

/// The other queue, and this process, are fine.
fn assert_served(front_end: &mut RawFrontend) {
    front_end.queue(1).write(77, &[0x77; 512]).unwrap();
    assert_eq!(front_end.queue(1).read(77, 512).unwrap(), [0x77; 512]);
}

/// Puts a chain of any shape at fixed descriptors and waits for it. Returns what the device says it wrote.
fn run(front_end: &mut RawFrontend, descriptors: &[Descriptor]) -> u32 {
    let queue = front_end.queue(0);
    for (index, descriptor) in (0..).zip(descriptors) {
        queue.ring.write_descriptor(index, *descriptor);
    }
    queue.ring.publish(0);
    queue.kick().unwrap();
    let used = queue.wait_used(SOON).unwrap().expect("a bad chain is given back");
    assert_eq!(used.head, 0);
    used.len
}

/// Links descriptors one after another.
fn linked(mut descriptors: Vec<Descriptor>) -> Vec<Descriptor> {
    let last = descriptors.len() - 1;
    for (next, descriptor) in (1..).zip(&mut descriptors[..last]) {
        descriptor.flags |= NEXT;
        descriptor.next = next;
    }
    descriptors
}

struct Buffers {
    memory: Arc<GuestMemory>,
    header: u64,
    data: u64,
    status: u64,
}

impl Buffers {
    fn new(front_end: &RawFrontend) -> Self {
        let memory = front_end.memory().clone();
        let page = || memory.alloc(4096, 4096).unwrap();
        let (header, data, status) = (page(), page(), page());
        Self { memory, header, data, status }
    }

    fn prepare(&self, kind: u32, sector: u64) -> [Descriptor; 3] {
        self.memory.write(self.header, &header(kind, sector));
        self.memory.write(self.data, &[UNTOUCHED; 4096]);
        self.memory.write(self.status, &[UNTOUCHED]);
        [
            Descriptor::readable(self.header, 16),
            Descriptor::writable(self.data, 512),
            Descriptor::writable(self.status, 1),
        ]
    }

    fn status(&self) -> u8 {
        self.memory.read(self.status, 1)[0]
    }
}

#[test]
fn requests_off_the_disk_or_without_sense_are_io_errors() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let mut front_end = two_queues(&stack);
    let data = [1; 512];
    let odd = [1; 100];
    let segment = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let (none, two) = (segment(0, 0, 0), [segment(0, 8, 0), segment(8, 8, 0)].concat());
    let other = |kind, data, writable| Request::Other { kind, sector: 0, data, writable };
    let cases: Vec<(Request<'_>, u8)> = vec![
        (Request::Read { sector: SECTORS, len: 512 }, IOERR),
        (Request::Read { sector: SECTORS - 1, len: 1024 }, IOERR),
        (Request::Read { sector: u64::MAX, len: 512 }, IOERR),
        (Request::Read { sector: u64::MAX / 512, len: 512 }, IOERR),
        (Request::Write { sector: SECTORS, data: &data }, IOERR),
        (Request::Write { sector: 0, data: &odd }, IOERR),
        (Request::Read { sector: 0, len: 513 }, IOERR),
        (Request::Read { sector: 0, len: 0 }, OK),
        (Request::Discard { sector: 0, sectors: 0 }, OK),
        (Request::Discard { sector: 0, sectors: u32::MAX }, IOERR),
        (Request::Discard { sector: SECTORS, sectors: 1 }, IOERR),
        (Request::Discard { sector: u64::MAX, sectors: 1 }, IOERR),
        (Request::WriteZeroes { sector: 0, sectors: u32::MAX, unmap: true }, IOERR),
        (Request::WriteZeroes { sector: SECTORS - 1, sectors: 2, unmap: false }, IOERR),
        (other(11, &segment(0, 8, 1), 0), UNSUPP),
        (other(11, &segment(0, 8, 0x8000_0000), 0), UNSUPP),
        (other(13, &segment(0, 8, 2), 0), UNSUPP),
        (other(11, &none[..8], 0), UNSUPP),
        (other(11, &two, 0), UNSUPP),
        (other(11, &none, 512), IOERR),
        (other(0, &data, 512), IOERR),
        (other(1, &data, 512), IOERR),
        (other(8, &[], 0), IOERR),
        (other(2, &[], 512), UNSUPP),
        (other(3, &data, 0), UNSUPP),
        (other(14, &none, 0), UNSUPP),
        (other(u32::MAX, &[], 0), UNSUPP),
    ]
    .into_iter()
    .map(|(request, status)| (leak(request), status))
    .collect();
    for (request, expected) in cases {
        let done = front_end.queue(0).request(&request).unwrap();
        assert_eq!(done.status, expected, "{request:?}");
        assert_eq!(done.written, 1, "{request:?}");
    }
    assert_eq!(front_end.queue(0).read(0, 4096).unwrap(), [0; 4096], "something was written");
    assert_served(&mut front_end);
}

/// Data of a case that was made in its line. A handful of bytes in a test.
fn leak(request: Request<'_>) -> Request<'static> {
    let keep = |data: &[u8]| -> &'static [u8] { Box::leak(data.to_vec().into_boxed_slice()) };
    match request {
        Request::Write { sector, data } => Request::Write { sector, data: keep(data) },
        Request::Other { kind, sector, data, writable } => {
            Request::Other { kind, sector, data: keep(data), writable }
        }
        Request::Read { sector, len } => Request::Read { sector, len },
        Request::Flush => Request::Flush,
        Request::Discard { sector, sectors } => Request::Discard { sector, sectors },
        Request::WriteZeroes { sector, sectors, unmap } => {
            Request::WriteZeroes { sector, sectors, unmap }
        }
        Request::GetId => Request::GetId,
    }
}

#[test]
fn buffers_of_the_wrong_kind_or_outside_memory_are_io_errors() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let mut front_end = two_queues(&stack);
    let b = Buffers::new(&front_end);
    let mut check = |name: &str, kind: u32, change: &dyn Fn(&mut [Descriptor; 3])| {
        let mut chain = b.prepare(kind, 0);
        change(&mut chain);
        let written = run(&mut front_end, &linked(chain.to_vec()));
        assert_eq!((written, b.status()), (1, IOERR), "{name}");
        assert_eq!(b.memory.read(b.data, 4096), [UNTOUCHED; 4096], "{name}");
    };
    check("the header is for the device to write", 0, &|c| c[0].flags |= WRITE);
    check("half a header", 0, &|c| c[0].len = 8);
    check("an empty header", 0, &|c| c[0].len = 0);
    check("a header nowhere", 0, &|c| c[0].addr = NOWHERE);
    check("data to read into is for the device to read", 0, &|c| c[1].flags = 0);
    check("data to write is for the device to write", 1, &|_| {});
    check("data nowhere", 0, &|c| c[1].addr = NOWHERE);
    check("data that runs out of memory", 0, &|c| c[1].len = u32::MAX);
    check("data at the end of addresses", 0, &|c| c[1].addr = u64::MAX - 100);
    check("a readable buffer behind a writable one", 0, &|c| {
        c.swap(0, 1);
        c[0].len = 1;
        c[0].addr = b.header + 100;
    });
    assert_served(&mut front_end);
}

#[test]
fn requests_without_a_place_for_the_status_are_given_back_untouched() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let mut front_end = two_queues(&stack);
    let b = Buffers::new(&front_end);
    let mut check = |name: &str, descriptors: Vec<Descriptor>| {
        let before = b.memory.read(b.data, 4096);
        assert_eq!(run(&mut front_end, &descriptors), 0, "{name}");
        assert_eq!((b.status(), b.memory.read(b.data, 4096)), (UNTOUCHED, before), "{name}");
    };
    let [head, data, status] = b.prepare(0, 0);
    let loops = |mut chain: Vec<Descriptor>, to: u16| {
        let last = chain.last_mut().unwrap();
        last.flags |= NEXT;
        last.next = to;
        chain
    };
    check("no status", vec![head]);
    check("an empty status", linked(vec![head, Descriptor { len: 0, ..status }]));
    check("a status nowhere", linked(vec![head, data, Descriptor { addr: NOWHERE, ..status }]));
    check("a loop of one", loops(vec![head], 0));
    check("a loop of three", loops(linked(vec![head, data, status]), 1));
    check("a next outside the table", loops(linked(vec![head, data]), 128));
    check("a next far outside", loops(vec![head], u16::MAX));
    let table = b.memory.alloc(4096, 16).unwrap();
    let indirect = |addr, len| Descriptor { flags: INDIRECT, ..Descriptor::readable(addr, len) };
    b.memory.write(table, &indirect(table + 1024, 16).bytes());
    check("an indirect table in an indirect table", vec![indirect(table, 16)]);
    check("an empty indirect table", vec![indirect(table, 0)]);
    check("half a descriptor in an indirect table", vec![indirect(table, 24)]);
    check("an indirect table nowhere", vec![indirect(NOWHERE, 16)]);
    check("an indirect table out of memory", vec![indirect(table, u32::MAX - 15)]);
    check("an indirect table and more", linked(vec![indirect(table, 16), status]));
    b.memory.write(table, &Descriptor { flags: NEXT, next: 0, ..head }.bytes());
    check("a loop in an indirect table", vec![indirect(table, 16)]);
    b.memory.write(table, &Descriptor { flags: NEXT, next: 1, ..head }.bytes());
    check("a next outside an indirect table", vec![indirect(table, 16)]);
    let long = b.memory.alloc(16 * 2000, 16).unwrap();
    for i in 0..1999_u16 {
        let one = Descriptor { flags: NEXT, next: i + 1, ..Descriptor::readable(b.header, 1) };
        b.memory.write(long + 16 * u64::from(i), &one.bytes());
    }
    b.memory.write(long + 16 * 1999, &status.bytes());
    check("two thousand buffers", vec![indirect(long, 16 * 2000)]);
    assert_served(&mut front_end);
}

/// Breaks queue 0 in a way that leaves nothing on it to be trusted.
fn breaks_the_queue(name: &str, stack: &Stack, hurt: impl Fn(&mut RawFrontend)) {
    let mut front_end = two_queues(stack);
    front_end.queue(0).write(5, &[5; 512]).unwrap();
    hurt(&mut front_end);
    front_end.queue(0).kick_anyway().unwrap();
    assert!(front_end.queue(0).wait_broken(SOON).unwrap(), "{name}: the front-end is told");
    let used = front_end.queue(0).ring.used_index();
    front_end.queue(0).kick_anyway().unwrap();
    std::thread::sleep(A_WHILE);
    assert_eq!(front_end.queue(0).ring.used_index(), used, "{name}: left alone");
    assert_served(&mut front_end);
    // What a guest does that notices.
    front_end.reset_rings().unwrap();
    for index in 0..2 {
        front_end.set_up_queue(index, 0).unwrap();
        front_end.enable(index, true).unwrap();
    }
    assert_eq!(front_end.queue(0).read(5, 512).unwrap(), [5; 512], "{name}: after a reset");
    assert_served(&mut front_end);
}

#[test]
fn a_queue_that_is_broken_stops_alone_and_works_again_after_a_reset() {
    let stack = Stack::start(&["--num-queues", "2"]);
    for by in [129, 1000, 0x8000, u16::MAX] {
        breaks_the_queue(&format!("jump by {by}"), &stack, |front_end| {
            let ring = &mut front_end.queue(0).ring;
            let to = ring.avail_index().wrapping_add(by);
            ring.jump_avail_index(to);
        });
    }
    for head in [128, 129, u16::MAX] {
        breaks_the_queue(&format!("head {head}"), &stack, |front_end| {
            front_end.queue(0).ring.publish(head);
        });
    }
    assert!(stack.lines("this queue stops until the guest resets the device") > 0);
}

#[test]
fn a_guest_cannot_flood_the_log() {
    let stack = Stack::start(&["--num-queues", "1"]);
    let mut front_end = stack.front_end();
    let begun = Instant::now();
    for i in 0..3000 {
        let bad = Request::Other { kind: 1000 + i, sector: 0, data: &[], writable: 0 };
        assert_eq!(front_end.queue(0).request(&bad).unwrap().status, UNSUPP);
    }
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap();
    let lines = stack.lines("refused a request of the guest");
    assert!((1..=seconds + 1).contains(&lines), "{lines} lines in {seconds} s");
}
