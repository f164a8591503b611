//! `baton-bench compare`: two stacks side by side.

use crate::docs::DocsArgs;
use crate::{seconds, size};
use anyhow::{Context, Result, bail};
use baton_integration::bench::compare::{CompareConfig, Report, compare, table};
use baton_integration::bench::stack::Kind;
use baton_integration::bench::{plot, section};
use baton_integration::workspace::target_dir;
use clap::Args;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The stack on top of the ratios
    #[arg(long, value_enum, default_value = "baton")]
    a: Kind,
    /// The stack it is measured against; the same as --a shows how well this machine can tell
    #[arg(long, value_enum, default_value = "qsd-nbdkit")]
    b: Kind,
    /// Restarts of both stacks
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds of each run
    #[arg(long)]
    seconds: Option<f64>,
    /// Size of each disk, such as 1G
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Only rows whose name contains this, such as r4k or q4
    #[arg(long)]
    only: Option<String>,
    /// A short run, to see whether it works: 2 rounds of 0.3 s on 256M
    #[arg(long)]
    quick: bool,
    /// Measure once more with nobody bound to a CPU: a second table
    #[arg(long)]
    unpinned: bool,
    /// Where every run is written as JSON, with the table beside it
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    docs: DocsArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DirtyLogArgs {
    /// What keeps the log
    #[arg(long, value_enum, default_value = "baton")]
    kind: Kind,
    /// Restarts of it
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Size of the disk, such as 1G
    #[arg(long, value_parser = size, default_value = "512M")]
    size: u64,
    /// Only rows whose name contains this, such as r4k or q4
    #[arg(long)]
    only: Option<String>,
    #[command(flatten)]
    docs: DocsArgs,
}

pub(crate) fn run(args: CompareArgs) -> Result<ExitCode> {
    let (rounds, run_seconds, bytes) =
        if args.quick { (2, 0.3, 256 << 20) } else { (5, 1.0, 1 << 30) };
    let pinned = CompareConfig {
        a: args.a,
        b: args.b,
        rounds: args.rounds.unwrap_or(rounds),
        duration: seconds(args.seconds.unwrap_or(run_seconds))?,
        bytes: args.size.unwrap_or(bytes),
        only: args.only,
        dirty_log: false,
        pinned: true,
    };
    let mut configs = vec![pinned.clone()];
    if args.unpinned {
        configs.push(CompareConfig { pinned: false, ..pinned });
    }
    measure(&configs, args.output, &args.docs)
}

pub(crate) fn dirty_log(args: DirtyLogArgs) -> Result<ExitCode> {
    let config = CompareConfig {
        a: args.kind,
        b: args.kind,
        rounds: args.rounds,
        duration: seconds(args.seconds)?,
        bytes: args.size,
        only: args.only,
        dirty_log: true,
        pinned: true,
    };
    measure(&[config], None, &args.docs)
}

/// Runs all of them, keeps and prints what they show, and writes the section if that was asked for.
fn measure(
    configs: &[CompareConfig],
    output: Option<PathBuf>,
    docs: &DocsArgs,
) -> Result<ExitCode> {
    let first = &configs[0];
    if first.rounds == 0 || first.bytes < 64 << 20 {
        bail!("--rounds must be at least 1 and --size at least 64M");
    }
    let name = section::name(first);
    docs.check(&name)?;
    let output = match output {
        Some(path) => path,
        None => target_dir()?.join("bench").join(format!("{name}.json")),
    };
    let mut reports = Vec::new();
    for config in configs {
        let report = compare(config, |text| eprintln!("{text}"))?;
        let table =
            [table(&report), section::verdicts(&report), section::distance(&report)].concat();
        let output =
            if config.pinned { output.clone() } else { output.with_extension("unpinned.json") };
        keep(&output, &report, &table)?;
        writeln!(std::io::stdout(), "{table}\nevery run: {}\n", output.display())?;
        reports.push(report);
    }
    let facts = docs.facts(reports[0].awake);
    let stem = match docs.folder() {
        // The default comparison is the one that the documents show first.
        Some(folder) if (first.a, first.b) == (Kind::Baton, Kind::QsdNbdkit) => {
            folder.join("bench")
        }
        Some(folder) => folder.join(&name),
        None => output.with_extension(""),
    };
    let [a, b] = first.names();
    plot::write(&stem, &format!("IOPS of {a} against {b}"), &facts, &plot::rows(&reports))?;
    writeln!(std::io::stdout(), "plot: {}.svg and .png", stem.display())?;
    docs.write(&name, &section::section(&facts, &reports))?;
    Ok(ExitCode::SUCCESS)
}

fn keep(output: &Path, report: &Report, table: &str) -> Result<()> {
    if let Some(dir) = output.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    fs::write(output, serde_json::to_string_pretty(report)?)
        .with_context(|| format!("cannot write {}", output.display()))?;
    fs::write(output.with_extension("txt"), table)?;
    Ok(())
}
