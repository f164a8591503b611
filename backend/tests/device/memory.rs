//! Memory tables and ring addresses change while requests are in flight.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_integration::blk::{OK, Request, UNTOUCHED, header};
use baton_integration::memory::{BASE, SharedMap};
use baton_integration::raw_frontend::RawFrontend;
use baton_integration::ring::Descriptor;
use baton_integration::vhost_user::request;

use crate::device::{
    A_WHILE, Device, SOON, accepted, set_num, verified_load, vring_addr, whole_table,
};
use crate::volume::Mode;

/// Where regions beside the guest's own begin.
const EXTRA: u64 = 1 << 40;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// SET_MEM_TABLE with the front-end's own memory.
pub(crate) fn send_table(front_end: &RawFrontend) {
    let map = front_end.memory().map();
    let body = words(&[1, BASE, map.len() as u64, front_end.memory().user_address(BASE), 0]);
    front_end.send(request::SET_MEM_TABLE, &body, &[map.fd()]).unwrap();
}

fn region(guest_addr: u64, len: u64) -> Vec<u8> {
    // The user address is made up: no ring lies there.
    words(&[0, guest_addr, len, guest_addr.wrapping_add(1 << 44), 0])
}

fn own_region(front_end: &RawFrontend) -> Vec<u8> {
    let map = front_end.memory().map();
    words(&[0, BASE, map.len() as u64, front_end.memory().user_address(BASE), 0])
}

#[test]
fn a_new_table_under_a_request_in_flight_loses_nothing() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.connect(whole_table());
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 1);
    send_table(&front_end);
    device.volume.release_all(0);
    let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
    assert_eq!((done.status, done.data), (OK, vec![0; 4096]));
}

#[test]
fn tables_and_slots_may_change_under_load() {
    let device = Device::start(Mode::Scramble);
    for whole in [true, false] {
        let options = if whole { whole_table() } else { Default::default() };
        let mut front_end = device.connect(options);
        let mut queue = front_end.take_queue(0);
        let extra = SharedMap::new("extra", 4096).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let load =
                scope.spawn(|| verified_load(&mut queue, 0, &|| stop.load(Ordering::Relaxed)));
            for _ in 0..200 {
                if whole {
                    send_table(&front_end);
                } else {
                    let body = region(EXTRA, 4096);
                    front_end.send(request::ADD_MEM_REG, &body, &[extra.fd()]).unwrap();
                    front_end.send(request::REM_MEM_REG, &body, &[]).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(load.join().unwrap() > 0);
        });
    }
}

#[test]
fn the_front_end_may_have_509_regions_and_no_more() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    assert_eq!(front_end.ask(request::GET_MAX_MEM_SLOTS, &[]).unwrap().u64().unwrap(), 509);
    let map = SharedMap::new("slots", 4096).unwrap();
    let add = |slot: u64| {
        front_end.send(request::ADD_MEM_REG, &region(EXTRA + slot * 8192, 4096), &[map.fd()])
    };
    for slot in 0..508 {
        add(slot).unwrap();
    }
    assert!(add(508).is_err(), "a 510th region");
    // The last one is as good as the first.
    let status = EXTRA + 507 * 8192 + 100;
    map.byte(100).store(UNTOUCHED, Ordering::SeqCst);
    let head = front_end.memory().alloc(16, 16).unwrap();
    front_end.memory().write(head, &header(4, 0));
    let chain = [Descriptor::readable(head, 16), Descriptor::writable(status, 1)];
    let queue = front_end.queue(0);
    queue.ring.push_chain(&chain).unwrap();
    queue.kick().unwrap();
    assert_eq!(queue.wait_used(SOON).unwrap().expect("a completion").len, 1);
    assert_eq!(map.byte(100).load(Ordering::SeqCst), OK);
}

#[test]
fn a_region_removed_under_a_read_stays_mapped_until_the_read_is_done() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    let map = SharedMap::new("extra", 8192).unwrap();
    map.byte(0).store(UNTOUCHED, Ordering::SeqCst);
    let body = region(EXTRA, 8192);
    front_end.send(request::ADD_MEM_REG, &body, &[map.fd()]).unwrap();
    let (head, status) = {
        let memory = front_end.memory();
        (memory.alloc(16, 16).unwrap(), memory.alloc(1, 1).unwrap())
    };
    front_end.memory().write(head, &header(0, 0));
    let chain = [
        Descriptor::readable(head, 16),
        Descriptor::writable(EXTRA, 512),
        Descriptor::writable(status, 1),
    ];
    front_end.queue(0).ring.push_chain(&chain).unwrap();
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 1);
    front_end.send(request::REM_MEM_REG, &body, &[]).unwrap();
    device.volume.release_all(0);
    assert_eq!(front_end.queue(0).wait_used(SOON).unwrap().expect("a completion").len, 513);
    assert_eq!(map.byte(0).load(Ordering::SeqCst), 0, "the read went somewhere else");
}

#[test]
fn a_ring_without_memory_stops_and_the_other_goes_on() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.send(request::REM_MEM_REG, &own_region(&front_end), &[]).unwrap();
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    front_end.queue(0).kick_anyway().unwrap();
    assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None);
    let map = front_end.memory().map().fd();
    front_end.send(request::ADD_MEM_REG, &own_region(&front_end), &[map]).unwrap();
    let base = front_end.get_vring_base(0).unwrap();
    front_end.set_up_queue(0, base).unwrap();
    front_end.enable(0, true).unwrap();
    assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("served").status, OK);
}

#[test]
fn bad_tables_are_refused_and_change_nothing() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    let map = SharedMap::new("small", 4096).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(100).unwrap();
    let page = |addr: u64| region(addr, 4096);
    let refused = |body: &[u8], fd| front_end.send(request::ADD_MEM_REG, body, &[fd]).is_err();
    assert!(refused(&page(BASE), map.fd()), "overlaps the guest's own memory");
    assert!(refused(&region(EXTRA, 8192), map.fd()), "longer than the descriptor");
    assert!(refused(&page(u64::MAX - 100), map.fd()), "runs over the end of addresses");
    assert!(refused(&region(EXTRA, 0), map.fd()), "empty");
    assert!(refused(&region(EXTRA, u64::MAX), map.fd()), "endless");
    assert!(refused(&page(EXTRA), file.as_fd()), "a file that is too short");
    let pipe = nix::unistd::pipe().unwrap();
    assert!(refused(&page(EXTRA), pipe.0.as_fd()), "a pipe");
    assert!(!accepted(&front_end, request::REM_MEM_REG, &page(EXTRA)), "never added");
    let two = [words(&[2]), page(EXTRA)[8..].to_vec(), page(EXTRA + 1)[8..].to_vec()].concat();
    let fds = [map.fd(), map.fd()];
    assert!(front_end.send(request::SET_MEM_TABLE, &two, &fds).is_err(), "overlapping regions");
    front_end.queue(0).write(0, &[1; 512]).unwrap();
}

/// One lost completion is a guest that hangs. QEMU sends this to running rings at the start of every migration.
#[test]
fn set_vring_addr_on_a_running_ring_loses_no_completion() {
    let device = Device::start(Mode::Scramble);
    let mut front_end = device.front_end();
    let body = vring_addr(&mut front_end, 0, 0);
    let mut queue = front_end.take_queue(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| verified_load(&mut queue, 0, &|| stop.load(Ordering::Relaxed)));
        let end = Instant::now() + Duration::from_secs(2);
        let mut sent = 0;
        while Instant::now() < end {
            front_end.send(request::SET_VRING_ADDR, &body, &[]).unwrap();
            sent += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let done = load.join().unwrap();
        assert!(done > 100 && sent > 100, "{done} requests, {sent} messages");
    });
}

#[test]
fn a_running_ring_keeps_its_size_and_its_place_in_memory() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    assert!(!set_num(&front_end, 0, 256), "twice the ring");
    assert!(!set_num(&front_end, 0, 64), "half the ring");
    assert!(set_num(&front_end, 0, 128), "the same ring");
    let good = vring_addr(&mut front_end, 0, 0);
    for at in [8, 16, 24] {
        let mut bad = good.clone();
        bad[at + 6] ^= 0x55;
        assert!(!accepted(&front_end, request::SET_VRING_ADDR, &bad), "field at {at}");
    }
    // Enough to go round the ring twice.
    for _ in 0..256 {
        front_end.queue(0).write(0, &[1; 512]).unwrap();
    }
}
