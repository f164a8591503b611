//! One connection's requests, judged: bytes in, decisions out.
//!
//! Pure: no sockets, no clock, no volume. The order of the checks is part of the
//! contract (`docs/wire.md`): frame, identity, mode, epoch, sequence, range. The
//! epoch comes before the sequence number, so that a fenced client learns that it
//! is fenced whatever it sends.

use baton_protocol::frame::{
    FLAG_CRC, FLAG_UNMAP, PAYLOAD_BYTES_MAX, REQUEST_HEADER_BYTES, REQUEST_MAGIC,
};
use baton_protocol::handoff::message::{ASK_BYTES_MAX, HandoffBodyError, OPEN_BYTES};
use baton_protocol::units::SECTOR_BYTES;
use baton_protocol::window::{Arrival, Window};
use baton_protocol::{
    AccessMode, Epoch, Features, FrameError, Opcode, QueueId, RequestHeader, Seq, SessionId, Status,
};

/// What stands at the front of the received bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Front {
    /// Not a whole request; `need` bytes make one (or at least its header).
    Partial {
        /// From the start of the request.
        need: usize,
    },
    /// A request with its payload.
    Whole {
        /// Its header.
        header: RequestHeader,
        /// Header and payload, bytes.
        bytes: usize,
    },
    /// The stream is beyond repair.
    Broken {
        /// Why.
        why: Violation,
        /// Whom to answer before closing; `None` when the peer is not ours.
        answer: Option<(Opcode, Seq)>,
    },
}

/// How a peer broke the protocol. The connection is closed after the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a header.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A payload of a length that the opcode does not have.
    #[error("{opcode:?} of {len} bytes came with a payload of {payload} bytes")]
    Payload {
        /// Of the request.
        opcode: Opcode,
        /// Of the request.
        len: u64,
        /// Bytes that follow the header.
        payload: u32,
    },
    /// A READ that no reply can carry.
    #[error("READ of {0} bytes; at most {PAYLOAD_BYTES_MAX} fit a reply")]
    ReadTooLong(u64),
    /// A flag the opcode or the session does not have.
    #[error("flags {0:#04x} do not belong to this request")]
    Flags(u8),
    /// Another session or queue than HELLO named.
    #[error("the request names session {session} queue {queue}, the connection another")]
    Identity {
        /// Named.
        session: SessionId,
        /// Named.
        queue: QueueId,
    },
    /// HELLO comes once.
    #[error("a second HELLO")]
    SecondHello,
    /// A number whose answer the client has.
    #[error("sequence number {0} was answered and may not come again")]
    TooOld(u64),
    /// A number too far ahead.
    #[error("sequence number {0} is further ahead than the window is wide")]
    TooNew(u64),
    /// One EVENT and one ACCESS are parked at a time.
    #[error("a second {0:?} while one is parked")]
    SecondParked(Opcode),
    /// A request that is about no range names one.
    #[error("{0:?} has no offset and no length")]
    Range(Opcode),
    /// A body that cannot be read.
    #[error(transparent)]
    Body(#[from] HandoffBodyError),
    /// A client waits for one SEAL before it sends the next; a few are let be.
    #[error("more SEALs wait than a client ever has")]
    TooManySeals,
}

/// Looks at the front of the received bytes; `elsewhere` more of its payload are held somewhere else. A request that
/// could never be accepted is refused by its header, before its payload is waited for.
#[must_use]
pub fn front(received: &[u8], elsewhere: usize) -> Front {
    let Some((head, _)) = received.split_first_chunk::<REQUEST_HEADER_BYTES>() else {
        return Front::Partial { need: REQUEST_HEADER_BYTES };
    };
    let header = match RequestHeader::decode(head) {
        Ok(header) => header,
        Err(why) => return Front::Broken { why: why.into(), answer: addressee(head) },
    };
    if let Err(why) = shape(&header) {
        return Front::Broken { why, answer: Some((header.opcode, header.seq)) };
    }
    let bytes = REQUEST_HEADER_BYTES + header.payload_len as usize;
    if received.len() + elsewhere < bytes {
        Front::Partial { need: bytes }
    } else {
        Front::Whole { header, bytes }
    }
}

/// What the header alone must satisfy.
fn shape(header: &RequestHeader) -> Result<(), Violation> {
    let RequestHeader { opcode, len, payload_len: payload, flags, .. } = *header;
    let fits = match opcode {
        Opcode::Write => u64::from(payload) == len,
        Opcode::Handoff => payload as usize <= ASK_BYTES_MAX,
        Opcode::Open => payload as usize == OPEN_BYTES,
        _ => payload == 0,
    };
    if !fits {
        return Err(Violation::Payload { opcode, len, payload });
    }
    if matches!(opcode, Opcode::Handoff | Opcode::Open) && (len, header.offset) != (0, 0) {
        return Err(Violation::Range(opcode));
    }
    if opcode == Opcode::Read && len > u64::from(PAYLOAD_BYTES_MAX) {
        return Err(Violation::ReadTooLong(len));
    }
    let allowed = if opcode == Opcode::WriteZeroes { FLAG_UNMAP } else { 0 };
    // No side of this version offers checksums, so no session has them.
    if flags & !allowed != 0 {
        return Err(Violation::Flags(flags & (FLAG_CRC | FLAG_UNMAP)));
    }
    if opcode == Opcode::Hello {
        return Err(Violation::SecondHello);
    }
    Ok(())
}

/// Whom a reply to an unreadable header of our protocol can name.
#[must_use]
pub fn addressee(head: &[u8; REQUEST_HEADER_BYTES]) -> Option<(Opcode, Seq)> {
    let (magic, rest) = head.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*magic) != REQUEST_MAGIC {
        return None;
    }
    let seq = rest.get(4..12)?.first_chunk::<8>()?;
    let opcode = Opcode::from_number(head[4]).unwrap_or(Opcode::Hello);
    Some((opcode, Seq(u64::from_le_bytes(*seq))))
}

/// Who is at the other end, fixed by HELLO.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Incarnation of the client.
    pub session: SessionId,
    /// Queue of this connection.
    pub queue: QueueId,
    /// What it may do.
    pub mode: AccessMode,
    /// What both sides can.
    pub features: Features,
}

impl Identity {
    fn permits(&self, opcode: Opcode) -> bool {
        let of_handoffs = matches!(opcode, Opcode::Access | Opcode::Handoff | Opcode::Open);
        self.mode.permits(opcode) && (!of_handoffs || self.features.contains(Features::HANDOFF))
    }
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Run it.
    Run,
    /// Answer with this status and go on.
    Answer(Status),
    /// Answer with [`Status::Protocol`] and close.
    Break(Violation),
}

/// Judges a whole request. `admitted` asks the gate; it is asked for requests
/// that touch data only, and at most once.
pub fn judge(
    identity: &Identity,
    window: &mut Window,
    header: &RequestHeader,
    size_bytes: u64,
    admitted: impl FnOnce(Epoch) -> bool,
) -> Verdict {
    let RequestHeader { opcode, session, queue, seq, .. } = *header;
    if session != identity.session || queue != identity.queue {
        return Verdict::Break(Violation::Identity { session, queue });
    }
    if !identity.permits(opcode) {
        return Verdict::Answer(Status::NotPermitted);
    }
    if touches_data(opcode) && !admitted(header.epoch) {
        return Verdict::Answer(Status::StaleEpoch);
    }
    match window.arrive(seq) {
        Arrival::New => {}
        Arrival::Done if opcode.is_mutation() => return Verdict::Answer(Status::Ok),
        Arrival::Done => {}
        Arrival::TooOld => return Verdict::Break(Violation::TooOld(seq.0)),
        Arrival::TooNew => return Verdict::Break(Violation::TooNew(seq.0)),
    }
    if opcode.has_range() && !in_range(header.offset, header.len, size_bytes) {
        return Verdict::Answer(Status::OutOfRange);
    }
    Verdict::Run
}

/// Whether the gate decides about the request.
#[must_use]
pub const fn touches_data(opcode: Opcode) -> bool {
    opcode.has_range() || matches!(opcode, Opcode::Flush)
}

fn in_range(offset: u64, len: u64, size_bytes: u64) -> bool {
    offset.is_multiple_of(SECTOR_BYTES)
        && len.is_multiple_of(SECTOR_BYTES)
        && offset.checked_add(len).is_some_and(|end| end <= size_bytes)
}

#[cfg(test)]
mod tests;
