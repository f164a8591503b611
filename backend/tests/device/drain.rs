//! A ring that stops answers what it took, and then leaves the guest alone.

use std::sync::mpsc;

use baton_integration::blk::{OK, Request, UNTOUCHED};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_remote_client::VolumeState;

use crate::device::{A_WHILE, Device, SOON, get_base};
use crate::volume::Mode;

const DATA: [u8; 512] = [7; 512];

fn three_writes(front_end: &mut RawFrontend) {
    let queue = front_end.queue(0);
    for sector in 0..3 {
        queue.submit(&Request::Write { sector, data: &DATA }).unwrap();
    }
    queue.kick().unwrap();
}

/// All of the guest's memory.
fn memory(front_end: &RawFrontend) -> Vec<u8> {
    front_end.memory().read(baton_integration::memory::BASE, front_end.memory().map().len())
}

fn stops_only_when_drained(stop: impl Fn(&RawFrontend) + Sync) {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    three_writes(&mut front_end);
    device.volume.wait_held(0, 3);
    let (sender, answered) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stop(&front_end);
            sender.send(()).unwrap();
        });
        assert!(answered.recv_timeout(A_WHILE).is_err(), "answered with three in flight");
        device.volume.release(0, 2);
        device.volume.release(0, 0);
        assert!(answered.recv_timeout(A_WHILE).is_err(), "answered with one in flight");
        device.volume.release(0, 0);
        answered.recv_timeout(SOON).expect("an answer when all is done");
    });
    assert_eq!(front_end.queue(0).ring.used_index(), 3, "published before the answer");
    assert_eq!(front_end.get_vring_base(0).unwrap(), 3);
}

#[test]
fn disabling_a_ring_waits_for_what_is_in_flight() {
    stops_only_when_drained(|front_end| front_end.enable(0, false).unwrap());
}

#[test]
fn get_vring_base_waits_for_what_is_in_flight() {
    stops_only_when_drained(|front_end| assert_eq!(get_base(front_end), 3));
}

#[test]
fn after_get_vring_base_nothing_changes_in_guest_memory_until_the_ring_starts_again() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.queue(0).write(0, &DATA).unwrap();
    assert_eq!(front_end.get_vring_base(0).unwrap(), 1);
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    let before = memory(&front_end);
    front_end.queue(0).kick_anyway().unwrap();
    std::thread::sleep(A_WHILE);
    assert!(memory(&front_end) == before, "the device wrote to memory after GET_VRING_BASE");
    // Nothing of it is lost.
    front_end.set_up_queue(0, 1).unwrap();
    front_end.enable(0, true).unwrap();
    let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
    assert_eq!((done.status, done.data.as_slice()), (OK, &DATA[..]));
}

#[test]
fn a_kick_before_enable_does_nothing_and_enable_sees_what_is_there() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.enable(0, false).unwrap();
    front_end.get_vring_base(0).unwrap();
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    front_end.set_up_queue(0, 0).unwrap();
    front_end.queue(0).kick_anyway().unwrap();
    assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None);
    // The kick was eaten or not: a ring that starts looks for itself.
    let _ = front_end.queue(0).kick.read();
    front_end.enable(0, true).unwrap();
    assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion").status, OK);
}

#[test]
fn requests_not_taken_before_a_stop_are_served_after_it() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    three_writes(&mut front_end);
    device.volume.wait_held(0, 3);
    std::thread::scope(|scope| {
        let queue = scope.spawn(|| get_base(&front_end));
        std::thread::sleep(A_WHILE);
        device.volume.release_all(0);
        assert_eq!(queue.join().unwrap(), 3);
    });
    device.volume.set_mode(Mode::Immediate);
    three_writes(&mut front_end);
    front_end.set_up_queue(0, 3).unwrap();
    front_end.enable(0, true).unwrap();
    for _ in 0..6 {
        let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
        assert_eq!(done.status, OK);
    }
}

#[test]
fn a_stop_is_answered_while_a_guest_refills_the_ring_for_ever() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.connect(Options { queue_size: 16, ..Options::default() });
    let mut queue = front_end.take_queue(0);
    let head = queue.ring.link(&[]).err().map(|_| 0_u16).expect("an empty chain is no chain");
    // Descriptor 0 is a request that is refused at once; it is offered again and again.
    queue.ring.write_descriptor(head, baton_integration::ring::Descriptor::readable(0, 1));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                while queue.ring.avail_index().wrapping_sub(queue.ring.used_index()) < 15 {
                    queue.ring.publish(head);
                }
                queue.kick_anyway().unwrap();
            }
        });
        let (sender, answered) = mpsc::channel();
        let front_end = &front_end;
        scope.spawn(move || sender.send(get_base(front_end)).unwrap());
        let answer = answered.recv_timeout(SOON);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        answer.expect("GET_VRING_BASE is answered");
    });
}

#[test]
fn shutting_down_answers_what_is_in_flight_and_keeps_the_volume_for_the_next_process() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    three_writes(&mut front_end);
    device.volume.wait_held(0, 3);
    device.shut_down();
    std::thread::sleep(A_WHILE);
    device.volume.release_all(0);
    assert!(!device.volume.wait_closed(), "a guest was at the disk");
    for _ in 0..3 {
        assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("answered").status, OK);
    }
}

#[test]
fn shutting_down_without_a_guest_gives_the_volume_back() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.queue(0).write(0, &DATA).unwrap();
    front_end.get_vring_base(0).unwrap();
    device.shut_down();
    assert!(device.volume.wait_closed());
}

/// The storage gave the volume to somebody else: no answer will ever come, and the VM must still be stoppable.
#[test]
fn a_fenced_disk_lets_its_rings_stop_and_touches_memory_no_more() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 1);
    device.volume.set_state(VolumeState::Fenced);
    front_end.get_vring_base(0).unwrap();
    assert_eq!(front_end.queue(0).ring.used_index(), 0, "an error or a success was invented");
    let before = memory(&front_end);
    assert!(before.contains(&UNTOUCHED));
    device.volume.set_mode(Mode::Immediate);
    std::thread::sleep(A_WHILE);
    assert!(memory(&front_end) == before);
}
