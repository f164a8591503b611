//! Typed errors on the wire.

/// Outcome of a request. Numbers are for ever; new ones are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u16)]
pub enum Status {
    /// Done.
    #[error("ok")]
    Ok = 0,
    /// The request broke the protocol; the server closes the connection after
    /// this reply.
    #[error("the request breaks the protocol")]
    Protocol = 1,
    /// The epoch is not, or no longer, the volume's: the sender was fenced. No
    /// retry under this session can succeed.
    #[error("the epoch is no longer the volume's: this client was fenced")]
    StaleEpoch = 2,
    /// The volume belongs to another owner; HELLO was refused. The payload
    /// names the owner.
    #[error("the volume belongs to another owner")]
    NotOwner = 3,
    /// The access mode of this session does not allow the request.
    #[error("the access mode does not allow this request")]
    NotPermitted = 4,
    /// No volume of this name.
    #[error("no such volume")]
    NoSuchVolume = 5,
    /// The two sides have no version or no required feature in common.
    #[error("no common protocol version")]
    Version = 6,
    /// The range ends behind the end of the volume, or is not a multiple of 512
    /// bytes.
    #[error("the range is not on the volume")]
    OutOfRange = 7,
    /// The pool has no free extent left for this write.
    #[error("the storage pool is full")]
    NoSpace = 8,
    /// The disk below the pool failed the request.
    #[error("the storage server's disk failed the request")]
    Io = 9,
    /// The payload does not match its checksum.
    #[error("the payload does not match its checksum")]
    Checksum = 10,
    /// The server is shutting down or has no room for another connection; try
    /// again, possibly after a pause.
    #[error("the server is busy or going away")]
    Busy = 11,
    /// The volume was deleted while the session was open.
    #[error("the volume was deleted")]
    Gone = 12,
    /// HELLO: the claimant is a side of a handoff that is not decided; it may
    /// stand by.
    #[error("a handoff of the volume is not decided; stand by")]
    InHandoff = 13,
}

impl Status {
    const ALL: [Self; 14] = [
        Self::Ok,
        Self::Protocol,
        Self::StaleEpoch,
        Self::NotOwner,
        Self::NotPermitted,
        Self::NoSuchVolume,
        Self::Version,
        Self::OutOfRange,
        Self::NoSpace,
        Self::Io,
        Self::Checksum,
        Self::Busy,
        Self::Gone,
        Self::InHandoff,
    ];

    /// The status with this number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Whether the same request may succeed later on a new connection.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (number, status) in (0u16..).zip(Status::ALL) {
            assert_eq!(status as u16, number);
            assert_eq!(Status::from_number(number), Some(status));
        }
        assert_eq!(Status::from_number(14), None);
    }
}
