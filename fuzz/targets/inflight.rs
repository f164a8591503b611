//! What a front-end hands a restarted back-end as its table of requests in flight.
//!
//! Held: each head is inside the ring and comes once, and a table that this process wrote is read back as it was.
#![no_main]

use baton_backend::inflight::{InflightRegion, InflightRing};
use baton_backend::vhost_user::message::InflightDescription;
use libfuzzer_sys::fuzz_target;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

const SIZE: u16 = 16;
/// Two rings of 16 and the trailer.
const REGION_BYTES: usize = 2 * 320 + 64;

type Made = (Arc<InflightRegion>, std::fs::File, InflightDescription);

fn region() -> &'static Made {
    static REGION: OnceLock<Made> = OnceLock::new();
    REGION.get_or_init(|| {
        // Small, without the parts for larger rings: all of it is written anew for each input.
        let (_, fd, made) = InflightRegion::create(2, SIZE).expect("region");
        let description = InflightDescription { mmap_size: REGION_BYTES as u64, ..made };
        let file = std::fs::File::from(fd);
        file.set_len(0).expect("cut");
        file.set_len(REGION_BYTES as u64).expect("cut");
        let fd: OwnedFd = file.try_clone().expect("dup").into();
        (Arc::new(InflightRegion::map(&fd, description).expect("map")), file, description)
    })
}

fn resumed(ring: &mut InflightRing, used_idx: u16) -> Vec<u16> {
    let heads = ring.resume(used_idx);
    let mut seen = heads.clone();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), heads.len(), "a head twice");
    assert!(heads.iter().all(|head| *head < SIZE));
    heads
}

fuzz_target!(|input: (u16, u8, InflightNumbers, &[u8], &[u8])| {
    let (used_idx, ring, numbers, table, requests) = input;
    let (region, file, _) = region();
    // Any description of the region, most of them wrong.
    let (mmap_size, mmap_offset, num_queues, queue_size) = numbers;
    let fd: OwnedFd = file.try_clone().expect("dup").into();
    let lie = InflightDescription {
        mmap_size: u64::from(mmap_size),
        mmap_offset: u64::from(mmap_offset),
        num_queues,
        queue_size,
    };
    let mut bytes = [0; REGION_BYTES];
    let len = table.len().min(bytes.len());
    bytes[..len].copy_from_slice(&table[..len]);
    file.write_all_at(&bytes, 0).expect("write");
    if let Ok(mapped) = InflightRegion::map(&fd, lie)
        && let Some(mut other) = Arc::new(mapped).ring(u16::from(ring), used_idx)
    {
        other.resume(used_idx);
    }
    file.write_all_at(&bytes, 0).expect("write");
    let mut ring = region.ring(u16::from(ring % 2), SIZE).expect("a ring");
    let mut in_flight = resumed(&mut ring, used_idx);
    // Then it is used, and read by a successor.
    let mut used_idx = used_idx;
    for byte in requests {
        let head = u16::from(byte % 16);
        if let Some(at) = in_flight.iter().position(|busy| *busy == head) {
            in_flight.remove(at);
            ring.link(head);
            used_idx = used_idx.wrapping_add(1);
            // A kill falls before or after the marks are cleared.
            if byte & 0x80 == 0 {
                ring.published([head].into_iter(), used_idx);
            } else {
                break;
            }
        } else if byte & 0x40 == 0 {
            ring.take(head);
            in_flight.push(head);
        }
    }
    let mut again = resumed(&mut ring, used_idx);
    again.sort_unstable();
    in_flight.sort_unstable();
    assert_eq!(again, in_flight);
});

type InflightNumbers = (u16, u16, u16, u16);
