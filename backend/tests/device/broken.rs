//! A ring that the guest breaks while requests are in flight.

use baton_integration::blk::{OK, Request};
use baton_integration::raw_frontend::{Options, RawFrontend};

use crate::device::{A_WHILE, Device, SOON};
use crate::volume::Mode;

fn hold_two(device: &Device) -> (RawFrontend, [u32; 2]) {
    let mut front_end = device.connect(Options { queues: 2, ..Options::default() });
    let heads = [0, 1]
        .map(|sector| front_end.queue(0).submit(&Request::Read { sector, len: 512 }).unwrap());
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 2);
    (front_end, heads)
}

/// Completing a head twice would hand the guest memory that it has given to somebody else.
#[test]
fn a_head_that_is_offered_twice_is_completed_once_and_the_queue_stops() {
    let device = Device::start(Mode::Hold);
    let (mut front_end, heads) = hold_two(&device);
    front_end.queue(0).ring.publish(u16::try_from(heads[0]).unwrap());
    front_end.queue(0).kick_anyway().unwrap();
    assert!(front_end.queue(0).wait_broken(SOON).unwrap());
    // What was taken before is answered; the other queue does not notice.
    device.volume.set_mode(Mode::Immediate);
    for _ in 0..2 {
        assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("answered").status, OK);
    }
    assert!(front_end.queue(0).wait_used(A_WHILE).unwrap().is_none(), "completed twice");
    front_end.queue(1).write(0, &[1; 512]).unwrap();
    front_end.reset_rings().unwrap();
    for index in 0..2 {
        front_end.set_up_queue(index, 0).unwrap();
        front_end.enable(index, true).unwrap();
        assert_eq!(front_end.queue(index).read(0, 512).unwrap(), [1; 512]);
    }
}

#[test]
fn a_broken_ring_still_drains() {
    let device = Device::start(Mode::Hold);
    let (mut front_end, _) = hold_two(&device);
    let ring = &mut front_end.queue(0).ring;
    let far = ring.avail_index().wrapping_add(1000);
    ring.jump_avail_index(far);
    front_end.queue(0).kick_anyway().unwrap();
    assert!(front_end.queue(0).wait_broken(SOON).unwrap());
    std::thread::scope(|scope| {
        let base = scope.spawn(|| front_end.get_vring_base(0).unwrap());
        std::thread::sleep(A_WHILE);
        assert!(!base.is_finished(), "answered with two in flight");
        device.volume.release_all(0);
        assert_eq!(base.join().unwrap(), 2);
    });
    assert_eq!(front_end.queue(0).ring.used_index(), 2);
}
