//! VMs as a whole: where they are, who owns their volumes, why things are as they
//! are. Ownership is read from the access records each time.

use std::sync::Arc;

use axum::http::StatusCode;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::cooperative;
use super::core::Core;
use super::fault::Fault;
use super::prepare::vm_name;
use super::storages::{RecordView, StorageError, StorageServer, place_of};
use super::vm_view::VmView;

/// A volume of a VM with its access record.
pub(super) struct Volume<'a> {
    pub(super) server: &'a StorageServer,
    pub(super) name: String,
    pub(super) record: Result<RecordView, StorageError>,
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
pub(super) async fn find(core: &Arc<Core>, vm: &str) -> Result<VmView, Fault> {
    vm_name(vm)?;
    if let Some(view) = core.remembered(vm) {
        return Ok(view);
    }
    let view = super::sides::find(core, vm, None).await?.view;
    core.remember(&view).await?;
    Ok(view)
}

pub(super) async fn volumes<'a>(
    core: &'a Arc<Core>,
    view: &VmView,
) -> Result<Vec<Volume<'a>>, Fault> {
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
    let mut found = join_all(records).await;
    super::orphan::anchor_first(&mut found);
    Ok(found)
}

/// Who owns the VM's volumes: a projection of the access records.
///
/// # Errors
/// [`Fault`].
pub async fn access(core: &Arc<Core>, vm: &str) -> Result<Value, Fault> {
    let view = find(core, vm).await?;
    if cooperative::elsewhere(&view).is_some() && !cooperative::has_records(&view) {
        return cooperative::access(core, vm).await;
    }
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
                "owner": record.owner.as_ref().map(|owner| &owner.name), "barred": record.barred,
                "handoff": under_way(record)}),
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
        "handoff": under_way(record),
        "anchor": {"volume": anchor.name, "storage": anchor.server.name},
        "members": members,
    }))
}

fn under_way(record: &RecordView) -> Option<Value> {
    let handoff = record.handoff.as_ref()?;
    Some(json!({"id": handoff.id, "attempt": handoff.attempt}))
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
    // Handoffs that nothing can decide any more, though a volume is in them.
    let forgotten = super::orphan::forgotten(&volumes).await;
    let forgotten: Vec<Value> =
        forgotten.into_iter().map(|(id, attempt)| json!({"id": id, "attempt": attempt})).collect();
    Ok(json!({"access": access, "audit": audit, "handoff": handoff, "forgotten": forgotten}))
}
