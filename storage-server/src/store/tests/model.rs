//! Random operations against a slow oracle: a volume is a `Vec<u8>`.

use proptest::prelude::*;

use super::*;
use crate::store::{Segment, VolumeError};

const SIZE: u64 = 6 * MIB - 1024;
const GROWN: u64 = 7 * MIB + 512;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64, u8),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    Read(u64, u64),
    Grow,
    Sync,
    Close,
    /// Goes on with what a kill of the process leaves.
    Kill,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let border = prop::sample::select(vec![0, MIB, 2 * MIB, 4096, MIB - 4096, 3 * MIB + 512]);
    let offset = prop_oneof![0..GROWN, border.clone(), (1..7u64).prop_map(|e| e * MIB)];
    let len = prop_oneof![0..9000u64, border, Just(u64::MAX)];
    (offset, len)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 1..=255u8).prop_map(|((o, l), b)| Op::Write(o, l, b)),
        4 => range().prop_map(|(o, l)| Op::Discard(o, l)),
        4 => (range(), any::<bool>()).prop_map(|((o, l), u)| Op::Zero(o, l, u)),
        4 => range().prop_map(|(o, l)| Op::Read(o, l)),
        1 => Just(Op::Grow),
        1 => Just(Op::Sync),
        1 => Just(Op::Close),
        2 => Just(Op::Kill),
    ]
}

/// What `discard` promises of every byte of the range: zero, or as it was where no whole page is covered.
fn oracle_discard(bytes: &mut [u8], from: usize, to: usize) {
    let (mib, page) = (1 << 20, 4096);
    let mut at = from;
    while at < to {
        let extent = at / mib * mib;
        let end = (extent + mib).min(bytes.len());
        let stop = to.min(end);
        if at == extent && stop == end {
            bytes[at..stop].fill(0);
        } else {
            let (first, last) = (at.next_multiple_of(page), stop / page * page);
            if first < last {
                bytes[first..last].fill(0);
            }
        }
        at = stop;
    }
}

fn planned(store: &Store, volume: &Arc<Volume>, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::from(store.pool_fd().try_clone_to_owned().unwrap());
    let plan = volume.plan_read(offset, len).unwrap();
    let mut bytes = Vec::new();
    for segment in plan.segments() {
        let mut part = vec![0; segment.len()];
        if let Segment::Data { pool_offset, .. } = segment {
            file.read_exact_at(&mut part, pool_offset).unwrap();
        }
        bytes.extend(part);
    }
    bytes
}

fn run(ops: Vec<Op>) {
    let (mut dir, mut store, mut volume) = with_volume(8, SIZE);
    let mut model = vec![0u8; usize::try_from(SIZE).unwrap()];
    for op in ops {
        let clip = |offset: u64, len: u64| {
            let size = model.len() as u64;
            let offset = offset.min(size);
            (offset, len.min(size - offset))
        };
        let span = |offset: u64, len: u64| {
            let from = usize::try_from(offset).unwrap();
            from..from + usize::try_from(len).unwrap()
        };
        match op {
            Op::Write(offset, len, byte) => {
                let (offset, len) = clip(offset, len);
                let span = span(offset, len);
                volume.write(offset, &vec![byte; span.len()]).unwrap();
                model[span].fill(byte);
            }
            Op::Discard(offset, len) => {
                let (offset, len) = clip(offset, len);
                let span = span(offset, len);
                volume.discard(offset, len).unwrap();
                oracle_discard(&mut model, span.start, span.end);
            }
            Op::Zero(offset, len, unmap) => {
                let (offset, len) = clip(offset, len);
                let before = volume.info().allocated_bytes;
                volume.write_zeroes(offset, len, unmap).unwrap();
                let after = volume.info().allocated_bytes;
                assert!(if unmap { after <= before } else { after == before });
                model[span(offset, len)].fill(0);
            }
            Op::Read(offset, len) => {
                let (offset, len) = clip(offset, len);
                let span = span(offset, len);
                assert!(read(&volume, offset, span.len()) == model[span.clone()]);
                assert!(planned(&store, &volume, offset, span.len()) == model[span.clone()]);
                let mut now = vec![0xEE; span.len()];
                if volume.try_read(offset, &mut now).unwrap() {
                    assert!(now == model[span]);
                }
            }
            Op::Grow => {
                store.resize_volume("v", GROWN).unwrap();
                model.resize(usize::try_from(GROWN).unwrap(), 0);
                let shrink = store.resize_volume("v", SIZE);
                assert!(matches!(shrink, Err(VolumeError::ShrinkRefused { current: GROWN, .. })));
            }
            Op::Sync => store.sync().unwrap(),
            Op::Close => {
                store.close().unwrap();
                assert_eq!(store.usage().log_records, 0);
            }
            Op::Kill => {
                let killed = snapshot(dir.path());
                drop((store, volume));
                dir = killed;
                store = open(dir.path(), 8);
                volume = store.volume("v").unwrap();
                assert!(read(&volume, 0, model.len()) == model);
            }
        }
        store.check().unwrap();
        assert_eq!(volume.size_bytes(), model.len() as u64);
    }
    assert!(read(&volume, 0, model.len()) == model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn a_volume_is_its_bytes(ops in prop::collection::vec(op(), 1..40)) {
        run(ops);
    }
}
