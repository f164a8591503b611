//! What the end-to-end tests, the demo and the benchmark are made of.
//!
//! Starts real processes (`daemon`, `baton`, `qsd`, `cluster`, `ceph`, `images`, `etcd`, `nbdkit`, `stunnel`), whole hosts (`machine`), real
//! guests (`guest`, `qemu`, `probe`, `qmp`, `libvirt`), moves them (`migration`) and lets that go wrong (`splitbrain`,
//! `faults`). Plays the other side of a vhost-user socket without a guest
//! (`vhost_user`, `memory`, `ring`, `raw_frontend`, `blk`), a storage server's client (`raw_wire`), or a bad network
//! (`proxy`, `distance`, `wire`, `island`) or disk (`slow_disk`), on ports of their own (`port`). Knows the command lines of Baton's programs;
//! links none of their code, so that both sides of a test cannot share a mistake.

pub mod baton;
pub mod bench;
pub mod blk;
pub mod ceph;
pub mod cluster;
pub mod daemon;
pub mod distance;
pub mod etcd;
pub mod faults;
pub mod guest;
pub mod handoff;
pub mod images;
pub mod island;
pub mod libvirt;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod nbdkit;
pub mod port;
pub mod probe;
pub mod proxy;
pub mod qemu;
pub mod qemu_nbd;
pub mod qmp;
pub mod qsd;
pub mod raw_frontend;
pub mod raw_wire;
pub mod ring;
pub mod slow_disk;
pub mod splitbrain;
pub mod stunnel;
pub mod vhost_user;
pub mod wire;
pub mod workspace;
