//! What a connection asks of the access record: HANDOFF, OPEN, RELEASE, and
//! ACCESS, which waits for news of it.
//!
//! What needs neither the disk nor a wait is answered by the worker that read it:
//! in fast mode all of a VM's blackout. Anything else is asked in a task, and the
//! answer comes by mailbox. Requests of one connection reach the record in their
//! order: one that has to wait takes its place in the record's queue before the
//! next one starts ([`Asks::enter`]). A SEAL gives up its turn once it is noted,
//! so that a RECLAIM behind it overtakes its wait.
//!
//! A process whose successor has said HELLO is not heard any more: a late RECLAIM
//! or ACTIVATE of a dead backend would win for a session that nobody is.

use std::sync::Arc;
use std::time::Duration;

use baton_fault_point as fault_point;
use baton_protocol::access::AccessRecord;
use baton_protocol::frame::{REPLY_HEADER_BYTES, ReplyHeader};
use baton_protocol::handoff::{Answer, Ask, Count, HandoffRequest, Open, Outcome, Side, Try};
use baton_protocol::{AccessMode, Epoch, Opcode, QueueId, RequestHeader, Seq, SessionId, Status};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::AbortHandle;

use crate::metrics::WorkerMetrics;
use crate::session::Violation;
use crate::volumes::{
    Asker, Begun, ChangeError, Control, Killer, Lease, Request, RunningVolume, SealWait, Sealing,
    Seat,
};

use super::Context;
use super::conn::{Conn, Life, Parked, Place};
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
    /// Points of fault injection of answers that are to be sent.
    answered: Vec<&'static str>,
}

/// How a request gets to the record.
enum Entry {
    /// It has it.
    Now(OwnedMutexGuard<Control>),
    /// It waits for it.
    Later(Turn),
}

impl Asks {
    /// The record itself if nobody has it and nothing of this connection is in
    /// front, else a turn.
    fn enter(&mut self, volume: &RunningVolume) -> Entry {
        let is_first = self.is_first();
        match volume.try_control() {
            Some(control) if is_first => Entry::Now(control),
            _ => Entry::Later(self.take_turn()),
        }
    }

    /// Whether everything in front has got the record.
    fn is_first(&mut self) -> bool {
        let waits = |last: &mut oneshot::Receiver<()>| {
            matches!(last.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        };
        // What has answered once must not be asked again.
        self.last = self.last.take().and_then(|mut last| waits(&mut last).then_some(last));
        self.last.is_none()
    }

    /// The answers were sent.
    pub(super) fn sent(&mut self) {
        for point in self.answered.drain(..) {
            fault_point::at(point);
        }
    }

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
    /// Version of the record in the body.
    tells: Option<u64>,
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
        let entry = conn.asks.enter(volume);
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

    fn seal(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        attempt: Try,
        counts: Vec<Count>,
    ) -> Result<(), Violation> {
        if conn.asks.seals.len() >= SEALS_MAX {
            return Err(Violation::TooManySeals);
        }
        let session = header.session;
        let reply = self.reply_to(conn, header, Kind::Seal);
        let entry = conn.asks.enter(volume);
        let from = Sender::of(conn, session);
        let volume = Arc::clone(volume);
        // Not counted as in flight: a connection does not outlive its peer for the
        // sake of a seal that may wait for ever.
        let task = match entry {
            Entry::Now(_) if !from.is_heard(&volume) => {
                let asked = reply.unheard(&volume);
                self.tell(conn, asked);
                return Ok(());
            }
            Entry::Now(control) => {
                let sealed = match volume.begin_seal(control, attempt, session, &counts) {
                    Ok(Sealing::Waits(wait)) => {
                        let may_end = wait.may_be_given_up();
                        let task = self.setup.runtime.spawn(finish_seal(volume, wait, reply));
                        if may_end {
                            conn.asks.seals.push((header.seq, task.abort_handle()));
                        }
                        return Ok(());
                    }
                    Ok(Sealing::Done(record)) => Ok(record),
                    Err(error) => Err(error),
                };
                let asked = reply.answered(&volume, attempt, None, sealed);
                self.tell(conn, asked);
                return Ok(());
            }
            Entry::Later(turn) => self.setup.runtime.spawn(async move {
                let control = turn.control(&volume).await;
                let mailbox = Arc::clone(&reply.mailbox);
                if !from.is_heard(&volume) {
                    return mailbox.answer(reply.unheard(&volume));
                }
                let sealed = match volume.begin_seal(control, attempt, session, &counts) {
                    Ok(Sealing::Waits(wait)) => return finish_seal(volume, wait, reply).await,
                    Ok(Sealing::Done(record)) => Ok(record),
                    Err(error) => Err(error),
                };
                mailbox.answer(reply.answered(&volume, attempt, None, sealed));
            }),
        };
        conn.asks.seals.push((header.seq, task.abort_handle()));
        Ok(())
    }

    /// The winner shows the anchor's decision. What is behind it on this
    /// connection waits, if it has to.
    pub(super) fn open(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        open: Open,
    ) {
        self.lend(conn);
        let (queue, session, seq) = (header.queue, header.session, header.seq);
        let entry = conn.asks.enter(volume);
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

async fn finish_seal(volume: Arc<RunningVolume>, wait: SealWait, reply: Reply) {
    let attempt = wait.attempt();
    let sealed = volume.finish_seal(wait).await;
    let mailbox = Arc::clone(&reply.mailbox);
    mailbox.answer(reply.answered(&volume, attempt, None, sealed));
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

/// Where an answer goes.
struct Reply {
    mailbox: Arc<Mailbox>,
    conn: u64,
    opcode: Opcode,
    seq: Seq,
    kind: Kind,
}

impl Reply {
    fn with(self, status: Status, body: Vec<u8>) -> Asked {
        let Self { conn, opcode, seq, kind, .. } = self;
        Asked { conn, opcode, seq, status, body, kind, tells: None }
    }

    fn telling(self, answer: &Answer) -> Asked {
        let tells = Some(answer.record.version);
        Asked { tells, ..self.with(Status::Ok, answer.encode()) }
    }

    fn send(self, status: Status, body: Vec<u8>) {
        let mailbox = Arc::clone(&self.mailbox);
        mailbox.answer(self.with(status, body));
    }

    /// What ends the connection.
    fn killer(&self) -> Killer {
        let (mailbox, id) = (Arc::clone(&self.mailbox), self.conn);
        Arc::new(move || mailbox.send(Message::Kill(id)))
    }

    /// Answers a HANDOFF of a process that has a successor: it is no side of it.
    fn unheard(self, volume: &RunningVolume) -> Asked {
        let record = volume.record().as_ref().clone();
        let outcome = Outcome::NotNominated;
        self.telling(&Answer { outcome, boot_id: volume.boot_id(), proof: None, record })
    }

    /// Answers a HANDOFF; `side` is who wins by it.
    fn answered(
        self,
        volume: &RunningVolume,
        attempt: Try,
        side: Option<Side>,
        result: Result<AccessRecord, ChangeError>,
    ) -> Asked {
        let (outcome, record) = match result {
            // Asked for and not won: the destination has to speak first.
            Ok(record) if side.is_some() && record.winner(attempt) != side => {
                (Outcome::Unknown, record)
            }
            Ok(record) => (Outcome::Granted, record),
            Err(ChangeError::Refused(refusal)) => {
                (Outcome::from(&refusal), volume.record().as_ref().clone())
            }
            Err(error) => return self.with(failure(volume, &error), Vec::new()),
        };
        let won = side.is_some() && outcome == Outcome::Granted;
        let proof = if won { record.proof(attempt) } else { None };
        self.telling(&Answer { outcome, boot_id: volume.boot_id(), proof, record })
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
        let Asked { opcode, seq, status, body, kind, tells, .. } = asked;
        // What the answer says need not be pushed as well. A later version may have
        // been told already.
        if let (Some(told), Some(Parked { known: (version, _), .. })) = (tells, &mut self.access) {
            *version = told.max(*version);
        }
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
        let Some(&Parked { seq, known, .. }) = self.access.as_ref() else { return };
        let volume = self.volume();
        let (status, body) = if volume.is_deleted() {
            (Status::Gone, Vec::new())
        } else {
            let record = volume.record();
            if (record.version, volume.boot_id()) == known {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_turn_behind_one_that_has_ended_does_not_wait() {
        let mut asks = Asks::default();
        assert!(asks.is_first());
        let before = asks.take_turn();
        assert!(!asks.is_first());
        let _ = before.done.send(());
        assert!(asks.is_first());
        // Somebody else has the record: a turn all the same, behind nobody.
        let turn = asks.take_turn();
        assert!(turn.before.is_none());
        assert!(!asks.is_first(), "it has not got the record");
    }
}
