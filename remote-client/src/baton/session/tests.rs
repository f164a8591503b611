//! The session against a server in memory: see `pair.rs` and `server.rs`.

mod breakage;
mod calls;
mod handoff;
mod lifecycle;
mod pair;
mod power_loss;
mod schedule;
mod server;

use pair::{Memory, Pair, identity};
use server::Server;

/// Recognizable bytes.
#[allow(clippy::cast_possible_truncation, reason = "the low byte is meant")]
fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| ((i / 8).wrapping_mul(31) + i + salt * 101) as u8).collect()
}
