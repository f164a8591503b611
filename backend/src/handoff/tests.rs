//! What the role's orders come to at the volumes, on a VM of two disks. The records are real ones.

use std::sync::Mutex;
use std::time::Duration;

use baton_protocol::access::{AccessRecord, Input as RecordInput};
use baton_protocol::handoff::{Answer, HandoffId, Key, Members, Mode, Outcome, Plan, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};
use baton_remote_client::{
    EventListener, Geometry, HandoffListener, QueueError, Volume, VolumeQueue, VolumeState,
};

use super::*;

const SOURCE: SessionId = SessionId(1);
const DESTINATION: SessionId = SessionId(2);
const VOLUMES: [VolumeId; 2] = [VolumeId(7), VolumeId(8)];
const TRY: Try = Try { id: HandoffId(1), attempt: 1 };

/// A call of a volume's port.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Ask(Asked),
    Post(Asked),
    Open,
    OpenLater,
    Hold,
    Go(Epoch),
    Park,
}

/// A volume that writes down what it is told.
#[derive(Default)]
struct Told {
    id: VolumeId,
    calls: Mutex<Vec<Call>>,
    listener: Mutex<Option<HandoffListener>>,
    /// What the storage has said before anybody listens.
    view: Mutex<Option<(u64, AccessRecord)>>,
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.id.fmt(f)
    }
}

impl Told {
    fn note(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Volume for Told {
    fn geometry(&self) -> Geometry {
        unreachable!("nobody asks")
    }

    fn state(&self) -> VolumeState {
        VolumeState::Connected
    }

    fn open_queue(&self, _: u16, _: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        unreachable!("no queue is opened")
    }

    fn set_listener(&self, _: EventListener) {}

    fn handoff(&self) -> Option<&dyn HandoffPort> {
        Some(self)
    }

    fn close(&self, _: bool) {}
}

impl HandoffPort for Told {
    fn volume(&self) -> VolumeId {
        self.id
    }

    fn claimed(&self) -> Option<Epoch> {
        None
    }

    fn welcomed_after(&self) -> Duration {
        Duration::ZERO
    }

    fn listen(&self, listener: HandoffListener) -> Option<(u64, AccessRecord)> {
        *self.listener.lock().unwrap() = Some(listener);
        self.view.lock().unwrap().clone()
    }

    fn ask(&self, _: Try, ask: Asked) {
        self.note(Call::Ask(ask));
    }

    fn post(&self, _: Try, ask: Asked) {
        self.note(Call::Post(ask));
    }

    fn open(&self, _: Open) {
        self.note(Call::Open);
    }

    fn open_later(&self, _: Open) {
        self.note(Call::OpenLater);
    }

    fn hold(&self) {
        self.note(Call::Hold);
    }

    fn is_held(&self) -> bool {
        true
    }

    fn go(&self, epoch: Epoch, _: Option<Opening>) {
        self.note(Call::Go(epoch));
    }

    fn park(&self) {
        self.note(Call::Park);
    }
}

/// A destination whose volumes are sealed.
struct Scene {
    volumes: [Arc<Told>; 2],
    disks: Vec<MemberHandle>,
    records: [AccessRecord; 2],
}

impl Scene {
    fn sealed() -> Self {
        let plan = Plan {
            attempt: TRY,
            vm: "vm".to_owned(),
            from: "a".to_owned(),
            to: "b".to_owned(),
            anchor: VOLUMES[0],
            members: Members::of(VOLUMES),
            mode: Mode::Fast,
            key: Key([7; 32]),
        };
        let armed = VOLUMES.map(|volume| {
            let claim = RecordInput::Claim { name: "a", session: SOURCE };
            let owned = AccessRecord::new(volume).step(claim).unwrap().record;
            let next_epoch = owned.next_epoch;
            let arm = RecordInput::Arm { plan: &plan, term: 1, next_epoch, generation: 1 };
            owned.step(arm).unwrap().record
        });
        let volumes = VOLUMES.map(|id| Arc::new(Told { id, ..Told::default() }));
        let named =
            volumes.each_ref().map(|v| (v.id.to_string(), Arc::clone(v) as Arc<dyn Volume>));
        let (_, disks) = VmHandoff::new("b", DESTINATION, None, &named);
        let disks = disks.into_iter().map(Option::unwrap).collect();
        let mut scene = Self { volumes, disks, records: armed };
        scene.show();
        for at in 0..2 {
            scene.step(at, &RecordInput::Seal { attempt: TRY, session: SOURCE });
            scene.step(at, &RecordInput::Sealed { attempt: TRY, session: SOURCE });
        }
        scene.show();
        assert_eq!(scene.calls(), [[], []]);
        scene
    }

    fn step(&mut self, at: usize, input: &RecordInput<'_>) {
        self.records[at] = self.records[at].step(*input).unwrap().record;
    }

    fn tell(&self, at: usize, event: HandoffEvent) {
        let listener = self.volumes[at].listener.lock().unwrap().clone().unwrap();
        listener(event);
    }

    /// The servers tell of their records.
    fn show(&self) {
        for at in 0..2 {
            let record = Box::new(self.records[at].clone());
            self.tell(at, HandoffEvent::View { boot_id: 1, record });
        }
    }

    /// The anchor grants what was asked for.
    fn grant(&mut self) {
        let activate = RecordInput::Activate { attempt: TRY, name: "b", session: DESTINATION };
        self.step(0, &activate);
        let record = self.records[0].clone();
        let proof = record.proof(TRY);
        let answer = Answer { outcome: Outcome::Granted, boot_id: 1, proof, record };
        let (ask, answer) = (Asked::Activate, Box::new(answer));
        self.tell(0, HandoffEvent::Answered { attempt: TRY, ask, answer });
    }

    /// The server of the second disk answers its OPEN.
    fn opened(&mut self) {
        let proof = self.records[0].proof(TRY).unwrap();
        assert_eq!(proof.side, Side::Destination);
        let open = RecordInput::Open { attempt: TRY, session: DESTINATION, proof };
        self.step(1, &open);
        self.tell(1, HandoffEvent::Opened(Some(self.records[1].epoch)));
    }

    /// What each volume was told since the last look.
    fn calls(&self) -> [Vec<Call>; 2] {
        self.volumes.each_ref().map(|v| std::mem::take(&mut *v.calls.lock().unwrap()))
    }
}

/// Both were granted epoch 2; the first disk's rings run.
fn granted() -> Scene {
    let mut scene = Scene::sealed();
    scene.disks[0].started();
    assert_eq!(scene.calls(), [vec![Call::Ask(Asked::Activate)], vec![]]);
    scene.grant();
    assert_eq!(scene.calls()[0], [Call::Go(Epoch(2))]);
    scene
}

#[test]
fn a_disk_whose_rings_do_not_run_goes_when_they_start() {
    let mut scene = Scene::sealed();
    scene.disks[0].started();
    scene.calls();
    scene.grant();
    let later = [vec![Call::Go(Epoch(2))], vec![Call::OpenLater]];
    assert_eq!(scene.calls(), later, "nothing but what can wait");
    assert!(!scene.disks[1].is_held());
    scene.disks[1].started();
    assert_eq!(scene.calls(), [vec![], vec![Call::Go(Epoch(2))]]);
    scene.opened();
    assert_eq!(scene.calls(), [[], []], "once");
}

#[test]
fn it_goes_when_the_server_has_heard_the_decision_if_they_never_do() {
    let mut scene = granted();
    scene.opened();
    assert_eq!(scene.calls()[1], [Call::Go(Epoch(2))]);
    scene.disks[1].started();
    assert_eq!(scene.calls(), [[], []], "once");
}

#[test]
fn a_disk_that_is_held_meanwhile_does_not_go() {
    let mut scene = granted();
    scene.step(0, &RecordInput::Fence { term: None, nominee: None, seen: None });
    scene.show();
    assert_eq!(scene.calls()[1], [Call::Hold, Call::Park]);
    scene.disks[1].started();
    assert_eq!(scene.calls(), [[], []]);
}

/// Requests that were taken before the rings stopped have to be answered under the new epoch.
#[test]
fn a_disk_that_drains_goes_at_once() {
    let mut scene = Scene::sealed();
    scene.disks[0].started();
    scene.disks[1].started();
    scene.disks[1].stopped(false);
    scene.calls();
    scene.grant();
    assert_eq!(scene.calls()[1], [Call::Go(Epoch(2))]);
}

/// Its agent starts the winner's next process without a try, and the machine that runs here connects at once.
#[test]
fn whose_the_volumes_are_is_known_before_a_front_end_comes() {
    let arrived = Some(Try { id: HandoffId(2), attempt: 1 });
    for (owner, is_strange) in [("b", false), ("a", true)] {
        let volume = Told { id: VOLUMES[0], ..Told::default() };
        let claim = RecordInput::Claim { name: owner, session: SOURCE };
        let record = AccessRecord::new(volume.id).step(claim).unwrap().record;
        *volume.view.lock().unwrap() = Some((1, record));
        let volume: Arc<dyn Volume> = Arc::new(volume);
        let (_, disks) = VmHandoff::new("b", DESTINATION, None, &[("vda".to_owned(), volume)]);
        let disk = disks.into_iter().flatten().next().unwrap();
        for arrived in [None, arrived] {
            assert_eq!(disk.awaits_another_machine(arrived), is_strange, "of {owner}");
        }
    }
}
