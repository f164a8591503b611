//! `baton-faults` (`make faults`): the fault matrix. See `faults`.
//!
//! Exit status 0 when every case kept every promise and every point was passed.

use anyhow::{Context, Result};
use baton_integration::ceph::{Ceph, Objects, skip_without_ceph};
use baton_integration::faults::case::{Case, Engine, POINTS, Story, all, shuffled};
use baton_integration::faults::report::{Report, Row};
use baton_integration::faults::run::{Times, run};
use baton_integration::images::{SharedCeph, add_users};
use baton_integration::workspace::{TestDir, target_dir};
use clap::Parser;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// So many cases have one cluster: each leaves images in it, and its disk is small.
const CLUSTER_CASES: usize = 20;

/// So many more cases of a point at which nobody was hurt.
const CHANCES: usize = 5;

/// Kills and freezes every process of a migration at every message boundary.
#[derive(Parser)]
struct Args {
    /// Where the VM's volumes are. On `rbd` each job has a cluster of its own.
    #[arg(long, value_enum, default_value = "baton")]
    engine: Engine,
    /// Only cases whose name contains all of these.
    #[arg(long)]
    filter: Vec<String>,
    /// Only the first so many cases, which are spread over points, victims and faults.
    #[arg(long)]
    cases: Option<usize>,
    /// Begins no case after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Order of the cases; a new one by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Skips so many cases of that order: to go on with an earlier run.
    #[arg(long, default_value_t = 0)]
    skip: usize,
    /// So many cases at a time; most of a case is waiting for what is frozen.
    #[arg(long, default_value = "1")]
    jobs: NonZeroUsize,
    /// How long a frozen process stays so, milliseconds.
    #[arg(long, default_value_t = 1500)]
    freeze_ms: u64,
    /// Prints the cases and runs none.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match play(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn play(args: &Args) -> Result<bool> {
    let seed = args.seed.map_or_else(new_seed, Ok)?;
    let cases: Vec<Case> = shuffled(all(args.engine), seed)
        .into_iter()
        .filter(|case| {
            let name = case.to_string();
            args.filter.iter().all(|part| name.contains(part.as_str()))
        })
        .skip(args.skip)
        .take(args.cases.unwrap_or(usize::MAX))
        .collect();
    if args.list {
        for case in &cases {
            say(&case.to_string());
        }
        return Ok(true);
    }
    if args.engine == Engine::Rbd && skip_without_ceph("the fault matrix on RBD") {
        say("0 passed, 0 failed");
        return Ok(true);
    }
    say(&format!("faults: {} cases, seed {seed}", cases.len()));
    let mut report = Report { seed, ..Report::default() };
    let begun = play_all(args, &cases, args.seconds, &mut |number, row, hits| {
        note(&mut report, &format!("{number:5}"), row, &hits);
    })?;
    if begun < cases.len() {
        let next = args.skip + begun;
        say(&format!("faults: the time is over; go on with --seed {seed} --skip {next}"));
    }
    let tried: BTreeSet<&str> =
        cases[..begun].iter().filter(|case| is_sure(case)).map(|case| case.point).collect();
    play_missed(args, &cases, &tried, &mut report)?;
    let folder = target_dir()?;
    let name = if args.engine == Engine::Baton { "report" } else { "report-rbd" };
    report.write(&folder, name)?;
    // A part of the matrix is asked for its own points, and all of it, or of its beginning, for every one there is.
    let is_part = !args.filter.is_empty() || args.skip > 0 || args.cases.is_some();
    let points: Vec<&str> = POINTS
        .iter()
        .filter(|point| point.engines.contains(&args.engine))
        .map(|point| point.name)
        .filter(|name| !is_part || tried.contains(name))
        .collect();
    let complaints = report.complaints(&points);
    for complaint in &complaints {
        say(&format!("faults: {complaint}"));
    }
    let good = report.rows.iter().filter(|row| row.outcome.is_some()).count();
    say(&format!("faults: the table is in {}/{name}.txt", folder.display()));
    say(&format!("{good} passed, {} failed", complaints.len()));
    Ok(complaints.is_empty() && good > 0)
}

/// In a race a point may be missed.
fn is_sure(case: &Case) -> bool {
    case.story != Story::Race
}

fn note(report: &mut Report, number: &str, row: Row, hits: &str) {
    say(&format!("{number} {}", row.line()));
    report.count_hits(hits);
    report.rows.push(row);
}

/// Plays more cases of the points at which nobody was hurt: once that may be so anywhere, on a busy machine.
fn play_missed(
    args: &Args,
    cases: &[Case],
    tried: &BTreeSet<&str>,
    report: &mut Report,
) -> Result<()> {
    for point in tried {
        let chances: Vec<Case> =
            cases.iter().filter(|case| is_sure(case) && case.point == *point).copied().collect();
        for chance in chances.chunks(1).take(CHANCES) {
            if report.has_hurt_at(point) {
                break;
            }
            play_all(args, chance, None, &mut |_, row, hits| note(report, "again", row, &hits))?;
        }
    }
    Ok(())
}

/// Plays the cases in their order, some at a time, and hands each to `done` with its number and the points that were
/// passed in it. Returns how many were begun, all of which have ended.
fn play_all(
    args: &Args,
    cases: &[Case],
    seconds: Option<u64>,
    done: &mut dyn FnMut(usize, Row, String),
) -> Result<usize> {
    let times =
        Times { freeze: Duration::from_millis(args.freeze_ms), dead: Duration::from_millis(300) };
    let began = Instant::now();
    let is_time_over = || seconds.is_some_and(|most| began.elapsed().as_secs() >= most);
    let next = AtomicUsize::new(0);
    let (sender, played) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.get() {
            let (sender, next) = (sender.clone(), &next);
            // A daemon dies with the thread that started it, so a thread plays whole cases.
            scope.spawn(move || {
                let (mut ours, mut played) = (None, 0);
                loop {
                    if is_time_over() {
                        return;
                    }
                    if played % CLUSTER_CASES == 0 {
                        // The old one goes first.
                        drop(ours.take());
                        ours = match cluster(args.engine) {
                            Ok(cluster) => cluster,
                            Err(error) => return drop(sender.send(Err(error))),
                        };
                    }
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&case) = cases.get(index) else { return };
                    let ceph = ours.as_ref().map(|(ceph, _)| ceph);
                    let result = one(case, times, ceph).map(|(row, hits)| (index, row, hits));
                    // What a failed case has left may fail the next ones: those get another cluster.
                    let failed = result.as_ref().is_ok_and(|(_, row, _)| row.outcome.is_none());
                    played = if failed { 0 } else { played + 1 };
                    // Nobody listens after a failure of the harness itself.
                    if sender.send(result).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut begun = 0;
        for case in played {
            let (index, row, hits) = case?;
            done(args.skip + index + 1, row, hits);
            begun += 1;
        }
        Ok(begun)
    })
}

/// A cluster with its directory, where the engine is one. What dies of it in a case is started again, with what it had.
fn cluster(engine: Engine) -> Result<Option<(SharedCeph, TestDir)>> {
    if engine == Engine::Baton {
        return Ok(None);
    }
    let begin = |dir: TestDir| -> Result<(SharedCeph, TestDir)> {
        let ceph = Ceph::start_with(dir.path(), Objects::Disk, "")?;
        add_users(&ceph)?;
        Ok((Arc::new(Mutex::new(ceph)), dir))
    };
    // Syncs cost nothing in memory; an older kernel's tmpfs has no O_DIRECT, which the OSD needs.
    let cluster = TestDir::in_memory("faults-ceph").and_then(begin);
    cluster.or_else(|_| TestDir::new("faults-ceph").and_then(begin)).map(Some)
}

/// A row of the table, and a line for each point that a process passed.
fn one(case: Case, times: Times, ceph: Option<&SharedCeph>) -> Result<(Row, String)> {
    let dir = TestDir::in_memory("faults")?;
    let hits = dir.join("hits");
    let began = Instant::now();
    let result = run(case, times, dir.path(), &hits, ceph);
    if result.is_err() {
        dir.keep();
    }
    Ok((Row::new(case, result, began.elapsed()), fs::read_to_string(&hits).unwrap_or_default()))
}

fn new_seed() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(u64::from(now.subsec_nanos()) ^ now.as_secs())
}

fn say(text: &str) {
    // Nobody reads: the outcome is in the exit status.
    let _ = writeln!(std::io::stdout(), "{text}");
}
