//! The journal of map changes: two fixed files used in turn, and what is read back from them.
//!
//! One file takes records while the other is being applied to `meta.redb`; then they swap. A file is never truncated:
//! its next use writes over the old records from the start. Sequence numbers tell them apart, so nothing depends on
//! the filesystem ordering a truncation, and syncing a record never changes the file's size.
//! Knows nothing of volumes and slots; who writes when is decided in `core`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::layout::{PoolId, RECORD_BYTES, Record};

/// Records a file holds: 65,536 x 32 bytes = 2 MiB, journal of 64 GiB of first writes.
/// Small in tests, so that swaps and waits for a checkpoint happen all the time.
pub(super) const FILE_RECORDS: u32 = if cfg!(test) { 128 } else { 1 << 16 };
/// A file this full is swapped out and applied in the background, while the second half is room to go on meanwhile.
pub(super) const SWAP_RECORDS: u32 = FILE_RECORDS / 2;

#[derive(Debug)]
pub(super) struct Journal {
    files: [File; 2],
    pool_id: PoolId,
}

/// The records at the start of one file that belong together: valid, and numbered without a gap.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) records: Vec<Record>,
    /// The highest number of any valid record in the file, inside the run or behind it.
    pub(super) seq_max: u64,
}

impl Run {
    pub(super) fn parse(bytes: &[u8], pool_id: &PoolId) -> Self {
        let mut run = Self::default();
        let mut open = true;
        for bytes in bytes.as_chunks::<RECORD_BYTES>().0 {
            let record = Record::decode(bytes, pool_id);
            let seq = record.map(|r| r.seq);
            let expected = run.records.last().map(|r| r.seq.saturating_add(1));
            open &= seq.is_some() && expected.is_none_or(|e| seq == Some(e));
            if open {
                run.records.extend(record);
            }
            run.seq_max = run.seq_max.max(seq.unwrap_or(0));
        }
        run
    }

    fn first_seq(&self) -> Option<u64> {
        self.records.first().map(|r| r.seq)
    }

    pub(super) fn last_seq(&self) -> Option<u64> {
        self.records.last().map(|r| r.seq)
    }
}

/// The records after `applied`, oldest first, up to the first gap: a prefix of what was written.
pub(super) fn chain(applied: u64, runs: &[Run; 2]) -> Vec<Record> {
    let mut runs: Vec<&Run> = runs.iter().collect();
    runs.sort_by_key(|run| run.first_seq());
    let mut chain = Vec::new();
    let mut expected = applied.saturating_add(1);
    for record in runs.iter().flat_map(|run| &run.records) {
        if record.seq == expected {
            chain.push(*record);
            expected = expected.saturating_add(1);
        } else if record.seq > expected {
            break;
        }
    }
    chain
}

impl Journal {
    pub(super) fn new(files: [File; 2], pool_id: PoolId) -> Self {
        Self { files, pool_id }
    }

    /// Fills a new or shortened file with zeros, so that later writes neither need space nor change its size.
    pub(super) fn prepare(file: &File) -> io::Result<()> {
        let full = u64::from(FILE_RECORDS) * RECORD_BYTES as u64;
        let mut at = file.metadata()?.len();
        while at < full {
            let n = usize::try_from(full - at).map_or(4096, |left| left.min(4096));
            file.write_all_at(&[0; 4096][..n], at)?;
            at += n as u64;
        }
        Ok(())
    }

    /// Writes records at `index` of a file, into the page cache: survives the process, not the machine.
    pub(super) fn write(&self, file: usize, index: u32, records: &[Record]) -> io::Result<()> {
        let at = u64::from(index) * RECORD_BYTES as u64;
        if let [record] = records {
            return self.files[file].write_all_at(&record.encode(&self.pool_id), at);
        }
        let bytes: Vec<u8> =
            records.iter().flat_map(|record| record.encode(&self.pool_id)).collect();
        self.files[file].write_all_at(&bytes, at)
    }

    pub(super) fn sync(&self, file: usize) -> io::Result<()> {
        self.files[file].sync_data()
    }

    pub(super) fn read(&self, file: usize) -> io::Result<Run> {
        let mut bytes = vec![0; FILE_RECORDS as usize * RECORD_BYTES];
        let mut len = 0;
        loop {
            match self.files[file].read_at(&mut bytes[len..], len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Run::parse(&bytes[..len], &self.pool_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PoolId = [3; 16];

    fn records(seqs: impl IntoIterator<Item = u64>) -> Vec<Record> {
        let one = |seq| Record { seq, volume: 1, extent: 2, slot: 3 };
        seqs.into_iter().map(one).collect()
    }

    fn bytes(seqs: impl IntoIterator<Item = u64>) -> Vec<u8> {
        let records = records(seqs);
        records.iter().flat_map(|r| r.encode(&ID)).collect()
    }

    fn run(seqs: impl IntoIterator<Item = u64>) -> Run {
        Run::parse(&bytes(seqs), &ID)
    }

    #[test]
    fn every_cut_and_every_broken_byte_leaves_a_prefix() {
        let whole = bytes(10..20);
        for cut in 0..whole.len() {
            let run = Run::parse(&whole[..cut], &ID);
            let full = (cut / RECORD_BYTES) as u64;
            assert_eq!(run.records, records(10..10 + full), "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            let run = Run::parse(&bad, &ID);
            let full = (at / RECORD_BYTES) as u64;
            assert_eq!(run.records, records(10..10 + full), "byte {at}");
            let last = if full == 9 { 18 } else { 19 };
            assert_eq!(run.seq_max, last, "records behind the break are still noticed");
        }
    }

    #[test]
    fn older_records_behind_newer_ones_end_a_run() {
        let reused = run([100, 101, 12, 13]);
        assert_eq!(reused.records, records([100, 101]));
        assert_eq!(reused.seq_max, 101);
        assert_eq!(run([12, 13, 102, 103]).records, records([12, 13]));
    }

    #[test]
    fn chains_go_over_both_files_in_order() {
        let seqs = |applied, a: Run, b: Run| -> Vec<u64> {
            let there = chain(applied, &[a.clone(), b.clone()]);
            assert_eq!(there, chain(applied, &[b, a]), "which file is which does not matter");
            there.iter().map(|r| r.seq).collect()
        };
        assert_eq!(seqs(0, run([]), run([])), [0u64; 0]);
        assert_eq!(seqs(0, run(1..4), run([])), [1, 2, 3]);
        assert_eq!(seqs(3, run(1..4), run(4..6)), [4, 5], "the first file is applied");
        assert_eq!(seqs(0, run(1..4), run(4..6)), [1, 2, 3, 4, 5]);
        assert_eq!(seqs(0, run(1..3), run(4..6)), [1, 2], "3 is lost, so is all after it");
        assert_eq!(seqs(0, run(2..4), run([])), [0u64; 0], "1 is lost");
        assert_eq!(seqs(2, run(1..6), run([])), [3, 4, 5]);
        assert_eq!(seqs(9, run(1..6), run(6..8)), [0u64; 0]);
    }
}
