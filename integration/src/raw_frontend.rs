//! A vhost-user-blk front-end without a VM, with every message and every ring in the test's hands.
//!
//! [`RawFrontend::connect`] does what QEMU does up to running rings; what a test wants different it switches off in
//! [`Options`] and does itself. Memory, rings, inflight region and dirty log outlive a connection, as a guest's do:
//! [`RawFrontend::reconnect`] hands them to the back-end that answers next.

use crate::memory::{BASE, GuestMemory, SharedMap};
use crate::ring::{Ring, Used};
use crate::vhost_user::{
    Channel, FLAG_NEED_REPLY, FLAG_REPLY, Message, backend_request, feature, protocol, request,
};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// The page of the dirty log, fixed by the protocol.
pub const LOG_PAGE: u64 = 4096;

const FEATURES: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | feature::BLK_SIZE_MAX
    | feature::BLK_SEG_MAX
    | feature::BLK_RO
    | feature::BLK_BLK_SIZE
    | feature::BLK_FLUSH
    | feature::BLK_TOPOLOGY
    | feature::BLK_CONFIG_WCE
    | feature::BLK_MQ
    | feature::BLK_DISCARD
    | feature::BLK_WRITE_ZEROES;

const PROTOCOL: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::DEVICE_STATE;

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Queues to set up.
    pub queues: u16,
    /// Descriptors in each; a power of two.
    pub queue_size: u16,
    /// Guest RAM.
    pub memory_bytes: usize,
    /// Features to accept, of those offered. LOG_ALL comes with [`RawFrontend::start_logging`].
    pub features: u64,
    /// Protocol features to accept, of those offered.
    pub protocol: u64,
    /// Use an inflight region, if both sides can.
    pub inflight: bool,
    /// Entries of each ring that it is asked for; `None`: as the rings have. QEMU 10.0.13 asks for fewer.
    pub inflight_size: Option<u16>,
    /// Start the rings; else the test does, with [`RawFrontend::start`].
    pub start: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            memory_bytes: 16 << 20,
            features: FEATURES,
            protocol: PROTOCOL,
            inflight: true,
            inflight_size: None,
            start: true,
        }
    }
}

/// One queue: its ring and its three descriptors. Can be moved to a thread of its own.
#[derive(Debug)]
pub struct Queue {
    /// The ring.
    pub ring: Ring,
    /// Written to wake the device.
    pub kick: EventFd,
    /// Written by the device. Non-blocking, as QEMU's is.
    pub call: EventFd,
    /// Written by the device that gave up on the ring.
    pub err: EventFd,
    /// Request memory that is free again, by length.
    pub(crate) spare: BTreeMap<usize, Vec<u64>>,
    /// Requests of `blk` that the device has, by head.
    pub(crate) pending: BTreeMap<u32, crate::blk::Pending>,
    pub(crate) memory: Arc<GuestMemory>,
}

impl Queue {
    fn new(memory: &Arc<GuestMemory>, size: u16, event_idx: bool) -> Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            ring: Ring::new(memory, size, event_idx)?,
            kick: event()?,
            call: event()?,
            err: event()?,
            spare: BTreeMap::new(),
            pending: BTreeMap::new(),
            memory: Arc::clone(memory),
        })
    }

    /// Kicks if the device wants it.
    pub fn kick(&mut self) -> Result<()> {
        if self.ring.kick_wanted() {
            self.kick_anyway()?;
        }
        Ok(())
    }

    /// Kicks.
    pub fn kick_anyway(&self) -> Result<()> {
        self.kick.write(1)?;
        Ok(())
    }

    /// Waits for a completion, asleep until the call comes. `None` when the time is over.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Option<Used>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.ring.pop_used() {
                return Ok(Some(used));
            }
            if self.ring.request_call() && !wait_event(&self.call, deadline)? {
                // A device that completed without a call has to be told from one that did not complete.
                return match self.ring.pop_used() {
                    Some(used) => bail!("head {} was completed without a call", used.head),
                    None => Ok(None),
                };
            }
        }
    }

    /// Whether the device reported a broken ring within `timeout`.
    pub fn wait_broken(&self, timeout: Duration) -> Result<bool> {
        wait_event(&self.err, Instant::now() + timeout)
    }
}

/// Waits for an eventfd and takes its count. False when the deadline passes first.
fn wait_event(event: &EventFd, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last fraction of a millisecond is slept rather than spun.
        let left_ms = left.as_millis().saturating_add(1).min(1 << 30);
        let timeout =
            if left.is_zero() { PollTimeout::ZERO } else { PollTimeout::try_from(left_ms)? };
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                event.read()?;
                return Ok(true);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// The inflight region as the back-end described it.
#[derive(Debug)]
pub struct Inflight {
    /// The region itself; the back-end writes, the front-end only keeps it.
    pub map: SharedMap,
    /// The body of GET_INFLIGHT_FD's reply, sent back as it was.
    description: Vec<u8>,
}

/// A front-end with its guest's memory.
#[derive(Debug)]
pub struct RawFrontend {
    channel: Option<Channel>,
    path: PathBuf,
    options: Options,
    memory: Arc<GuestMemory>,
    features: u64,
    protocol: u64,
    offered_features: u64,
    offered_protocol: u64,
    max_queues: u64,
    queues: Vec<Option<Queue>>,
    inflight: Option<Inflight>,
    log: Option<SharedMap>,
    from_backend: Option<Channel>,
}

impl RawFrontend {
    /// Connects to `path`, negotiates, and starts the rings.
    pub fn connect(path: &Path, options: Options) -> Result<Self> {
        let memory = Arc::new(GuestMemory::new(options.memory_bytes)?);
        Self::connect_with(path, options, memory)
    }

    /// [`Self::connect`] with memory that somebody else made.
    pub fn connect_with(path: &Path, options: Options, memory: Arc<GuestMemory>) -> Result<Self> {
        let mut this = Self {
            channel: None,
            path: path.to_path_buf(),
            options,
            memory,
            features: 0,
            protocol: 0,
            offered_features: 0,
            offered_protocol: 0,
            max_queues: 1,
            queues: Vec::new(),
            inflight: None,
            log: None,
            from_backend: None,
        };
        this.negotiate()?;
        for _ in 0..options.queues {
            let event_idx = this.features & feature::EVENT_IDX != 0;
            this.queues.push(Some(Queue::new(&this.memory, options.queue_size, event_idx)?));
        }
        if options.start {
            this.start()?;
        }
        Ok(this)
    }

    /// Closes the connection. The guest's memory stays as it is.
    pub fn disconnect(&mut self) {
        self.channel = None;
        self.from_backend = None;
    }

    /// Connects again, to a back-end that may be another process, with the same memory, rings and inflight region.
    pub fn reconnect(&mut self) -> Result<()> {
        self.attach()?;
        self.start()
    }

    /// Connects again like [`Self::reconnect`], with the rings left as they are.
    pub fn attach(&mut self) -> Result<()> {
        self.disconnect();
        self.negotiate()
    }

    fn negotiate(&mut self) -> Result<()> {
        self.channel = Some(Channel::connect(&self.path)?);
        self.protocol = 0;
        self.send(request::SET_OWNER, &[], &[])?;
        self.offered_features = self.ask(request::GET_FEATURES, &[])?.u64()?;
        let logging = if self.log.is_some() { feature::LOG_ALL } else { 0 };
        self.features = self.offered_features & (self.options.features | logging);
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            self.offered_protocol = self.ask(request::GET_PROTOCOL_FEATURES, &[])?.u64()?;
            let accepted = self.offered_protocol & self.options.protocol;
            self.send(request::SET_PROTOCOL_FEATURES, &accepted.to_le_bytes(), &[])?;
            self.protocol = accepted;
        }
        if self.protocol & protocol::MQ != 0 {
            self.max_queues = self.ask(request::GET_QUEUE_NUM, &[])?.u64()?;
        }
        if self.protocol & protocol::BACKEND_REQ != 0 {
            let (ours, theirs) = UnixStream::pair()?;
            self.send(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
            self.from_backend = Some(Channel::new(ours)?);
        }
        Ok(())
    }

    /// Hands over features, memory and rings in QEMU's order, and enables the rings.
    pub fn start(&mut self) -> Result<()> {
        self.set_features(self.features)?;
        if self.options.inflight && self.protocol & protocol::INFLIGHT_SHMFD != 0 {
            match self.inflight {
                None => self.take_inflight()?,
                Some(_) => self.set_inflight()?,
            }
        }
        self.send_memory()?;
        for index in 0..self.options.queues {
            // A queue that was taken away is set up by whoever took it, or not at all.
            if self.queues[usize::from(index)].is_some() {
                let base = self.queue_ref(index).ring.used_index();
                self.set_up_queue(index, base)?;
            }
        }
        if self.log.is_some() {
            self.send_log_base()?;
        }
        for index in 0..self.options.queues {
            if self.queues[usize::from(index)].is_some() {
                self.enable(index, true)?;
                // A guest kicks after a restart, because what it published before may not have been seen.
                self.queue_ref(index).kick_anyway()?;
            }
        }
        Ok(())
    }

    /// Ring size, base, addresses and descriptors of one queue, up to KICK.
    pub fn set_up_queue(&self, index: u16, base: u16) -> Result<()> {
        let i = u32::from(index);
        let queue = self.queue_ref(index);
        self.send(request::SET_VRING_NUM, &pair(i, u32::from(queue.ring.size())), &[])?;
        self.send(request::SET_VRING_BASE, &pair(i, u32::from(base)), &[])?;
        self.set_vring_addr(index, self.log.is_some())?;
        let id = u64::from(index).to_le_bytes();
        self.send(request::SET_VRING_CALL, &id, &[queue.call.as_fd()])?;
        self.send(request::SET_VRING_ERR, &id, &[queue.err.as_fd()])?;
        self.send(request::SET_VRING_KICK, &id, &[queue.kick.as_fd()])
    }

    /// SET_VRING_ADDR, with the flag for a logged used ring or without it.
    pub fn set_vring_addr(&self, index: u16, logged: bool) -> Result<()> {
        let (descriptors, avail, used) = self.queue_ref(index).ring.addresses();
        let mut body = pair(u32::from(index), u32::from(logged)).to_vec();
        for gpa in [descriptors, used, avail] {
            body.extend_from_slice(&self.memory.user_address(gpa).to_le_bytes());
        }
        body.extend_from_slice(&used.to_le_bytes());
        self.send(request::SET_VRING_ADDR, &body, &[])
    }

    /// Hands over the guest's memory; once on a connection.
    pub fn send_memory(&self) -> Result<()> {
        let map = self.memory.map();
        let region = [BASE, map.len() as u64, self.memory.user_address(BASE), 0];
        let region: Vec<u8> = region.iter().flat_map(|w| w.to_le_bytes()).collect();
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
            let body = [&[0; 8], region.as_slice()].concat();
            self.send(request::ADD_MEM_REG, &body, &[map.fd()])
        } else {
            let body = [&pair(1, 0), region.as_slice()].concat();
            self.send(request::SET_MEM_TABLE, &body, &[map.fd()])
        }
    }

    /// SET_VRING_ENABLE.
    pub fn enable(&self, index: u16, on: bool) -> Result<()> {
        self.send(request::SET_VRING_ENABLE, &pair(u32::from(index), u32::from(on)), &[])
    }

    /// GET_VRING_BASE: stops the ring, and returns where it would go on.
    pub fn get_vring_base(&self, index: u16) -> Result<u16> {
        let reply = self.ask(request::GET_VRING_BASE, &pair(u32::from(index), 0))?;
        let base = reply
            .payload
            .get(4..8)
            .and_then(|b| b.try_into().ok())
            .context("a vring state has 8 bytes")?;
        u16::try_from(u32::from_le_bytes(base)).context("a split ring's base has 16 bits")
    }

    /// SET_FEATURES with exactly these.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.send(request::SET_FEATURES, &features.to_le_bytes(), &[])
    }

    /// Device configuration space from its start; shorter if the back-end has less.
    pub fn config(&self, len: u32) -> Result<Vec<u8>> {
        let mut body: Vec<u8> = [0, len, 0].iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
        body.resize(12 + usize::try_from(len)?, 0);
        let reply = self.ask(request::GET_CONFIG, &body)?;
        Ok(reply.payload.get(12..).context("the back-end refused GET_CONFIG")?.to_vec())
    }

    /// SET_CONFIG of some bytes.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        let len = u32::try_from(bytes.len())?;
        let mut body: Vec<u8> = [offset, len, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        body.extend_from_slice(bytes);
        self.send(request::SET_CONFIG, &body, &[])
    }

    /// The disk's size in sectors, from configuration space.
    pub fn capacity(&self) -> Result<u64> {
        let config = self.config(8)?;
        Ok(u64::from_le_bytes(config[..].try_into().context("the capacity has 8 bytes")?))
    }

    /// GET_INFLIGHT_FD: a fresh region of the back-end.
    pub fn get_inflight(&self) -> Result<Inflight> {
        let mut body = vec![0; 24];
        body[16..18].copy_from_slice(&self.options.queues.to_le_bytes());
        let size = self.options.inflight_size.unwrap_or(self.options.queue_size);
        body[18..20].copy_from_slice(&size.to_le_bytes());
        let mut reply = self.ask(request::GET_INFLIGHT_FD, &body)?;
        let size = reply.u64()?;
        let fd = reply.fds.pop().context("GET_INFLIGHT_FD's reply has no descriptor")?;
        Ok(Inflight {
            map: SharedMap::of_fd(fd, usize::try_from(size)?)?,
            description: reply.payload,
        })
    }

    /// GET_INFLIGHT_FD, and the region is the one in use from here on.
    pub fn take_inflight(&mut self) -> Result<()> {
        self.inflight = Some(self.get_inflight()?);
        self.set_inflight()
    }

    /// The region in use is so many bytes from here on, as a back-end of another version would have made it.
    pub fn cut_inflight(&mut self, bytes: u64) -> Result<()> {
        let inflight = self.inflight.as_mut().context("there is no inflight region")?;
        inflight.description[..8].copy_from_slice(&bytes.to_le_bytes());
        Ok(())
    }

    /// SET_INFLIGHT_FD with the region in use.
    pub fn set_inflight(&self) -> Result<()> {
        let inflight = self.inflight.as_ref().context("there is no inflight region")?;
        self.send(request::SET_INFLIGHT_FD, &inflight.description, &[inflight.map.fd()])
    }

    /// The inflight region in use.
    #[must_use]
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// Turns dirty logging on as QEMU does at the start of a migration: log, feature, ring addresses.
    pub fn start_logging(&mut self) -> Result<()> {
        self.log = Some(self.new_log()?);
        self.send_log_base()?;
        self.set_features(self.features | feature::LOG_ALL)?;
        self.each_queue(|this, index| this.set_vring_addr(index, true))
    }

    /// Turns dirty logging off.
    pub fn stop_logging(&mut self) -> Result<()> {
        self.set_features(self.features & !feature::LOG_ALL)?;
        self.log = None;
        self.each_queue(|this, index| this.set_vring_addr(index, false))
    }

    /// Swaps in an empty log, as cloud-hypervisor does in each round, and returns the pages of the old one. After this
    /// the back-end must not mark the old one any more.
    pub fn swap_log(&mut self) -> Result<SharedMap> {
        let new = self.new_log()?;
        let old = self.log.replace(new).context("logging is off")?;
        self.send_log_base()?;
        Ok(old)
    }

    /// Guest addresses of the pages marked so far, which are unmarked by this.
    pub fn take_dirty(&self) -> Result<Vec<u64>> {
        Ok(take_marked(self.log.as_ref().context("logging is off")?))
    }

    fn new_log(&self) -> Result<SharedMap> {
        let pages = (BASE + self.memory.map().len() as u64).div_ceil(LOG_PAGE);
        SharedMap::new("dirty-log", usize::try_from(pages.div_ceil(8).next_multiple_of(LOG_PAGE))?)
    }

    fn send_log_base(&self) -> Result<()> {
        let log = self.log.as_ref().context("logging is off")?;
        let body: Vec<u8> = [log.len() as u64, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        // Answered in any case when the log is shared memory, so no acknowledgement is asked for.
        let channel = self.channel()?;
        channel.send(request::SET_LOG_BASE, 0, &body, &[log.fd()])?;
        expect_reply(channel, request::SET_LOG_BASE).map(drop)
    }

    fn each_queue(&self, mut act: impl FnMut(&Self, u16) -> Result<()>) -> Result<()> {
        (0..self.options.queues).try_for_each(|index| act(self, index))
    }

    /// The guest resets the device: rings stop and are empty.
    pub fn reset_rings(&mut self) -> Result<()> {
        self.each_queue(|this, index| this.get_vring_base(index).map(drop))?;
        for queue in self.queues.iter_mut().flatten() {
            queue.ring.reset();
            queue.pending.clear();
        }
        self.inflight = None;
        Ok(())
    }

    /// Waits for the back-end to say that configuration space changed.
    pub fn wait_config_change(&mut self, timeout: Duration) -> Result<()> {
        let channel = self.from_backend.as_mut().context("the back-end has no request channel")?;
        channel.set_timeout(timeout)?;
        let message = channel.receive()?;
        if message.request != backend_request::CONFIG_CHANGE_MSG {
            bail!(
                "the back-end sent request {} instead of a configuration change",
                message.request
            );
        }
        if message.flags & FLAG_NEED_REPLY != 0 {
            channel.send(message.request, FLAG_REPLY, &0_u64.to_le_bytes(), &[])?;
        }
        Ok(())
    }

    /// Sends a request and, where REPLY_ACK was negotiated, waits for its acknowledgement.
    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let channel = self.channel()?;
        if self.protocol & protocol::REPLY_ACK == 0 {
            return channel.send(request, 0, payload, fds);
        }
        channel.send(request, FLAG_NEED_REPLY, payload, fds)?;
        match expect_reply(channel, request)?.u64()? {
            0 => Ok(()),
            code => bail!("the back-end refused request {request} with {code}"),
        }
    }

    /// Sends a request that has a reply, and returns it.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Result<Message> {
        let channel = self.channel()?;
        channel.send(request, 0, payload, &[])?;
        expect_reply(channel, request)
    }

    /// The connection, for anything else.
    pub fn channel(&self) -> Result<&Channel> {
        self.channel.as_ref().context("the front-end is not connected")
    }

    /// Features agreed on.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Features and protocol features the back-end offered.
    #[must_use]
    pub fn offered(&self) -> (u64, u64) {
        (self.offered_features, self.offered_protocol)
    }

    /// Queues the back-end has.
    #[must_use]
    pub fn max_queues(&self) -> u64 {
        self.max_queues
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn queue_ref(&self, index: u16) -> &Queue {
        self.queues[usize::from(index)].as_ref().expect("a queue that was not taken")
    }

    /// One queue.
    ///
    /// # Panics
    /// When there is no such queue, or it was taken.
    pub fn queue(&mut self, index: u16) -> &mut Queue {
        self.queues[usize::from(index)].as_mut().expect("a queue that was not taken")
    }

    /// One queue, to be driven by another thread.
    ///
    /// # Panics
    /// When there is no such queue, or it was taken.
    pub fn take_queue(&mut self, index: u16) -> Queue {
        self.queues[usize::from(index)].take().expect("a queue that was not taken")
    }
}

/// Guest addresses of the pages marked in a log, which are unmarked by this.
#[must_use]
pub fn take_marked(log: &SharedMap) -> Vec<u64> {
    let mut pages = Vec::new();
    for byte in 0..log.len() {
        let marks = log.byte(byte).swap(0, SeqCst);
        pages.extend(
            (0..8)
                .filter(|bit| marks & (1 << bit) != 0)
                .map(|bit| (byte as u64 * 8 + bit) * LOG_PAGE),
        );
    }
    pages
}

fn expect_reply(channel: &Channel, request: u32) -> Result<Message> {
    let reply =
        channel.receive().with_context(|| format!("waiting for the reply to request {request}"))?;
    if reply.request != request || reply.flags & FLAG_REPLY == 0 {
        bail!(
            "expected the reply to request {request}, got {} with flags {:#x}",
            reply.request,
            reply.flags
        );
    }
    Ok(reply)
}

fn pair(a: u32, b: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&a.to_le_bytes());
    bytes[4..].copy_from_slice(&b.to_le_bytes());
    bytes
}
