//! A split virtqueue seen from the device (virtio 1.2 2.7), on memory that the
//! guest may change at any moment.
//!
//! Purpose-built because the general one costs ten times as much per request:
//! used entries are published once per batch, and nothing is locked. Every
//! value read from the guest is read once, into a local, and checked there.
//!
//! Knows descriptors, not requests: what a chain means is `virtio_blk`.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use crate::memory::GuestMemory;

/// Most entries a split virtqueue may have (virtio 1.2 2.7).
pub const QUEUE_SIZE_MAX: u32 = 32768;
/// Most descriptors of one request. A driver uses at most `seg_max + 2`; the
/// kernel takes at most 1024 pieces in one call.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;

const DESCRIPTOR_BYTES: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Where the three parts of a ring are, with the memory that keeps them there.
#[derive(Clone, Debug)]
pub struct RingAddresses {
    size: u16,
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers stay valid as long as `memory`, which goes with them,
// and are bound to no thread.
unsafe impl Send for RingAddresses {}

impl RingAddresses {
    /// Finds the parts, given in the front-end's addresses. `None` when a part
    /// is not wholly in one region, is misaligned, or the size is not a power of
    /// two up to [`QUEUE_SIZE_MAX`].
    #[must_use]
    pub fn find(
        memory: &Arc<GuestMemory>,
        num: u32,
        desc: u64,
        avail: u64,
        used: u64,
    ) -> Option<Self> {
        if !num.is_power_of_two() || num > QUEUE_SIZE_MAX {
            return None;
        }
        let n = u64::from(num);
        // virtio 1.2 2.7: alignments 16, 2 and 4; both rings end in an event index.
        let aligned = desc.is_multiple_of(16) && avail.is_multiple_of(2) && used.is_multiple_of(4);
        let desc = memory.contiguous_user(desc, DESCRIPTOR_BYTES * n)?;
        let avail = memory.contiguous_user(avail, 6 + 2 * n)?;
        let used = memory.contiguous_user(used, 6 + 8 * n)?;
        // Host alignment follows from guest alignment only if the region is
        // mapped at a page, so look at the pointers too.
        let host_aligned = (avail.as_ptr() as usize).is_multiple_of(2)
            && (used.as_ptr() as usize).is_multiple_of(4);
        (aligned && host_aligned).then(|| Self {
            size: u16::try_from(num).expect("at most 32768"),
            desc,
            avail,
            used,
            memory: Arc::clone(memory),
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Memory the ring and its requests lie in.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `find` checked size and alignment; shared memory is only
        // touched through atomics and raw copies.
        unsafe { AtomicU16::from_ptr(self.avail.as_ptr().add(offset).cast()) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above.
        unsafe { AtomicU16::from_ptr(self.used.as_ptr().add(offset).cast()) }
    }

    fn used_u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above; the used ring is four-byte aligned.
        unsafe { AtomicU32::from_ptr(self.used.as_ptr().add(offset).cast()) }
    }

    /// The used index in guest memory.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.used_u16(2).load(Ordering::Acquire)
    }
}

/// The guest broke the ring itself, so no further entry can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More entries are available than the ring has.
    #[error(
        "the available index jumped to {avail_idx} from {next_avail}, further than the ring's {size} entries"
    )]
    AvailJump {
        /// The guest's index.
        avail_idx: u16,
        /// Ours.
        next_avail: u16,
        /// Entries.
        size: u16,
    },
    /// An available entry names a descriptor that does not exist.
    #[error("the available ring names descriptor {head} of a ring of {size}")]
    BadHead {
        /// The entry.
        head: u16,
        /// Entries.
        size: u16,
    },
}

/// The guest broke one chain; the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Longer than the ring or the limit allows, which a loop is too.
    #[error("a descriptor chain is looped or too long")]
    TooLong,
    /// A `next` index outside its table.
    #[error("a descriptor chain leads out of its table")]
    BadNext,
    /// An indirect table that is nested, empty, misshapen or not in memory.
    #[error("a descriptor chain has a bad indirect table")]
    BadIndirect,
}

/// The buffers of a chain, in pieces contiguous here. Reused between requests.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the guest wrote for the device.
    pub readable: Vec<libc::iovec>,
    /// What the device writes for the guest.
    pub writable: Vec<libc::iovec>,
    /// A piece was not in guest memory, or a readable piece followed a writable
    /// one: the request must fail.
    pub faulty: bool,
    /// The last writable piece was not in guest memory, so the end of
    /// `writable` is not the end of what the guest offered.
    pub tail_missing: bool,
}

impl Chain {
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.faulty = false;
        self.tail_missing = false;
    }
}

/// One descriptor, read once.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// # Safety
    /// `table` has more than `index` descriptors.
    unsafe fn read(table: *const u8, index: u16) -> Self {
        // SAFETY: the caller's promise; volatile because the guest may write.
        let raw: [u8; 16] =
            unsafe { table.cast::<[u8; 16]>().add(usize::from(index)).read_volatile() };
        let (addr, rest) = raw.split_first_chunk::<8>().expect("16 bytes");
        Self {
            addr: u64::from_le_bytes(*addr),
            len: u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]),
            flags: u16::from_le_bytes([rest[4], rest[5]]),
            next: u16::from_le_bytes([rest[6], rest[7]]),
        }
    }
}

/// The device's side of a ring.
#[derive(Debug)]
pub struct Virtqueue {
    ring: RingAddresses,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The used index at the last look at whether to signal.
    signalled: u16,
}

impl Virtqueue {
    /// Starts at `next_avail`; the used index is the one in guest memory.
    #[must_use]
    pub fn new(ring: RingAddresses, event_idx: bool, next_avail: u16) -> Self {
        let next_used = ring.used_idx();
        Self { ring, event_idx, next_avail, next_used, signalled: next_used }
    }

    /// The same ring at (usually) the same place, in a new memory table.
    /// Indices stay: the front-end does this while requests are in flight.
    pub fn relocate(&mut self, ring: RingAddresses, event_idx: bool) {
        self.ring = ring;
        self.event_idx = event_idx;
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.ring.size
    }

    /// The next available entry to take.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The next used entry to fill.
    #[must_use]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Whether the available entries from the used index to the next one to
    /// take are exactly `heads`: then everything older is used, and the used
    /// index is where a device that knows nothing else may go on.
    #[must_use]
    pub fn ends_with(&self, heads: &[u16]) -> bool {
        usize::from(self.next_avail.wrapping_sub(self.next_used)) == heads.len()
            && (0..).zip(heads).all(|(at, head)| {
                let slot = usize::from(self.next_used.wrapping_add(at) & (self.ring.size - 1));
                self.ring.avail_u16(4 + 2 * slot).load(Ordering::Relaxed) == *head
            })
    }

    /// Takes the head of the next request, if there is one.
    ///
    /// # Errors
    /// [`RingError`]; the ring is to be given up.
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        let avail_idx = self.ring.avail_u16(2).load(Ordering::Acquire);
        let waiting = avail_idx.wrapping_sub(self.next_avail);
        let size = self.ring.size;
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > size {
            return Err(RingError::AvailJump { avail_idx, next_avail: self.next_avail, size });
        }
        let slot = usize::from(self.next_avail & (size - 1));
        let head = self.ring.avail_u16(4 + 2 * slot).load(Ordering::Relaxed);
        if head >= size {
            return Err(RingError::BadHead { head, size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Collects the buffers of the chain at `head` (below the ring's size).
    ///
    /// # Errors
    /// [`ChainError`] when the chain's shape is broken, so that not even its
    /// status byte can be found.
    pub fn read_chain(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        debug_assert!(head < self.ring.size);
        chain.clear();
        let (mut table, mut table_len) = (self.ring.desc, self.ring.size);
        let mut index = head;
        let mut indirect = false;
        // Bounds loops: a chain has no more descriptors than its table.
        let mut left = CHAIN_DESCRIPTORS_MAX.min(usize::from(table_len));
        loop {
            if left == 0 {
                return Err(ChainError::TooLong);
            }
            left -= 1;
            // SAFETY: index is below table_len, and the table is mapped.
            let descriptor = unsafe { Descriptor::read(table.as_ptr(), index) };
            if descriptor.flags & DESC_INDIRECT != 0 {
                // virtio 1.2 2.7.5.3.1: not nested, not chained onwards.
                let len = u64::from(descriptor.len);
                let entries = len / DESCRIPTOR_BYTES;
                if indirect
                    || descriptor.flags & DESC_NEXT != 0
                    || entries == 0
                    || !len.is_multiple_of(DESCRIPTOR_BYTES)
                {
                    return Err(ChainError::BadIndirect);
                }
                table_len = u16::try_from(entries).map_err(|_| ChainError::BadIndirect)?;
                table = self
                    .ring
                    .memory
                    .contiguous(descriptor.addr, len)
                    .ok_or(ChainError::BadIndirect)?;
                left = CHAIN_DESCRIPTORS_MAX.min(usize::from(table_len));
                index = 0;
                indirect = true;
                continue;
            }
            self.collect(descriptor, chain);
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            if descriptor.next >= table_len {
                return Err(ChainError::BadNext);
            }
            index = descriptor.next;
        }
    }

    fn collect(&self, descriptor: Descriptor, chain: &mut Chain) {
        let Chain { readable, writable, faulty, tail_missing } = chain;
        let writes = descriptor.flags & DESC_WRITE != 0;
        let buffers = if writes {
            writable
        } else {
            // virtio 1.2 2.7.4.2: writable descriptors come after readable ones.
            *faulty |= !writable.is_empty();
            readable
        };
        let whole = self.ring.memory.for_each_piece(
            descriptor.addr,
            u64::from(descriptor.len),
            |base, len| {
                buffers.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            },
        );
        *faulty |= !whole;
        if writes && descriptor.len > 0 {
            *tail_missing = !whole;
        }
    }

    /// Fills the next used entry; the guest sees it after [`Virtqueue::publish`].
    pub fn put_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.ring.size - 1));
        self.ring.used_u32(4 + 8 * slot).store(u32::from(head), Ordering::Relaxed);
        self.ring.used_u32(8 + 8 * slot).store(written, Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Offset and length in the used ring of the entry last filled, for the
    /// dirty log.
    #[must_use]
    pub fn last_used_range(&self) -> (u64, u64) {
        let slot = u64::from(self.next_used.wrapping_sub(1) & (self.ring.size - 1));
        (4 + 8 * slot, 8)
    }

    /// Shows the guest all filled entries.
    pub fn publish(&mut self) {
        self.ring.used_u16(2).store(self.next_used, Ordering::Release);
    }

    /// Whether the guest wants to be told of what was published since the last
    /// call (virtio 1.2 2.7.7, 2.7.8).
    #[must_use]
    pub fn wants_signal(&mut self) -> bool {
        let (old, new) = (self.signalled, self.next_used);
        if old == new {
            return false;
        }
        self.signalled = new;
        // The guest must not go to sleep between our store of the index and our
        // look at its wish: both sides store, fence, load.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let used_event =
                self.ring.avail_u16(4 + 2 * usize::from(self.ring.size)).load(Ordering::Relaxed);
            new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ring.avail_u16(0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks for no kicks while the ring is being worked on. A hint only.
    pub fn disable_kicks(&self) {
        if !self.event_idx {
            self.ring.used_u16(0).store(USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks for a kick at the next entry. Returns true when there already is
    /// one, which no kick will tell of.
    #[must_use]
    pub fn enable_kicks(&self) -> bool {
        if self.event_idx {
            let avail_event = 4 + 8 * usize::from(self.ring.size);
            self.ring.used_u16(avail_event).store(self.next_avail, Ordering::Relaxed);
        } else {
            self.ring.used_u16(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.ring.avail_u16(2).load(Ordering::Acquire) != self.next_avail
    }

    /// Offset and length of what [`Virtqueue::enable_kicks`] writes, for the
    /// dirty log.
    #[must_use]
    pub fn kick_wish_range(&self) -> (u64, u64) {
        if self.event_idx { (4 + 8 * u64::from(self.ring.size), 2) } else { (0, 2) }
    }
}

#[cfg(test)]
mod tests;
