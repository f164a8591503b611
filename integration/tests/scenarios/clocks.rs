//! Clocks jump.

use std::path::{Path, PathBuf};

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
