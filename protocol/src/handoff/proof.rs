//! How a member knows what the anchor decided: a MAC under a key that only the
//! members and the coordinator have. Neither source nor destination can make
//! one, so a backend that was not granted the volumes cannot open them.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use sha2::Sha256;

use super::Try;
use crate::units::SessionId;

/// Who won.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Side {
    /// The source goes on.
    Source = 0,
    /// The destination goes on.
    Destination = 1,
}

impl Side {
    /// The side with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Source),
            1 => Some(Self::Destination),
            _ => None,
        }
    }
}

/// Bytes of a MAC.
pub const MAC_BYTES: usize = 32;

/// The key of one handoff: random.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Key(pub [u8; 32]);

/// A key is never shown.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// The anchor's decision, for the winner to show to the other members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Proof {
    /// Who won.
    pub side: Side,
    /// Rises with every incarnation of the winner that the anchor granted, so
    /// that a member can tell the latest.
    pub grant: u64,
    /// Over all of it and the session that may use it.
    pub mac: [u8; MAC_BYTES],
}

impl Proof {
    /// Made by the anchor for `session`.
    #[must_use]
    pub fn new(key: &Key, attempt: Try, side: Side, grant: u64, session: SessionId) -> Self {
        let mac = mac(key, attempt, side, grant, session).finalize().into_bytes().into();
        Self { side, grant, mac }
    }

    /// Whether the anchor said this of `session`.
    #[must_use]
    pub fn holds(&self, key: &Key, attempt: Try, session: SessionId) -> bool {
        mac(key, attempt, self.side, self.grant, session).verify_slice(&self.mac).is_ok()
    }
}

fn mac(key: &Key, attempt: Try, side: Side, grant: u64, session: SessionId) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.0).expect("HMAC takes keys of any length");
    mac.update(b"baton-handoff-1");
    mac.update(&attempt.id.0.to_le_bytes());
    mac.update(&attempt.attempt.to_le_bytes());
    mac.update(&[side as u8]);
    mac.update(&grant.to_le_bytes());
    mac.update(&session.0.to_le_bytes());
    mac
}

#[cfg(test)]
mod tests {
    use super::super::HandoffId;
    use super::*;

    #[test]
    fn a_proof_is_good_for_what_it_says_and_nothing_else() {
        let (key, other) = (Key([7; 32]), Key([8; 32]));
        let attempt = Try { id: HandoffId(9), attempt: 1 };
        let proof = Proof::new(&key, attempt, Side::Destination, 5, SessionId(3));
        assert!(proof.holds(&key, attempt, SessionId(3)));
        assert!(!proof.holds(&other, attempt, SessionId(3)));
        assert!(!proof.holds(&key, Try { attempt: 2, ..attempt }, SessionId(3)));
        assert!(!proof.holds(&key, Try { id: HandoffId(8), ..attempt }, SessionId(3)));
        assert!(!proof.holds(&key, attempt, SessionId(4)));
        assert!(!Proof { side: Side::Source, ..proof }.holds(&key, attempt, SessionId(3)));
        assert!(!Proof { grant: 6, ..proof }.holds(&key, attempt, SessionId(3)));
        assert!(!Proof { mac: [0; 32], ..proof }.holds(&key, attempt, SessionId(3)));
    }
}
