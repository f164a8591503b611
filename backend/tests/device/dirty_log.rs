//! Every page the device writes is in the log of the migration, and in the right one.

use std::sync::atomic::{AtomicBool, Ordering};

use baton_integration::blk::{OK, Request, header};
use baton_integration::memory::SharedMap;
use baton_integration::raw_frontend::{LOG_PAGE, Options, RawFrontend, take_marked};
use baton_integration::ring::Descriptor;
use baton_integration::vhost_user::{feature, request};

use crate::device::{Device, SOON, verified_load};
use crate::volume::Mode;

/// A read whose header, data and status have pages of their own.
pub(crate) struct Read {
    header: u64,
    data: u64,
    pub(crate) status: u64,
}

impl Read {
    pub(crate) fn new(front_end: &RawFrontend) -> Self {
        let memory = front_end.memory();
        let page = || memory.alloc(4096, 4096).unwrap();
        let read = Self { header: page(), data: page(), status: page() };
        memory.write(read.header, &header(0, 0));
        read
    }

    pub(crate) fn submit(&self, front_end: &mut RawFrontend) {
        let chain = [
            Descriptor::readable(self.header, 16),
            Descriptor::writable(self.data, 4096),
            Descriptor::writable(self.status, 1),
        ];
        front_end.queue(0).ring.push_chain(&chain).unwrap();
        front_end.queue(0).kick().unwrap();
    }

    pub(crate) fn finish(front_end: &mut RawFrontend) {
        let used = front_end.queue(0).wait_used(SOON).unwrap().expect("a completion");
        front_end.queue(0).ring.release(used.head).unwrap();
    }

    pub(crate) fn assert_in(&self, marked: &[u64]) {
        for page in [self.data, self.status] {
            assert!(marked.contains(&page), "{page:#x} is not in {marked:x?}");
        }
        assert!(!marked.contains(&self.header), "the device only reads {:#x}", self.header);
    }
}

#[test]
fn a_request_made_before_logging_and_done_after_it_began_is_marked() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    let read = Read::new(&front_end);
    read.submit(&mut front_end);
    device.volume.wait_held(0, 1);
    front_end.start_logging().unwrap();
    device.volume.release_all(0);
    Read::finish(&mut front_end);
    read.assert_in(&front_end.take_dirty().unwrap());
}

#[test]
fn data_status_used_ring_and_kick_wish_are_marked_and_nothing_else() {
    for event_idx in [feature::EVENT_IDX, 0] {
        let device = Device::start(Mode::Immediate);
        // 512 entries: the used ring is longer than a page, and the kick wish of EVENT_IDX lies on the second.
        let all = Options::default();
        let features = all.features & !feature::EVENT_IDX | event_idx;
        let mut front_end = device.connect(Options { queue_size: 512, features, ..all });
        let read = Read::new(&front_end);
        let used = front_end.queue(0).ring.addresses().2;
        front_end.start_logging().unwrap();
        front_end.take_dirty().unwrap();
        read.submit(&mut front_end);
        Read::finish(&mut front_end);
        let mut expected = vec![used, read.data, read.status];
        if event_idx != 0 {
            expected.push(used + LOG_PAGE);
        }
        expected.sort_unstable();
        // The wish follows the completion; it has been made when the ring has stopped.
        front_end.get_vring_base(0).unwrap();
        assert_eq!(front_end.take_dirty().unwrap(), expected, "EVENT_IDX {event_idx:#x}");
    }
}

#[test]
fn the_device_id_and_refused_requests_are_marked_too() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    let read = Read::new(&front_end);
    front_end.start_logging().unwrap();
    for (kind, sector) in [(8, 0), (0, u64::MAX)] {
        front_end.memory().write(read.header, &header(kind, sector));
        read.submit(&mut front_end);
        Read::finish(&mut front_end);
        let marked = front_end.take_dirty().unwrap();
        assert!(marked.contains(&read.status), "type {kind}: {marked:x?}");
        assert_eq!(marked.contains(&read.data), kind == 8, "type {kind}: {marked:x?}");
    }
}

#[test]
fn after_the_answer_to_a_new_log_nobody_marks_the_old_one() {
    let device = Device::start(Mode::Hold);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    let read = Read::new(&front_end);
    read.submit(&mut front_end);
    device.volume.wait_held(0, 1);
    let old = front_end.swap_log().unwrap();
    let _ = take_marked(&old);
    device.volume.release_all(0);
    Read::finish(&mut front_end);
    read.assert_in(&front_end.take_dirty().unwrap());
    assert_eq!(take_marked(&old), [0_u64; 0]);
}

#[test]
fn swapping_logs_under_load_loses_no_mark_and_leaves_old_logs_alone() {
    let device = Device::start(Mode::Scramble);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    let mut queue = front_end.take_queue(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| verified_load(&mut queue, 0, &|| stop.load(Ordering::Relaxed)));
        let mut old: Vec<SharedMap> = Vec::new();
        let mut marks = 0;
        for _ in 0..300 {
            let log = front_end.swap_log().unwrap();
            marks += take_marked(&log).len();
            old.push(log);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
        assert!(marks > 0, "the load was not logged");
        for (round, log) in old.iter().enumerate() {
            assert_eq!(take_marked(log), [0_u64; 0], "log {round} was marked after its swap");
        }
    });
}

#[test]
fn marks_end_with_logging() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    front_end.queue(0).read(0, 4096).unwrap();
    front_end.set_features(front_end.features() & !feature::LOG_ALL).unwrap();
    assert!(!front_end.take_dirty().unwrap().is_empty());
    front_end.queue(0).read(0, 4096).unwrap();
    assert_eq!(front_end.take_dirty().unwrap(), [0_u64; 0]);
}

/// A new memory table must not end logging: QEMU sends one in the middle of migrations.
#[test]
fn a_new_memory_table_keeps_logging() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.connect(crate::device::whole_table());
    front_end.start_logging().unwrap();
    crate::memory::send_table(&front_end);
    front_end.take_dirty().unwrap();
    let read = Read::new(&front_end);
    read.submit(&mut front_end);
    Read::finish(&mut front_end);
    read.assert_in(&front_end.take_dirty().unwrap());
}

/// A log that is too short for the guest's memory is the front-end's matter; the device must not write past it.
#[test]
fn a_short_log_is_not_overrun() {
    let device = Device::start(Mode::Immediate);
    let mut front_end = device.front_end();
    front_end.start_logging().unwrap();
    let log = SharedMap::new("short", 4096).unwrap();
    let body = [8_u64, 16].map(u64::to_le_bytes).concat();
    let channel = front_end.channel().unwrap();
    channel.send(request::SET_LOG_BASE, 0, &body, &[log.fd()]).unwrap();
    channel.receive().unwrap();
    let done = front_end.queue(0).request(&Request::Read { sector: 0, len: 4096 }).unwrap();
    assert_eq!(done.status, OK);
    assert_eq!(take_marked(&log), [0_u64; 0]);
}
