//! The one thread that attends to the control connections of all volumes of this
//! process.
//!
//! ```text
//!   control connection of a volume --its epoll instance--> +-------+ --events--> listeners
//!   ...                                                     | desk  |
//!   control connection of a volume --its epoll instance--> +-------+ --names to look up--> a thread for that
//! ```
//!
//! One for all, because what happens to the volumes of a VM happens to all of them
//! at once: while it is at one of them, news of others arrives and is found without
//! another wake-up. It sleeps until there is something, so an idle volume wakes
//! nobody. Nothing here may block, since all other volumes would wait.
//!
//! Decides nothing: the sessions and the listeners do.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use baton_protocol::AccessMode;
use baton_protocol::message::EventKind;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::queue::{Halt, Reporter};
use super::session::{DropReason, LostReason, Notice};
use super::volume::{GiveBack, Line, Shared, micros};
use crate::socket::{Endpoint, Wake};

/// How long the server has to take a volume back.
pub(super) const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// Names are resolved again at most this often while the server is away.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);
/// Volumes that are looked at for one wait.
const EVENTS: usize = 64;
/// epoll data of the desk's own notification.
const NEWCOMERS: u64 = 0;

/// The thread's, while there are volumes.
static DESK: Mutex<Option<Arc<Desk>>> = Mutex::new(None);

thread_local! {
    static ATTENDS: Cell<bool> = const { Cell::new(false) };
}

/// Whether the caller is the thread that attends, and so must not wait for it.
pub(super) fn is_here() -> bool {
    ATTENDS.get()
}

/// Attends to a volume from now on; `wake` tells of anything at its control
/// connection. Starts the thread if there is none.
pub(super) fn attend(shared: Arc<Shared>, wake: OwnedFd) -> io::Result<()> {
    let mut place = lock(&DESK);
    let desk = match &*place {
        Some(desk) => Arc::clone(desk),
        None => {
            let desk = Arc::new(Desk::new()?);
            let run = Arc::clone(&desk);
            thread::Builder::new().name("baton-control".to_owned()).spawn(move || run.run())?;
            Arc::clone(place.insert(desk))
        }
    };
    desk.take_on(Charge::new(shared, wake))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the thread waits.
#[derive(Debug)]
struct Desk {
    epoll: Epoll,
    wake: Wake,
    newcomers: Mutex<Newcomers>,
}

#[derive(Debug)]
struct Newcomers {
    /// epoll data of the next volume.
    next: u64,
    waiting: Vec<(u64, Charge)>,
}

impl Desk {
    fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = Wake::new()?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, NEWCOMERS))?;
        let newcomers = Mutex::new(Newcomers { next: NEWCOMERS + 1, waiting: Vec::new() });
        Ok(Self { epoll, wake, newcomers })
    }

    fn take_on(&self, charge: Charge) -> io::Result<()> {
        let mut newcomers = lock(&self.newcomers);
        let key = newcomers.next;
        self.epoll.add(charge.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key))?;
        newcomers.next += 1;
        newcomers.waiting.push((key, charge));
        self.wake.notify();
        Ok(())
    }

    fn run(&self) {
        ATTENDS.set(true);
        let mut charges = BTreeMap::new();
        // Of those that are being given back, so that an event of one does not look at all.
        let mut late_at: BTreeMap<u64, Instant> = BTreeMap::new();
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let n = self.epoll.wait(&mut events, timeout(late_at.values())).unwrap_or(0);
            self.wake.take();
            // Volumes whose first event this may be; each is looked at once.
            let came = std::mem::take(&mut lock(&self.newcomers).waiting);
            let mut due: Vec<u64> = came.iter().map(|(key, _)| *key).collect();
            charges.extend(came);
            due.extend(events[..n].iter().map(EpollEvent::data).filter(|key| *key != NEWCOMERS));
            let now = Instant::now();
            due.extend(late_at.iter().filter(|(_, at)| **at <= now).map(|(key, _)| *key));
            // A server that is woken for the first of its volumes finds what is said to the others, too.
            due.sort_unstable_by_key(|key| (charges.get(key).map(|charge| charge.server), *key));
            due.dedup();
            for key in due {
                let Some(charge) = charges.get_mut(&key) else { continue };
                // A volume whose part panics is over; the others are not.
                let goes_on = catch_unwind(AssertUnwindSafe(|| charge.look())).unwrap_or(false);
                late_at.extend(charge.release_until.map(|at| (key, at)));
                if !goes_on && let Some(charge) = charges.remove(&key) {
                    late_at.remove(&key);
                    // Its descriptor may live on in the link for a moment.
                    let _ = self.epoll.delete(&charge.wake);
                }
            }
            if charges.is_empty() && self.is_left() {
                return;
            }
        }
    }

    /// Whether nobody has come; then nobody can any more.
    fn is_left(&self) -> bool {
        let mut place = lock(&DESK);
        let empty = lock(&self.newcomers).waiting.is_empty();
        if empty {
            *place = None;
        }
        empty
    }
}

/// Until the first volume that is being given back is late.
fn timeout<'a>(late_at: impl Iterator<Item = &'a Instant>) -> EpollTimeout {
    let Some(until) = late_at.min() else { return EpollTimeout::NONE };
    // One more millisecond, so that a wait rounded down does not spin.
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
}

/// One volume.
#[derive(Debug)]
struct Charge {
    shared: Arc<Shared>,
    /// The same number for the same server.
    server: u64,
    wake: OwnedFd,
    reporter: Reporter,
    resolver: Resolver,
    /// Its server is asked to take it back, and has this long.
    release_until: Option<Instant>,
}

impl Charge {
    fn new(shared: Arc<Shared>, wake: OwnedFd) -> Self {
        let (reporter, resolver) = Default::default();
        let mut server = DefaultHasher::new();
        shared.endpoint.to_string().hash(&mut server);
        let server = server.finish();
        Self { shared, server, wake, reporter, resolver, release_until: None }
    }

    fn is_late(&self, now: Instant) -> bool {
        self.release_until.is_some_and(|until| until <= now)
    }

    /// Does what is due at the control connection and tells what came of it; false:
    /// it is over.
    fn look(&mut self) -> bool {
        let Some(news) = self.attend() else { return false };
        self.shared.tell(news.grown);
        // What happens to a volume that is being given back is not news: this process asked for it.
        if self.release_until.is_none() {
            self.shared.tell_of_handoff(news.of_handoff);
        }
        if news.unreachable {
            self.resolver.resolve(&self.shared.endpoint);
        }
        let late = self.is_late(Instant::now());
        if late {
            tracing::warn!(
                volume = self.shared.who.volume,
                "the storage server did not take the volume back in time; it stays with this owner"
            );
        }
        !late
    }

    fn attend(&mut self) -> Option<News> {
        let shared = &self.shared;
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
            self.release_until.get_or_insert_with(|| Instant::now() + RELEASE_WAIT);
        }
        errands.run(link.session(), shared);
        link.poll(&mut Vec::new());
        let mut news = News::default();
        while let Some(notice) = link.session().pop_notice() {
            self.reporter.report(&notice, link.session(), shared);
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
}

impl Drop for Charge {
    fn drop(&mut self) {
        // Also when the thread panics: `close` must not wait in vain.
        self.shared.left();
    }
}

/// What a look at the control connection brought.
#[derive(Default)]
struct News {
    grown: Option<u64>,
    of_handoff: Vec<Notice>,
    unreachable: bool,
}

/// Asks for a server's name again, on a thread of its own: that may take long.
#[derive(Debug, Default)]
struct Resolver {
    last: Option<Instant>,
    asking: Arc<AtomicBool>,
}

impl Resolver {
    fn resolve(&mut self, endpoint: &Arc<Endpoint>) {
        let recent = self.last.is_some_and(|last| last.elapsed() < RESOLVE_PAUSE);
        if recent || !endpoint.has_name() || self.asking.swap(true, Ordering::AcqRel) {
            return;
        }
        self.last = Some(Instant::now());
        let (endpoint, asking) = (Arc::clone(endpoint), Arc::clone(&self.asking));
        let ask = move || {
            endpoint.refresh();
            asking.store(false, Ordering::Release);
        };
        if let Err(error) = thread::Builder::new().name("baton-resolve".to_owned()).spawn(ask) {
            tracing::warn!(%error, "no thread to look up the storage server's name; trying again");
            self.asking.store(false, Ordering::Release);
        }
    }
}
