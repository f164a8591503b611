//! A real guest: QEMU with vhost-user disks, its console in a file, its probe on a serial line, its QMP socket.
//!
//! KVM is used where a guest really runs under it, which a /dev/kvm that opens does not prove; else TCG.
//! `BATON_ACCEL=tcg` or `kvm` decides instead.

use crate::daemon::Daemon;
use crate::guest::GuestFiles;
use crate::probe::{ASK_TIMEOUT, Probe};
use crate::qmp::Qmp;
use crate::workspace::{TestDir, system_program, target_dir};
use anyhow::{Context, Result, bail};
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// A boot under TCG takes 2.5 s on an idle machine; this is for a busy one.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// A kernel under KVM says its first words in well under a second.
const KVM_TRIAL_TIMEOUT: Duration = Duration::from_secs(8);

/// For the guest's kernel, which would otherwise check that an emulated timer ticks in time, and panic on a busy machine.
pub(crate) const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet no_timer_check";

/// What to boot.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Names the guest's files in its directory; two guests of one test need two names.
    pub name: String,
    /// One vhost-user-blk disk for each: vda, vdb, ...
    pub sockets: Vec<PathBuf>,
    /// Queues of each disk.
    pub queues: u16,
    /// Descriptors in each queue.
    pub queue_size: u16,
    /// Guest memory.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// How often QEMU tries to reach a backend that went away; `None` for never.
    pub reconnect_ms: Option<u32>,
    /// Waits for an incoming migration instead of booting.
    pub incoming: bool,
    /// More arguments for QEMU.
    pub extra_args: Vec<String>,
}

impl GuestConfig {
    /// One CPU and one disk with one queue.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            name: "guest".to_owned(),
            sockets: vec![socket.to_path_buf()],
            queues: 1,
            queue_size: 128,
            memory_mib: 192,
            cpus: 1,
            reconnect_ms: Some(20),
            incoming: false,
            extra_args: Vec::new(),
        }
    }

    /// What QEMU is started with, its files and sockets in `dir`.
    #[must_use]
    pub fn arguments(&self, dir: &Path, files: &GuestFiles) -> Vec<String> {
        let path = |suffix: &str| dir.join(format!("{}.{suffix}", self.name)).display().to_string();
        let memory = format!("{}M", self.memory_mib);
        let mut args: Vec<String> = [
            "-name",
            // Names QEMU's threads, so that a test can see what one of them waits for.
            &format!("{},debug-threads=on", self.name),
            "-accel",
            accelerator(),
            "-machine",
            "q35,memory-backend=mem0",
            // Has the CRC instruction the probe uses, and no long feature list to emulate.
            "-cpu",
            "Nehalem",
            "-m",
            &memory,
            "-smp",
            &self.cpus.to_string(),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-object",
            // vhost-user needs memory that another process can map.
            &format!("memory-backend-memfd,id=mem0,size={memory},share=on"),
            "-kernel",
            &files.kernel.display().to_string(),
            "-initrd",
            &files.initramfs.display().to_string(),
            "-append",
            COMMAND_LINE,
            "-chardev",
            &format!("file,id=console,path={}", path("console")),
            "-serial",
            "chardev:console",
            "-chardev",
            &format!("socket,id=probe,path={},server=on,wait=off", path("probe")),
            "-serial",
            "chardev:probe",
            "-qmp",
            &format!("unix:{},server=on,wait=off", path("qmp")),
            "-msg",
            "timestamp=on",
        ]
        .map(str::to_owned)
        .into();
        for (i, socket) in self.sockets.iter().enumerate() {
            let reconnect =
                self.reconnect_ms.map_or(String::new(), |ms| format!(",reconnect-ms={ms}"));
            args.extend([
                "-chardev".to_owned(),
                format!("socket,id=disk{i},path={}{reconnect}", socket.display()),
            ]);
            let (queues, size) = (self.queues, self.queue_size);
            let device = format!(
                "vhost-user-blk-pci,id=blk{i},chardev=disk{i},num-queues={queues},queue-size={size}"
            );
            args.extend(["-device".to_owned(), device]);
        }
        if self.incoming {
            args.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        args.extend(self.extra_args.iter().cloned());
        args
    }
}

/// A running guest. Dropping it kills QEMU. What it is asked goes to its [`Probe`].
#[derive(Debug)]
pub struct Guest {
    qemu: Daemon,
    probe: Probe,
    console: PathBuf,
    qmp_path: PathBuf,
}

impl Deref for Guest {
    type Target = Probe;

    fn deref(&self) -> &Probe {
        &self.probe
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Probe {
        &mut self.probe
    }
}

impl Guest {
    /// Boots, and waits for the probe inside to be ready.
    pub fn boot(dir: &Path, config: &GuestConfig) -> Result<Self> {
        let guest = Self::start(dir, config)?;
        guest.wait_ready(BOOT_TIMEOUT).with_context(|| {
            format!(
                "the guest did not come up; its console:\n{}\nQEMU:\n{}",
                guest.console(),
                guest.qemu.log()
            )
        })?;
        Ok(guest)
    }

    /// Starts QEMU without waiting for the guest, for one that waits for a migration or for its backend.
    pub fn start(dir: &Path, config: &GuestConfig) -> Result<Self> {
        let files = GuestFiles::prepare(dir)?;
        let program = system_program("qemu-system-x86_64")?;
        let mut qemu = Daemon::start(dir, &config.name, &program, config.arguments(dir, &files))?;
        let path = |suffix: &str| dir.join(format!("{}.{suffix}", config.name));
        // The guest does not run before QEMU has made both, so the probe's first word cannot be missed.
        qemu.wait_socket(&path("probe"), BOOT_TIMEOUT)?;
        qemu.wait_socket(&path("qmp"), BOOT_TIMEOUT)?;
        let probe = Probe::connect(&path("probe"), &path("probe.log"))?;
        Ok(Self { qemu, probe, console: path("console"), qmp_path: path("qmp") })
    }

    /// What the kernel printed.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// A new connection to QEMU's control socket.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_path)
    }

    /// QEMU itself.
    #[must_use]
    pub fn process(&mut self) -> &mut Daemon {
        &mut self.qemu
    }

    /// Switches the guest off from inside and waits for QEMU to end.
    pub fn power_off(mut self) -> Result<()> {
        self.ask("poweroff")?;
        let status = self.qemu.wait_exit(ASK_TIMEOUT)?;
        if status.success() {
            Ok(())
        } else {
            bail!("QEMU ended with {status}:\n{}", self.qemu.log())
        }
    }
}

/// "kvm" where a guest kernel starts under it, else "tcg".
pub fn accelerator() -> &'static str {
    static FOUND: OnceLock<&'static str> = OnceLock::new();
    FOUND.get_or_init(|| match std::env::var("BATON_ACCEL").as_deref() {
        Ok("kvm") => "kvm",
        Ok("tcg") => "tcg",
        _ if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() => "tcg",
        _ if kvm_works_remembered().unwrap_or(false) => "kvm",
        _ => "tcg",
    })
}

/// The trial takes seconds where KVM hangs, so its outcome is kept beside the guest's kernel until the machine boots
/// anew.
fn kvm_works_remembered() -> Result<bool> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let memo = target_dir()?.join("guest/.accelerator");
    let text = |works: bool| format!("{} {works}", boot.trim());
    match fs::read_to_string(&memo) {
        Ok(found) if found == text(true) => return Ok(true),
        Ok(found) if found == text(false) => return Ok(false),
        _ => {}
    }
    let works = kvm_works()?;
    fs::write(&memo, text(works))?;
    Ok(works)
}

/// Starts a kernel under KVM and waits for its first words: nested or filtered KVM may accept everything and then
/// never run.
fn kvm_works() -> Result<bool> {
    let dir = TestDir::new("kvm")?;
    let files = GuestFiles::prepare(dir.path())?;
    let kernel = files.kernel.display().to_string();
    let args = "-accel kvm -machine q35 -m 128M -nodefaults -no-reboot -display none -serial stdio -append";
    let args = args.split(' ').chain(["console=ttyS0 panic=-1", "-kernel", &kernel]);
    let mut qemu = Daemon::start(dir.path(), "kvm", &system_program("qemu-system-x86_64")?, args)?;
    Ok(qemu.wait_line("Linux version", KVM_TRIAL_TIMEOUT).is_ok())
}
