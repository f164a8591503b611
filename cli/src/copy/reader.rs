//! Reads a volume piece by piece, as many at once as there are buffers. What the volume says is zeros is not read.

use baton_remote_client::{Completion, Extent, Op, Tag, VolumeQueue};

use super::map::{Known, Map};
use super::piece::{PIECE_BYTES, Pieces, is_zero};
use super::{CopyError, Role};

/// Pieces that are read or written at once: 48 MiB of memory.
pub(super) const SLOTS: usize = 12;
/// Pieces of zeros that are told of at once, so that no request covers more than 1 GiB.
const ZEROS_MAX: u64 = 256;
/// Extents of one answer: 64 KiB of memory.
const EXTENTS: usize = 4096;
/// A question is about so much, bytes.
const ASK_BYTES: u64 = 1 << 30;

const MAP_TAG: Tag = Tag(u32::MAX);

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// So many pieces read as zeros.
    Zeros { first: u64, count: u64 },
    /// A piece is in this slot, which has to be [`Reader::release`]d.
    Data { piece: u64, slot: usize },
}

#[derive(Debug)]
struct Slot {
    piece: u64,
    buffer: Box<[u8]>,
}

/// See the module's documentation.
pub(super) struct Reader {
    // First, so that nothing is read into buffers that are gone.
    queue: Box<dyn VolumeQueue>,
    role: Role,
    pieces: Pieces,
    /// Reads are whole blocks of the volume, bytes.
    block: u64,
    slots: Vec<Slot>,
    free: Vec<usize>,
    next: u64,
    reading: usize,
    /// `None`: the volume cannot tell.
    map: Option<Map>,
    /// First byte of the question under way.
    asked: Option<u64>,
    extents: Box<[Extent]>,
    done: Vec<Completion>,
}

impl Reader {
    /// Queues for a reader need this depth.
    pub(super) const DEPTH: usize = SLOTS + 1;

    pub(super) fn new(queue: Box<dyn VolumeQueue>, role: Role, pieces: Pieces, block: u32) -> Self {
        let bytes = usize::try_from(PIECE_BYTES).expect("small");
        let slot = || Slot { piece: 0, buffer: vec![0; bytes].into_boxed_slice() };
        Self {
            queue,
            role,
            pieces,
            block: u64::from(block),
            slots: (0..SLOTS).map(|_| slot()).collect(),
            free: (0..SLOTS).collect(),
            next: 0,
            reading: 0,
            map: Some(Map::default()),
            asked: None,
            extents: vec![Extent::default(); EXTENTS].into_boxed_slice(),
            done: Vec::new(),
        }
    }

    pub(super) fn wake_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.queue.wake_fd()
    }

    pub(super) fn pieces(&self) -> Pieces {
        self.pieces
    }

    /// Everything was found.
    pub(super) fn is_done(&self) -> bool {
        self.next == self.pieces.count() && self.reading == 0 && self.asked.is_none()
    }

    /// The bytes of a piece, and behind them what fills the buffer.
    pub(super) fn buffer(&mut self, slot: usize) -> &mut [u8] {
        &mut self.slots[slot].buffer
    }

    /// The buffer may be used for another piece.
    pub(super) fn release(&mut self, slot: usize) {
        self.free.push(slot);
    }

    /// Takes in what was read, and goes on reading the pieces that are `wanted`, unless `found` has more than `most`
    /// pieces of news. True: something happened, and more may at once.
    pub(super) fn pump(
        &mut self,
        wanted: &dyn Fn(u64) -> bool,
        most: usize,
        found: &mut Vec<Found>,
    ) -> Result<bool, CopyError> {
        let mut done = std::mem::take(&mut self.done);
        self.queue.poll(&mut done);
        let mut moved = !done.is_empty();
        for completion in done.drain(..) {
            self.completed(completion, found)?;
        }
        self.done = done;
        while found.len() < most && self.next < self.pieces.count() {
            if !wanted(self.next) {
                self.next += 1;
                continue;
            }
            match self.look(self.next) {
                Known::Zeros => {
                    let (first, mut count) = (self.next, 1);
                    while count < ZEROS_MAX
                        && first + count < self.pieces.count()
                        && wanted(first + count)
                        && self.look(first + count) == Known::Zeros
                    {
                        count += 1;
                    }
                    self.next += count;
                    found.push(Found::Zeros { first, count });
                }
                Known::Ask(at) if self.asked.is_none() => self.ask(at),
                Known::Ask(_) => break,
                Known::Data => {
                    let Some(slot) = self.free.pop() else { break };
                    self.read(slot);
                }
            }
            moved = true;
        }
        if moved {
            self.queue.send(&mut self.done);
            for completion in std::mem::take(&mut self.done) {
                self.completed(completion, found)?;
            }
        }
        Ok(moved)
    }

    fn look(&mut self, piece: u64) -> Known {
        let from = self.pieces.offset(piece);
        let to = from + self.pieces.bytes(piece, 1);
        self.map.as_mut().map_or(Known::Data, |map| map.look(from, to))
    }

    fn ask(&mut self, at: u64) {
        debug_assert!(at.is_multiple_of(self.block), "pieces and what is known end with a block");
        let len = ASK_BYTES.min(self.pieces.size_bytes.next_multiple_of(self.block) - at);
        // SAFETY: the extents live as long as the queue, and nobody touches them until the answer.
        if unsafe { self.queue.submit_map(MAP_TAG, at, len, &mut self.extents) } {
            self.asked = Some(at);
        } else {
            self.map = None;
        }
    }

    fn read(&mut self, slot: usize) {
        let piece = self.next;
        let len = self.pieces.bytes(piece, 1).next_multiple_of(self.block);
        let held = &mut self.slots[slot];
        held.piece = piece;
        let data = [libc::iovec {
            iov_base: held.buffer.as_mut_ptr().cast(),
            iov_len: usize::try_from(len).expect("a piece"),
        }];
        let tag = Tag(u32::try_from(slot).expect("few"));
        let offset = self.pieces.offset(piece);
        // SAFETY: the buffer lives as long as the queue, and nobody touches it until the piece was read.
        unsafe { self.queue.submit(tag, Op::Read { offset }, &data) };
        self.next += 1;
        self.reading += 1;
    }

    fn completed(&mut self, done: Completion, found: &mut Vec<Found>) -> Result<(), CopyError> {
        if done.tag == MAP_TAG {
            let at = self.asked.take().unwrap_or_default();
            let (end, block) = (self.pieces.size_bytes, self.block);
            let map = self.map.as_mut().filter(|_| done.result.is_ok());
            if !map.is_some_and(|map| map.learn(at, &self.extents, end, block)) {
                // Then everything is read.
                self.map = None;
            }
            return Ok(());
        }
        self.reading -= 1;
        let slot = done.tag.0 as usize;
        let piece = self.slots[slot].piece;
        let offset = self.pieces.offset(piece);
        if let Err(error) = done.result {
            return Err(CopyError::Io { role: self.role, doing: "reading", offset, error });
        }
        let len = usize::try_from(self.pieces.bytes(piece, 1)).expect("a piece");
        if is_zero(&self.slots[slot].buffer[..len]) {
            self.free.push(slot);
            found.push(Found::Zeros { first: piece, count: 1 });
        } else {
            found.push(Found::Data { piece, slot });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, BorrowedFd};

    use super::*;

    /// Answers at once, and to every question with the same extents. Reads as ones.
    struct Stubborn {
        extents: Vec<Extent>,
        asked: u64,
        done: Vec<Completion>,
        wake: File,
    }

    impl VolumeQueue for Stubborn {
        unsafe fn submit(&mut self, tag: Tag, _: Op, data: &[libc::iovec]) {
            for part in data {
                // SAFETY: the reader's own buffer.
                unsafe { part.iov_base.cast::<u8>().write_bytes(1, part.iov_len) };
            }
            self.done.push(Completion { tag, result: Ok(()) });
        }

        unsafe fn submit_map(&mut self, tag: Tag, _: u64, _: u64, into: &mut [Extent]) -> bool {
            into.fill(Extent::default());
            into[..self.extents.len()].copy_from_slice(&self.extents);
            self.asked += 1;
            assert!(self.asked < 100, "the same question for ever");
            self.done.push(Completion { tag, result: Ok(()) });
            true
        }

        fn poll(&mut self, completions: &mut Vec<Completion>) {
            completions.append(&mut self.done);
        }

        fn wake_fd(&self) -> BorrowedFd<'_> {
            self.wake.as_fd()
        }

        fn in_flight(&self) -> usize {
            self.done.len()
        }
    }

    #[test]
    fn a_map_that_leads_nowhere_is_not_asked_for_again() {
        let extent = |len, zeros| Extent { len, zeros };
        for extents in [
            vec![],
            vec![extent(0, 1)],
            vec![extent(1000, 1)],
            vec![extent(PIECE_BYTES - 1000, 1)],
            vec![extent(PIECE_BYTES, 0), extent(1000, 1)],
        ] {
            let wake = File::open("/dev/null").expect("it is there");
            let queue = Stubborn { extents, asked: 0, done: Vec::new(), wake };
            let pieces = Pieces { size_bytes: 3 * PIECE_BYTES };
            let mut reader = Reader::new(Box::new(queue), Role::Source, pieces, 512);
            let mut found = Vec::new();
            for _ in 0..100 {
                reader.pump(&|_| true, 100, &mut found).expect("no error");
            }
            assert!(reader.is_done());
            found.sort_by_key(|found| match found {
                Found::Data { piece, .. } => *piece,
                Found::Zeros { first, .. } => *first,
            });
            let all = [0, 1, 2]
                .map(|of| matches!(found[of], Found::Data { piece, .. } if piece == of as u64));
            assert_eq!((all, found.len()), ([true; 3], 3), "{found:?}");
        }
    }
}
