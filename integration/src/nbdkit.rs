//! nbdkit under test: one raw file as the default export, on a Unix socket.

use crate::baton::{READY_TIMEOUT, wait_until};
use crate::daemon::Daemon;
use crate::workspace::system_program;
use anyhow::Result;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An NBD server. Killed when dropped.
#[derive(Debug)]
pub struct Nbdkit {
    /// Its process.
    pub daemon: Daemon,
    dir: PathBuf,
    name: String,
    read_delay: Duration,
}

impl Nbdkit {
    /// Starts one on `DIR/NAME.img`, a new file of this size, at `DIR/NAME.nbd`.
    pub fn start(dir: &Path, name: &str, size_bytes: u64) -> Result<Self> {
        Self::slow(dir, name, size_bytes, Duration::ZERO)
    }

    /// The same, but each read takes so long, however fast this machine is.
    pub fn slow(dir: &Path, name: &str, size_bytes: u64, read_delay: Duration) -> Result<Self> {
        File::create(dir.join(format!("{name}.img")))?.set_len(size_bytes)?;
        let daemon = launch(dir, name, read_delay)?;
        Ok(Self { daemon, dir: dir.to_owned(), name: name.to_owned(), read_delay })
    }

    /// Kills it with no warning and starts it again after a while, on the same file.
    pub fn kill_and_restart(&mut self, pause: Duration) -> Result<()> {
        self.daemon.kill()?;
        std::thread::sleep(pause);
        self.daemon = launch(&self.dir, &self.name, self.read_delay)?;
        Ok(())
    }

    /// What it exports.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.dir.join(format!("{}.img", self.name))
    }

    /// What it was asked, in order.
    pub fn asked(&self) -> Result<Vec<Asked>> {
        let text = fs::read_to_string(log(&self.dir, &self.name))?;
        Ok(text.lines().filter_map(asked).collect())
    }

    /// URI of the export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", socket(&self.dir, &self.name).display())
    }
}

/// One line of the server's log of requests: which connection, and what it asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Numbers connections, in the order in which they came.
    pub connection: u32,
    /// `Write`, `Read`, ...
    pub what: String,
}

fn asked(line: &str) -> Option<Asked> {
    // "2026-01-01 00:00:00.000000 connection=1 Write id=2 offset=... ..."; answers begin with three dots.
    let (_, rest) = line.split_once("connection=")?;
    let mut words = rest.split_whitespace();
    let connection = words.next()?.parse().ok()?;
    let what = words.next().filter(|word| !word.starts_with("..."))?;
    let known = ["Read", "Write", "Flush", "Trim", "Zero"];
    known.contains(&what).then(|| Asked { connection, what: what.to_owned() })
}

fn log(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.requests.log"))
}

fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.nbd"))
}

fn launch(dir: &Path, name: &str, read_delay: Duration) -> Result<Daemon> {
    let (socket, file) = (socket(dir, name), dir.join(format!("{name}.img")));
    let _ = fs::remove_file(&socket);
    let log = format!("logfile={}", log(dir, name).display());
    let delay = format!("rdelay={}ms", read_delay.as_millis());
    // Of several threads of a connection one may answer a client that was killed when another has
    // closed it, which ends nbdkit 1.32 (`raw_send_socket: Assertion `sock >= 0' failed`).
    let threads = if read_delay.is_zero() { "--threads=1" } else { "--threads=16" };
    let args: [&OsStr; 11] = [
        "-f".as_ref(),
        "--exit-with-parent".as_ref(),
        threads.as_ref(),
        "--filter=log".as_ref(),
        "--filter=delay".as_ref(),
        "-U".as_ref(),
        socket.as_os_str(),
        "file".as_ref(),
        file.as_os_str(),
        log.as_ref(),
        delay.as_ref(),
    ];
    let daemon = Daemon::start(dir, &format!("nbdkit-{name}"), &system_program("nbdkit")?, args)?;
    wait_until("nbdkit listens", READY_TIMEOUT, || socket.exists())?;
    Ok(daemon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_everything_else() {
        let of = |line: &str| asked(line).map(|asked| (asked.connection, asked.what));
        let at = "2026-11-29 10:00:00.000001 ";
        let write = format!("{at}connection=3 Write id=7 offset=0x0 count=0x200 fua=0 ...");
        assert_eq!(of(&write), Some((3, "Write".to_owned())));
        for other in [
            format!("{at}connection=3 ...Write id=7 return=0"),
            format!("{at}connection=3 Connect export='' tls=0 size=0x4000000"),
            format!("{at}Ready thread_model=3"),
            String::new(),
        ] {
            assert_eq!(of(&other), None, "{other}");
        }
    }
}
