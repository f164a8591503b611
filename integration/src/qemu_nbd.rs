//! qemu-nbd under test: one raw file as the default export, on a Unix socket.

use crate::baton::READY_TIMEOUT;
use crate::daemon::Daemon;
use crate::workspace::system_program;
use anyhow::Result;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

/// An NBD server that takes so many clients at a time and outlives them. Killed when dropped.
#[derive(Debug)]
pub struct QemuNbd {
    /// Its process.
    pub daemon: Daemon,
    socket: PathBuf,
}

impl QemuNbd {
    /// Starts one on `DIR/NAME.img`, a new file of this size, at `DIR/NAME.nbd`. With more than one client at a time
    /// it says CAN_MULTI_CONN.
    pub fn start(dir: &Path, name: &str, size_bytes: u64, clients: u32) -> Result<Self> {
        let (file, socket) = (dir.join(format!("{name}.img")), dir.join(format!("{name}.nbd")));
        File::create(&file)?.set_len(size_bytes)?;
        let shared = format!("--shared={clients}");
        let args: [&OsStr; 6] = [
            "--format=raw".as_ref(),
            "--persistent".as_ref(),
            shared.as_ref(),
            "--socket".as_ref(),
            socket.as_ref(),
            file.as_ref(),
        ];
        let program = system_program("qemu-nbd")?;
        let mut daemon = Daemon::start(dir, &format!("qemu-nbd-{name}"), &program, args)?;
        daemon.wait_socket(&socket, READY_TIMEOUT)?;
        Ok(Self { daemon, socket })
    }

    /// URI of the export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}
