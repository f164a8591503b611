//! Handoff of volume access between hosts: the host agent, and what it shares
//! with the coordinator.
//!
//! | module | is |
//! |---|---|
//! | [`agent`] | `baton-agent`: configuration, API, what ties the rest together |
//! | [`supervisor`] | backends of this host: started, watched, found again |
//! | [`vmm`] | narrow drivers for QEMU (QMP) and cloud-hypervisor (HTTP) |
//! | [`identity`] | who a peer is: role and name, a URI in its certificate |
//! | [`tls`] | mutual TLS: our certificate, whom we believe, why not |
//! | [`dev_ca`] | an authority to try with, in one command |
//! | [`door`] | where an HTTP API is served, and who came in |
//! | [`client`] | calls such an API |
//! | [`coordinator`] | plans handoffs, watches them, cleans up behind them |
//! | [`problem`] | errors of the APIs |
//! | `http`, `unix` | one exchange over a connected stream; a patient connect |
//!
//! Nothing here decides who may write: the storage server admits a request by
//! the epoch of the volume's access record (`baton_protocol::access`), whoever
//! says what.

pub mod agent;
pub mod client;
#[cfg(test)]
mod cooperative_model;
pub mod coordinator;
pub mod dev_ca;
pub mod door;
mod http;
pub mod identity;
pub mod problem;
pub mod supervisor;
pub mod tls;
mod unix;
pub mod vmm;
