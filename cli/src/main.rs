//! `baton`: the operator's command. Knows the admin API of the storage server and the coordinator's API, and nothing
//! behind them.
//!
//! | module | noun |
//! |---|---|
//! | [`args`] | what is said on the command line |
//! | [`client`] | the admin API, and the ways it can fail |
//! | [`coordinator`] | the coordinator's API, and the ways it can fail |
//! | [`copy`] | what `baton volume import` and `export` do |
//! | [`handoff`] | what `baton vm` and `baton handoff` do |
//! | [`phases`] | a migration's phases, from what was noted |
//! | [`report`] | the page of `--report` |
//! | [`view`], [`vm_view`] | answers as text for people |
//! | [`warnings`] | what drivers warn of meanwhile |

mod args;
mod client;
mod coordinator;
mod copy;
mod handoff;
mod phases;
mod report;
mod view;
mod vm_view;
mod warnings;

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use baton_remote_client::OpenError;
use clap::Parser;
use serde_json::{Value, json};

use crate::args::{Cli, Common, VolumeCommand, What};
use crate::client::{CallError, Client};
use crate::coordinator::CoordinatorError;
use crate::copy::CopyError;

/// The server refused, or the operator did.
const EXIT_REFUSED: u8 = 1;
/// Wrong use; also what clap exits with.
const EXIT_USAGE: u8 = 2;
const EXIT_UNREACHABLE: u8 = 3;
const EXIT_FAILED: u8 = 4;
/// What a shell makes of an interrupt.
const EXIT_INTERRUPTED: u8 = 130;

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    #[error("cannot write the report to {}: {source}; nothing was asked for: name a file that can be written", file.display())]
    Report { file: PathBuf, source: io::Error },
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("nothing was deleted")]
    Declined,
    #[error("this deletes data and there is no terminal to ask on; add --yes if you mean it")]
    NobodyToAsk,
    #[error("cannot print the answer: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Call(CallError::Refused { .. }) | Self::Declined => EXIT_REFUSED,
            Self::NobodyToAsk | Self::Report { .. } => EXIT_USAGE,
            Self::Call(CallError::Unreachable { .. } | CallError::Silent { .. }) => {
                EXIT_UNREACHABLE
            }
            Self::Call(CallError::Foreign { .. } | CallError::Failed { .. }) | Self::Output(_) => {
                EXIT_FAILED
            }
            Self::Coordinator(error) => coordinator_exit_code(error),
            Self::Copy(error) => copy_exit_code(error),
        }
    }
}

fn coordinator_exit_code(error: &CoordinatorError) -> u8 {
    use baton_live_migrate::client::CallError;
    match error {
        CoordinatorError::Call(CallError::Refused { status, .. }) if *status < 500 => EXIT_REFUSED,
        CoordinatorError::Call(
            CallError::Unreachable { .. } | CallError::Silent { .. } | CallError::Distrust { .. },
        ) => EXIT_UNREACHABLE,
        CoordinatorError::NoHandoff(_) => EXIT_REFUSED,
        CoordinatorError::NoLeader { .. } => EXIT_UNREACHABLE,
        CoordinatorError::Credentials(_)
        | CoordinatorError::Identity(_)
        | CoordinatorError::NoCredentials(_) => EXIT_USAGE,
        CoordinatorError::Call(_) | CoordinatorError::Foreign(_) | CoordinatorError::Host(_) => {
            EXIT_FAILED
        }
    }
}

fn copy_exit_code(error: &CopyError) -> u8 {
    match error {
        CopyError::Open { source, .. } => open_exit_code(source),
        CopyError::State(error) if error.is_refusal() => EXIT_REFUSED,
        CopyError::TooSmall { .. }
        | CopyError::Ragged { .. }
        | CopyError::ReadOnly
        | CopyError::Changed { .. }
        | CopyError::Fenced(_) => EXIT_REFUSED,
        CopyError::Same | CopyError::Make { .. } => EXIT_USAGE,
        CopyError::Interrupted { .. } => EXIT_INTERRUPTED,
        CopyError::State(_)
        | CopyError::Queue { .. }
        | CopyError::Io { .. }
        | CopyError::Lost(_)
        | CopyError::Differs { .. }
        | CopyError::System(_)
        | CopyError::Output(_) => EXIT_FAILED,
    }
}

fn open_exit_code(error: &OpenError) -> u8 {
    match error {
        OpenError::Uri(_) | OpenError::NoServer | OpenError::Resolve { .. } => EXIT_USAGE,
        OpenError::Unreachable { .. }
        | OpenError::Timeout { .. }
        | OpenError::NoAnswer { .. }
        | OpenError::NbdUnreachable { .. }
        | OpenError::NbdTimeout { .. } => EXIT_UNREACHABLE,
        OpenError::NotBaton { .. }
        | OpenError::Version { .. }
        | OpenError::NotNbd { .. }
        | OpenError::NbdOldStyle { .. }
        | OpenError::System(_) => EXIT_FAILED,
        _ => EXIT_REFUSED,
    }
}

fn main() -> ExitCode {
    let what = Cli::parse().what;
    warnings::show();
    let done = match what {
        What::Volume(command) => run(command).map(|()| 0),
        What::Vm(command) => handoff::vm(command),
        What::Handoff(command) => handoff::handoff(command),
        What::Coordinator(command) => handoff::coordinator(command),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        // Whoever reads has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("baton: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create { volume, size, common } => {
            let answer = client(&common).create(&volume.name, size.0)?;
            print(&common, &answer, |answer| {
                format!("created {}, {}\n", volume.name, view::size(&answer["size_bytes"]))
            })
        }
        VolumeCommand::Import(copy) | VolumeCommand::Export(copy) => match copy::run(&copy) {
            Err(CopyError::Output(error)) => Err(Failure::Output(error)),
            other => other.map_err(Failure::from),
        },
        VolumeCommand::List { common } => {
            let answer = client(&common).list()?;
            print(&common, &answer, view::list)
        }
        VolumeCommand::Show { volume, common } => {
            let answer = client(&common).show(&volume.name)?;
            print(&common, &answer, view::show)
        }
        VolumeCommand::Resize { volume, size, common } => {
            let answer = client(&common).resize(&volume.name, size.0)?;
            print(&common, &answer, |answer| {
                format!("resized {} to {}\n", volume.name, view::size(&answer["size_bytes"]))
            })
        }
        VolumeCommand::Delete { volume, yes, force, common } => {
            let client = client(&common);
            if !yes {
                if !io::stdin().is_terminal() {
                    return Err(Failure::NobodyToAsk);
                }
                // A volume that is not there needs no question.
                let found = client.show(&volume.name)?;
                ask(&volume.name, &found)?;
            }
            let answer = match client.delete(&volume.name, force)? {
                Value::Null => json!({"name": volume.name, "deleted": true}),
                answer => answer,
            };
            print(&common, &answer, |_| format!("deleted {}\n", volume.name))
        }
        VolumeCommand::Fence { volume, reason, nominee, common } => {
            let answer = client(&common).fence(&volume.name, &reason, nominee.as_deref())?;
            print(&common, &answer, |answer| fenced(&volume.name, answer))
        }
    }
}

fn client(common: &Common) -> Client {
    Client::new(&common.server)
}

fn print(
    common: &Common,
    answer: &Value,
    view: impl FnOnce(&Value) -> String,
) -> Result<(), Failure> {
    print_text(&if common.json { format!("{answer:#}\n") } else { view(answer) })
}

fn print_text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Asks before data is lost.
fn ask(name: &str, found: &Value) -> Result<(), Failure> {
    eprint!(
        "Delete volume {name} ({}, {} allocated) and its data? [y/N] ",
        view::size(&found["size_bytes"]),
        view::size(&found["allocated_bytes"])
    );
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(Failure::Declined) }
}

fn fenced(name: &str, answer: &Value) -> String {
    let access = &answer["access"];
    let next = match (&access["owner"], &access["barred"]) {
        (Value::Null, Value::Null) => "anybody may claim it".to_owned(),
        (Value::Null, barred) => format!("anybody but {} may claim it", view::text(barred)),
        (nominee, _) => format!("only {} may claim it", view::text(nominee)),
    };
    format!("fenced {name} at epoch {}; {next}\n", view::text(&access["epoch"]))
}
