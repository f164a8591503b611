//! Which slots of the pool are free, and which of them may be handed out.
//!
//! Pure bookkeeping: knows no files. The caller does what each state demands before it moves a slot on.
//!
//! ```text
//! fresh --take--> used --freed (punched)--> dirty --sync begins--> syncing --sync done--> clean --take--> used
//!                   \--give_back (unused, still zero)--> ready | clean
//! ```
//! `ready` and `clean` slots read as zeros, also after a power loss, and no durable map names them.
//! `ready` slots have their disk space already, `clean` and `fresh` ones not.

use super::layout::MAX_SLOTS;

/// Freed slots that wait for a sync before the allocator forces one, although fresh slots are left.
/// 1024 = 1 GiB of address space: keeps the file short when nobody ever flushes, at one sync per 1024 allocations.
const DIRTY_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Slots {
    /// Slots `fresh..` were never used.
    fresh: u32,
    /// Most slots that may be in use, and the last slot number.
    capacity: u32,
    /// Mapped, or taken and on the way to a map.
    used: u32,
    ready: Vec<u32>,
    clean: Vec<u32>,
    dirty: Vec<u32>,
    /// In the hands of a running sync.
    syncing: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// Zero and with disk space.
    Ready(u32),
    /// Zero; disk space must be had first.
    Bare(u32),
    /// Free slots are left, but only after a sync.
    NeedsSync,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotCounts {
    pub(super) capacity: u32,
    pub(super) used: u32,
    /// Free, but not before the next sync.
    pub(super) dirty: u32,
}

impl Slots {
    /// Slots `1..fresh` exist; those not in use are in `dirty`.
    pub(super) fn new(capacity: Option<u32>, fresh: u32, dirty: Vec<u32>) -> Self {
        let capacity = capacity.unwrap_or(MAX_SLOTS).min(MAX_SLOTS);
        Self {
            fresh,
            capacity,
            used: fresh - 1 - len(&dirty),
            ready: Vec::new(),
            clean: Vec::new(),
            dirty,
            syncing: 0,
        }
    }

    pub(super) fn take(&mut self) -> Take {
        if self.used >= self.capacity {
            return Take::Full;
        }
        let waiting = self.dirty.len() + self.syncing as usize;
        let take = if let Some(slot) = self.ready.pop() {
            Take::Ready(slot)
        } else if let Some(slot) = self.clean.pop() {
            Take::Bare(slot)
        } else if self.fresh <= self.capacity && waiting < DIRTY_MAX {
            self.fresh += 1;
            Take::Bare(self.fresh - 1)
        } else if waiting > 0 {
            return Take::NeedsSync;
        } else {
            return Take::Full;
        };
        self.used += 1;
        take
    }

    /// A taken slot that was not put behind any extent and is still zero.
    pub(super) fn give_back(&mut self, slot: u32, has_space: bool) {
        self.used -= 1;
        if has_space {
            self.ready.push(slot);
        } else {
            self.clean.push(slot);
        }
    }

    /// Slots whose unmapping is journaled and which are punched.
    pub(super) fn freed(&mut self, slots: &[u32]) {
        self.used -= len(slots);
        self.dirty.extend_from_slice(slots);
    }

    pub(super) fn sync_begins(&mut self) -> Vec<u32> {
        let slots = std::mem::take(&mut self.dirty);
        self.syncing += len(&slots);
        slots
    }

    pub(super) fn sync_done(&mut self, slots: &[u32]) {
        self.syncing -= len(slots);
        self.clean.extend_from_slice(slots);
    }

    pub(super) fn has_unsynced(&self) -> bool {
        !self.dirty.is_empty() || self.syncing > 0
    }

    /// Free slots that `free_slots` does not name, because a sync has them.
    pub(super) fn in_sync(&self) -> u32 {
        self.syncing
    }

    pub(super) fn counts(&self) -> SlotCounts {
        SlotCounts {
            capacity: self.capacity,
            used: self.used,
            dirty: len(&self.dirty) + self.syncing,
        }
    }

    /// Every free slot below `fresh` that is not in a running sync, and `fresh` itself, for checks.
    pub(super) fn free_slots(&self) -> (impl Iterator<Item = u32> + '_, u32) {
        let free = self.ready.iter().chain(&self.clean).chain(&self.dirty);
        (free.copied(), self.fresh)
    }
}

fn len(slots: &[u32]) -> u32 {
    u32::try_from(slots.len()).expect("there are fewer than 2^32 slots")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_slot_waits_for_a_sync() {
        let mut slots = Slots::new(Some(2), 1, Vec::new());
        assert_eq!(slots.take(), Take::Bare(1));
        assert_eq!(slots.take(), Take::Bare(2));
        assert_eq!(slots.take(), Take::Full);
        slots.freed(&[1]);
        assert_eq!(slots.take(), Take::NeedsSync);
        let batch = slots.sync_begins();
        assert_eq!(slots.take(), Take::NeedsSync, "the sync is not done yet");
        slots.freed(&[2]);
        slots.sync_done(&batch);
        assert_eq!(slots.take(), Take::Bare(1));
        assert_eq!(slots.take(), Take::NeedsSync, "2 was freed after the sync began");
        assert!(slots.has_unsynced());
    }

    #[test]
    fn given_back_slots_are_first_choice() {
        let mut slots = Slots::new(None, 1, Vec::new());
        assert_eq!(slots.take(), Take::Bare(1));
        assert_eq!(slots.take(), Take::Bare(2));
        slots.give_back(1, false);
        slots.give_back(2, true);
        assert_eq!(slots.take(), Take::Ready(2));
        assert_eq!(slots.take(), Take::Bare(1));
        assert_eq!(slots.counts().used, 2);
    }

    #[test]
    fn the_file_stays_short_without_syncs() {
        let mut slots = Slots::new(None, 1, Vec::new());
        for slot in 1..=u32::try_from(DIRTY_MAX).unwrap() {
            assert_eq!(slots.take(), Take::Bare(slot));
            slots.freed(&[slot]);
        }
        assert_eq!(slots.take(), Take::NeedsSync);
    }

    #[test]
    fn a_capacity_below_what_is_used_only_refuses() {
        let mut slots = Slots::new(Some(3), 11, vec![4]);
        assert_eq!(slots.counts().used, 9);
        assert_eq!(slots.take(), Take::Full);
        slots.freed(&[1, 2, 3, 5, 6, 7, 8]);
        assert_eq!(slots.take(), Take::NeedsSync);
    }
}
