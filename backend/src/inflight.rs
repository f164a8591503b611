//! The table of requests in flight, in memory shared with the front-end, from
//! which a restarted back-end learns what it has to do again (vhost-user.rst,
//! "Inflight I/O tracking"; layout of split rings).
//!
//! ```text
//!  per ring, 64-byte aligned:
//!  0  u64 features   8 u16 version   10 u16 desc_num   12 u16 last_batch_head
//!  14 u16 used_idx   16 + 16 * head: { u8 inflight, 5 padding, u16 next, u64 counter }
//! ```
//!
//! Completing a batch takes several stores that a kill can separate, so their
//! order is the contract: link the batch, publish the used index, clear the
//! marks, record the used index. A used index that differs from the recorded
//! one on restart means the kill fell between, and the linked batch is cleared.
//!
//! Behind the rings the region has a trailer of ours, 64-byte aligned: 0 u64
//! magic, 8 and 16 u64 the handoff's id, low half first, 24 u64 its try. Front-ends keep the
//! region as it is, whatever its size.
//!
//! Behind that it has each ring once more, for one that is larger than the
//! front-end said: the guest decides how large its rings are, and QEMU (seen with
//! 10.0.13) lets it have 1024 entries where it asks here for the 128 of its
//! `queue-size`. There is room for the largest; what nobody writes takes no memory
//! (unless the machine's is locked: 0.5 MiB a ring). A process of an earlier version
//! does not know of these parts and runs such a ring without a table, so what is in
//! them counts only if no such process has had the region since. Of a ring's two parts
//! the one counts that it ran with last.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_protocol::handoff::{HandoffId, Try};

use crate::config::NUM_QUEUES_MAX;
use crate::memory::Mapping;
use crate::vhost_user::message::InflightDescription;
use crate::virtqueue::QUEUE_SIZE_MAX;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
/// First version of the layout; zero says "never used".
const VERSION: u16 = 1;

/// In the features word of ring 0: the guest chose write-through.
const WRITE_THROUGH: u64 = 1 << 63;

/// The same: the parts for larger rings are up to date. Earlier versions take it away.
const LARGE_KEPT: u64 = 1 << 62;

const TRAILER_BYTES: usize = 64;
/// "BTNtry" and a version: the trailer names a try. Zero in a new region.
const TRAILER_MAGIC: u64 = u64::from_le_bytes(*b"BTNtry\0\x01");

/// In the features word of each ring's first part: it has run with the part for larger ones.
const LARGE_USED: u64 = 1 << 61;

/// Bytes of one ring's part.
const fn ring_bytes(queue_size: usize) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * queue_size).next_multiple_of(64)
}

/// Entries and bytes of the part of a ring that is larger than the front-end said.
const LARGEST: u16 = 1 << 15;
const LARGE_BYTES: usize = ring_bytes(LARGEST as usize);
const _: () = assert!(LARGEST as u32 == QUEUE_SIZE_MAX);

/// In-flight regions that this process has made, the latest ones.
///
/// A front-end keeps its region over a reconnect. So one that brings a region that
/// was not made here has run on an earlier process.
#[derive(Debug, Default)]
pub struct MadeHere(Mutex<VecDeque<(libc::dev_t, libc::ino_t)>>);

impl MadeHere {
    /// A front-end asks for one when it first starts: more than ever try.
    const MAX: usize = 64;

    /// This one was.
    pub fn add(&self, fd: &OwnedFd) {
        let Ok(id) = identity(fd) else { return };
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() == Self::MAX {
            made.pop_front();
        }
        made.push_back(id);
    }

    /// Whether this one was.
    #[must_use]
    pub fn has(&self, fd: &OwnedFd) -> bool {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        identity(fd).is_ok_and(|id| made.contains(&id))
    }
}

fn identity(fd: &OwnedFd) -> nix::Result<(libc::dev_t, libc::ino_t)> {
    nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

/// The whole region, for all rings of a device.
#[derive(Debug)]
pub struct InflightRegion {
    mapping: Mapping,
    offset: usize,
    /// From the offset on.
    len: u64,
    num_queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Makes an empty region and its descriptor.
    ///
    /// # Errors
    /// Without rings, or when the kernel refuses a memfd of that size.
    pub fn create(
        num_queues: u16,
        queue_size: u16,
    ) -> io::Result<(Self, OwnedFd, InflightDescription)> {
        if num_queues == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it was asked for no rings"));
        }
        let each = ring_bytes(usize::from(queue_size)) + LARGE_BYTES;
        let len = each * usize::from(num_queues) + TRAILER_BYTES;
        // SAFETY: a constant C string.
        let fd = unsafe { libc::memfd_create(c"baton-inflight".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(io::Error::other)?)?;
        let description =
            InflightDescription { mmap_size: len as u64, mmap_offset: 0, num_queues, queue_size };
        let region = Self::map_as_it_is(&fd, description)?;
        region.keep_large();
        Ok((region, fd, description))
    }

    /// Maps a region the front-end kept for us.
    ///
    /// # Errors
    /// When it is too small for what it claims to hold.
    pub fn map(fd: &OwnedFd, description: InflightDescription) -> io::Result<Self> {
        let region = Self::map_as_it_is(fd, description)?;
        region.forget_what_is_out_of_date();
        region.keep_large();
        Ok(region)
    }

    fn map_as_it_is(fd: &OwnedFd, description: InflightDescription) -> io::Result<Self> {
        let InflightDescription { mmap_size, mmap_offset, num_queues, queue_size } = description;
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let end = mmap_offset
            .checked_add(mmap_size)
            .ok_or_else(|| invalid("the region's size overflows"))?;
        let offset = usize::try_from(mmap_offset).map_err(io::Error::other)?;
        if offset % 8 != 0 {
            return Err(invalid("the in-flight region is not aligned"));
        }
        let mapping = Mapping::new(fd, end)?;
        let region = Self { mapping, offset, len: mmap_size, num_queues, queue_size };
        if mmap_size < region.rings_bytes() as u64 {
            return Err(invalid("the in-flight region is too small for its rings"));
        }
        Ok(region)
    }

    /// Of the rings of the size that the front-end said.
    fn rings_bytes(&self) -> usize {
        ring_bytes(usize::from(self.queue_size)) * usize::from(self.num_queues)
    }

    /// A process of an earlier version may have had this region, and run larger rings without their parts.
    fn forget_what_is_out_of_date(&self) {
        let kept = |word: &AtomicU64| word.load(Ordering::Acquire) & LARGE_KEPT != 0;
        if self.features().is_some_and(kept) {
            return;
        }
        // The front-end may say that there are more; none of ours has them.
        for index in 0..self.num_queues.min(NUM_QUEUES_MAX) {
            if let Some(part) = self.large_part(index) {
                self.version_of(part).store(0, Ordering::Release);
            }
        }
    }

    /// The version of the ring's part that begins there; zero says that nothing in it counts.
    fn version_of(&self, part: usize) -> &AtomicU16 {
        // SAFETY: `map` or `large_part` checked that it is mapped; 8 is the version's place, and aligned.
        unsafe { AtomicU16::from_ptr(self.mapping.as_ptr().add(part + 8).cast()) }
    }

    /// From here on this process keeps the parts for larger rings up to date.
    fn keep_large(&self) {
        if let Some(features) = self.features() {
            features.fetch_or(LARGE_KEPT, Ordering::AcqRel);
        }
    }

    /// The word of ring 0 that the specification keeps for features and that is
    /// zero in every version so far.
    fn features(&self) -> Option<&AtomicU64> {
        (self.rings_bytes() > 0).then(|| self.features_of(self.offset))
    }

    /// The same of the ring whose first part begins there.
    fn features_of(&self, first: usize) -> &AtomicU64 {
        // SAFETY: `map` checked that all rings are mapped, and the alignment.
        unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(first).cast()) }
    }

    /// Keeps the guest's choice of cache mode for the process that comes next:
    /// a front-end does not repeat SET_CONFIG when it reconnects, and a guest
    /// that chose write-through sends no flush.
    pub fn set_write_through(&self, write_through: bool) {
        if let Some(features) = self.features() {
            if write_through {
                features.fetch_or(WRITE_THROUGH, Ordering::AcqRel);
            } else {
                features.fetch_and(!WRITE_THROUGH, Ordering::AcqRel);
            }
        }
    }

    /// The choice kept; false in a region that somebody else made.
    #[must_use]
    pub fn is_write_through(&self) -> bool {
        self.features().is_some_and(|f| f.load(Ordering::Acquire) & WRITE_THROUGH != 0)
    }

    /// Word `at` of the trailer; none in a region that somebody else made.
    fn trailer(&self, at: usize) -> Option<&AtomicU64> {
        let start = self.rings_bytes();
        let has = self.len >= (start + TRAILER_BYTES) as u64;
        // SAFETY: `map` checked that so many bytes are mapped, and the alignment; a ring's part is a multiple of 64.
        has.then(|| unsafe {
            AtomicU64::from_ptr(self.mapping.as_ptr().add(self.offset + start + 8 * at).cast())
        })
    }

    /// Keeps for the process that comes next that this front-end's machine arrived here in this try of a handoff.
    pub fn set_arrival(&self, arrival: Try) {
        let half = |shift: u32| u64::try_from((arrival.id.0 >> shift) & u128::from(u64::MAX));
        let half = |shift| half(shift).expect("64 bits");
        let words = [half(0), half(64), u64::from(arrival.attempt)];
        let Some(magic) = self.trailer(0) else { return };
        // A kill in between leaves no try rather than half of one.
        magic.store(0, Ordering::Release);
        for (at, word) in (1..).zip(words) {
            if let Some(place) = self.trailer(at) {
                place.store(word, Ordering::Release);
            }
        }
        magic.store(TRAILER_MAGIC, Ordering::Release);
    }

    /// The try in which this front-end's machine arrived here, if that was kept.
    #[must_use]
    pub fn arrival(&self) -> Option<Try> {
        let word = |at| self.trailer(at).map(|word| word.load(Ordering::Acquire));
        if word(0)? != TRAILER_MAGIC {
            return None;
        }
        let id = HandoffId(u128::from(word(1)?) | u128::from(word(2)?) << 64);
        Some(Try { id, attempt: u32::try_from(word(3)?).ok()? })
    }

    /// The part of ring `index`, if the region has it and it can track
    /// `queue_size` entries.
    #[must_use]
    pub fn ring(self: &Arc<Self>, index: u16, queue_size: u16) -> Option<InflightRing> {
        if index >= self.num_queues || queue_size > LARGEST {
            return None;
        }
        let first = self.offset + ring_bytes(usize::from(self.queue_size)) * usize::from(index);
        let large = self.large_part(index);
        let (base, room) = if queue_size <= self.queue_size {
            (first, self.queue_size)
        } else {
            (large?, LARGEST)
        };
        let region = Arc::clone(self);
        Some(InflightRing { region, first, large, base, room, size: queue_size, counter: 0 })
    }

    /// Where the part is for a ring that is larger than the front-end said, if the region has it.
    fn large_part(&self, index: u16) -> Option<usize> {
        let start = self.rings_bytes() + TRAILER_BYTES;
        let has = self.len >= (start + LARGE_BYTES * usize::from(self.num_queues)) as u64;
        has.then(|| self.offset + start + LARGE_BYTES * usize::from(index))
    }
}

/// The part of one ring.
#[derive(Debug)]
pub struct InflightRing {
    region: Arc<InflightRegion>,
    /// Where the ring's first part begins, and the one for larger rings.
    first: usize,
    large: Option<usize>,
    /// The one of the two that it has.
    base: usize,
    /// Entries that part has room for.
    room: u16,
    size: u16,
    /// Rises with every request taken; requests are done again in this order.
    counter: u64,
}

impl InflightRing {
    fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: `ring` and `map` checked that the ring's part is mapped, and
        // offsets are below its size.
        unsafe { self.region.mapping.as_ptr().add(self.base + offset) }
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: mapped, aligned (base is a multiple of 8, offset of 2), and
        // only ever used with atomics by us.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    fn version(&self) -> &AtomicU16 {
        self.region.version_of(self.base)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.u16_at(10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.u16_at(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.u16_at(14)
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.room);
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `u16_at`; a byte needs no alignment.
        unsafe { AtomicU8::from_ptr(self.at(self.entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + 6)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `u16_at`; entries are 16 bytes, the counter at 8.
        unsafe { AtomicU64::from_ptr(self.at(self.entry(head) + 8).cast()) }
    }

    /// Takes over the table when the ring starts, with the used index that is
    /// in guest memory. Returns the heads that were in flight, oldest first:
    /// they have to be done again.
    ///
    /// A fresh table takes its used index from the ring, never zero: after a
    /// migration the ring is somewhere else, and a zero would be read as a batch
    /// cut off by a kill.
    pub fn resume(&mut self, ring_used_idx: u16) -> Vec<u16> {
        self.forget_other_sizes();
        if self.version().load(Ordering::Acquire) != VERSION {
            for head in 0..self.size {
                self.inflight(head).store(0, Ordering::Relaxed);
            }
            self.used_idx().store(ring_used_idx, Ordering::Relaxed);
            self.version().store(VERSION, Ordering::Release);
            return Vec::new();
        }
        self.clear_cut_off_batch(ring_used_idx);
        let mut heads: Vec<u16> = (0..self.size)
            .filter(|head| self.inflight(*head).load(Ordering::Acquire) == 1)
            .collect();
        heads.sort_by_key(|head| self.counter_of(*head).load(Ordering::Relaxed));
        self.counter =
            heads.last().map_or(0, |head| self.counter_of(*head).load(Ordering::Relaxed));
        heads
    }

    /// A ring has another size only after the guest began anew with it. What it left in flight with that size is
    /// nobody's, and must not be found when the ring has that size again.
    fn forget_other_sizes(&self) {
        for head in self.size..self.desc_num().load(Ordering::Relaxed).min(self.room) {
            self.inflight(head).store(0, Ordering::Relaxed);
        }
        self.desc_num().store(self.size, Ordering::Relaxed);
        let features = self.region.features_of(self.first);
        if Some(self.base) == self.large {
            features.fetch_or(LARGE_USED, Ordering::AcqRel);
            self.region.version_of(self.first).store(0, Ordering::Release);
        } else if let Some(large) = self.large
            && features.load(Ordering::Acquire) & LARGE_USED != 0
        {
            // Looked at only then: what nobody touches takes no memory.
            self.region.version_of(large).store(0, Ordering::Release);
        }
    }

    /// The used index was published and the kill came before the marks of that
    /// batch were cleared: clear them.
    fn clear_cut_off_batch(&self, ring_used_idx: u16) {
        let batch = ring_used_idx.wrapping_sub(self.used_idx().load(Ordering::Acquire));
        // The table is in the front-end's hands: bound every step.
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        for _ in 0..batch.min(self.size) {
            if head >= self.size {
                break;
            }
            self.inflight(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_idx().store(ring_used_idx, Ordering::Release);
    }

    /// A request was taken from the available ring.
    pub fn take(&mut self, head: u16) {
        // What it goes on from is the front-end's; any number must do.
        self.counter = self.counter.wrapping_add(1);
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.inflight(head).store(1, Ordering::Release);
    }

    /// A completion was put into the used ring and is not yet published.
    pub fn link(&mut self, head: u16) {
        self.next(head).store(self.last_batch_head().load(Ordering::Relaxed), Ordering::Relaxed);
        self.last_batch_head().store(head, Ordering::Release);
    }

    /// The used index that covers `batch` (all linked since the last call) was
    /// published.
    pub fn published(&mut self, batch: impl Iterator<Item = u16>, ring_used_idx: u16) {
        for head in batch {
            self.inflight(head).store(0, Ordering::Release);
        }
        self.used_idx().store(ring_used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> (Arc<InflightRegion>, OwnedFd, InflightDescription) {
        let (region, fd, description) = InflightRegion::create(2, 8).expect("region");
        (Arc::new(region), fd, description)
    }

    /// What a restarted process sees.
    fn restarted(fd: &OwnedFd, description: InflightDescription, used_idx: u16) -> Vec<u16> {
        let region = Arc::new(InflightRegion::map(fd, description).expect("map"));
        region.ring(1, 8).expect("ring").resume(used_idx)
    }

    #[test]
    fn a_fresh_table_starts_at_the_rings_own_index() {
        let (region, fd, description) = region();
        let mut ring = region.ring(1, 8).expect("ring");
        assert_eq!(ring.resume(500), [0u16; 0]);
        ring.take(0);
        drop(ring);
        assert_eq!(restarted(&fd, description, 500), [0], "request 0 must not be taken for done");
    }

    #[test]
    fn the_cache_mode_outlives_the_process() {
        let (region, fd, description) = region();
        let kept = || InflightRegion::map(&fd, description).expect("map").is_write_through();
        assert!(!kept());
        region.set_write_through(true);
        let mut ring = region.ring(0, 8).expect("ring");
        ring.resume(0);
        assert!(kept());
        region.set_write_through(false);
        assert!(!kept());
    }

    #[test]
    fn the_try_of_the_arrival_outlives_the_process() {
        let (region, fd, description) = region();
        let kept = |description| InflightRegion::map(&fd, description).expect("map").arrival();
        assert_eq!(kept(description), None);
        let arrival = Try { id: HandoffId(u128::MAX - 5), attempt: 7 };
        region.set_arrival(arrival);
        let mut ring = region.ring(1, 8).expect("ring");
        ring.resume(0);
        (0..8).for_each(|head| ring.take(head));
        assert_eq!(kept(description), Some(arrival));
        // One that has no room for it, as another program makes it.
        let short = InflightDescription { mmap_size: 2 * 192, ..description };
        assert_eq!(kept(short), None);
        InflightRegion::map(&fd, short).expect("map").set_arrival(Try::default());
        assert_eq!(kept(description), Some(arrival), "nothing was written behind its end");
    }

    /// QEMU 10.0.13 asks for 128 entries and has rings of 1024.
    #[test]
    fn rings_may_be_larger_than_the_front_end_said() {
        let (region, fd, description) = region();
        assert_eq!(description.queue_size, 8);
        let arrival = Try { id: HandoffId(3), attempt: 1 };
        region.set_arrival(arrival);
        for (index, size) in [(0, 1024), (1, 32768)] {
            let mut ring = region.ring(index, size).expect("ring");
            ring.resume(0);
            (0..size).rev().for_each(|head| ring.take(head));
        }
        let region = Arc::new(InflightRegion::map(&fd, description).expect("map"));
        for (index, size) in [(0, 1024), (1, 32768)] {
            let again = region.ring(index, size).expect("ring").resume(0);
            assert_eq!(again, (0..size).rev().collect::<Vec<_>>());
        }
        assert_eq!(region.arrival(), Some(arrival));
    }

    /// One process of this version, one of an earlier one, and one of this version, on the same region and ring.
    #[test]
    fn what_an_earlier_version_did_not_keep_up_to_date_is_forgotten() {
        let (region, fd, description) = region();
        let left = || {
            let region = Arc::new(InflightRegion::map(&fd, description).expect("map"));
            region.ring(1, 1024).expect("ring").resume(5)
        };
        let mut ring = region.ring(1, 1024).expect("ring");
        ring.resume(0);
        ring.take(900);
        region.set_write_through(true);
        assert_eq!(left(), [900]);
        // All that an earlier version does when it gets the region.
        region.features().expect("a ring").store(WRITE_THROUGH, Ordering::Release);
        assert_eq!(left(), [0u16; 0]);
        assert!(region.is_write_through());
        ring.take(901);
        assert_eq!(left(), [901], "who has the region now keeps them again");
    }

    /// Requests that were left in flight when the guest began anew with a ring of another size, and again with the first.
    #[test]
    fn what_a_ring_of_another_size_left_is_forgotten() {
        // Of one part, of the other, and of both, each way.
        for (before, between) in [(8, 4), (8, 1024), (1024, 8), (1024, 16), (32768, 8)] {
            let (_, fd, description) = region();
            let starts = |size: u16, takes: u16| {
                let region = Arc::new(InflightRegion::map(&fd, description).expect("map"));
                let mut ring = region.ring(1, size).expect("ring");
                let left = ring.resume(5);
                ring.take(takes);
                left
            };
            assert_eq!(starts(before, before - 1), [0u16; 0]);
            assert_eq!(
                starts(before, before - 1),
                [before - 1],
                "of the same size it is done again"
            );
            assert_eq!(starts(between, between - 1), [0u16; 0], "{before} to {between}");
            assert_eq!(starts(between, between - 1), [between - 1], "{before} to {between}");
            let left = starts(before, 0);
            assert!(!left.contains(&(before - 1)), "{before}, {between} and back: {left:?}");
        }
    }

    /// One that only ever has rings as large as the front-end said does not touch the parts for larger ones.
    #[test]
    fn parts_that_no_ring_has_take_no_memory() {
        let (region, fd, description) = region();
        let blocks = || nix::sys::stat::fstat(&fd).expect("stat").st_blocks;
        let (mut zero, mut one) =
            (region.ring(0, 8).expect("ring"), region.ring(1, 8).expect("ring"));
        assert_eq!((zero.resume(0), one.resume(0)), (vec![], vec![]));
        assert_eq!(restarted(&fd, description, 0), [0u16; 0]);
        assert_eq!(blocks() * 512, 4096);
    }

    /// Earlier versions made the rings and the trailer only: whoever of the two comes after the other finds what was
    /// left in a ring of the size that the front-end said.
    #[test]
    fn a_region_of_an_earlier_version_has_all_but_larger_rings() {
        let (region, fd, description) = region();
        let earlier = InflightDescription { mmap_size: 2 * 192 + 64, ..description };
        let mut ring = region.ring(1, 8).expect("ring");
        ring.resume(0);
        ring.take(7);
        region.set_arrival(Try { id: HandoffId(3), attempt: 1 });
        assert_eq!(restarted(&fd, earlier, 0), [7]);
        assert_eq!(restarted(&fd, description, 0), [7]);
        let earlier = Arc::new(InflightRegion::map(&fd, earlier).expect("map"));
        assert!(earlier.arrival().is_some());
        assert!(earlier.ring(1, 16).is_none(), "more than it has room for");
    }

    #[test]
    fn requests_come_back_in_the_order_they_were_taken() {
        let (region, fd, description) = region();
        let mut ring = region.ring(1, 8).expect("ring");
        ring.resume(0);
        for head in [5, 2, 7, 0] {
            ring.take(head);
        }
        ring.link(2);
        ring.published([2].into_iter(), 1);
        assert_eq!(restarted(&fd, description, 1), [5, 7, 0]);
        // The counter goes on from the highest one seen.
        let mut ring = region.ring(1, 8).expect("ring");
        ring.resume(1);
        ring.take(2);
        assert_eq!(restarted(&fd, description, 1), [5, 7, 0, 2]);
    }

    /// A kill after each single store of a batch of two.
    #[test]
    fn a_batch_cut_off_by_a_kill_is_settled() {
        for cut in 0..5 {
            let (region, fd, description) = region();
            let mut ring = region.ring(1, 8).expect("ring");
            ring.resume(10);
            for head in [1, 3, 4] {
                ring.take(head);
            }
            let mut used_idx = 10;
            let steps: [&mut dyn FnMut(&mut InflightRing); 5] = [
                &mut |ring| ring.link(3),
                &mut |ring| ring.link(1),
                &mut |_| used_idx = 12,
                &mut |ring| ring.inflight(3).store(0, Ordering::Relaxed),
                &mut |ring| ring.inflight(1).store(0, Ordering::Relaxed),
            ];
            for step in steps.into_iter().take(cut + 1) {
                step(&mut ring);
            }
            let expected: &[u16] = if cut < 2 { &[1, 3, 4] } else { &[4] };
            assert_eq!(restarted(&fd, description, used_idx), expected, "kill after step {cut}");
        }
    }

    #[test]
    fn a_hostile_table_is_bounded() {
        let (region, fd, description) = region();
        let mut ring = region.ring(1, 8).expect("ring");
        ring.resume(0);
        ring.take(1);
        ring.last_batch_head().store(60000, Ordering::Relaxed);
        assert_eq!(restarted(&fd, description, 9), [1]);
        ring.last_batch_head().store(1, Ordering::Relaxed);
        ring.next(1).store(1, Ordering::Relaxed);
        assert_eq!(restarted(&fd, description, 40000), [0u16; 0], "a loop ends");
        ring.inflight(1).store(1, Ordering::Relaxed);
        ring.counter_of(1).store(u64::MAX, Ordering::Relaxed);
        assert_eq!(ring.resume(40000), [1]);
        ring.take(2);
        ring.desc_num().store(u16::MAX, Ordering::Relaxed);
        assert_eq!(ring.resume(40000), [2, 1], "of its own entries");
        assert!(region.ring(2, 8).is_none(), "no such ring");
        assert!(region.ring(0, u16::MAX).is_none(), "more entries than the table has");
        let lying = InflightDescription { num_queues: u16::MAX, ..description };
        assert!(InflightRegion::map(&fd, lying).is_err());
    }
}
