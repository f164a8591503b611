//! A change of an access record: the one place that applies a [`Step`].
//!
//! ```text
//!   store First -> gate closed and drained, opened for the new record
//!     -> replaced in memory -> watchers told -> (the caller answers)
//! ```
//!
//! A change that needs neither the disk nor a wait for requests inside is made
//! where it is asked for: SEAL and ACTIVATE of fast mode are inside a VM's
//! blackout. Any other is made on a thread of its own, and carried through even
//! if whoever asked goes away.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use baton_fault_point as fault_point;
use baton_protocol::access::{AccessRecord, Refusal, Step, Store};
use baton_protocol::{EventKind, QueueId, SessionId};
use tokio::sync::OwnedMutexGuard;

use crate::metrics::{AccessMetrics, AccessStep, StepResult};
use crate::store::VolumeError;

use super::request::Facts;
use super::{QUEUES_MAX, Request, RunningVolume, Seat};

/// What only one task at a time may change.
#[derive(Debug)]
pub struct Control {
    /// The access record.
    pub record: AccessRecord,
    /// Seats of the current owner's queues.
    seats: HashMap<QueueId, Arc<Seat>>,
}

/// Why an access record did not change.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The record says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be made durable.
    #[error("the access record could not be stored; see the server's log")]
    Store(#[source] VolumeError),
    /// The volume is gone.
    #[error("the volume was deleted")]
    Deleted,
    /// The server is stopping.
    #[error("the server is going away")]
    Stopped,
}

impl Control {
    pub(super) fn new(record: AccessRecord) -> Self {
        Self { record, seats: HashMap::new() }
    }

    /// The seat of one of the owner's queues, or `None` when the session has too
    /// many queues.
    pub fn seat(&mut self, queue: QueueId) -> Option<Arc<Seat>> {
        if self.seats.len() >= QUEUES_MAX && !self.seats.contains_key(&queue) {
            return None;
        }
        Some(Arc::clone(self.seats.entry(queue).or_default()))
    }
}

/// How far a change got without a wait.
#[derive(Debug)]
pub enum Begun {
    /// Made, or the record was so already.
    Made(OwnedMutexGuard<Control>, AccessRecord),
    /// Granted. It must be carried through by [`RunningVolume::finish`]: the gate
    /// may be closed for it already.
    Waits(Waiting),
}

/// A granted change that has to wait for the disk or for requests inside.
#[derive(Debug)]
#[must_use = "a granted change is to be carried through"]
pub struct Waiting {
    control: OwnedMutexGuard<Control>,
    change: Change,
}

/// A granted change that is to be carried out.
#[derive(Debug)]
struct Change {
    request: Request,
    step: Step,
}

impl Change {
    /// The gate must be closed and drained. For SEALED before it is stored: what
    /// is durable then is that nothing comes any more.
    fn closes(&self) -> bool {
        self.step.reopen || self.is_sealed()
    }

    fn is_sealed(&self) -> bool {
        matches!(self.request, Request::Sealed { .. })
    }
}

impl RunningVolume {
    /// Asks the record. When it changes, the change is as durable as it must be
    /// and everything of the old epoch has drained when this returns.
    ///
    /// # Errors
    /// [`ChangeError`] when the record stays as it is.
    ///
    /// # Cancel safety
    /// A change that has begun is carried through.
    pub async fn change(self: &Arc<Self>, request: Request) -> Result<AccessRecord, ChangeError> {
        let control = self.control().await;
        self.change_locked(control, request).await.map(|(_, record)| record)
    }

    /// [`RunningVolume::change`] for who holds the control; gives it back.
    ///
    /// # Errors
    /// [`ChangeError`] when the record stays as it is.
    pub async fn change_locked(
        self: &Arc<Self>,
        control: OwnedMutexGuard<Control>,
        request: Request,
    ) -> Result<(OwnedMutexGuard<Control>, AccessRecord), ChangeError> {
        match self.begin(control, request)? {
            Begun::Made(control, record) => Ok((control, record)),
            Begun::Waits(waiting) => self.finish(waiting).await,
        }
    }

    /// [`RunningVolume::change_locked`] as far as it goes without a wait: for
    /// threads that must not block.
    ///
    /// # Errors
    /// [`ChangeError`] when the record stays as it is.
    pub fn begin(
        &self,
        mut control: OwnedMutexGuard<Control>,
        request: Request,
    ) -> Result<Begun, ChangeError> {
        if self.is_deleted() {
            return Err(ChangeError::Deleted);
        }
        let facts = Facts {
            boot_id: self.common.boot_id,
            generation: self.common.store.durability_generation(),
        };
        let metrics = &self.common.metrics;
        let step = match control.record.step(request.input(facts)) {
            Ok(step) => step,
            Err(refusal) => {
                metrics.stepped(request.step(), StepResult::Refused);
                return Err(refusal.into());
            }
        };
        if !step.changed {
            metrics.stepped(request.step(), StepResult::Same);
            return Ok(Begun::Made(control, step.record));
        }
        let change = Change { request, step };
        let at_once =
            change.step.store != Store::First && (!change.closes() || self.gate.try_close());
        if at_once {
            self.carry_out(&mut control, &change).map_err(ChangeError::Store)?;
            return Ok(Begun::Made(control, change.step.record));
        }
        Ok(Begun::Waits(Waiting { control, change }))
    }

    /// Carries through what [`RunningVolume::begin`] granted.
    ///
    /// # Errors
    /// [`ChangeError`] when it could not be stored.
    ///
    /// # Cancel safety
    /// Carried through once this was polled.
    pub async fn finish(
        self: &Arc<Self>,
        waiting: Waiting,
    ) -> Result<(OwnedMutexGuard<Control>, AccessRecord), ChangeError> {
        let Waiting { mut control, change } = waiting;
        let volume = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            volume.carry_out(&mut control, &change)?;
            Ok((control, change.step.record))
        })
        .await
        .map_err(|_| ChangeError::Stopped)?
        .map_err(ChangeError::Store)
    }

    /// Waits for the disk and for requests inside, where there is something to
    /// wait for.
    fn carry_out(&self, control: &mut Control, change: &Change) -> Result<(), VolumeError> {
        let Change { request, step } = change;
        if change.is_sealed() {
            self.drain("a seal");
            fault_point::at("seal.closed");
        }
        if step.store == Store::First {
            let begun = Instant::now();
            let stored = self.common.keeper.now(&self.kept, &step.record);
            AccessMetrics::waited(&self.common.metrics.storing_us, begun);
            if let Err(error) = stored {
                if change.is_sealed() {
                    self.open_for(&control.record);
                }
                return Err(error);
            }
            match request.step() {
                AccessStep::Arm => fault_point::at("arm.stored"),
                AccessStep::Reclaim => fault_point::at("reclaim.stored"),
                AccessStep::Settle => fault_point::at("settle.stored"),
                AccessStep::Fence => fault_point::at("fence.stored"),
                _ => {}
            }
        }
        if step.reopen {
            self.drain("a change of access");
        }
        if change.closes() {
            self.open_for(&step.record);
        }
        self.adopt(control, change);
        Ok(())
    }

    fn adopt(&self, control: &mut Control, change: &Change) {
        let Change { request, step } = change;
        let record = &step.record;
        let owner = |record: &AccessRecord| -> Option<SessionId> {
            record.owner.as_ref().map(|owner| owner.session)
        };
        if owner(record) != owner(&control.record) {
            // Who holds them keeps its lease, but nobody asks for it again.
            control.seats.clear();
        }
        let moved = record.epoch != control.record.epoch;
        self.epoch.store(record.epoch.0, Ordering::Release);
        control.record = record.clone();
        self.shown.send_replace(Arc::new(record.clone()));
        if step.store == Store::Later {
            self.common.keeper.soon(&self.kept, record.clone());
        }
        self.audit.note(record, request.step().name(), request.who());
        self.common.metrics.stepped(request.step(), StepResult::Changed);
        if moved {
            self.events.publish(EventKind::EpochChanged, record.epoch.0);
        }
        match request.step() {
            // The winner knows it, and the guest waits for its first answers.
            AccessStep::Activate | AccessStep::Open => self.common.quiet.announce(self.id()),
            // Only those who wait to hear it have anything to do then, and the guest stands still.
            AccessStep::Seal | AccessStep::Sealed => self.announce_to_listeners(),
            _ => self.announce(),
        }
    }
}
