//! Handoff of volume access between hosts: the host agent, and what it shares
//! with the coordinator.
//!
//! | module | is |
//! |---|---|
//! | [`vmm`] | narrow drivers for QEMU (QMP) and cloud-hypervisor (HTTP) |
//! | `http` | one exchange over a connected stream |
//!
//! Nothing here decides who may write: the storage server admits a request by
//! the epoch of the volume's access record (`baton_protocol::access`), whoever
//! says what.

mod http;
mod unix;
pub mod vmm;
