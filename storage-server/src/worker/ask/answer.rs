//! What the record answers, and how it gets to the connection that asked.

use std::sync::Arc;

use baton_protocol::access::AccessRecord;
use baton_protocol::frame::{REPLY_HEADER_BYTES, ReplyHeader};
use baton_protocol::handoff::{Answer, Outcome, Side, Try};
use baton_protocol::{AccessMode, Epoch, Opcode, Seq, Status};

use crate::metrics::WorkerMetrics;
use crate::volumes::{ChangeError, Killer, Lease, RunningVolume};

use super::super::conn::{Conn, Life, Parked, Place};
use super::super::mailbox::{Mailbox, Message};

/// An answer of the record on its way to the connection.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Id of the connection, which may be gone.
    pub(in super::super) conn: u64,
    opcode: Opcode,
    seq: Seq,
    status: Status,
    body: Vec<u8>,
    kind: Kind,
    /// Version of the record in the body.
    tells: Option<u64>,
}

#[derive(Debug)]
pub(super) enum Kind {
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
    pub(in super::super) fn answered_point(&self) -> &'static str {
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

/// Where an answer goes.
pub(super) struct Reply {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) conn: u64,
    pub(super) opcode: Opcode,
    pub(super) seq: Seq,
    pub(super) kind: Kind,
}

impl Reply {
    pub(super) fn with(self, status: Status, body: Vec<u8>) -> Asked {
        let Self { conn, opcode, seq, kind, .. } = self;
        Asked { conn, opcode, seq, status, body, kind, tells: None }
    }

    fn telling(self, answer: &Answer) -> Asked {
        let tells = Some(answer.record.version);
        Asked { tells, ..self.with(Status::Ok, answer.encode()) }
    }

    pub(super) fn send(self, status: Status, body: Vec<u8>) {
        let mailbox = Arc::clone(&self.mailbox);
        mailbox.answer(self.with(status, body));
    }

    /// What ends the connection.
    pub(super) fn killer(&self) -> Killer {
        let (mailbox, id) = (Arc::clone(&self.mailbox), self.conn);
        Arc::new(move || mailbox.send(Message::Kill(id)))
    }

    /// Answers a HANDOFF of a process that has a successor: it is no side of it.
    pub(super) fn unheard(self, volume: &RunningVolume) -> Asked {
        let record = volume.record().as_ref().clone();
        let outcome = Outcome::NotNominated;
        self.telling(&Answer { outcome, boot_id: volume.boot_id(), proof: None, record })
    }

    /// Answers a HANDOFF; `side` is who wins by it.
    pub(super) fn answered(
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
pub(super) fn failure(volume: &RunningVolume, error: &ChangeError) -> Status {
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
    pub(in super::super) fn hear(&mut self, asked: Asked, metrics: &WorkerMetrics) {
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
    pub(in super::super) fn answer_access(&mut self, metrics: &WorkerMetrics) {
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
