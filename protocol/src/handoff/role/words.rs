//! What goes in and comes out of the machine.

use serde::Serialize;

use super::super::message::Answer;
use super::super::{Proof, Try};
use crate::access::AccessRecord;
use crate::units::Epoch;

/// What the edge tells the machine. `member` is a volume's position in the list
/// given to [`Role::new`](super::Role::new).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The access record of a member, as its server pushed it.
    View {
        /// Whose.
        member: usize,
        /// The server's incarnation.
        boot_id: u64,
        /// As shown to clients.
        record: Box<AccessRecord>,
    },
    /// The data path of a member was granted an epoch when it was opened.
    Claimed {
        /// Whose.
        member: usize,
        /// Which.
        epoch: Epoch,
    },
    /// The VMM has started a member's first ring.
    Started {
        /// Whose.
        member: usize,
    },
    /// The VMM has stopped a member's rings; what was taken from them is on its
    /// way and nothing more will be.
    Stopped {
        /// Whose.
        member: usize,
        /// While a migration ran: the dirty log was on.
        migrating: bool,
    },
    /// An ask was answered.
    Answered {
        /// By whom.
        member: usize,
        /// In which handoff.
        attempt: Try,
        /// What was asked.
        ask: Asked,
        /// The answer.
        answer: Box<Answer>,
    },
    /// An OPEN was answered.
    Opened {
        /// By whom.
        member: usize,
        /// The epoch granted; `None`: refused.
        epoch: Option<Epoch>,
    },
    /// Requests in flight at a member were refused after its seal: a connection
    /// broke at the wrong moment. They can only be finished as the owner.
    Stuck {
        /// At which.
        member: usize,
    },
    /// Somebody outside says so (explicit mode).
    Order(Order),
}

/// What an agent can order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Source: seal as soon as the rings have stopped; nothing in a process to which
    /// the machine never came.
    Seal,
    /// Destination: activate without waiting for the rings.
    Activate,
    /// Destination: never activate this handoff.
    Abdicate,
    /// Source: come back.
    Reclaim,
}

/// What can be asked of a member, without the data that the edge adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Asked {
    /// With the counts of the member's queues.
    Seal,
    /// At the anchor.
    Activate,
    /// At the anchor.
    Reclaim,
    /// At the anchor.
    Abdicate,
    /// Of this incarnation of the server.
    Unfreeze {
        /// Which.
        boot_id: u64,
    },
}

/// What the edge is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Ask a member; the answer comes back as [`Input::Answered`].
    Ask {
        /// Whom.
        member: usize,
        /// In which handoff.
        attempt: Try,
        /// What.
        ask: Asked,
    },
    /// Show a member the decision on the control connection; the answer comes
    /// back as [`Input::Opened`].
    Open {
        /// To whom.
        member: usize,
        /// In which handoff.
        attempt: Try,
        /// The decision.
        proof: Proof,
    },
    /// Take no new requests to this member until [`Output::Go`].
    Hold {
        /// Which.
        member: usize,
    },
    /// The data path of a member may go on under `epoch`. With `open`, its
    /// connections that were in standby show the decision first.
    Go {
        /// Which.
        member: usize,
        /// The epoch of every request from now on.
        epoch: Epoch,
        /// What connections in standby show.
        open: Option<(Try, Proof)>,
    },
    /// The other side has the volumes: everything stays held for ever.
    Park(Parked),
}

/// Why the VM's volumes are parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Parked {
    /// The anchor decided for the other side.
    #[error("the handoff was decided for the other host: this VM must not run here")]
    Lost,
    /// This destination promised not to activate.
    #[error("this host gave up the handoff: this VM must not run here")]
    Abdicated,
    /// The handoff was ended or fenced by somebody.
    #[error(
        "the handoff is over and this process does not hold the volumes: this VM must not run here"
    )]
    Over,
    /// It stood by for another handoff than the one that the VM is in. The host may own the
    /// volumes all the same: it won, and the process that had them is gone.
    #[error(
        "this process was started for another handoff than the one that the VM is in, and never held the volumes: this VM must not run here before that handoff is over and a new process has claimed them"
    )]
    OtherTry,
}

/// How the VM stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It holds its volumes.
    Serving,
    /// It waits; not all volumes are armed for it.
    Standby,
    /// It waits; all volumes are armed for it.
    Ready,
    /// Some volume's seal is on its way.
    Sealing,
    /// All volumes are sealed: the destination may activate.
    Sealed,
    /// The source wants its volumes back.
    Reclaiming,
    /// The destination runs and waits for the volumes.
    Activating,
    /// Held for ever.
    Parked,
}
