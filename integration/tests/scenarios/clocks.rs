//! Clocks jump.

use crate::scene::{DISK_BYTES, OWNERS, SOON, Scene};
use baton_integration::baton::Environment;
use baton_integration::guest::skip_if;
use baton_integration::handoff::{Begin, Fleet, Host};
use baton_integration::workspace::TestDir;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What reads the wall clock, in the standard library, `time`, `chrono`, `rustls` and the C library.
const READS: [&str; 9] = [
    "SystemTime::now",
    "UNIX_EPOCH.elapsed",
    "now_utc",
    "now_local",
    "Utc::now",
    "Local::now",
    "UnixTime::now",
    "CLOCK_REALTIME",
    "gettimeofday",
];

/// Who may read it, and what for. Nothing of this decides who may write.
const READERS: [(&str, &str); 8] = [
    ("backend/src/handoff/journal.rs", "shows when things happened, beside how long they took"),
    ("backend/src/latency.rs", "shows when the time slices of a report began"),
    ("cli/src/coordinator.rs", "new ids sort by time; their random half makes them differ"),
    ("live-migrate/src/agent/events.rs", "shows when things happened"),
    ("live-migrate/src/coordinator/core.rs", "shows when things happened, and sorts what is shown"),
    ("live-migrate/src/dev_ca.rs", "certificates to try things with are valid from now on"),
    ("storage-server/src/store/mod.rs", "shows when a volume was made"),
    ("storage-server/src/volumes/audit.rs", "shows when a record changed"),
];

/// Nothing that decides may read a clock that can jump: what reads one shows it to people.
#[test]
fn f13_the_wall_clock_is_for_people() {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut found = Vec::new();
    for part in [
        "protocol",
        "remote-client",
        "backend",
        "storage-server",
        "live-migrate",
        "cli",
        "fault-point",
    ] {
        readers(&root.join(part).join("src"), &mut found);
    }
    let mut found: Vec<String> =
        found.iter().map(|path| path.strip_prefix(&root).unwrap().display().to_string()).collect();
    found.sort();
    // Both ways: a reader that is gone is no excuse for another one in its file.
    assert_eq!(found, READERS.map(|(file, _)| file), "on the left: who reads the wall clock");
}

fn readers(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            readers(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            if READS.iter().any(|read| text.contains(read)) {
                found.push(path);
            }
        }
    }
}

const HOUR_S: i64 = 3600;

/// The wall clock of a process, by libfaketime: others stay as they are.
struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// So far from the true time is it from now on.
    fn jump(&self, off_s: i64) {
        // Nobody reads half of it.
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{off_s:+}")).unwrap();
        std::fs::rename(&new, &self.file).unwrap();
    }

    fn environment(&self) -> Environment {
        let one = |name: &str| (name.to_owned(), "1".into());
        let file = ("FAKETIME_TIMESTAMP_FILE".to_owned(), self.file.clone().into());
        let library = ("LD_PRELOAD".to_owned(), self.library.clone().into());
        vec![library, file, one("FAKETIME_NO_CACHE"), one("FAKETIME_DONT_FAKE_MONOTONIC")]
    }
}

/// libfaketime for programs with threads.
fn library() -> Option<PathBuf> {
    let dirs = std::fs::read_dir("/usr/lib").ok()?.flatten();
    let mut found = dirs.map(|dir| dir.path().join("faketime/libfaketimeMT.so.1"));
    found.find(|path| path.exists())
}

/// When the backend's last event was, by its clock, from now by ours.
fn last_event_s(host: &Host) -> i64 {
    let status = host.status().unwrap();
    let events = status["handoff"]["events"].as_array().unwrap();
    let at_us = events.last().unwrap()["at_unix_us"].as_i64().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    at_us / 1_000_000 - i64::try_from(now.as_secs()).unwrap()
}

/// Two hours apart, and all of them jump between the steps of each move.
#[test]
fn f13_a_guest_moves_between_hosts_whose_clocks_jump() {
    let library = library();
    let why = library.is_none().then(|| "there is no libfaketime".to_owned());
    if skip_if("f13_a_guest_moves_between_hosts_whose_clocks_jump", why) {
        return;
    }
    let library = library.expect("seen");
    let dir = TestDir::new("f13").unwrap();
    let clocks = ["servers", "a", "b"]
        .map(|name| Clock { file: dir.join(&format!("{name}.clock")), library: library.clone() });
    let apart = |offs: [i64; 3]| {
        for (clock, off) in clocks.iter().zip(offs) {
            clock.jump(off * HOUR_S);
        }
    };
    apart([0, 1, -1]);
    let env = |n: usize| clocks[n].environment();
    let fleet = Fleet::start_in(dir.path(), 2, 2, DISK_BYTES, |_| env(0)).unwrap();
    let start = |n: usize, label, begin| {
        Host::start_in(dir.path(), label, OWNERS[n], &fleet, begin, 1, env(n + 1)).unwrap()
    };
    let (source, standby) = (start(0, "a", Begin::Claim), start(1, "b", Begin::Standby));
    let mut scene = Scene::begin(dir, fleet, source);
    scene.hosts.push(standby);
    for round in 0..4 {
        let moving = scene.prepare();
        apart([-1, -1, 1]);
        scene.stop_guest(&moving);
        apart([1, 1, -1]);
        scene.fleet.wait_phase(&["sealed"]).unwrap();
        scene.go_on(moving);
        let off_s = last_event_s(scene.here());
        assert!(off_s.abs() > HOUR_S / 2, "round {round}: its clock is {off_s} s off");
        apart([0, 1, -1]);
        scene.guest.wait_progress(20, SOON).unwrap();
        scene.stand_by_again();
    }
    assert!(scene.judge() > 200);
}
