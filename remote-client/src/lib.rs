//! The client side of remote storage: one trait pair for a volume, and its
//! drivers. Knows nothing of virtio.

pub mod volume;

pub use volume::{
    Completion, EventListener, Geometry, IoError, Op, QueueError, Tag, Volume, VolumeEvent,
    VolumeQueue, VolumeState,
};
