//! What a test knows about the data on a disk, and how it checks it.
//!
//! The same stamps are used inside a guest (the `baton-probe` program) and by the front-ends outside of one, so
//! that either can verify what the other wrote. Knows block devices and files; knows nothing of virtio, of
//! vhost-user, or of Baton.

pub mod agent;
pub mod device;
pub mod filesystem;
pub mod load;
pub mod stamp;
