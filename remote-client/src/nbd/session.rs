//! One queue's conversation with an NBD server, over any number of connections.
//! Sans-IO: no socket, no clock, no log.
//!
//! ```text
//!   Backoff --until passed--> Connecting --connected--> Handshake --export--> Ready
//!      ^                          |                       |                     |
//!      +------ dropped -----------+-----------------------+---------------------+
//!   another export than the one that was opened: Lost
//! ```
//!
//! Promises:
//! - A request is completed at most once. A lost connection completes nothing:
//!   what is unanswered is sent again, whole and in the order of submission.
//! - Nothing is written outside the buffers of the READ that is answered.
//! - A server that is silent is waited for. NBD has no way to say that requests
//!   of an old connection are over, so a connection is given up only when it is
//!   known to be dead.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use super::handshake::{Export, Handshake, Progress, Refusal};
use super::receive::Receive;
use super::table::{Ask, Cut, Table};
use super::tls::TlsError;
use super::wire::{Command, Dialect, HeadError, REQUEST_BYTES_MAX, Request, request_bytes};
use crate::baton::Timing;
use crate::baton::session::backoff::Backoff;
use crate::volume::{Completion, Extent, IoError, Op, Tag};

const SECTOR_BYTES: u64 = 512;

/// A connection that was of use for this long earns an attempt without a pause.
const STEADY: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DropReason {
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    #[error("no export within {} ms", .0.as_millis())]
    HandshakeTimeout(Duration),
    #[error("the server closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(#[source] io::Error),
    #[error("the server does not serve us: {0}")]
    Refused(#[from] Refusal),
    #[error("no TLS with the server: {0}")]
    Tls(#[source] TlsError),
    #[error("the server is shutting down")]
    GoingAway,
    #[error("the server broke the protocol: {0}")]
    Violation(#[from] Violation),
}

/// What a server must not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("an answer to nothing that was asked")]
    NotAsked,
    #[error("a chunk of {0} bytes that cannot be")]
    ChunkLength(u64),
    #[error("data outside of what was read")]
    Range,
    #[error("a READ answered in part")]
    Short,
}

/// Why a volume is no longer the one that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LostReason {
    #[error("the export shrank from {from} to {to} bytes")]
    Shrunk { from: u64, to: u64 },
    #[error("the export has become read-only")]
    ReadOnly,
    #[error("the export now needs requests of at least {0} bytes")]
    Blocks(u32),
}

/// News for the driver.
#[derive(Debug)]
pub(crate) enum Notice {
    Ready(Export),
    Dropped(DropReason),
    Lost(LostReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Backoff { until: Instant },
    Connecting { since: Instant },
    Handshake { since: Instant },
    Ready { since: Instant },
    Lost,
}

/// As what the volume was opened; what the guest relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) read_only: bool,
}

/// What is asked of a server, at each connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes<'a> {
    pub(crate) export: &'a str,
    /// To be told of holes.
    pub(crate) map: bool,
    pub(crate) tls: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Session {
    pub(super) state: State,
    export_name: String,
    map: bool,
    tls: bool,
    /// TLS is to begin.
    secure: bool,
    opened: Option<Opened>,
    timing: Timing,
    backoff: Backoff,
    handshake: Option<Handshake>,
    pub(super) export: Option<Export>,
    pub(super) table: Table,
    pub(super) receive: Receive,
    /// Everything below was sent on this connection.
    sent_to: u64,
    /// Bytes of request `sent_to` that were sent.
    sent_part: usize,
    blocked: bool,
    completed: Vec<Completion>,
    notices: VecDeque<Notice>,
}

impl Session {
    /// Connects as soon as it is polled.
    pub(crate) fn new(wishes: Wishes<'_>, timing: Timing, seed: u64, now: Instant) -> Self {
        let Wishes { export, map, tls } = wishes;
        Self {
            state: State::Backoff { until: now },
            export_name: export.to_owned(),
            map,
            tls,
            secure: false,
            opened: None,
            timing,
            backoff: Backoff::new(timing.backoff_min, timing.backoff_max, seed),
            handshake: None,
            export: None,
            table: Table::new(0),
            receive: Receive::default(),
            sent_to: 1,
            sent_part: 0,
            blocked: false,
            completed: Vec::new(),
            notices: VecDeque::new(),
        }
    }

    /// What every later connection has to find again.
    pub(crate) fn set_opened(&mut self, opened: Opened) {
        self.opened = Some(opened);
    }

    pub(crate) fn has_size(&self, size_bytes: u64) -> bool {
        self.opened.is_some_and(|opened| opened.size_bytes >= size_bytes)
    }

    /// Room for so many requests. Nothing is in flight.
    pub(crate) fn set_depth(&mut self, depth: usize) {
        let mut table = Table::new(depth);
        std::mem::swap(&mut table, &mut self.table);
        self.sent_to = self.table.next();
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Bytes can be exchanged.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Handshake { .. } | State::Ready { .. })
    }

    pub(crate) fn has_socket(&self) -> bool {
        self.is_open() || matches!(self.state, State::Connecting { .. })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.table.in_flight() + self.completed.len()
    }

    pub(crate) fn pop_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    pub(crate) fn take_completions(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.completed);
    }

    /// Takes a request.
    pub(crate) fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        let bytes = data.iter().fold(0u64, |sum, v| sum.saturating_add(v.iov_len as u64));
        match self.judge(op, bytes) {
            Ok(Some((op, bytes))) => self.table.submit(tag, Ask::Op(op), data, bytes),
            Ok(None) => self.completed.push(Completion { tag, result: Ok(()) }),
            Err(error) => self.completed.push(Completion { tag, result: Err(error) }),
        }
    }

    /// Takes a question for the holes, which are told in order to `into`; false: the
    /// server does not know.
    pub(crate) fn submit_map(
        &mut self,
        tag: Tag,
        offset: u64,
        len: u64,
        into: &mut [Extent],
    ) -> bool {
        let known = self.export.is_none_or(|export| export.allocation.is_some());
        if !self.map || !known {
            return false;
        }
        let block = self.opened.map_or(SECTOR_BYTES, |opened| u64::from(opened.block_bytes));
        let is_on = |n: u64| n.is_multiple_of(block);
        let end = offset.checked_add(len);
        let fits = end.is_some_and(|end| self.has_size(end)) && is_on(offset) && is_on(len);
        if len == 0 || into.is_empty() || !fits {
            self.completed.push(Completion { tag, result: Err(IoError::OutOfRange) });
            return true;
        }
        let iov = [libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: size_of_val(into) }];
        self.table.submit(tag, Ask::Map { offset, len }, &iov, 1);
        true
    }

    /// What is to be asked for `op`; `None`: nothing.
    fn judge(&self, op: Op, bytes: u64) -> Result<Option<(Op, u64)>, IoError> {
        let Some(opened) = self.opened else { return Err(IoError::Io) };
        let (offset, len) = match op {
            Op::Flush if opened.read_only => return Ok(None),
            Op::Flush => return Ok(Some((op, 1))),
            Op::Read { offset } | Op::Write { offset } => (offset, bytes),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
        };
        let is_on = |n: u64, of: u64| n.is_multiple_of(of);
        let end = offset.checked_add(len).filter(|end| *end <= opened.size_bytes);
        let Some(end) = end.filter(|_| is_on(offset, SECTOR_BYTES) && is_on(len, SECTOR_BYTES))
        else {
            return Err(IoError::OutOfRange);
        };
        if opened.read_only && !matches!(op, Op::Read { .. }) {
            return Err(IoError::ReadOnly);
        }
        let block = u64::from(opened.block_bytes);
        if let Op::Discard { .. } = op {
            // A hint: what is not a whole block stays.
            let (first, last) = (offset.next_multiple_of(block), end / block * block);
            let len = last.saturating_sub(first);
            return Ok((len > 0).then_some((Op::Discard { offset: first, len }, len)));
        }
        if !is_on(offset, block) || !is_on(len, block) {
            return Err(IoError::Unsupported);
        }
        Ok((len > 0).then_some((op, len)))
    }

    pub(crate) fn wants_connect(&self, now: Instant) -> bool {
        matches!(self.state, State::Backoff { until } if now >= until)
    }

    pub(crate) fn connecting(&mut self, now: Instant) {
        self.state = State::Connecting { since: now };
    }

    pub(crate) fn connected(&mut self, now: Instant) {
        self.state = State::Handshake { since: now };
        self.handshake = Some(Handshake::new(&self.export_name, self.map, self.tls));
        (self.blocked, self.secure) = (false, false);
    }

    /// Whether TLS is to begin now; said once.
    pub(crate) fn take_secure(&mut self) -> bool {
        std::mem::take(&mut self.secure)
    }

    /// TLS is there.
    pub(crate) fn secured(&mut self) {
        if let Some(handshake) = &mut self.handshake {
            handshake.secured();
        }
    }

    /// The connection, or the attempt, ended.
    pub(crate) fn dropped(&mut self, now: Instant, reason: DropReason) {
        let steady = match self.state {
            State::Ready { since } => now.saturating_duration_since(since) >= STEADY,
            State::Connecting { .. } | State::Handshake { .. } => false,
            State::Backoff { .. } | State::Lost => return,
        };
        if steady {
            self.backoff.reset();
        }
        let polite = matches!(reason, DropReason::Refused(_) | DropReason::GoingAway);
        self.state = State::Backoff { until: now + self.backoff.next(polite) };
        self.handshake = None;
        self.receive.reset();
        self.table.restart();
        self.notices.push_back(Notice::Dropped(reason));
    }

    fn lose(&mut self, reason: LostReason) {
        self.state = State::Lost;
        self.receive.reset();
        self.table.restart();
        self.notices.push_back(Notice::Lost(reason));
    }

    /// When [`Session::on_timer`] wants to be called, if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Backoff { until } => Some(until),
            State::Connecting { since } => Some(since + self.timing.connect),
            State::Handshake { since } => Some(since + self.timing.hello),
            State::Ready { .. } | State::Lost => None,
        }
    }

    pub(crate) fn on_timer(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.state {
            State::Connecting { .. } => {
                self.dropped(now, DropReason::ConnectTimeout(self.timing.connect));
            }
            State::Handshake { .. } => {
                self.dropped(now, DropReason::HandshakeTimeout(self.timing.hello));
            }
            State::Backoff { .. } | State::Ready { .. } | State::Lost => {}
        }
    }

    /// Takes bytes that were received into a buffer of the driver.
    pub(crate) fn ingest(&mut self, now: Instant, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let used = match self.state {
                State::Handshake { .. } => self.shake(now, bytes),
                State::Ready { .. } => match self.take(bytes) {
                    Ok(used) => used,
                    Err(reason) => return self.dropped(now, reason),
                },
                _ => return,
            };
            bytes = &bytes[used..];
        }
    }

    fn shake(&mut self, now: Instant, bytes: &[u8]) -> usize {
        let Some(handshake) = &mut self.handshake else { return bytes.len() };
        match handshake.ingest(bytes) {
            Ok((used, Progress::More)) => used,
            Ok((used, Progress::Secure)) => {
                self.secure = true;
                used
            }
            Ok((used, Progress::Done(export))) => {
                self.found(now, export);
                used
            }
            Err(refusal) => {
                self.dropped(now, refusal.into());
                bytes.len()
            }
        }
    }

    fn found(&mut self, now: Instant, export: Export) {
        self.handshake = None;
        if let Some(opened) = &mut self.opened {
            let (from, to) = (opened.size_bytes, export.size_bytes);
            if to < from {
                return self.lose(LostReason::Shrunk { from, to });
            }
            if export.flags.read_only() && !opened.read_only {
                return self.lose(LostReason::ReadOnly);
            }
            if export.min_block > opened.block_bytes {
                return self.lose(LostReason::Blocks(export.min_block));
            }
            let block = u64::from(opened.block_bytes);
            opened.size_bytes = to / block * block;
        }
        self.state = State::Ready { since: now };
        self.export = Some(export);
        (self.sent_to, self.sent_part) = (self.table.next(), 0);
        self.notices.push_back(Notice::Ready(export));
    }

    pub(super) fn has_sent(&self, number: u64) -> bool {
        number < self.sent_to
    }

    /// Records an answer: this is progress.
    pub(super) fn finish(&mut self, number: u64, result: Result<(), IoError>) {
        self.backoff.reset();
        self.completed.extend(self.table.answer(number, result));
    }

    /// Whether there is something that can be sent now.
    pub(crate) fn has_unsent(&self) -> bool {
        match (&self.state, &self.handshake) {
            (State::Handshake { .. }, Some(handshake)) => !handshake.unsent().is_empty(),
            (State::Ready { .. }, _) if !self.blocked => {
                self.sent_to < self.table.next() || self.table.may_cut()
            }
            _ => false,
        }
    }

    /// Appends the bytes to be sent next to `iov`, which may grow to `max` entries;
    /// returns how many bytes they are. They stay where they are until the next
    /// call that takes `&mut self` other than `gather` and `sent`.
    pub(crate) fn gather(&mut self, iov: &mut Vec<libc::iovec>, max: usize) -> usize {
        match (self.state, &self.handshake, self.export) {
            (State::Handshake { .. }, Some(handshake), _) => {
                let rest = handshake.unsent();
                if !rest.is_empty() {
                    iov.push(libc::iovec {
                        iov_base: rest.as_ptr().cast_mut().cast(),
                        iov_len: rest.len(),
                    });
                }
                rest.len()
            }
            (State::Ready { .. }, _, Some(export)) => self.gather_requests(&export, iov, max),
            _ => 0,
        }
    }

    fn gather_requests(
        &mut self,
        export: &Export,
        iov: &mut Vec<libc::iovec>,
        max: usize,
    ) -> usize {
        let (mut number, mut offset, mut bytes) = (self.sent_to, self.sent_part, 0);
        while iov.len() < max {
            if number == self.table.next() {
                match self.table.cut(export) {
                    Cut::Added => {}
                    Cut::Nothing => break,
                    Cut::Done(completion) => {
                        self.completed.push(completion);
                        continue;
                    }
                }
            }
            let pushed = self.table.push_frame(number, export.dialect, offset, iov, max);
            bytes += pushed;
            if offset + pushed < self.table.frame_bytes(number, export.dialect) {
                break;
            }
            (number, offset) = (number + 1, 0);
        }
        bytes
    }

    /// The first `n` of the bytes gathered were sent.
    pub(crate) fn sent(&mut self, mut n: usize) {
        self.blocked = false;
        if let Some(handshake) = &mut self.handshake {
            return handshake.sent(n);
        }
        let Some(export) = self.export else { return };
        while n > 0 {
            let left = self.table.frame_bytes(self.sent_to, export.dialect) - self.sent_part;
            if n < left {
                self.sent_part += n;
                return;
            }
            n -= left;
            (self.sent_to, self.sent_part) = (self.sent_to + 1, 0);
        }
    }

    /// The socket takes no more for now.
    pub(crate) fn blocked(&mut self) {
        self.blocked = true;
    }

    /// Connected, and nothing is under way.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.is_ready() && self.in_flight() == 0 && self.sent_part == 0
    }

    /// What ends the connection politely, when nothing is under way on it.
    pub(crate) fn goodbye(&self) -> Option<([u8; REQUEST_BYTES_MAX], usize)> {
        let extended = self.export.filter(|_| self.is_at_rest())?.dialect == Dialect::Extended;
        let (command, cookie) = (Command::Disconnect, self.table.next());
        let request = Request { command, flags: 0, cookie, offset: 0, len: 0 };
        Some((request.encode(extended), request_bytes(extended)))
    }
}

#[cfg(test)]
mod tests;
