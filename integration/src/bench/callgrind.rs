//! A process under callgrind: what its busiest thread did since the last time somebody asked.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a thread did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions in user space.
    pub instructions: u64,
    /// System calls.
    pub system_calls: u64,
    /// Calls to malloc and its kin.
    pub allocations: u64,
}

/// A running process under callgrind.
#[derive(Debug)]
pub struct Callgrind {
    /// Of the process.
    pid: u32,
    /// Dumps are this with ".NUMBER-THREAD" behind it.
    out: PathBuf,
}

impl Callgrind {
    /// The command that runs `program` under callgrind, with its counts beside `out`.
    pub fn command(program: &Path, out: &Path) -> Result<Command> {
        let mut command = Command::new(crate::workspace::system_program("valgrind")?);
        command
            .args(["--tool=callgrind", "--collect-systime=yes", "--separate-threads=yes"])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(program);
        Ok(command)
    }

    /// A process that was started with [`Callgrind::command`].
    #[must_use]
    pub fn new(pid: u32, out: &Path) -> Self {
        Self { pid, out: out.to_owned() }
    }

    /// What the busiest thread did since the last call.
    pub fn take(&self) -> Result<Counts> {
        let done = Command::new(crate::workspace::system_program("vgdb")?)
            .arg(format!("--pid={}", self.pid))
            .arg("dump")
            .output()
            .context("cannot run vgdb")?;
        if !done.status.success() {
            bail!("vgdb: {}", String::from_utf8_lossy(&done.stderr));
        }
        let dir = self.out.parent().context("a file in a directory")?;
        let stem = format!("{}.", self.out.file_name().unwrap_or_default().to_string_lossy());
        let mut busiest = Counts::default();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(&stem) {
                continue;
            }
            let text = fs::read_to_string(entry.path())?;
            fs::remove_file(entry.path())?;
            let counts = parse(&text).with_context(|| format!("{}", entry.path().display()))?;
            if counts.instructions > busiest.instructions {
                busiest = counts;
            }
        }
        if busiest.instructions == 0 {
            bail!("callgrind counted nothing for process {}", self.pid);
        }
        Ok(busiest)
    }
}

/// Functions of the C library that take memory.
const ALLOCATORS: [&str; 5] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc"];

/// Reads a profile (callgrind format, version 1): the totals, and how often an allocator was called.
fn parse(text: &str) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut events: Vec<&str> = Vec::new();
    // Names are given once, with a number, and by the number from then on.
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut callee = "";
    let mut totals = None;
    for line in text.lines() {
        if let Some(list) = line.strip_prefix("events:") {
            events = list.split_whitespace().collect();
        } else if let Some(list) = line.strip_prefix("totals:") {
            totals = Some(list);
        } else if let Some(name) = line.strip_prefix("cfn=").or_else(|| line.strip_prefix("fn=")) {
            let (number, name) = name.split_once(' ').unwrap_or((name, ""));
            if !name.is_empty() {
                names.insert(number, name);
            }
            if line.starts_with("cfn=") {
                callee = names.get(number).copied().unwrap_or_default();
            }
        } else if let Some(calls) = line.strip_prefix("calls=") {
            // A recursion carries a depth: "malloc'2".
            let plain = callee.split('\'').next().unwrap_or_default();
            if ALLOCATORS.contains(&plain) {
                let number = calls.split_whitespace().next().context("calls without a number")?;
                counts.allocations += number.parse::<u64>()?;
            }
        }
    }
    let totals: Vec<u64> = totals
        .context("no totals: the profile is cut off")?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let total = |event: &str| {
        let at = events.iter().position(|name| *name == event)?;
        Some(totals.get(at).copied().unwrap_or(0))
    };
    counts.instructions = total("Ir").context("no count of instructions")?;
    counts.system_calls = total("sysCount").context("no count of system calls")?;
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = "\
version: 1
events: Ir sysCount sysTime
fn=(1) serve
16 5
cfn=(2) malloc
calls=3 10
17 30
cfn=(3) realloc'2
calls=2 10
17 20
cfn=(4) free
calls=9 10
17 20
fn=(2)
1 30
cfn=(2)
calls=1 1
1 3
totals: 1234 56 789
";

    #[test]
    fn totals_and_allocations_are_read() {
        let counts = parse(PROFILE).unwrap();
        assert_eq!(counts, Counts { instructions: 1234, system_calls: 56, allocations: 6 });
    }

    #[test]
    fn a_profile_that_is_cut_off_or_of_other_events_is_refused() {
        assert!(parse("events: Ir sysCount\nfn=(1) a\n").is_err());
        assert!(parse("events: Ir\ntotals: 12\n").is_err());
        assert!(parse("events: Ir sysCount\ntotals: many\n").is_err());
    }
}
