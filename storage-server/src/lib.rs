//! The storage server as a library; `baton-storage` (`main.rs`) is arguments, configuration and `run`.
//!
//! | module | noun |
//! |---|---|
//! | [`store`] | the extent pool |
//! | [`gate`] | who is inside a volume; closes and drains |
//! | [`volumes`] | volumes as served: access record, seats, events |
//! | [`session`] | one connection's requests, judged (pure) |
//! | `handshake` | from an accepted socket to a welcomed connection |
//! | `worker` | the data path |
//! | [`listeners`] | whom to tell of news |
//! | [`admin`] | the REST API and metrics |
//! | [`server`] | all of it put together |
//!
//! Under `--cfg loom` only the gate and the listeners are built, for their proofs.

pub mod gate;
pub mod listeners;

#[cfg(not(loom))]
pub mod admin;
#[cfg(not(loom))]
pub mod config;
#[cfg(not(loom))]
mod handshake;
#[cfg(not(loom))]
pub mod log;
#[cfg(not(loom))]
pub mod metrics;
#[cfg(not(loom))]
mod net;
#[cfg(not(loom))]
pub mod server;
#[cfg(not(loom))]
pub mod session;
#[cfg(not(loom))]
pub mod store;
#[cfg(not(loom))]
pub mod volumes;
#[cfg(not(loom))]
mod worker;

/// For who measures against it.
#[cfg(not(loom))]
pub use worker::ask_for_short_slice;
