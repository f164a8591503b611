//! The driver's half of a split virtqueue, as bytes in guest memory.
//!
//! Well-formed chains are pushed with [`Ring::push_chain`]. A hostile driver writes any descriptor with
//! [`Ring::write_descriptor`] and makes any head available with [`Ring::publish`].
//!
//! Order: the avail index is stored with release; a full fence stands between it and the look at whether a kick is
//! wanted, and between asking for a call and the last look at the used index. Without the fences both sides can
//! sleep.

use crate::memory::GuestMemory;
use anyhow::{Context, Result, bail};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

/// The chain goes on.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

const DESCRIPTOR_BYTES: usize = 16;
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

/// One descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT, WRITE, INDIRECT.
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl Descriptor {
    /// A buffer the device reads.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: 0 }
    }

    /// A buffer the device writes.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE, next: 0 }
    }

    /// The 16 bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain that the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// The driver's half of one queue.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    descriptors: u64,
    avail: u64,
    used: u64,
    /// Descriptors in no chain.
    free: Vec<u16>,
    /// For each head pushed by `push_chain`, the descriptors it owns.
    owned: Vec<Vec<u16>>,
    /// The avail index: what the device may see.
    published: u16,
    /// The avail index with the chains staged after it.
    staged: u16,
    last_used: u16,
    /// The avail index at the last decision about a kick.
    kicked: u16,
}

impl Ring {
    /// A ring of `size` descriptors, in memory of its own.
    pub fn new(memory: &Arc<GuestMemory>, size: u16, event_idx: bool) -> Result<Self> {
        let entries = usize::from(size);
        Ok(Self {
            descriptors: memory.alloc(DESCRIPTOR_BYTES * entries, 4096)?,
            avail: memory.alloc(6 + 2 * entries, 4096)?,
            used: memory.alloc(6 + 8 * entries, 4096)?,
            memory: Arc::clone(memory),
            size,
            event_idx,
            free: (0..size).rev().collect(),
            owned: vec![Vec::new(); entries],
            published: 0,
            staged: 0,
            last_used: 0,
            kicked: 0,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest addresses of the descriptor table, the avail ring and the used ring.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors, self.avail, self.used)
    }

    /// The used index, as the device left it: where a front-end lets a restarted back-end go on.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.memory.u16(self.used + 2).load(Acquire)
    }

    /// The avail index that the device can see.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.published
    }

    /// Chains that the device has and has not given back.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.last_used)
    }

    /// Descriptors in no chain.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Writes one descriptor, whatever it says and whoever uses it.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        let at = self.descriptors + DESCRIPTOR_BYTES as u64 * u64::from(index);
        self.memory.write(at, &descriptor.bytes());
    }

    /// Links `chain` through free descriptors and publishes it. Returns its head.
    pub fn push_chain(&mut self, chain: &[Descriptor]) -> Result<u16> {
        let head = self.link(chain)?;
        self.publish(head);
        Ok(head)
    }

    /// Links `chain` through free descriptors without showing it to the device.
    pub fn link(&mut self, chain: &[Descriptor]) -> Result<u16> {
        if chain.is_empty() || chain.len() > self.free.len() {
            bail!("{} descriptors are free, the chain has {}", self.free.len(), chain.len());
        }
        let taken = self.free.split_off(self.free.len() - chain.len());
        for (i, descriptor) in chain.iter().enumerate() {
            let mut descriptor = *descriptor;
            if let Some(&next) = taken.get(i + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = next;
            }
            self.write_descriptor(taken[i], descriptor);
        }
        let head = taken[0];
        self.owned[usize::from(head)] = taken;
        Ok(head)
    }

    /// Turns the second descriptor of a chain of three, the data, to be written or read by the device.
    ///
    /// # Panics
    /// When `head` is not the head of a linked chain of three.
    pub fn set_direction(&self, head: u16, device_writes: bool) {
        let owned = &self.owned[usize::from(head)];
        assert_eq!(owned.len(), 3, "header, data, status");
        let flags = NEXT | if device_writes { WRITE } else { 0 };
        let at = self.descriptors + DESCRIPTOR_BYTES as u64 * u64::from(owned[1]);
        self.memory.u16(at + 12).store(flags, Relaxed);
    }

    /// Makes any head available at once.
    pub fn publish(&mut self, head: u16) {
        self.stage(head);
        self.commit();
    }

    /// Puts a head into the avail ring; the device sees it after [`Self::commit`].
    pub fn stage(&mut self, head: u16) {
        let slot = u64::from(self.staged & (self.size - 1));
        self.memory.u16(self.avail + 4 + 2 * slot).store(head, Relaxed);
        self.staged = self.staged.wrapping_add(1);
    }

    /// Shows all staged heads to the device.
    pub fn commit(&mut self) {
        self.published = self.staged;
        self.memory.u16(self.avail + 2).store(self.published, Release);
    }

    /// Sets the avail index to anything. The ring is broken afterwards, and meant to be.
    pub fn jump_avail_index(&mut self, to: u16) {
        self.staged = to;
        self.commit();
    }

    /// Whether the device wants a kick for what was published since the last time this was asked.
    pub fn kick_wanted(&mut self) -> bool {
        let (old, new) = (self.kicked, self.published);
        self.kicked = new;
        fence(SeqCst);
        if self.event_idx {
            let event = self.memory.u16(self.used + 4 + 8 * u64::from(self.size)).load(Relaxed);
            // virtio 1.2, 2.7.10: notify when the index that the device waits for was just passed.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.u16(self.used).load(Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Takes the next chain that the device gave back.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_index() == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used & (self.size - 1));
        let word = |at: u64| self.memory.u32(self.used + 4 + 8 * slot + at).load(Relaxed);
        let used = Used { head: word(0), len: word(4) };
        self.last_used = self.last_used.wrapping_add(1);
        Some(used)
    }

    /// Gives the descriptors of a chain back to be used again. For a chain of [`Self::link`] after [`Self::pop_used`].
    pub fn release(&mut self, head: u32) -> Result<()> {
        let owned = usize::try_from(head).ok().and_then(|h| self.owned.get_mut(h));
        let owned = owned.with_context(|| {
            format!("the device returned head {head}, which is outside the ring")
        })?;
        if owned.is_empty() {
            bail!("the device returned head {head}, which it did not have");
        }
        self.free.append(owned);
        Ok(())
    }

    /// Asks for a call at the next completion. False when one is there already, and no call may come.
    pub fn request_call(&self) -> bool {
        self.memory.u16(self.avail).store(0, Relaxed);
        if self.event_idx {
            self.memory
                .u16(self.avail + 4 + 2 * u64::from(self.size))
                .store(self.last_used, Relaxed);
        }
        fence(SeqCst);
        self.used_index() == self.last_used
    }

    /// Asks for no calls. With EVENT_IDX the flag means nothing, and the used event left behind does the same.
    pub fn refuse_calls(&self) {
        if !self.event_idx {
            self.memory.u16(self.avail).store(NO_INTERRUPT, Relaxed);
        }
    }

    /// Goes on where another driver with the same memory stopped: what it published is there, what it took back of the
    /// device's is `last_used`. For chains that are not linked by [`Self::link`].
    pub fn adopt(&mut self, last_used: u16) {
        let published = self.memory.u16(self.avail + 2).load(Acquire);
        (self.published, self.staged, self.kicked) = (published, published, published);
        self.last_used = last_used;
    }

    /// What was taken back of the device's so far, for [`Self::adopt`].
    #[must_use]
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Forgets everything, as a driver does that resets the device.
    pub fn reset(&mut self) {
        self.memory.u16(self.avail).store(0, Relaxed);
        self.memory.u16(self.avail + 2).store(0, Relaxed);
        self.memory.u16(self.used).store(0, Relaxed);
        self.memory.u16(self.used + 2).store(0, Relaxed);
        self.free = (0..self.size).rev().collect();
        self.owned.iter_mut().for_each(Vec::clear);
        (self.published, self.staged, self.last_used, self.kicked) = (0, 0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(event_idx: bool) -> (Arc<GuestMemory>, Ring) {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let ring = Ring::new(&memory, 8, event_idx).unwrap();
        (memory, ring)
    }

    /// The device's side of one completion.
    fn complete(memory: &GuestMemory, ring: &Ring, head: u32, len: u32) {
        let (_, _, used) = ring.addresses();
        let index = ring.used_index();
        let slot = used + 4 + 8 * u64::from(index % 8);
        memory.write(slot, &head.to_le_bytes());
        memory.write(slot + 4, &len.to_le_bytes());
        memory.u16(used + 2).store(index.wrapping_add(1), Release);
    }

    #[test]
    fn chains_are_linked_published_and_given_back() {
        let (memory, mut ring) = ring(false);
        let chain = [Descriptor::readable(BUF, 16), Descriptor::writable(BUF + 64, 512)];
        let head = ring.push_chain(&chain).unwrap();
        assert_eq!((head, ring.free_descriptors(), ring.outstanding()), (1, 6, 1));
        let (table, avail, _) = ring.addresses();
        assert_eq!(memory.read(avail, 6), [0, 0, 1, 0, 1, 0]);
        let first = memory.read(table + 16, 16);
        assert_eq!(first, Descriptor { next: 0, flags: NEXT, ..chain[0] }.bytes());
        assert_eq!(memory.read(table, 16), chain[1].bytes());
        assert_eq!(ring.pop_used(), None);
        complete(&memory, &ring, u32::from(head), 513);
        assert_eq!(ring.pop_used(), Some(Used { head: 1, len: 513 }));
        ring.release(1).unwrap();
        assert_eq!(ring.free_descriptors(), 8);
        assert!(ring.release(1).is_err() && ring.release(99).is_err());
    }

    const BUF: u64 = crate::memory::BASE;

    #[test]
    fn a_full_ring_says_so() {
        let (_memory, mut ring) = ring(false);
        let four = [Descriptor::readable(BUF, 1); 4];
        ring.push_chain(&four).unwrap();
        ring.push_chain(&four).unwrap();
        assert!(ring.push_chain(&four[..1]).is_err());
    }

    #[test]
    fn kicks_follow_the_flag_or_the_event_index() {
        let (memory, mut flagged) = ring(false);
        let (_, _, used) = flagged.addresses();
        flagged.push_chain(&[Descriptor::readable(BUF, 1)]).unwrap();
        assert!(flagged.kick_wanted());
        memory.u16(used).store(NO_NOTIFY, Relaxed);
        flagged.push_chain(&[Descriptor::readable(BUF, 1)]).unwrap();
        assert!(!flagged.kick_wanted());

        let (memory, mut indexed) = ring(true);
        let (_, _, used) = indexed.addresses();
        let event = memory.u16(used + 4 + 64);
        event.store(1, Relaxed);
        let one = [Descriptor::readable(BUF, 1)];
        indexed.push_chain(&one).unwrap();
        assert!(!indexed.kick_wanted(), "the device waits for the second");
        indexed.push_chain(&one).unwrap();
        assert!(indexed.kick_wanted());
        indexed.push_chain(&one).unwrap();
        assert!(!indexed.kick_wanted(), "it was told already");
    }

    #[test]
    fn a_call_is_asked_for_only_while_nothing_is_there() {
        let (memory, mut ring) = ring(true);
        let head = ring.push_chain(&[Descriptor::readable(BUF, 1)]).unwrap();
        assert!(ring.request_call());
        complete(&memory, &ring, u32::from(head), 0);
        assert!(!ring.request_call());
        ring.pop_used().unwrap();
        assert!(ring.request_call());
        let (_, avail, _) = ring.addresses();
        assert_eq!(memory.u16(avail + 4 + 16).load(Relaxed), 1);
    }
}
