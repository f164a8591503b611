//! Why a request failed: RFC 9457 documents with stable types. Each that is about a VM
//! says who owns its volumes now, as far as that is known and the caller may know it,
//! and what to do. A request that is wrong in itself (`baton:bad-request`), or about a VM
//! that nobody knows, is about none.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::agents::AgentError;
use super::etcd::EtcdError;
use super::journal::JournalError;
use super::keeper::AskError;
use super::plan::{Member, Progress, Refusal, Row, State, Trouble, Winner};
use super::storages::StorageError;
use crate::problem::Problem;

/// A problem document.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Fault {
    /// Type, title, status, detail.
    #[serde(flatten)]
    pub problem: Problem,
    /// The handoff it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handoff: Option<String>,
    /// Who owns the volumes now: `source`, `destination` or `unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
}

/// Types of trouble that reach us as text, with title and status.
const TROUBLES: [(&str, &str, StatusCode); 18] = [
    ("baton:agent-unreachable", "An agent cannot be reached", StatusCode::SERVICE_UNAVAILABLE),
    ("baton:agent-failed", "An agent failed", StatusCode::SERVICE_UNAVAILABLE),
    (
        "baton:storage-unreachable",
        "A storage server cannot be reached",
        StatusCode::SERVICE_UNAVAILABLE,
    ),
    ("baton:destination-runs-vm", "The destination runs the VM already", StatusCode::CONFLICT),
    ("baton:handoff-in-progress", "Another handoff is under way", StatusCode::CONFLICT),
    ("baton:not-owner", "The source does not own the volumes", StatusCode::CONFLICT),
    ("baton:not-ready", "The handoff is not ready", StatusCode::CONFLICT),
    ("baton:unknown-volume", "There is no such volume", StatusCode::NOT_FOUND),
    ("baton:unknown-vm", "There is no such VM", StatusCode::NOT_FOUND),
    ("baton:unknown-host", "There is no such host", StatusCode::NOT_FOUND),
    ("baton:fenced", "The volumes were fenced", StatusCode::CONFLICT),
    ("baton:unknown-frozen", "Nobody can say yet who owns the volumes", StatusCode::CONFLICT),
    ("baton:not-movable", "A disk cannot move", StatusCode::CONFLICT),
    ("baton:not-proven", "Nobody has proven that the source has stopped", StatusCode::CONFLICT),
    ("baton:mixed-fences", "The disks cannot move together", StatusCode::CONFLICT),
    ("baton:forbidden", "The caller may not do this", StatusCode::FORBIDDEN),
    ("baton:bad-request", "The request is wrong", StatusCode::BAD_REQUEST),
    ("baton:migration-failed", "The migration failed", StatusCode::CONFLICT),
];

impl Fault {
    /// One of a kind.
    pub fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl ToString,
    ) -> Self {
        Problem::new(status, kind, title, detail).into()
    }

    /// The caller made a mistake.
    pub fn bad_request(detail: impl ToString) -> Self {
        Problem::bad_request(detail).into()
    }

    /// Of a known type, by name.
    #[must_use]
    pub fn of(trouble: &Trouble) -> Self {
        let known = TROUBLES.iter().find(|(kind, ..)| *kind == trouble.kind);
        let (kind, title, status) =
            known.copied().unwrap_or(("baton:refused", "It was refused", StatusCode::CONFLICT));
        Self::new(status, kind, title, &trouble.detail)
    }

    /// A storage server did not do what was asked of it, and nothing was armed or
    /// changed. `owner` says who owns the volumes, as far as that is known without it.
    #[must_use]
    pub fn storage(error: StorageError, owner: &str) -> Self {
        match error {
            StorageError::Unreachable(Trouble { kind, detail }) => Self::of(&Trouble {
                kind,
                detail: format!(
                    "{detail}; {owner}; nothing was armed or changed, and the VM stays where it is: see to that server and ask again"
                ),
            }),
            StorageError::Refused { trouble } => Self::of(&trouble),
            StorageError::StaleTerm(_) => stopping(),
        }
    }

    /// There is no such thing.
    pub fn unknown(kind: &'static str, title: &'static str, detail: impl ToString) -> Self {
        Self::new(StatusCode::NOT_FOUND, kind, title, detail)
    }

    /// Refused before anything was begun; `owner` says who owns the volumes.
    #[must_use]
    pub fn before_all(mut self, owner: &str) -> Self {
        let detail = &mut self.problem.detail;
        *detail = format!("{detail}; {owner}, and nothing was armed or changed");
        self
    }

    /// About a handoff: names it and who owns the volumes.
    #[must_use]
    pub fn about(mut self, row: &Row) -> Self {
        self.handoff = Some(row.id.to_string());
        self.outcome = Some(row.outcome().map_or("unknown", Winner::name));
        self
    }

    /// A request that a handoff's state does not allow.
    #[must_use]
    pub fn refused(error: &AskError, row: &Row) -> Self {
        let owner = owner_sentence(row);
        let fault = match error {
            AskError::Refused(Refusal::LostRace) => Self::new(
                StatusCode::CONFLICT,
                "baton:lost-race",
                "The destination won",
                format!(
                    "the destination {} owns the volumes of `{}`: do not resume the source on {}; finish the handoff",
                    row.to, row.vm, row.from
                ),
            ),
            AskError::Refused(refusal @ Refusal::NotReady { .. }) => Self::new(
                StatusCode::CONFLICT,
                "baton:not-ready",
                "The handoff is not ready",
                format!("{refusal}; wait with ?wait= and ask again"),
            ),
            AskError::Refused(refusal @ Refusal::Implicit) => Self::new(
                StatusCode::CONFLICT,
                "baton:implicit",
                "The handoff is implicit",
                format!("{refusal}; {owner}"),
            ),
            AskError::Refused(refusal @ Refusal::Fenced) => Self::new(
                StatusCode::CONFLICT,
                "baton:fenced-by-storage",
                "Nothing is forced here",
                format!(
                    "{refusal}; {owner}; if {} is dead, `baton handoff fence {}`",
                    row.from, row.vm
                ),
            ),
            AskError::Refused(refusal @ Refusal::Over) => Self::new(
                StatusCode::CONFLICT,
                "baton:stale-attempt",
                "The handoff is over",
                format!("{refusal}; {owner}; begin another with a new id"),
            ),
            // That one is not written, so what was asked for is not begun.
            AskError::Journal(error) => Self::from(error.clone()).before_all(&owner),
            AskError::Gone => stopping(),
        };
        fault.about(row)
    }
}

/// Who owns the volumes now and what to do, for people.
#[must_use]
pub fn owner_sentence(row: &Row) -> String {
    if row.is_cooperative() && row.state == State::Sealed {
        return format!(
            "the source {} owns the volumes of `{2}` and its backend has ended; {} has them as soon as its machine runs: start neither by hand; `baton handoff cancel {2}` gives them back",
            row.from, row.to, row.vm
        );
    }
    match row.outcome() {
        Some(Winner::Source) => {
            format!("the source {} owns the volumes of `{}`: it may run there", row.from, row.vm)
        }
        Some(Winner::Destination) => format!(
            "the destination {} owns the volumes of `{}`: do not resume the source on {}",
            row.to, row.vm, row.from
        ),
        None if row.fenced => format!(
            "the volumes of `{0}` were fenced: `baton handoff why {0}` (GET /v1/vms/{0}/access) says who may have them; start it nowhere else",
            row.vm
        ),
        None => format!(
            "the anchor's server restarted and cannot say yet who owns the volumes of `{}`: resume neither side; it ends by itself when the destination's backend answers, and if that is gone for good, fence the VM",
            row.vm
        ),
    }
}

/// Who owns the volumes, what may be armed and what to do, while a storage server is
/// away in the middle of a handoff.
#[must_use]
pub fn while_storage_is_away(row: &Row) -> String {
    let Row { vm, from, to, .. } = row;
    if row.outcome().is_none() || row.winner.is_some() {
        return format!(
            "{}; what is left of the handoff is cleaned up by itself when that server answers: see to it",
            owner_sentence(row)
        );
    }
    let armed = |member: &&Member| matches!(member.progress, Progress::Asked | Progress::Armed);
    let armed: Vec<&str> =
        row.members.iter().filter(armed).map(|member| member.volume.as_str()).collect();
    let last = format!("see to that server, or `baton handoff cancel {vm}`");
    if armed.is_empty() {
        return format!(
            "the source {from} owns the volumes of `{vm}`, which goes on there, and nothing is armed: {last}"
        );
    }
    let armed = armed.join(", ");
    if row.state == State::Preparing {
        return format!(
            "the source {from} owns the volumes of `{vm}`, which goes on there; armed for {to}, or about to be: {armed}; that takes nothing from the source, and is taken back if the handoff fails: {last}"
        );
    }
    format!(
        "as last known the source {from} owns the volumes of `{vm}`; armed for {to}, which may take them once the machine has stopped on {from}: {armed}; if it has, resume neither side until that server answers: {last}"
    )
}

fn stopping() -> Fault {
    Fault::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "baton:stopping",
        "The coordinator is going away",
        "the coordinator is going away; ask again when it is back",
    )
}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Self {
        Self { problem, handoff: None, outcome: None }
    }
}

impl From<JournalError> for Fault {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Full(_) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "baton:journal-full",
                "The journal's disk is full",
                error,
            ),
            JournalError::Etcd(EtcdError::NoSpace) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "baton:journal-full",
                "etcd has no space left",
                error,
            ),
            JournalError::Etcd(EtcdError::TooLarge { .. }) => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "baton:journal-too-large",
                "This is too large for etcd",
                error,
            ),
            JournalError::Etcd(EtcdError::Deposed) => stopping(),
            JournalError::Etcd(EtcdError::Unreachable { .. } | EtcdError::Unknown { .. }) => {
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "baton:journal-unreachable",
                    "etcd cannot be reached",
                    error,
                )
            }
            other => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "baton:journal-failed",
                "The journal failed",
                format!("{other}; nothing was started"),
            ),
        }
    }
}

impl From<AgentError> for Fault {
    fn from(error: AgentError) -> Self {
        Self::of(error.trouble())
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let content_type = header::HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}
