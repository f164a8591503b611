//! VMs of this host: their definitions, and how they are.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::definition::VmDefinition;
use super::super::{Agent, STATUS_LIMIT};
use super::{body, find};
use crate::problem::Problem;
use crate::supervisor::control::Control;
use crate::supervisor::{BackendState, Run};
use crate::vmm::VmmStatus;

/// A VM and how it is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmView {
    /// What it is.
    definition: VmDefinition,
    /// The process of its backend.
    backend: BackendState,
    /// What the backend says of itself; null when it does not answer.
    #[schema(value_type = Object)]
    status: Value,
    /// Where the storage keeps nobody out: what became here of the last handoff that was
    /// heard of, and the number of its try; null: none was.
    #[schema(value_type = Object)]
    ledger: Value,
    /// What its monitor says; null when there is none to ask, or it does not answer.
    vmm: Option<VmmStatus>,
    /// Why it does not.
    vmm_error: Option<String>,
}

/// A VM, without asking anybody.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmEntry {
    /// What it is.
    definition: VmDefinition,
    /// The process of its backend.
    backend: BackendState,
}

/// All VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmList {
    /// Name of this host.
    host: String,
    /// By name.
    vms: Vec<VmEntry>,
}

/// Lists the VMs of this host.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = VmList)))]
pub(super) async fn list(State(agent): State<Arc<Agent>>) -> Json<VmList> {
    let entry = |definition: VmDefinition| {
        let backend = agent.supervisor.state(&definition.name);
        VmEntry { definition, backend }
    };
    let vms = agent.inventory.list().into_iter().map(entry).collect();
    Json(VmList { host: agent.config.host.clone(), vms })
}

/// Shows a VM: its definition, and what backend and monitor say.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path)),
    responses((status = 200, body = VmView), (status = 404, body = Problem)))]
pub(super) async fn show(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<VmView>, Problem> {
    let definition = find(&agent, &name)?;
    let control = Control::new(agent.config.control_socket(&name));
    let monitor = agent.vmm(&definition);
    let (status, vmm) = tokio::join!(
        async { control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await.unwrap_or_default() },
        async {
            match monitor {
                Some(vmm) => Some(vmm.status().await),
                None => None,
            }
        }
    );
    let (vmm, vmm_error) = match vmm.transpose() {
        Ok(status) => (status, None),
        Err(error) => (None, Some(Problem::described(&error))),
    };
    let backend = agent.supervisor.state(&name);
    // One that cannot be read is told to whoever orders something.
    let note = agent.cooperative.last_heard(&name);
    let ledger = note.and_then(|note| serde_json::to_value(note).ok()).unwrap_or_default();
    Ok(Json(VmView { definition, backend, status, ledger, vmm, vmm_error }))
}

/// Defines a VM, so that it can come to this host. The same again changes nothing.
#[utoipa::path(put, path = "/v1/vms/{vm}", params(("vm" = String, Path)), request_body = VmDefinition,
    responses((status = 200, body = VmDefinition), (status = 201, body = VmDefinition),
    (status = 400, body = Problem), (status = 403, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn define(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    request: Result<Json<Value>, JsonRejection>,
) -> Result<(StatusCode, Json<VmDefinition>), Problem> {
    let mut sent = body(request)?;
    // The path names it; the body may.
    match sent.as_object_mut() {
        Some(fields) if !fields.contains_key("name") => {
            fields.insert("name".to_owned(), name.clone().into());
        }
        _ => {}
    }
    let vm: VmDefinition = serde_json::from_value(sent)
        .map_err(|error| Problem::bad_request(format!("the body is no definition: {error}")))?;
    if vm.name != name {
        let both = format!("the path says `{name}` and the body `{}`; send one name", vm.name);
        return Err(Problem::bad_request(both));
    }
    allowed(&agent, &vm)?;
    let running = agent.supervisor.state(&name).run != Run::Stopped;
    if running && agent.inventory.find(&name).is_some_and(|known| known.disks != vm.disks) {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "baton:backend-runs",
            "The VM's backend runs",
            format!("the backend of {name} serves other disks than these; stop it first"),
        ));
    }
    let new = agent.inventory.put(&vm)?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    // What holds here: the configuration's own, where there is one.
    Ok((status, Json(find(&agent, &name)?)))
}

/// Who may define a VM may not thereby run programs or read files of this host.
fn allowed(agent: &Agent, vm: &VmDefinition) -> Result<(), Problem> {
    let refused = |detail: String| {
        Err(Problem::new(
            StatusCode::FORBIDDEN,
            "baton:not-from-outside",
            "This is for the host's own configuration",
            detail,
        ))
    };
    if vm.incoming_command.is_some() && !agent.config.remote_commands {
        return refused(format!(
            "a command that this host runs is not taken from outside; set incoming_command in section [vmm] of the agent of {}",
            agent.config.host
        ));
    }
    let local = |uri: &str| {
        !uri.starts_with("baton://") && !uri.starts_with("nbd://") && !uri.starts_with("rbd://")
    };
    match vm.disks.iter().find(|disk| local(&disk.volume)) {
        Some(disk) if !agent.config.remote_files => refused(format!(
            "disk `{}` is of this host ({}), which is not taken from outside; define {} in the agent's configuration",
            disk.name, disk.volume, vm.name
        )),
        _ => Ok(()),
    }
}

/// Forgets a VM that was sent, whose backend is stopped.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path)),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn forget(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Problem> {
    find(&agent, &name)?;
    if agent.supervisor.state(&name).run != Run::Stopped {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "baton:backend-runs",
            "The VM's backend runs",
            format!("stop the backend of {name} first: DELETE /v1/vms/{name}/backend"),
        ));
    }
    agent.inventory.forget(&name)?;
    Ok(StatusCode::NO_CONTENT)
}
