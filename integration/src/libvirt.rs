//! Two hosts of libvirt on one machine: each is a libvirtd of its own, with its own directories and host UUID.
//!
//! A libvirtd that runs as root is always the system's own, so a root test runs it as the user "nobody" in session mode;
//! any other user runs it as itself. What libvirt starts belongs to that user: [`Host::open_to`] lets it reach a file or
//! a socket of the test.
//!
//! libvirt reads hooks from one fixed folder of the machine, /etc/libvirt/hooks, in session mode as well. With a
//! [`Hook`], the host gets a mount namespace in which that folder is its own, so that nothing of the machine is touched
//! and two hosts have two hooks; only root can do that.

use crate::daemon::Daemon;
use crate::guest::GuestFiles;
use crate::port::free_port;
use crate::probe::Probe;
use crate::qemu::{COMMAND_LINE, accelerator};
use crate::workspace::{system_program, target_dir};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Uid, chown, geteuid};
use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// libvirtd probes QEMU when it starts, which takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// For one virsh, migrations included.
const VIRSH_TIMEOUT_S: u32 = 120;

/// "nobody" and its group, on Debian.
const NOBODY: u32 = 65534;

/// Run by libvirt when something happens to a guest; see libvirt's own documentation for its arguments.
#[derive(Clone, Debug, Default)]
pub struct Hook {
    /// The program or script to install as `qemu`. It runs as the user of libvirtd, so the test's copy of it does.
    pub program: PathBuf,
    /// Variables it sees; libvirt itself hands almost none on.
    pub environment: Vec<(String, String)>,
}

/// A guest as libvirt shall run it.
#[derive(Clone, Debug)]
pub struct Domain {
    /// The guest's name, the same on both hosts.
    pub name: String,
    /// The vhost-user socket of its disk, on this host.
    pub disk: PathBuf,
    /// Queues of the disk.
    pub queues: u16,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u32,
}

impl Domain {
    /// One CPU and one disk with one queue.
    #[must_use]
    pub fn new(name: &str, disk: &Path) -> Self {
        Self { name: name.to_owned(), disk: disk.to_owned(), queues: 1, cpus: 1, memory_mib: 192 }
    }
}

/// A libvirtd, and what it runs. Dropping it ends both.
#[derive(Debug)]
pub struct Host {
    name: String,
    dir: PathBuf,
    daemon: Daemon,
    files: GuestFiles,
}

/// Says what is missing for this module; `None` when nothing is.
#[must_use]
pub fn missing() -> Option<String> {
    let need = ["libvirtd", "virsh", "setpriv"];
    need.iter().find_map(|name| system_program(name).err()).map(|e| format!("{e:#}"))
}

/// Why a host cannot have a [`Hook`] here; `None` when it can.
#[must_use]
pub fn no_hooks() -> Option<String> {
    let works = Command::new("unshare").args(["--mount", "true"]).status();
    let why = "hooks need root and mount namespaces".to_owned();
    (!works.is_ok_and(|status| status.success())).then_some(why)
}

impl Host {
    /// Starts one in `dir/NAME`.
    pub fn start(dir: &Path, name: &str, hook: Option<&Hook>) -> Result<Self> {
        let own = dir.join(name);
        for folder in ["run", "config/libvirt", "cache", "home", "guest"] {
            fs::create_dir_all(own.join(folder))?;
        }
        fs::set_permissions(own.join("run"), Permissions::from_mode(0o700))?;
        // The test's directory is its owner's alone.
        fs::set_permissions(dir, Permissions::from_mode(0o755))?;
        let host_uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let config = own.join("config/libvirt/libvirtd.conf");
        let log = own.join("libvirtd.log");
        fs::write(
            &config,
            format!(
                "host_uuid = \"{}\"\nlog_outputs = \"2:file:{}\"\n",
                host_uuid.trim(),
                log.display()
            ),
        )?;
        fs::write(
            own.join("config/libvirt/qemu.conf"),
            "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nmax_core = 0\n",
        )?;
        let files = own_files(&own.join("guest"))?;
        give_away(&own)?;

        let mut command = match hook {
            Some(hook) => with_hook(&own, hook)?,
            None => Command::new(system_program("env")?),
        };
        as_user(&mut command)?;
        command.arg(system_program("libvirtd")?).arg("-f").arg(&config);
        command.arg("-p").arg(own.join("libvirtd.pid"));
        environment(&mut command, &own);
        let daemon = Daemon::start_command(dir, &format!("libvirtd-{name}"), command)?;
        let mut host = Self { name: name.to_owned(), dir: own, daemon, files };
        host.daemon.wait_socket(&host.dir.join("run/libvirt/libvirt-sock"), START_TIMEOUT)?;
        // It listens before it can answer.
        host.virsh(&["version"]).with_context(|| host.log())?;
        Ok(host)
    }

    /// Lets the user of libvirtd use a file or a socket of the test.
    pub fn open_to(path: &Path) -> Result<()> {
        fs::set_permissions(path, Permissions::from_mode(0o666))
            .with_context(|| format!("cannot open {} to everybody", path.display()))
    }

    /// Runs the operator's command on this host and returns what it printed.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(system_program("timeout")?);
        command.arg(VIRSH_TIMEOUT_S.to_string());
        as_user(&mut command)?;
        command.arg(system_program("virsh")?).args(["-q", "-c", &self.uri()]).args(args);
        environment(&mut command, &self.dir);
        let output = command.output().context("cannot run virsh")?;
        if !output.status.success() {
            bail!(
                "virsh {} on host {}: {}",
                args.join(" "),
                self.name,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a guest here that is forgotten when it ends.
    pub fn create(&self, domain: &Domain) -> Result<()> {
        let xml = self.write_xml(domain)?;
        self.virsh(&["create", &xml]).map(drop).with_context(|| self.log())
    }

    /// Moves a running guest to another host, as an operator does; `there` is the guest as it is to be over there.
    pub fn migrate(&self, to: &Self, there: &Domain) -> Result<()> {
        let xml = to.write_xml(there)?;
        // libvirt wants a number.
        let port = free_port()?.port();
        let stream = format!("tcp://127.0.0.1:{port}");
        let args = ["migrate", "--live", &there.name, &to.uri(), "--migrateuri", &stream];
        let more = ["--listen-address", "127.0.0.1", "--xml", &xml];
        self.virsh(&[args.as_slice(), &more].concat())
            .map(drop)
            .with_context(|| format!("{}\n{}", self.log(), to.log()))
    }

    /// What libvirt says of a guest: "running", "paused", ...; an error when it knows no such guest.
    pub fn state(&self, name: &str) -> Result<String> {
        self.virsh(&["domstate", name])
    }

    /// Connects to the probe in a guest that runs, or will run, here.
    pub fn probe(&self, domain: &Domain) -> Result<Probe> {
        let socket = self.guest_file(domain, "probe");
        Probe::connect(&socket, &self.guest_file(domain, "probe.log"))
    }

    /// What the program of [`Hook`] can write to, as its `$HOME`.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        self.dir.join("home")
    }

    /// The host's libvirtd.
    #[must_use]
    pub fn process(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// For `virsh -c` and for a migration to here.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("qemu:///session?socket={}/run/libvirt/libvirt-sock", self.dir.display())
    }

    /// What libvirtd complained about so far.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("libvirtd.log")).unwrap_or_default();
        format!("libvirtd of host {}:\n{}", self.name, String::from_utf8_lossy(&log))
    }

    fn guest_file(&self, domain: &Domain, suffix: &str) -> PathBuf {
        self.dir.join("guest").join(format!("{}.{suffix}", domain.name))
    }

    fn write_xml(&self, domain: &Domain) -> Result<String> {
        let path = self.guest_file(domain, "xml");
        fs::write(&path, self.xml(domain)?)?;
        Ok(path.display().to_string())
    }

    fn xml(&self, domain: &Domain) -> Result<String> {
        let Domain { name, disk, queues, cpus, memory_mib } = domain;
        let kind = if accelerator() == "kvm" { "kvm" } else { "qemu" };
        let emulator = system_program("qemu-system-x86_64")?;
        let (emulator, uuid) = (emulator.display(), uuid(name));
        let (kernel, initrd) = (self.files.kernel.display(), self.files.initramfs.display());
        let (console, probe) =
            (self.guest_file(domain, "console"), self.guest_file(domain, "probe"));
        let (console, probe, disk) = (console.display(), probe.display(), disk.display());
        // The probe's line is the second serial port, as without libvirt; nothing in a path needs escaping here.
        Ok(format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{COMMAND_LINE}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>Nehalem</model></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{console}'/><target type='isa-serial' port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{probe}'/><target type='isa-serial' port='1'/></serial>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw' queues='{queues}'/>
      <source type='unix' path='{disk}'><reconnect enabled='yes' timeout='1'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
",
        ))
    }

    /// Process ids of the QEMUs that run here, as libvirt noted them.
    fn guests(&self) -> Vec<nix::unistd::Pid> {
        let notes = fs::read_dir(self.dir.join("run/libvirt/qemu/run")).into_iter().flatten();
        let pids = notes.flatten().map(|note| note.path());
        let pids = pids.filter(|path| path.extension().is_some_and(|e| e == "pid"));
        let pids = pids.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
        pids.map(nix::unistd::Pid::from_raw).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // libvirtd first, or else it would look after the dead. Its guests are no children of ours.
        let guests = self.guests();
        let _ = self.daemon.kill();
        for pid in guests {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// A guest that moves keeps its identity, and another guest has another.
fn uuid(name: &str) -> String {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    format!("5ba70000-0000-4000-8000-{:012x}", hasher.finish() >> 16)
}

/// The guest's kernel may be where only its owner can read it.
fn own_files(dir: &Path) -> Result<GuestFiles> {
    let files = GuestFiles::prepare(dir)?;
    let kernel = dir.join("vmlinuz");
    fs::copy(target_dir()?.join("guest/vmlinuz"), &kernel)?;
    Ok(GuestFiles { kernel, ..files })
}

/// Prefixes what a command runs with the change to the user of libvirtd.
fn as_user(command: &mut Command) -> Result<()> {
    if geteuid().is_root() {
        command.arg(system_program("setpriv")?).args([
            &format!("--reuid={NOBODY}"),
            &format!("--regid={NOBODY}"),
            "--clear-groups",
            // A change of the user clears what `Daemon` asked for.
            "--pdeathsig=KILL",
        ]);
    }
    Ok(())
}

fn give_away(dir: &Path) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(NOBODY), nix::unistd::Gid::from_raw(NOBODY));
    chown(dir, Some(user), Some(group))?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            give_away(&path)?;
        } else {
            chown(&path, Some(user), Some(group))?;
        }
    }
    Ok(())
}

fn environment(command: &mut Command, dir: &Path) {
    command.env("XDG_RUNTIME_DIR", dir.join("run"));
    command.env("XDG_CONFIG_HOME", dir.join("config"));
    command.env("XDG_CACHE_HOME", dir.join("cache"));
    command.env("HOME", dir.join("home"));
}

/// A shell that puts the host's own folder over /etc/libvirt, for itself only, and then runs its arguments.
fn with_hook(dir: &Path, hook: &Hook) -> Result<Command> {
    if !geteuid().is_root() {
        bail!("a hook needs root, to hide /etc/libvirt from libvirtd; run the test as root");
    }
    let hooks = dir.join("etc/hooks");
    fs::create_dir_all(&hooks)?;
    let program = hooks.join("program");
    fs::copy(&hook.program, &program)
        .with_context(|| format!("cannot read {}", hook.program.display()))?;
    let mut script = "#!/bin/sh\n".to_owned();
    for (name, value) in &hook.environment {
        script += &format!("export {name}='{}'\n", value.replace('\'', "'\\''"));
    }
    script += &format!("exec {} \"$@\"\n", program.display());
    fs::write(hooks.join("qemu"), script)?;
    for path in [program, hooks.join("qemu")] {
        fs::set_permissions(path, Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new(system_program("unshare")?);
    command.args(["--mount", "sh", "-c"]);
    command.arg("mount --bind \"$0\" /etc/libvirt && exec \"$@\"").arg(dir.join("etc"));
    Ok(command)
}
