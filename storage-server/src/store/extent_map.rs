//! One volume's map from extent to slot, readable and pinnable without a lock.
//!
//! Three fixed levels (512 x 512 x 4096 = 2^30 extents = 1 PiB) made on demand: growing a volume changes nothing here,
//! an empty volume of any size costs the 8 KiB root, and 4 GiB that hold any data cost 32 KiB.
//! Does not know files, slots' contents or the journal.
//!
//! An entry is one `AtomicU64`: slot in the upper 32 bits (0 = hole), pins in the lower 32. Invariants:
//! - a pin is taken only on a mapped entry, and a pinned entry keeps its slot;
//! - `map` and `unmap` are called under the pool's state lock, so they never race with each other, only with pins.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of the three levels.
const ROOT: u32 = 512;
const NODE: u32 = 512;
const CHUNK: u32 = 4096;

type Chunk = Box<[AtomicU64]>;
type Node = Box<[OnceLock<Chunk>]>;

#[derive(Debug)]
pub(super) struct ExtentMap {
    root: Box<[OnceLock<Node>]>,
}

/// What `unmap` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmapped {
    Slot(u32),
    Pinned,
    Hole,
}

fn slot_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

#[allow(clippy::cast_possible_truncation, reason = "the pins are the lower 32 bits")]
fn pins_of(entry: u64) -> u32 {
    entry as u32
}

fn empty<T>(len: u32) -> Box<[OnceLock<T>]> {
    (0..len).map(|_| OnceLock::new()).collect()
}

fn split(extent: u32) -> (usize, usize, usize) {
    let root = extent / (NODE * CHUNK);
    let node = extent / CHUNK % NODE;
    (root as usize, node as usize, (extent % CHUNK) as usize)
}

impl ExtentMap {
    pub(super) fn new() -> Self {
        Self { root: empty(ROOT) }
    }

    fn entry(&self, extent: u32) -> Option<&AtomicU64> {
        let (root, node, chunk) = split(extent);
        self.root.get(root)?.get()?[node].get().map(|c| &c[chunk])
    }

    /// Pins the extent and says its slot; `None` for a hole. Undo with `unpin`.
    pub(super) fn pin(&self, extent: u32) -> Option<u32> {
        let entry = self.entry(extent)?;
        let mut now = entry.load(Ordering::Relaxed);
        loop {
            if slot_of(now) == 0 {
                return None;
            }
            // Acquire pairs with the release in `map`: the slot is journaled and zero before we touch it.
            match entry.compare_exchange_weak(now, now + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(slot_of(now)),
                Err(seen) => now = seen,
            }
        }
    }

    /// Gives a pin back; true if it was the last.
    pub(super) fn unpin(&self, extent: u32) -> bool {
        let Some(entry) = self.entry(extent) else {
            debug_assert!(false, "a pinned extent has an entry");
            return false;
        };
        // SeqCst: see `Volume::unpin`, which looks at the deleted flag next.
        let before = entry.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(pins_of(before) > 0, "unpin without a pin");
        pins_of(before) == 1
    }

    /// Puts `slot` behind a hole, with `pins` pins for the caller.
    pub(super) fn map(&self, extent: u32, slot: u32, pins: u32) {
        let (root, node, chunk) = split(extent);
        let node = &self.root[root].get_or_init(|| empty(NODE))[node];
        let entry = &node.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect())[chunk];
        let before = entry.swap(u64::from(slot) << 32 | u64::from(pins), Ordering::AcqRel);
        debug_assert_eq!(before, 0, "only a hole is mapped");
    }

    /// Makes a hole unless somebody uses the extent.
    pub(super) fn unmap(&self, extent: u32) -> Unmapped {
        let Some(entry) = self.entry(extent) else {
            return Unmapped::Hole;
        };
        let now = entry.load(Ordering::SeqCst);
        if slot_of(now) == 0 {
            return Unmapped::Hole;
        }
        let free = u64::from(slot_of(now)) << 32;
        match entry.compare_exchange(free, 0, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Unmapped::Slot(slot_of(now)),
            Err(_) => Unmapped::Pinned,
        }
    }

    /// Appends mapped extents of `from..to` to `found` until it holds `max`; returns where to go on.
    /// Skips parts of the map that were never made without looking at their extents.
    pub(super) fn collect_mapped(
        &self,
        from: u32,
        to: u32,
        max: usize,
        found: &mut Vec<u32>,
    ) -> u32 {
        let mut at = from;
        while at < to && found.len() < max {
            let (root, node, chunk) = split(at);
            let Some(nodes) = self.root.get(root).and_then(OnceLock::get) else {
                at = next_multiple(at, NODE * CHUNK, to);
                continue;
            };
            let Some(entries) = nodes[node].get() else {
                at = next_multiple(at, CHUNK, to);
                continue;
            };
            let end = next_multiple(at, CHUNK, to);
            for entry in &entries[chunk..chunk + (end - at) as usize] {
                if found.len() == max {
                    return at;
                }
                if slot_of(entry.load(Ordering::Relaxed)) != 0 {
                    found.push(at);
                }
                at += 1;
            }
        }
        at
    }

    /// (extent, slot, pins) of every mapped extent, for checks.
    pub(super) fn for_each(&self, mut visit: impl FnMut(u32, u32, u32)) {
        let mut first = 0u32;
        for node in &self.root {
            for chunk in node.get().into_iter().flatten() {
                for (extent, entry) in (first..).zip(chunk.get().into_iter().flatten()) {
                    let entry = entry.load(Ordering::Relaxed);
                    if slot_of(entry) != 0 {
                        visit(extent, slot_of(entry), pins_of(entry));
                    }
                }
                first += CHUNK;
            }
            if node.get().is_none() {
                first += NODE * CHUNK;
            }
        }
    }
}

/// The next multiple of `step` above `at`, at most `to`.
fn next_multiple(at: u32, step: u32, to: u32) -> u32 {
    (at / step + 1).saturating_mul(step).min(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST: u32 = (1 << 30) - 1;

    #[test]
    fn pins_hold_the_slot() {
        let map = ExtentMap::new();
        assert_eq!(map.pin(5), None);
        map.map(5, 77, 1);
        assert_eq!(map.unmap(5), Unmapped::Pinned);
        assert_eq!(map.pin(5), Some(77));
        assert!(!map.unpin(5));
        assert_eq!(map.unmap(5), Unmapped::Pinned);
        assert!(map.unpin(5));
        assert_eq!(map.unmap(5), Unmapped::Slot(77));
        assert_eq!(map.unmap(5), Unmapped::Hole);
        assert_eq!(map.pin(5), None);
    }

    #[test]
    fn collect_finds_everything_in_bounded_steps() {
        let map = ExtentMap::new();
        let put = [0, 1, 4095, 4096, 1 << 21, (1 << 29) + 3, LAST];
        for extent in put {
            map.map(extent, extent + 1, 0);
        }
        for max in [1, 2, 3, 100] {
            let (mut at, mut all) = (0, Vec::new());
            loop {
                let mut found = Vec::new();
                at = map.collect_mapped(at, LAST + 1, max, &mut found);
                assert!(found.len() <= max);
                if found.is_empty() {
                    break;
                }
                all.extend(found);
            }
            assert_eq!(all, put, "max {max}");
        }
        let mut part = Vec::new();
        map.collect_mapped(1, 4096, 100, &mut part);
        assert_eq!(part, [1, 4095]);
        let mut seen = Vec::new();
        map.for_each(|extent, slot, pins| {
            assert_eq!((slot, pins), (extent + 1, 0));
            seen.push(extent);
        });
        assert_eq!(seen, put);
    }
}
