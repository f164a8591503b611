//! What a back-end that takes over from a killed one relies on, and news from the storage.

use baton_integration::blk::{OK, Request};
use baton_integration::raw_frontend::{Options, RawFrontend};

use crate::device::{A_WHILE, DISK_BYTES, Device, SOON};
use crate::volume::Mode;

/// cloud-hypervisor says where the guest's next request is, not where the device was. Trusting it loses requests.
#[test]
fn with_an_inflight_region_requests_waiting_at_the_start_are_served_whatever_the_base_says() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    for _ in 0..5 {
        front_end.queue(0).write(0, &[1; 512]).unwrap();
    }
    assert_eq!(front_end.get_vring_base(0).unwrap(), 5);
    for sector in 0..3 {
        front_end.queue(0).submit(&Request::Read { sector, len: 512 }).unwrap();
    }
    let avail = front_end.queue(0).ring.avail_index();
    assert_eq!(avail, 8);
    front_end.set_up_queue(0, avail).unwrap();
    front_end.enable(0, true).unwrap();
    for _ in 0..3 {
        assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("served").status, OK);
    }
    assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None, "served twice");
}

/// Without a region the front-end's base is all there is.
#[test]
fn without_an_inflight_region_the_base_counts() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.connect(Options { inflight: false, ..Options::default() });
    front_end.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(front_end.get_vring_base(0).unwrap(), 1);
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    front_end.set_up_queue(0, 2).unwrap();
    front_end.enable(0, true).unwrap();
    assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None, "skipped as told");
}

/// The destination of a migration gets a fresh region with a ring that is far from its start.
#[test]
fn a_fresh_region_on_an_old_ring_takes_nothing_for_done() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    for _ in 0..300 {
        front_end.queue(0).write(0, &[1; 512]).unwrap();
    }
    front_end.get_vring_base(0).unwrap();
    // Asking for a region makes it the one in use.
    let fresh = front_end.get_inflight().unwrap();
    front_end.set_up_queue(0, 300).unwrap();
    device.volume.set_mode(Mode::Hold);
    front_end.enable(0, true).unwrap();
    front_end.queue(0).submit(&Request::Write { sector: 9, data: &[9; 512] }).unwrap();
    front_end.queue(0).kick_anyway().unwrap();
    device.volume.wait_held(0, 1);
    let bytes: Vec<u8> =
        (0..64).map(|at| fresh.map.byte(at).load(std::sync::atomic::Ordering::SeqCst)).collect();
    assert_eq!(bytes[8..10], [1, 0], "version");
    assert_eq!(bytes[10..12], 128_u16.to_le_bytes(), "entries");
    assert_eq!(bytes[14..16], 300_u16.to_le_bytes(), "the ring's own used index");
    device.volume.release_all(0);
    assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("done").status, OK);
}

/// A kill may fall between showing completions and calling the guest, which then sleeps for ever.
#[test]
fn a_ring_that_starts_calls_the_guest_once() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    assert!(front_end.queue(0).ring.request_call());
    front_end.queue(0).kick().unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while front_end.queue(0).ring.used_index() == 0 {
        assert!(std::time::Instant::now() < deadline, "no completion");
    }
    front_end.get_vring_base(0).unwrap();
    // The call is lost with the process that made it.
    assert!(front_end.queue(0).call.read().is_ok());
    front_end.set_up_queue(0, 1).unwrap();
    front_end.enable(0, true).unwrap();
    assert_called(&mut front_end);
}

fn assert_called(front_end: &mut RawFrontend) {
    let deadline = std::time::Instant::now() + SOON;
    while front_end.queue(0).call.read().is_err() {
        assert!(std::time::Instant::now() < deadline, "the guest was never called");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Fifty front-ends one after another, the device busy whenever one goes away.
#[test]
fn a_front_end_that_goes_away_under_load_is_followed_by_the_next() {
    let device = Device::start(Mode::Scramble);
    let mut front_end = device.front_end();
    for round in 0_u8..50 {
        let data = [round; 512];
        for sector in 0..8 {
            front_end.queue(0).submit(&Request::Write { sector, data: &data }).unwrap();
        }
        front_end.queue(0).kick_anyway().unwrap();
        front_end.reconnect().unwrap();
        for _ in 0..8 {
            let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
            assert_eq!(done.status, OK);
        }
        assert_eq!(front_end.queue(0).read(7, 512).unwrap(), data);
    }
}

#[test]
fn growth_reaches_the_guest_without_reattaching() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    assert_eq!(front_end.capacity().unwrap(), DISK_BYTES / 512);
    let behind = DISK_BYTES / 512;
    assert_ne!(
        front_end.queue(0).request(&Request::Read { sector: behind, len: 512 }).unwrap().status,
        OK
    );
    device.volume.grow(2 * DISK_BYTES);
    front_end.wait_config_change(SOON).unwrap();
    assert_eq!(front_end.capacity().unwrap(), 2 * DISK_BYTES / 512);
    front_end.queue(0).write(behind, &[5; 512]).unwrap();
    assert_eq!(front_end.queue(0).read(behind, 512).unwrap(), [5; 512]);
}
