//! From the storage to the used ring: data, dirty bits, used entries, call.

use baton_remote_client::{Completion, Op};

use super::order::Order;
use super::pending::{Pending, Stage};
use super::worker::{Worker, signal};
use crate::dirty_log::DirtyLog;
use crate::memory::GuestMemory;
use crate::virtio_blk::request::Status;

impl Worker {
    pub(super) fn poll_volume(&mut self) {
        if let Some(io) = &mut self.io {
            io.poll(&mut self.completions);
        }
        self.complete_all();
    }

    /// Completes what the storage has answered and shows the guest all of it
    /// at once.
    pub(super) fn complete_all(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        self.publish();
        self.rest();
        self.finish_drain();
    }

    fn complete(&mut self, completion: Completion) {
        let Ok(head) = u16::try_from(completion.tag.0) else { return };
        let Some(pending) = self.pending.get_mut(usize::from(head)) else { return };
        if !pending.is_at_storage() {
            return;
        }
        if pending.stage == Stage::ThenFlush && completion.result.is_ok() {
            pending.stage = Stage::Last;
            if let Some(io) = &mut self.io {
                // SAFETY: a flush has no buffers.
                unsafe { io.submit(completion.tag, Op::Flush, &[]) };
                self.unsent = true;
            }
            return;
        }
        let Pending { data, written, status, memory, begun, .. } = std::mem::take(pending);
        if let Some(begun) = begun {
            self.disk.status.latency.end(self.index, begun);
        }
        self.in_flight -= 1;
        if let Err(error) = completion.result
            && let Some(suppressed) = self.guest_errors.permit()
        {
            tracing::warn!(
                disk = self.disk.name,
                queue = self.index,
                suppressed,
                "a guest request failed: {error}"
            );
        }
        let log = self.ring.as_ref().and_then(|ring| ring.setup.log.clone());
        if let (Some(log), Some(memory)) = (&log, &memory) {
            mark(log, &memory.0, &data);
        }
        if let Some(status) = status {
            write_status(status, completion.result.into());
            if let (Some(log), Some(memory)) = (&log, &memory)
                && let Some(addr) = memory.0.guest_addr_of(status)
            {
                log.mark(addr, 1);
            }
        }
        // Keep the buffer's capacity for the next request of this head.
        self.pending[usize::from(head)].data = data;
        self.put_used(head, written);
    }

    /// Answers a request that never reached the storage.
    pub(super) fn answer(&mut self, head: u16, status: *mut u8, answer: Status, data_bytes: u32) {
        write_status(status, answer);
        if let Some(ring) = &self.ring
            && let Some(log) = &ring.setup.log
            && let Some(addr) = ring.memory.0.guest_addr_of(status)
        {
            log.mark(addr, 1);
        }
        self.finish(head, Some(answer), data_bytes);
    }

    /// Gives a request back; without an answer nothing could be written.
    pub(super) fn finish(&mut self, head: u16, answer: Option<Status>, data_bytes: u32) {
        let written = if answer.is_some() { data_bytes.saturating_add(1) } else { 0 };
        self.put_used(head, written);
    }

    /// A request is complete, its data and status in guest memory and in the
    /// log: shows it, or holds it back until all older ones are shown.
    fn put_used(&mut self, head: u16, written: u32) {
        let Some(ring) = &mut self.ring else { return };
        let Some(order) = &mut ring.order else { return self.show(head, written) };
        order.complete(head, written);
        self.pending[usize::from(head)].stage = Stage::HeldBack;
        while let Some(ring) = &mut self.ring
            && let Some((head, written)) = ring.order.as_mut().and_then(Order::pop)
        {
            self.show(head, written);
        }
    }

    /// Fills a used entry. Until it is published the in-flight table keeps the
    /// request, so that a kill has it done again.
    pub(super) fn show(&mut self, head: u16, written: u32) {
        let Some(ring) = &mut self.ring else { return };
        self.pending[usize::from(head)].stage = Stage::Idle;
        ring.queue.put_used(head, written);
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            let (offset, len) = ring.queue.last_used_range();
            log.mark(used.wrapping_add(offset), len);
        }
        if let Some(table) = &mut ring.inflight {
            table.link(head);
        }
        self.batch.push(head);
    }

    pub(super) fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let Some(ring) = &mut self.ring else {
            self.batch.clear();
            return;
        };
        ring.queue.publish();
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            log.mark(used, 4);
        }
        if let Some(table) = &mut ring.inflight {
            table.published(self.batch.iter().copied(), ring.queue.next_used());
        }
        self.batch.clear();
        if ring.queue.wants_signal()
            && let Some(call) = &ring.setup.call
        {
            signal(call);
        }
    }

    /// The storage may have filled a part of any buffer it was given.
    pub(super) fn mark_abandoned(&self) {
        let Some(log) = self.ring.as_ref().and_then(|ring| ring.setup.log.as_ref()) else { return };
        for pending in &self.pending {
            if let (true, Some(memory)) = (pending.stage != Stage::Idle, &pending.memory) {
                mark(log, &memory.0, &pending.data);
            }
        }
    }

    /// Marks the writable buffers of the current chain.
    pub(super) fn mark_chain(&self) {
        if let Some(ring) = &self.ring
            && let Some(log) = &ring.setup.log
        {
            mark(log, &ring.memory.0, &self.chain.writable);
        }
    }
}

fn mark(log: &DirtyLog, memory: &GuestMemory, buffers: &[libc::iovec]) {
    for buffer in buffers {
        if let Some(addr) = memory.guest_addr_of(buffer.iov_base.cast()) {
            log.mark(addr, buffer.iov_len as u64);
        }
    }
}

fn write_status(status: *mut u8, value: Status) {
    // SAFETY: points into guest memory that the caller holds mapped; volatile
    // because the guest may read or write it meanwhile.
    unsafe { status.write_volatile(value as u8) };
}
