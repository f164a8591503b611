//! One handoff as the coordinator sees it: a row of its journal, and the pure
//! function that says what is to be done about it.
//!
//! ```text
//!              all armed, destination stands by      all sealed        anchor: destination
//!  PREPARING --------------------------------> READY ---------> SEALED ------------------> ACTIVE
//!      |  ^                                      |                 |                         |
//!      |  +---- the destination's backend died --+                 |            all settled  v
//!      |                                         |                 |                      SETTLED
//!      +--- refused, late, cancelled ------------+-----------------+                         ^
//!                             |                                                              |
//!                             v   anchor: source                         all settled         |
//!                          RECLAIMED ---------------------------------------------- or FAILED
//!                             |
//!                             +--> PREPARING, the next attempt: see `again`
//! ```
//!
//! Rules:
//! - What is due follows from the row alone ([`Row::due`]). A restart loses
//!   nothing: whoever has the row does what is due, and everything that is due
//!   may be done twice.
//! - The row is written before anything that it makes due is begun: a member is
//!   marked asked before the ARM leaves, so that a restart knows of every record
//!   that may be armed.
//! - Where a storage fences, the coordinator decides nothing. Who won is what the anchor's record says,
//!   and a row without that answer stays open for ever, whatever times out.
//! - Nothing stays half-armed: a member that was asked and has not answered is
//!   asked again after the decision, then settled, so that an ARM that is still
//!   on its way finds the handoff over.
//! - The destination is abdicated for only when its backend is dead, its machine
//!   does not run, and nothing has shown it active. A server that restarted does
//!   not take even that for an answer: then a person fences.
//!
//! Does not know clocks, sockets or the journal's file.

mod again;
mod codec;
mod cooperative;
mod due;
mod row;
mod state;
mod step;
#[cfg(test)]
mod tests;
mod timings;
mod words;
#[cfg(test)]
mod world;

pub use again::ATTEMPTS_MAX;
pub use cooperative::Cooperation;
pub use due::Action;
pub use row::{Member, Row, hex_of, owner, random_key};
pub use state::State;
pub use step::{Input, Output, Refusal, Step};
#[cfg(test)]
pub(crate) use tests::fresh;
pub use timings::Timings;
pub use words::{Because, Grant, Progress, Seen, Standing, Trigger, Trouble, Winner};
