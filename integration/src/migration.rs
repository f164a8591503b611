//! Moves a real guest from one QEMU to another, step by step, so that a test can put an accident between two steps.
//!
//! ```text
//!   source QEMU                          destination QEMU (waits with the same machine)
//!   migrate ───────────────────────────> migrate-incoming
//!      active            RAM is copied while the guest runs
//!      pre-switchover    the guest stands still, its disks are stopped
//!   migrate-continue ──────────────────> the guest's devices arrive
//!      completed                         completed, the guest runs
//! ```
//!
//! Plays the orchestrator: it believes what the two QEMUs say and knows nothing of what is behind their disks. The
//! probe's serial line does not move with the guest: each QEMU has its own, and [`Probe::resynchronise`](crate::probe::Probe::resynchronise) finds the
//! probe again on the other one.

use crate::baton::wait_until;
use crate::qemu::{Guest, GuestConfig};
use crate::qmp::Qmp;
use crate::wire::Wire;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// A move takes a second or two on an idle machine; this is for one step of it on a busy one.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// How fast a migration goes. The product is about what may be left to send when the guest is stopped.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// RAM copied in a second, at most.
    pub bytes_per_s: u64,
    /// For how long the guest may stand still.
    pub downtime_ms: u64,
}

impl Pace {
    /// As fast as one machine can.
    pub const FULL: Self = Self { bytes_per_s: 10 << 30, downtime_ms: 300 };
}

/// One attempt to move a guest.
#[derive(Debug)]
pub struct Migration {
    /// Control of the QEMU where the guest was.
    pub source: Qmp,
    /// Control of the QEMU where the guest shall be.
    pub destination: Qmp,
    /// The network between them.
    pub wire: Wire,
}

/// The QEMU for `config`'s guest to move to: the same machine, another name, other sockets.
pub fn destination(dir: &Path, config: &GuestConfig) -> Result<Guest> {
    Guest::start(dir, &GuestConfig { incoming: true, ..config.clone() })
}

impl Migration {
    /// Starts to move the guest: RAM is copied while it runs, as fast as `pace` says.
    ///
    /// The source stops the guest when little is left, and then waits for [`Self::switch_over`].
    pub fn begin(source: &Guest, destination: &Guest, pace: Pace) -> Result<Self> {
        let (mut from, mut to) = (source.qmp()?, destination.qmp()?);
        let on = |name: &str| json!({ "capability": name, "state": true });
        let names = ["events", "return-path", "pause-before-switchover"];
        let capabilities = json!({ "capabilities": names.map(on) });
        for side in [&mut from, &mut to] {
            side.execute("migrate-set-capabilities", capabilities.clone())?;
        }
        to.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listening = to.execute("query-migrate", json!({}))?;
        let port = listening["socket-address"][0]["port"].as_str();
        let port =
            port.and_then(|port| port.parse().ok()).context("the destination has no port")?;
        let wire = Wire::to(SocketAddr::from(([127, 0, 0, 1], port)))?;
        let mut migration = Self { source: from, destination: to, wire };
        migration.set_pace(pace)?;
        let uri = format!("tcp:{}", migration.wire.address());
        migration.source.execute("migrate", json!({ "uri": uri }))?;
        Ok(migration)
    }

    /// Changes the pace of a migration that runs.
    pub fn set_pace(&mut self, pace: Pace) -> Result<()> {
        let Pace { bytes_per_s, downtime_ms } = pace;
        let parameters = json!({ "max-bandwidth": bytes_per_s, "downtime-limit": downtime_ms });
        self.source.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Waits until RAM is being copied; by then the source's disks log what they change.
    pub fn wait_active(&mut self) -> Result<()> {
        self.source.wait_migration("active", STEP_TIMEOUT).map(drop)
    }

    /// Waits until the guest stands still on the source and the source waits for us.
    pub fn wait_pre_switchover(&mut self) -> Result<()> {
        self.source.wait_migration("pre-switchover", STEP_TIMEOUT).map(drop)
    }

    /// Lets the source hand over.
    pub fn switch_over(&mut self) -> Result<()> {
        self.source.execute("migrate-continue", json!({ "state": "pre-switchover" })).map(drop)
    }

    /// Waits until the source has sent the whole guest, whoever reads it.
    pub fn wait_all_sent(&self) -> Result<()> {
        wait_until("the source has sent everything", STEP_TIMEOUT, || self.wire.is_complete())
    }

    /// Waits until both say that it is done and the destination runs the guest.
    pub fn wait_completed(&mut self) -> Result<()> {
        self.source.wait_migration("completed", STEP_TIMEOUT)?;
        self.destination
            .wait_event(STEP_TIMEOUT, |e| e["event"] == "RESUME")
            .context("waiting for the destination to run the guest")
            .map(drop)
    }

    /// Gives up, as an orchestrator does that heard nothing in time, and makes the guest run on the source again.
    pub fn cancel(&mut self) -> Result<()> {
        self.source.execute("migrate_cancel", json!({}))?;
        // QEMU closes the connection first, and then finds its own migration to have failed, if that is quicker.
        let ends = ["cancelled", "failed"];
        self.source
            .wait_event(STEP_TIMEOUT, |e| {
                let status = e["data"]["status"].as_str();
                e["event"] == "MIGRATION" && status.is_some_and(|status| ends.contains(&status))
            })
            .context("waiting for the migration to be cancelled")?;
        wait_until("the source has ended the migration", STEP_TIMEOUT, || {
            run_state(&mut self.source).is_ok_and(|state| state != "finish-migrate")
        })?;
        // QEMU may have done this by itself; an orchestrator makes sure.
        self.source.execute("cont", json!({})).map(drop)
    }
}

/// What a QEMU says of its guest: "running", "paused", "postmigrate", ...
pub fn run_state(qmp: &mut Qmp) -> Result<String> {
    let status: Value = qmp.execute("query-status", json!({}))?;
    status["status"].as_str().map(str::to_owned).context("query-status has no status")
}

/// Moves a guest with no accident, ends the source's QEMU, and goes on talking to the probe on the destination.
pub fn move_guest(dir: &Path, mut source: Guest, config: &GuestConfig) -> Result<Guest> {
    let mut guest = destination(dir, config)?;
    let mut migration = Migration::begin(&source, &guest, Pace::FULL)?;
    migration.wait_pre_switchover()?;
    migration.switch_over()?;
    migration.wait_completed()?;
    // Follows the event.
    wait_until("the source says that the guest has left", STEP_TIMEOUT, || {
        run_state(&mut migration.source).is_ok_and(|state| state == "postmigrate")
    })?;
    source.process().kill()?;
    guest.resynchronise()?;
    Ok(guest)
}
