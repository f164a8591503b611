//! What several tests of the harness share.

use baton_integration::daemon::Daemon;
use baton_integration::guest::skip_without_program;
use baton_integration::qsd::{StorageDaemon, raw_file};
use baton_integration::workspace::TestDir;
use std::path::PathBuf;

#[allow(dead_code, reason = "not every test compares the size")]
pub(crate) const DISK_BYTES: u64 = 64 << 20;

#[allow(dead_code, reason = "tests with a guest need more than this daemon")]
pub(crate) fn skip_without_storage_daemon(test: &str) -> bool {
    skip_without_program(test, "qemu-storage-daemon")
}

/// qemu-storage-daemon serving `disk.img` of the directory as a vhost-user disk.
pub(crate) fn storage_daemon(dir: &TestDir, queues: u16) -> (Daemon, PathBuf) {
    let disk = dir.join("disk.img");
    raw_file(&disk, DISK_BYTES).unwrap();
    let StorageDaemon { daemon, socket } =
        StorageDaemon::start(dir.path(), "disk", &disk, queues).unwrap();
    (daemon, socket)
}
