//! OPEN: the winner's connection becomes one that may write, once no old connection of
//! its queue has anything under way.

use std::sync::Arc;
use std::time::Duration;

use baton_fault_point as fault_point;
use baton_protocol::handoff::Open;
use baton_protocol::{Epoch, QueueId, RequestHeader, Seq, SessionId, Status};
use tokio::sync::OwnedMutexGuard;

use crate::volumes::{Begun, Control, Request, RunningVolume, Seat};

use super::super::Context;
use super::super::conn::{Conn, Place};
use super::answer::{Asked, Kind, Reply, failure};
use super::turn::Entry;
use super::{Changed, Sender};

/// How long OPEN waits for an old connection of its queue.
const PATIENCE: Duration = Duration::from_secs(30);

impl Context {
    /// The winner shows the anchor's decision. What is behind it on this
    /// connection waits, if it has to.
    pub(in super::super) fn open(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        open: Open,
    ) {
        self.lend(conn);
        let (queue, session, seq) = (header.queue, header.session, header.seq);
        let entry = conn.asks.turns.enter(volume);
        let from = Sender::of(conn, session);
        let volume = Arc::clone(volume);
        let held = match &conn.place {
            Place::Owner(lease) => Some(lease.seat()),
            Place::Other(_) => None,
        };
        let opening = Opening { queue, session, seq, held };
        let reply = self.reply_to(conn, header, Kind::Open(None));
        let request = Request::Open { open, session };
        match entry {
            Entry::Now(_) if !from.is_heard(&volume) => {
                let asked = reply.with(Status::StaleEpoch, Vec::new());
                self.tell(conn, asked);
            }
            Entry::Now(control) => match volume.begin(control, request) {
                Ok(Begun::Waits(waiting)) => {
                    conn.asks.opening = true;
                    self.setup.runtime.spawn(async move {
                        let changed = volume.finish(waiting).await;
                        opening.carry_on(&volume, changed, reply).await;
                    });
                }
                Ok(Begun::Made(control, record)) => {
                    match opening.seat_now(control, record.epoch, reply) {
                        Ok(asked) => self.tell(conn, asked),
                        Err((seat, reply)) => {
                            conn.asks.opening = true;
                            self.setup.runtime.spawn(async move {
                                opening.take_seat(&volume, seat, reply).await;
                            });
                        }
                    }
                }
                Err(error) => {
                    let status = failure(&volume, &error);
                    let asked = reply.with(status, Vec::new());
                    self.tell(conn, asked);
                }
            },
            Entry::Later(turn) => {
                conn.asks.opening = true;
                self.setup.runtime.spawn(async move {
                    let control = turn.control(&volume).await;
                    if !from.is_heard(&volume) {
                        return reply.send(Status::StaleEpoch, Vec::new());
                    }
                    let changed = volume.change_locked(control, request).await;
                    opening.carry_on(&volume, changed, reply).await;
                });
            }
        }
    }
}

/// An OPEN.
struct Opening {
    queue: QueueId,
    session: SessionId,
    seq: Seq,
    /// What the connection has already.
    held: Option<Arc<Seat>>,
}

impl Opening {
    async fn carry_on(self, volume: &RunningVolume, changed: Changed, reply: Reply) {
        let mailbox = Arc::clone(&reply.mailbox);
        match changed {
            Ok((control, record)) => match self.seat_now(control, record.epoch, reply) {
                Ok(asked) => mailbox.answer(asked),
                Err((seat, reply)) => self.take_seat(volume, seat, reply).await,
            },
            Err(error) => reply.send(failure(volume, &error), Vec::new()),
        }
    }

    /// Answers if there is no old connection to wait for; else the place to wait for.
    fn seat_now(
        &self,
        mut control: OwnedMutexGuard<Control>,
        epoch: Epoch,
        mut reply: Reply,
    ) -> Result<Asked, (Arc<Seat>, Reply)> {
        fault_point::at("open.stepped");
        let Some(seat) = control.seat(self.queue) else {
            return Ok(reply.with(Status::NotPermitted, Vec::new()));
        };
        let lease = if self.held.as_ref().is_some_and(|held| Arc::ptr_eq(held, &seat)) {
            None
        } else {
            match seat.try_take(self.seq) {
                Some(lease) => Some(lease),
                None => return Err((seat, reply)),
            }
        };
        if lease.is_some() {
            seat.runs(reply.killer(), || ());
        }
        reply.kind = Kind::Open(Some((epoch, lease)));
        Ok(reply.with(Status::Ok, Vec::new()))
    }

    /// Waits for an old connection, not under the lock: a fence must not wait for it.
    async fn take_seat(&self, volume: &RunningVolume, seat: Arc<Seat>, mut reply: Reply) {
        let Ok(lease) = seat.take(self.seq, PATIENCE).await else {
            return reply.send(Status::Busy, Vec::new());
        };
        let now = volume.control().await.record.clone();
        if now.owner.as_ref().is_none_or(|owner| owner.session != self.session) {
            return reply.send(Status::StaleEpoch, Vec::new());
        }
        let killer = reply.killer();
        reply.kind = Kind::Open(Some((now.epoch, Some(lease))));
        seat.runs(killer, || reply.send(Status::Ok, Vec::new()));
    }
}
