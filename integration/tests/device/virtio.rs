//! Every feature is offered and works: virtio 1.2 section 5.2 as a driver sees it.

use crate::support::{DISK_BYTES, SECTORS, SOON, Stack, image};
use baton_integration::baton::Backend;
use baton_integration::blk::{IOERR, OK, Request, UNTOUCHED, header};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::ring::{Descriptor, INDIRECT, NEXT};
use baton_integration::vhost_user::{feature, request};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

const BLOCK: [u8; 4096] = [0x5a; 4096];

const ALWAYS: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::LOG_ALL
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::BLK_SEG_MAX
    | feature::BLK_SIZE_MAX
    | feature::BLK_BLK_SIZE
    | feature::BLK_TOPOLOGY
    | feature::BLK_FLUSH
    | feature::BLK_CONFIG_WCE;

#[test]
fn what_is_offered_follows_from_the_disk() {
    let changes = feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
    let cases: [(&[&str], u64); 3] = [
        (&["--num-queues", "4"], ALWAYS | changes | feature::BLK_MQ),
        (&["--num-queues", "1"], ALWAYS | changes),
        (&["--num-queues", "1", "--read-only"], ALWAYS | feature::BLK_RO),
    ];
    for (args, expected) in cases {
        let stack = Stack::start(args);
        assert_eq!(stack.front_end().offered().0, expected, "{args:?}");
    }
}

#[test]
fn configuration_space_says_what_the_disk_is() {
    let stack = Stack::start(&["--num-queues", "3", "--queue-size", "64"]);
    let front_end = stack.front_end();
    let config = front_end.config(60).unwrap();
    let u16_at = |at: usize| u16::from_le_bytes(config[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(front_end.capacity().unwrap(), SECTORS);
    assert!(u32_at(8) >= 65536, "size_max");
    assert_eq!(u32_at(12), 62, "seg_max leaves room for header and status");
    assert_eq!(u32_at(20), 512, "blk_size");
    assert_eq!(config[24], 3, "physical blocks of 4 KiB");
    assert_eq!(config[32], 1, "write-back");
    assert_eq!(u16_at(34), 3, "num_queues");
    assert_eq!(front_end.max_queues(), 3);
    assert!(u32_at(36) > 0 && u32_at(40) > 0 && u32_at(44) > 0, "discard limits");
    assert!(u32_at(48) > 0 && u32_at(52) > 0, "limits of zeroes");
    assert_eq!(config[56], 1, "zeroes may unmap");
}

/// QEMU asks for a prefix, cloud-hypervisor once asked at 0x100; a driver may ask for more than there is.
#[test]
fn configuration_space_is_read_at_any_offset_and_length() {
    let stack = Stack::start(&[]);
    let front_end = stack.front_end();
    let whole = front_end.config(60).unwrap();
    let read = |offset: u32, len: u32| {
        let mut body = [offset, len, 1].map(u32::to_le_bytes).concat();
        body.resize(12 + usize::try_from(len).unwrap(), 0);
        let reply = front_end.ask(request::GET_CONFIG, &body).unwrap().payload;
        assert_eq!(reply[..12], body[..12], "the reply repeats what was asked");
        reply[12..].to_vec()
    };
    for len in [1, 8, 57, 60] {
        assert_eq!(read(0, len), whole[..usize::try_from(len).unwrap()], "{len} bytes");
    }
    assert_eq!(read(8, 4), whole[8..12]);
    assert_eq!(read(58, 10), [&whole[58..], &[0; 8]].concat());
    assert_eq!(read(0x100, 16), [0; 16]);
    assert_eq!(read(u32::MAX, 2), [0; 2]);
    assert_eq!(read(0, 256)[60..], [0; 196]);
}

fn works(front_end: &mut RawFrontend, index: u16, fill: u8) {
    let sector = u64::from(index) * 1000;
    // More than a ring full, so that both indices go round.
    for i in 0..300 {
        front_end.queue(index).write(sector + i, &[fill; 512]).unwrap();
    }
    assert_eq!(front_end.queue(index).read(sector, 512 * 300).unwrap(), vec![fill; 512 * 300]);
    // A ring full at once, with one kick.
    let queue = front_end.queue(index);
    for i in 0..32 {
        queue.submit(&Request::Read { sector: sector + i, len: 512 }).unwrap();
    }
    queue.kick().unwrap();
    for _ in 0..32 {
        let done = queue.wait_completion(SOON).unwrap().expect("a completion");
        assert_eq!((done.status, done.written), (OK, 513));
    }
}

#[test]
fn notification_works_by_index_and_by_flag() {
    let stack = Stack::start(&["--num-queues", "1"]);
    let all = Options::default();
    works(&mut stack.connect(all), 0, 1);
    works(
        &mut stack.connect(Options { features: all.features & !feature::EVENT_IDX, ..all }),
        0,
        2,
    );
}

/// With EVENT_IDX a driver that wants no call gets none.
#[test]
fn calls_come_only_when_wanted() {
    let stack = Stack::start(&["--num-queues", "1"]);
    for features in [u64::MAX, !feature::EVENT_IDX] {
        let all = Options::default();
        let mut front_end = stack.connect(Options { features: all.features & features, ..all });
        front_end.queue(0).write(0, &BLOCK).unwrap();
        let queue = front_end.queue(0);
        let _ = queue.call.read();
        queue.ring.refuse_calls();
        for sector in 0..20 {
            queue.submit(&Request::Read { sector, len: 512 }).unwrap();
        }
        queue.kick_anyway().unwrap();
        // Not by waiting for a call, which is what must not come. With EVENT_IDX the first completion after the
        // index that was left behind may still call.
        let until = std::time::Instant::now() + SOON;
        while queue.ring.used_index() < 21 {
            assert!(std::time::Instant::now() < until, "{} completed", queue.ring.used_index());
        }
        let calls = queue.call.read().unwrap_or(0);
        assert!(calls <= u64::from(features == u64::MAX), "{calls} calls that nobody wanted");
    }
}

#[test]
fn all_queues_serve_the_same_disk_at_once() {
    let stack = Stack::start(&["--num-queues", "4"]);
    let mut front_end = stack.connect(Options { queues: 4, ..Options::default() });
    let queues: Vec<_> = (0..4).map(|index| front_end.take_queue(index)).collect();
    std::thread::scope(|scope| {
        for (index, mut queue) in (0_u8..).zip(queues) {
            scope.spawn(move || {
                let sector = u64::from(index) * 4096;
                for round in 0..100 {
                    let data = vec![index * 50 + round % 50; 8192];
                    queue.write(sector, &data).unwrap();
                    assert_eq!(queue.read(sector, 8192).unwrap(), data);
                }
            });
        }
    });
}

#[test]
fn an_indirect_table_may_be_longer_than_the_ring() {
    let stack = Stack::start(&[]);
    let mut front_end = stack.connect(Options { queue_size: 16, ..Options::default() });
    let memory = front_end.memory().clone();
    const PIECES: u32 = 200;
    let (head, status) = (memory.alloc(16, 16).unwrap(), memory.alloc(1, 1).unwrap());
    let data = memory.alloc(512 * 200, 4096).unwrap();
    let table = memory.alloc(16 * 202, 16).unwrap();
    File::options()
        .write(true)
        .open(image(stack.dir.path()))
        .unwrap()
        .write_all_at(&[9; 512 * 200], 0)
        .unwrap();
    memory.write(head, &header(0, 0));
    let mut descriptors = vec![Descriptor::readable(head, 16)];
    descriptors.extend((0..PIECES).map(|i| Descriptor::writable(data + u64::from(i) * 512, 512)));
    descriptors.push(Descriptor::writable(status, 1));
    let last = descriptors.len() - 1;
    for (i, mut descriptor) in descriptors.into_iter().enumerate() {
        if i != last {
            descriptor.flags |= NEXT;
            descriptor.next = u16::try_from(i + 1).unwrap();
        }
        memory.write(table + 16 * i as u64, &descriptor.bytes());
    }
    let queue = front_end.queue(0);
    let indirect = Descriptor { flags: INDIRECT, ..Descriptor::readable(table, 16 * (PIECES + 2)) };
    queue.ring.push_chain(&[indirect]).unwrap();
    queue.kick().unwrap();
    assert_eq!(queue.wait_used(SOON).unwrap().expect("done").len, 512 * PIECES + 1);
    assert_eq!(memory.read(data, 512 * 200), vec![9; 512 * 200]);
    assert_eq!(memory.read(status, 1), [OK]);
}

/// However a driver cuts a request into buffers, it is the same request.
#[test]
fn any_framing_of_a_request_works() {
    let stack = Stack::start(&[]);
    let mut front_end = stack.front_end();
    let memory = front_end.memory().clone();
    let content: Vec<u8> = (0..=255_u8).cycle().take(1024).collect();
    front_end.queue(0).write(64, &content).unwrap();
    let cuts = |start: u64, lens: &[u32], make: fn(u64, u32) -> Descriptor| -> Vec<Descriptor> {
        let mut at = start;
        lens.iter()
            .map(|&len| {
                at += u64::from(len);
                make(at - u64::from(len), len)
            })
            .collect()
    };
    let headers: [&[u32]; 4] = [&[16], &[5, 6, 5], &[1, 0, 15], &[8, 8]];
    // The last byte of each is the status: apart, in one buffer with data, behind empty buffers.
    let bodies: [&[u32]; 5] =
        [&[1024, 1], &[1025], &[1, 333, 178, 512, 1], &[511, 513, 0, 1], &[0, 1000, 25, 0]];
    for head in headers {
        for body in bodies {
            let (head_at, body_at) = (memory.alloc(16, 1).unwrap(), memory.alloc(1025, 1).unwrap());
            memory.write(head_at, &header(0, 64));
            memory.write(body_at, &[UNTOUCHED; 1025]);
            let chain = [
                cuts(head_at, head, Descriptor::readable),
                cuts(body_at, body, Descriptor::writable),
            ]
            .concat();
            let queue = front_end.queue(0);
            queue.ring.push_chain(&chain).unwrap();
            queue.kick().unwrap();
            let used = queue.wait_used(SOON).unwrap().expect("a completion");
            queue.ring.release(used.head).unwrap();
            assert_eq!(used.len, 1025, "{head:?} {body:?}");
            assert_eq!(
                memory.read(body_at, 1025),
                [&content[..], &[OK]].concat(),
                "{head:?} {body:?}"
            );
        }
    }
    // The same for a write, whose data may follow the header in one buffer.
    for lens in [&[16_u32, 1024][..], &[1040], &[3, 14, 600, 0, 423], &[17, 1023]] {
        let (at, status) = (memory.alloc(1040, 1).unwrap(), memory.alloc(1, 1).unwrap());
        let fill = u8::try_from(lens.len()).unwrap();
        memory.write(at, &[&header(1, 128)[..], &[fill; 1024]].concat());
        let mut chain = cuts(at, lens, Descriptor::readable);
        chain.push(Descriptor::writable(status, 1));
        let queue = front_end.queue(0);
        queue.ring.push_chain(&chain).unwrap();
        queue.kick().unwrap();
        let used = queue.wait_used(SOON).unwrap().expect("a completion");
        queue.ring.release(used.head).unwrap();
        assert_eq!((used.len, memory.read(status, 1)), (1, vec![OK]), "{lens:?}");
        assert_eq!(front_end.queue(0).read(128, 1024).unwrap(), [fill; 1024], "{lens:?}");
    }
}

#[test]
fn discard_gives_space_back_and_zeroes_read_as_zeros() {
    let stack = Stack::start(&[]);
    let mut front_end = stack.front_end();
    let used = || std::fs::metadata(image(stack.dir.path())).unwrap().blocks();
    let data = vec![7; 1 << 20];
    let zap = [
        Request::Discard { sector: 2048, sectors: 2048 },
        Request::WriteZeroes { sector: 2048, sectors: 2048, unmap: true },
        Request::WriteZeroes { sector: 2048, sectors: 2048, unmap: false },
    ];
    for (request, frees) in zap.iter().zip([true, true, false]) {
        front_end.queue(0).write(2048, &data).unwrap();
        front_end.queue(0).flush().unwrap();
        let before = used();
        assert_eq!(front_end.queue(0).request(request).unwrap().status, OK);
        assert_eq!(
            front_end.queue(0).read(2048, 1 << 20).unwrap(),
            vec![0; 1 << 20],
            "{request:?}"
        );
        assert_eq!(used() < before, frees, "{request:?}: {before} to {}", used());
    }
}

#[test]
fn the_disk_has_a_name() {
    let stack = Stack::start(&[]);
    let mut front_end = stack.front_end();
    let done = front_end.queue(0).request(&Request::GetId).unwrap();
    assert_eq!((done.status, done.written), (OK, 21));
    assert_eq!(done.data, b"disk.img\0\0\0\0\0\0\0\0\0\0\0\0");
    // A driver with less room gets the beginning.
    let short = Request::Other { kind: 8, sector: 0, data: &[], writable: 4 };
    let done = front_end.queue(0).request(&short).unwrap();
    assert_eq!((done.status, done.data.as_slice(), done.written), (OK, &b"disk"[..], 5));
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let stack = Stack::start(&["--read-only"]);
    let mut front_end = stack.front_end();
    let changes = [
        Request::Write { sector: 0, data: &[1; 512] },
        Request::Discard { sector: 0, sectors: 1 },
        Request::WriteZeroes { sector: 0, sectors: 1, unmap: false },
    ];
    for change in changes {
        assert_eq!(front_end.queue(0).request(&change).unwrap().status, IOERR, "{change:?}");
    }
    assert_eq!(front_end.queue(0).read(0, 4096).unwrap(), [0; 4096]);
    front_end.queue(0).flush().unwrap();
    // It needs no write access, and so no lock.
    let uri = format!("file://{}", image(stack.dir.path()).display());
    let second = Backend::start(stack.dir.path(), "second", &uri, &["--read-only"]).unwrap();
    let mut other = RawFrontend::connect(&second.socket, Options::default()).unwrap();
    assert_eq!(other.queue(0).read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn what_is_written_is_in_the_file_and_the_last_sector_counts() {
    let stack = Stack::start(&[]);
    let mut front_end = stack.front_end();
    front_end.queue(0).write(SECTORS - 8, &BLOCK).unwrap();
    front_end.queue(0).flush().unwrap();
    let mut bytes = [0; 4096];
    File::open(image(stack.dir.path()))
        .unwrap()
        .read_exact_at(&mut bytes, DISK_BYTES - 4096)
        .unwrap();
    assert_eq!(bytes, BLOCK);
    assert_eq!(std::fs::metadata(image(stack.dir.path())).unwrap().len(), DISK_BYTES);
}
