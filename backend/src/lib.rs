//! `baton-backend`: serves the disks of one VM over vhost-user-blk and forwards
//! the I/O to storage. Knows nothing of how storage stores.
//!
//! | module | noun |
//! |---|---|
//! | [`config`] | flags and TOML, checked once |
//! | [`socket`] | where front-ends connect: path, passed descriptor, systemd |
//! | [`descriptors`] | room for open files |
//! | [`disk`] | one disk: its volume, its queues, its front-ends one after another |
//! | [`vhost_user`] | the protocol with the front-end |
//! | [`queue`] | queues and their threads: ring, storage and back |
//! | [`virtqueue`] | the ring in guest memory |
//! | [`virtio_blk`] | what requests mean |
//! | [`memory`], [`iovecs`] | guest memory and buffers in it |
//! | [`inflight`] | requests in flight, kept over a kill |
//! | [`dirty_log`] | pages written during a migration |
//! | [`status`] | what a disk is doing, for who only looks |
//! | [`handoff`] | the VM's part when its volumes move to another host |
//! | [`control`] | the control socket: commands of the operator and the agent |
//! | [`latency`] | how long requests took, around a handoff |
//! | [`log_limit`] | bounds what a guest can make us log |

pub mod config;
pub mod control;
pub mod descriptors;
pub mod dirty_log;
pub mod disk;
pub mod handoff;
pub mod inflight;
pub mod iovecs;
pub mod latency;
pub mod log_limit;
pub mod memory;
pub mod queue;
pub mod socket;
pub mod status;
pub mod vhost_user;
pub mod virtio_blk;
pub mod virtqueue;
