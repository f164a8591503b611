//! The disk under the server's metadata is full (F20 of docs/scenarios.md): what cannot be recorded is not
//! done, whoever owns the volume goes on, and all is as before once there is room.

mod common;

use std::fs::File;
use std::io::Write;
use std::process::Command;

use baton_protocol::access::Phase;
use baton_protocol::handoff::{Ask, Outcome, Try};
use baton_protocol::{AccessMode, Epoch, Opcode, Status};
use common::handoff::{
    Backend, DESTINATION, Member, S, SOURCE, TRY, arm, arm_try, plan, which, which_try,
};
use common::small_disk::SmallDisk;
use common::{Client, Daemon, arguments, greeting, http, json, metric, wait_for};
use tempfile::TempDir;

const MODES: [&str; 2] = ["fast", "base"];
/// The store gives guests no new space on a disk with less than 64 MiB left.
const DISK_BYTES: u64 = 96 << 20;
const POOL: [&str; 2] = ["--pool-size", "16M"];

/// A server whose data is on a small disk.
struct Server {
    disk: SmallDisk,
    daemon: Option<Daemon>,
    dir: TempDir,
    /// Volumes that only take up room.
    made: usize,
}

impl Server {
    /// `None` where no small disk can be made, which is said.
    fn start() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let Some(disk) = SmallDisk::mount(&dir.path().join("data"), DISK_BYTES) else {
            eprintln!("skipped: this machine makes no namespaces");
            return None;
        };
        let mut server = Self { disk, daemon: None, dir, made: 0 };
        server.daemon = Some(server.run());
        Some(server)
    }

    fn run(&self) -> Daemon {
        Daemon::from(self.command())
    }

    fn command(&self) -> Command {
        let mut command = self.disk.command(env!("CARGO_BIN_EXE_baton-storage"));
        arguments(&mut command, self.dir.path());
        command.args(POOL);
        command
    }

    /// A shell on the disk, in its namespace.
    fn as_root(&self, script: &str) {
        let script = format!("cd '{}' && {script}", self.dir.path().join("data").display());
        let status = self.disk.command("sh").args(["-c", &script]).status().expect("a shell");
        assert!(status.success(), "{script}");
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("running")
    }

    fn member(&self, name: &str) -> Member {
        Member::create(self.daemon().data, self.daemon().admin, name)
    }

    /// Not a page is left, on the disk and in the metadata's file: that grows until it cannot.
    fn fill(&mut self) {
        self.disk.fill();
        self.fill_metadata();
    }

    fn fill_metadata(&mut self) {
        for number in self.made.. {
            let new =
                serde_json::json!({"name": format!("filler-{number:040}"), "size_bytes": 512});
            let (status, text) = http(self.daemon().admin, "POST", "/v1/volumes", &new.to_string());
            if status != 201 {
                finds_no_room((status, json(&text)));
                self.made = number;
                return;
            }
        }
    }

    /// Starts it again, where a volume finds it.
    fn go_on(&mut self, member: &mut Member) {
        let daemon = self.run();
        (member.data, member.admin) = (daemon.data, daemon.admin);
        self.daemon = Some(daemon);
    }

    fn kill(&mut self, member: &mut Member) {
        self.daemon.take().expect("running").kill();
        self.go_on(member);
    }
}

/// Refused because there is no room, in the words of the manual.
fn finds_no_room((status, problem): (u16, serde_json::Value)) {
    assert_eq!((status, problem["type"].as_str()), (507, Some("baton:metadata-full")), "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    for part in ["is full", "nothing was changed", "whoever owns the volume goes on", "make room"] {
        assert!(detail.contains(part), "{detail}");
    }
}

/// The owner's guest notices nothing, as long as it writes where it has written.
fn goes_on(owner: &mut Backend, value: u8) {
    assert_eq!(owner.queue.write(0, &[value; 4096]), Status::Ok);
    assert_eq!(owner.queue.call(Opcode::Flush, 0, 0).0, Status::Ok);
    assert_eq!(owner.queue.read(0, 4096), [value; 4096]);
}

#[test]
fn f20_a_handoff_is_not_begun_on_a_full_disk_and_is_when_there_is_room() {
    for mode in MODES {
        let Some(mut server) = Server::start() else { return };
        let (mut volume, mut standby) = (server.member("d"), None::<Backend>);
        let mut source = volume.source();
        goes_on(&mut source, 1);
        server.fill();
        let body = volume.arming(1, &plan(&[&volume], mode, TRY));
        for value in 2..4 {
            finds_no_room(volume.post("arm", &body));
            assert_eq!(volume.phase(), "owned");
            goes_on(&mut source, value);
            let destination = standby.insert(volume.destination());
            let told = destination.control.ask(Ask::Activate);
            assert_eq!(told.outcome, Outcome::NoSuchHandoff, "not even half armed");
        }
        // What else has to be recorded is refused by the same word.
        let new = serde_json::json!({"name": "e", "size_bytes": 1 << 20}).to_string();
        let (status, text) = http(volume.admin, "POST", "/v1/volumes", &new);
        finds_no_room((status, json(&text)));
        finds_no_room(volume.post("fence", &serde_json::json!({"term": 1, "reason": "test"})));
        goes_on(&mut source, 4);

        server.disk.free();
        arm(&[&volume], mode);
        assert_eq!(source.seal().outcome, Outcome::Granted);
        let mut destination = standby.take().expect("stands by");
        let proof = destination.control.wins(Ask::Activate);
        destination.open(proof);
        assert_eq!(destination.queue.read(0, 4096), [4; 4096]);
        assert_eq!(volume.post("settle", &which(1)).1["owner"]["name"], DESTINATION);
        server.kill(&mut volume);
        assert_eq!(volume.record()["owner"]["name"], DESTINATION, "all of it is on the disk");
        let mut hello = greeting("d", SOURCE, S);
        hello.epoch = 1;
        assert_eq!(Client::greet(volume.data, &hello).err().expect("out").0, Status::StaleEpoch);
    }
}

/// A step that has to be recorded and cannot be.
fn is_not_recorded(control: &mut Client, ask: Ask) {
    let ask = control.send_ask(ask);
    assert_eq!(control.answer(ask).0, Status::Io);
}

/// What the record says of it is what the sides were told, and asking again is enough.
#[test]
fn f20_a_disk_that_fills_up_in_a_handoff_stops_it_where_it_is() {
    let steps = [
        ("base", "seal"),
        ("base", "activate"),
        ("base", "reclaim"),
        ("fast", "reclaim"),
        ("fast", "settle"),
    ];
    for (mode, step) in steps {
        let Some(mut server) = Server::start() else { return };
        let mut volume = server.member("d");
        let (mut source, mut destination) = (volume.source(), volume.destination());
        goes_on(&mut source, 1);
        arm(&[&volume], mode);
        if step != "seal" {
            assert_eq!(source.seal().outcome, Outcome::Granted);
        }
        server.fill();
        for value in 2..4 {
            match step {
                "seal" => {
                    let counts = source.drained();
                    is_not_recorded(&mut source.control, Ask::Seal(counts));
                    assert_eq!(volume.phase(), "armed");
                    goes_on(&mut source, value);
                }
                "activate" => {
                    is_not_recorded(&mut destination.control, Ask::Activate);
                    assert_eq!(volume.phase(), "sealed", "nobody has won");
                    assert_eq!(destination.queue.write(0, &[9; 512]), Status::NotPermitted);
                }
                "reclaim" => {
                    is_not_recorded(&mut source.control, Ask::Reclaim);
                    finds_no_room(volume.post("reclaim", &which(1)));
                    assert_eq!(volume.phase(), "sealed", "nobody has won");
                    assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch);
                }
                _ => {
                    // Both are in memory only, so far.
                    let proof = destination.control.wins(Ask::Activate);
                    destination.open(proof);
                    finds_no_room(volume.post("settle", &which(1)));
                    assert_eq!(volume.phase(), "active");
                    goes_on(&mut destination, value);
                }
            }
        }
        server.disk.free();
        let name = if step == "reclaim" { SOURCE } else { DESTINATION };
        if step == "seal" {
            assert_eq!(source.seal().outcome, Outcome::Granted);
        }
        if name == DESTINATION {
            let proof = destination.control.wins(Ask::Activate);
            destination.open(proof);
            goes_on(&mut destination, 5);
            assert_eq!(source.control.ask(Ask::Reclaim).outcome, Outcome::Lost);
        } else {
            let proof = source.control.wins(Ask::Reclaim);
            source.open(proof);
            goes_on(&mut source, 5);
            assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::Lost);
        }
        assert_eq!(volume.post("settle", &which(1)).1["owner"]["name"], name);
        server.kill(&mut volume);
        assert_eq!(volume.record()["owner"]["name"], name, "{mode}, {step}");
        assert_eq!(volume.phase(), "owned");

        // And on to the next.
        let session = if name == SOURCE { 0xa2 } else { 0xb2 };
        let mut owner = volume.control(name, session, AccessMode::Owner, 0);
        assert!(owner.epoch > Epoch(2));
        let next = Try { attempt: 2, ..TRY };
        let mut back = plan(&[&volume], mode, next);
        (back["from"], back["to"]) = (name.into(), "host-c/vm".into());
        assert_eq!(volume.post("arm", &volume.arming(1, &back)).0, 200);
        assert_eq!(owner.ask_of(next, Ask::Reclaim).record.phase, Phase::Reclaimed);
        assert_eq!(volume.post("settle", &which_try(1, next)).0, 200);
    }
}

/// A member that has no room takes the others back with it: nothing is left armed.
#[test]
fn f20_a_full_member_is_disarmed_with_the_others() {
    let Some(server) = Server::start() else { return };
    let Some(mut full) = Server::start() else { return };
    let (anchor, other) = (server.member("boot"), full.member("data"));
    let (mut source, mut at_other) = (anchor.source(), other.source());
    goes_on(&mut at_other, 1);
    full.fill();
    let members = [&anchor, &other];
    let body = plan(&members, "fast", TRY);
    assert_eq!(anchor.post("arm", &anchor.arming(1, &body)).0, 200);
    finds_no_room(other.post("arm", &other.arming(1, &body)));
    // As the coordinator does: all or none.
    assert_eq!(anchor.post("reclaim", &which(1)).1["outcome"], "source");
    assert_eq!(anchor.post("settle", &which(1)).0, 200);
    goes_on(&mut at_other, 2);
    assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
    full.disk.free();
    arm_try(&members, "fast", Try { attempt: 2, ..TRY });
}

/// The journal is half full and cannot be applied: the guest notices nothing, and nothing is lost, also if the server
/// is killed before there is room. A discard gives room to the disk, so the metadata is on another one.
#[test]
fn f20_the_extent_map_waits_in_the_journal_while_the_disk_is_full() {
    /// A checkpoint begins with so many records.
    const HALF: u64 = 1 << 15;
    let extent = |number: u64| number << 20;
    for killed in [false, true] {
        let Some(mut server) = Server::start() else { return };
        let mut volume = server.member("d");
        server.daemon.take().expect("running").kill();
        server.as_root(
            "mkdir own && mount -t tmpfs -o size=$(stat -c %s meta.redb) tmpfs own && mv meta.redb own/ && ln -s own/meta.redb .",
        );
        server.go_on(&mut volume);
        let mut source = volume.source();
        let records = |volume: &Member| metric(volume.admin, "baton_pool_journal_records");
        let waits_for_room =
            |volume: &Member| metric(volume.admin, "baton_pool_journal_waits_for_room");
        let unmap = |source: &mut Backend, number| {
            let (status, _) = source.queue.call(Opcode::Discard, extent(number), extent(1));
            assert_eq!(status, Status::Ok);
        };
        (0..12).for_each(|n| assert_eq!(source.queue.write(extent(n), &[1; 512]), Status::Ok));
        for _ in 0..(HALF - 4 - records(&volume)) / 2 {
            unmap(&mut source, 11);
            assert_eq!(source.queue.write(extent(11), &[1; 512]), Status::Ok);
        }
        server.fill_metadata();
        for n in 2..9 {
            if n == 8 {
                wait_for("the journal cannot be applied", || waits_for_room(&volume) == 1);
            }
            unmap(&mut source, n);
            assert_eq!(source.queue.read(extent(n), 512), [0; 512]);
            assert_eq!(source.queue.write(extent(n), &[2; 512]), Status::Ok);
            goes_on(&mut source, u8::try_from(n).expect("small"));
        }
        finds_no_room(volume.post("arm", &volume.arming(1, &plan(&[&volume], "fast", TRY))));
        assert!(records(&volume) > HALF, "none was taken out of the journal");
        if killed {
            server.daemon.take().expect("running").kill();
        }
        server.as_root("mount -o remount,size=8M own");
        if killed {
            server.go_on(&mut volume);
            let control = volume.control(SOURCE, 0xa2, AccessMode::Owner, 0);
            let mut hello = greeting("d", SOURCE, 0xa2);
            hello.epoch = control.epoch.0;
            let queue = Client::greet(volume.data, &hello).expect("welcomed").0;
            source = Backend { control, queue };
        }
        wait_for("the journal is applied", || {
            unmap(&mut source, 11);
            assert_eq!(source.queue.write(extent(11), &[1; 512]), Status::Ok);
            records(&volume) < HALF
        });
        assert_eq!(waits_for_room(&volume), 0);
        for n in 1..12 {
            let byte = if (2..9).contains(&n) { 2 } else { 1 };
            assert_eq!(source.queue.read(extent(n), 512), [byte; 512], "extent {n}");
        }
        goes_on(&mut source, 9);
    }
}

/// It says why, ends, and starts when there is room.
#[test]
fn f20_a_server_is_not_started_on_a_full_disk() {
    let Some(mut server) = Server::start() else { return };
    let mut volume = server.member("d");
    let mut source = volume.source();
    goes_on(&mut source, 1);
    server.fill();
    server.daemon.take().expect("running").kill();
    let output = server.command().output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("meta.redb") && said.contains("No space left"), "{said}");
    server.disk.free();
    server.daemon = Some(server.run());
    (volume.data, volume.admin) = (server.daemon().data, server.daemon().admin);
    let mut source = volume.standby(SOURCE, 0xa2);
    drop(source.control);
    let owner = volume.control(SOURCE, 0xa2, AccessMode::Owner, 0);
    let mut hello = greeting("d", SOURCE, 0xa2);
    hello.epoch = owner.epoch.0;
    source.queue = Client::greet(volume.data, &hello).expect("welcomed").0;
    assert_eq!(source.queue.read(0, 4096), [1; 4096]);
}

/// The log is on a full disk: its lines are lost, and nothing else.
#[test]
fn f20_a_log_that_cannot_be_written_ends_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(disk) = SmallDisk::mount(&dir.path().join("logs"), 1 << 20) else { return };
    let log = || File::options().append(true).create(true).open(disk.path("log")).expect("open");
    let mut command = disk.command(env!("CARGO_BIN_EXE_baton-storage"));
    arguments(&mut command, dir.path());
    let mut child = command.stderr(log()).spawn().expect("the binary runs");
    let said = || std::fs::read_to_string(disk.path("log")).expect("text");
    wait_for("it listens", || said().contains("listening ") && said().ends_with('\n'));
    let address = |key: &str| {
        let said = said();
        let value = said.split_whitespace().find_map(|word| word.strip_prefix(key));
        value.and_then(|value| value.parse().ok()).expect("an address")
    };
    let (data, admin) = (address("data="), address("admin="));
    disk.fill();
    // Not even in the page that it has begun.
    while log().write_all(b"\n").is_ok() {}
    for round in 0..3 {
        // Made, claimed, refused: each has a line.
        let volume = Member::create(data, admin, &format!("d{round}"));
        let mut source = volume.source();
        let other = greeting(&volume.name, DESTINATION, 0xb);
        assert_eq!(Client::greet(data, &other).err().expect("refused").0, Status::NotOwner);
        goes_on(&mut source, 1);
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
}
