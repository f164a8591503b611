//! A handoff as the API shows it: the row without its secrets.

use serde_json::{Value, json};

use super::fault::owner_sentence;
use super::plan::{ATTEMPTS_MAX, Because, Row, Winner};

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

/// A row without key and proof.
#[must_use]
pub fn handoff(row: &Row) -> Value {
    let members: Vec<Value> = row
        .members
        .iter()
        .enumerate()
        .map(|(place, member)| {
            json!({"disk": member.disk, "volume": member.volume, "storage": member.storage,
                "id": format!("{:016x}", member.id), "anchor": place == 0,
                "progress": member.progress, "phase": member.seen, "epoch": member.epoch})
        })
        .collect();
    let reached: serde_json::Map<String, Value> =
        row.reached.iter().map(|(state, at)| (state.name().to_owned(), (*at).into())).collect();
    let because = row.back.as_ref().map(|because| match because {
        Because::Cancelled => json!({"type": "cancelled", "detail": "somebody cancelled it"}),
        Because::TakenBack => json!({"type": "taken-back", "detail": taken_back(row)}),
        Because::Failed(trouble) => json!({"type": trouble.kind, "detail": trouble.detail}),
    });
    json!({
        "id": row.id.to_string(),
        "attempt": row.attempt,
        "vm": row.vm,
        "from": row.from,
        "to": row.to,
        "mode": row.trigger,
        "durability": if row.fast { "fast" } else { "base" },
        "labels": row.labels,
        "state": row.state.name(),
        "outcome": row.outcome().map_or("unknown", Winner::name),
        "decided": row.winner.is_some(),
        "owner": owner_sentence(row),
        "over": row.is_over(),
        "cancelling": row.back.is_some() && row.winner.is_none(),
        "because": because,
        "trouble": row.trouble,
        "destination": row.standing,
        "members": members,
        "reached_unix_us": reached,
        "created_unix_us": row.created_unix_us,
        "migration": row.driven,
        "version": row.version,
        "term": row.term,
    })
}
