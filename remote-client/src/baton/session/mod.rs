//! One queue's conversation with its storage server, over any number of
//! connections. Sans-IO: no socket, no clock, no log; the driver passes bytes
//! and `now` in, and takes bytes, completions and notices out.
//!
//! ```text
//!   Idle --start--> Backoff <------------- dropped, refused for now, silent
//!                     | until passed             ^        ^        ^
//!                     v                          |        |        |
//!                 Connecting --connected--> Hello ---WELCOME---> Ready
//!                                             |                    |
//!             grant over (StaleEpoch) --------+--------------------+--> Fenced
//!             another or no volume -----------+--------------------+--> Lost
//! ```
//!
//! Promises:
//! - A request is completed at most once, and only by the server's answer to
//!   it. A lost connection completes nothing: unanswered requests are sent
//!   again, in order and with their old sequence numbers, after the WELCOME of
//!   the next one.
//! - A FLUSH that the server answered with success is completed with an error
//!   when changes from before it were lost with the server's page cache: `ledger`.
//! - After Fenced or Lost nothing is completed and no guest memory is touched.
//! - Whatever the server sends, nothing is written outside the buffers of the
//!   READ that it answers, and nothing panics: the connection is dropped.
//! - No allocation per request once each slot was used.

pub(crate) mod backoff;
mod handoff;
mod handshake;
mod receive;
mod send;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::access::AccessRecord;
use baton_protocol::frame::PAYLOAD_BYTES_MAX;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Try};
use baton_protocol::message::{Event, Welcome};
use baton_protocol::units::SECTOR_BYTES;
use baton_protocol::{AccessMode, Epoch, Features, Seq, Status};

use super::ledger::{Account, Ledger};
use crate::volume::{Completion, IoError, Op, Tag};
use backoff::Backoff;
use handoff::Handing;
pub(crate) use handshake::{Grant, Identity, LostReason, Violation};
use receive::Receive;
use send::Send;
use table::{Purpose, RING, Stamp, Table};

/// How long a session waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For a connection to be made.
    pub connect: Duration,
    /// For the answer to HELLO. Longer than the rest: the server first waits
    /// until the requests of this queue's old connection have drained.
    pub hello: Duration,
    /// Requests are outstanding and nothing was heard: ask whether anybody is
    /// there.
    pub ping_after: Duration,
    /// Nothing was heard after that either: the connection is dead.
    pub dead_after: Duration,
    /// First pause between attempts to connect.
    pub backoff_min: Duration,
    /// Longest pause between attempts to connect.
    pub backoff_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            hello: Duration::from_secs(10),
            ping_after: Duration::from_secs(5),
            dead_after: Duration::from_secs(5),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_secs(1),
        }
    }
}

/// A connection that was of use for this long earns an attempt without a pause.
const STEADY: Duration = Duration::from_secs(1);

/// Window places kept free of guest requests, so that a PING gets through while
/// one request holds up the window.
const PING_RESERVE: u64 = 32;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DropReason {
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    #[error("no answer to HELLO within {} ms", .0.as_millis())]
    HelloTimeout(Duration),
    #[error("the server closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(#[source] io::Error),
    #[error("nothing heard for {} ms", .0.as_millis())]
    Silent(Duration),
    #[error("the server says `{status}`: {text}")]
    Refused { status: Status, text: String },
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the volume has a new epoch")]
    NewEpoch,
    #[error("requests that wait at the server need new numbers")]
    Renumber,
}

/// News for the driver.
#[derive(Debug)]
pub(crate) enum Notice {
    /// A connection was welcomed.
    Welcomed(Welcome),
    /// A connection, or an attempt at one, ended; there will be another.
    Dropped(DropReason),
    /// Final.
    Fenced,
    /// Final.
    Lost(LostReason),
    /// From the parked EVENT request.
    Event(Event),
    /// The volume was given back.
    Released,
    /// So many changes were acknowledged, not flushed, and may be gone.
    WritesLost(u64),
    /// The volume is not this session's now; it watches.
    StandsBy,
    /// The access record is news.
    View { boot_id: u64, record: Box<AccessRecord> },
    /// An ask was answered.
    Answered { attempt: Try, ask: Asked, answer: Box<Answer> },
    /// The decision was shown; `None`: refused.
    Opened(Option<Epoch>),
    /// Unanswered guest requests were refused with their epoch.
    Stuck,
    /// A guest request was answered, the first since the data path went on.
    FirstAnswer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Idle,
    Backoff { until: Instant },
    Connecting { since: Instant },
    Hello { since: Instant },
    Ready { since: Instant },
    Fenced,
    Lost,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Session {
    who: Identity,
    timing: Timing,
    state: State,
    grant: Option<Grant>,
    /// What requests say about their sender; the epoch is the last WELCOME's.
    stamp: Stamp,
    table: Table,
    account: Account,
    send: Send,
    receive: Receive,
    backoff: Backoff,
    /// Of this connection: largest payload, and widest spread of seqs.
    payload_max: u32,
    window: u64,
    /// When something was last heard, or the first request after silence sent.
    heard: Instant,
    /// When the outstanding PING was queued.
    pinged: Option<Instant>,
    /// The server owed an answer when last looked.
    was_live: bool,
    /// From HELLO to WELCOME of this connection.
    welcomed_after: Option<Duration>,
    /// Number of the last event known.
    event: u64,
    completed: Vec<Completion>,
    notices: VecDeque<Notice>,
    handing: Handing,
}

impl Session {
    /// A session for up to `depth` requests, whose first one gets `first`.
    /// With a `grant` it rejoins; without, its first HELLO claims the volume.
    pub(crate) fn new(
        who: Identity,
        timing: Timing,
        grant: Option<Grant>,
        depth: usize,
        first: Seq,
        seed: u64,
        now: Instant,
    ) -> Self {
        let epoch = grant.map_or(Epoch(0), |grant| grant.epoch);
        Self {
            stamp: Stamp { session: who.session, queue: who.queue, epoch },
            handing: Handing::new(who.mode),
            who,
            timing,
            state: State::Idle,
            grant,
            table: Table::new(depth, first),
            account: Arc::<Ledger>::default().open(),
            send: Send::default(),
            receive: Receive::default(),
            backoff: Backoff::new(timing.backoff_min, timing.backoff_max, seed),
            payload_max: PAYLOAD_BYTES_MAX,
            window: RING,
            heard: now,
            pinged: None,
            was_live: false,
            welcomed_after: None,
            event: 0,
            completed: Vec::with_capacity(depth),
            notices: VecDeque::new(),
        }
    }

    /// The same session on the books of its volume; before anything was submitted.
    pub(crate) fn on_ledger(mut self, ledger: &Arc<Ledger>) -> Self {
        self.account = ledger.open();
        self
    }

    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        self.account.ledger()
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    pub(crate) fn who(&self) -> &Identity {
        &self.who
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Whether a connection should exist: bytes may go both ways.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Hello { .. } | State::Ready { .. })
    }

    /// Whether the driver should hold a socket.
    pub(crate) fn has_socket(&self) -> bool {
        self.is_open() || matches!(self.state, State::Connecting { .. })
    }

    /// How long the server took to welcome the last connection: in standby, where it writes nothing, a round trip.
    pub(crate) fn welcomed_after(&self) -> Option<Duration> {
        self.welcomed_after
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.table.in_flight() + self.completed.len()
    }

    /// The next sequence number: a later session of the same queue begins here.
    pub(crate) fn next_seq(&self) -> Seq {
        self.table.next()
    }

    pub(crate) fn grant(&self) -> Option<Grant> {
        self.grant
    }

    /// The volume is known to have grown.
    pub(crate) fn grown(&mut self, size_bytes: u64) {
        if let Some(grant) = &mut self.grant {
            grant.size_bytes = grant.size_bytes.max(size_bytes);
        }
    }

    pub(crate) fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    pub(crate) fn pop_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// What was popped and is somebody else's to hear, in front of the rest.
    pub(crate) fn put_back(&mut self, notices: Vec<Notice>) {
        for notice in notices.into_iter().rev() {
            self.notices.push_front(notice);
        }
    }

    /// Moves what is finished to the end of `completions`.
    pub(crate) fn take_completions(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.completed);
    }

    /// Takes a guest request. The buffers are used from now until its
    /// completion was taken.
    pub(crate) fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        self.settle_hold();
        self.handing.submitted();
        let bytes = data.iter().fold(0u64, |sum, v| sum.saturating_add(v.iov_len as u64));
        let (offset, len) = match op {
            Op::Read { offset } | Op::Write { offset } => (offset, bytes),
            Op::Flush => return self.table.submit_flush(tag, self.account.flush_begins()),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
        };
        let aligned = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        let answer = if !aligned || offset.checked_add(len).is_none() {
            Some(Err(IoError::OutOfRange))
        } else if self.who.mode == AccessMode::ReadOnly && !matches!(op, Op::Read { .. }) {
            Some(Err(IoError::ReadOnly))
        } else if len == 0 {
            Some(Ok(()))
        } else {
            None
        };
        match answer {
            Some(result) => self.completed.push(Completion { tag, result }),
            None => self.table.submit(tag, op, data, bytes),
        }
    }

    /// Gives the volume back, once connected.
    pub(crate) fn release(&mut self) {
        if !self.table.has_own(Purpose::Release) && self.has_room(0) {
            self.table.add_own(Purpose::Release, 0, 0, &[], &self.stamp);
        }
    }

    /// Begins to connect.
    pub(crate) fn start(&mut self, now: Instant) {
        if self.state == State::Idle {
            self.state = State::Backoff { until: now };
        }
    }

    /// Whether it is time to make a connection; then the driver makes one and
    /// calls [`Session::connecting`].
    pub(crate) fn wants_connect(&self, now: Instant) -> bool {
        matches!(self.state, State::Backoff { until } if now >= until)
    }

    pub(crate) fn connecting(&mut self, now: Instant) {
        if matches!(self.state, State::Backoff { .. }) {
            self.state = State::Connecting { since: now };
        }
    }

    /// The connection stands: HELLO goes out.
    pub(crate) fn connected(&mut self, now: Instant) {
        if !matches!(self.state, State::Connecting { .. }) {
            return;
        }
        self.state = State::Hello { since: now };
        self.table.forget_parked();
        // Readers hold no grant: they take the volume's epoch as it is.
        let epoch = match (self.who.mode, self.grant) {
            (AccessMode::Owner, Some(grant)) => grant.epoch,
            _ => Epoch(0),
        };
        let hello = handshake::hello(&self.who, epoch, self.table.lowest());
        self.send = Send::hello(hello, self.table.lowest());
        self.receive.reset();
        self.pinged = None;
    }

    /// The connection, or the attempt, ended.
    pub(crate) fn dropped(&mut self, now: Instant, reason: DropReason) {
        let ready_for = match self.state {
            State::Ready { since } => now.saturating_duration_since(since),
            State::Connecting { .. } | State::Hello { .. } => Duration::ZERO,
            State::Idle | State::Backoff { .. } | State::Fenced | State::Lost => return,
        };
        if ready_for >= STEADY {
            self.backoff.reset();
        }
        let polite = matches!(reason, DropReason::Refused { .. });
        let pause = self.backoff.next(polite);
        self.state = State::Backoff { until: now + pause };
        self.pinged = None;
        self.was_live = false;
        self.receive.reset();
        self.notices.push_back(Notice::Dropped(reason));
    }

    /// The grant is over.
    pub(crate) fn fence(&mut self) {
        if !matches!(self.state, State::Fenced | State::Lost) {
            self.state = State::Fenced;
            self.receive.reset();
            self.notices.push_back(Notice::Fenced);
        }
    }

    /// The volume is not, or no longer, the one that is meant.
    pub(crate) fn lose(&mut self, reason: LostReason) {
        if !matches!(self.state, State::Fenced | State::Lost) {
            self.state = State::Lost;
            self.receive.reset();
            self.notices.push_back(Notice::Lost(reason));
        }
    }

    /// When [`Session::on_timer`] wants to be called, if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Backoff { until } => Some(until),
            State::Connecting { since } => Some(since + self.timing.connect),
            State::Hello { since } => Some(since + self.timing.hello),
            State::Ready { .. } => {
                [self.silent_at(), self.kept_back_until()].into_iter().flatten().min()
            }
            State::Idle | State::Fenced | State::Lost => None,
        }
    }

    /// When a server that owes an answer has been silent for too long: for a PING, or for good.
    fn silent_at(&self) -> Option<Instant> {
        self.was_live.then(|| match self.pinged {
            Some(at) => at + self.timing.dead_after,
            None => self.heard + self.timing.ping_after,
        })
    }

    /// Acts on whatever deadline has passed. May be called at any time.
    pub(crate) fn on_timer(&mut self, now: Instant) {
        if let State::Ready { .. } = self.state {
            self.catch_up(now);
            if self.silent_at().is_none_or(|at| now < at) {
                return;
            }
        } else if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.state {
            State::Connecting { .. } => {
                self.dropped(now, DropReason::ConnectTimeout(self.timing.connect));
            }
            State::Hello { .. } => self.dropped(now, DropReason::HelloTimeout(self.timing.hello)),
            State::Ready { .. } if self.pinged.is_some() => {
                let silence = now.saturating_duration_since(self.heard);
                self.dropped(now, DropReason::Silent(silence));
            }
            State::Ready { .. } => {
                self.pinged = Some(now);
                if self.has_room(0) {
                    self.table.add_own(Purpose::Ping, 0, 0, &[], &self.stamp);
                }
            }
            State::Idle | State::Backoff { .. } | State::Fenced | State::Lost => {}
        }
    }

    /// Whether the window takes another request and still has `reserve` places.
    fn has_room(&self, reserve: u64) -> bool {
        let spread = self.table.next().0 - self.table.lowest().0;
        // A server with a tiny window still gets one request at a time.
        spread < self.window.saturating_sub(reserve).max(1)
    }

    fn welcomed(&mut self, now: Instant, welcome: Welcome) {
        if self.table.longest() > welcome.payload_bytes_max {
            // Requests were cut for a server that took more.
            return self.dropped(now, Violation::Welcome("payload limit").into());
        }
        if let State::Hello { since } = self.state {
            self.welcomed_after = Some(now.saturating_duration_since(since));
        }
        self.state = State::Ready { since: now };
        // Until the decision was shown it is the other side's epoch.
        let granted = self.grant.filter(|_| self.is_opening());
        let epoch = granted.map_or(welcome.epoch, |grant| grant.epoch);
        // What was agreed first is what the driver relies on.
        let handoff = match self.grant {
            Some(grant) => grant.handoff,
            None => welcome.features.contains(Features::HANDOFF),
        };
        self.grant = Some(Grant {
            volume: welcome.volume,
            epoch,
            block_bytes: welcome.block_bytes,
            size_bytes: welcome.size_bytes,
            handoff,
        });
        self.payload_max = welcome.payload_bytes_max.min(PAYLOAD_BYTES_MAX) / 4096 * 4096;
        self.window = u64::from(welcome.window_requests).min(RING);
        self.event = welcome.event_id;
        self.stamp.epoch = epoch;
        self.table.restamp(epoch);
        self.heard = now;
        self.notices.push_back(Notice::Welcomed(welcome));
        self.account.welcomed(welcome.durability_generation);
        self.report_lost();
        self.park_event();
        self.welcomed_to_handoff(now);
    }

    fn report_lost(&mut self) {
        let lost = self.account.take_lost();
        if lost > 0 {
            self.notices.push_back(Notice::WritesLost(lost));
        }
    }

    fn park_event(&mut self) {
        if self.who.watch && !self.table.has_own(Purpose::Event) && self.has_room(0) {
            self.table.add_own(Purpose::Event, self.event, 0, &[], &self.stamp);
        }
    }
}
