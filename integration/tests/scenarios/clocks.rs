//! Clocks jump.

use std::path::PathBuf;

/// Nothing that decides may read a clock that can jump: what reads one shows it to people.
#[test]
fn f13_the_wall_clock_is_for_people() {
    const SHOWN: [&str; 7] = [
        // An audit entry's time.
        "storage-server/src/volumes/audit.rs",
        // When a volume was made.
        "storage-server/src/store/mod.rs",
        "backend/src/latency.rs",
        "backend/src/handoff/journal.rs",
        "live-migrate/src/agent/events.rs",
        "live-migrate/src/coordinator/core.rs",
        "live-migrate/src/coordinator/api/events.rs",
    ];
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut found = Vec::new();
    for part in ["protocol", "remote-client", "backend", "storage-server", "live-migrate"] {
        readers(&root.join(part).join("src"), &mut found);
    }
    let found: Vec<String> = found
        .iter()
        .map(|path| path.strip_prefix(&root).unwrap().display().to_string())
        .filter(|path| !SHOWN.contains(&path.as_str()) && !path.contains("test"))
        .collect();
    assert!(found.is_empty(), "these read the wall clock: {found:?}");
}

fn readers(dir: &std::path::Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            readers(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs")
            && std::fs::read_to_string(&path).unwrap().contains("SystemTime::now")
        {
            found.push(path);
        }
    }
}
