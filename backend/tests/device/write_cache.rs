//! When a write is complete, and what discards and zeroes become.

use baton_integration::blk::{OK, Request};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::vhost_user::feature;
use baton_remote_client::Op;

use crate::device::{A_WHILE, Device, SOON};
use crate::volume::Mode;

/// Offset of `writeback` in configuration space (virtio 1.2 5.2.4).
const WRITEBACK: u32 = 32;

/// Submits a write, a discard and a write of zeroes in turn; each must be followed by a flush before it completes.
fn assert_write_through(device: &Device, front_end: &mut RawFrontend) {
    device.volume.set_mode(Mode::Hold);
    device.volume.take_ops();
    let changes = [
        Request::Write { sector: 0, data: &[1; 512] },
        Request::Discard { sector: 0, sectors: 1 },
        Request::WriteZeroes { sector: 0, sectors: 1, unmap: true },
    ];
    for change in changes {
        front_end.queue(0).submit(&change).unwrap();
        front_end.queue(0).kick().unwrap();
        device.volume.wait_held(0, 1);
        assert_ne!(device.volume.take_ops(), [Op::Flush]);
        device.volume.release(0, 0);
        device.volume.wait_held(0, 1);
        assert_eq!(device.volume.take_ops(), [Op::Flush], "{change:?}");
        assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None, "{change:?}");
        device.volume.release(0, 0);
        let done = front_end.queue(0).wait_completion(SOON).unwrap().expect("a completion");
        assert_eq!(done.status, OK);
    }
    device.volume.set_mode(Mode::Immediate);
}

fn assert_write_back(device: &Device, front_end: &mut RawFrontend) {
    device.volume.take_ops();
    front_end.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(device.volume.take_ops(), [Op::Write { offset: 0 }]);
}

#[test]
fn the_guest_chooses_between_write_back_and_write_through() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    assert_eq!(front_end.config(33).unwrap()[32], 1, "write-back at first");
    assert_write_back(&device, &mut front_end);
    front_end.set_config(WRITEBACK, &[0]).unwrap();
    assert_eq!(front_end.config(33).unwrap()[32], 0);
    assert_write_through(&device, &mut front_end);
    front_end.set_config(WRITEBACK, &[1]).unwrap();
    assert_write_back(&device, &mut front_end);
    // Nothing else may be written.
    assert!(front_end.set_config(0, &[1; 8]).is_err());
    assert!(front_end.set_config(WRITEBACK, &[0; 2]).is_err());
    assert_write_back(&device, &mut front_end);
}

/// QEMU reconnects without SET_CONFIG, and the guest that chose write-through sends no flush.
#[test]
fn the_choice_outlives_a_lost_connection() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.set_config(WRITEBACK, &[0]).unwrap();
    front_end.disconnect();
    front_end.reconnect().unwrap();
    assert_eq!(front_end.config(33).unwrap()[32], 0);
    assert_write_through(&device, &mut front_end);
}

#[test]
fn a_guest_that_cannot_flush_gets_write_through() {
    let device = Device::start(Mode::Immediate);
    let all = Options::default();
    let features = all.features & !(feature::BLK_FLUSH | feature::BLK_CONFIG_WCE);
    let mut front_end = device.connect(Options { features, ..all });
    assert_write_through(&device, &mut front_end);
}

/// What is submitted after a queue came to rest would wait for the end of a handoff.
#[test]
fn a_queue_that_stops_rests_when_its_writes_are_followed_by_their_flushes() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.set_config(WRITEBACK, &[0]).unwrap();
    device.volume.set_mode(Mode::Hold);
    front_end.queue(0).submit(&Request::Write { sector: 0, data: &[1; 512] }).unwrap();
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 1);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| front_end.get_vring_base(0).unwrap());
        std::thread::sleep(A_WHILE);
        assert_eq!(device.volume.rests(), [0_usize; 0], "a flush is to come");
        device.volume.release(0, 0);
        device.volume.wait_held(0, 1);
        device.volume.release(0, 0);
        assert_eq!(stopping.join().unwrap(), 1);
    });
    let rests = device.volume.rests();
    assert!(!rests.is_empty() && rests.iter().all(|submitted| *submitted == 2), "{rests:?}");
}

#[test]
fn a_guest_that_can_flush_but_not_choose_gets_write_back() {
    let device = Device::start(Mode::Immediate);
    let all = Options::default();
    let features = all.features & !feature::BLK_CONFIG_WCE;
    let mut front_end = device.connect(Options { features, ..all });
    assert_write_back(&device, &mut front_end);
    front_end.queue(0).flush().unwrap();
    assert_eq!(device.volume.take_ops(), [Op::Flush]);
}

#[test]
fn discards_and_zeroes_reach_the_volume_as_the_guest_meant_them() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    let (offset, len) = (8 * 512, 16 * 512);
    let cases = [
        (Request::Discard { sector: 8, sectors: 16 }, Op::Discard { offset, len }),
        (
            Request::WriteZeroes { sector: 8, sectors: 16, unmap: false },
            Op::WriteZeroes { offset, len, unmap: false },
        ),
        (
            Request::WriteZeroes { sector: 8, sectors: 16, unmap: true },
            Op::WriteZeroes { offset, len, unmap: true },
        ),
    ];
    for (request, expected) in cases {
        assert_eq!(front_end.queue(0).request(&request).unwrap().status, OK);
        assert_eq!(device.volume.take_ops(), [expected]);
    }
}
