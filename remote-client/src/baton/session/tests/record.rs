//! The test server's half of a handoff: the real access record, and a gate that
//! asks it about every request.

use baton_protocol::access::{By, Input, Phase, Refusal};
use baton_protocol::handoff::{Answer, Ask, HandoffRequest, Open, Outcome};
use baton_protocol::{AccessMode, Hello, Opcode, QueueId, RequestHeader, Seq, SessionId, Status};

use super::{Connection, Server, frame};

impl Server {
    /// Changes the record, or says why not.
    pub(crate) fn step(&mut self, input: Input<'_>) -> Result<(), Refusal> {
        let record = self.record.as_mut().expect("a server that can hand over");
        *record = record.step(input)?.record;
        self.epoch = record.epoch;
        Ok(())
    }

    /// The status of a HELLO, where the record decides it.
    pub(super) fn judge_hello(&mut self, h: &RequestHeader, hello: &Hello) -> Option<Status> {
        let record = self.record.as_ref()?;
        if hello.mode != AccessMode::Owner {
            return Some(Status::Ok);
        }
        if record.phase == Phase::Frozen && h.queue != QueueId::CONTROL {
            return Some(Status::Busy);
        }
        let session = h.session;
        let input = match h.epoch.0 {
            0 => Input::Claim { name: &hello.owner, session },
            _ => Input::Rejoin { session, epoch: h.epoch },
        };
        Some(match self.step(input) {
            Ok(()) => Status::Ok,
            Err(Refusal::InHandoff(_)) => Status::InHandoff,
            Err(Refusal::StaleEpoch { .. }) => Status::StaleEpoch,
            Err(_) => Status::NotOwner,
        })
    }

    /// Handles what the record decides: `Some(())` when that was all.
    pub(super) fn handoff_request(
        &mut self,
        c: &mut Connection,
        h: &RequestHeader,
        payload: &[u8],
    ) -> Option<()> {
        let queue = c.queue.expect("after HELLO");
        let session = h.session;
        if !matches!(h.opcode, Opcode::Ping | Opcode::Event) {
            self.windows.get_mut(&queue.0).expect("made by HELLO").arrive(h.seq);
        }
        match h.opcode {
            Opcode::Access => {
                c.access = Some((h.seq, h.len, h.offset));
                self.show_record(c);
            }
            Opcode::Handoff => {
                let request = HandoffRequest::decode(payload).expect("a client sends valid asks");
                self.asked.push(request.clone());
                if let Some(status) = self.refuse_requests {
                    self.reply(c, h, status, b"told to");
                    return Some(());
                }
                let refused = self.decide(&request, session).err();
                match request.ask {
                    Ask::Seal(_) if refused.is_none() => {
                        c.seal = Some((h.seq, request));
                        self.try_seal(c, session);
                    }
                    _ => {
                        let outcome = refused.as_ref().map_or(Outcome::Granted, Outcome::from);
                        self.answer_ask(c, h.seq, &request, outcome);
                    }
                }
                self.show_record(c);
            }
            Opcode::Open => {
                self.opened += 1;
                let Open { attempt, proof } = Open::decode(payload).expect("valid");
                if self.step(Input::Open { attempt, session, proof }).is_err() {
                    self.reply(c, h, Status::StaleEpoch, b"not yours");
                    return Some(());
                }
                c.mode = Some(AccessMode::Owner);
                self.done(queue, h.seq);
                self.reply(c, h, Status::Ok, b"");
            }
            Opcode::Ping | Opcode::Event => return None,
            _ => {
                let record = self.record.as_ref().expect("asked by the caller");
                let owner = record.owner.as_ref().is_some_and(|owner| owner.session == session);
                let admitted = record.admits().owner == Some(h.epoch) && owner;
                if admitted && c.mode == Some(AccessMode::Owner) {
                    return None;
                }
                self.reply(c, h, Status::StaleEpoch, b"fenced");
            }
        }
        Some(())
    }

    fn done(&mut self, queue: QueueId, seq: Seq) {
        self.windows.get_mut(&queue.0).expect("made by HELLO").complete(seq);
    }

    fn decide(&mut self, request: &HandoffRequest, session: SessionId) -> Result<(), Refusal> {
        let (attempt, boot_id_now) = (request.attempt, self.boot_id);
        let name = "host/vm";
        let by = By::Backend { name, session };
        self.step(match request.ask {
            Ask::Seal(_) => Input::Seal { attempt, session },
            Ask::Activate => Input::Activate { attempt, name, session },
            Ask::Reclaim => Input::Reclaim { attempt, by },
            Ask::Abdicate => Input::Abdicate { attempt, by },
            Ask::Unfreeze { boot_id } => Input::Unfreeze { attempt, session, boot_id, boot_id_now },
        })
    }

    /// Seals once everything that was sent has arrived and been answered.
    pub(crate) fn try_seal(&mut self, c: &mut Connection, session: SessionId) {
        let Some((seq, request)) = c.seal.take() else { return };
        let Ask::Seal(counts) = &request.ask else { return };
        let reached = counts.iter().all(|count| {
            let highest = self.highest.get(&count.queue.0).copied().unwrap_or(0);
            count.is_reached(Seq(highest))
        });
        if !reached {
            c.seal = Some((seq, request));
            return;
        }
        let sealed = self.step(Input::Sealed { attempt: request.attempt, session });
        let outcome = sealed.as_ref().err().map_or(Outcome::Granted, Outcome::from);
        self.answer_ask(c, seq, &request, outcome);
        self.show_record(c);
    }

    fn answer_ask(
        &mut self,
        c: &mut Connection,
        seq: Seq,
        request: &HandoffRequest,
        outcome: Outcome,
    ) {
        let record = self.record.as_ref().expect("asked by the caller");
        let wins = matches!(request.ask, Ask::Activate | Ask::Reclaim);
        let proof = record.proof(request.attempt).filter(|_| wins);
        let answer = Answer { outcome, boot_id: self.boot_id, proof, record: record.clone() };
        self.done(c.queue.expect("after HELLO"), seq);
        c.replies.push(frame(Opcode::Handoff, Status::Ok, seq, self.epoch, &answer.encode()));
    }

    /// Answers the parked ACCESS if the record is news to it.
    pub(crate) fn show_record(&mut self, c: &mut Connection) {
        let (Some((seq, boot, version)), Some(record)) = (c.access, &self.record) else { return };
        if (boot, version) == (self.boot_id, record.version) {
            return;
        }
        c.access = None;
        let outcome = Outcome::Granted;
        let answer = Answer { outcome, boot_id: self.boot_id, proof: None, record: record.clone() };
        self.done(c.queue.expect("after HELLO"), seq);
        c.replies.push(frame(Opcode::Access, Status::Ok, seq, self.epoch, &answer.encode()));
    }
}
