//! `baton-bench-handoff`: what a handoff costs (`make bench-handoff`).

use anyhow::{Result, bail};
use baton_integration::bench::cpu::hold_cpus_awake;
use baton_integration::bench::document::{machine, replace};
use baton_integration::bench::handoff::{
    Figures, Many, Messages, Moves, Syncs, distant_fleet, fleet, many, messages, moves, syncs,
};
use baton_integration::workspace::TestDir;
use clap::Parser;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// How far the servers are from the hosts in the second table.
const ONE_WAY: Duration = Duration::from_millis(5);
/// Its section in docs/performance.md.
const SECTION: &str = "bench-handoff";

/// Measures handoffs in fast mode between two backends and storage servers on this machine.
#[derive(Debug, Parser)]
#[command(name = "baton-bench-handoff")]
struct Cli {
    /// Moves of one volume
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// Moves of 64 volumes on 8 servers
    #[arg(long, default_value_t = 300)]
    wide_runs: usize,
    /// Moves with the servers at a distance: of one volume, and of 64
    #[arg(long, default_value_t = 50)]
    distant_runs: usize,
    /// Handoffs at the same time
    #[arg(long, default_value_t = 1000)]
    many: usize,
    /// Replace the section between the markers in this file
    #[arg(long)]
    write: Option<PathBuf>,
    /// Commit to name in the section
    #[arg(long, default_value = "unknown")]
    commit: String,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if [cli.runs, cli.wide_runs, cli.distant_runs, cli.many].contains(&0) {
        bail!(
            "nothing to measure: --runs, --wide-runs, --distant-runs and --many must be at least 1"
        );
    }
    let awake = hold_cpus_awake();
    let on = |what: &str| -> Result<TestDir> {
        eprintln!("bench-handoff: {what}");
        TestDir::new("bench-handoff")
    };
    let move_on = |what: &str, servers, volumes, mode, runs| -> Result<Moves> {
        let dir = on(what)?;
        let mut fleet = fleet(dir.path(), servers, volumes)?;
        fleet.mode = mode;
        moves(&fleet, dir.path(), runs)
    };
    let small = move_on("one volume", 1, 1, "fast", cli.runs)?;
    let durable = move_on("one volume, base mode", 1, 1, "base", cli.runs)?;
    let wide = move_on("64 volumes on 8 servers", 8, 64, "fast", cli.wide_runs)?;
    let move_far = |what: &str, servers, volumes| -> Result<Moves> {
        let dir = on(what)?;
        let fleet = distant_fleet(dir.path(), servers, volumes, ONE_WAY)?;
        moves(&fleet, dir.path(), cli.distant_runs)
    };
    let distant = Distant {
        small: move_far("one volume at a distance", 1, 1)?,
        wide: move_far("64 volumes at a distance", 8, 64)?,
        messages: {
            let dir = on("messages at a distance")?;
            let fleet = distant_fleet(dir.path(), 1, 1, ONE_WAY)?;
            messages(&fleet, dir.path(), cli.distant_runs)?
        },
    };
    let messages = {
        let dir = on("messages")?;
        messages(&fleet(dir.path(), 1, 1)?, dir.path(), cli.runs)?
    };
    let syncs = syncs(on("calls to the disk")?.path(), 5)?;
    let many_at_once = many(on("many at once")?.path(), cli.many)?;
    let result =
        Outcome { small, durable, wide, distant, messages, syncs, many: (cli.many, many_at_once) };
    let text = section(&result, &cli.commit, awake.is_some());
    // Nobody may be reading.
    let _ = writeln!(std::io::stdout(), "{text}");
    match &cli.write {
        Some(file) => replace(file, SECTION, &text),
        None => Ok(()),
    }
}

/// With the servers at a distance.
struct Distant {
    small: Moves,
    wide: Moves,
    messages: Messages,
}

struct Outcome {
    small: Moves,
    durable: Moves,
    wide: Moves,
    distant: Distant,
    messages: Messages,
    syncs: Option<Syncs>,
    many: (usize, Many),
}

fn section(result: &Outcome, commit: &str, awake: bool) -> String {
    let Outcome { small, durable, wide, distant, messages, syncs, many: (count, many) } = result;
    let mut text = String::new();
    let awake = if awake { "kept from halting" } else { "free to halt" };
    let _ = writeln!(text, "{}, idle CPUs {awake}, commit {commit}:\n", machine());
    let _ = writeln!(text, "| what | runs | p50 | p99 | target |\n|---|---|---|---|---|");
    let mut row = |what: &str, figures: &Figures, target: &str| {
        let (p50, p99) = (figures.quantile(0.5), figures.quantile(0.99));
        let _ =
            writeln!(text, "| {what} | {} | {} | {} | {target} |", figures.len(), ms(p50), ms(p99));
    };
    row("one volume: added gap", &small.added, "p50 1 ms, p99 5 ms");
    row("- of these, runs in which no CPU stood still", &small.added_awake, "");
    row("- gap of a move", &small.moved, "");
    row("- gap of the same with the fence off", &small.unguarded, "");
    row("- gap of a pause on one backend", &small.paused, "");
    row("- move less pause", &small.over_pause, "");
    row("- drain: ring stop to the end of what was under way", &small.drain, "shown apart");
    row("- SEAL to SEALED", &small.seal, "1 round trip + longest in flight");
    row("- ACTIVATE to its answer", &small.activate, "1 round trip");
    row("one volume in base mode: added gap", &durable.added, "2 syncs more");
    row("- SEAL to SEALED", &durable.seal, "1 sync");
    row("- ACTIVATE to its answer", &durable.activate, "1 sync");
    row("64 volumes on 8 servers: added gap", &wide.added, "p99 10 ms");
    row("- of these, runs in which no CPU stood still", &wide.added_awake, "");
    row("- gap of a move", &wide.moved, "");
    row("- gap of the same with the fence off", &wide.unguarded, "");
    row("- gap of a pause on one backend", &wide.paused, "");
    row("- move less pause", &wide.over_pause, "");
    row("- drain", &wide.drain, "shown apart");
    row("- SEAL to all SEALED", &wide.seal, "1 round trip + longest in flight");
    row("- ACTIVATE to its answer", &wide.activate, "1 round trip");
    row("- CPU time of backends and servers, move", &wide.moved_cpu, "");
    row("- CPU time of the same with the fence off", &wide.unguarded_cpu, "");
    row("forced FENCE, over HTTP", &messages.fence, "10 ms + drain");
    row("- wait for the disk in it", &messages.fence_store, "");
    row("- drain in it", &messages.fence_drain, "shown apart");
    row(
        "forced FENCE of an owner with 1 MiB of writes under way",
        &messages.fence_busy,
        "10 ms + drain",
    );
    row("- drain in it", &messages.fence_busy_drain, "shown apart");
    row("RECLAIM after a seal", &messages.reclaim, "2 round trips + 1 fsync");
    row("for comparison: round trip (PING)", &messages.rtt, "");
    row("for comparison: round trip (PING) after 20 ms of silence", &messages.rtt_idle, "");
    row("for comparison: 4 KiB overwrite + fdatasync", &messages.sync, "");
    let _ = writeln!(
        text,
        "\nMade again, because other programs had more than 1 ms of the processors in what is measured of them: {} runs with one volume, {} in base mode, {} with 64 volumes.",
        small.disturbed, durable.disturbed, wide.disturbed
    );
    text.push_str(&in_round_trips(distant));
    let _ = writeln!(
        text,
        "{count} handoffs at once on one server: first SEAL to last ACTIVATED {:.0} ms (target 1 s); ARM of all {:.0} ms before, SETTLE of all {:.0} ms after.",
        many.blackout_s * 1e3,
        many.arm_s * 1e3,
        many.settle_s * 1e3
    );
    let _ = match syncs {
        None => writeln!(text, "Calls to the disk were not traced: there is no strace here."),
        Some(syncs) => writeln!(
            text,
            "fsync, fdatasync, sync_file_range and msync of the storage server in five traced moves: {} from the stop to the answer of ACTIVATE, {} from there to the guest's first answer, {} later. The decision is stored 200 ms behind its answer; nobody waits for that.",
            syncs.before_decision, syncs.before_first_io, syncs.later
        ),
    };
    text
}

/// What is a matter of messages shows where these take longer than all else.
fn in_round_trips(Distant { small, wide, messages }: &Distant) -> String {
    let rtt = messages.rtt_idle.quantile(0.5);
    let mut text = format!(
        "\nThe servers {} away in each direction (a round trip of PING: {}), in round trips:\n\n| what | runs | p50 | p99 | target |\n|---|---|---|---|---|\n",
        ms(ONE_WAY.as_secs_f64() * 1e6),
        ms(rtt)
    );
    let sync = format!("2, and 1 fsync ({:.2})", messages.sync.quantile(0.5) / rtt);
    for (what, figures, target) in [
        ("one volume: SEAL to SEALED", &small.seal, "1 + longest in flight"),
        ("- ACTIVATE to its answer", &small.activate, "1"),
        ("- added gap", &small.added, ""),
        ("64 volumes on 8 servers: SEAL to all SEALED", &wide.seal, "1 + longest in flight"),
        ("- ACTIVATE to its answer", &wide.activate, "1"),
        ("- added gap", &wide.added, ""),
        ("RECLAIM after a seal", &messages.reclaim, sync.as_str()),
    ] {
        let [p50, p99] = [0.5, 0.99].map(|part| figures.quantile(part) / rtt);
        let _ = writeln!(text, "| {what} | {} | {p50:.2} | {p99:.2} | {target} |", figures.len());
    }
    text.push('\n');
    text
}

fn ms(us: f64) -> String {
    format!("{:.2} ms", us / 1e3)
}
