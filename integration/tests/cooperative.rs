//! A VM on an NBD server, which keeps nobody out, moves by proof: the destination sends nothing before the source's
//! backend is proven gone, whatever is killed or frozen on the way.

use baton_integration::baton::{Storage, wait_until};
use baton_integration::cluster::{Cluster, Disk, Driver, HOSTS, Trust, VM, call};
use baton_integration::daemon::Daemon;
use baton_integration::guest::{skip_without_program, skip_without_qemu};
use baton_integration::nbdkit::Nbdkit;
use baton_integration::probe::Probe;
use baton_integration::qemu_nbd::QemuNbd;
use baton_integration::workspace::{TestDir, program};
use nix::sys::signal::{Signal, kill};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 << 20;

/// One decision covers all volumes that may be written, so who stands by for some of Baton's and some on NBD is told so;
/// one that is only read has no part in it.
#[test]
fn who_stands_by_for_volumes_of_two_kinds_is_told_that_they_do_not_move_together() {
    let name = "who_stands_by_for_volumes_of_two_kinds_is_told_that_they_do_not_move_together";
    if skip_without_program(name, "nbdkit") {
        return;
    }
    let dir = TestDir::new("mixed").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("root", DISK_BYTES).unwrap();
    let server = Nbdkit::start(dir.path(), "data", DISK_BYTES).unwrap();
    let baton = storage.uri("root", None);
    let standby = |disks: [(&str, bool); 2], run: &str| {
        let mut text = "owner = \"host-b/web\"\n".to_owned();
        for (n, (volume, read_only)) in disks.iter().enumerate() {
            let socket = dir.join(&format!("{run}-{n}.sock"));
            text += &format!(
                "[[disk]]\nname = \"disk{n}\"\nvolume = \"{volume}\"\nsocket_path = \"{}\"\nread_only = {read_only}\n",
                socket.display()
            );
        }
        let file = dir.join(&format!("{run}.toml"));
        std::fs::write(&file, text).unwrap();
        let args = ["--standby".as_ref(), "--config".as_ref(), file.as_os_str()];
        Daemon::start(dir.path(), run, &program("baton-backend").unwrap(), args).unwrap()
    };
    let nbd = server.uri();
    for (run, disks) in [
        ("baton-first", [(&*baton, false), (&*nbd, false)]),
        ("nbd-first", [(&*nbd, false), (&*baton, false)]),
    ] {
        let mut backend = standby(disks, run);
        assert!(!backend.wait_exit(SOON).unwrap().success());
        let said = backend.log();
        assert!(said.contains(&format!("disk disk1: volume {}", disks[1].0)), "{said}");
        assert!(said.contains("cannot be handed over together"), "{said}");
    }
    let mut backend = standby([(&*baton, false), (&*nbd, true)], "read-only");
    backend.wait_line("listening socket=", SOON).unwrap();
    assert!(backend.terminate(SOON).unwrap().success());
}

fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_micros()).unwrap()
}

fn skipped(name: &str) -> bool {
    skip_without_qemu(name) || skip_without_program(name, "nbdkit")
}

/// Of qemu-nbd: one for each queue of the disk, and one for the destination's look at the export.
const CLIENTS: u32 = 2 + 1;

/// A cluster whose guest runs on the first host, under load, with its disk on an NBD server.
struct Running<Server = Nbdkit> {
    cluster: Cluster,
    server: Server,
    probe: Probe,
    // Killed when dropped.
    _guest: Daemon,
}

impl Running {
    fn start(dir: &TestDir) -> Self {
        let server = Nbdkit::start(dir.path(), "disk", DISK_BYTES).unwrap();
        let uri = server.uri();
        Self::start_on(dir, server, uri)
    }

    /// How many requests the server had, and the connections that they came by.
    fn asked(&self) -> (usize, Vec<u32>) {
        let asked = self.server.asked().unwrap();
        let mut connections: Vec<u32> = asked.iter().map(|asked| asked.connection).collect();
        connections.sort_unstable();
        connections.dedup();
        (asked.len(), connections)
    }

    /// Of what came after the first `before` requests, nothing came by a connection that had asked something before.
    fn nothing_more_by(&self, old: &[u32], before: usize) {
        let asked = self.server.asked().unwrap();
        let first_new = asked[..].iter().position(|asked| !old.contains(&asked.connection));
        let first_new = first_new.expect("the other host asked something").max(before);
        let late = asked[first_new..].iter().find(|asked| old.contains(&asked.connection));
        assert_eq!(late, None, "the source asked after the destination");
    }

    /// The guest moves away from `host`, which is where it is afterwards, and the coordinator is killed when the row is
    /// `at` this state. False: by then it was not any more.
    fn is_killed_at(&mut self, dir: &TestDir, at: &str, host: &mut usize) -> bool {
        let (before, old) = self.asked();
        let mut operator = self.migrate_in_the_background(dir, HOSTS[1 - *host]);
        self.wait_state(at);
        let killing = now_us();
        self.cluster.coordinator.kill().unwrap();
        let killed = now_us();
        self.cluster.restart_coordinator().unwrap();
        operator.wait_exit(2 * SOON).unwrap();
        let last = self.last();
        assert_eq!(last["over"], true, "{last:#}");
        // When it came to be in each state, as the journal has it.
        let reached = last["reached_unix_us"].as_object().unwrap();
        let times = || reached.iter().map(|(state, us)| (us.as_u64().unwrap(), &**state));
        let state = times().filter(|(us, _)| *us <= killed).max().unwrap().1;
        let hit = state == at && times().all(|(us, _)| us <= killing || us > killed);
        eprintln!("killed at {state}: the {} won", last["outcome"]);
        if hit && at == "ACTIVE" {
            assert_eq!(last["outcome"], "destination", "it was decided: {last:#}");
        }
        if last["outcome"] == "destination" {
            *host = 1 - *host;
            self.goes_on_at(*host);
            self.nothing_more_by(&old, before);
        } else {
            self.serves_at(*host);
        }
        assert_ne!(self.standing(1 - *host), "serving", "both serve");
        hit
    }
}

impl<Server> Running<Server> {
    fn start_on(dir: &TestDir, server: Server, volume: String) -> Self {
        let disks = [Disk { name: "disk0".to_owned(), volume }];
        let (driver, trust) = (Driver::Agent, Trust::Loopback);
        let cluster = Cluster::start_on(dir.path(), 0, &disks, driver, trust).unwrap();
        let (guest, mut probe) = cluster.hosts[0].boot().unwrap();
        probe.ask("load dev=vda threads=2 depth=4 flush-every=50").unwrap();
        probe.wait_progress(300, SOON).unwrap();
        Self { cluster, server, probe, _guest: guest }
    }

    /// The guest goes on at this host and finds everything as it left it.
    fn goes_on_at(&mut self, host: usize) {
        self.probe = self.cluster.hosts[host].probe().unwrap();
        self.probe.resynchronise().unwrap();
        self.serves_at(host);
    }

    fn serves_at(&mut self, host: usize) {
        self.probe.wait_progress(300, SOON).unwrap();
        let standing = self.standing(host);
        assert_eq!(standing, "serving", "{}", HOSTS[host]);
    }

    fn standing(&self, host: usize) -> String {
        let vm = self.cluster.hosts[host].vm().unwrap();
        vm["status"]["handoff"]["standing"].as_str().unwrap_or("none").to_owned()
    }

    fn migrate_in_the_background(&self, dir: &TestDir, to: &str) -> Daemon {
        let mut command = self.cluster.command(&["vm", "migrate", VM, "--to", to]).unwrap();
        command.stdin(std::process::Stdio::null());
        Daemon::start_command(dir.path(), "operator", command).unwrap()
    }

    fn last(&self) -> serde_json::Value {
        self.cluster.handoffs().unwrap().pop().unwrap_or_default()
    }

    fn wait_state(&self, state: &str) -> serde_json::Value {
        let under_way = || self.last()["over"] == false;
        wait_until("the handoff is known", SOON, under_way).unwrap();
        let id = self.last()["id"].as_str().unwrap().to_owned();
        let path =
            format!("{}/v1/vms/{VM}/handoffs/{id}?wait={state}&timeout=50s", self.cluster.url());
        call("GET", &path, None).unwrap()
    }
}

#[test]
fn a_guest_on_nbd_moves_there_and_back_by_proof() {
    if skipped("a_guest_on_nbd_moves_there_and_back_by_proof") {
        return;
    }
    let dir = TestDir::new("coop").unwrap();
    let mut running = Running::start(&dir);
    let drill = running.cluster.does(&["handoff", "drill", VM, "--to", "host-b"]).unwrap();
    assert!(drill.contains("could move from host-a to host-b"), "{drill}");
    running.probe.wait_progress(100, SOON).unwrap();

    for to in [1, 0, 1] {
        let (before, old) = running.asked();
        let said = running.cluster.does(&["vm", "migrate", VM, "--to", HOSTS[to]]).unwrap();
        eprintln!("{said}");
        running.goes_on_at(to);
        running.nothing_more_by(&old, before);
        assert_eq!(running.cluster.hosts[1 - to].run_state().unwrap(), "gone");
        let there = running.cluster.hosts[1 - to].vm().unwrap();
        assert_eq!(there["backend"]["run"], "stopped");
        let status = running.cluster.does(&["handoff", "status", VM]).unwrap();
        for part in ["SETTLED", "cooperative", "was seen (waitpid)"] {
            assert!(status.contains(part), "{part}: {status}");
        }
    }
    let why = running.cluster.does(&["handoff", "why", VM]).unwrap();
    assert!(why.starts_with("host-b/web owns"), "{why}");
    let fence = ["handoff", "fence", VM, "--dead-host", "host-b", "--reason", "test"];
    let (code, said) = running.cluster.operator(&fence).unwrap();
    assert!(code == 1 && said.contains("baton:no-fence"), "{code}: {said}");
    // What left a host is not claimed there by who does not know where it is.
    let refused = running.cluster.hosts[0].claim().unwrap_err().to_string();
    assert!(refused.contains("baton:given-away"), "{refused}");
    let totals = running.probe.stop_load().unwrap();
    assert!(totals.writes >= 300, "{totals}");
}

/// qemu-nbd has no log of requests: that nothing of the source's came after the destination's is what the guest finds,
/// which knows every block by a stamp. Its places are counted: a host that kept a connection would keep the other out.
#[test]
fn a_guest_on_qemu_nbd_moves_there_and_back() {
    let name = "a_guest_on_qemu_nbd_moves_there_and_back";
    if skip_without_qemu(name) || skip_without_program(name, "qemu-nbd") {
        return;
    }
    let dir = TestDir::new("coop-qemu").unwrap();
    let server = QemuNbd::start(dir.path(), "disk", DISK_BYTES, CLIENTS).unwrap();
    let uri = server.uri();
    let mut running = Running::start_on(&dir, server, uri);
    for to in [1, 0] {
        running.cluster.does(&["vm", "migrate", VM, "--to", HOSTS[to]]).unwrap();
        running.goes_on_at(to);
        assert_eq!(running.cluster.hosts[1 - to].run_state().unwrap(), "gone");
        let status = running.cluster.does(&["handoff", "status", VM]).unwrap();
        for part in ["SETTLED", "cooperative", "was seen (waitpid)"] {
            assert!(status.contains(part), "{part}: {status}");
        }
    }
    assert!(running.server.daemon.is_running().unwrap(), "{}", running.server.daemon.log());
    let totals = running.probe.stop_load().unwrap();
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0), "{totals}");
    assert!(totals.writes >= 300, "{totals}");
}

/// A source that does not answer has proven nothing; what it sends when it thaws, it sends before the destination is
/// permitted.
#[test]
fn a_frozen_source_is_not_proven_and_nothing_is_lost_when_it_thaws() {
    if skipped("a_frozen_source_is_not_proven_and_nothing_is_lost_when_it_thaws") {
        return;
    }
    let dir = TestDir::new("coop-frozen").unwrap();
    let mut running = Running::start(&dir);
    let (before, old) = running.asked();
    let backend = running.cluster.hosts[0].backend_pid().unwrap();
    let mut operator = running.migrate_in_the_background(&dir, "host-b");
    running.wait_state("READY");
    kill(backend, Signal::SIGSTOP).unwrap();
    // Nobody kills it for being silent.
    running.cluster.hosts[0].agent.signal(Signal::SIGSTOP).unwrap();

    // The destination gets nothing, and an operator who asks is told why and what to do.
    let (code, said) =
        running.cluster.operator(&["handoff", "finish", VM, "--timeout", "3s"]).unwrap();
    assert_eq!(code, 20, "{said}");
    for part in ["baton:not-proven", "host-a"] {
        assert!(said.contains(part), "{said}");
    }
    let (code, said) = running.cluster.operator(&["handoff", "finish", VM, "--force"]).unwrap();
    assert_eq!(code, 2, "no reason: {said}");
    assert!(["ready", "activating"].contains(&&*running.standing(1)), "{}", running.standing(1));
    assert_eq!(running.asked().1, old, "the destination has asked for something");

    kill(backend, Signal::SIGCONT).unwrap();
    running.cluster.hosts[0].agent.signal(Signal::SIGCONT).unwrap();
    let status = operator.wait_exit(2 * SOON).unwrap();
    let last = running.last();
    let host = usize::from(last["outcome"] == "destination");
    assert_eq!(status.code(), Some(1 - i32::try_from(host).unwrap()), "{last:#}{}", operator.log());
    if host == 1 {
        running.goes_on_at(1);
        running.nothing_more_by(&old, before);
    } else {
        running.serves_at(0);
    }
    eprintln!("{} won: {last:#}", HOSTS[host]);
    running.probe.stop_load().unwrap();
}

/// A backend that is killed has sealed nothing; its successor serves the machine, and can give it up.
#[test]
fn a_killed_source_backend_ends_the_move_or_not_but_never_splits_it() {
    if skipped("a_killed_source_backend_ends_the_move_or_not_but_never_splits_it") {
        return;
    }
    let dir = TestDir::new("coop-killed").unwrap();
    let mut running = Running::start(&dir);
    let mut operator = running.migrate_in_the_background(&dir, "host-b");
    running.wait_state("READY");
    let old = running.cluster.hosts[0].backend_pid().unwrap();
    kill(old, Signal::SIGKILL).unwrap();
    let status = operator.wait_exit(2 * SOON).unwrap();
    let last = running.last();
    let host = usize::from(last["outcome"] == "destination");
    assert_eq!(status.code(), Some(1 - i32::try_from(host).unwrap()), "{last:#}{}", operator.log());
    eprintln!("{} won", HOSTS[host]);
    if host == 1 {
        running.goes_on_at(1);
    } else {
        running.serves_at(0);
    }
    let other = running.standing(1 - host);
    assert_ne!(other, "serving", "both serve");
    // Nothing is left that would be in the way of the next one.
    running.cluster.does(&["vm", "migrate", VM, "--to", HOSTS[1 - host]]).unwrap();
    running.goes_on_at(1 - host);
    running.probe.stop_load().unwrap();
}

/// The decision is in the journal: whichever side of it the coordinator dies on, one host has the volumes.
#[test]
fn a_coordinator_killed_around_the_decision_ends_what_it_began() {
    if skipped("a_coordinator_killed_around_the_decision_ends_what_it_began") {
        return;
    }
    let dir = TestDir::new("coop-crash").unwrap();
    let mut running = Running::start(&dir);
    let mut host = 0;
    for at in ["SEALED", "ACTIVE"] {
        // The row may move on between the look at it and the kill; that kill has shown nothing.
        let hit = (0..5).any(|_| running.is_killed_at(&dir, at, &mut host));
        assert!(hit, "the coordinator was never killed at {at}");
    }
    running.probe.stop_load().unwrap();
}

/// A dead source's host proves nothing; a person may, says why, and that is kept.
#[test]
fn a_person_takes_the_place_of_a_proof_and_says_why() {
    if skipped("a_person_takes_the_place_of_a_proof_and_says_why") {
        return;
    }
    let dir = TestDir::new("coop-forced").unwrap();
    let mut running = Running::start(&dir);
    running.cluster.does(&["handoff", "prepare", VM, "--to", "host-b", "--wait"]).unwrap();
    running.cluster.hosts[0].die().unwrap();
    let (code, said) =
        running.cluster.operator(&["handoff", "finish", VM, "--timeout", "3s"]).unwrap();
    assert!(code == 20 && said.contains("baton:not-proven"), "{code}: {said}");
    let (before, old) = running.asked();
    assert_eq!(running.standing(1), "ready");
    let forced = ["handoff", "finish", VM, "--force", "--reason", "host-a is off, ticket 7"];
    let (code, said) = running.cluster.operator(&forced).unwrap();
    assert_eq!(code, 10, "{said}");
    assert!(said.contains("host-a is off, ticket 7"), "{said}");
    assert_eq!(running.last()["forced"], "host-a is off, ticket 7");
    assert_eq!(running.standing(1), "serving");
    let events = format!("{}/v1/events?since=0", running.cluster.url());
    let told = std::process::Command::new("curl")
        .args(["--silent", "--max-time", "2", &events])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("baton.handoff.forced") && told.contains("ticket 7"), "{told}");
    // Started from its disks there.
    let (_guest, mut probe) = running.cluster.hosts[1].boot().unwrap();
    probe.ask("load dev=vda threads=1 depth=2 flush-every=50").unwrap();
    probe.wait_progress(50, SOON).unwrap();
    running.nothing_more_by(&old, before);
    probe.stop_load().unwrap();
}
