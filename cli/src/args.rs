//! What is said on the command line.

use baton_protocol::ByteSize;
use baton_protocol::message::{OWNER_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use clap::{Args, Parser, Subcommand};

use crate::client::Server;

/// The operator's command of Baton: volumes on a storage server.
#[derive(Debug, Parser)]
#[command(
    name = "baton",
    version,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 the server refused or a question was answered with no, \
                  2 wrong flags, name, size or address, 3 the server cannot be reached, \
                  4 what answered is not a Baton storage server or failed."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// Create, list, show, resize, delete and fence volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume; space is taken as it is written
    Create {
        #[command(flatten)]
        volume: Named,
        /// Size: a whole number with an optional K, M, G or T (powers of 1024)
        #[arg(long)]
        size: ByteSize,
        #[command(flatten)]
        common: Common,
    },
    /// List the volumes of a server
    List {
        #[command(flatten)]
        common: Common,
    },
    /// Show one volume: size, owner, epoch, connected sessions
    Show {
        #[command(flatten)]
        volume: Named,
        #[command(flatten)]
        common: Common,
    },
    /// Grow a volume; a running guest sees the new size at once
    Resize {
        #[command(flatten)]
        volume: Named,
        /// New size, larger than the old one
        #[arg(long)]
        size: ByteSize,
        #[command(flatten)]
        common: Common,
    },
    /// Delete a volume and its data
    Delete {
        #[command(flatten)]
        volume: Named,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Delete although read-only or standby clients are connected; an owner must be fenced first
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Take a volume away from its owner by force; its guest's I/O stops for good
    #[command(long_about = "Take a volume away from its owner by force.\n\n\
        When this returns, no request of the old owner is being carried out and none will be. \
        The I/O of the old owner's guest stops for good, and the old owner's name is refused until \
        somebody else has claimed the volume.")]
    Fence {
        #[command(flatten)]
        volume: Named,
        /// Why; goes to the server's log
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: String,
        /// The only owner name that may claim the volume next [default: any but the old one]
        #[arg(long, value_name = "OWNER", value_parser = owner)]
        nominee: Option<String>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the volume: 1 to 64 letters, digits, `.`, `_` and `-`
    #[arg(value_parser = volume_name)]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Admin address of the storage server, HOST:PORT or http://HOST:PORT
    #[arg(
        long,
        value_name = "ADMIN_ADDR",
        env = "BATON_SERVER",
        default_value = "http://127.0.0.1:7701"
    )]
    pub(crate) server: Server,
    /// Print the server's answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The server's rule, checked here too so that a name cannot change the URL it becomes part of.
fn volume_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && text.len() <= VOLUME_NAME_BYTES_MAX && text.chars().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "a volume's name has 1 to {VOLUME_NAME_BYTES_MAX} letters, digits, `.`, `_` and `-`, the first a letter or digit"
        ))
    }
}

fn owner(text: &str) -> Result<String, String> {
    if (1..=OWNER_BYTES_MAX).contains(&text.len()) {
        Ok(text.to_owned())
    } else {
        Err(format!("an owner's name has 1 to {OWNER_BYTES_MAX} bytes"))
    }
}

fn reason(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        Err("say why, so that whoever reads the server's log knows".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_that_would_change_a_url_are_refused() {
        for good in ["a", "vm-1.disk_0", "0", &"x".repeat(64)] {
            assert_eq!(volume_name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", "-a", "_a", "a/b", "a?b", "a b", "a%2f", "é", &"x".repeat(65)] {
            assert!(volume_name(bad).is_err(), "{bad}");
        }
    }
}
