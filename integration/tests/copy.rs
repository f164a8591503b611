//! The operator copies disks into Baton and out of it; a volume that is copied to is the copy's, and nobody else's, until
//! it is whole.

use baton_integration::baton::{Backend, Storage, wait_until};
use baton_integration::nbdkit::Nbdkit;
use baton_integration::workspace::{TestDir, program};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const MIB: usize = 1 << 20;

fn copy(from: &str, to: &str, state: &Path) -> Command {
    let mut command = Command::new(program("baton").unwrap());
    command.args(["volume", "import", from, to, "--json", "--state"]).arg(state);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(from: &str, to: &str, state: &Path) -> (Option<i32>, String, Value) {
    let output = copy(from, to, state).output().unwrap();
    ended(&output)
}

fn ended(output: &Output) -> (Option<i32>, String, Value) {
    let out = String::from_utf8(output.stdout.clone()).unwrap();
    let last = out.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).unwrap());
    (output.status.code(), String::from_utf8(output.stderr.clone()).unwrap(), last)
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out
}

fn disk(path: &Path, bytes: usize, data: &[(usize, usize)]) -> Vec<u8> {
    let mut disk = vec![0; bytes];
    let file = File::create(path).unwrap();
    file.set_len(bytes as u64).unwrap();
    for (at, len) in data {
        let data = noise(*len, *at as u64);
        file.write_all_at(&data, *at as u64).unwrap();
        disk[*at..at + len].copy_from_slice(&data);
    }
    disk
}

fn uri(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// A source of 192 MiB, and its bytes. What is durable is noted every second, and with 48 requests of 0.7 s, 12 at a time,
/// there are such seconds in every copy of it. nbdkit 1.32 may abort when a client leaves with requests under way, so start
/// it again behind such a client.
fn slow_source(dir: &TestDir) -> (Nbdkit, Vec<u8>) {
    let delay = Duration::from_millis(700);
    let source = Nbdkit::slow(dir.path(), "source", 192 << 20, delay).unwrap();
    let parts: Vec<_> = (0..24).map(|n| (n * 8 * MIB, 8 * MIB)).collect();
    let whole = disk(&source.file(), 192 * MIB, &parts);
    (source, whole)
}

#[test]
fn a_disk_goes_in_thin_and_comes_out_thin() {
    let dir = TestDir::new("copy").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    let (from, back, state) = (dir.join("from"), dir.join("back"), dir.join("state"));
    let data = [(0, 2 * MIB), (9 * MIB, 4096), (31 * MIB, MIB)];
    let whole = disk(&from, 32 * MIB, &data);
    storage.create("v", 40 << 20).unwrap();
    let volume = storage.uri("v", None);
    let (status, error, done) = run(&uri(&from), &volume, &state);
    assert_eq!(status, Some(0), "{error}");
    assert_eq!(done["verified"], true);
    let shown = storage.show("v").unwrap();
    assert!(shown["allocated_bytes"].as_u64() <= Some(5 << 20), "{shown}");
    assert_eq!(shown["access"]["owner"], Value::Null, "it is given back: {shown}");
    assert!(!state.exists());

    // Out of it, beside a backend that owns it.
    let backend = Backend::start(dir.path(), "b", &volume, &[]).unwrap();
    let (status, error, out) = run(&volume, &uri(&back), &state);
    assert_eq!(status, Some(0), "{error}");
    let found = std::fs::read(&back).unwrap();
    assert!(found[..whole.len()] == whole && found[whole.len()..].iter().all(|b| *b == 0));
    assert!(std::fs::metadata(&back).unwrap().blocks() * 512 <= 5 << 20);
    // Digests of the same size are the same.
    storage.create("w", 40 << 20).unwrap();
    let (status, error, again) = run(&uri(&back), &storage.uri("w", None), &state);
    assert_eq!((status, &again["digest"]), (Some(0), &out["digest"]), "{error}");
    drop(backend);
}

#[test]
fn a_running_backends_volume_is_not_written_over() {
    let dir = TestDir::new("copy-owned").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    let (from, state) = (dir.join("from"), dir.join("state"));
    disk(&from, 8 * MIB, &[(0, MIB)]);
    storage.create("v", 8 << 20).unwrap();
    let volume = storage.uri("v", None);
    let backend = Backend::start(dir.path(), "b", &volume, &[]).unwrap();
    let (status, error, _) = run(&uri(&from), &volume, &state);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("owned by another client"), "{error}");
    assert_eq!(storage.show("v").unwrap()["allocated_bytes"], 0);
    drop(backend);

    // A copy that is refused before it has begun keeps nothing.
    storage.create("small", 4 << 20).unwrap();
    let (status, error, _) = run(&uri(&from), &storage.uri("small", None), &state);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("less than the source"), "{error}");
    assert_eq!(storage.show("small").unwrap()["access"]["owner"], Value::Null);
    assert!(!state.exists());

    // Nor does one that is told to go on in the state of another.
    storage.create("w", 8 << 20).unwrap();
    let (slow, _) = slow_source(&dir);
    storage.create("wide", 192 << 20).unwrap();
    let mut other = copy(&slow.uri(), &storage.uri("wide", None), &state).spawn().unwrap();
    wait_until("some is noted", Duration::from_secs(30), || noted(&state) > 0).unwrap();
    // A second run of the same leaves the first alone.
    let (status, error, _) = run(&slow.uri(), &storage.uri("wide", None), &state);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("runs already"), "{error}");
    assert!(other.try_wait().unwrap().is_none(), "it goes on");
    other.kill().unwrap();
    other.wait().unwrap();
    let (status, error, _) = run(&uri(&from), &storage.uri("w", None), &state);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("belongs to a copy of"), "{error}");
    assert_eq!(storage.show("w").unwrap()["access"]["owner"], Value::Null);

    // What does not fill a sector would be lost.
    let (ragged, fresh) = (dir.join("ragged"), dir.join("fresh"));
    std::fs::write(&ragged, vec![7; 4 * MIB + 100]).unwrap();
    let (status, error, _) = run(&uri(&ragged), &storage.uri("w", None), &fresh);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("the last 100 would be lost"), "{error}");
    assert_eq!(storage.show("w").unwrap()["access"]["owner"], Value::Null);
}

/// A copy that has begun, killed or stopped, keeps its volume; the next one goes on and gives it back.
#[test]
fn half_a_disk_is_nobody_elses() {
    let dir = TestDir::new("copy-killed").unwrap();
    let mut storage = Storage::start(dir.path(), &[]).unwrap();
    let (state, back) = (dir.join("state"), dir.join("back"));
    let (mut source, whole) = slow_source(&dir);
    storage.create("v", 192 << 20).unwrap();
    let volume = storage.uri("v", None);
    let begin = |source: &Nbdkit| -> Child {
        let child = copy(&source.uri(), &volume, &state).spawn().unwrap();
        let before = noted(&state);
        wait_until("more is noted", Duration::from_secs(30), || noted(&state) > before).unwrap();
        child
    };
    let mut child = begin(&source);
    child.kill().unwrap();
    child.wait().unwrap();
    source.kill_and_restart(Duration::ZERO).unwrap();
    let owner = storage.show("v").unwrap()["access"]["owner"].clone();
    assert!(owner.as_str().unwrap().starts_with("baton-copy/"), "{owner}");
    let backend = Backend::start(dir.path(), "b", &volume, &[]);
    let refused = backend.err().map(|error| format!("{error:#}")).unwrap_or_default();
    assert!(refused.contains("owned by another client"), "{refused}");

    // In the middle of the next run the server is killed.
    let child = begin(&source);
    storage.kill_and_restart().unwrap();
    let output = child.wait_with_output().unwrap();
    let (status, error, done) = ended(&output);
    assert_eq!(status, Some(0), "{error}");
    assert!(done["resumed_bytes"].as_u64() >= Some(4 << 20), "{done}");
    assert_eq!(storage.show("v").unwrap()["access"]["owner"], Value::Null);
    let (status, error, _) = run(&volume, &uri(&back), &state);
    assert_eq!(status, Some(0), "{error}");
    assert!(std::fs::read(&back).unwrap() == whole);
}

/// Pieces that the state file has notes of.
fn noted(state: &Path) -> usize {
    std::fs::read(state).map_or(0, |bytes| {
        bytes.chunks(32).skip(512).filter(|note| note.iter().any(|b| *b != 0)).count()
    })
}

/// A copy whose volume is fenced stops, with the reason.
#[test]
fn a_fenced_copy_stops() {
    let dir = TestDir::new("copy-fenced").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    let state = dir.join("state");
    let (mut source, _) = slow_source(&dir);
    storage.create("v", 192 << 20).unwrap();
    let volume = storage.uri("v", None);
    let child = copy(&source.uri(), &volume, &state).spawn().unwrap();
    wait_until("some is noted", Duration::from_secs(30), || noted(&state) > 0).unwrap();
    storage.fence("v", None).unwrap();
    let (status, error, _) = ended(&child.wait_with_output().unwrap());
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("given to another owner"), "{error}");
    source.kill_and_restart(Duration::ZERO).unwrap();
    // And the next run is no way around it.
    let (status, error, _) = run(&source.uri(), &volume, &state);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("another owner must claim"), "{error}");
    assert_eq!(storage.show("v").unwrap()["access"]["owner"], Value::Null);
}
