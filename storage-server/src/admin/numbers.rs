//! Numbers as the API writes them: ids and sessions are 16 hexadecimal digits,
//! keys and MACs 64, handoffs ULIDs. JSON numbers would lose digits in many
//! languages.

use baton_protocol::handoff::HandoffId;
use serde::{Deserialize, Deserializer, de};

/// 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hex64(pub(super) u64);

/// 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Hex256(pub(super) [u8; 32]);

/// A ULID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ulid(pub(super) HandoffId);

/// It may be a key.
impl std::fmt::Debug for Hex256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hex256(..)")
    }
}

fn digits(text: &str, count: usize) -> Option<&str> {
    (text.len() == count && text.bytes().all(|b| b.is_ascii_hexdigit())).then_some(text)
}

/// 16 hexadecimal digits, of a query.
pub(super) fn hex64(text: &str) -> Option<u64> {
    u64::from_str_radix(digits(text, 16)?, 16).ok()
}

fn hex256(text: &str) -> Option<[u8; 32]> {
    let text = digits(text, 64)?;
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// As text.
pub(super) fn text256(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl<'de> Deserialize<'de> for Hex64 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        hex64(&text).map(Self).ok_or_else(|| de::Error::custom("write 16 hexadecimal digits"))
    }
}

impl<'de> Deserialize<'de> for Hex256 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        hex256(&text).map(Self).ok_or_else(|| de::Error::custom("write 64 hexadecimal digits"))
    }
}

impl<'de> Deserialize<'de> for Ulid {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map(Self).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_survive_their_text(number: u64, bytes: [u8; 32]) {
            prop_assert_eq!(hex64(&format!("{number:016x}")), Some(number));
            prop_assert_eq!(hex256(&text256(&bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_a_number_or_refused(text: String) {
            prop_assert!(hex64(&text).is_none() || text.len() == 16);
            prop_assert!(hex256(&text).is_none() || text.len() == 64);
        }
    }
}
