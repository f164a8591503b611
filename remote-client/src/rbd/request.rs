//! A request and the pieces in which it goes to the cluster. Pure.
//!
//! A request may be of any length; what is under way at once is bounded, so a
//! long one goes piece by piece. It is done when its last piece is, and fails
//! with the first failure.

use std::time::Instant;

use crate::volume::{IoError, Op, Tag};

/// The largest piece that carries data, bytes: an image's usual object.
pub(super) const DATA_PIECE_BYTES: u64 = 4 << 20;
/// The largest piece without data, bytes: the library turns it into one
/// request per object.
pub(super) const BARE_PIECE_BYTES: u64 = 64 << 20;
/// What such a piece counts for, bytes: its requests, roughly.
const BARE_PIECE_COST: usize = 64 << 10;
/// The most buffers of one piece.
const PIECE_BUFFERS: usize = crate::file::IOV_MAX;

/// Part of a request.
#[derive(Debug)]
pub(super) struct Piece {
    /// The operation on this part.
    pub(super) op: Op,
    /// From the start of the request, bytes.
    pub(super) at: u64,
    /// Bytes.
    pub(super) len: u64,
    /// WRITE: where from.
    pub(super) buffers: Vec<libc::iovec>,
}

impl Piece {
    /// What it takes of the memory that a volume may use, bytes.
    pub(super) fn cost(&self) -> usize {
        match self.op {
            Op::Read { .. } | Op::Write { .. } => usize::try_from(self.len).unwrap_or(usize::MAX),
            Op::Discard { .. } | Op::WriteZeroes { .. } => BARE_PIECE_COST,
            Op::Flush => 0,
        }
    }
}

/// A request that is not done.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) tag: Tag,
    pub(super) since: Instant,
    op: Op,
    data: Vec<libc::iovec>,
    len: u64,
    /// Bytes of which pieces were made.
    made: u64,
    /// The buffer that is next, and how much of it was used.
    next: (usize, usize),
    /// A flush was made.
    flushed: bool,
    /// Pieces made and not come back.
    under_way: u32,
    failed: Option<IoError>,
}

impl Request {
    pub(super) fn new(tag: Tag, op: Op, data: &[libc::iovec], len: u64, since: Instant) -> Self {
        let (next, flushed, under_way, failed) = ((0, 0), false, 0, None);
        Self { tag, since, op, data: data.to_vec(), len, made: 0, next, flushed, under_way, failed }
    }

    /// The next piece, to be sent; `None`: there is no more.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        let piece = self.cut();
        self.under_way += u32::from(piece.is_some());
        piece
    }

    fn cut(&mut self) -> Option<Piece> {
        if self.op == Op::Flush {
            let first = !std::mem::replace(&mut self.flushed, true);
            let piece = Piece { op: Op::Flush, at: 0, len: 0, buffers: Vec::new() };
            return first.then_some(piece);
        }
        let (at, left) = (self.made, self.len - self.made);
        if left == 0 || self.failed.is_some() {
            return None;
        }
        let (op, len, buffers) = match self.op {
            Op::Read { offset } => {
                let len = left.min(DATA_PIECE_BYTES);
                (Op::Read { offset: offset + at }, len, Vec::new())
            }
            Op::Write { offset } => {
                let (buffers, len) = self.take(left.min(DATA_PIECE_BYTES));
                (Op::Write { offset: offset + at }, len, buffers)
            }
            Op::Discard { offset, .. } => {
                let len = left.min(BARE_PIECE_BYTES);
                (Op::Discard { offset: offset + at, len }, len, Vec::new())
            }
            Op::WriteZeroes { offset, unmap, .. } => {
                let len = left.min(BARE_PIECE_BYTES);
                (Op::WriteZeroes { offset: offset + at, len, unmap }, len, Vec::new())
            }
            Op::Flush => unreachable!("answered above"),
        };
        self.made += len;
        Some(Piece { op, at, len, buffers })
    }

    /// Buffers for the next `want` bytes, or fewer bytes when they are many.
    fn take(&mut self, want: u64) -> (Vec<libc::iovec>, u64) {
        let (mut buffers, mut got) = (Vec::new(), 0u64);
        while got < want && buffers.len() < PIECE_BUFFERS && self.next.0 < self.data.len() {
            let (index, used) = self.next;
            let whole = self.data[index];
            let room = usize::try_from(want - got).unwrap_or(usize::MAX);
            let len = (whole.iov_len - used).min(room);
            if len > 0 {
                let iov_base = whole.iov_base.wrapping_byte_add(used);
                buffers.push(libc::iovec { iov_base, iov_len: len });
                got += len as u64;
            }
            self.next =
                if used + len == whole.iov_len { (index + 1, 0) } else { (index, used + len) };
        }
        (buffers, got)
    }

    /// A piece came back, or could not be sent.
    pub(super) fn came_back(&mut self, result: Result<(), IoError>) {
        self.under_way -= 1;
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
    }

    /// The outcome, once there is one.
    pub(super) fn outcome(&self) -> Option<Result<(), IoError>> {
        let all_made = match self.op {
            Op::Flush => self.flushed,
            _ => self.made == self.len,
        };
        if self.under_way > 0 || !(all_made || self.failed.is_some()) {
            return None;
        }
        Some(self.failed.map_or(Ok(()), Err))
    }

    /// Puts what was read where the submitter wants it.
    ///
    /// # Safety
    /// The buffers the request was made with are valid.
    pub(super) unsafe fn fill(&self, at: u64, mut bytes: &[u8]) {
        let mut skip = usize::try_from(at).unwrap_or(usize::MAX);
        for buffer in &self.data {
            if skip >= buffer.iov_len {
                skip -= buffer.iov_len;
                continue;
            }
            let len = (buffer.iov_len - skip).min(bytes.len());
            let (now, later) = bytes.split_at(len);
            // SAFETY: within the buffer, which the caller vouches for; a guest
            // may see half of it, as with any device.
            unsafe {
                let to = buffer.iov_base.cast::<u8>().add(skip);
                std::ptr::copy_nonoverlapping(now.as_ptr(), to, len);
            }
            (bytes, skip) = (later, 0);
            if bytes.is_empty() {
                return;
            }
        }
    }
}

/// Whether a request may be made at all; its length in bytes.
pub(super) fn check(
    op: Op,
    data: &[libc::iovec],
    size_bytes: u64,
    read_only: bool,
) -> Result<u64, IoError> {
    const SECTOR_BYTES: u64 = baton_protocol::units::SECTOR_BYTES;
    let (offset, len) = match op {
        Op::Flush => return Ok(0),
        Op::Read { offset } | Op::Write { offset } => {
            let len = data.iter().try_fold(0u64, |sum, part| sum.checked_add(part.iov_len as u64));
            (offset, len.ok_or(IoError::OutOfRange)?)
        }
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
    };
    if read_only && !matches!(op, Op::Read { .. }) {
        return Err(IoError::ReadOnly);
    }
    let aligned = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
    match offset.checked_add(len) {
        Some(end) if aligned && end <= size_bytes => Ok(len),
        _ => Err(IoError::OutOfRange),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(op: Op, data: &[libc::iovec], len: u64) -> Request {
        Request::new(Tag(1), op, data, len, Instant::now())
    }

    fn parts(sizes: &[usize]) -> Vec<libc::iovec> {
        let mut base = 4096;
        let part = |len: &usize| {
            let iov_base = std::ptr::without_provenance_mut(base);
            // A gap between, so that a part taken too long is seen.
            base += len + 512;
            libc::iovec { iov_base, iov_len: *len }
        };
        sizes.iter().map(part).collect()
    }

    #[test]
    fn bounds_are_checked_before_anything_is_sent() {
        let size = 1 << 20;
        let data = parts(&[512, 512]);
        let read = |offset| check(Op::Read { offset }, &data, size, true);
        assert_eq!(read(0), Ok(1024));
        assert_eq!(read(size - 1024), Ok(1024));
        for offset in [1, size - 512, size, u64::MAX - 511] {
            assert_eq!(read(offset), Err(IoError::OutOfRange), "{offset}");
        }
        let zeroes = |offset, len| Op::WriteZeroes { offset, len, unmap: false };
        assert_eq!(check(zeroes(512, u64::MAX - 511), &[], size, false), Err(IoError::OutOfRange));
        assert_eq!(check(Op::Discard { offset: 0, len: size }, &[], size, false), Ok(size));
        for op in [Op::Write { offset: 0 }, Op::Discard { offset: 0, len: 512 }, zeroes(0, 512)] {
            assert_eq!(check(op, &data, size, true), Err(IoError::ReadOnly), "{op:?}");
        }
        assert_eq!(check(Op::Flush, &[], size, true), Ok(0));
    }

    #[test]
    fn long_ranges_go_in_pieces() {
        let len = 2 * BARE_PIECE_BYTES + 512;
        let mut whole = request(Op::WriteZeroes { offset: 1024, len, unmap: true }, &[], len);
        let mut ends = Vec::new();
        while let Some(piece) = whole.next_piece() {
            let Op::WriteZeroes { offset, len, unmap: true } = piece.op else {
                panic!("WRITE_ZEROES became {:?}", piece.op)
            };
            ends.push((offset, len));
        }
        let far = 1024 + 2 * BARE_PIECE_BYTES;
        let piece = BARE_PIECE_BYTES;
        assert_eq!(ends, [(1024, piece), (1024 + piece, piece), (far, 512)]);
    }

    #[test]
    fn a_request_is_done_when_its_last_piece_is() {
        let len = 2 * DATA_PIECE_BYTES;
        let mut read = request(Op::Read { offset: 0 }, &[], len);
        assert!(read.next_piece().is_some());
        read.came_back(Ok(()));
        assert_eq!(read.outcome(), None);
        assert!(read.next_piece().is_some());
        assert_eq!(read.outcome(), None);
        read.came_back(Err(IoError::Io));
        assert_eq!(read.outcome(), Some(Err(IoError::Io)));

        let mut flush = request(Op::Flush, &[], 0);
        assert_eq!(flush.outcome(), None);
        assert!(flush.next_piece().is_some_and(|piece| piece.cost() == 0));
        assert!(flush.next_piece().is_none());
        assert_eq!(flush.outcome(), None);
        flush.came_back(Ok(()));
        assert_eq!(flush.outcome(), Some(Ok(())));
    }

    #[test]
    fn a_failure_ends_a_request_without_its_other_pieces() {
        let mut write = request(Op::Write { offset: 0 }, &parts(&[16 << 20]), 16 << 20);
        write.next_piece();
        write.came_back(Err(IoError::NoSpace));
        assert!(write.next_piece().is_none());
        assert_eq!(write.outcome(), Some(Err(IoError::NoSpace)));
    }

    proptest! {
        #[test]
        fn pieces_of_a_write_are_the_write(
            sizes in proptest::collection::vec(0usize..3 << 20, 0..40),
            small in proptest::collection::vec(0usize..40, 0..3000),
        ) {
            let data = parts(&[sizes, small].concat());
            let len = data.iter().map(|part| part.iov_len as u64).sum();
            let mut write = request(Op::Write { offset: 512 }, &data, len);
            let (mut at, mut bytes) = (0, Vec::new());
            while let Some(piece) = write.next_piece() {
                prop_assert_eq!((piece.at, piece.op), (at, Op::Write { offset: 512 + at }));
                prop_assert!(piece.len <= DATA_PIECE_BYTES && piece.buffers.len() <= PIECE_BUFFERS);
                let sum: u64 = piece.buffers.iter().map(|part| part.iov_len as u64).sum();
                prop_assert_eq!(sum, piece.len);
                at += piece.len;
                bytes.extend(piece.buffers.iter().map(|b| (b.iov_base.addr(), b.iov_len)));
            }
            prop_assert_eq!(at, len);
            // The same addresses in the same order: neighbours that were cut are joined again.
            let joined = |list: Vec<(usize, usize)>| {
                let mut out: Vec<(usize, usize)> = Vec::new();
                for (base, len) in list.into_iter().filter(|(_, len)| *len > 0) {
                    match out.last_mut() {
                        Some(last) if last.0 + last.1 == base => last.1 += len,
                        _ => out.push((base, len)),
                    }
                }
                out
            };
            let wanted = data.iter().map(|b| (b.iov_base.addr(), b.iov_len)).collect();
            prop_assert_eq!(joined(bytes), joined(wanted));
        }

        #[test]
        fn what_was_read_fills_the_buffers(
            sizes in proptest::collection::vec(0usize..50, 1..12), cut in 0usize..600,
        ) {
            let total: usize = sizes.iter().sum();
            let mut memory: Vec<Vec<u8>> = sizes.iter().map(|len| vec![0; *len]).collect();
            let data: Vec<_> = memory
                .iter_mut()
                .map(|m| libc::iovec { iov_base: m.as_mut_ptr().cast(), iov_len: m.len() })
                .collect();
            let bytes: Vec<u8> = (0..total).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let read = request(Op::Read { offset: 0 }, &data, total as u64);
            let cut = cut.min(total);
            // SAFETY: the buffers are `memory`.
            unsafe {
                read.fill(cut as u64, &bytes[cut..]);
                read.fill(0, &bytes[..cut]);
            }
            prop_assert_eq!(memory.concat(), bytes);
        }
    }
}
