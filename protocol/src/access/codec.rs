//! The stored bytes of a record; the table is in `docs/on-disk.md`. The same
//! bytes, without keys, show the record to clients (`docs/wire.md`, ACCESS).

use crate::cursor::{Cursor, Short, put_text};
use crate::handoff::{
    Decided, Handoff, HandoffId, Key, Members, Mode, Plan, Side, Try, VM_BYTES_MAX,
};
use crate::message::OWNER_BYTES_MAX;
use crate::units::{Epoch, SessionId, VolumeId};

use super::{AccessRecord, Owner, Phase};

/// Records before handoffs existed.
const FORMAT_1: u8 = 1;
const FORMAT_1_FIXED_BYTES: usize = 48;
/// What is written.
const FORMAT_2: u8 = 2;

const HAS_OWNER: u8 = 1 << 0;
const HAS_BARRED: u8 = 1 << 1;
const HAS_HANDOFF: u8 = 1 << 2;
const HAS_DECIDED: u8 = 1 << 3;

const SEALED: u8 = 1 << 0;
const SEAL_SEEN: u8 = 1 << 1;
const ABDICATED: u8 = 1 << 2;
const WANTED_BACK: u8 = 1 << 3;

const FIXED_BYTES: usize = 8 + 5 * 8;
const HANDOFF_FIXED_BYTES: usize = 16 + 4 + 4 + 8 + 8 + 4 * 8 + 32;
const DECIDED_BYTES: usize = 16 + 4 + 4 + 8 + 32;
/// No record is longer, bytes.
pub const RECORD_BYTES_MAX: usize = FIXED_BYTES
    + (8 + 2 + OWNER_BYTES_MAX)
    + (2 + OWNER_BYTES_MAX)
    + HANDOFF_FIXED_BYTES
    + 2 * (2 + OWNER_BYTES_MAX)
    + (2 + VM_BYTES_MAX)
    + DECIDED_BYTES;

/// Why stored bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored access record is damaged or of a newer format")]
pub struct RecordError;

impl From<Short> for RecordError {
    fn from(_: Short) -> Self {
        Self
    }
}

impl AccessRecord {
    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let present = flag(self.owner.is_some(), HAS_OWNER)
            | flag(self.barred.is_some(), HAS_BARRED)
            | flag(self.handoff.is_some(), HAS_HANDOFF)
            | flag(self.decided.is_some(), HAS_DECIDED);
        let mut b = Vec::with_capacity(512);
        b.extend_from_slice(&[FORMAT_2, self.phase as u8, present, 0, 0, 0, 0, 0]);
        for number in
            [self.volume.0, self.version, self.epoch.0, self.next_epoch.0, self.coordinator_term]
        {
            b.extend_from_slice(&number.to_le_bytes());
        }
        if let Some(owner) = &self.owner {
            b.extend_from_slice(&owner.session.0.to_le_bytes());
            put_text(&mut b, &owner.name);
        }
        if let Some(barred) = &self.barred {
            put_text(&mut b, barred);
        }
        if let Some(handoff) = &self.handoff {
            encode_handoff(handoff, &mut b);
        }
        if let Some(decided) = &self.decided {
            b.extend_from_slice(&decided.attempt.id.0.to_le_bytes());
            b.extend_from_slice(&decided.attempt.attempt.to_le_bytes());
            b.extend_from_slice(&[decided.winner as u8, u8::from(decided.anchor), 0, 0]);
            b.extend_from_slice(&decided.grant.to_le_bytes());
            b.extend_from_slice(&decided.key.0);
        }
        debug_assert!(b.len() <= RECORD_BYTES_MAX);
        b
    }

    /// Reads stored bytes.
    ///
    /// # Errors
    /// [`RecordError`] when they are not a record of a known format.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(RecordError);
        }
        match bytes.first() {
            Some(&FORMAT_1) => decode_1(bytes),
            Some(&FORMAT_2) => decode_2(bytes),
            _ => Err(RecordError),
        }
    }
}

fn encode_handoff(handoff: &Handoff, b: &mut Vec<u8>) {
    let Handoff { plan, .. } = handoff;
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    let flags = flag(handoff.sealed, SEALED)
        | flag(handoff.seal_seen, SEAL_SEEN)
        | flag(handoff.abdicated, ABDICATED)
        | flag(handoff.wanted_back, WANTED_BACK);
    b.extend_from_slice(&plan.attempt.id.0.to_le_bytes());
    b.extend_from_slice(&plan.attempt.attempt.to_le_bytes());
    b.extend_from_slice(&[plan.mode as u8, flags]);
    b.extend_from_slice(&plan.members.count.to_le_bytes());
    for number in [
        plan.members.hash,
        plan.anchor.0,
        handoff.e_to.0,
        handoff.e_back.0,
        handoff.generation,
        handoff.grant,
    ] {
        b.extend_from_slice(&number.to_le_bytes());
    }
    b.extend_from_slice(&plan.key.0);
    for text in [&plan.from, &plan.to, &plan.vm] {
        put_text(b, text);
    }
}

fn decode_2(bytes: &[u8]) -> Result<AccessRecord, RecordError> {
    let mut b = Cursor::new(bytes);
    let [_, phase, present, reserved @ ..] = b.array::<8>()?;
    let known = HAS_OWNER | HAS_BARRED | HAS_HANDOFF | HAS_DECIDED;
    if present & !known != 0 || reserved != [0; 5] {
        return Err(RecordError);
    }
    let has = |flag| present & flag != 0;
    let record = AccessRecord {
        volume: VolumeId(b.u64()?),
        version: b.u64()?,
        epoch: Epoch(b.u64()?),
        next_epoch: Epoch(b.u64()?),
        coordinator_term: b.u64()?,
        phase: Phase::from_number(phase).ok_or(RecordError)?,
        owner: has(HAS_OWNER)
            .then(|| -> Result<_, RecordError> {
                let session = SessionId(b.u64()?);
                Ok(Owner { session, name: name(&mut b)? })
            })
            .transpose()?,
        barred: has(HAS_BARRED).then(|| name(&mut b)).transpose()?,
        handoff: has(HAS_HANDOFF).then(|| decode_handoff(&mut b)).transpose()?,
        decided: has(HAS_DECIDED).then(|| decode_decided(&mut b)).transpose()?,
    };
    // What no step makes is damage.
    let owned = record.phase != Phase::Free;
    let moving = !matches!(record.phase, Phase::Free | Phase::Owned);
    if !b.is_empty()
        || record.owner.is_some() != owned
        || record.handoff.is_some() != moving
        || record.next_epoch <= record.epoch
    {
        return Err(RecordError);
    }
    Ok(record)
}

fn decode_handoff(b: &mut Cursor<'_>) -> Result<Handoff, RecordError> {
    let attempt = Try { id: HandoffId(b.u128()?), attempt: b.u32()? };
    let mode = match b.u8()? {
        0 => Mode::Base,
        1 => Mode::Fast,
        _ => return Err(RecordError),
    };
    let flags = b.u8()?;
    if flags & !(SEALED | SEAL_SEEN | ABDICATED | WANTED_BACK) != 0 {
        return Err(RecordError);
    }
    let count = b.u16()?;
    let members = Members { count, hash: b.u64()? };
    let anchor = VolumeId(b.u64()?);
    let (e_to, e_back) = (Epoch(b.u64()?), Epoch(b.u64()?));
    let (generation, grant) = (b.u64()?, b.u64()?);
    let key = Key(b.array()?);
    let (from, to) = (name(b)?, name(b)?);
    let vm = name(b)?;
    Ok(Handoff {
        plan: Plan { attempt, vm, from, to, anchor, members, mode, key },
        e_to,
        e_back,
        generation,
        grant,
        sealed: flags & SEALED != 0,
        seal_seen: flags & SEAL_SEEN != 0,
        abdicated: flags & ABDICATED != 0,
        wanted_back: flags & WANTED_BACK != 0,
    })
}

fn decode_decided(b: &mut Cursor<'_>) -> Result<Decided, RecordError> {
    let attempt = Try { id: HandoffId(b.u128()?), attempt: b.u32()? };
    let [winner, anchor, reserved @ ..] = b.array::<4>()?;
    if anchor > 1 || reserved != [0; 2] {
        return Err(RecordError);
    }
    let winner = Side::from_number(winner).ok_or(RecordError)?;
    Ok(Decided { attempt, winner, anchor: anchor == 1, grant: b.u64()?, key: Key(b.array()?) })
}

const _: () = assert!(VM_BYTES_MAX == OWNER_BYTES_MAX, "one bound for every name");

fn name(b: &mut Cursor<'_>) -> Result<String, RecordError> {
    let text = b.text()?.map_err(|_| RecordError)?;
    if text.is_empty() || text.len() > OWNER_BYTES_MAX {
        return Err(RecordError);
    }
    Ok(text.to_owned())
}

fn decode_1(bytes: &[u8]) -> Result<AccessRecord, RecordError> {
    let mut b = Cursor::new(bytes);
    let [_, phase, ..] = b.array::<4>()?;
    let (name_len, barred_len) = (usize::from(b.u16()?), usize::from(b.u16()?));
    let named = name_len.max(barred_len) <= OWNER_BYTES_MAX;
    if !named || bytes.len() != FORMAT_1_FIXED_BYTES + name_len + barred_len {
        return Err(RecordError);
    }
    let (volume, version, epoch) = (VolumeId(b.u64()?), b.u64()?, Epoch(b.u64()?));
    // There is no number after the last.
    if epoch.next() <= epoch {
        return Err(RecordError);
    }
    let (coordinator_term, session) = (b.u64()?, SessionId(b.u64()?));
    let mut text = |len| -> Result<Option<String>, RecordError> {
        let text = std::str::from_utf8(b.bytes(len)?).map_err(|_| RecordError)?;
        Ok((!text.is_empty()).then(|| text.to_owned()))
    };
    let (name, barred) = (text(name_len)?, text(barred_len)?);
    let phase = match (phase, &name) {
        (0, None) => Phase::Free,
        (1, Some(_)) => Phase::Owned,
        _ => return Err(RecordError),
    };
    Ok(AccessRecord {
        volume,
        version,
        epoch,
        next_epoch: epoch.next(),
        phase,
        owner: name.map(|name| Owner { name, session }),
        barred,
        coordinator_term,
        handoff: None,
        decided: None,
    })
}
