//! The feature bits this back-end has, in the words of their specifications.

/// virtio feature bits (virtio 1.2 5.2.3, 6) and the two that vhost adds.
pub mod virtio {
    /// Largest size of any single segment is in `size_max`.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// Largest number of segments in a request is in `seg_max`.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// Block size is in `blk_size`.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Cache flush command.
    pub const FLUSH: u64 = 1 << 9;
    /// Topology is in `topology`.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// Cache mode can be changed through `writeback`.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one virtqueue.
    pub const MQ: u64 = 1 << 12;
    /// Discard command.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes command.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// vhost: log all writes to guest memory.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user: protocol features can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// vhost-user protocol feature bits.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// Dirty log in shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// A reply to any message that asks for it.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back-end can send messages of its own.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The back-end holds the configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// Requests in flight are tracked in shared memory.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE message.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory regions are added and removed one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// Device state can be transferred.
    pub const DEVICE_STATE: u64 = 1 << 19;

    /// All that this back-end has.
    pub const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | DEVICE_STATE;
}

/// The virtio features offered for a disk.
#[must_use]
pub const fn offered(read_only: bool, queues: u16) -> u64 {
    let mut bits = virtio::SIZE_MAX
        | virtio::SEG_MAX
        | virtio::BLK_SIZE
        | virtio::FLUSH
        | virtio::TOPOLOGY
        | virtio::CONFIG_WCE
        | virtio::LOG_ALL
        | virtio::INDIRECT_DESC
        | virtio::EVENT_IDX
        | virtio::PROTOCOL_FEATURES
        | virtio::VERSION_1;
    if read_only {
        bits |= virtio::RO;
    } else {
        bits |= virtio::DISCARD | virtio::WRITE_ZEROES;
    }
    if queues > 1 {
        bits |= virtio::MQ;
    }
    bits
}
