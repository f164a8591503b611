//! Accidents around a move that have no message boundary of their own, with stamping guests and the judge of what they
//! saw. Numbers are those of the list of scenarios in docs/handoff.md.
//!
//! Elsewhere: F1, F2 `splitbrain_on_baton.rs`; F5 `power_loss.rs`; F6 `a_seal_waits_for_what_is_at_the_disk`
//! (storage-server); F8 `activate.stepped@anchor ... kill anchor` of the fault matrix; F10, F11, F12 `storms.rs`; F20
//! `handoff_full.rs` (storage-server) and `live-migrate/tests/` for the journal and the agent; F15 `members_follow_the_anchors_proof` (storage-server).

mod clocks;
mod guests;
mod network;
mod scene;
mod servers;
