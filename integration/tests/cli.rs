//! The operator manages volumes with `baton`, and is told in one sentence what is wrong.

use baton_integration::baton::{Backend, Storage, wait_until};
use baton_integration::guest::skip_without_qemu;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::{TestDir, program};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;

struct Operator {
    server: String,
}

impl Operator {
    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(program("baton").unwrap())
            .args(args)
            .env("BATON_SERVER", &self.server)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn does(&self, args: &[&str]) -> String {
        let (status, out, err) = self.run(args);
        assert_eq!((status, err.as_str()), (0, ""), "{args:?}");
        out
    }

    fn is_refused(&self, args: &[&str], why: &str) {
        let (status, out, err) = self.run(args);
        assert_eq!((status, out.as_str()), (1, ""), "{args:?}: {err}");
        assert!(err.starts_with("baton: ") && err.contains(why), "{args:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.does(args)).unwrap()
    }
}

fn start(dir: &TestDir) -> (Storage, Operator) {
    let storage = Storage::start(dir.path(), &[]).unwrap();
    let server = storage.admin_address().to_string();
    (storage, Operator { server })
}

#[test]
fn a_volume_is_created_listed_shown_grown_and_deleted() {
    let dir = TestDir::new("cli").unwrap();
    let (_storage, op) = start(&dir);
    assert_eq!(op.does(&["volume", "list"]), "NAME  SIZE  ALLOCATED  EPOCH  PHASE  OWNER\n");
    assert_eq!(op.does(&["volume", "create", "a", "--size", "10G"]), "created a, 10G\n");
    op.does(&["volume", "create", "b", "--size", "512"]);
    let list = op.does(&["volume", "list"]);
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(
        lines[1..],
        ["a      10G          0      0  free   -", "b      512          0      0  free   -"]
    );

    assert_eq!(op.does(&["volume", "resize", "a", "--size", "20G"]), "resized a to 20G\n");
    let shown = op.json(&["volume", "show", "a", "--json"]);
    assert_eq!(shown["size_bytes"], 20_u64 << 30);
    assert_eq!(shown["access"]["phase"], "free");
    let text = op.does(&["volume", "show", "a"]);
    assert!(text.contains("size       20G (21474836480 bytes)\n"), "{text}");
    assert!(text.ends_with("nobody is connected\n"), "{text}");

    assert_eq!(op.does(&["volume", "delete", "a", "--yes"]), "deleted a\n");
    let deleted = op.json(&["volume", "delete", "b", "--yes", "--json"]);
    assert_eq!(deleted["deleted"], true);
    assert_eq!(op.json(&["volume", "list", "--json"])["volumes"], Value::Array(vec![]));
}

#[test]
fn each_refusal_is_one_sentence() {
    let dir = TestDir::new("cli").unwrap();
    let (_storage, op) = start(&dir);
    op.does(&["volume", "create", "a", "--size", "1G"]);
    op.is_refused(&["volume", "create", "a", "--size", "1G"], "already exists");
    op.is_refused(&["volume", "create", "odd", "--size", "1000"], "512");
    op.is_refused(&["volume", "resize", "a", "--size", "1M"], "shrink");
    for args in [
        &["volume", "show", "none"][..],
        &["volume", "resize", "none", "--size", "1G"],
        &["volume", "delete", "none", "--yes"],
        &["volume", "fence", "none", "--reason", "test"],
    ] {
        op.is_refused(args, "none");
    }
    // Without a terminal there is nobody to ask, and the volume stays.
    let (status, _, err) = op.run(&["volume", "delete", "a"]);
    assert_eq!(status, 2, "{err}");
    op.does(&["volume", "show", "a"]);
}

#[test]
fn a_fence_names_who_may_come_next() {
    let dir = TestDir::new("cli").unwrap();
    let (storage, op) = start(&dir);
    op.does(&["volume", "create", "a", "--size", "1G"]);
    let fence = ["volume", "fence", "a", "--reason", "drill"];
    assert_eq!(op.does(&fence), "fenced a at epoch 1; anybody may claim it\n");
    let nominee = [&fence[..], &["--nominee", "host-b:vm"]].concat();
    assert_eq!(op.does(&nominee), "fenced a at epoch 2; only host-b:vm may claim it\n");
    assert_eq!(op.does(&fence), "fenced a at epoch 3; anybody but host-b:vm may claim it\n");
    assert!(op.does(&["volume", "show", "a"]).contains("barred     host-b:vm (fenced"), "shown");
    assert!(storage.daemon.log().contains("drill"), "the reason is in the server's log");
}

#[test]
fn a_data_port_and_a_dead_server_are_told_apart() {
    let dir = TestDir::new("cli").unwrap();
    let (mut storage, op) = start(&dir);
    let data = storage.data_address().to_string();
    let (status, _, err) = op.run(&["volume", "list", "--server", &data]);
    assert_eq!(status, 4, "{err}");
    assert!(err.contains("data port"), "{err}");
    storage.daemon.kill().unwrap();
    let (status, _, err) = op.run(&["volume", "list"]);
    assert_eq!(status, 3, "{err}");
    assert!(err.contains("cannot reach the storage server"), "{err}");
}

/// docs/operations.md, "Fencing by hand": the guest of a fenced backend waits without an error, and goes on when the
/// fence is undone.
#[test]
fn a_fence_by_mistake_is_undone_under_a_running_guest() {
    if skip_without_qemu("a_fence_by_mistake_is_undone_under_a_running_guest") {
        return;
    }
    const SOON: Duration = Duration::from_secs(60);
    let dir = TestDir::new("cli").unwrap();
    let (storage, op) = start(&dir);
    op.does(&["volume", "create", "a", "--size", "64M"]);
    let owner = ["--owner", "host-a:vm"];
    let mut backend =
        Backend::start(dir.path(), "backend", &storage.uri("a", None), &owner).unwrap();
    let mut guest = Guest::boot(dir.path(), &GuestConfig::new(&backend.socket)).unwrap();
    assert!(op.does(&["volume", "list"]).contains("host-a:vm"), "the owner is listed");
    op.is_refused(&["volume", "delete", "a", "--yes"], "host-a:vm");

    guest.ask("load threads=2 depth=2").unwrap();
    guest.wait_progress(200, SOON).unwrap();
    assert_eq!(
        op.does(&["volume", "fence", "a", "--reason", "by mistake"]),
        "fenced a at epoch 2; anybody but host-a:vm may claim it\n"
    );
    let fenced = || backend.daemon.log().contains("fenced: the volume was given to another owner");
    wait_until("the backend says that it was fenced", SOON, fenced).unwrap();
    assert!(guest.wait_progress(1, Duration::from_secs(1)).is_err(), "nothing completes any more");
    // What a supervisor would do at once is refused.
    let error = format!("{:#}", backend.kill_and_restart().unwrap_err());
    assert!(error.contains("was fenced"), "{error}");

    op.does(&["volume", "fence", "a", "--reason", "undo", "--nominee", "host-a:vm"]);
    backend.restart().unwrap();
    guest.wait_progress(200, SOON).unwrap();
    guest.stop_load().unwrap();
    guest.power_off().unwrap();
    assert!(backend.daemon.terminate(SOON).unwrap().success());
    op.does(&["volume", "delete", "a", "--yes"]);
}

/// Nothing in the backend's code names its allocator, so nothing else would notice that it is not there any more.
#[test]
fn the_backends_malloc_is_its_own() {
    let output = Command::new(program("baton-backend").unwrap())
        .arg("--version")
        .env("MIMALLOC_VERBOSE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("mimalloc: v2."), "{said}");
}
