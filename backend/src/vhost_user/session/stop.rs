//! How rings stop: one by one as the front-end asks, all at once during a migration, and what is waited for.
//!
//! Front-ends stop rings one by one. While a dirty log is kept, the first stop begins to drain all of them, so that the
//! drains overlap and nothing new is sent to the storage from then on. A ring drained early runs on for the front-end:
//! it answers its own stop, and starts again when it is enabled or gets a kick event instead. No front-end of a block
//! device stops one ring in the middle of a migration and goes on with the others.

use std::time::{Duration, Instant};

use baton_remote_client::VolumeState;

use super::Session;
use crate::handoff::MemberHandle;
use crate::queue::mailbox::DrainState;
use crate::vhost_user::features::virtio;

/// How often a waiting drain looks at whether it still should wait.
const DRAIN_TICK: Duration = Duration::from_millis(50);

/// Rings that stop with less than this between them stop for one reason.
const STOPPING_TOGETHER: Duration = Duration::from_secs(1);

/// How the stop of all rings went, since a ring last started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// No ring was stopped that counts.
    None,
    /// The front-end stopped rings while a dirty log was kept, and no request
    /// was given up.
    Clean,
    /// Requests were given up.
    Abandoned,
}

/// How the wait for a drain ends early.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "a closure has nothing to show")]
pub struct DrainLimit<'a> {
    /// The front-end is gone or the process is ending: wait no longer than
    /// `grace` from then on.
    pub hurry: &'a dyn Fn() -> bool,
    /// What a drain may take when in a hurry, and when storage does not answer
    /// and the in-flight table keeps the requests.
    pub grace: Duration,
}

impl Session<'_> {
    /// Stops all rings: the front-end is gone or the process ends.
    pub fn end(&mut self, limit: DrainLimit<'_>) {
        if self.is_running() {
            // The front-end has no answer to the stop of these.
            self.stop = Stop::None;
        }
        self.drain_all();
        for index in 0..self.rings.len() {
            self.stop(index, limit);
        }
        // Nobody said that the guest has stopped.
        self.tell_stopped(false);
        self.log = None;
        self.show_status();
    }

    /// A dirty log is kept.
    pub(super) fn is_migrating(&self) -> bool {
        self.log.is_some() && self.features & virtio::LOG_ALL != 0
    }

    /// The front-end stops a ring, and during a migration means all of them.
    pub(super) fn stop_asked(&mut self, index: usize, limit: DrainLimit<'_>) {
        let migrating = self.is_migrating();
        if !self.rings[index].running {
            return;
        }
        if migrating {
            // First: a queue that is drained says what it has sent if it is held by then, and is not woken again for it.
            self.tell_stopped(true);
            self.drain_all();
        }
        self.stop(index, limit);
        if !self.is_running() {
            self.tell_stopped(migrating);
            // What was given up is not answered, and may still be done.
            if let Some(member) = self.disk.member.as_ref().filter(|_| self.stop != Stop::Abandoned)
            {
                member.drained();
            }
        }
        if migrating && self.stop == Stop::None {
            self.stop = Stop::Clean;
        }
    }

    fn tell_stopped(&mut self, migrating: bool) {
        if std::mem::take(&mut self.told_running)
            && let Some(member) = &self.disk.member
        {
            member.stopped(migrating);
        }
    }

    /// Begins to drain every ring that runs.
    fn drain_all(&mut self) {
        for (ring, queue) in self.rings.iter_mut().zip(self.queues) {
            if ring.running && ring.draining.is_none() {
                ring.draining = Some(queue.drain());
            }
        }
    }

    /// Stops a ring when everything in flight has been answered. While storage
    /// does not answer, requests that the in-flight table keeps are given up
    /// after a while, to be done again when the ring starts; during a migration
    /// they are waited for, because the table does not move with the guest.
    pub(super) fn stop(&mut self, index: usize, limit: DrainLimit<'_>) {
        if !std::mem::take(&mut self.rings[index].running) {
            return;
        }
        let queue = &self.queues[index];
        let draining = self.rings[index].draining.take().unwrap_or_else(|| queue.drain());
        let now = Instant::now();
        let begun = match self.stopping {
            Some((begun, latest)) if now.duration_since(latest) < STOPPING_TOGETHER => begun,
            _ => now,
        };
        let next_avail = loop {
            if let DrainState::Stopped(next_avail) = draining.wait(DRAIN_TICK) {
                break next_avail;
            }
            let never = matches!(self.disk.volume.state(), VolumeState::Fenced | VolumeState::Lost);
            let migrating = self.is_migrating();
            let may_give_up = (self.rings[index].kept && !migrating) || (limit.hurry)();
            // Who waits for a decision need not be answered by the end.
            let held = self.disk.member.as_ref().is_some_and(MemberHandle::is_held);
            let soon = held && (limit.hurry)();
            if never || soon || (may_give_up && begun.elapsed() > limit.grace) {
                tracing::warn!(
                    disk = self.disk.name,
                    queue = index,
                    "stopping a ring whose requests the storage has not answered"
                );
                self.stop = Stop::Abandoned;
                let next_avail = queue.abandon();
                if let Some(member) = &self.disk.member {
                    member.given_up();
                }
                break next_avail;
            }
        };
        self.stopping = Some((begun, Instant::now()));
        if let Some(next_avail) = next_avail {
            self.rings[index].base = next_avail;
        }
        tracing::debug!(disk = self.disk.name, queue = index, "ring stopped");
    }
}
