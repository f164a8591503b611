//! `baton-sim`: plays worlds of the simulator and says in which of them a rule
//! of the handoff was broken.

#![allow(clippy::print_stdout, reason = "its report is what it is for")]

use std::process::ExitCode;

use baton_simulator::bug::Bug;
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
    /// Go on after a broken rule, and count.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.trace {
        let report = run(args.seed, args.bug, true);
        report.trace.lines().iter().for_each(|line| println!("{line}"));
        println!("trace hash {:016x}", report.trace.hash());
        return match report.violation {
            None => ExitCode::SUCCESS,
            Some(violation) => {
                println!("seed={} {violation}", report.seed);
                ExitCode::FAILURE
            }
        };
    }
    let (mut hits, mut handoffs, mut won) = (Hits::default(), 0, [0; 2]);
    let (mut fenced, mut broken) = (0, 0u64);
    for seed in args.seed.. {
        if handoffs >= args.handoffs {
            break;
        }
        let report = run(seed, args.bug, false);
        hits.add(&report.hits);
        handoffs += report.handoffs;
        fenced += report.fenced;
        won.iter_mut().zip(report.won).for_each(|(sum, won)| *sum += won);
        if let Some(violation) = report.violation {
            let step = report.trace.steps();
            println!("seed={seed} step={step} {violation}");
            println!("  to read it: baton-sim --seed {seed} --trace");
            broken += 1;
            if !args.keep_going {
                return ExitCode::FAILURE;
            }
        }
    }
    println!(
        "{handoffs} handoffs: the source won {}, the destination {}; an operator had to end {fenced}",
        won[0], won[1]
    );
    for (fault, hits) in Fault::ALL.iter().zip(hits.faults) {
        println!("  {hits:8} {fault:?}");
    }
    for ((point, hits), sprung) in Point::ALL.iter().zip(hits.points).zip(hits.sprung) {
        println!("  {hits:8} {point:?}, {sprung} with a fault");
    }
    let missing = hits.missing();
    missing.iter().for_each(|what| println!("never happened: {what}"));
    if broken > 0 {
        println!("{broken} worlds with a broken rule");
    }
    if broken > 0 || !missing.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
