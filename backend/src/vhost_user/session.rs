//! One front-end: what it negotiated and what its rings look like.
//!
//! ```text
//!   ring:  described (NUM, ADDR, BASE) --KICK and ENABLE(1)--> running
//!             ^                                                  |
//!             +--- ENABLE(0), GET_VRING_BASE, RESET, gone -------+  drains first
//! ```
//!
//! Front-ends stop rings one by one. While a dirty log is kept, the first stop
//! begins to drain all of them, so that the drains overlap and nothing new is
//! sent to the storage from then on. A ring drained early runs on for the
//! front-end: it answers its own stop, and starts again when it is enabled or
//! gets a kick event instead. No front-end of a block device stops one ring in
//! the middle of a migration and goes on with the others.
//!
//! A ring never starts on KICK alone: a front-end that restarts a ring during a
//! migration sends the dirty log between KICK and ENABLE. A changed memory
//! table, log, feature or address goes to running rings whole, and is answered
//! when every ring has taken it over.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_fault_point as fault_point;
use baton_remote_client::VolumeState;

use super::connection::BackendChannel;
use super::features::{self, protocol, virtio};
use super::message::{
    InflightDescription, MEM_SLOTS_MAX, Region, Request, StateDirection, VringAddr,
};
use super::refused::Refused;
use crate::dirty_log::DirtyLog;
use crate::handoff::MemberHandle;
use crate::inflight::InflightRegion;
use crate::memory::{GuestMemory, MemoryRegion};
use crate::queue::mailbox::{DrainState, Draining, QueueHandle};
use crate::queue::{Disk, RingSetup, RingStart};
use crate::status::RingsStatus;
use crate::virtio_blk::config_space;
use crate::virtqueue::{QUEUE_SIZE_MAX, RingAddresses};

/// Bit 0 of the flags of SET_VRING_ADDR: log writes to the used ring.
const VRING_LOG: u32 = 1;
/// In the reply to SET_DEVICE_STATE_FD: no descriptor comes with it.
const STATE_NO_FD: u64 = 1 << 8;
/// How often a waiting drain looks at whether it still should wait.
const DRAIN_TICK: Duration = Duration::from_millis(50);

/// Rings that stop with less than this between them stop for one reason.
const STOPPING_TOGETHER: Duration = Duration::from_secs(1);

/// What is sent back.
#[derive(Debug)]
pub enum Reply {
    /// Nothing, unless the front-end asked for an acknowledgement.
    Ack,
    /// A number.
    Number(u64),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Bytes and a descriptor.
    WithFd(Vec<u8>, OwnedFd),
}

/// What the front-end said of a ring.
#[derive(Debug, Default)]
struct Ring {
    num: u32,
    base: u16,
    addr: Option<VringAddr>,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    enabled: bool,
    /// Started and not stopped by the front-end.
    running: bool,
    /// It runs for the front-end and takes no more requests.
    draining: Option<Draining>,
}

/// How the stop of all rings went, since a ring last started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// No ring was stopped that counts.
    None,
    /// The front-end stopped rings while a dirty log was kept, and no request
    /// was given up.
    Clean,
    /// Requests were given up.
    Abandoned,
}

/// How the wait for a drain ends early.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "a closure has nothing to show")]
pub struct DrainLimit<'a> {
    /// The front-end is gone or the process is ending: wait no longer than
    /// `grace` from then on.
    pub hurry: &'a dyn Fn() -> bool,
    /// What a drain may take when in a hurry, and when storage does not answer
    /// and the in-flight table keeps the requests.
    pub grace: Duration,
}

/// One connected front-end.
#[derive(Debug)]
pub struct Session<'a> {
    disk: &'a Arc<Disk>,
    queues: &'a [QueueHandle],
    queue_size: u16,
    features: u64,
    protocol_features: u64,
    writeback: bool,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    inflight: Option<Arc<InflightRegion>>,
    log: Option<Arc<DirtyLog>>,
    channel: Option<BackendChannel>,
    /// When the first ring of those that stop now began to, and when the latest
    /// had stopped: a front-end stops them one by one, and the wait for dead
    /// storage is not to add up.
    stopping: Option<(Instant, Instant)>,
    stop: Stop,
    /// The VM's handoff was told that rings run.
    told_running: bool,
}

impl<'a> Session<'a> {
    /// A front-end that has said nothing yet.
    #[must_use]
    pub fn new(disk: &'a Arc<Disk>, queues: &'a [QueueHandle], queue_size: u16) -> Self {
        disk.status.set_rings(RingsStatus::default());
        Self {
            disk,
            queues,
            queue_size,
            features: 0,
            protocol_features: 0,
            writeback: true,
            memory: Arc::default(),
            rings: queues.iter().map(|_| Ring::default()).collect(),
            inflight: None,
            log: None,
            channel: None,
            stopping: None,
            stop: Stop::None,
            told_running: false,
        }
    }

    /// Whether a guest is at the disk: a ring runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.running)
    }

    /// Does what the front-end asks.
    ///
    /// # Errors
    /// [`Refused`]; nothing was changed then, except that a ring whose
    /// description became unusable has stopped.
    pub fn handle(&mut self, request: Request, limit: DrainLimit<'_>) -> Result<Reply, Refused> {
        match request {
            Request::GetFeatures => {
                return Ok(Reply::Number(features::offered(
                    self.disk.read_only,
                    self.queue_count(),
                )));
            }
            Request::SetFeatures(bits) => self.set_features(bits)?,
            Request::GetProtocolFeatures => return Ok(Reply::Number(protocol::OFFERED)),
            Request::SetProtocolFeatures(bits) => {
                if bits & !protocol::OFFERED != 0 {
                    return Err(Refused::Features(bits & !protocol::OFFERED));
                }
                self.protocol_features = bits;
            }
            Request::GetQueueNum => return Ok(Reply::Number(u64::from(self.queue_count()))),
            Request::SetOwner => {}
            Request::ResetOwner | Request::ResetDevice => self.reset(limit),
            Request::SetMemTable(regions) => {
                let regions: Result<Vec<_>, Refused> =
                    regions.into_iter().map(|(region, fd)| map_region(region, &fd)).collect();
                self.set_memory(regions?, limit)?;
            }
            Request::GetMaxMemSlots => return Ok(Reply::Number(MEM_SLOTS_MAX)),
            Request::AddMemRegion(region, fd) => {
                let mut regions = self.memory.regions().to_vec();
                regions.push(map_region(region, &fd)?);
                self.set_memory(regions, limit)?;
            }
            Request::RemoveMemRegion(region) => self.remove_region(region, limit)?,
            Request::SetLogBase { mmap_size, mmap_offset, fd } => {
                let log = DirtyLog::map(&fd, mmap_size, mmap_offset)
                    .map_err(|source| Refused::Map { what: "the dirty log", source })?;
                self.log = Some(Arc::new(log));
                self.apply_all();
                let body = [mmap_size.to_le_bytes(), mmap_offset.to_le_bytes()].concat();
                return Ok(Reply::Bytes(body));
            }
            Request::SetVringNum { index, num } => {
                if !num.is_power_of_two() || num > QUEUE_SIZE_MAX {
                    return Err(Refused::RingSize(num));
                }
                let ring = self.ring(index)?;
                // Its table of requests has one entry per descriptor.
                if ring.running && ring.num != num {
                    return Err(Refused::Running(index));
                }
                ring.num = num;
            }
            Request::SetVringAddr(addr) => {
                let ring = self.ring(addr.index)?;
                let before = ring.addr.replace(addr);
                let index = addr.index as usize;
                if self.rings[index].running && self.setup(index).is_none() {
                    self.rings[index].addr = before;
                    return Err(Refused::Start { index, source: unusable() });
                }
                self.apply(index);
            }
            Request::SetVringBase { index, base } => {
                // The upper bits belong to packed rings.
                self.ring(index)?.base = u16::try_from(base & 0xffff).expect("masked");
            }
            Request::GetVringBase { index } => {
                self.ring(index)?;
                self.stop_asked(index as usize, limit);
                fault_point::at("stop.drained");
                let ring = self.ring(index)?;
                ring.kick = None;
                let base = u32::from(ring.base);
                return Ok(Reply::Bytes([index.to_le_bytes(), base.to_le_bytes()].concat()));
            }
            Request::SetVringKick { index, fd } => {
                let Some(fd) = fd else { return Err(Refused::NoKick(index)) };
                self.ring(index)?;
                // A kick for a running ring means it is started anew.
                self.stop(index as usize, limit);
                self.ring(index)?.kick = Some(Arc::new(fd));
                if self.features & virtio::PROTOCOL_FEATURES == 0 {
                    self.ring(index)?.enabled = true;
                }
                self.start_if_ready(index as usize)?;
            }
            Request::SetVringCall { index, fd } => {
                self.ring(index)?.call = fd.map(Arc::new);
                self.apply(index as usize);
            }
            Request::SetVringErr { index, fd } => {
                self.ring(index)?.err = fd.map(Arc::new);
                self.apply(index as usize);
            }
            Request::SetVringEnable { index, enable } => {
                self.ring(index)?.enabled = enable;
                if enable {
                    if self.ring(index)?.draining.is_some() {
                        self.stop(index as usize, limit);
                    }
                    self.start_if_ready(index as usize)?;
                } else {
                    self.stop_asked(index as usize, limit);
                }
            }
            Request::SetBackendReqFd(fd) => self.channel = Some(BackendChannel::new(fd)),
            Request::GetConfig { offset, size, flags } => {
                let mut body =
                    [offset.to_le_bytes(), size.to_le_bytes(), flags.to_le_bytes()].concat();
                body.extend(config_space::read(&self.config(), offset, size));
                return Ok(Reply::Bytes(body));
            }
            Request::SetConfig { offset, payload } => self.set_config(offset, &payload)?,
            Request::GetInflightFd(wanted) => return self.make_inflight(wanted),
            Request::SetInflightFd(description, fd) => {
                let region = InflightRegion::map(&fd, description)
                    .map_err(|source| Refused::Map { what: "the in-flight region", source })?;
                let is_strange =
                    |member: &MemberHandle| member.awaits_another_machine(region.arrival());
                if self.disk.member.as_ref().is_some_and(is_strange)
                    && !self.disk.inflight_made.has(&fd)
                {
                    return Err(Refused::EarlierMachine);
                }
                self.writeback &= !region.is_write_through();
                region.set_write_through(!self.writeback);
                self.inflight = Some(Arc::new(region));
                self.apply_all();
            }
            Request::SetDeviceStateFd(direction, fd) => return transfer_state(direction, fd),
            Request::CheckDeviceState => return Ok(Reply::Number(0)),
            Request::Unknown(number) => return Err(Refused::Unknown(number)),
        }
        Ok(Reply::Ack)
    }

    /// Tells the front-end that the configuration space changed, if it listens.
    pub fn config_changed(&mut self) {
        if self.protocol_features & protocol::BACKEND_REQ == 0 {
            return;
        }
        if let Some(channel) = &mut self.channel
            && let Err(error) = channel.config_changed()
        {
            tracing::warn!(disk = self.disk.name, %error, "cannot tell the front-end of the new size");
        }
    }

    /// Shows what the rings are doing to who only looks.
    pub fn show_status(&self) {
        let takes = |ring: &&Ring| ring.running && ring.draining.is_none();
        self.disk.status.set_rings(RingsStatus {
            running: self.rings.iter().filter(takes).count(),
            logging: self.is_migrating(),
            drained: self.stop == Stop::Clean && !self.is_running(),
        });
    }

    /// An answer may not have reached the front-end, so it cannot be said that
    /// the rings were stopped.
    pub fn forget_stop(&mut self) {
        self.stop = Stop::None;
    }

    /// Stops all rings: the front-end is gone or the process ends.
    pub fn end(&mut self, limit: DrainLimit<'_>) {
        if self.is_running() {
            // The front-end has no answer to the stop of these.
            self.stop = Stop::None;
        }
        self.drain_all();
        for index in 0..self.rings.len() {
            self.stop(index, limit);
        }
        // Nobody said that the guest has stopped.
        self.tell_stopped(false);
        self.log = None;
        self.show_status();
    }

    fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).expect("configured as u16")
    }

    fn config(&self) -> [u8; config_space::CONFIG_BYTES] {
        let mut geometry = self.disk.volume.geometry();
        geometry.size_bytes = self.disk.size_bytes.load(Ordering::Relaxed);
        geometry.read_only = self.disk.read_only;
        config_space::encode(&geometry, self.queue_count(), self.queue_size, self.writeback)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring, Refused> {
        let queues = self.queue_count();
        self.rings.get_mut(index as usize).ok_or(Refused::NoSuchRing { index, queues })
    }

    fn set_features(&mut self, bits: u64) -> Result<(), Refused> {
        let unknown = bits & !features::offered(self.disk.read_only, self.queue_count());
        if unknown != 0 {
            return Err(Refused::Features(unknown));
        }
        self.features = bits;
        if bits & virtio::LOG_ALL == 0 {
            self.log = None;
        }
        self.apply_all();
        Ok(())
    }

    fn set_memory(
        &mut self,
        regions: Vec<Arc<MemoryRegion>>,
        limit: DrainLimit<'_>,
    ) -> Result<(), Refused> {
        if regions.len() as u64 > MEM_SLOTS_MAX {
            return Err(Refused::MemoryTable);
        }
        let memory = GuestMemory::new(regions).map_err(|_| Refused::MemoryTable)?;
        self.memory = Arc::new(memory);
        for index in 0..self.rings.len() {
            if self.rings[index].running && self.setup(index).is_none() {
                tracing::warn!(
                    disk = self.disk.name,
                    queue = index,
                    "the front-end took away the memory of a running ring; it stops"
                );
                self.stop(index, limit);
            }
        }
        self.apply_all();
        Ok(())
    }

    fn remove_region(&mut self, gone: Region, limit: DrainLimit<'_>) -> Result<(), Refused> {
        let mut regions = self.memory.regions().to_vec();
        let is_gone = |region: &Arc<MemoryRegion>| {
            let have = region.description();
            (have.guest_addr, have.size, have.user_addr)
                == (gone.guest_addr, gone.size, gone.user_addr)
        };
        let at = regions.iter().position(is_gone).ok_or(Refused::NoSuchRegion)?;
        regions.remove(at);
        self.set_memory(regions, limit)
    }

    fn set_config(&mut self, offset: u32, payload: &[u8]) -> Result<(), Refused> {
        if offset as usize != config_space::WRITEBACK_OFFSET || payload.len() != 1 {
            return Err(Refused::ConfigWrite(offset));
        }
        self.writeback = payload[0] != 0;
        if let Some(region) = &self.inflight {
            region.set_write_through(!self.writeback);
        }
        self.apply_all();
        Ok(())
    }

    fn make_inflight(&mut self, wanted: InflightDescription) -> Result<Reply, Refused> {
        let InflightDescription { num_queues, queue_size, .. } = wanted;
        if num_queues > self.queue_count() {
            return Err(Refused::NoSuchRing {
                index: u32::from(num_queues),
                queues: self.queue_count(),
            });
        }
        if queue_size == 0 || u32::from(queue_size) > QUEUE_SIZE_MAX {
            return Err(Refused::RingSize(u32::from(queue_size)));
        }
        let (region, fd, made) = InflightRegion::create(num_queues, queue_size)
            .map_err(|source| Refused::Map { what: "an in-flight region", source })?;
        region.set_write_through(!self.writeback);
        self.disk.inflight_made.add(&fd);
        self.inflight = Some(Arc::new(region));
        // This process may die before the first ring starts, when the machine runs already.
        self.keep_arrival();
        let mut body = [made.mmap_size.to_le_bytes(), made.mmap_offset.to_le_bytes()].concat();
        body.extend(num_queues.to_le_bytes());
        body.extend(queue_size.to_le_bytes());
        // repr(C) padding, which the vhost crate expects and QEMU ignores.
        body.extend([0; 4]);
        Ok(Reply::WithFd(body, fd))
    }

    /// For the process that comes next, should this one die under a machine that arrives with a try.
    fn keep_arrival(&self) {
        let arrival = self.disk.member.as_ref().and_then(MemberHandle::arrival);
        if let (Some(region), Some(arrival)) = (&self.inflight, arrival) {
            region.set_arrival(arrival);
        }
    }

    fn reset(&mut self, limit: DrainLimit<'_>) {
        self.end(limit);
        self.stop = Stop::None;
        self.rings = self.queues.iter().map(|_| Ring::default()).collect();
        self.inflight = None;
        self.log = None;
        self.features = 0;
        self.writeback = true;
    }

    /// The ring as it should run, or `None` when it cannot.
    fn setup(&self, index: usize) -> Option<RingSetup> {
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

    fn apply_all(&mut self) {
        for index in 0..self.rings.len() {
            self.apply(index);
        }
    }

    /// Brings a running ring up to date.
    fn apply(&mut self, index: usize) {
        if self.rings[index].running
            && let Some(setup) = self.setup(index)
        {
            self.queues[index].apply(setup);
        }
    }

    fn start_if_ready(&mut self, index: usize) -> Result<(), Refused> {
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
        if !std::mem::replace(&mut self.told_running, true)
            && let Some(member) = &self.disk.member
        {
            self.keep_arrival();
            member.started();
        }
        tracing::debug!(disk = self.disk.name, queue = index, "ring started");
        Ok(())
    }

    /// A dirty log is kept.
    fn is_migrating(&self) -> bool {
        self.log.is_some() && self.features & virtio::LOG_ALL != 0
    }

    /// The front-end stops a ring, and during a migration means all of them.
    fn stop_asked(&mut self, index: usize, limit: DrainLimit<'_>) {
        let migrating = self.is_migrating();
        if !self.rings[index].running {
            return;
        }
        if migrating {
            self.drain_all();
            // The seal goes out while the drain is under way.
            self.tell_stopped(true);
        }
        self.stop(index, limit);
        if !self.is_running() {
            self.tell_stopped(migrating);
            // What was given up is not answered, and may still be done.
            if let Some(member) = self.disk.member.as_ref().filter(|_| self.stop != Stop::Abandoned)
            {
                member.drained();
            }
        }
        if migrating && self.stop == Stop::None {
            self.stop = Stop::Clean;
        }
    }

    fn tell_stopped(&mut self, migrating: bool) {
        if std::mem::take(&mut self.told_running)
            && let Some(member) = &self.disk.member
        {
            member.stopped(migrating);
        }
    }

    /// Begins to drain every ring that runs.
    fn drain_all(&mut self) {
        for (ring, queue) in self.rings.iter_mut().zip(self.queues) {
            if ring.running && ring.draining.is_none() {
                ring.draining = Some(queue.drain());
            }
        }
    }

    /// Stops a ring when everything in flight has been answered. While storage
    /// does not answer, requests that the in-flight table keeps are given up
    /// after a while, to be done again when the ring starts; during a migration
    /// they are waited for, because the table does not move with the guest.
    fn stop(&mut self, index: usize, limit: DrainLimit<'_>) {
        if !std::mem::take(&mut self.rings[index].running) {
            return;
        }
        let queue = &self.queues[index];
        let draining = self.rings[index].draining.take().unwrap_or_else(|| queue.drain());
        let now = Instant::now();
        let begun = match self.stopping {
            Some((begun, latest)) if now.duration_since(latest) < STOPPING_TOGETHER => begun,
            _ => now,
        };
        let next_avail = loop {
            if let DrainState::Stopped(next_avail) = draining.wait(DRAIN_TICK) {
                break next_avail;
            }
            let never = matches!(self.disk.volume.state(), VolumeState::Fenced | VolumeState::Lost);
            let migrating = self.is_migrating();
            let may_give_up = (self.inflight.is_some() && !migrating) || (limit.hurry)();
            // Who waits for a decision need not be answered by the end.
            let held = self.disk.member.as_ref().is_some_and(MemberHandle::is_held);
            let soon = held && (limit.hurry)();
            if never || soon || (may_give_up && begun.elapsed() > limit.grace) {
                tracing::warn!(
                    disk = self.disk.name,
                    queue = index,
                    "stopping a ring whose requests the storage has not answered"
                );
                self.stop = Stop::Abandoned;
                let next_avail = queue.abandon();
                if let Some(member) = &self.disk.member {
                    member.given_up();
                }
                break next_avail;
            }
        };
        self.stopping = Some((begun, Instant::now()));
        if let Some(next_avail) = next_avail {
            self.rings[index].base = next_avail;
        }
        tracing::debug!(disk = self.disk.name, queue = index, "ring stopped");
    }
}

fn unusable() -> std::io::Error {
    std::io::Error::other("its addresses are not in the guest's memory")
}

fn map_region(region: Region, fd: &OwnedFd) -> Result<Arc<MemoryRegion>, Refused> {
    MemoryRegion::map(region, fd)
        .map(Arc::new)
        .map_err(|source| Refused::Map { what: "a memory region", source })
}

/// The device has no state beyond its rings. Saving writes nothing: closing the
/// descriptor is the end of the stream. Loading reads nothing but its end.
fn transfer_state(direction: StateDirection, fd: OwnedFd) -> Result<Reply, Refused> {
    if direction == StateDirection::Load {
        let mut byte = [0];
        // The front-end may write the (empty) stream after our answer, so only
        // what is there already can be judged.
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        let _ = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags));
        if matches!(nix::unistd::read(&fd, &mut byte), Ok(1)) {
            return Err(Refused::DeviceState);
        }
    }
    Ok(Reply::Number(STATE_NO_FD))
}
