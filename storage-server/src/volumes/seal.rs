//! SEAL: the source has stopped and says what it sent; sealed is the volume when
//! all of that has arrived and is done.
//!
//! ```text
//!   record: seal seen -> wait until every count is reached (no lock)
//!     -> lock, gate closed and drained, record: sealed -> answer
//! ```
//!
//! Nothing is held while it waits, so a RECLAIM or a fence overtakes it: it then
//! ends with what the record says.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_fault_point as fault_point;
use baton_protocol::SessionId;
use baton_protocol::access::{AccessRecord, Input, Phase, Refusal};
use baton_protocol::handoff::{Count, Try};
use tokio::sync::{Notify, OwnedMutexGuard};

use super::change::{ChangeError, Control};
use super::{Request, RunningVolume};

/// Wakes SEALs that wait for requests to arrive.
///
/// A waiter counts itself, has the workers look at the volume's connections, and
/// looks again whenever it is woken. A turn of a worker after that look sees the
/// count; what a turn before it stored, the waiter sees because that turn comes
/// before the worker's answer to the look. So a turn pays for one plain load.
#[derive(Debug, Default)]
pub struct Arrivals {
    waiting: AtomicUsize,
    came: Notify,
}

impl Arrivals {
    /// Something may have arrived: after each turn of an owner's connection.
    pub fn look(&self) {
        if self.waiting.load(Ordering::Acquire) != 0 {
            self.came.notify_waiters();
        }
    }
}

struct Waiting<'a>(&'a Arrivals);

impl<'a> Waiting<'a> {
    fn new(arrivals: &'a Arrivals) -> Self {
        arrivals.waiting.fetch_add(1, Ordering::AcqRel);
        Self(arrivals)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl RunningVolume {
    /// Seals the volume for `session` when everything in `counts` has arrived.
    ///
    /// # Errors
    /// [`ChangeError`]; the volume is not sealed by this.
    ///
    /// # Cancel safety
    /// Given up while it waits, it has done no more than to note that a seal was
    /// asked for.
    pub async fn seal(
        self: &Arc<Self>,
        control: OwnedMutexGuard<Control>,
        attempt: Try,
        session: SessionId,
        counts: &[Count],
    ) -> Result<AccessRecord, ChangeError> {
        let (mut control, _) =
            self.change_locked(control, Request::Seal { attempt, session }).await?;
        fault_point::at("seal.requested");
        let seats: Vec<_> =
            counts.iter().map(|count| (*count, control.seat(count.queue))).collect();
        drop(control);
        let is_reached = || {
            seats.iter().all(|(count, seat)| {
                count.is_reached(seat.as_ref().map_or_else(Default::default, |s| s.arrived()))
            })
        };
        let mut watch = self.watch();
        let _waiting = Waiting::new(&self.arrivals);
        let mut asked = false;
        loop {
            let mut came = pin!(self.arrivals.came.notified());
            came.as_mut().enable();
            if is_reached() {
                let control = self.control().await;
                let sealed = Request::Sealed { attempt, session };
                return self.change_locked(control, sealed).await.map(|(_, record)| record);
            }
            if self.is_deleted() {
                return Err(ChangeError::Deleted);
            }
            let record = Arc::clone(&watch.borrow_and_update());
            let step = record.step(Input::Sealed { attempt, session })?;
            if !step.changed {
                return Ok(step.record);
            }
            if record.phase == Phase::Frozen {
                // What had arrived before the restart is not known any more.
                return Err(Refusal::NotSealed.into());
            }
            if !asked {
                asked = true;
                self.announce();
            }
            tokio::select! {
                () = came => {}
                _ = watch.changed() => {}
            }
        }
    }
}
