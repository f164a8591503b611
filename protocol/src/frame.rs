//! The fixed headers in front of every message, little-endian.
//!
//! Byte tables are in `docs/wire.md`; the golden-bytes tests below hold the two
//! together. A header carries everything the admission gate needs (volume is
//! bound to the connection by HELLO; epoch, session, queue and sequence number
//! are in each request), so that a request is judged by what it says wherever
//! it was delayed, never by the state of the connection it arrived on.

use crate::message::Opcode;
use crate::status::Status;
use crate::units::{Epoch, QueueId, Seq, SessionId};

/// Size of a request header, bytes.
pub const REQUEST_HEADER_BYTES: usize = 64;
/// Size of a reply header, bytes.
pub const REPLY_HEADER_BYTES: usize = 32;

/// First four bytes of a request: `BTNq`.
pub const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"BTNq");
/// First four bytes of a reply: `BTNr`.
pub const REPLY_MAGIC: u32 = u32::from_le_bytes(*b"BTNr");

/// Largest payload of one frame, bytes. Bounds what either side must buffer;
/// larger guest requests are split by the client.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;

/// Largest number of requests of one queue that may be unanswered, and the
/// largest distance between the oldest unanswered and the newest sequence
/// number: the size of the server's window (see [`crate::window`]).
pub const WINDOW_REQUESTS: u64 = 1024;

/// `payload_crc32c` holds the CRC-32C of the payload.
pub const FLAG_CRC: u8 = 1 << 0;
/// WRITE_ZEROES may deallocate.
pub const FLAG_UNMAP: u8 = 1 << 1;
const FLAGS_KNOWN: u8 = FLAG_CRC | FLAG_UNMAP;

/// Header of a request, client to server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// What is asked.
    pub opcode: Opcode,
    /// [`FLAG_CRC`], [`FLAG_UNMAP`].
    pub flags: u8,
    /// Queue of the session.
    pub queue: QueueId,
    /// Position on the queue.
    pub seq: Seq,
    /// Fencing token under which the request asks to be admitted.
    pub epoch: Epoch,
    /// Incarnation of the client process.
    pub session: SessionId,
    /// First byte of the range on the volume.
    pub offset: u64,
    /// Length of the range, bytes.
    pub len: u64,
    /// Bytes that follow the header, at most [`PAYLOAD_BYTES_MAX`].
    pub payload_len: u32,
    /// CRC-32C of the payload when [`FLAG_CRC`] is set, else zero.
    pub payload_crc32c: u32,
}

/// Header of a reply, server to client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// Opcode of the request this answers.
    pub opcode: Opcode,
    /// [`FLAG_CRC`].
    pub flags: u8,
    /// Outcome.
    pub status: Status,
    /// Sequence number of the request this answers.
    pub seq: Seq,
    /// The volume's epoch at the server; tells a fenced client by whom it was
    /// overtaken.
    pub epoch: Epoch,
    /// Bytes that follow the header, at most [`PAYLOAD_BYTES_MAX`].
    pub payload_len: u32,
    /// CRC-32C of the payload when [`FLAG_CRC`] is set, else zero.
    pub payload_crc32c: u32,
}

/// Why bytes are not a header. A stream with one of these is beyond repair: the
/// receiver closes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not ours.
    #[error("the peer does not speak Baton's protocol (first bytes {0:#010x})")]
    Magic(u32),
    /// An opcode this version does not have.
    #[error("unknown opcode {0}")]
    Opcode(u8),
    /// Flags this version does not have.
    #[error("unknown flags {0:#04x}")]
    Flags(u8),
    /// A status this version does not have.
    #[error("unknown status {0}")]
    Status(u16),
    /// The payload is longer than [`PAYLOAD_BYTES_MAX`].
    #[error("payload of {0} bytes; at most {PAYLOAD_BYTES_MAX} are allowed")]
    PayloadTooLong(u32),
    /// Bytes kept for later versions are not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
}

// The byte tables of docs/wire.md: the last field of each header ends here.
const _: () = assert!(REQUEST_HEADER_BYTES == 56 + size_of::<u64>());
const _: () = assert!(REPLY_HEADER_BYTES == 28 + size_of::<u32>());

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl RequestHeader {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_HEADER_BYTES] {
        let mut b = [0; REQUEST_HEADER_BYTES];
        b[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        b[4] = self.opcode as u8;
        b[5] = self.flags;
        b[6..8].copy_from_slice(&self.queue.0.to_le_bytes());
        b[8..16].copy_from_slice(&self.seq.0.to_le_bytes());
        b[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        b[24..32].copy_from_slice(&self.session.0.to_le_bytes());
        b[32..40].copy_from_slice(&self.offset.to_le_bytes());
        b[40..48].copy_from_slice(&self.len.to_le_bytes());
        b[48..52].copy_from_slice(&self.payload_len.to_le_bytes());
        b[52..56].copy_from_slice(&self.payload_crc32c.to_le_bytes());
        b
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are not a request header of this version.
    pub fn decode(b: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = u32_at(b, 0);
        if magic != REQUEST_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let header = Self {
            opcode: Opcode::from_number(b[4]).ok_or(FrameError::Opcode(b[4]))?,
            flags: b[5],
            queue: QueueId(u16_at(b, 6)),
            seq: Seq(u64_at(b, 8)),
            epoch: Epoch(u64_at(b, 16)),
            session: SessionId(u64_at(b, 24)),
            offset: u64_at(b, 32),
            len: u64_at(b, 40),
            payload_len: u32_at(b, 48),
            payload_crc32c: u32_at(b, 52),
        };
        check_flags_and_payload(header.flags, header.payload_len)?;
        if u64_at(b, 56) != 0 {
            return Err(FrameError::Reserved);
        }
        Ok(header)
    }
}

impl ReplyHeader {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_HEADER_BYTES] {
        let mut b = [0; REPLY_HEADER_BYTES];
        b[0..4].copy_from_slice(&REPLY_MAGIC.to_le_bytes());
        b[4] = self.opcode as u8;
        b[5] = self.flags;
        b[6..8].copy_from_slice(&(self.status as u16).to_le_bytes());
        b[8..16].copy_from_slice(&self.seq.0.to_le_bytes());
        b[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        b[24..28].copy_from_slice(&self.payload_len.to_le_bytes());
        b[28..32].copy_from_slice(&self.payload_crc32c.to_le_bytes());
        b
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are not a reply header of this version.
    pub fn decode(b: &[u8; REPLY_HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = u32_at(b, 0);
        if magic != REPLY_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let status = u16_at(b, 6);
        let header = Self {
            opcode: Opcode::from_number(b[4]).ok_or(FrameError::Opcode(b[4]))?,
            flags: b[5],
            status: Status::from_number(status).ok_or(FrameError::Status(status))?,
            seq: Seq(u64_at(b, 8)),
            epoch: Epoch(u64_at(b, 16)),
            payload_len: u32_at(b, 24),
            payload_crc32c: u32_at(b, 28),
        };
        check_flags_and_payload(header.flags, header.payload_len)?;
        Ok(header)
    }
}

fn check_flags_and_payload(flags: u8, payload_len: u32) -> Result<(), FrameError> {
    if flags & !FLAGS_KNOWN != 0 {
        return Err(FrameError::Flags(flags));
    }
    if payload_len > PAYLOAD_BYTES_MAX {
        return Err(FrameError::PayloadTooLong(payload_len));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REQUEST: RequestHeader = RequestHeader {
        opcode: Opcode::Write,
        flags: FLAG_CRC,
        queue: QueueId(0x0203),
        seq: Seq(0x0405_0607_0809_0a0b),
        epoch: Epoch(0x1112_1314_1516_1718),
        session: SessionId(0x2122_2324_2526_2728),
        offset: 0x3132_3334_3536_3738,
        len: 0x4142_4344_4546_4748,
        payload_len: 0x0009_5152,
        payload_crc32c: 0x6162_6364,
    };

    /// Changing these bytes changes the wire: it needs a new [`crate::Version`].
    #[test]
    fn golden_request_v1() {
        let golden: [u8; 64] = [
            b'B', b'T', b'N', b'q', 3, 1, 0x03, 0x02, //
            0x0b, 0x0a, 0x09, 0x08, 0x07, 0x06, 0x05, 0x04, //
            0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, //
            0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21, //
            0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31, //
            0x48, 0x47, 0x46, 0x45, 0x44, 0x43, 0x42, 0x41, //
            0x52, 0x51, 0x09, 0x00, 0x64, 0x63, 0x62, 0x61, //
            0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(REQUEST.encode(), golden);
        assert_eq!(RequestHeader::decode(&golden), Ok(REQUEST));
    }

    #[test]
    fn golden_reply_v1() {
        let reply = ReplyHeader {
            opcode: Opcode::Read,
            flags: 0,
            status: Status::StaleEpoch,
            seq: Seq(7),
            epoch: Epoch(0x0102),
            payload_len: 4096,
            payload_crc32c: 0,
        };
        let golden: [u8; 32] = [
            b'B', b'T', b'N', b'r', 2, 0, 0x02, 0x00, //
            7, 0, 0, 0, 0, 0, 0, 0, //
            0x02, 0x01, 0, 0, 0, 0, 0, 0, //
            0x00, 0x10, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(reply.encode(), golden);
        assert_eq!(ReplyHeader::decode(&golden), Ok(reply));
    }

    #[test]
    fn each_malformed_header_says_what_is_wrong() {
        let with = |at: usize, value: u8| {
            let mut b = REQUEST.encode();
            b[at] = value;
            RequestHeader::decode(&b).expect_err("malformed")
        };
        assert!(matches!(with(0, b'X'), FrameError::Magic(_)));
        assert_eq!(with(4, 0), FrameError::Opcode(0));
        assert_eq!(with(4, 200), FrameError::Opcode(200));
        assert_eq!(with(5, 0x80), FrameError::Flags(0x80));
        assert!(matches!(with(51, 1), FrameError::PayloadTooLong(_)));
        assert_eq!(with(63, 1), FrameError::Reserved);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_back(bytes: [u8; 64]) {
            let mut b = bytes;
            b[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
            if let Ok(header) = RequestHeader::decode(&b) {
                prop_assert_eq!(header.encode(), b);
            }
        }

        #[test]
        fn any_reply_bytes_decode_to_what_encodes_back(bytes: [u8; 32]) {
            let mut b = bytes;
            b[0..4].copy_from_slice(&REPLY_MAGIC.to_le_bytes());
            if let Ok(header) = ReplyHeader::decode(&b) {
                prop_assert_eq!(header.encode(), b);
            }
        }
    }
}
