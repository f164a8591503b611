//! The requests of a session: what the guest asked, and the wire requests cut
//! from it.
//!
//! ```text
//!   guest requests (slab, `depth`)      wire requests (ring by seq)
//!   [tag, buffers, cut so far] --cut--> [seq, opcode, range of the buffers]
//!              ^                                    |
//!              +------- last one answered ----------+
//! ```
//!
//! Invariants:
//! - every seq in `lowest..next` was given out, and `lowest` is unanswered;
//! - `next - lowest` is at most [`RING`], so a seq has its slot for itself;
//! - a guest request is freed when all of it is cut and all cuts are answered,
//!   and only then is its memory no longer touched.
//!
//! Does not know connections: what was sent is the session's affair.

use std::collections::VecDeque;

use baton_protocol::frame::{FLAG_UNMAP, REQUEST_HEADER_BYTES, WINDOW_REQUESTS};
use baton_protocol::{Epoch, Opcode, QueueId, RequestHeader, Seq, SessionId};

use super::handoff::ASKS;
use crate::baton::ledger::Mark;
use crate::cursor::Cursor;
use crate::volume::{Completion, IoError, Op, Tag};

/// Slots for wire requests: the widest window a server may offer.
pub(super) const RING: u64 = WINDOW_REQUESTS;
#[allow(clippy::cast_possible_truncation, reason = "1024")]
const SLOTS: usize = RING as usize;

/// READs of at least this many bytes are worth a system call that puts them
/// straight into guest memory. Below, a copy out of the batch is cheaper:
/// a `recvmsg` costs as much as copying several pages.
pub(super) const DIRECT_BYTES: u32 = 16 << 10;

/// What every header of a session says about its sender.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) session: SessionId,
    pub(super) queue: QueueId,
    pub(super) epoch: Epoch,
}

/// Why a wire request exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Part of the guest request in this slot of the slab.
    Guest(u32),
    /// Is anybody there?
    Ping,
    /// Parked at the server until there is news.
    Event,
    /// Parked at the server until the access record changes.
    Access,
    /// Gives the volume back.
    Release,
    /// Asks something of a handoff; which says the number.
    Handoff(u8),
    /// Shows the anchor's decision.
    Open,
}

impl Purpose {
    fn is_parked(self) -> bool {
        matches!(self, Self::Event | Self::Access)
    }
}

/// Requests of the session's own that have a body.
const BODIES: usize = ASKS + 1;

/// The body of a request of the session's own.
#[derive(Debug)]
struct Body {
    #[allow(dead_code, reason = "keeps what `iov` names")]
    bytes: Vec<u8>,
    /// Names `bytes`.
    iov: [libc::iovec; 1],
}

impl Body {
    fn new(bytes: &[u8]) -> Self {
        let mut bytes = bytes.to_vec();
        let iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        Self { bytes, iov }
    }
}

/// A wire request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub(super) purpose: Purpose,
    pub(super) opcode: Opcode,
    pub(super) unanswered: bool,
    /// Payload of the request (WRITE, HANDOFF, OPEN) or of its reply (READ), bytes.
    pub(super) len: u32,
    /// Where that payload begins in the guest's buffers.
    pub(super) at: Cursor,
}

const FREE: Child = Child {
    purpose: Purpose::Ping,
    opcode: Opcode::Ping,
    unanswered: false,
    len: 0,
    at: Cursor::START,
};

impl Child {
    /// Bytes that follow the header in the request.
    pub(super) fn payload_bytes(&self) -> usize {
        match self.opcode {
            Opcode::Write | Opcode::Handoff | Opcode::Open => self.len as usize,
            _ => 0,
        }
    }

    /// Bytes of the whole request.
    pub(super) fn frame_bytes(&self) -> usize {
        REQUEST_HEADER_BYTES + self.payload_bytes()
    }

    fn is_direct_read(&self) -> bool {
        self.opcode == Opcode::Read && self.len >= DIRECT_BYTES
    }
}

#[derive(Debug)]
struct Guest {
    tag: Tag,
    op: Op,
    /// The guest's memory. Keeps its capacity over uses of the slot.
    iov: Vec<libc::iovec>,
    /// Bytes not yet cut into wire requests; for requests without buffers, 1
    /// until the one wire request was cut.
    uncut: u64,
    /// Bytes cut.
    cut: u64,
    cursor: Cursor,
    /// Wire requests not yet answered.
    open: u32,
    result: Result<(), IoError>,
    /// Of a FLUSH.
    mark: Mark,
}

#[derive(Debug)]
pub(super) struct Table {
    guests: Vec<Guest>,
    free: Vec<u32>,
    /// Guest requests that are not cut to the end, oldest first.
    waiting: VecDeque<u32>,
    children: Box<[Child]>,
    /// Apart from `children` so that neighbours on the wire are neighbours in
    /// memory: a run of READs is one iovec.
    headers: Box<[[u8; REQUEST_HEADER_BYTES]]>,
    /// By [`body_slot`].
    bodies: [Body; BODIES],
    lowest: u64,
    next: u64,
    /// Unanswered wire requests that the server should answer soon: all but
    /// EVENT and ACCESS.
    live: usize,
    direct_reads: usize,
}

// SAFETY: the raw pointers are addresses in guest memory that the submitter
// vouches for until completion, whatever thread the queue is moved to.
unsafe impl Send for Table {}

impl Table {
    pub(super) fn new(depth: usize, first: Seq) -> Self {
        let first = first.0.max(1);
        let mut table = Self {
            guests: Vec::with_capacity(depth),
            free: Vec::with_capacity(depth),
            waiting: VecDeque::with_capacity(depth),
            children: vec![FREE; SLOTS].into_boxed_slice(),
            headers: vec![[0; REQUEST_HEADER_BYTES]; SLOTS].into_boxed_slice(),
            bodies: std::array::from_fn(|_| Body::new(&[])),
            lowest: first,
            next: first,
            live: 0,
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
            op: Op::Flush,
            iov: Vec::new(),
            uncut: 0,
            cut: 0,
            cursor: Cursor::default(),
            open: 0,
            result: Ok(()),
            mark: Mark::default(),
        });
        self.free.push(index);
    }

    /// The lowest seq that was not answered, or the next one to be given out.
    pub(super) fn lowest(&self) -> Seq {
        Seq(self.lowest)
    }

    /// The next seq to be given out.
    pub(super) fn next(&self) -> Seq {
        Seq(self.next)
    }

    /// Guest requests that are not completed.
    pub(super) fn in_flight(&self) -> usize {
        self.guests.len() - self.free.len()
    }

    /// Whether the server owes an answer soon, or would if it had the request.
    pub(super) fn is_live(&self) -> bool {
        self.live > 0 || !self.waiting.is_empty()
    }

    /// Whether guest requests wait to be cut.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a large READ is unanswered.
    pub(super) fn has_direct_read(&self) -> bool {
        self.direct_reads > 0
    }

    /// Takes a guest request whose buffers hold `bytes`.
    pub(super) fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec], bytes: u64) {
        if self.free.is_empty() {
            // The caller broke its promise; more memory is better than a panic.
            self.add_slot();
        }
        let index = self.free.pop().expect("a slot was added when there was none");
        let guest = &mut self.guests[index as usize];
        guest.tag = tag;
        guest.op = op;
        guest.iov.clear();
        guest.iov.extend_from_slice(data);
        guest.uncut = if matches!(op, Op::Read { .. } | Op::Write { .. }) { bytes } else { 1 };
        guest.cut = 0;
        guest.cursor = Cursor::default();
        guest.open = 0;
        guest.result = Ok(());
        self.waiting.push_back(index);
    }

    /// Takes a FLUSH.
    pub(super) fn submit_flush(&mut self, tag: Tag, mark: Mark) {
        self.submit(tag, Op::Flush, &[], 0);
        if let Some(&index) = self.waiting.back() {
            self.guests[index as usize].mark = mark;
        }
    }

    /// What the FLUSH that `child` belongs to remembers.
    pub(super) fn mark(&self, child: &Child) -> Mark {
        match child.purpose {
            Purpose::Guest(index) => self.guests[index as usize].mark,
            _ => Mark::default(),
        }
    }

    /// Cuts the next wire request from the oldest waiting guest request, if
    /// there is one. The caller has checked the window.
    pub(super) fn cut(&mut self, payload_max: u32, stamp: &Stamp) -> bool {
        let Some(&index) = self.waiting.front() else {
            return false;
        };
        let guest = &mut self.guests[index as usize];
        let at = guest.cursor;
        let mut len = 0;
        let (opcode, offset, range, flags) = match guest.op {
            Op::Read { offset } | Op::Write { offset } => {
                len = u32::try_from(guest.uncut).unwrap_or(u32::MAX).min(payload_max);
                let begin = offset + guest.cut;
                guest.cursor.advance(&guest.iov, len as usize);
                guest.cut += u64::from(len);
                guest.uncut -= u64::from(len);
                let read = matches!(guest.op, Op::Read { .. });
                let opcode = if read { Opcode::Read } else { Opcode::Write };
                (opcode, begin, u64::from(len), 0)
            }
            Op::Flush => (Opcode::Flush, 0, 0, 0),
            Op::Discard { offset, len } => (Opcode::Discard, offset, len, 0),
            Op::WriteZeroes { offset, len, unmap } => {
                (Opcode::WriteZeroes, offset, len, if unmap { FLAG_UNMAP } else { 0 })
            }
        };
        if !opcode_has_buffers(opcode) {
            guest.uncut = 0;
        }
        guest.open += 1;
        if guest.uncut == 0 {
            self.waiting.pop_front();
        }
        let child = Child { purpose: Purpose::Guest(index), opcode, unanswered: true, len, at };
        self.add(child, flags, offset, range, stamp);
        true
    }

    /// Adds a request of the session's own. The caller has checked the window,
    /// and that none of this purpose with a body is unanswered.
    pub(super) fn add_own(
        &mut self,
        purpose: Purpose,
        offset: u64,
        range: u64,
        body: &[u8],
        stamp: &Stamp,
    ) {
        let opcode = match purpose {
            Purpose::Event => Opcode::Event,
            Purpose::Access => Opcode::Access,
            Purpose::Release => Opcode::Release,
            Purpose::Handoff(_) => Opcode::Handoff,
            Purpose::Open => Opcode::Open,
            Purpose::Ping | Purpose::Guest(_) => Opcode::Ping,
        };
        let mut len = 0;
        if let Some(at) = body_slot(purpose) {
            self.bodies[at] = Body::new(body);
            len = u32::try_from(body.len()).expect("bounded by ASK_BYTES_MAX");
        }
        let child = Child { purpose, opcode, unanswered: true, len, ..FREE };
        self.add(child, 0, offset, range, stamp);
    }

    /// Gives an unanswered request of the session's own another body. Nothing of
    /// it may have been sent on the connection.
    pub(super) fn replace_body(&mut self, purpose: Purpose, body: &[u8]) {
        let (Some(seq), Some(at)) = (self.find_own(purpose), body_slot(purpose)) else { return };
        self.bodies[at] = Body::new(body);
        let (child, bytes) = (&mut self.children[slot(seq)], &mut self.headers[slot(seq)]);
        child.len = u32::try_from(body.len()).expect("bounded by ASK_BYTES_MAX");
        let mut header = RequestHeader::decode(bytes).expect("we encoded it");
        header.payload_len = child.len;
        *bytes = header.encode();
    }

    /// Forgets what is parked at the server; it is asked anew, under new numbers.
    pub(super) fn forget_parked(&mut self) {
        for seq in self.lowest..self.next {
            let child = &mut self.children[slot(seq)];
            child.unanswered &= !child.purpose.is_parked();
        }
        self.raise_lowest();
    }

    fn raise_lowest(&mut self) {
        while self.lowest < self.next && !self.children[slot(self.lowest)].unanswered {
            self.lowest += 1;
        }
    }

    fn add(&mut self, child: Child, flags: u8, offset: u64, len: u64, stamp: &Stamp) {
        debug_assert!(self.next - self.lowest < RING);
        let header = RequestHeader {
            opcode: child.opcode,
            flags,
            queue: stamp.queue,
            seq: Seq(self.next),
            epoch: stamp.epoch,
            session: stamp.session,
            offset,
            len,
            payload_len: u32::try_from(child.payload_bytes()).expect("len is a u32"),
            payload_crc32c: 0,
        };
        let slot = slot(self.next);
        self.headers[slot] = header.encode();
        self.children[slot] = child;
        self.live += usize::from(!child.purpose.is_parked());
        self.direct_reads += usize::from(child.is_direct_read());
        self.next += 1;
    }

    /// The unanswered wire request `seq`.
    pub(super) fn unanswered(&self, seq: Seq) -> Option<Child> {
        if !(self.lowest..self.next).contains(&seq.0) {
            return None;
        }
        let child = self.children[slot(seq.0)];
        child.unanswered.then_some(child)
    }

    /// Whether a request of this purpose is unanswered.
    pub(super) fn has_own(&self, purpose: Purpose) -> bool {
        self.find_own(purpose).is_some()
    }

    fn find_own(&self, purpose: Purpose) -> Option<u64> {
        (self.lowest..self.next)
            .find(|seq| self.unanswered(Seq(*seq)).is_some_and(|c| c.purpose == purpose))
    }

    /// The lowest seq of a guest request that was not answered, or the next one
    /// to be given out.
    pub(super) fn lowest_guest(&self) -> Seq {
        let is_guest = |child: Child| matches!(child.purpose, Purpose::Guest(_));
        let found =
            (self.lowest..self.next).find(|seq| self.unanswered(Seq(*seq)).is_some_and(is_guest));
        Seq(found.unwrap_or(self.next))
    }

    /// The longest payload among unanswered wire requests of the guest, bytes.
    pub(super) fn longest(&self) -> u32 {
        (self.lowest..self.next)
            .filter_map(|seq| self.unanswered(Seq(seq)))
            .filter(|child| matches!(child.purpose, Purpose::Guest(_)))
            .map(|child| child.len)
            .max()
            .unwrap_or(0)
    }

    /// Header bytes of `seq`, where they stay until it is answered.
    pub(super) fn header(&self, seq: Seq) -> &[u8; REQUEST_HEADER_BYTES] {
        &self.headers[slot(seq.0)]
    }

    /// The buffers of the guest request that `child` was cut from.
    pub(super) fn buffers(&self, child: &Child) -> &[libc::iovec] {
        match child.purpose {
            Purpose::Guest(index) => &self.guests[index as usize].iov,
            purpose => body_slot(purpose).map_or(&[], |at| &self.bodies[at].iov),
        }
    }

    /// Stamps all unanswered requests anew.
    pub(super) fn restamp(&mut self, epoch: Epoch) {
        for seq in self.lowest..self.next {
            let (child, bytes) = (&self.children[slot(seq)], &mut self.headers[slot(seq)]);
            if !child.unanswered {
                continue;
            }
            let mut header = RequestHeader::decode(bytes).expect("we encoded it");
            header.epoch = epoch;
            *bytes = header.encode();
        }
    }

    /// Records the answer of an unanswered wire request; returns the completion
    /// of its guest request when that was the last part.
    pub(super) fn answer(&mut self, seq: Seq, result: Result<(), IoError>) -> Option<Completion> {
        let child = self.unanswered(seq)?;
        self.children[slot(seq.0)].unanswered = false;
        self.live -= usize::from(!child.purpose.is_parked());
        self.direct_reads -= usize::from(child.is_direct_read());
        self.raise_lowest();
        let Purpose::Guest(index) = child.purpose else {
            return None;
        };
        let guest = &mut self.guests[index as usize];
        guest.result = guest.result.and(result);
        guest.open -= 1;
        if guest.open > 0 || guest.uncut > 0 {
            return None;
        }
        self.free.push(index);
        Some(Completion { tag: guest.tag, result: guest.result })
    }
}

fn opcode_has_buffers(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Read | Opcode::Write)
}

/// Where the body of a request of the session's own is kept.
fn body_slot(purpose: Purpose) -> Option<usize> {
    match purpose {
        Purpose::Handoff(at) => Some(usize::from(at)),
        Purpose::Open => Some(ASKS),
        _ => None,
    }
}

fn slot(seq: u64) -> usize {
    usize::try_from(seq % RING).expect("below RING")
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { session: SessionId(5), queue: QueueId(1), epoch: Epoch(7) };

    fn iov(base: usize, len: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: len }
    }

    fn header(table: &Table, seq: u64) -> RequestHeader {
        RequestHeader::decode(table.header(Seq(seq))).expect("valid")
    }

    #[test]
    fn a_large_request_is_cut_and_completes_once_with_its_first_error() {
        let mut table = Table::new(2, Seq(1));
        let data = [iov(0x10000, 512), iov(0x20000, 0), iov(0x30000, 9728)];
        table.submit(Tag(3), Op::Write { offset: 4096 }, &data, 10240);
        while table.cut(4096, &STAMP) {}
        assert_eq!(table.next(), Seq(4));
        let ranges: Vec<_> =
            (1..4).map(|s| (header(&table, s).offset, header(&table, s).len)).collect();
        assert_eq!(ranges, [(4096, 4096), (8192, 4096), (12288, 2048)]);
        let mut out = Vec::new();
        let second = table.unanswered(Seq(2)).expect("unanswered");
        assert_eq!(second.at.push(table.buffers(&second), 4096, &mut out, 9), 4096);
        assert_eq!((out.len(), out[0].iov_base.addr(), out[0].iov_len), (1, 0x30000 + 3584, 4096));
        assert_eq!(table.answer(Seq(2), Err(IoError::NoSpace)), None);
        assert_eq!(table.lowest(), Seq(1));
        assert_eq!(table.answer(Seq(2), Ok(())), None, "a second answer is nobody's");
        assert_eq!(table.answer(Seq(1), Ok(())), None);
        assert_eq!(table.lowest(), Seq(3));
        assert_eq!(table.in_flight(), 1);
        let done = table.answer(Seq(3), Err(IoError::Io));
        assert_eq!(done, Some(Completion { tag: Tag(3), result: Err(IoError::NoSpace) }));
        assert_eq!((table.in_flight(), table.is_live(), table.lowest()), (0, false, Seq(4)));
    }

    #[test]
    fn restamping_reaches_only_what_is_unanswered() {
        let mut table = Table::new(4, Seq(9));
        for _ in 0..3 {
            table.submit(Tag(0), Op::Flush, &[], 0);
            table.cut(4096, &STAMP);
        }
        table.add_own(Purpose::Event, 4, 0, &[], &STAMP);
        table.answer(Seq(10), Ok(()));
        table.restamp(Epoch(8));
        let epochs: Vec<_> = (9..13).map(|s| header(&table, s).epoch.0).collect();
        assert_eq!(epochs, [8, 7, 8, 8]);
        assert!(table.has_own(Purpose::Event) && !table.has_own(Purpose::Ping));
    }

    #[test]
    fn what_is_parked_can_be_forgotten_and_the_rest_stays() {
        let mut table = Table::new(1, Seq(1));
        table.add_own(Purpose::Event, 4, 0, &[], &STAMP);
        table.add_own(Purpose::Access, 1, 2, &[], &STAMP);
        assert!(!table.is_live(), "nobody waits for what is parked");
        assert_eq!((header(&table, 2).offset, header(&table, 2).len), (1, 2));
        table.add_own(Purpose::Handoff(0), 0, 0, &[1; 40], &STAMP);
        assert!(table.is_live());
        table.forget_parked();
        assert_eq!(table.lowest(), Seq(3));
        assert!(!table.has_own(Purpose::Event) && !table.has_own(Purpose::Access));
        let child = table.unanswered(Seq(3)).expect("kept");
        assert_eq!((child.frame_bytes(), header(&table, 3).payload_len), (64 + 40, 40));
        table.replace_body(Purpose::Handoff(0), &[2; 64]);
        let child = table.unanswered(Seq(3)).expect("kept");
        assert_eq!((child.frame_bytes(), header(&table, 3).payload_len), (128, 64));
        assert_eq!(table.bodies[0].bytes, [2; 64]);
        assert_eq!(table.lowest_guest(), table.next());
    }

    #[test]
    fn too_many_requests_cost_memory_and_nothing_else() {
        let mut table = Table::new(1, Seq(1));
        for tag in 0..3 {
            table.submit(Tag(tag), Op::Flush, &[], 0);
        }
        assert_eq!(table.in_flight(), 3);
        while table.cut(4096, &STAMP) {}
        let tags: Vec<_> =
            (1..4).filter_map(|s| table.answer(Seq(s), Ok(()))).map(|c| c.tag.0).collect();
        assert_eq!(tags, [0, 1, 2]);
    }
}
