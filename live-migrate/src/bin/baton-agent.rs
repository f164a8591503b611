//! `baton-agent`: arguments, configuration, run.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use baton_live_migrate::agent::config::{Config, LogFormat};
use baton_live_migrate::agent::{self, StartError};
use baton_live_migrate::dev_ca;
use baton_live_migrate::identity::{Identity, Role};
use baton_live_migrate::problem::Problem;
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Wrong flags or configuration; clap uses the same number.
const USAGE: u8 = 2;
/// Could not start, or failed while running.
const FAILED: u8 = 1;

/// The host agent of Baton: starts backends of VMs and drives their monitors.
///
/// Exit codes: 0 stopped by a signal, 1 could not start or failed while running,
/// 2 wrong flags or configuration. Backends and monitors outlive it.
#[derive(Debug, Parser)]
#[command(name = "baton-agent", version, args_conflicts_with_subcommands = true)]
struct Flags {
    #[command(subcommand)]
    command: Option<Command>,
    /// TOML file
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a certificate authority to try Baton with, and certificates by it
    DevCa(DevCa),
}

#[derive(Debug, Args)]
struct DevCa {
    /// Directory to make; it must not exist
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of a host; may be given several times
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// Name of a coordinator; may be given several times
    #[arg(long, value_name = "NAME")]
    coordinator: Vec<String>,
    /// Name of an operator; may be given several times
    #[arg(long, value_name = "NAME")]
    operator: Vec<String>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(Command::DevCa(asked)) = flags.command {
        return make_ca(&asked);
    }
    // clap has seen to it that there is one.
    let config = match Config::load(&flags.config.unwrap_or_default()) {
        Ok(config) => config,
        Err(error) => return fail(USAGE, &error),
    };
    start_logging(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agent")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error),
    };
    let code = runtime.block_on(run(config));
    runtime.shutdown_background();
    code
}

async fn run(config: Config) -> ExitCode {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (mut terminate, mut interrupt) = match signals {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => return fail(FAILED, &error),
    };
    let agent = match agent::start(config).await {
        Ok(agent) => agent,
        // Starting it again would not help.
        Err(error @ (StartError::Credentials(_) | StartError::WrongHost { .. })) => {
            return fail(USAGE, &error);
        }
        Err(error) => return fail(FAILED, &error),
    };
    say(&format!("listening api={}", agent.address));
    // Fails only without systemd.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping: backends and monitors stay");
    agent.stop().await;
    ExitCode::SUCCESS
}

fn make_ca(asked: &DevCa) -> ExitCode {
    let names = [
        (Role::Host, &asked.host),
        (Role::Coordinator, &asked.coordinator),
        (Role::Operator, &asked.operator),
    ];
    let all =
        names.into_iter().flat_map(|(role, names)| names.iter().map(move |name| (role, name)));
    let identities: Result<Vec<_>, _> = all.map(|(role, name)| Identity::new(role, name)).collect();
    let identities = match identities {
        Ok(identities) => identities,
        Err(error) => return fail(USAGE, &error),
    };
    match dev_ca::write(&asked.dir, &identities) {
        Ok(()) => {
            say(&format!(
                "made {}: for trials only, since the authority's key lies there, too",
                asked.dir.display()
            ));
            ExitCode::SUCCESS
        }
        Err(error) => fail(FAILED, &error),
    }
}

fn start_logging(config: &Config) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(config.log_level)
        .with_writer(std::io::stderr)
        .with_target(false)
        // A log that cannot be written, on a full disk, must not end who writes it.
        .log_internal_errors(false);
    match config.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// One sentence, with its causes.
fn fail(code: u8, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    say(format!("baton-agent: {}", Problem::described(error)).trim_end());
    ExitCode::from(code)
}

fn say(line: &str) {
    // Nobody may be listening any more.
    let _ = writeln!(std::io::stderr(), "{line}");
}
