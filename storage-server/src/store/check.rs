//! The pool's invariants as one function, for tests and for an operator who doubts a pool.
//!
//! Looks at memory only: what is on disk became memory by `recovery`, which refuses what does not fit.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_protocol::VolumeId;
use thiserror::Error;

use super::core::Core;
use super::volume::{Volume, extent_of};
use super::{EXTENT_BYTES, layout::MAX_SLOTS};

/// A sound pool in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckReport {
    pub mapped_slots: u32,
    pub free_slots: u32,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum CheckError {
    #[error(
        "slot {slot} is mapped by extent {extent} of volume {volume} and also {other}; restore the pool"
    )]
    SlotTwice { slot: u32, volume: VolumeId, extent: u32, other: &'static str },
    #[error("slot {slot} of extent {extent} of volume {volume} does not exist; restore the pool")]
    SlotOutside { slot: u32, volume: VolumeId, extent: u32 },
    #[error("extent {extent} of volume {volume} lies behind the volume's end; restore the pool")]
    ExtentOutside { volume: VolumeId, extent: u32 },
    #[error(
        "extent {extent} of volume {volume} has {pins} users although nothing runs; report this as a bug"
    )]
    Pinned { volume: VolumeId, extent: u32, pins: u32 },
    #[error("slot {slot} is free twice; report this as a bug")]
    FreeTwice { slot: u32 },
    #[error("{lost} slots are neither mapped nor free; restart the server to get them back")]
    Lost { lost: u32 },
    #[error("{what} counts {counted} extents where {found} are mapped; report this as a bug")]
    Count { what: String, counted: u64, found: u64 },
}

pub(super) fn check<'a>(
    core: &Core,
    volumes: impl Iterator<Item = &'a Arc<Volume>>,
) -> Result<CheckReport, CheckError> {
    let mut owners: BTreeMap<u32, &'static str> = BTreeMap::new();
    let state = core.state();
    let (free, fresh) = state.slots.free_slots();
    for slot in free {
        if slot == 0 || slot > MAX_SLOTS || owners.insert(slot, "free").is_some() {
            return Err(CheckError::FreeTwice { slot });
        }
    }
    let free_slots = count(owners.len());
    for volume in volumes {
        check_volume(volume, fresh, &mut owners)?;
    }
    let mapped_slots = count(owners.len()) - free_slots;
    // A store may be syncing at any moment, also just after it was opened: its checkpoint does.
    let lost = (fresh - 1 - count(owners.len())).saturating_sub(state.slots.in_sync());
    if lost > 0 {
        return Err(CheckError::Lost { lost });
    }
    let used = state.slots.counts().used;
    if used != mapped_slots {
        return Err(CheckError::Count {
            what: "the pool".to_owned(),
            counted: used.into(),
            found: mapped_slots.into(),
        });
    }
    Ok(CheckReport { mapped_slots, free_slots })
}

fn check_volume(
    volume: &Volume,
    fresh: u32,
    owners: &mut BTreeMap<u32, &'static str>,
) -> Result<(), CheckError> {
    let id = volume.id();
    let end = extent_of(volume.size_bytes().next_multiple_of(EXTENT_BYTES));
    let mut first = Ok(());
    let mut found = 0;
    volume.map.for_each(|extent, slot, pins| {
        found += 1;
        let other = owners.insert(slot, "mapped elsewhere");
        let wrong = if let Some(other) = other {
            CheckError::SlotTwice { slot, volume: id, extent, other }
        } else if slot >= fresh {
            CheckError::SlotOutside { slot, volume: id, extent }
        } else if extent >= end {
            CheckError::ExtentOutside { volume: id, extent }
        } else if pins > 0 {
            CheckError::Pinned { volume: id, extent, pins }
        } else {
            return;
        };
        if first.is_ok() {
            first = Err(wrong);
        }
    });
    first?;
    let counted = volume.info().allocated_bytes / EXTENT_BYTES;
    if counted != found {
        return Err(CheckError::Count { what: format!("volume {id}"), counted, found });
    }
    Ok(())
}

fn count(len: usize) -> u32 {
    u32::try_from(len).expect("there are fewer than 2^32 slots")
}
