//! The outgoing half: which bytes are next. Requests leave in order of their
//! sequence numbers, headers from the table, payloads from guest memory.

use std::time::Instant;

use baton_protocol::Seq;
use baton_protocol::frame::REQUEST_HEADER_BYTES;

use super::table::Child;
use super::{PING_RESERVE, Session, State};

/// With more requests under way than this the server has enough to do, and calls are short.
const FEW_REQUESTS: u64 = 16;
/// With more than this they are shorter where payloads are large: it costs who has so many a few per cent, and who has 32
/// a quarter.
const MANY_REQUESTS: u64 = 64;
/// A short call has at most so many bytes, and takes no further request behind half of them: while it copies, a kernel
/// without preemption lets nobody else on this CPU.
const SHORT_CALL_BYTES: usize = 256 << 10;
/// The same of a shorter one.
const SHORTER_CALL_BYTES: usize = 64 << 10;
/// Payloads from here on are large.
const LARGE_BYTES: usize = 32 << 10;

/// The most bytes of a call that ends in this request.
fn call_bytes_max(under_way: u64, child: &Child) -> usize {
    if under_way < FEW_REQUESTS {
        usize::MAX
    } else if under_way >= MANY_REQUESTS && child.payload_bytes() >= LARGE_BYTES {
        SHORTER_CALL_BYTES
    } else {
        SHORT_CALL_BYTES
    }
}

/// How far the connection's outgoing stream is.
#[derive(Debug, Default)]
pub(super) struct Send {
    hello: Vec<u8>,
    hello_sent: usize,
    /// Everything below was sent on this connection.
    seq: u64,
    /// Bytes of request `seq` that were sent.
    offset: usize,
    /// The socket took less than it was offered.
    blocked: bool,
}

impl Send {
    /// A new connection: HELLO, then everything from `lowest`.
    pub(super) fn hello(hello: Vec<u8>, lowest: Seq) -> Self {
        Self { hello, seq: lowest.0, ..Self::default() }
    }

    /// Bytes sent of a request that is not sent whole.
    pub(super) fn partial(&self) -> usize {
        self.offset
    }

    /// Whether all of `seq` was sent on this connection.
    pub(super) fn has_sent(&self, seq: Seq) -> bool {
        seq.0 < self.seq
    }
}

impl Session {
    /// Whether there is something that can be sent now.
    pub(crate) fn has_unsent(&self) -> bool {
        match self.state {
            State::Hello { .. } => self.send.hello_sent < self.send.hello.len(),
            State::Ready { .. } if self.send.blocked => false,
            State::Ready { .. } => {
                self.send.seq < self.table.next().0
                    || (self.table.has_waiting() && self.has_room(PING_RESERVE) && self.may_cut())
            }
            _ => false,
        }
    }

    /// Appends the bytes to be sent next to `iov`, which may grow to `max`
    /// entries; returns how many bytes they are. They stay where they are until
    /// the next call that takes `&mut self` other than `gather` and `sent`.
    pub(crate) fn gather(&mut self, now: Instant, iov: &mut Vec<libc::iovec>, max: usize) -> usize {
        match self.state {
            State::Hello { .. } => {
                let rest = &self.send.hello[self.send.hello_sent..];
                if rest.is_empty() || iov.len() >= max {
                    return 0;
                }
                push_bytes(iov, rest);
                rest.len()
            }
            State::Ready { .. } => {
                if !self.was_live && self.table.is_live() {
                    // The silence before was nobody's fault.
                    self.was_live = true;
                    self.heard = now;
                }
                self.gather_requests(iov, max)
            }
            _ => 0,
        }
    }

    fn gather_requests(&mut self, iov: &mut Vec<libc::iovec>, max: usize) -> usize {
        // What was answered on an earlier connection is passed over lazily, so
        // the stream may be behind the table.
        if self.send.seq < self.table.lowest().0 {
            (self.send.seq, self.send.offset) = (self.table.lowest().0, 0);
        }
        let (mut seq, mut offset) = (Seq(self.send.seq), self.send.offset);
        let mut bytes = 0;
        while iov.len() < max {
            if seq == self.table.next() && !self.cut_next() {
                break;
            }
            let under_way = seq.0 - self.table.lowest().0;
            if under_way >= self.window {
                // Only after a reconnect to a server with a narrower window.
                break;
            }
            // Answered requests are not sent again.
            let Some(child) = self.table.unanswered(seq) else {
                seq = Seq(seq.0 + 1);
                if bytes == 0 {
                    (self.send.seq, self.send.offset) = (seq.0, 0);
                }
                continue;
            };
            let call = call_bytes_max(under_way, &child);
            if bytes >= call / 2 {
                break;
            }
            let pushed = self.push_frame(seq, &child, offset, call - bytes, iov, max);
            bytes += pushed;
            if offset + pushed < child.frame_bytes() {
                break;
            }
            seq = Seq(seq.0 + 1);
            offset = 0;
        }
        bytes
    }

    fn cut_next(&mut self) -> bool {
        self.table.has_waiting()
            && self.has_room(PING_RESERVE)
            && self.may_cut()
            && self.table.cut(self.payload_max, &self.stamp)
    }

    fn push_frame(
        &self,
        seq: Seq,
        child: &Child,
        offset: usize,
        most: usize,
        iov: &mut Vec<libc::iovec>,
        max: usize,
    ) -> usize {
        let mut pushed = 0;
        if offset < REQUEST_HEADER_BYTES {
            let rest = &self.table.header(seq)[offset..];
            push_bytes(iov, rest);
            pushed = rest.len();
        }
        let begin = offset.saturating_sub(REQUEST_HEADER_BYTES);
        let payload = child.payload_bytes();
        if begin < payload {
            let buffers = self.table.buffers(child);
            let mut at = child.at;
            at.advance(buffers, begin);
            let most = most.saturating_sub(pushed);
            pushed += at.push(buffers, most.min(payload - begin), iov, max);
        }
        pushed
    }

    /// The first `n` of the bytes gathered were sent.
    pub(crate) fn sent(&mut self, now: Instant, mut n: usize) {
        if n > 0 && self.send.blocked {
            // The peer made room, so it is alive; its answers, and the PING, may
            // be behind much data.
            self.send.blocked = false;
            self.heard = now;
            self.pinged = None;
        }
        if let State::Hello { .. } = self.state {
            self.send.hello_sent += n;
            return;
        }
        while n > 0 {
            let seq = Seq(self.send.seq);
            let Some(child) = self.table.unanswered(seq) else {
                self.send.seq += 1;
                self.send.offset = 0;
                continue;
            };
            let left = child.frame_bytes() - self.send.offset;
            if n < left {
                self.send.offset += n;
                return;
            }
            n -= left;
            self.send.seq += 1;
            self.send.offset = 0;
        }
    }

    /// The socket takes no more for now.
    pub(crate) fn blocked(&mut self) {
        self.send.blocked = true;
    }
}

/// Appends bytes, joined to the last entry when they follow it in memory.
fn push_bytes(iov: &mut Vec<libc::iovec>, bytes: &[u8]) {
    let base: *const u8 = bytes.as_ptr();
    if let Some(last) = iov.last_mut()
        && last.iov_base.wrapping_byte_add(last.iov_len).cast_const().cast() == base
    {
        last.iov_len += bytes.len();
        return;
    }
    iov.push(libc::iovec { iov_base: base.cast_mut().cast(), iov_len: bytes.len() });
}
