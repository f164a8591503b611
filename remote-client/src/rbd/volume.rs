//! An image as a volume: its state, its news, and its end.
//!
//! A thread of its own does what may have to wait for the cluster: it reads the
//! size when the image has changed, and closes the image. It sleeps until then.
//! Where the volume takes part in handoffs, another one looks after its access
//! record ([`super::handover`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use baton_protocol::access::Input;
use baton_protocol::{Epoch, SessionId, VolumeId};

use super::handover::Handover;
use super::image::Image;
use super::inbox::{Budget, Inbox};
use super::objects::Objects;
use super::opening::{self, Opened};
use super::queue::RbdQueue;
use super::register::Register;
use super::watch::Watch;
use crate::handoff::HandoffPort;
use crate::open::{OpenError, OpenOptions};
use crate::uri::RbdUri;
use crate::volume::{
    EventListener, Geometry, QueueError, Volume, VolumeEvent, VolumeQueue, VolumeState,
};

/// How long `close` waits for the cluster to take the image back.
const CLOSE_WAIT: Duration = Duration::from_secs(3);
/// Discards of this size give space back whatever the OSDs' allocation unit,
/// bytes: the largest that was ever a default. Smaller ones are carried out as
/// well (`opening::SETTINGS`).
const DISCARD_BYTES: u32 = 64 << 10;

/// The end of a volume's service, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fenced = 1,
    Lost = 2,
    /// The other side of a handoff has won: as fenced, by ourselves.
    Parked = 3,
}

/// The volume's place in its VM's handoffs: what does not change.
#[derive(Debug)]
struct Part {
    owner: String,
    session: SessionId,
    volume: VolumeId,
    claimed: Option<Epoch>,
    opened_after: Duration,
}

/// What the queues, the library's threads and the volume's own thread share.
#[derive(Debug)]
pub(super) struct Shared {
    spec: String,
    geometry: Geometry,
    size_bytes: AtomicU64,
    /// An [`End`]; 0: it is served.
    over: AtomicU8,
    /// The image may have changed.
    updated: AtomicBool,
    budget: Budget,
    /// Pieces that are at the cluster, of queues that are closed, too.
    out: AtomicUsize,
    part: Part,
    /// Whether the queues are held, in the lowest bit; above it, a number that
    /// rises with every change.
    course: AtomicU64,
    hub: Mutex<Hub>,
    /// For the volume's thread.
    news: Condvar,
    /// For the access thread.
    pub(super) work: Condvar,
    /// For `close`.
    done: Condvar,
}

/// What queues send to.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) image: Arc<Image>,
    /// `None`: all goes through librbd.
    pub(super) objects: Option<Arc<Objects>>,
}

pub(super) struct Hub {
    /// Until the volume is closed.
    served: Option<Served>,
    pub(super) queues: BTreeMap<u16, Weak<Inbox>>,
    pub(super) handover: Handover,
    /// Queues to which the cluster does not answer.
    down: BTreeSet<u16>,
    told: VolumeState,
    listener: Option<EventListener>,
    /// Asked for; true: with giving the image back.
    closing: Option<bool>,
    closed: bool,
}

impl Hub {
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// Has every queue look.
    fn wake_queues(&self) {
        for inbox in self.queues.values().filter_map(Weak::upgrade) {
            inbox.notify();
        }
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("down", &self.down)
            .field("closing", &self.closing)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn hub(&self) -> MutexGuard<'_, Hub> {
        // Nothing in a critical section can leave the hub half changed.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn spec(&self) -> &str {
        &self.spec
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    pub(super) fn read_only(&self) -> bool {
        self.geometry.read_only
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Nothing is sent and nothing answered any more.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire) != 0
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.over.load(Ordering::Acquire) == End::Fenced as u8
    }

    pub(super) fn owner(&self) -> &str {
        &self.part.owner
    }

    pub(super) fn session(&self) -> SessionId {
        self.part.session
    }

    pub(super) fn volume_id(&self) -> VolumeId {
        self.part.volume
    }

    pub(super) fn claimed_epoch(&self) -> Option<Epoch> {
        self.part.claimed
    }

    pub(super) fn opened_after(&self) -> Duration {
        self.part.opened_after
    }

    /// A number that rises with every change, and whether the queues are held.
    pub(super) fn course(&self) -> (u64, bool) {
        let course = self.course.load(Ordering::Acquire);
        (course >> 1, course & 1 == 1)
    }

    pub(super) fn turn(&self, hub: &mut Hub, held: bool) {
        let (serial, _) = self.course();
        self.course.store((serial + 1) << 1 | u64::from(held), Ordering::Release);
        hub.wake_queues();
    }

    pub(super) fn sent(&self) {
        self.out.fetch_add(1, Ordering::SeqCst);
    }

    /// A piece is back. The last one may be what a seal waits for.
    pub(super) fn came_back(&self) {
        if self.out.fetch_sub(1, Ordering::SeqCst) == 1 && self.course().1 {
            drop(self.hub());
            self.work.notify_all();
        }
    }

    /// Nothing of this client's is at the cluster.
    pub(super) fn is_quiet(&self) -> bool {
        self.out.load(Ordering::SeqCst) == 0
    }

    pub(super) fn give_up_for_good(&self) {
        self.end(End::Parked);
    }

    fn end(&self, end: End) {
        let first =
            self.over.compare_exchange(0, end as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if !first {
            return;
        }
        let image = self.spec();
        match end {
            End::Fenced => tracing::error!(
                image,
                "fenced: the Ceph cluster refuses this client, or has given the image's lock to \
                 another; this client's I/O stops for good and its guest should be stopped"
            ),
            End::Lost => tracing::error!(
                image,
                "the image, its snapshot or its pool is gone; its I/O waits for ever, and a \
                 person must look"
            ),
            // Said by who decided it.
            End::Parked => {}
        }
        self.tell();
        self.wake_queues();
    }

    /// The image may have changed.
    pub(super) fn updated(&self) {
        self.updated.store(true, Ordering::Release);
        self.tell();
    }

    /// Has the volume's thread look. Not between its look and its sleep.
    fn tell(&self) {
        drop(self.hub());
        self.news.notify_all();
        self.work.notify_all();
    }

    /// The end of this client, if that is what an error of the cluster says
    /// that was not about a guest's request.
    pub(super) fn judge_client(&self, error: &io::Error) {
        if error.raw_os_error() == Some(libc::ESHUTDOWN) {
            self.end(End::Fenced);
        }
    }

    /// Looks at what the library answered for what says that this client's time is over.
    pub(super) fn judge(&self, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::ESHUTDOWN) => self.end(End::Fenced),
            // Who has claimed an image writes it, until another client has the lock.
            Some(libc::EROFS) if !self.geometry.read_only => self.end(End::Fenced),
            Some(libc::ENOENT) => self.end(End::Lost),
            _ => {}
        }
    }

    pub(super) fn wake_queues(&self) {
        self.hub().wake_queues();
    }

    pub(super) fn set_down(&self, index: u16, down: bool) {
        let mut hub = self.hub();
        let changed = if down { hub.down.insert(index) } else { hub.down.remove(&index) };
        if changed {
            self.news.notify_all();
        }
    }

    pub(super) fn queue_closed(&self, index: u16) {
        let mut hub = self.hub();
        hub.queues.remove(&index);
        hub.handover.closed(index);
        self.work.notify_all();
        if hub.down.remove(&index) {
            self.news.notify_all();
        }
    }

    fn state(&self, hub: &Hub) -> VolumeState {
        match self.over.load(Ordering::Acquire) {
            0 if hub.down.is_empty() => VolumeState::Connected,
            0 => VolumeState::Reconnecting,
            over if over == End::Lost as u8 => VolumeState::Lost,
            _ => VolumeState::Fenced,
        }
    }

    /// The volume's thread: tells what there is to tell, until the volume is to
    /// be closed; then the image, and whether it is given back.
    fn watch(&self) -> (Option<Served>, bool) {
        let mut hub = self.hub();
        loop {
            if let Some(give_back) = hub.closing {
                return (hub.served.take(), give_back);
            }
            let (state, listener) = (self.state(&hub), hub.listener.clone());
            if state != hub.told {
                hub.told = state;
                drop(hub);
                if let Some(listener) = listener {
                    listener(VolumeEvent::State(state));
                }
                hub = self.hub();
            } else if self.updated.swap(false, Ordering::AcqRel)
                && !self.is_over()
                && let Some(served) = hub.served.clone()
            {
                drop(hub);
                self.look_at_size(&served.image, listener.as_deref());
                if let Some(objects) = &served.objects {
                    objects.look();
                }
                hub = self.hub();
            } else {
                hub = self.news.wait(hub).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn look_at_size(&self, image: &Image, listener: Option<&(dyn Fn(VolumeEvent) + Send + Sync)>) {
        match image.size_bytes() {
            Ok(bytes) => {
                let bytes = whole_sectors(bytes);
                let before = self.size_bytes.fetch_max(bytes, Ordering::AcqRel);
                if let Some(listener) = listener.filter(|_| bytes > before) {
                    listener(VolumeEvent::Resized(bytes));
                }
            }
            Err(error) => {
                tracing::warn!(image = self.spec(), %error, "cannot read the image's size");
            }
        }
    }

    /// Before the lock goes with the image.
    fn give_back(&self, register: &Register) {
        let session = self.session();
        let released = register.change(|seat| {
            let owner = seat.record.owner.as_ref().map(|owner| owner.session);
            if owner != Some(session) {
                return Ok(seat.clone());
            }
            seat.step(Input::Release { session, epoch: seat.record.epoch }, None)
        });
        if let Err(error) = released {
            tracing::warn!(
                image = self.spec(),
                ?error,
                "the image stays this VM's, whose next backend gets it"
            );
        }
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    const SECTOR_BYTES: u64 = baton_protocol::units::SECTOR_BYTES;
    bytes / SECTOR_BYTES * SECTOR_BYTES
}

/// An open image.
#[derive(Debug)]
pub(crate) struct RbdVolume {
    shared: Arc<Shared>,
    hands_over: bool,
}

impl RbdVolume {
    /// Opens the image, and claims it unless it is only read or stands by.
    pub(crate) fn open(uri: &RbdUri, options: &OpenOptions) -> Result<Self, OpenError> {
        let opened = opening::open(uri, options)?;
        Self::start(uri, options, opened).map_err(OpenError::System)
    }

    fn start(uri: &RbdUri, options: &OpenOptions, opened: Opened) -> io::Result<Self> {
        let Opened { served, register, record, claimed, size_bytes, read_only, opened_after } =
            opened;
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(register.id().bytes()) {
            *to = from;
        }
        let size_bytes = whole_sectors(size_bytes);
        let held = claimed.is_none() && !read_only;
        let shared = Arc::new(Shared {
            spec: uri.spec(),
            geometry: Geometry {
                id,
                size_bytes,
                block_bytes: 512,
                discard_bytes: DISCARD_BYTES,
                read_only,
            },
            size_bytes: AtomicU64::new(size_bytes),
            over: AtomicU8::new(0),
            // It may have grown before the watch.
            updated: AtomicBool::new(true),
            budget: Budget::default(),
            out: AtomicUsize::new(0),
            part: Part {
                owner: options.owner.clone(),
                session: options.session,
                volume: register.volume(),
                claimed,
                opened_after,
            },
            course: AtomicU64::new(u64::from(held)),
            hub: Mutex::new(Hub {
                served: Some(served.clone()),
                queues: BTreeMap::new(),
                handover: Handover::new(record),
                down: BTreeSet::new(),
                told: VolumeState::Connected,
                listener: None,
                closing: None,
                closed: false,
            }),
            news: Condvar::new(),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let watch = Watch::begin(&served.image, &shared)?;
        drop(served);
        let hands_over = options.handoff && !read_only;
        let access = if hands_over {
            let observer = opening::observer(uri, options);
            Some(look_after_access(Arc::clone(&shared), register.clone(), observer)?)
        } else {
            None
        };
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("rbd-control".to_owned()).spawn(move || {
            // Also when the thread panics: `close` must not wait in vain.
            let _closed = SayClosed(&watched);
            let (served, give_back) = watched.watch();
            let Some(served) = served else { return };
            if let Some(access) = access {
                watched.work.notify_all();
                let _ = access.join();
            }
            if give_back && !watched.read_only() && !watched.is_over() {
                watched.give_back(&register);
            }
            watch.end(&served.image);
            // Closes it, unless a queue is still there.
            drop((register, served));
        })?;
        Ok(Self { shared, hands_over })
    }
}

fn look_after_access(
    shared: Arc<Shared>,
    register: Register,
    observer: impl Fn() -> Option<Register> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let name = "rbd-access".to_owned();
    thread::Builder::new().name(name).spawn(move || shared.attend(&register, observer))
}

struct SayClosed<'a>(&'a Shared);

impl Drop for SayClosed<'_> {
    fn drop(&mut self) {
        self.0.hub().closed = true;
        self.0.done.notify_all();
    }
}

impl Volume for RbdVolume {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.shared.size_bytes(), ..self.shared.geometry }
    }

    fn state(&self) -> VolumeState {
        self.shared.state(&self.shared.hub())
    }

    fn open_queue(&self, index: u16, _depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        let refuse = |why| QueueError::System(io::Error::new(io::ErrorKind::InvalidInput, why));
        let inbox = Arc::new(Inbox::new(&self.shared)?);
        let mut hub = self.shared.hub();
        let served = hub.served.clone().ok_or_else(|| refuse("the volume is closed"))?;
        if hub.queues.contains_key(&index) {
            return Err(refuse("this queue is open already"));
        }
        hub.queues.insert(index, Arc::downgrade(&inbox));
        drop(hub);
        let queue = RbdQueue::new(index, &self.shared, served, inbox);
        let queue = queue.inspect_err(|_| self.shared.queue_closed(index))?;
        Ok(Box::new(queue))
    }

    fn handoff(&self) -> Option<&dyn HandoffPort> {
        self.hands_over.then_some(&*self.shared as &dyn HandoffPort)
    }

    fn set_listener(&self, listener: EventListener) {
        self.shared.hub().listener = Some(listener);
    }

    /// Without `give_back` the lock goes all the same, with this client; the
    /// record stays as it is, so that only this VM's next backend gets the image.
    fn close(&self, give_back: bool) {
        let mut hub = self.shared.hub();
        if hub.closing.is_none() {
            hub.closing = Some(give_back);
        }
        self.shared.news.notify_all();
        self.shared.work.notify_all();
        // What the cluster does not take back now, ends with this process.
        let waited = self.shared.done.wait_timeout_while(hub, CLOSE_WAIT, |hub| !hub.closed);
        let (hub, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(hub);
        if waited.timed_out() {
            let image = self.shared.spec();
            tracing::warn!(image, "the Ceph cluster does not answer; the image is left as it is");
        }
    }
}

impl Drop for RbdVolume {
    fn drop(&mut self) {
        self.close(false);
    }
}
