//! The backend's half of a handoff: one machine for all volumes of a VM, as the
//! source, the destination, or both in turn. Pure: facts in, what to send and
//! what the data path may do out.
//!
//! ```text
//!                     rings stop under            all SEALED
//!           (armed)   a migration                                winner: destination
//!  SERVING ---------> SEALING ----------> SEALED ---------------------------> PARKED
//!     ^                  |                  |  rings start again
//!     |  reclaim won     v                  v
//!     +------------- RECLAIMING <-----------+
//!
//!            all members armed   all SEALED, rings start      granted
//!  STANDBY ---------> READY ----------> ACTIVATING ------------------> SERVING
//!                       |                   |  lost, abdicated
//!                       +-------------------+------------------------> PARKED
//! ```
//!
//! Rules:
//! - Nothing is decided here. The anchor's record decides; this machine asks,
//!   repeats what was not answered, and obeys.
//! - The data path of a volume is held from the moment its seal is sent until
//!   the storage has granted an epoch again. Parked means held for ever: the
//!   guest sees no error.
//! - The source never says that it did not seal a volume to which it has sent a
//!   seal. The destination never activates what it has not seen sealed whole,
//!   nor after it has abdicated, nor abdicates after it has activated, nor
//!   before it has seen for itself that no process before it can have.
//!
//! Does not know rings, sockets or clocks. Each ask may be repeated by the
//! transport at will: all are idempotent.
//!
//! | module | noun |
//! |---|---|
//! | `words` | what goes in and comes out |

#[cfg(test)]
mod tests;
mod words;

use super::message::{Answer, Outcome};
use super::{Handoff, Members, Proof, Side, Try};
use crate::access::{AccessRecord, Phase};
use crate::units::{Epoch, SessionId, VolumeId};

pub use words::{Asked, Input, Order, Output, Parked, Standing};

/// One volume of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Member {
    volume: VolumeId,
    /// Epoch under which the data path may send.
    granted: Option<Epoch>,
    /// The VMM's rings run.
    running: bool,
    /// The rings were stopped under a migration and not started since.
    stopped: bool,
    /// New requests are held.
    held: bool,
    /// To which try a seal was sent.
    seal_sent: Option<Try>,
    /// Which try, with which destination epoch, was seen sealed.
    sealed: Option<(Try, Epoch)>,
    /// Incarnation and version of the record as heard when `granted` was
    /// granted: what was heard until then says nothing about who lost since.
    heard_at_grant: Option<(u64, u64)>,
    asks: [Ask; KINDS],
}

/// How one kind of ask stands: it is repeated only when the record has changed
/// since its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Ask {
    /// In which try it is on its way.
    outstanding: Option<Try>,
    /// The try in which it was answered, incarnation of the server and version
    /// of the record at the answer.
    answered_at: Option<(Try, u64, u64)>,
}

const KINDS: usize = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Seal = 0,
    Activate = 1,
    Reclaim = 2,
    Abdicate = 3,
    Unfreeze = 4,
    Open = 5,
}

impl From<Asked> for Kind {
    fn from(ask: Asked) -> Self {
        match ask {
            Asked::Seal => Self::Seal,
            Asked::Activate => Self::Activate,
            Asked::Reclaim => Self::Reclaim,
            Asked::Abdicate => Self::Abdicate,
            Asked::Unfreeze { .. } => Self::Unfreeze,
        }
    }
}

/// A member's record as last heard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    boot_id: u64,
    record: AccessRecord,
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Role {
    name: String,
    session: SessionId,
    members: Vec<Member>,
    /// What a plan has to say of the members.
    whole: Members,
    views: Vec<Option<View>>,
    /// The source wants to come back, whether or not its rings run.
    wants_back: bool,
    /// The destination may activate without its rings.
    ordered: bool,
    seal_ordered: bool,
    /// The try in which ACTIVATE was sent; it may have been carried out.
    activate_sent: Option<Try>,
    /// The try that this destination gave up.
    abdicated: Option<Try>,
    /// The only try in which this process may be the destination.
    bound: Option<Try>,
    /// The try that this process has seen undecided: a member not yet sealed,
    /// or the anchor sealed and with its memory. No incarnation before it had
    /// activated by then, and none can have run since: so it may promise for
    /// them all that none ever did.
    witnessed: Option<Try>,
    /// The last handoff that concerned this VM, for when it is over at the
    /// members before this process could finish it.
    last: Option<Focus>,
    won: Option<(Try, Proof)>,
    parked: Option<Parked>,
    out: Vec<Output>,
}

/// The handoff that concerns this VM, as its members' records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Focus {
    attempt: Try,
    side: Side,
    /// Position of the anchor.
    anchor: Option<usize>,
}

impl Role {
    /// A VM with these volumes, whose backend has this owner name and
    /// incarnation. Nothing is granted yet: say [`Input::Claimed`] for each
    /// volume that was claimed when it was opened.
    #[must_use]
    pub fn new(name: &str, session: SessionId, volumes: &[VolumeId]) -> Self {
        let member = |volume: &VolumeId| Member {
            volume: *volume,
            granted: None,
            running: false,
            stopped: false,
            held: true,
            seal_sent: None,
            sealed: None,
            heard_at_grant: None,
            asks: [Ask::default(); KINDS],
        };
        Self {
            name: name.to_owned(),
            session,
            members: volumes.iter().map(member).collect(),
            whole: Members::of(volumes.iter().copied()),
            views: vec![None; volumes.len()],
            wants_back: false,
            ordered: false,
            seal_ordered: false,
            activate_sent: None,
            abdicated: None,
            bound: None,
            witnessed: None,
            last: None,
            won: None,
            parked: None,
            out: Vec::new(),
        }
    }

    /// Takes a fact and says what is to be done. A member that does not exist is
    /// passed over.
    pub fn step(&mut self, input: Input) -> Vec<Output> {
        self.learn(input);
        if self.parked.is_none() {
            self.decide();
        }
        std::mem::take(&mut self.out)
    }

    /// Why everything is held for ever, if it is.
    #[must_use]
    pub fn parked(&self) -> Option<Parked> {
        self.parked
    }

    /// Whether new requests of a member are held.
    #[must_use]
    pub fn is_held(&self, member: usize) -> bool {
        self.members.get(member).is_none_or(|member| member.held)
    }

    /// The epoch that a member's requests carry.
    #[must_use]
    pub fn granted(&self, member: usize) -> Option<Epoch> {
        self.members.get(member)?.granted
    }

    /// The handoff that concerns this VM now.
    #[must_use]
    pub fn attempt(&self) -> Option<Try> {
        self.focus().map(|focus| focus.attempt)
    }

    /// How the VM stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let all = |test: fn(&Member) -> bool| self.members.iter().all(test);
        let focus = self.focus();
        let sealed = focus.is_some_and(|focus| self.all_sealed(focus.attempt));
        if self.parked.is_some() {
            Standing::Parked
        } else if all(|member| !member.held) {
            Standing::Serving
        } else if focus.is_some_and(|focus| focus.side == Side::Destination) {
            let running = self.ordered || self.members.iter().any(|member| member.running);
            match (running, focus.is_some_and(|focus| self.is_ready(focus))) {
                (true, _) => Standing::Activating,
                (false, true) => Standing::Ready,
                (false, false) => Standing::Standby,
            }
        } else if self.is_coming_back() {
            Standing::Reclaiming
        } else if focus.is_some() {
            if sealed { Standing::Sealed } else { Standing::Sealing }
        } else {
            Standing::Standby
        }
    }

    fn learn(&mut self, input: Input) {
        match input {
            Input::View { member, boot_id, record } => self.see(member, boot_id, *record),
            Input::Claimed { member, epoch } => {
                let heard = self.heard(member);
                if let Some(member) = self.members.get_mut(member)
                    && self.parked.is_none()
                {
                    member.granted = Some(epoch);
                    member.heard_at_grant = heard;
                    member.held = false;
                }
            }
            Input::Started { member: at } => {
                let Some(member) = self.members.get_mut(at) else { return };
                member.running = true;
                member.stopped = false;
                self.seal_ordered = false;
            }
            Input::Stopped { member, migrating } => {
                let Some(member) = self.members.get_mut(member) else { return };
                member.running = false;
                member.stopped = migrating || self.seal_ordered;
            }
            Input::Answered { member, attempt, ask, answer } => {
                self.answered(member, attempt, ask, *answer);
            }
            Input::Opened { member, epoch } => self.opened(member, epoch),
            Input::Stuck { member } => {
                let sealed = self.members.get(member).is_some_and(|m| m.seal_sent.is_some());
                self.wants_back |= sealed && self.is_held(member);
            }
            Input::Order(order) => self.ordered(order),
        }
    }

    /// A source whose guest waits for a volume wants them all back.
    fn is_coming_back(&self) -> bool {
        self.wants_back || self.members.iter().any(|member| member.running && member.held)
    }

    fn ordered(&mut self, order: Order) {
        match order {
            Order::Seal => {
                self.seal_ordered = true;
                for member in &mut self.members {
                    member.stopped |= !member.running;
                }
            }
            Order::Activate => self.ordered = true,
            Order::Abdicate => {
                if let Some(focus) = self.focus()
                    && focus.side == Side::Destination
                    && self.activate_sent != Some(focus.attempt)
                {
                    self.abdicated = Some(focus.attempt);
                }
            }
            Order::Reclaim => {
                let focus = self.focus().or(self.last);
                self.wants_back |= focus.is_some_and(|focus| focus.side == Side::Source);
            }
        }
    }

    fn see(&mut self, at: usize, boot_id: u64, record: AccessRecord) {
        let Some(member) = self.members.get_mut(at) else { return };
        if record.volume != member.volume {
            return;
        }
        // Answers and pushes of one incarnation, out of order.
        let known = self.views[at].as_ref().map(|view| (view.boot_id, view.record.version));
        if known.is_some_and(|(boot, version)| boot == boot_id && record.version < version) {
            return;
        }
        if let Some(handoff) = &record.handoff {
            let anchor = handoff.plan.anchor == record.volume;
            if record.phase == Phase::Armed || (anchor && record.phase == Phase::Sealed) {
                self.witnessed = Some(handoff.plan.attempt);
            }
            let sealed = match record.phase {
                Phase::Sealed | Phase::Active => true,
                Phase::Frozen => handoff.sealed,
                _ => false,
            };
            let numbered = (handoff.plan.attempt, handoff.e_to);
            if sealed {
                member.sealed = Some(numbered);
            } else if member.sealed.is_some_and(|seen| seen != numbered) {
                // Another try, or the source was replaced before it sealed.
                member.sealed = None;
            }
        }
        self.views[at] = Some(View { boot_id, record });
    }

    fn answered(&mut self, at: usize, attempt: Try, ask: Asked, answer: Answer) {
        let Answer { outcome, boot_id, proof, record } = answer;
        if at >= self.members.len() {
            return;
        }
        // An answer about another incarnation than is there now settles nothing.
        let misdirected = matches!(ask, Asked::Unfreeze { boot_id: meant } if meant != boot_id);
        let stamp = (!misdirected).then_some((attempt, boot_id, record.version));
        let owned = record.owner.as_ref().is_some_and(|owner| owner.session == self.session);
        let epoch = record.epoch;
        let winner = record.winner(attempt);
        self.see(at, boot_id, record);
        self.members[at].asks[Kind::from(ask) as usize] =
            Ask { outstanding: None, answered_at: stamp };
        match (ask, outcome) {
            (Asked::Activate | Asked::Reclaim, Outcome::Granted) => {
                let side = if ask == Asked::Activate { Side::Destination } else { Side::Source };
                if let Some(proof) = proof
                    && winner == Some(side)
                    && owned
                {
                    self.won = Some((attempt, proof));
                    self.wants_back = false;
                    self.go(at, epoch);
                }
            }
            (Asked::Activate | Asked::Reclaim, Outcome::Lost) => self.park(Parked::Lost),
            (Asked::Activate | Asked::Reclaim, Outcome::NoSuchHandoff | Outcome::NotNominated)
                if !owned =>
            {
                self.park(Parked::Over)
            }
            (Asked::Abdicate, Outcome::Granted) if self.abdicated == Some(attempt) => {
                self.park(Parked::Abdicated);
            }
            // It can never be reached any more: finish as the owner.
            (Asked::Seal, Outcome::NotSealed) => {
                self.wants_back |= self.members[at].seal_sent == Some(attempt);
            }
            _ => {}
        }
    }

    fn opened(&mut self, at: usize, epoch: Option<Epoch>) {
        let Some(member) = self.members.get_mut(at) else { return };
        let heard = self.views[at].as_ref().map(|view| (view.boot_id, view.record.version));
        let ask = &mut member.asks[Kind::Open as usize];
        let asked = ask.outstanding.zip(heard);
        let answered_at = asked.map(|(attempt, (boot, version))| (attempt, boot, version));
        *ask = Ask { outstanding: None, answered_at };
        if let Some(epoch) = epoch
            && self.won.is_some()
        {
            self.go(at, epoch);
            self.members[at].heard_at_grant = heard;
        }
    }

    fn decide(&mut self) {
        self.bind();
        self.look_for_losses();
        if self.parked.is_some() {
            return;
        }
        for at in 0..self.members.len() {
            self.follow(at);
            self.decide_source(at);
        }
        if let Some(focus) = self.focus() {
            self.last = Some(focus);
        }
        if let Some(focus) = self.last
            && let Some(anchor) = focus.anchor
        {
            match focus.side {
                Side::Source => self.decide_reclaim(focus, anchor),
                Side::Destination => self.decide_destination(focus, anchor),
            }
        }
        self.decide_open();
    }

    /// A destination is good for one try only. A VMM that was given up in an
    /// earlier one may still start its rings, with memory that is out of date.
    fn bind(&mut self) {
        let Some(focus) = self.focus() else { return };
        if focus.side == Side::Destination {
            match self.bound {
                None => self.bound = Some(focus.attempt),
                Some(bound) if bound != focus.attempt => self.park(Parked::Over),
                Some(_) => {}
            }
        }
    }

    fn look_for_losses(&mut self) {
        // Once, not for each member: many volumes have many events, and each looks at all of them.
        let attempt = self.bound.or_else(|| self.attempt());
        for at in 0..self.members.len() {
            let Some(view) = &self.views[at] else { continue };
            let record = &view.record;
            let mine = record.owner.as_ref().is_some_and(|o| o.session == self.session);
            let decided = match record.phase {
                Phase::Sealed | Phase::Frozen => false,
                // The source is the owner: another incarnation of this one.
                Phase::Armed => record.handoff.as_ref().is_some_and(|h| h.plan.from == self.name),
                _ => true,
            };
            // It was ours and is somebody else's.
            let member = &self.members[at];
            let older = member.asks[Kind::Open as usize].outstanding.is_some()
                || (member.heard_at_grant.is_some() && member.heard_at_grant == self.heard(at));
            if decided && !mine && member.granted.is_some() && !older {
                return self.park(Parked::Lost);
            }
            let winner = attempt.and_then(|attempt| record.winner(attempt));
            let side = if attempt == self.bound { Side::Destination } else { Side::Source };
            if winner.is_some_and(|winner| winner != side) {
                return self.park(Parked::Lost);
            }
        }
    }

    /// The storage says that a volume this process had is its own still, under
    /// a later epoch or after its seal: a coordinator has settled it.
    fn follow(&mut self, at: usize) {
        let Some(view) = &self.views[at] else { return };
        let record = &view.record;
        let mine = record.owner.as_ref().is_some_and(|owner| owner.session == self.session);
        let (Some(epoch), Some(granted)) = (record.admits().owner, self.members[at].granted) else {
            return;
        };
        let settled = matches!(record.phase, Phase::Owned | Phase::Reclaimed | Phase::Active);
        let held = self.members[at].held;
        if mine && ((held && settled) || (!held && epoch > granted)) {
            self.go(at, epoch);
        }
    }

    /// Seal, or say that there was none.
    fn decide_source(&mut self, at: usize) {
        let Some(view) = &self.views[at] else { return };
        let Some(handoff) = &view.record.handoff else { return };
        let attempt = handoff.plan.attempt;
        let owner = view.record.owner.as_ref().map(|owner| owner.session);
        if handoff.plan.from != self.name || owner != Some(self.session) {
            return;
        }
        // It is decided, though this member does not know yet.
        if self.won.is_some_and(|(won, _)| won == attempt) {
            return;
        }
        let (phase, boot_id, sealed) = (view.record.phase, view.boot_id, handoff.sealed);
        let undecided = matches!(phase, Phase::Armed | Phase::Frozen);
        let member = &mut self.members[at];
        if undecided && member.stopped && !sealed {
            member.seal_sent = Some(attempt);
            if !member.held {
                member.held = true;
                self.out.push(Output::Hold { member: at });
            }
            self.ask(at, attempt, Asked::Seal);
        } else if phase == Phase::Frozen && member.seal_sent != Some(attempt) {
            self.ask(at, attempt, Asked::Unfreeze { boot_id });
        } else if phase == Phase::Sealed && member.seal_sent != Some(attempt) {
            // The destination abdicated while this was frozen: only to reclaim
            // brings it back.
            self.wants_back = true;
        }
    }

    fn decide_reclaim(&mut self, focus: Focus, anchor: usize) {
        // Somebody else reclaimed for us: fetch the proof.
        let decided = self.views[anchor]
            .as_ref()
            .is_some_and(|view| view.record.winner(focus.attempt) == Some(Side::Source));
        let back = self.is_coming_back() || (decided && self.is_any_held());
        if back && self.won.is_none_or(|(attempt, _)| attempt != focus.attempt) {
            self.ask(anchor, focus.attempt, Asked::Reclaim);
        }
    }

    fn decide_destination(&mut self, focus: Focus, anchor: usize) {
        let attempt = focus.attempt;
        let frozen = self.views[anchor].as_ref().is_some_and(|v| v.record.phase == Phase::Frozen);
        if self.won.is_some_and(|(won, _)| won == attempt) {
            // The anchor forgot its decision: only this process can remind it.
            if frozen {
                self.ask(anchor, attempt, Asked::Activate);
            }
            return;
        }
        let witnessed = self.witnessed == Some(attempt);
        let asked_back = self.handoff_of(anchor).is_some_and(|handoff| handoff.wanted_back);
        if asked_back && witnessed && self.activate_sent != Some(attempt) {
            self.abdicated = Some(attempt);
        }
        if self.abdicated == Some(attempt) {
            // The promise is kept here whether or not it may be made there; and
            // it must be heard, so asking goes on until it is granted.
            if witnessed {
                self.ask(anchor, attempt, Asked::Abdicate);
            }
            return;
        }
        let runs = self.ordered || self.members.iter().any(|member| member.running);
        // A member that was opened for the destination says what the anchor
        // decided, for an earlier incarnation.
        let decided = self
            .views
            .iter()
            .flatten()
            .any(|view| view.record.winner(attempt) == Some(Side::Destination));
        let sealed = self.all_sealed(attempt) && self.is_complete(focus);
        if runs && (decided || sealed) {
            self.activate_sent = Some(attempt);
            self.ask(anchor, attempt, Asked::Activate);
        }
    }

    /// The winner shows the decision to the members that do not know it, or
    /// have not heard it from this incarnation.
    fn decide_open(&mut self) {
        let Some((attempt, proof)) = self.won else { return };
        for at in 0..self.members.len() {
            let Some(view) = &self.views[at] else { continue };
            let record = &view.record;
            let handoff = record.handoff.as_ref().filter(|h| h.plan.attempt == attempt);
            let over = record.decided.as_ref().is_some_and(|d| d.attempt == attempt);
            if handoff.is_none() && !over {
                continue;
            }
            let undecided = matches!(record.phase, Phase::Armed | Phase::Sealed | Phase::Frozen);
            let is_anchor = handoff.is_some_and(|h| h.plan.anchor == self.members[at].volume);
            if is_anchor || !(self.members[at].held || undecided) {
                continue;
            }
            // The destination's first requests follow its OPEN on the same
            // connection, so they need not wait for its answer; the epoch is
            // known while the member is sealed.
            let ahead = handoff
                .filter(|_| proof.side == Side::Destination && record.phase == Phase::Sealed)
                .map(|handoff| handoff.e_to);
            if self.open(at, attempt, proof)
                && let Some(epoch) = ahead
            {
                self.go(at, epoch);
            }
        }
    }

    fn go(&mut self, at: usize, epoch: Epoch) {
        if self.parked.is_some() {
            return;
        }
        let (open, heard) = (self.won, self.heard(at));
        let member = &mut self.members[at];
        if !member.held && member.granted == Some(epoch) {
            return;
        }
        member.held = false;
        member.granted = Some(epoch);
        member.heard_at_grant = heard;
        self.out.push(Output::Go { member: at, epoch, open });
        if !self.is_any_held() {
            self.ordered = false;
        }
    }

    fn park(&mut self, why: Parked) {
        if self.parked.is_none() {
            self.parked = Some(why);
            self.out.clear();
            for at in 0..self.members.len() {
                self.members[at].held = true;
                self.out.push(Output::Hold { member: at });
            }
            self.out.push(Output::Park(why));
        }
    }

    fn ask(&mut self, at: usize, attempt: Try, ask: Asked) {
        if self.take_turn(at, attempt, ask.into()) {
            self.out.push(Output::Ask { member: at, attempt, ask });
        }
    }

    fn open(&mut self, at: usize, attempt: Try, proof: Proof) -> bool {
        let turn = self.take_turn(at, attempt, Kind::Open);
        if turn {
            self.out.push(Output::Open { member: at, attempt, proof });
        }
        turn
    }

    /// Whether it is time to ask: nothing of the kind is on its way, and the
    /// record has changed since the last answer.
    fn take_turn(&mut self, at: usize, attempt: Try, kind: Kind) -> bool {
        let now = self.heard(at).map(|(boot_id, version)| (attempt, boot_id, version));
        let ask = &mut self.members[at].asks[kind as usize];
        if ask.outstanding.is_some() || (ask.answered_at.is_some() && ask.answered_at == now) {
            return false;
        }
        ask.outstanding = Some(attempt);
        true
    }

    /// Incarnation of the server and version of the record as last heard.
    fn heard(&self, at: usize) -> Option<(u64, u64)> {
        self.views.get(at)?.as_ref().map(|view| (view.boot_id, view.record.version))
    }

    fn handoff_of(&self, at: usize) -> Option<&Handoff> {
        self.views.get(at)?.as_ref()?.record.handoff.as_ref()
    }

    fn is_any_held(&self) -> bool {
        self.members.iter().any(|member| member.held)
    }

    /// The try that names this VM's owner name: one that is not decided before
    /// one that is, the newest of several, and only then one that is over.
    fn focus(&self) -> Option<Focus> {
        self.open_focus().or_else(|| {
            let over = (0..self.members.len()).filter_map(|at| {
                let record = &self.views[at].as_ref()?.record;
                let mine = record.owner.as_ref().is_some_and(|owner| owner.name == self.name);
                let decided = record.decided.as_ref().filter(|decided| mine && decided.anchor)?;
                let (attempt, side) = (decided.attempt, decided.winner);
                Some(Focus { attempt, side, anchor: Some(at) })
            });
            over.max_by_key(|focus| focus.attempt)
        })
    }

    fn open_focus(&self) -> Option<Focus> {
        let mine = (0..self.members.len()).filter_map(|at| {
            let handoff = self.handoff_of(at)?;
            let side = if handoff.plan.from == self.name {
                Side::Source
            } else if handoff.plan.to == self.name {
                Side::Destination
            } else {
                return None;
            };
            let phase = self.views[at].as_ref()?.record.phase;
            let undecided = matches!(phase, Phase::Armed | Phase::Sealed | Phase::Frozen);
            Some((undecided, handoff.plan.attempt, side, handoff.plan.anchor))
        });
        let newest = mine.max_by_key(|(undecided, attempt, ..)| (*undecided, *attempt));
        let (_, attempt, side, anchor) = newest?;
        let anchor = self.members.iter().position(|member| member.volume == anchor);
        Some(Focus { attempt, side, anchor })
    }

    /// All members show this try, and they are the ones that were planned.
    fn is_complete(&self, focus: Focus) -> bool {
        (0..self.members.len()).all(|at| {
            self.handoff_of(at).is_some_and(|handoff| {
                handoff.plan.attempt == focus.attempt && handoff.plan.members == self.whole
            })
        })
    }

    fn is_ready(&self, focus: Focus) -> bool {
        // Unless it has witnessed the try undecided it could not abdicate, and
        // a source could be locked out by one more accident.
        focus.anchor.is_some() && self.is_complete(focus) && self.witnessed == Some(focus.attempt)
    }

    fn all_sealed(&self, attempt: Try) -> bool {
        self.members.iter().all(|member| member.sealed.is_some_and(|(seen, _)| seen == attempt))
    }
}
