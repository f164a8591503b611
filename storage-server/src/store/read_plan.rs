//! Where the bytes of a read are, for a caller that does the I/O itself (io_uring).

use std::sync::Arc;

use super::pool_file::slot_offset;
use super::volume::{Piece, Volume, pieces};

/// Part of a planned read, in the order of the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// A hole: fill with zeros.
    Zero { len: usize },
    /// `len` bytes at this offset of `Store::pool_fd`.
    Data { pool_offset: u64, len: usize },
}

impl Segment {
    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Zero { len } | Self::Data { len, .. } => *len,
        }
    }
}

/// Keeps the extents of a read in place until it is dropped; drop it when the I/O is done.
#[derive(Debug)]
pub struct ReadPlan {
    volume: Arc<Volume>,
    offset: u64,
    len: usize,
    /// Reads rarely cross an extent's border: the first segment needs no memory of its own.
    first: Option<Segment>,
    rest: Vec<Segment>,
}

impl ReadPlan {
    /// The range lies inside the volume.
    pub(super) fn new(volume: Arc<Volume>, offset: u64, len: usize) -> Self {
        let segment = |piece: Piece| match volume.map.pin(piece.extent) {
            None => Segment::Zero { len: piece.len },
            Some(slot) => {
                Segment::Data { pool_offset: slot_offset(slot) + piece.within, len: piece.len }
            }
        };
        let mut segments = pieces(offset, len as u64).map(segment);
        let first = segments.next();
        let rest = segments.collect();
        Self { volume, offset, len, first, rest }
    }

    /// Their lengths add up to the length asked for.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.first.iter().chain(&self.rest).copied()
    }

    /// True if there is nothing to read from the pool.
    pub fn is_all_zero(&self) -> bool {
        self.segments().all(|s| matches!(s, Segment::Zero { .. }))
    }
}

impl Drop for ReadPlan {
    fn drop(&mut self) {
        for (piece, segment) in pieces(self.offset, self.len as u64).zip(self.segments()) {
            if matches!(segment, Segment::Data { .. }) {
                self.volume.unpin(piece.extent);
            }
        }
    }
}
