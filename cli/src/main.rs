//! `baton`: the operator's command. Knows the admin API of the storage server and nothing behind it.
//!
//! | module | noun |
//! |---|---|
//! | [`args`] | what is said on the command line |
//! | [`client`] | the admin API, and the ways it can fail |
//! | [`view`] | answers as tables for people |

mod args;
mod client;
mod view;

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use crate::args::{Cli, Common, VolumeCommand, What};
use crate::client::{CallError, Client};

/// The server refused, or the operator did.
const EXIT_REFUSED: u8 = 1;
/// Wrong use; also what clap exits with.
const EXIT_USAGE: u8 = 2;
const EXIT_UNREACHABLE: u8 = 3;
const EXIT_FAILED: u8 = 4;

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Call(#[from] CallError),
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
            Self::NobodyToAsk => EXIT_USAGE,
            Self::Call(CallError::Unreachable { .. } | CallError::Silent { .. }) => {
                EXIT_UNREACHABLE
            }
            Self::Call(CallError::Foreign { .. } | CallError::Failed { .. }) | Self::Output(_) => {
                EXIT_FAILED
            }
        }
    }
}

fn main() -> ExitCode {
    let Cli { what: What::Volume(command) } = Cli::parse();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
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
    let text = if common.json { format!("{answer:#}\n") } else { view(answer) };
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
