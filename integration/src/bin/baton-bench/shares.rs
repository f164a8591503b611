//! `baton-bench fair`, `tenants` and `polling`: who gets what of a disk, of a server and of a core.

use crate::docs::DocsArgs;
use crate::{seconds, size};
use anyhow::Result;
use baton_integration::bench::cpu::hold_cpus_awake;
use baton_integration::bench::stack::Kind;
use baton_integration::bench::{fair, polling, tenants};
use clap::Args;
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(crate) struct FairArgs {
    /// What serves the disk
    #[arg(long, value_enum, default_value = "baton")]
    kind: Kind,
    /// Restarts of it
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Size of the disk, such as 1G
    #[arg(long, value_parser = size, default_value = "512M")]
    size: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    docs: DocsArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TenantsArgs {
    /// Restarts of everything
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only rows whose name contains this, such as "beside writes of 128"
    #[arg(long)]
    only: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    docs: DocsArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PollingArgs {
    /// Restarts of everything
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    docs: DocsArgs,
}

pub(crate) fn fair(args: FairArgs) -> Result<ExitCode> {
    args.docs.check("bench-fair")?;
    let time = seconds(args.seconds)?;
    let fair = fair::measure(args.kind, args.rounds, time, args.size, |text| eprintln!("{text}"))?;
    let table = fair::table(&fair);
    let text = if args.json { serde_json::to_string_pretty(&fair)? } else { table.clone() };
    writeln!(std::io::stdout(), "{text}")?;
    args.docs.write("bench-fair", &format!("{}. {table}", args.docs.facts(fair.awake)))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn tenants(args: TenantsArgs) -> Result<ExitCode> {
    args.docs.check("bench-tenants")?;
    let awake = hold_cpus_awake();
    let time = seconds(args.seconds)?;
    let rows =
        tenants::measure(args.rounds, time, args.only.as_deref(), |text| eprintln!("{text}"))?;
    let table = tenants::table(&rows);
    let text = if args.json { serde_json::to_string_pretty(&rows)? } else { table.clone() };
    writeln!(std::io::stdout(), "{text}")?;
    args.docs.write("bench-tenants", &format!("{}. {table}", args.docs.facts(awake.is_some())))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn polling(args: PollingArgs) -> Result<ExitCode> {
    args.docs.check("bench-polling")?;
    let polling =
        polling::measure(args.rounds, seconds(args.seconds)?, |text| eprintln!("{text}"))?;
    let table = polling::table(&polling);
    let text = if args.json { serde_json::to_string_pretty(&polling)? } else { table.clone() };
    writeln!(std::io::stdout(), "{text}")?;
    args.docs.write("bench-polling", &format!("{}. {table}", args.docs.facts(polling.awake)))?;
    Ok(ExitCode::SUCCESS)
}
