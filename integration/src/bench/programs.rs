//! What each program of the machine has used of its processors: who else ran while something was measured.
//!
//! Exact to the nanosecond, unlike /proc/stat, which counts ticks of 10 ms. The kernel's own threads are left out: much
//! of what they do is done for the measured programs.

use super::cpu::cpu_time_of;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// In the flags of /proc/PID/stat: a thread of the kernel.
const PF_KTHREAD: u64 = 0x0020_0000;

/// CPU time of each process at one moment.
#[derive(Clone, Debug)]
pub struct Programs(BTreeMap<u32, Duration>);

impl Programs {
    /// The state now.
    pub fn look() -> Result<Self> {
        let mut used = BTreeMap::new();
        for entry in fs::read_dir("/proc").context("there is no /proc to look at")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // It may have ended since.
            if let Ok(time) = cpu_time_of(pid) {
                used.insert(pid, time);
            }
        }
        Ok(Self(used))
    }

    /// What all programs but these have used since `earlier`.
    #[must_use]
    pub fn others_since(&self, earlier: &Self, these: &[u32]) -> Duration {
        let began = |pid| earlier.0.get(pid).copied().unwrap_or_default();
        let used = self.0.iter().filter(|(pid, _)| !these.contains(pid)).map(|(pid, time)| {
            let used = time.saturating_sub(began(pid));
            if used.is_zero() || is_of_the_kernel(*pid) { Duration::ZERO } else { used }
        });
        used.sum()
    }
}

fn is_of_the_kernel(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    flags(&stat).is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// "7 (a (name) 1) S 2 0 0 0 -1 FLAGS ...": a name may have blanks and brackets.
fn flags(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, id};

    #[test]
    fn others_are_all_but_those_named_and_the_kernel() {
        let before = Programs::look().unwrap();
        // Several ms of CPU time in a process of its own.
        let script = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; echo; read line";
        let mut busy = Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(busy.stdout.as_mut().unwrap(), &mut line).unwrap();
        let after = Programs::look().unwrap();
        let of_busy = after.0[&busy.id()];
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(of_busy > Duration::from_millis(1), "{of_busy:?}");
        let with = after.others_since(&before, &[id()]);
        let without = after.others_since(&before, &[id(), busy.id()]);
        assert_eq!(with - without, of_busy);
    }

    #[test]
    fn a_thread_of_the_kernel_is_told_by_its_flags() {
        let kernel = "14 (rcu ) preempt) I 2 0 0 0 -1 2129984 0 0 0 0 0 6187 0 0 20 0 1 0 3";
        assert_eq!(flags(kernel), Some(2_129_984));
        assert_ne!(2_129_984 & PF_KTHREAD, 0);
        assert!(!is_of_the_kernel(id()));
        assert_eq!(flags("no bracket"), None);
    }
}
