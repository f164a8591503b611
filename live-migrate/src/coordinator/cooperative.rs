//! A new handoff of volumes whose storage keeps nobody out: no access record says who
//! owns them, so what the hosts' agents say counts, before anything is begun.

use axum::http::StatusCode;
use baton_remote_client::{Engine, Fence, VolumeUri};

use super::access::{Access, DecidedBy, UnderWay};
use super::core::Core;
use super::fault::Fault;
use super::plan::{self, Cooperation, Member, Progress, Seen, Winner};
use super::sides::{self, Found};
use super::vm_view::{DiskView, VmView};

/// A disk that other hosts reach, on a storage that keeps no access record, and how it is fenced.
pub(super) fn elsewhere(view: &VmView) -> Option<(DiskView, Fence)> {
    view.disks().into_iter().find_map(|disk| {
        let uri: VolumeUri = disk.volume.parse().ok()?;
        let fence = uri.engine().capabilities().fence;
        (fence == Fence::Cooperative).then_some((disk, fence))
    })
}

/// Whether an access record says who has one of its volumes.
pub(super) fn has_records(view: &VmView) -> bool {
    view.disks().iter().any(|disk| {
        let uri = disk.volume.parse::<VolumeUri>();
        uri.is_ok_and(|uri| {
            matches!(uri.engine().capabilities().fence, Fence::Storage | Fence::Blocklist)
        })
    })
}

/// Who has the VM's volumes, as its agents say and as its last handoff was decided.
///
/// # Errors
/// Nobody knows such a VM.
pub(super) async fn access(core: &Core, vm: &str) -> Result<Access, Fault> {
    let last = core.latest(vm).map(|handle| handle.row());
    let decided = last.as_ref().and_then(|row| {
        let host = match row.outcome()? {
            Winner::Source => &row.from,
            Winner::Destination => &row.to,
        };
        Some(host.clone())
    });
    let serving = match sides::find(core, vm, None).await {
        Ok(found) => found.serving,
        // Who is silent does not change what was decided.
        Err(_) if decided.is_some() => None,
        Err(fault) => return Err(fault),
    };
    let host = serving.or(decided);
    let over = last.as_ref().filter(|row| row.winner.is_some());
    let under_way = last.as_ref().filter(|row| !row.is_over());
    let decided_by = over.map(|row| DecidedBy {
        handoff: row.id.to_string(),
        attempt: row.attempt,
        winner: row.winner,
    });
    Ok(Access {
        vm: vm.to_owned(),
        owner: host.as_ref().map(|host| plan::owner(host, vm)),
        owner_host: host,
        fence: Some(Fence::Cooperative.name()),
        epoch: None,
        phase: None,
        barred: None,
        decided_by,
        handoff: under_way.map(|row| UnderWay::of_row(row)),
        anchor: None,
        members: Vec::new(),
    })
}

/// The host whose backend serves the VM.
///
/// # Errors
/// No agent says so, or not the one of the host that was named.
pub(super) fn source(vm: &str, found: &Found, owner: &str) -> Result<String, Fault> {
    if let Some(host) = &found.serving {
        return Ok(host.clone());
    }
    let who = match (&found.named, &found.told_by) {
        (Some(named), _) => format!("the agent of {named} does not say that its backend serves"),
        (None, Some(host)) => format!("no agent says that its backend serves, nor does {host}"),
        (None, None) => "no agent says that its backend serves".to_owned(),
    };
    Err(Fault::new(
        StatusCode::CONFLICT,
        "baton:not-owner",
        "The source does not own the volumes",
        format!(
            "{who} `{vm}`, whose volumes are on NBD servers: these do not know who may write, so a VM moves only from a backend that can be asked: start its backend where the VM runs, or see to that host's agent"
        ),
    )
    .before_all(owner))
}

/// What a new try begins with: its place among all of the VM, behind what the journal
/// knows, and what the two hosts have heard, whose agents may know of a journal before
/// this one; and how the source's backend is now.
///
/// # Errors
/// The source's backend does not say how it is.
pub(super) fn begin(
    core: &Core,
    vm: &str,
    from: &str,
    sides: &[Option<VmView>; 2],
) -> Result<Cooperation, Fault> {
    let journal = core.latest(vm).map_or(0, |handle| handle.row().cooperation.turn);
    let heard = sides.iter().flatten().map(VmView::turn).max().unwrap_or(0);
    let [source, _] = sides;
    let Some((source_pid, source_starts)) = source.as_ref().and_then(VmView::starts) else {
        return Err(Fault::new(
            StatusCode::CONFLICT,
            "baton:not-owner",
            "The source does not own the volumes",
            format!(
                "the backend of `{vm}` on {from} does not say how it is: see to it (a backend of an older version cannot), and ask again"
            ),
        )
        .before_all(&format!("the source {from} owns the volumes of `{vm}`")));
    };
    let turn = journal.max(heard) + 1;
    Ok(Cooperation { turn, source_pid, source_starts, ..Cooperation::default() })
}

/// The volumes, as the plan keeps them.
pub(super) fn members(disks: &[DiskView], engines: &[Engine]) -> Vec<Member> {
    let member = |(place, (disk, engine)): (usize, (&DiskView, &Engine))| Member {
        disk: disk.name.clone(),
        engine: *engine,
        storage: server(&disk.volume),
        volume: disk.volume.clone(),
        id: place as u64 + 1,
        progress: Progress::Planned,
        seen: Seen::Nothing,
        epoch: 0,
        next_epoch: 0,
    };
    disks.iter().zip(engines).enumerate().map(member).collect()
}

/// For people.
fn server(volume: &str) -> String {
    match volume.parse() {
        Ok(VolumeUri::Nbd(uri)) => uri.server.to_string(),
        _ => String::new(),
    }
}
