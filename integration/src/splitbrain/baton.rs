//! Baton: one storage server, a backend on each host, and a handoff prepared before the migration.

use super::{Advice, QUEUES, Stack};
use crate::daemon::Daemon;
use crate::handoff::{Attempt, Begin, Fleet, Host};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Size of the volume.
const DISK_BYTES: u64 = 64 << 20;
const SOURCE: &str = "host-a/vm";
const DESTINATION: &str = "host-b/vm";

/// A volume on a storage server, and who may write it.
#[derive(Debug)]
pub struct BatonStack {
    dir: PathBuf,
    fleet: Fleet,
    source: Host,
    destination: Option<Host>,
    attempt: Option<Attempt>,
}

impl BatonStack {
    /// Starts the storage server and the source's backend.
    pub fn start(dir: &Path) -> Result<Self> {
        let fleet = Fleet::start(dir, 1, 1, DISK_BYTES)?;
        let source = Host::start_with(dir, "source-backend", SOURCE, &fleet, Begin::Claim, QUEUES)?;
        Ok(Self { dir: dir.to_owned(), fleet, source, destination: None, attempt: None })
    }
}

impl Stack for BatonStack {
    fn name(&self) -> String {
        "Baton".to_owned()
    }

    fn source_socket(&self) -> PathBuf {
        self.source.socket(0).to_owned()
    }

    fn prepare_destination(&mut self) -> Result<PathBuf> {
        let host = Host::start_with(
            &self.dir,
            "destination-backend",
            DESTINATION,
            &self.fleet,
            Begin::Standby,
            QUEUES,
        )?;
        self.attempt = Some(self.fleet.arm(SOURCE, DESTINATION)?);
        host.wait_standing("ready")?;
        let socket = host.socket(0).to_owned();
        self.destination = Some(host);
        Ok(socket)
    }

    fn source_backend(&mut self) -> &mut Daemon {
        &mut self.source.daemon
    }

    fn gave_up(&mut self) -> Result<Advice> {
        // Nobody tells Baton anything: the source's rings start, so its backend
        // reclaims the volume.
        self.source.wait_standing("serving")?;
        let told = "Baton was told nothing: the source's rings started again, and its backend reclaimed the volume";
        Ok(Advice { told: Some(told.to_owned()), ..Advice::default() })
    }

    fn completed(&mut self) -> Result<Advice> {
        let attempt = self.attempt.as_ref().context("a handoff was prepared")?;
        let destination = self.destination.as_ref().context("there is a destination")?;
        destination.wait_standing("activating")?;
        self.source.restart()?;
        let answer = self.fleet.reclaim(attempt)?;
        let owner = self.fleet.owner(0)?;
        destination.wait_standing("parked")?;
        let told = format!(
            "asked before it believes QEMU, the storage says: the source never sealed the volume, the owner is the {} ({owner}); \
             its backend is started again and the orchestrator continues the guest there",
            answer["outcome"].as_str().unwrap_or("?")
        );
        Ok(Advice { told: Some(told), continue_source: true })
    }

    fn verdict(&mut self) -> Result<Option<String>> {
        let destination = match &self.destination {
            Some(host) => host.standing()?,
            None => "absent".to_owned(),
        };
        Ok(Some(format!(
            "The storage says: {} owns the volume. Source backend: {}; destination backend: {destination}.",
            self.fleet.owner(0)?,
            self.source.standing()?,
        )))
    }
}
