//! A world in a seed: the product's pure code (access record, role, window) under
//! a network, disks, processes and people that fail in every way they can, in
//! virtual time, and a checker that judges what came of it.
//!
//! Links `baton-protocol` and nothing else of Baton: sockets, disks and clocks of
//! the product are tested by `integration`. Knows no real time and no real
//! chance: a seed gives the same world on every machine.
//!
//! ```text
//!   orchestrator --> VM (source)   VM (destination)      guests: stamped requests
//!                       |  rings      |
//!   coordinator      backend       backend               product: handoff::role
//!        |              |             |
//!        +-------> storage servers <--+                  product: access, window
//!                       |
//!                    history --> checker       watch: the rules that hold at once
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`world`] | all of it: what happens, to whom, and when it is over |
//! | `agenda`, `network`, `stage` | virtual time, connections, what all processes share |
//! | `server`, `backend`, `vm`, `coordinator` | the processes |
//! | [`fault`] | what goes wrong |
//! | [`coverage`] | which pairs of state and event were reached |
//! | [`ending`] | how handoffs end, and why |
//! | `theme` | what goes wrong together |
//! | [`bug`] | what the world must notice if the glue is broken |
//! | `watch` | rules judged at once |
//! | [`history`], [`checker`] | what the guests saw, and whether it can be |
//! | [`trace`] | what happened, to read |

mod agenda;
mod backend;
pub mod bug;
pub mod checker;
mod coordinator;
pub mod coverage;
pub mod ending;
pub mod fault;
pub mod history;
mod network;
mod server;
mod stage;
mod theme;
pub mod trace;
mod vm;
mod watch;
pub mod world;

pub use agenda::Time;
pub use watch::Violation;
pub use world::{Report, run};
