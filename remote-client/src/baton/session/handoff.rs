//! The session's part in a handoff: holding guest requests back, counting what
//! was sent, moving to another epoch, and asking.
//!
//! ```text
//!   FREE --hold--> WANTED --rests, and all of it is cut--> HELD
//!     ^                                                     |
//!     +------------------------ go -------------------------+
//! ```
//!
//! In HELD no guest request is cut; what was cut before is sent again as ever.
//! A connection in standby sends OPEN before the first request and cuts what
//! follows behind it, without waiting for the answer: the server makes what is
//! behind an OPEN wait for it.

use std::time::{Duration, Instant};

use baton_protocol::access::Phase;
use baton_protocol::frame::REQUEST_HEADER_BYTES;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Ask, Count, HandoffRequest, Open, Try};
use baton_protocol::{AccessMode, Epoch, Seq, Status};

use super::table::Purpose;
use super::{DropReason, Notice, Session, State, Violation};
use crate::volume::IoError;

/// Whether guest requests are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Hold {
    #[default]
    Free,
    /// As soon as the submitter rests and nothing it submitted is uncut.
    Wanted,
    Held,
}

/// Kinds of asks: one of each may be outstanding.
pub(super) const ASKS: usize = 5;

fn slot(ask: Asked) -> u8 {
    match ask {
        Asked::Seal => 0,
        Asked::Activate => 1,
        Asked::Reclaim => 2,
        Asked::Abdicate => 3,
        Asked::Unfreeze { .. } => 4,
    }
}

/// How long the control connection keeps back what nobody waits for: longer than a VM with many disks takes to start
/// its rings, each of which has its own word with the server first.
pub(super) const LATER: Duration = Duration::from_millis(50);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Handing {
    hold: Hold,
    /// Nothing was submitted since the submitter said that it rests.
    resting: bool,
    /// What a connection in standby has to show before data.
    opening: Option<Open>,
    /// When a control connection does what it keeps back: shows `opening`, asks for news.
    later: Option<Instant>,
    asks: [Option<(Try, Asked)>; ASKS],
    /// What a SEAL says.
    counts: Vec<Count>,
    /// The server's incarnation and the record's version, as known here.
    known: (u64, u64),
    /// The next answer to a guest request is news.
    first_due: bool,
}

impl Handing {
    pub(super) fn new(mode: AccessMode) -> Self {
        let hold = if mode == AccessMode::Standby { Hold::Held } else { Hold::Free };
        Self {
            hold,
            resting: true,
            opening: None,
            later: None,
            asks: [None; ASKS],
            counts: Vec::new(),
            known: (0, 0),
            first_due: false,
        }
    }

    pub(super) fn submitted(&mut self) {
        self.resting = false;
    }

    /// Whether the answer to a guest request is the first since a change of hands.
    pub(super) fn take_first(&mut self) -> bool {
        std::mem::take(&mut self.first_due)
    }
}

impl Session {
    /// Whether the server can hand the volume over and we take part.
    pub(crate) fn hands_over(&self) -> bool {
        self.grant.is_some_and(|grant| grant.handoff)
    }

    /// Cut no guest request once the submitter rests.
    pub(crate) fn hold(&mut self) {
        if self.handing.hold == Hold::Free {
            self.handing.hold = Hold::Wanted;
        }
        self.settle_hold();
    }

    /// The submitter submits nothing for now.
    pub(crate) fn rest(&mut self) {
        self.handing.resting = true;
        self.settle_hold();
    }

    pub(super) fn settle_hold(&mut self) {
        let Handing { hold, resting, .. } = self.handing;
        if hold == Hold::Wanted && resting && !self.table.has_waiting() {
            self.handing.hold = Hold::Held;
        }
    }

    /// What was sent on this queue, once no more will be.
    pub(crate) fn held_count(&mut self) -> Option<Count> {
        self.settle_hold();
        (self.handing.hold == Hold::Held).then(|| Count {
            queue: self.who.queue,
            last: Seq(self.table.next().0 - 1),
            lowest: self.table.lowest_guest(),
        })
    }

    /// Whether guest requests may be cut.
    pub(super) fn may_cut(&self) -> bool {
        self.handing.hold != Hold::Held
            && (self.who.mode != AccessMode::Standby || self.table.has_own(Purpose::Open))
    }

    /// Guest requests flow under `epoch`; a connection in standby shows `open`
    /// before them.
    pub(crate) fn go(&mut self, now: Instant, epoch: Epoch, open: Option<Open>) {
        self.handing.hold = Hold::Free;
        self.handing.first_due = true;
        if self.who.mode == AccessMode::Standby && open.is_some() {
            self.handing.opening = open;
        }
        self.adopt(now, epoch);
        // A control connection has no data to show it before.
        if self.who.watch {
            self.keep_back(now)
        } else {
            self.add_opening(now)
        }
        self.hurry(now);
    }

    /// The decision is to be shown, or was and is not answered.
    pub(super) fn is_opening(&self) -> bool {
        self.who.mode == AccessMode::Standby && self.handing.opening.is_some()
    }

    /// Shows the decision on a connection that carries no data.
    pub(crate) fn open(&mut self, now: Instant, open: Open) {
        self.handing.opening = Some(open);
        self.add_opening(now);
    }

    /// The same, but not now.
    pub(crate) fn open_later(&mut self, now: Instant, open: Open) {
        self.handing.opening = Some(open);
        self.keep_back(now);
    }

    fn keep_back(&mut self, now: Instant) {
        self.handing.later.get_or_insert(now + LATER);
    }

    pub(super) fn kept_back_until(&self) -> Option<Instant> {
        self.handing.later
    }

    /// Does what was kept back, when it is time.
    pub(super) fn catch_up(&mut self, now: Instant) {
        if self.handing.later.is_some_and(|at| at <= now) {
            self.handing.later = None;
            self.add_opening(now);
            self.park_access(now);
        }
    }

    fn add_opening(&mut self, now: Instant) {
        if let (Some(open), State::Ready { .. }) = (self.handing.opening, self.state)
            && !self.table.has_own(Purpose::Open)
        {
            self.make_room(now);
            self.table.add_own(Purpose::Open, 0, 0, &open.encode(), &self.stamp);
        }
    }

    /// Sends the SEAL with these counts from its next connection on.
    pub(crate) fn set_counts(&mut self, counts: Vec<Count>) {
        self.handing.counts = counts;
    }

    /// Asks the server, until it has answered. One of each kind at a time.
    pub(crate) fn ask(&mut self, now: Instant, attempt: Try, ask: Asked) {
        let at = slot(ask);
        if self.table.has_own(Purpose::Handoff(at)) {
            return;
        }
        self.make_room(now);
        self.handing.asks[usize::from(at)] = Some((attempt, ask));
        let body = self.request(attempt, ask);
        self.table.add_own(Purpose::Handoff(at), 0, 0, &body, &self.stamp);
    }

    fn request(&self, attempt: Try, ask: Asked) -> Vec<u8> {
        let ask = match ask {
            Asked::Seal => Ask::Seal(self.handing.counts.clone()),
            Asked::Activate => Ask::Activate,
            Asked::Reclaim => Ask::Reclaim,
            Asked::Abdicate => Ask::Abdicate,
            Asked::Unfreeze { boot_id } => Ask::Unfreeze { boot_id },
        };
        HandoffRequest { attempt, ask }.encode()
    }

    /// Parked requests keep their numbers while others come and go, so the
    /// window can fill up behind them; on a new connection they get new ones.
    fn make_room(&mut self, now: Instant) {
        if !self.has_room(0) {
            if self.is_open() {
                self.dropped(now, DropReason::Renumber);
            }
            self.table.forget_parked();
        }
    }

    /// Requests carry `epoch` from now on, those sent already from the next
    /// connection on.
    pub(super) fn adopt(&mut self, now: Instant, epoch: Epoch) {
        if let Some(grant) = &mut self.grant {
            grant.epoch = epoch;
        }
        if self.stamp.epoch == epoch {
            return;
        }
        // A header that is half sent cannot change.
        if self.is_ready() && (1..REQUEST_HEADER_BYTES).contains(&self.send.partial()) {
            self.dropped(now, DropReason::NewEpoch);
        }
        self.stamp.epoch = epoch;
        self.table.restamp(epoch);
    }

    /// Tries to connect at once, if that is what is waited for.
    pub(crate) fn hurry(&mut self, now: Instant) {
        if let State::Backoff { until } = &mut self.state {
            *until = now.min(*until);
        }
    }

    /// A connection was welcomed: what has to be on it, in front of data.
    pub(super) fn welcomed_to_handoff(&mut self, now: Instant) {
        if !self.hands_over() {
            return;
        }
        if self.table.has_own(Purpose::Handoff(slot(Asked::Seal)))
            && let Some((attempt, ask)) = self.handing.asks[usize::from(slot(Asked::Seal))]
        {
            let body = self.request(attempt, ask);
            self.table.replace_body(Purpose::Handoff(slot(ask)), &body);
        }
        self.handing.later = None;
        if self.who.mode == AccessMode::Standby {
            self.add_opening(now);
        }
        self.park_access(now);
    }

    pub(super) fn park_access(&mut self, now: Instant) {
        if self.who.watch && self.hands_over() && !self.table.has_own(Purpose::Access) {
            self.make_room(now);
            let (boot_id, version) = self.handing.known;
            self.table.add_own(Purpose::Access, version, boot_id, &[], &self.stamp);
        }
    }

    /// The body of an answer to ACCESS or HANDOFF arrived.
    pub(super) fn on_answer(&mut self, now: Instant, seq: Seq, body: &[u8]) {
        let answer = match Answer::decode(body) {
            Ok(answer) => answer,
            Err(error) => return self.dropped(now, Violation::Handoff(error).into()),
        };
        if self.grant.is_some_and(|grant| grant.volume != answer.record.volume) {
            return self.dropped(now, Violation::OtherRecord.into());
        }
        let Some(child) = self.table.unanswered(seq) else { return };
        if let Purpose::Handoff(at) = child.purpose {
            self.finish(seq, Ok(()));
            if let Some((attempt, ask)) = self.handing.asks[usize::from(at)].take() {
                let answer = Box::new(answer);
                self.notices.push_back(Notice::Answered { attempt, ask, answer });
            }
            return;
        }
        let known = (answer.boot_id, answer.record.version);
        if known == self.handing.known {
            return self.dropped(now, Violation::OldRecord.into());
        }
        self.handing.known = known;
        self.finish(seq, Ok(()));
        // What follows a seal is what this session decides, or loses by: no news until it has had its time.
        let quiet = answer.record.phase == Phase::Sealed && self.who.mode == AccessMode::Standby;
        let (boot_id, record) = (answer.boot_id, Box::new(answer.record));
        self.notices.push_back(Notice::View { boot_id, record });
        if quiet { self.keep_back(now) } else { self.park_access(now) }
    }

    /// OPEN was answered with success: the connection is the owner's.
    pub(super) fn opened(&mut self, now: Instant, seq: Seq, epoch: Epoch) {
        self.finish(seq, Ok(()));
        self.handing.opening = None;
        self.who.mode = AccessMode::Owner;
        self.adopt(now, epoch);
        self.notices.push_back(Notice::Opened(Some(epoch)));
    }

    /// What carried our epoch, or the decision we showed, was refused. Only the
    /// record tells whether that is for good, so the connection comes again,
    /// politely, until it is welcomed or the volume is parked.
    pub(super) fn on_stale(&mut self, now: Instant, seq: Seq, text: String) {
        let shown = self.table.unanswered(seq).is_some_and(|c| c.purpose == Purpose::Open);
        if shown && self.who.watch {
            self.finish(seq, Err(IoError::Io));
            self.handing.opening = None;
            return self.notices.push_back(Notice::Opened(None));
        }
        if self.table.in_flight() > 0 {
            self.notices.push_back(Notice::Stuck);
        }
        self.dropped(now, DropReason::Refused { status: Status::StaleEpoch, text });
    }

    /// The volume is not this session's now: its control connection watches.
    pub(super) fn stand_by(&mut self, now: Instant) {
        self.who.mode = AccessMode::Standby;
        self.state = State::Backoff { until: now };
        self.was_live = false;
        self.receive.reset();
        self.notices.push_back(Notice::StandsBy);
    }
}
