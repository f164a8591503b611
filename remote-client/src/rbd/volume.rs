//! An image as a volume: its state, its news, and its end.
//!
//! A thread of its own does what may have to wait for the cluster: it reads the
//! size when the image has changed, and closes the image. It sleeps until then.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::claim::CLAIM_NOTE;
use super::image::Image;
use super::inbox::{Budget, Inbox};
use super::opening::{self, Opened};
use super::queue::RbdQueue;
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
    hub: Mutex<Hub>,
    /// For the volume's thread.
    news: Condvar,
    /// For `close`.
    done: Condvar,
}

struct Hub {
    /// Until the volume is closed.
    image: Option<Arc<Image>>,
    queues: BTreeMap<u16, Weak<Inbox>>,
    /// Queues to which the cluster does not answer.
    down: BTreeSet<u16>,
    told: VolumeState,
    listener: Option<EventListener>,
    /// Asked for; true: with giving the image back.
    closing: Option<bool>,
    closed: bool,
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
    fn hub(&self) -> MutexGuard<'_, Hub> {
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
        }
        self.tell();
        self.wake_queues();
    }

    /// Has the volume's thread look. Not between its look and its sleep.
    fn tell(&self) {
        drop(self.hub());
        self.news.notify_all();
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
        let open: Vec<_> = self.hub().queues.values().filter_map(Weak::upgrade).collect();
        for inbox in open {
            inbox.notify();
        }
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
        if hub.down.remove(&index) {
            self.news.notify_all();
        }
    }

    fn state(&self, hub: &Hub) -> VolumeState {
        match self.over.load(Ordering::Acquire) {
            0 if hub.down.is_empty() => VolumeState::Connected,
            0 => VolumeState::Reconnecting,
            over if over == End::Fenced as u8 => VolumeState::Fenced,
            _ => VolumeState::Lost,
        }
    }

    /// The volume's thread: tells what there is to tell, until the volume is to
    /// be closed; then the image, and whether it is given back.
    fn watch(&self) -> (Option<Arc<Image>>, bool) {
        let mut hub = self.hub();
        loop {
            if let Some(give_back) = hub.closing {
                return (hub.image.take(), give_back);
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
                && let Some(image) = hub.image.clone()
            {
                drop(hub);
                self.look_at_size(&image, listener.as_deref());
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

    fn give_up(&self, image: &Image, give_back: bool) {
        if give_back && !self.read_only() && !self.is_over() {
            // Before the lock goes with the image.
            if let Err(error) = image.remove_note(CLAIM_NOTE) {
                tracing::warn!(
                    image = self.spec(), %error,
                    "the image stays claimed by this VM, which a later backend of it ends"
                );
            }
        }
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    const SECTOR_BYTES: u64 = baton_protocol::units::SECTOR_BYTES;
    bytes / SECTOR_BYTES * SECTOR_BYTES
}

/// Called by the library when the image may have changed. Only the volume's
/// thread may ask the cluster how.
unsafe extern "C" fn updated(shared: *mut c_void) {
    // SAFETY: kept until the watch has ended.
    let shared = unsafe { &*shared.cast::<Shared>() };
    shared.updated.store(true, Ordering::Release);
    shared.tell();
}

/// An open image.
#[derive(Debug)]
pub(crate) struct RbdVolume {
    shared: Arc<Shared>,
}

impl RbdVolume {
    /// Opens the image, and claims it unless it is only read.
    pub(crate) fn open(uri: &RbdUri, options: &OpenOptions) -> Result<Self, OpenError> {
        let opened = opening::open(uri, options)?;
        Self::start(uri, opened).map_err(OpenError::System)
    }

    fn start(uri: &RbdUri, opened: Opened) -> io::Result<Self> {
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(opened.id.bytes()) {
            *to = from;
        }
        let size_bytes = whole_sectors(opened.size_bytes);
        let image = Arc::new(opened.image);
        let shared = Arc::new(Shared {
            spec: uri.spec(),
            geometry: Geometry {
                id,
                size_bytes,
                block_bytes: 512,
                discard_bytes: DISCARD_BYTES,
                read_only: opened.read_only,
            },
            size_bytes: AtomicU64::new(size_bytes),
            over: AtomicU8::new(0),
            // It may have grown before the watch.
            updated: AtomicBool::new(true),
            budget: Budget::default(),
            hub: Mutex::new(Hub {
                image: Some(Arc::clone(&image)),
                queues: BTreeMap::new(),
                down: BTreeSet::new(),
                told: VolumeState::Connected,
                listener: None,
                closing: None,
                closed: false,
            }),
            news: Condvar::new(),
            done: Condvar::new(),
        });
        let watch = Watch::begin(&image, &shared)?;
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("rbd-control".to_owned()).spawn(move || {
            // Also when the thread panics: `close` must not wait in vain.
            let _closed = SayClosed(&watched);
            // Of the volume, which drops its own when it is closed.
            drop(image);
            let (image, give_back) = watched.watch();
            let Some(image) = image else { return };
            watched.give_up(&image, give_back);
            watch.end(&image);
            // Closes it, unless a queue is still there.
            drop(image);
        })?;
        Ok(Self { shared })
    }
}

/// The library's way to say that the image may have changed.
struct Watch {
    number: u64,
    /// One reference, the library's.
    shared: *const Shared,
}

// SAFETY: it is the address of a value that all threads may use.
unsafe impl Send for Watch {}

impl Watch {
    fn begin(image: &Image, shared: &Arc<Shared>) -> io::Result<Self> {
        let shared = Arc::into_raw(Arc::clone(shared));
        // SAFETY: the reference is given back only when no call can come any more.
        let begun = unsafe { image.watch(updated, shared.cast_mut().cast()) };
        match begun {
            Ok(number) => Ok(Self { number, shared }),
            Err(error) => {
                // SAFETY: as made above, and the library does not have it.
                drop(unsafe { Arc::from_raw(shared) });
                Err(error)
            }
        }
    }

    fn end(self, image: &Image) {
        // Else a call may still come, and the reference stays for it.
        if image.unwatch(self.number).is_ok() {
            // SAFETY: as made by `begin`, and the library has forgotten it.
            drop(unsafe { Arc::from_raw(self.shared) });
        }
    }
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
        let image = hub.image.clone().ok_or_else(|| refuse("the volume is closed"))?;
        if hub.queues.contains_key(&index) {
            return Err(refuse("this queue is open already"));
        }
        hub.queues.insert(index, Arc::downgrade(&inbox));
        drop(hub);
        let queue = RbdQueue::new(index, &self.shared, image, inbox);
        let queue = queue.inspect_err(|_| self.shared.queue_closed(index))?;
        Ok(Box::new(queue))
    }

    fn set_listener(&self, listener: EventListener) {
        self.shared.hub().listener = Some(listener);
    }

    /// Without `give_back` the lock goes all the same, with this client; the
    /// claim stays, so that only this VM's next backend gets the image.
    fn close(&self, give_back: bool) {
        let mut hub = self.shared.hub();
        if hub.closing.is_none() {
            hub.closing = Some(give_back);
        }
        self.shared.news.notify_all();
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
