//! How a volume's right to write moves to another host: what the VM's role
//! (`baton_protocol::handoff::Role`) needs of each volume, and nothing else.
//!
//! A narrow port beside [`crate::Volume`], for volumes whose storage can hand
//! over. No call waits for the storage; what comes of it is told to the
//! listener. Decides nothing.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::access::AccessRecord;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Open, Try};
use baton_protocol::{Epoch, VolumeId};

/// News of a handoff.
#[derive(Clone, Debug)]
pub enum HandoffEvent {
    /// The access record, whenever it has changed or the server has restarted.
    View {
        /// The server's incarnation.
        boot_id: u64,
        /// Without keys.
        record: Box<AccessRecord>,
    },
    /// A [`HandoffPort::ask`] was answered.
    Answered {
        /// In which handoff.
        attempt: Try,
        /// What was asked.
        ask: Asked,
        /// The answer.
        answer: Box<Answer>,
    },
    /// A [`HandoffPort::open`] was answered; `None`: refused.
    Opened(Option<Epoch>),
    /// Unanswered requests were refused: the epoch they carry is over.
    Stuck,
    /// The first request since [`HandoffPort::go`] was answered.
    FirstAnswer,
}

/// Called from a thread of the driver, which holds no lock meanwhile; it may
/// call any [`HandoffPort`].
pub type HandoffListener = Arc<dyn Fn(HandoffEvent) + Send + Sync>;

/// What lets the data path of a destination go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Shown by connections that are in standby.
    pub open: Open,
    /// The server's durability generation when the source was armed: if the
    /// server's has risen since, what the source had written and not flushed may
    /// be gone, and the next flush has to say so. Zero: not known.
    pub generation: u64,
}

/// One volume's part in a handoff.
pub trait HandoffPort: Send + Sync + Debug {
    /// Which volume.
    fn volume(&self) -> VolumeId;

    /// What the claim at opening was granted; `None` in standby. Does not change
    /// with a handoff.
    fn claimed(&self) -> Option<Epoch>;

    /// How long the server took to welcome the control connection: in standby a
    /// round trip, for who claimed the volume also what that took.
    fn welcomed_after(&self) -> Duration;

    /// Sets who is told from now on. Comes with the record as it stands and the server's incarnation, which are not told
    /// again: a listener that has work to refuse or to take must not wait for them.
    fn listen(&self, listener: HandoffListener) -> Option<(u64, AccessRecord)>;

    /// Asks the server. A SEAL leaves when every open queue is held, rests
    /// ([`crate::VolumeQueue::rest`]) and has put all it took on the wire, and
    /// says what that was. Asked until answered, whatever happens to connections.
    fn ask(&self, attempt: Try, ask: Asked);

    /// As [`HandoffPort::ask`], but always by the volume's own thread: for who has to ask at many volumes at once.
    fn post(&self, attempt: Try, ask: Asked);

    /// Shows the anchor's decision on the control connection.
    fn open(&self, open: Open);

    /// As [`HandoffPort::open`], but a little later: nobody waits for it, and the
    /// guest waits for its other disks meanwhile. [`HandoffPort::go`] does it by itself.
    fn open_later(&self, open: Open);

    /// Takes effect on each queue as soon as it rests: what is submitted
    /// afterwards waits for [`HandoffPort::go`]. Wakes no queue: one that is drained
    /// afterwards sees it, and any other when a SEAL asks for its count.
    fn hold(&self);

    /// Whether the volume is held.
    fn is_held(&self) -> bool;

    /// The data path goes on under `epoch`. Connections in standby show the
    /// decision first and do not wait for its answer.
    fn go(&self, epoch: Epoch, opening: Option<Opening>);

    /// Nothing is sent for this volume any more: [`crate::VolumeState::Fenced`].
    fn park(&self);
}
