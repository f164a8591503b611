//! Who owns a VM's volumes, as the API shows it.

use serde::Serialize;
use utoipa::ToSchema;

use super::plan::{Row, Winner};
use super::record::RecordView;
use super::vms::Volume;

/// Who owns a VM's volumes: its anchor's access record, or, where the storage keeps
/// none, what its agents say and its last handoff decided.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Access {
    /// Whose volumes.
    pub vm: String,
    /// Host that owns them; null: nobody does.
    pub owner_host: Option<String>,
    /// Its name as owner, `HOST/VM`.
    pub owner: Option<String>,
    /// `cooperative` where the storage keeps no record; else absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fence: Option<&'static str>,
    /// The record's; null without one.
    pub epoch: Option<u64>,
    /// The record's: `free`, `owned`, `armed`, `sealed`, `active`, `reclaimed` or `frozen`.
    pub phase: Option<String>,
    /// Owner name that was fenced and may not claim.
    pub barred: Option<String>,
    /// The last handoff that is decided.
    pub decided_by: Option<DecidedBy>,
    /// The handoff under way.
    pub handoff: Option<UnderWay>,
    /// The volume whose record this is.
    pub anchor: Option<AnchorView>,
    /// All volumes, the anchor first.
    pub members: Vec<MemberAccess>,
}

/// A handoff that is decided.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DecidedBy {
    /// Which.
    pub handoff: String,
    /// Which try.
    pub attempt: u32,
    /// Who won.
    pub winner: Option<Winner>,
}

/// A try that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct UnderWay {
    /// Which handoff.
    pub id: String,
    /// Which try.
    pub attempt: u32,
}

/// The volume that decides.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AnchorView {
    /// Its name.
    pub volume: String,
    /// Its server.
    pub storage: String,
}

/// A volume and its record; without `error` all that is null is so there.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct MemberAccess {
    /// Its name.
    pub volume: String,
    /// Its server.
    pub storage: String,
    /// As in the whole.
    pub phase: Option<String>,
    /// As in the whole.
    pub epoch: Option<u64>,
    /// Owner name.
    pub owner: Option<String>,
    /// Owner name that may not claim.
    pub barred: Option<String>,
    /// The handoff that it is in.
    pub handoff: Option<UnderWay>,
    /// Why its server does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl UnderWay {
    pub(super) fn of_row(row: &Row) -> Self {
        Self { id: row.id.to_string(), attempt: row.attempt }
    }

    pub(super) fn of_record(record: &RecordView) -> Option<Self> {
        let handoff = record.handoff.as_ref()?;
        Some(Self { id: handoff.id.clone(), attempt: handoff.attempt })
    }
}

impl DecidedBy {
    pub(super) fn of_record(record: &RecordView) -> Option<Self> {
        let decided = record.decided.as_ref()?;
        let (handoff, attempt) = (decided.id.clone(), decided.attempt);
        Some(Self { handoff, attempt, winner: Some(decided.winner) })
    }
}

impl MemberAccess {
    pub(super) fn of(volume: &Volume<'_>) -> Self {
        let member = Self {
            volume: volume.name.clone(),
            storage: volume.server.name.clone(),
            ..Self::default()
        };
        match &volume.record {
            Ok(record) => Self {
                phase: Some(record.phase.clone()),
                epoch: Some(record.epoch),
                owner: record.owner.as_ref().map(|owner| owner.name.clone()),
                barred: record.barred.clone(),
                handoff: UnderWay::of_record(record),
                ..member
            },
            Err(error) => Self { error: Some(error.to_string()), ..member },
        }
    }
}
