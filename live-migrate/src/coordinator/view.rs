//! A handoff as the API shows it: the row without its secrets.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::fault::owner_sentence;
use super::plan::{
    ATTEMPTS_MAX, Because, Progress, Row, Seen, Standing, Timings, Trigger, Trouble, Winner,
};

/// Why a handoff whose source came back is, or is not, tried again.
fn taken_back(row: &Row) -> String {
    let what = format!(
        "the source's machine was stopped and started again before the destination ran (its guest reset, or somebody continued it): `{}` goes on at {}",
        row.vm, row.from
    );
    let next = if row.goes_again() {
        format!("attempt {} follows", row.attempt + 1)
    } else if row.attempt >= ATTEMPTS_MAX {
        format!("this was the last of {ATTEMPTS_MAX} attempts; begin another handoff")
    } else if row.can_be_tried_again() {
        "no other attempt follows; begin another handoff".to_owned()
    } else {
        format!(
            "an implicit handoff is not tried again, for the machine at {} may have the memory of this one; end it, and begin another handoff",
            row.to
        )
    };
    format!("{what}; {next}")
}

/// A handoff, as the API shows it.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Handoff)]
pub struct Shown {
    /// A ULID.
    pub id: String,
    /// The try, from 1.
    pub attempt: u32,
    /// Whose volumes move.
    pub vm: String,
    /// From this host.
    pub from: String,
    /// To this host.
    pub to: String,
    /// Who says when the volumes switch.
    pub mode: Trigger,
    /// How the loser is kept from the volumes: `storage` (compares every request),
    /// `blocklist` (a cluster refuses its client), `cooperative` (not at all: the
    /// volumes move on the proof that the source's backend is gone).
    pub fence: &'static str,
    /// Whether SEALED and ACTIVE are on disk before anyone is told: `fast`, `base`.
    pub durability: &'static str,
    /// As the caller noted.
    pub labels: BTreeMap<String, String>,
    /// PREPARING, READY, SEALED, ACTIVE, RECLAIMED, FAILED or SETTLED.
    pub state: &'static str,
    /// Who owns the volumes: `source`, `destination` or `unknown`.
    pub outcome: &'static str,
    /// That will not change any more.
    pub decided: bool,
    /// The same as a sentence, with what to do.
    pub owner: String,
    /// Nothing is left to do.
    pub over: bool,
    /// The source is to have its volumes back, and has not yet.
    pub cancelling: bool,
    /// Why it was given up.
    pub because: Option<Trouble>,
    /// What hinders it now.
    pub trouble: Option<Trouble>,
    /// The destination's backend, in a word.
    pub destination: Standing,
    /// The volumes, the anchor first.
    pub members: Vec<MemberView>,
    /// When it reached each state, microseconds since 1970.
    pub reached_unix_us: BTreeMap<&'static str, u64>,
    /// When it was asked for.
    pub created_unix_us: u64,
    /// How long the parts of the switch took; noted when the source's backend is ended.
    pub timings: Timings,
    /// `cooperative`: the agent's proof that the source's backend has stopped for good.
    #[schema(value_type = Option<Object>)]
    pub proof: Option<Value>,
    /// `cooperative`: why somebody took the proof's place.
    pub forced: Option<String>,
    /// A migration that the coordinator drives.
    #[schema(value_type = Option<Object>)]
    pub migration: Option<Value>,
    /// Counts changes.
    pub version: u64,
    /// Term of the coordinator that wrote this.
    pub term: u64,
}

/// A volume of a handoff, as the API shows it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MemberView {
    /// Name of the disk in the VM.
    pub disk: String,
    /// Its name at its storage.
    pub volume: String,
    /// Data address of its storage.
    pub storage: String,
    /// What its storage is.
    pub engine: &'static str,
    /// How that keeps the loser out.
    pub fence: &'static str,
    /// Its id at its storage, 16 hexadecimal digits.
    pub id: String,
    /// It decides for all.
    pub anchor: bool,
    /// How far it is.
    pub progress: Progress,
    /// What its record said last.
    pub phase: Seen,
    /// The epoch that its record had then.
    pub epoch: u64,
}

/// A row without key and proof.
#[must_use]
pub fn handoff(row: &Row) -> Shown {
    let members = row.members.iter().enumerate().map(|(place, member)| MemberView {
        disk: member.disk.clone(),
        volume: member.volume.clone(),
        storage: member.storage.clone(),
        engine: member.engine.name(),
        fence: member.engine.capabilities().fence.name(),
        id: format!("{:016x}", member.id),
        anchor: place == 0,
        progress: member.progress,
        phase: member.seen,
        epoch: member.epoch,
    });
    let because = row.back.as_ref().map(|because| match because {
        Because::Cancelled => {
            Trouble { kind: "cancelled".to_owned(), detail: "somebody cancelled it".to_owned() }
        }
        Because::TakenBack => Trouble { kind: "taken-back".to_owned(), detail: taken_back(row) },
        Because::Failed(trouble) => trouble.clone(),
    });
    Shown {
        id: row.id.to_string(),
        attempt: row.attempt,
        vm: row.vm.clone(),
        from: row.from.clone(),
        to: row.to.clone(),
        mode: row.trigger,
        fence: row.fence().name(),
        durability: if row.fast { "fast" } else { "base" },
        labels: row.labels.clone(),
        state: row.state.name(),
        outcome: row.outcome().map_or("unknown", Winner::name),
        decided: row.winner.is_some(),
        owner: owner_sentence(row),
        over: row.is_over(),
        cancelling: row.back.is_some() && row.winner.is_none(),
        because,
        trouble: row.trouble.clone(),
        destination: row.standing,
        members: members.collect(),
        reached_unix_us: row.reached.iter().map(|(state, at)| (state.name(), *at)).collect(),
        created_unix_us: row.created_unix_us,
        timings: row.timings.clone(),
        proof: row.cooperation.proof.clone(),
        forced: row.cooperation.forced.clone(),
        migration: row.driven.clone(),
        version: row.version,
        term: row.term,
    }
}
