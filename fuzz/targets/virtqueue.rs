//! What a guest writes: rings, chains, indirect tables and request headers, all of it the input.
//!
//! Held: pieces lie in guest memory, and the storage is asked only for whole sectors of the disk.
#![no_main]

use baton_backend::iovecs;
use baton_backend::memory::{GuestMemory, MemoryRegion};
use baton_backend::vhost_user::message::Region;
use baton_backend::virtio_blk::request::{
    Decision, HEADER_BYTES, Limits, SEGMENT_BYTES, Shape, decide,
};
use baton_backend::virtqueue::{Chain, RingAddresses, Virtqueue};
use baton_remote_client::Op;
use libfuzzer_sys::fuzz_target;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

/// Two regions that touch and one apart; small, so that random addresses hit.
const REGIONS: [(u64, u64); 3] = [(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000)];
const USER: u64 = 0x7000_0000_0000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const SIZE: u16 = 16;
const DISK: Limits = Limits { size_bytes: 1 << 20, read_only: false };

fn memory() -> &'static Arc<GuestMemory> {
    static MEMORY: OnceLock<Arc<GuestMemory>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let regions = REGIONS.map(|(guest_addr, size)| {
            // SAFETY: a constant C string; the descriptor is new and ours.
            let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"fuzz".as_ptr(), 0)) };
            std::fs::File::from(fd.try_clone().expect("dup")).set_len(size).expect("size");
            let region = Region { guest_addr, size, user_addr: USER + guest_addr, mmap_offset: 0 };
            Arc::new(MemoryRegion::map(region, &fd).expect("map"))
        });
        Arc::new(GuestMemory::new(regions.to_vec()).expect("no overlap"))
    })
}

fn write(memory: &GuestMemory, addr: u64, bytes: &[u8]) {
    let at = memory.contiguous(addr, bytes.len() as u64).expect("in memory");
    // SAFETY: in the region, which only this thread touches.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
}

/// The pieces lie in guest memory and can be touched from end to end.
fn check(memory: &GuestMemory, pieces: &[libc::iovec]) {
    for piece in pieces {
        assert!(piece.iov_len > 0);
        let first: *const u8 = piece.iov_base.cast();
        let addr = memory.guest_addr_of(first).expect("in guest memory");
        assert!(memory.contiguous(addr, piece.iov_len as u64).is_some());
    }
}

fuzz_target!(|input: (u16, &[u8])| {
    let (next_avail, bytes) = input;
    let memory = memory();
    // The input fills memory from the descriptors on, then the avail ring; the rest keeps what was there.
    write(memory, AVAIL, &[0; 6 + 2 * SIZE as usize]);
    write(memory, DESC, &bytes[..bytes.len().min(0x2000)]);
    let Some(ring) =
        RingAddresses::find(memory, u32::from(SIZE), USER + DESC, USER + AVAIL, USER + USED)
    else {
        unreachable!("a good ring");
    };
    let mut queue = Virtqueue::new(ring, next_avail % 2 == 0, next_avail);
    let mut chain = Chain::default();
    // Each head once, whether it was offered or not.
    for head in 0..SIZE {
        if queue.read_chain(head, &mut chain).is_err() {
            continue;
        }
        check(memory, &chain.readable);
        check(memory, &chain.writable);
        let status = iovecs::take_last_byte(&mut chain.writable);
        let mut header = [0; HEADER_BYTES];
        let got = iovecs::take_front(&mut chain.readable, &mut header);
        check(memory, &chain.readable);
        let mut segment = [0; SEGMENT_BYTES];
        iovecs::peek_front(&chain.readable, &mut segment);
        let shape = Shape {
            header,
            readable_bytes: iovecs::total(&chain.readable),
            writable_bytes: iovecs::total(&chain.writable),
            segment,
        };
        if status.is_none() || got < HEADER_BYTES || chain.faulty {
            continue;
        }
        if let Decision::Storage(op) = decide(&shape, DISK) {
            let (offset, len) = match op {
                Op::Read { offset } => (offset, shape.writable_bytes),
                Op::Write { offset } => (offset, shape.readable_bytes),
                Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
                Op::Flush => (0, 512),
            };
            assert!(len > 0 && offset % 512 == 0 && len % 512 == 0);
            assert!(offset + len <= DISK.size_bytes);
        }
    }
    for _ in 0..2 * SIZE {
        match queue.pop() {
            Ok(Some(head)) => {
                assert!(head < SIZE);
                queue.put_used(head, 1);
                queue.publish();
                let _ = queue.wants_signal();
            }
            Ok(None) | Err(_) => break,
        }
    }
    let _ = queue.enable_kicks();
});
