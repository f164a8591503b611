//! A storage server whose disk does not answer, without such a disk: the thread that waits for it stands still, and the
//! files of a dead server stay open, as the kernel keeps them for what it still has to do.

use crate::daemon::Daemon;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::null_mut;

/// A thread of a process that stands still while the others run. It goes on when this is dropped, on the thread that
/// made it.
#[derive(Debug)]
pub struct StalledThread {
    id: libc::pid_t,
}

impl StalledThread {
    /// Stops the thread with this name.
    pub fn stop(daemon: &Daemon, name: &str) -> Result<Self> {
        let mut tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid()))?.flatten();
        let named = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let task = tasks.find(named).with_context(|| format!("there is no thread {name}"))?;
        let id = task.file_name().to_string_lossy().parse()?;
        trace(libc::PTRACE_SEIZE, id).with_context(|| format!("cannot trace thread {name}"))?;
        let this = Self { id };
        trace(libc::PTRACE_INTERRUPT, id)?;
        this.wait()?;
        Ok(this)
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: waits for a thread that this one traces; nobody wants its status.
        Errno::result(unsafe { libc::waitpid(self.id, null_mut(), libc::__WALL) })?;
        Ok(())
    }
}

impl Drop for StalledThread {
    fn drop(&mut self) {
        // One that was killed with its process is not dead before it was waited for.
        if trace(libc::PTRACE_DETACH, self.id).is_err() {
            let _ = self.wait();
        }
    }
}

fn trace(what: libc::c_uint, id: libc::pid_t) -> Result<()> {
    let none = null_mut::<libc::c_void>();
    // SAFETY: these requests look at no address.
    Errno::result(unsafe { libc::ptrace(what, id, none, none) })?;
    Ok(())
}

/// The open file of a process that has this path: with its locks, which last until the last copy is gone.
pub fn open_file_of(daemon: &Daemon, path: &Path) -> Result<File> {
    let pid = daemon.pid();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let number: i32 = entry.file_name().to_string_lossy().parse()?;
            return Ok(File::from(copy_of(pid, number)?));
        }
    }
    bail!("process {pid} has not opened {}", path.display())
}

fn copy_of(pid: u32, number: i32) -> Result<OwnedFd> {
    let owned = |fd: libc::c_long| -> Result<OwnedFd> {
        let fd = i32::try_from(Errno::result(fd)?)?;
        // SAFETY: new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: no memory is named.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
        .context("cannot copy a descriptor of another process")
}
