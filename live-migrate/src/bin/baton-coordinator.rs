//! `baton-coordinator`: arguments, configuration, run.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use baton_live_migrate::coordinator::config::Config;
use baton_live_migrate::coordinator::core::Down;
use baton_live_migrate::coordinator::server::{self, StartError};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Could not start, or failed while running.
const FAILED: u8 = 1;
/// Wrong flags or configuration; clap uses the same number.
const USAGE: u8 = 2;
/// A newer coordinator has taken over, or this one lost its journal and its term was too low: only then start it
/// again.
const SUPERSEDED: u8 = 5;
/// One of several has led and leads no more: start it again, it follows then.
const DEPOSED: u8 = 6;

/// Plans handoffs of VMs' volumes between hosts, and cleans up behind them.
#[derive(Debug, Parser)]
#[command(
    name = "baton-coordinator",
    version,
    after_help = "Exit status: 0 stopped by a signal, 1 could not start or failed, 2 wrong flags \
                  or configuration, 5 a higher term than this one's was heard: a newer coordinator has taken over (do not start \
                  this one again), or this one began with an empty journal while a host was away (start it again), \
                  6 one of several on etcd leads no more (start it again: it follows then)."
)]
struct Flags {
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/baton/baton-coordinator.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let config = match Config::load(&Flags::parse().config) {
        Ok(config) => config,
        Err(error) => return fail(USAGE, &error),
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(config.log_level)
        .with_writer(std::io::stderr)
        .with_target(false)
        // A log that cannot be written, on a full disk, must not end who writes it.
        .log_internal_errors(false);
    if config.log_json {
        builder.json().init();
    } else {
        builder.with_ansi(false).init();
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error),
    };
    let code = runtime.block_on(serve(config));
    runtime.shutdown_background();
    code
}

async fn serve(config: Config) -> ExitCode {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (mut terminate, mut interrupt) = match signals {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => return fail(FAILED, &error),
    };
    let coordinator = match server::start(config).await {
        Ok(coordinator) => coordinator,
        // Starting it again would not help.
        Err(error @ (StartError::Credentials(_) | StartError::WrongRole(_))) => {
            return fail(USAGE, &error);
        }
        Err(error) => return fail(FAILED, &error),
    };
    let term = coordinator.term.clone();
    match *term.borrow() {
        Some(term) => say(&format!("listening api={} term={term}", coordinator.address)),
        None => say(&format!("listening api={} role=follower", coordinator.address)),
    }
    let leads = tokio::spawn(announce(coordinator.term.clone()));
    // Fails only without systemd.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut down = coordinator.down();
    let code = tokio::select! {
        _ = terminate.recv() => ExitCode::SUCCESS,
        _ = interrupt.recv() => ExitCode::SUCCESS,
        Some(Down { why, again }) = ended(&mut down) => {
            let term = term.borrow().map_or_else(String::new, |term| format!("term {term} is over: "));
            if again {
                say(&format!("baton-coordinator: {term}{why}; this one ends, and follows when it is started again"));
                // At once, so that nothing of the term goes on.
                std::process::exit(DEPOSED.into());
            }
            say(&format!("baton-coordinator: {term}{why}; a newer coordinator has taken over, so this one ends; if there is none, and this one's journal was lost, start it again"));
            ExitCode::from(SUPERSEDED)
        }
    };
    leads.abort();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    coordinator.stop().await;
    code
}

/// Says when one of several leads.
async fn announce(mut term: watch::Receiver<Option<u64>>) {
    while term.changed().await.is_ok() {
        if let Some(term) = *term.borrow_and_update() {
            say(&format!("leading term={term}"));
        }
    }
}

/// Why it must end, once it must; `None`: nobody will say.
async fn ended(down: &mut watch::Receiver<Option<Down>>) -> Option<Down> {
    down.wait_for(Option::is_some).await.ok().and_then(|down| *down)
}

/// One sentence, with its causes.
fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    let mut text = format!("baton-coordinator: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    say(text.trim_end());
    ExitCode::from(code)
}

fn say(line: &str) {
    // Nobody may be listening any more.
    let _ = writeln!(std::io::stderr(), "{line}");
}
