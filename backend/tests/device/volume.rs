//! A volume in memory whose requests complete when the test says so, in the order it says.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_remote_client::{
    Completion, EventListener, Geometry, IoError, Op, QueueError, Tag, Volume, VolumeEvent,
    VolumeQueue, VolumeState,
};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Longer than anything a test waits for in vain.
const WAIT: Duration = Duration::from_secs(20);

/// When requests complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// At once.
    Immediate,
    /// When the test releases them.
    Hold,
    /// Soon, in an order of a seeded generator.
    Scramble,
}

/// A request the volume has.
struct Held {
    tag: Tag,
    op: Op,
    data: Vec<libc::iovec>,
}

// SAFETY: the submitter keeps the memory valid until completion, on whatever thread.
unsafe impl Send for Held {}

struct Lane {
    wake: Arc<EventFd>,
    held: Vec<Held>,
    released: Vec<Held>,
}

struct State {
    mode: Mode,
    bytes: Vec<u8>,
    lanes: BTreeMap<u16, Lane>,
    /// Everything submitted, oldest first.
    ops: Vec<(u16, Op)>,
    /// How many there were each time a queue came to rest.
    rests: Vec<usize>,
    size_bytes: u64,
    state: VolumeState,
    listener: Option<EventListener>,
    closed: Option<bool>,
    queues_fail: bool,
    random: fastrand::Rng,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that waited in vain panics with it; what cleans up after the test still needs it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct TestVolume {
    shared: Arc<Shared>,
}

impl fmt::Debug for TestVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestVolume")
    }
}

impl TestVolume {
    pub(crate) fn new(size_bytes: u64, mode: Mode) -> Arc<Self> {
        let state = State {
            mode,
            bytes: vec![0; usize::try_from(size_bytes).expect("small")],
            lanes: BTreeMap::new(),
            ops: Vec::new(),
            rests: Vec::new(),
            size_bytes,
            state: VolumeState::Connected,
            listener: None,
            closed: None,
            queues_fail: false,
            random: fastrand::Rng::with_seed(1),
        };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new() };
        Arc::new(Self { shared: Arc::new(shared) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    fn wait_until<T>(&self, what: &str, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.lock();
        loop {
            if let Some(value) = ready(&mut state) {
                return value;
            }
            let (next, timeout) =
                self.shared.changed.wait_timeout(state, WAIT).expect("not poisoned");
            assert!(!timeout.timed_out(), "waited in vain for {what}");
            state = next;
        }
    }

    /// Changes when requests complete; with [`Mode::Immediate`] those held complete now.
    pub(crate) fn set_mode(&self, mode: Mode) {
        self.lock().mode = mode;
        if mode == Mode::Immediate {
            let lanes: Vec<u16> = self.lock().lanes.keys().copied().collect();
            lanes.into_iter().for_each(|lane| self.release_all(lane));
        }
    }

    /// Waits until queue `lane` has exactly `count` requests held.
    pub(crate) fn wait_held(&self, lane: u16, count: usize) {
        self.wait_until(&format!("{count} requests of queue {lane}"), |state| {
            state.lanes.get(&lane).is_some_and(|l| l.held.len() == count).then_some(())
        });
    }

    /// Waits until the queue's thread has taken what was released.
    pub(crate) fn wait_taken(&self, lane: u16) {
        self.wait_until("the queue to take its completions", |state| {
            state.lanes.get(&lane).is_some_and(|l| l.released.is_empty()).then_some(())
        });
    }

    /// Waits until queue `lane` is closed.
    pub(crate) fn wait_closed_queue(&self, lane: u16) {
        self.wait_until("the queue to be closed", |state| {
            (!state.lanes.contains_key(&lane)).then_some(())
        });
    }

    /// Completes the held request at `position` (0 is the oldest).
    pub(crate) fn release(&self, lane: u16, position: usize) {
        let mut state = self.lock();
        let lane = state.lanes.get_mut(&lane).expect("an open queue");
        let one = lane.held.remove(position);
        lane.released.push(one);
        lane.wake.write(1).expect("wake");
    }

    /// Completes all held requests of a queue, newest first.
    pub(crate) fn release_all(&self, lane: u16) {
        let mut state = self.lock();
        let Some(lane) = state.lanes.get_mut(&lane) else { return };
        lane.held.reverse();
        let mut all = std::mem::take(&mut lane.held);
        lane.released.append(&mut all);
        lane.wake.write(1).expect("wake");
    }

    /// Everything submitted so far, oldest first, which is forgotten by this.
    pub(crate) fn take_ops(&self) -> Vec<Op> {
        std::mem::take(&mut self.lock().ops).into_iter().map(|(_, op)| op).collect()
    }

    /// How much had been submitted each time a queue came to rest.
    pub(crate) fn rests(&self) -> Vec<usize> {
        self.lock().rests.clone()
    }

    /// From now on no queue can be opened, or again.
    pub(crate) fn set_queues_fail(&self, fail: bool) {
        self.lock().queues_fail = fail;
    }

    pub(crate) fn grow(&self, size_bytes: u64) {
        let listener = {
            let mut state = self.lock();
            state.bytes.resize(usize::try_from(size_bytes).expect("small"), 0);
            state.size_bytes = size_bytes;
            state.listener.clone()
        };
        listener.expect("a listener")(VolumeEvent::Resized(size_bytes));
    }

    pub(crate) fn set_state(&self, now: VolumeState) {
        let listener = {
            let mut state = self.lock();
            state.state = now;
            state.listener.clone()
        };
        listener.expect("a listener")(VolumeEvent::State(now));
    }

    /// Waits until the volume was closed; true: it was given back.
    pub(crate) fn wait_closed(&self) -> bool {
        self.wait_until("close", |state| state.closed)
    }
}

impl Volume for TestVolume {
    fn geometry(&self) -> Geometry {
        let mut id = [0; 20];
        id[..4].copy_from_slice(b"test");
        let size_bytes = self.lock().size_bytes;
        Geometry { id, size_bytes, block_bytes: 512, discard_bytes: 1 << 20, read_only: false }
    }

    fn state(&self) -> VolumeState {
        self.lock().state
    }

    fn open_queue(&self, index: u16, _depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        if self.lock().queues_fail {
            return Err(std::io::Error::from_raw_os_error(libc::EMFILE).into());
        }
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(std::io::Error::from)?;
        let wake = Arc::new(wake);
        let lane = Lane { wake: Arc::clone(&wake), held: Vec::new(), released: Vec::new() };
        let before = self.lock().lanes.insert(index, lane);
        assert!(before.is_none(), "queue {index} is open twice");
        Ok(Box::new(Queue { shared: Arc::clone(&self.shared), index, wake }))
    }

    fn set_listener(&self, listener: EventListener) {
        self.lock().listener = Some(listener);
    }

    fn close(&self, give_back: bool) {
        let mut state = self.lock();
        assert!(state.lanes.is_empty(), "queues are dropped before the volume is closed");
        state.closed = Some(give_back);
        self.shared.changed.notify_all();
    }
}

struct Queue {
    shared: Arc<Shared>,
    index: u16,
    wake: Arc<EventFd>,
}

impl VolumeQueue for Queue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        let mut state = self.shared.lock();
        state.ops.push((self.index, op));
        let immediate = state.mode == Mode::Immediate;
        let lane = state.lanes.get_mut(&self.index).expect("open");
        let request = Held { tag, op, data: data.to_vec() };
        if immediate {
            lane.released.push(request)
        } else {
            lane.held.push(request)
        }
        self.shared.changed.notify_all();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        let _ = self.wake.read();
        let mut state = self.shared.lock();
        let state = &mut *state;
        let lane = state.lanes.get_mut(&self.index).expect("open");
        if state.mode == Mode::Scramble {
            for _ in 0..lane.held.len().div_ceil(2) {
                let at = state.random.usize(..lane.held.len());
                let one = lane.held.swap_remove(at);
                lane.released.push(one);
            }
            if !lane.held.is_empty() {
                self.wake.write(1).expect("wake");
            }
        }
        for request in lane.released.drain(..) {
            let result = run(&mut state.bytes, &request);
            completions.push(Completion { tag: request.tag, result });
        }
        self.shared.changed.notify_all();
    }

    fn rest(&mut self) {
        let mut state = self.shared.lock();
        let submitted = state.ops.len();
        state.rests.push(submitted);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        let state = self.shared.lock();
        state.lanes.get(&self.index).map_or(0, |l| l.held.len() + l.released.len())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().lanes.remove(&self.index);
        self.shared.changed.notify_all();
    }
}

fn run(disk: &mut [u8], request: &Held) -> Result<(), IoError> {
    let disk_len = disk.len();
    let at = |offset: u64, len: usize| {
        let start = usize::try_from(offset).map_err(|_| IoError::OutOfRange)?;
        let end = start.checked_add(len).ok_or(IoError::OutOfRange)?;
        if end > disk_len { Err(IoError::OutOfRange) } else { Ok(start..end) }
    };
    let total = request.data.iter().map(|v| v.iov_len).sum();
    match request.op {
        Op::Read { offset } | Op::Write { offset } => {
            let mut rest = &mut disk[at(offset, total)?];
            for v in &request.data {
                let (here, after) = rest.split_at_mut(v.iov_len);
                rest = after;
                // SAFETY: the submitter's memory, checked against the disk's length.
                unsafe {
                    if matches!(request.op, Op::Read { .. }) {
                        std::ptr::copy_nonoverlapping(here.as_ptr(), v.iov_base.cast(), v.iov_len);
                    } else {
                        std::ptr::copy_nonoverlapping(
                            v.iov_base.cast(),
                            here.as_mut_ptr(),
                            v.iov_len,
                        );
                    }
                }
            }
        }
        Op::Flush => {}
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
            disk[at(offset, usize::try_from(len).map_err(|_| IoError::OutOfRange)?)?].fill(0);
        }
    }
    Ok(())
}
