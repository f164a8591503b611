//! Virtual machine monitors: what the agent may ask one, whichever it is.
//!
//! Nothing here decides who owns a disk: a monitor's opinion is a report, and
//! storage is the arbiter. Every call ends in bounded time, also when the
//! monitor hangs, and says so with a type of its own.

mod cloud_hypervisor;
mod qmp;
mod verdict;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use cloud_hypervisor::CloudHypervisor;
pub use qmp::Qemu;
pub use verdict::{Verdict, verdict};

/// How long a monitor may take for one command. A drain of slow disks holds up
/// QEMU's main loop for as long as it takes, so this is not short.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// What the virtual machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Its CPUs run, or may at any moment (a suspended guest can wake up).
    Running,
    /// Stopped by somebody; it runs again when told to.
    Paused,
    /// Waits for, or receives, a migration.
    Incoming,
    /// Stopped for the end of its outgoing migration.
    Switching,
    /// Stopped after an outgoing migration that the monitor calls complete.
    Migrated,
    /// Shut down.
    Shutdown,
    /// There is no monitor, or it has no machine.
    Gone,
    /// The monitor is busy and does not say.
    Unknown,
}

/// Where a migration is, from one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// There was none.
    #[default]
    None,
    /// Connecting, negotiating.
    Setup,
    /// Memory is copied, the machine may run.
    Active,
    /// The source is stopped, its disks' rings too, and waits for `continue`.
    PreSwitchover,
    /// The state of devices is sent.
    Device,
    /// This side believes that the machine moved. The other side may not.
    Completed,
    /// It failed; the source goes on or can be resumed.
    Failed,
    /// On the way to `cancelled`.
    Cancelling,
    /// Somebody cancelled it.
    Cancelled,
    /// Post-copy and other modes that nobody here starts.
    Other,
}

impl MigrationPhase {
    /// Whether somebody must decide or nothing more will happen.
    #[must_use]
    pub fn is_decided(self) -> bool {
        matches!(self, Self::PreSwitchover | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// A migration from one side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Where it is.
    pub phase: MigrationPhase,
    /// Why it failed.
    pub error: Option<String>,
    /// Memory sent so far, bytes.
    pub transferred_bytes: Option<u64>,
    /// Memory to send, bytes; guests make more while they run.
    pub remaining_bytes: Option<u64>,
    /// How long the machine stood still, by the monitor's clock, milliseconds.
    pub downtime_ms: Option<u64>,
}

/// What a monitor says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmmStatus {
    /// What the machine does.
    pub run: RunState,
    /// The monitor's own word for it.
    pub detail: String,
    /// The last migration.
    pub migration: Migration,
    /// Of the monitor.
    pub version: Option<String>,
}

/// An outgoing migration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Outgoing {
    /// Where to: `unix:PATH` or `tcp:HOST:PORT`.
    pub uri: String,
    /// Stop before the switch and wait for `continue` (explicit mode).
    #[serde(default = "yes")]
    pub pause_before_switchover: bool,
    /// Most bytes a second; the monitor's default if absent.
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// How long the machine may stand still, milliseconds; the monitor's default if absent.
    pub downtime_limit_ms: Option<u64>,
}

fn yes() -> bool {
    true
}

/// An incoming migration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// Where to listen: `unix:PATH` or `tcp:HOST:PORT`.
    pub uri: String,
    /// The same as the source's.
    #[serde(default = "yes")]
    pub pause_before_switchover: bool,
}

/// Why a monitor did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Nobody listens.
    #[error("no {vmm} answers at {}; is the machine running, and is this its control socket?", socket.display())]
    Unreachable {
        /// Kind.
        vmm: &'static str,
        /// Where.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It hangs.
    #[error(
        "{vmm} at {} did not answer `{command}` within {} ms; it hangs, or waits for a disk's back-end, and may still carry the command out",
        socket.display(), after.as_millis()
    )]
    Silent {
        /// Kind.
        vmm: &'static str,
        /// Where.
        socket: PathBuf,
        /// What it was told.
        command: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// It understood and refused.
    #[error("{vmm} refused `{command}`: {detail}")]
    Refused {
        /// Kind.
        vmm: &'static str,
        /// What it was told.
        command: &'static str,
        /// Its words.
        detail: String,
    },
    /// It ended, or is something else.
    #[error("{vmm} at {} broke off during `{command}`; it ended, or this is another program's socket", socket.display())]
    Broken {
        /// Kind.
        vmm: &'static str,
        /// Where.
        socket: PathBuf,
        /// What it was told.
        command: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// This kind of monitor has no such thing.
    #[error("{vmm} cannot {what}; {instead}")]
    Unsupported {
        /// Kind.
        vmm: &'static str,
        /// What was asked.
        what: &'static str,
        /// What to do.
        instead: &'static str,
    },
}

/// A monitor of one virtual machine.
#[async_trait]
pub trait Vmm: Send + Sync + std::fmt::Debug {
    /// What it says now. A monitor that is not there is [`RunState::Gone`], not an error.
    async fn status(&self) -> Result<VmmStatus, VmmError>;
    /// Makes it listen for a migration.
    async fn incoming(&self, incoming: &Incoming) -> Result<(), VmmError>;
    /// Starts an outgoing migration; does not wait for it.
    async fn migrate(&self, outgoing: &Outgoing) -> Result<(), VmmError>;
    /// Waits until the migration's phase [is decided](MigrationPhase::is_decided),
    /// at most `limit`; the status then, decided or not.
    async fn wait(&self, limit: Duration) -> Result<VmmStatus, VmmError>;
    /// Lets a migration go on that waits before the switch. The caller must know
    /// that the source's back-end drained: the phase does not prove it.
    async fn proceed(&self) -> Result<(), VmmError>;
    /// Cancels an outgoing migration.
    async fn cancel(&self) -> Result<(), VmmError>;
    /// Lets the machine run.
    async fn resume(&self) -> Result<(), VmmError>;
    /// Stops the machine's CPUs.
    async fn stop(&self) -> Result<(), VmmError>;
    /// Ends the monitor.
    async fn quit(&self) -> Result<(), VmmError>;
}
