//! SEAL: the source has stopped and says what it sent; sealed is the volume when
//! all of that has arrived and is done.
//!
//! ```text
//!   record: seal seen -> wait until every count is reached (no lock)
//!     -> lock, gate closed and drained, record: sealed -> answer
//! ```
//!
//! What has all arrived when SEAL comes, which is the rule, is sealed on the spot
//! and without the first step ([`RunningVolume::begin_seal`]).
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

use super::change::{Begun, ChangeError, Control, Waiting};
use super::{Request, RunningVolume, Seat};

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

struct Waiter<'a>(&'a Arrivals);

impl<'a> Waiter<'a> {
    fn new(arrivals: &'a Arrivals) -> Self {
        arrivals.waiting.fetch_add(1, Ordering::AcqRel);
        Self(arrivals)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A SEAL that was begun.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one lives for a moment, on a stack")]
pub enum Sealing {
    /// The record as it is now: sealed, or noted where that was all there was to do.
    Done(AccessRecord),
    /// It waits; [`RunningVolume::finish_seal`].
    Waits(SealWait),
}

/// What a SEAL waits for.
#[derive(Debug)]
pub struct SealWait {
    attempt: Try,
    session: SessionId,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For the record to note it.
    Noting(Waiting, Vec<Count>),
    /// For what the source sent.
    Arriving(Seats),
    /// For requests inside, or the disk.
    Closing(Waiting),
}

impl SealWait {
    /// Of which handoff.
    #[must_use]
    pub fn attempt(&self) -> Try {
        self.attempt
    }

    /// Whether it may be dropped: nothing was granted that must be carried through.
    #[must_use]
    pub fn may_be_given_up(&self) -> bool {
        matches!(self.stage, Stage::Arriving(_))
    }
}

/// How far each queue has to get, and its place.
type Seats = Vec<(Count, Option<Arc<Seat>>)>;

fn seats(control: &mut Control, counts: &[Count]) -> Seats {
    counts.iter().map(|count| (*count, control.seat(count.queue))).collect()
}

fn is_reached(seats: &Seats) -> bool {
    seats.iter().all(|(count, seat)| {
        count.is_reached(seat.as_ref().map_or_else(Default::default, |s| s.arrived()))
    })
}

impl RunningVolume {
    /// Seals the volume for `session` if everything in `counts` has arrived and
    /// nothing is to be waited for; otherwise says what is.
    ///
    /// # Errors
    /// [`ChangeError`]; the volume is not sealed by this.
    pub fn begin_seal(
        &self,
        mut control: OwnedMutexGuard<Control>,
        attempt: Try,
        session: SessionId,
        counts: &[Count],
    ) -> Result<Sealing, ChangeError> {
        let wait = |stage| Ok(Sealing::Waits(SealWait { attempt, session, stage }));
        let seats = seats(&mut control, counts);
        if is_reached(&seats) {
            fault_point::at("seal.requested");
            return match self.begin(control, Request::Sealed { attempt, session })? {
                Begun::Made(_, record) => Ok(Sealing::Done(record)),
                Begun::Waits(waiting) => wait(Stage::Closing(waiting)),
            };
        }
        match self.begin(control, Request::Seal { attempt, session })? {
            Begun::Made(..) => {
                fault_point::at("seal.requested");
                wait(Stage::Arriving(seats))
            }
            Begun::Waits(waiting) => wait(Stage::Noting(waiting, counts.to_vec())),
        }
    }

    /// Waits for what a SEAL waits for, and seals the volume.
    ///
    /// # Errors
    /// [`ChangeError`]; the volume is not sealed by this.
    ///
    /// # Cancel safety
    /// Given up while it waits for what the source sent, it has done no more than
    /// to note that a seal was asked for.
    pub async fn finish_seal(
        self: &Arc<Self>,
        wait: SealWait,
    ) -> Result<AccessRecord, ChangeError> {
        let SealWait { attempt, session, stage } = wait;
        let seats = match stage {
            Stage::Closing(waiting) => {
                return self.finish(waiting).await.map(|(_, record)| record);
            }
            Stage::Noting(waiting, counts) => {
                let (mut control, _) = self.finish(waiting).await?;
                fault_point::at("seal.requested");
                seats(&mut control, &counts)
            }
            Stage::Arriving(seats) => seats,
        };
        let mut watch = self.watch();
        let _waiter = Waiter::new(&self.arrivals);
        let mut asked = false;
        loop {
            let mut came = pin!(self.arrivals.came.notified());
            came.as_mut().enable();
            if is_reached(&seats) {
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
