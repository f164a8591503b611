//! `baton-splitbrain` (`make demo-splitbrain`): what becomes of a volume when a live migration goes wrong, on real
//! guests.
//!
//! Exit status 0 when the replays could be run, whatever they showed; 1 when not.

use anyhow::{Context, Result, bail};
use baton_integration::guest;
use baton_integration::splitbrain::baton::BatonStack;
use baton_integration::splitbrain::peer::SharedFile;
use baton_integration::splitbrain::{
    Outcome, Replay, Side, Stack, Step, Story, Verification, replay_dead_source_backend,
    replay_frozen_destination,
};
use baton_integration::workspace::{TestDir, system_program};
use clap::{Parser, ValueEnum};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

/// Replays two accidents of live migration and counts who writes the volume afterwards.
#[derive(Parser)]
struct Args {
    /// What serves the volume; all of them by default.
    #[arg(long)]
    stack: Option<StackKind>,
    /// One JSON object per replay instead of a story.
    #[arg(long)]
    json: bool,
}

/// What serves the volume to both hosts.
#[derive(Clone, Copy, ValueEnum)]
enum StackKind {
    /// A raw file on storage both hosts reach, with a qemu-storage-daemon on each.
    Qsd,
    /// A volume on baton-storage, with a baton-backend on each host.
    Baton,
}

impl StackKind {
    fn start(self, dir: &Path) -> Result<Box<dyn Stack>> {
        Ok(match self {
            Self::Qsd => Box::new(SharedFile::start(dir)?),
            Self::Baton => Box::new(BatonStack::start(dir)?),
        })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("splitbrain: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(why) = guest::missing() {
        bail!("{why}");
    }
    system_program("qemu-storage-daemon")?;
    let kinds = match args.stack {
        Some(kind) => vec![kind],
        None => StackKind::value_variants().to_vec(),
    };
    let mut summary = Vec::new();
    for replay in [Replay::FrozenDestination, Replay::DeadSourceBackend] {
        if !args.json {
            say(title(replay));
        }
        for &kind in &kinds {
            let outcome = play(kind, replay, args.json)?;
            if args.json {
                say(&serde_json::to_string(&outcome)?);
            } else {
                let said = conclusion(&outcome);
                say(&format!("\n  => {said}\n"));
                summary.push(format!("  {replay}, {}: {}", outcome.stack, short(&outcome)));
            }
        }
    }
    if !args.json {
        say(&format!("In this run:\n{}", summary.join("\n")));
    }
    Ok(())
}

fn play(kind: StackKind, replay: Replay, json: bool) -> Result<Outcome> {
    let dir = TestDir::new("splitbrain")?;
    let mut stack = kind.start(dir.path())?;
    let mut watch = |step: &Step| {
        if !json {
            say(&format!("  [{:5.1} s] {}", seconds(step), step.text));
        }
    };
    let mut story = Story::new(&mut watch);
    let outcome = match replay {
        Replay::FrozenDestination => {
            replay_frozen_destination(dir.path(), stack.as_mut(), &mut story)
        }
        Replay::DeadSourceBackend => {
            replay_dead_source_backend(dir.path(), stack.as_mut(), &mut story)
        }
    };
    let outcome = outcome.with_context(|| format!("the replay '{replay}' could not be run"));
    if outcome.is_err() {
        eprintln!("splitbrain: logs are kept in {}", dir.path().display());
        std::mem::forget(dir);
    }
    outcome
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds of a demo")]
fn seconds(step: &Step) -> f64 {
    step.at_ms as f64 / 1000.0
}

fn title(replay: Replay) -> &'static str {
    match replay {
        Replay::FrozenDestination => {
            "1. The destination freezes in the middle of a live migration, and thaws when nobody waits for it any more.\n   \
             The orchestrator makes no mistake: it cancels the migration, and only then lets the guest run on the source.\n"
        }
        Replay::DeadSourceBackend => {
            "2. The process that serves the source's disk dies while QEMU stops the guest.\n   \
             Nobody has said that all writes of the source have ended.\n"
        }
    }
}

fn conclusion(outcome: &Outcome) -> String {
    let Outcome { source, destination, .. } = outcome;
    let said = match (outcome.is_split_brain(), outcome.replay) {
        (true, _) => format!(
            "BOTH guests are running and writing one volume: source {} writes, destination {} writes.\n     \
             The source found {}.\n     The destination found {}.",
            source.writes,
            destination.writes,
            found(source),
            found(destination)
        ),
        (false, Replay::DeadSourceBackend) if destination.writes > 0 => format!(
            "QEMU called the migration COMPLETED, and the destination WRITES ({} writes), though the source's\n     \
             backend never said that it had stopped. A backend that was merely cut off would still be writing.",
            destination.writes
        ),
        (false, _) => format!(
            "one guest at most writes: source {} ({} writes), destination {} ({} writes).",
            source.vm, source.writes, destination.vm, destination.writes
        ),
    };
    match &outcome.verdict {
        Some(verdict) => format!("{said}\n     {verdict}"),
        None => said,
    }
}

fn short(outcome: &Outcome) -> String {
    let Outcome { source, destination, .. } = outcome;
    match (source.writes, destination.writes) {
        (0, 0) => "nobody writes".to_owned(),
        (n, 0) => format!("only the source writes ({n} writes, {})", found(source)),
        (0, n) => format!("only the destination writes ({n} writes, {})", found(destination)),
        (s, d) => format!("BOTH WRITE (source {s} writes, destination {d} writes)"),
    }
}

fn found(side: &Side) -> String {
    match &side.verification {
        Verification::Good => "its own data intact".to_owned(),
        Verification::Bad { errors, stale, corrupt, .. } => format!(
            "{stale} reads without its acknowledged writes, {corrupt} with data it never wrote, {errors} errors"
        ),
        Verification::Stalled => "nothing: its disk does not answer".to_owned(),
        Verification::NotRunning => "nothing: it does not run".to_owned(),
    }
}

fn say(text: &str) {
    // Nobody reads: the outcome is in the exit status.
    let _ = writeln!(std::io::stdout(), "{text}");
}
