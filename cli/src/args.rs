//! What is said on the command line.

use std::path::PathBuf;
use std::time::Duration;

use baton_live_migrate::client::Endpoint;
use baton_live_migrate::identity::is_name;
use baton_protocol::ByteSize;
use baton_protocol::handoff::HandoffId;
use baton_protocol::message::{OWNER_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use baton_remote_client::VolumeUri;
use clap::{Args, Parser, Subcommand};

use crate::client::Server;

/// The operator's command of Baton: volumes, handoffs, migrations.
#[derive(Debug, Parser)]
#[command(
    name = "baton",
    version,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 refused, or a question was answered with no, or the VM \
                  did not move and the source owns its volumes, 2 wrong flags, name, size or address, \
                  3 the server cannot be reached, 4 what answered is not Baton's or failed. \
                  `handoff cancel` and `handoff finish`: 0 the source owns the volumes, 10 the \
                  destination does, 20 nobody can say yet: start or resume neither side. `vm migrate`: \
                  0 it runs at the destination, 1 at the source, 20 nobody can say yet. `volume import` and `export`: 130 interrupted, and can go on."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// Create, list, show, resize, delete, copy and fence volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// List VMs and move them to other hosts
    #[command(subcommand)]
    Vm(VmCommand),
    /// Move the right to a VM's volumes, step by step
    #[command(subcommand)]
    Handoff(HandoffCommand),
    /// See which of several coordinators leads
    #[command(subcommand)]
    Coordinator(CoordinatorCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum CoordinatorCommand {
    /// List the coordinators of --coordinator: who leads, who follows, who does not answer
    List {
        #[command(flatten)]
        common: Coordinated,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// List the VMs that the coordinator knows
    List {
        #[command(flatten)]
        common: Coordinated,
    },
    /// Move a running VM to another host
    Migrate {
        #[command(flatten)]
        vm: Vm,
        /// Host that shall run it
        #[arg(long, value_name = "HOST", value_parser = host)]
        to: String,
        /// Host that runs it [default: whoever owns its volumes]
        #[arg(long, value_name = "HOST", value_parser = host)]
        from: Option<String>,
        /// Where the destination's monitor listens, tcp:HOST:PORT or unix:PATH [default: as the coordinator is configured]
        #[arg(long)]
        uri: Option<String>,
        /// Id of the migration, a ULID: the same again is the same migration [default: a new one]
        #[arg(long, value_name = "ULID")]
        id: Option<HandoffId>,
        /// Write a page with the timeline and the guest's I/O latency
        #[arg(long, value_name = "FILE.html")]
        report: Option<PathBuf>,
        #[command(flatten)]
        common: Coordinated,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HandoffCommand {
    /// Arm the volumes and start a standby backend at the destination
    Prepare {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        route: Route,
        /// Id of the handoff, a ULID: the same again is the same handoff [default: a new one]
        #[arg(long, value_name = "ULID")]
        id: Option<HandoffId>,
        /// The caller says when it switches, not the machines
        #[arg(long)]
        explicit: bool,
        /// Wait until it is READY, and exit with 1 if it cannot be
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Show a handoff
    Status {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Let the source keep its volumes, if it is not too late
    Cancel {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        patience: Patience,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Clean up behind the decision and stop the loser's backend
    #[command(long_about = "Clean up behind the decision and stop the loser's backend.\n\n\
        Where no storage fences (NBD) the destination gets the volumes only when the source's backend \
        is proven gone. --force takes the proof's place: say it only if the source's host surely \
        cannot reach the storage any more, for two backends destroy the volumes.")]
    Finish {
        /// Where no storage fences: without a proof that the source's backend is gone
        #[arg(long, requires = "reason")]
        force: bool,
        /// Who forces and why; goes to the journal
        #[arg(long, value_name = "TEXT", value_parser = reason, requires = "force")]
        reason: Option<String>,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        patience: Patience,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Say who owns a VM's volumes, and how that came to be
    Why {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Rehearse: prepare a handoff, and cancel it once it is READY
    Drill {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        route: Route,
        #[command(flatten)]
        common: Coordinated,
    },
    /// Take all volumes of a VM from a dead host
    #[command(long_about = "Take all volumes of a VM from a dead host.\n\n\
        When this returns 0, nothing of that host can reach any of the volumes any more, and the VM \
        may be started elsewhere. Otherwise it may not: 1 also where another host owns them.")]
    Fence {
        #[command(flatten)]
        vm: Vm,
        /// The host that shall not touch the volumes any more
        #[arg(long, value_name = "HOST", value_parser = host)]
        dead_host: String,
        /// Why; goes to the audit
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: String,
        /// Although that host's agent answers and says that the VM runs
        #[arg(long)]
        force: bool,
        /// The only host that may claim the volumes next [default: any but the dead one]
        #[arg(long, value_name = "HOST", value_parser = host)]
        nominee: Option<String>,
        #[command(flatten)]
        common: Coordinated,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// Name of the VM
    #[arg(value_name = "VM", value_parser = host)]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Route {
    /// Host that shall run it
    #[arg(long, value_name = "HOST", value_parser = host)]
    pub(crate) to: String,
    /// Host that runs it [default: whoever owns its volumes]
    #[arg(long, value_name = "HOST", value_parser = host)]
    pub(crate) from: Option<String>,
    /// How long it may take to become READY: 500ms, 30s, 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    pub(crate) timeout: String,
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    #[command(flatten)]
    pub(crate) vm: Vm,
    /// Id of the handoff [default: the last one of the VM]
    #[arg(value_name = "ULID")]
    pub(crate) id: Option<HandoffId>,
}

#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// How long to wait for the outcome: 500ms, 30s, 2m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
    pub(crate) timeout: String,
}

#[derive(Debug, Args)]
pub(crate) struct Coordinated {
    /// Where the coordinator is: https://HOST:PORT, http://127.0.0.1:PORT or unix:/PATH; of several, all of them, with
    /// commas between: the one that leads is found, and waited for while there is none
    #[arg(
        long,
        value_name = "URL,...",
        env = "BATON_COORDINATOR",
        default_value = "http://127.0.0.1:7720",
        value_delimiter = ','
    )]
    pub(crate) coordinator: Vec<Endpoint>,
    /// Name in its certificate, for https; several coordinators have one
    #[arg(long, value_name = "NAME", env = "BATON_COORDINATOR_NAME", default_value = "coordinator", value_parser = host)]
    pub(crate) coordinator_name: String,
    /// Certificate of the authority, PEM, for https
    #[arg(long, value_name = "FILE", env = "BATON_TLS_CA", requires_all = ["tls_cert", "tls_key"])]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Your certificate
    #[arg(long, value_name = "FILE", env = "BATON_TLS_CERT")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", env = "BATON_TLS_KEY")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Print the coordinator's answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
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
    /// Copy a disk from elsewhere to a volume, and verify the copy
    #[command(long_about = IMPORT)]
    Import(Copy),
    /// Copy a volume to elsewhere, and verify the copy
    #[command(long_about = IMPORT)]
    Export(Copy),
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

const IMPORT: &str = "Copy a disk from any volume to any other, and verify the copy. \
`import` and `export` are one command with two names.\n\n\
A volume is baton://HOST:PORT/NAME, baton+unix:///NAME?socket=PATH, nbd://HOST/EXPORT, \
nbd+unix:///EXPORT?socket=PATH (nbds://, nbds+unix:// through TLS), rbd://POOL/IMAGE or file:///PATH. A file that does not exist is made; \
anything else exists already, is at least as large as the source, and is written over. Holes stay holes.\n\n\
The same command goes on where an earlier one was ended, by its state file. A Baton volume is owned by the \
copy until it is whole, so that no VM starts on half a disk. The source is only read; nobody should write \
to it meanwhile.";

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// What is copied
    #[arg(value_name = "SOURCE_URI")]
    pub(crate) source: VolumeUri,
    /// Where to; written over
    #[arg(value_name = "DESTINATION_URI")]
    pub(crate) destination: VolumeUri,
    /// What is done so far, for a copy that is ended early; removed when it is whole [default: beside a file that is
    /// copied to, else in this folder, named after the two URIs]
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,
    /// Do not read the destination again when the copy is done
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Print progress and outcome as JSON, an object a line
    #[arg(long)]
    pub(crate) json: bool,
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

fn host(text: &str) -> Result<String, String> {
    if is_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a name has a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`"
            .to_owned())
    }
}

/// The longest time the coordinator takes.
const TIME_MAX: Duration = Duration::from_secs(3600);

fn time(text: &str) -> Result<String, String> {
    match parsed(text) {
        Some(time) if !time.is_zero() && time <= TIME_MAX => Ok(text.to_owned()),
        _ => Err("write a time such as 500ms, 30s or 2m, more than nothing and at most an hour"
            .to_owned()),
    }
}

/// A time that [`time`] has let pass.
pub(crate) fn duration(text: &str) -> Duration {
    parsed(text).unwrap_or_default()
}

fn parsed(text: &str) -> Option<Duration> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &text[number.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return None,
    };
    Some(Duration::from_millis(u64::from(number.parse::<u32>().ok()?) * unit_ms))
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
    fn times_are_more_than_nothing_and_at_most_an_hour() {
        for (text, ms) in [("1ms", 1), ("30s", 30_000), ("60m", 3_600_000)] {
            assert_eq!(time(text).map(|text| duration(&text)), Ok(Duration::from_millis(ms)));
        }
        for bad in ["", "5", "s", "0s", "0ms", "61m", "-1s", "1h", "1.5s", "99999999999s"] {
            assert!(time(bad).is_err(), "{bad}");
        }
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
