//! What the storage server does at its disk while nobody may write, as strace sees it.

use super::moves::Vm;
use super::{DISK_BYTES, PATIENCE};
use crate::daemon::Daemon;
use crate::handoff::Fleet;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// Calls to the disk by the storage server around one move: while nobody may write, from the decision to the guest's
/// first answer, and later.
#[derive(Clone, Copy, Debug, Default)]
pub struct Syncs {
    /// From the stop to the answer of ACTIVATE.
    pub before_decision: usize,
    /// From there to the first answer.
    pub before_first_io: usize,
    /// After that: the decision is stored behind its answer.
    pub later: usize,
    /// The longest time from the answer of ACTIVATE to the guest's first, in s.
    pub slowest_s: f64,
}

/// Watches a storage server with strace through some moves. `None` without strace.
pub fn syncs(dir: &Path, runs: usize) -> Result<Option<Syncs>> {
    let fleet = Fleet::start(dir, 1, 1, DISK_BYTES)?;
    let mut vm = Vm::start(&fleet, dir)?;
    let mut out = Syncs::default();
    for _ in 0..runs {
        for disk in &mut vm.disks {
            disk.start_logging()?;
        }
        let (attempt, there, mut disks) = vm.prepare()?;
        let trace = dir.join("strace");
        let Some(tracer) = Tracer::attach(&fleet.servers[0].daemon, &trace)? else {
            return Ok(None);
        };
        let stop = unix_s()?;
        vm.go(&mut disks)?;
        let first_io = unix_s()?;
        let stored = || fs::read_to_string(&trace).is_ok_and(|text| text.contains("sync("));
        crate::baton::wait_until("the decision is stored", PATIENCE, stored)?;
        drop(tracer);
        let (_, destination) = vm.arrived(&attempt, there, disks)?;
        let activated = event_s(&destination, "activated")?;
        out.slowest_s = out.slowest_s.max(first_io - activated);
        for at in fs::read_to_string(&trace)?.lines().filter_map(sync_at) {
            if at > stop && at < activated {
                out.before_decision += 1;
            } else if at >= activated && at < first_io {
                out.before_first_io += 1;
            } else {
                out.later += 1;
            }
        }
    }
    Ok(Some(out))
}

/// "PID 1700000000.123456 fdatasync(4) = 0": when. A call that another thread interrupts has a second line, which
/// does not begin one.
fn sync_at(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once(' ')?;
    let (at, call) = rest.trim_start().split_once(' ')?;
    let (name, _) = call.split_once('(')?;
    let syncs = ["fsync", "fdatasync", "sync_file_range", "msync"].contains(&name);
    syncs.then(|| at.parse().ok())?
}

fn unix_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

fn event_s(status: &Value, name: &str) -> Result<f64> {
    let events = status["handoff"]["events"].as_array().context("no events")?;
    let event = events.iter().rev().find(|event| event["event"] == name);
    let at = event.and_then(|event| event["at_unix_us"].as_f64());
    Ok(at.with_context(|| format!("no event {name}"))? / 1e6)
}

struct Tracer(Child);

impl Tracer {
    fn attach(daemon: &Daemon, to: &Path) -> Result<Option<Self>> {
        let pid = daemon.pid();
        let child = Command::new("strace")
            .args(["-f", "-ttt", "-e", "trace=fsync,fdatasync,sync_file_range,msync", "-p"])
            .arg(pid.to_string())
            .arg("-o")
            .arg(to)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else { return Ok(None) };
        let tracer = Self(child);
        let all = || all_traced(pid).unwrap_or(false);
        crate::baton::wait_until("strace has every thread of the server", PATIENCE, all)?;
        Ok(Some(tracer))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

fn all_traced(pid: u32) -> Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        if status.lines().any(|line| line == "TracerPid:\t0") {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begun_calls_of_a_trace_count_once() {
        assert_eq!(sync_at("12 1700000000.500000 fdatasync(9) = 0"), Some(1_700_000_000.5));
        assert_eq!(sync_at("12 1.5 fdatasync(9 <unfinished ...>"), Some(1.5));
        assert_eq!(sync_at("12 1.5 <... fdatasync resumed>) = 0"), None);
        assert_eq!(sync_at("12 1.5 +++ exited with 0 +++"), None);
    }
}
