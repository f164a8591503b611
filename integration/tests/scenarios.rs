//! Accidents around a move that have no message boundary of their own, with stamping guests and the judge of what they
//! saw. Numbers are those of the list of scenarios in docs/handoff.md.
//!
//! Elsewhere: F1, F2 `splitbrain_on_baton.rs`; F5 `power_loss.rs`; F6 `a_seal_waits_for_what_is_at_the_disk`
//! (storage-server); F8 `activate.stepped@anchor ... kill anchor` of the fault matrix; F10, F11, F12 `storms.rs`; F20
//! `handoff_full.rs` (storage-server) and `live-migrate/tests/` for the journal and the agent; F15 `members_follow_the_anchors_proof` (storage-server).

use baton_integration::blk::Request;
use baton_integration::faults::history::{Event, Judge, What, now_ns};
use baton_integration::faults::stub::Stub;
use baton_integration::handoff::{Attempt, Begin, Fleet, Host};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const DISK_BYTES: u64 = 16 << 20;
const SOON: Duration = Duration::from_secs(30);
const OWNERS: [&str; 2] = ["host-a/vm", "host-b/vm"];

/// A VM on one of two hosts, and the servers of its volumes.
struct Scene {
    dir: TestDir,
    fleet: Fleet,
    hosts: Vec<Host>,
    vmms: u64,
    /// The VMM that runs the guest.
    guest: Stub,
    /// Where it is.
    at: usize,
    /// Histories of the VMMs that the guest has left.
    past: Vec<Event>,
}

/// A guest that has stopped and is to go on elsewhere.
struct Moving {
    attempt: Attempt,
    saved: PathBuf,
    next: Stub,
}

impl Scene {
    /// With the source's connections by way of proxies, if there are any.
    fn new(name: &str, servers: usize, volumes: usize, proxied: bool) -> (Self, Vec<Proxy>) {
        let dir = TestDir::new(name).unwrap();
        let mut fleet = Fleet::start(dir.path(), servers, volumes, DISK_BYTES).unwrap();
        let proxy = |(server, seed): (SocketAddr, u64)| Proxy::start(server, seed).unwrap();
        let addresses = fleet.servers.iter().map(|server| server.data_address());
        let proxies: Vec<Proxy> =
            if proxied { addresses.zip(1..).map(proxy).collect() } else { Vec::new() };
        fleet.through = proxies.iter().map(Proxy::address).collect();
        let source = Host::start(dir.path(), "a", OWNERS[0], &fleet, Begin::Claim).unwrap();
        fleet.through.clear();
        let mut guest = Stub::start(dir.path(), 1, &source.sockets()).unwrap();
        guest.wait_ready().unwrap();
        guest.order("run").unwrap();
        guest.wait_progress(20, SOON).unwrap();
        let hosts = vec![source];
        (Self { dir, fleet, hosts, vmms: 1, guest, at: 0, past: Vec::new() }, proxies)
    }

    fn stand_by(&mut self) {
        let host =
            Host::start(self.dir.path(), "b", OWNERS[1], &self.fleet, Begin::Standby).unwrap();
        self.hosts.push(host);
    }

    fn here(&self) -> &Host {
        &self.hosts[self.at]
    }

    fn there(&self) -> &Host {
        &self.hosts[1 - self.at]
    }

    /// Arms a move and waits until the other host is ready for it.
    fn prepare(&mut self) -> Moving {
        let attempt = self.fleet.arm(OWNERS[self.at], OWNERS[1 - self.at]).unwrap();
        self.there().wait_standing("ready").unwrap();
        self.vmms += 1;
        let mut next = Stub::start(self.dir.path(), self.vmms, &self.there().sockets()).unwrap();
        next.wait_ready().unwrap();
        Moving { attempt, saved: self.dir.join(&format!("saved-{}", self.vmms)), next }
    }

    fn stop_guest(&self, moving: &Moving) {
        self.guest.order("log").unwrap();
        self.guest.order("stop").unwrap();
        self.guest.save(&moving.saved).unwrap();
    }

    /// The guest goes on over there, and only there.
    fn go_on(&mut self, moving: Moving) {
        let Moving { attempt, saved, next } = moving;
        next.load(&saved).unwrap();
        next.order("run").unwrap();
        next.wait_progress(10, SOON).unwrap();
        assert_eq!(self.fleet.settle(&attempt).unwrap(), "destination");
        self.past.extend(self.guest.history().unwrap());
        self.guest = next;
        self.at = 1 - self.at;
    }

    /// The whole life of the guest was as it should be; the last word is a fresh look at every block.
    fn judge(&self) -> u64 {
        self.guest.sweep(SOON).unwrap();
        let mut judge = Judge::default();
        judge.follow(&self.past).unwrap();
        judge.follow(&self.guest.history().unwrap()).unwrap();
        assert_eq!(judge.unanswered(), 0);
        judge.completed()
    }
}

fn answered_after(events: &[Event], at_ns: u64) -> Option<&Event> {
    events.iter().find(|event| event.what == What::Complete && event.at_ns > at_ns)
}

#[test]
fn f3_what_a_cut_off_source_says_too_late_changes_nothing() {
    let (mut scene, proxies) = Scene::new("f3", 1, 1, true);
    scene.stand_by();
    let moving = scene.prepare();
    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    let sealed = now_ns();
    // From now on nothing of the source arrives, and it is told to go on.
    proxies[0].hold_requests();
    scene.guest.order("run").unwrap();
    moving.next.load(&moving.saved).unwrap();
    moving.next.order("run").unwrap();
    moving.next.wait_progress(10, SOON).unwrap();
    // Its RECLAIM, and whatever it sent with it, arrive now.
    proxies[0].release_requests();
    scene.hosts[0].wait_standing("parked").unwrap();
    moving.next.wait_progress(20, SOON).unwrap();
    let source = scene.guest.history().unwrap();
    assert_eq!(answered_after(&source, sealed), None, "the source lost");
    scene.past = source.into_iter().filter(|event| event.at_ns <= sealed).collect();
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "destination");
    scene.guest = moving.next;
    assert!(scene.judge() > 50);
}

/// Row 9 of the failure table: the source is cut off before it stopped.
#[test]
fn row_09_a_source_that_is_cut_off_before_its_seal_is_not_succeeded() {
    let (mut scene, proxies) = Scene::new("row9", 1, 1, true);
    scene.stand_by();
    let moving = scene.prepare();
    proxies[0].hold_requests();
    // The orchestrator starts the other side all the same, and then gives up.
    drop(moving.next);
    let mut rogue = RawFrontend::connect(scene.there().socket(0), Options::default()).unwrap();
    rogue.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
    rogue.queue(0).kick().unwrap();
    scene.there().wait_standing("activating").unwrap();
    assert_eq!(rogue.queue(0).wait_used(Duration::from_millis(100)).unwrap(), None);
    assert_eq!(scene.fleet.reclaim(&moving.attempt).unwrap()["outcome"], "source");
    scene.there().wait_standing("parked").unwrap();
    proxies[0].release_requests();
    scene.guest.wait_progress(20, SOON).unwrap();
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "source");
    assert!(scene.judge() > 30);
}

#[test]
fn f4_a_slow_network_that_reorders_and_cuts_only_delays() {
    let (mut scene, proxies) = Scene::new("f4", 2, 2, true);
    scene.stand_by();
    let moving = scene.prepare();
    for proxy in &proxies {
        proxy.delay_replies(Duration::from_millis(500));
    }
    // Connections that break make the client send again what was not answered: duplicates, from the server's view.
    for _ in 0..3 {
        scene.guest.wait_progress(2, SOON).unwrap();
        proxies.iter().for_each(Proxy::cut);
    }
    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    scene.go_on(moving);
    assert!(scene.judge() > 50);
}

#[test]
fn f9_eight_volumes_on_four_servers_move_as_one_while_servers_die() {
    let (mut scene, _) = Scene::new("f9", 4, 8, false);
    scene.stand_by();
    for dies in 0..4 {
        let moving = scene.prepare();
        // Right behind the seals; the first is the anchor's.
        scene.stop_guest(&moving);
        scene.fleet.wait_phase(&["sealed"]).unwrap();
        scene.fleet.servers[dies].kill_and_restart().unwrap();
        scene.go_on(moving);
        let owners: Vec<String> = (0..8).map(|m| scene.fleet.owner(m).unwrap()).collect();
        assert_eq!(owners, [OWNERS[scene.at]; 8]);
        // Back on standby, for the next round.
        let left = 1 - scene.at;
        scene.hosts[left].daemon.kill().unwrap();
        scene.hosts[left].set_begin(Begin::Standby).unwrap();
        scene.hosts[left].restart().unwrap();
    }
    assert!(scene.judge() > 500);
}

#[test]
fn f14_a_standby_reads_and_writes_nothing_however_hard_its_vmm_tries() {
    let (mut scene, _) = Scene::new("f14", 1, 1, false);
    scene.stand_by();
    scene.fleet.arm(OWNERS[0], OWNERS[1]).unwrap();
    scene.there().wait_standing("ready").unwrap();
    // Nobody has stopped the guest; this one starts all the same.
    let mut rogue = RawFrontend::connect(scene.there().socket(0), Options::default()).unwrap();
    let requests =
        [Request::Write { sector: 0, data: &[9; 4096] }, Request::Read { sector: 0, len: 4096 }];
    for request in &requests {
        rogue.queue(0).submit(request).unwrap();
    }
    rogue.queue(0).kick().unwrap();
    scene.guest.wait_progress(50, SOON).unwrap();
    assert_eq!(rogue.queue(0).wait_used(Duration::from_millis(100)).unwrap(), None);
    assert_eq!(scene.there().standing().unwrap(), "activating");
    assert!(scene.judge() > 70);
}

#[test]
fn f16_a_guest_that_resets_its_disk_during_pre_copy_keeps_it() {
    let (mut scene, _) = Scene::new("f16", 1, 1, false);
    scene.stand_by();
    let moving = scene.prepare();
    // Rings stop and start again while the dirty log is on: to the backend each looks like the end of a migration.
    scene.guest.order("log").unwrap();
    for _ in 0..10 {
        scene.guest.order("stop").unwrap();
        scene.guest.order("run").unwrap();
        scene.guest.wait_progress(5, SOON).unwrap();
        scene.guest.order("log").unwrap();
    }
    scene.here().wait_standing("serving").unwrap();
    // The first reset ended the handoff; the guest has its disk, and another can be armed.
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "source");
    drop(moving);
    assert!(scene.judge() > 70);
    let again = scene.fleet.arm(OWNERS[0], OWNERS[1]).unwrap();
    assert_eq!(scene.fleet.reclaim(&again).unwrap()["outcome"], "source");
}

/// A hundred times in a test run; `BATON_PING_PONG` times by wish.
#[test]
fn f18_a_guest_that_moves_to_and_fro_loses_nothing() {
    let rounds = std::env::var("BATON_PING_PONG").ok().map_or(100, |text| text.parse().unwrap());
    let (mut scene, _) = Scene::new("f18", 2, 2, false);
    scene.stand_by();
    for _ in 0..rounds {
        let moving = scene.prepare();
        scene.stop_guest(&moving);
        scene.go_on(moving);
        // The old owner's process ends and the next one of the host stands by.
        let left = 1 - scene.at;
        scene.hosts[left].daemon.kill().unwrap();
        scene.hosts[left].set_begin(Begin::Standby).unwrap();
        scene.hosts[left].restart().unwrap();
    }
    let answers = scene.judge();
    assert!(answers > 40 * rounds, "{answers}");
}

/// Nothing that decides may read a clock that can jump: what reads one shows it to people.
#[test]
fn f13_the_wall_clock_is_for_people() {
    const SHOWN: [&str; 7] = [
        // An audit entry's time.
        "storage-server/src/volumes/audit.rs",
        // When a volume was made.
        "storage-server/src/store/mod.rs",
        "backend/src/latency.rs",
        "backend/src/handoff/journal.rs",
        "live-migrate/src/agent/events.rs",
        "live-migrate/src/coordinator/core.rs",
        "live-migrate/src/coordinator/api/events.rs",
    ];
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut found = Vec::new();
    for part in ["protocol", "remote-client", "backend", "storage-server", "live-migrate"] {
        readers(&root.join(part).join("src"), &mut found);
    }
    let found: Vec<String> = found
        .iter()
        .map(|path| path.strip_prefix(&root).unwrap().display().to_string())
        .filter(|path| !SHOWN.contains(&path.as_str()) && !path.contains("test"))
        .collect();
    assert!(found.is_empty(), "these read the wall clock: {found:?}");
}

fn readers(dir: &std::path::Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            readers(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs")
            && std::fs::read_to_string(&path).unwrap().contains("SystemTime::now")
        {
            found.push(path);
        }
    }
}
