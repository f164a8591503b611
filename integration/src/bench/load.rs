//! Load on one vhost-user disk.
//!
//! Each slot of a queue is one request that is always in flight: its chain is linked once and published again and
//! again. A thread serves its queues in turn and sleeps in epoll when nothing is complete, as a guest does; it never
//! polls the rings. Calls are waited for edge-triggered and never read: QEMU sets O_NONBLOCK on the shared eventfd, so
//! a blocking read would spin.
//!
//! With `dirty_log`, a log is kept as during a migration (`dirty`). With `verify`, every block belongs to one slot, which knows what it may hold and checks each read.

use crate::bench::cpu::{Snapshot, Usage};
use crate::bench::dirty::{self, DirtyPages, Taker};
use crate::bench::outcome::{Outcome, Tally, summary};
use crate::blk::{OK, UNTOUCHED, header};
use crate::memory::GuestMemory;
use crate::raw_frontend::{Options, Queue, RawFrontend};
use crate::ring::Descriptor;
use anyhow::{Context, Result, bail};
use baton_probe::stamp::{Expect, SECTOR, Stamp, Version, check_block, encode_block};
use clap::ValueEnum;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::Serialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// What to do with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "lower")]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Half of each, at random places.
    RandRw,
    /// Reads from start to end, each queue in its own part.
    Read,
    /// Writes from start to end, each queue in its own part.
    Write,
}

impl Pattern {
    fn is_sequential(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// What to do.
    pub pattern: Pattern,
    /// Bytes in a request.
    pub block_bytes: usize,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues used.
    pub queues: u16,
    /// A thread for each queue, or one for all.
    pub thread_per_queue: bool,
    /// Time before the measurement.
    pub warmup: Duration,
    /// Time measured.
    pub duration: Duration,
    /// Stamp what is written and check what is read.
    pub verify: bool,
    /// Part of the disk used, from its start; `None` for all.
    pub span_bytes: Option<u64>,
    /// From the start of one block to that of the next; `None`: they lie side by side.
    pub stride_bytes: Option<u64>,
    /// Keep a dirty log, as during a migration, and take its marks now and then, as a VMM does.
    pub dirty_log: bool,
    /// Seed of the random places.
    pub seed: u64,
    /// Processes whose CPU time is measured with it.
    pub pids: Vec<u32>,
}

const WARM_UP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// Runs one job from connecting to disconnecting.
pub fn run(job: &Job) -> Result<Outcome> {
    check(job)?;
    let slots = usize::from(job.depth) * usize::from(job.queues);
    let options = Options {
        queues: job.queues,
        // Three descriptors each; at least what a Linux guest has.
        queue_size: (3 * job.depth).next_power_of_two().max(128),
        // A request's header has a page in front of its data.
        memory_bytes: slots * (job.block_bytes.next_multiple_of(4096) + 4096)
            + (usize::from(job.queues) << 18)
            + (1 << 20),
        start: false,
        ..Options::default()
    };
    let mut frontend = RawFrontend::connect(&job.socket, options)?;
    if u64::from(job.queues) > frontend.max_queues() {
        bail!(
            "the back-end has {} queues, fewer than --queues {}",
            frontend.max_queues(),
            job.queues
        );
    }
    frontend.start()?;
    if job.dirty_log {
        dirty::start(&mut frontend)?;
    }
    let disk_bytes = frontend.capacity()? * SECTOR as u64;
    let span = job.span_bytes.unwrap_or(disk_bytes).min(disk_bytes);
    let blocks = span / job.stride_bytes();
    if blocks < slots as u64 {
        bail!("{span} bytes are too few for {slots} requests of {} bytes", job.block_bytes);
    }
    let memory = Arc::clone(frontend.memory());
    let workers = (0..job.queues)
        .map(|index| Worker::new(job, frontend.take_queue(index), &memory, index, blocks))
        .collect::<Result<Vec<_>>>()?;
    let written = workers.iter().flat_map(Worker::written_pages).collect();
    let log = job.dirty_log.then(|| DirtyPages::expect(written));
    let threads: Vec<Vec<Worker>> = if job.thread_per_queue {
        workers.into_iter().map(|w| vec![w]).collect()
    } else {
        vec![workers]
    };

    let phase = AtomicU8::new(WARM_UP);
    let mut taker = Taker { frontend: &frontend, log };
    let (tallies, usage) = std::thread::scope(|scope| {
        let handles: Vec<_> =
            threads.into_iter().map(|workers| scope.spawn(|| serve(workers, &phase))).collect();
        let usage = timed(job, &phase, &mut taker);
        // Set again in case the measurement failed, or the threads would never end.
        phase.store(STOP, Ordering::Relaxed);
        let tallies = handles
            .into_iter()
            .map(|h| h.join().expect("no panic in a load thread"))
            .collect::<Result<Vec<_>>>();
        (tallies, usage)
    });
    let (tallies, usage) = (tallies?, usage?);
    let dirty_pages = taker.finish()?;
    Ok(Outcome { dirty_pages, ..summary(tallies, usage) })
}

fn timed(job: &Job, phase: &AtomicU8, taker: &mut Taker<'_>) -> Result<Usage> {
    taker.sleep(job.warmup)?;
    let before = Snapshot::take(&job.pids)?;
    phase.store(MEASURE, Ordering::Relaxed);
    taker.sleep(job.duration)?;
    phase.store(STOP, Ordering::Relaxed);
    Ok(Snapshot::take(&job.pids)?.since(&before))
}

impl Job {
    /// One request of 4 KiB at a time on the whole disk, after a fifth of the time to warm up.
    pub(super) fn single(socket: &Path, pids: Vec<u32>, pattern: Pattern, time: Duration) -> Self {
        Self {
            socket: socket.to_path_buf(),
            pattern,
            block_bytes: 4096,
            depth: 1,
            queues: 1,
            thread_per_queue: false,
            warmup: time / 5,
            duration: time,
            verify: false,
            span_bytes: None,
            stride_bytes: None,
            dirty_log: false,
            seed: 1,
            pids,
        }
    }

    fn stride_bytes(&self) -> u64 {
        self.stride_bytes.unwrap_or(self.block_bytes as u64)
    }
}

fn check(job: &Job) -> Result<()> {
    if job.block_bytes == 0 || !job.block_bytes.is_multiple_of(SECTOR) {
        bail!("--bs must be a positive multiple of {SECTOR}");
    }
    let stride = job.stride_bytes();
    if stride < job.block_bytes as u64 || !stride.is_multiple_of(SECTOR as u64) {
        bail!("blocks must not overlap, and begin at multiples of {SECTOR}");
    }
    if job.depth == 0 || job.depth > 256 || job.queues == 0 || job.queues > 64 {
        bail!("--depth must be from 1 to 256 and --queues from 1 to 64");
    }
    Ok(())
}

struct Slot {
    head: u16,
    /// Header and status share a line of memory.
    header: u64,
    data: u64,
    block: u64,
    is_read: bool,
    submitted: Instant,
    /// With verify: the last write of each of the slot's blocks, as a sequence.
    written: HashMap<u64, u64>,
}

const STATUS_OFFSET: u64 = 16;

/// One queue with its requests.
struct Worker {
    queue: Queue,
    memory: Arc<GuestMemory>,
    slots: Vec<Slot>,
    /// Slot number by head.
    slot_of: Vec<usize>,
    pattern: Pattern,
    block_bytes: usize,
    stride_sectors: u64,
    verify: bool,
    /// First block and number of blocks of this queue, for sequential patterns.
    part: (u64, u64),
    /// Blocks of the disk used.
    blocks: u64,
    /// Slots of all queues, and the number of this queue's first.
    all_slots: u64,
    first_slot: u64,
    cursor: u64,
    sequence: u64,
    epoch: u64,
    random: fastrand::Rng,
}

impl Worker {
    fn new(
        job: &Job,
        mut queue: Queue,
        memory: &Arc<GuestMemory>,
        index: u16,
        blocks: u64,
    ) -> Result<Self> {
        let mut slots = Vec::new();
        let mut slot_of = vec![usize::MAX; usize::from(queue.ring.size())];
        let len = u32::try_from(job.block_bytes)?;
        for number in 0..usize::from(job.depth) {
            let header = memory.alloc(64, 64)?;
            let data = memory.alloc(job.block_bytes, 4096)?;
            // The direction of the data is set when the request is; a chain has the same shape for both.
            let chain = [
                Descriptor::readable(header, 16),
                Descriptor::readable(data, len),
                Descriptor::writable(header + STATUS_OFFSET, 1),
            ];
            let head = queue.ring.link(&chain)?;
            slot_of[usize::from(head)] = number;
            let submitted = Instant::now();
            slots.push(Slot {
                head,
                header,
                data,
                block: 0,
                is_read: false,
                submitted,
                written: HashMap::new(),
            });
        }
        let share = blocks / u64::from(job.queues);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .context("the clock is set")?;
        Ok(Self {
            queue,
            memory: Arc::clone(memory),
            slots,
            slot_of,
            pattern: job.pattern,
            block_bytes: job.block_bytes,
            stride_sectors: job.stride_bytes() / SECTOR as u64,
            verify: job.verify,
            part: (share * u64::from(index), share),
            blocks,
            all_slots: u64::from(job.depth) * u64::from(job.queues),
            first_slot: u64::from(job.depth) * u64::from(index),
            cursor: 0,
            sequence: 0,
            // Tells what an earlier run left from what this one wrote.
            epoch: now.as_secs(),
            random: fastrand::Rng::with_seed(job.seed.wrapping_add(u64::from(index) << 32)),
        })
    }

    /// Pages that the device writes while this queue is used: the used index, each status, and what is read.
    fn written_pages(&self) -> Vec<u64> {
        let (_, _, used) = self.queue.ring.addresses();
        let mut pages = vec![used];
        let reads = matches!(self.pattern, Pattern::Read | Pattern::RandRead);
        for slot in &self.slots {
            pages.push(slot.header + STATUS_OFFSET);
            if reads {
                pages.extend((slot.data..slot.data + self.block_bytes as u64).step_by(512));
            }
        }
        pages
    }

    fn next_block(&mut self, slot: usize) -> u64 {
        if self.verify {
            // Blocks are dealt out to the slots in turn, so that nobody else writes what a slot checks.
            let own = self.blocks / self.all_slots;
            let pick =
                if self.pattern.is_sequential() { self.advance() } else { self.random.u64(..) };
            return (pick % own) * self.all_slots + self.first_slot + slot as u64;
        }
        if self.pattern.is_sequential() {
            self.part.0 + self.advance() % self.part.1
        } else {
            self.random.u64(..self.blocks)
        }
    }

    fn advance(&mut self) -> u64 {
        self.cursor += 1;
        self.cursor - 1
    }

    fn sector_of(&self, block: u64) -> u64 {
        block * self.stride_sectors
    }

    /// Publishes the slot's next request; the caller commits and kicks.
    fn submit(&mut self, number: usize) {
        let block = self.next_block(number);
        let is_read = match self.pattern {
            Pattern::RandRead | Pattern::Read => true,
            Pattern::RandWrite | Pattern::Write => false,
            Pattern::RandRw => self.random.bool(),
        };
        let sector = self.sector_of(block);
        if self.verify && !is_read {
            self.sequence += 1;
            self.stamp(number, block, sector);
        }
        let slot = &mut self.slots[number];
        if slot.is_read != is_read {
            slot.is_read = is_read;
            self.queue.ring.set_direction(slot.head, is_read);
        }
        slot.block = block;
        self.memory.write(slot.header, &header(u32::from(!is_read), sector));
        self.memory.write(slot.header + STATUS_OFFSET, &[UNTOUCHED]);
        slot.submitted = Instant::now();
        self.queue.ring.stage(slot.head);
    }

    fn stamp(&mut self, number: usize, block: u64, sector: u64) {
        let mut bytes = vec![0; self.block_bytes];
        let version = Version { epoch: self.epoch, sequence: self.sequence };
        encode_block(Stamp { volume: 1, sector, writer: 1, version }, &mut bytes);
        self.memory.write(self.slots[number].data, &bytes);
        self.slots[number].written.insert(block, self.sequence);
    }

    /// Takes all completions and, unless it is time to stop, submits the next requests. Returns how many there were.
    /// `at` is this queue's place in the tally.
    fn reap(&mut self, at: usize, phase: u8, tally: &mut Tally) -> Result<u32> {
        let mut count = 0;
        while let Some(used) = self.queue.ring.pop_used() {
            let number = usize::try_from(used.head).ok().and_then(|h| self.slot_of.get(h)).copied();
            let number = number.filter(|&n| n != usize::MAX);
            let number = number.with_context(|| {
                format!("the device returned head {}, which it did not have", used.head)
            })?;
            let latency = self.slots[number].submitted.elapsed();
            if phase == MEASURE {
                tally.record(at, latency);
            }
            self.judge(number, tally);
            if phase != STOP {
                self.submit(number);
            }
            count += 1;
        }
        if count > 0 && phase != STOP {
            self.queue.ring.commit();
            self.queue.kick()?;
        }
        Ok(count)
    }

    fn judge(&self, number: usize, tally: &mut Tally) {
        let slot = &self.slots[number];
        let status = self.memory.read_byte(slot.header + STATUS_OFFSET);
        if status != OK {
            tally.errors += 1;
            let what = if slot.is_read { "read" } else { "write" };
            tally.find(|| format!("{what} of block {} ended with status {status:#x}", slot.block));
            return;
        }
        if !self.verify || !slot.is_read {
            return;
        }
        let Some(&sequence) = slot.written.get(&slot.block) else { return };
        let version = Version { epoch: self.epoch, sequence };
        let expect = Expect {
            volume: 1,
            sector: self.sector_of(slot.block),
            acked: version,
            issued: version,
        };
        let verdict = check_block(&self.memory.read(slot.data, self.block_bytes), &expect);
        tally.checked += 1;
        if !verdict.is_good() {
            tally.bad_reads += 1;
            tally.find(|| format!("block {}: {verdict:?}, expected {version}", slot.block));
        }
    }

    fn in_flight(&self) -> u16 {
        self.queue.ring.outstanding()
    }
}

/// One thread: serves its queues until the phase says stop and everything has come back.
fn serve(mut workers: Vec<Worker>, phase: &AtomicU8) -> Result<Tally> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (i, worker) in workers.iter().enumerate() {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, i as u64);
        epoll.add(&worker.queue.call, event)?;
    }
    let mut tally = Tally::new(workers.len());
    for worker in &mut workers {
        for number in 0..worker.slots.len() {
            worker.submit(number);
        }
        worker.queue.ring.commit();
        worker.queue.kick()?;
    }
    let mut events = vec![EpollEvent::empty(); workers.len()];
    loop {
        let now = phase.load(Ordering::Relaxed);
        let mut done = 0;
        for (at, worker) in workers.iter_mut().enumerate() {
            worker.queue.ring.refuse_calls();
            done += worker.reap(at, now, &mut tally)?;
        }
        if done > 0 {
            continue;
        }
        if now == STOP && workers.iter().all(|w| w.in_flight() == 0) {
            return Ok(tally);
        }
        // Before the sleep each queue must have its call requested; the first that has news makes it unnecessary.
        let quiet = workers.iter().all(|w| w.queue.ring.request_call());
        if quiet {
            let slept = epoll.wait(&mut events, EpollTimeout::try_from(STALL)?);
            match slept {
                Ok(0) => bail!(
                    "{} requests did not complete in {STALL:?}",
                    workers.iter().map(|w| w.in_flight()).sum::<u16>()
                ),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// A device that completes nothing for so long has stopped.
const STALL: Duration = Duration::from_secs(60);
