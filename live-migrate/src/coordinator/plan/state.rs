//! Where a handoff stands.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a handoff stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Members are being armed, or the destination's backend is not there yet.
    Preparing,
    /// The machine may be migrated.
    Ready,
    /// The source has stopped, and everything it sent is done.
    Sealed,
    /// The destination has the volumes.
    Active,
    /// The source has the volumes.
    Reclaimed,
    /// Over: it could not be prepared. The source has the volumes, nothing is
    /// left armed.
    Failed,
    /// Over: every member knows who won.
    Settled,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Preparing,
        Self::Ready,
        Self::Sealed,
        Self::Active,
        Self::Reclaimed,
        Self::Failed,
        Self::Settled,
    ];

    /// As the API shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preparing => "PREPARING",
            Self::Ready => "READY",
            Self::Sealed => "SEALED",
            Self::Active => "ACTIVE",
            Self::Reclaimed => "RECLAIMED",
            Self::Failed => "FAILED",
            Self::Settled => "SETTLED",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name().eq_ignore_ascii_case(name))
    }

    /// Nothing happens any more.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Settled)
    }

    /// How far it is; a wait for a state ends at any that is as far.
    const fn rank(self) -> u8 {
        match self {
            Self::Preparing => 0,
            Self::Ready => 1,
            Self::Sealed => 2,
            Self::Active | Self::Reclaimed => 3,
            Self::Failed | Self::Settled => 4,
        }
    }

    /// A wait for `wanted` is over.
    #[must_use]
    pub const fn reached(self, wanted: Self) -> bool {
        self.rank() >= wanted.rank()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
