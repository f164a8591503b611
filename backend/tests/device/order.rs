//! While a migration runs, completions are shown in the order in which the guest made the requests available, so that a
//! front-end that lost its back-end may guess from the used index where the ring goes on.

use std::collections::BTreeSet;
use std::sync::mpsc;

use baton_integration::blk::{OK, Request, UNTOUCHED};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::vhost_user::request;
use baton_remote_client::{Op, VolumeState};

use crate::device::{A_WHILE, Device, SOON, get_base};
use crate::dirty_log::Read;
use crate::volume::Mode;

fn data(number: usize) -> [u8; 512] {
    [u8::try_from(number).unwrap() + 1; 512]
}

/// Writes sector `n` for each `n` of the range, without waiting. Returns the heads in available order.
fn write_all(front_end: &mut RawFrontend, sectors: std::ops::Range<usize>) -> Vec<u32> {
    let queue = front_end.queue(0);
    let write =
        |n: usize| queue.submit(&Request::Write { sector: n as u64, data: &data(n) }).unwrap();
    let heads = sectors.map(write).collect();
    front_end.queue(0).kick().unwrap();
    heads
}

/// The heads of the next completions, in the order of the used ring.
fn completed(front_end: &mut RawFrontend, count: usize) -> Vec<u32> {
    (0..count)
        .map(|_| {
            let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
            assert_eq!(done.status, OK);
            done.head
        })
        .collect()
}

/// The used index once the queue has dealt with everything released: it answers this message behind that.
fn settled(device: &Device, front_end: &mut RawFrontend, logged: bool) -> u16 {
    device.volume.wait_taken(0);
    front_end.set_vring_addr(0, logged).unwrap();
    front_end.queue(0).ring.used_index()
}

#[test]
fn the_used_ring_is_in_available_order() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    let heads = write_all(&mut front_end, 0..6);
    device.volume.wait_held(0, 6);
    for (position, shown) in [(3, 0), (4, 0), (1, 0), (0, 2), (1, 2)] {
        device.volume.release(0, position);
        assert_eq!(settled(&device, &mut front_end, true), shown, "after {position}");
    }
    device.volume.release(0, 0);
    assert_eq!(completed(&mut front_end, 6), heads);
}

#[test]
fn a_scrambled_load_stays_in_order() {
    let device = Device::start(Mode::Scramble);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    for _ in 0..100 {
        let heads = write_all(&mut front_end, 0..40);
        assert_eq!(completed(&mut front_end, 40), heads);
    }
}

/// A request that is answered without the storage is not faster than the order either.
#[test]
fn a_refused_request_waits_its_turn() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    let first = write_all(&mut front_end, 0..1)[0];
    let refused = front_end.queue(0).submit(&Request::Read { sector: u64::MAX, len: 512 }).unwrap();
    front_end.queue(0).kick().unwrap();
    let last = write_all(&mut front_end, 1..2)[0];
    device.volume.wait_held(0, 2);
    assert_eq!(settled(&device, &mut front_end, true), 0);
    device.volume.release_all(0);
    let order: Vec<u32> = (0..3)
        .map(|_| front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion").head)
        .collect();
    assert_eq!(order, [first, refused, last]);
}

/// Its order is kept from where the log came, and what is held back is shown when the log goes.
#[test]
fn the_order_begins_and_ends_with_the_log_while_requests_are_in_flight() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    let heads = write_all(&mut front_end, 0..4);
    device.volume.wait_held(0, 4);
    device.volume.release(0, 1);
    assert_eq!(completed(&mut front_end, 1), [heads[1]], "no log, no order");
    front_end.start_logging().unwrap();
    let more = write_all(&mut front_end, 4..6);
    device.volume.wait_held(0, 5);
    // Held: 0, 2, 3, 4, 5. The last three complete, newest first.
    for position in [4, 3, 2] {
        device.volume.release(0, position);
        assert_eq!(settled(&device, &mut front_end, true), 1);
    }
    front_end.stop_logging().unwrap();
    assert_eq!(front_end.queue(0).ring.used_index(), 4, "shown before the answer");
    assert_eq!(completed(&mut front_end, 3), [heads[3], more[0], more[1]]);
    // And again, with what is left.
    front_end.start_logging().unwrap();
    device.volume.release(0, 1);
    assert_eq!(settled(&device, &mut front_end, true), 4);
    device.volume.release(0, 0);
    assert_eq!(completed(&mut front_end, 2), [heads[0], heads[2]]);
}

/// Data, status and dirty bits are there before a completion that is held back is shown.
#[test]
fn what_is_held_back_is_complete_and_logged() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    write_all(&mut front_end, 0..1);
    let read = Read::new(&front_end);
    front_end.memory().write(read.status, &[UNTOUCHED]);
    read.submit(&mut front_end);
    device.volume.wait_held(0, 2);
    front_end.take_dirty().unwrap();
    device.volume.release(0, 1);
    assert_eq!(settled(&device, &mut front_end, true), 0);
    assert_eq!(front_end.memory().read(read.status, 1), [OK]);
    let marked = front_end.take_dirty().unwrap();
    read.assert_in(&marked);
    device.volume.release_all(0);
    completed(&mut front_end, 1);
    Read::finish(&mut front_end);
}

/// A ring whose requests are given up in the middle of a migration, with completions out of order behind a stuck one.
fn abandoned(logging: bool) -> (Device, RawFrontend, Vec<u32>) {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    if logging {
        front_end.start_logging().unwrap();
    }
    let heads = write_all(&mut front_end, 0..6);
    device.volume.wait_held(0, 6);
    // Held: 0..6; completes 0, 4, 2.
    for position in [0, 3, 1] {
        device.volume.release(0, position);
    }
    settled(&device, &mut front_end, logging);
    device.volume.take_ops();
    device.volume.set_state(VolumeState::Fenced);
    (device, front_end, heads)
}

/// What QEMU (up to 10.0) does when the back-end died in the drain: the destination gets a fresh in-flight region and the
/// used index as its base. Everything that is not in the used ring is done there, and nothing else.
#[test]
fn a_front_end_that_guesses_from_the_used_index_loses_nothing() {
    let (device, mut front_end, heads) = abandoned(true);
    let base = get_base(&front_end);
    let guess = front_end.queue(0).ring.used_index();
    let before: BTreeSet<u32> = completed(&mut front_end, usize::from(guess)).into_iter().collect();
    assert!(!device.disk.status.rings().drained, "requests were given up");
    device.volume.set_state(VolumeState::Connected);
    device.volume.set_mode(Mode::Immediate);
    front_end.get_inflight().unwrap();
    front_end.stop_logging().unwrap();
    front_end.set_up_queue(0, guess).unwrap();
    front_end.enable(0, true).unwrap();
    let rest: BTreeSet<u32> =
        completed(&mut front_end, heads.len() - before.len()).into_iter().collect();
    assert!(before.is_disjoint(&rest));
    assert_eq!(&before | &rest, heads.iter().copied().collect());
    for n in 0..6 {
        assert_eq!(front_end.queue(0).read(n as u64, 512).unwrap(), data(n), "sector {n}");
    }
    assert_eq!(base, guess, "the answer to GET_VRING_BASE is the boundary too");
}

/// Without the order the used index is no boundary, and the base must not claim that it is one.
#[test]
fn without_a_log_the_base_of_a_ring_given_up_is_behind_what_was_taken() {
    let (_device, mut front_end, _) = abandoned(false);
    assert_eq!(get_base(&front_end), 6);
    assert_eq!(front_end.queue(0).ring.used_index(), 3);
}

/// What is held back stays in the in-flight table: the next back-end does it again, oldest first, before anything new.
#[test]
fn a_back_end_that_takes_over_does_again_what_was_not_shown_in_its_order() {
    let (device, mut front_end, heads) = abandoned(true);
    front_end.disconnect();
    assert_eq!(completed(&mut front_end, 1), heads[..1]);
    device.volume.wait_closed_queue(0);
    device.volume.set_state(VolumeState::Connected);
    let newest = write_all(&mut front_end, 6..7)[0];
    front_end.reconnect().unwrap();
    device.volume.wait_held(0, 6);
    let again: Vec<Op> = (1..7).map(|n| Op::Write { offset: n * 512 }).collect();
    assert_eq!(device.volume.take_ops(), again);
    device.volume.release_all(0);
    let order: Vec<u32> = heads[1..].iter().copied().chain([newest]).collect();
    assert_eq!(completed(&mut front_end, 6), order);
}

/// A stop that waits for the storage, of queue 0 of two that have one request each.
fn stopping_two(then: impl FnOnce(&Device, &mut RawFrontend)) {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.connect(Options { queues: 2, ..Options::default() });
    front_end.start_logging().unwrap();
    for queue in 0..2 {
        front_end.queue(queue).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
        front_end.queue(queue).kick().unwrap();
        device.volume.wait_held(queue, 1);
    }
    let (sender, answered) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            front_end.enable(0, false).unwrap();
            sender.send(()).unwrap();
        });
        assert!(answered.recv_timeout(A_WHILE).is_err(), "answered with one in flight");
        device.volume.release_all(0);
        answered.recv_timeout(SOON).expect("an answer");
    });
    then(&device, &mut front_end);
}

fn offer_another(front_end: &mut RawFrontend) {
    front_end.queue(1).submit(&Request::Read { sector: 1, len: 512 }).unwrap();
    front_end.queue(1).kick_anyway().unwrap();
}

#[test]
fn the_first_stop_of_a_migration_drains_all_rings() {
    stopping_two(|device, front_end| {
        // Queue 1 takes nothing any more, and still owes what it took.
        offer_another(front_end);
        std::thread::sleep(A_WHILE);
        device.volume.wait_held(1, 1);
        assert!(!device.disk.status.rings().drained, "queue 1 is not stopped");
        device.volume.release_all(1);
        assert_eq!(front_end.queue(1).wait_completion(SOON).unwrap().expect("done").status, OK);
        front_end.enable(1, false).unwrap();
        assert_eq!(front_end.get_vring_base(0).unwrap(), 1);
        assert_eq!(front_end.get_vring_base(1).unwrap(), 1, "the request that was not taken");
        let rings = device.disk.status.rings();
        assert_eq!((rings.running, rings.logging, rings.drained), (0, true, true));
        // The VMM gives up: the guest goes on.
        device.volume.set_mode(Mode::Immediate);
        for queue in 0..2 {
            front_end.set_up_queue(queue, 1).unwrap();
            front_end.enable(queue, true).unwrap();
            let rings = device.disk.status.rings();
            assert!(!rings.drained && rings.running == usize::from(queue) + 1, "{rings:?}");
        }
        assert_eq!(front_end.queue(1).wait_completion(SOON).unwrap().expect("done").status, OK);
    });
}

#[test]
fn a_ring_drained_early_runs_again_when_it_is_enabled_or_gets_a_kick_event() {
    for kicked in [false, true] {
        stopping_two(|device, front_end| {
            device.volume.set_mode(Mode::Immediate);
            offer_another(front_end);
            if kicked {
                front_end.set_up_queue(1, 1).unwrap();
            } else {
                front_end.enable(1, true).unwrap();
            }
            for _ in 0..2 {
                let done = front_end.queue(1).wait_completion(SOON).unwrap().expect("done");
                assert_eq!(done.status, OK);
            }
            front_end.queue(1).write(0, &[3; 512]).unwrap();
        });
    }
}

#[test]
fn outside_a_migration_a_stop_leaves_the_other_rings_alone() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.connect(Options { queues: 2, ..Options::default() });
    front_end.enable(0, false).unwrap();
    front_end.queue(1).write(0, &[3; 512]).unwrap();
    front_end.enable(1, false).unwrap();
    assert!(!device.disk.status.rings().drained, "no migration");
}

/// Waits until the device has done with a front-end that logged and is gone.
fn gone(device: &Device) {
    let deadline = std::time::Instant::now() + SOON;
    while device.disk.status.rings().logging {
        assert!(std::time::Instant::now() < deadline, "the device does not notice");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// A front-end that goes away between two stops has no answer to the last one.
#[test]
fn half_a_stop_is_not_drained() {
    stopping_two(|device, front_end| {
        device.volume.set_mode(Mode::Immediate);
        front_end.disconnect();
        gone(device);
        assert!(!device.disk.status.rings().drained);
    });
}

#[test]
fn a_stop_whose_answer_nobody_takes_is_not_drained() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    write_all(&mut front_end, 0..1);
    device.volume.wait_held(0, 1);
    let stop = [0; 8];
    front_end.channel().unwrap().send(request::GET_VRING_BASE, 0, &stop, &[]).unwrap();
    front_end.disconnect();
    device.volume.release_all(0);
    gone(&device);
    assert!(!device.disk.status.rings().drained);
    completed(&mut front_end, 1);
}
