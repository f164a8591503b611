//! Verified load: workers write stamped blocks, read every acknowledged write back, and keep checking.
//!
//! Each worker owns its blocks, so it knows what each may hold. It reads into a pool of memory slots and looks at
//! every slot again before it reuses it: memory that changed since the disk filled it means that a live migration
//! lost a page the device had written, which a check right after the read would never see.
//!
//! ```text
//!   write block b ── acknowledged ──> read b into slot s ──> check
//!                                     read any block c  ──> check          (old acknowledged writes)
//!                                     before a slot is reused ──> check again (memory)
//! ```

use crate::device::{AlignedBuf, Disk};
use crate::stamp::{Expect, SECTOR, Stamp, Verdict, Version, check_block, encode_block};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many findings are kept in full; the counters go on.
const FINDINGS_MAX: usize = 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Workers, each with one request at a time: threads x depth.
    pub workers: usize,
    /// Bytes in a block; a multiple of the sector.
    pub block_bytes: usize,
    /// Blocks each worker owns.
    pub blocks_per_worker: u64,
    /// Where the first worker's first block begins, in bytes.
    pub offset: u64,
    /// Memory slots each worker reads into.
    pub slots: usize,
    /// Identity in the stamps.
    pub volume: u64,
    /// Identity in the stamps.
    pub writer: u32,
    /// Epoch in the stamps: a load started later on the same blocks needs a greater one.
    pub epoch: u64,
    /// A flush after every so many writes of a worker; 0 for never.
    pub flush_every: u64,
    /// Seed of the choice of blocks.
    pub seed: u64,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            workers: 4,
            block_bytes: 4096,
            blocks_per_worker: 256,
            offset: 0,
            slots: 64,
            volume: 1,
            writer: 1,
            epoch: 1,
            flush_every: 0,
            seed: 1,
        }
    }
}

/// Counters of a load so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Completed reads, writes and flushes, with or without an error.
    pub ops: u64,
    /// Writes that were acknowledged; part of `ops`.
    pub writes: u64,
    /// Requests that failed.
    pub errs: u64,
    /// Acknowledged data that was missing: old versions, zeros, and memory that went back in time.
    pub stale: u64,
    /// Wrong data: torn, misplaced, future, or no stamp at all.
    pub corrupt: u64,
    /// The longest time in which nothing completed, in ms.
    pub max_gap_ms: u64,
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ops, writes, errs, stale, corrupt, max_gap_ms } = self;
        write!(
            f,
            "ops={ops} writes={writes} errs={errs} stale={stale} corrupt={corrupt} max_gap_ms={max_gap_ms}"
        )
    }
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    started: Instant,
    ops: AtomicU64,
    writes: AtomicU64,
    errs: AtomicU64,
    stale: AtomicU64,
    corrupt: AtomicU64,
    last_done_ns: AtomicU64,
    max_gap_ns: AtomicU64,
    findings: Mutex<Vec<String>>,
}

impl Shared {
    #[allow(clippy::cast_possible_truncation, reason = "nanoseconds of a test fit in 64 bits")]
    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn completed(&self) {
        let now = self.now_ns();
        let last = self.last_done_ns.swap(now, Relaxed);
        self.max_gap_ns.fetch_max(now.saturating_sub(last), Relaxed);
        self.ops.fetch_add(1, Relaxed);
    }

    fn find(&self, text: impl FnOnce() -> String) {
        let mut findings = self.findings.lock().expect("no worker panics while it holds this");
        if findings.len() < FINDINGS_MAX {
            findings.push(text());
        }
    }

    fn failed(&self, what: &str, sector: u64, error: &std::io::Error) {
        self.errs.fetch_add(1, Relaxed);
        self.find(|| format!("{what} of sector {sector} failed: {error}"));
    }

    fn judge(&self, what: &str, sector: u64, verdict: Verdict, expect: &Expect) {
        if verdict.is_good() {
            return;
        }
        let counter = if verdict.is_lost() { &self.stale } else { &self.corrupt };
        counter.fetch_add(1, Relaxed);
        self.find(|| {
            format!(
                "{what} sector {sector}: {verdict:?}, acknowledged {}, sent {}",
                expect.acked, expect.issued
            )
        });
    }

    fn totals(&self) -> Totals {
        // A stall that is still going on counts as well.
        let open_gap = self.now_ns().saturating_sub(self.last_done_ns.load(Relaxed));
        Totals {
            ops: self.ops.load(Relaxed),
            writes: self.writes.load(Relaxed),
            errs: self.errs.load(Relaxed),
            stale: self.stale.load(Relaxed),
            corrupt: self.corrupt.load(Relaxed),
            max_gap_ms: self.max_gap_ns.load(Relaxed).max(open_gap) / 1_000_000,
        }
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the workers: as many as `config` says on each of the disks. The stamps' volume counts the disks.
    pub fn start(disks: &[Arc<dyn Disk>], config: &LoadConfig) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            started: Instant::now(),
            ops: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            errs: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            last_done_ns: AtomicU64::new(0),
            max_gap_ns: AtomicU64::new(0),
            findings: Mutex::new(Vec::new()),
        });
        let mut workers = Vec::new();
        for (volume, disk) in (config.volume..).zip(disks) {
            for index in 0..config.workers {
                let config = LoadConfig { volume, ..config.clone() };
                let mut worker = Worker::new(index, Arc::clone(disk), Arc::clone(&shared), config);
                workers.push(std::thread::spawn(move || worker.run()));
            }
        }
        Self { shared, workers }
    }

    /// Counters so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.shared.totals()
    }

    /// Takes the first findings, in words.
    #[must_use]
    pub fn take_findings(&self) -> Vec<String> {
        std::mem::take(
            &mut *self.shared.findings.lock().expect("no worker panics while it holds this"),
        )
    }

    /// Stops the workers, who then check every block they own once more.
    #[must_use]
    pub fn stop(mut self) -> (Totals, Vec<String>) {
        let gap_until_stop = self.shared.totals().max_gap_ms;
        self.shared.stop.store(true, Relaxed);
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                self.shared.errs.fetch_add(1, Relaxed);
                self.shared.find(|| "a worker of the load panicked".to_owned());
            }
        }
        // The gap is that of the load, not of its end.
        let totals = Totals { max_gap_ms: gap_until_stop, ..self.shared.totals() };
        (totals, self.take_findings())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    acked: Version,
    issued: Version,
}

struct Slot {
    buf: AlignedBuf,
    /// The block the slot was filled from and the version found, until it is found bad.
    holds: Option<(u64, Version)>,
}

struct Worker {
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    config: LoadConfig,
    /// First sector of this worker's blocks.
    base_sector: u64,
    blocks: Vec<Block>,
    slots: Vec<Slot>,
    next_slot: usize,
    write_buf: AlignedBuf,
    version: Version,
    random: u64,
}

impl Worker {
    fn new(index: usize, disk: Arc<dyn Disk>, shared: Arc<Shared>, config: LoadConfig) -> Self {
        let sectors_per_worker = config.blocks_per_worker * (config.block_bytes / SECTOR) as u64;
        let blocks =
            usize::try_from(config.blocks_per_worker).expect("a worker's blocks fit in memory");
        Self {
            base_sector: config.offset / SECTOR as u64 + index as u64 * sectors_per_worker,
            blocks: vec![Block::default(); blocks],
            slots: (0..config.slots.max(1))
                .map(|_| Slot { buf: AlignedBuf::new(config.block_bytes), holds: None })
                .collect(),
            next_slot: 0,
            write_buf: AlignedBuf::new(config.block_bytes),
            version: Version { epoch: config.epoch, sequence: 0 },
            random: (config.seed ^ (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1,
            disk,
            shared,
            config,
        }
    }

    fn run(&mut self) {
        while !self.shared.stop.load(Relaxed) {
            let block = self.pick();
            self.write(block);
            self.read(block);
            let other = self.pick();
            self.read(other);
            // Failing requests come back at once; hammering adds nothing.
            if self.shared.errs.load(Relaxed) > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        for block in 0..self.blocks.len() {
            if self.blocks[block].issued != Version::NONE {
                self.read(block);
            }
        }
        for slot in 0..self.slots.len() {
            self.check_memory(slot);
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "the remainder is less than a length")]
    fn pick(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % self.blocks.len() as u64) as usize
    }

    fn sector_of(&self, block: usize) -> u64 {
        self.base_sector + block as u64 * (self.config.block_bytes / SECTOR) as u64
    }

    fn expect(&self, block: usize) -> Expect {
        let Block { acked, issued } = self.blocks[block];
        Expect { volume: self.config.volume, sector: self.sector_of(block), acked, issued }
    }

    fn write(&mut self, block: usize) {
        self.version = self.version.next();
        let sector = self.sector_of(block);
        let stamp = Stamp {
            volume: self.config.volume,
            sector,
            writer: self.config.writer,
            version: self.version,
        };
        encode_block(stamp, &mut self.write_buf);
        self.blocks[block].issued = self.version;
        let done = self.disk.write_at(&self.write_buf, sector * SECTOR as u64);
        self.shared.completed();
        match done {
            Ok(()) => {
                self.blocks[block].acked = self.version;
                self.shared.writes.fetch_add(1, Relaxed);
            }
            Err(e) => self.shared.failed("write", sector, &e),
        }
        if self.config.flush_every > 0
            && self.version.sequence.is_multiple_of(self.config.flush_every)
        {
            let flushed = self.disk.flush();
            self.shared.completed();
            if let Err(e) = flushed {
                self.shared.failed("flush", sector, &e);
            }
        }
    }

    fn read(&mut self, block: usize) {
        // What was on the disk before this load is nobody's to judge.
        if self.blocks[block].acked == Version::NONE {
            return;
        }
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % self.slots.len();
        self.check_memory(slot);
        let expect = self.expect(block);
        let done = self.disk.read_at(&mut self.slots[slot].buf, expect.sector * SECTOR as u64);
        self.shared.completed();
        if let Err(e) = done {
            self.shared.failed("read", expect.sector, &e);
            return;
        }
        let verdict = check_block(&self.slots[slot].buf, &expect);
        self.shared.judge("disk", expect.sector, verdict, &expect);
        if let Verdict::Good(version) = verdict {
            self.slots[slot].holds = Some((expect.sector, version));
        }
    }

    /// Looks again at memory the disk filled earlier. The slot is then free.
    fn check_memory(&mut self, slot: usize) {
        let Some((sector, version)) = self.slots[slot].holds.take() else {
            return;
        };
        let expect = Expect { volume: self.config.volume, sector, acked: version, issued: version };
        let mut verdict = check_block(&self.slots[slot].buf, &expect);
        if let Verdict::Misplaced { .. } = verdict {
            // What the slot held before this block: the page went back in time.
            verdict = Verdict::Stale(Version::NONE);
        }
        self.shared.judge("memory of", sector, verdict, &expect);
    }
}

#[cfg(test)]
mod tests;
