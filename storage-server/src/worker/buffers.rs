//! A connection's two buffers: received bytes and replies to send.
//!
//! Both keep their bytes initialised for their whole life, so nothing is zeroed
//! per request, and both give memory back when idle.

use super::rounds::SHARE_REQUESTS;
use baton_protocol::frame::{PAYLOAD_BYTES_MAX, REPLY_HEADER_BYTES, REQUEST_HEADER_BYTES};

/// Size at rest: dozens of small requests.
const SMALL: usize = 16 << 10;
/// How far reading ahead may grow the receive buffer, and the most that is
/// received in one turn unless one request needs more: a share that is the same
/// for all connections, whatever their buffers have grown to. Four requests of
/// 128 KiB with their headers.
pub(super) const READ_AHEAD: usize = (512 << 10) + 4 * REQUEST_HEADER_BYTES;

/// What to receive at most for a turn of so many payload bytes: with the headers of all requests that it may have, and
/// some more, so that a whole batch does not look like the first part of a larger one.
#[inline]
pub(super) fn read_ahead(payload_bytes: u64) -> usize {
    let payload = usize::try_from(payload_bytes).unwrap_or(READ_AHEAD);
    READ_AHEAD.min(payload.saturating_add(2 * SHARE_REQUESTS * REQUEST_HEADER_BYTES))
}

/// The largest request.
const LARGEST_REQUEST: usize = REQUEST_HEADER_BYTES + PAYLOAD_BYTES_MAX as usize;
/// Replies wait up to this size for the socket. The largest reply always fits
/// an empty buffer.
pub(super) const OUT_MAX: usize = REPLY_HEADER_BYTES + PAYLOAD_BYTES_MAX as usize;
/// Enough replies to send them at once: large sequential reads then go from a
/// buffer that is still in the cache, while the client works on the last part.
pub(super) const SEND_AT: usize = 256 << 10;

/// Received bytes that are not served yet.
#[derive(Debug, Default)]
pub(super) struct InBuf {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl InBuf {
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room to receive into, with space for a request of `need` bytes at the
    /// front. Empty only if that is already there.
    pub(super) fn room(&mut self, need: usize) -> &mut [u8] {
        let need = need.min(LARGEST_REQUEST);
        let want = need.max(SMALL);
        if self.bytes.len() < want {
            // Large requests seldom come alone; with room for one, most of each
            // receive would be a part that has to be moved.
            let size = if want > SMALL { (4 * want).min(READ_AHEAD.max(want)) } else { want };
            self.grow(size);
        } else if self.start > 0 && self.bytes.len() - self.start < want {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// `n` bytes were received.
    pub(super) fn received(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len());
    }

    /// The peer sends more than the buffer takes at once. Also with a part of a request in it, or a stream of writes
    /// would never get more than what a small buffer takes.
    pub(super) fn read_further_ahead(&mut self) {
        if self.bytes.len() < READ_AHEAD {
            self.grow((self.bytes.len().max(SMALL) * 2).min(READ_AHEAD));
        }
    }

    fn grow(&mut self, size: usize) {
        let mut grown = vec![0; size];
        let unread = self.end - self.start;
        grown[..unread].copy_from_slice(&self.bytes[self.start..self.end]);
        (self.bytes, self.start, self.end) = (grown, 0, unread);
    }

    pub(super) fn is_large(&self) -> bool {
        self.bytes.len() > SMALL
    }

    pub(super) fn shrink(&mut self) {
        if self.start == self.end {
            *self = Self::default();
        }
    }
}

/// Replies that are not sent yet.
#[derive(Debug, Default)]
pub(super) struct OutBuf {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl OutBuf {
    pub(super) fn unsent(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn sent(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Whether a reply of `len` bytes may be added now.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.is_empty() || self.unsent().len() + len <= OUT_MAX
    }

    /// Room for a reply of `len` bytes, to be kept with [`OutBuf::keep`]. Its
    /// bytes are whatever was there before. Call [`OutBuf::has_room`] first.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < self.end + len {
            self.make_room(len);
        }
        &mut self.bytes[self.end..self.end + len]
    }

    fn make_room(&mut self, len: usize) {
        let unsent = self.end - self.start;
        let want = unsent + len;
        if self.bytes.len() < want {
            let size = want.next_power_of_two().clamp(SMALL, OUT_MAX.max(want));
            let mut grown = vec![0; size];
            grown[..unsent].copy_from_slice(&self.bytes[self.start..self.end]);
            self.bytes = grown;
        } else {
            self.bytes.copy_within(self.start..self.end, 0);
        }
        (self.start, self.end) = (0, unsent);
    }

    /// The last room given holds a reply of this length.
    pub(super) fn keep(&mut self, len: usize) {
        self.end += len;
        debug_assert!(self.end <= self.bytes.len());
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.keep(bytes.len());
    }

    pub(super) fn is_large(&self) -> bool {
        self.bytes.len() > SMALL
    }

    pub(super) fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the sizes, the bytes come out as they went in.
        #[test]
        fn received_bytes_keep_their_order(steps in prop::collection::vec((1usize..40_000, 0usize..40_000, 0usize..300_000), 1..40)) {
            let mut buf = InBuf::default();
            let (mut next_in, mut next_out) = (0u8, 0u8);
            for (arrive, take, need) in steps {
                let room = buf.room(need);
                let n = arrive.min(room.len());
                for byte in &mut room[..n] {
                    *byte = next_in;
                    next_in = next_in.wrapping_add(1);
                }
                buf.received(n);
                let take = take.min(buf.unread().len());
                for byte in &buf.unread()[..take] {
                    prop_assert_eq!(*byte, next_out);
                    next_out = next_out.wrapping_add(1);
                }
                buf.consume(take);
                if take % 7 == 0 { buf.read_further_ahead(); buf.shrink(); }
                prop_assert!(buf.bytes.len() <= LARGEST_REQUEST);
            }
        }

        #[test]
        fn replies_keep_their_order(steps in prop::collection::vec((1usize..200_000, 0usize..300_000), 1..40)) {
            let mut buf = OutBuf::default();
            let (mut next_in, mut next_out) = (0u8, 0u8);
            for (add, send) in steps {
                if buf.has_room(add) {
                    for byte in buf.room(add) {
                        *byte = next_in;
                        next_in = next_in.wrapping_add(1);
                    }
                    buf.keep(add);
                }
                let send = send.min(buf.unsent().len());
                for byte in &buf.unsent()[..send] {
                    prop_assert_eq!(*byte, next_out);
                    next_out = next_out.wrapping_add(1);
                }
                buf.sent(send);
                prop_assert!(buf.bytes.len() <= OUT_MAX);
            }
        }
    }

    #[test]
    fn the_largest_request_fits_and_idle_costs_nothing() {
        let mut buf = InBuf::default();
        let need = LARGEST_REQUEST;
        assert_eq!(buf.room(need).len(), need);
        assert!(buf.is_large());
        buf.received(need);
        buf.consume(need);
        buf.shrink();
        assert_eq!(buf.bytes.capacity(), 0);
    }
}
