//! Lets a VM run, and says whether it has its volumes: its CPUs run too where its
//! backend is parked, with disks that never answer.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::{Agent, STATUS_LIMIT};
use super::monitors::monitor;
use crate::problem::Problem;
use crate::supervisor::control::Control;
use crate::vmm::VmmStatus;

/// How long storage may take to say whose the volumes are: a round trip and a disk sync,
/// with room for a slow disk. After that the answer says what is waited for.
const DECISION_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at the backend.
const LOOK: Duration = Duration::from_millis(20);

/// A VM that was let run.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Resumed {
    #[serde(flatten)]
    vmm: VmmStatus,
    /// What its backend does: `serving` has the volumes; at any other word the guest's
    /// requests wait until the storage has said whose they are. Null: no backend that
    /// answers.
    standing: Option<String>,
}

/// What a backend says of the handoff it is or was in; null when it does not answer.
async fn handoff(control: &Control) -> Value {
    let answer = control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await;
    answer.map_or(Value::Null, |mut status| status["handoff"].take())
}

fn standing(handoff: &Value) -> Option<&str> {
    handoff["standing"].as_str()
}

/// What the guest's rings wait for will be said soon.
fn is_being_decided(handoff: &Value) -> bool {
    matches!(standing(handoff), Some("sealing" | "sealed" | "reclaiming" | "ready" | "activating"))
}

/// The refusal for a VM whose volumes are not its own any more.
fn parked(vm: &str, host: &str, handoff: &Value, done: &str) -> Problem {
    let other = match (handoff["parked"].as_str(), handoff["side"].as_str()) {
        (Some("lost"), Some("source")) => "the destination won, and owns the volumes",
        (Some("lost"), _) => "the other host won, and owns the volumes",
        (Some("abdicated"), _) => "this host gave it up, and the source owns the volumes",
        _ => "it is over, and this host does not own the volumes",
    };
    let id = handoff["id"].as_str().map_or_else(String::new, |id| format!(" {id}"));
    Problem::new(
        StatusCode::CONFLICT,
        "baton:parked",
        "The VM has lost its volumes",
        format!(
            "`{vm}` must not run on {host}, and {done}: its backend is parked after handoff{id}: {other}; its memory is out of date: end it (`baton handoff why {vm}` says where the VM may run)"
        ),
    )
}

/// Lets the VM run, unless its backend is parked: then another host owns its volumes,
/// and it is not resumed, or stopped again if that is known only afterwards.
#[utoipa::path(post, path = "/v1/vms/{vm}/vmm/resume", params(("vm" = String, Path)),
    responses((status = 200, body = Resumed), (status = 404, body = Problem),
    (status = 409, description = "`baton:parked`: another host owns the volumes; or the monitor refuses.", body = Problem),
    (status = 504, body = Problem)))]
pub(super) async fn resume(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
) -> Result<Json<Resumed>, Problem> {
    let (_, vmm) = monitor(&agent, &name)?;
    let control = Control::new(agent.config.control_socket(&name));
    let host = &agent.config.host;
    let mut now = handoff(&control).await;
    if standing(&now) == Some("parked") {
        return Err(parked(&name, host, &now, "was not resumed"));
    }
    vmm.resume().await?;
    let deadline = tokio::time::Instant::now() + DECISION_LIMIT;
    loop {
        now = handoff(&control).await;
        if !is_being_decided(&now) || tokio::time::Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    if standing(&now) == Some("parked") {
        // The same that is done about it when nobody asks (`zombie`).
        let done = match vmm.stop().await {
            Ok(()) => "was stopped again".to_owned(),
            Err(error) => {
                format!("could not be stopped again ({})", Problem::described(&error))
            }
        };
        return Err(parked(&name, host, &now, &done));
    }
    let standing = standing(&now).map(str::to_owned);
    Ok(Json(Resumed { vmm: vmm.status().await?, standing }))
}
