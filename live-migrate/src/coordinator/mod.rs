//! The coordinator: plans handoffs, watches them, cleans up behind them.
//!
//! It is never on the path of a switch: its death delays cleaning up, nothing
//! else. Who owns a VM's volumes is what the anchor's access record says.
//!
//! | module | is |
//! |---|---|
//! | [`plan`] | a handoff's row and the pure function that says what is due |

pub mod plan;
