//! The access record as the API shows it. Keys are left out.

use baton_protocol::access::AccessRecord;
use baton_protocol::handoff::{Decided, Handoff, Mode, Proof, Side};
use serde::Serialize;
use utoipa::ToSchema;

use super::numbers::text256;

/// Who may touch the volume.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RecordView {
    /// The volume, 16 hexadecimal digits.
    volume: String,
    /// Counts changes.
    version: u64,
    /// Only requests of this epoch are admitted.
    epoch: u64,
    /// The next epoch that nobody had.
    next_epoch: u64,
    /// `free`, `owned`, `armed`, `sealed`, `active`, `reclaimed` or `frozen`.
    phase: &'static str,
    /// The owner; the source while a handoff is not decided.
    owner: Option<OwnerView>,
    /// Name that may not claim until somebody else has.
    barred: Option<String>,
    /// Highest coordinator term seen.
    coordinator_term: u64,
    /// Under way.
    handoff: Option<HandoffView>,
    /// The last one that is over.
    decided: Option<DecidedView>,
}

/// The owner.
#[derive(Debug, Serialize, ToSchema)]
struct OwnerView {
    /// Host and VM.
    name: String,
    /// Incarnation, 16 hexadecimal digits; zero before a nominee comes.
    session: String,
}

/// A handoff under way.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HandoffView {
    /// ULID.
    id: String,
    /// From 1.
    attempt: u32,
    /// The VM.
    vm: String,
    /// Owner name of the source.
    from: String,
    /// Owner name of the destination.
    to: String,
    /// The volume that decides, 16 hexadecimal digits.
    anchor: String,
    /// All volumes that move.
    members: MembersView,
    /// `fast` or `base`.
    mode: &'static str,
    /// The destination's epoch, if it wins.
    e_to: u64,
    /// The source's epoch, if it comes back after its seal.
    e_back: u64,
    /// The server's durability generation when it was armed.
    generation: u64,
    /// Frozen: the source's seal is known.
    sealed: bool,
    /// A seal was asked for since the server started.
    seal_seen: bool,
    /// The destination never activated and never will.
    abdicated: bool,
    /// Frozen anchor: the source asked for the volume.
    wanted_back: bool,
    /// Number of the decision's latest grant.
    grant: u64,
}

/// Volumes that move together.
#[derive(Debug, Serialize, ToSchema)]
struct MembersView {
    /// How many.
    count: u16,
    /// Of their ids, 16 hexadecimal digits.
    hash: String,
}

/// A handoff that is over.
#[derive(Debug, Serialize, ToSchema)]
struct DecidedView {
    /// ULID.
    id: String,
    /// From 1.
    attempt: u32,
    /// `source` or `destination`.
    winner: &'static str,
    /// Number of the decision's latest grant.
    grant: u64,
}

/// The anchor's decision, to show to the other members.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProofView {
    /// `source` or `destination`.
    side: &'static str,
    /// Rises with every incarnation of the winner.
    grant: u64,
    /// 64 hexadecimal digits.
    mac: String,
}

pub(super) fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

impl From<&AccessRecord> for RecordView {
    fn from(record: &AccessRecord) -> Self {
        Self {
            volume: record.volume.to_string(),
            version: record.version,
            epoch: record.epoch.0,
            next_epoch: record.next_epoch.0,
            phase: record.phase.name(),
            owner: record.owner.as_ref().map(|owner| OwnerView {
                name: owner.name.clone(),
                session: owner.session.to_string(),
            }),
            barred: record.barred.clone(),
            coordinator_term: record.coordinator_term,
            handoff: record.handoff.as_ref().map(HandoffView::from),
            decided: record.decided.as_ref().map(DecidedView::from),
        }
    }
}

impl From<&Handoff> for HandoffView {
    fn from(handoff: &Handoff) -> Self {
        let plan = &handoff.plan;
        Self {
            id: plan.attempt.id.to_string(),
            attempt: plan.attempt.attempt,
            vm: plan.vm.clone(),
            from: plan.from.clone(),
            to: plan.to.clone(),
            anchor: plan.anchor.to_string(),
            members: MembersView {
                count: plan.members.count,
                hash: format!("{:016x}", plan.members.hash),
            },
            mode: match plan.mode {
                Mode::Fast => "fast",
                Mode::Base => "base",
            },
            e_to: handoff.e_to.0,
            e_back: handoff.e_back.0,
            generation: handoff.generation,
            sealed: handoff.sealed,
            seal_seen: handoff.seal_seen,
            abdicated: handoff.abdicated,
            wanted_back: handoff.wanted_back,
            grant: handoff.grant,
        }
    }
}

impl From<&Decided> for DecidedView {
    fn from(decided: &Decided) -> Self {
        Self {
            id: decided.attempt.id.to_string(),
            attempt: decided.attempt.attempt,
            winner: side_name(decided.winner),
            grant: decided.grant,
        }
    }
}

impl From<&Proof> for ProofView {
    fn from(proof: &Proof) -> Self {
        Self { side: side_name(proof.side), grant: proof.grant, mac: text256(&proof.mac) }
    }
}
