//! Wire versions and how two sides agree on one.

/// The documentation of each variant is the changelog of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Version {
    /// First version: 64-byte request header, 32-byte reply header, HELLO,
    /// READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES, PING, EVENT, RELEASE.
    V1 = 1,
}

impl Version {
    /// The oldest version this build speaks.
    pub const OLDEST: Self = Self::V1;
    /// The newest version this build speaks.
    pub const NEWEST: Self = Self::V1;

    const ALL: [Self; 1] = [Self::V1];

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The version with this number, if this build speaks it.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.number() == number)
    }

    /// The newest version inside the peer's range `oldest..=newest`, or `None`
    /// when the two ranges do not meet.
    #[must_use]
    pub fn negotiate(oldest: u16, newest: u16) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|v| (oldest..=newest).contains(&v.number()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        assert_eq!(Version::negotiate(1, 1), Some(Version::V1));
        assert_eq!(Version::negotiate(0, 9), Some(Version::V1));
        assert_eq!(Version::negotiate(2, 9), None);
        assert_eq!(Version::negotiate(9, 1), None);
        assert_eq!(Version::from_number(0), None);
        assert_eq!(Version::from_number(1), Some(Version::V1));
    }
}
