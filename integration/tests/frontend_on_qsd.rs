//! The front-end without a VM, on somebody else's backend. Nothing of Baton takes part.

use baton_integration::blk::{IOERR, OK, Request};
use baton_integration::raw_frontend::{LOG_PAGE, Options, RawFrontend};
use baton_integration::ring::Descriptor;
use baton_integration::vhost_user::{feature, protocol};
use baton_integration::workspace::TestDir;
use baton_probe::stamp::{Expect, Stamp, Verdict, Version, check_block, encode_block};
use std::time::Duration;
use support::{DISK_BYTES, skip_without_storage_daemon, storage_daemon};

mod support;

const SOON: Duration = Duration::from_secs(10);

fn stamped(sector: u64, sequence: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    encode_block(
        Stamp { volume: 1, sector, writer: 1, version: Version { epoch: 1, sequence } },
        &mut block,
    );
    block
}

#[test]
fn reads_writes_and_queues() {
    if skip_without_storage_daemon("reads_writes_and_queues") {
        return;
    }
    let dir = TestDir::new("fe").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 2);
    let mut frontend =
        RawFrontend::connect(&socket, Options { queues: 2, ..Options::default() }).unwrap();
    assert_eq!(frontend.capacity().unwrap(), DISK_BYTES / 512);
    assert_eq!(frontend.max_queues(), 2);
    assert_ne!(frontend.features() & feature::BLK_FLUSH, 0);

    frontend.queue(0).write(8, &stamped(8, 5)).unwrap();
    frontend.queue(0).flush().unwrap();
    let block = frontend.queue(1).read(8, 4096).unwrap();
    let version = Version { epoch: 1, sequence: 5 };
    let expect = Expect { volume: 1, sector: 8, acked: version, issued: version };
    assert_eq!(check_block(&block, &expect), Verdict::Good(version));
    let past_the_end = Request::Read { sector: DISK_BYTES / 512, len: 512 };
    assert_eq!(frontend.queue(0).request(&past_the_end).unwrap().status, IOERR);

    // Many at once, in whatever order they come back.
    let queue = frontend.queue(1);
    let mut heads: Vec<u32> = (0..32)
        .map(|i| {
            queue
                .submit(&Request::Write { sector: 64 + 8 * i, data: &stamped(64 + 8 * i, 1) })
                .unwrap()
        })
        .collect();
    queue.kick().unwrap();
    while !heads.is_empty() {
        let done = queue.wait_completion(SOON).unwrap().expect("a completion");
        assert_eq!(done.status, OK);
        heads.retain(|&h| h != done.head);
    }
    assert_eq!(queue.ring.free_descriptors(), 128);
    assert_eq!(queue.wait_completion(Duration::from_millis(20)).unwrap(), None);
}

#[test]
fn works_without_the_optional_features() {
    if skip_without_storage_daemon("works_without_the_optional_features") {
        return;
    }
    let dir = TestDir::new("fe").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 1);
    let bare = Options {
        features: feature::VERSION_1 | feature::PROTOCOL_FEATURES,
        protocol: protocol::CONFIG,
        ..Options::default()
    };
    let mut frontend = RawFrontend::connect(&socket, bare).unwrap();
    assert!(frontend.inflight().is_none());
    // Enough to go round the ring, with notification by flags instead of indices.
    for i in 0..200 {
        frontend.queue(0).write(i * 8, &stamped(i * 8, i + 1)).unwrap();
    }
    assert_eq!(frontend.queue(0).read(800, 4096).unwrap(), stamped(800, 101));
}

#[test]
fn the_dirty_log_has_the_pages_that_the_device_wrote() {
    if skip_without_storage_daemon("the_dirty_log_has_the_pages_that_the_device_wrote") {
        return;
    }
    let dir = TestDir::new("fe").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 1);
    let mut frontend = RawFrontend::connect(&socket, Options::default()).unwrap();
    let (buffer, status) = {
        let memory = frontend.memory();
        (memory.alloc(4096, 4096).unwrap(), memory.alloc(1, 4096).unwrap())
    };
    let header = frontend.memory().alloc(16, 4096).unwrap();
    frontend.memory().write(header, &baton_integration::blk::header(0, 0));
    let chain = [
        Descriptor::readable(header, 16),
        Descriptor::writable(buffer, 4096),
        Descriptor::writable(status, 1),
    ];
    let run = |frontend: &mut RawFrontend| {
        let queue = frontend.queue(0);
        queue.ring.push_chain(&chain).unwrap();
        queue.kick().unwrap();
        let used = queue.wait_used(SOON).unwrap().expect("a completion");
        queue.ring.release(used.head).unwrap();
        assert_eq!(used.len, 4097);
    };
    frontend.start_logging().unwrap();
    run(&mut frontend);
    let dirty = frontend.take_dirty().unwrap();
    let used_page = frontend.queue(0).ring.addresses().2 / LOG_PAGE * LOG_PAGE;
    for page in [buffer, status, used_page] {
        assert!(dirty.contains(&page), "{page:#x} is not in {dirty:x?}");
    }
    assert!(!dirty.contains(&header), "the device only read {header:#x}");
    assert_eq!(frontend.take_dirty().unwrap(), Vec::<u64>::new());
}

#[test]
fn rings_go_on_where_they_stopped() {
    if skip_without_storage_daemon("rings_go_on_where_they_stopped") {
        return;
    }
    let dir = TestDir::new("fe").unwrap();
    let (mut daemon, socket) = storage_daemon(&dir, 1);
    let mut frontend = RawFrontend::connect(&socket, Options::default()).unwrap();
    for i in 0..5 {
        frontend.queue(0).write(i * 8, &stamped(i * 8, 1)).unwrap();
    }
    assert_eq!(frontend.get_vring_base(0).unwrap(), 5);
    // The same back-end with a new connection, then another process with the same socket.
    frontend.disconnect();
    frontend.reconnect().unwrap();
    frontend.queue(0).write(0, &stamped(0, 2)).unwrap();
    daemon.kill().unwrap();
    assert!(frontend.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).is_ok());
    let (_second, _) = storage_daemon(&dir, 1);
    frontend.reconnect().unwrap();
    let done = frontend
        .queue(0)
        .wait_completion(SOON)
        .unwrap()
        .expect("the request made while nobody listened");
    assert_eq!(done.data, stamped(0, 2));
}
