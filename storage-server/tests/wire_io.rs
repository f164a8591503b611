//! Data over the wire, whichever way reads go.

mod common;

use baton_protocol::frame::{FLAG_UNMAP, PAYLOAD_BYTES_MAX};
use baton_protocol::{Opcode, RequestHeader, Status};
use common::{ALL_READS, Client, Fixture, Reads, greeting, json, metric};

const EXTENT: u64 = 1 << 20;
const SIZE: u64 = 64 << 20;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|n| (n.wrapping_mul(31) ^ seed.wrapping_mul(7) ^ (n >> 8)).to_le_bytes()[0])
        .collect()
}

#[test]
fn what_was_written_is_read() {
    for reads in ALL_READS {
        let fixture = Fixture::reading(reads);
        fixture.create("d", SIZE);
        let mut owner = fixture.owner("d", "h", 1);
        assert_eq!(owner.read(0, 4096), [0; 4096], "holes are zeros");
        // Inside an extent, over its end, the largest, from hole to data.
        for (seed, offset, len) in [
            (1, 512, 512),
            (2, EXTENT - 512, 1024),
            (3, 3 * EXTENT - 4096, PAYLOAD_BYTES_MAX as usize),
            (4, 9 * EXTENT, 131_072),
        ] {
            let data = pattern(seed, len);
            assert_eq!(owner.write(offset, &data), Status::Ok, "{reads:?}");
            assert!(owner.read(offset, len as u64) == data, "{reads:?} {offset}+{len}");
        }
        let across = owner.read(9 * EXTENT - 512, 1024);
        assert_eq!(across[..512], [0; 512]);
        assert_eq!(across[512..], pattern(4, 512));
        let [cold, mapped] = ["baton_cold_reads_total", "baton_mapped_reads_total"]
            .map(|name| metric(fixture.admin, name) > 0);
        let expected =
            (matches!(reads, Reads::Uring | Reads::Threads), matches!(reads, Reads::Hot));
        assert_eq!((cold, mapped), expected, "{reads:?}: the path under test was taken");
    }
}

/// The client does not take its answers until the socket is full, so that large ones go in parts, and what is left of one
/// is kept by the server. By then another volume has the space.
#[test]
fn what_the_socket_did_not_take_is_not_another_volumes_data() {
    for reads in [Reads::Hot, Reads::Copied] {
        let fixture = Fixture::reading(reads);
        fixture.create("d", SIZE);
        fixture.create("other", SIZE);
        let mut owner = fixture.owner("d", "h", 1);
        let data: Vec<Vec<u8>> = (0..16).map(|n| pattern(n, 1 << 20)).collect();
        for (n, data) in (0..).zip(&data) {
            assert_eq!(owner.write(n * EXTENT, data), Status::Ok);
        }
        let asked: Vec<_> = (0..16).map(|n| owner.send(Opcode::Read, n * EXTENT, EXTENT)).collect();
        // It has answered what it could once its counter stands still: for a tenth of a second, since a worker that
        // waits for a CPU looks the same.
        let (mut answered, mut still) = (0, 0);
        common::wait_for("a full socket", || {
            let before = answered;
            answered = metric(fixture.admin, "baton_read_bytes_total");
            still = if answered > 0 && answered == before { still + 1 } else { 0 };
            still >= 20
        });
        let mapped = metric(fixture.admin, "baton_mapped_reads_total");
        assert_eq!(
            mapped > 0,
            matches!(reads, Reads::Hot),
            "{reads:?}: the path under test was taken"
        );
        let mut second = greeting("d", "h", 1);
        second.queue = 1;
        let (mut second, _) = Client::greet(fixture.data, &second).expect("welcomed");
        assert_eq!(second.call(Opcode::Discard, 0, SIZE).0, Status::Ok);
        assert_eq!(second.call(Opcode::Flush, 0, 0).0, Status::Ok, "the space is free");
        let mut other = fixture.owner("other", "o", 2);
        for n in 0..32 {
            assert_eq!(other.write(n * EXTENT, &[0xee; 1 << 20]), Status::Ok);
        }
        let mut whole = 0;
        for _ in &asked {
            let (header, body) = owner.reply();
            let n = usize::try_from(header.seq.0 - asked[0]).expect("one of them");
            assert_eq!(header.status, Status::Ok);
            let zeros = body.iter().all(|byte| *byte == 0);
            assert!(
                body == data[n] || zeros,
                "{reads:?}: answer {n} is neither the old data nor the new"
            );
            whole += usize::from(!zeros);
        }
        assert!(whole > 0, "{reads:?}: some were answered before the discard");
        assert!(whole < asked.len(), "{reads:?}: the socket was never full");
    }
}

/// Random operations against an array, many in flight at once on different places.
#[test]
fn agrees_with_an_array_under_a_deep_queue() {
    for reads in ALL_READS {
        let fixture = Fixture::reading(reads);
        fixture.create("d", SIZE);
        let mut owner = fixture.owner("d", "h", 1);
        let mut model = vec![0u8; 16 << 20];
        let mut state = 12345u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for round in 0..60 {
            // Sixteen lanes of 1 MiB: requests of a batch do not overlap.
            let mut expected = Vec::new();
            for lane in 0..16u64 {
                let within = random(2048) * 512;
                let len = (1 + random(512)) * 512;
                let offset = lane * EXTENT + within.min(EXTENT - len);
                let range = usize::try_from(offset).expect("small")
                    ..usize::try_from(offset + len).expect("small");
                match random(5) {
                    0 | 1 => {
                        let data = pattern(round * 100 + lane, range.len());
                        owner.send_write(offset, &data);
                        model[range].copy_from_slice(&data);
                        expected.push((owner.seq, Vec::new()));
                    }
                    2 => {
                        let mut header = owner.header(Opcode::WriteZeroes, offset, len);
                        header.flags = if random(2) == 0 { FLAG_UNMAP } else { 0 };
                        owner.raw(&header.encode());
                        model[range].fill(0);
                        expected.push((owner.seq, Vec::new()));
                    }
                    _ => {
                        owner.send(Opcode::Read, offset, len);
                        expected.push((owner.seq, model[range].to_vec()));
                    }
                }
            }
            let mut got: Vec<_> = (0..16)
                .map(|_| {
                    let (header, body) = owner.reply();
                    assert_eq!(header.status, Status::Ok);
                    (header.seq.0, body)
                })
                .collect();
            got.sort();
            assert!(got == expected, "{reads:?} round {round}");
        }
    }
}

#[test]
fn discards_give_space_back_even_huge_ones() {
    let fixture = Fixture::start();
    fixture.create("d", 1 << 40);
    let mut owner = fixture.owner("d", "h", 1);
    let pool = || json(&common::http(fixture.admin, "GET", "/v1/pool", "").1);
    for extent in 0..8 {
        assert_eq!(owner.write(extent * EXTENT, &[5; 4096]), Status::Ok);
    }
    assert_eq!(pool()["allocated_bytes"], 8 * EXTENT);
    // On the spot, then by the pool's threads.
    assert_eq!(owner.call(Opcode::Discard, 0, 4 * EXTENT).0, Status::Ok);
    assert_eq!(pool()["allocated_bytes"], 4 * EXTENT);
    assert_eq!(owner.call(Opcode::Discard, 0, 1 << 40).0, Status::Ok);
    assert_eq!(pool()["allocated_bytes"], 0);
    assert_eq!(owner.read(7 * EXTENT, 4096), [0; 4096]);
}

/// A full pool refuses what needs space and nothing else.
#[test]
fn a_full_pool_goes_on() {
    let fixture = Fixture::with(&["--pool-size", "4M"], |_| ());
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "h", 1);
    for extent in 0..4u8 {
        assert_eq!(owner.write(u64::from(extent) * EXTENT, &[extent; 512]), Status::Ok);
    }
    assert_eq!(owner.write(4 * EXTENT, &[4; 512]), Status::NoSpace);
    assert_eq!(owner.write(3 * EXTENT, &[33; 512]), Status::Ok, "overwrites go on");
    assert_eq!(owner.read(3 * EXTENT, 512), [33; 512]);
    assert_eq!(owner.call(Opcode::Flush, 0, 0).0, Status::Ok);
    assert_eq!(owner.read(4 * EXTENT, 512), [0; 512], "nothing half-made");
    assert_eq!(owner.call(Opcode::Discard, 0, EXTENT).0, Status::Ok, "discards go on");
    assert_eq!(owner.write(4 * EXTENT, &[4; 512]), Status::Ok, "freed space is usable");
    assert_eq!(owner.read(0, 512), [0; 512]);
    // A refused write is not remembered as done: sent again, it runs again.
    let mut header = owner.header(Opcode::Write, 9 * EXTENT, 512);
    header.payload_len = 512;
    let bytes = [&header.encode()[..], &[9; 512]].concat();
    owner.raw(&bytes);
    assert_eq!(owner.answer(header.seq.0).0, Status::NoSpace);
    assert_eq!(owner.call(Opcode::Discard, EXTENT, EXTENT).0, Status::Ok);
    owner.raw(&bytes);
    assert_eq!(owner.answer(header.seq.0).0, Status::Ok);
    assert_eq!(owner.read(9 * EXTENT, 512), [9; 512]);
}

/// A request that took effect and whose answer was lost comes again on the next
/// connection: it is answered and not run a second time.
#[test]
fn a_resent_write_does_not_run_twice() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut old = fixture.owner("d", "h", 1);
    assert_eq!(old.write(0, &[1; 512]), Status::Ok);
    assert_eq!(old.write(0, &[2; 512]), Status::Ok);
    let mut hello = greeting("d", "h", 1);
    hello.epoch = 1;
    let (mut new, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert!(old.is_closed(), "the old connection is dead");
    // To the client both are unanswered; the first must not cover the second.
    for (seq, byte) in [(1, 1u8), (2, 2)] {
        let header = RequestHeader { payload_len: 512, ..new.header(Opcode::Write, 0, 512) };
        assert_eq!(header.seq.0, seq);
        new.raw(&[&header.encode()[..], &[byte; 512]].concat());
        assert_eq!(new.answer(seq).0, Status::Ok);
        assert_eq!(read_at(&fixture, 0), [2; 512], "after seq {seq}");
    }
    // A new one runs.
    assert_eq!(new.write(0, &[3; 512]), Status::Ok);
    assert_eq!(read_at(&fixture, 0), [3; 512]);
}

fn read_at(fixture: &Fixture, offset: u64) -> Vec<u8> {
    let mut buffer = vec![0; 512];
    fixture.volume("d").data.read(offset, &mut buffer).expect("read");
    buffer
}

#[test]
fn flushes_that_wait_together_are_answered_together() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "h", 1);
    let mut all = Vec::new();
    for _ in 0..1000 {
        all.extend_from_slice(&owner.header(Opcode::Flush, 0, 0).encode());
    }
    owner.raw(&all);
    for _ in 0..1000 {
        assert_eq!(owner.reply().0.status, Status::Ok);
    }
    let syncs = metric(fixture.admin, "baton_flush_seconds_count");
    assert_eq!(metric(fixture.admin, "baton_flush_requests_total"), 1000);
    assert!(syncs < 500, "{syncs} syncs for 1000 flushes");
}
