//! `baton-demo` (`make demo`): the whole of Baton once, on real processes, with a report of what was seen.
//!
//! Every number it prints is measured in this run. Leaves nothing running and nothing behind, whether it ends well,
//! fails (then the logs stay, and it says where) or is interrupted.

use anyhow::{Context, Result, bail, ensure};
use baton_integration::baton::{Backend, Storage};
use baton_integration::guest;
use baton_integration::qemu::{Guest, GuestConfig, accelerator};
use baton_integration::workspace::{TestDir, program, system_program, target_dir};
use baton_probe::load::Totals;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const VOLUME: &str = "demo";
const GIB: u64 = 1 << 30;
const FS: &str = "files=8 bytes=2097152";
/// Each on a load of its own, so that the longest pause of the load is that of the kill.
const KILLS: usize = 3;
/// Requests before and after each kill.
const OPS_AROUND: u64 = 400;
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(60);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let dir = match TestDir::new("demo") {
        Ok(dir) => dir,
        Err(error) => {
            eprintln!("demo: no temporary directory: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = clean_up_when_interrupted(dir.path()) {
        eprintln!("demo: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut demo = Demo { started: Instant::now(), dir: dir.path().to_owned() };
    match demo.run() {
        Ok(report) => {
            demo.say(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            while INTERRUPTED.load(Ordering::Relaxed) {
                // The children are killed under our feet; whoever does that ends the process, too.
                std::thread::park();
            }
            eprintln!("\ndemo: FAILED: {error:#}");
            // The daemons are dead by now. What they stored is large and says less than their logs.
            let _ = fs::remove_dir_all(dir.path().join("data"));
            let _ = fs::remove_file(dir.path().join("initramfs.cpio"));
            eprintln!("demo: logs are kept in {}", dir.path().display());
            std::mem::forget(dir);
            ExitCode::FAILURE
        }
    }
}

struct Demo {
    started: Instant,
    dir: PathBuf,
}

/// What one load with one accident in the middle showed.
struct Accident {
    totals: Totals,
}

impl Demo {
    fn run(&mut self) -> Result<String> {
        if let Some(why) = guest::missing() {
            bail!("{why}");
        }
        self.say("A VM's disk on a storage server, with accidents.\n");
        let mut storage = Storage::start(&self.dir, &[])?;
        let admin = storage.admin_address().to_string();
        self.step(&format!(
            "storage server for clients at {}, for operators at {admin}",
            storage.data_address()
        ));
        self.baton(&admin, &["volume", "create", VOLUME, "--size", "1G"])?;

        let uri = storage.uri(VOLUME, None);
        let mut backend = Backend::start(&self.dir, "backend", &uri, &["--num-queues", "2"])?;
        self.step(&format!("backend for one VM: {uri} as a vhost-user-blk device"));

        self.step(&format!(
            "booting {} in {} ({})",
            guest_kernel()?,
            qemu_version()?,
            accelerator()
        ));
        let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&backend.socket) };
        let booting = Instant::now();
        let mut guest = Guest::boot(&self.dir, &config)?;
        ensure!(
            guest.ask("size")? == format!("bytes={GIB}"),
            "the guest sees another size than 1G"
        );
        let boot_s = booting.elapsed().as_secs_f64();
        self.step(&format!("the guest is up after {boot_s:.1} s and has a disk of 1G"));

        let fs_started = Instant::now();
        let files = guest.ask_within(&format!("fs {FS}"), PROGRESS_TIMEOUT)?;
        let fs_s = fs_started.elapsed().as_secs_f64();
        self.step(&format!(
            "ext4 made, 8 files written, mounted again and read back equal ({files})"
        ));

        let growing = Instant::now();
        self.baton(&admin, &["volume", "resize", VOLUME, "--size", "2G"])?;
        guest.ask(&format!("wait-size bytes={}", 2 * GIB))?;
        let grow_ms = growing.elapsed().as_millis();
        self.step(&format!("the running guest sees 2G, {grow_ms} ms after the command began"));

        // In the new half: the filesystem is compared again at the end.
        let mut loads = Loads { guest: &mut guest, epoch: 0 };
        let quiet = loads.with("nothing", || Ok(()))?;
        self.step(&format!("verified load, no accident: {}", seen_in(&quiet.totals)));
        let mut backend_kills = Vec::new();
        for n in 1..=KILLS {
            let seen = loads.with("a kill of the backend", || backend.kill_and_restart())?;
            self.step(&format!(
                "kill -9 of the backend under load ({n} of {KILLS}), started again: {}",
                seen_in(&seen.totals)
            ));
            backend_kills.push(seen);
        }
        let mut server_kills = Vec::new();
        for n in 1..=KILLS {
            let seen = loads.with("a kill of the storage server", || storage.kill_and_restart())?;
            self.step(&format!(
                "kill -9 of the storage server under load ({n} of {KILLS}), started again: {}",
                seen_in(&seen.totals)
            ));
            server_kills.push(seen);
        }
        let files_after = guest.ask_within(&format!("fs-verify {FS}"), PROGRESS_TIMEOUT)?;
        ensure!(
            files == files_after,
            "the files changed: {files} before the accidents, {files_after} after"
        );
        self.step("the filesystem mounts and its files are equal to what was written");
        self.baton(&admin, &["volume", "show", VOLUME])?;

        guest.power_off()?;
        let ended = backend.daemon.terminate(Duration::from_secs(20))?;
        ensure!(ended.success(), "the backend ended with {ended} on SIGTERM");
        self.baton(&admin, &["volume", "delete", VOLUME, "--yes"])?;
        let ended = storage.daemon.terminate(Duration::from_secs(20))?;
        ensure!(ended.success(), "the storage server ended with {ended} on SIGTERM");
        self.step(
            "guest switched off, volume deleted, backend and storage server ended by SIGTERM",
        );

        let all = || backend_kills.iter().chain(&server_kills).chain([&quiet]);
        let sum = |what: fn(&Totals) -> u64| all().map(|seen| what(&seen.totals)).sum::<u64>();
        Ok(format!(
            "\nReport: what was seen in this run of {total:.0} s\n\
             \x20 filesystem        8 files of 2 MiB written and read back equal in {fs_s:.1} s, and again after all kills\n\
             \x20 online growth     1G to 2G, seen by the guest {grow_ms} ms after the command began\n\
             \x20 verified I/O      {ops} requests: {errs} errors, {stale} stale or lost, {corrupt} corrupt\n\
             \x20 longest pause     {quiet} ms without an accident\n\
             \x20   backend killed  {backend} ms ({KILLS} times kill -9, started again at once)\n\
             \x20   server killed   {server} ms ({KILLS} times kill -9, started again at once)\n\
             \x20 left running      nothing",
            total = self.started.elapsed().as_secs_f64(),
            ops = sum(|t| t.ops),
            errs = sum(|t| t.errs),
            stale = sum(|t| t.stale),
            corrupt = sum(|t| t.corrupt),
            quiet = quiet.totals.max_gap_ms,
            backend = pauses(&backend_kills),
            server = pauses(&server_kills),
        ))
    }

    /// Runs the operator's command and shows both the command and its answer.
    fn baton(&self, admin: &str, args: &[&str]) -> Result<()> {
        self.step(&format!("$ baton {}", args.join(" ")));
        let output =
            Command::new(program("baton")?).args(args).env("BATON_SERVER", admin).output()?;
        let said = [output.stdout, output.stderr].concat();
        for line in String::from_utf8_lossy(&said).lines() {
            self.say(format!("           {line}").trim_end());
        }
        ensure!(output.status.success(), "baton {} ended with {}", args.join(" "), output.status);
        Ok(())
    }

    fn step(&self, text: &str) {
        self.say(&format!("[{:6.1} s] {text}", self.started.elapsed().as_secs_f64()));
    }

    fn say(&self, text: &str) {
        // Nobody reads: the outcome is in the exit status.
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

/// Loads one after another on the same blocks; a later one has a greater epoch in its stamps.
struct Loads<'a> {
    guest: &'a mut Guest,
    epoch: u64,
}

impl Loads<'_> {
    fn with(&mut self, what: &str, accident: impl FnOnce() -> Result<()>) -> Result<Accident> {
        self.epoch += 1;
        let load =
            format!("load threads=2 depth=4 flush-every=50 offset={GIB} epoch={}", self.epoch);
        self.guest.ask(&load)?;
        self.guest.wait_progress(OPS_AROUND, PROGRESS_TIMEOUT)?;
        accident().with_context(|| what.to_owned())?;
        self.guest
            .wait_progress(OPS_AROUND, PROGRESS_TIMEOUT)
            .with_context(|| format!("the load did not go on after {what}"))?;
        // Reads everything acknowledged once more; an error, and lost or wrong data, are errors here.
        Ok(Accident { totals: self.guest.stop_load()? })
    }
}

fn seen_in(totals: &Totals) -> String {
    let Totals { ops, errs, stale, corrupt, max_gap_ms, .. } = totals;
    let bad = stale + corrupt;
    format!("{ops} requests, {errs} errors, {bad} with wrong data, longest pause {max_gap_ms} ms")
}

fn pauses(seen: &[Accident]) -> String {
    let each: Vec<_> = seen.iter().map(|seen| seen.totals.max_gap_ms.to_string()).collect();
    each.join(", ")
}

fn guest_kernel() -> Result<String> {
    let name = fs::read_to_string(target_dir()?.join("guest/KERNEL"))
        .context("cannot tell the guest's kernel; run scripts/setup.sh --demo")?;
    Ok(format!("Debian's {}", name.trim()))
}

fn qemu_version() -> Result<String> {
    let output = Command::new(system_program("qemu-system-x86_64")?).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("version ").nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok(format!("QEMU {}", version.unwrap_or("of unknown version")))
}

/// Ctrl-C and SIGTERM: ends the children, removes the directory, then ends this process.
fn clean_up_when_interrupted(dir: &Path) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Before any other thread exists, so that only the one below gets them. Daemons start with none blocked.
    signals.thread_block().context("cannot block signals")?;
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        INTERRUPTED.store(true, Ordering::Relaxed);
        eprintln!("\ndemo: {signal}; cleaning up");
        for child in children() {
            let _ = kill(child, Signal::SIGKILL);
        }
        // A dying child may still make a file in it.
        let deadline = Instant::now() + Duration::from_secs(5);
        while (fs::remove_dir_all(&dir).is_err() && dir.exists()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}

/// Processes that this one started.
fn children() -> Vec<Pid> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let text: String = lists.collect();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
