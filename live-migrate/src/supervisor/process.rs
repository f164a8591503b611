//! Processes by number and start time, so that a number that the kernel gave to
//! somebody else is not taken for ours.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::runner::Launch;
use crate::problem::found_no_room;

/// How often a process that is not our child is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// One process, for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProcessId {
    pub(super) pid: i32,
    /// Clock ticks since boot (proc(5), field 22 of stat).
    start_ticks: u64,
    /// Of which boot.
    boot_id: String,
}

impl ProcessId {
    /// Of a process that runs now; `None` when there is none.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let Stat { state, start_ticks } = parse_stat(&stat)?;
        let gone = matches!(state, b'Z' | b'X' | b'x');
        (!gone).then(|| Self { pid, start_ticks, boot_id: boot_id() })
    }

    /// Whether it still runs.
    pub(super) fn runs(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Whether it ran since this host's last boot.
    pub(super) fn is_of_this_boot(&self) -> bool {
        self.boot_id == boot_id()
    }

    /// Signals it if it still runs.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        if !self.runs() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for its end. True: the kernel told it, by the [descriptor](Self::descriptor)
    /// of this very process, of all its threads.
    pub(super) async fn ended(&self, descriptor: Option<&OwnedFd>) -> bool {
        if let Some(process) = descriptor.and_then(|fd| fd.try_clone().ok()) {
            // SAFETY: an owned descriptor is what it shows for as long as it lives.
            let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
            if let Ok(process) = process {
                return process.readable().await.is_ok();
            }
        }
        while self.runs() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        false
    }

    /// pidfd_open(2): readable once it has ended. To be had while it runs: afterwards
    /// there is only a number, which proves nothing.
    pub(super) fn descriptor(&self) -> Option<OwnedFd> {
        // SAFETY: takes two numbers, gives a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: just made, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The number may have been another's by then.
        self.runs().then_some(fd)
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    start_ticks: u64,
}

/// proc(5): "pid (comm) state ppid ...", where comm may hold anything.
fn parse_stat(stat: &[u8]) -> Option<Stat> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    // `state` is field 3.
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_ticks })
}

/// All records are so long, so that one can be written over another.
const RECORD_BYTES: usize = 512;

/// What is remembered of a backend while the agent is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) process: ProcessId,
    pub(super) standby: bool,
    /// As a backend takes it. Left out where there is none, so that an agent that
    /// does not know of it understands the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) only_for: Option<String>,
}

impl Record {
    pub(super) fn of(process: ProcessId, launch: &Launch) -> Self {
        let only_for = launch.only_for.map(|attempt| attempt.to_string());
        Self { process, standby: launch.standby, only_for }
    }

    /// `None` when there is none, or what is there is not ours to understand.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let text = fs::read(path).ok()?;
        match serde_json::from_slice(&text) {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a pid file is damaged and ignored");
                None
            }
        }
    }

    /// Replaces what was there at once. On a full disk there is room for it only in
    /// the file that is there, so it is written over that.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec(self)?;
        text.resize(RECORD_BYTES.max(text.len()), b' ');
        let new = path.with_extension("new");
        match fs::write(&new, &text).and_then(|()| fs::rename(&new, path)) {
            Err(error) if found_no_room(&error) && path.exists() => {
                File::options().write(true).open(path)?.write_all(&text)
            }
            done => done,
        }
    }

    /// There is none any more.
    pub(super) fn remove(path: &Path) {
        for path in [path, &path.with_extension("new")] {
            let _ = fs::remove_file(path);
        }
    }

    /// Fails where a record could not be written. What it writes is the next record's place.
    pub(super) fn make_room(path: &Path) -> io::Result<()> {
        fs::write(path.with_extension("new"), [b' '; RECORD_BYTES])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::process::{Command, Stdio};

    #[test]
    fn a_recycled_number_is_somebody_else() {
        let mut child =
            Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep");
        let pid = i32::try_from(child.id()).expect("pid");
        let process = ProcessId::of(pid).expect("runs");
        assert!(process.runs());
        let later = ProcessId { start_ticks: process.start_ticks + 1, ..process.clone() };
        let other_boot = ProcessId { boot_id: "x".to_owned(), ..process.clone() };
        assert!(!later.runs() && !other_boot.runs() && !other_boot.is_of_this_boot());
        later.signal(Signal::SIGKILL).expect("not signalled");
        assert!(process.runs(), "somebody else was spared");
        process.signal(Signal::SIGKILL).expect("signalled");
        // A zombie runs no more, also before it is reaped.
        while process.runs() {
            std::thread::yield_now();
        }
        child.wait().expect("reaped");
        assert_eq!(ProcessId::of(pid), None);
    }

    #[test]
    fn a_name_may_hold_anything() {
        let stat = b"7 (a) R (b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(parse_stat(stat), Some(Stat { state: b'S', start_ticks: 4711 }));
    }

    #[test]
    fn records_are_read_back_and_damage_is_none() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("vm.json");
        assert_eq!(Record::read(&path), None);
        let me = i32::try_from(std::process::id()).expect("pid");
        let process = ProcessId::of(me).expect("runs");
        let old = json!({"process": process, "standby": true});
        let attempt = "01ARZ3NDEKTSV4RRFFQ69G5FAV/2".to_owned();
        for only_for in [None, Some(attempt)] {
            let record = Record { process: process.clone(), standby: true, only_for };
            record.write(&path).expect("written");
            assert_eq!(Record::read(&path), Some(record));
        }
        // One that an agent wrote before there were tries, and the same back.
        fs::write(&path, old.to_string()).expect("write");
        let record = Record::read(&path).expect("understood");
        assert_eq!((record.standby, &record.only_for), (true, &None));
        assert_eq!(serde_json::to_value(&record).expect("JSON"), old);
        fs::write(&path, "{").expect("write");
        assert_eq!(Record::read(&path), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe(stat in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_stat(&stat);
        }
    }
}
