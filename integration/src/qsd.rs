//! The peer: qemu-storage-daemon, serving a raw file as a vhost-user disk.

use crate::daemon::Daemon;
use crate::workspace::system_program;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// It is there at once; this is for a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// One that runs. Killed when dropped.
#[derive(Debug)]
pub struct StorageDaemon {
    /// Its process.
    pub daemon: Daemon,
    /// Where a VMM connects.
    pub socket: PathBuf,
}

impl StorageDaemon {
    /// Serves `disk` at `dir/NAME.sock`, with the daemon's own choice of locks and caches.
    pub fn start(dir: &Path, name: &str, disk: &Path, queues: u16) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let args = [
            "--blockdev".to_owned(),
            format!("driver=file,node-name=disk,filename={},discard=unmap", disk.display()),
            "--export".to_owned(),
            format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ),
        ];
        let program = system_program("qemu-storage-daemon")?;
        let mut daemon = Daemon::start(dir, name, &program, args)?;
        daemon.wait_socket(&socket, START_TIMEOUT)?;
        Ok(Self { daemon, socket })
    }
}

/// A file of zeros for it to serve, unless it exists.
pub fn raw_file(path: &Path, bytes: u64) -> Result<()> {
    if !path.exists() {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        file.set_len(bytes)?;
    }
    Ok(())
}
