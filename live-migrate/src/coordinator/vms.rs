//! VMs as a whole: where they are, who owns their volumes, why things are as they
//! are. Ownership is read from the access records each time.

use std::sync::Arc;

use axum::http::StatusCode;
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::access::{Access, AnchorView, DecidedBy, MemberAccess, UnderWay};
use super::cooperative;
use super::core::Core;
use super::fault::Fault;
use super::plan::State;
use super::prepare::vm_name;
use super::storages::{RecordView, StorageError, StorageServer, place_of};
use super::view::Shown;
use super::vm_view::VmView;

/// A volume of a VM with its access record.
pub(super) struct Volume<'a> {
    pub(super) server: &'a StorageServer,
    pub(super) name: String,
    pub(super) record: Result<RecordView, StorageError>,
}

/// VMs and where they are.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VmList {
    /// By name.
    pub vms: Vec<VmEntry>,
    /// Hosts whose agents did not say which VMs they have.
    pub unreachable: Vec<SilentHost>,
}

/// A VM.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VmEntry {
    /// Its name.
    pub name: String,
    /// Hosts whose agents know it now.
    pub hosts: Vec<VmAtHost>,
    /// How many disks it has that move.
    pub disks: usize,
    /// Its last handoff.
    pub handoff: Option<LastHandoff>,
}

/// A VM's backend at one host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VmAtHost {
    /// Which.
    pub host: String,
    /// What its process does: `running`, `stopped`, ...
    pub backend: Option<String>,
    /// What it was started as: `owner` or `standby`.
    pub role: Option<String>,
}

/// The last handoff of a VM.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LastHandoff {
    /// Which.
    pub id: String,
    /// Where it stands.
    pub state: State,
    /// From this host.
    pub from: String,
    /// To this host.
    pub to: String,
}

/// A host whose agent does not answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SilentHost {
    /// Which.
    pub host: String,
    /// Why.
    pub detail: String,
}

/// Why things are as they are.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Why {
    /// Who owns the volumes.
    pub access: Access,
    /// The audit trail of each volume, the anchor's first.
    pub audit: Vec<Trail>,
    /// The last handoff.
    pub handoff: Option<Shown>,
    /// Handoffs that nothing can decide any more, though a volume is in them.
    pub forgotten: Vec<UnderWay>,
}

/// The audit trail of a volume.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Trail {
    /// Its name.
    pub volume: String,
    /// Its server.
    pub storage: String,
    /// As the server tells it: each with `version`, `epoch`, `phase`, `what`, `who` and
    /// `at_unix_us`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub entries: Option<Value>,
    /// Why the server does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// All VMs that any agent knows now, or knew.
pub async fn list(core: &Arc<Core>) -> VmList {
    let asked = core.agents.iter().map(|agent| async move { (agent, agent.vms().await) });
    let mut vms: std::collections::BTreeMap<String, Vec<VmAtHost>> =
        core.known_vms().into_iter().map(|name| (name, Vec::new())).collect();
    let mut unreachable = Vec::new();
    for (agent, answer) in join_all(asked).await {
        let host = agent.host.name.clone();
        match answer {
            Ok(views) => {
                for view in views {
                    if let Err(error) = core.remember(&view).await {
                        tracing::warn!(%error, vm = view.name(), "a VM is not remembered");
                    }
                    let backend = |key: &str| view.0["backend"][key].as_str().map(str::to_owned);
                    vms.entry(view.name().to_owned()).or_default().push(VmAtHost {
                        host: host.clone(),
                        backend: backend("run"),
                        role: backend("role"),
                    });
                }
            }
            Err(error) => unreachable.push(SilentHost { host, detail: error.to_string() }),
        }
    }
    let vms = vms.into_iter().map(|(name, hosts)| {
        let handoff = core.latest(&name).map(|handle| {
            let row = handle.row();
            LastHandoff {
                id: row.id.to_string(),
                state: row.state,
                from: row.from.clone(),
                to: row.to.clone(),
            }
        });
        let disks = core.remembered(&name).map_or(0, |view| view.disks().len());
        VmEntry { name, hosts, disks, handoff }
    });
    VmList { vms: vms.collect(), unreachable }
}

/// The VM as it was remembered, or as an agent tells it now.
pub(super) async fn find(core: &Arc<Core>, vm: &str) -> Result<VmView, Fault> {
    vm_name(vm)?;
    if let Some(view) = core.remembered(vm) {
        return Ok(view);
    }
    let found = super::sides::find(core, vm, None).await?;
    let remembered = core.remember(&found.view).await;
    remembered.map_err(|error| Fault::from(error).before_all(&found.owner_so_far(core, vm)))?;
    Ok(found.view)
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
pub async fn access(core: &Arc<Core>, vm: &str) -> Result<Access, Fault> {
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
    let owner = record.owner.as_ref().map(|owner| owner.name.clone());
    let host = owner.as_ref().map(|owner| owner.strip_suffix(&format!("/{vm}")).unwrap_or(owner));
    Ok(Access {
        vm: vm.to_owned(),
        owner_host: host.map(str::to_owned),
        fence: None,
        epoch: Some(record.epoch),
        phase: Some(record.phase.clone()),
        barred: record.barred.clone(),
        decided_by: DecidedBy::of_record(record),
        handoff: UnderWay::of_record(record),
        anchor: Some(AnchorView {
            volume: anchor.name.clone(),
            storage: anchor.server.name.clone(),
        }),
        members: volumes.iter().map(MemberAccess::of).collect(),
        owner,
    })
}

/// The anchor's audit trail and record, and the last handoff.
///
/// # Errors
/// [`Fault`].
pub async fn why(core: &Arc<Core>, vm: &str) -> Result<Why, Fault> {
    let access = access(core, vm).await?;
    let view = find(core, vm).await?;
    let volumes = volumes(core, &view).await?;
    let audit = volumes.iter().map(|volume| async move {
        let (entries, error) = match volume.server.audit(&volume.name).await {
            Ok(audit) => (Some(audit["entries"].clone()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let (name, storage) = (volume.name.clone(), volume.server.name.clone());
        Trail { volume: name, storage, entries, error }
    });
    let audit = join_all(audit).await;
    let handoff = core.latest(vm).map(|handle| super::view::handoff(&handle.row()));
    let forgotten = super::orphan::forgotten(&volumes).await;
    let forgotten = forgotten.into_iter().map(|(id, attempt)| UnderWay { id, attempt });
    Ok(Why { access, audit, handoff, forgotten: forgotten.collect() })
}
