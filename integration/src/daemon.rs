//! Any program run as a daemon under test: started, watched, frozen, killed.
//!
//! Everything it prints goes to a log file. It dies with the thread that started it, whatever happens to that
//! thread, so a test must not start it from a thread that ends earlier.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often a log is looked at; short, because start-up times are measured with it.
const POLL: Duration = Duration::from_millis(1);

/// How much of a log goes into an error message.
const LOG_TAIL_BYTES: usize = 4000;

/// A running program.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `program` with its output in `DIR/NAME.log`, appended to what an earlier run left there.
    pub fn start<I, S>(dir: &Path, name: &str, program: &Path, args: I) -> Result<Self>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(program);
        command.args(args);
        Self::start_command(dir, name, command)
    }

    /// Starts a prepared command, for one that needs an environment, a directory or inherited descriptors.
    pub fn start_command(dir: &Path, name: &str, mut command: Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        // Each run reads only what it wrote itself.
        let log =
            (1..).map(|n| if n == 1 { log.clone() } else { dir.join(format!("{name}.{n}.log")) });
        let log = log.into_iter().find(|p| !p.exists()).context("no free name for a log")?;
        let file =
            File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        die_with_this_thread(&mut command);
        // Ctrl-C at a terminal is for the one who started it, who then cleans up.
        command.process_group(0);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits for a line that contains `text`, and returns it.
    pub fn wait_line(&mut self, text: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            // Looked at before the log is read, so that the last words of a dead program are seen.
            let ended = self.child.try_wait()?;
            let log = self.log();
            // A line without its end may be half of one.
            let complete = &log[..log.rfind('\n').map_or(0, |n| n + 1)];
            if let Some(line) = complete.lines().find(|l| l.contains(text)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = ended {
                bail!("{} ended ({status}) before it said '{text}':\n{}", self.name, tail(&log));
            }
            if Instant::now() > deadline {
                bail!("{} did not say '{text}' in {timeout:?}:\n{}", self.name, tail(&log));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until somebody listens on the socket at `path`, without connecting: some servers serve the first
    /// connection only.
    pub fn wait_socket(&mut self, path: &Path, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !is_listening(path)? {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended ({status}) before it made {}:\n{}",
                    self.name,
                    path.display(),
                    tail(&self.log())
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not make {} in {timeout:?}:\n{}",
                    self.name,
                    path.display(),
                    tail(&self.log())
                );
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether the process is alive (a frozen one is).
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGSTOP: the process keeps its sockets and memory and does nothing. Returns when it has stopped.
    pub fn freeze(&self) -> Result<()> {
        freeze(self.process()?).with_context(|| format!("cannot freeze {}", self.name))
    }

    /// SIGCONT: goes on after [`Self::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(timeout)
    }

    /// Waits for the process to end by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end in {timeout:?}:\n{}", self.name, tail(&self.log()));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends any signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.process()?, signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Whether a thread with this name is inside this system call right now.
    pub fn thread_is_in(&self, thread: &str, syscall: libc::c_long) -> Result<bool> {
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let task = task?.path();
            // A thread may end while we look.
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.trim() != thread {
                continue;
            }
            // "running", or the number of the call and its arguments.
            let now = fs::read_to_string(task.join("syscall"))
                .with_context(|| format!("cannot see what thread {thread} does"))?;
            if now.split_whitespace().next() == Some(&syscall.to_string()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib =
            status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS in /proc")?;
        let kib: u64 =
            kib.trim().trim_end_matches(" kB").trim().parse().context("VmRSS is not a number")?;
        Ok(kib * 1024)
    }

    /// Proportional set size in bytes: shared pages are divided among their users.
    pub fn pss_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib * 1024)
    }

    /// CPU time of all its threads, to the nanosecond, with those that have ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let time = nix::time::ClockId::pid_cpu_clock_id(self.process()?)?.now()?;
        Ok(Duration::from(time))
    }

    /// Voluntary and other context switches of all threads so far: unchanged means that nothing woke up.
    pub fn context_switches(&self) -> Result<u64> {
        let mut total = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            for line in status.lines().filter(|l| l.contains("ctxt_switches:")) {
                let count = line.rsplit(':').next().unwrap_or_default().trim();
                total += count.parse::<u64>().context("a switch count is a number")?;
            }
        }
        Ok(total)
    }

    fn process(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.pid()).context("a process id is positive")?))
    }
}

/// SIGSTOP for any process, also one that somebody else has started. Returns when no thread of it runs any more.
pub fn freeze(pid: Pid) -> Result<()> {
    kill(pid, Signal::SIGSTOP)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !all_threads_stopped(pid)? {
        if Instant::now() > deadline {
            bail!("process {pid} did not stop within 5 s of SIGSTOP");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn all_threads_stopped(pid: Pid) -> Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        // The state follows the name, which is in brackets and may contain anything.
        let state = stat.rsplit(") ").next().and_then(|s| s.chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {} ({}) ----\n{}", self.name, self.log.display(), tail(&self.log()));
        }
    }
}

/// Lets the kernel kill the child when the calling thread ends, and starts it with no signal blocked: a caller that
/// waits for signals itself has them blocked, and a child would inherit that.
pub(crate) fn die_with_this_thread(command: &mut Command) {
    let none = SigSet::empty();
    // SAFETY: prctl and sigprocmask are async-signal-safe, and the set is a copy that nobody else touches.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&none), None)?)
        });
    }
}

/// Whether a Unix socket of this path listens. The file alone does not tell: it appears before that, and stays when
/// its maker is killed.
fn is_listening(path: &Path) -> Result<bool> {
    // Of the network of this thread, which a test may have made. Num RefCount Protocol Flags Type St Inode Path; the flag is the kernel's __SO_ACCEPTCON.
    let sockets = fs::read_to_string("/proc/thread-self/net/unix")?;
    let path = path.to_string_lossy();
    let listens = |line: &str| {
        let mut fields = line.split_whitespace().skip(3);
        fields.next() == Some("00010000") && line.ends_with(&format!(" {path}"))
    };
    Ok(sockets.lines().any(listens))
}

fn tail(log: &str) -> &str {
    let mut from = log.len().saturating_sub(LOG_TAIL_BYTES);
    while !log.is_char_boundary(from) {
        from += 1;
    }
    &log[from..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::TestDir;

    fn sh(dir: &TestDir, script: &str) -> Daemon {
        Daemon::start(dir.path(), "sh", Path::new("/bin/sh"), ["-c", script]).unwrap()
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn lines_are_waited_for_and_an_early_end_is_reported_with_the_log() {
        let dir = TestDir::new("daemon").unwrap();
        let mut good = sh(&dir, "echo listening at=5 >&2; sleep 60");
        assert_eq!(good.wait_line("listening", SOON).unwrap(), "listening at=5");
        let mut bad = sh(&dir, "echo no such volume >&2; exit 3");
        let error = bad.wait_line("listening", SOON).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no such volume"), "{error}");
    }

    #[test]
    fn signals_do_what_they_say() {
        let dir = TestDir::new("daemon").unwrap();
        let mut daemon = sh(&dir, "trap 'exit 0' TERM; echo up; while :; do sleep 0.01; done");
        daemon.wait_line("up", SOON).unwrap();
        daemon.freeze().unwrap();
        assert!(daemon.is_running().unwrap());
        daemon.thaw().unwrap();
        assert!(daemon.terminate(SOON).unwrap().success());
        let mut other = sh(&dir, "sleep 60");
        other.kill().unwrap();
        assert!(!other.is_running().unwrap());
    }

    #[test]
    fn a_socket_listens_only_when_it_does() {
        let dir = TestDir::new("daemon").unwrap();
        let path = dir.join("s");
        assert!(!is_listening(&path).unwrap());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path).unwrap());
        drop(listener);
        assert!(path.exists() && !is_listening(&path).unwrap());
    }

    #[test]
    fn dropping_kills() {
        let dir = TestDir::new("daemon").unwrap();
        let daemon = sh(&dir, "sleep 60");
        let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
        assert!(proc.exists());
        drop(daemon);
        assert!(!proc.exists());
    }
}
