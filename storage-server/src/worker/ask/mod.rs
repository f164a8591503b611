//! What a connection asks of the access record: HANDOFF, OPEN, RELEASE, and
//! ACCESS, which waits for news of it.
//!
//! What needs neither the disk nor a wait is answered by the worker that read it:
//! in fast mode all of a VM's blackout. Anything else is asked in a task, and the
//! answer comes by mailbox. Requests of one connection reach the record in their
//! order: one that has to wait takes its place in the record's queue before the
//! next one starts ([`Turns::enter`]). A SEAL gives up its turn once it is noted,
//! so that a RECLAIM behind it overtakes its wait.
//!
//! A process whose successor has said HELLO is not heard any more: a late RECLAIM
//! or ACTIVATE of a dead backend would win for a session that nobody is.

mod answer;
mod open;
mod seal;
mod turn;

use std::sync::Arc;

use baton_fault_point as fault_point;
use baton_protocol::access::AccessRecord;
use baton_protocol::handoff::{Ask, HandoffRequest, Side};
use baton_protocol::{RequestHeader, Seq, SessionId, Status};
use tokio::sync::OwnedMutexGuard;
use tokio::task::AbortHandle;

use crate::session::Violation;
use crate::volumes::{Asker, Begun, ChangeError, Control, Request, RunningVolume};

use super::Context;
use super::conn::Conn;
pub(crate) use answer::Asked;
use answer::{Kind, Reply, failure};
use turn::{Entry, Turns};

/// What a connection has asked and not been told.
#[derive(Debug, Default)]
pub(super) struct Asks {
    /// An OPEN is under way: what is behind it waits.
    pub(super) opening: bool,
    seals: Vec<(Seq, AbortHandle)>,
    turns: Turns,
    /// Points of fault injection of answers that are to be sent.
    answered: Vec<&'static str>,
}

impl Asks {
    /// The answers were sent.
    #[inline]
    pub(super) fn sent(&mut self) {
        if self.answered.is_empty() {
            return;
        }
        for point in self.answered.drain(..) {
            fault_point::at(point);
        }
    }

    /// Seals that wait end; nobody would be told.
    pub(super) fn give_up_seals(&mut self) {
        for (_, seal) in self.seals.drain(..) {
            seal.abort();
        }
    }
}

impl Drop for Asks {
    fn drop(&mut self) {
        self.give_up_seals();
    }
}

impl Context {
    /// The owner gives the volume back: a change of the access record, which
    /// waits for the disk and for everything admitted.
    pub(super) fn release(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
    ) {
        self.lend(conn);
        let turn = conn.asks.turns.take();
        let request = Request::Release { session: header.session, epoch: header.epoch };
        let volume = Arc::clone(volume);
        let reply = self.reply_to(conn, header, Kind::Release);
        self.setup.runtime.spawn(async move {
            let control = turn.control(&volume).await;
            let status = match volume.change_locked(control, request).await {
                Ok((_, record)) => {
                    let name = volume.data.name();
                    tracing::info!(volume = name, epoch = %record.epoch, "given back by its owner");
                    Status::Ok
                }
                Err(ChangeError::Refused(_)) => Status::StaleEpoch,
                Err(error) => failure(&volume, &error),
            };
            reply.send(status, Vec::new());
        });
    }

    pub(super) fn handoff(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        request: HandoffRequest,
    ) -> Result<(), Violation> {
        let HandoffRequest { attempt, ask } = request;
        let session = header.session;
        let name = || conn.presence.owner.as_ref().to_owned();
        let by = || Asker::Backend { name: name(), session };
        let (kind, side, request) = match ask {
            Ask::Seal(counts) => return self.seal(conn, volume, header, attempt, counts),
            Ask::Activate => {
                let request = Request::Activate { attempt, name: name(), session };
                (Kind::Activate, Some(Side::Destination), request)
            }
            Ask::Reclaim => {
                (Kind::Reclaim, Some(Side::Source), Request::Reclaim { attempt, by: by() })
            }
            Ask::Abdicate => (Kind::Abdicate, None, Request::Abdicate { attempt, by: by() }),
            Ask::Unfreeze { boot_id } => {
                (Kind::Unfreeze, None, Request::Unfreeze { attempt, session, boot_id })
            }
        };
        self.lend(conn);
        let reply = self.reply_to(conn, header, kind);
        let entry = conn.asks.turns.enter(volume);
        let from = Sender::of(conn, session);
        let volume = Arc::clone(volume);
        let conclude = move |volume: &RunningVolume, reply: Reply, changed: Changed| {
            if side == Some(Side::Destination) {
                fault_point::at("activate.stepped");
            }
            reply.answered(volume, attempt, side, changed.map(|(_, record)| record))
        };
        match entry {
            Entry::Now(_) if !from.is_heard(&volume) => {
                let asked = reply.unheard(&volume);
                self.tell(conn, asked);
            }
            Entry::Now(control) => {
                let changed = match volume.begin(control, request) {
                    Ok(Begun::Waits(waiting)) => {
                        self.setup.runtime.spawn(async move {
                            let changed = volume.finish(waiting).await;
                            let mailbox = Arc::clone(&reply.mailbox);
                            mailbox.answer(conclude(&volume, reply, changed));
                        });
                        return Ok(());
                    }
                    Ok(Begun::Made(control, record)) => Ok((control, record)),
                    Err(error) => Err(error),
                };
                let asked = conclude(&volume, reply, changed);
                self.tell(conn, asked);
            }
            Entry::Later(turn) => {
                self.setup.runtime.spawn(async move {
                    let control = turn.control(&volume).await;
                    let mailbox = Arc::clone(&reply.mailbox);
                    if !from.is_heard(&volume) {
                        return mailbox.answer(reply.unheard(&volume));
                    }
                    let changed = volume.change_locked(control, request).await;
                    mailbox.answer(conclude(&volume, reply, changed));
                });
            }
        }
        Ok(())
    }

    /// An answer of the record, to the connection that is being served: it leaves
    /// with the others of its turn.
    fn tell(&self, conn: &mut Conn, asked: Asked) {
        conn.asks.answered.push(asked.answered_point());
        conn.hear(asked, &self.setup.metrics);
    }

    fn reply_to(&self, conn: &Conn, header: &RequestHeader, kind: Kind) -> Reply {
        Reply {
            mailbox: Arc::clone(&self.setup.mailbox),
            conn: conn.presence.id,
            opcode: header.opcode,
            seq: header.seq,
            kind,
        }
    }
}

/// What became of a change of the record.
type Changed = Result<(OwnedMutexGuard<Control>, AccessRecord), ChangeError>;

/// The process behind a connection.
struct Sender {
    name: Arc<str>,
    session: SessionId,
}

impl Sender {
    fn of(conn: &Conn, session: SessionId) -> Self {
        Self { name: Arc::clone(&conn.presence.owner), session }
    }

    /// Whether no successor has said HELLO. Looked at by who has the record.
    fn is_heard(&self, volume: &RunningVolume) -> bool {
        let heard = volume.incarnations.is_latest(&self.name, self.session);
        if !heard {
            tracing::warn!(
                volume = volume.data.name(), owner = %self.name, session = %self.session,
                "not heard: a newer process of this owner name has come; stop this one"
            );
        }
        heard
    }
}
