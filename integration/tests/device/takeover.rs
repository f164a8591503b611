//! A killed backend's successor does what was left, once, whatever order storage answered in.

use crate::support::{Random, SOON, seed};
use baton_integration::baton::{Backend, Storage};
use baton_integration::blk::{OK, Request};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::collections::BTreeMap;
use std::time::Duration;

const SLOTS: u64 = 64;

fn block(slot: u64, version: u64) -> Vec<u8> {
    [slot, version].iter().flat_map(|w| w.to_le_bytes()).cycle().take(4096).collect()
}

/// Completes what is there; a write makes its version the one that must be read.
fn take_completions(
    front_end: &mut RawFrontend,
    pending: &mut BTreeMap<u32, (u64, u64)>,
    versions: &mut [u64],
    wait: Duration,
) {
    while !pending.is_empty() {
        let Some(done) = front_end.queue(0).wait_completion(wait).unwrap() else { return };
        assert_eq!(done.status, OK);
        let (slot, version) = pending.remove(&done.head).expect("completed twice");
        versions[usize::try_from(slot).unwrap()] = version;
    }
}

#[test]
fn fifteen_kills_at_random_moments_lose_and_repeat_nothing() {
    kill_often(Options::default());
}

/// As QEMU 10.0.13 has it: `queue-size=128`, and a guest that takes 1024.
#[test]
fn fifteen_kills_of_rings_larger_than_the_front_end_said_lose_nothing_either() {
    kill_often(Options { queue_size: 1024, inflight_size: Some(128), ..Options::default() });
}

/// A region as earlier versions made it: rings of 128 and a trailer.
#[test]
fn a_ring_that_the_table_has_no_room_for_is_served_and_warned_of() {
    let dir = TestDir::new("no-room").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 << 20).unwrap();
    let args = ["--num-queues", "1"];
    let backend = Backend::start(dir.path(), "vm", &storage.uri("v", None), &args).unwrap();
    let large = Options { queue_size: 1024, inflight_size: Some(128), ..Options::default() };
    let connect = |options| {
        let mut front_end = RawFrontend::connect(&backend.socket, options).unwrap();
        if !options.start {
            front_end.take_inflight().unwrap();
            front_end.cut_inflight(2112 + 64).unwrap();
            front_end.start().unwrap();
        }
        front_end.queue(0).write(0, &block(1, 1)).unwrap();
        assert!(front_end.queue(0).read(0, 4096).unwrap() == block(1, 1));
    };
    let warned = || backend.daemon.log().contains("has no room for this ring");
    connect(large);
    connect(Options { queue_size: 128, start: false, ..large });
    assert!(!warned());
    connect(Options { start: false, ..large });
    assert!(warned());
}

fn kill_often(options: Options) {
    let mut random = Random(seed());
    let dir = TestDir::new("take").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 << 20).unwrap();
    let proxy = Proxy::start(storage.data_address(), random.next()).unwrap();
    proxy.delay_replies(Duration::from_millis(2));
    let uri = storage.uri("v", Some(proxy.address()));
    let mut backend = Backend::start(dir.path(), "vm", &uri, &["--num-queues", "1"]).unwrap();
    let mut front_end = RawFrontend::connect(&backend.socket, options).unwrap();
    let mut versions = vec![0; usize::try_from(SLOTS).unwrap()];
    let mut pending = BTreeMap::new();
    let mut version = 0;
    let mut left_at_kills = 0;
    for _ in 0..15 {
        for _ in 0..1 + random.below(40) {
            version += 1;
            let slot = random.below(SLOTS);
            // One write per slot at a time: two would be in no order.
            if pending.len() >= 20 || pending.values().any(|(busy, _)| *busy == slot) {
                take_completions(&mut front_end, &mut pending, &mut versions, SOON);
            }
            let data = block(slot, version);
            let head = front_end
                .queue(0)
                .submit(&Request::Write { sector: slot * 8, data: &data })
                .unwrap();
            pending.insert(head, (slot, version));
            front_end.queue(0).kick().unwrap();
        }
        std::thread::sleep(Duration::from_micros(random.below(4000)));
        backend.daemon.kill().unwrap();
        left_at_kills += pending.len();
        backend.restart().unwrap();
        front_end.reconnect().unwrap();
    }
    take_completions(&mut front_end, &mut pending, &mut versions, SOON);
    assert!(pending.is_empty(), "lost: {pending:?}");
    assert!(left_at_kills > 15, "the kills met only {left_at_kills} requests");
    for (slot, version) in (0..).zip(versions) {
        let data = front_end.queue(0).read(slot * 8, 4096).unwrap();
        let expected = if version == 0 { vec![0; 4096] } else { block(slot, version) };
        assert!(data == expected, "slot {slot} does not have version {version}");
    }
}
