//! nbdkit under test: one raw file as the default export, on a Unix socket.

use crate::baton::{READY_TIMEOUT, wait_until};
use crate::daemon::Daemon;
use crate::workspace::system_program;
use anyhow::Result;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// An NBD server. Killed when dropped.
#[derive(Debug)]
pub struct Nbdkit {
    /// Its process.
    pub daemon: Daemon,
    dir: PathBuf,
    name: String,
}

impl Nbdkit {
    /// Starts one on `DIR/NAME.img`, a new file of this size, at `DIR/NAME.nbd`.
    pub fn start(dir: &Path, name: &str, size_bytes: u64) -> Result<Self> {
        File::create(dir.join(format!("{name}.img")))?.set_len(size_bytes)?;
        let daemon = launch(dir, name)?;
        Ok(Self { daemon, dir: dir.to_owned(), name: name.to_owned() })
    }

    /// Kills it with no warning and starts it again after a while, on the same file.
    pub fn kill_and_restart(&mut self, pause: std::time::Duration) -> Result<()> {
        self.daemon.kill()?;
        std::thread::sleep(pause);
        self.daemon = launch(&self.dir, &self.name)?;
        Ok(())
    }

    /// What it exports.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.dir.join(format!("{}.img", self.name))
    }

    /// URI of the export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", socket(&self.dir, &self.name).display())
    }
}

fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.nbd"))
}

fn launch(dir: &Path, name: &str) -> Result<Daemon> {
    let (socket, file) = (socket(dir, name), dir.join(format!("{name}.img")));
    let _ = fs::remove_file(&socket);
    let args: [&OsStr; 6] = [
        "-f".as_ref(),
        "--exit-with-parent".as_ref(),
        "-U".as_ref(),
        socket.as_os_str(),
        "file".as_ref(),
        file.as_os_str(),
    ];
    let daemon = Daemon::start(dir, &format!("nbdkit-{name}"), &system_program("nbdkit")?, args)?;
    wait_until("nbdkit listens", READY_TIMEOUT, || socket.exists())?;
    Ok(daemon)
}
