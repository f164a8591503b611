//! A new handoff: who, what and whether, before the first row is written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use baton_protocol::handoff::HandoffId;
use baton_remote_client::{Engine, Fence};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::agents::Agent;
use super::cooperative;
use super::core::{Core, unix_us};
use super::fault::{Fault, owner_sentence};
use super::keeper::Handle;
use super::movable::{self, Immovable};
use super::orphan;
use super::plan::{self, Member, Progress, Row, Seen, Standing, State, Trigger};
use super::sides::{self, Found};
use super::storages::{VolumeView, place_of};
use super::vm_view::{DiskView, VmView};
use crate::identity::is_name;

const LABELS_MAX: usize = 32;
const LABEL_BYTES_MAX: usize = 256;
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// Whether SEALED and ACTIVE are on disk before anyone is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Not: no sync while the machine stands still.
    #[default]
    Fast,
    /// They are.
    Base,
}

/// A handoff to prepare.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareHandoff {
    /// Host that runs the VM. Found by the volumes' owner if absent.
    pub from: Option<String>,
    /// Host that shall run it.
    pub to: String,
    /// Disks that move; all that the VM may write if absent.
    pub volumes: Option<Vec<String>>,
    /// Who says when the volumes switch.
    #[serde(default)]
    pub mode: Trigger,
    /// What is on disk during the switch.
    #[serde(default)]
    pub durability: Durability,
    /// How long it may take to become READY, such as `30s`.
    pub ready_timeout: Option<String>,
    /// For the caller's own use.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A time as people write it: `500ms`, `30s`, `2m`.
///
/// # Errors
/// A sentence.
pub fn duration(text: &str) -> Result<Duration, Fault> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let wrong = || {
        Fault::bad_request(format!(
            "`{text}` is not a time; write 500ms, 30s or 2m, at most an hour"
        ))
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        _ => return Err(wrong()),
    };
    let time = Duration::from_millis(number.saturating_mul(factor));
    if time > TIMEOUT_MAX { Err(wrong()) } else { Ok(time) }
}

/// An id of a caller.
///
/// # Errors
/// A sentence.
pub fn id(text: &str) -> Result<HandoffId, Fault> {
    let id: HandoffId = text.parse().map_err(Fault::bad_request)?;
    if id == HandoffId(0) { Err(Fault::bad_request("an id cannot be zero")) } else { Ok(id) }
}

/// A VM's name.
///
/// # Errors
/// A sentence.
pub fn vm_name(name: &str) -> Result<(), Fault> {
    if is_name(name) {
        Ok(())
    } else {
        Err(Fault::bad_request(
            "a VM's name has a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`",
        ))
    }
}

/// Prepares a handoff, or finds the one that was prepared with this id.
///
/// # Errors
/// [`Fault`]; nothing was started.
pub async fn prepare(
    core: &Arc<Core>,
    vm: &str,
    id: HandoffId,
    request: PrepareHandoff,
    driven: Option<serde_json::Value>,
) -> Result<(Handle, bool), Fault> {
    vm_name(vm)?;
    let hash = hash(vm, &request, driven.as_ref());
    // Who has this id, and whether the VM is free, must not change meanwhile.
    let _turn = core.turn(vm).await;
    if let Some(known) = core.handoff(id) {
        let row = known.row();
        return if row.request_hash == hash {
            Ok((known, false))
        } else {
            Err(Fault::new(
                StatusCode::CONFLICT,
                "baton:id-in-use",
                "The id belongs to another request",
                format!(
                    "handoff {id} of `{}` was asked for with another body; {}; choose a new id",
                    row.vm,
                    owner_sentence(&row)
                ),
            )
            .about(&row))
        };
    }
    if let Some(other) = core.latest(vm)
        && !other.row().is_over()
    {
        let row = other.row();
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:handoff-in-progress",
            "Another handoff is under way",
            format!(
                "handoff {} of `{vm}` is {}; {}; cancel or finish it first",
                row.id,
                row.state,
                owner_sentence(&row)
            ),
        )
        .about(&row));
    }
    let row = plan(core, vm, id, request, hash, driven).await?;
    let shown = row.clone();
    let handle = core.keep(row).await.map_err(|error| Fault::refused(&error, &shown))?;
    Ok((handle, true))
}

fn hash(vm: &str, request: &PrepareHandoff, driven: Option<&serde_json::Value>) -> String {
    // All that was asked for, and not when.
    let driven =
        driven.map(|note| serde_json::json!([note["uri"], note["bandwidth"], note["watch_io"]]));
    let body = serde_json::json!([vm, request, driven]).to_string();
    plan::hex_of(&Sha256::digest(body.as_bytes()))
}

async fn plan(
    core: &Arc<Core>,
    vm: &str,
    id: HandoffId,
    request: PrepareHandoff,
    request_hash: String,
    driven: Option<serde_json::Value>,
) -> Result<Row, Fault> {
    let ready_timeout = match &request.ready_timeout {
        Some(text) => duration(text)?,
        None => core.config.ready_timeout,
    };
    let fits = |text: &String| text.len() <= LABEL_BYTES_MAX;
    if request.labels.len() > LABELS_MAX || !request.labels.iter().all(|(k, v)| fits(k) && fits(v))
    {
        return Err(Fault::bad_request(format!(
            "at most {LABELS_MAX} labels of {LABEL_BYTES_MAX} bytes"
        )));
    }
    agent(core, vm, &request.to).await?;
    let found = sides::find(core, vm, request.from.as_deref()).await?;
    let owner = found.owner_so_far(core, vm);
    let disks = chosen(&found.view, request.volumes.as_deref(), &owner)?;
    let engines =
        movable::engines(&disks).map_err(|immovable| cannot_move(&immovable, vm, &owner))?;
    let cooperative = engines.iter().any(|one| one.capabilities().fence == Fence::Cooperative);
    let (members, from) = if cooperative {
        (cooperative::members(&disks, &engines), cooperative::source(vm, &found, &owner)?)
    } else {
        stored(core, vm, (disks, engines), &found, request.from.as_deref()).await?
    };
    let view = found.view;
    let owner = format!("the source {from} owns the volumes of `{vm}`");
    if core.agents.of(&from).is_none() {
        return Err(unknown_host(&from, &owner));
    }
    if from == request.to {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:destination-runs-vm",
            "The destination runs the VM already",
            format!("{from} owns the volumes of `{vm}` and runs it; there is nothing to move"),
        ));
    }
    // Where the rings switch it and somebody else drives the machines, nothing is asked
    // of the source's agent.
    let orders = cooperative || driven.is_some() || request.mode == Trigger::Explicit;
    let sides = sides::answer(core, vm, (&from, &request.to), orders).await?;
    let cooperation = match cooperative {
        true => cooperative::begin(core, vm, &from, &sides)?,
        false => plan::Cooperation::default(),
    };
    let [here, _] = sides;
    let view = here.unwrap_or(view);
    if driven.is_some() && view.monitor_is_foreign() {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:vmm-unsupported",
            "The VM's monitor cannot do this",
            format!(
                "{from} owns the volumes of `{vm}`, which goes on there, and nothing was armed: its definition says vmm = \"none\", so somebody else drives its monitor; migrate it there (`virsh migrate`), or set vmm to qemu or cloud-hypervisor"
            ),
        ));
    }
    let key = plan::random_key().map_err(|error| {
        Fault::new(StatusCode::INTERNAL_SERVER_ERROR, "baton:failed", "No random bytes", error)
    })?;
    let remembered = core.remember(&view).await;
    remembered.map_err(|error| Fault::from(error).before_all(&owner))?;
    Ok(Row {
        id,
        attempt: 1,
        vm: vm.to_owned(),
        from,
        to: request.to,
        request_hash,
        trigger: request.mode,
        fast: request.durability == Durability::Fast,
        key,
        labels: request.labels,
        created_unix_us: created(
            core.latest(vm).map(|handle| handle.row().created_unix_us),
            unix_us(),
        ),
        ready_timeout_ms: u64::try_from(ready_timeout.as_millis()).unwrap_or(u64::MAX),
        members,
        state: State::Preparing,
        standing: Standing::Unknown,
        stood: false,
        was_active: false,
        back: None,
        winner: None,
        proof: None,
        unknown: false,
        abdicated: false,
        fenced: false,
        switchover: false,
        seal_ordered: false,
        activate: false,
        activate_ordered: false,
        finish: false,
        last: false,
        loser_gone: false,
        trouble: None,
        timings: plan::Timings::default(),
        cooperation,
        driven,
        version: 0,
        term: core.term,
        reached: Vec::new(),
    })
}

/// When a handoff was made, later than the VM's last one: a clock that was set back must not hide it behind that.
fn created(last: Option<u64>, now: u64) -> u64 {
    last.map_or(now, |last| now.max(last.saturating_add(1)))
}

/// Volumes with access records, and the host that these say owns them.
async fn stored(
    core: &Arc<Core>,
    vm: &str,
    (disks, engines): (Vec<DiskView>, Vec<Engine>),
    found: &Found,
    wanted: Option<&str>,
) -> Result<(Vec<Member>, String), Fault> {
    let disks: Vec<_> = disks.into_iter().zip(engines).collect();
    let serving = found.serving.as_deref();
    let mut seen = members(core, vm, &disks, serving).await?;
    // The journal knows of no handoff of this VM that is under way.
    if seen.iter().any(|(_, volume)| !["owned", "free"].contains(&volume.phase.as_str()))
        && orphan::tidy(core, &found.view).await?
    {
        seen = members(core, vm, &disks, serving).await?;
    }
    let mut members = Vec::with_capacity(seen.len());
    let mut owner = None;
    for (member, volume) in seen {
        match volume.owner {
            Some(name) if owner.as_ref().is_none_or(|owner| *owner == name) => owner = Some(name),
            Some(name) => {
                let before = owner.unwrap_or_default();
                let what = format!("belongs to `{name}`, the volume before it to `{before}`");
                let whose = format!("no host owns all volumes of `{vm}`");
                return Err(not_owner(&member, &what, wanted).before_all(&whose));
            }
            None => {
                let whose = match owner {
                    Some(before) => format!("`{before}` owns the volume before it"),
                    None => format!("nobody owns the volumes of `{vm}`"),
                };
                let what = "belongs to nobody: the VM does not run";
                return Err(not_owner(&member, what, wanted).before_all(&whose));
            }
        }
        members.push(member);
    }
    let owned_by = owner.as_deref().unwrap_or_default();
    let running_on = owned_by.strip_suffix(&format!("/{vm}")).unwrap_or_default();
    let from = wanted.map(str::to_owned).or_else(|| found.named.clone());
    let from = from.unwrap_or_else(|| running_on.to_owned());
    if plan::owner(&from, vm) == owned_by {
        return Ok((members, from));
    }
    let known = core.agents.of(&from).is_some();
    let whose = format!("`{owned_by}` owns the volumes of `{vm}`");
    let what = format!("does not belong to `{from}/{vm}`");
    Err(match members.first() {
        Some(member) if known => not_owner(member, &what, Some(&from)).before_all(&whose),
        _ => unknown_host(&from, &whose),
    })
}

fn chosen(view: &VmView, wanted: Option<&[String]>, owner: &str) -> Result<Vec<DiskView>, Fault> {
    let all = view.disks();
    let Some(wanted) = wanted else {
        return if all.is_empty() {
            Err(Fault::new(
                StatusCode::CONFLICT,
                "baton:not-movable",
                "The VM has no disk to move",
                format!("`{}` has no disk that it may write", view.name()),
            ))
        } else {
            Ok(all)
        };
    };
    // Part of a VM's volumes here and part there is what nobody wants.
    let names = |disk: &DiskView, wanted: &String| {
        disk.name == *wanted || disk.volume.ends_with(&format!("/{wanted}"))
    };
    let known = |wanted: &String| all.iter().any(|disk| names(disk, wanted));
    if let Some(foreign) = wanted.iter().find(|wanted| !known(wanted)) {
        return Err(Fault::unknown(
            "baton:unknown-volume",
            "There is no such volume",
            format!(
                "`{}` has no writable disk `{foreign}`; leave `volumes` out to move all",
                view.name()
            ),
        )
        .before_all(owner));
    }
    let left = all.iter().find(|disk| !wanted.iter().any(|wanted| names(disk, wanted)));
    match left {
        Some(left) => Err(Fault::bad_request(format!(
            "disk `{}` of `{}` would stay behind; a VM's volumes move together: name all, or none",
            left.name,
            view.name()
        ))),
        None => Ok(all),
    }
}

async fn members(
    core: &Core,
    vm: &str,
    disks: &[(DiskView, Engine)],
    serving: Option<&str>,
) -> Result<Vec<(Member, VolumeView)>, Fault> {
    let mut members = Vec::with_capacity(disks.len());
    for (disk, engine) in disks {
        members.push(member(core, vm, (disk, *engine), serving).await?);
    }
    Ok(members)
}

fn cannot_move(immovable: &Immovable, vm: &str, owner: &str) -> Fault {
    let (kind, title, todo) = match immovable {
        Immovable::Mixed(..) => (
            "baton:mixed-fences",
            "The disks cannot move together",
            "bring its disks to one kind of storage, or stop it there and start it on the other host",
        ),
        Immovable::Engine { .. } => (
            "baton:not-movable",
            "A disk cannot move",
            "stop it there, end its backend, and start it on the other host",
        ),
        Immovable::Uri { .. } => (
            "baton:not-movable",
            "A disk cannot move",
            "correct the disk's volume in the VM's definition",
        ),
    };
    let detail = format!(
        "{immovable}; {owner}; `{vm}` goes on where it is, and nothing was armed or changed: {todo}"
    );
    Fault::new(StatusCode::CONFLICT, kind, title, detail)
}

async fn member(
    core: &Core,
    vm: &str,
    (disk, engine): (&DiskView, Engine),
    serving: Option<&str>,
) -> Result<(Member, VolumeView), Fault> {
    let not_movable = |why: String| {
        Fault::new(
            StatusCode::CONFLICT,
            "baton:not-movable",
            "A disk cannot move",
            format!("disk `{}`: {why}", disk.name),
        )
    };
    let (data, volume) = place_of(&disk.volume).map_err(not_movable)?;
    let server = core.storages.at(&data).ok_or_else(|| {
        not_movable(match data.first().and_then(|data| data.strip_prefix("ceph:")) {
            Some(conf) => format!(
                "no Ceph cluster with the configuration {conf} is configured; add a [[ceph]] section"
            ),
            None => format!(
                "no storage server {} is configured; add a [[storage]] section",
                data.join(",")
            ),
        })
    })?;
    let found = server.show(&volume).await.map_err(|error| {
        let owner = sides::owner_so_far(core, vm, serving);
        if error.refusal() == "baton:no-such-volume" {
            let detail = format!("disk `{}`: {error}", disk.name);
            Fault::unknown("baton:unknown-volume", "There is no such volume", detail)
                .before_all(&owner)
        } else {
            Fault::storage(error, &owner)
        }
    })?;
    let member = Member {
        disk: disk.name.clone(),
        engine,
        storage: server.name.clone(),
        volume,
        id: found.id,
        progress: Progress::Planned,
        seen: Seen::Nothing,
        epoch: found.epoch,
        next_epoch: found.next_epoch,
    };
    Ok((member, found))
}

/// The agent of a host that a request about this VM names.
///
/// # Errors
/// No such host; it says who owns the VM.
pub async fn agent<'a>(core: &'a Core, vm: &str, host: &str) -> Result<&'a Agent, Fault> {
    match core.agents.of(host) {
        Some(agent) => Ok(agent),
        None => Err(unknown_host(host, &sides::owner_now(core, vm).await)),
    }
}

pub(super) fn unknown_host(host: &str, owner: &str) -> Fault {
    let shown: String = host.chars().take(80).collect();
    Fault::unknown(
        "baton:unknown-host",
        "There is no such host",
        format!("no host `{shown}` is configured; add a [[host]] section or correct the name"),
    )
    .before_all(owner)
}

/// No such VM.
#[must_use]
pub fn unknown_vm(vm: &str, why: &str) -> Fault {
    Fault::unknown(
        "baton:unknown-vm",
        "There is no such VM",
        format!("`{vm}`: {why}; GET /v1/vms lists what is known"),
    )
}

fn not_owner(member: &Member, what: &str, from: Option<&str>) -> Fault {
    let from = from.unwrap_or("the source");
    Fault::new(
        StatusCode::CONFLICT,
        "baton:not-owner",
        "The source does not own the volumes",
        format!(
            "volume `{}` at {} {what}; {from} has nothing to hand off: look at `access`, and fence if its owner is gone for good",
            member.volume, member.storage
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handoff_is_later_than_the_last_by_any_clock() {
        for (last, now, made) in [
            (None, 5, 5),
            (Some(3), 5, 5),
            (Some(5), 5, 6),
            (Some(9), 5, 10),
            (Some(u64::MAX), 5, u64::MAX),
        ] {
            assert_eq!(created(last, now), made, "{last:?} {now}");
        }
    }

    #[test]
    fn times_as_people_write_them() {
        for (text, ms) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("7", 7000),
            ("1h", 0),
            ("", 0),
            ("99999999999999999999s", 0),
            ("61m", 0),
        ] {
            let parsed = duration(text).map(|time| time.as_millis());
            if ms == 0 {
                assert!(parsed.is_err(), "{text}");
            } else {
                assert_eq!(parsed.expect(text), ms);
            }
        }
    }
}
