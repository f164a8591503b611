//! `baton volume import` and `export` between files and real NBD servers: what arrives, what is noticed, what is left
//! when it ends early. With Baton's own volumes: `integration/tests/copy.rs`.

#[path = "../../remote-client/tests/nbd_server/mod.rs"]
mod nbd_server;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nbd_server::{NbdServer, skip_without};
use nix::sys::signal::Signal;
use serde_json::Value;
use sha2::{Digest, Sha256};

const PIECE: usize = 4 << 20;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.arg("volume").args(args).stdin(Stdio::null());
    command
}

fn baton(args: &[&str]) -> Output {
    command(args).output().expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// Copies; the last line of JSON.
fn copies(from: &str, to: &str, more: &[&str]) -> Value {
    let output = baton(&[&["import", from, to, "--json"], more].concat());
    assert!(output.status.success(), "{from} {to}: {}", text(&output.stderr));
    let out = text(&output.stdout);
    let last: Value = serde_json::from_str(out.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["event"], "done");
    last
}

/// The one sentence of a copy that ends with `status`; a driver may have warned before.
fn fails(args: &[&str], status: i32, says: &str) -> String {
    let output = baton(args);
    let said = text(&output.stderr);
    let is_warning = |line: &&str| line.starts_with("baton: warning: ");
    let sentences: Vec<&str> = said.lines().filter(|line| !is_warning(line)).collect();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
    assert_eq!(sentences.len(), 1, "{said}");
    assert!(sentences[0].contains(says), "{args:?}: {said}");
    sentences[0].to_owned()
}

fn uri(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// Bytes that no two places share.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A disk of `bytes` with data at its begin, at odd places, and at its end.
fn sparse(path: &Path, bytes: usize) -> Vec<u8> {
    let mut disk = vec![0; bytes];
    let file = File::create(path).expect("create");
    file.set_len(bytes as u64).expect("size");
    for (at, len) in
        [(0, 64 << 10), (PIECE - 4096, 12 << 10), (9 * PIECE / 2, 512), (bytes - 1536, 1536)]
    {
        let data = noise(len, at as u64);
        file.write_all_at(&data, at as u64).expect("write");
        disk[at..at + len].copy_from_slice(&data);
    }
    disk
}

/// What `split -b 4M --filter='sha256sum | cut -c1-64 | xxd -r -p' DISK | sha256sum` prints.
fn digest_of(disk: &[u8]) -> String {
    let mut whole = Sha256::new();
    disk.chunks(PIECE).for_each(|piece| whole.update(Sha256::digest(piece)));
    whole.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).expect("file").blocks() * 512
}

fn holds(path: &Path, disk: &[u8]) {
    let found = std::fs::read(path).expect("read");
    assert_eq!(found.len(), disk.len());
    let wrong = found.iter().zip(disk).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{}", path.display());
}

#[test]
fn a_file_is_made_sparse_and_the_digest_is_anybodys() {
    let dir = tempfile::tempdir().expect("directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    // Not a multiple of a piece, nor of a block of 4096.
    let disk = sparse(&from, 10 * PIECE + 1536);
    let done = copies(&uri(&from), &uri(&to), &[]);
    holds(&to, &disk);
    assert_eq!(done["digest"], digest_of(&disk).as_str());
    assert_eq!((&done["verified"], &done["resumed_bytes"]), (&Value::Bool(true), &0.into()));
    assert_eq!(done["size_bytes"], disk.len());
    assert!(allocated(&to) <= 256 << 10, "{} bytes", allocated(&to));
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("list").collect();
    assert_eq!(left.len(), 2, "the state file is gone: {left:?}");

    // A destination with other data loses all of it, in the holes as well.
    std::fs::write(&to, vec![9; disk.len() + 8192]).expect("write");
    let output = baton(&["export", &uri(&from), &uri(&to)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    assert!(out.contains(&format!("verified: sha256/4M {}\n", digest_of(&disk))), "{out}");
    let found = std::fs::read(&to).expect("read");
    assert!(found[..disk.len()] == disk, "as the source");
    assert!(found[disk.len()..].iter().all(|b| *b == 9), "what is behind the source stays");
}

#[test]
fn from_every_server_to_every_server_holes_stay_holes() {
    const NAME: &str = "from_every_server_to_every_server_holes_stay_holes";
    if skip_without(NAME, "nbdkit") || skip_without(NAME, "qemu-nbd") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("from");
    let disk = sparse(&path, 8 * PIECE);
    let from = path.to_str().expect("UTF-8");
    let server = |qemu: bool, more: &[&str], path: &str| {
        let dir = tempfile::tempdir().expect("directory");
        let server = match qemu {
            true => NbdServer::qemu(dir.path(), &[&["--discard=unmap"], more, &[path]].concat()),
            false => NbdServer::nbdkit(dir.path(), &[more, &["file", path]].concat()),
        };
        (server, dir, if qemu { "disk" } else { "" })
    };
    for (n, (from_qemu, from_args, to_qemu, to_args)) in [
        (false, &[][..], false, &[][..]),
        (true, &["--read-only"], false, &[]),
        (false, &["--no-sr"], true, &[]),
        // It can neither tell nor take holes: zeros are found and written.
        (false, &["--filter=noextents"], false, &["--filter=nozero"]),
    ]
    .into_iter()
    .enumerate()
    {
        let to = dir.path().join(format!("to-{n}"));
        File::create(&to).and_then(|f| f.set_len(8 * PIECE as u64)).expect("create");
        let (source, _a, export) = server(from_qemu, from_args, from);
        let source = source_uri(&source, export);
        let (target, _b, name) = server(to_qemu, to_args, to.to_str().expect("UTF-8"));
        let state = dir.path().join("state");
        let more = ["--state", state.to_str().expect("UTF-8")];
        let done = copies(&source.0, &target.uri(name), &more);
        assert_eq!(done["digest"], digest_of(&disk).as_str(), "{n}");
        holds(&to, &disk);
        if !to_args.contains(&"--filter=nozero") {
            assert!(allocated(&to) <= 256 << 10, "{n}: {} bytes", allocated(&to));
        }
    }
}

/// Keeps the borrow short.
fn source_uri(server: &NbdServer, export: &str) -> (String,) {
    (server.uri(export),)
}

/// A source that gives 16 MiB a second, so that a copy can be ended in its middle.
struct Slow {
    dir: tempfile::TempDir,
    disk: Vec<u8>,
    path: PathBuf,
    server: NbdServer,
}

impl Slow {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("from");
        let disk = noise(12 * PIECE, 5);
        std::fs::write(&path, &disk).expect("write");
        let args =
            ["--filter=rate", "file", path.to_str().expect("UTF-8"), "rate=128M", "burstiness=0.1"];
        let server = NbdServer::nbdkit(dir.path(), &args);
        Self { dir, disk, path, server }
    }

    /// The same disk, as fast as it goes.
    fn fast(&mut self) {
        self.server.kill();
        let path = self.path.to_str().expect("UTF-8");
        self.server = NbdServer::nbdkit(self.dir.path(), &["file", path]);
    }

    fn to(&self) -> PathBuf {
        self.dir.path().join("to")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("to.baton-copy")
    }

    /// The pieces that the state file has notes of: not always the first, for a server answers in its own order.
    fn noted(&self) -> Vec<usize> {
        let state = std::fs::read(self.state()).unwrap_or_default();
        let notes = state.chunks(32).skip(512).enumerate();
        notes.filter(|(_, note)| note.iter().any(|b| *b != 0)).map(|(piece, _)| piece).collect()
    }

    /// Begins a copy to [`Slow::to`], and waits until some of it is noted.
    fn begin(&self) -> Child {
        let before = self.noted().len();
        let mut child = command(&["import", &self.server.uri(""), &uri(&self.to())])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command runs");
        let until = Instant::now() + Duration::from_secs(20);
        while self.noted().len() <= before {
            assert_eq!(child.try_wait().expect("wait"), None, "it ended early");
            assert!(Instant::now() < until, "nothing is noted");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    fn killed(&self) {
        let mut child = self.begin();
        child.kill().expect("killed");
        child.wait().expect("waited");
    }

    fn args<'a>(from: &'a str, to: &'a str) -> [&'a str; 3] {
        ["import", from, to]
    }
}

#[test]
fn after_kill_9_it_goes_on() {
    if skip_without("after_kill_9_it_goes_on", "nbdkit") {
        return;
    }
    let mut slow = Slow::start();
    slow.killed();
    slow.fast();
    let done = copies(&slow.server.uri(""), &uri(&slow.to()), &[]);
    let before = done["resumed_bytes"].as_u64().expect("a number");
    assert!(before >= PIECE as u64 && before < slow.disk.len() as u64, "{done}");
    assert_eq!(before + done["data_bytes"].as_u64().expect("a number"), slow.disk.len() as u64);
    assert_eq!(done["digest"], digest_of(&slow.disk).as_str());
    holds(&slow.to(), &slow.disk);
    assert!(!slow.state().exists());
}

#[test]
fn what_was_changed_meanwhile_is_refused() {
    if skip_without("what_was_changed_meanwhile_is_refused", "nbdkit") {
        return;
    }
    let mut slow = Slow::start();
    slow.killed();
    slow.fast();
    let (from, to, state) = (slow.server.uri(""), uri(&slow.to()), slow.state());
    let state = state.to_str().expect("UTF-8");
    let write = |path: &Path, at: u64, byte: u8| {
        let file = File::options().write(true).open(path).expect("open");
        file.write_all_at(&[byte], at).expect("write");
    };
    // Other ends, with this state.
    let other = uri(&slow.dir.path().join("other"));
    fails(&["import", &from, &other, "--state", state], 1, "belongs to a copy of nbd+unix:");
    fails(&["import", &uri(&slow.path), &to, "--state", state], 1, "belongs to a copy of");
    // Other contents, of what is noted.
    let at = slow.noted()[0] * PIECE + 77;
    for (path, role) in [(slow.path.clone(), "source"), (slow.to(), "destination")] {
        write(&path, at as u64, !slow.disk[at]);
        let sentence = fails(&Slow::args(&from, &to), 1, "has changed since the copy began");
        assert!(sentence.contains(role) && sentence.contains(state), "{sentence}");
        write(&path, at as u64, slow.disk[at]);
    }
    // Another size, and another file of that name.
    File::options().write(true).open(&slow.path).and_then(|f| f.set_len(20 << 20)).expect("cut");
    slow.fast();
    fails(&Slow::args(&from, &to), 1, "the source is not the one");
    std::fs::write(&slow.path, &slow.disk).expect("write");
    slow.fast();
    let aside = slow.dir.path().join("aside");
    std::fs::rename(slow.to(), &aside).expect("move");
    fails(&Slow::args(&from, &to), 1, "the destination is not the one");
    std::fs::rename(&aside, slow.to()).expect("move");
    // All is as it was.
    assert_ne!(copies(&from, &to, &[])["resumed_bytes"], 0);
    holds(&slow.to(), &slow.disk);
}

#[test]
fn ctrl_c_leaves_what_the_next_run_goes_on_from() {
    if skip_without("ctrl_c_leaves_what_the_next_run_goes_on_from", "nbdkit") {
        return;
    }
    let mut slow = Slow::start();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = slow.begin();
        // A second one at the same time is refused.
        let (from, to) = (slow.server.uri(""), uri(&slow.to()));
        let busy = fails(&Slow::args(&from, &to), 1, "in use");
        assert!(busy.contains(slow.to().to_str().expect("UTF-8")), "{busy}");
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("our child");
        let output = child.wait_with_output().expect("waited");
        let sentence = text(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{sentence}");
        assert!(sentence.contains("interrupted at ") && sentence.contains("goes on"), "{sentence}");
        assert!(slow.state().exists());
        // nbdkit's rate filter does not always outlive a client that goes.
        slow.server.kill();
        slow.server.restart();
    }
    slow.fast();
    let done = copies(&slow.server.uri(""), &uri(&slow.to()), &[]);
    assert!(done["resumed_bytes"].as_u64() >= Some(PIECE as u64), "{done}");
    holds(&slow.to(), &slow.disk);
}

/// A server that dies under the copy is waited for.
#[test]
fn a_server_that_comes_back_is_a_pause() {
    if skip_without("a_server_that_comes_back_is_a_pause", "nbdkit") {
        return;
    }
    let mut slow = Slow::start();
    let child = slow.begin();
    slow.server.kill();
    std::thread::sleep(Duration::from_millis(300));
    slow.fast();
    let output = child.wait_with_output().expect("waited");
    assert!(output.status.success(), "{}", text(&output.stderr));
    holds(&slow.to(), &slow.disk);
}

/// A destination that loses what it acknowledges.
#[test]
fn a_destination_that_lies_is_noticed() {
    if skip_without("a_destination_that_lies_is_noticed", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let from = dir.path().join("from");
    std::fs::write(&from, noise(3 * PIECE, 5)).expect("write");
    let kept = dir.path().join("kept");
    let state = dir.path().join("state");
    // One piece's bytes are kept, but for one bit; the rest is dropped.
    std::fs::write(&kept, noise(3 * PIECE, 5)).expect("write");
    let spoilt = File::options().write(true).open(&kept).expect("open");
    spoilt.write_all_at(&[noise(3 * PIECE, 5)[PIECE + 9] ^ 1], PIECE as u64 + 9).expect("write");
    let read =
        format!("pread=dd if={} iflag=skip_bytes,count_bytes skip=$4 count=$3", kept.display());
    let size = format!("get_size=echo {}", 3 * PIECE);
    let args = ["eval", &size, &read, "pwrite=cat >/dev/null", "can_write=exit 0"];
    let to = NbdServer::nbdkit(dir.path(), &args);
    let args = ["import", &uri(&from), &to.uri(""), "--state", state.to_str().expect("UTF-8")];
    let says = format!("1 of the pieces differ, the first at byte {PIECE}");
    fails(&args, 4, &says);
    // That piece is copied again, and found wrong again.
    fails(&args, 4, &says);
    spoilt.write_all_at(&[noise(3 * PIECE, 5)[PIECE + 9]], PIECE as u64 + 9).expect("write");
    let output = baton(&[&args[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let last = text(&output.stdout);
    assert!(last.contains(&format!("\"data_bytes\":{PIECE}")), "{last}");
}

#[test]
fn each_refusal_is_one_sentence() {
    const NAME: &str = "each_refusal_is_one_sentence";
    if skip_without(NAME, "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let from = dir.path().join("from");
    let disk = sparse(&from, 5 * PIECE);
    let (from, to) = (uri(&from), uri(&dir.path().join("to")));
    let small = dir.path().join("small");
    std::fs::write(&small, &disk[512..]).expect("write");
    let diary = dir.path().join("diary");
    std::fs::write(&diary, "dear diary").expect("write");
    let diary_name = diary.to_str().expect("UTF-8");
    let none = format!("nbd+unix:///?socket={}", dir.path().join("none").display());
    let read_only = NbdServer::nbdkit(dir.path(), &["-r", "memory", "20M"]);
    let state = dir.path().join("state");
    let state = state.to_str().expect("UTF-8");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("from"), &link).expect("link");
    for (args, status, says) in [
        (&["import", &from, "/dev/null"][..], 2, "not a volume URI"),
        (&["import", &from], 2, "DESTINATION_URI"),
        (&["import", &from, &from], 2, "are the same volume"),
        (&["import", &uri(&link), &from, "--state", state], 2, "are the same volume"),
        (&["import", &uri(&dir.path().join("nothing")), &to], 1, "cannot open the source"),
        (&["import", &from, &uri(&small)], 1, "512 less than the source"),
        (&["import", &from, &read_only.uri(""), "--state", state], 1, "is read-only"),
        (&["import", &none, &to], 3, "cannot reach an NBD server"),
        (&["import", &from, "baton://127.0.0.1:1/v", "--state", state], 3, "cannot reach"),
        (&["import", &from, &to, "--state", diary_name], 1, "not the state of a copy"),
        (&["import", &from, &uri(&dir.path().join("no/such/folder"))], 2, "cannot make the file"),
    ] {
        let output = baton(args);
        let sentence = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {sentence}");
        assert!(sentence.contains(says), "{args:?}: {sentence}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(std::fs::read_to_string(&diary).expect("read"), "dear diary");
    assert_eq!(std::fs::read(&small).expect("read"), &disk[512..], "it was not touched");
    holds(&dir.path().join("from"), &disk);
}

/// For a person, on standard error; what a machine reads stays what it was.
#[test]
fn what_a_driver_warns_of_is_shown() {
    let dir = tempfile::tempdir().expect("directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    std::fs::write(&from, noise(4096, 1)).expect("write");
    std::fs::write(&to, [0; 4096 + 100]).expect("write");
    let output = baton(&["import", &uri(&from), &uri(&to), "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let warning = text(&output.stderr);
    assert!(warning.starts_with("baton: warning: the last 100 bytes of"), "{warning}");
    assert_eq!(warning.lines().count(), 1, "{warning}");
    for line in text(&output.stdout).lines() {
        serde_json::from_str::<Value>(line).expect("JSON");
    }
}

#[test]
fn a_machine_is_told_how_far_it_is() {
    if skip_without("a_machine_is_told_how_far_it_is", "nbdkit") {
        return;
    }
    let slow = Slow::start();
    let output = baton(&["import", &slow.server.uri(""), &uri(&slow.to()), "--json"]);
    assert!(output.status.success() && output.stderr.is_empty());
    let lines: Vec<Value> =
        text(&output.stdout).lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let copying: Vec<_> = lines
        .iter()
        .filter(|l| l["phase"] == "copying")
        .map(|l| l["done_bytes"].as_u64())
        .collect();
    assert!(copying.len() >= 3 && copying.is_sorted(), "{lines:?}");
    let middle = lines.iter().find(|l| l["done_bytes"].as_u64() > Some(0)).expect("progress");
    assert_eq!(middle["total_bytes"], slow.disk.len());
    assert!(middle["bytes_per_second"].as_u64() > Some(0) && middle["left_seconds"].is_u64());
    assert!(lines.iter().any(|l| l["phase"] == "verifying"));
    assert_eq!(lines.last().expect("a line")["event"], "done");
}

/// What is said to be a hole is neither read nor written, at neither end: a tebibyte would take an hour.
#[test]
fn a_tebibyte_of_nothing_is_soon_copied() {
    if skip_without("a_tebibyte_of_nothing_is_soon_copied", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let server = NbdServer::nbdkit(dir.path(), &["memory", "1T"]);
    let to = dir.path().join("to");
    let done = copies(&server.uri(""), &uri(&to), &[]);
    assert_eq!((&done["zero_bytes"], &done["data_bytes"]), (&(1u64 << 40).into(), &0.into()));
    assert_eq!(std::fs::metadata(&to).expect("file").len(), 1 << 40);
    assert!(allocated(&to) < 1 << 20);
}
