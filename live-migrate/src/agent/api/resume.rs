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
    let id = handoff["id"].as_str().map_or_else(String::new, |id| format!(" {id}"));
    let stale = "its memory is out of date: end it";
    let (other, then) = match (handoff["parked"].as_str(), handoff["side"].as_str()) {
        (Some("lost"), Some("source")) => ("the destination won, and owns the volumes", stale),
        (Some("lost"), _) => ("the other host won, and owns the volumes", stale),
        (Some("abdicated"), _) => ("this host gave it up, and the source owns the volumes", stale),
        (Some("other-try"), _) => (
            "it was started for another one and never had the volumes",
            "if this host owns them, wait until the handoff is over and start its backend anew, else end it",
        ),
        _ => ("it is over, and this process does not have the volumes", stale),
    };
    Problem::new(
        StatusCode::CONFLICT,
        "baton:parked",
        "The VM has lost its volumes",
        format!(
            "`{vm}` must not run on {host}, and {done}: its backend is parked after handoff{id}: {other}; {then} (`baton handoff why {vm}` says where the VM may run)"
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn row_35_a_winners_successor_is_not_said_to_be_another_hosts() {
        let said = |word: &str| {
            let handoff = json!({"standing": "parked", "parked": word, "id": "ID"});
            parked("web", "host-b", &handoff, "was not resumed").detail
        };
        let other = said("other-try");
        assert!(other.contains("if this host owns them, wait"), "{other}");
        assert!(!other.contains("out of date"), "{other}");
        for word in ["lost", "abdicated", "over"] {
            assert!(said(word).contains("its memory is out of date: end it"), "{}", said(word));
        }
    }
}
