//! "An acknowledged write survives a kill of the storage server": a real process, killed with SIGKILL at random moments.
//!
//! The child runs operations 0, 1, 2, ... on a data directory, each a pure function of its number, and stores the
//! number of acknowledged ones in a file with `pwrite`. The parent kills it, opens the directory and compares with a
//! model that ran exactly the acknowledged operations; of the one that was under way either outcome is right.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_storage_server::store::{EXTENT_BYTES, PoolConfig, Store, Volume};

const CHILD_DIR: &str = "BATON_TEST_STORE_DIR";
const SIZE: u64 = 12 * EXTENT_BYTES;
const ACKED: &str = "acked";

enum Op {
    Write { offset: u64, len: u64, byte: u8 },
    Discard { extent: u64 },
    Zero { offset: u64, len: u64 },
    Sync,
}

fn op(number: u64) -> Op {
    let mut dice = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    dice ^= dice >> 29;
    dice = dice.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    dice ^= dice >> 32;
    let offset = (dice >> 8) % (SIZE / 512) * 512;
    let len = ((dice >> 40) % 40 + 1) * 512;
    let len = len.min(SIZE - offset);
    match dice % 64 {
        0 => Op::Sync,
        1..16 => Op::Discard { extent: offset / EXTENT_BYTES },
        16..20 => Op::Zero { offset, len },
        _ => Op::Write { offset, len, byte: u8::try_from(number % 255 + 1).unwrap() },
    }
}

impl Op {
    fn range(&self) -> std::ops::Range<usize> {
        let (offset, len) = match *self {
            Self::Write { offset, len, .. } | Self::Zero { offset, len } => (offset, len),
            Self::Discard { extent } => (extent * EXTENT_BYTES, EXTENT_BYTES),
            Self::Sync => (0, 0),
        };
        let from = usize::try_from(offset).unwrap();
        from..from + usize::try_from(len).unwrap()
    }

    fn apply(&self, model: &mut [u8]) {
        let byte = if let Self::Write { byte, .. } = self { *byte } else { 0 };
        model[self.range()].fill(byte);
    }

    fn run(&self, store: &Store, volume: &Volume) {
        match *self {
            Self::Write { offset, len, byte } => {
                let data = vec![byte; usize::try_from(len).unwrap()];
                volume.write(offset, &data).unwrap();
            }
            Self::Discard { extent } => {
                volume.discard(extent * EXTENT_BYTES, EXTENT_BYTES).unwrap();
            }
            Self::Zero { offset, len } => volume.write_zeroes(offset, len, true).unwrap(),
            Self::Sync => store.sync().unwrap(),
        }
    }
}

fn open(dir: &Path) -> Arc<Store> {
    let config = PoolConfig { capacity_bytes: None, reserve_bytes: 0 };
    Store::open(&dir.join("data"), config).unwrap()
}

fn acked(dir: &Path) -> u64 {
    let mut bytes = [0; 8];
    let file = File::open(dir.join(ACKED)).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
#[ignore = "the child process of the test below"]
fn child() {
    let dir = std::env::var_os(CHILD_DIR).expect("run by the test below");
    let dir = Path::new(&dir);
    let store = open(dir);
    let volume = store.volume("v").unwrap();
    let file = File::options().write(true).open(dir.join(ACKED)).unwrap();
    let mut number = acked(dir);
    loop {
        op(number).run(&store, &volume);
        number += 1;
        file.write_all_at(&number.to_le_bytes(), 0).unwrap();
    }
}

#[test]
fn acknowledged_operations_survive_kills() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join(ACKED), 0u64.to_le_bytes()).unwrap();
    open(dir).create_volume("v", SIZE).unwrap();
    let mut model = vec![0u8; usize::try_from(SIZE).unwrap()];
    let mut modelled = 0;
    for round in 0..12u64 {
        let log = File::create(dir.join("child.log")).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env(CHILD_DIR, dir)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        // Every round gets further than the last, and is killed wherever it is when we notice.
        let wanted = modelled + 1 + round * round * 60;
        let begun = Instant::now();
        while acked(dir) < wanted {
            let log = || std::fs::read_to_string(dir.join("child.log")).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "child died: {}", log());
            assert!(begun.elapsed().as_secs() < 120, "child hangs: {}", log());
            std::thread::sleep(Duration::from_micros(300));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let acked = acked(dir);
        for number in modelled..acked {
            op(number).apply(&mut model);
        }
        modelled = acked;
        let store = open(dir);
        store.check().unwrap();
        let volume = store.volume("v").unwrap();
        let mut seen = vec![0xEE; model.len()];
        volume.read(0, &mut seen).unwrap();
        // The next child runs the cut-off operation again.
        let cut_off = op(acked).range();
        seen[cut_off.clone()].copy_from_slice(&model[cut_off]);
        let wrong = seen.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "round {round} after {acked} operations");
        if round % 4 == 3 {
            store.close().unwrap();
        }
    }
}
