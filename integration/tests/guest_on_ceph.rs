//! A real guest with its disk on a Ceph image, through `baton-backend`: it works, grows, and goes on after kills of its
//! backend; and a cluster that is away stops nothing but its I/O.

use baton_integration::baton::{Backend, wait_until};
use baton_integration::ceph::{Ceph, Objects, skip_without_ceph};
use baton_integration::guest::skip_without_qemu;
use baton_integration::handoff::ask;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::TestDir;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);
/// For a backend to end whose storage does not answer: it waits for requests, then for the image.
const END: Duration = Duration::from_secs(30);

struct Stack {
    ceph: Ceph,
    backend: Backend,
    control: PathBuf,
    dir: TestDir,
}

impl Stack {
    fn start(name: &str) -> Self {
        Self::start_on(name, Objects::Memory)
    }

    fn start_on(name: &str, objects: Objects) -> Self {
        let dir = TestDir::new(name).unwrap();
        let ceph = Ceph::start_with(dir.path(), objects, "").unwrap();
        ceph.create_image("v", 64 * MIB).unwrap();
        // No more rights than the documents ask for.
        ceph.add_user("vm", "profile rbd", "profile rbd pool=rbd").unwrap();
        let control = dir.join("control");
        let uri = format!("{}&id=vm", ceph.uri("v"));
        let more = ["--num-queues", "2", "--control", control.to_str().unwrap()];
        let backend = Backend::start(dir.path(), "disk", &uri, &more).unwrap();
        Self { ceph, backend, control, dir }
    }

    fn boot(&self) -> Guest {
        let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&self.backend.socket) };
        Guest::boot(self.dir.path(), &config).unwrap()
    }

    fn disk(&self) -> Value {
        let status = ask(&self.control, &json!({ "cmd": "status" }), SOON).unwrap();
        status["disks"][0].clone()
    }

    /// Whose the image is, as Ceph's own tool shows the record.
    fn phase(&self) -> String {
        let note = self.ceph.rbd(&["image-meta", "get", "rbd/v", "baton.access"]).unwrap();
        let note: Value = serde_json::from_str(&note).unwrap();
        note["phase"].as_str().unwrap().to_owned()
    }
}

fn skip(test: &str) -> bool {
    skip_without_qemu(test) || skip_without_ceph(test)
}

#[test]
fn a_guest_works_grows_and_survives_kills_of_the_backend() {
    if skip("a_guest_works_grows_and_survives_kills_of_the_backend") {
        return;
    }
    let mut stack = Stack::start("ceph-guest");
    let mut guest = stack.boot();
    assert_eq!(guest.ask("size").unwrap(), format!("bytes={}", 64 * MIB));
    guest.ask("write start=16 count=40 seq=7").unwrap();
    guest.ask("flush").unwrap();
    // One block: less than the space that a discard gives back, and gone all the same.
    guest.ask("discard start=17 count=1").unwrap();
    guest.ask("zeroout start=19 count=1").unwrap();
    guest.ask("verify start=16 count=1 seq=7").unwrap();
    guest.ask("verify-zero start=17 count=1").unwrap();
    guest.ask("verify start=18 count=1 seq=7").unwrap();
    guest.ask("verify-zero start=19 count=1").unwrap();
    guest.ask("verify start=20 count=36 seq=7").unwrap();
    let report = guest.ask("fs files=2 bytes=300000").unwrap();
    assert!(report.starts_with("bytes=600000 crc="), "{report}");

    stack.ceph.grow_image("v", 96 * MIB).unwrap();
    wait_until("the guest sees the new size", SOON, || {
        guest.ask("size").unwrap() == format!("bytes={}", 96 * MIB)
    })
    .unwrap();
    guest.ask("write start=20000 count=4 seq=1").unwrap();
    guest.ask("verify start=20000 count=4 seq=1").unwrap();

    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    for _ in 0..3 {
        guest.wait_progress(200, SOON).unwrap();
        stack.backend.kill_and_restart().unwrap();
    }
    guest.wait_progress(200, SOON).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 600, "{totals}");
    // Each was fenced before the next wrote.
    assert!(stack.ceph.blocklisted().unwrap().len() >= 3);
    assert_eq!(stack.phase(), "owned");
    guest.power_off().unwrap();
    assert!(stack.backend.daemon.terminate(END).unwrap().success());
    assert_eq!(stack.phase(), "free");
}

#[test]
fn a_cluster_that_is_away_stops_the_guests_io_and_nothing_else() {
    if skip("a_cluster_that_is_away_stops_the_guests_io_and_nothing_else") {
        return;
    }
    let mut stack = Stack::start_on("ceph-away", Objects::Disk);
    let mut guest = stack.boot();
    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    guest.wait_progress(200, SOON).unwrap();
    stack.ceph.osd.freeze().unwrap();
    wait_until("the status says so", SOON, || stack.disk()["state"] == "reconnecting").unwrap();
    assert!(stack.disk()["in_flight"].as_u64().unwrap() > 0);
    stack.ceph.osd.thaw().unwrap();
    guest.wait_progress(200, SOON).unwrap();
    wait_until("the status says so", SOON, || stack.disk()["state"] == "connected").unwrap();

    // Killed and not frozen: one that was frozen for longer than its lease of 16 s may not serve for minutes.
    stack.ceph.osd.kill().unwrap();
    wait_until("the status says so", SOON, || stack.disk()["state"] == "reconnecting").unwrap();
    let begun = Instant::now();
    assert!(stack.backend.daemon.terminate(END).unwrap().success());
    eprintln!("ended after {:?} without the cluster", begun.elapsed());
    stack.ceph.restart_osd().unwrap();
    stack.backend.restart().unwrap();
    guest.wait_progress(200, SOON).unwrap();
    guest.stop_load().unwrap();
    guest.power_off().unwrap();
}

#[test]
fn a_killed_osd_costs_the_guest_time_and_a_fence_all_its_io() {
    if skip("a_killed_osd_costs_the_guest_time_and_a_fence_all_its_io") {
        return;
    }
    let mut stack = Stack::start_on("ceph-osd", Objects::Disk);
    let mut guest = stack.boot();
    // The guest re-reads what it has written, and knows every block by a stamp.
    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    guest.wait_progress(100, SOON).unwrap();
    stack.ceph.osd.kill().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(stack.disk()["in_flight"].as_u64().unwrap() > 0, "{}", stack.disk());
    stack.ceph.restart_osd().unwrap();
    guest.wait_progress(100, SOON).unwrap();
    let totals = guest.stop_load().unwrap();
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0), "{totals}");
    assert_eq!(stack.disk()["state"], "connected");

    // Fenced under load, it answers nothing any more, and the guest sees no error.
    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    guest.wait_progress(100, SOON).unwrap();
    let clients = stack.ceph.clients_of("v").unwrap();
    stack.ceph.blocklist(&clients[0]).unwrap();
    wait_until("the status says so", SOON, || stack.disk()["state"] == "fenced").unwrap();
    let from = guest.heard_so_far();
    std::thread::sleep(Duration::from_secs(3));
    // One report may have been on its way.
    let reports = guest.reports(from);
    let ops: Vec<_> = reports.iter().skip(1).map(|totals| totals.ops).collect();
    assert!(ops.iter().all(|n| *n == ops[0]), "{ops:?}");
    assert_eq!(guest.complaints(), Vec::<String>::new());
}
