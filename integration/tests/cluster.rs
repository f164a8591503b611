//! A real guest under load is moved by `baton vm migrate`, with all of Baton running: nothing it wrote is lost, stale or
//! corrupt, and what goes wrong on the way is said in one sentence and leaves the guest where it was.

use baton_integration::baton::wait_until;
use baton_integration::cluster::{Cluster, Disk, Driver, HOSTS, Trust, VM, call};
use baton_integration::daemon::{Daemon, freeze};
use baton_integration::guest::{skip_without_program, skip_without_qemu};
use baton_integration::nbdkit::Nbdkit;
use baton_integration::probe::Probe;
use baton_integration::workspace::TestDir;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
/// QEMU's name for the thread that sends, and stops the guest.
const MIGRATION_THREAD: &str = "mig/src/main";

/// A cluster whose guest runs on the first host, under load.
struct Running {
    cluster: Cluster,
    probe: Probe,
    // Killed when dropped.
    _guest: Daemon,
}

fn start(dir: &TestDir, volumes: usize) -> Running {
    let cluster = Cluster::start(dir.path(), volumes, Driver::Agent).unwrap();
    let (guest, mut probe) = cluster.hosts[0].boot().unwrap();
    let devices = ["vda", "vdb"][..volumes].join(",");
    probe.ask(&format!("load dev={devices} threads=2 depth=4 flush-every=50")).unwrap();
    probe.wait_progress(300, SOON).unwrap();
    Running { cluster, probe, _guest: guest }
}

/// The guest goes on at this host and finds everything as it left it.
fn goes_on_at(cluster: &Cluster, host: usize) -> Probe {
    let mut probe = cluster.hosts[host].probe().unwrap();
    probe.resynchronise().unwrap();
    probe.wait_progress(300, SOON).unwrap();
    cluster.wait_owner(HOSTS[host]).unwrap();
    assert_eq!(cluster.access().unwrap()["owner_host"], HOSTS[host]);
    probe
}

#[test]
fn the_operator_moves_a_guest_there_and_back() {
    if skip_without_qemu("the_operator_moves_a_guest_there_and_back") {
        return;
    }
    let dir = TestDir::new("cluster").unwrap();
    let Running { cluster, mut probe, _guest } = start(&dir, 2);
    assert!(cluster.does(&["handoff", "why", VM]).unwrap().starts_with("host-a/web owns"));

    let drill = cluster.does(&["handoff", "drill", VM, "--to", "host-b"]).unwrap();
    assert!(drill.contains("could move from host-a to host-b: all 2 volumes"), "{drill}");
    probe.wait_progress(100, SOON).unwrap();

    for (to, from) in [(1, 0), (0, 1)] {
        let page = dir.join(&format!("to-{}.html", HOSTS[to]));
        let report = page.display().to_string();
        let args = ["vm", "migrate", VM, "--to", HOSTS[to], "--report", &report];
        let said = cluster.does(&args).unwrap();
        eprintln!("{said}");
        probe = goes_on_at(&cluster, to);
        assert_eq!(cluster.hosts[from].run_state().unwrap(), "gone");
        let why = cluster.does(&["handoff", "why", VM]).unwrap();
        assert!(why.starts_with(&format!("{}/web owns", HOSTS[to])), "{why}");
        assert!(why.contains("the destination won"), "{why}");
        let status = cluster.does(&["handoff", "status", VM]).unwrap();
        assert!(status.contains("SETTLED") && status.contains(HOSTS[to]), "{status}");
        assert!(std::fs::read_to_string(&page).unwrap().contains("<html"), "a page");
    }
    let totals = probe.stop_load().unwrap();
    assert!(totals.writes >= 300, "{totals}");
}

/// With certificates of the development authority everywhere, and who has none is not let in. The storage server's admin
/// API is behind stunnel by the example in `configs/`, which lets nobody in but the coordinator.
#[test]
fn a_guest_moves_in_a_cluster_with_mutual_tls() {
    const NAME: &str = "a_guest_moves_in_a_cluster_with_mutual_tls";
    if skip_without_qemu(NAME) || skip_without_program(NAME, "stunnel4") {
        return;
    }
    let dir = TestDir::new("mtls").unwrap();
    let trust = Trust::certificates(dir.path()).unwrap();
    let cluster = Cluster::start_with(dir.path(), 1, Driver::Agent, trust.clone()).unwrap();
    let (_guest, mut probe) = cluster.hosts[0].boot().unwrap();
    probe.ask("load dev=vda threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(300, SOON).unwrap();
    for url in [cluster.url(), &cluster.hosts[0].url, &cluster.hosts[1].url] {
        assert!(url.starts_with("https://"), "{url}");
        let mut curl = std::process::Command::new("curl");
        let nobody =
            curl.args(["--insecure", "--silent", &format!("{url}/healthz")]).output().unwrap();
        assert!(!nobody.status.success(), "{url} let a stranger in");
    }
    let admin = format!("https://{}/healthz", cluster.terminator.as_ref().unwrap().address);
    for (who, is_let_in) in
        [("coordinator-coordinator", true), ("host-host-a", false), ("operator-me", false)]
    {
        let [_, cert, key] = trust.files(who).unwrap();
        let mut curl = std::process::Command::new("curl");
        curl.args(["--insecure", "--silent", "--fail", &admin]);
        let asked = curl.arg("--cert").arg(cert).arg("--key").arg(key).output().unwrap();
        assert_eq!(asked.status.success(), is_let_in, "{who}: {asked:?}");
    }
    cluster.does(&["vm", "migrate", VM, "--to", "host-b"]).unwrap();
    probe = goes_on_at(&cluster, 1);
    assert_eq!(cluster.hosts[0].run_state().unwrap(), "gone");
    probe.stop_load().unwrap();
}

#[test]
fn what_cannot_be_done_is_refused_and_changes_nothing() {
    if skip_without_qemu("what_cannot_be_done_is_refused_and_changes_nothing") {
        return;
    }
    let dir = TestDir::new("refused").unwrap();
    let Running { mut cluster, mut probe, _guest } = start(&dir, 1);
    let refused = |cluster: &Cluster, args: &[&str], status: i32, why: &str| {
        let (code, text) = cluster.operator(args).unwrap();
        assert!(code == status && text.contains(why), "{args:?} ended with {code}: {text}");
    };
    let migrate = |vm, to| ["vm", "migrate", vm, "--to", to];
    refused(&cluster, &migrate("other", "host-b"), 1, "no agent knows");
    refused(&cluster, &migrate(VM, "host-c"), 1, "host-c");
    refused(&cluster, &migrate(VM, "host-a"), 1, "owns the volumes");

    cluster.hosts[1].agent.kill().unwrap();
    refused(&cluster, &migrate(VM, "host-b"), 4, "the source host-a owns the volumes");
    // Whoever was armed is disarmed, and the guest has noticed nothing.
    cluster.wait_owner("host-a").unwrap();
    let why = cluster.does(&["handoff", "why", VM]).unwrap();
    assert!(why.starts_with("host-a/web owns"), "{why}");
    probe.wait_progress(100, SOON).unwrap();

    // The agent comes back, and the same move works.
    cluster.hosts[1].restart().unwrap();
    cluster.does(&migrate(VM, "host-b")).unwrap();
    probe = goes_on_at(&cluster, 1);
    probe.stop_load().unwrap();
}

/// One decision at an access record covers no export of an NBD server: refused before anything is armed.
#[test]
fn a_vm_that_mixes_fences_is_refused_and_goes_on() {
    const NAME: &str = "a_vm_that_mixes_fences_is_refused_and_goes_on";
    if skip_without_qemu(NAME) || skip_without_program(NAME, "nbdkit") {
        return;
    }
    let dir = TestDir::new("mixed").unwrap();
    let nbd = Nbdkit::start(dir.path(), "elsewhere", 64 << 20).unwrap();
    let elsewhere = [Disk { name: "elsewhere".to_owned(), volume: nbd.uri() }];
    let (driver, trust) = (Driver::Agent, Trust::Loopback);
    let cluster = Cluster::start_on(dir.path(), 1, &elsewhere, driver, trust).unwrap();
    let (_guest, mut probe) = cluster.hosts[0].boot().unwrap();
    probe.ask("load dev=vda,vdb threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(300, SOON).unwrap();

    let access = || cluster.storage.show("disk0").unwrap()["access"].clone();
    let before = access();
    assert_eq!((&before["phase"], &before["owner"]), (&"owned".into(), &"host-a/web".into()));
    for args in [
        &["vm", "migrate", VM, "--to", "host-b"][..],
        &["handoff", "prepare", VM, "--to", "host-b", "--wait"],
        &["handoff", "prepare", VM, "--to", "host-b", "--explicit", "--wait"],
        &["handoff", "drill", VM, "--to", "host-b"],
    ] {
        let (code, said) = cluster.operator(args).unwrap();
        assert_eq!(code, 1, "{args:?}: {said}");
        for part in [
            "(baton:mixed-fences)",
            "`disk0`",
            "`elsewhere`",
            "host-a says that it owns the volumes of `web`",
            "nothing was armed",
        ] {
            assert!(said.contains(part), "{args:?}: {said}");
        }
    }
    // Not even for a moment: each change of a record counts.
    assert_eq!(access(), before);
    assert!(cluster.handoffs().unwrap().is_empty());
    assert_eq!(cluster.hosts[1].vm().unwrap()["backend"]["run"], "stopped");
    probe.wait_progress(300, SOON).unwrap();
    let totals = probe.stop_load().unwrap();
    assert!(totals.writes >= 100, "{totals}");
}

/// Row 36 of the failure table: the host of a VM is dead, and an operator says so.
#[test]
fn row_36_the_operator_fences_a_dead_host_through_the_coordinator() {
    let dir = TestDir::new("fence").unwrap();
    let mut cluster = Cluster::start(dir.path(), 2, Driver::Other).unwrap();
    // Heard of while its host lived.
    cluster.does(&["vm", "list"]).unwrap();
    cluster.hosts[0].agent.kill().unwrap();
    let fence = ["handoff", "fence", VM, "--dead-host", "host-a", "--nominee", "host-b"];
    let fence = [&fence[..], &["--reason", "lost power, ticket 123"]].concat();
    let said = cluster.does(&fence).unwrap();
    eprintln!("{said}");
    cluster.wait_owner("host-b").unwrap();
    // Its backend lives, and reaches nothing; the next owner claims and serves.
    cluster.hosts[1].claim().unwrap();
    let there = cluster.hosts[1].vm().unwrap();
    assert_eq!(there["status"]["handoff"]["standing"], "serving", "{there:#}");
    cluster.hosts[0].restart().unwrap();
    let parked = || {
        let here = cluster.hosts[0].vm().unwrap();
        here["status"]["handoff"]["standing"] == "parked"
    };
    wait_until("the old owner is parked", SOON, parked).unwrap();
    // Said again it takes nothing from the new owner.
    cluster.does(&fence).unwrap();
    cluster.wait_owner("host-b").unwrap();
    // The agent that is back says of its machine what it can.
    let events = cluster.hosts[0].events().unwrap();
    assert_eq!(events["events"][0]["kind"], "baton.vm.not-stopped", "{events:#}");
}

/// Row 36 of the failure table, at a coordinator that has lost its journal with the handoff in it.
#[test]
fn row_36_a_lost_journal_does_not_leave_the_volumes_armed_for_a_dead_host() {
    let name = "row_36_a_lost_journal_does_not_leave_the_volumes_armed_for_a_dead_host";
    if skip_without_qemu(name) {
        return;
    }
    let dir = TestDir::new("lost").unwrap();
    let mut cluster = Cluster::start(dir.path(), 2, Driver::Other).unwrap();
    let (_guest, mut probe) = cluster.hosts[0].boot().unwrap();
    probe.ask("load dev=vda,vdb threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(300, SOON).unwrap();
    cluster.does(&["handoff", "prepare", VM, "--to", "host-b", "--wait"]).unwrap();

    cluster.coordinator.kill().unwrap();
    std::fs::remove_file(dir.join("journal.redb")).unwrap();
    cluster.hosts[1].die().unwrap();
    cluster.restart_coordinator().unwrap();
    assert!(cluster.handoffs().unwrap().is_empty());
    let armed = cluster.access().unwrap();
    assert_eq!((&armed["phase"], &armed["owner_host"]), (&"armed".into(), &"host-a".into()));

    let fence = ["handoff", "fence", VM, "--dead-host", "host-b", "--reason", "journal lost"];
    eprintln!("{:?}", cluster.operator(&fence).unwrap());
    cluster.wait_owner("host-a").unwrap();
    let access = cluster.access().unwrap();
    assert!(access["handoff"].is_null(), "{access:#}");
    probe.wait_progress(300, SOON).unwrap();

    // Nothing is in the way of the next one.
    cluster.hosts[1].restart().unwrap();
    cluster.does(&["handoff", "drill", VM, "--to", "host-b"]).unwrap();
    probe.stop_load().unwrap();
}

/// Row 36 of the failure table: a volume is armed for a handoff to a dead host that its anchor has forgotten. Its fence
/// ends it under a guest that runs on, and the guest moves afterwards. Servers and processes are killed in between.
#[test]
fn row_36_a_fence_of_a_dead_destination_disarms_what_the_anchor_has_forgotten() {
    let name = "row_36_a_fence_of_a_dead_destination_disarms_what_the_anchor_has_forgotten";
    if skip_without_qemu(name) {
        return;
    }
    let dir = TestDir::new("forgotten").unwrap();
    let Running { mut cluster, mut probe, _guest } = start(&dir, 2);
    cluster.does(&["handoff", "prepare", VM, "--to", "host-b", "--wait"]).unwrap();
    let id = cluster.handoffs().unwrap()[0]["id"].as_str().unwrap().to_owned();
    cluster.coordinator.kill().unwrap();
    std::fs::remove_file(dir.join("journal.redb")).unwrap();
    cluster.hosts[1].die().unwrap();
    settle_at_the_anchor_alone(&cluster, &id);
    cluster.restart_coordinator().unwrap();

    // A server that restarts cannot know how it stood; the source says so, and goes on.
    cluster.storage.kill_and_restart().unwrap();
    probe.wait_progress(300, SOON).unwrap();
    let phase = |cluster: &Cluster| cluster.storage.show("disk1").unwrap()["access"].clone();
    let before = phase(&cluster);
    assert_eq!(before["phase"], "armed", "{before:#}");
    let why = cluster.does(&["handoff", "why", VM]).unwrap();
    let said = format!("Volume disk1 is still armed for handoff {id}");
    assert!(why.contains(&said) && why.contains("host-a/web goes on"), "{why}");

    let fence = ["handoff", "fence", VM, "--dead-host", "host-b", "--reason", "lost power"];
    let (_, text) = cluster.operator(&fence).unwrap();
    assert!(text.contains(&id) && text.contains("is ended here"), "{text}");
    cluster.wait_owner("host-a").unwrap();
    let why = cluster.does(&["handoff", "why", VM]).unwrap();
    assert!(why.contains("disarm") && !why.contains("is still armed"), "{why}");
    probe.wait_progress(300, SOON).unwrap();
    // On disk before it was told, and under the same session all the time.
    cluster.storage.kill_and_restart().unwrap();
    let after = phase(&cluster);
    assert_eq!(after["phase"], "owned", "{after:#}");
    assert_eq!((&after["owner"], &after["epoch"]), (&before["owner"], &before["epoch"]));
    probe.wait_progress(300, SOON).unwrap();

    cluster.hosts[1].restart().unwrap();
    cluster.does(&["vm", "migrate", VM, "--to", "host-b"]).unwrap();
    probe = goes_on_at(&cluster, 1);
    probe.stop_load().unwrap();
}

/// What a coordinator without the journal did that knew no better: the handoff is taken back and settled at the anchor
/// alone, and the anchor armed for another one, which is taken back, too.
fn settle_at_the_anchor_alone(cluster: &Cluster, id: &str) {
    let anchor = format!("http://{}/v1/volumes/disk0", cluster.storage.admin_address());
    let record = call("GET", &format!("{anchor}/access"), None).unwrap()["record"].clone();
    let (term, other) = (&record["coordinator_term"], "01JZZZZZZZZZZZZZZZZZZZZZZZ");
    let plan = json!({"id": other, "attempt": 1, "vm": VM, "from": "host-a/web", "to": "host-b/web",
        "anchor": record["volume"], "members": {"count": 1, "hash": "0000000000000001"}, "mode": "fast", "key": "07".repeat(32)});
    let arm = json!({"term": term, "next_epoch": record["next_epoch"], "plan": plan});
    let which = |id: &str| json!({"term": term, "id": id, "attempt": 1});
    for (what, body) in [
        ("reclaim", which(id)),
        ("settle", which(id)),
        ("arm", arm),
        ("reclaim", which(other)),
        ("settle", which(other)),
    ] {
        call("POST", &format!("{anchor}/{what}"), Some(&body)).unwrap();
    }
}

/// Row 11 of the failure table: the source's backend hangs when QEMU stops the guest's disk, until its agent kills it.
/// A QEMU before 10.1 takes the disk for stopped then; nothing is sealed, and the guest stands still until it is let go.
#[test]
fn row_11_a_guest_whose_backend_hangs_in_the_switch_goes_on_at_the_source() {
    if skip_without_qemu("row_11_a_guest_whose_backend_hangs_in_the_switch_goes_on_at_the_source") {
        return;
    }
    let dir = TestDir::new("hung").unwrap();
    let Running { mut cluster, mut probe, _guest: qemu } = start(&dir, 1);
    // QEMU has to come to the stop before the backend is killed; the copy takes some seconds on a busy machine.
    cluster.hosts[0].agent.kill().unwrap();
    insert(&dir.join("host-a/agent.toml"), "hang_ms = 15000", "manager");
    cluster.hosts[0].restart().unwrap();

    let backend = cluster.hosts[0].backend_pid().unwrap();
    let migrate = cluster.command(&["vm", "migrate", VM, "--to", "host-b"]).unwrap();
    let mut operator = Daemon::start_command(dir.path(), "operator", migrate).unwrap();
    wait_until("memory is copied", SOON, || {
        cluster.hosts[0].migration().is_ok_and(|phase| phase == "active")
    })
    .unwrap();
    freeze(backend).unwrap();
    wait_until("QEMU waits for its backend", SOON, || {
        // Only a vhost-user answer makes this thread receive anything.
        qemu.thread_is_in(MIGRATION_THREAD, libc::SYS_recvmsg).unwrap_or(false)
    })
    .unwrap();
    let status = operator.wait_exit(2 * SOON).unwrap();
    let said = operator.log();
    assert_eq!(status.code(), Some(1), "the source owns the volumes: {said}");
    // Not after the minute that a seal may take.
    assert!(said.contains("the next one has nothing to seal"), "{said}");

    cluster.wait_owner("host-a").unwrap();
    let here = cluster.hosts[0].vm().unwrap();
    assert_eq!((&here["vmm"]["run"], &here["backend"]["hung"]), (&"running".into(), &1.into()));
    assert_ne!(cluster.hosts[0].backend_pid().unwrap(), backend);
    probe.wait_progress(300, SOON).unwrap();
    wait_until("the destination's machine is gone", SOON, || {
        cluster.hosts[1].run_state().is_ok_and(|state| state == "gone")
    })
    .unwrap();
    assert_eq!(cluster.hosts[1].vm().unwrap()["backend"]["run"], "stopped");
    probe.stop_load().unwrap();
}

/// Adds a setting to a configuration, in front of another.
fn insert(config: &Path, setting: &str, before: &str) {
    let text = std::fs::read_to_string(config).unwrap();
    let new = text.replacen(before, &format!("{setting}\n{before}"), 1);
    assert_ne!(new, text);
    std::fs::write(config, new).unwrap();
}

/// Rows 3 and 4 of the failure table.
#[test]
fn row_03_a_coordinator_killed_while_the_volumes_are_sealed_goes_on_or_rolls_back() {
    a_migration_ends_although_its_coordinator_was_killed("SEALED");
}

#[test]
fn row_04_a_coordinator_killed_when_the_destination_has_activated_cleans_up() {
    a_migration_ends_although_its_coordinator_was_killed("ACTIVE");
}

#[test]
fn row_02_a_coordinator_killed_in_the_copy_of_memory_goes_on_or_rolls_back() {
    a_migration_ends_although_its_coordinator_was_killed("READY");
}

fn a_migration_ends_although_its_coordinator_was_killed(at: &str) {
    if skip_without_qemu("a_migration_ends_although_its_coordinator_was_killed") {
        return;
    }
    let dir = TestDir::new("crash").unwrap();
    let Running { mut cluster, probe, _guest } = start(&dir, 1);
    let migrate = ["vm", "migrate", VM, "--to", "host-b"];
    let mut command = cluster.command(&migrate).unwrap();
    let mut operator = Daemon::start_command(dir.path(), "operator", {
        command.stdin(std::process::Stdio::null());
        command
    })
    .unwrap();
    wait_until("the handoff is known", SOON, || {
        cluster.handoffs().is_ok_and(|all| !all.is_empty())
    })
    .unwrap();
    let id = cluster.handoffs().unwrap()[0]["id"].as_str().unwrap().to_owned();
    let path = format!("{}/v1/vms/{VM}/handoffs/{id}?wait={at}&timeout=50s", cluster.url());
    let row = call("GET", &path, None).unwrap();
    eprintln!("killed at {}", row["state"]);
    cluster.coordinator.kill().unwrap();
    cluster.restart_coordinator().unwrap();
    // Whether it was rolled back or went through, the command says which, and one host runs the guest.
    let status = operator.wait_exit(2 * SOON).unwrap();
    let last = cluster.handoffs().unwrap().pop().unwrap();
    let owner = cluster.access().unwrap()["owner_host"].as_str().unwrap().to_owned();
    let (code, host) = if owner == "host-b" { (0, 1) } else { (1, 0) };
    assert_eq!(status.code(), Some(code), "{last:#} {}", operator.log());
    let mut probe = match host {
        1 => goes_on_at(&cluster, 1),
        _ => probe,
    };
    probe.wait_progress(300, SOON).unwrap();
    cluster.wait_owner(HOSTS[host]).unwrap();
    eprintln!("{} won:\n{}", HOSTS[host], operator.log());

    // Nothing is left that would be in the way of the next one.
    cluster.does(&["vm", "migrate", VM, "--to", HOSTS[1 - host]]).unwrap();
    probe = goes_on_at(&cluster, 1 - host);
    probe.stop_load().unwrap();
}
