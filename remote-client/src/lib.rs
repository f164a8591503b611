//! The client side of remote storage: one trait pair for a volume, and its
//! drivers. Knows nothing of virtio.

pub mod baton;
mod cursor;
pub mod engine;
pub mod fence;
pub mod file;
pub mod gate;
pub mod handoff;
mod link;
#[cfg(fuzzing)]
pub mod nbd;
#[cfg(not(fuzzing))]
mod nbd;
pub mod open;
pub mod rbd;
mod socket;
pub mod uri;
pub mod volume;

pub use baton::Timing;
pub use engine::{Capabilities, Engine, Support};
pub use fence::Fence;
pub use file::lock_file;
pub use gate::Gate;
pub use handoff::{HandoffEvent, HandoffListener, HandoffPort, Opening};
pub use open::{OpenError, OpenOptions, open};
pub use uri::{UriError, VolumeUri};
pub use volume::{
    Completion, EventListener, Extent, Geometry, IoError, Op, QueueError, Tag, Volume, VolumeEvent,
    VolumeQueue, VolumeState,
};
