//! One ring as the front-end described it: how it starts, and how a change reaches it while it runs.
//!
//! A ring never starts on KICK alone: a front-end that restarts a ring during a migration sends the dirty log between
//! KICK and ENABLE.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Session;
use super::stop::Stop;
use crate::queue::mailbox::Draining;
use crate::queue::{RingSetup, RingStart};
use crate::vhost_user::features::virtio;
use crate::vhost_user::message::VringAddr;
use crate::vhost_user::refused::Refused;
use crate::virtqueue::RingAddresses;

/// Bit 0 of the flags of SET_VRING_ADDR: log writes to the used ring.
const VRING_LOG: u32 = 1;

/// What the front-end said of a ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) num: u32,
    pub(super) base: u16,
    pub(super) addr: Option<VringAddr>,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) err: Option<Arc<OwnedFd>>,
    pub(super) enabled: bool,
    /// Started and not stopped by the front-end.
    pub(super) running: bool,
    /// The in-flight table has its requests, should this process end.
    pub(super) kept: bool,
    /// It runs for the front-end and takes no more requests.
    pub(super) draining: Option<Draining>,
}

impl Session<'_> {
    /// The ring as it should run, or `None` when it cannot.
    pub(super) fn setup(&self, index: usize) -> Option<RingSetup> {
        let ring = &self.rings[index];
        let addr = ring.addr?;
        let addresses =
            RingAddresses::find(&self.memory, ring.num, addr.desc, addr.avail, addr.used)?;
        let logging = self.features & virtio::LOG_ALL != 0;
        let log = self.log.clone().filter(|_| logging);
        // virtio 1.2 5.2.5.2: without CONFIG_WCE the cache is write-back exactly
        // if the driver can flush.
        let write_through = if self.features & virtio::CONFIG_WCE != 0 {
            !self.writeback
        } else {
            self.features & virtio::FLUSH == 0
        };
        Some(RingSetup {
            addresses,
            event_idx: self.features & virtio::EVENT_IDX != 0,
            write_through,
            call: ring.call.clone(),
            err: ring.err.clone(),
            log_used_at: (log.is_some() && addr.flags & VRING_LOG != 0)
                .then_some(addr.log_guest_addr),
            log,
        })
    }

    pub(super) fn apply_all(&mut self) {
        for index in 0..self.rings.len() {
            self.apply(index);
        }
    }

    /// Brings a running ring up to date.
    pub(super) fn apply(&mut self, index: usize) {
        if self.rings[index].running
            && let Some(setup) = self.setup(index)
        {
            self.queues[index].apply(setup);
        }
    }

    pub(super) fn start_if_ready(&mut self, index: usize) -> Result<(), Refused> {
        let ring = &self.rings[index];
        if ring.running || !ring.enabled {
            return Ok(());
        }
        let Some(kick) = ring.kick.clone() else { return Ok(()) };
        let setup =
            self.setup(index).ok_or_else(|| Refused::Start { index, source: unusable() })?;
        let number = u16::try_from(index).expect("queues are counted in u16");
        let inflight =
            self.inflight.as_ref().and_then(|region| region.ring(number, setup.addresses.size()));
        let kept = inflight.is_some();
        if self.inflight.is_some() && !kept {
            tracing::warn!(
                disk = self.disk.name,
                queue = index,
                size = setup.addresses.size(),
                "the front-end's in-flight table has no room for this ring: what is in flight when this process is \
                 killed will be lost; reboot the guest to get a table that has"
            );
        }
        let start = RingStart { setup, kick, base: self.rings[index].base, inflight };
        // Before the guest's first request: what was drained is so no more.
        self.stop = Stop::None;
        self.show_status();
        if !self.told_running
            && let Some(member) = &self.disk.member
        {
            member.starting();
        }
        if let Err(source) = self.queues[index].start(start) {
            if !self.told_running
                && let Some(member) = &self.disk.member
            {
                member.not_started();
            }
            return Err(Refused::Start { index, source });
        }
        self.stopping = None;
        self.rings[index].running = true;
        self.rings[index].kept = kept;
        if !std::mem::replace(&mut self.told_running, true)
            && let Some(member) = &self.disk.member
        {
            self.keep_arrival();
            member.started();
        }
        tracing::debug!(disk = self.disk.name, queue = index, "ring started");
        Ok(())
    }
}

pub(super) fn unusable() -> std::io::Error {
    std::io::Error::other("its addresses are not in the guest's memory")
}
