//! Access records, as the coordinator reads them from whatever storage.

use serde::Deserialize;
use serde_json::Value;

use super::plan::{Row, Seen, Winner};

/// An access record, as the API shows it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RecordView {
    /// Id of the volume, as `anchor` names it.
    #[serde(default)]
    pub volume: String,
    /// Counts changes.
    #[serde(default)]
    pub version: u64,
    /// Only requests with it are admitted.
    #[serde(default)]
    pub epoch: u64,
    /// The next that nobody had.
    #[serde(default)]
    pub next_epoch: u64,
    /// Where it stands.
    #[serde(default)]
    pub phase: String,
    /// Who owns the volume.
    pub owner: Option<OwnerView>,
    /// Who may not claim.
    pub barred: Option<String>,
    /// Highest term seen.
    #[serde(default)]
    pub coordinator_term: u64,
    /// Under way.
    pub handoff: Option<HandoffView>,
    /// The last one that is over.
    pub decided: Option<DecidedView>,
}

/// Owner of a volume.
#[derive(Clone, Debug, Deserialize)]
pub struct OwnerView {
    /// Host and VM.
    pub name: String,
    /// Incarnation.
    #[serde(default)]
    pub session: Value,
}

/// A handoff under way.
#[derive(Clone, Debug, Deserialize)]
pub struct HandoffView {
    /// Which.
    pub id: String,
    /// Which try.
    pub attempt: u32,
    /// Owner name of the destination.
    #[serde(default)]
    pub to: String,
    /// Id of the volume that decides.
    #[serde(default)]
    pub anchor: String,
    /// Its seal is known.
    #[serde(default)]
    pub sealed: bool,
}

/// A handoff that is over.
#[derive(Clone, Debug, Deserialize)]
pub struct DecidedView {
    /// Which.
    pub id: String,
    /// Which try.
    pub attempt: u32,
    /// How it ended.
    pub winner: Winner,
}

/// A volume and who may use it.
#[derive(Clone, Debug)]
pub struct VolumeView {
    /// Never used again.
    pub id: u64,
    /// Owner name.
    pub owner: Option<String>,
    /// Barred name.
    pub barred: Option<String>,
    /// Of the record.
    pub phase: String,
    /// Of the record.
    pub epoch: u64,
    /// Of the record: what an ARM that is planned now shows.
    pub next_epoch: u64,
}

impl RecordView {
    /// What it says of this try.
    #[must_use]
    pub fn seen(&self, row: &Row) -> Seen {
        let id = row.id.to_string();
        if let Some(decided) = &self.decided
            && (&decided.id, decided.attempt) == (&id, row.attempt)
        {
            return match decided.winner {
                Winner::Source => Seen::OverSource,
                Winner::Destination => Seen::OverDestination,
            };
        }
        match &self.handoff {
            Some(handoff) if (&handoff.id, handoff.attempt) == (&id, row.attempt) => {
                match self.phase.as_str() {
                    "armed" => Seen::Armed,
                    "sealed" => Seen::Sealed,
                    "active" => Seen::Active,
                    "reclaimed" => Seen::Reclaimed,
                    "frozen" if handoff.sealed => Seen::FrozenSealed,
                    "frozen" => Seen::Frozen,
                    _ => Seen::Nothing,
                }
            }
            _ => Seen::Nothing,
        }
    }
}
