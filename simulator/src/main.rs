//! `baton-sim`: plays worlds of the simulator and says in which of them a rule
//! of the handoff was broken.

use std::io::{self, Write};
use std::process::ExitCode;

use baton_simulator::bug::Bug;
use baton_simulator::coverage::Coverage;
use baton_simulator::ending::{Ending, Endings};
use baton_simulator::fault::{Fault, Hits, Point};
use baton_simulator::run;
use clap::Parser;

/// Simulate handoffs with accidents, and check what the guests saw.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Handoffs to simulate; a world has a few.
    #[arg(long, default_value_t = 10_000)]
    handoffs: u64,
    /// The first world's seed; the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Play only the world of `--seed` and print what happens in it.
    #[arg(long)]
    trace: bool,
    /// Put this bug into the world: it must be found.
    #[arg(long)]
    bug: Option<Bug>,
    /// Say how often each pair of state and event was reached.
    #[arg(long)]
    coverage: bool,
    /// Go on after a broken rule, and count.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    // Nobody who reads it: nothing was shown to hold.
    play(&Args::parse(), &mut io::stdout().lock()).unwrap_or(ExitCode::FAILURE)
}

fn play(args: &Args, out: &mut impl Write) -> io::Result<ExitCode> {
    if args.trace {
        let report = run(args.seed, args.bug, true);
        report.trace.lines().iter().try_for_each(|line| writeln!(out, "{line}"))?;
        writeln!(out, "trace hash {:016x}", report.trace.hash())?;
        return Ok(match report.violation {
            None => ExitCode::SUCCESS,
            Some(violation) => {
                writeln!(out, "seed={} {violation}", report.seed)?;
                ExitCode::FAILURE
            }
        });
    }
    let (mut hits, mut handoffs, mut endings) = (Hits::default(), 0, Endings::default());
    let (mut coverage, mut broken) = (Coverage::default(), 0u64);
    for seed in args.seed.. {
        if handoffs >= args.handoffs {
            break;
        }
        let report = run(seed, args.bug, false);
        hits.add(&report.hits);
        handoffs += report.handoffs;
        endings.add(&report.endings);
        coverage.add(&report.coverage);
        if let Some(violation) = report.violation {
            let step = report.trace.steps();
            writeln!(out, "seed={seed} step={step} {violation}")?;
            let bug = args.bug.map_or(String::new(), |bug| format!(" --bug {bug}"));
            writeln!(out, "  to read it: baton-sim --seed {seed} --trace{bug}")?;
            broken += 1;
            if !args.keep_going {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    writeln!(out, "{handoffs} handoffs; they ended so:")?;
    for (ending, count) in Ending::ALL.iter().zip(endings.handoffs) {
        writeln!(out, "  {count:8} {ending}")?;
    }
    let Endings { evacuated, booted, .. } = endings;
    writeln!(out, "  {evacuated:8} of them then FENCE: the winner's host was gone")?;
    writeln!(out, "  {booted:8} of them then a start from the disks: the memory was lost")?;
    writeln!(out, "what went wrong:")?;
    for (fault, hits) in Fault::ALL.iter().zip(hits.faults) {
        writeln!(out, "  {hits:8} {fault:?}")?;
    }
    for ((point, hits), sprung) in Point::ALL.iter().zip(hits.points).zip(hits.sprung) {
        writeln!(out, "  {hits:8} {point:?}, {sprung} with a fault")?;
    }
    if args.coverage {
        writeln!(out, "reached:")?;
        write!(out, "{coverage}")?;
    }
    let missing = [hits.missing(), endings.missing(), coverage.missing()].concat();
    missing.iter().try_for_each(|what| writeln!(out, "never happened: {what}"))?;
    if broken > 0 {
        writeln!(out, "{broken} worlds with a broken rule")?;
    }
    let good = broken == 0 && missing.is_empty();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
