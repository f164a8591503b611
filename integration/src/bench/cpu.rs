//! Who used the CPUs between two moments, and what keeps a measurement quiet.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// CPU time of some processes and of the machine at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    at: Instant,
    own: Duration,
    processes: Vec<Duration>,
    busy_ticks: u64,
    steal_ticks: u64,
}

/// What happened between two snapshots.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Usage {
    /// Wall time, in s.
    pub seconds: f64,
    /// CPU time of this process, in s.
    pub frontend_s: f64,
    /// CPU time of each process asked for, in s and in that order.
    pub processes_s: Vec<f64>,
    /// CPU time of everybody else, in percent of all CPUs.
    pub others_pct: f64,
    /// Time taken by the hypervisor, in percent of all CPUs.
    pub steal_pct: f64,
}

impl Usage {
    /// Noise above which a measurement is repeated, in percent.
    pub const NOISE_MAX_PCT: f64 = 8.0;

    /// Whether somebody else disturbed the measurement.
    #[must_use]
    pub fn is_noisy(&self) -> bool {
        self.others_pct > Self::NOISE_MAX_PCT || self.steal_pct > Self::NOISE_MAX_PCT
    }
}

impl Snapshot {
    /// The state now, for these process ids.
    pub fn take(pids: &[u32]) -> Result<Self> {
        let processes = pids.iter().map(|&pid| cpu_time_of(pid)).collect::<Result<_>>()?;
        let own = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
        let (busy_ticks, steal_ticks) = machine_ticks(&fs::read_to_string("/proc/stat")?)?;
        Ok(Self { at: Instant::now(), own, processes, busy_ticks, steal_ticks })
    }

    /// What happened since `earlier`, which was taken for the same processes.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Usage {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let frontend_s = self.own.saturating_sub(earlier.own).as_secs_f64();
        let processes_s: Vec<f64> = self
            .processes
            .iter()
            .zip(&earlier.processes)
            .map(|(b, a)| b.saturating_sub(*a).as_secs_f64())
            .collect();
        let known = frontend_s + processes_s.iter().sum::<f64>();
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        let share = |s: f64| 100.0 * s / (seconds * cpus() as f64);
        Usage {
            others_pct: share((ticks_to_s(self.busy_ticks - earlier.busy_ticks) - known).max(0.0)),
            steal_pct: share(ticks_to_s(self.steal_ticks - earlier.steal_ticks)),
            seconds,
            frontend_s,
            processes_s,
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of a short measurement")]
fn ticks_to_s(ticks: u64) -> f64 {
    // USER_HZ, which is 100 on every Linux that this runs on.
    ticks as f64 / 100.0
}

/// CPUs of the machine, whatever this process is bound to.
pub(super) fn cpus() -> usize {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().filter(|l| l.starts_with("cpu") && !l.starts_with("cpu ")).count().max(1)
}

/// CPU time of a process with all its threads, also those that have ended.
pub(super) fn cpu_time_of(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("there is no process {pid} to measure"))?;
    Ok(Duration::from(clock_gettime(clock)?))
}

/// Busy and stolen time of all CPUs, from the first line of /proc/stat.
fn machine_ticks(stat: &str) -> Result<(u64, u64)> {
    // user nice system idle iowait irq softirq steal guest guest_nice
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    let field = |i: usize| fields.get(i).copied().context("/proc/stat is not as expected");
    Ok((field(0)? + field(1)? + field(2)? + field(5)? + field(6)?, field(7)?))
}

/// Binds a running process, with all its threads, to a CPU.
pub fn bind_process(pid: u32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    let tasks = format!("/proc/{pid}/task");
    // A thread that starts meanwhile has the CPUs of one that started it, which may not be bound yet.
    for _ in 0..2 {
        for task in fs::read_dir(&tasks)? {
            let id: i32 = task?.file_name().to_string_lossy().parse()?;
            match sched_setaffinity(Pid::from_raw(id), &set) {
                // It has ended.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot bind {pid}")),
            }
        }
    }
    Ok(())
}

/// Keeps idle CPUs from sleeping deeply while it lives: a wake-up of a halted virtual CPU costs more than the request
/// that it waits for. `None` where that is not allowed, or nobody heeds it.
#[must_use]
pub fn hold_cpus_awake() -> Option<File> {
    // Without a driver the kernel halts idle CPUs whatever latency was asked for, and takes the wish all the same.
    let driver = fs::read_to_string("/sys/devices/system/cpu/cpuidle/current_driver");
    if !heeds_latency(&driver.unwrap_or_default()) {
        return None;
    }
    let mut file = OpenOptions::new().write(true).open("/dev/cpu_dma_latency").ok()?;
    file.write_all(&0_i32.to_ne_bytes()).ok()?;
    Some(file)
}

fn heeds_latency(driver: &str) -> bool {
    !matches!(driver.trim(), "" | "none")
}

/// Does something that binds its thread to a CPU, which lasts: on a thread that is used up by it. Daemons that are
/// started there end with it.
pub fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().expect("no panic in a measurement"))
}

/// Binds the calling thread, and those it starts, to one CPU.
pub fn pin_this_thread(cpu: usize) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &only(cpu)?)
        .with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Does something at the lowest priority there is: the calling thread, and the threads and processes that it starts
/// meanwhile, run only when nobody else on the CPU wants to. What was started stays so.
pub fn yielding_to_everybody<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    set_policy(libc::SCHED_IDLE)?;
    let done = work();
    set_policy(libc::SCHED_OTHER)?;
    done
}

fn set_policy(policy: libc::c_int) -> Result<()> {
    // SAFETY: all bytes zero is a valid value: priority 0, the only one that these policies have.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: a system call on the calling thread, with parameters that outlive it.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot change the priority");
    }
    Ok(())
}

/// Lets a command run on one CPU only.
pub fn pin_command(command: &mut Command, cpu: usize) -> Result<()> {
    let set = only(cpu)?;
    // SAFETY: a system call on the child's own thread, with a set that was made before the fork.
    unsafe {
        command.pre_exec(move || sched_setaffinity(Pid::from_raw(0), &set).map_err(Into::into));
    }
    Ok(())
}

/// The CPUs that a process may run on, as the kernel writes them ("0-1").
pub fn allowed_cpus(pid: u32) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("there is no process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(line.context("/proc does not say where a process may run")?.trim().to_owned())
}

fn only(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("there is no CPU {cpu}"))?;
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_proc_stat_is_read() {
        let stat = "cpu  10 1 20 500 7 2 3 4 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(machine_ticks(stat).unwrap(), (10 + 1 + 20 + 2 + 3, 4));
        assert!(machine_ticks("").is_err());
    }

    #[test]
    fn own_work_is_own_and_others_are_noise() {
        let before = Snapshot::take(&[]).unwrap();
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let usage = Snapshot::take(&[]).unwrap().since(&before);
        // Other tests run in this process; at least this thread's work must be there.
        assert!(usage.frontend_s > 0.05 && usage.seconds >= 0.3, "{usage:?}");
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(Snapshot::take(&[child.id()]).is_err(), "a process that is gone");
    }

    #[test]
    fn a_bound_command_is_seen_to_be_bound() {
        let mut command = Command::new("sleep");
        command.arg("20");
        pin_command(&mut command, 0).unwrap();
        let mut child = command.spawn().unwrap();
        let cpus = allowed_cpus(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(cpus.unwrap(), "0");
        assert!(allowed_cpus(child.id()).is_err(), "a process that is gone");
    }

    #[test]
    fn what_is_started_at_the_lowest_priority_stays_there() {
        // SAFETY: asks for a number.
        let policy = |pid| unsafe { libc::sched_getscheduler(pid) };
        let pid = |child: &std::process::Child| i32::try_from(child.id()).unwrap();
        let mut child =
            yielding_to_everybody(|| Ok(Command::new("sleep").arg("20").spawn()?)).unwrap();
        let (of_child, own) = (policy(pid(&child)), policy(0));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((of_child, own), (libc::SCHED_IDLE, libc::SCHED_OTHER));
    }

    #[test]
    fn without_a_driver_nobody_is_kept_awake() {
        assert!(heeds_latency("haltpoll\n") && heeds_latency("intel_idle"));
        assert!(!heeds_latency("none\n") && !heeds_latency(""));
    }

    #[test]
    fn noise_has_a_threshold() {
        assert!(!Usage { others_pct: 7.9, ..Usage::default() }.is_noisy());
        assert!(Usage { others_pct: 8.1, ..Usage::default() }.is_noisy());
        assert!(Usage { steal_pct: 8.1, ..Usage::default() }.is_noisy());
    }
}
