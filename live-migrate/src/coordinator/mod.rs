//! The coordinator: plans handoffs, watches them, cleans up behind them.
//!
//! It is never on the path of a switch: its death delays cleaning up, nothing
//! else. Who owns a VM's volumes is what the anchor's access record says.
//!
//! | module | is |
//! |---|---|
//! | [`plan`] | a handoff's row and the pure function that says what is due |
//! | [`journal`] | rows, term and events, durable before anything is begun; in a file or in etcd |
//! | [`etcd`] | several coordinators: which of them leads, and the journal that they share |
//! | `front` | who answers: the one that leads, or a word about where it is |
//! | [`keeper`] | one handoff: writes its row, has what is due carried out |
//! | `carry_out` | one action, at the storage or at the hosts: calls until it is done, reports what it learns |
//! | [`storages`], [`agents`] | who is called |
//! | [`vm_view`] | what an agent says of a VM |
//! | [`record`] | access records as they are read |
//! | [`ceph`], `clients` | access records of images in Ceph, and who is kept out by name |
//! | [`prepare`] | a new handoff: who, what and whether |
//! | `cooperative` | a new one of volumes that no storage fences |
//! | `movable` | whether its disks can move together |
//! | `sides` | its two hosts, asked before anything is armed |
//! | `tidings` | what the agents did by themselves, taken into the log of events |
//! | [`vms`], [`access`] | a VM as a whole: where it is, who owns it, why |
//! | [`fence`] | takes a VM's volumes from a dead host |
//! | [`migrate`] | drives a whole migration |
//! | `api`, [`view`], [`fault`] | HTTP: routes, what is shown, problems |
//! | [`core`], [`config`], [`server`] | what is shared, what is configured, start |

pub mod access;
pub mod agents;
mod api;
mod carry_out;
pub mod ceph;
mod clients;
pub mod config;
mod cooperative;
pub mod core;
pub mod etcd;
pub mod fault;
pub mod fence;
pub mod front;
pub mod journal;
pub mod keeper;
pub mod migrate;
mod movable;
mod orphan;
pub mod plan;
pub mod prepare;
pub mod record;
pub mod server;
mod sides;
pub mod storages;
mod tidings;
pub mod view;
pub mod vm_view;
pub mod vms;
