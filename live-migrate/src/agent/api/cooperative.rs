//! Orders of a handoff of volumes whose storage keeps nobody out. All may be said twice.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::Agent;
use super::super::cooperative::Since;
use super::super::ledger::{Proof, Turn};
use super::{body, find};
use crate::problem::Problem;

/// Which try of a handoff.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OfTry {
    /// Its id, a slash and the attempt's number.
    #[serde(rename = "try")]
    #[schema(example = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1")]
    attempt: String,
    /// The try's place among all of the VM.
    turn: u64,
}

/// Which try, and whether anybody has proven that its source has stopped.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PermitOfTry {
    /// Its id, a slash and the attempt's number.
    #[serde(rename = "try")]
    #[schema(example = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1")]
    attempt: String,
    /// The try's place among all of the VM.
    turn: u64,
    /// A person took the proof's place: the VM starts from its disks, and a machine that
    /// waits must be ended first.
    #[serde(default)]
    forced: bool,
}

/// Which try, and how the source's backend was when it began.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EndOfTry {
    /// Its id, a slash and the attempt's number.
    #[serde(rename = "try")]
    #[schema(example = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1")]
    attempt: String,
    /// The try's place among all of the VM.
    turn: u64,
    /// The backend's process then.
    pid: i32,
    /// How often rings had been started in it then.
    starts: u32,
}

fn turn(request: Result<Json<OfTry>, JsonRejection>) -> Result<Turn, Problem> {
    let OfTry { attempt, turn } = body(request)?;
    Ok(Turn { number: turn, attempt: attempt.parse().map_err(Problem::bad_request)? })
}

/// A caller that goes away leaves nothing half done.
pub(super) async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, Problem> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "baton:failed",
            "The agent failed",
            format!("the agent failed in the middle of it ({error}); ask again"),
        ))
    })
}

/// Source: has the backend seal and ends it, and answers when the process is proven gone.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/end", params(("vm" = String, Path)), request_body = EndOfTry,
    responses((status = 200, body = Proof), (status = 404, body = Problem),
    (status = 409, description = "`baton:still-serving`: the guest is at its disks. `baton:came-back`: it was stopped and went on. `baton:not-proven`. `baton:stale-attempt`.", body = Problem)))]
pub(super) async fn end(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<EndOfTry>, JsonRejection>,
) -> Result<Json<Proof>, Problem> {
    let EndOfTry { attempt, turn, pid, starts } = body(request)?;
    let turn = Turn { number: turn, attempt: attempt.parse().map_err(Problem::bad_request)? };
    let vm = find(&agent, &name)?;
    let since = Since { pid, starts };
    whole(async move { agent.end_for(&vm, turn, since).await }).await.map(Json)
}

/// Source: the try was called off; its volumes stay, or a backend claims them again.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/keep", params(("vm" = String, Path)), request_body = OfTry,
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn keep(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<OfTry>, JsonRejection>,
) -> Result<StatusCode, Problem> {
    let turn = turn(request)?;
    let vm = find(&agent, &name)?;
    whole(async move { agent.keep(&vm, turn).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Destination: the source is proven gone; the backend that stands by may serve.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/permit", params(("vm" = String, Path)), request_body = PermitOfTry,
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn permit(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<PermitOfTry>, JsonRejection>,
) -> Result<StatusCode, Problem> {
    let PermitOfTry { attempt, turn, forced } = body(request)?;
    let turn = Turn { number: turn, attempt: attempt.parse().map_err(Problem::bad_request)? };
    let vm = find(&agent, &name)?;
    whole(async move { agent.permit(&vm, turn, forced).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Destination: the try was called off; the backend that stands by is ended, and no late order brings one back.
#[utoipa::path(post, path = "/v1/vms/{vm}/backend/dismiss", params(("vm" = String, Path)), request_body = OfTry,
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn dismiss(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<OfTry>, JsonRejection>,
) -> Result<StatusCode, Problem> {
    let turn = turn(request)?;
    let vm = find(&agent, &name)?;
    whole(async move { agent.dismiss(&vm, turn).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
