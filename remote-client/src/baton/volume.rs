//! A Baton volume: what its control connection and its queues share.
//!
//! The control connection claims the volume, keeps watch over it and gives it
//! back. It carries no I/O; queues connect themselves, with the epoch that the
//! control connection was granted, and the loss of one connection does not disturb
//! the others.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_protocol::{AccessMode, QueueId, Seq};

use super::claim::{Claimed, Servers, claim};
use super::control::{self, RELEASE_WAIT};
use super::handover::{Errands, Handover};
use super::ledger::Ledger;
use super::link::Link;
use super::queue::{BatonQueue, Halt};
use super::session::{Grant, Identity, Session, Timing};
use crate::handoff::HandoffPort;
use crate::open::{OpenError, OpenOptions, random_nonzero};
use crate::socket::{Endpoint, Wake};
use crate::volume::{
    EventListener, Geometry, QueueError, Volume, VolumeEvent, VolumeQueue, VolumeState,
};

/// What the links of one volume share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) who: Identity,
    timing: Timing,
    pub(super) endpoint: Arc<Endpoint>,
    grant: Grant,
    geometry: Geometry,
    size_bytes: AtomicU64,
    /// From HELLO to WELCOME of the control connection, µs.
    pub(super) welcomed_after_us: AtomicU64,
    ledger: Arc<Ledger>,
    control: Arc<Wake>,
    /// `None` once the control thread is done.
    line: Mutex<Option<Line>>,
    hub: Mutex<Hub>,
    /// Signalled when the control thread is done.
    done: Condvar,
}

/// The control connection. Served by the control thread; whoever has something to ask
/// sends it at once when the thread is asleep, without waking it. Locked before
/// the hub, and by no one who calls a listener.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) link: Link,
    pub(super) errands: Errands,
}

pub(super) struct Hub {
    pub(super) halt: Option<Halt>,
    /// Queues, and the control connection, that lost their connection.
    down: BTreeSet<u16>,
    told: VolumeState,
    listener: Option<EventListener>,
    /// Every queue that was ever opened.
    queues: BTreeMap<u16, QueueRecord>,
    pub(super) closing: Option<GiveBack>,
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
pub(super) enum GiveBack {
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

    /// Wakes the queues that have no connection.
    pub(super) fn wake_down(&self) {
        for record in self.down.iter().filter_map(|index| self.queues.get(index)) {
            if let Some(wake) = &record.open {
                wake.notify();
            }
        }
    }
}

/// Wakes each queue that is open, without the lock: it is the first thing that a woken queue takes.
pub(super) fn wake_queues(hub: MutexGuard<'_, Hub>) {
    let wakes: Vec<_> = hub.queues.values().filter_map(|record| record.open.clone()).collect();
    drop(hub);
    for wake in wakes {
        wake.notify();
    }
}

impl Shared {
    pub(super) fn hub(&self) -> MutexGuard<'_, Hub> {
        // Nothing in a critical section can leave the hub half changed.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn line(&self) -> MutexGuard<'_, Option<Line>> {
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
        wake_queues(hub);
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

    /// The control connection is over, and nobody attends to it any more.
    pub(super) fn left(&self) {
        *self.line() = None;
        self.hub().control_done = true;
        self.done.notify_all();
    }

    /// Tells the listener what it was not told yet. Control thread only.
    pub(super) fn tell(&self, grown: Option<u64>) {
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
    pub(super) fn grow(&self, size_bytes: u64) -> Option<u64> {
        let before = self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
        (size_bytes > before).then_some(size_bytes)
    }
}

/// An open volume on a storage server.
#[derive(Debug)]
pub(crate) struct BatonVolume {
    shared: Arc<Shared>,
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
        let claimed = claim(servers, &who, options)?;
        Self::start(claimed, options.timing).map_err(OpenError::System)
    }

    fn start(claimed: Claimed, timing: Timing) -> io::Result<Self> {
        let Claimed { mut link, welcome, view } = claimed;
        // A claim during a handoff has become a standby.
        let who = link.session().who().clone();
        let mut id = [0; 20];
        id[..16].copy_from_slice(welcome.volume.to_string().as_bytes());
        let grant = link.session().grant().ok_or_else(|| io::Error::other("no grant"))?;
        let handover = Handover::new(who.mode, grant.epoch, view);
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
        control::attend(Arc::clone(&shared), wake)?;
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

pub(super) fn micros(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| time.as_micros().try_into().unwrap_or(u64::MAX))
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
        if control::is_here() {
            // A listener has the last hold on the volume: its thread attends to it next.
            return;
        }
        // A little longer than the thread itself waits.
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
