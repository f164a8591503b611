//! A handoff that stands in the access records and not in the journal: it was armed by
//! a coordinator whose journal is lost. The records say which it is, and which volume
//! decides it; the decision stays with that one, whoever asks for it.
//!
//! That one may have forgotten it: it was fenced alone, by hand, or was armed for another
//! handoff before the other volumes had learnt how this one ended. Then nothing decides it
//! any more: a volume that is armed for it is disarmed (`docs/decisions/0007-*`), and one
//! that the winner has opened is settled.

use std::sync::Arc;

use baton_protocol::handoff::Try;
use futures_util::future::join_all;

use super::core::Core;
use super::fault::Fault;
use super::fence::SETTLE_LIMIT;
use super::plan::Grant;
use super::storages::{HandoffView, Reclaimed, RecordView, StorageError};
use super::vm_view::VmView;
use super::vms::{Volume, volumes};

/// Puts the volume that decides in front, as the records say; before all others one that
/// cannot be read and may be it.
pub(super) fn anchor_first(volumes: &mut [Volume<'_>]) {
    let records = || volumes.iter().filter_map(|volume| volume.record.as_ref().ok());
    let named: Vec<String> = records().filter_map(handoff).map(|h| h.anchor.clone()).collect();
    let is_named = |record: &RecordView| named.contains(&record.volume);
    if named.is_empty() {
        return;
    }
    let found = records().any(is_named);
    volumes.sort_by_key(|volume| match &volume.record {
        Ok(record) => !is_named(record),
        Err(_) => found,
    });
}

/// Has the anchor decide what the dead owner could still win, and settles what is
/// decided. What is left to do, if a server did not answer; a handoff that the journal
/// knows, or of which nobody can say how it stands, is not touched.
pub(super) async fn end(core: &Core, volumes: &[Volume<'_>], dead: &str) -> Option<String> {
    let handoff = volumes.iter().find_map(|volume| handoff(volume.record.as_ref().ok()?))?;
    let of = Try { id: handoff.id.parse().ok()?, attempt: handoff.attempt };
    if core.handoff(of.id).is_some_and(|handle| !handle.row().state.is_over()) {
        return None;
    }
    let anchor = volumes.iter().find(|volume| {
        volume.record.as_ref().is_ok_and(|record| record.volume == handoff.anchor)
    })?;
    let decided = async {
        let grant = decide(core, anchor, of, handoff.to == dead).await?;
        let Some(grant) = grant else { return Ok(()) };
        tracing::warn!(handoff = %of.id, winner = grant.winner.name(), dead, "settled from the records; the journal does not know it");
        let settled = volumes.iter().map(|volume| settle(core, volume, of, &grant));
        join_all(settled).await.into_iter().collect()
    };
    let error = match tokio::time::timeout(SETTLE_LIMIT, decided).await {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error,
        Err(_) => "a storage server is slow".to_owned(),
    };
    Some(format!("handoff {} is not over at every volume: {error}", of.id))
}

/// Before the VM's next handoff is planned: what the one before has left at the volumes,
/// if the journal does not know it. Whether anything was done.
pub(super) async fn tidy(core: &Arc<Core>, view: &VmView) -> Result<bool, Fault> {
    let mut found = volumes(core, view).await?;
    let stands = |found: &[Volume<'_>]| {
        let records = found.iter().filter_map(|volume| volume.record.as_ref().ok());
        records.filter(|record| record.handoff.is_some()).count()
    };
    let before = stands(&found);
    if before == 0 {
        return Ok(false);
    }
    // Nobody is dead: what is decided is settled, and nothing else decided.
    if let Some(left) = end(core, &found, "").await {
        tracing::warn!(vm = view.name(), left, "an earlier handoff is not over");
    }
    found = volumes(core, view).await?;
    end_forgotten(core, &mut found).await;
    Ok(stands(&found) < before)
}

/// A volume, and the handoff that was ended there.
pub(super) struct Ended {
    pub(super) volume: String,
    pub(super) handoff: String,
}

/// Ends handoffs that nothing decides any more (see [`forgotten`]), under an owner that runs
/// on: it has the volume that decides, too. A volume that is armed is disarmed, one that the
/// winner has opened is settled; the records are as they are then. What is sealed or frozen
/// is left alone: the destination may have won before it was forgotten.
pub(super) async fn end_forgotten(core: &Core, volumes: &mut [Volume<'_>]) -> Vec<Ended> {
    let forgotten = forgotten(volumes).await;
    let owners: Vec<(String, Option<String>)> = volumes
        .iter()
        .filter_map(|volume| volume.record.as_ref().ok())
        .map(|record| (record.volume.clone(), record.owner.as_ref().map(|o| o.name.clone())))
        .collect();
    let mut ended = Vec::new();
    for volume in volumes {
        let Ok(record) = &volume.record else { continue };
        let Some(of) = handoff(record) else { continue };
        let Ok(id) = of.id.parse() else { continue };
        let owner = record.owner.as_ref().map(|owner| &owner.name);
        let has_both = owners.iter().any(|(id, name)| *id == of.anchor && name.as_ref() == owner);
        let known = core.handoff(id).is_some_and(|handle| !handle.row().state.is_over());
        if !forgotten.contains(&(of.id.clone(), of.attempt)) || !has_both || known {
            continue;
        }
        let attempt = Try { id, attempt: of.attempt };
        let (server, name) = (volume.server, &volume.name);
        let answer = match record.phase.as_str() {
            "armed" => server.disarm(attempt, name, core.term).await,
            "active" | "reclaimed" => match server.settle(attempt, None, name, core.term).await {
                Ok(_) => server.keep_former_out(name).await.map(drop),
                Err(error) => Err(error),
            },
            _ => continue,
        };
        let phase = &record.phase;
        match answer {
            Ok(()) => {
                tracing::warn!(
                    volume = name,
                    handoff = of.id,
                    phase,
                    "ended; the volume that decides does not know it any more"
                );
                ended.push(Ended { volume: name.clone(), handoff: of.id.clone() });
            }
            Err(error) => {
                let error = told(core, &error);
                tracing::warn!(volume = name, handoff = of.id, phase, error, "not ended");
            }
        }
        volume.record = server.access(name, None).await.map(|(_, record)| record);
    }
    ended
}

/// The handoffs that volumes are armed for and that the volume which decides them does not know any more. The anchor
/// is armed before all others, and an ARM that comes again is refused: nobody can win such a handoff.
pub(super) async fn forgotten(volumes: &[Volume<'_>]) -> Vec<(String, u32)> {
    let mut asked: Vec<(String, u32)> = Vec::new();
    let mut forgotten = Vec::new();
    let records = volumes.iter().filter_map(|volume| volume.record.as_ref().ok());
    for handoff in records.filter_map(handoff) {
        let key = (handoff.id.clone(), handoff.attempt);
        let anchor = volumes.iter().find(|volume| {
            volume.record.as_ref().is_ok_and(|record| record.volume == handoff.anchor)
        });
        let (Some(anchor), Ok(id)) = (anchor, handoff.id.parse()) else { continue };
        if asked.contains(&key) {
            continue;
        }
        asked.push(key.clone());
        let answer = anchor.server.proof(Try { id, attempt: handoff.attempt }, &anchor.name).await;
        if answer.is_err_and(|error| error.refusal() == "baton:no-such-handoff") {
            forgotten.push(key);
        }
    }
    forgotten
}

fn handoff(record: &RecordView) -> Option<&HandoffView> {
    record.handoff.as_ref().filter(|handoff| !handoff.anchor.is_empty())
}

/// The anchor's decision; `None`: there is none, and none is needed or to be had.
async fn decide(
    core: &Core,
    anchor: &Volume<'_>,
    of: Try,
    take_back: bool,
) -> Result<Option<Grant>, String> {
    let proof = match anchor.server.proof(of, &anchor.name).await {
        // Fenced, or armed for another since.
        Err(error) if error.refusal() == "baton:no-such-handoff" => return Ok(None),
        answer => answer.map_err(|error| told(core, &error))?,
    };
    if proof.is_some() || !take_back {
        return Ok(proof);
    }
    match anchor.server.reclaim(of, &anchor.name, core.term).await {
        Ok(Reclaimed::Source(grant)) => Ok(Some(grant)),
        // It has won meanwhile.
        Ok(Reclaimed::Lost) => {
            anchor.server.proof(of, &anchor.name).await.map_err(|error| told(core, &error))
        }
        Ok(Reclaimed::Unknown | Reclaimed::Foreign) => Ok(None),
        Err(error) => Err(told(core, &error)),
    }
}

async fn settle(core: &Core, volume: &Volume<'_>, of: Try, grant: &Grant) -> Result<(), String> {
    let settled = volume.server.settle(of, Some(grant), &volume.name, core.term).await;
    let settled = match settled {
        Ok(_) => volume.server.keep_former_out(&volume.name).await.map(drop),
        Err(error) => Err(error),
    };
    match settled {
        Ok(()) => Ok(()),
        // Not armed yet, or fenced.
        Err(error) if error.refusal() == "baton:no-such-handoff" => Ok(()),
        Err(error) => Err(format!("volume `{}`: {}", volume.name, told(core, &error))),
    }
}

fn told(core: &Core, error: &StorageError) -> String {
    if matches!(error, StorageError::StaleTerm(_)) {
        core.step_down("a storage server has heard a higher term");
    }
    error.to_string()
}
