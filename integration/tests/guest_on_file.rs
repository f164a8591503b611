//! A real guest on `baton-backend` with a local file: the device alone, without a storage server.

use baton_integration::daemon::Daemon;
use baton_integration::guest::skip_without_qemu;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::{TestDir, program};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DISK_BYTES: u64 = 64 << 20;

fn backend(dir: &TestDir, name: &str, file: &Path) -> (Daemon, PathBuf) {
    let socket = dir.join("disk.sock");
    let args =
        ["--socket-path".as_ref(), socket.as_os_str(), "--blk-file".as_ref(), file.as_os_str()];
    let mut daemon =
        Daemon::start(dir.path(), name, &program("baton-backend").unwrap(), args).unwrap();
    daemon.wait_line("listening socket=", Duration::from_secs(10)).unwrap();
    (daemon, socket)
}

#[test]
fn a_guest_works_and_survives_kills_of_the_backend() {
    if skip_without_qemu("a_guest_works_and_survives_kills_of_the_backend") {
        return;
    }
    let dir = TestDir::new("file").unwrap();
    let file = dir.join("disk.img");
    File::create(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let (mut daemon, socket) = backend(&dir, "backend", &file);
    let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&socket) };
    let mut guest = Guest::boot(dir.path(), &config).unwrap();
    assert_eq!(guest.ask("size").unwrap(), format!("bytes={DISK_BYTES}"));
    assert_eq!(guest.ask("queues").unwrap(), "queues=2");
    guest.ask("write start=16 count=4 seq=7").unwrap();
    guest.ask("flush").unwrap();
    guest.ask("discard start=17 count=1").unwrap();
    guest.ask("zeroout start=18 count=1").unwrap();
    guest.ask("verify-zero start=18 count=1").unwrap();
    let report = guest.ask("fs files=2 bytes=300000").unwrap();
    assert!(report.starts_with("bytes=600000 crc="), "{report}");

    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    for _ in 0..5 {
        guest.wait_progress(200, Duration::from_secs(60)).unwrap();
        daemon.kill().unwrap();
        (daemon, _) = backend(&dir, "backend", &file);
    }
    guest.wait_progress(200, Duration::from_secs(60)).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 1000, "{totals}");
    guest.power_off().unwrap();
    assert!(daemon.terminate(Duration::from_secs(10)).unwrap().success());
}
