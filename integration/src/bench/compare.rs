//! Two stacks side by side.
//!
//! In each round both are started anew, in changing order, and each row is run A B B A (then B A A B). A ratio is taken
//! of two runs next to each other, and the pair is run again when somebody else used the CPUs meanwhile. The report has
//! the median over all pairs, and the lowest and highest median of a round.

use crate::bench::cpu::{
    Usage, allowed_cpus, bind_process, hold_cpus_awake, on_own_thread, pin_this_thread,
};
use crate::bench::floor::{self, Floors};
use crate::bench::load::{Job, Pattern, run};
use crate::bench::outcome::Outcome;
use crate::bench::stack::{Kind, PollUs, Stack, StackConfig};
use crate::bench::stats::{Spread, median};
use crate::ceph::{Ceph, Objects};
use crate::workspace::TestDir;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::Duration;

/// How often a noisy pair is run again before it is taken as it is.
const REPEATS_MAX: u32 = 3;
/// How often a noisy run is made at most.
pub(super) const QUIET_TRIES: u32 = REPEATS_MAX + 1;

/// Time of each of the seven floors in a round.
const FLOOR_TIME: Duration = Duration::from_millis(300);

/// What to compare, and how long.
#[derive(Clone, Debug, Serialize)]
pub struct CompareConfig {
    /// The one on top of a ratio.
    pub a: Kind,
    /// The one it is measured against.
    pub b: Kind,
    /// Restarts of both.
    pub rounds: u32,
    /// Time measured of each run.
    pub duration: Duration,
    /// Size of each disk.
    pub bytes: u64,
    /// Only rows whose name contains this.
    pub only: Option<String>,
    /// A is B itself, with its dirty log on: one stack takes both parts.
    pub dirty_log: bool,
    /// The front-end on CPU 0 and the stacks on CPU 1, where there are two; else nobody is bound to a CPU.
    pub pinned: bool,
}

impl CompareConfig {
    /// What A and B are, in words.
    #[must_use]
    pub fn names(&self) -> [String; 2] {
        let (a, b) = (self.a.to_string(), self.b.to_string());
        if self.dirty_log {
            [format!("{a} with a dirty log"), format!("{b} without")]
        } else {
            [a, b]
        }
    }
}

/// One line of the report.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Row {
    /// Short name: pattern, block size, depth, queues.
    pub name: &'static str,
    /// What is done.
    pub pattern: Pattern,
    /// Bytes in a request.
    pub block_bytes: usize,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
}

const fn row(name: &'static str, pattern: Pattern, kib: usize, depth: u16, queues: u16) -> Row {
    Row { name, pattern, block_bytes: kib << 10, depth, queues }
}

/// All rows.
pub const ROWS: [Row; 12] = [
    row("r4k-d1-q1", Pattern::RandRead, 4, 1, 1),
    row("w4k-d1-q1", Pattern::RandWrite, 4, 1, 1),
    row("r4k-d32-q1", Pattern::RandRead, 4, 32, 1),
    row("w4k-d32-q1", Pattern::RandWrite, 4, 32, 1),
    row("r128k-d8-q1", Pattern::Read, 128, 8, 1),
    row("w128k-d8-q1", Pattern::Write, 128, 8, 1),
    row("r4k-d1-q4", Pattern::RandRead, 4, 1, 4),
    row("w4k-d1-q4", Pattern::RandWrite, 4, 1, 4),
    row("r4k-d32-q4", Pattern::RandRead, 4, 32, 4),
    row("w4k-d32-q4", Pattern::RandWrite, 4, 32, 4),
    row("r128k-d8-q4", Pattern::Read, 128, 8, 4),
    row("w128k-d8-q4", Pattern::Write, 128, 8, 4),
];

/// Two runs next to each other.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    /// Which restart.
    pub round: u32,
    /// Runs thrown away because of noise.
    pub repeats: u32,
    /// Still noisy after the last repeat.
    pub noisy: bool,
    /// A's run.
    pub a: Outcome,
    /// B's run.
    pub b: Outcome,
}

/// A row with its pairs.
#[derive(Clone, Debug, Serialize)]
pub struct RowResult {
    /// Which.
    pub row: Row,
    /// All pairs in the order they were run.
    pub pairs: Vec<Pair>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked for.
    pub config: CompareConfig,
    /// Whether front-end and stacks had a CPU each.
    pub pinned: bool,
    /// Whether idle CPUs were kept awake.
    pub awake: bool,
    /// What is under both stacks, for each round.
    pub floors: Vec<Floors>,
    /// By row.
    pub rows: Vec<RowResult>,
}

/// Runs the comparison; `progress` is told what is being done.
pub fn compare(config: &CompareConfig, progress: impl FnMut(&str) + Send) -> Result<Report> {
    on_own_thread(|| compare_here(config, progress))
}

fn compare_here(config: &CompareConfig, mut progress: impl FnMut(&str)) -> Result<Report> {
    let rows: Vec<Row> = ROWS
        .into_iter()
        .filter(|r| config.only.as_ref().is_none_or(|only| r.name.contains(only.as_str())))
        .collect();
    if config.dirty_log && config.a != config.b {
        bail!("a dirty log is compared with the same stack without it");
    }
    if rows.is_empty() {
        let names: Vec<&str> = ROWS.iter().map(|r| r.name).collect();
        bail!("no row is called like that; there are {}", names.join(", "));
    }
    let awake = hold_cpus_awake();
    // From here on only this thread and those of the load are on CPU 0; a machine with one CPU shares it.
    let pinned = config.pinned && std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    if pinned {
        pin_this_thread(0)?;
    }
    let mut results: Vec<RowResult> =
        rows.iter().map(|&row| RowResult { row, pairs: Vec::new() }).collect();
    let mut floors = Vec::new();
    for round in 0..config.rounds {
        floors.push(floor::measure(pinned, config.bytes, FLOOR_TIME.min(config.duration))?);
        progress(&format!("round {} of {}: starting both stacks", round + 1, config.rounds));
        let cluster = (config.a.is_rbd() || config.b.is_rbd()).then(|| Cluster::start(pinned));
        let cluster = cluster.transpose()?;
        let ceph = cluster.as_ref().map(|cluster| &cluster.ceph);
        let stack = |kind| pinned_stack(kind, config.bytes, pinned, ceph);
        let stacks = if config.dirty_log {
            vec![stack(config.a)?]
        } else if round % 2 == 0 {
            // Whoever starts second may get other memory; so each does in turn.
            vec![stack(config.a)?, stack(config.b)?]
        } else {
            let b = stack(config.b)?;
            vec![stack(config.a)?, b]
        };
        let (a, b) = (&stacks[0], &stacks[stacks.len() - 1]);
        for result in &mut results {
            for half in 0..2 {
                let a_first = (round + half) % 2 == 0;
                result.pairs.push(quiet_pair(config, result.row, round, [a, b], a_first)?);
            }
            progress(&line(result));
        }
    }
    Ok(Report { config: config.clone(), pinned, awake: awake.is_some(), floors, rows: results })
}

/// What all stacks on images of Ceph have together: a new one for each round, with its objects in memory.
struct Cluster {
    ceph: Ceph,
    /// Goes last.
    _dir: TestDir,
}

/// What is measured is the client: the OSD, on the same CPU, keeps no books that a client does not wait for, and goes
/// through a short log of its changes instead of one that grows with each round (a quarter of its time in writes).
const LEAN_OSD: &str = "debug osd = 0/0
osd enable op tracker = false
osd min pg log entries = 100
osd max pg log entries = 100
osd target pg log entries per osd = 0
osd pg log dups tracked = 100
";

impl Cluster {
    fn start(pinned: bool) -> Result<Self> {
        let dir = TestDir::in_memory("bench-ceph")?;
        let ceph = Ceph::start_with(dir.path(), Objects::Memory, LEAN_OSD)?;
        if pinned {
            for daemon in [&ceph.mon, &ceph.osd] {
                bind_process(daemon.pid(), 1)?;
            }
        }
        Ok(Self { ceph, _dir: dir })
    }
}

/// A stack of four queues, on CPU 1 or anywhere, which is looked up.
pub(super) fn pinned_stack(
    kind: Kind,
    bytes: u64,
    pinned: bool,
    ceph: Option<&Ceph>,
) -> Result<Stack> {
    let cpu = pinned.then_some(1);
    let poll = PollUs::default();
    let config = StackConfig { kind, queues: 4, bytes, cpu, callgrind: false, poll, ceph };
    let stack = Stack::start(&config)?;
    // The first thread of this process is never bound.
    let expected = if pinned { "1".to_owned() } else { allowed_cpus(std::process::id())? };
    for pid in stack.pids() {
        let cpus = allowed_cpus(pid)?;
        if cpus != expected {
            bail!("a process of {kind} may run on CPU {cpus}, not on {expected}");
        }
    }
    Ok(stack)
}

fn quiet_pair(
    config: &CompareConfig,
    row: Row,
    round: u32,
    [a, b]: [&Stack; 2],
    a_first: bool,
) -> Result<Pair> {
    let mut repeats = 0;
    loop {
        let (run_a, run_b) = if a_first {
            let run_a = one(config, row, a, config.dirty_log)?;
            (run_a, one(config, row, b, false)?)
        } else {
            let run_b = one(config, row, b, false)?;
            (one(config, row, a, config.dirty_log)?, run_b)
        };
        let noisy = run_a.usage.is_noisy() || run_b.usage.is_noisy();
        if !noisy || repeats == REPEATS_MAX {
            return Ok(Pair { round, repeats, noisy, a: run_a, b: run_b });
        }
        repeats += 1;
    }
}

fn one(config: &CompareConfig, row: Row, stack: &Stack, dirty_log: bool) -> Result<Outcome> {
    let outcome = run(&Job {
        block_bytes: row.block_bytes,
        depth: row.depth,
        queues: row.queues,
        dirty_log,
        ..Job::single(stack.socket(), stack.pids(), row.pattern, config.duration)
    })?;
    sound(outcome).with_context(|| row.name)
}

/// A run in which a request failed, or that had none, says nothing.
pub(super) fn sound(outcome: Outcome) -> Result<Outcome> {
    if outcome.errors > 0 {
        bail!("{} requests failed: {}", outcome.errors, outcome.findings.join("; "));
    }
    if outcome.ios == 0 {
        bail!("nothing completed");
    }
    Ok(outcome)
}

/// Runs a job that nobody disturbs, or the last of some tries.
pub(super) fn quiet(job: &Job) -> Result<Outcome> {
    let mut tries = 0;
    loop {
        let outcome = sound(run(job)?)?;
        tries += 1;
        if !outcome.usage.is_noisy() || tries == QUIET_TRIES {
            return Ok(outcome);
        }
    }
}

/// The ratio A to B of some figure over all pairs of a row.
#[must_use]
pub fn ratio(pairs: &[Pair], figure: impl Fn(&Outcome) -> f64) -> Spread {
    let ratios: Vec<(u32, f64)> =
        pairs.iter().map(|p| (p.round, figure(&p.a) / figure(&p.b))).collect();
    Spread::of(&ratios)
}

/// The report as a table.
#[must_use]
pub fn table(report: &Report) -> String {
    let CompareConfig { rounds, duration, bytes, .. } = &report.config;
    let [a, b] = report.config.names();
    let mut text = format!(
        "A={a} B={b}: {rounds} rounds x 2 pairs x {:.1} s on {} MiB in memory; {}, idle CPUs {}.\n\
         A/B: median of all pairs [lowest and highest median of a round]. IOPS: more is better; the others: less.\n\
         {:<12} {:>8} {:>8}  {:^18} {:^18} {:^18} {:^18} {:^18} {:^18} {:>7}\n",
        duration.as_secs_f64(),
        bytes >> 20,
        if report.pinned { "front-end on CPU 0, stacks on CPU 1" } else { "unpinned" },
        if report.awake {
            "kept awake"
        } else {
            "may halt (no cpuidle driver, or /dev/cpu_dma_latency cannot be opened)"
        },
        "row",
        "A IOPS",
        "B IOPS",
        "IOPS",
        "p50",
        "p99",
        "CPU/IO of both",
        "backend CPU/IO",
        "server CPU/IO",
        "noisy"
    );
    for result in &report.rows {
        text.push_str(&line(result));
        text.push('\n');
    }
    if report.rows.iter().any(|r| r.pairs.iter().any(|p| p.noisy)) {
        let _ = writeln!(
            text,
            "noisy: pairs in which others or the hypervisor used more than {} % of the CPUs in every try, of all pairs.",
            Usage::NOISE_MAX_PCT
        );
    }
    text
}

fn line(result: &RowResult) -> String {
    let pairs = &result.pairs;
    // "-" where one of the two has no such process.
    let cell = |figure: &dyn Fn(&Outcome) -> f64| ratio(pairs, figure).text(2);
    format!(
        "{:<12} {:>8.0} {:>8.0}  {:^18} {:^18} {:^18} {:^18} {:^18} {:^18} {:>3}/{}",
        result.row.name,
        median(pairs.iter().map(|p| p.a.iops)),
        median(pairs.iter().map(|p| p.b.iops)),
        cell(&|o| o.iops),
        cell(&|o| o.p50_us),
        cell(&|o| o.p99_us),
        cell(&Outcome::cpu_us_per_io_of_all),
        cell(&|o| o.cpu_us_per_io(0)),
        cell(&|o| o.cpu_us_per_io(1)),
        pairs.iter().filter(|p| p.noisy).count(),
        pairs.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(iops: f64) -> Outcome {
        Outcome { iops, ..Outcome::default() }
    }

    fn pair(round: u32, a: f64, b: f64) -> Pair {
        Pair { round, repeats: 0, noisy: false, a: outcome(a), b: outcome(b) }
    }

    #[test]
    fn a_ratio_is_of_neighbours_and_its_spread_of_rounds() {
        let pairs =
            [pair(0, 10.0, 10.0), pair(0, 30.0, 10.0), pair(1, 40.0, 10.0), pair(1, 5.0, 1.0)];
        assert_eq!(ratio(&pairs, |o| o.iops), Spread { median: 3.5, low: 2.0, high: 4.5 });
    }
}
