//! A place for one connection at a (session, queue), and its window.
//!
//! One connection at a time holds the [`Lease`] of a place. The next one gets it
//! only when the holder is dead: its socket closed and everything it had admitted
//! finished. That is what keeps a request of the old connection from running
//! after one of the new. The window goes from holder to holder, so that what the
//! old connection completed is not run again.
//!
//! The seat also knows how far its holder has got, for SEAL: what was *carried
//! in* was admitted or answered. That begins again with each holder, because the
//! client sends again whatever it has no answer for; without a holder it is zero.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_protocol::Seq;
use baton_protocol::window::Window;
use tokio::sync::Notify;

/// Ends a connection: tells its worker to. Must return soon.
pub type Killer = Arc<dyn Fn() + Send + Sync>;

/// The place of a (session, queue).
#[derive(Default)]
pub struct Seat {
    state: Mutex<State>,
    freed: Notify,
    /// Highest number that the holder has carried in. Written by the holder.
    arrived: AtomicU64,
}

#[derive(Default)]
struct State {
    /// `None` before the first holder and while somebody holds the lease.
    window: Option<Box<Window>>,
    held: bool,
    /// How to end the holder, once it runs.
    killer: Option<Killer>,
    /// The newest asker; older ones give up.
    newest: u64,
}

/// Why a seat was not had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSeat {
    /// A newer connection of the same queue wants it.
    Overtaken,
    /// The old connection has admitted requests that do not end.
    StillBusy,
}

/// The right to serve the queue. Dropping it frees the seat.
pub struct Lease {
    seat: Arc<Seat>,
    window: Option<Box<Window>>,
}

impl Seat {
    /// Ends the holder if there is one, waits until it is gone, and takes over.
    /// `resume_from` is the lowest number the client may still send.
    ///
    /// # Errors
    /// [`NoSeat`] when somebody newer came, or the holder did not end within
    /// `patience`. It is ended all the same.
    ///
    /// # Cancel safety
    /// Nothing is held before this returns.
    pub async fn take(
        self: &Arc<Self>,
        resume_from: Seq,
        patience: Duration,
    ) -> Result<Lease, NoSeat> {
        let ticket = {
            let mut state = self.state();
            state.newest += 1;
            state.newest
        };
        // Older askers look again and give up.
        self.freed.notify_waiters();
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let killer = {
                let mut state = self.state();
                if state.newest != ticket {
                    return Err(NoSeat::Overtaken);
                }
                if !state.held {
                    return Ok(self.lease(&mut state, resume_from));
                }
                state.killer.take()
            };
            if let Some(kill) = killer {
                kill();
            }
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                return Err(NoSeat::StillBusy);
            }
        }
    }

    /// [`Seat::take`] if nobody holds it.
    #[must_use]
    pub fn try_take(self: &Arc<Self>, resume_from: Seq) -> Option<Lease> {
        let lease = {
            let mut state = self.state();
            if state.held {
                return None;
            }
            state.newest += 1;
            self.lease(&mut state, resume_from)
        };
        // Older askers look again and give up.
        self.freed.notify_waiters();
        Some(lease)
    }

    fn lease(self: &Arc<Self>, state: &mut State, resume_from: Seq) -> Lease {
        state.held = true;
        let window = state.window.take();
        let mut window = window.unwrap_or_else(|| Box::new(Window::starting_at(resume_from)));
        window.forget_below(resume_from);
        self.arrived.store(resume_from.0.saturating_sub(1), Ordering::Release);
        Lease { seat: Arc::clone(self), window: Some(window) }
    }

    /// The holder starts to run, by `start`; `killer` ends it. Nobody can use the
    /// killer before `start` has returned. `start` must not drop the lease.
    pub fn runs(&self, killer: Killer, start: impl FnOnce()) {
        {
            let mut state = self.state();
            start();
            state.killer = Some(killer);
        }
        // Who asked before there was a killer looks again.
        self.freed.notify_waiters();
    }

    /// The highest number that was carried in; everything below was, too.
    #[must_use]
    pub fn arrived(&self) -> Seq {
        Seq(self.arrived.load(Ordering::Acquire))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// The window of the queue.
    pub fn window(&mut self) -> &mut Window {
        self.window.as_mut().expect("taken only by drop")
    }

    /// Everything up to `seq` was carried in. Once per turn of the connection.
    pub fn carried_in(&self, seq: Seq) {
        // One writer: no locked instruction is needed.
        if seq.0 > self.seat.arrived.load(Ordering::Relaxed) {
            self.seat.arrived.store(seq.0, Ordering::Release);
        }
    }

    /// The place it is for.
    #[must_use]
    pub fn seat(&self) -> Arc<Seat> {
        Arc::clone(&self.seat)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        {
            let mut state = self.seat.state();
            state.window = self.window.take();
            self.seat.arrived.store(0, Ordering::Release);
            state.held = false;
            state.killer = None;
        }
        self.seat.freed.notify_waiters();
    }
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").field("held", &self.state().held).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::window::Arrival;
    use std::sync::atomic::AtomicU32;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_next_holder_waits_for_the_last_and_gets_its_window() {
        let seat = Arc::new(Seat::default());
        let mut old = seat.take(Seq(1), PATIENCE).await.expect("free");
        old.window().complete(Seq(3));
        let kills = Arc::new(AtomicU32::new(0));
        let killer = Arc::new({
            let kills = Arc::clone(&kills);
            move || {
                kills.fetch_add(1, Ordering::SeqCst);
            }
        });
        seat.runs(killer, || ());
        let short = seat.take(Seq(1), Duration::from_millis(20)).await;
        assert_eq!(short.expect_err("held"), NoSeat::StillBusy);
        assert_eq!(kills.load(Ordering::SeqCst), 1);
        let next = tokio::spawn({
            let seat = Arc::clone(&seat);
            async move { seat.take(Seq(2), PATIENCE).await }
        });
        tokio::task::yield_now().await;
        drop(old);
        let mut next = next.await.expect("no panic").expect("free now");
        assert_eq!(seat.arrived(), Seq(1), "what the client has the answers of");
        next.carried_in(Seq(4));
        next.carried_in(Seq(3));
        assert_eq!(seat.arrived(), Seq(4));
        assert_eq!(next.window().arrive(Seq(3)), Arrival::Done);
        assert_eq!(next.window().arrive(Seq(1)), Arrival::TooOld);
        drop(next);
        assert_eq!(seat.arrived(), Seq(0), "what is unanswered will be sent again");
    }

    #[tokio::test]
    async fn the_newest_asker_wins() {
        let seat = Arc::new(Seat::default());
        let holder = seat.take(Seq(1), PATIENCE).await.expect("free");
        let ask = || {
            let seat = Arc::clone(&seat);
            tokio::spawn(async move { seat.take(Seq(1), PATIENCE).await })
        };
        let first = ask();
        tokio::task::yield_now().await;
        let second = ask();
        assert_eq!(first.await.expect("no panic").expect_err("older"), NoSeat::Overtaken);
        drop(holder);
        assert!(second.await.expect("no panic").is_ok());
    }
}
