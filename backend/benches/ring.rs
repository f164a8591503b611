//! A request's way through the ring: taken, read, judged, put into the used ring and shown, without storage or thread.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_backend::iovecs;
use baton_backend::memory::{GuestMemory, MemoryRegion, PAGE_BYTES};
use baton_backend::vhost_user::message::Region;
use baton_backend::virtio_blk::request::{
    Decision, HEADER_BYTES, Limits, SEGMENT_BYTES, Shape, decide,
};
use baton_backend::virtqueue::{Chain, RingAddresses, Virtqueue};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const SIZE: u16 = 128;
const USER: u64 = 0x7000_0000_0000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const MEMORY_BYTES: u64 = 0x20_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const LIMITS: Limits = Limits { size_bytes: 1 << 30, read_only: false };

struct Driver {
    memory: Arc<GuestMemory>,
    avail_idx: u16,
}

impl Driver {
    fn write(&self, addr: u64, bytes: &[u8]) {
        let at = self.memory.contiguous(addr, bytes.len() as u64).expect("in memory");
        // SAFETY: in the region, which only this program touches.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(DESC + 16 * u64::from(index), &bytes);
    }

    /// Reads of 4 KiB in chains of three descriptors, at every third head.
    fn lay_out(&self) {
        for n in 0..SIZE / 3 {
            let (head, at) = (3 * n, u64::from(n));
            let mut header = [0; HEADER_BYTES];
            header[8..].copy_from_slice(&(8 * at).to_le_bytes());
            self.write(HEADERS + 32 * at, &header);
            self.descriptor(head, HEADERS + 32 * at, 16, NEXT, head + 1);
            self.descriptor(head + 1, DATA + 4096 * at, 4096, NEXT | WRITE, head + 2);
            self.descriptor(head + 2, HEADERS + 32 * at + 16, 1, WRITE, 0);
        }
    }

    fn offer(&mut self, requests: u16) {
        for n in 0..requests {
            let slot = u64::from((self.avail_idx + n) % SIZE);
            self.write(AVAIL + 4 + 2 * slot, &(3 * n).to_le_bytes());
        }
        self.avail_idx = self.avail_idx.wrapping_add(requests);
        self.write(AVAIL + 2, &self.avail_idx.to_le_bytes());
    }
}

fn serve(queue: &mut Virtqueue, chain: &mut Chain) {
    queue.disable_kicks();
    while let Some(head) = queue.pop().expect("a good ring") {
        queue.read_chain(head, chain).expect("a good chain");
        let status = iovecs::take_last_byte(&mut chain.writable).expect("a status byte");
        let mut header = [0; HEADER_BYTES];
        iovecs::take_front(&mut chain.readable, &mut header);
        let shape = Shape {
            header,
            readable_bytes: iovecs::total(&chain.readable),
            writable_bytes: iovecs::total(&chain.writable),
            segment: [0; SEGMENT_BYTES],
        };
        assert!(matches!(decide(&shape, LIMITS), Decision::Storage(_)));
        // SAFETY: in guest memory, which lives as long as the queue.
        unsafe { status.write_volatile(0) };
        queue.put_used(head, 4097);
    }
    queue.publish();
    black_box(queue.wants_signal());
    black_box(queue.enable_kicks());
}

fn ring(c: &mut Criterion) {
    let file: File = tempfile::tempfile().expect("a file");
    file.set_len(MEMORY_BYTES + PAGE_BYTES).expect("room");
    let description =
        Region { guest_addr: 0, size: MEMORY_BYTES, user_addr: USER, mmap_offset: PAGE_BYTES };
    let region = MemoryRegion::map(description, &OwnedFd::from(file)).expect("mapped");
    let memory = Arc::new(GuestMemory::new(vec![Arc::new(region)]).expect("one region"));
    let find = RingAddresses::find(&memory, SIZE.into(), USER + DESC, USER + AVAIL, USER + USED);
    let mut queue = Virtqueue::new(find.expect("a good ring"), true, 0);
    let mut driver = Driver { memory, avail_idx: 0 };
    driver.lay_out();
    let mut chain = Chain::default();
    let mut group = c.benchmark_group("ring");
    for batch in [1, 32] {
        group.throughput(Throughput::Elements(batch.into()));
        group.bench_function(format!("read 4 KiB, batches of {batch}"), |b| {
            b.iter(|| {
                driver.offer(batch);
                serve(&mut queue, &mut chain);
            });
        });
    }
}

criterion_group!(benches, ring);
criterion_main!(benches);
