//! Handoffs over HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Api, body, may_hand_off, may_look, may_order, query, refused};
use crate::coordinator::fault::{Fault, owner_sentence};
use crate::coordinator::keeper::Handle;
use crate::coordinator::migrate;
use crate::coordinator::plan::{Input, Row, State as HandoffState};
use crate::coordinator::prepare::{self, PrepareHandoff, duration};
use crate::coordinator::view::{self, Shown};
use crate::door::Peer;

/// A wait without `timeout`.
const WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// `:finish` and `:cancel` answer when the outcome is known, or after this.
const DECISION_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Waiting {
    /// A state to wait for; `OVER` for the end of all cleaning up.
    wait: Option<String>,
    /// Such as `30s`.
    timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    state: Option<String>,
    vm: Option<String>,
}

/// What a wait is for.
#[derive(Clone, Copy)]
enum Until {
    State(HandoffState),
    Over,
}

impl Waiting {
    fn until(&self) -> Result<Option<(Until, Duration)>, Fault> {
        let timeout = self.timeout.as_deref().map_or(Ok(WAIT_DEFAULT), duration)?;
        let Some(wait) = &self.wait else { return Ok(None) };
        let until = if wait.eq_ignore_ascii_case("over") {
            Until::Over
        } else {
            let state = HandoffState::from_name(wait).ok_or_else(|| {
                Fault::bad_request(format!(
                    "`{wait}` is no state; write READY, SEALED, ACTIVE, SETTLED or OVER"
                ))
            })?;
            Until::State(state)
        };
        Ok(Some((until, timeout)))
    }
}

impl Until {
    fn reached(self, row: &Row) -> bool {
        match self {
            // Who waits for READY must learn of a failure at once.
            Self::State(state) => {
                row.state.reached(state)
                    || (row.back.is_some() && row.winner.is_none() && state == HandoffState::Ready)
            }
            Self::Over => row.is_over() && row.driven.as_ref().is_none_or(migration_is_over),
        }
    }
}

fn migration_is_over(note: &Value) -> bool {
    matches!(note["step"].as_str(), Some("done" | "rolled-back"))
}

fn etag(row: &Row) -> String {
    format!("\"{}-{}\"", row.id, row.version)
}

fn answer(status: StatusCode, row: &Row) -> Response {
    let mut response = (status, Json(view::handoff(row))).into_response();
    if let Ok(etag) = HeaderValue::from_str(&etag(row)) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

fn find(core: &Api, vm: &str, id: &str) -> Result<Handle, Fault> {
    let id = prepare::id(id)?;
    let found = core.handoff(id).filter(|handle| handle.row().vm == vm);
    found.ok_or_else(|| {
        let latest = core.latest(vm).map_or_else(String::new, |handle| {
            let row = handle.row();
            format!("; the last of this VM is {}, and {}", row.id, owner_sentence(&row))
        });
        Fault::unknown(
            "baton:stale-attempt",
            "There is no such handoff",
            format!("VM `{vm}` has no handoff {id}{latest}"),
        )
    })
}

/// Waits, and shows the row then.
async fn wait(handle: &Handle, until: Until, timeout: Duration) -> Arc<Row> {
    let mut shown = handle.watch();
    let _ = tokio::time::timeout(timeout, shown.wait_for(|row| until.reached(row))).await;
    handle.row()
}

/// Prepares a handoff: arms the volumes and starts a standby backend at the
/// destination. Idempotent by the id, a ULID of the caller's.
#[utoipa::path(put, path = "/v1/vms/{vm}/handoffs/{id}", params(("vm" = String, Path), ("id" = String, Path),
    ("wait" = Option<String>, Query, description = "Answer when this state is reached."),
    ("timeout" = Option<String>, Query, description = "Or after this time, such as 30s.")),
    request_body = PrepareHandoff, responses((status = 201, body = Shown), (status = 200, description = "It was asked for before, with the same body.", body = Shown),
    (status = 404, body = Fault), (status = 409, description = "Among others `baton:mixed-fences`: the VM's disks cannot move together; nothing was armed.", body = Fault),
    (status = 503, description = "`baton:agent-unreachable`, `baton:storage-unreachable`: nothing was armed.", body = Fault), (status = 507, body = Fault)))]
pub(super) async fn prepare(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
    request: Result<Json<PrepareHandoff>, JsonRejection>,
) -> Result<Response, Fault> {
    let (request, until) = (body(request)?, query(waiting)?.until()?);
    let hosts = [request.to.as_str(), request.from.as_deref().unwrap_or_default()];
    may_hand_off(&peer, &hosts).map_err(|fault| refused(&core, &peer, &vm, fault))?;
    let id = prepare::id(&id)?;
    let (handle, new) = prepare::prepare(&core, &vm, id, request, None).await?;
    if new {
        tracing::info!(%peer, vm, handoff = %id, "asked for a handoff");
    }
    let row = match until {
        Some((until, timeout)) => wait(&handle, until, timeout).await,
        None => handle.row(),
    };
    Ok(answer(if new { StatusCode::CREATED } else { StatusCode::OK }, &row))
}

/// Shows a handoff.
#[utoipa::path(get, path = "/v1/vms/{vm}/handoffs/{id}", params(("vm" = String, Path), ("id" = String, Path),
    ("wait" = Option<String>, Query, description = "Answer when this state, or one behind it, is reached."),
    ("timeout" = Option<String>, Query, description = "Or after this time, such as 30s."),
    ("If-None-Match" = Option<String>, Header, description = "With it and no `wait`: answer when it has changed, if `timeout` is given.")),
    responses((status = 200, body = Shown), (status = 304, description = "Not changed."), (status = 404, body = Fault)))]
pub(super) async fn show(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    may_look(&peer)?;
    let waiting = query(waiting)?;
    let until = waiting.until()?;
    let handle = find(&core, &vm, &id)?;
    let known = headers.get(header::IF_NONE_MATCH).and_then(|etag| etag.to_str().ok());
    let row = match (until, known, &waiting.timeout) {
        (Some((until, timeout)), ..) => wait(&handle, until, timeout).await,
        (None, Some(known), Some(timeout)) => {
            let mut shown = handle.watch();
            let changed = shown.wait_for(|row| etag(row) != known);
            let _ = tokio::time::timeout(duration(timeout)?, changed).await;
            handle.row()
        }
        _ => handle.row(),
    };
    if known.is_some_and(|known| known == etag(&row)) {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    Ok(answer(StatusCode::OK, &row))
}

/// `POST .../{id}:VERB`.
pub(super) async fn verb(
    core: State<Api>,
    peer: ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
    body: Bytes,
) -> Result<Response, Fault> {
    let Some((id, verb)) = id.split_once(':') else {
        return Err(Fault::unknown(
            "baton:no-such-route",
            "There is nothing here",
            "write .../{id}:cancel, :finish, :switchover or :activate",
        ));
    };
    let path = Path((vm, id.to_owned()));
    match verb {
        "switchover" => switchover(core, peer, path, waiting).await,
        "activate" => activate(core, peer, path, waiting).await,
        "finish" => finish(core, peer, path, waiting, body).await,
        "cancel" => cancel(core, peer, path, waiting).await,
        other => {
            let other: String = other.chars().take(40).collect();
            Err(Fault::unknown(
                "baton:no-such-route",
                "There is nothing here",
                format!(
                    "a handoff has no `:{other}`; there are :cancel, :finish, :switchover and :activate"
                ),
            ))
        }
    }
}

async fn order(
    core: &Api,
    peer: &Peer,
    (vm, id): (&str, &str),
    waiting: Result<Query<Waiting>, QueryRejection>,
    (input, until): (Input, Until),
) -> Result<Arc<Row>, Fault> {
    let waiting = query(waiting)?;
    let timeout = waiting.timeout.as_deref().map_or(Ok(DECISION_WAIT), duration)?;
    let until = waiting.until()?.map_or(until, |(until, _)| until);
    let handle = find(core, vm, id)?;
    let row = handle.row();
    may_hand_off(peer, &[&row.from, &row.to]).map_err(|fault| refused(core, peer, vm, fault))?;
    handle.ask(input).await.map_err(|error| Fault::refused(&error, &handle.row()))?;
    Ok(wait(&handle, until, timeout).await)
}

/// Explicit mode: the source's machine has stopped; seal the volumes. Answered
/// when they are sealed.
#[utoipa::path(post, path = "/v1/vms/{vm}/handoffs/{id}:switchover", params(("vm" = String, Path), ("id" = String, Path),
    ("Idempotency-Key" = Option<String>, Header, description = "Not needed: the same order again is answered the same.")),
    responses((status = 200, body = Shown), (status = 409, body = Fault)))]
pub(super) async fn switchover(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
) -> Result<Response, Fault> {
    let until = Until::State(HandoffState::Sealed);
    let row = order(&core, &peer, (&vm, &id), waiting, (Input::Switchover, until)).await?;
    Ok(answer(StatusCode::OK, &row))
}

/// Explicit mode: the destination's machine is about to run. Answered when the
/// destination owns the volumes.
#[utoipa::path(post, path = "/v1/vms/{vm}/handoffs/{id}:activate", params(("vm" = String, Path), ("id" = String, Path),
    ("Idempotency-Key" = Option<String>, Header, description = "Not needed: the same order again is answered the same.")),
    responses((status = 200, body = Shown), (status = 409, body = Fault)))]
pub(super) async fn activate(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
) -> Result<Response, Fault> {
    let until = Until::State(HandoffState::Active);
    let row = order(&core, &peer, (&vm, &id), waiting, (Input::Activate, until)).await?;
    Ok(answer(StatusCode::OK, &row))
}

/// How to finish. May be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FinishHandoff {
    /// Where no storage fences (`fence: cooperative`) and nobody has proven that the
    /// source's backend has stopped: let the destination serve all the same. Whoever
    /// says so vouches that the source's host cannot reach the storage any more. For
    /// operators.
    #[serde(default)]
    force: bool,
    /// Who forces and why; for the journal.
    reason: Option<String>,
}

impl FinishHandoff {
    fn input(self) -> Result<Input, Fault> {
        let reason = self.reason.filter(|reason| !reason.trim().is_empty());
        match (self.force, reason) {
            (false, _) => Ok(Input::Finish),
            (true, Some(reason)) => Ok(Input::Force(reason)),
            (true, None) => Err(Fault::bad_request(
                "`force` needs a `reason`: who says that the source cannot reach the storage any more, and why, for the journal",
            )),
        }
    }
}

/// Cleans up behind the decision and stops the loser's backend. Answered with
/// `outcome`: who owns the volumes.
#[utoipa::path(post, path = "/v1/vms/{vm}/handoffs/{id}:finish", params(("vm" = String, Path), ("id" = String, Path),
    ("Idempotency-Key" = Option<String>, Header, description = "Not needed: the same order again is answered the same.")),
    request_body(content = Option<FinishHandoff>, description = "May be empty."),
    responses((status = 200, body = Shown), (status = 409, description = "Nothing is decided yet; `baton:not-proven`: where no storage fences, the source was not proven gone.", body = Fault)))]
pub(super) async fn finish(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
    body: Bytes,
) -> Result<Response, Fault> {
    let asked: FinishHandoff = if body.is_empty() {
        FinishHandoff::default()
    } else {
        serde_json::from_slice(&body).map_err(Fault::bad_request)?
    };
    if asked.force {
        may_order(&peer).map_err(|fault| refused(&core, &peer, &vm, fault))?;
    }
    let (forced, input) = (asked.force, asked.input()?);
    if let Input::Force(reason) = &input {
        tracing::warn!(%peer, vm, handoff = id, reason, "forced: the destination gets the volumes without a proof");
    }
    let row = order(&core, &peer, (&vm, &id), waiting, (input, Until::Over)).await?;
    if row.winner.is_none() && !row.state.is_over() && !forced {
        return Err(undecided(&row));
    }
    Ok(answer(StatusCode::OK, &row))
}

/// The source keeps its volumes, if it is not too late. Answered with `outcome`:
/// who owns the volumes.
#[utoipa::path(post, path = "/v1/vms/{vm}/handoffs/{id}:cancel", params(("vm" = String, Path), ("id" = String, Path),
    ("Idempotency-Key" = Option<String>, Header, description = "Not needed: the same order again is answered the same.")),
    responses((status = 200, body = Shown), (status = 409, description = "The destination owns the volumes, or nobody can say yet.", body = Fault)))]
pub(super) async fn cancel(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm, id)): Path<(String, String)>,
    waiting: Result<Query<Waiting>, QueryRejection>,
) -> Result<Response, Fault> {
    let handle = find(&core, &vm, &id)?;
    let row = order(&core, &peer, (&vm, &id), waiting, (Input::Cancel, Until::Over)).await?;
    use crate::coordinator::keeper::AskError;
    use crate::coordinator::plan::{Refusal, Winner};
    match row.winner {
        // The race was on when it was asked.
        Some(Winner::Destination) => {
            Err(Fault::refused(&AskError::Refused(Refusal::LostRace), &handle.row()))
        }
        None if !row.state.is_over() => Err(undecided(&row)),
        _ => Ok(answer(StatusCode::OK, &row)),
    }
}

fn undecided(row: &Row) -> Fault {
    let fault = if row.unknown {
        Fault::new(
            StatusCode::CONFLICT,
            "baton:unknown-frozen",
            "Nobody can say yet who owns the volumes",
            owner_sentence(row),
        )
    } else if row.is_cooperative() {
        let trouble = row.trouble.as_ref().map_or_else(
            || {
                format!(
                    "the machine of `{}` still runs on {}, or its backend has just been asked",
                    row.vm, row.from
                )
            },
            |trouble| trouble.detail.clone(),
        );
        Fault::new(
            StatusCode::CONFLICT,
            "baton:not-proven",
            "Nobody has proven that the source has stopped",
            format!(
                "handoff {} is {}, and its storage keeps nobody out: {} gets no volume before the backend on {} is proven gone: {trouble}",
                row.id, row.state, row.to, row.from
            ),
        )
    } else {
        let trouble = row.trouble.as_ref().map_or_else(String::new, |t| format!(" ({})", t.detail));
        Fault::new(
            StatusCode::CONFLICT,
            "baton:not-ready",
            "Nothing is decided yet",
            format!(
                "handoff {} is {}{trouble}; the request is noted and carried out; ask again for the outcome",
                row.id, row.state
            ),
        )
    };
    fault.about(row)
}

/// Handoffs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HandoffList {
    /// Oldest first.
    handoffs: Vec<Shown>,
}

/// Lists handoffs, oldest first.
#[utoipa::path(get, path = "/v1/handoffs", params(("state" = Option<String>, Query), ("vm" = Option<String>, Query)),
    responses((status = 200, body = HandoffList), (status = 400, body = Fault)))]
pub(super) async fn list(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    filter: Result<Query<Filter>, QueryRejection>,
) -> Result<Json<HandoffList>, Fault> {
    may_look(&peer)?;
    let Filter { state, vm } = query(filter)?;
    let state = match state {
        Some(name) => Some(
            HandoffState::from_name(&name)
                .ok_or_else(|| Fault::bad_request(format!("`{name}` is no state of a handoff")))?,
        ),
        None => None,
    };
    let rows = core.rows();
    let wanted = rows.iter().filter(|row| {
        state.is_none_or(|state| row.state == state) && vm.as_ref().is_none_or(|vm| row.vm == *vm)
    });
    Ok(Json(HandoffList { handoffs: wanted.map(|row| view::handoff(row)).collect() }))
}

/// A migration that was asked for.
pub(super) async fn begin_migration(
    core: &Api,
    vm: &str,
    request: migrate::MigrateVm,
) -> Result<Response, Fault> {
    let id = prepare::id(&request.id)?;
    let note = request.note(core, vm).await?;
    let (handle, new) = prepare::prepare(core, vm, id, request.handoff(), Some(note)).await?;
    if new {
        migrate::drive(core, handle.clone(), false);
    }
    Ok(answer(if new { StatusCode::ACCEPTED } else { StatusCode::OK }, &handle.row()))
}
