//! What a storage server finds in its extent log after a crash.
//!
//! Held: what is replayed is a run of consecutive records after the checkpoint.
#![no_main]
// The files are shared with the server; a target has no use for the rest of them.
#![allow(dead_code, unreachable_pub)]

#[path = "../../storage-server/src/store"]
mod store {
    mod journal;
    mod layout;

    use journal::{Run, chain};
    use layout::{PoolHeader, Record};

    const POOL: layout::PoolId = [7; 16];

    fn run(raw: bool, bytes: &[u8]) -> Run {
        if raw {
            return Run::parse(bytes, &POOL);
        }
        // Records with right checksums, which chance would never make.
        let sealed: Vec<u8> = bytes
            .chunks_exact(4)
            .flat_map(|c| {
                let record = Record {
                    seq: u64::from(c[0]) % 32,
                    volume: u64::from(c[1]),
                    extent: u32::from(c[2]),
                    slot: u32::from(c[3]),
                };
                record.encode(&POOL)
            })
            .collect();
        Run::parse(&sealed, &POOL)
    }

    pub(super) fn fuzz(applied: u8, raw: bool, first: &[u8], second: &[u8]) {
        if let Some(head) = first.first_chunk() {
            let _ = PoolHeader::decode(head);
        }
        let applied = u64::from(applied) % 32;
        let replayed = chain(applied, &[run(raw, first), run(raw, second)]);
        for (expected, record) in (applied + 1..).zip(&replayed) {
            assert_eq!(record.seq, expected);
        }
    }
}

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, bool, &[u8], &[u8])| {
    let (applied, raw, first, second) = input;
    store::fuzz(applied, raw, first, second);
});
