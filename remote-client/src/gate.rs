//! What keeps a host's own requests back, for volumes whose storage does not.

use std::fmt::Debug;

/// A gate in front of a volume's storage, in this process. Shut, nothing of the
/// guest is sent and nothing is answered: what is submitted waits. Opened with
/// [`crate::OpenOptions::standby`], a volume is shut.
pub trait Gate: Send + Sync + Debug {
    /// What waits is sent.
    fn open(&self);

    /// Nothing is sent from here on, and each queue closes its connection when its
    /// thread looks next. Nothing may be in flight: what is would be asked for again
    /// by whoever opens the gate.
    fn shut(&self);

    /// Whether it is shut.
    fn is_shut(&self) -> bool;
}
