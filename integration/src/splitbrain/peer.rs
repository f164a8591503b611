//! The usual shared storage: one raw file that both hosts can open, and a qemu-storage-daemon on each host.

use super::{QUEUES, Stack};
use crate::daemon::Daemon;
use crate::qsd::{StorageDaemon, raw_file};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Size of the volume.
const DISK_BYTES: u64 = 64 << 20;

/// Two qemu-storage-daemons on one file.
#[derive(Debug)]
pub struct SharedFile {
    dir: PathBuf,
    disk: PathBuf,
    source: StorageDaemon,
    destination: Option<StorageDaemon>,
}

impl SharedFile {
    /// Starts the source's.
    pub fn start(dir: &Path) -> Result<Self> {
        let disk = dir.join("disk.img");
        raw_file(&disk, DISK_BYTES)?;
        let source = StorageDaemon::start(dir, "source-disk", &disk, QUEUES)?;
        Ok(Self { dir: dir.to_owned(), disk, source, destination: None })
    }
}

impl Stack for SharedFile {
    fn name(&self) -> String {
        "qemu-storage-daemon".to_owned()
    }

    fn source_socket(&self) -> PathBuf {
        self.source.socket.clone()
    }

    fn prepare_destination(&mut self) -> Result<PathBuf> {
        let daemon = StorageDaemon::start(&self.dir, "destination-disk", &self.disk, QUEUES)?;
        let socket = daemon.socket.clone();
        self.destination = Some(daemon);
        Ok(socket)
    }

    fn source_backend(&mut self) -> &mut Daemon {
        &mut self.source.daemon
    }
}
