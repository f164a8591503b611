//! A real guest: QEMU with vhost-user disks, its console in a file, its probe on a serial line, its QMP socket.
//!
//! KVM is used where a guest really runs under it, which a /dev/kvm that opens does not prove; else TCG.
//! `BATON_ACCEL=tcg` or `kvm` decides instead.

use crate::daemon::Daemon;
use crate::guest::GuestFiles;
use crate::qmp::Qmp;
use crate::workspace::{TestDir, system_program, target_dir};
use anyhow::{Context, Result, bail};
use baton_probe::load::Totals;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// A boot under TCG takes 2.5 s on an idle machine; this is for a busy one.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// A kernel under KVM says its first words in well under a second.
const KVM_TRIAL_TIMEOUT: Duration = Duration::from_secs(8);

/// For one command to the probe.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(60);

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

    fn arguments(&self, dir: &Path, files: &GuestFiles) -> Vec<String> {
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
            "console=ttyS0 panic=-1 quiet",
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

/// In a line of the probe's counters.
const TOTALS_COUNTERS: usize = 6;

/// Lines that the probe said, and those that were looked at already.
#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Ear {
    heard: Mutex<Heard>,
    news: Condvar,
}

/// A running guest. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Guest {
    qemu: Daemon,
    probe: UnixStream,
    ear: Arc<Ear>,
    console: PathBuf,
    qmp_path: PathBuf,
}

impl Guest {
    /// Boots, and waits for the probe inside to be ready.
    pub fn boot(dir: &Path, config: &GuestConfig) -> Result<Self> {
        let guest = Self::start(dir, config)?;
        guest.wait_for(BOOT_TIMEOUT, 0, |line| line == "ready").with_context(|| {
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
        let probe = UnixStream::connect(path("probe"))
            .context("cannot connect to the guest's serial line")?;
        let ear = Arc::new(Ear::default());
        let (listening, from) = (Arc::clone(&ear), probe.try_clone()?);
        let mut log = fs::File::create(path("probe.log"))?;
        std::thread::spawn(move || listen(from, &mut log, &listening));
        Ok(Self { qemu, probe, ear, console: path("console"), qmp_path: path("qmp") })
    }

    /// Gives the probe one command and returns its answer without the "ok"; an "err" is an error.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.ask_within(command, ASK_TIMEOUT)
    }

    /// [`Self::ask`] for a command that takes long, or must not.
    pub fn ask_within(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let from = self.heard_so_far();
        self.probe
            .write_all(format!("{command}\n").as_bytes())
            .context("cannot write to the guest's serial line")?;
        let is_answer =
            |line: &str| line == "ok" || line.starts_with("ok ") || line.starts_with("err ");
        let answer = self
            .wait_for(timeout, from, is_answer)
            .with_context(|| format!("asked the guest: {command}"))?;
        match answer.strip_prefix("err ") {
            Some(why) => bail!("{command}: {why}"),
            None => Ok(answer.trim_start_matches("ok").trim().to_owned()),
        }
    }

    /// Number of lines heard from the probe; a later [`Self::wait_for`] can start there.
    #[must_use]
    pub fn heard_so_far(&self) -> usize {
        self.ear.heard.lock().expect("the listener does not panic").lines.len()
    }

    /// Waits for a line of the probe, of those from number `from` on.
    pub fn wait_for(
        &self,
        timeout: Duration,
        from: usize,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut heard = self.ear.heard.lock().expect("the listener does not panic");
        let mut next = from;
        loop {
            if let Some(line) =
                heard.lines[next.min(heard.lines.len())..].iter().find(|l| wanted(l))
            {
                return Ok(line.clone());
            }
            next = heard.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || heard.closed {
                let last = heard.lines.last().map_or("nothing", String::as_str);
                let why = if heard.closed {
                    "QEMU is gone".to_owned()
                } else {
                    format!("{timeout:?} are over")
                };
                bail!("the line did not come: {why}; the probe last said: {last}");
            }
            heard = self.ear.news.wait_timeout(heard, left).expect("the listener does not panic").0;
        }
    }

    /// The probe's complaints so far ("bad ..." lines).
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let heard = self.ear.heard.lock().expect("the listener does not panic");
        heard.lines.iter().filter(|l| l.starts_with("bad ")).cloned().collect()
    }

    /// Waits until the running load has completed `more` requests from now on, and returns its counters.
    pub fn wait_progress(&self, more: u64, timeout: Duration) -> Result<Totals> {
        // Not from the beginning: an earlier load may have counted further.
        let from = self.heard_so_far();
        let first = self.wait_for(timeout, from, |l| l.starts_with("io "))?;
        let goal = parse_totals(&first)?.ops + more;
        let reached =
            |l: &str| l.starts_with("io ") && parse_totals(l).is_ok_and(|t| t.ops >= goal);
        parse_totals(&self.wait_for(timeout, from, reached)?)
    }

    /// The counters of the load as reported from line number `from` on.
    #[must_use]
    pub fn reports(&self, from: usize) -> Vec<Totals> {
        let heard = self.ear.heard.lock().expect("the listener does not panic");
        let lines = heard.lines.iter().skip(from).filter(|l| l.starts_with("io "));
        lines.filter_map(|line| parse_totals(line).ok()).collect()
    }

    /// Goes on with a probe whose serial line moved here from another QEMU: what was on its way may have lost its
    /// beginning, so everything up to the answer to a ping of our own is skipped.
    pub fn resynchronise(&mut self) -> Result<()> {
        static TOKEN: AtomicU64 = AtomicU64::new(1);
        let token = TOKEN.fetch_add(1, Ordering::Relaxed);
        let from = self.heard_so_far();
        // The first line end closes half a command of before, which is then answered as unknown.
        self.probe
            .write_all(format!("\nping token={token}\n").as_bytes())
            .context("cannot write to the guest's serial line")?;
        self.wait_for(ASK_TIMEOUT, from, |line| line == format!("ok token={token}"))
            .context("the probe does not answer on its new serial line")?;
        Ok(())
    }

    /// Stops the load and returns its counters, good or bad.
    pub fn end_load(&mut self) -> Result<Totals> {
        parse_totals(&self.ask("stop")?)
    }

    /// Stops the load and returns its counters, or an error with what it found if it found anything bad.
    pub fn stop_load(&mut self) -> Result<Totals> {
        let totals = self.end_load()?;
        if totals.errs + totals.stale + totals.corrupt > 0 {
            bail!("the load found bad data: {totals}\n{}", self.complaints().join("\n"));
        }
        Ok(totals)
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

/// Reads a line of counters, as [`Totals`] prints them, with or without a word before.
fn parse_totals(line: &str) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut counters = 0;
    for (name, value) in line.split_whitespace().filter_map(|w| w.split_once('=')) {
        let value =
            value.parse().with_context(|| format!("{name}={value} in '{line}' is not a number"))?;
        match name {
            "ops" => totals.ops = value,
            "writes" => totals.writes = value,
            "errs" => totals.errs = value,
            "stale" => totals.stale = value,
            "corrupt" => totals.corrupt = value,
            "max_gap_ms" => totals.max_gap_ms = value,
            _ => bail!("unknown counter {name} in '{line}'"),
        }
        counters += 1;
    }
    // The line may have been cut by a migration.
    if counters != TOTALS_COUNTERS {
        bail!("'{line}' is not a whole line of counters");
    }
    Ok(totals)
}

fn listen(from: UnixStream, log: &mut fs::File, ear: &Ear) {
    for line in BufReader::new(from).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
        // The log is for people; the test goes on without it.
        let _ = writeln!(log, "{line}");
        ear.heard.lock().expect("nobody panics with the lines").lines.push(line);
        ear.news.notify_all();
    }
    ear.heard.lock().expect("nobody panics with the lines").closed = true;
    ear.news.notify_all();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_survive_the_serial_line() {
        let totals = Totals { ops: 10, writes: 4, errs: 1, stale: 2, corrupt: 3, max_gap_ms: 40 };
        assert_eq!(parse_totals(&format!("io {totals}")).unwrap(), totals);
        assert!(parse_totals("io ops=x").is_err());
        let cut = format!("io {totals}").replace(" max_gap_ms=40", "");
        assert!(parse_totals(&cut).is_err(), "{cut}");
    }
}
