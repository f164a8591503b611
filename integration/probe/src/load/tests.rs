//! The load against disks that lie: every kind of lie must be found, and an honest disk must pass.

use super::*;
use std::io;
use std::sync::atomic::AtomicUsize;

#[derive(Clone, Copy, PartialEq)]
enum Lie {
    None,
    DropWrite,
    WriteElsewhere,
    TearWrite,
    FlipBit,
    ReadZeros,
    FailRead,
    FailFlush,
    Stall,
}

/// A disk in memory that lies once, on its `nth` request.
struct Liar {
    lie: Lie,
    count: AtomicUsize,
    nth: usize,
    bytes: Mutex<Vec<u8>>,
}

impl Liar {
    fn due(&self) -> bool {
        self.count.fetch_add(1, Relaxed) == self.nth
    }
}

impl Disk for Liar {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let read_lie =
            matches!(self.lie, Lie::FlipBit | Lie::ReadZeros | Lie::FailRead | Lie::Stall);
        let due = read_lie && self.due();
        let at = usize::try_from(at).unwrap();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        match self.lie {
            Lie::FlipBit if due => buf[700] ^= 4,
            Lie::ReadZeros if due => buf.fill(0),
            Lie::FailRead if due => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Lie::Stall if due => std::thread::sleep(Duration::from_millis(120)),
            _ => {}
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        let write_lie = matches!(self.lie, Lie::DropWrite | Lie::WriteElsewhere | Lie::TearWrite);
        let due = write_lie && self.due();
        let mut at = usize::try_from(at).unwrap();
        let mut len = buf.len();
        match self.lie {
            Lie::DropWrite if due => return Ok(()),
            Lie::WriteElsewhere if due => at = if at == 0 { buf.len() } else { 0 },
            Lie::TearWrite if due => len /= 2,
            _ => {}
        }
        self.bytes.lock().unwrap()[at..at + len].copy_from_slice(&buf[..len]);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.lie == Lie::FailFlush && self.due() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

fn run(lie: Lie) -> (Totals, Vec<String>) {
    let config = LoadConfig {
        workers: 1,
        blocks_per_worker: 16,
        slots: 4,
        flush_every: 3,
        ..LoadConfig::default()
    };
    let bytes = Mutex::new(vec![0; 16 * config.block_bytes]);
    let disk: Arc<dyn Disk> = Arc::new(Liar { lie, count: AtomicUsize::new(0), nth: 40, bytes });
    let load = Load::start(&[disk], &config);
    let deadline = Instant::now() + Duration::from_secs(20);
    while load.totals().ops < 2000 && Instant::now() < deadline {
        std::thread::yield_now();
        let t = load.totals();
        // After an error the load slows down; the lie has then been seen.
        if t.errs + t.stale + t.corrupt > 0 {
            break;
        }
    }
    load.stop()
}

#[test]
fn an_honest_disk_passes() {
    let (totals, findings) = run(Lie::None);
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0), "{findings:?}");
    assert!(totals.ops >= 2000, "{totals}");
    // Every write is read back, and another block is read.
    assert!(totals.writes > totals.ops / 5 && totals.writes < totals.ops / 2, "{totals}");
}

#[test]
fn lost_data_counts_as_stale() {
    for lie in [Lie::DropWrite, Lie::ReadZeros] {
        let (totals, findings) = run(lie);
        assert!(totals.stale > 0 && totals.corrupt == 0, "{totals} {findings:?}");
        assert!(!findings.is_empty());
    }
}

#[test]
fn wrong_data_counts_as_corrupt() {
    for lie in [Lie::TearWrite, Lie::FlipBit] {
        let (totals, findings) = run(lie);
        assert!(totals.corrupt > 0, "{totals} {findings:?}");
    }
    // The block that should have been written is stale, the one that was is misplaced.
    let (totals, findings) = run(Lie::WriteElsewhere);
    assert!(totals.stale + totals.corrupt > 0, "{totals} {findings:?}");
}

#[test]
fn failed_requests_are_counted_and_named() {
    for (lie, word) in [(Lie::FailRead, "read"), (Lie::FailFlush, "flush")] {
        let (totals, findings) = run(lie);
        assert!(totals.errs > 0, "{totals}");
        assert!(findings[0].starts_with(word), "{findings:?}");
    }
}

#[test]
fn a_stall_shows_as_the_longest_gap() {
    let (totals, _) = run(Lie::Stall);
    assert!(totals.max_gap_ms >= 120, "{totals}");
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0));
}

#[test]
fn memory_that_goes_back_in_time_is_found() {
    let config =
        LoadConfig { workers: 1, blocks_per_worker: 16, slots: 2, ..LoadConfig::default() };
    let bytes = Mutex::new(vec![0; 16 * config.block_bytes]);
    let disk: Arc<dyn Disk> =
        Arc::new(Liar { lie: Lie::None, count: AtomicUsize::new(0), nth: 0, bytes });
    let load = Load { shared: Arc::clone(&shared()), workers: Vec::new() };
    let mut worker = Worker::new(0, disk, Arc::clone(&load.shared), config);
    worker.write(3);
    worker.read(3);
    let before = worker.slots[0].buf.to_vec();
    worker.write(3);
    worker.read(3);
    // The page of slot 1 is lost on the way to another host: it is what it was before the read.
    worker.slots[1].buf.copy_from_slice(&before);
    worker.check_memory(0);
    assert_eq!(load.totals().stale, 0);
    worker.check_memory(1);
    assert_eq!(load.totals().stale, 1);
}

fn shared() -> Arc<Shared> {
    Arc::new(Shared {
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
    })
}
