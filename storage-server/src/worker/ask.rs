//! What a connection asks of the access record: HANDOFF, OPEN, RELEASE, and
//! ACCESS, which waits for news of it.
//!
//! The record may have to wait for the disk or for requests inside the gate, so
//! it is asked in a task; the answer comes by mailbox. Requests of one connection
//! reach the record in their order: each takes its place in the record's queue
//! before the next one starts ([`Asks::take_turn`]). A SEAL gives up its turn
//! once it is noted, so that a RECLAIM behind it overtakes its wait.

use std::sync::Arc;
use std::time::Duration;

use baton_fault_point as fault_point;
use baton_protocol::access::AccessRecord;
use baton_protocol::frame::{REPLY_HEADER_BYTES, ReplyHeader};
use baton_protocol::handoff::{Answer, Ask, HandoffRequest, Open, Outcome, Side, Try};
use baton_protocol::{AccessMode, Epoch, Opcode, RequestHeader, Seq, Status};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::AbortHandle;

use crate::metrics::WorkerMetrics;
use crate::session::Violation;
use crate::volumes::{Asker, ChangeError, Control, Lease, Request, RunningVolume};

use super::Context;
use super::conn::{Conn, Life, Place};
use super::mailbox::{Mailbox, Message};

/// SEALs of one connection that may wait. A client has one.
const SEALS_MAX: usize = 4;
/// How long OPEN waits for an old connection of its queue.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a connection has asked and not been told.
#[derive(Debug, Default)]
pub(super) struct Asks {
    /// An OPEN is under way: what is behind it waits.
    pub(super) opening: bool,
    seals: Vec<(Seq, AbortHandle)>,
    last: Option<oneshot::Receiver<()>>,
}

impl Asks {
    /// The turn of a request: it comes when the one before has got the record.
    fn take_turn(&mut self) -> Turn {
        let (done, next) = oneshot::channel();
        Turn { before: self.last.replace(next), done }
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

/// Dropping it lets the next one start.
struct Turn {
    before: Option<oneshot::Receiver<()>>,
    done: oneshot::Sender<()>,
}

impl Turn {
    /// Waits for the one before and gets the record.
    async fn control(self, volume: &RunningVolume) -> OwnedMutexGuard<Control> {
        if let Some(before) = self.before {
            // An error means that it has ended.
            let _ = before.await;
        }
        let control = volume.control().await;
        // The receiver may be gone with its connection.
        let _ = self.done.send(());
        control
    }
}

/// An answer of the record on its way to the connection.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Id of the connection, which may be gone.
    pub(super) conn: u64,
    opcode: Opcode,
    seq: Seq,
    status: Status,
    body: Vec<u8>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Release,
    Seal,
    Activate,
    Reclaim,
    Abdicate,
    Unfreeze,
    /// The epoch granted, and the seat of a connection that had none.
    Open(Option<(Epoch, Option<Lease>)>),
}

impl Asked {
    /// The point of fault injection behind its being sent.
    pub(super) fn answered_point(&self) -> &'static str {
        match self.kind {
            Kind::Seal => "seal.answered",
            Kind::Activate => "activate.answered",
            Kind::Reclaim => "reclaim.answered",
            Kind::Abdicate => "abdicate.answered",
            Kind::Unfreeze => "unfreeze.answered",
            Kind::Open(_) => "open.answered",
            Kind::Release => "release.answered",
        }
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
        let turn = conn.asks.take_turn();
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
        let volume = Arc::clone(volume);
        let (kind, request) = match ask {
            Ask::Seal(counts) => {
                if conn.asks.seals.len() >= SEALS_MAX {
                    return Err(Violation::TooManySeals);
                }
                let turn = conn.asks.take_turn();
                let reply = self.reply_to(conn, header, Kind::Seal);
                // Not counted as in flight: a connection does not outlive its
                // peer for the sake of a seal that may wait for ever.
                let task = self.setup.runtime.spawn(async move {
                    let control = turn.control(&volume).await;
                    let sealed = volume.seal(control, attempt, session, &counts).await;
                    reply.answer(&volume, attempt, None, sealed);
                });
                conn.asks.seals.push((header.seq, task.abort_handle()));
                return Ok(());
            }
            Ask::Activate => (Kind::Activate, Request::Activate { attempt, name: name(), session }),
            Ask::Reclaim => (Kind::Reclaim, Request::Reclaim { attempt, by: by() }),
            Ask::Abdicate => (Kind::Abdicate, Request::Abdicate { attempt, by: by() }),
            Ask::Unfreeze { boot_id } => {
                (Kind::Unfreeze, Request::Unfreeze { attempt, session, boot_id })
            }
        };
        let side = match request {
            Request::Activate { .. } => Some(Side::Destination),
            Request::Reclaim { .. } => Some(Side::Source),
            _ => None,
        };
        self.lend(conn);
        let turn = conn.asks.take_turn();
        let reply = self.reply_to(conn, header, kind);
        self.setup.runtime.spawn(async move {
            let control = turn.control(&volume).await;
            let changed = volume.change_locked(control, request).await;
            if side == Some(Side::Destination) {
                fault_point::at("activate.stepped");
            }
            reply.answer(&volume, attempt, side, changed.map(|(_, record)| record));
        });
        Ok(())
    }

    /// The winner shows the anchor's decision. What is behind it on this
    /// connection waits.
    pub(super) fn open(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        open: Open,
    ) {
        self.lend(conn);
        conn.asks.opening = true;
        let turn = conn.asks.take_turn();
        let (queue, session, seq) = (header.queue, header.session, header.seq);
        let volume = Arc::clone(volume);
        let held = match &conn.place {
            Place::Owner(lease) => Some(lease.seat()),
            Place::Other(_) => None,
        };
        let mut reply = self.reply_to(conn, header, Kind::Open(None));
        self.setup.runtime.spawn(async move {
            let control = turn.control(&volume).await;
            let request = Request::Open { open, session };
            let (mut control, record) = match volume.change_locked(control, request).await {
                Ok(granted) => granted,
                Err(ChangeError::Refused(_)) => return reply.send(Status::StaleEpoch, Vec::new()),
                Err(error) => return reply.send(failure(&volume, &error), Vec::new()),
            };
            fault_point::at("open.stepped");
            let Some(seat) = control.seat(queue) else {
                return reply.send(Status::NotPermitted, Vec::new());
            };
            // Not under the lock: a fence must not wait for an old connection.
            drop(control);
            if held.is_some_and(|held| Arc::ptr_eq(&held, &seat)) {
                reply.kind = Kind::Open(Some((record.epoch, None)));
                return reply.send(Status::Ok, Vec::new());
            }
            let Ok(lease) = seat.take(seq, PATIENCE).await else {
                return reply.send(Status::Busy, Vec::new());
            };
            let now = volume.control().await.record.clone();
            if now.owner.as_ref().is_none_or(|owner| owner.session != session) {
                return reply.send(Status::StaleEpoch, Vec::new());
            }
            let killer = Arc::clone(&reply.mailbox);
            let id = reply.conn;
            reply.kind = Kind::Open(Some((now.epoch, Some(lease))));
            seat.runs(Arc::new(move || killer.send(Message::Kill(id))), || {
                reply.send(Status::Ok, Vec::new());
            });
        });
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

/// Where an answer goes.
struct Reply {
    mailbox: Arc<Mailbox>,
    conn: u64,
    opcode: Opcode,
    seq: Seq,
    kind: Kind,
}

impl Reply {
    fn send(self, status: Status, body: Vec<u8>) {
        let Self { mailbox, conn, opcode, seq, kind } = self;
        mailbox.send(Message::Asked(Box::new(Asked { conn, opcode, seq, status, body, kind })));
    }

    /// Answers a HANDOFF; `side` is who wins by it.
    fn answer(
        self,
        volume: &RunningVolume,
        attempt: Try,
        side: Option<Side>,
        result: Result<AccessRecord, ChangeError>,
    ) {
        let (outcome, record) = match result {
            // Asked for and not won: the destination has to speak first.
            Ok(record) if side.is_some() && record.winner(attempt) != side => {
                (Outcome::Unknown, record)
            }
            Ok(record) => (Outcome::Granted, record),
            Err(ChangeError::Refused(refusal)) => {
                (Outcome::from(&refusal), volume.record().as_ref().clone())
            }
            Err(error) => return self.send(failure(volume, &error), Vec::new()),
        };
        let won = side.is_some() && outcome == Outcome::Granted;
        let proof = if won { record.proof(attempt) } else { None };
        let body = Answer { outcome, boot_id: volume.boot_id(), proof, record }.encode();
        self.send(Status::Ok, body);
    }
}

/// The status of a change that failed for a reason that is not the record's.
fn failure(volume: &RunningVolume, error: &ChangeError) -> Status {
    match error {
        ChangeError::Refused(_) => Status::StaleEpoch,
        ChangeError::Deleted => Status::Gone,
        ChangeError::Stopped => Status::Busy,
        ChangeError::Store(_) => {
            tracing::error!(
                volume = volume.data.name(),
                error = error as &dyn std::error::Error,
                "a change of access failed"
            );
            Status::Io
        }
    }
}

impl Conn {
    /// An answer of the record came.
    pub(super) fn hear(&mut self, asked: Asked, metrics: &WorkerMetrics) {
        let Asked { opcode, seq, status, body, kind, .. } = asked;
        let mut epoch = self.volume().epoch();
        match kind {
            Kind::Seal => self.asks.seals.retain(|(seal, _)| *seal != seq),
            Kind::Open(opened) => {
                self.asks.opening = false;
                if let Some((granted, lease)) = opened {
                    epoch = granted;
                    self.identity.mode = AccessMode::Owner;
                    self.presence.volume.opened(self.presence.id, granted);
                    if let Some(lease) = lease {
                        self.place = Place::Owner(lease);
                    }
                }
                self.returned(metrics);
            }
            Kind::Release | Kind::Activate | Kind::Reclaim | Kind::Abdicate | Kind::Unfreeze => {
                self.returned(metrics)
            }
        }
        metrics.answered(opcode, status);
        let header = ReplyHeader {
            opcode,
            flags: 0,
            status,
            seq,
            epoch,
            payload_len: u32::try_from(body.len()).expect("a record"),
            payload_crc32c: 0,
        };
        let mut answer = header.encode().to_vec();
        answer.extend_from_slice(&body);
        self.late_answer(answer, 0);
    }

    fn returned(&mut self, metrics: &WorkerMetrics) {
        self.inflight -= 1;
        crate::metrics::sub(&metrics.inflight, 1);
    }

    /// Answers a parked ACCESS if the record is not the one its sender knows.
    pub(super) fn answer_access(&mut self, metrics: &WorkerMetrics) {
        let Some((seq, version, boot_id)) = self.access else { return };
        let volume = self.volume();
        let (status, body) = if volume.is_deleted() {
            (Status::Gone, Vec::new())
        } else {
            let record = volume.record();
            if (record.version, volume.boot_id()) == (version, boot_id) {
                return;
            }
            let record = record.as_ref().clone();
            let boot_id = volume.boot_id();
            let outcome = Outcome::Granted;
            (Status::Ok, Answer { outcome, boot_id, proof: None, record }.encode())
        };
        if self.life != Life::Open || !self.output.has_room(REPLY_HEADER_BYTES + body.len()) {
            // Looked at again when the socket takes bytes.
            return;
        }
        self.access = None;
        metrics.answered(Opcode::Access, status);
        let header = self.header(Opcode::Access, seq, status, body.len());
        self.output.push(&header);
        self.output.push(&body);
    }
}
