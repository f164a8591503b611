//! What a neighbour on the same storage server costs a tenant that has one request in flight.
//!
//! ```text
//!   CPU 0   tenant's front-end and backend         CPU 1   the storage server, alone
//!           neighbour's front-end and backend, which run when the tenant's do not
//! ```
//!
//! Tenants are on other hosts than the server, and on hosts of their own: what they take of each other's processor is
//! not the server's doing. So the neighbour's programs give way to the tenant's (SCHED_IDLE), and have the rest of the
//! CPU to saturate the server with. How busy the server was is measured, and a target is not called met otherwise.

use crate::baton::{Backend, Storage};
use crate::bench::compare::{QUIET_TRIES, sound};
use crate::bench::cpu::{hold_cpus_awake, on_own_thread, pin_this_thread, yielding_to_everybody};
use crate::bench::load::{Job, Pattern, run};
use crate::bench::outcome::Outcome;
use crate::bench::stack::fill;
use crate::bench::stats::Spread;
use crate::bench::targets::{Target, Verdict};
use crate::workspace::TestDir;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The tenant's p99 with the neighbour, in its p99 alone.
pub const P99: Target = Target::AtMost(5.0);
/// A server that is busy for less of the time has no need to let anybody wait.
const SATURATED: f64 = 0.9;

const QUEUES: u16 = 4;
const DEPTH: u16 = 128;
/// Of each volume.
const DISK_BYTES: u64 = 512 << 20;
/// From the neighbour's start until it has all its requests in flight.
const HEAD_START: Duration = Duration::from_millis(300);

/// What the neighbour does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// Random reads or writes.
    pub pattern: Pattern,
    /// Bytes in a request.
    pub block_bytes: usize,
}

const fn work(pattern: Pattern, kib: usize) -> Work {
    Work { pattern, block_bytes: kib << 10 }
}

/// All of them.
const NEIGHBOURS: [Work; 4] = [
    work(Pattern::RandRead, 4),
    work(Pattern::RandWrite, 4),
    work(Pattern::RandRead, 128),
    work(Pattern::RandWrite, 128),
];

/// The tenant alone and beside its neighbour, next to each other.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    /// Which restart.
    pub round: u32,
    /// Alone.
    pub alone: Outcome,
    /// With the neighbour.
    pub beside: Outcome,
    /// The neighbour's part.
    pub neighbour: Outcome,
    /// Others took part in every try.
    pub noisy: bool,
}

impl Pair {
    /// Part of the time that the server worked while the neighbour was there.
    #[must_use]
    pub fn server_busy(&self) -> f64 {
        let usage = &self.beside.usage;
        usage.processes_s.first().map_or(f64::NAN, |s| s / usage.seconds)
    }
}

/// One tenant's work beside one neighbour's.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The tenant's work, one request of 4 KiB at a time.
    pub tenant: Pattern,
    /// The neighbour's.
    pub neighbour: Work,
    /// All pairs in the order they were run.
    pub pairs: Vec<Pair>,
}

impl Row {
    /// "reads beside writes of 128 KiB".
    #[must_use]
    pub fn name(&self) -> String {
        let Work { pattern, block_bytes } = self.neighbour;
        format!("{} beside {} of {} KiB", word(self.tenant), word(pattern), block_bytes >> 10)
    }
}

fn word(pattern: Pattern) -> &'static str {
    if pattern == Pattern::RandRead { "reads" } else { "writes" }
}

/// Measures the rows whose name contains `only`, with everything started anew in each round.
pub fn measure(
    rounds: u32,
    time: Duration,
    only: Option<&str>,
    progress: impl FnMut(&str) + Send,
) -> Result<Vec<Row>> {
    if rounds == 0 {
        bail!("nothing to measure: --rounds must be at least 1");
    }
    let _awake = hold_cpus_awake();
    on_own_thread(|| measure_here(rounds, time, only, progress))
}

fn measure_here(
    rounds: u32,
    time: Duration,
    only: Option<&str>,
    mut progress: impl FnMut(&str),
) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = [Pattern::RandRead, Pattern::RandWrite]
        .into_iter()
        .flat_map(|tenant| NEIGHBOURS.map(|neighbour| Row { tenant, neighbour, pairs: Vec::new() }))
        .filter(|row| only.is_none_or(|only| row.name().contains(only)))
        .collect();
    if rows.is_empty() {
        bail!(
            "no row is called like that; there are \"reads beside writes of 128 KiB\" and the like"
        );
    }
    // Before this thread is bound to one of them.
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for round in 0..rounds {
        progress(&format!("round {} of {rounds}", round + 1));
        let house = House::start(cpus)?;
        for row in &mut rows {
            for half in 0..2 {
                let alone_first = (round + half) % 2 == 0;
                row.pairs.push(house.quiet_pair(row, round, alone_first, time)?);
            }
        }
    }
    Ok(rows)
}

/// A server with both tenants' volumes and backends.
struct House {
    storage: Storage,
    tenant: Backend,
    neighbour: Backend,
    /// Data and logs; goes last.
    _dir: TestDir,
}

impl House {
    /// The calling thread is on CPU 0 afterwards.
    fn start(cpus: usize) -> Result<Self> {
        let dir = TestDir::in_memory("tenants")?;
        // Processes have the affinity and the priority that the thread has which starts them.
        if cpus > 1 {
            pin_this_thread(1)?;
        }
        let storage = Storage::start(dir.path(), &[])?;
        pin_this_thread(0)?;
        let tenant = backend(dir.path(), &storage, "tenant", 1)?;
        let neighbour =
            yielding_to_everybody(|| backend(dir.path(), &storage, "neighbour", QUEUES))?;
        for disk in [&tenant, &neighbour] {
            fill(&disk.socket, DISK_BYTES)?;
        }
        Ok(Self { storage, tenant, neighbour, _dir: dir })
    }

    fn quiet_pair(&self, row: &Row, round: u32, alone_first: bool, time: Duration) -> Result<Pair> {
        let mut tries = 0;
        loop {
            let (alone, (beside, neighbour)) = if alone_first {
                let alone = self.tenant(row.tenant, time)?;
                (alone, self.beside(row, time)?)
            } else {
                let beside = self.beside(row, time)?;
                (self.tenant(row.tenant, time)?, beside)
            };
            tries += 1;
            let noisy = alone.usage.is_noisy() || beside.usage.is_noisy();
            if !noisy || tries == QUIET_TRIES {
                return Ok(Pair { round, alone, beside, neighbour, noisy });
            }
        }
    }

    fn tenant(&self, pattern: Pattern, time: Duration) -> Result<Outcome> {
        // All that belong to the measurement, the server first: the rest is noise.
        let daemons = [&self.storage.daemon, &self.tenant.daemon, &self.neighbour.daemon];
        let pids = daemons.map(|daemon| daemon.pid()).to_vec();
        sound(run(&Job::single(&self.tenant.socket, pids, pattern, time))?)
    }

    /// The tenant's run and the neighbour's around it.
    fn beside(&self, row: &Row, time: Duration) -> Result<(Outcome, Outcome)> {
        // Before and after the tenant's, with its warm-up and the time it takes to connect.
        let longer = HEAD_START * 2 + time * 3 / 2;
        let job = Job {
            socket: self.neighbour.socket.clone(),
            pattern: row.neighbour.pattern,
            block_bytes: row.neighbour.block_bytes,
            depth: DEPTH,
            queues: QUEUES,
            thread_per_queue: false,
            warmup: Duration::ZERO,
            duration: longer,
            verify: false,
            span_bytes: None,
            stride_bytes: None,
            dirty_log: false,
            seed: 2,
            pids: Vec::new(),
        };
        std::thread::scope(|scope| {
            let neighbour = scope.spawn(|| -> Result<(Outcome, Instant)> {
                let outcome = yielding_to_everybody(|| run(&job))?;
                Ok((sound(outcome)?, Instant::now()))
            });
            std::thread::sleep(HEAD_START);
            let tenant = self.tenant(row.tenant, time);
            let tenant_end = Instant::now();
            let (neighbour, end) = neighbour.join().expect("no panic in a load")?;
            if end < tenant_end {
                bail!("the neighbour had ended before the tenant was measured");
            }
            Ok((tenant?, neighbour))
        })
    }
}

fn backend(dir: &Path, storage: &Storage, name: &str, queues: u16) -> Result<Backend> {
    storage.create(name, DISK_BYTES)?;
    let queues = queues.to_string();
    Backend::start(dir, name, &storage.uri(name, None), &["--num-queues", &queues])
        .with_context(|| format!("the backend of the {name}"))
}

/// The p99 beside the neighbour in that alone, pair by pair.
#[must_use]
pub fn ratio(pairs: &[Pair]) -> Spread {
    of(pairs, |pair| pair.beside.p99_us / pair.alone.p99_us)
}

fn of(pairs: &[Pair], figure: impl Fn(&Pair) -> f64) -> Spread {
    let figures: Vec<(u32, f64)> = pairs.iter().map(|pair| (pair.round, figure(pair))).collect();
    Spread::of(&figures)
}

/// Whether the target is reached; in words, because a server with time to spare proves nothing.
#[must_use]
pub fn verdict(pairs: &[Pair]) -> String {
    let busy = of(pairs, Pair::server_busy).median;
    match P99.judge(ratio(pairs)) {
        verdict @ (Verdict::Met | Verdict::MetNotAlways)
            if !busy.is_finite() || busy < SATURATED =>
        {
            format!("{verdict}, but the server had time to spare")
        }
        verdict => verdict.to_string(),
    }
}

/// For people, and for docs/performance.md.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let rounds = rows.first().map_or(0, |row| row.pairs.len() / 2);
    let mut text = format!(
        "One request of 4 KiB in flight, alone and beside a neighbour with {QUEUES} queues of {DEPTH}; {rounds} rounds of two pairs. Median [lowest and highest round].\n\n\
         | tenant | neighbour | p99 alone, us | p99 beside it, us | ratio, {P99} | IOPS of the neighbour | server busy | noisy pairs |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        let of = |figure: &dyn Fn(&Pair) -> f64, digits| of(&row.pairs, figure).text(digits);
        let _ = writeln!(
            text,
            "| {} | {} of {} KiB | {} | {} | {}: {} | {} | {} % | {} of {} |",
            word(row.tenant),
            word(row.neighbour.pattern),
            row.neighbour.block_bytes >> 10,
            of(&|pair| pair.alone.p99_us, 1),
            of(&|pair| pair.beside.p99_us, 1),
            ratio(&row.pairs).text(2),
            verdict(&row.pairs),
            of(&|pair| pair.neighbour.iops, 0),
            of(&|pair| 100.0 * pair.server_busy(), 0),
            row.pairs.iter().filter(|pair| pair.noisy).count(),
            row.pairs.len(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cpu::Usage;

    fn pair(alone: f64, beside: f64, busy: f64) -> Pair {
        let outcome = |p99_us| Outcome { p99_us, ..Outcome::default() };
        let usage = Usage { seconds: 2.0, processes_s: vec![2.0 * busy, 9.0], ..Usage::default() };
        Pair {
            round: 0,
            alone: outcome(alone),
            beside: Outcome { usage, ..outcome(beside) },
            neighbour: Outcome { iops: 1234.0, ..Outcome::default() },
            noisy: false,
        }
    }

    #[test]
    fn a_server_with_time_to_spare_proves_nothing() {
        assert_eq!(verdict(&[pair(10.0, 40.0, 0.95)]), "met");
        let idle = verdict(&[pair(10.0, 40.0, 0.5)]);
        assert!(idle.contains("time to spare"), "{idle}");
        assert_eq!(verdict(&[pair(10.0, 60.0, 0.5)]), "**missed**", "missed all the same");
        assert_eq!(verdict(&[]), "**not measured**");
        let nobody =
            Pair { beside: Outcome { p99_us: 1.0, ..Outcome::default() }, ..pair(1.0, 1.0, 1.0) };
        assert!(verdict(&[nobody]).contains("time to spare"), "nobody looked at the server");
    }

    #[test]
    fn a_row_says_what_the_neighbour_did() {
        let row = Row {
            tenant: Pattern::RandRead,
            neighbour: NEIGHBOURS[3],
            pairs: vec![pair(10.0, 60.0, 0.95), pair(10.0, 80.0, 0.97)],
        };
        let text = table(&[row]);
        for part in [
            "| reads | writes of 128 KiB | 10.0 [10.0 10.0] | 70.0 [70.0 70.0] |",
            "| 7.00 [7.00 7.00]: **missed** | 1234 [1234 1234] | 96 [96 96] % | 0 of 2 |",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
