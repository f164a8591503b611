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
//! - The data path of a volume is held from the moment its rings stop under a
//!   migration until the storage has granted an epoch again, or until they run
//!   again before a seal was sent. Parked means held for ever: the guest sees no
//!   error.
//! - Seals leave when no ring of the VM runs any more, all at once.
//! - The source never says that it did not seal a volume to which it has sent a
//!   seal. The destination never activates what it has not seen sealed whole,
//!   nor after it has abdicated, nor abdicates after it has activated, nor
//!   before it has seen for itself that no process before it can have.
//!
//! - A process that was away while somebody else had the volumes has lost, even
//!   if it is its host's turn again: the epoch says so. One that was bound to
//!   another try and never had a volume is no source either.
//! - Whoever starts a process that stands by may say for which try. Without that
//!   it takes the first of which it hears for its own, and one that hung until
//!   the next is taken in by that.
//!
//! Does not know rings, sockets or clocks. Each ask may be repeated by the
//! transport at will: all are idempotent.
//!
//! | module | noun |
//! |---|---|
//! | `words` | what goes in and comes out |
//! | `learn` | what a fact changes in what is known |
//! | `decide` | what is to be asked and done |
//! | `focus` | which handoff concerns this VM |

mod decide;
mod focus;
mod learn;
#[cfg(test)]
mod tests;
mod words;

use super::{Handoff, Members, Proof, Side, Try};
use crate::access::AccessRecord;
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
    /// The VMM has started its rings in this process.
    ran: bool,
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

/// A member's record as last heard, and what of it is looked at with every event of any member: names and lists are
/// compared once, here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    boot_id: u64,
    record: AccessRecord,
    /// Of its handoff, by this process's owner name.
    side: Option<Side>,
    /// Its handoff's plan is for the members there are.
    whole: bool,
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
    /// What the views say: found anew with each of them, since a VM of many volumes has many events of other kinds.
    focus: Option<Focus>,
    /// The source wants to come back, whether or not its rings run.
    wants_back: bool,
    /// The destination may activate without its rings.
    ordered: bool,
    seal_ordered: bool,
    /// The try in which ACTIVATE was sent; it may have been carried out.
    activate_sent: Option<Try>,
    /// The try that this destination gave up.
    abdicated: Option<Try>,
    /// The only try in which this process may be the destination: the one that it
    /// was started for, or else the first that it heard of.
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
            ran: false,
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
            focus: None,
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

    /// The same for a process that was started to stand by for this try: it takes
    /// part in no other until it has had a volume, also if it has not heard of
    /// its own.
    #[must_use]
    pub fn only_for(self, attempt: Try) -> Self {
        Self { bound: Some(attempt), ..self }
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
        self.focus.map(|focus| focus.attempt)
    }

    /// Whether this process has seen the try undecided, so that it can promise for
    /// every incarnation before it that none activated.
    #[must_use]
    pub fn has_witnessed(&self, attempt: Try) -> bool {
        self.witnessed == Some(attempt)
    }

    /// Whether this process is good for no other try than it knows of: it has had
    /// a volume, was started for a try, or has heard of the one in which it is the
    /// destination.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.bound.is_some() || self.had_any()
    }

    /// The try in which a machine arrives in this process: the one that it is the
    /// destination of.
    #[must_use]
    pub fn arrival(&self) -> Option<Try> {
        if self.parked.is_some() { None } else { self.bound }
    }

    /// How the VM stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let all = |test: fn(&Member) -> bool| self.members.iter().all(test);
        let focus = self.focus;
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
        } else if let Some(Focus { attempt, .. }) = focus {
            let sent = self.members.iter().any(|member| member.seal_sent == Some(attempt));
            // A disk has stopped, and the VM has not: it is held, and asks for nothing.
            let rests = !sent && all(|m| !m.held || (m.stopped && m.granted.is_some()));
            match (sealed, rests) {
                (true, _) => Standing::Sealed,
                (false, true) => Standing::Serving,
                (false, false) => Standing::Sealing,
            }
        } else {
            Standing::Standby
        }
    }

    /// A source whose guest waits for a volume wants them all back.
    fn is_coming_back(&self) -> bool {
        self.wants_back || self.members.iter().any(|member| member.running && member.held)
    }

    fn go(&mut self, at: usize, epoch: Epoch) {
        if self.parked.is_some() {
            return;
        }
        // What was won before concerns nobody when the next try is under way.
        let now = self.focus.map(|focus| focus.attempt);
        let open = self.won.filter(|(won, _)| now.is_none_or(|now| now == *won));
        let heard = self.heard(at);
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

    fn view(&self, boot_id: u64, record: AccessRecord) -> View {
        let plan = record.handoff.as_ref().map(|handoff| &handoff.plan);
        let side = plan.and_then(|plan| match () {
            () if plan.from == self.name => Some(Side::Source),
            () if plan.to == self.name => Some(Side::Destination),
            () => None,
        });
        let whole = plan.is_some_and(|plan| plan.members == self.whole);
        View { boot_id, side, whole, record }
    }

    fn handoff_of(&self, at: usize) -> Option<&Handoff> {
        self.views.get(at)?.as_ref()?.record.handoff.as_ref()
    }

    fn is_any_held(&self) -> bool {
        self.members.iter().any(|member| member.held)
    }
}
