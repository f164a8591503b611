//! A request costs no allocation once every slot was used.

mod common;
mod nbd_server;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use baton_remote_client::{Op, Tag};
use common::{Buffer, Server, TinyServer, opened, wait};
use nbd_server::{NbdServer, skip_without};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_request_in_steady_state_allocates_nothing() {
    let server = TinyServer::tcp(Server::new(32 << 20));
    allocates_nothing(&server.uri);
}

#[test]
fn nor_does_one_of_nbd() {
    if skip_without("nor_does_one_of_nbd", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let server = NbdServer::nbdkit(dir.path(), &["memory", "32M"]);
    allocates_nothing(&server.uri(""));
}

fn allocates_nothing(uri: &str) {
    const DEPTH: u32 = 32;
    let volume = opened(uri);
    let mut queue = volume.open_queue(0, DEPTH as usize).expect("queue");
    let mut buffers: Vec<_> = (0..DEPTH).map(|i| Buffer(vec![7; 512 << (i % 9)])).collect();
    let mut done = Vec::with_capacity(DEPTH as usize);
    let mut first = 0;
    for round in 0..200u64 {
        if round == 50 {
            first = COUNT.with(Cell::get);
            assert!(first > 0, "the counter counts");
        }
        for (tag, buffer) in (0u32..).zip(&mut buffers) {
            let offset = u64::from(tag) << 20;
            let op = match (round + u64::from(tag)) % 4 {
                0 => Op::Write { offset },
                1 => Op::Read { offset },
                2 => Op::Flush,
                _ => Op::WriteZeroes { offset, len: 512, unmap: true },
            };
            // SAFETY: the buffers live until all requests are done.
            unsafe { queue.submit(Tag(tag), op, &buffer.iov()) };
        }
        done.clear();
        queue.send(&mut done);
        while done.len() < DEPTH as usize {
            assert!(wait(&*queue, Duration::from_secs(20)), "no answer");
            queue.poll(&mut done);
        }
    }
    assert_eq!(COUNT.with(Cell::get) - first, 0);
}
