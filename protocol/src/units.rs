//! Newtypes for the integers that travel together, so that two of them cannot
//! be swapped, and sizes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The unit of virtio-blk addresses, in bytes (virtio 1.2 5.2.6: `sector` is
/// always in units of 512 bytes, whatever the device's block size).
pub const SECTOR_BYTES: u64 = 512;

macro_rules! integer_newtype {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);
    };
}

integer_newtype! {
    /// A volume for ever: random, never zero, never used again after a delete.
    VolumeId(u64)
}
integer_newtype! {
    /// A fencing token. Each number belongs to at most one principal for ever,
    /// so a request that carries it says who sent it. Zero is "none yet".
    Epoch(u64)
}
integer_newtype! {
    /// One incarnation of a client process: random, never zero.
    SessionId(u64)
}
integer_newtype! {
    /// A queue of a session; one connection serves one queue.
    QueueId(u16)
}
integer_newtype! {
    /// Position of a request on its queue, from 1, without gaps. A request that
    /// is sent again after a reconnect keeps its number.
    Seq(u64)
}

impl QueueId {
    /// The connection that carries no I/O: it claims the volume, keeps an EVENT
    /// request parked and gives the volume back at the end.
    pub const CONTROL: Self = Self(u16::MAX);
}

impl Epoch {
    /// The next token. Saturates: 2^64 hand-overs do not happen.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::CONTROL { f.write_str("control") } else { write!(f, "{}", self.0) }
    }
}

/// A size as people write it: `512`, `64K`, `10G`, in powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits followed by at most one unit letter.
    #[error("`{0}` is not a size; write a whole number with an optional K, M, G or T, such as 10G")]
    Syntax(String),
    /// More than 2^64 - 1 bytes.
    #[error("`{0}` is too large a size")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let syntax = || SizeError::Syntax(text.to_owned());
        let trimmed = text.trim();
        let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        let shift = match trimmed[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(syntax()),
        };
        let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge(text.to_owned()))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| SizeError::TooLarge(text.to_owned()))
    }
}

/// The largest unit that divides the size, so that printing and parsing agree.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("10G", 10 << 30),
            ("2TiB", 2 << 40),
            (" 1M ", 1 << 20),
        ] {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "10X", "1 G", "0x10", "１"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Syntax(_))), "{text}");
        }
        for text in ["99999999999999999999", "16777216T"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::TooLarge(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_size_parses_to_itself(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn any_text_parses_or_is_refused(text: String) {
            let _ = text.parse::<ByteSize>();
        }
    }
}
