//! Opcodes, and the bodies of the messages that have one.
//!
//! READ replies and WRITE requests carry plain data. HELLO, WELCOME and EVENT
//! carry the small structures below; `docs/wire.md` has their byte tables.

use crate::status::Status;
use crate::units::{Epoch, Seq, VolumeId};

/// What a request asks. Numbers are for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Opens the conversation; exactly one, first, on every connection. Answered
    /// by WELCOME (status ok) or by a typed refusal with a sentence as payload.
    Hello = 1,
    /// Data of a range.
    Read = 2,
    /// New data for a range; answered when the server has it.
    Write = 3,
    /// Answered when everything answered before is on stable storage.
    Flush = 4,
    /// The range's contents are no longer needed.
    Discard = 5,
    /// The range reads as zeros.
    WriteZeroes = 6,
    /// Answered at once, whatever the disk does.
    Ping = 7,
    /// Parked by the server until there is news.
    Event = 8,
    /// The owner gives the volume back: nobody owns it afterwards.
    Release = 9,
    /// Parked by the server until the access record differs from the one the
    /// client knows: `offset` is its version, `len` the server's boot id.
    Access = 10,
    /// Asks something of a handoff ([`crate::handoff::message`]).
    Handoff = 11,
    /// Shows the anchor's decision; the connection goes on under the winner's
    /// epoch, and what follows on it waits for that.
    Open = 12,
}

impl Opcode {
    const ALL: [Self; 12] = [
        Self::Hello,
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
        Self::Ping,
        Self::Event,
        Self::Release,
        Self::Access,
        Self::Handoff,
        Self::Open,
    ];

    /// The opcode with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// Whether the request changes the volume's contents, so that running it a
    /// second time after a reconnect could cover a later change.
    #[must_use]
    pub const fn is_mutation(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }

    /// Whether `offset` and `len` name a range of the volume.
    #[must_use]
    pub const fn has_range(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

/// What a session wants to do with the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AccessMode {
    /// Read and write; at most one owner at a time.
    Owner = 1,
    /// Connected and waiting: size and events, no data (the destination of a
    /// migration before it is granted the volume).
    Standby = 2,
    /// Read only, beside whoever owns the volume.
    ReadOnly = 3,
}

impl AccessMode {
    /// The mode with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Owner),
            2 => Some(Self::Standby),
            3 => Some(Self::ReadOnly),
            _ => None,
        }
    }

    /// Whether a session of this mode may send this request at all.
    #[must_use]
    pub const fn permits(self, opcode: Opcode) -> bool {
        match opcode {
            Opcode::Hello | Opcode::Ping | Opcode::Event | Opcode::Access => true,
            // Who may ask what is the access record's to say.
            Opcode::Handoff | Opcode::Open => matches!(self, Self::Owner | Self::Standby),
            Opcode::Read | Opcode::Flush => matches!(self, Self::Owner | Self::ReadOnly),
            Opcode::Write | Opcode::Discard | Opcode::WriteZeroes | Opcode::Release => {
                matches!(self, Self::Owner)
            }
        }
    }
}

/// Optional abilities, agreed in HELLO and WELCOME: the session has those that
/// both sides set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Payload checksums (CRC-32C). The headers have the room; no side of this
    /// version offers it yet.
    pub const CHECKSUM: Self = Self(1 << 0);

    /// ACCESS, HANDOFF and OPEN.
    pub const HANDOFF: Self = Self(1 << 1);

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those that both sides set.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Longest owner name, bytes.
pub const OWNER_BYTES_MAX: usize = 255;
/// Longest volume name, bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 64;
/// Longest credential, bytes (none is used by this version).
pub const TOKEN_BYTES_MAX: usize = 512;
/// Fixed part of a HELLO body, bytes.
pub const HELLO_FIXED_BYTES: usize = 32;
/// Longest HELLO body, bytes; a server refuses a longer one before reading it.
pub const HELLO_BYTES_MAX: usize =
    HELLO_FIXED_BYTES + OWNER_BYTES_MAX + VOLUME_NAME_BYTES_MAX + TOKEN_BYTES_MAX;
/// A WELCOME body, bytes.
pub const WELCOME_BYTES: usize = 80;
/// An EVENT reply body, bytes.
pub const EVENT_BYTES: usize = 32;

// The byte tables of docs/wire.md: the last field of each body ends here.
const _: () = assert!(HELLO_FIXED_BYTES == 24 + size_of::<u64>());
const _: () = assert!(WELCOME_BYTES == 72 + size_of::<u64>());
const _: () = assert!(EVENT_BYTES == 24 + size_of::<u64>());

/// Body of HELLO. Session, queue and epoch are in the header: epoch zero asks
/// for a new claim, any other rejoins the session that was granted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version the client speaks.
    pub version_oldest: u16,
    /// Newest version the client speaks.
    pub version_newest: u16,
    /// What the session wants.
    pub mode: AccessMode,
    /// Features the client can use.
    pub features: Features,
    /// The lowest sequence number the client may still send on this queue.
    pub resume_from: Seq,
    /// Who claims: stable over restarts of the same client, different for
    /// everybody else (host and VM).
    pub owner: String,
    /// Name of the volume.
    pub volume: String,
    /// Credential, empty in this version.
    pub token: Vec<u8>,
}

/// Body of WELCOME: what the session got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Version of every later message.
    pub version: u16,
    /// Granted mode.
    pub mode: AccessMode,
    /// The volume itself is read-only.
    pub read_only: bool,
    /// Smallest unit that is written at once, bytes.
    pub block_bytes: u32,
    /// The volume.
    pub volume: VolumeId,
    /// Token for every request of this session.
    pub epoch: Epoch,
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// Features of the session.
    pub features: Features,
    /// Largest payload of one frame, bytes.
    pub payload_bytes_max: u32,
    /// Largest number of unanswered requests on this queue.
    pub window_requests: u32,
    /// Discards of this size and alignment give space back, bytes.
    pub discard_bytes: u32,
    /// Random per start of the server: tells a restart from a reconnect.
    pub boot_id: u64,
    /// Number of the last event; goes into the first EVENT request.
    pub event_id: u64,
    /// Rises when changes that were answered and not flushed may have been lost,
    /// as by a power loss; a restart of the server alone leaves it. Zero: the
    /// server does not say.
    pub durability_generation: u64,
}

/// What happened, in an EVENT reply. Numbers are for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum EventKind {
    /// The volume has a new size; `value` is the size in bytes.
    Resized = 1,
    /// The volume has a new epoch; `value` is the epoch. A session of a lower
    /// epoch is fenced.
    EpochChanged = 2,
    /// The volume was deleted.
    Deleted = 3,
    /// The server is going away; reconnect.
    GoingAway = 4,
}

impl EventKind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Resized),
            2 => Some(Self::EpochChanged),
            3 => Some(Self::Deleted),
            4 => Some(Self::GoingAway),
            _ => None,
        }
    }
}

/// Body of an EVENT reply. The request's `offset` is the last event the client
/// knows; the reply comes as soon as there is a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the event on this volume, rising.
    pub id: u64,
    /// What happened.
    pub kind: EventKind,
    /// Meaning depends on the kind.
    pub value: u64,
}

/// Why a body cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The body's length does not fit its content.
    #[error("{what} of {len} bytes: wrong length")]
    Length {
        /// Which body.
        what: &'static str,
        /// Bytes received.
        len: usize,
    },
    /// A name is not UTF-8, is empty or is too long.
    #[error("{0} is empty, too long or not UTF-8")]
    Name(&'static str),
    /// A number that this version does not have.
    #[error("unknown {what} {number}")]
    Unknown {
        /// Which field.
        what: &'static str,
        /// Its value.
        number: u64,
    },
}

impl BodyError {
    /// How the server answers a HELLO with this error.
    #[must_use]
    pub const fn status(&self) -> Status {
        Status::Protocol
    }
}

/// Cuts little-endian integers off the front of a body of checked length.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        head
    }
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N));
        out
    }
    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

fn mode(number: u8) -> Result<AccessMode, BodyError> {
    AccessMode::from_number(number)
        .ok_or(BodyError::Unknown { what: "access mode", number: u64::from(number) })
}

fn name(bytes: &[u8], what: &'static str, max: usize) -> Result<String, BodyError> {
    if bytes.is_empty() || bytes.len() > max {
        return Err(BodyError::Name(what));
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| BodyError::Name(what))
}

impl Hello {
    /// The bytes on the wire. Names longer than their limits are refused by
    /// every server, so they are a bug of the caller.
    ///
    /// # Panics
    /// When a name or the token is longer than its limit.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.owner.len() <= OWNER_BYTES_MAX, "owner name too long");
        assert!(self.volume.len() <= VOLUME_NAME_BYTES_MAX, "volume name too long");
        assert!(self.token.len() <= TOKEN_BYTES_MAX, "token too long");
        let len16 = |n: usize| u16::try_from(n).expect("checked above").to_le_bytes();
        let mut b = Vec::with_capacity(HELLO_BYTES_MAX);
        b.extend_from_slice(&self.version_oldest.to_le_bytes());
        b.extend_from_slice(&self.version_newest.to_le_bytes());
        b.extend_from_slice(&[self.mode as u8, 0]);
        b.extend_from_slice(&len16(self.owner.len()));
        b.extend_from_slice(&len16(self.volume.len()));
        b.extend_from_slice(&len16(self.token.len()));
        b.extend_from_slice(&[0; 4]);
        b.extend_from_slice(&self.features.0.to_le_bytes());
        b.extend_from_slice(&self.resume_from.0.to_le_bytes());
        debug_assert_eq!(b.len(), HELLO_FIXED_BYTES);
        b.extend_from_slice(self.owner.as_bytes());
        b.extend_from_slice(self.volume.as_bytes());
        b.extend_from_slice(&self.token);
        b
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] when the bytes are not a HELLO body. The version range is
    /// read even from a longer, later body, so that the refusal can name it.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let length = || BodyError::Length { what: "HELLO", len: body.len() };
        if body.len() < HELLO_FIXED_BYTES || body.len() > HELLO_BYTES_MAX {
            return Err(length());
        }
        let mut f = Fields(body);
        let (version_oldest, version_newest) = (f.u16(), f.u16());
        let mode = mode(f.u8())?;
        let _reserved = f.u8();
        let lens = [f.u16(), f.u16(), f.u16()].map(usize::from);
        let _reserved = f.u32();
        let features = Features(f.u64());
        let resume_from = Seq(f.u64());
        if body.len() != HELLO_FIXED_BYTES + lens.iter().sum::<usize>() {
            return Err(length());
        }
        let owner = name(f.bytes(lens[0]), "the owner's name", OWNER_BYTES_MAX)?;
        let volume = name(f.bytes(lens[1]), "the volume's name", VOLUME_NAME_BYTES_MAX)?;
        if lens[2] > TOKEN_BYTES_MAX {
            return Err(length());
        }
        let token = f.bytes(lens[2]).to_vec();
        Ok(Self {
            version_oldest,
            version_newest,
            mode,
            features,
            resume_from,
            owner,
            volume,
            token,
        })
    }
}

impl Welcome {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let mut b = [0; WELCOME_BYTES];
        b[0..2].copy_from_slice(&self.version.to_le_bytes());
        b[2] = self.mode as u8;
        b[3] = u8::from(self.read_only);
        b[4..8].copy_from_slice(&self.block_bytes.to_le_bytes());
        b[8..16].copy_from_slice(&self.volume.0.to_le_bytes());
        b[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        b[24..32].copy_from_slice(&self.size_bytes.to_le_bytes());
        b[32..40].copy_from_slice(&self.features.0.to_le_bytes());
        b[40..44].copy_from_slice(&self.payload_bytes_max.to_le_bytes());
        b[44..48].copy_from_slice(&self.window_requests.to_le_bytes());
        b[48..52].copy_from_slice(&self.discard_bytes.to_le_bytes());
        b[56..64].copy_from_slice(&self.boot_id.to_le_bytes());
        b[64..72].copy_from_slice(&self.event_id.to_le_bytes());
        b[72..80].copy_from_slice(&self.durability_generation.to_le_bytes());
        b
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] when the bytes are not a WELCOME body.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        if body.len() != WELCOME_BYTES {
            return Err(BodyError::Length { what: "WELCOME", len: body.len() });
        }
        let mut f = Fields(body);
        let version = f.u16();
        let mode = mode(f.u8())?;
        let read_only = f.u8() & 1 == 1;
        let block_bytes = f.u32();
        let volume = VolumeId(f.u64());
        let epoch = Epoch(f.u64());
        let size_bytes = f.u64();
        let features = Features(f.u64());
        let (payload_bytes_max, window_requests, discard_bytes) = (f.u32(), f.u32(), f.u32());
        let _reserved = f.u32();
        let (boot_id, event_id) = (f.u64(), f.u64());
        let durability_generation = f.u64();
        Ok(Self {
            version,
            mode,
            read_only,
            block_bytes,
            volume,
            epoch,
            size_bytes,
            features,
            payload_bytes_max,
            window_requests,
            discard_bytes,
            boot_id,
            event_id,
            durability_generation,
        })
    }
}

impl Event {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; EVENT_BYTES] {
        let mut b = [0; EVENT_BYTES];
        b[0..8].copy_from_slice(&self.id.to_le_bytes());
        b[8..10].copy_from_slice(&(self.kind as u16).to_le_bytes());
        b[16..24].copy_from_slice(&self.value.to_le_bytes());
        b
    }

    /// Reads a body. A kind of a later version is an error the client may pass
    /// over: it parks its next request with the same event number.
    ///
    /// # Errors
    /// [`BodyError`] when the bytes are not an EVENT body of this version.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        if body.len() != EVENT_BYTES {
            return Err(BodyError::Length { what: "EVENT", len: body.len() });
        }
        let mut f = Fields(body);
        let id = f.u64();
        let kind = f.u16();
        let _reserved = f.bytes(6);
        let value = f.u64();
        let kind = EventKind::from_number(kind)
            .ok_or(BodyError::Unknown { what: "event", number: u64::from(kind) })?;
        Ok(Self { id, kind, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            version_oldest: 1,
            version_newest: 2,
            mode: AccessMode::Owner,
            features: Features(0x0102),
            resume_from: Seq(9),
            owner: "h/v".to_owned(),
            volume: "d0".to_owned(),
            token: vec![0xaa],
        }
    }

    #[test]
    fn golden_hello_v1() {
        let golden: &[u8] = &[
            1, 0, 2, 0, 1, 0, 3, 0, 2, 0, 1, 0, 0, 0, 0, 0, //
            0x02, 0x01, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, //
            b'h', b'/', b'v', b'd', b'0', 0xaa,
        ];
        assert_eq!(hello().encode(), golden);
        assert_eq!(Hello::decode(golden), Ok(hello()));
    }

    #[test]
    fn golden_welcome_v1() {
        let welcome = Welcome {
            version: 1,
            mode: AccessMode::ReadOnly,
            read_only: true,
            block_bytes: 512,
            volume: VolumeId(0x11),
            epoch: Epoch(0x22),
            size_bytes: 0x33,
            features: Features(0x44),
            payload_bytes_max: 0x55,
            window_requests: 0x66,
            discard_bytes: 0x77,
            boot_id: 0x88,
            event_id: 0x99,
            durability_generation: 0xaa,
        };
        let mut golden = [0u8; 80];
        for (at, byte) in [
            (0, 1),
            (2, 3),
            (3, 1),
            (5, 2),
            (8, 0x11),
            (16, 0x22),
            (24, 0x33),
            (32, 0x44),
            (40, 0x55),
            (44, 0x66),
            (48, 0x77),
            (56, 0x88),
            (64, 0x99),
            (72, 0xaa),
        ] {
            golden[at] = byte;
        }
        assert_eq!(welcome.encode(), golden);
        assert_eq!(Welcome::decode(&golden), Ok(welcome));
    }

    #[test]
    fn golden_event_v1() {
        let event = Event { id: 5, kind: EventKind::Resized, value: 0x0102 };
        let mut golden = [0u8; 32];
        (golden[0], golden[8], golden[16], golden[17]) = (5, 1, 2, 1);
        assert_eq!(event.encode(), golden);
        assert_eq!(Event::decode(&golden), Ok(event));
    }

    #[test]
    fn a_hello_with_a_bad_part_is_refused() {
        let good = hello().encode();
        let with = |at: usize, value: u8| {
            let mut b = good.clone();
            b[at] = value;
            Hello::decode(&b)
        };
        assert!(matches!(with(4, 0), Err(BodyError::Unknown { .. })), "mode");
        assert!(matches!(with(6, 9), Err(BodyError::Length { .. })), "owner length");
        assert!(matches!(with(32, 0xff), Err(BodyError::Name(_))), "owner not UTF-8");
        assert!(matches!(Hello::decode(&good[..31]), Err(BodyError::Length { .. })));
        assert!(matches!(Hello::decode(&[0; HELLO_BYTES_MAX + 1]), Err(BodyError::Length { .. })));
        let empty = Hello { owner: String::new(), ..hello() }.encode();
        assert!(matches!(Hello::decode(&empty), Err(BodyError::Name(_))));
    }

    /// The whole mode x opcode matrix.
    #[test]
    fn what_each_mode_permits() {
        let permitted = |mode: AccessMode| {
            Opcode::ALL.into_iter().filter(|o| mode.permits(*o)).collect::<Vec<_>>()
        };
        use Opcode::*;
        assert_eq!(permitted(AccessMode::Owner), Opcode::ALL);
        assert_eq!(permitted(AccessMode::Standby), [Hello, Ping, Event, Access, Handoff, Open]);
        assert_eq!(permitted(AccessMode::ReadOnly), [Hello, Read, Flush, Ping, Event, Access]);
    }

    #[test]
    fn opcode_numbers_are_positions_from_one() {
        for (number, opcode) in (1u8..).zip(Opcode::ALL) {
            assert_eq!(opcode as u8, number);
            assert_eq!(Opcode::from_number(number), Some(opcode));
        }
        assert_eq!(Opcode::from_number(0), None);
        assert_eq!(Opcode::from_number(13), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(hello) = Hello::decode(&bytes) {
                prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
            let _ = Welcome::decode(&bytes);
            let _ = Event::decode(&bytes);
        }
    }
}
