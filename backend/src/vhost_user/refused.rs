//! Why the back-end refuses a message of the front-end.

/// Why a request was refused. The connection goes on: the front-end is told if
/// it asked to be.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A ring this disk does not have.
    #[error("the front-end named ring {index}; this disk has {queues} queues (raise num-queues)")]
    NoSuchRing {
        /// Its index.
        index: u32,
        /// How many there are.
        queues: u16,
    },
    /// Feature bits that were not offered.
    #[error("the front-end asked for feature bits {0:#x}, which were not offered")]
    Features(u64),
    /// A ring size that is not a power of two up to 32768.
    #[error("the front-end asked for a ring of {0} entries")]
    RingSize(u32),
    /// The size of a running ring.
    #[error(
        "the front-end changed the size of ring {0} while it runs; it has to stop the ring first"
    )]
    Running(u32),
    /// A region, log or table that cannot be mapped.
    #[error("cannot map {what} of the front-end")]
    Map {
        /// What it is.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Regions that overlap, or more than there are slots.
    #[error("the front-end's memory table is not usable")]
    MemoryTable,
    /// A region that is not there.
    #[error("the front-end removed a memory region that it had not added")]
    NoSuchRegion,
    /// A configuration field that a driver may not write.
    #[error("the front-end wrote configuration bytes {0}.., which a driver may not change")]
    ConfigWrite(u32),
    /// A ring that should run cannot.
    #[error("ring {index} cannot start")]
    Start {
        /// Its index.
        index: usize,
        /// Why not.
        source: std::io::Error,
    },
    /// A descriptor that is missing.
    #[error("ring {0} came without a kick event, and this back-end does not poll")]
    NoKick(u32),
    /// A machine that ran here before an earlier try: it would go on with the memory of then.
    #[error(
        "the front-end brings requests of an earlier backend, but this one waits for a machine that comes with its memory; the old machine must not run here any more: end it"
    )]
    EarlierMachine,
    /// Device state that is not empty.
    #[error("the front-end loads device state, of which this device has none")]
    DeviceState,
    /// A request this back-end does not have.
    #[error("vhost-user request {0} is not supported")]
    Unknown(u32),
}

impl Refused {
    /// The front-end must not go on as if nothing had happened, and would: it need
    /// not ask how the request ended.
    #[must_use]
    pub const fn ends_connection(&self) -> bool {
        matches!(self, Self::EarlierMachine)
    }
}
