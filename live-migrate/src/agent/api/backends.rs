//! The backend of a VM: its process, and its part in a handoff.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use baton_protocol::handoff::Try;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::cooperative::proof_of;
use super::super::ledger::{Proof, Turn};
use super::super::{Agent, COMMAND_LIMIT};
use super::cooperative::whole;
use super::{body, find};
use crate::problem::Problem;
use crate::supervisor::control::Control;
use crate::supervisor::{BackendState, Role};

/// How to start a backend.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StartBackend {
    /// `owner` claims the volumes, `standby` waits for a handoff.
    role: Role,
    /// For `standby`: the only try of a handoff in which it may become the owner, its
    /// id, a slash and the attempt's number. Without it that is the first of which it
    /// hears.
    #[serde(rename = "try", default)]
    #[schema(example = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1")]
    only_for: Option<String>,
    /// With `try`, where the storage keeps nobody out: the try's place among all of the
    /// VM. The agent remembers it, and refuses what comes late.
    #[serde(default)]
    turn: Option<u64>,
    /// For `owner`: although the volumes left this host in a handoff, and nothing but
    /// the caller's word says that no other host can reach them.
    #[serde(default)]
    force: bool,
}

impl StartBackend {
    fn only_for(&self) -> Result<Option<Try>, Problem> {
        match (&self.only_for, self.role) {
            (None, _) => Ok(None),
            (Some(_), Role::Owner) => Err(Problem::bad_request(
                "`try` is for role `standby`; an owner belongs to no try, so leave it out",
            )),
            (Some(text), Role::Standby) => text.parse().map(Some).map_err(Problem::bad_request),
        }
    }
}

/// Starts the backend and waits until it answers. One that runs is left alone;
/// the role then counts from its next start on.
#[utoipa::path(put, path = "/v1/vms/{vm}/backend", params(("vm" = String, Path)),
    request_body = StartBackend, responses((status = 200, body = BackendState),
    (status = 400, body = Problem), (status = 404, body = Problem), (status = 409, body = Problem),
    (status = 504, body = Problem)))]
pub(super) async fn start(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<StartBackend>, JsonRejection>,
) -> Result<Json<BackendState>, Problem> {
    let request = body(request)?;
    let only_for = request.only_for()?;
    let vm = find(&agent, &name)?;
    if request.role == Role::Owner {
        return whole(async move { agent.claim(&vm, request.force).await }).await.map(Json);
    }
    if let (Some(attempt), Some(number)) = (only_for, request.turn) {
        let turn = Turn { number, attempt };
        return whole(async move { agent.stand(&vm, turn).await }).await.map(Json);
    }
    let launch = agent.to_launch(&vm, request.role, only_for)?;
    Ok(Json(agent.supervisor.start(launch).await?))
}

/// Stops the backend: asks it to end, and kills it if it does not.
#[utoipa::path(delete, path = "/v1/vms/{vm}/backend", params(("vm" = String, Path)),
    responses((status = 200, description = "Its process was seen to end", body = Proof),
    (status = 204, description = "None runs, and nobody has seen one end"),
    (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn stop(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Response, Problem> {
    find(&agent, &name)?;
    let ended = agent.supervisor.end(&name).await?;
    let proof = ended.and_then(|(pid, ending)| proof_of(pid, ending));
    Ok(match proof {
        Some(proof) => Json(proof).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

async fn tell(agent: &Agent, name: &str, command: &str) -> Result<Json<Value>, Problem> {
    find(agent, name)?;
    let control = Control::new(agent.config.control_socket(name));
    Ok(Json(control.ask(&json!({"cmd": command}), COMMAND_LIMIT).await?))
}

/// Passes `seal` to the backend: drain, and give the volumes up to the handoff.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/seal", params(("vm" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn seal(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    tell(&agent, &name, "seal").await
}

/// Passes `activate` to the backend: ask for the volumes.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/activate", params(("vm" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn activate(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    tell(&agent, &name, "activate").await
}

/// Passes `abdicate` to the backend: promise never to have activated.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/abdicate", params(("vm" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn abdicate(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    tell(&agent, &name, "abdicate").await
}

/// Passes `reclaim` to the backend: ask for the volumes back.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/reclaim", params(("vm" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn reclaim(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Problem> {
    tell(&agent, &name, "reclaim").await
}

/// What to time.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WatchLatency {
    /// Go on timing the guest's requests for so long from now, seconds, at most
    /// an hour; 0 only shows what is there.
    #[serde(default)]
    watch_s: u32,
}

/// Passes `latency` to the backend: how long the guest's requests took, in slices.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/latency", params(("vm" = String, Path)),
    request_body = WatchLatency, responses((status = 200, body = Object), (status = 400, body = Problem),
    (status = 404, body = Problem), (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn latency(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<WatchLatency>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    let WatchLatency { watch_s } = body(request)?;
    find(&agent, &name)?;
    let control = Control::new(agent.config.control_socket(&name));
    let command = json!({"cmd": "latency", "watch_s": watch_s});
    Ok(Json(control.ask(&command, COMMAND_LIMIT).await?))
}
