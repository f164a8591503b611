//! The harness itself, on somebody else's backend: a real guest on qemu-storage-daemon's vhost-user disk.
//!
//! Nothing of Baton takes part. When this fails, look at the harness; when only others fail, look at Baton.

use baton_integration::guest::skip_without_qemu;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::TestDir;
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use support::{DISK_BYTES, storage_daemon};

mod support;

#[test]
fn a_guest_writes_verifies_and_powers_off() {
    if skip_without_qemu("a_guest_writes_verifies_and_powers_off") {
        return;
    }
    let dir = TestDir::new("qsd").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 2);
    let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&socket) };
    let mut guest = Guest::boot(dir.path(), &config).unwrap();

    assert_eq!(guest.ask("size").unwrap(), format!("bytes={DISK_BYTES}"));
    assert_eq!(guest.ask("queues").unwrap(), "queues=2");
    assert!(guest.ask("limits").unwrap().contains("ro=0"));
    assert!(guest.ask("size dev=vdz").is_err());

    assert_eq!(guest.ask("write start=16 count=4 seq=7").unwrap(), "blocks=4");
    guest.ask("flush").unwrap();
    assert_eq!(guest.ask("verify start=16 count=4 seq=7").unwrap(), "blocks=4");
    guest.ask("discard start=17 count=1").unwrap();
    guest.ask("zeroout start=18 count=1").unwrap();
    guest.ask("verify-zero start=17 count=2").unwrap();

    let report = guest.ask("fs files=2 bytes=300000").unwrap();
    assert!(report.starts_with("bytes=600000 crc="), "{report}");

    guest.ask("load threads=2 depth=2 offset=16777216 flush-every=50").unwrap();
    guest.wait_progress(500, Duration::from_secs(60)).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 500, "{totals}");

    let status = guest.qmp().unwrap().execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["running"], true);
    guest.power_off().unwrap();
}

#[test]
fn damage_behind_the_guest_is_found() {
    if skip_without_qemu("damage_behind_the_guest_is_found") {
        return;
    }
    let dir = TestDir::new("qsd").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 1);
    let mut guest = Guest::boot(dir.path(), &GuestConfig::new(&socket)).unwrap();
    guest.ask("load blocks=64").unwrap();
    guest.wait_progress(500, Duration::from_secs(60)).unwrap();
    wipe(&dir.join("disk.img"));
    // Counters of a load that reads what somebody else wiped.
    guest
        .wait_for(Duration::from_secs(60), 0, |l| l.starts_with("bad ") && l.contains("Zero"))
        .unwrap();
    let error = guest.stop_load().unwrap_err().to_string();
    assert!(error.contains("the load found bad data"), "{error}");
}

fn wipe(disk: &Path) {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(disk).unwrap();
    file.write_all_at(&vec![0; 1 << 20], 0).unwrap();
}

#[test]
fn a_killed_and_restarted_backend_is_survived() {
    if skip_without_qemu("a_killed_and_restarted_backend_is_survived") {
        return;
    }
    let dir = TestDir::new("qsd").unwrap();
    let (mut daemon, socket) = storage_daemon(&dir, 1);
    let mut guest = Guest::boot(dir.path(), &GuestConfig::new(&socket)).unwrap();
    guest.ask("load threads=2 depth=2").unwrap();
    for _ in 0..3 {
        guest.wait_progress(200, Duration::from_secs(60)).unwrap();
        daemon.kill().unwrap();
        daemon = storage_daemon(&dir, 1).0;
    }
    guest.wait_progress(200, Duration::from_secs(60)).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 800, "{totals}");
    guest.power_off().unwrap();
    daemon.terminate(Duration::from_secs(10)).unwrap();
}
