//! The incoming half: whatever bytes arrive, in whatever pieces. Everything a
//! server says is checked against what was asked before it is acted on.

use std::time::Instant;

use baton_protocol::frame::REPLY_HEADER_BYTES;
use baton_protocol::handoff::message::ANSWER_BYTES_MAX;
use baton_protocol::message::{BodyError, EVENT_BYTES};
use baton_protocol::{AccessMode, Event, EventKind, Opcode, ReplyHeader, Seq, Status};

use super::handshake::{Verdict, judge, sentence};
use super::table::{Child, Purpose};
use super::{DropReason, LostReason, Notice, Session, State, Violation};
use crate::cursor::{Cursor, copy_out};
use crate::volume::IoError;

/// Longest body other than READ data that a server may send, bytes: a WELCOME,
/// an event, a sentence, or an access record.
const BODY_BYTES_MAX: usize = ANSWER_BYTES_MAX;
const _: () = assert!(BODY_BYTES_MAX >= 1024, "sentences have room");

/// Where the incoming stream is.
#[derive(Debug)]
pub(super) enum At {
    /// `filled` bytes of a header are in `Receive::header`.
    Header { filled: usize },
    /// `filled` bytes of a small body are in `Receive::body`.
    Body { header: ReplyHeader, filled: usize },
    /// READ data on its way to guest memory; `left` bytes are missing.
    Data { seq: Seq, child: Child, at: Cursor, left: usize },
}

#[derive(Debug)]
pub(super) struct Receive {
    at: At,
    header: [u8; REPLY_HEADER_BYTES],
    body: Box<[u8; BODY_BYTES_MAX]>,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            at: At::Header { filled: 0 },
            header: [0; REPLY_HEADER_BYTES],
            body: Box::new([0; BODY_BYTES_MAX]),
        }
    }
}

impl Receive {
    pub(super) fn reset(&mut self) {
        self.at = At::Header { filled: 0 };
    }
}

impl Session {
    /// Takes bytes that were received into a buffer of the driver.
    pub(crate) fn ingest(&mut self, now: Instant, mut bytes: &[u8]) {
        self.heard(now, bytes.len());
        while !bytes.is_empty() && self.is_open() {
            let used = match self.receive.at {
                At::Header { filled } => self.take_header(now, filled, bytes),
                At::Body { header, filled } => self.take_body(now, header, filled, bytes),
                At::Data { seq, child, at, left } => {
                    let n = left.min(bytes.len());
                    copy_out(self.table.buffers(&child), at, &bytes[..n]);
                    self.data_arrived(seq, child, at, left, n);
                    n
                }
            };
            bytes = &bytes[used..];
        }
    }

    /// Appends the guest memory that the next bytes of the stream belong to, for
    /// a driver that reads straight into it; `iov` may grow to `max` entries.
    /// Returns the bytes, and whether they reach the end of the payload, so that
    /// more of the stream may be read behind them.
    pub(crate) fn payload_target(&self, iov: &mut Vec<libc::iovec>, max: usize) -> (usize, bool) {
        match self.receive.at {
            At::Data { child, at, left, .. } if self.is_open() => {
                let n = at.push(self.table.buffers(&child), left, iov, max);
                (n, n == left)
            }
            _ => (0, true),
        }
    }

    /// `n` bytes were read into the [`Session::payload_target`].
    pub(crate) fn payload_received(&mut self, now: Instant, n: usize) {
        self.heard(now, n);
        if let At::Data { seq, child, at, left } = self.receive.at {
            self.data_arrived(seq, child, at, left, n.min(left));
        }
    }

    /// Whether payloads are expected that are worth reading straight into guest
    /// memory, so that little should be read into the driver's buffer.
    pub(crate) fn prefers_direct(&self) -> bool {
        self.table.has_direct_read()
    }

    fn heard(&mut self, now: Instant, n: usize) {
        if n > 0 {
            self.heard = now;
            self.pinged = None;
        }
    }

    fn data_arrived(&mut self, seq: Seq, child: Child, mut at: Cursor, left: usize, n: usize) {
        if n == left {
            self.receive.reset();
            self.finish(seq, Ok(()));
        } else {
            at.advance(self.table.buffers(&child), n);
            self.receive.at = At::Data { seq, child, at, left: left - n };
        }
    }

    fn take_header(&mut self, now: Instant, filled: usize, bytes: &[u8]) -> usize {
        let (header, used) = match bytes.first_chunk() {
            Some(header) if filled == 0 => (*header, REPLY_HEADER_BYTES),
            _ => {
                let n = (REPLY_HEADER_BYTES - filled).min(bytes.len());
                self.receive.header[filled..filled + n].copy_from_slice(&bytes[..n]);
                if filled + n < REPLY_HEADER_BYTES {
                    self.receive.at = At::Header { filled: filled + n };
                    return n;
                }
                (self.receive.header, n)
            }
        };
        self.receive.reset();
        let judged = ReplyHeader::decode(&header).map_err(Violation::from);
        if let Err(violation) = judged.and_then(|header| self.on_header(now, header)) {
            self.dropped(now, violation.into());
        }
        used
    }

    fn on_header(&mut self, now: Instant, header: ReplyHeader) -> Result<(), Violation> {
        let ReplyHeader { opcode, seq, status, payload_len: len, .. } = header;
        if header.flags != 0 {
            return Err(Violation::Flags(header.flags));
        }
        let body_len = Violation::PayloadLength { opcode, len };
        if let State::Hello { .. } = self.state {
            if opcode != Opcode::Hello || seq != Seq(0) {
                return Err(Violation::NotAsked { opcode, seq });
            }
            return self.expect_body(now, header).ok_or(body_len);
        }
        // A server that closes on a broken request may not know which it was.
        if opcode == Opcode::Hello || self.table.unanswered(seq).is_none() {
            return match status {
                Status::Protocol | Status::Busy => self.expect_body(now, header).ok_or(body_len),
                _ => Err(Violation::NotAsked { opcode, seq }),
            };
        }
        let child = self.table.unanswered(seq).ok_or(Violation::NotAsked { opcode, seq })?;
        if child.opcode != opcode {
            return Err(Violation::NotAsked { opcode, seq });
        }
        if status != Status::Ok {
            return self.expect_body(now, header).ok_or(body_len);
        }
        // An answer before the request was sent whole cannot be one to it.
        if !self.send.has_sent(seq) {
            return Err(Violation::NotAsked { opcode, seq });
        }
        match opcode {
            Opcode::Read if len == child.len => {
                self.receive.at = At::Data { seq, child, at: child.at, left: len as usize };
            }
            Opcode::Event if len as usize == EVENT_BYTES => {
                return self.expect_body(now, header).ok_or(body_len);
            }
            Opcode::Access | Opcode::Handoff if len != 0 => {
                return self.expect_body(now, header).ok_or(body_len);
            }
            Opcode::Read | Opcode::Event | Opcode::Access | Opcode::Handoff => {
                return Err(body_len);
            }
            _ if len != 0 => return Err(body_len),
            Opcode::Open => self.opened(now, seq, header.epoch),
            _ => self.finish(seq, Ok(())),
        }
        Ok(())
    }

    /// `None`: the body is longer than any body.
    fn expect_body(&mut self, now: Instant, header: ReplyHeader) -> Option<()> {
        if header.payload_len as usize > BODY_BYTES_MAX {
            return None;
        }
        if header.payload_len == 0 {
            self.on_body(now, header);
        } else {
            self.receive.at = At::Body { header, filled: 0 };
        }
        Some(())
    }

    fn take_body(
        &mut self,
        now: Instant,
        header: ReplyHeader,
        filled: usize,
        bytes: &[u8],
    ) -> usize {
        let len = header.payload_len as usize;
        let n = (len - filled).min(bytes.len());
        self.receive.body[filled..filled + n].copy_from_slice(&bytes[..n]);
        if filled + n < len {
            self.receive.at = At::Body { header, filled: filled + n };
        } else {
            self.receive.reset();
            self.on_body(now, header);
        }
        n
    }

    /// A reply with a small body, or none, has arrived whole.
    fn on_body(&mut self, now: Instant, header: ReplyHeader) {
        let body = &self.receive.body[..header.payload_len as usize];
        if let State::Hello { .. } = self.state {
            match judge(&self.who, self.grant.as_ref(), header.status, body) {
                Verdict::Welcome(welcome) => self.welcomed(now, welcome),
                Verdict::Later { status, text } => {
                    self.dropped(now, DropReason::Refused { status, text });
                }
                Verdict::StandBy => self.stand_by(now),
                Verdict::Fenced => self.fence(),
                Verdict::Lost(reason) => self.lose(reason),
                Verdict::Violation(violation) => self.dropped(now, violation.into()),
            }
        } else if header.status != Status::Ok {
            let text = sentence(body);
            self.on_refusal(now, header, text);
        } else if matches!(header.opcode, Opcode::Access | Opcode::Handoff) {
            // A small copy, so that the buffer is free again.
            let body = body.to_vec();
            self.on_answer(now, header.seq, &body);
        } else {
            let event = event(body, self.event);
            match event {
                Ok((id, event)) => self.on_event(now, header.seq, id, event),
                Err(violation) => self.dropped(now, violation.into()),
            }
        }
    }

    fn on_refusal(&mut self, now: Instant, header: ReplyHeader, text: String) {
        let ReplyHeader { opcode, seq, status, .. } = header;
        let error = match status {
            Status::StaleEpoch if self.hands_over() => return self.on_stale(now, seq, text),
            Status::StaleEpoch if self.who.mode == AccessMode::Owner => return self.fence(),
            // A reader takes the new epoch with its next HELLO.
            Status::StaleEpoch => return self.dropped(now, DropReason::NewEpoch),
            Status::Gone => return self.lose(LostReason::Gone),
            Status::Busy | Status::Protocol => {
                return self.dropped(now, DropReason::Refused { status, text });
            }
            // It could not record what was asked for, and has not done it: a full disk.
            Status::Io if matches!(opcode, Opcode::Handoff | Opcode::Open) => {
                return self.dropped(now, DropReason::Refused { status, text });
            }
            Status::OutOfRange if opcode.has_range() => IoError::OutOfRange,
            Status::NoSpace if opcode.is_mutation() => IoError::NoSpace,
            Status::NotPermitted if opcode.is_mutation() => IoError::ReadOnly,
            Status::Io if opcode.has_range() || opcode == Opcode::Flush => IoError::Io,
            _ => {
                return self.dropped(now, Violation::Status { opcode, status }.into());
            }
        };
        if self.send.has_sent(seq) {
            self.finish(seq, Err(error));
        } else {
            self.dropped(now, Violation::NotAsked { opcode, seq }.into());
        }
    }

    fn on_event(&mut self, now: Instant, seq: Seq, id: u64, event: Option<Event>) {
        self.event = id;
        self.finish(seq, Ok(()));
        if let Some(event) = event {
            match event.kind {
                EventKind::Deleted => return self.lose(LostReason::Gone),
                // The access record says what it means.
                EventKind::EpochChanged if self.hands_over() => {}
                EventKind::EpochChanged
                    if self.who.mode == AccessMode::Owner && event.value > self.stamp.epoch.0 =>
                {
                    return self.fence();
                }
                EventKind::EpochChanged if event.value > self.stamp.epoch.0 => {
                    return self.dropped(now, DropReason::NewEpoch);
                }
                EventKind::Resized => self.grown(event.value),
                EventKind::EpochChanged | EventKind::GoingAway => {}
            }
            self.notices.push_back(Notice::Event(event));
        }
        self.park_event();
    }

    /// The server answered `seq`: this is progress.
    pub(super) fn finish(&mut self, seq: Seq, mut result: Result<(), IoError>) {
        self.backoff.reset();
        let child = self.table.unanswered(seq);
        if let Some(child) = child
            && result.is_ok()
        {
            // Parts of a request count by themselves: one may be answered before a
            // power loss and the last one after it.
            if child.opcode.is_mutation() {
                self.account.acknowledged();
            } else if child.opcode == Opcode::Flush {
                result = self.account.flush_answered(self.table.mark(&child));
                if result.is_err() {
                    self.report_lost();
                }
            }
        }
        let released = child.is_some_and(|c| c.purpose == Purpose::Release);
        if let Some(completion) = self.table.answer(seq, result) {
            self.completed.push(completion);
            if self.handing.take_first() {
                self.notices.push_back(Notice::FirstAnswer);
            }
        }
        if released {
            self.notices.push_back(Notice::Released);
        }
        self.was_live &= self.table.is_live();
    }
}

/// Reads an event. Its number must be news; a kind of a later version is passed
/// over, but its number counts, or the server would tell it again and again.
fn event(body: &[u8], known: u64) -> Result<(u64, Option<Event>), Violation> {
    let (id, event) = match (Event::decode(body), body.first_chunk()) {
        (Ok(event), _) => (event.id, Some(event)),
        (Err(BodyError::Unknown { .. }), Some(id)) => (u64::from_le_bytes(*id), None),
        (Err(error), _) => return Err(error.into()),
    };
    if id <= known {
        return Err(Violation::EventOrder { known, found: id });
    }
    Ok((id, event))
}
