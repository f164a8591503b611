//! An NBD export as a volume, and its queues.
//!
//! The connection that found the export is kept for the first queue: some servers
//! serve one client, or end with their last. A queue that is dropped in peace gives
//! its connection back for the next.
//!
//! How many queues: as many as are asked for where the server says that a FLUSH on
//! one connection covers what was answered on another (CAN_MULTI_CONN); else one.
//! One connection for several queues would put a lock and a thread between each
//! request and its bytes, for servers that are not made for load.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::Epoll;

use super::handshake::{Export, Refusal};
use super::link::Link;
use super::session::{DropReason, Notice, Opened, Session, Wishes};
use super::tls::TlsSettings;
use crate::baton::Timing;
use crate::gate::Gate;
use crate::open::{OpenError, OpenOptions, random_nonzero};
use crate::socket::{Endpoint, Wake};
use crate::uri::{NbdServer, NbdUri};
use crate::volume::{
    Completion, EventListener, Extent, Geometry, Op, QueueError, Tag, Volume, VolumeEvent,
    VolumeQueue, VolumeState,
};

/// Pause between attempts while a volume is opened.
const OPEN_PAUSE: Duration = Duration::from_millis(50);
/// Names are resolved again at most this often while the server is away.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);
/// The kernel gives up a dead peer by itself, after its own time: an earlier end
/// would also cut off a server that is alive and stands still, whose old requests
/// could then be done after new ones.
const USER_TIMEOUT_MS: u32 = 0;

struct Hub {
    lost: bool,
    /// Queues that have no connection.
    down: BTreeSet<u16>,
    told: VolumeState,
    listener: Option<EventListener>,
    /// The size that each open queue's server has shown it, bytes.
    open: BTreeMap<u16, u64>,
    spare: Option<Link>,
    /// Wakes each open queue's thread when the gate moves.
    wakers: BTreeMap<u16, Arc<Wake>>,
    resolved: Instant,
}

struct Shared {
    uri: NbdUri,
    timing: Timing,
    endpoint: Arc<Endpoint>,
    geometry: Geometry,
    multi_conn: bool,
    map: bool,
    tls: Option<Arc<TlsSettings>>,
    size_bytes: AtomicU64,
    resolving: AtomicBool,
    /// Nothing of the guest is sent.
    shut: AtomicBool,
    hub: Mutex<Hub>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Shared {
    fn hub(&self) -> MutexGuard<'_, Hub> {
        // Nothing in a critical section can leave the hub half changed.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the hub, and tells the listener what comes of it.
    fn change(&self, change: impl FnOnce(&mut Hub)) {
        let (state, listener) = {
            let mut hub = self.hub();
            change(&mut hub);
            let state = hub.state();
            if std::mem::replace(&mut hub.told, state) == state {
                return;
            }
            (state, hub.listener.clone())
        };
        if let Some(listener) = listener {
            listener(VolumeEvent::State(state));
        }
    }

    /// A queue's server showed this size. The volume has grown when all have seen
    /// it: a connection of before might be refused what is new.
    fn sized(&self, queue: u16, size_bytes: u64) {
        let (all, listener) = {
            let mut hub = self.hub();
            hub.open.insert(queue, size_bytes);
            (hub.open.values().min().copied().unwrap_or(0), hub.listener.clone())
        };
        let before = self.size_bytes.fetch_max(all, Ordering::AcqRel);
        if let Some(listener) = listener.filter(|_| all > before) {
            listener(VolumeEvent::Resized(all));
        }
    }

    /// The gate has moved: every queue looks.
    fn wake(&self) {
        for waker in self.hub().wakers.values() {
            waker.notify();
        }
    }

    /// Looks the server's name up again, in a thread that ends with that: it may
    /// block, and a queue must not.
    fn resolve(self: &Arc<Self>) {
        let is_name = match &*self.endpoint {
            Endpoint::Tcp { server, .. } => server.host.parse::<std::net::IpAddr>().is_err(),
            Endpoint::Unix(_) => false,
        };
        {
            let mut hub = self.hub();
            if !is_name || hub.resolved.elapsed() < RESOLVE_PAUSE {
                return;
            }
            hub.resolved = Instant::now();
        }
        if self.resolving.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new().name("baton-resolve".to_owned()).spawn(move || {
            shared.endpoint.refresh();
            shared.resolving.store(false, Ordering::Release);
        });
        if spawned.is_err() {
            self.resolving.store(false, Ordering::Release);
        }
    }
}

impl Hub {
    fn state(&self) -> VolumeState {
        match (self.lost, self.down.is_empty()) {
            (true, _) => VolumeState::Lost,
            (false, true) => VolumeState::Connected,
            (false, false) => VolumeState::Reconnecting,
        }
    }
}

/// An open export.
#[derive(Debug)]
pub(crate) struct NbdVolume {
    shared: Arc<Shared>,
}

impl NbdVolume {
    /// Connects, and keeps trying for as long as the options say.
    pub(crate) fn open(uri: &NbdUri, options: &OpenOptions) -> Result<Self, OpenError> {
        let deadline = Instant::now() + options.connect_timeout;
        loop {
            match attempt(uri, options, deadline) {
                Ok((link, export)) => return Self::start(uri, link, export, options),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again(error)) if Instant::now() + OPEN_PAUSE >= deadline => {
                    return Err(error);
                }
                Err(Attempt::Again(_)) => thread::sleep(OPEN_PAUSE),
            }
        }
    }

    fn start(
        uri: &NbdUri,
        mut link: Link,
        export: Export,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let block = u64::from(export.min_block);
        let size_bytes = export.size_bytes / block * block;
        if size_bytes == 0 {
            return Err(OpenError::NbdEmpty {
                volume: uri.to_string(),
                size_bytes: export.size_bytes,
                block_bytes: export.min_block,
            });
        }
        if size_bytes != export.size_bytes {
            tracing::warn!(
                "the last {} bytes of `{uri}` do not fill a block and are left out",
                export.size_bytes - size_bytes
            );
        }
        if !export.flags.flush() && !export.flags.read_only() {
            tracing::warn!(
                "the server of `{uri}` has no flush command; {}",
                if export.flags.fua() {
                    "each write is made durable by itself, which is slow"
                } else {
                    "what the guest flushes is as durable as the server keeps any write"
                }
            );
        }
        let geometry = Geometry {
            id: uri.id(),
            size_bytes,
            block_bytes: export.min_block,
            discard_bytes: export.preferred_block,
            read_only: options.read_only || export.flags.read_only(),
        };
        link.session().set_opened(Opened {
            size_bytes,
            block_bytes: export.min_block,
            read_only: geometry.read_only,
        });
        // What nobody may write is nobody's to hand over, and needs no permission.
        let stands_by = options.standby && !geometry.read_only;
        let shared = Arc::new(Shared {
            uri: uri.clone(),
            timing: options.timing,
            endpoint: Arc::clone(link.endpoint()),
            geometry,
            multi_conn: export.flags.multi_conn(),
            map: options.map,
            tls: link.settings().cloned(),
            size_bytes: AtomicU64::new(size_bytes),
            resolving: AtomicBool::new(false),
            shut: AtomicBool::new(stands_by),
            hub: Mutex::new(Hub {
                lost: false,
                down: BTreeSet::new(),
                told: VolumeState::Connected,
                listener: None,
                open: BTreeMap::new(),
                // Who stands by has seen the export, and holds no place at the server.
                spare: Some(link).filter(|_| !stands_by),
                wakers: BTreeMap::new(),
                resolved: Instant::now(),
            }),
        });
        Ok(Self { shared })
    }
}

enum Attempt {
    Final(OpenError),
    /// May be better the next time.
    Again(OpenError),
}

fn attempt(uri: &NbdUri, options: &OpenOptions, until: Instant) -> Result<(Link, Export), Attempt> {
    let endpoint = match &uri.server {
        NbdServer::Tcp(server) => Endpoint::resolve(server, USER_TIMEOUT_MS).map_err(|source| {
            Attempt::Again(OpenError::Resolve { host: server.host.clone(), source })
        })?,
        NbdServer::Unix(path) => Endpoint::Unix(path.clone()),
    };
    let server = endpoint.to_string();
    let now = Instant::now();
    let tls = uri.tls.as_ref().map(|tls| {
        let host = match &uri.server {
            NbdServer::Tcp(server) => Some(server.host.as_str()),
            NbdServer::Unix(_) => None,
        };
        Arc::new(TlsSettings::new(tls, host))
    });
    let wishes = Wishes { export: &uri.export, map: options.map, tls: tls.is_some() };
    let session = Session::new(wishes, options.timing, random_nonzero(), now);
    let link = Link::new(session, Arc::new(endpoint), true);
    let link = link.map_err(|error| Attempt::Final(OpenError::System(error)))?;
    let mut link = link.with(tls);
    loop {
        link.poll(&mut Vec::new());
        while let Some(notice) = link.session().pop_notice() {
            match notice {
                Notice::Ready(export) => return Ok((link, export)),
                Notice::Dropped(reason) => return Err(failed(server, uri, reason)),
                Notice::Lost(_) => {}
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let after_ms = options.connect_timeout.as_millis();
            return Err(Attempt::Again(OpenError::NbdTimeout { server, after_ms }));
        }
        // One more millisecond, so that a wait rounded down does not spin.
        let left = PollTimeout::try_from(left + Duration::from_millis(1));
        let mut fds = [PollFd::new(link.wake_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, left.unwrap_or(PollTimeout::MAX));
    }
}

fn failed(server: String, uri: &NbdUri, reason: DropReason) -> Attempt {
    let export = uri.export.clone();
    match reason {
        DropReason::Connect(source) => Attempt::Again(OpenError::NbdUnreachable { server, source }),
        DropReason::Refused(Refusal::ShuttingDown) => {
            Attempt::Again(OpenError::NoAnswer { server, source: Box::new(reason) })
        }
        DropReason::Refused(refusal) => Attempt::Final(match refusal {
            Refusal::NotNbd => OpenError::NotNbd { server },
            Refusal::OldStyle => OpenError::NbdOldStyle { server },
            Refusal::TlsRequired => OpenError::NbdTlsRequired { server },
            Refusal::NoTls(_) => OpenError::NbdNoTls { server },
            Refusal::NoExport(_) => OpenError::NbdNoExport { server, export },
            refusal => OpenError::NbdRefused { server, export, source: Box::new(refusal) },
        }),
        DropReason::Tls(source) => {
            Attempt::Final(OpenError::NbdTls { server, reason: source.to_string() })
        }
        reason => Attempt::Again(OpenError::NoAnswer { server, source: Box::new(reason) }),
    }
}

impl Volume for NbdVolume {
    fn geometry(&self) -> Geometry {
        let size_bytes = self.shared.size_bytes.load(Ordering::Acquire);
        Geometry { size_bytes, ..self.shared.geometry }
    }

    fn state(&self) -> VolumeState {
        self.shared.hub().state()
    }

    fn queues_max(&self) -> u16 {
        if self.shared.multi_conn { u16::MAX } else { 1 }
    }

    fn open_queue(&self, index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        let shared = &self.shared;
        let refuse =
            |why| Err(QueueError::System(io::Error::new(io::ErrorKind::InvalidInput, why)));
        let mut hub = shared.hub();
        if hub.open.contains_key(&index) {
            return refuse("this queue is open already");
        }
        if !shared.multi_conn && !hub.open.is_empty() {
            return refuse("the server takes one connection, and it is another queue's");
        }
        let size_bytes = shared.size_bytes.load(Ordering::Acquire);
        let spare = hub.spare.take().filter(|link| link.has_size(size_bytes));
        let mut link = match spare {
            Some(link) => link,
            None => {
                let geometry = shared.geometry;
                let wishes = Wishes {
                    export: &shared.uri.export,
                    map: shared.map,
                    tls: shared.tls.is_some(),
                };
                let now = Instant::now();
                let mut session = Session::new(wishes, shared.timing, random_nonzero(), now);
                session.set_opened(Opened {
                    size_bytes,
                    block_bytes: geometry.block_bytes,
                    read_only: geometry.read_only,
                });
                Link::new(session, Arc::clone(&shared.endpoint), true)?.with(shared.tls.clone())
            }
        };
        link.session().set_depth(depth);
        hub.open.insert(index, size_bytes);
        hub.wakers.insert(index, Arc::clone(link.wake()));
        drop(hub);
        let shared = Arc::clone(shared);
        let mut queue = NbdQueue { index, link: Some(link), shared, lost_at: None };
        queue.poll(&mut Vec::new());
        Ok(Box::new(queue))
    }

    fn set_listener(&self, listener: EventListener) {
        self.shared.hub().listener = Some(listener);
    }

    fn gate(&self) -> Option<&dyn Gate> {
        Some(&*self.shared)
    }

    /// Nobody owns an export: there is nothing to give back.
    fn close(&self, _give_back: bool) {
        let spare = self.shared.hub().spare.take();
        drop(spare);
    }
}

impl Gate for Shared {
    fn open(&self) {
        if self.shut.swap(false, Ordering::AcqRel) {
            self.wake();
        }
    }

    fn shut(&self) {
        if !self.shut.swap(true, Ordering::AcqRel) {
            let spare = self.hub().spare.take();
            drop(spare);
            self.wake();
        }
    }

    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }
}

/// One queue of an [`NbdVolume`].
#[derive(Debug)]
struct NbdQueue {
    index: u16,
    /// `None` only while it is dropped.
    link: Option<Link>,
    shared: Arc<Shared>,
    lost_at: Option<Instant>,
}

impl NbdQueue {
    fn link(&mut self) -> &mut Link {
        self.link.as_mut().expect("taken by drop only")
    }

    /// Nothing is sent, and nothing is answered.
    fn is_shut(&mut self) -> bool {
        let shut = self.shared.is_shut();
        if shut {
            self.link().disconnect();
        }
        shut
    }

    /// Logs what happened, and tells the volume. One line when the connection is
    /// lost and one when it is back.
    fn tell(&mut self) {
        while let Some(notice) = self.link().session().pop_notice() {
            let requests = self.link().in_flight();
            let (queue, volume) = (self.index, self.shared.uri.to_string());
            match notice {
                Notice::Ready(export) => {
                    if let Some(lost_at) = self.lost_at.take() {
                        tracing::info!(
                            volume,
                            queue,
                            requests,
                            after_ms = lost_at.elapsed().as_millis(),
                            "connected again; unanswered requests are sent again"
                        );
                    }
                    let block = u64::from(self.shared.geometry.block_bytes);
                    self.shared.sized(queue, export.size_bytes / block * block);
                    self.shared.change(|hub| {
                        hub.down.remove(&queue);
                    });
                }
                Notice::Dropped(reason) => {
                    if self.lost_at.is_none() {
                        self.lost_at = Some(Instant::now());
                        tracing::warn!(
                            volume, queue, requests, %reason,
                            "no connection to the NBD server; requests wait until it is back"
                        );
                    } else {
                        tracing::debug!(volume, queue, %reason, "still no connection");
                    }
                    self.shared.resolve();
                    self.shared.change(|hub| {
                        hub.down.insert(queue);
                    });
                }
                Notice::Lost(reason) => {
                    tracing::error!(
                        volume, queue, %reason,
                        "the export is no longer the one that was opened; its I/O waits for ever, and a person must look"
                    );
                    self.shared.change(|hub| hub.lost = true);
                }
            }
        }
    }
}

impl VolumeQueue for NbdQueue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        self.link().session().submit(tag, op, data);
    }

    unsafe fn submit_map(&mut self, tag: Tag, offset: u64, len: u64, into: &mut [Extent]) -> bool {
        self.link().session().submit_map(tag, offset, len, into)
    }

    fn send(&mut self, completions: &mut Vec<Completion>) {
        if !self.is_shut() {
            self.link().send(completions);
            self.tell();
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        // The gate may have been shut or opened.
        self.link().wake().take();
        if !self.is_shut() {
            self.link().poll(completions);
            self.tell();
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.link.as_ref().expect("taken by drop only").wake_fd()
    }

    fn watch_in(&mut self, epoll: &Epoll, data: u64) -> io::Result<()> {
        self.link().watch_in(epoll, data)
    }

    fn in_flight(&self) -> usize {
        self.link.as_ref().map_or(0, Link::in_flight)
    }
}

impl Drop for NbdQueue {
    fn drop(&mut self) {
        let index = self.index;
        let spare = self.link.take().filter(|link| link.is_at_rest());
        // Whose events woke the queue's thread must not wake it any more.
        let spare = spare.and_then(|mut link| link.watch_alone().is_ok().then_some(link));
        let shared = Arc::clone(&self.shared);
        self.shared.change(|hub| {
            hub.down.remove(&index);
            hub.open.remove(&index);
            hub.wakers.remove(&index);
            // Asked under the lock: whoever shuts the gate takes the spare behind it.
            if hub.spare.is_none() && !shared.is_shut() {
                hub.spare = spare;
            }
        });
    }
}
