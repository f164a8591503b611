//! A disk whose storage keeps nobody out, in its VM's handoff.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_backend::handoff::CooperativeVm;
use baton_integration::blk::{OK, Request};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_protocol::handoff::{HandoffId, Try};
use baton_remote_client::{
    EventListener, Gate, Geometry, QueueError, Volume, VolumeQueue, VolumeState,
};

use crate::device::{DISK_BYTES, Device, SOON, get_base};
use crate::volume::{Mode, TestVolume};

/// A test volume that has a gate.
#[derive(Debug)]
struct Gated {
    volume: Arc<TestVolume>,
    shut: AtomicBool,
    read_only: bool,
}

impl Gate for Gated {
    fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
    }

    fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }
}

impl Volume for Gated {
    fn geometry(&self) -> Geometry {
        Geometry { read_only: self.read_only, ..self.volume.geometry() }
    }

    fn state(&self) -> VolumeState {
        self.volume.state()
    }

    fn open_queue(&self, index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        self.volume.open_queue(index, depth)
    }

    fn set_listener(&self, listener: EventListener) {
        self.volume.set_listener(listener);
    }

    fn gate(&self) -> Option<&dyn Gate> {
        Some(self)
    }

    fn close(&self, give_back: bool) {
        self.volume.close(give_back);
    }
}

fn standing(vm: &CooperativeVm) -> String {
    let shown = serde_json::to_value(vm.show()).expect("JSON");
    shown["standing"].as_str().expect("a word").to_owned()
}

const TRY: Try = Try { id: HandoffId(7), attempt: 1 };

/// The machine's rings did not start, so nobody may take it for one that runs there.
#[test]
fn a_start_that_fails_is_not_shown_as_a_guest_that_arrived() {
    let volume = TestVolume::new(DISK_BYTES, Mode::Immediate);
    let gated: Arc<dyn Volume> =
        Arc::new(Gated { volume: Arc::clone(&volume), shut: true.into(), read_only: false });
    let (vm, mut members) = CooperativeVm::new("host-b/web", Some(TRY), &[gated]);
    let vm = vm.expect("it has a gate");
    let device = Device::serve(Arc::clone(&volume), members.remove(0));
    volume.set_queues_fail(true);
    RawFrontend::connect(&device.socket, Options::default()).map(drop).expect_err("no queue opens");
    assert_eq!(standing(&vm), "ready");
    volume.set_queues_fail(false);
    let front_end = device.front_end();
    assert_eq!(standing(&vm), "activating");
    drop(front_end);
}

/// A seal that comes while the start is under way is refused by what was said before it; afterwards it is not the
/// guest that is in the way.
#[test]
fn a_source_whose_start_fails_does_not_seal_and_says_why() {
    use baton_protocol::handoff::cooperative::Refusal;
    let volume = TestVolume::new(DISK_BYTES, Mode::Immediate);
    let gated: Arc<dyn Volume> =
        Arc::new(Gated { volume: Arc::clone(&volume), shut: false.into(), read_only: false });
    let (vm, mut members) = CooperativeVm::new("host-a/web", None, &[gated]);
    let vm = vm.expect("it has a gate");
    let device = Device::serve(Arc::clone(&volume), members.remove(0));
    volume.set_queues_fail(true);
    RawFrontend::connect(&device.socket, Options::default()).map(drop).expect_err("no queue opens");
    // Whether an earlier process left something behind, nobody knows.
    assert_eq!(vm.seal(TRY, 1), Err(Refusal::Unanswered));
    volume.set_queues_fail(false);
    let front_end = device.front_end();
    assert_eq!(vm.seal(TRY, 2), Err(Refusal::Running));
    drop(front_end);
}

/// The storage may do them after the other host's first request, and will not say when.
#[test]
fn what_was_given_up_keeps_the_source_from_sealing_however_it_is_stopped_later() {
    use baton_protocol::handoff::cooperative::Refusal;
    for given_up in [true, false] {
        let volume = TestVolume::new(DISK_BYTES, Mode::Hold);
        let gated: Arc<dyn Volume> =
            Arc::new(Gated { volume: Arc::clone(&volume), shut: false.into(), read_only: false });
        let (vm, mut members) = CooperativeVm::new("host-a/web", None, &[gated]);
        let vm = vm.expect("it has a gate");
        let device = Device::serve(Arc::clone(&volume), members.remove(0));
        let mut front_end = device.front_end();
        let write = Request::Write { sector: 0, data: &[1; 512] };
        front_end.queue(0).submit(&write).unwrap();
        front_end.queue(0).kick_anyway().unwrap();
        volume.wait_held(0, 1);
        // The machine is stopped for another reason, and goes on.
        if given_up {
            volume.set_state(VolumeState::Lost);
        } else {
            volume.release_all(0);
        }
        let base = get_base(&front_end);
        volume.set_state(VolumeState::Connected);
        volume.set_mode(Mode::Immediate);
        front_end.set_up_queue(0, base).unwrap();
        front_end.enable(0, true).unwrap();
        assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("done").status, OK);
        // Now it moves, and everything that this stop took is answered.
        front_end.start_logging().unwrap();
        get_base(&front_end);
        assert!(device.disk.status.rings().drained);
        assert_eq!(vm.seal(TRY, 1), Err(Refusal::CameBack));
        let sealed = if given_up { Err(Refusal::GivenUp) } else { Ok(()) };
        assert_eq!(vm.seal(TRY, 2), sealed);
    }
}

#[test]
fn only_what_may_be_written_and_has_a_gate_has_a_place() {
    let open = |read_only| -> Arc<dyn Volume> {
        let volume = TestVolume::new(DISK_BYTES, Mode::Immediate);
        Arc::new(Gated { volume, shut: false.into(), read_only })
    };
    let scratch: Arc<dyn Volume> = TestVolume::new(DISK_BYTES, Mode::Immediate);
    let (vm, members) = CooperativeVm::new(
        "a",
        None,
        &[open(true), open(false), Arc::clone(&scratch), open(false)],
    );
    assert!(vm.is_some());
    assert_eq!(members.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true, false, true]);
    let (vm, members) = CooperativeVm::new("a", None, &[open(true), scratch]);
    assert!(vm.is_none() && members.iter().all(Option::is_none) && members.len() == 2);
}
