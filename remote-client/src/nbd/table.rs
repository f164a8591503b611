//! The requests of a connection: what the guest asked, and the wire requests cut
//! from it, by what the export takes.
//!
//! Invariants:
//! - a wire request's cookie is its number, which is never used twice;
//! - `next - lowest` is at most [`RING`], so a number has its slot for itself;
//! - a guest request is freed when all of it is cut and all cuts are answered;
//! - after [`Table::restart`] every guest request that was not completed is whole
//!   again and waits, in the order of submission: the next server may take other
//!   pieces, and doing a part twice changes nothing.

use std::collections::VecDeque;

use super::handshake::Export;
use super::wire::{
    CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, Command, Dialect, REQUEST_BYTES_MAX, Request, request_bytes,
};
use crate::cursor::Cursor;
use crate::volume::{Completion, IoError, Op, Tag};

/// Most wire requests without an answer. Enough to fill any queue's depth.
const RING: u64 = 1024;
const SLOTS: usize = 1024;

/// READs of at least this many bytes are worth a system call that puts them
/// straight into guest memory.
const DIRECT_BYTES: u32 = 16 << 10;

/// Most bytes of one TRIM or WRITE_ZEROES, so that one is never long.
const RANGE_BYTES_MAX: u64 = 1 << 30;

/// What is sent to a server that cannot zero by itself.
const ZEROS_BYTES: usize = 256 << 10;
static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];

/// A wire request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    guest: u32,
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) len: u32,
    /// Where its part of the guest's buffers begins.
    pub(super) at: Cursor,
    /// A WRITE of zeros, which are not the guest's.
    zeros: bool,
    unanswered: bool,
    /// Bytes of a READ that arrived.
    pub(super) received: u32,
    /// First error of a reply that goes on.
    pub(super) failed: Option<IoError>,
}

const FREE: Child = Child {
    guest: 0,
    command: Command::Flush,
    offset: 0,
    len: 0,
    at: Cursor::START,
    zeros: false,
    unanswered: false,
    received: 0,
    failed: None,
};

impl Child {
    fn payload_bytes(&self) -> usize {
        if self.command == Command::Write { self.len as usize } else { 0 }
    }

    fn is_direct_read(&self) -> bool {
        self.command == Command::Read && self.len >= DIRECT_BYTES
    }
}

/// What is asked of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Op(Op),
    /// Which parts read as zeros.
    Map {
        offset: u64,
        len: u64,
    },
}

#[derive(Debug)]
struct Guest {
    tag: Tag,
    ask: Ask,
    /// Order of submission; `None` while the slot is free.
    serial: Option<u64>,
    iov: Vec<libc::iovec>,
    /// Bytes of the whole request; 1 for a FLUSH and a map.
    bytes: u64,
    cut: u64,
    cursor: Cursor,
    open: u32,
    result: Result<(), IoError>,
}

/// What [`Table::cut`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Nothing,
    Added,
    /// The export has no such command, and needs none.
    Done(Completion),
}

#[derive(Debug)]
pub(super) struct Table {
    guests: Vec<Guest>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    children: Box<[Child]>,
    headers: Box<[[u8; REQUEST_BYTES_MAX]]>,
    lowest: u64,
    next: u64,
    serial: u64,
    direct_reads: usize,
}

// SAFETY: the raw pointers are addresses in guest memory that the submitter
// vouches for until completion, whatever thread the queue is moved to.
unsafe impl Send for Table {}

impl Table {
    pub(super) fn new(depth: usize) -> Self {
        let mut table = Self {
            guests: Vec::with_capacity(depth),
            free: Vec::with_capacity(depth),
            waiting: VecDeque::with_capacity(depth),
            children: vec![FREE; SLOTS].into_boxed_slice(),
            headers: vec![[0; REQUEST_BYTES_MAX]; SLOTS].into_boxed_slice(),
            lowest: 1,
            next: 1,
            serial: 0,
            direct_reads: 0,
        };
        for _ in 0..depth {
            table.add_slot();
        }
        table
    }

    fn add_slot(&mut self) {
        let index = u32::try_from(self.guests.len()).expect("far fewer requests than 2^32");
        self.guests.push(Guest {
            tag: Tag(0),
            ask: Ask::Op(Op::Flush),
            serial: None,
            iov: Vec::new(),
            bytes: 0,
            cut: 0,
            cursor: Cursor::START,
            open: 0,
            result: Ok(()),
        });
        self.free.push(index);
    }

    /// The next number to be given out.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Guest requests that are not completed.
    pub(super) fn in_flight(&self) -> usize {
        self.guests.len() - self.free.len()
    }

    pub(super) fn may_cut(&self) -> bool {
        !self.waiting.is_empty() && self.next - self.lowest < RING
    }

    pub(super) fn has_direct_read(&self) -> bool {
        self.direct_reads > 0
    }

    /// Takes a guest request; `bytes` is its range.
    pub(super) fn submit(&mut self, tag: Tag, ask: Ask, data: &[libc::iovec], bytes: u64) {
        if self.free.is_empty() {
            // The caller broke its promise; more memory is better than a panic.
            self.add_slot();
        }
        let index = self.free.pop().expect("a slot was added when there was none");
        self.serial += 1;
        let guest = &mut self.guests[index as usize];
        (guest.tag, guest.ask, guest.serial) = (tag, ask, Some(self.serial));
        guest.iov.clear();
        guest.iov.extend_from_slice(data);
        guest.bytes = bytes;
        guest.make_whole();
        self.waiting.push_back(index);
    }

    /// The connection is gone: nothing of what was sent counts.
    pub(super) fn restart(&mut self) {
        self.lowest = self.next;
        self.direct_reads = 0;
        for child in &mut self.children {
            child.unanswered = false;
        }
        let mut all: Vec<(u64, u32)> = (0u32..)
            .zip(&mut self.guests)
            .filter_map(|(index, guest)| {
                guest.make_whole();
                guest.serial.map(|serial| (serial, index))
            })
            .collect();
        all.sort_unstable();
        self.waiting.clear();
        self.waiting.extend(all.into_iter().map(|(_, index)| index));
    }

    /// Cuts the next wire request from the oldest waiting guest request.
    pub(super) fn cut(&mut self, export: &Export) -> Cut {
        if !self.may_cut() {
            return Cut::Nothing;
        }
        let Some(&index) = self.waiting.front() else { return Cut::Nothing };
        let guest = &mut self.guests[index as usize];
        let flags = export.flags;
        // Without FLUSH, each change has to be durable by itself where it can be.
        let fua = if !flags.flush() && flags.fua() { CMD_FLAG_FUA } else { 0 };
        let payload_max = u64::from(export.payload_max);
        let zeros_max = payload_max.min(ZEROS_BYTES as u64);
        let op = match guest.ask {
            Ask::Op(op) => op,
            Ask::Map { offset, len } => return self.cut_map(index, export, offset, len),
        };
        let (command, bits, begin, max, zeros) = match op {
            Op::Read { offset } => (Command::Read, 0, offset, payload_max, false),
            Op::Write { offset } => (Command::Write, fua, offset, payload_max, false),
            Op::Flush if flags.flush() => (Command::Flush, 0, 0, 1, false),
            Op::Discard { offset, .. } if flags.trim() => {
                (Command::Trim, fua, offset, RANGE_BYTES_MAX, false)
            }
            Op::WriteZeroes { offset, unmap, .. } if flags.write_zeroes() => {
                let keep = if unmap { 0 } else { CMD_FLAG_NO_HOLE };
                (Command::WriteZeroes, fua | keep, offset, RANGE_BYTES_MAX, false)
            }
            Op::WriteZeroes { offset, .. } => (Command::Write, fua, offset, zeros_max, true),
            Op::Flush | Op::Discard { .. } => {
                self.waiting.pop_front();
                return Cut::Done(self.complete(index));
            }
        };
        let part = (guest.bytes - guest.cut).min(max);
        let len = if command == Command::Flush { 0 } else { part };
        let (offset, at) = (begin + guest.cut, guest.cursor);
        let len = u32::try_from(len).expect("at most 1 GiB");
        if matches!(command, Command::Read | Command::Write) && !zeros {
            guest.cursor.advance(&guest.iov, len as usize);
        }
        guest.cut += part;
        if guest.cut == guest.bytes {
            self.waiting.pop_front();
        }
        let child =
            Child { guest: index, command, offset, len, at, zeros, unanswered: true, ..FREE };
        self.add(child, bits, export.dialect);
        Cut::Added
    }

    fn cut_map(&mut self, index: u32, export: &Export, offset: u64, len: u64) -> Cut {
        self.waiting.pop_front();
        let guest = &mut self.guests[index as usize];
        if export.allocation.is_none() {
            // The server of before could tell, this one cannot.
            guest.result = Err(IoError::Unsupported);
            return Cut::Done(self.complete(index));
        }
        guest.cut = guest.bytes;
        let len = u32::try_from(len.min(RANGE_BYTES_MAX)).expect("at most 1 GiB");
        let command = Command::BlockStatus;
        let child = Child { guest: index, command, offset, len, unanswered: true, ..FREE };
        self.add(child, 0, export.dialect);
        Cut::Added
    }

    fn add(&mut self, child: Child, flags: u16, dialect: Dialect) {
        let Child { command, offset, len, .. } = child;
        let request = Request { command, flags, cookie: self.next, offset, len };
        self.headers[slot(self.next)] = request.encode(dialect == Dialect::Extended);
        self.children[slot(self.next)] = child;
        self.guests[child.guest as usize].open += 1;
        self.direct_reads += usize::from(child.is_direct_read());
        self.next += 1;
    }

    /// The unanswered wire request `number`.
    pub(super) fn unanswered(&self, number: u64) -> Option<&Child> {
        if !(self.lowest..self.next).contains(&number) {
            return None;
        }
        Some(&self.children[slot(number)]).filter(|child| child.unanswered)
    }

    pub(super) fn unanswered_mut(&mut self, number: u64) -> Option<&mut Child> {
        self.unanswered(number)?;
        Some(&mut self.children[slot(number)])
    }

    /// The buffers of the guest request that `child` was cut from.
    pub(super) fn buffers(&self, child: &Child) -> &[libc::iovec] {
        &self.guests[child.guest as usize].iov
    }

    /// Bytes of the whole wire request.
    pub(super) fn frame_bytes(&self, number: u64, dialect: Dialect) -> usize {
        let payload = self.unanswered(number).map_or(0, Child::payload_bytes);
        request_bytes(dialect == Dialect::Extended) + payload
    }

    /// Appends what of `number` is behind its first `offset` bytes; `out` may grow
    /// to `max` entries. Returns the bytes.
    pub(super) fn push_frame(
        &self,
        number: u64,
        dialect: Dialect,
        offset: usize,
        out: &mut Vec<libc::iovec>,
        max: usize,
    ) -> usize {
        let Some(child) = self.unanswered(number) else { return 0 };
        let head = request_bytes(dialect == Dialect::Extended);
        let mut pushed = 0;
        if offset < head && out.len() < max {
            let rest = &self.headers[slot(number)][offset..head];
            out.push(libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
            pushed = rest.len();
        }
        let (begin, payload) = (offset.saturating_sub(head), child.payload_bytes());
        if begin >= payload {
            return pushed;
        }
        if child.zeros {
            if out.len() < max {
                let rest = &ZEROS[..payload - begin];
                out.push(libc::iovec {
                    iov_base: rest.as_ptr().cast_mut().cast(),
                    iov_len: rest.len(),
                });
                pushed += rest.len();
            }
            return pushed;
        }
        let (buffers, mut at) = (self.buffers(child), child.at);
        at.advance(buffers, begin);
        pushed + at.push(buffers, payload - begin, out, max)
    }

    /// Records the answer of an unanswered wire request; the completion, when it
    /// was the last part of its guest request.
    pub(super) fn answer(
        &mut self,
        number: u64,
        result: Result<(), IoError>,
    ) -> Option<Completion> {
        let child = *self.unanswered(number)?;
        self.children[slot(number)].unanswered = false;
        self.direct_reads -= usize::from(child.is_direct_read());
        while self.lowest < self.next && !self.children[slot(self.lowest)].unanswered {
            self.lowest += 1;
        }
        let guest = &mut self.guests[child.guest as usize];
        guest.result = guest.result.and(result);
        guest.open -= 1;
        (guest.open == 0 && guest.cut == guest.bytes).then(|| self.complete(child.guest))
    }

    fn complete(&mut self, index: u32) -> Completion {
        self.free.push(index);
        let guest = &mut self.guests[index as usize];
        guest.serial = None;
        Completion { tag: guest.tag, result: guest.result }
    }
}

impl Guest {
    fn make_whole(&mut self) {
        (self.cut, self.cursor, self.open, self.result) = (0, Cursor::START, 0, Ok(()));
    }
}

fn slot(number: u64) -> usize {
    usize::try_from(number % RING).expect("below RING")
}

#[cfg(test)]
mod tests {
    use super::super::wire::ExportFlags;
    use super::*;

    const ALL: u16 = 0b0000_0110_1101;

    fn export(flags: u16, payload_max: u32) -> Export {
        Export {
            size_bytes: 1 << 40,
            flags: ExportFlags(flags),
            dialect: Dialect::Structured,
            min_block: 512,
            preferred_block: 4096,
            payload_max,
            allocation: None,
        }
    }

    fn iov(base: usize, len: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: len }
    }

    /// Command, flags, offset and length of each wire request for one operation.
    fn wire(op: Op, bytes: u64, export: &Export) -> Vec<(Command, u16, u64, u32)> {
        let mut table = Table::new(1);
        table.submit(Tag(1), Ask::Op(op), &[iov(0x10000, 1 << 20)], bytes);
        let mut found = Vec::new();
        while table.cut(export) == Cut::Added {
            let number = table.next() - 1;
            let child = table.unanswered(number).expect("added");
            let head = &table.headers[slot(number)];
            let flags = u16::from_be_bytes([head[4], head[5]]);
            found.push((child.command, flags, child.offset, child.len));
        }
        found
    }

    #[test]
    fn what_each_operation_becomes_on_what_server() {
        use Command::{Flush, Read, Trim, Write, WriteZeroes};
        let all = export(ALL, 4096);
        let keep = |unmap| Op::WriteZeroes { offset: 512, len: 3 << 30, unmap };
        assert_eq!(
            wire(Op::Read { offset: 512 }, 8704, &all),
            [(Read, 0, 512, 4096), (Read, 0, 4608, 4096), (Read, 0, 8704, 512)]
        );
        assert_eq!(wire(Op::Write { offset: 0 }, 512, &all), [(Write, 0, 0, 512)]);
        assert_eq!(wire(Op::Flush, 1, &all), [(Flush, 0, 0, 0)]);
        let discard = Op::Discard { offset: 512, len: 4096 };
        assert_eq!(wire(discard, 4096, &all), [(Trim, 0, 512, 4096)]);
        let gib = 1u64 << 30;
        assert_eq!(
            wire(keep(true), 3 * gib, &all),
            [0, 1, 2].map(|n| (WriteZeroes, 0, 512 + n * gib, 1 << 30))
        );
        assert_eq!(wire(keep(false), gib, &all), [(WriteZeroes, 2, 512, 1 << 30)]);
        // A server that can nothing: zeros are written, never trimmed.
        let bare = export(1, 32 << 20);
        let zeros = wire(keep(true), 600 << 10, &bare);
        assert_eq!(
            zeros,
            [
                (Write, 0, 512, 256 << 10),
                (Write, 0, 512 + (256 << 10), 256 << 10),
                (Write, 0, 512 + (512 << 10), 88 << 10)
            ]
        );
        assert_eq!(wire(Op::Flush, 1, &bare), []);
        assert_eq!(wire(discard, 4096, &bare), []);
        // FUA stands in for a FLUSH that is not there.
        let fua = export(0b1001, 4096);
        assert_eq!(wire(Op::Write { offset: 0 }, 512, &fua), [(Write, CMD_FLAG_FUA, 0, 512)]);
    }

    #[test]
    fn what_is_not_needed_is_done_at_once() {
        let mut table = Table::new(1);
        table.submit(Tag(4), Ask::Op(Op::Flush), &[], 1);
        let done = Completion { tag: Tag(4), result: Ok(()) };
        assert_eq!(table.cut(&export(1, 4096)), Cut::Done(done));
        assert_eq!(table.in_flight(), 0);
    }

    #[test]
    fn a_restart_makes_everything_whole_again_in_order() {
        let (wide, narrow) = (export(ALL, 8192), export(ALL, 4096));
        let mut table = Table::new(3);
        for tag in 0..3u32 {
            let data = [iov(0x10000, 512), iov(0x20000, 0), iov(0x30000, 15872)];
            let write = Ask::Op(Op::Write { offset: u64::from(tag) << 20 });
            table.submit(Tag(tag), write, &data, 16384);
        }
        while table.cut(&wide) == Cut::Added {}
        assert_eq!(table.next(), 7);
        assert_eq!(table.answer(3, Ok(())), None);
        let done = table.answer(4, Ok(()));
        assert_eq!(done, Some(Completion { tag: Tag(1), result: Ok(()) }));
        assert_eq!(table.answer(1, Err(IoError::Io)), None);
        table.restart();
        assert_eq!(table.in_flight(), 2);
        assert!(table.unanswered(5).is_none(), "an old number is nobody's");
        while table.cut(&narrow) == Cut::Added {}
        let offsets: Vec<_> = (7..15)
            .map(|n| table.unanswered(n).map(|c| (c.offset, c.len)).expect("unanswered"))
            .collect();
        let want: Vec<_> = [0u64, 2]
            .iter()
            .flat_map(|t| (0..4).map(move |n| ((t << 20) + n * 4096, 4096)))
            .collect();
        assert_eq!(offsets, want);
        let mut out = Vec::new();
        assert_eq!(table.push_frame(8, Dialect::Structured, 30, &mut out, 9), 4094);
        assert_eq!((out.len(), out[0].iov_base.addr()), (1, 0x30000 + 3584 + 2));
        for n in 7..10 {
            assert_eq!(table.answer(n, Ok(())), None);
        }
        // The error of before was of another connection.
        let done = table.answer(10, Ok(()));
        assert_eq!(done, Some(Completion { tag: Tag(0), result: Ok(()) }));
        assert_eq!(table.answer(10, Ok(())), None, "a second answer is nobody's");
    }
}
