//! A model of VMs that move on storage that keeps nobody out: two hosts and one NBD
//! server, around the functions that the product runs: [`Cooperative::step`] (backend),
//! `agent::ledger::step` (agents), [`Row::step`](crate::coordinator::plan::Row::step)
//! (coordinator).
//!
//! ```text
//!   coordinator: row --orders, late, lost, twice--> agents: notes --> backends --> server
//!                                                                       ^          (requests
//!                     orchestrator: stops, copies, resumes --> machines +           under way)
//! ```
//!
//! Anything may happen at any time within a small budget: an order arrives tries later,
//! or twice, or is carried out and its answer lost; a backend or an agent dies between
//! any two steps (notes and the row stay, memory does not); an orchestrator stops, copies
//! and resumes any machine whenever it likes; requests of a queue that was given up stay
//! at the server for ever.
//!
//! Not in it, because it is not promised (`docs/engines.md`): what a backend that died
//! had under way is done, or dropped, when it dies; what one gave up is not done behind
//! its own later writes, though it may be behind another host's; nobody starts a backend by hand on a
//! host that has never heard of the VM; force is for a host that is gone. That the last
//! one matters is a test.
//!
//! | module | noun |
//! |---|---|
//! | [`world`] | what there is, and what broke |
//! | [`action`] | what can happen |
//! | [`host`] | what agents, backends and machines do |
//! | [`server`] | the requests under way, and what must hold when one is done |
//! | [`coordinator`] | the row and its orders |
//! | [`calm`] | what comes of a world when nothing more goes wrong |
//! | [`scene`] | where an exploration begins |
//! | [`mutant`] | mistakes that must be found |
//! | [`tests`] | how it is explored |

mod action;
mod calm;
mod coordinator;
mod host;
mod mutant;
mod scene;
mod server;
#[cfg(test)]
mod tests;
mod world;
