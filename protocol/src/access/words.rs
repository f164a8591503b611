//! What is asked of the record and what it answers.

use crate::handoff::{Plan, Proof, Try};
use crate::message::OWNER_BYTES_MAX;
use crate::units::{Epoch, SessionId};

use super::AccessRecord;

/// On whose behalf a handoff message comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By<'a> {
    /// A backend.
    Backend {
        /// Its owner name.
        name: &'a str,
        /// Its incarnation.
        session: SessionId,
    },
    /// The coordinator of this term.
    Coordinator {
        /// Its term.
        term: u64,
    },
}

/// What somebody has read in the record who is about to fence its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen<'a> {
    /// The owner's name, if there was an owner.
    pub owner: Option<&'a str>,
    /// [`AccessRecord::next_epoch`].
    pub next_epoch: Epoch,
}

/// What somebody asks of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input<'a> {
    /// A client that holds nothing wants to become the owner.
    Claim {
        /// Its name.
        name: &'a str,
        /// Its incarnation.
        session: SessionId,
    },
    /// A connection of a session that was granted an epoch comes (back).
    Rejoin {
        /// Its incarnation.
        session: SessionId,
        /// What it was granted last, as far as it knows.
        epoch: Epoch,
    },
    /// The owner gives the volume back.
    Release {
        /// Its incarnation.
        session: SessionId,
        /// What it was granted.
        epoch: Epoch,
    },
    /// The owner loses the volume, asked or not.
    Fence {
        /// Term of the coordinator that says so; `None` for an operator.
        term: Option<u64>,
        /// The only name that may claim afterwards; `None` for anybody but the
        /// old owner.
        nominee: Option<&'a str>,
        /// Whom it is meant for, the same in every repetition: refused when the
        /// volume has changed hands since. `None`: whoever has it.
        seen: Option<Seen<'a>>,
    },
    /// A handoff is planned; the owner goes on.
    Arm {
        /// The plan.
        plan: &'a Plan,
        /// The coordinator's term.
        term: u64,
        /// [`AccessRecord::next_epoch`] as the coordinator read it when it
        /// planned, the same in every repetition: a record that has given out a
        /// number since is not the one that was planned for.
        next_epoch: Epoch,
        /// The server's durability generation now.
        generation: u64,
    },
    /// The source has stopped and says what it sent. From now on it cannot say
    /// that it never sealed. The caller then waits for what was sent, closes
    /// the gate, drains it, and says [`Input::Sealed`].
    Seal {
        /// Which.
        attempt: Try,
        /// The source.
        session: SessionId,
    },
    /// Everything the source sent is done and the gate is closed and drained.
    Sealed {
        /// Which.
        attempt: Try,
        /// The source.
        session: SessionId,
    },
    /// The destination has seen SEALED from all members and runs. Anchor only.
    Activate {
        /// Which.
        attempt: Try,
        /// Its owner name.
        name: &'a str,
        /// Its incarnation.
        session: SessionId,
    },
    /// The source is to go on. Anchor only.
    Reclaim {
        /// Which.
        attempt: Try,
        /// Who asks.
        by: By<'a>,
    },
    /// The destination never activated and never will. Anchor only.
    Abdicate {
        /// Which.
        attempt: Try,
        /// Who says so.
        by: By<'a>,
    },
    /// The winner shows the anchor's decision.
    Open {
        /// Which.
        attempt: Try,
        /// The winner.
        session: SessionId,
        /// The decision.
        proof: Proof,
    },
    /// The source never sealed.
    Unfreeze {
        /// Which.
        attempt: Try,
        /// The source.
        session: SessionId,
        /// The server's incarnation that the source means.
        boot_id: u64,
        /// The server's incarnation now.
        boot_id_now: u64,
    },
    /// The handoff is over. At a member that nobody opened the proof says how.
    Settle {
        /// Which.
        attempt: Try,
        /// The coordinator's term.
        term: u64,
        /// The winner's session and the anchor's decision.
        proof: Option<(SessionId, Proof)>,
    },
    /// The anchor does not know the handoff any more, so that it can never be
    /// decided: the owner goes on as if it had not been armed here. Not at the
    /// anchor itself, and only while the source has not sealed.
    Disarm {
        /// Which.
        attempt: Try,
        /// The coordinator's term.
        term: u64,
    },
}

/// Why the record stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody else owns the volume.
    #[error(
        "the volume belongs to `{owner}` (epoch {epoch}); fence it first if that client is gone for good"
    )]
    NotOwner {
        /// Who.
        owner: String,
        /// Since which epoch.
        epoch: Epoch,
    },
    /// The claimant was fenced and nobody has claimed since.
    #[error(
        "`{name}` was fenced at epoch {epoch}; another owner must claim the volume first, or fence it again naming this one"
    )]
    Barred {
        /// The claimant.
        name: String,
        /// The epoch of the fence.
        epoch: Epoch,
    },
    /// The fence was meant for somebody who has not got the volume any more, or
    /// was carried out before: it came late.
    #[error(
        "the volume has changed hands since the fence was asked for: `{owner}` owns it (epoch {epoch}); look which machine runs, then fence again"
    )]
    StaleFence {
        /// Who owns the volume now.
        owner: String,
        /// Since which epoch.
        epoch: Epoch,
    },
    /// The session's grant is over.
    #[error("the grant is over: the volume is at epoch {current}")]
    StaleEpoch {
        /// The volume's epoch.
        current: Epoch,
    },
    /// A newer coordinator has spoken.
    #[error("coordinator term {term} is over: term {current} has spoken")]
    StaleTerm {
        /// The term refused.
        term: u64,
        /// The highest seen.
        current: u64,
    },
    /// A name that no record can hold.
    #[error("an owner's name must have 1 to {OWNER_BYTES_MAX} bytes")]
    BadName,
    /// A plan that makes no sense.
    #[error("the plan cannot be used: {0}")]
    BadPlan(&'static str),
    /// The claimant is a side of a handoff that is not decided: it may only
    /// stand by, and reclaim or activate.
    #[error("handoff {} of this volume is not decided; stand by instead of claiming it", .0.id)]
    InHandoff(Try),
    /// Another handoff is under way.
    #[error("handoff {} (attempt {}) of this volume is under way; cancel or finish it first", .0.id, .0.attempt)]
    HandoffInProgress(Try),
    /// The record has given out an epoch since the handoff was planned: this ARM
    /// came late, and none of its plan can be taken here any more.
    #[error(
        "the handoff was planned when the volume's next epoch was {planned}, now it is {current}: the volume was claimed again, moved or fenced since; `{owner}` owns it and goes on; prepare a new handoff"
    )]
    StalePlan {
        /// The next epoch when it was planned.
        planned: Epoch,
        /// The next epoch now.
        current: Epoch,
        /// Who owns the volume now.
        owner: String,
    },
    /// The try is over or was never armed here.
    #[error("the volume knows no handoff {} (attempt {})", .0.id, .0.attempt)]
    NoSuchHandoff(Try),
    /// The sender is not the side it says.
    #[error("this client is not nominated in the handoff")]
    NotNominated,
    /// The decision is not this volume's to make.
    #[error("the handoff is decided at its anchor volume {anchor}")]
    NotAnchor {
        /// Where.
        anchor: crate::units::VolumeId,
    },
    /// The source has not stopped.
    #[error("the source has not sealed the volume")]
    NotSealed,
    /// The other side won.
    #[error("the handoff was decided for the other side: the volume belongs to `{owner}`")]
    Lost {
        /// The winner.
        owner: String,
    },
    /// The server restarted in between and cannot know whether the destination
    /// has activated.
    #[error(
        "the server restarted during the handoff and cannot know who holds the volume; the destination must activate or abdicate first"
    )]
    UnknownFrozen,
    /// Too late: the handoff is decided.
    #[error("the handoff is decided already")]
    TooLate,
    /// Not yet: nothing is decided.
    #[error("the handoff is not decided; activate or reclaim it first")]
    Undecided,
    /// The decision shown is not the anchor's, or not its latest.
    #[error("the proof is not the anchor's latest decision")]
    BadProof,
    /// What the source says it never did, it did, or it means another
    /// incarnation of the server.
    #[error("the volume cannot be unfrozen: a seal was seen, or the server has restarted again")]
    CannotUnfreeze,
    /// The handoff may have been decided, or is decided here.
    #[error("the volume cannot be disarmed: {0}")]
    CannotDisarm(&'static str),
}

/// How durable a change must be, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Store {
    /// Memory only.
    Never,
    /// Soon; it may be lost with a restart.
    Later,
    /// Before anything else happens and anybody is told.
    First,
}

/// A granted input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The record afterwards.
    pub record: AccessRecord,
    /// The record changed: tell those who watch it.
    pub changed: bool,
    /// How durable the change must be.
    pub store: Store,
    /// After storing: close the gate, wait until it has drained, open it for
    /// [`AccessRecord::admits`], and only then answer.
    pub reopen: bool,
}
