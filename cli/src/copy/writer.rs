//! Writes pieces, zeros as zeros, and says which are done, and which are durable.

use std::os::fd::BorrowedFd;

use baton_remote_client::{Completion, IoError, Op, Tag, VolumeQueue};

use super::digests::Digests;
use super::piece::{Digest, NO_DIGEST, Pieces, RUNS_MAX, ZeroDigests, runs};
use super::reader::SLOTS;
use super::{CopyError, Role};

/// Ranges of zeros that are written at once.
pub(super) const ZEROS: usize = 32;
const FLUSH_TAG: Tag = Tag(u32::MAX);

/// Pieces that are at the destination.
#[derive(Clone, Copy, Debug)]
pub(super) enum Written {
    Zeros { first: u64, count: u64 },
    Data { piece: u64, digest: Digest },
}

#[derive(Clone, Copy, Debug)]
struct Job {
    written: Written,
    left: usize,
    error: Option<IoError>,
}

/// See the module's documentation.
pub(super) struct Writer {
    digests: Digests,
    queue: Box<dyn VolumeQueue>,
    pieces: Pieces,
    /// Writes are whole blocks of the destination, bytes.
    block: u64,
    /// By tag: the slots of the reader, then the ranges of zeros.
    jobs: Vec<Option<Job>>,
    busy: usize,
    /// Bytes done since somebody asked.
    bytes: u64,
    /// Done, but a power loss might take it.
    volatile: Vec<Written>,
    /// What the flush under way makes durable.
    flushing: Option<Vec<Written>>,
    done: Vec<Completion>,
}

impl Writer {
    /// Queues for a writer need this depth.
    pub(super) const DEPTH: usize = SLOTS * RUNS_MAX + ZEROS + 1;

    pub(super) fn new(
        queue: Box<dyn VolumeQueue>,
        pieces: Pieces,
        block: u32,
        digests: Digests,
    ) -> Self {
        Self {
            digests,
            queue,
            pieces,
            block: u64::from(block),
            jobs: vec![None; SLOTS + ZEROS],
            busy: 0,
            bytes: 0,
            volatile: Vec::new(),
            flushing: None,
            done: Vec::new(),
        }
    }

    pub(super) fn wake_fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.queue.wake_fd(), self.digests.wake_fd()]
    }

    /// Nothing is under way, a flush included.
    pub(super) fn is_idle(&self) -> bool {
        self.busy == 0 && self.flushing.is_none()
    }

    /// Bytes written since the last call.
    pub(super) fn take_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }

    /// Something would be made durable by a flush.
    pub(super) fn has_volatile(&self) -> bool {
        !self.volatile.is_empty()
    }

    pub(super) fn is_flushing(&self) -> bool {
        self.flushing.is_some()
    }

    /// Takes `count` pieces of zeros; false: too many are under way.
    pub(super) fn zeros(&mut self, first: u64, count: u64) -> bool {
        let Some(tag) = (SLOTS..SLOTS + ZEROS).find(|tag| self.jobs[*tag].is_none()) else {
            return false;
        };
        let offset = self.pieces.offset(first);
        let len = self.pieces.bytes(first, count).next_multiple_of(self.block);
        self.begin(tag, Written::Zeros { first, count }, 1);
        let op = Op::WriteZeroes { offset, len, unmap: true };
        // SAFETY: no memory is named.
        unsafe { self.queue.submit(tag_of(tag), op, &[]) };
        true
    }

    /// Takes the piece in `buffer` of `slot`, which stays as it is until the slot is told to be done.
    ///
    /// # Safety
    /// `buffer` must stay valid and unchanged until then, or until this writer was dropped.
    pub(super) unsafe fn data(&mut self, slot: usize, piece: u64, buffer: &mut [u8]) {
        let len = usize::try_from(self.pieces.bytes(piece, 1)).expect("a piece");
        let whole = len.next_multiple_of(usize::try_from(self.block).expect("a block"));
        // The end of the destination's last block.
        buffer[len..whole].fill(0);
        // SAFETY: the caller vouches for the buffer.
        unsafe { self.digests.ask(slot, &buffer[..len]) };
        // A destination with blocks larger than the grain has its zeros written as data.
        let runs = match self.block {
            ..=4096 => runs(&buffer[..whole]),
            _ => vec![super::piece::Run { at: 0, len: whole, zeros: false }],
        };
        // And the digest.
        self.begin(slot, Written::Data { piece, digest: NO_DIGEST }, runs.len() + 1);
        for run in runs {
            let offset = self.pieces.offset(piece) + run.at as u64;
            let (op, data) = match run.zeros {
                true => (Op::WriteZeroes { offset, len: run.len as u64, unmap: true }, None),
                false => (Op::Write { offset }, Some(&mut buffer[run.at..run.at + run.len])),
            };
            let data = data.map(|part| libc::iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: part.len(),
            });
            // SAFETY: the caller vouches for the buffer.
            unsafe { self.queue.submit(tag_of(slot), op, data.as_slice()) };
        }
    }

    fn begin(&mut self, tag: usize, written: Written, left: usize) {
        self.jobs[tag] = Some(Job { written, left, error: None });
        self.busy += 1;
    }

    /// Makes what is done durable. Nothing is done when a flush is under way.
    pub(super) fn flush(&mut self) {
        if self.flushing.is_none() {
            self.flushing = Some(std::mem::take(&mut self.volatile));
            // SAFETY: no memory is named.
            unsafe { self.queue.submit(FLUSH_TAG, Op::Flush, &[]) };
        }
    }

    /// Sends and takes in. Tells which slots are free again, and what has become durable. True: something happened.
    pub(super) fn pump(
        &mut self,
        free: &mut Vec<usize>,
        durable: &mut Vec<Written>,
    ) -> Result<bool, CopyError> {
        let mut done = std::mem::take(&mut self.done);
        self.queue.poll(&mut done);
        let mut moved = !done.is_empty();
        for completion in done.drain(..) {
            self.completed(completion, free, durable)?;
        }
        self.done = done;
        while let Some((slot, made)) = self.digests.take() {
            if let Some(Job { written: Written::Data { digest, .. }, .. }) = &mut self.jobs[slot] {
                *digest = made;
            }
            self.done_with(slot, None, free)?;
            moved = true;
        }
        Ok(moved)
    }

    fn completed(
        &mut self,
        done: Completion,
        free: &mut Vec<usize>,
        durable: &mut Vec<Written>,
    ) -> Result<(), CopyError> {
        if done.tag != FLUSH_TAG {
            return self.done_with(done.tag.0 as usize, done.result.err(), free);
        }
        let flushed = self.flushing.take().unwrap_or_default();
        done.result.map_err(|error| failed("making durable what was written", 0, error))?;
        durable.extend(flushed);
        Ok(())
    }

    /// One of the things that a job waits for.
    fn done_with(
        &mut self,
        tag: usize,
        error: Option<IoError>,
        free: &mut Vec<usize>,
    ) -> Result<(), CopyError> {
        let Some(job) = &mut self.jobs[tag] else { return Ok(()) };
        job.left -= 1;
        job.error = job.error.or(error);
        if job.left > 0 {
            return Ok(());
        }
        let job = *job;
        self.jobs[tag] = None;
        self.busy -= 1;
        let (first, count) = job.written.pieces();
        if let Some(error) = job.error {
            return Err(failed("writing", self.pieces.offset(first), error));
        }
        self.bytes += self.pieces.bytes(first, count);
        self.volatile.push(job.written);
        if tag < SLOTS {
            free.push(tag);
        }
        Ok(())
    }
}

impl Written {
    /// First piece and how many.
    pub(super) fn pieces(&self) -> (u64, u64) {
        match *self {
            Self::Zeros { first, count } => (first, count),
            Self::Data { piece, .. } => (piece, 1),
        }
    }

    pub(super) fn digest(&self, piece: u64, zeros: &ZeroDigests) -> Digest {
        match self {
            Self::Zeros { .. } => zeros.of(piece),
            Self::Data { digest, .. } => *digest,
        }
    }
}

fn failed(doing: &'static str, offset: u64, error: IoError) -> CopyError {
    CopyError::Io { role: Role::Destination, doing, offset, error }
}

fn tag_of(tag: usize) -> Tag {
    Tag(u32::try_from(tag).expect("few"))
}
