//! A real guest whose disk is an export of an NBD server, which is killed and started again under load.

use baton_integration::daemon::Daemon;
use baton_integration::guest::{skip_without_program, skip_without_qemu};
use baton_integration::nbdkit::Nbdkit;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::{TestDir, program};
use std::ffi::OsStr;
use std::time::Duration;

const DISK_BYTES: u64 = 64 << 20;

#[test]
fn a_guest_works_on_nbd_and_sees_nothing_of_kills_of_the_server() {
    const NAME: &str = "a_guest_works_on_nbd_and_sees_nothing_of_kills_of_the_server";
    if skip_without_qemu(NAME) || skip_without_program(NAME, "nbdkit") {
        return;
    }
    let dir = TestDir::new("nbd").unwrap();
    let socket = dir.join("disk.sock");
    let mut storage = Nbdkit::start(dir.path(), "disk", DISK_BYTES).unwrap();
    let uri = storage.uri();
    let args: [&OsStr; 4] =
        ["--socket-path".as_ref(), socket.as_os_str(), "--volume".as_ref(), uri.as_ref()];
    let backend = program("baton-backend").unwrap();
    let mut backend = Daemon::start(dir.path(), "backend", &backend, args).unwrap();
    backend.wait_line("listening socket=", Duration::from_secs(10)).unwrap();

    let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&socket) };
    let mut guest = Guest::boot(dir.path(), &config).unwrap();
    assert_eq!(guest.ask("size").unwrap(), format!("bytes={DISK_BYTES}"));
    guest.ask("write start=16 count=4 seq=7").unwrap();
    guest.ask("flush").unwrap();
    guest.ask("discard start=17 count=1").unwrap();
    guest.ask("zeroout start=18 count=1").unwrap();
    guest.ask("verify-zero start=18 count=1").unwrap();
    let report = guest.ask("fs files=2 bytes=300000").unwrap();
    assert!(report.starts_with("bytes=600000 crc="), "{report}");

    guest.ask("load threads=2 depth=4 offset=16777216 flush-every=50").unwrap();
    for _ in 0..3 {
        guest.wait_progress(200, Duration::from_secs(60)).unwrap();
        storage.kill_and_restart(Duration::from_millis(300)).unwrap();
    }
    guest.wait_progress(200, Duration::from_secs(60)).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 600, "{totals}");
    guest.power_off().unwrap();
    assert!(backend.terminate(Duration::from_secs(10)).unwrap().success());
}
