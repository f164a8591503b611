//! How a storage keeps a host from a volume that is another's.

use std::fmt;

/// How a storage keeps a host from a volume that is another's. Volumes of one VM
/// move together only where one decision covers them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fence {
    /// The storage compares every request with who may write.
    Storage,
    /// The storage is told which client it shall not serve any more.
    Blocklist,
    /// Nothing keeps a host out: it moves by the proof that the source's process is gone.
    Cooperative,
    /// Nothing keeps a host out, and another host cannot reach it.
    None,
}

impl Fence {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Storage, Self::Blocklist, Self::Cooperative, Self::None];

    /// One word, for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::Blocklist => "blocklist",
            Self::Cooperative => "cooperative",
            Self::None => "none",
        }
    }

    /// The volume is fenced ..., for a sentence.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Storage => "by its storage server",
            Self::Blocklist => "by its cluster's blocklist",
            Self::Cooperative => "by the end of the source's backend only",
            Self::None => "by nothing, for it is on its host",
        }
    }

    /// One decision covers a volume of each.
    #[must_use]
    pub fn moves_with(self, other: Self) -> bool {
        self == other && self != Self::None
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fences_of_one_kind_move_together() {
        for one in Fence::ALL {
            for other in Fence::ALL {
                let expected = one == other && one != Fence::None;
                assert_eq!(one.moves_with(other), expected, "{one} with {other}");
            }
        }
    }
}
