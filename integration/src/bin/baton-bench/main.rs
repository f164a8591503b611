//! `baton-bench`: load on one vhost-user disk, or two stacks side by side (`make bench`).

mod compare;
mod docs;
mod shares;

use anyhow::{Context, Result, bail};
use baton_integration::bench::cost;
use baton_integration::bench::cpu::hold_cpus_awake;
use baton_integration::bench::idle;
use baton_integration::bench::load::{Job, Pattern, run};
use baton_integration::bench::outcome::Outcome;
use baton_integration::bench::scale;
use clap::{Args, Parser, Subcommand};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Load generator for vhost-user-blk.
#[derive(Debug, Parser)]
#[command(
    name = "baton-bench",
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    load: Option<LoadArgs>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure Baton and a peer in turn, and print ratios
    Compare(compare::CompareArgs),
    /// See how evenly four full queues are served
    Fair(shares::FairArgs),
    /// See what a busy neighbour on the same server costs a tenant
    Tenants(shares::TenantsArgs),
    /// See what keeping a dirty log costs, as during a migration
    DirtyLog(compare::DirtyLogArgs),
    /// Count what a request costs: instructions, system calls, allocations
    Cost(CostArgs),
    /// See what a request costs as queues, volumes and their sizes grow
    Scale(ScaleArgs),
    /// See what busy polling brings, and what it takes
    Polling(shares::PollingArgs),
    /// Watch backends with idle guests: CPU, wake-ups, memory
    Idle(IdleArgs),
}

#[derive(Debug, Args)]
struct ScaleArgs {
    /// Measurements of each point
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct IdleArgs {
    /// Backends, each with a guest and a volume of its own
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    backends: u16,
    /// Queues of each guest's disk
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Seconds to watch
    #[arg(long, default_value_t = 30.0)]
    seconds: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CostArgs {
    /// Compare with the stored costs, and fail where one differs by more than 5 %
    #[arg(long, conflicts_with = "bless")]
    check: Option<PathBuf>,
    /// Store the costs here
    #[arg(long)]
    bless: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// The back-end's vhost-user socket
    #[arg(long)]
    socket: PathBuf,
    /// What to do with the disk
    #[arg(long, value_enum, default_value = "randread")]
    rw: Pattern,
    /// Bytes in a request, such as 4k
    #[arg(long, value_parser = size, default_value = "4k")]
    bs: u64,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1)]
    depth: u16,
    /// Queues used
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Seconds measured, after a fifth of that to warm up
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Part of the disk used, from its start
    #[arg(long, value_parser = size)]
    span: Option<u64>,
    /// One thread for each queue, instead of one for all
    #[arg(long)]
    threads: bool,
    /// Stamp what is written and check what is read back; best with --rw randrw
    #[arg(long)]
    verify: bool,
    /// Keep a dirty log, as during a migration, and check that what the device writes is in it
    #[arg(long)]
    dirty_log: bool,
    /// Seed of the random places
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Processes whose CPU time is measured, such as 12,34
    #[arg(long, value_delimiter = ',')]
    pids: Vec<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// "128k", "1G", "4096": powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, shift) = match lower.char_indices().last() {
        Some((at, 'k')) => (&lower[..at], 10),
        Some((at, 'm')) => (&lower[..at], 20),
        Some((at, 'g')) => (&lower[..at], 30),
        _ => (&lower[..], 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("'{text}' is not a size; write 4k, 128k, 1G or bytes"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

fn seconds(value: f64) -> Result<Duration> {
    if !(0.05..=600.0).contains(&value) {
        bail!("--seconds must be from 0.05 to 600");
    }
    Ok(Duration::from_secs_f64(value))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (cli.command, cli.load) {
        (Some(Command::Compare(args)), _) => compare::run(args),
        (Some(Command::DirtyLog(args)), _) => compare::dirty_log(args),
        (Some(Command::Fair(args)), _) => shares::fair(args),
        (Some(Command::Tenants(args)), _) => shares::tenants(args),
        (Some(Command::Polling(args)), _) => shares::polling(args),
        (Some(Command::Cost(args)), _) => run_cost(args),
        (Some(Command::Scale(args)), _) => run_scale(args),
        (Some(Command::Idle(args)), _) => run_idle(args),
        (None, Some(args)) => run_load(args),
        (None, None) => Err(anyhow::anyhow!("give --socket, or the command compare; see --help")),
    };
    match done {
        Ok(code) => code,
        Err(e) => {
            eprintln!("baton-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_load(args: LoadArgs) -> Result<ExitCode> {
    let duration = seconds(args.seconds)?;
    let _awake = hold_cpus_awake();
    let outcome = run(&Job {
        socket: args.socket,
        pattern: args.rw,
        block_bytes: usize::try_from(args.bs)?,
        depth: args.depth,
        queues: args.queues,
        thread_per_queue: args.threads,
        warmup: duration / 5,
        duration,
        verify: args.verify,
        span_bytes: args.span,
        stride_bytes: None,
        dirty_log: args.dirty_log,
        seed: args.seed,
        pids: args.pids,
    })?;
    let text = if args.json {
        serde_json::to_string_pretty(&outcome)?
    } else {
        in_words(&outcome, args.bs)
    };
    writeln!(std::io::stdout(), "{text}")?;
    for finding in &outcome.findings {
        eprintln!("baton-bench: {finding}");
    }
    Ok(if outcome.errors + outcome.bad_reads > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn in_words(outcome: &Outcome, block_bytes: u64) -> String {
    let Outcome {
        iops, p50_us, p99_us, p999_us, max_us, errors, bad_reads, checked, usage, ..
    } = outcome;
    let mut text = format!(
        "{iops:.0} IOPS, {:.0} MB/s; p50 {p50_us:.1} us, p99 {p99_us:.1} us, p99.9 {p999_us:.1} us, max {max_us:.0} us\n\
         errors {errors}; checked {checked}, bad {bad_reads}; others {:.1} %, steal {:.1} % of the CPUs",
        iops * block_bytes as f64 / 1e6,
        usage.others_pct,
        usage.steal_pct
    );
    for index in 0..usage.processes_s.len() {
        text.push_str(&format!(
            "\nprocess {}: {:.2} us of CPU per request",
            index + 1,
            outcome.cpu_us_per_io(index)
        ));
    }
    if let Some(pages) = outcome.dirty_pages {
        text.push_str(&format!("\npages in the dirty log: {pages}"));
    }
    text
}

fn run_cost(args: CostArgs) -> Result<ExitCode> {
    let costs = cost::measure(|work| eprintln!("counting {work}"))?;
    let compiler = compiler()?;
    let text = if args.json { serde_json::to_string_pretty(&costs)? } else { cost::table(&costs) };
    writeln!(std::io::stdout(), "{text}")?;
    if let Some(path) = args.bless {
        let stored = cost::Stored { compiler, costs };
        fs::write(&path, serde_json::to_string_pretty(&stored)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = args.check else { return Ok(ExitCode::SUCCESS) };
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let stored: cost::Stored = serde_json::from_slice(&text)
        .with_context(|| format!("{} holds no costs", path.display()))?;
    if stored.compiler != compiler {
        eprintln!(
            "baton-bench: the stored costs are of {}, this is {compiler}: instructions may differ by 15 % more",
            stored.compiler
        );
    }
    let complaints = cost::complaints(&stored, &costs, &compiler);
    for complaint in &complaints {
        eprintln!("baton-bench: {complaint}");
    }
    if complaints.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "baton-bench: if that is meant to be, store it with `make bench-cost BLESS=1` and say why in the commit"
    );
    Ok(ExitCode::FAILURE)
}

fn run_scale(args: ScaleArgs) -> Result<ExitCode> {
    let scale = scale::measure(args.rounds, seconds(args.seconds)?, |text| eprintln!("{text}"))?;
    let text = if args.json { serde_json::to_string_pretty(&scale)? } else { scale::table(&scale) };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

fn run_idle(args: IdleArgs) -> Result<ExitCode> {
    let idle = idle::measure(usize::from(args.backends), args.queues, seconds(args.seconds)?)?;
    let text = if args.json { serde_json::to_string_pretty(&idle)? } else { idle::table(&idle) };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// What the programs were built with, most likely.
fn compiler() -> Result<String> {
    let said = std::process::Command::new("rustc").arg("--version").output();
    Ok(String::from_utf8(said.context("cannot run rustc")?.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("512"), Ok(512));
        assert!(size("").is_err() && size("4kb").is_err() && size("99999999999999G").is_err());
    }
}
