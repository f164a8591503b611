//! A Baton volume: claims it, keeps watch over it on the control connection,
//! and gives it back.
//!
//! The control connection has a thread of its own, which sleeps until there is
//! news: an idle volume wakes nobody. It carries no I/O; queues connect
//! themselves, with the epoch that the control connection was granted, and the
//! loss of one connection does not disturb the others.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use baton_protocol::message::{EventKind, Welcome};
use baton_protocol::{AccessMode, QueueId, Seq, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::handover::{Errands, Handover};
use super::ledger::Ledger;
use super::link::Link;
use super::queue::{BatonQueue, Halt, Reporter};
use super::session::{DropReason, Grant, Identity, LostReason, Notice, Session, Timing};
use crate::handoff::HandoffPort;
use crate::open::{OpenError, OpenOptions, random_nonzero};
use crate::socket::{Endpoint, Wake};
use crate::uri::HostPort;
use crate::volume::{
    EventListener, Geometry, QueueError, Volume, VolumeEvent, VolumeQueue, VolumeState,
};

/// How long `close` waits for the server to take the volume back.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// Pause between rounds of attempts while a volume is opened.
const OPEN_PAUSE: Duration = Duration::from_millis(50);
/// Sent data that nobody acknowledges for this long ends the connection.
const USER_TIMEOUT_MS: u32 = 15_000;
/// Names are resolved again at most this often while the server is away.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);

/// What the links of one volume share.
#[derive(Debug)]
pub(crate) struct Shared {
    who: Identity,
    timing: Timing,
    endpoint: Arc<Endpoint>,
    grant: Grant,
    geometry: Geometry,
    size_bytes: AtomicU64,
    /// From HELLO to WELCOME of the control connection, µs.
    welcomed_after_us: AtomicU64,
    ledger: Arc<Ledger>,
    control: Arc<Wake>,
    /// `None` once the control thread is done.
    line: Mutex<Option<Line>>,
    hub: Mutex<Hub>,
    /// Signalled when the control thread is done.
    done: Condvar,
}

/// The control connection. Served by its thread; whoever has something to ask
/// sends it at once when the thread is asleep, without waking it. Locked before
/// the hub, and by no one who calls a listener.
#[derive(Debug)]
struct Line {
    link: Link,
    errands: Errands,
}

pub(super) struct Hub {
    halt: Option<Halt>,
    /// Queues, and the control connection, that lost their connection.
    down: BTreeSet<u16>,
    told: VolumeState,
    listener: Option<EventListener>,
    /// Every queue that was ever opened.
    queues: BTreeMap<u16, QueueRecord>,
    closing: Option<GiveBack>,
    control_done: bool,
    pub(super) handover: Handover,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("halt", &self.halt)
            .field("down", &self.down)
            .field("closing", &self.closing)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GiveBack {
    Yes,
    No,
}

struct QueueRecord {
    /// The server remembers which numbers of a queue it has seen, so a queue
    /// that is opened again goes on where it stopped.
    next: Seq,
    open: Option<Arc<Wake>>,
}

impl Hub {
    fn state(&self) -> VolumeState {
        match self.halt {
            Some(Halt::Fenced) => VolumeState::Fenced,
            Some(Halt::Lost) => VolumeState::Lost,
            None if self.down.is_empty() => VolumeState::Connected,
            None => VolumeState::Reconnecting,
        }
    }

    pub(super) fn open_queues(&self) -> Vec<u16> {
        let open = self.queues.iter().filter(|(_, record)| record.open.is_some());
        open.map(|(index, _)| *index).collect()
    }

    pub(super) fn wake_queues(&self) {
        for wake in self.queues.values().filter_map(|record| record.open.as_ref()) {
            wake.notify();
        }
    }

    /// Wakes the queues that have no connection.
    pub(super) fn wake_down(&self) {
        for record in self.down.iter().filter_map(|index| self.queues.get(index)) {
            if let Some(wake) = &record.open {
                wake.notify();
            }
        }
    }
}

impl Shared {
    pub(super) fn hub(&self) -> MutexGuard<'_, Hub> {
        // Nothing in a critical section can leave the hub half changed.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self) -> MutexGuard<'_, Option<Line>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What the first WELCOME said.
    pub(super) fn grant(&self) -> Grant {
        self.grant
    }

    /// As what the volume was opened.
    pub(super) fn mode(&self) -> AccessMode {
        self.who.mode
    }

    pub(super) fn welcomed_after(&self) -> Duration {
        Duration::from_micros(self.welcomed_after_us.load(Ordering::Relaxed))
    }

    pub(super) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    pub(super) fn wake_control(&self) {
        self.control.notify();
    }

    /// Has the control connection do what it was sent for: here if it is free, else
    /// by its thread, which hears of anything there is to be told.
    pub(super) fn run_errands(&self) {
        let Ok(mut line) = self.line.try_lock() else { return self.wake_control() };
        let done = line.as_mut().is_none_or(|line| line.hurry(self));
        drop(line);
        if !done {
            self.wake_control();
        }
    }

    pub(crate) fn halted(&self) -> Option<Halt> {
        self.hub().halt
    }

    /// Ends the volume's service for good; false when it had ended before.
    pub(crate) fn halt(&self, halt: Halt) -> bool {
        let mut hub = self.hub();
        if hub.halt.is_some() {
            return false;
        }
        hub.halt = Some(halt);
        hub.wake_queues();
        self.control.notify();
        true
    }

    pub(crate) fn set_down(&self, queue: QueueId, down: bool) {
        let mut hub = self.hub();
        let changed = if down { hub.down.insert(queue.0) } else { hub.down.remove(&queue.0) };
        if changed && hub.state() != hub.told {
            self.control.notify();
        }
    }

    pub(crate) fn queue_closed(&self, index: u16, next: Seq) {
        let mut hub = self.hub();
        hub.down.remove(&index);
        hub.queues.insert(index, QueueRecord { next, open: None });
        // A SEAL may have waited for this one only.
        if hub.state() != hub.told || hub.handover.course().held {
            self.control.notify();
        }
    }

    /// Tells the listener what it was not told yet. Control thread only.
    fn tell(&self, grown: Option<u64>) {
        let (state, listener) = {
            let mut hub = self.hub();
            let state = hub.state();
            let changed = hub.told != state;
            hub.told = state;
            (changed.then_some(state), hub.listener.clone())
        };
        let Some(listener) = listener else {
            return;
        };
        if let Some(size) = grown {
            listener(VolumeEvent::Resized(size));
        }
        if let Some(state) = state {
            listener(VolumeEvent::State(state));
        }
    }

    /// Records a size; returns it when the volume grew.
    fn grow(&self, size_bytes: u64) -> Option<u64> {
        let before = self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
        (size_bytes > before).then_some(size_bytes)
    }
}

/// An open volume on a storage server.
#[derive(Debug)]
pub(crate) struct BatonVolume {
    shared: Arc<Shared>,
}

/// Where to look for a volume.
pub(crate) enum Servers {
    Tcp(Vec<HostPort>),
    Unix(std::path::PathBuf),
}

impl BatonVolume {
    /// Claims the volume at the first server that answers.
    pub(crate) fn open(
        servers: &Servers,
        volume: &str,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let who = Identity {
            owner: options.owner.clone(),
            session: options.session,
            queue: QueueId::CONTROL,
            mode: match (options.read_only, options.standby) {
                (true, _) => AccessMode::ReadOnly,
                (_, true) => AccessMode::Standby,
                _ => AccessMode::Owner,
            },
            volume: volume.to_owned(),
            watch: true,
            handoff: options.handoff && !options.read_only,
        };
        let (link, welcome) = claim(servers, &who, options)?;
        Self::start(link, &welcome, options.timing).map_err(OpenError::System)
    }

    fn start(mut link: Link, welcome: &Welcome, timing: Timing) -> io::Result<Self> {
        // A claim during a handoff has become a standby.
        let who = link.session().who().clone();
        let mut id = [0; 20];
        id[..16].copy_from_slice(welcome.volume.to_string().as_bytes());
        let grant = link.session().grant().ok_or_else(|| io::Error::other("no grant"))?;
        let handover = Handover::new(who.mode, grant.epoch);
        let shared = Arc::new(Shared {
            geometry: Geometry {
                id,
                size_bytes: welcome.size_bytes,
                block_bytes: welcome.block_bytes,
                discard_bytes: welcome.discard_bytes,
                // Whoever stands by writes as soon as it is granted the volume.
                read_only: match who.mode {
                    AccessMode::Standby => !grant.handoff,
                    AccessMode::ReadOnly => true,
                    AccessMode::Owner => welcome.read_only,
                },
            },
            who,
            timing,
            endpoint: Arc::clone(link.endpoint()),
            grant,
            size_bytes: AtomicU64::new(welcome.size_bytes),
            welcomed_after_us: AtomicU64::new(micros(link.session().welcomed_after())),
            control: Arc::clone(link.wake()),
            line: Mutex::new(None),
            ledger: Arc::clone(link.session().ledger()),
            hub: Mutex::new(Hub {
                halt: None,
                down: BTreeSet::new(),
                told: VolumeState::Connected,
                listener: None,
                queues: BTreeMap::new(),
                closing: None,
                control_done: false,
                handover,
            }),
            done: Condvar::new(),
        });
        // Of the same epoll instance.
        let wake = link.wake_fd().try_clone_to_owned()?;
        *shared.line() = Some(Line { link, errands: Errands::default() });
        let watch = Arc::clone(&shared);
        thread::Builder::new().name("baton-control".to_owned()).spawn(move || {
            // Also when the thread panics: `close` must not wait in vain.
            let _done = SignalDone(&watch);
            control(&watch, wake.as_fd());
        })?;
        Ok(Self { shared })
    }
}

impl Line {
    /// Sends what is to be asked; false if the rest is the control thread's.
    fn hurry(&mut self, shared: &Shared) -> bool {
        if !self.link.session().is_ready() {
            return false;
        }
        self.errands.run(self.link.session(), shared);
        self.link.send(&mut Vec::new());
        !self.link.session().has_notices() && !shared.hub().handover.has_news()
    }
}

struct SignalDone<'a>(&'a Shared);

impl Drop for SignalDone<'_> {
    fn drop(&mut self) {
        *self.0.line() = None;
        self.0.hub().control_done = true;
        self.0.done.notify_all();
    }
}

/// Tries server after server until one answers or the time is over.
fn claim(
    servers: &Servers,
    who: &Identity,
    options: &OpenOptions,
) -> Result<(Link, Welcome), OpenError> {
    let deadline = Instant::now() + options.connect_timeout;
    loop {
        let count = match servers {
            Servers::Tcp(list) => list.len(),
            Servers::Unix(_) => 1,
        };
        let mut last = None;
        for index in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            // Later servers get their share when an earlier one is silent.
            let share = left / u32::try_from(count - index).unwrap_or(1);
            match attempt(servers, index, who, options, Instant::now() + share)? {
                Attempt::Welcomed(link, welcome) => return Ok((*link, welcome)),
                Attempt::Failed(error) => last = Some(error),
            }
        }
        if Instant::now() + OPEN_PAUSE >= deadline {
            return Err(last.unwrap_or(OpenError::NoServer));
        }
        thread::sleep(OPEN_PAUSE);
    }
}

enum Attempt {
    Welcomed(Box<Link>, Welcome),
    /// May be better the next time.
    Failed(OpenError),
}

/// One connection to one server. An error is final: trying again cannot help.
fn attempt(
    servers: &Servers,
    index: usize,
    who: &Identity,
    options: &OpenOptions,
    until: Instant,
) -> Result<Attempt, OpenError> {
    let endpoint = match servers {
        Servers::Tcp(list) => match Endpoint::resolve(&list[index], USER_TIMEOUT_MS) {
            Ok(endpoint) => endpoint,
            Err(source) => {
                let host = list[index].host.clone();
                return Ok(Attempt::Failed(OpenError::Resolve { host, source }));
            }
        },
        Servers::Unix(path) => Endpoint::Unix(path.clone()),
    };
    let server = endpoint.to_string();
    let now = Instant::now();
    let mut session =
        Session::new(who.clone(), options.timing, None, 0, Seq(1), random_nonzero(), now);
    session.start(now);
    let mut link = Link::new(session, Arc::new(endpoint), false).map_err(OpenError::System)?;
    loop {
        link.poll(&mut Vec::new());
        while let Some(notice) = link.session().pop_notice() {
            match notice {
                Notice::Welcomed(welcome) => return Ok(Attempt::Welcomed(Box::new(link), welcome)),
                Notice::Dropped(reason) => return failed(server, reason).map(Attempt::Failed),
                Notice::Lost(LostReason::Refused { status, text }) => {
                    return Err(refused(server, who, status, text));
                }
                Notice::Lost(_)
                | Notice::Fenced
                | Notice::Event(_)
                | Notice::Released
                | Notice::WritesLost(_)
                | Notice::StandsBy
                | Notice::View { .. }
                | Notice::Answered { .. }
                | Notice::Opened(_)
                | Notice::Stuck
                | Notice::FirstAnswer => {}
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let after_ms = options.connect_timeout.as_millis();
            return Ok(Attempt::Failed(OpenError::Timeout { server, after_ms }));
        }
        wait(link.wake_fd(), Some(left));
    }
}

fn failed(server: String, reason: DropReason) -> Result<OpenError, OpenError> {
    match reason {
        DropReason::Connect(source) => Ok(OpenError::Unreachable { server, source }),
        DropReason::Violation(violation) => {
            Err(OpenError::NotBaton { server, source: Box::new(violation) })
        }
        reason => Ok(OpenError::NoAnswer { server, source: Box::new(reason) }),
    }
}

fn refused(server: String, who: &Identity, status: Status, text: String) -> OpenError {
    let volume = who.volume.clone();
    match status {
        Status::NoSuchVolume => OpenError::NoSuchVolume { server, volume },
        Status::NotOwner => OpenError::NotOwner { server, volume, text },
        Status::Version => OpenError::Version { server, text },
        _ => OpenError::Refused { server, volume, status, text },
    }
}

/// Waits until the descriptor is readable, at most `limit`.
fn wait(fd: BorrowedFd<'_>, limit: Option<Duration>) {
    // One more millisecond, so that a wait rounded down does not spin.
    let timeout = limit.map_or(PollTimeout::NONE, |limit| {
        PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    });
    // An interrupted wait is a short one; the caller looks again anyway.
    let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout);
}

/// The control thread; `wake` tells of anything at the control connection.
fn control(shared: &Shared, wake: BorrowedFd<'_>) {
    let mut reporter = Reporter::default();
    let mut resolved = Instant::now();
    let mut release_until = None;
    loop {
        let Some(news) = attend(shared, &mut reporter, &mut release_until) else { return };
        shared.tell(news.grown);
        // What happens to a volume that is being given back is not news: this process asked for it.
        if release_until.is_none() {
            shared.tell_of_handoff(news.of_handoff);
        }
        if news.unreachable && resolved.elapsed() >= RESOLVE_PAUSE {
            shared.endpoint.refresh();
            resolved = Instant::now();
        }
        let limit = release_until.map(|until| until.saturating_duration_since(Instant::now()));
        if limit.is_some_and(|limit| limit.is_zero()) {
            tracing::warn!(
                volume = shared.who.volume,
                "the storage server did not take the volume back in time; it stays with this owner"
            );
            return;
        }
        wait(wake, limit);
    }
}

fn micros(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| time.as_micros().try_into().unwrap_or(u64::MAX))
}

/// What a look at the control connection brought.
#[derive(Default)]
struct News {
    grown: Option<u64>,
    of_handoff: Vec<Notice>,
    unreachable: bool,
}

/// Does what is due at the control connection. `None`: it is over.
fn attend(
    shared: &Shared,
    reporter: &mut Reporter,
    release_until: &mut Option<Instant>,
) -> Option<News> {
    let mut line = shared.line();
    let Line { link, errands } = line.as_mut()?;
    link.wake().take();
    let (closing, halt) = {
        let hub = shared.hub();
        (hub.closing, hub.halt)
    };
    match halt {
        Some(Halt::Fenced) => link.session().fence(),
        Some(Halt::Lost) => link.session().lose(LostReason::Gone),
        None => {}
    }
    if closing.is_some() {
        let owner = link.session().who().mode == AccessMode::Owner
            && halt.is_none()
            && !shared.course().held;
        if closing != Some(GiveBack::Yes) || !owner {
            return None;
        }
        link.session().release();
        release_until.get_or_insert_with(|| Instant::now() + RELEASE_WAIT);
    }
    errands.run(link.session(), shared);
    link.poll(&mut Vec::new());
    let mut news = News::default();
    while let Some(notice) = link.session().pop_notice() {
        reporter.report(&notice, link.session(), shared);
        match notice {
            Notice::Welcomed(welcome) => {
                let after = micros(link.session().welcomed_after());
                shared.welcomed_after_us.store(after, Ordering::Relaxed);
                news.grown = shared.grow(welcome.size_bytes).or(news.grown);
            }
            Notice::Event(event) if event.kind == EventKind::Resized => {
                news.grown = shared.grow(event.value).or(news.grown);
            }
            Notice::Dropped(DropReason::Connect(_) | DropReason::ConnectTimeout(_)) => {
                news.unreachable = true;
            }
            Notice::Released => return None,
            notice => news.of_handoff.push(notice),
        }
    }
    Some(news)
}

impl Volume for BatonVolume {
    fn geometry(&self) -> Geometry {
        let size_bytes = self.shared.size_bytes.load(Ordering::Acquire);
        Geometry { size_bytes, ..self.shared.geometry }
    }

    fn state(&self) -> VolumeState {
        self.shared.hub().state()
    }

    fn open_queue(&self, index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        let shared = &self.shared;
        let refuse =
            |why| Err(QueueError::System(io::Error::new(io::ErrorKind::InvalidInput, why)));
        if shared.who.mode == AccessMode::Standby && !shared.grant.handoff {
            return refuse("a volume in standby has no queues");
        }
        if index == QueueId::CONTROL.0 {
            return refuse("this queue number is the control connection's");
        }
        let mut hub = shared.hub();
        let first = match hub.queues.get(&index) {
            Some(QueueRecord { open: Some(_), .. }) => return refuse("this queue is open already"),
            Some(record) => record.next,
            None => Seq(1),
        };
        let course = hub.handover.course();
        let mode = match shared.who.mode {
            AccessMode::Standby if course.owner => AccessMode::Owner,
            mode => mode,
        };
        let who = Identity { queue: QueueId(index), watch: false, mode, ..shared.who.clone() };
        let size_bytes = shared.size_bytes.load(Ordering::Acquire);
        let grant = Grant { size_bytes, epoch: course.epoch, ..shared.grant };
        let now = Instant::now();
        let session =
            Session::new(who, shared.timing, Some(grant), depth, first, random_nonzero(), now)
                .on_ledger(&shared.ledger);
        let link = Link::new(session, Arc::clone(&shared.endpoint), true)?;
        if hub.halt.is_some() {
            link.wake().notify();
        }
        let open = Some(Arc::clone(link.wake()));
        hub.queues.insert(index, QueueRecord { next: first, open });
        drop(hub);
        Ok(Box::new(BatonQueue::start(index, link, Arc::clone(shared), course)))
    }

    fn handoff(&self) -> Option<&dyn HandoffPort> {
        self.shared.grant.handoff.then_some(&*self.shared)
    }

    fn set_listener(&self, listener: EventListener) {
        self.shared.hub().listener = Some(listener);
    }

    fn close(&self, give_back: bool) {
        let mut hub = self.shared.hub();
        if hub.closing.is_none() {
            hub.closing = Some(if give_back { GiveBack::Yes } else { GiveBack::No });
        }
        self.shared.control.notify();
        // A little longer than the thread itself waits; it may also be asking
        // for a name, which can take long, and then it ends by itself later.
        let limit = RELEASE_WAIT + Duration::from_secs(1);
        let waited = self.shared.done.wait_timeout_while(hub, limit, |hub| !hub.control_done);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for BatonVolume {
    fn drop(&mut self) {
        self.close(false);
    }
}
