//! Disks on a real Ceph cluster change hands between two hosts, with all of Baton running: agents, backends, coordinator.
//! A raw front-end plays the VMM on both, or real QEMUs move a guest. What was written before is there after, and who
//! lost, died or came back from a freeze changes no byte.

use baton_integration::baton::wait_until;
use baton_integration::blk::Request;
use baton_integration::ceph::{Ceph, skip_without_ceph};
use baton_integration::cluster::{Cluster, Disk, Driver, HOSTS, Trust, VM};
use baton_integration::daemon::freeze;
use baton_integration::guest::skip_without_qemu;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
/// For what must not happen.
const A_WHILE: Duration = Duration::from_millis(700);
const QUEUES: u16 = 2;

/// Two hosts, a coordinator, and a VM with so many images, which runs on the first host.
struct Scene {
    cluster: Cluster,
    guest: Vec<RawFrontend>,
    ceph: Ceph,
    images: usize,
    dir: TestDir,
}

fn disks(ceph: &Ceph, images: usize, bytes: u64) -> Vec<Disk> {
    let disk = |n: usize| {
        let name = format!("image{n}");
        ceph.create_image(&name, bytes).unwrap();
        // No more rights than the documents ask for.
        Disk { volume: format!("{}&id=vm", ceph.uri(&name)), name }
    };
    let osd = "profile rbd pool=rbd";
    ceph.add_user("vm", "profile rbd", osd).unwrap();
    let mon = "profile rbd, allow command \"osd blocklist\" with blocklistop=rm";
    ceph.add_user("coordinator", mon, osd).unwrap();
    (0..images).map(disk).collect()
}

fn block(salt: usize) -> Vec<u8> {
    vec![u8::try_from(salt).unwrap(); 4096]
}

impl Scene {
    fn start(name: &str, images: usize) -> Self {
        let dir = TestDir::new(name).unwrap();
        let ceph = Ceph::start(dir.path()).unwrap();
        let disks = disks(&ceph, images, 8 << 20);
        let cluster =
            Cluster::start_on(dir.path(), 0, &disks, Driver::Other, Trust::Loopback).unwrap();
        let mut scene = Self { cluster, guest: Vec::new(), ceph, images, dir };
        scene.guest = scene.connect(0);
        for (disk, salt) in scene.guest.iter_mut().zip(1..) {
            disk.queue(0).write(0, &block(salt)).unwrap();
        }
        scene
    }

    /// The VMM on a host starts its guest.
    fn connect(&self, host: usize) -> Vec<RawFrontend> {
        let disk = |n| {
            let socket = self.cluster.hosts[host].socket(&format!("image{n}"));
            let options = Options { queues: QUEUES, ..Options::default() };
            RawFrontend::connect(&socket, options).unwrap()
        };
        (0..self.images).map(disk).collect()
    }

    fn prepare(&mut self, to: usize) {
        self.cluster.does(&["handoff", "prepare", VM, "--to", HOSTS[to], "--wait"]).unwrap();
        self.guest.iter_mut().for_each(|disk| disk.start_logging().unwrap());
        for (disk, salt) in self.guest.iter_mut().zip(101..) {
            disk.queue(1).write(8, &block(salt)).unwrap();
        }
    }

    /// The VMM stops its guest to move it.
    fn stop(&mut self) {
        for disk in &self.guest {
            (0..QUEUES).for_each(|queue| disk.enable(queue, false).unwrap());
            for queue in 0..QUEUES {
                disk.get_vring_base(queue).unwrap();
            }
        }
    }

    /// The VMM was told to cancel, and goes on with its guest.
    fn resume(&mut self) {
        for disk in &mut self.guest {
            for queue in 0..QUEUES {
                let base = disk.queue(queue).ring.used_index();
                disk.set_up_queue(queue, base).unwrap();
                disk.enable(queue, true).unwrap();
                disk.queue(queue).kick_anyway().unwrap();
            }
        }
    }

    fn standing(&self, host: usize) -> String {
        let vm = self.cluster.hosts[host].vm().unwrap();
        vm["status"]["handoff"]["standing"].as_str().unwrap_or_default().to_owned()
    }

    fn wait_standing(&self, host: usize, standing: &str) {
        wait_until(&format!("{} is {standing}", HOSTS[host]), SOON, || {
            self.standing(host) == standing
        })
        .unwrap();
    }

    fn pid(&self, host: usize) -> Pid {
        let vm = self.cluster.hosts[host].vm().unwrap();
        Pid::from_raw(i32::try_from(vm["status"]["pid"].as_i64().unwrap()).unwrap())
    }

    /// What is noted on an image.
    fn note(&self, image: usize) -> Value {
        let spec = format!("rbd/image{image}");
        let note = self.ceph.rbd(&["image-meta", "get", &spec, "baton.access"]).unwrap();
        serde_json::from_str(&note).unwrap()
    }

    /// What Ceph's own tool finds in all images.
    fn contents(&self) -> Vec<u8> {
        let export = |image| self.ceph.export(&format!("image{image}")).unwrap();
        (0..self.images).flat_map(export).collect()
    }
}

fn check(guest: &mut [RawFrontend]) {
    for (disk, salt) in guest.iter_mut().zip(1..) {
        assert_eq!(disk.queue(0).read(0, 4096).unwrap(), block(salt));
        assert_eq!(disk.queue(1).read(8, 4096).unwrap(), block(salt + 100));
        disk.queue(1).write(16, &block(salt + 50)).unwrap();
        disk.queue(0).flush().unwrap();
        assert_eq!(disk.queue(0).read(16, 4096).unwrap(), block(salt + 50));
    }
}

/// A write that must not be done is on its way.
fn write_late(disk: &mut RawFrontend) {
    disk.queue(0).submit(&Request::Write { sector: 0, data: &block(0xbd) }).unwrap();
    disk.queue(0).kick_anyway().unwrap();
}

fn is_unanswered(disk: &mut RawFrontend) {
    assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "answered");
}

#[test]
fn two_images_move_and_whoever_lost_changes_no_byte() {
    if skip_without_ceph("two_images_move_and_whoever_lost_changes_no_byte") {
        return;
    }
    let mut scene = Scene::start("ceph-move", 2);
    let source = scene.note(0)["client"].as_str().unwrap().to_owned();
    scene.prepare(1);
    let status = scene.cluster.does(&["handoff", "status", VM]).unwrap();
    assert!(status.contains("blocklist"), "{status}");
    scene.stop();
    scene.wait_standing(0, "sealed");
    // The lock was given back with the seal, and nothing is decided yet.
    assert_eq!(scene.note(0)["phase"], "sealed");
    let mut there = scene.connect(1);
    check(&mut there);
    scene.wait_standing(0, "parked");
    scene.cluster.wait_owner("host-b").unwrap();
    let why = scene.cluster.does(&["handoff", "why", VM]).unwrap();
    assert!(why.starts_with("host-b/web owns"), "{why}");
    // It has sealed, and is kept out all the same.
    assert!(scene.ceph.blocklisted().unwrap().contains_key(&source), "{source}");
    let before = scene.contents();
    // The machine that lost starts its rings all the same.
    scene.resume();
    scene.guest.iter_mut().for_each(write_late);
    scene.guest.iter_mut().for_each(is_unanswered);
    assert!(scene.contents() == before, "a loser's write landed");
    // Status 10: the destination owns the volumes.
    let (status, said) = scene.cluster.operator(&["handoff", "finish", VM]).unwrap();
    assert_eq!(status, 10, "{said}");
    // Its process is dead, and said before that nothing of it was under way.
    wait_until("the source's clients are forgotten", SOON, || {
        let former = scene.note(0)["former"].as_array().unwrap().len();
        former == 0 && !scene.ceph.blocklisted().unwrap().contains_key(&source)
    })
    .unwrap();
    let dead = scene.cluster.told("baton.clients.dead").unwrap();
    assert!(dead.iter().any(|event| event.to_string().contains(&source)), "{dead:?}");
}

/// The drain certificate of an image: a source seals when nothing of it is under way, however long the data takes.
#[test]
fn a_source_whose_data_is_stuck_does_not_seal_until_it_is_not() {
    if skip_without_ceph("a_source_whose_data_is_stuck_does_not_seal_until_it_is_not") {
        return;
    }
    let dir = TestDir::new("ceph-stuck").unwrap();
    let ceph = Ceph::start(dir.path()).unwrap();
    // The data have a pool of their own, which stops when it wants more copies than there are OSDs.
    ceph.ceph(&["osd", "pool", "create", "data", "8"]).unwrap();
    ceph.ceph(&["osd", "pool", "set", "data", "size", "2"]).unwrap();
    ceph.ceph(&["osd", "pool", "application", "enable", "data", "rbd"]).unwrap();
    ceph.add_user("vm", "profile rbd", "profile rbd").unwrap();
    let more = "profile rbd, allow command \"osd blocklist\" with blocklistop=rm";
    ceph.add_user("coordinator", more, "profile rbd").unwrap();
    ceph.rbd(&["create", "--size", "8M", "--data-pool", "data", "rbd/image0"]).unwrap();
    let volume = format!("{}&id=vm", ceph.uri("image0"));
    let disk = Disk { name: "image0".to_owned(), volume };
    let trust = Trust::Loopback;
    let cluster = Cluster::start_on(dir.path(), 0, &[disk], Driver::Other, trust).unwrap();
    let mut scene = Scene { cluster, guest: Vec::new(), ceph, images: 1, dir };
    scene.guest = scene.connect(0);
    scene.guest[0].queue(0).write(0, &block(1)).unwrap();
    scene.prepare(1);

    let least = |scene: &Scene, copies: &str| {
        scene.ceph.ceph(&["osd", "pool", "set", "data", "min_size", copies]).unwrap();
    };
    least(&scene, "2");
    scene.guest[0].queue(0).submit(&Request::Write { sector: 24, data: &block(77) }).unwrap();
    scene.guest[0].queue(0).kick().unwrap();
    is_unanswered(&mut scene.guest[0]);
    // The VMM stops the rings, and is answered when the write is.
    let guest = std::mem::take(&mut scene.guest);
    let stopping = std::thread::spawn(move || {
        (0..QUEUES).for_each(|queue| guest[0].enable(queue, false).unwrap());
        guest
    });
    scene.wait_standing(0, "sealing");
    let mut there = scene.connect(1);
    there[0].queue(0).submit(&Request::Read { sector: 24, len: 4096 }).unwrap();
    there[0].queue(0).kick().unwrap();
    is_unanswered(&mut there[0]);
    assert_eq!((scene.standing(0).as_str(), &scene.note(0)["phase"]), ("sealing", &"armed".into()));

    least(&scene, "1");
    let read = there[0].queue(0).wait_completion(SOON).unwrap().expect("an answer");
    assert_eq!(read.ok().unwrap(), block(77), "the destination has read before the source's write");
    let mut guest = stopping.join().unwrap();
    assert!(guest[0].queue(0).wait_completion(SOON).unwrap().is_some());
    check(&mut there);
}

#[test]
fn a_cancelled_move_and_one_whose_destination_dies_go_on_at_the_source() {
    if skip_without_ceph("a_cancelled_move_and_one_whose_destination_dies_go_on_at_the_source") {
        return;
    }
    let mut scene = Scene::start("ceph-cancel", 2);
    // Cancelled after the seal: the source's machine goes on, and the destination's, which starts as well, is parked.
    scene.prepare(1);
    scene.stop();
    scene.wait_standing(0, "sealed");
    scene.cluster.does(&["handoff", "cancel", VM]).unwrap();
    scene.resume();
    check(&mut scene.guest);
    scene.cluster.wait_owner("host-a").unwrap();
    assert_eq!(scene.standing(0), "serving");

    // The destination's host dies when all is sealed.
    scene.prepare(1);
    scene.stop();
    scene.wait_standing(0, "sealed");
    scene.cluster.hosts[1].die().unwrap();
    scene.resume();
    check(&mut scene.guest);
    scene.cluster.hosts[1].restart().unwrap();
    let _ = scene.cluster.operator(&["handoff", "cancel", VM]).unwrap();
    scene.cluster.wait_owner("host-a").unwrap();
    check(&mut scene.guest);
    // Nobody who was let in had to be put on the blocklist.
    assert_eq!(scene.note(0)["former"], Value::Array(Vec::new()));

    // Both machines start at once: the record decides, and one of them works.
    scene.prepare(1);
    scene.stop();
    scene.wait_standing(0, "sealed");
    let mut there = scene.connect(1);
    scene.resume();
    wait_until("one has won", SOON, || [0, 1].iter().any(|host| scene.standing(*host) == "parked"))
        .unwrap();
    let (winner, loser) = match scene.standing(0).as_str() {
        "parked" => (&mut there, &mut scene.guest),
        _ => (&mut scene.guest, &mut there),
    };
    check(winner);
    loser.iter_mut().for_each(write_late);
    loser.iter_mut().for_each(is_unanswered);
    check(winner);
}

#[test]
fn a_frozen_source_is_fenced_and_changes_no_byte_when_it_thaws() {
    if skip_without_ceph("a_frozen_source_is_fenced_and_changes_no_byte_when_it_thaws") {
        return;
    }
    let mut scene = Scene::start("ceph-frozen", 2);
    scene.prepare(1);
    let client = scene.note(1)["client"].as_str().unwrap().to_owned();
    // The host hangs as a whole while memory is copied, with writes of its guest in the rings.
    let backend = scene.pid(0);
    scene.cluster.hosts[0].agent.freeze().unwrap();
    freeze(backend).unwrap();
    scene.guest.iter_mut().for_each(write_late);
    // The destination's machine starts: nobody has sealed, so it waits.
    let mut there = scene.connect(1);
    there.iter_mut().for_each(write_late);
    there.iter_mut().for_each(is_unanswered);
    drop(there);

    let fence = ["handoff", "fence", VM, "--dead-host", "host-a", "--nominee", "host-b"];
    let fence = [&fence[..], &["--reason", "it hangs, ticket 9", "--force"]].concat();
    scene.cluster.does(&fence).unwrap();
    assert!(scene.ceph.blocklisted().unwrap().contains_key(&client), "{client}");
    scene.cluster.hosts[1].stop_backend().unwrap();
    scene.cluster.hosts[1].claim().unwrap();
    let mut there = scene.connect(1);
    check(&mut there);
    let before = scene.contents();

    kill(backend, Signal::SIGCONT).unwrap();
    scene.cluster.hosts[0].agent.thaw().unwrap();
    scene.guest.iter_mut().for_each(is_unanswered);
    // It learns from the record, with a client that only reads, that its machine must stop.
    scene.wait_standing(0, "parked");
    assert!(scene.contents() == before, "a zombie's write landed");
    check(&mut there);
    // Nobody has proven it dead: the entry stays.
    assert!(scene.ceph.blocklisted().unwrap().contains_key(&client), "{client}");
}

/// The host of a destination that lost had the image once: of that process nobody has seen the end, though the host has
/// ended a backend now.
#[test]
fn the_end_of_a_destination_that_lost_is_not_that_of_an_earlier_source_there() {
    let name = "the_end_of_a_destination_that_lost_is_not_that_of_an_earlier_source_there";
    if skip_without_ceph(name) {
        return;
    }
    let mut scene = Scene::start("ceph-bury", 1);
    let earlier = "127.0.0.1:0/4711";
    scene.ceph.blocklist(earlier).unwrap();
    let mut note = scene.note(0);
    let former = json!({"client": earlier, "owner": "host-b/web", "sealed": true, "listed": true});
    note["former"].as_array_mut().unwrap().push(former.clone());
    let set = ["image-meta", "set", "rbd/image0", "baton.access", &note.to_string()];
    scene.ceph.rbd(&set).unwrap();

    scene.prepare(1);
    scene.cluster.does(&["handoff", "cancel", VM]).unwrap();
    wait_until("the destination's backend is ended, and nothing left to do", SOON, || {
        let handoffs = scene.cluster.handoffs().unwrap();
        handoffs.last().is_some_and(|row| row["over"] == true)
    })
    .unwrap();
    assert_eq!(scene.standing(1), "", "it is ended");
    assert_eq!(scene.note(0)["former"], json!([former]));
    assert!(scene.ceph.blocklisted().unwrap().contains_key(earlier), "its entry was ended");
    assert_eq!(scene.cluster.told("baton.clients.dead").unwrap(), Vec::<Value>::new());
    check(&mut scene.guest);
}

/// The journal is lost when the destination has won: what settles the handoff from the records puts the source's clients
/// on the blocklist, as the journal's own handoff would have.
#[test]
fn a_handoff_that_the_journal_has_lost_is_settled_with_the_blocklist() {
    let name = "a_handoff_that_the_journal_has_lost_is_settled_with_the_blocklist";
    if skip_without_ceph(name) {
        return;
    }
    let mut scene = Scene::start("ceph-orphan", 2);
    scene.prepare(1);
    let source = [0, 1].map(|image| scene.note(image)["client"].as_str().unwrap().to_owned());
    scene.cluster.coordinator.kill().unwrap();
    scene.stop();
    scene.wait_standing(0, "sealed");
    let mut there = scene.connect(1);
    check(&mut there);
    let listed = |scene: &Scene| {
        let listed = scene.ceph.blocklisted().unwrap();
        source.iter().filter(|client| listed.contains_key(&**client)).count()
    };
    // It had sealed, so the destination did not have to.
    assert_eq!(listed(&scene), 0);
    fs::remove_file(scene.dir.join("journal.redb")).unwrap();
    scene.cluster.restart_coordinator().unwrap();
    assert_eq!(scene.cluster.handoffs().unwrap(), Vec::<Value>::new());

    let fence = ["handoff", "fence", VM, "--dead-host", "host-a", "--reason", "journal lost"];
    let (status, said) = scene.cluster.operator(&fence).unwrap();
    // The volumes are the destination's, which goes on.
    assert_eq!(status, 1, "{said}");
    assert_eq!(listed(&scene), 2, "{said}");
    for image in [0, 1] {
        let note = scene.note(image);
        assert_eq!((&note["phase"], &note["owner"]), (&json!("owned"), &json!("host-b/web")));
    }
    check(&mut there);
    let before = scene.contents();
    scene.resume();
    scene.guest.iter_mut().for_each(write_late);
    scene.guest.iter_mut().for_each(is_unanswered);
    assert!(scene.contents() == before, "a loser's write landed");
}

#[test]
fn a_source_that_is_killed_and_one_whose_destination_was_killed_after_the_switch() {
    let name = "a_source_that_is_killed_and_one_whose_destination_was_killed_after_the_switch";
    if skip_without_ceph(name) {
        return;
    }
    let mut scene = Scene::start("ceph-killed", 1);
    // The source's backend dies while memory is copied; its agent starts the next one, which goes on.
    scene.prepare(1);
    let first = scene.note(0)["client"].as_str().unwrap().to_owned();
    let dead = scene.pid(0);
    kill(dead, Signal::SIGKILL).unwrap();
    wait_until("the next backend serves", SOON, || {
        scene.standing(0) == "serving" && scene.pid(0) != dead
    })
    .unwrap();
    scene.guest.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    check(&mut scene.guest);
    assert!(scene.ceph.blocklisted().unwrap().contains_key(&first), "{first}");

    // The handoff goes on with it.
    scene.guest.iter_mut().for_each(|disk| disk.start_logging().unwrap());
    scene.stop();
    scene.wait_standing(0, "sealed");
    let mut there = scene.connect(1);
    check(&mut there);
    scene.cluster.wait_owner("host-b").unwrap();
    // The destination's backend dies after the switch: the source may not come back, its successor goes on.
    // The successor is started without the try, which has been had.
    let record = scene.dir.join("host-b/state/web.backend.json");
    wait_until("its agent has seen it serve", SOON, || {
        fs::read_to_string(&record).is_ok_and(|record| !record.contains("only_for"))
    })
    .unwrap();
    let dead = scene.pid(1);
    kill(dead, Signal::SIGKILL).unwrap();
    scene.resume();
    scene.guest.iter_mut().for_each(write_late);
    // It is the next process of the try, and takes the image when the machine is back.
    wait_until("the next backend stands by", SOON, || {
        scene.standing(1) == "standby" && scene.pid(1) != dead
    })
    .unwrap();
    there.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    check(&mut there);
    scene.guest.iter_mut().for_each(is_unanswered);
    check(&mut there);
}

#[test]
fn a_guest_moves_there_and_back_by_two_qemus() {
    let name = "a_guest_moves_there_and_back_by_two_qemus";
    if skip_without_qemu(name) || skip_without_ceph(name) {
        return;
    }
    let dir = TestDir::new("ceph-guest-move").unwrap();
    let ceph = Ceph::start(dir.path()).unwrap();
    let disks = disks(&ceph, 2, 64 << 20);
    let cluster = Cluster::start_on(dir.path(), 0, &disks, Driver::Agent, Trust::Loopback).unwrap();
    let (_guest, mut probe) = cluster.hosts[0].boot().unwrap();
    // The guest re-reads what it has written, and knows every block by a stamp.
    probe.ask("load dev=vda,vdb threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(200, SOON).unwrap();
    for (from, to) in [(0, 1), (1, 0)] {
        cluster.does(&["vm", "migrate", VM, "--to", HOSTS[to]]).unwrap();
        probe = cluster.hosts[to].probe().unwrap();
        probe.resynchronise().unwrap();
        probe.wait_progress(200, SOON).unwrap();
        cluster.wait_owner(HOSTS[to]).unwrap();
        assert_eq!(cluster.hosts[from].run_state().unwrap(), "gone");
    }
    let totals = probe.stop_load().unwrap();
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0), "{totals}");
}
