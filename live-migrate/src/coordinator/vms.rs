//! VMs as a whole: where they are, who owns their volumes, fencing them, why
//! things are as they are. Ownership is read from the access records each time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::StatusCode;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::agents::VmView;
use super::core::{Core, unix_us};
use super::fault::Fault;
use super::journal::{Change, Event};
use super::plan::{self, Input};
use super::prepare::vm_name;
use super::storages::{RecordView, StorageError, StorageServer, place_of};

/// A VM that was fenced from a host.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FenceVm {
    /// The host that shall not touch the volumes any more.
    pub dead_host: String,
    /// Who fences and why; for the log and the audit.
    pub reason: String,
    /// Although the host's agent answers and says that the VM runs.
    #[serde(default)]
    pub force: bool,
    /// The only host that may claim the volumes next; any but the dead one if absent.
    pub nominee: Option<String>,
}

/// What became of one volume.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FencedVolume {
    /// Its name.
    pub volume: String,
    /// Its server.
    pub storage: String,
    /// Nothing of the dead host can reach it any more.
    pub fenced: bool,
    /// It was the dead host's, and this call took it.
    pub taken: bool,
    /// Whose it was already, if it was not the dead host's: the VM may run nowhere else.
    pub belongs_to: Option<String>,
    /// Its epoch afterwards.
    pub epoch: u64,
    /// What happened.
    pub detail: String,
}

/// A volume of a VM with its access record.
struct Volume<'a> {
    server: &'a StorageServer,
    name: String,
    record: Result<RecordView, StorageError>,
}

/// All VMs that any agent knows now, or knew.
pub async fn list(core: &Arc<Core>) -> Value {
    let asked = core.agents.iter().map(|agent| async move { (agent, agent.vms().await) });
    let mut vms: std::collections::BTreeMap<String, Vec<Value>> =
        core.known_vms().into_iter().map(|name| (name, Vec::new())).collect();
    let mut silent = Vec::new();
    for (agent, answer) in join_all(asked).await {
        match answer {
            Ok(views) => {
                for view in views {
                    if let Err(error) = core.remember(&view).await {
                        tracing::warn!(%error, vm = view.name(), "a VM is not remembered");
                    }
                    vms.entry(view.name().to_owned()).or_default().push(json!({
                        "host": agent.host.name,
                        "backend": view.0["backend"]["run"],
                        "role": view.0["backend"]["role"],
                    }));
                }
            }
            Err(error) => {
                silent.push(json!({"host": agent.host.name, "detail": error.to_string()}));
            }
        }
    }
    let shown = vms.into_iter().map(|(name, hosts)| {
        let latest = core.latest(&name).map(|handle| {
            let row = handle.row();
            json!({"id": row.id.to_string(), "state": row.state.name(), "from": row.from, "to": row.to})
        });
        let disks = core.remembered(&name).map_or(0, |view| view.disks().len());
        json!({"name": name, "hosts": hosts, "disks": disks, "handoff": latest})
    });
    let vms: Vec<Value> = shown.collect();
    json!({"vms": vms, "unreachable": silent})
}

/// The VM as it was remembered, or as an agent tells it now.
async fn find(core: &Arc<Core>, vm: &str) -> Result<VmView, Fault> {
    vm_name(vm)?;
    if let Some(view) = core.remembered(vm) {
        return Ok(view);
    }
    let view = super::sides::find(core, vm, None).await?.view;
    core.remember(&view).await?;
    Ok(view)
}

async fn volumes<'a>(core: &'a Arc<Core>, view: &VmView) -> Result<Vec<Volume<'a>>, Fault> {
    let mut found = Vec::new();
    // The anchor of the last handoff first: it is the one that decides.
    let anchor = core.latest(view.name()).and_then(|handle| {
        handle.row().anchor().map(|anchor| (anchor.storage.clone(), anchor.volume.clone()))
    });
    for disk in view.disks() {
        let Ok((data, volume)) = place_of(&disk.volume) else { continue };
        let Some(server) = core.storages.at(&data) else {
            return Err(Fault::new(
                StatusCode::CONFLICT,
                "baton:not-movable",
                "A disk cannot move",
                format!("disk `{}`: no storage server {} is configured", disk.name, data.join(",")),
            ));
        };
        found.push((server, volume));
    }
    found.sort_by_key(|(server, volume)| {
        anchor.as_ref().is_none_or(|(storage, name)| (storage, name) != (&server.name, volume))
    });
    let records = found.into_iter().map(|(server, name)| async move {
        let record = server.access(&name, None).await.map(|(_, record)| record);
        Volume { server, name, record }
    });
    Ok(join_all(records).await)
}

/// Who owns the VM's volumes: a projection of the access records.
///
/// # Errors
/// [`Fault`].
pub async fn access(core: &Arc<Core>, vm: &str) -> Result<Value, Fault> {
    let view = find(core, vm).await?;
    let volumes = volumes(core, &view).await?;
    let anchor = volumes.first().ok_or_else(|| {
        Fault::new(
            StatusCode::CONFLICT,
            "baton:not-movable",
            "The VM has no disk to move",
            format!("`{vm}` has no disk on a storage server"),
        )
    })?;
    let record = match &anchor.record {
        Ok(record) => record,
        Err(error) => {
            // Not the others: the anchor decides.
            let owner = super::sides::owner_so_far(core, vm, None);
            return Err(Fault::storage(error.clone(), &owner));
        }
    };
    let host_of = |record: &RecordView| {
        let owner = record.owner.as_ref()?;
        Some(owner.name.strip_suffix(&format!("/{vm}")).unwrap_or(&owner.name).to_owned())
    };
    let decided = record.decided.as_ref();
    let members: Vec<Value> = volumes
        .iter()
        .map(|volume| match &volume.record {
            Ok(record) => json!({"volume": volume.name, "storage": volume.server.name,
                "phase": record.phase, "epoch": record.epoch,
                "owner": record.owner.as_ref().map(|owner| &owner.name), "barred": record.barred}),
            Err(error) => json!({"volume": volume.name, "storage": volume.server.name,
                "error": error.to_string()}),
        })
        .collect();
    Ok(json!({
        "vm": vm,
        "owner_host": host_of(record),
        "owner": record.owner.as_ref().map(|owner| &owner.name),
        "epoch": record.epoch,
        "phase": record.phase,
        "barred": record.barred,
        "decided_by": decided.map(|decided| json!({"handoff": decided.id, "attempt": decided.attempt, "winner": decided.winner.name()})),
        "handoff": record.handoff.as_ref().map(|handoff| json!({"id": handoff.id, "attempt": handoff.attempt})),
        "anchor": {"volume": anchor.name, "storage": anchor.server.name},
        "members": members,
    }))
}

/// The anchor's audit trail and record, and the last handoff.
///
/// # Errors
/// [`Fault`].
pub async fn why(core: &Arc<Core>, vm: &str) -> Result<Value, Fault> {
    let access = access(core, vm).await?;
    let view = find(core, vm).await?;
    let volumes = volumes(core, &view).await?;
    let audits = volumes.iter().map(|volume| async move {
        match volume.server.audit(&volume.name).await {
            Ok(audit) => json!({"volume": volume.name, "storage": volume.server.name, "entries": audit["entries"]}),
            Err(error) => json!({"volume": volume.name, "storage": volume.server.name, "error": error.to_string()}),
        }
    });
    let audit = join_all(audits).await;
    let handoff = core.latest(vm).map(|handle| super::view::handoff(&handle.row()));
    Ok(json!({"access": access, "audit": audit, "handoff": handoff}))
}

/// Takes all volumes of a VM from a host. Each is answered when nothing of that
/// host can reach it any more.
///
/// # Errors
/// [`Fault`]; the VM may be started elsewhere only after it succeeded.
pub async fn fence(core: &Arc<Core>, vm: &str, request: FenceVm) -> Result<Value, Fault> {
    let FenceVm { dead_host, reason, force, nominee } = request;
    if reason.trim().is_empty() {
        return Err(Fault::bad_request("`reason` is empty; say who fences and why, for the audit"));
    }
    super::prepare::agent(core, &dead_host)?;
    if let Some(nominee) = &nominee {
        super::prepare::agent(core, nominee)?;
    }
    let _turn = core.turn(vm).await;
    let view = find(core, vm).await?;
    if !force
        && let Some(agent) = core.agents.of(&dead_host)
        && let Ok(there) = agent.vm(vm).await
        && (there.run() == "running" || there.standing_word() == Some("serving"))
    {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:host-alive",
            "The host is not dead",
            format!(
                "the agent of {dead_host} answers, and `{vm}` runs there (machine: {}, backend: {}) and owns its volumes; stop it there, migrate it, or fence with force",
                there.run(),
                there.standing_word().unwrap_or("none")
            ),
        ));
    }
    let owner = plan::owner(&dead_host, vm);
    let nominee = nominee.map(|host| plan::owner(&host, vm));
    let volumes = volumes(core, &view).await?;
    let fences = volumes
        .into_iter()
        .map(|volume| fence_one(core, volume, &owner, nominee.as_deref(), &reason));
    let results = join_all(fences).await;
    core.metrics.fences.fetch_add(1, Ordering::Relaxed);
    let all = results.iter().all(|result| result.fenced);
    let data = json!({"vm": vm, "dead_host": dead_host, "reason": reason, "force": force,
        "done": all, "volumes": results});
    tracing::warn!(vm, dead_host, reason, force, done = all, "fenced");
    let event = Event {
        seq: 0,
        kind: "baton.vm.fenced".to_owned(),
        subject: format!("vms/{vm}"),
        at_unix_us: unix_us(),
        data: data.clone(),
    };
    let told = core.journal.write(Change { events: vec![event], ..Change::default() }).await;
    if let Err(error) = told {
        tracing::error!(%error, vm, "the fence was carried out, but is not in the journal");
    }
    if !all {
        let left: Vec<&str> =
            results.iter().filter(|r| !r.fenced).map(|r| r.detail.as_str()).collect();
        return Err(Fault::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "baton:fence-incomplete",
            "Not every volume is fenced",
            format!(
                "do not start `{vm}` elsewhere: {}; fence again when they answer",
                left.join("; ")
            ),
        ));
    }
    if let Some(handle) = core.latest(vm) {
        let row = handle.row();
        // One that is over must not go on saying that the dead host owns the volumes.
        let stale = row.state.is_over() && results.iter().any(|result| result.taken);
        if stale || (!row.state.is_over() && row.from == dead_host && row.winner.is_none()) {
            let _ = handle.ask(Input::Fenced).await;
        }
    }
    Ok(data)
}

async fn fence_one(
    core: &Core,
    volume: Volume<'_>,
    owner: &str,
    nominee: Option<&str>,
    reason: &str,
) -> FencedVolume {
    let mut result = FencedVolume {
        volume: volume.name.clone(),
        storage: volume.server.name.clone(),
        fenced: false,
        taken: false,
        belongs_to: None,
        epoch: 0,
        detail: String::new(),
    };
    let record = match volume.record {
        Ok(record) => record,
        Err(error) => {
            result.detail = format!("volume `{}`: {error}", volume.name);
            return result;
        }
    };
    let current = record.owner.as_ref().map(|owner| owner.name.as_str());
    // Asked again after somebody else has come: that one keeps it.
    if current != Some(owner) {
        result.fenced = true;
        result.epoch = record.epoch;
        result.belongs_to = current.map(str::to_owned);
        result.detail = match current {
            Some(other) => format!("belongs to `{other}`"),
            None => "belongs to nobody".to_owned(),
        };
        return result;
    }
    match volume.server.fence(&volume.name, core.term, reason, nominee, &record).await {
        Ok(epoch) => {
            result.fenced = true;
            result.taken = true;
            result.epoch = epoch;
            result.detail = format!("taken from `{owner}`");
        }
        Err(error) => {
            if matches!(error, StorageError::StaleTerm(_)) {
                core.step_down("a storage server has heard a higher term");
            }
            result.detail = format!("volume `{}`: {error}", volume.name);
        }
    }
    result
}
