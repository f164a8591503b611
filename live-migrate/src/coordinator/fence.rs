//! Takes a VM's volumes from a host that is dead, or shall not have them.
//!
//! A FENCE says whom it is meant for, as the record was read, and is refused when that
//! has changed. In the middle of a handoff it does change: an ARM gives out epochs, the
//! backend's next process claims, the destination activates. And a record may name the
//! other host while the dead one can still win, or has won and the member does not know
//! it yet. So one FENCE to each volume is not always enough:
//!
//! 1. What is not decided is taken back first if the dead host is the destination; what
//!    is decided is settled first. Both need the anchor, and have a time. A handoff that
//!    the journal does not know is read from the records ([`super::orphan`]); a volume that
//!    is in one that its anchor does not know any more is disarmed, or settled.
//! 2. The anchor is fenced before the other volumes: what it decided until then holds,
//!    and afterwards nothing is decided any more. While it is not fenced, volumes that
//!    are in a handoff are left alone: they may be the other host's.
//! 3. A FENCE that came too late is said again, with what the record says now. Whoever
//!    has the volume then, and is not the dead host, keeps it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::StatusCode;
use baton_fault_point as fault_point;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::core::{Core, unix_us};
use super::fault::Fault;
use super::journal::{Change, Event};
use super::orphan;
use super::plan::{self, Input};
use super::storages::{RecordView, StorageError};
use super::vms::{Volume, find, volumes};

/// Looks at the records, each followed by a FENCE where one is due. Each but the first
/// means that somebody changed a record between a look and its FENCE; a host that does
/// that so often is not dead.
const ROUNDS_MAX: u32 = 8;
/// How long a handoff may take to be taken back, or settled, before its volumes are
/// fenced as they are. A few round trips, unless a server is away.
pub(super) const SETTLE_LIMIT: Duration = Duration::from_secs(3);

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

/// A VM that was taken from a host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Fenced {
    /// Which.
    pub vm: String,
    /// The host that has nothing of it any more.
    pub dead_host: String,
    /// As it was said.
    pub reason: String,
    /// As it was said.
    pub force: bool,
    /// Every volume is fenced: the VM may be started elsewhere.
    pub done: bool,
    /// What became of each.
    pub volumes: Vec<FencedVolume>,
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

/// Who is fenced, for whom and why.
struct Order<'a> {
    /// Owner name at the dead host.
    owner: &'a str,
    nominee: Option<&'a str>,
    reason: &'a str,
}

/// Takes all volumes of a VM from a host. Each is answered when nothing of that
/// host can reach it any more.
///
/// # Errors
/// [`Fault`]; the VM may be started elsewhere only after it succeeded.
pub async fn fence(core: &Arc<Core>, vm: &str, request: FenceVm) -> Result<Fenced, Fault> {
    let FenceVm { dead_host, reason, force, nominee } = request;
    if reason.trim().is_empty() {
        return Err(Fault::bad_request("`reason` is empty; say who fences and why, for the audit"));
    }
    super::prepare::agent(core, vm, &dead_host).await?;
    if let Some(nominee) = &nominee {
        super::prepare::agent(core, vm, nominee).await?;
    }
    let _turn = core.turn(vm).await;
    let view = find(core, vm).await?;
    if let Some((disk, fenced)) = super::cooperative::elsewhere(&view) {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:no-fence",
            "The storage cannot be told",
            format!(
                "disk `{}` of `{vm}` ({}) is fenced {}: the coordinator cannot take it from {dead_host}, and took nothing; make sure that {dead_host} does not reach that storage any more (power it off, end its export), then fence its other volumes, if it has any, by `baton volume fence`, and start the VM from its disks, or, in a handoff, `baton handoff finish {vm} --force --reason TEXT`",
                disk.name,
                disk.volume,
                fenced.words()
            ),
        ));
    }
    if !super::cooperative::has_records(&view) {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:no-fence",
            "The storage cannot be told",
            format!(
                "`{vm}` has no writable disk on a storage that can keep a host out, so nothing was taken from {dead_host}, and it may reach them still: see to that host"
            ),
        ));
    }
    if !force {
        is_not_alive(core, vm, &dead_host).await?;
    }
    let owner = plan::owner(&dead_host, vm);
    let nominee = nominee.map(|host| plan::owner(&host, vm));
    let order = Order { owner: &owner, nominee: nominee.as_deref(), reason: &reason };
    let mut taken: Vec<String> = Vec::new();
    let mut left_over: Option<String>;
    let mut ended = Vec::new();
    let mut round = 0;
    let mut results = loop {
        round += 1;
        end_handoff(core, vm, &dead_host).await;
        left_over = orphan::end(core, &volumes(core, &view).await?, order.owner).await;
        let mut found = volumes(core, &view).await?;
        ended.extend(orphan::end_forgotten(core, &mut found).await);
        let (results, changed) = fence_all(core, found, &order).await;
        taken.extend(results.iter().filter(|r| r.taken).map(|r| r.volume.clone()));
        if !changed || round == ROUNDS_MAX {
            break results;
        }
        tracing::info!(vm, dead_host, round, "a record changed before it was fenced; again");
    };
    // By an earlier round, whose answer this one found.
    for result in &mut results {
        result.taken |= result.fenced && taken.contains(&result.volume);
        if let Some(ended) = ended.iter().find(|ended| ended.volume == result.volume) {
            result.detail = format!(
                "{}; handoff {}, which the volume that decides it does not know any more, is ended here",
                result.detail, ended.handoff
            );
        }
    }
    core.metrics.fences.fetch_add(1, Ordering::Relaxed);
    if results.iter().all(|result| result.taken) {
        left_over = None;
    }
    let all = results.iter().all(|result| result.fenced) && left_over.is_none();
    tracing::warn!(vm, dead_host, reason, force, done = all, "fenced");
    let fenced =
        Fenced { vm: vm.to_owned(), dead_host, reason, force, done: all, volumes: results };
    let event = Event {
        seq: 0,
        kind: "baton.vm.fenced".to_owned(),
        subject: format!("vms/{vm}"),
        at_unix_us: unix_us(),
        data: json!(fenced),
    };
    let told = core.journal.write(Change { events: vec![event], ..Change::default() }).await;
    if let Err(error) = told {
        tracing::error!(%error, vm, "the fence was carried out, but is not in the journal");
    }
    if !all {
        let left: Vec<&str> = fenced
            .volumes
            .iter()
            .filter(|r| !r.fenced)
            .map(|r| r.detail.as_str())
            .chain(left_over.as_deref())
            .collect();
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
    if let Some(handle) = core.latest(vm)
        && fenced.volumes.iter().any(|result| result.taken)
    {
        // One that is over must not go on saying that the dead host owns the volumes.
        let row = handle.row();
        if row.state.is_over() || [&row.from, &row.to].contains(&&fenced.dead_host) {
            let _ = handle.ask(Input::Fenced).await;
        }
    }
    Ok(fenced)
}

async fn is_not_alive(core: &Core, vm: &str, host: &str) -> Result<(), Fault> {
    let Some(agent) = core.agents.of(host) else { return Ok(()) };
    let Ok(there) = agent.vm(vm).await else { return Ok(()) };
    if there.run() != "running" && there.standing_word() != Some("serving") {
        return Ok(());
    }
    Err(Fault::new(
        StatusCode::CONFLICT,
        "baton:host-alive",
        "The host is not dead",
        format!(
            "the agent of {host} answers, and `{vm}` runs there (machine: {}, backend: {}) and owns its volumes; stop it there, migrate it, or fence with force",
            there.run(),
            there.standing_word().unwrap_or("none")
        ),
    ))
}

/// Has a handoff decided that the dead host could win, and settled one that is decided:
/// each record then says whose the volume is. What does not end in time is fenced as it is.
async fn end_handoff(core: &Core, vm: &str, dead_host: &str) {
    let Some(handle) = core.latest(vm) else { return };
    let row = handle.row();
    if row.state.is_over() || row.fenced {
        return;
    }
    if row.winner.is_none() {
        if row.to != dead_host {
            return;
        }
        tracing::warn!(vm, dead_host, handoff = %row.id, "taken back before the fence");
        // Refused only if the destination has won meanwhile: that is settled, too.
        let _ = handle.ask(Input::Cancel).await;
    }
    let mut shown = handle.watch();
    let over = shown.wait_for(|row| row.state.is_over() || row.fenced);
    let _ = tokio::time::timeout(SETTLE_LIMIT, over).await;
}

/// One look at all volumes and a FENCE where it is due, the first volume before the
/// others; whether a record changed in between.
async fn fence_all(
    core: &Core,
    volumes: Vec<Volume<'_>>,
    order: &Order<'_>,
) -> (Vec<FencedVolume>, bool) {
    let forgotten = &orphan::forgotten(&volumes).await;
    let mut volumes = volumes.into_iter();
    let Some(anchor) = volumes.next() else { return (Vec::new(), false) };
    let decides = handoff_of(&anchor);
    let (first, changed) = fence_one(core, anchor, order, (false, forgotten)).await;
    let open = !first.fenced;
    let lost = first.fenced && !first.taken;
    let others = volumes.map(|volume| {
        let follows = handoff_of(&volume);
        // Of the anchor's handoff, or of one that the anchor cannot be asked about.
        let together = follows.is_some() && (open || follows == decides);
        let winner = first.belongs_to.as_deref();
        let forgets = follows.as_ref().is_some_and(|follows| forgotten.contains(follows));
        let anchor_taken = first.taken && (together || forgets);
        async move {
            if together && open {
                let mut result = unfenced(&volume);
                result.detail = format!(
                    "volume `{}`: is in a handoff, and waits until the one that decides it is fenced",
                    volume.name
                );
                (result, false)
            } else if together && lost && winner.is_some() {
                // What the anchor has decided, or leaves to its owner, holds for all.
                let mut result = unfenced(&volume);
                result.fenced = true;
                result.belongs_to = winner.map(str::to_owned);
                result.detail = format!("goes to `{}` with the handoff", winner.unwrap_or_default());
                (result, false)
            } else {
                fence_one(core, volume, order, (anchor_taken, forgotten)).await
            }
        }
    });
    let others = join_all(others).await;
    let changed = changed || others.iter().any(|(_, changed)| *changed);
    let results = std::iter::once(first).chain(others.into_iter().map(|(result, _)| result));
    (results.collect(), changed)
}

/// The handoff that a volume is in.
fn handoff_of(volume: &Volume<'_>) -> Option<(String, u32)> {
    let handoff = volume.record.as_ref().ok()?.handoff.as_ref()?;
    Some((handoff.id.clone(), handoff.attempt))
}

fn unfenced(volume: &Volume<'_>) -> FencedVolume {
    FencedVolume {
        volume: volume.name.clone(),
        storage: volume.server.name.clone(),
        fenced: false,
        taken: false,
        belongs_to: None,
        epoch: volume.record.as_ref().map_or(0, |record| record.epoch),
        detail: String::new(),
    }
}

/// Whether a volume that is somebody else's may yet be the dead host's, or is already and
/// does not know it; `None`: it cannot. `false`: it may, and its owner still runs.
fn may_win(record: &RecordView, dead: &str, anchor_taken: bool) -> Option<bool> {
    let handoff = record.handoff.as_ref().filter(|handoff| handoff.to == dead)?;
    match record.phase.as_str() {
        "reclaimed" => None,
        "armed" if !handoff.sealed => Some(anchor_taken),
        _ => Some(true),
    }
}

/// One volume; whether its record changed before the FENCE was there.
async fn fence_one(
    core: &Core,
    volume: Volume<'_>,
    order: &Order<'_>,
    (anchor_taken, forgotten): (bool, &[(String, u32)]),
) -> (FencedVolume, bool) {
    let mut result = unfenced(&volume);
    let of = handoff_of(&volume).unwrap_or_default();
    let record = match volume.record {
        Ok(record) => record,
        Err(error) => {
            result.detail = format!("volume `{}`: {error}", volume.name);
            return (result, false);
        }
    };
    let current = record.owner.as_ref().map(|owner| owner.name.as_str());
    if current != Some(order.owner) {
        match may_win(&record, order.owner, anchor_taken) {
            Some(true) => {}
            // Its owner runs, and the dead host has no way to it any more.
            Some(false) if forgotten.contains(&of) => {
                let (owner, (id, _)) = (current.unwrap_or("nobody"), of);
                result.fenced = true;
                result.belongs_to = current.map(str::to_owned);
                result.detail = format!(
                    "belongs to `{owner}`, and is still armed for handoff {id}, which the volume that decides it does not know any more, so that nobody can win it. It could not be disarmed: once the VM is stopped, fence it from the host of `{owner}` to end that, too"
                );
                return (result, false);
            }
            Some(false) => {
                result.detail = format!(
                    "volume `{}`: belongs to `{}`, which runs and hands it over to `{}` in handoff {}, which is not taken back yet",
                    volume.name,
                    current.unwrap_or("nobody"),
                    order.owner,
                    record.handoff.as_ref().map_or("", |handoff| handoff.id.as_str()),
                );
                return (result, false);
            }
            // Asked again after somebody else has come: that one keeps it.
            None => {
                result.fenced = true;
                result.belongs_to = current.map(str::to_owned);
                result.detail = match current {
                    Some(other) => format!("belongs to `{other}`"),
                    None => "belongs to nobody".to_owned(),
                };
                return (result, false);
            }
        }
    }
    // A record bars its owner's name. Where that is not the dead host's, the volume is
    // kept for the owner, or the dead host could claim it.
    let nominee = order.nominee.or(current.filter(|owner| *owner != order.owner));
    let fenced = volume.server.fence(&volume.name, core.term, order.reason, nominee, &record).await;
    match fenced {
        Ok(epoch) => {
            fault_point::at("fence.sent");
            (result.fenced, result.taken, result.epoch) = (true, true, epoch);
            result.detail = format!("taken from `{}`", order.owner);
            (result, false)
        }
        Err(error) => {
            if matches!(error, StorageError::StaleTerm(_)) {
                core.step_down("a storage server has heard a higher term");
            }
            result.detail = format!("volume `{}`: {error}", volume.name);
            (result, error.refusal() == "baton:stale-fence")
        }
    }
}
