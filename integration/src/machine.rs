//! A host whose init is systemd: a container on this machine's root and network, in which Baton's own units run as they
//! are installed. `machine.sh` says what is in it.

use crate::daemon::Daemon;
use crate::guest::skip_if;
use crate::workspace::{program, system_program};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const BOOT: &str = include_str!("machine.sh");
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A running machine. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Machine {
    name: String,
    init: Pid,
    container: Daemon,
    /// Of all in it.
    cgroup: PathBuf,
}

/// True when a test that needs systemd has to be skipped; says so, loudly.
///
/// # Panics
/// When it is missing and `BATON_REQUIRE_QEMU=1` says that everything must be there.
#[must_use]
pub fn skip_without_systemd(test: &str) -> bool {
    let need = || -> Result<()> {
        system_program("systemd-nspawn").map(drop)?;
        if !nix::unistd::geteuid().is_root() {
            bail!("only root can make a container that boots");
        }
        Ok(())
    };
    skip_if(test, need().err().map(|error| format!("{error:#}")))
}

impl Machine {
    /// Boots `name` with the project's units and these files in `/etc/baton`: path there and content.
    pub fn boot(dir: &Path, name: &str, files: &[(&str, String)]) -> Result<Self> {
        let own = dir.join(name);
        let units = own.join("units");
        fs::create_dir_all(&units)?;
        for unit in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/systemd"))?
        {
            let unit = unit?;
            fs::copy(unit.path(), units.join(unit.file_name()))?;
        }
        fs::create_dir_all(own.join("baton/vm"))?;
        for (path, content) in files {
            let path = own.join("baton").join(path);
            fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
            fs::write(path, content)?;
        }
        let programs = program("baton-backend")?;
        let programs = programs.parent().context("a program is in a directory")?;
        let mut boot = Command::new(system_program("unshare")?);
        boot.args(["--mount", "bash", "-c", BOOT, "machine.sh"]).arg(dir).arg(name).arg(programs);
        let mut container = Daemon::start_command(&own, "machine", boot)?;
        let init = init(&mut container)?;
        let cgroup = cgroup(&container)?;
        let machine = Self { name: name.to_owned(), init, container, cgroup };
        let deadline = Instant::now() + BOOT_TIMEOUT;
        // Fails until systemd listens, and says "starting" until it has started what it is to start.
        while machine.systemctl(&["is-system-running"]).is_err() {
            if Instant::now() > deadline {
                bail!("{name} does not boot:\n{}", machine.container.log());
            }
            std::thread::sleep(POLL);
        }
        Ok(machine)
    }

    /// A program in it, not started yet.
    pub fn command(&self, program: &str) -> Result<Command> {
        let mut command = Command::new(system_program("nsenter")?);
        let init = self.init.to_string();
        command
            .args(["--target", &init, "--mount", "--pid", "--uts", "--ipc", "--cgroup", program]);
        Ok(command)
    }

    /// Runs a program in it, which must work, and returns what it said.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program)?.args(args).output()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("{}: {program} {}: {said} {error}", self.name, args.join(" "));
        }
        Ok(said)
    }

    /// Tells its systemd something.
    pub fn systemctl(&self, args: &[&str]) -> Result<String> {
        self.run("systemctl", args)
    }

    /// Starts a unit; its journal is in the error.
    pub fn start(&self, unit: &str) -> Result<()> {
        self.systemctl(&["start", unit]).map(drop).with_context(|| self.journal())
    }

    /// Puts a line into effect that a unit has as a comment, before it is started.
    pub fn uncomment(&self, unit: &str, starts: &str) -> Result<()> {
        let file = format!("{unit}.service");
        let text = fs::read_to_string(self.path("/etc/systemd/system").join(&file))?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix('#'));
        let line = lines.find(|line| line.starts_with(starts));
        let line = line.with_context(|| format!("{unit} has no comment {starts}"))?;
        let dir = self.path("/run/systemd/system").join(file + ".d");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("uncommented.conf"), format!("[Service]\n{line}\n"))?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    /// A unit's property, such as `MainPID`.
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        self.systemctl(&["show", "--value", "--property", property, unit])
    }

    /// The main process of a unit, as this machine numbers it.
    pub fn main_pid(&self, unit: &str) -> Result<i32> {
        let pid: i32 = self.property(unit, "MainPID")?.parse()?;
        if pid == 0 { bail!("{unit} has no process on {}", self.name) } else { Ok(pid) }
    }

    /// Everything that was logged in it.
    #[must_use]
    pub fn journal(&self) -> String {
        self.run("journalctl", &["--no-pager", "--output=short-precise"])
            .unwrap_or_else(|error| error.to_string())
    }

    /// A path of it, seen from outside.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All that runs in it ends with its init.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.container.kill();
        remove_cgroups(&self.cgroup);
    }
}

/// The container's first process, which is systemd from some moment on.
fn init(container: &mut Daemon) -> Result<Pid> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    loop {
        let pid = container.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        for child in children.unwrap_or_default().split_ascii_whitespace() {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if name.trim() == "systemd" {
                return Ok(Pid::from_raw(child.parse()?));
            }
        }
        if !container.is_running()? || Instant::now() > deadline {
            bail!("no systemd runs in the container:\n{}", container.log());
        }
        std::thread::sleep(POLL);
    }
}

/// The branch of the tree of cgroups that `machine.sh` made.
fn cgroup(container: &Daemon) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let tree = mounts.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [_, at, "cgroup2", ..] => Some(at.to_owned()),
        _ => None,
    });
    let of = fs::read_to_string(format!("/proc/{}/cgroup", container.pid()))?;
    let own = of.lines().find_map(|line| line.strip_prefix("0::/")).context("a cgroup")?;
    // The container may be in a branch of it by now.
    let own = own.split('/').next().filter(|name| name.starts_with("baton-")).context("its own")?;
    Ok(Path::new(&tree.context("a tree of cgroups")?).join(own))
}

/// Leaves first, once all that was in it has ended.
fn remove_cgroups(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let lives = |events: String| events.contains("populated 1");
    while fs::read_to_string(path.join("cgroup.events")).is_ok_and(lives)
        && Instant::now() < deadline
    {
        std::thread::sleep(POLL);
    }
    for child in fs::read_dir(path).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&child.path());
        }
    }
    // Nothing more to do with one that somebody is still in.
    let _ = fs::remove_dir(path);
}
