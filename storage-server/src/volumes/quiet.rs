//! News that nobody waits for.
//!
//! A destination knows what it was granted, and its source has stopped: what OPEN
//! and ACTIVATE changed is told to both a little later, all volumes together. With
//! 64 volumes the telling, and the losing side's leaving, were more work for the
//! server than the handoff itself, while the guest waited for its first answers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_protocol::VolumeId;

use super::Announcer;

/// How much later: longer than a VM with many disks takes to start its rings.
const QUIET: Duration = Duration::from_millis(50);

/// See the module's documentation.
pub(crate) struct Quiet {
    announce: Announcer,
    runtime: tokio::runtime::Handle,
    /// Volumes with news; a task tells of them unless there are none.
    untold: Mutex<BTreeSet<VolumeId>>,
}

impl Quiet {
    /// Inside a runtime.
    pub(super) fn new(announce: Announcer) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { announce, runtime, untold: Mutex::default() }
    }

    /// Announces news of this volume soon.
    pub(super) fn announce(self: &Arc<Self>, volume: VolumeId) {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = untold.is_empty();
        untold.insert(volume);
        drop(untold);
        if is_first {
            let quiet = Arc::clone(self);
            self.runtime.spawn(async move {
                tokio::time::sleep(QUIET).await;
                quiet.tell();
            });
        }
    }

    fn tell(&self) {
        let untold = {
            let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *untold)
        };
        for volume in untold {
            self.announce.to_all(volume);
        }
    }
}
