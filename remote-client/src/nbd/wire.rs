//! The bytes of NBD: what a client sends, and the heads of what it is told.
//! Numbers are big-endian. Names follow the protocol's document
//! (NetworkBlockDevice/nbd, doc/proto.md).
//!
//! ```text
//!  request    magic flags type cookie offset length             28 bytes, compact
//!             magic flags type cookie offset length             32 bytes, extended
//!  reply      magic error cookie                                16 bytes, simple
//!             magic flags type cookie length                    20 bytes, structured chunk
//!             magic flags type cookie offset length             32 bytes, extended chunk
//! ```

use super::allocation::Form;

/// "NBDMAGIC", with which every server begins.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": a newstyle server, and the head of every option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server says in its place.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Head of every answer to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, the same bits in both directions.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
const REP_ERR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERR + 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERR + 2;
pub(super) const REP_ERR_INVALID: u32 = REP_ERR + 3;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERR + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERR + 6;
pub(super) const REP_ERR_SHUTDOWN: u32 = REP_ERR + 7;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// What an export can do (transmission flags).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExportFlags(pub(super) u16);

impl ExportFlags {
    const HAS_FLAGS: u16 = 1 << 0;

    fn has(self, bit: u16) -> bool {
        // proto.md: without HAS_FLAGS the others mean nothing.
        self.0 & Self::HAS_FLAGS != 0 && self.0 & (1 << bit) != 0
    }
    pub(super) fn read_only(self) -> bool {
        self.has(1)
    }
    pub(super) fn flush(self) -> bool {
        self.has(2)
    }
    pub(super) fn fua(self) -> bool {
        self.has(3)
    }
    pub(super) fn trim(self) -> bool {
        self.has(5)
    }
    pub(super) fn write_zeroes(self) -> bool {
        self.has(6)
    }
    pub(super) fn multi_conn(self) -> bool {
        self.has(8)
    }
}

/// What is asked of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Of a WRITE with an extended header: the length is the payload's.
const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(super) const REQUEST_BYTES: usize = 28;
/// The longer of the two.
pub(super) const REQUEST_BYTES_MAX: usize = 32;

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// Fits 32 bits: what is longer is cut.
    pub(super) len: u32,
}

/// Bytes of a request's head.
pub(super) fn request_bytes(extended: bool) -> usize {
    if extended { REQUEST_BYTES_MAX } else { REQUEST_BYTES }
}

impl Request {
    /// The head's bytes at the front, and how many they are.
    pub(super) fn encode(&self, extended: bool) -> [u8; REQUEST_BYTES_MAX] {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        let (magic, mut flags) = match extended {
            true => (EXTENDED_REQUEST_MAGIC, self.flags),
            false => (REQUEST_MAGIC, self.flags),
        };
        if extended && self.command == Command::Write {
            flags |= CMD_FLAG_PAYLOAD_LEN;
        }
        put(0, &magic.to_be_bytes());
        put(4, &flags.to_be_bytes());
        put(6, &(self.command as u16).to_be_bytes());
        put(8, &self.cookie.to_be_bytes());
        put(16, &self.offset.to_be_bytes());
        if extended {
            put(24, &u64::from(self.len).to_be_bytes());
        } else {
            put(24, &self.len.to_be_bytes());
        }
        bytes
    }
}

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
/// The longest head of a reply.
pub(super) const REPLY_BYTES_MAX: usize = 32;

/// The forms that replies have on a connection, by what was agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// One reply per request.
    #[default]
    Simple,
    /// Chunks for READ, either form for the rest.
    Structured,
    /// 64-bit heads both ways, chunks only.
    Extended,
}

/// What a chunk of a reply carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkKind {
    None,
    /// Offset and data.
    OffsetData,
    /// Offset and size of a range of zeros.
    OffsetHole,
    /// Answer to BLOCK_STATUS.
    BlockStatus(Form),
    /// Error number and sentence.
    Error,
    /// The same with an offset.
    ErrorOffset,
    /// Another error: its number comes first in any of them.
    OtherError(u16),
}

/// Head of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplyHead {
    Simple { error: u32, cookie: u64 },
    Chunk { done: bool, kind: ChunkKind, cookie: u64, len: u64 },
}

/// Why bytes are no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("a reply that begins with {0:#010x}")]
    Magic(u32),
    #[error("a reply in a form that was not agreed")]
    Form,
    #[error("a chunk of the unknown kind {0}")]
    Kind(u16),
}

/// Bytes of a reply's head, from its first four.
pub(super) fn reply_bytes(magic: [u8; 4], dialect: Dialect) -> Result<usize, HeadError> {
    match (u32::from_be_bytes(magic), dialect) {
        (SIMPLE_MAGIC, Dialect::Simple | Dialect::Structured) => Ok(16),
        (STRUCTURED_MAGIC, Dialect::Structured) => Ok(20),
        (EXTENDED_MAGIC, Dialect::Extended) => Ok(32),
        (SIMPLE_MAGIC | STRUCTURED_MAGIC | EXTENDED_MAGIC, _) => Err(HeadError::Form),
        (magic, _) => Err(HeadError::Magic(magic)),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

const CHUNK_DONE: u16 = 1 << 0;
const CHUNK_IS_ERROR: u16 = 1 << 15;

impl ReplyHead {
    /// Of whole heads: as many bytes as [`reply_bytes`] said, at the front.
    pub(super) fn decode(
        bytes: &[u8; REPLY_BYTES_MAX],
        dialect: Dialect,
    ) -> Result<Self, HeadError> {
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        let len = match reply_bytes(magic, dialect)? {
            16 => {
                return Ok(Self::Simple { error: u32_at(bytes, 4), cookie: u64_at(bytes, 8) });
            }
            20 => u64::from(u32_at(bytes, 16)),
            _ => u64_at(bytes, 24),
        };
        let kind = match u16_at(bytes, 6) {
            0 => ChunkKind::None,
            1 => ChunkKind::OffsetData,
            2 => ChunkKind::OffsetHole,
            5 if dialect == Dialect::Structured => ChunkKind::BlockStatus(Form::Compact),
            6 if dialect == Dialect::Extended => ChunkKind::BlockStatus(Form::Extended),
            0x8001 => ChunkKind::Error,
            0x8002 => ChunkKind::ErrorOffset,
            kind if kind & CHUNK_IS_ERROR != 0 => ChunkKind::OtherError(kind),
            kind => return Err(HeadError::Kind(kind)),
        };
        let done = u16_at(bytes, 4) & CHUNK_DONE != 0;
        Ok(Self::Chunk { done, kind, cookie: u64_at(bytes, 8), len })
    }
}

/// The number and the sentence of an error chunk; `None` when it is too short
/// for what it says.
pub(super) fn error_chunk(body: &[u8]) -> Option<(u32, String)> {
    if body.len() < 6 {
        // A number alone is enough for an error of a kind that is not known.
        return (body.len() >= 4).then(|| (u32_at(body, 0), String::new()));
    }
    let text = body.get(6..6 + usize::from(u16_at(body, 4)))?;
    Some((u32_at(body, 0), printable(text)))
}

/// Offset and size of a hole.
pub(super) fn hole_chunk(body: &[u8; 12]) -> (u64, u32) {
    (u64_at(body, 0), u32_at(body, 8))
}

/// Longest sentence of a server that is repeated, bytes.
const TEXT_BYTES_MAX: usize = 256;

/// A server's sentence, fit for a log.
pub(super) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(TEXT_BYTES_MAX)]);
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.trim().to_owned()
}

/// An option's bytes.
pub(super) fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_be_bytes());
    let len = u32::try_from(data.len()).expect("an export's name is short");
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Asks for an export, its size and its block sizes.
pub(super) fn go(export: &str) -> Vec<u8> {
    let mut data = u32::try_from(export.len()).expect("checked").to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    option(OPT_GO, &data)
}

/// Head of an answer to an option.
pub(super) const OPTION_REPLY_BYTES: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) option: u32,
    pub(super) kind: u32,
    pub(super) len: u32,
}

impl OptionReply {
    /// `None`: something else.
    pub(super) fn decode(bytes: &[u8; OPTION_REPLY_BYTES]) -> Option<Self> {
        (u64_at(bytes, 0) == OPTION_REPLY_MAGIC).then(|| Self {
            option: u32_at(bytes, 8),
            kind: u32_at(bytes, 12),
            len: u32_at(bytes, 16),
        })
    }

    pub(super) fn is_error(&self) -> bool {
        self.kind & REP_ERR != 0
    }
}

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Info {
    Export {
        size_bytes: u64,
        flags: ExportFlags,
    },
    BlockSize {
        min: u32,
        preferred: u32,
        max: u32,
    },
    /// Not asked for, and of no use.
    Other,
}

impl Info {
    /// `None`: its length is wrong.
    pub(super) fn decode(body: &[u8]) -> Option<Self> {
        if body.len() < 2 {
            return None;
        }
        match u16_at(body, 0) {
            INFO_EXPORT if body.len() == 12 => Some(Self::Export {
                size_bytes: u64_at(body, 2),
                flags: ExportFlags(u16_at(body, 10)),
            }),
            INFO_BLOCK_SIZE if body.len() == 14 => Some(Self::BlockSize {
                min: u32_at(body, 2),
                preferred: u32_at(body, 6),
                max: u32_at(body, 10),
            }),
            INFO_EXPORT | INFO_BLOCK_SIZE => None,
            _ => Some(Self::Other),
        }
    }
}

/// Size and flags, the answer to EXPORT_NAME.
pub(super) fn export_name_answer(bytes: &[u8; 10]) -> (u64, ExportFlags) {
    (u64_at(bytes, 0), ExportFlags(u16_at(bytes, 8)))
}

pub(super) fn greeting(bytes: &[u8; 16]) -> (u64, u64) {
    (u64_at(bytes, 0), u64_at(bytes, 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_requests() {
        let request = Request {
            command: Command::Write,
            flags: CMD_FLAG_FUA,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len: 0x200,
        };
        let compact = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 2, 0,
        ];
        assert_eq!(request.encode(false)[..request_bytes(false)], compact);
        // The flag that says that the length is the payload's.
        let extended = [
            0x21, 0xe4, 0x1c, 0x71, 0, 0x21, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10,
            0, 0, 0, 0, 0, 0, 0, 2, 0,
        ];
        assert_eq!(request.encode(true), extended);
        let zeroes = Request { command: Command::WriteZeroes, flags: CMD_FLAG_NO_HOLE, ..request };
        assert_eq!(zeroes.encode(true)[4..8], [0, 2, 0, 6], "no payload, no such flag");
    }

    fn head(bytes: &[u8], dialect: Dialect) -> Result<ReplyHead, HeadError> {
        let mut whole = [0xaa; REPLY_BYTES_MAX];
        whole[..bytes.len()].copy_from_slice(bytes);
        ReplyHead::decode(&whole, dialect)
    }

    #[test]
    fn golden_replies() {
        let simple = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 9];
        let want = ReplyHead::Simple { error: 28, cookie: 9 };
        assert_eq!(head(&simple, Dialect::Simple), Ok(want));
        assert_eq!(head(&simple, Dialect::Structured), Ok(want));
        assert_eq!(head(&simple, Dialect::Extended), Err(HeadError::Form));

        let mut chunk = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9];
        chunk.extend([0, 0, 2, 8]);
        let want =
            ReplyHead::Chunk { done: true, kind: ChunkKind::OffsetData, cookie: 9, len: 520 };
        assert_eq!(head(&chunk, Dialect::Structured), Ok(want));
        assert_eq!(head(&chunk, Dialect::Simple), Err(HeadError::Form));
        chunk[6..8].copy_from_slice(&[0x80, 0x07]);
        let error = head(&chunk, Dialect::Structured).expect("an error of any kind");
        assert!(matches!(error, ReplyHead::Chunk { kind: ChunkKind::OtherError(0x8007), .. }));
        // Holes in the form of the other dialect, and what nobody knows.
        for kind in [6, 7] {
            chunk[6..8].copy_from_slice(&[0, kind]);
            let want = Err(HeadError::Kind(u16::from(kind)));
            assert_eq!(head(&chunk, Dialect::Structured), want);
        }

        let mut wide = vec![0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9];
        wide.extend([0; 8]);
        wide.extend([0, 0, 0, 1, 0, 0, 0, 12]);
        let len = (1 << 32) + 12;
        let want = ReplyHead::Chunk { done: false, kind: ChunkKind::OffsetHole, cookie: 9, len };
        assert_eq!(head(&wide, Dialect::Extended), Ok(want));
        assert_eq!(head(&[1, 2, 3, 4], Dialect::Simple), Err(HeadError::Magic(0x0102_0304)));
    }

    #[test]
    fn error_chunks_say_what_they_have() {
        assert_eq!(error_chunk(&[0, 0, 0, 5, 0, 2, b'n', b'o']), Some((5, "no".to_owned())));
        assert_eq!(error_chunk(&[0, 0, 0, 5, 0, 3, b'n', b'\n', b'o', 9]), Some((5, "n o".into())));
        assert_eq!(error_chunk(&[0, 0, 0, 5]), Some((5, String::new())));
        assert_eq!(error_chunk(&[0, 0, 0, 5, 0, 3, b'n']), None);
        assert_eq!(error_chunk(&[0, 0, 5]), None);
    }

    #[test]
    fn golden_options() {
        assert_eq!(
            go("ab"),
            [
                b"IHAVEOPT".as_slice(),
                &[0, 0, 0, 7, 0, 0, 0, 10],
                &[0, 0, 0, 2, b'a', b'b', 0, 1, 0, 3]
            ]
            .concat()
        );
        let mut export = vec![0, 0];
        export.extend(0x10_0000u64.to_be_bytes());
        export.extend([1, 0x25]);
        let Some(Info::Export { size_bytes: 0x10_0000, flags }) = Info::decode(&export) else {
            panic!("not an export")
        };
        assert!(flags.flush() && flags.trim() && flags.multi_conn());
        assert!(!flags.read_only() && !flags.fua() && !flags.write_zeroes());
        assert!(!ExportFlags(0xfffe).flush(), "without HAS_FLAGS there are none");
        assert_eq!(Info::decode(&export[..11]), None);
        assert_eq!(Info::decode(&[0, 2, 9]), Some(Info::Other));
        assert_eq!(Info::decode(&[0]), None);
    }
}
