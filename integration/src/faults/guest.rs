//! A guest that stamps blocks of a disk and looks at them again, in a few bytes of memory that can be moved.
//!
//! Its driver has a fixed place in memory for each request, so that its whole state is a short [`State`] beside the
//! memory: what a live migration moves.
//!
//! ```text
//!   slot n: descriptors 3n (header), 3n+1 (data), 3n+2 (status); one page for each of their buffers
//! ```

use super::history::{Event, Kind, Recorder, STAMP_BITS, TORN, What, now_ns};
use crate::blk::{UNTOUCHED, header};
use crate::memory::GuestMemory;
use crate::raw_frontend::Queue;
use crate::ring::{Descriptor, NEXT, WRITE};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Requests in flight at most, for each disk.
pub const DEPTH: usize = 6;
/// Blocks the guest uses, from the start of the disk.
pub const BLOCKS: u32 = 24;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Descriptors of the guest's ring.
pub const QUEUE_SIZE: u16 = 32;
/// Memory that is enough for the ring and the slots.
pub const MEMORY_BYTES: usize = 256 << 10;

/// Bits of a stamp below the position of its disk.
const DISK_AT: u32 = 32;
const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES as u64 / 512;

/// A request that the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Op {
    id: u64,
    kind: Kind,
    block: u32,
    stamp: u64,
}

/// What a guest knows besides its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    last_used: u16,
    slots: [Option<Op>; DEPTH],
    /// Counts requests: their numbers, and the choice of the next.
    count: u64,
}

/// A guest on one disk.
#[derive(Debug)]
pub struct Guest {
    vmm: u64,
    disk: usize,
    state: State,
    memory: Arc<GuestMemory>,
    /// Header, data and status of each slot.
    buffers: [[u64; 3]; DEPTH],
    /// Blocks still to be looked at by a sweep.
    sweep: Vec<u32>,
    /// Answers seen in this process.
    answered: u64,
}

impl Guest {
    /// A guest that boots. `vmm` is the number of this process; after the queue nothing else may take of the memory.
    pub fn boot(vmm: u64, disk: usize, memory: &Arc<GuestMemory>) -> Result<Self> {
        let mut buffers = [[0; 3]; DEPTH];
        for slot in &mut buffers {
            for buffer in slot.iter_mut() {
                *buffer = memory.alloc(BLOCK_BYTES, 4096)?;
            }
        }
        let state = State { last_used: 0, slots: [None; DEPTH], count: 0 };
        let memory = Arc::clone(memory);
        Ok(Self { vmm, disk, state, memory, buffers, sweep: Vec::new(), answered: 0 })
    }

    /// Becomes a guest that was saved elsewhere; its memory is in place.
    pub fn resume(&mut self, state: State, queue: &mut Queue) {
        queue.ring.adopt(state.last_used);
        self.state = state;
    }

    /// What is to be saved beside the memory.
    #[must_use]
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Requests that the device has.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.state.slots.iter().flatten().count()
    }

    /// Answers seen in this process.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Looks at every block once, when told to go on.
    pub fn begin_sweep(&mut self) {
        self.sweep = (0..BLOCKS).collect();
    }

    /// Blocks a sweep has not looked at, and requests in flight.
    #[must_use]
    pub fn sweep_left(&self) -> usize {
        self.sweep.len() + self.outstanding()
    }

    /// Takes the answers that are there.
    pub fn take_answers(&mut self, queue: &mut Queue, recorder: &mut Recorder) -> Result<()> {
        while let Some(used) = queue.ring.pop_used() {
            self.state.last_used = queue.ring.last_used();
            let slot = usize::try_from(used.head / 3)?;
            let op = self.state.slots.get_mut(slot).and_then(Option::take);
            let op = op.filter(|_| used.head.is_multiple_of(3));
            let op = op.with_context(|| format!("head {} was answered and not sent", used.head))?;
            self.answered += 1;
            let [_, data, status] = self.buffers[slot];
            let stamp = match op.kind {
                Kind::Read => self.read_stamp(op.block, data),
                Kind::Write | Kind::Flush => op.stamp,
            };
            let status = self.memory.read_byte(status);
            recorder.record(&Event { stamp, status, ..self.event(What::Complete, op) })?;
        }
        recorder.write_out()
    }

    /// Sends new requests: random ones, or what is left of a sweep.
    pub fn send(&mut self, queue: &mut Queue, recorder: &mut Recorder, random: bool) -> Result<()> {
        let mut heads = Vec::new();
        for slot in 0..DEPTH {
            if self.state.slots[slot].is_some() {
                continue;
            }
            let next = if random { self.choose() } else { self.next_of_sweep() };
            let Some((kind, block)) = next else { continue };
            self.state.count += 1;
            let stamp = self.vmm << STAMP_BITS | (self.disk as u64) << DISK_AT | self.state.count;
            let op =
                Op { id: stamp, kind, block, stamp: if kind == Kind::Write { stamp } else { 0 } };
            self.state.slots[slot] = Some(op);
            self.fill(queue, slot, op);
            recorder.record(&self.event(What::Submit, op))?;
            heads.push(u16::try_from(3 * slot)?);
        }
        if heads.is_empty() {
            return Ok(());
        }
        recorder.write_out()?;
        for head in heads {
            queue.ring.stage(head);
        }
        queue.ring.commit();
        queue.kick()
    }

    /// A block that nothing is in flight for; now and then a flush.
    fn choose(&mut self) -> Option<(Kind, u32)> {
        let random = mix(self.state.count ^ self.vmm << 32 ^ (self.disk as u64) << 48);
        if random.is_multiple_of(16) {
            return Some((Kind::Flush, 0));
        }
        let block = u32::try_from((random >> 8) % u64::from(BLOCKS)).expect("BLOCKS is small");
        let free = (0..BLOCKS).map(|n| (block + n) % BLOCKS).find(|b| !self.is_busy(*b))?;
        Some((if random & 0x40 == 0 { Kind::Read } else { Kind::Write }, free))
    }

    fn next_of_sweep(&mut self) -> Option<(Kind, u32)> {
        let at = self.sweep.iter().position(|block| !self.is_busy(*block))?;
        Some((Kind::Read, self.sweep.remove(at)))
    }

    fn is_busy(&self, block: u32) -> bool {
        self.state.slots.iter().flatten().any(|op| op.kind != Kind::Flush && op.block == block)
    }

    fn fill(&self, queue: &Queue, slot: usize, op: Op) {
        let [head, data, status] = self.buffers[slot];
        let (code, flags) = match op.kind {
            Kind::Read => (0, WRITE),
            Kind::Write => (1, 0),
            Kind::Flush => (4, 0),
        };
        self.memory.write(head, &header(code, u64::from(op.block) * SECTORS_PER_BLOCK));
        self.memory.write(status, &[UNTOUCHED]);
        if op.kind == Kind::Write {
            self.memory.write(data, &block_bytes(op.stamp, op.block));
        }
        let first = u16::try_from(3 * slot).expect("few slots");
        let chain = |at: u64, len: usize, flags: u16, next: u16| Descriptor {
            addr: at,
            len: u32::try_from(len).expect("a block is short"),
            flags,
            next,
        };
        let after_head = if op.kind == Kind::Flush { first + 2 } else { first + 1 };
        queue.ring.write_descriptor(first, chain(head, 16, NEXT, after_head));
        queue.ring.write_descriptor(first + 1, chain(data, BLOCK_BYTES, NEXT | flags, first + 2));
        queue.ring.write_descriptor(first + 2, chain(status, 1, WRITE, 0));
    }

    fn read_stamp(&self, block: u32, data: u64) -> u64 {
        let bytes = self.memory.read(data, BLOCK_BYTES);
        stamp_of(&bytes, block).unwrap_or(TORN)
    }

    fn event(&self, what: What, op: Op) -> Event {
        let Op { id, kind, block, stamp } = op;
        let (vmm, disk) = (self.vmm, self.disk);
        Event { at_ns: now_ns(), vmm, disk, what, op: id, kind, block, stamp, status: 0 }
    }
}

/// A whole block of one stamp: each eight bytes say the stamp and where they are.
#[must_use]
pub fn block_bytes(stamp: u64, block: u32) -> Vec<u8> {
    (0..BLOCK_BYTES as u64 / 8).flat_map(|at| word(stamp, block, at).to_le_bytes()).collect()
}

fn word(stamp: u64, block: u32, at: u64) -> u64 {
    if at == 0 { stamp } else { mix(stamp ^ u64::from(block) << 20 ^ at) }
}

/// The stamp of a block, or an error when its parts do not belong together or to that block.
pub fn stamp_of(bytes: &[u8], block: u32) -> Result<u64> {
    let words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes")));
    let mut words = words.peekable();
    let stamp = *words.peek().context("a block has words")?;
    if stamp == 0 && bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    if (0..).zip(words).any(|(at, found)| found != word(stamp, block, at)) {
        bail!("the block's parts do not belong together");
    }
    Ok(stamp)
}

/// splitmix64: a value that looks random, the same for the same input.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_found_again_and_damage_is_seen() {
        assert_eq!(stamp_of(&[0; BLOCK_BYTES], 3).unwrap(), 0);
        let good = block_bytes(77, 3);
        assert_eq!(stamp_of(&good, 3).unwrap(), 77);
        assert!(stamp_of(&good, 4).is_err());
        let mut torn = block_bytes(78, 3);
        torn[..512].copy_from_slice(&good[..512]);
        assert!(stamp_of(&torn, 3).is_err());
        let mut half = good;
        half[2048..].fill(0);
        assert!(stamp_of(&half, 3).is_err());
    }
}
