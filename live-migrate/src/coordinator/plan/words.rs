//! What a row is made of: who won, how far each part is, what went wrong.

use baton_protocol::SessionId;
use baton_protocol::handoff::Side;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::codec::hex;

/// Who says when the volumes switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    /// The rings of the two machines.
    #[default]
    Implicit,
    /// The caller, by `:switchover` and `:activate`.
    Explicit,
}

/// What went wrong, as a problem document says it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct Trouble {
    /// Stable type.
    #[serde(rename = "type")]
    pub kind: String,
    /// One sentence.
    pub detail: String,
}

/// Why the source is to have its volumes back.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Because {
    /// Somebody cancelled.
    Cancelled,
    /// It came back by itself: its machine was resumed.
    TakenBack,
    /// The handoff cannot be.
    Failed(Trouble),
}

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// No ARM has left.
    Planned,
    /// An ARM may have left, and may still arrive.
    Asked,
    /// Its record has the handoff.
    Armed,
    /// Its record says no, and has no such handoff.
    Refused,
    /// Its record knows who won.
    Settled,
}

/// A member's record, as far as it concerns this try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Seen {
    /// The source writes.
    Armed,
    /// Nobody does.
    Sealed,
    /// The destination does.
    Active,
    /// The source does again.
    Reclaimed,
    /// The server restarted and knows of no seal.
    Frozen,
    /// The server restarted, and the source has sealed.
    FrozenSealed,
    /// It is over; the source won.
    OverSource,
    /// It is over; the destination won.
    OverDestination,
    /// The record does not know this try: not armed, or fenced.
    Nothing,
}

/// The destination's backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Not heard of yet.
    #[default]
    Unknown,
    /// It runs and does not see all members yet.
    Starting,
    /// It stands by at all members.
    Ready,
    /// It activates, or serves.
    Active,
    /// It gave up, or lost.
    Parked,
    /// Its process is gone and its machine does not run.
    Dead,
}

/// The anchor's decision, to show to the members.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// The winner's incarnation.
    #[serde(with = "hex")]
    pub session: u64,
    /// Who won.
    pub winner: Winner,
    /// Number of the grant.
    pub grant: u64,
    /// 64 hexadecimal digits.
    pub mac: String,
}

/// [`Side`], as the journal writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Winner {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Winner {
    /// As the API shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl From<Winner> for Side {
    fn from(winner: Winner) -> Self {
        match winner {
            Winner::Source => Self::Source,
            Winner::Destination => Self::Destination,
        }
    }
}

impl Grant {
    /// The winner's incarnation.
    #[must_use]
    pub fn session(&self) -> SessionId {
        SessionId(self.session)
    }
}
