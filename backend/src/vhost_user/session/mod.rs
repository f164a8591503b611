//! One front-end: what it negotiated and what its rings look like.
//!
//! ```text
//!   ring:  described (NUM, ADDR, BASE) --KICK and ENABLE(1)--> running
//!             ^                                                  |
//!             +--- ENABLE(0), GET_VRING_BASE, RESET, gone -------+  drains first
//! ```
//!
//! A changed memory table, log, feature or address goes to running rings whole, and is
//! answered when every ring has taken it over.
//!
//! | module | noun |
//! |---|---|
//! | `memory` | the guest's memory as it is shared |
//! | `ring` | how a ring starts and is changed |
//! | `stop` | how rings stop |

mod memory;
mod ring;
mod stop;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use baton_fault_point as fault_point;

use super::connection::BackendChannel;
use super::features::{self, protocol, virtio};
use super::message::{InflightDescription, MEM_SLOTS_MAX, Request, StateDirection};
use super::refused::Refused;
use crate::dirty_log::DirtyLog;
use crate::handoff::MemberHandle;
use crate::inflight::InflightRegion;
use crate::memory::GuestMemory;
use crate::queue::Disk;
use crate::queue::mailbox::QueueHandle;
use crate::status::RingsStatus;
use crate::virtio_blk::config_space;
use crate::virtqueue::QUEUE_SIZE_MAX;
use memory::map_region;
use ring::{Ring, unusable};
use stop::Stop;

pub use stop::DrainLimit;

/// In the reply to SET_DEVICE_STATE_FD: no descriptor comes with it.
const STATE_NO_FD: u64 = 1 << 8;
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
