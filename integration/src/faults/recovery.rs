//! When a Ceph cluster is of use again whose OSD or monitor was hurt.
//!
//! It takes its own time, which is no promise of Baton's: an OSD that was killed reads its disk, and lets requests wait
//! until the leases of its last life are over, 16 s, or longer where the machine is busy. What is to happen in time
//! afterwards counts from then.

use crate::ceph::Ceph;
use crate::daemon::Daemon;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// In which a cluster whose daemons run serves again.
const PATIENCE: Duration = Duration::from_secs(180);

/// See the module's documentation.
#[derive(Debug)]
pub struct Recovery {
    /// A question to all of it that waits for its answer.
    asked: Option<Daemon>,
    until: Option<Instant>,
    over: bool,
}

impl Recovery {
    /// Of a cluster that will be hurt, or will not.
    #[must_use]
    pub fn new(hurt: bool) -> Self {
        Self { asked: None, until: None, over: !hurt }
    }

    /// Whether the cluster serves; to be looked at when whoever was hurt may run again. Does not wait: who looks may be
    /// the one to start what died.
    pub fn is_over(&mut self, ceph: &Ceph) -> Result<bool> {
        if self.over {
            return Ok(true);
        }
        let until = *self.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        if Instant::now() > until {
            bail!(
                "the cluster does not serve {PATIENCE:?} after its accident:\n{}",
                ceph.osd.log()
            );
        }
        let asked = match &mut self.asked {
            Some(asked) => asked,
            None => self.asked.insert(ceph.ask_all_groups()?),
        };
        if !asked.is_running()? {
            self.over = asked.wait_exit(Duration::ZERO)?.success();
            // One that got no answer is asked again.
            self.asked = None;
        }
        Ok(self.over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baton::wait_until;
    use crate::ceph::skip_without_ceph;
    use crate::workspace::TestDir;

    #[test]
    fn a_frozen_osd_is_waited_for_and_nobody_else() {
        if skip_without_ceph("a_frozen_osd_is_waited_for_and_nobody_else") {
            return;
        }
        let dir = TestDir::new("recovery").unwrap();
        let ceph = Ceph::start(dir.path()).unwrap();
        ceph.osd.freeze().unwrap();
        assert!(Recovery::new(false).is_over(&ceph).unwrap());
        let mut recovery = Recovery::new(true);
        assert!(!recovery.is_over(&ceph).unwrap());
        ceph.osd.thaw().unwrap();
        wait_until("it serves", PATIENCE, || recovery.is_over(&ceph).unwrap()).unwrap();
        // Once is enough.
        ceph.osd.freeze().unwrap();
        assert!(recovery.is_over(&ceph).unwrap());
    }
}
