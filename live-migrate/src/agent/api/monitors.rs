//! The monitor of a VM.
//!
//! `continue` is refused unless the source's backend says that all its disks are
//! drained: QEMU reaches `pre-switchover` also when the backend died in the
//! middle of a drain, and would then complete a migration that lost requests.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::definition::VmDefinition;
use super::super::{Agent, STATUS_LIMIT};
use super::{WAIT_MS_MAX, body, find};
use crate::problem::Problem;
use crate::supervisor::control::{Control, not_drained};
use crate::vmm::{Incoming, Outgoing, Vmm, VmmStatus};

/// How long to wait.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitOptions {
    /// At most this long until the migration is decided, milliseconds.
    #[serde(default)]
    wait_ms: u64,
}

pub(super) fn monitor(agent: &Agent, name: &str) -> Result<(VmDefinition, Arc<dyn Vmm>), Problem> {
    let vm = find(agent, name)?;
    match agent.vmm(&vm) {
        Some(vmm) => Ok((vm, vmm)),
        None => Err(Problem::new(
            StatusCode::CONFLICT,
            "baton:vmm-foreign",
            "The VM's monitor is somebody else's",
            format!(
                "{name} has vmm = \"none\": whoever runs it must be asked, or set vmm to qemu or cloud-hypervisor"
            ),
        )),
    }
}

/// Shows what the monitor says; with `wait_ms`, once its migration is decided.
#[utoipa::path(get, path = "/v1/vms/{vm}/vmm", params(("vm" = String, Path),
    ("wait_ms" = Option<u64>, Query, description = "at most 60000")),
    responses((status = 200, body = VmmStatus), (status = 400, body = Problem),
    (status = 404, body = Problem), (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn status(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    options: Result<Query<WaitOptions>, QueryRejection>,
) -> Result<Json<VmmStatus>, Problem> {
    let Query(WaitOptions { wait_ms }) =
        options.map_err(|rejection| Problem::bad_request(rejection.body_text()))?;
    if wait_ms > WAIT_MS_MAX {
        return Err(Problem::bad_request(format!("wait_ms is at most {WAIT_MS_MAX}")));
    }
    let (_, vmm) = monitor(&agent, &name)?;
    let status = match wait_ms {
        0 => vmm.status().await?,
        ms => vmm.wait(Duration::from_millis(ms)).await?,
    };
    Ok(Json(status))
}

/// Makes the monitor listen for a migration, and starts it first if need be.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/incoming", params(("vm" = String, Path)),
    request_body = Incoming, responses((status = 200, body = VmmStatus), (status = 400, body = Problem),
    (status = 404, body = Problem), (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn incoming(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<Incoming>, JsonRejection>,
) -> Result<Json<VmmStatus>, Problem> {
    let incoming = body(request)?;
    uri(&incoming.uri)?;
    let (vm, vmm) = monitor(&agent, &name)?;
    agent.incoming(&vm, vmm.as_ref(), &incoming).await?;
    Ok(Json(vmm.status().await?))
}

/// Starts an outgoing migration; GET with `wait_ms` tells how it goes.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/migrate", params(("vm" = String, Path)),
    request_body = Outgoing, responses((status = 202, body = VmmStatus), (status = 400, body = Problem),
    (status = 404, body = Problem), (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn migrate(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<Outgoing>, JsonRejection>,
) -> Result<(StatusCode, Json<VmmStatus>), Problem> {
    let outgoing = body(request)?;
    uri(&outgoing.uri)?;
    let (_, vmm) = monitor(&agent, &name)?;
    vmm.migrate(&outgoing).await?;
    Ok((StatusCode::ACCEPTED, Json(vmm.status().await?)))
}

/// QEMU would take `exec:COMMAND`, too.
fn uri(uri: &str) -> Result<(), Problem> {
    if uri.starts_with("tcp:") || uri.starts_with("unix:") {
        return Ok(());
    }
    Err(Problem::bad_request(format!(
        "`{uri}` is no migration address; write tcp:HOST:PORT or unix:PATH"
    )))
}

/// Lets a migration go on that waits before its switch, if the backend is drained.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/continue", params(("vm" = String, Path)),
    responses((status = 200, body = VmmStatus), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn proceed(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<VmmStatus>, Problem> {
    let (vm, vmm) = monitor(&agent, &name)?;
    // One that was proven gone had drained before.
    if !agent.has_given_up(&name).await? {
        let control = Control::new(agent.config.control_socket(&name));
        let answer = control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await;
        let disks: Vec<&str> = vm.disks.iter().map(|disk| disk.name.as_str()).collect();
        drained(&name, answer.map_err(|error| Problem::described(&error)), &disks)?;
    }
    vmm.proceed().await?;
    Ok(Json(vmm.status().await?))
}

fn drained(vm: &str, status: Result<Value, String>, disks: &[&str]) -> Result<(), Problem> {
    let why = match status {
        Ok(status) => match not_drained(&status, disks) {
            open if open.is_empty() => return Ok(()),
            open => format!("disk {} is not drained", open.join(", ")),
        },
        Err(error) => error,
    };
    Err(Problem::new(
        StatusCode::CONFLICT,
        "baton:not-drained",
        "The source's backend did not say that it is drained",
        format!(
            "the migration of {vm} must not go on: {why}; cancel it, and the VM goes on where it is"
        ),
    ))
}

/// Cancels an outgoing migration; the source goes on.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/cancel", params(("vm" = String, Path)),
    responses((status = 200, body = VmmStatus), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn cancel(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<VmmStatus>, Problem> {
    let (_, vmm) = monitor(&agent, &name)?;
    vmm.cancel().await?;
    Ok(Json(vmm.status().await?))
}

/// Stops the VM's CPUs.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/stop", params(("vm" = String, Path)),
    responses((status = 200, body = VmmStatus), (status = 404, body = Problem),
    (status = 409, body = Problem), (status = 504, body = Problem)))]
pub(super) async fn stop(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<VmmStatus>, Problem> {
    let (_, vmm) = monitor(&agent, &name)?;
    vmm.stop().await?;
    Ok(Json(vmm.status().await?))
}

/// Ends the monitor.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/quit", params(("vm" = String, Path)),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem),
    (status = 504, body = Problem)))]
pub(super) async fn quit(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Problem> {
    let (_, vmm) = monitor(&agent, &name)?;
    vmm.quit().await?;
    Ok(StatusCode::NO_CONTENT)
}
