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
        pinned: true,
    };
    if pinned.rounds == 0 || pinned.bytes < 64 << 20 {
        bail!("--rounds must be at least 1 and --size at least 64M");
    }
    let name = section::name(args.a, args.b);
    args.docs.check(&name)?;
    let output = match args.output {
        Some(path) => path,
        None => target_dir()?.join("bench").join(format!("{}-{}.json", args.a, args.b)),
    };
    let mut configs = vec![pinned.clone()];
    if args.unpinned {
        configs.push(CompareConfig { pinned: false, ..pinned });
    }
    let mut reports = Vec::new();
    for config in &configs {
        let report = compare(config, |text| eprintln!("{text}"))?;
        let table =
            [table(&report), section::verdicts(&report), section::distance(&report)].concat();
        let output =
            if config.pinned { output.clone() } else { output.with_extension("unpinned.json") };
        keep(&output, &report, &table)?;
        writeln!(std::io::stdout(), "{table}\nevery run: {}\n", output.display())?;
        reports.push(report);
    }
    let facts = args.docs.facts(reports[0].awake);
    let stem = match args.docs.folder() {
        // The default comparison is the one that the documents show first.
        Some(folder) if (args.a, args.b) == (Kind::Baton, Kind::QsdNbdkit) => folder.join("bench"),
        Some(folder) => folder.join(&name),
        None => output.with_extension(""),
    };
    let title = format!("IOPS of {} against {}", args.a, args.b);
    plot::write(&stem, &title, &facts, &plot::rows(&reports))?;
    writeln!(std::io::stdout(), "plot: {}.svg and .png", stem.display())?;
    args.docs.write(&name, &section::section(&facts, &reports))?;
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
