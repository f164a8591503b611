//! `baton vm` and `baton handoff` against a real coordinator, on pretended agents and servers with real access
//! records.

// The coordinator's own tests have the same cluster.
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../../live-migrate/tests/coordinator/world/mod.rs"]
mod world;

use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use baton_live_migrate::coordinator::config::Config;
use baton_live_migrate::coordinator::server::{self, Coordinator};
use serde_json::{Value, json};
use tempfile::TempDir;

use world::{Agent, Storage};

struct Cluster {
    runtime: tokio::runtime::Runtime,
    a: Arc<Agent>,
    b: Arc<Agent>,
    storage: Arc<Storage>,
    dir: TempDir,
    coordinator: Option<Coordinator>,
}

impl Cluster {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let dir = tempfile::tempdir().expect("temp dir");
        let (a, b, storage, coordinator) = runtime.block_on(async {
            let storage = Storage::start(&[("root", Some("host-a/web"))]).await;
            let storages = [Arc::clone(&storage)];
            let (a, b) =
                (Agent::start("host-a", &storages).await, Agent::start("host-b", &storages).await);
            a.meet(&b);
            let address = storage.address;
            let disk = json!({"name": "root", "volume": format!("baton://{address}/root")});
            a.with("web", |machine| {
                machine.definition = json!({"name": "web", "vmm": "qemu", "disk": [disk]});
                (machine.backend, machine.run, machine.phase) = (Some("owner"), "running", "none");
            });
            let text = format!(
                "listen = \"unix:{0}/c.sock\"\njournal = \"{0}/c.redb\"\ncall_timeout_ms = 2000\nswitch_timeout_ms = 300\n\
                 [[host]]\nname = \"host-a\"\nagent = \"http://{1}\"\n\
                 [[host]]\nname = \"host-b\"\nagent = \"http://{2}\"\nmigration_uri = \"tcp:127.0.0.1:1\"\n\
                 [[storage]]\ndata = \"{address}\"\nadmin = \"http://{address}\"\n",
                dir.path().display(), a.address, b.address
            );
            let file = dir.path().join("c.toml");
            std::fs::write(&file, text).expect("written");
            let config = Config::load(&file).expect("a configuration");
            let coordinator = server::start(config).await.expect("it starts");
            (a, b, storage, coordinator)
        });
        Self { runtime, a, b, storage, dir, coordinator: Some(coordinator) }
    }

    fn baton(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_baton"))
            .args(args)
            .env("BATON_COORDINATOR", format!("unix:{}/c.sock", self.dir.path().display()))
            .stdin(Stdio::null())
            .output()
            .expect("the command runs")
    }

    /// What it printed, when it exits with `code`.
    fn prints(&self, code: i32, args: &[&str]) -> String {
        let output = self.baton(args);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{args:?}: {out}{err}");
        out + &err
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.take() {
            self.runtime.block_on(coordinator.stop());
        }
    }
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
}

#[test]
fn migrate_shows_how_far_it_is_and_writes_a_report() {
    let cluster = Cluster::start();
    contains(&cluster.prints(0, &["vm", "list"]), &["web", "host-a", "owner"]);
    let report = cluster.dir.path().join("report.html");
    let report = report.to_str().expect("text");
    let text = cluster.prints(0, &["vm", "migrate", "web", "--to", "host-b", "--report", report]);
    contains(
        &text,
        &[
            "web moved from host-a to host-b",
            "3 s of timing the guest's I/O",
            "precopy",
            "seal sent to all volumes sealed",
        ],
    );
    let page = std::fs::read_to_string(report).expect("a report");
    contains(&page, &["moved to host-b", "<svg"]);
    assert_eq!(cluster.storage.record("root").owner.expect("owned").name, "host-b/web");
    contains(
        &cluster.prints(0, &["handoff", "why", "web"]),
        &["host-b/web owns", "the destination won", "claim"],
    );
    // Too late for the source.
    contains(&cluster.prints(10, &["handoff", "cancel", "web"]), &["do not resume the source"]);
    let row = cluster.prints(10, &["handoff", "finish", "web", "--json"]);
    contains(&row, &["\"outcome\": \"destination\""]);
}

#[test]
fn a_migration_that_fails_is_status_1_and_says_why() {
    let cluster = Cluster::start();
    cluster.b.with("web", |machine| {
        machine.definition = cluster.a.machine("web").definition;
        (machine.run, machine.stuck) = ("gone", true);
    });
    let text = cluster.prints(1, &["vm", "migrate", "web", "--to", "host-b"]);
    contains(&text, &["did not move", "the source host-a owns", "did not run in time"]);
    assert_eq!(cluster.a.machine("web").run, "running");
    contains(
        &cluster.prints(1, &["vm", "migrate", "web", "--to", "host-x"]),
        &["no host `host-x`", "(baton:unknown-host)"],
    );
}

#[test]
fn a_drill_changes_nothing() {
    let cluster = Cluster::start();
    let text = cluster.prints(0, &["handoff", "drill", "web", "--to", "host-b"]);
    contains(&text, &["could move", "all 1 volumes armed", "the source host-a owns"]);
    let record = cluster.storage.record("root");
    assert_eq!((record.phase.name(), record.epoch.0, record.handoff), ("owned", 1, None));
    assert_eq!(cluster.b.machine("web").backend, None);
    // One that cannot be.
    cluster.b.with("web", |machine| machine.run = "running");
    contains(
        &cluster.prints(1, &["handoff", "drill", "web", "--to", "host-b"]),
        &["runs on host-b already"],
    );
}

#[test]
fn step_by_step() {
    let cluster = Cluster::start();
    contains(&cluster.prints(1, &["handoff", "status", "web"]), &["has no handoff"]);
    let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let prepare = ["handoff", "prepare", "web", "--to", "host-b", "--id", id, "--wait"];
    contains(&cluster.prints(0, &prepare), &[id, "READY", "anchor", "root"]);
    contains(&cluster.prints(0, &prepare), &["READY"]);
    let row: Value =
        serde_json::from_str(&cluster.prints(0, &["handoff", "status", "web", id, "--json"]))
            .expect("JSON");
    assert_eq!((&row["state"], &row["from"]), (&json!("READY"), &json!("host-a")));
    contains(
        &cluster.prints(0, &["handoff", "cancel", "web"]),
        &["SETTLED", "the source host-a owns"],
    );
    contains(&cluster.prints(0, &["handoff", "finish", "web"]), &["SETTLED"]);
    contains(&cluster.prints(2, &["handoff", "cancel", "web", "nonsense"]), &["not a handoff id"]);
}

#[test]
fn an_explicit_handoff_is_prepared_and_shows_its_mode() {
    let cluster = Cluster::start();
    let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let prepare = ["handoff", "prepare", "web", "--to", "host-b", "--id", id];
    let row = cluster.prints(0, &[&prepare[..], &["--explicit", "--wait", "--json"]].concat());
    let row: Value = serde_json::from_str(&row).expect("JSON");
    assert_eq!((&row["mode"], &row["state"]), (&json!("explicit"), &json!("READY")));
    // The same id as another kind of handoff is another request.
    contains(&cluster.prints(1, &prepare), &["(baton:id-in-use)", "host-a owns"]);
    contains(&cluster.prints(0, &["handoff", "cancel", "web"]), &["SETTLED"]);
}

#[test]
fn a_handoff_that_fails_to_get_ready_is_status_1() {
    let cluster = Cluster::start();
    cluster.b.full.store(true, Ordering::SeqCst);
    let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let prepare = ["handoff", "prepare", "web", "--to", "host-b", "--id", id, "--wait"];
    let full = "(baton:state-full)";
    contains(&cluster.prints(1, &prepare), &["because", full, "the source host-a owns"]);
    // It is waited for no longer than it takes to know; the rest is cleaned up behind it.
    contains(&cluster.prints(0, &["handoff", "cancel", "web"]), &["FAILED", full]);
    contains(&cluster.prints(1, &prepare), &["FAILED", full, "the source host-a owns"]);
    assert_eq!(cluster.storage.record("root").handoff, None, "nothing is left armed");
}

/// What both backends measured is shown when the source's is gone, whoever drove the machines.
#[test]
fn a_handoff_that_is_finished_shows_its_timings() {
    let cluster = Cluster::start();
    cluster.prints(0, &["handoff", "prepare", "web", "--to", "host-b", "--wait"]);
    let shown = cluster.prints(0, &["handoff", "status", "web"]);
    assert!(!shown.contains("timings"), "{shown}");
    let definition = cluster.a.machine("web").definition;
    cluster.a.seal(&definition);
    assert!(cluster.b.activate("web", &definition), "the machines switch");
    contains(&cluster.prints(10, &["handoff", "finish", "web"]), &["SETTLED"]);
    contains(
        &cluster.prints(0, &["handoff", "status", "web"]),
        &[
            "timings  drain 210 µs; seal 300 µs; activate 260 µs; rings stopped there to started here",
        ],
    );
    let row = cluster.prints(0, &["handoff", "status", "web", "--json"]);
    let row: Value = serde_json::from_str(&row).expect("JSON");
    assert_eq!(row["timings"]["vmm_gap_us"], 700);
}

/// The anchor cannot say who won, and a person fences: the migration has no winner.
#[test]
fn a_migration_whose_end_nobody_can_tell_is_status_20() {
    let cluster = Cluster::start();
    cluster.b.with("web", |machine| {
        machine.definition = cluster.a.machine("web").definition;
        (machine.run, machine.stuck) = ("gone", true);
    });
    // Rolled back only once its server does not know any more.
    cluster.storage.hang_on("reclaim");
    let migrate = ["vm", "migrate", "web", "--to", "host-b"];
    std::thread::scope(|scope| {
        let migration = scope.spawn(|| cluster.prints(20, &migrate));
        while cluster.storage.record("root").phase.name() != "sealed" && !migration.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        cluster.storage.restart();
        cluster.storage.thaw();
        let fence = ["handoff", "fence", "web", "--dead-host", "host-a", "--reason", "a test"];
        let fence = [&fence[..], &["--force", "--nominee", "host-b"]].concat();
        contains(&cluster.prints(0, &fence), &["nothing on host-a can reach"]);
        let text = migration.join().expect("status 20");
        contains(&text, &["did not move", "were fenced", "start it nowhere else"]);
    });
}

/// The one bit: nobody can say is neither yes nor no.
#[test]
fn an_owner_that_nobody_can_name_is_status_20() {
    let cluster = Cluster::start();
    cluster.prints(0, &["handoff", "prepare", "web", "--to", "host-b", "--wait"]);
    cluster.a.seal(&cluster.a.machine("web").definition);
    cluster.storage.restart();
    let path = ["handoff", "cancel", "web"];
    // The server's answer is waited for no longer than the coordinator does.
    let text = cluster.prints(20, &[&path[..], &["--timeout", "300ms"]].concat());
    contains(&text, &["resume neither side"]);
    contains(&cluster.prints(0, &["handoff", "why", "web"]), &["frozen", "nobody writes"]);
    // A person decides.
    let fence = ["handoff", "fence", "web", "--dead-host", "host-a", "--reason", "a test"];
    contains(&cluster.prints(1, &fence), &["agent of host-a answers", "force"]);
    let fence = [&fence[..], &["--force", "--nominee", "host-b"]].concat();
    contains(&cluster.prints(0, &fence), &["nothing on host-a can reach", "root"]);
    assert_eq!(cluster.storage.record("root").barred.as_deref(), Some("host-a/web"));
}

/// At 0 the VM may be started elsewhere: not when it is another host's.
#[test]
fn a_fence_of_a_host_that_owns_nothing_is_status_1_and_says_whose_it_is() {
    let cluster = Cluster::start();
    let fence = ["handoff", "fence", "web", "--dead-host", "host-b", "--reason", "a test"];
    let text = cluster.prints(1, &fence);
    contains(&text, &["it belongs to host-a/web and may run nowhere else"]);
    assert!(!text.contains("started elsewhere"), "{text}");
    assert_eq!(cluster.storage.record("root").epoch.0, 1);
}

#[test]
fn a_coordinator_that_is_not_there_is_status_3_and_mistakes_are_status_2() {
    let cluster = Cluster::start();
    for (args, code, part) in [
        (vec!["vm", "list", "--coordinator", "unix:/nowhere/c.sock"], 3, "cannot reach"),
        (
            vec!["vm", "list", "--coordinator", "http://192.0.2.1:1"],
            2,
            "plaintext leaves this host",
        ),
        (vec!["vm", "list", "--coordinator", "https://h:1"], 2, "BATON_TLS_CERT"),
        // Refused before the VM is moved.
        (
            vec!["vm", "migrate", "web", "--to", "host-b", "--report", "/nowhere/x.html"],
            2,
            "nothing was asked for",
        ),
        (vec!["vm", "migrate", "a/b", "--to", "c"], 2, "a name has"),
        (vec!["handoff", "fence", "web", "--dead-host", "host-a", "--reason", " "], 2, "say why"),
        (vec!["handoff", "prepare", "web", "--to", "b", "--timeout", "soon"], 2, "30s"),
    ] {
        contains(&cluster.prints(code, &args), &[part]);
    }
    assert_eq!(cluster.storage.record("root").epoch.0, 1);
    cluster.storage.silent.store(true, Ordering::SeqCst);
    contains(
        &cluster.prints(4, &["handoff", "drill", "web", "--to", "host-b"]),
        &["storage server"],
    );
}
