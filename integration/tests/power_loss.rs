//! "After the storage server's machine lost power, a flush does not claim what was lost; after a kill of the server
//! alone, nobody notices anything."
//!
//! The machine is not switched off here. Between a kill and a restart of the server its data directory is opened once
//! on another boot of the kernel, by the store's own code, which is what the next boot would find.

use baton_integration::baton::{Storage, wait_until};
use baton_integration::workspace::TestDir;
use baton_remote_client::{
    Completion, IoError, Op, OpenOptions, Tag, Volume, VolumeQueue, VolumeState, open,
};
use baton_storage_server::store::{BootId, PoolConfig, Store};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

struct Bench {
    dir: TestDir,
    storage: Storage,
    volume: Arc<dyn Volume>,
    queues: Vec<Box<dyn VolumeQueue>>,
}

impl Bench {
    fn new(name: &str) -> Self {
        let dir = TestDir::new(name).unwrap();
        let storage = Storage::start(dir.path(), &[]).unwrap();
        storage.create("v", 16 * MIB).unwrap();
        let volume = open(&storage.uri("v", None), &OpenOptions::new("host/vm")).unwrap();
        let queues = (0..2).map(|index| volume.open_queue(index, 8).unwrap()).collect();
        Self { dir, storage, volume, queues }
    }

    /// What a cold start of the machine makes of the killed server's directory.
    fn lose_power(&mut self) {
        self.storage.daemon.kill().unwrap();
        boot_elsewhere(&self.dir.path().join("data"));
        self.storage.restart().unwrap();
    }

    fn run(&mut self, queue: usize, op: Op, data: &mut [u8]) -> Result<(), IoError> {
        // SAFETY: the buffer outlives the request, which is waited for.
        unsafe { self.queues[queue].submit(Tag(1), op, &iov(data)) };
        finish(&mut *self.queues[queue])
    }

    fn write(&mut self, queue: usize, offset: u64) {
        let written = self.run(queue, Op::Write { offset }, &mut [7; 4096]);
        assert_eq!(written, Ok(()));
    }

    fn flush(&mut self, queue: usize) -> Result<(), IoError> {
        self.run(queue, Op::Flush, &mut [])
    }

    fn logged_losses(&self) -> usize {
        self.storage.daemon.log().matches("went down while the pool was in use").count()
    }
}

fn boot_elsewhere(data: &Path) {
    let boot = BootId::parse("00000000-0000-4000-8000-000000000001");
    let store = Store::open_on(data, PoolConfig::default(), boot).unwrap();
    assert!(store.durability_generation() > 1, "a killed server's pool on another boot");
}

fn iov(data: &mut [u8]) -> [libc::iovec; 1] {
    [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }]
}

fn finish(queue: &mut dyn VolumeQueue) -> Result<(), IoError> {
    let until = Instant::now() + SOON;
    let mut done: Vec<Completion> = Vec::new();
    queue.poll(&mut done);
    while done.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no answer");
        let mut fds = [PollFd::new(queue.wake_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left).unwrap()).unwrap();
        queue.poll(&mut done);
    }
    assert_eq!(done.len(), 1);
    done[0].result
}

#[test]
fn a_flush_after_a_power_loss_fails_once_and_only_if_something_was_not_flushed() {
    let mut bench = Bench::new("power-loss");
    bench.write(0, 0);
    bench.lose_power();
    assert_eq!(bench.flush(1), Err(IoError::Io), "another queue's flush");
    assert_eq!(bench.flush(0), Ok(()));
    assert_eq!(bench.flush(1), Ok(()));
    assert_eq!(bench.logged_losses(), 1);
    // Everything flushed: the next power loss is only a pause.
    bench.write(0, MIB);
    bench.write(1, 2 * MIB);
    assert_eq!(bench.flush(0), Ok(()));
    bench.lose_power();
    assert_eq!(bench.flush(0), Ok(()));
    assert_eq!(bench.flush(1), Ok(()));
    let mut back = [0; 4096];
    assert_eq!(bench.run(1, Op::Read { offset: MIB }, &mut back), Ok(()));
    assert_eq!(back, [7; 4096]);
}

#[test]
fn a_flush_that_waited_through_the_power_loss_fails() {
    let mut bench = Bench::new("power-loss-waiting");
    bench.write(0, 0);
    bench.storage.daemon.kill().unwrap();
    // SAFETY: no memory is named.
    unsafe { bench.queues[0].submit(Tag(2), Op::Flush, &[]) };
    let mut early = Vec::new();
    bench.queues[0].poll(&mut early);
    assert_eq!(early, []);
    boot_elsewhere(&bench.dir.path().join("data"));
    bench.storage.restart().unwrap();
    assert_eq!(finish(&mut *bench.queues[0]), Err(IoError::Io));
    assert_eq!(bench.flush(1), Ok(()));
}

#[test]
fn a_kill_of_the_server_alone_is_never_seen() {
    let mut bench = Bench::new("kill-unseen");
    for round in 0..4 {
        bench.write(0, round * MIB);
        bench.write(1, (8 + round) * MIB);
        bench.storage.kill_and_restart().unwrap();
        assert_eq!(bench.flush(usize::from(round % 2 == 0)), Ok(()));
    }
    assert_eq!(bench.logged_losses(), 0);
    let volume = Arc::clone(&bench.volume);
    wait_until("connected", SOON, || volume.state() == VolumeState::Connected).unwrap();
}

/// A planned reboot: the server stops cleanly, the machine restarts, unflushed data is on the disk all the same.
#[test]
fn a_clean_stop_before_the_reboot_is_never_seen() {
    let mut bench = Bench::new("clean-reboot");
    bench.write(0, 0);
    assert!(bench.storage.daemon.terminate(SOON).unwrap().success());
    // Another boot finds a clean pool, and is itself ended cleanly.
    let boot = BootId::parse("00000000-0000-4000-8000-000000000002");
    let data = bench.dir.path().join("data");
    let store = Store::open_on(&data, PoolConfig::default(), boot).unwrap();
    assert_eq!(store.durability_generation(), 1);
    store.close().unwrap();
    drop(store);
    bench.storage.restart().unwrap();
    assert_eq!(bench.flush(1), Ok(()));
    let mut back = [0; 4096];
    assert_eq!(bench.run(1, Op::Read { offset: 0 }, &mut back), Ok(()));
    assert_eq!(back, [7; 4096]);
}
