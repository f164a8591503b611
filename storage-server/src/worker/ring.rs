//! Reads of data that is not in memory, by io_uring.
//!
//! The kernel writes into buffers that this module owns from submission to
//! completion; the read plan keeps the extents in place as long. A read that ends
//! in any unusual way is done again by the pool, whose result counts.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use baton_protocol::frame::REPLY_HEADER_BYTES;
use baton_protocol::{RequestHeader, Status};
use io_uring::{IoUring, opcode, types};

use crate::gate::{Gate, Pass};
use crate::store::{ReadPlan, Segment};

use super::mailbox::Done;

/// Reads that may be at the kernel at once, per worker.
const ENTRIES: u32 = 256;
/// Buffers kept for the next reads, bytes.
const SPARE_BYTES_MAX: usize = 4 << 20;

/// A read at the kernel.
#[derive(Debug)]
pub(super) struct ColdRead {
    pub(super) conn: usize,
    pub(super) header: RequestHeader,
    pub(super) pass: Pass<Arc<Gate>>,
    plan: ReadPlan,
    buffer: Vec<u8>,
    segments_left: u32,
    failed: bool,
}

/// A read that came back.
pub(super) enum Back {
    /// With its data.
    Done(Done),
    /// To be done again where waiting is allowed.
    Again(ColdRead),
}

pub(super) struct Ring {
    uring: IoUring,
    pool_fd: RawFd,
    reads: Vec<Option<ColdRead>>,
    free: Vec<usize>,
    /// Segments at the kernel or about to be.
    outstanding: u32,
    unsubmitted: bool,
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
}

impl Ring {
    /// Why io_uring cannot be used is the error.
    pub(super) fn new(pool_fd: BorrowedFd<'_>) -> std::io::Result<Self> {
        let uring = IoUring::new(ENTRIES)?;
        let mut probe = io_uring::Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            uring,
            pool_fd: pool_fd.as_raw_fd(),
            reads: Vec::new(),
            free: Vec::new(),
            outstanding: 0,
            unsubmitted: false,
            spare: Vec::new(),
            spare_bytes: 0,
        })
    }

    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Whether a read of so many pieces can be taken now.
    pub(super) fn has_room(&self) -> bool {
        // A read touches at most two extents.
        self.outstanding + 2 <= ENTRIES
    }

    /// Takes a read. Call [`Ring::has_room`] first and [`Ring::submit`] afterwards.
    pub(super) fn read(
        &mut self,
        conn: usize,
        header: RequestHeader,
        plan: ReadPlan,
        len: usize,
        pass: Pass<Arc<Gate>>,
    ) {
        let mut buffer = self.buffer(REPLY_HEADER_BYTES + len);
        let index = self.free.pop().unwrap_or_else(|| {
            self.reads.push(None);
            self.reads.len() - 1
        });
        let mut at = REPLY_HEADER_BYTES;
        let mut segments_left = 0;
        for segment in plan.segments() {
            let part = &mut buffer[at..at + segment.len()];
            at += segment.len();
            match segment {
                Segment::Zero { .. } => part.fill(0),
                Segment::Data { pool_offset, .. } => {
                    let bytes = u32::try_from(part.len()).expect("a frame is at most 1 MiB");
                    let entry =
                        opcode::Read::new(types::Fd(self.pool_fd), part.as_mut_ptr(), bytes)
                            .offset(pool_offset)
                            .build()
                            .user_data((index as u64) << 32 | u64::from(bytes));
                    // SAFETY: the buffer's heap bytes stay where they are and are
                    // not looked at until this entry has completed: `buffer`
                    // lives in `self.reads` until then (and `Drop` leaks it if
                    // the kernel still has it), and so does the plan that keeps
                    // the extent.
                    unsafe { self.uring.submission().push(&entry) }
                        .expect("has_room keeps entries below the queue's size");
                    segments_left += 1;
                    self.outstanding += 1;
                    self.unsubmitted = true;
                }
            }
        }
        // Without any data there is no completion; the read counts as failed and
        // is picked up by `reap` at once. It does not happen: holes are read on
        // the spot unless they were made between.
        let read = ColdRead { conn, header, pass, plan, buffer, segments_left, failed: false };
        self.reads[index] = Some(read);
        if segments_left == 0 {
            let entry = opcode::Nop::new().build().user_data((index as u64) << 32);
            // SAFETY: a no-op touches no memory.
            unsafe { self.uring.submission().push(&entry) }
                .expect("has_room keeps entries below the queue's size");
            self.outstanding += 1;
            self.unsubmitted = true;
            if let Some(read) = &mut self.reads[index] {
                read.segments_left = 1;
            }
        }
    }

    /// Hands new reads to the kernel, all at once.
    pub(super) fn submit(&mut self) {
        if !self.unsubmitted {
            return;
        }
        match self.uring.submit() {
            Ok(_) => self.unsubmitted = false,
            // Busy or interrupted: the entries stay in the queue for the next time.
            Err(error) => tracing::debug!(%error, "io_uring takes no entries for now"),
        }
    }

    /// Whether entries wait that the kernel did not take.
    pub(super) fn has_unsubmitted(&self) -> bool {
        self.unsubmitted
    }

    /// Collects what came back.
    pub(super) fn reap(&mut self, back: &mut Vec<Back>) {
        let Self { uring, reads, free, outstanding, .. } = self;
        for entry in uring.completion() {
            *outstanding -= 1;
            let index = usize::try_from(entry.user_data() >> 32).unwrap_or(usize::MAX);
            let bytes = entry.user_data() & u64::from(u32::MAX);
            let Some(slot) = reads.get_mut(index) else { continue };
            let Some(read) = slot else { continue };
            read.failed |= u64::try_from(entry.result()) != Ok(bytes);
            read.segments_left -= 1;
            if read.segments_left > 0 {
                continue;
            }
            let Some(read) = slot.take() else { continue };
            free.push(index);
            back.push(if read.failed { Back::Again(read) } else { Back::Done(read.done()) });
        }
    }

    fn buffer(&mut self, len: usize) -> Vec<u8> {
        match self.spare.pop() {
            Some(mut buffer) => {
                self.spare_bytes -= buffer.capacity();
                buffer.resize(len, 0);
                buffer
            }
            None => vec![0; len],
        }
    }

    /// Takes a buffer back for the next read.
    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare_bytes + buffer.capacity() <= SPARE_BYTES_MAX {
            self.spare_bytes += buffer.capacity();
            self.spare.push(buffer);
        }
    }
}

impl ColdRead {
    fn done(self) -> Done {
        let Self { conn, header, plan, pass, buffer, .. } = self;
        drop(plan);
        drop(pass);
        Done { reply: Some(buffer), ..Done::new(conn, &header, Status::Ok) }
    }

    /// What is left when the pool takes over: the buffer and the pass.
    pub(super) fn into_parts(self) -> (usize, RequestHeader, Vec<u8>, Pass<Arc<Gate>>) {
        (self.conn, self.header, self.buffer, self.pass)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.outstanding > 0 {
            // The kernel may still write: better leaked than freed.
            std::mem::forget(std::mem::take(&mut self.reads));
        }
    }
}
