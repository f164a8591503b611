//! A handoff: the right to write a VM's volumes moves from one host to another.
//!
//! ```text
//!   coordinator --ARM--> every member (volume of the VM)
//!   source      --SEAL-> every member            destination: STANDBY, sees SEALED
//!   destination --ACTIVATE--> anchor <--RECLAIM-- source or coordinator
//!                             exactly one wins: the proof opens the other members
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`crate::access`] | the storage server's half: one access record per volume |
//! | [`role`] | the backend's half: all volumes of one VM, as source or destination |
//! | [`cooperative`] | the same, where the storage keeps nobody out |
//! | [`message`] | what the two say to each other on the wire |
//! | [`proof`] | what shows a member how the anchor decided |
//!
//! `docs/handoff.md` has the whole protocol and why it is safe.

pub mod cooperative;
pub mod message;
pub mod proof;
pub mod role;

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::units::{Epoch, VolumeId};

pub use cooperative::Cooperative;
pub use message::{Answer, Ask, Count, HandoffRequest, Open, Outcome};
pub use proof::{Key, Proof, Side};
pub use role::Role;

/// Longest name of a VM, bytes.
pub const VM_BYTES_MAX: usize = 255;

/// Names a handoff: 128 random or time-ordered bits chosen by whoever asks for
/// it (a ULID). Written as 26 characters of Crockford's base 32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandoffId(pub u128);

const BASE32: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const ID_CHARS: usize = 26;

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = (0..ID_CHARS)
            .rev()
            .map(|place| {
                let digit = usize::try_from(self.0 >> (5 * place) & 31).expect("5 bits");
                char::from(BASE32[digit])
            })
            .collect();
        f.write_str(&text)
    }
}

/// Why a text is not the name of a handoff.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a handoff id; write a ULID, 26 characters of Crockford's base 32")]
pub struct IdError(String);

impl FromStr for HandoffId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let error = || IdError(text.chars().take(80).collect());
        if text.len() != ID_CHARS {
            return Err(error());
        }
        let mut id: u128 = 0;
        for (place, byte) in text.bytes().enumerate() {
            let digit = BASE32.iter().position(|b| *b == byte.to_ascii_uppercase());
            let digit = digit.ok_or_else(error)?;
            // 26 characters hold 130 bits.
            if place == 0 && digit > 7 {
                return Err(error());
            }
            id = id << 5 | digit as u128;
        }
        Ok(Self(id))
    }
}

impl Serialize for HandoffId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One try of a handoff. After the source came back, the same handoff may be
/// tried again under the next number; messages of an older try are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Try {
    /// Of which handoff.
    pub id: HandoffId,
    /// From 1.
    pub attempt: u32,
}

/// As [`Try::from_str`] reads it: `ID/ATTEMPT`.
impl fmt::Display for Try {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.id, self.attempt)
    }
}

/// Why a text is not the name of a try.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a try of a handoff; write ID/ATTEMPT, a ULID and a number from 1")]
pub struct TryError(String);

impl FromStr for Try {
    type Err = TryError;

    fn from_str(text: &str) -> Result<Self, TryError> {
        let parts = text.split_once('/').and_then(|(id, attempt)| {
            let digits = attempt.bytes().all(|byte| byte.is_ascii_digit());
            Some((id.parse().ok()?, attempt.parse().ok().filter(|number| digits && *number > 0)?))
        });
        let (id, attempt) = parts.ok_or_else(|| TryError(text.chars().take(80).collect()))?;
        Ok(Self { id, attempt })
    }
}

/// What is on disk inside the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Mode {
    /// SEALED and ACTIVE are durable before anyone is told.
    Base = 0,
    /// They are in memory only; a server that restarts in between is FROZEN
    /// until the source or the destination says how it stood.
    Fast = 1,
}

/// Which volumes move together, as every member and every backend can check it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Members {
    /// How many.
    pub count: u16,
    /// Hash of their ids, see [`Members::of`].
    pub hash: u64,
}

impl Members {
    /// Of these volumes, in any order.
    #[must_use]
    pub fn of(volumes: impl IntoIterator<Item = VolumeId>) -> Self {
        let mut ids: Vec<u64> = volumes.into_iter().map(|volume| volume.0).collect();
        ids.sort_unstable();
        ids.dedup();
        // FNV-1a over the ids: the members are named by who may plan, so this
        // guards against a mistake, not against an enemy.
        let hash = ids
            .iter()
            .flat_map(|id| id.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        Self { count: u16::try_from(ids.len()).unwrap_or(u16::MAX), hash }
    }
}

/// What the coordinator plans; the same at every member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Plan {
    /// Which handoff and try.
    #[serde(flatten)]
    pub attempt: Try,
    /// The VM, for people.
    pub vm: String,
    /// Owner name of the source.
    pub from: String,
    /// Owner name of the destination.
    pub to: String,
    /// The volume whose record decides.
    pub anchor: VolumeId,
    /// All volumes that move.
    pub members: Members,
    /// What is on disk inside the blackout.
    pub mode: Mode,
    /// Known to the members and the coordinator only: makes the anchor's
    /// decision provable to the others.
    #[serde(skip)]
    pub key: Key,
}

/// A handoff as one member's access record holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Handoff {
    /// As armed.
    #[serde(flatten)]
    pub plan: Plan,
    /// The destination's epoch on this volume, if it wins.
    pub e_to: Epoch,
    /// The source's epoch on this volume, if it comes back after its seal.
    pub e_back: Epoch,
    /// The server's durability generation when this was armed: if it rises,
    /// changes that the source had acknowledged may be gone.
    pub generation: u64,
    /// FROZEN: the source's seal is known.
    pub sealed: bool,
    /// A seal was asked for since the server started: the source cannot say any
    /// more that it never sealed.
    pub seal_seen: bool,
    /// The destination never activated and never will.
    pub abdicated: bool,
    /// FROZEN anchor: the source asked for the volume; the destination, if it
    /// has not activated, is to abdicate.
    pub wanted_back: bool,
    /// ACTIVE, RECLAIMED: number of the decision's latest grant.
    pub grant: u64,
}

/// A handoff that is over, kept until the next one so that late and repeated
/// messages get the right answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Decided {
    /// Which.
    #[serde(flatten)]
    pub attempt: Try,
    /// Who won.
    pub winner: Side,
    /// Number of the decision's latest grant.
    pub grant: u64,
    /// It was decided here.
    pub anchor: bool,
    /// Of the plan.
    #[serde(skip)]
    pub key: Key,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn members_do_not_depend_on_order_and_notice_a_difference() {
        let of = |ids: &[u64]| Members::of(ids.iter().map(|id| VolumeId(*id)));
        assert_eq!(of(&[1, 2, 3]), of(&[3, 1, 2, 1]));
        assert_ne!(of(&[1, 2, 3]), of(&[1, 2, 4]));
        assert_ne!(of(&[1, 2]), of(&[1, 2, 3]));
        assert_eq!(of(&[1, 2]).count, 2);
    }

    #[test]
    fn what_is_not_an_id_is_refused() {
        for text in [
            "",
            "01",
            "81ARZ3NDEKTSV4RRFFQ69G5FAV",
            "01ARZ3NDEKTSV4RRFFQ69G5FAU",
            "01ARZ3NDEKTSV4RRFFQ69G5FAVX",
        ] {
            assert!(text.parse::<HandoffId>().is_err(), "{text}");
        }
        let id: HandoffId = "01arz3ndektsv4rrffq69g5fav".parse().expect("a ULID");
        assert_eq!(id.to_string(), "01ARZ3NDEKTSV4RRFFQ69G5FAV");
    }

    #[test]
    fn what_is_not_a_try_is_refused() {
        let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
        for number in ["", "/", "/0", "/+1", "/-1", "/1/", "/4294967296", "/x", ":1"] {
            let text = format!("{id}{number}");
            assert!(text.parse::<Try>().is_err(), "{text}");
        }
        assert!("/1".parse::<Try>().is_err());
    }

    proptest! {
        #[test]
        fn a_printed_try_parses_to_itself(id: u128, attempt in 1_u32..) {
            let attempt = Try { id: HandoffId(id), attempt };
            prop_assert_eq!(attempt.to_string().parse(), Ok(attempt));
        }

        #[test]
        fn a_printed_id_parses_to_itself(id: u128) {
            prop_assert_eq!(HandoffId(id).to_string().parse(), Ok(HandoffId(id)));
        }

        #[test]
        fn any_text_parses_or_is_refused(text: String) {
            let _ = text.parse::<HandoffId>();
            let _ = text.parse::<Try>();
        }
    }
}
