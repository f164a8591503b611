//! A thread's rounds one by one, on a ring in memory and under a clock that the test moves.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use baton_remote_client::{OpenOptions, Volume, open};
use nix::sys::epoll::{EpollCreateFlags, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::inflight::MadeHere;
use crate::memory::GuestMemory;
use crate::memory::tests::region;
use crate::queue::mailbox::Command;
use crate::queue::worker::signal;
use crate::queue::{RingSetup, RingStart};
use crate::status::DiskStatus;
use crate::virtqueue::RingAddresses;

const US: Duration = Duration::from_micros(1);
const USER: u64 = 0x7000_0000_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const SIZE: u16 = 8;

/// The guest's side: every request is the same chain, answered without the storage.
struct Driver {
    memory: Arc<GuestMemory>,
    kick: Arc<OwnedFd>,
    event_idx: bool,
    avail_idx: u16,
}

impl Driver {
    fn new(event_idx: bool) -> Self {
        let memory = Arc::new(GuestMemory::new(vec![region(0, 0x10000)]).expect("one region"));
        let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let driver = Self { memory, kick: Arc::new(kick.into()), event_idx, avail_idx: 0 };
        // GET_ID: header, 20 bytes for the answer, status.
        driver.write(HEADER, &8u32.to_le_bytes());
        for (index, addr, len, flags) in
            [(0u16, HEADER, 16u32, 1u16), (1, DATA, 20, 3), (2, DATA + 20, 1, 2)]
        {
            let at = 16 * u64::from(index);
            driver.write(at, &addr.to_le_bytes());
            driver.write(at + 8, &len.to_le_bytes());
            driver.write(at + 12, &flags.to_le_bytes());
            driver.write(at + 14, &(index + 1).to_le_bytes());
        }
        driver
    }

    fn addresses(&self) -> RingAddresses {
        let (desc, avail, used) = (USER, USER + AVAIL, USER + USED);
        RingAddresses::find(&self.memory, u32::from(SIZE), desc, avail, used).expect("a good ring")
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        let at = self.memory.contiguous(addr, bytes.len() as u64).expect("in memory");
        // SAFETY: in the region, which only this test touches, on one thread.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
    }

    fn read_u16(&self, addr: u64) -> u16 {
        let at = self.memory.contiguous(addr, 2).expect("in memory");
        // SAFETY: as above.
        unsafe { at.as_ptr().cast::<u16>().read_unaligned() }
    }

    /// Offers a request, and kicks if the device asked for it. Says whether it did.
    fn offer(&mut self) -> bool {
        self.write(AVAIL + 4 + 2 * u64::from(self.avail_idx % SIZE), &0u16.to_le_bytes());
        let offered = self.avail_idx;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail_idx.to_le_bytes());
        let wanted = if self.event_idx {
            self.read_u16(USED + 4 + 8 * u64::from(SIZE)) == offered
        } else {
            self.read_u16(USED) == 0
        };
        if wanted {
            signal(&self.kick);
        }
        wanted
    }

    fn is_answered(&self) -> bool {
        self.read_u16(USED + 2) == self.avail_idx
    }
}

/// Moves by 1 us at each look at it, and then may offer a request, once.
struct Clock {
    now: Instant,
    looks: u32,
    offer_at: Option<u32>,
    driver: Arc<Mutex<Driver>>,
}

impl Clock {
    fn read(&mut self) -> Instant {
        self.now += US;
        self.looks += 1;
        if self.offer_at == Some(self.looks) {
            let kicked = self.driver.lock().expect("not poisoned").offer();
            assert!(!kicked, "a guest was to kick a thread that is looking");
        }
        self.now
    }
}

/// A thread with a ring that runs for each of the drivers.
fn serving(
    drivers: &[Arc<Mutex<Driver>>],
    polling: Option<Polling>,
) -> (QueueThread, Vec<Arc<Mailbox>>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("disk.img");
    std::fs::write(&file, vec![0; 4096]).expect("written");
    let uri = format!("file://{}", file.display());
    let volume: Arc<dyn Volume> = open(&uri, &OpenOptions::new("h:vm")).expect("a volume");
    let disk = Arc::new(Disk {
        name: "disk".to_owned(),
        size_bytes: AtomicU64::new(volume.geometry().size_bytes),
        volume,
        read_only: false,
        id: [7; 20],
        inflight_made: MadeHere::default(),
        status: DiskStatus::new(u16::try_from(drivers.len()).expect("few")),
        member: None,
    });
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
    let mailbox = |slot| {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Mailbox.token(slot));
        epoll.add(&wake, event).expect("watched");
        Arc::new(Mailbox { commands: Mutex::default(), wake })
    };
    let mailboxes: Vec<_> = (0..drivers.len()).map(mailbox).collect();
    let queues = (0..).zip(mailboxes.clone()).collect();
    let mut thread = QueueThread::new(&disk, queues, epoll, polling);
    for (worker, driver) in thread.workers.iter_mut().zip(drivers) {
        let driver = driver.lock().expect("not poisoned");
        let setup = RingSetup {
            addresses: driver.addresses(),
            event_idx: driver.event_idx,
            write_through: false,
            call: None,
            err: None,
            log: None,
            log_used_at: None,
        };
        let kick = Arc::clone(&driver.kick);
        worker.start(RingStart { setup, kick, base: 0, inflight: None }).expect("it starts");
        // As the round does that started it.
        assert!(!worker.ask_for_kicks());
    }
    (thread, mailboxes, dir)
}

struct Bench {
    thread: QueueThread,
    driver: Arc<Mutex<Driver>>,
    clock: Arc<Mutex<Clock>>,
    limit: Duration,
    _dir: tempfile::TempDir,
}

impl Bench {
    /// A ring that runs, and a guest that asked for nothing yet.
    fn new(poll_us: u64, event_idx: bool) -> Self {
        let driver = Arc::new(Mutex::new(Driver::new(event_idx)));
        let clock = Arc::new(Mutex::new(Clock {
            now: Instant::now(),
            looks: 0,
            offer_at: None,
            driver: Arc::clone(&driver),
        }));
        let theirs = Arc::clone(&clock);
        let polling = Polling::new(poll_us, move || theirs.lock().expect("not poisoned").read());
        let (thread, _, dir) = serving(std::slice::from_ref(&driver), polling);
        Self { thread, driver, clock, limit: Duration::from_micros(poll_us), _dir: dir }
    }

    /// A request `after` the last was done, which the sleeping thread is kicked for.
    fn request(&mut self, after: Duration) -> Next {
        self.clock.lock().expect("not poisoned").now += after;
        let kicked = self.driver.lock().expect("not poisoned").offer();
        assert!(kicked, "a guest was not to kick a thread that sleeps");
        let next = self.thread.round(Next::Sleep);
        assert!(self.is_answered());
        next
    }

    /// Rounds until the thread sleeps; how many only looked.
    fn fall_asleep(&mut self, mut next: Next) -> u32 {
        let mut looks = 0;
        while next == Next::Look {
            looks += 1;
            assert!(looks < 1000, "the thread does not give the core back");
            next = self.thread.round(next);
        }
        looks
    }

    /// Two requests so near to each other that the window is the longest there is.
    fn wake_up(&mut self) -> Next {
        assert_eq!(self.request(US), Next::Sleep, "nothing is known yet");
        self.request(self.limit / 2)
    }

    fn is_answered(&self) -> bool {
        self.driver.lock().expect("not poisoned").is_answered()
    }

    fn looks(&self) -> u32 {
        self.clock.lock().expect("not poisoned").looks
    }
}

#[test]
fn off_it_sleeps_at_once_and_never_looks_at_the_clock() {
    for event_idx in [true, false] {
        let mut bench = Bench::new(0, event_idx);
        for _ in 0..10 {
            assert_eq!(bench.request(US), Next::Sleep);
        }
        assert_eq!(bench.looks(), 0);
    }
}

#[test]
fn after_the_last_request_the_core_is_given_back_within_the_limit() {
    for (poll_us, event_idx) in [(100, true), (100, false), (30, true), (10, true)] {
        let mut bench = Bench::new(poll_us, event_idx);
        let next = bench.wake_up();
        // Each look takes two microseconds of this clock.
        let looks = bench.fall_asleep(next);
        assert!(2 * u64::from(looks) <= poll_us + 2, "{looks} looks of 2 us, limit {poll_us} us");
        assert!(u64::from(looks) > poll_us / 4, "it does look: {looks}");
        // What made it sleep is not a timer, and the guest is to wake it.
        assert_eq!(bench.request(5000 * US), Next::Sleep, "far requests are not looked for");
    }
}

/// A request may come at any moment of a thread's way to sleep, also between the last look at the ring and the wish for
/// a kick, which nobody then gives.
#[test]
fn a_request_that_comes_as_the_thread_falls_asleep_is_not_forgotten() {
    for event_idx in [true, false] {
        let mut moments = 0;
        for moment in 1.. {
            let mut bench = Bench::new(100, event_idx);
            let next = bench.wake_up();
            assert_eq!(next, Next::Look);
            let at = bench.looks() + moment;
            bench.clock.lock().expect("not poisoned").offer_at = Some(at);
            bench.fall_asleep(next);
            if bench.looks() < at {
                break;
            }
            moments = moment;
            assert!(bench.is_answered(), "asleep with a request in the ring, come at {moment}");
        }
        assert!(moments > 10, "{moments}");
    }
}

fn offer(driver: &Mutex<Driver>) -> bool {
    driver.lock().expect("not poisoned").offer()
}

fn is_answered(driver: &Mutex<Driver>) -> bool {
    driver.lock().expect("not poisoned").is_answered()
}

fn drivers(count: usize, event_idx: bool) -> Vec<Arc<Mutex<Driver>>> {
    (0..count).map(|_| Arc::new(Mutex::new(Driver::new(event_idx)))).collect()
}

#[test]
fn a_round_serves_every_queue_that_has_something_and_asks_for_the_next() {
    for event_idx in [true, false] {
        let drivers = drivers(3, event_idx);
        let (mut thread, _mailboxes, _dir) = serving(&drivers, None);
        for had in [vec![0, 1, 2], vec![1], vec![0, 2], vec![2]] {
            for one in &had {
                assert!(offer(&drivers[*one]), "queue {one} did not ask for a kick");
            }
            assert_eq!(thread.round(Next::Sleep), Next::Sleep);
            for (one, driver) in drivers.iter().enumerate() {
                assert!(is_answered(driver), "queue {one} of {had:?}");
            }
        }
    }
}

/// Who looks, looks at all of them, and whoever it is that then comes last is not forgotten.
#[test]
fn while_one_queue_keeps_the_thread_looking_no_other_needs_a_kick() {
    for event_idx in [true, false] {
        let drivers = drivers(2, event_idx);
        let start = Instant::now();
        let polling = Polling::new(100, move || start);
        let (mut thread, _mailboxes, _dir) = serving(&drivers, polling);
        let mut next = Next::Sleep;
        for _ in 0..3 {
            offer(&drivers[0]);
            next = thread.round(next);
        }
        assert_eq!(next, Next::Look, "the clock stands still, so the thread looks");
        assert_eq!(thread.round(next), Next::Look);
        // With EVENT_IDX a wish for a kick is taken back only by what comes.
        assert_eq!(offer(&drivers[1]), event_idx);
        thread.round(next);
        assert!(is_answered(&drivers[1]));
    }
}

#[test]
fn a_queue_that_is_given_up_leaves_the_others_of_its_thread_alone() {
    let drivers = drivers(2, true);
    let (mut thread, mailboxes, _dir) = serving(&drivers, None);
    let tell = |mailbox: &Mailbox| {
        mailbox.commands.lock().expect("not poisoned").push_back(Command::Exit);
        mailbox.wake.write(1).expect("told");
    };
    tell(&mailboxes[0]);
    // In the same round as a request.
    assert!(offer(&drivers[1]));
    assert_eq!(thread.round(Next::Sleep), Next::Sleep);
    assert!(is_answered(&drivers[1]));
    offer(&drivers[0]);
    for _ in 0..3 {
        assert!(offer(&drivers[1]));
        assert_eq!(thread.round(Next::Sleep), Next::Sleep);
        assert!(is_answered(&drivers[1]) && !is_answered(&drivers[0]));
    }
    tell(&mailboxes[1]);
    // It ends by itself.
    thread.run();
}
