//! The client library on the real storage server, without a backend between: what one says is what the other means.

use baton_integration::baton::{Storage, wait_until};
use baton_integration::proxy::Proxy;
use baton_integration::workspace::TestDir;
use baton_remote_client::{
    IoError, Op, OpenError, OpenOptions, Tag, Timing, Volume, VolumeEvent, VolumeQueue,
    VolumeState, open,
};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use completions::collect;

#[path = "support/completions.rs"]
mod completions;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

fn storage(name: &str) -> (TestDir, Storage) {
    let dir = TestDir::new(name).unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    (dir, storage)
}

fn options(owner: &str) -> OpenOptions {
    let timing = Timing {
        ping_after: Duration::from_millis(200),
        dead_after: Duration::from_millis(200),
        hello: Duration::from_secs(1),
        ..Timing::default()
    };
    OpenOptions { timing, ..OpenOptions::new(owner) }
}

fn opened(uri: &str) -> Arc<dyn Volume> {
    open(uri, &options("host/vm")).unwrap()
}

fn iov(data: &mut [u8]) -> [libc::iovec; 2] {
    let half = data.len() / 1024 * 512;
    let (a, b) = data.split_at_mut(half);
    [a, b].map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
}

fn run(queue: &mut dyn VolumeQueue, op: Op, data: &mut [u8]) -> Result<(), IoError> {
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Tag(1), op, &iov(data)) };
    let done = collect(queue, 1, SOON);
    assert_eq!(done.len(), 1, "no answer to {op:?}");
    done[0].result
}

#[test]
fn every_operation_does_what_it_says() {
    let (_dir, storage) = storage("operations");
    let volume = opened(&storage.uri("v", None));
    assert_eq!(volume.geometry().size_bytes, 64 * MIB);
    let mut queue = volume.open_queue(0, 8).unwrap();
    // Across extents, and larger than a frame.
    let offset = MIB - 512;
    let mut data: Vec<u8> = (0..3 * MIB + 1024).map(|i| (i % 251) as u8).collect();
    assert_eq!(run(&mut *queue, Op::Write { offset }, &mut data), Ok(()));
    assert_eq!(run(&mut *queue, Op::Flush, &mut []), Ok(()));
    assert_eq!(run(&mut *queue, Op::Discard { offset: MIB, len: MIB }, &mut []), Ok(()));
    let zero = Op::WriteZeroes { offset: 3 * MIB, len: 512, unmap: false };
    assert_eq!(run(&mut *queue, zero, &mut []), Ok(()));
    let mut back = vec![0xee; data.len() + 512];
    assert_eq!(run(&mut *queue, Op::Read { offset }, &mut back), Ok(()));
    data.resize(data.len() + 512, 0);
    let mib = usize::try_from(MIB).unwrap();
    data[512..512 + mib].fill(0);
    data[512 + 2 * mib..][..512].fill(0);
    assert!(back == data);
    let end = Op::Read { offset: 64 * MIB };
    assert_eq!(run(&mut *queue, end, &mut [0; 512]), Err(IoError::OutOfRange));
    drop(queue);
    volume.close(true);
    assert_eq!(storage.show("v").unwrap()["access"]["phase"], "free");
}

/// A VMM may connect as soon as the volume is open, and what it may do depends on whose the volume is.
#[test]
fn who_stands_by_knows_whose_the_volume_is_when_it_is_open() {
    let (_dir, storage) = storage("standby");
    let owner = opened(&storage.uri("v", None));
    let proxy = Proxy::start(storage.data_address(), 5).unwrap();
    proxy.delay_requests(Duration::from_millis(100));
    let standby = OpenOptions { standby: true, handoff: true, ..options("other/vm") };
    for _ in 0..5 {
        let volume = open(&storage.uri("v", Some(proxy.address())), &standby).unwrap();
        let (_, record) = volume.handoff().unwrap().listen(Arc::new(drop)).unwrap();
        assert_eq!(record.owner.unwrap().name, "host/vm");
        volume.close(false);
    }
    owner.close(true);
}

/// Verified load on two queues through kills of the server, cut connections and silence.
#[test]
fn trouble_between_client_and_server_is_only_a_pause() {
    trouble("pause", 16, 24 << 10);
}

/// The same with writes that the server passes from the socket to the file, and that are cut in the middle.
#[test]
fn trouble_in_the_middle_of_large_writes_is_only_a_pause() {
    let (_dir, storage) = trouble("large", 4, 96 << 10);
    assert!(storage.metric("baton_piped_writes_total").unwrap() > 0.0);
}

/// With so many requests of so many bytes at a time on each of two queues.
fn trouble(name: &str, slots: usize, request_bytes: usize) -> (TestDir, Storage) {
    let (dir, mut storage) = storage(name);
    let proxy = Proxy::start(storage.data_address(), 5).unwrap();
    proxy.delay_replies(Duration::from_millis(2));
    let volume = opened(&storage.uri("v", Some(proxy.address())));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let workers: Vec<_> = (0..2u16)
        .map(|index| {
            let (volume, stop) = (Arc::clone(&volume), Arc::clone(&stop));
            thread::spawn(move || {
                let mut queue = volume.open_queue(index, slots).unwrap();
                let mut buffers = vec![vec![0u8; request_bytes]; slots];
                let (mut stamp, mut rounds) = (0u8, 0u32);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let write = rounds.is_multiple_of(2);
                    stamp = stamp.wrapping_add(u8::from(write));
                    for (slot, buffer) in (0u8..).zip(&mut buffers) {
                        let place = u64::from(index) * 64 + u64::from(slot);
                        let offset = place * request_bytes as u64;
                        buffer.fill(if write { stamp ^ slot } else { 0xee });
                        let op = if write { Op::Write { offset } } else { Op::Read { offset } };
                        // SAFETY: the buffers live until all are collected.
                        unsafe { queue.submit(Tag(u32::from(slot)), op, &iov(buffer)) };
                    }
                    let done = collect(&mut *queue, slots, SOON);
                    assert_eq!(done.len(), slots);
                    assert!(done.iter().all(|c| c.result.is_ok()), "{done:?}");
                    for (slot, buffer) in (0u8..).zip(&buffers) {
                        assert!(buffer.iter().all(|b| *b == stamp ^ slot), "queue {index}");
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    for round in 0..12 {
        thread::sleep(Duration::from_millis(150));
        match round % 3 {
            0 => storage.kill_and_restart().unwrap(),
            1 => proxy.cut(),
            _ => {
                proxy.fall_silent();
                thread::sleep(Duration::from_millis(300));
                proxy.speak();
            }
        }
    }
    thread::sleep(Duration::from_millis(300));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for worker in workers {
        assert!(worker.join().unwrap() > 10, "hardly any progress");
    }
    wait_until("connected", SOON, || volume.state() == VolumeState::Connected).unwrap();
    (dir, storage)
}

#[test]
fn the_owner_is_one_and_a_fence_is_final() {
    let (_dir, storage) = storage("owner");
    let uri = storage.uri("v", None);
    let first = opened(&uri);
    let mut queue = first.open_queue(0, 8).unwrap();
    assert_eq!(run(&mut *queue, Op::Write { offset: 0 }, &mut [1; 512]), Ok(()));
    // Another name is refused with the owner's; readers are welcome.
    let error = open(&uri, &options("host2/vm")).expect_err("owned");
    assert!(matches!(error, OpenError::NotOwner { .. }), "{error:?}");
    assert!(error.to_string().contains("host/vm"), "{error}");
    let reader = OpenOptions { read_only: true, ..options("backup") };
    let reader = open(&uri, &reader).unwrap();
    let mut reads = reader.open_queue(0, 8).unwrap();
    let mut back = [0; 512];
    assert_eq!(run(&mut *reads, Op::Read { offset: 0 }, &mut back), Ok(()));
    assert_eq!(back, [1; 512]);
    // The same name again is the same client, started again: the old one is fenced at once.
    let second = opened(&uri);
    wait_until("fenced", SOON, || first.state() == VolumeState::Fenced).unwrap();
    // SAFETY: the buffer is static.
    unsafe { queue.submit(Tag(2), Op::Discard { offset: 0, len: 512 }, &[]) };
    assert!(collect(&mut *queue, 1, Duration::from_millis(300)).is_empty());
    let mut queue = second.open_queue(0, 8).unwrap();
    assert_eq!(run(&mut *queue, Op::Read { offset: 0 }, &mut back), Ok(()));
    assert_eq!(back, [1; 512]);
    // Readers go on across epochs.
    assert_eq!(run(&mut *reads, Op::Read { offset: 0 }, &mut back), Ok(()));
    // By force.
    storage.fence("v", None).unwrap();
    wait_until("fenced", SOON, || second.state() == VolumeState::Fenced).unwrap();
    let error = open(&uri, &options("host/vm")).expect_err("barred");
    assert!(matches!(error, OpenError::NotOwner { .. }), "{error:?}");
    opened_by(&uri, "host2/vm").close(true);
}

fn opened_by(uri: &str, owner: &str) -> Arc<dyn Volume> {
    open(uri, &options(owner)).unwrap()
}

#[test]
fn growth_is_told_and_a_missing_volume_is_named() {
    let (_dir, mut storage) = storage("growth");
    let volume = opened(&storage.uri("v", None));
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    volume.set_listener(Arc::new(move |event| sink.lock().unwrap().push(event)));
    for size in [65 * MIB, 70 * MIB] {
        storage.resize("v", size).unwrap();
        let told = || events.lock().unwrap().contains(&VolumeEvent::Resized(size));
        wait_until("told", SOON, told).unwrap();
        assert_eq!(volume.geometry().size_bytes, size);
    }
    storage.kill_and_restart().unwrap();
    wait_until("back", SOON, || volume.state() == VolumeState::Connected).unwrap();
    storage.resize("v", 80 * MIB).unwrap();
    wait_until("told", SOON, || volume.geometry().size_bytes == 80 * MIB).unwrap();
    let error = open(&storage.uri("nope", None), &options("host/vm")).expect_err("missing");
    assert!(matches!(error, OpenError::NoSuchVolume { .. }), "{error:?}");
}

/// The way to a busy server with long requests: PING keeps the connection.
#[test]
fn ping_and_event_numbers_agree_with_the_servers_window() {
    let (_dir, storage) = storage("ping");
    let proxy = Proxy::start(storage.data_address(), 9).unwrap();
    let timing = Timing {
        ping_after: Duration::from_millis(20),
        dead_after: Duration::from_secs(5),
        ..Timing::default()
    };
    let options = OpenOptions { timing, ..OpenOptions::new("host/vm") };
    let volume = open(&storage.uri("v", Some(proxy.address())), &options).unwrap();
    let mut queue = volume.open_queue(0, 64).unwrap();
    // Replies so late that each batch is asked after; more numbers than one window holds.
    proxy.delay_replies(Duration::from_millis(60));
    let mut data = [7; 512];
    for round in 0..30u64 {
        for tag in 0..64u32 {
            let offset = (round * 64 + u64::from(tag)) * 512;
            // SAFETY: the buffer outlives the requests, which are waited for.
            unsafe { queue.submit(Tag(tag), Op::Write { offset }, &iov(&mut data)) };
        }
        let done = collect(&mut *queue, 64, SOON);
        assert_eq!(done.len(), 64);
        assert!(done.iter().all(|c| c.result.is_ok()), "{done:?}");
    }
    assert_eq!(volume.state(), VolumeState::Connected);
}
