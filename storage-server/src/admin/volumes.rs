//! Volumes over HTTP.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::{Json, http::header, response::IntoResponse};
use baton_protocol::access::AccessRecord;
use baton_protocol::{AccessMode, Epoch};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::problem::Problem;
use super::record::HandoffView;
use crate::volumes::{Connection, Request, RunningVolume, SeenOwner};

/// A volume.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VolumeView {
    /// 16 hexadecimal digits, never used again.
    id: String,
    /// Its name.
    name: String,
    /// Size, bytes.
    size_bytes: u64,
    /// Pool space it takes, bytes.
    allocated_bytes: u64,
    /// When it was made, seconds since 1970.
    created_unix_s: u64,
    /// Who may use it.
    access: AccessView,
    /// Who is connected.
    sessions: Vec<SessionView>,
}

/// The access record.
#[derive(Debug, Serialize, ToSchema)]
struct AccessView {
    /// Only requests of this epoch are admitted.
    epoch: u64,
    /// The next epoch that nobody had; an ARM shows it.
    next_epoch: u64,
    /// `free`, `owned`, `armed`, `sealed`, `active`, `reclaimed` or `frozen`.
    phase: &'static str,
    /// Name of the owner, or of the nominee of a fence who has not come yet.
    owner: Option<String>,
    /// The owner's incarnation, 16 hexadecimal digits; null before a nominee comes.
    session: Option<String>,
    /// Name that may not claim until somebody else has (after a fence).
    barred: Option<String>,
    /// Highest coordinator term seen.
    coordinator_term: u64,
    /// Under way; all of it is at `/v1/volumes/{name}/access`.
    handoff: Option<HandoffView>,
}

/// A connection.
#[derive(Debug, Serialize, ToSchema)]
struct SessionView {
    /// The client's name for itself.
    owner: String,
    /// Incarnation of the client, 16 hexadecimal digits.
    session: String,
    /// Queue number, or `control`.
    queue: String,
    /// `owner`, `standby` or `read-only`.
    mode: &'static str,
    /// Epoch of its welcome; a lower one than the volume's is fenced.
    epoch: u64,
    /// Where it comes from.
    peer: String,
}

/// All volumes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VolumeList {
    /// By name.
    volumes: Vec<VolumeView>,
}

/// A volume to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateVolume {
    /// A letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`.
    name: String,
    /// A multiple of 512, at most 1 PiB.
    size_bytes: u64,
}

/// A new size.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ResizeVolume {
    /// At least the current size, a multiple of 512.
    size_bytes: u64,
}

/// A fence.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FenceVolume {
    /// For the log: who fences and why.
    reason: String,
    /// The only owner name that may claim next; otherwise anybody but the old owner.
    nominee: Option<String>,
    /// Term of the coordinator that says so; refused when a higher one has spoken.
    term: Option<u64>,
    /// Whom it is meant for, as read in `access`: refused when the volume has changed
    /// hands since. Without it whoever has the volume is fenced.
    seen: Option<SeenAccess>,
}

/// What was read in a volume's `access` before it is fenced.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SeenAccess {
    /// The owner's name; none if nobody owned the volume.
    owner: Option<String>,
    /// `next_epoch`.
    next_epoch: u64,
}

/// How to delete.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteOptions {
    /// Delete although read-only or standby clients are connected. An owner must
    /// be fenced first.
    #[serde(default)]
    force: bool,
}

impl VolumeView {
    fn of(volume: &RunningVolume) -> Self {
        let record = volume.record();
        let info = volume.data.info();
        Self {
            id: volume.id().to_string(),
            name: info.name,
            size_bytes: info.size_bytes,
            allocated_bytes: info.allocated_bytes,
            created_unix_s: info.created_unix_s,
            access: AccessView::of(&record),
            sessions: volume.connections().iter().map(SessionView::of).collect(),
        }
    }
}

impl AccessView {
    fn of(record: &AccessRecord) -> Self {
        let owner = record.owner.as_ref();
        Self {
            epoch: record.epoch.0,
            next_epoch: record.next_epoch.0,
            phase: record.phase.name(),
            owner: owner.map(|owner| owner.name.clone()),
            session: owner.filter(|o| o.session.0 != 0).map(|o| o.session.to_string()),
            barred: record.barred.clone(),
            coordinator_term: record.coordinator_term,
            handoff: record.handoff.as_ref().map(HandoffView::from),
        }
    }
}

impl SessionView {
    fn of(connection: &Connection) -> Self {
        Self {
            owner: connection.owner.clone(),
            session: connection.session.to_string(),
            queue: connection.queue.to_string(),
            mode: match connection.mode {
                AccessMode::Owner => "owner",
                AccessMode::Standby => "standby",
                AccessMode::ReadOnly => "read-only",
            },
            epoch: connection.epoch.0,
            peer: connection.peer.clone(),
        }
    }
}

pub(super) fn find(api: &Api, name: &str) -> Result<Arc<RunningVolume>, Problem> {
    api.volumes.get(name).ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        crate::store::VolumeError::NotFound { name: shown }.into()
    })
}

pub(super) type Body<T> = Result<Json<T>, JsonRejection>;

pub(super) fn body<T>(body: Body<T>) -> Result<T, Problem> {
    body.map(|Json(value)| value).map_err(|error| Problem::bad_request(error.body_text()))
}

/// Lists the volumes.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = VolumeList)))]
pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<VolumeList> {
    let volumes = api.volumes.list();
    Json(VolumeList { volumes: volumes.iter().map(|volume| VolumeView::of(volume)).collect() })
}

/// Makes a volume. It takes no space until it is written.
#[utoipa::path(post, path = "/v1/volumes", request_body = CreateVolume, responses(
    (status = 201, body = VolumeView), (status = 400, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn create(
    State(api): State<Arc<Api>>,
    request: Body<CreateVolume>,
) -> Result<impl IntoResponse, Problem> {
    let CreateVolume { name, size_bytes } = body(request)?;
    let volume = api.volumes.create(name, size_bytes).await?;
    tracing::info!(volume = volume.data.name(), size_bytes, "created");
    let location = [(header::LOCATION, format!("/v1/volumes/{}", volume.data.name()))];
    Ok((StatusCode::CREATED, location, Json(VolumeView::of(&volume))))
}

/// Shows a volume, its access record and who is connected.
#[utoipa::path(get, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = VolumeView), (status = 404, response = Problem)))]
pub(super) async fn show(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
) -> Result<Json<VolumeView>, Problem> {
    Ok(Json(VolumeView::of(&*find(&api, &name)?)))
}

/// Deletes a volume that nobody uses.
#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path),
    ("force" = Option<bool>, Query, description = "Delete although read-only or standby clients are connected.")),
    responses((status = 204), (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    options: Result<Query<DeleteOptions>, QueryRejection>,
) -> Result<StatusCode, Problem> {
    let Query(options) = options.map_err(|error| Problem::bad_request(error.body_text()))?;
    api.volumes.delete(&name, options.force).await?;
    tracing::warn!(volume = name, force = options.force, "deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// Grows a volume; connected clients are told.
#[utoipa::path(post, path = "/v1/volumes/{name}/resize", params(("name" = String, Path)),
    request_body = ResizeVolume, responses((status = 200, body = VolumeView),
    (status = 400, response = Problem), (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn resize(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<ResizeVolume>,
) -> Result<Json<VolumeView>, Problem> {
    let ResizeVolume { size_bytes } = body(request)?;
    let volume = find(&api, &name)?;
    api.volumes.resize(&name, size_bytes).await?;
    tracing::info!(volume = name, size_bytes, "resized");
    Ok(Json(VolumeView::of(&volume)))
}

/// Takes a volume from its owner. Answered when the change is durable and
/// nothing of the old owner can reach the volume any more.
#[utoipa::path(post, path = "/v1/volumes/{name}/fence", params(("name" = String, Path)),
    request_body = FenceVolume, responses((status = 200, body = VolumeView),
    (status = 400, response = Problem), (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn fence(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<FenceVolume>,
) -> Result<Json<VolumeView>, Problem> {
    let FenceVolume { reason, nominee, term, seen } = body(request)?;
    if reason.trim().is_empty() {
        return Err(Problem::bad_request("`reason` is empty; say who fences and why, for the log"));
    }
    let volume = find(&api, &name)?;
    let seen = seen.map(|seen| SeenOwner { owner: seen.owner, next_epoch: Epoch(seen.next_epoch) });
    let record = volume.change(Request::Fence { term, nominee: nominee.clone(), seen }).await?;
    tracing::warn!(
        volume = name, epoch = %record.epoch, barred = record.barred, nominee, term, reason, "fenced"
    );
    Ok(Json(VolumeView::of(&volume)))
}
