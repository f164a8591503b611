//! VMs over HTTP.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, Path, State};
use axum::response::Response;

use super::{Api, body, may_look, may_order, refused};
use crate::coordinator::access::Access;
use crate::coordinator::fault::Fault;
use crate::coordinator::fence::{self as fences, FenceVm, Fenced};
use crate::coordinator::migrate::MigrateVm;
use crate::coordinator::view::Shown;
use crate::coordinator::vms::{self, VmList, Why};
use crate::door::Peer;

/// Lists VMs and where they are.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = VmList), (status = 403, body = Fault)))]
pub(super) async fn list(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<VmList>, Fault> {
    may_look(&peer)?;
    Ok(Json(vms::list(&core).await))
}

/// Who owns a VM's volumes, read from the anchor's access record.
#[utoipa::path(get, path = "/v1/vms/{vm}/access", params(("vm" = String, Path)),
    responses((status = 200, body = Access), (status = 404, body = Fault), (status = 503, body = Fault)))]
pub(super) async fn access(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<Json<Access>, Fault> {
    may_look(&peer)?;
    Ok(Json(vms::access(&core, &vm).await?))
}

/// Why things are as they are: records, their audit trails, the last handoff.
#[utoipa::path(get, path = "/v1/vms/{vm}/why", params(("vm" = String, Path)),
    responses((status = 200, body = Why), (status = 404, body = Fault), (status = 503, body = Fault)))]
pub(super) async fn why(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<Json<Why>, Fault> {
    may_look(&peer)?;
    Ok(Json(vms::why(&core, &vm).await?))
}

/// `POST /v1/vms/{vm}:VERB`.
pub(super) async fn verb(
    core: State<Api>,
    peer: ConnectInfo<Peer>,
    Path(vm): Path<String>,
    request: Result<Json<FenceVm>, JsonRejection>,
) -> Result<Json<Fenced>, Fault> {
    match vm.split_once(':') {
        Some((vm, "fence")) => fence(core, peer, Path(vm.to_owned()), request).await,
        _ => Err(Fault::unknown(
            "baton:no-such-route",
            "There is nothing here",
            "write /v1/vms/{vm}:fence",
        )),
    }
}

/// Takes all volumes of a VM from a dead host. Answered when nothing of that
/// host can reach them any more; only then may the VM be started elsewhere. In the
/// middle of a handoff too: what that host could still win is taken back first, and
/// who has won meanwhile keeps all volumes (`belongs_to`).
#[utoipa::path(post, path = "/v1/vms/{vm}:fence", params(("vm" = String, Path)), request_body = FenceVm,
    responses((status = 200, body = Fenced), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault), (status = 503, description = "Not every volume is fenced: do not start the VM elsewhere.", body = Fault)))]
pub(super) async fn fence(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
    request: Result<Json<FenceVm>, JsonRejection>,
) -> Result<Json<Fenced>, Fault> {
    may_order(&peer).map_err(|fault| refused(&core, &peer, &vm, fault))?;
    Ok(Json(fences::fence(&core, &vm, body(request)?).await?))
}

/// Migrates a VM: prepares the handoff, tells both machines what to do, cleans
/// up. Answered at once; the handoff of the same id shows how far it is.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrations", params(("vm" = String, Path)), request_body = MigrateVm,
    responses((status = 202, body = Shown), (status = 200, description = "It was asked for before.", body = Shown),
    (status = 404, body = Fault), (status = 409, body = Fault),
    (status = 503, description = "`baton:agent-unreachable`, which names the source, the destination or both, `baton:storage-unreachable`: nothing was armed.", body = Fault)))]
pub(super) async fn migrate(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
    request: Result<Json<MigrateVm>, JsonRejection>,
) -> Result<Response, Fault> {
    may_order(&peer).map_err(|fault| refused(&core, &peer, &vm, fault))?;
    super::handoffs::begin_migration(&core, &vm, body(request)?).await
}
