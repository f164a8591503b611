//! What several tests of the harness share.

use baton_integration::daemon::Daemon;
use baton_integration::guest::skip_without_program;
use baton_integration::workspace::{TestDir, system_program};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

#[allow(dead_code, reason = "not every test compares the size")]
pub(crate) const DISK_BYTES: u64 = 64 << 20;

#[allow(dead_code, reason = "tests with a guest need more than this daemon")]
pub(crate) fn skip_without_storage_daemon(test: &str) -> bool {
    skip_without_program(test, "qemu-storage-daemon")
}

/// qemu-storage-daemon serving `disk.img` of the directory as a vhost-user disk.
pub(crate) fn storage_daemon(dir: &TestDir, queues: u16) -> (Daemon, PathBuf) {
    let disk = dir.join("disk.img");
    if !disk.exists() {
        File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    }
    let socket = dir.join("disk.sock");
    let program = system_program("qemu-storage-daemon").unwrap();
    let args = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=disk,filename={},discard=unmap", disk.display()),
        "--export".to_owned(),
        format!(
            "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        ),
    ];
    let mut daemon = Daemon::start(dir.path(), "qsd", &program, args).unwrap();
    daemon.wait_socket(&socket, Duration::from_secs(10)).unwrap();
    (daemon, socket)
}
