//! From the ring to the storage: takes requests, reads what they mean, hands
//! them on or answers them.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use baton_remote_client::{Op, Tag};

use super::pending::Stage;
use super::worker::{Worker, signal};
use crate::iovecs;
use crate::virtio_blk::request::{
    Decision, HEADER_BYTES, Limits, SEGMENT_BYTES, Shape, Status, decide,
};
use crate::virtqueue::RingError;

impl Worker {
    pub(super) fn take_all(&mut self) {
        let Some(ring) = &self.ring else { return };
        ring.queue.disable_kicks();
        for _ in 0..ring.queue.size() {
            let Some(ring) = &mut self.ring else { return };
            if ring.broken || ring.draining.is_some() {
                return;
            }
            match ring.queue.pop() {
                Ok(None) => return,
                Ok(Some(head)) if self.pending[usize::from(head)].stage != Stage::Idle => {
                    self.break_ring(&format!("the guest offered descriptor {head} twice"));
                }
                Ok(Some(head)) => {
                    if let Some(table) = &mut ring.inflight {
                        table.take(head);
                    }
                    self.take(head);
                }
                Err(error @ (RingError::AvailJump { .. } | RingError::BadHead { .. })) => {
                    self.break_ring(&error.to_string());
                }
            }
        }
    }

    /// Nothing on the ring can be trusted any more: leave it alone until the
    /// front-end stops and starts it.
    fn break_ring(&mut self, why: &str) {
        let Some(ring) = &mut self.ring else { return };
        ring.broken = true;
        if let Some(err) = &ring.setup.err {
            signal(err);
        }
        if let Some(suppressed) = self.breaks.permit() {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "{why}; this queue stops until the guest resets the device"
            );
        }
    }

    /// Reads the request at `head` and hands it on or answers it.
    pub(super) fn take(&mut self, head: u16) {
        let Some(ring) = &mut self.ring else { return };
        self.taken += 1;
        self.pending[usize::from(head)].taken = self.taken;
        if let Some(order) = &mut ring.order {
            order.take(head);
        }
        let chain = &mut self.chain;
        if let Err(error) = ring.queue.read_chain(head, chain) {
            self.complain(&error.to_string());
            return self.finish(head, None, 0);
        }
        let status = iovecs::take_last_byte(&mut chain.writable);
        let mut header = [0; HEADER_BYTES];
        let header_bytes = iovecs::take_front(&mut chain.readable, &mut header);
        let mut segment = [0; SEGMENT_BYTES];
        // Only discard and write-zeroes have one; they carry no other data.
        let readable_bytes = iovecs::total(&chain.readable);
        if readable_bytes <= 2 * SEGMENT_BYTES as u64 {
            iovecs::peek_front(&chain.readable, &mut segment);
        }
        let writable_bytes = iovecs::total(&chain.writable);
        let Some(status) = status.filter(|_| !chain.tail_missing) else {
            self.complain("a request has no room for its status");
            return self.finish(head, None, 0);
        };
        if chain.faulty || header_bytes < HEADER_BYTES {
            self.complain("a request has a short header or a buffer outside the guest's memory");
            return self.answer(head, status, Status::IoErr, 0);
        }
        let limits = Limits {
            size_bytes: self.disk.size_bytes.load(Ordering::Relaxed),
            read_only: self.disk.read_only,
        };
        let shape = Shape { header, readable_bytes, writable_bytes, segment };
        match decide(&shape, limits) {
            Decision::Storage(op) => self.submit(head, status, op, writable_bytes),
            Decision::GetId => {
                let written = iovecs::fill(&self.chain.writable, &self.disk.id);
                self.mark_chain();
                self.answer(head, status, Status::Ok, written);
            }
            Decision::Answer(answer) => {
                if answer != Status::Ok {
                    self.complain("a request is off the disk, malformed or not supported");
                }
                self.answer(head, status, answer, 0);
            }
        }
    }

    fn submit(&mut self, head: u16, status: *mut u8, op: Op, writable_bytes: u64) {
        let (Some(ring), Some(io)) = (&mut self.ring, &mut self.io) else { return };
        let pending = &mut self.pending[usize::from(head)];
        let data = match op {
            Op::Read { .. } => &mut self.chain.writable,
            Op::Write { .. } => &mut self.chain.readable,
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => {
                self.chain.readable.clear();
                &mut self.chain.readable
            }
        };
        let mutation = matches!(op, Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. });
        pending.stage =
            if mutation && ring.setup.write_through { Stage::ThenFlush } else { Stage::Last };
        let read_bytes = if matches!(op, Op::Read { .. }) { writable_bytes } else { 0 };
        pending.written = u32::try_from(read_bytes).unwrap_or(u32::MAX - 1).saturating_add(1);
        pending.begun = self.disk.status.latency.begin();
        pending.status = Some(status);
        pending.memory = Some(Rc::clone(&ring.memory));
        // SAFETY: the buffers lie in guest memory that `pending.memory` keeps
        // mapped until the completion, or until the volume's queue is dropped.
        unsafe { io.submit(Tag(u32::from(head)), op, data) };
        pending.data.clear();
        if matches!(op, Op::Read { .. }) {
            std::mem::swap(&mut pending.data, data);
        }
        self.in_flight += 1;
        self.unsent = true;
    }

    fn complain(&mut self, why: &str) {
        if let Some(suppressed) = self.guest_errors.permit() {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "refused a request of the guest: {why}"
            );
        }
    }
}
