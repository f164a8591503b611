//! What a handoff costs: the gap that a guest sees, and the messages inside it.
//!
//! ```text
//!   one run:  stop here, start there, the fence off  (the base)    gap = first stop to first completion on every disk,
//!             stop and start on one backend          (a pause)           less what passes the volumes on in the base
//!             stop here, start there                 (the move)
//! ```
//!
//! All of a run send the same vhost-user messages with the same requests under way, and both moves go to a backend that
//! serves nobody yet and to a front-end that was connected before, as an incoming VMM's is. What a move takes longer than
//! the base is what the handoff adds. In the base the volumes are passed on by FENCE while the rings stand still and no
//! clock runs: the backend that starts has them already, so nothing is sealed and nothing activated.
//!
//! `moves` plays the VM, `meter` watches what else happens, `syncs` looks at the disk meanwhile; `messages` asks for single messages, `many` for very many
//! at once.

mod many;
mod messages;
mod meter;
mod moves;
mod syncs;

use crate::baton::Storage;
use crate::distance::Distance;
use crate::handoff::Fleet;
use anyhow::Result;
use std::path::Path;
use std::time::Duration;

pub use many::{Many, many};
pub use messages::{Messages, messages};
pub use moves::{Moves, moves};
pub use syncs::{Syncs, syncs};

const DISK_BYTES: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Figures of one kind, one a run.
#[derive(Clone, Debug, Default)]
pub struct Figures(Vec<f64>);

impl Figures {
    /// Another run's.
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The smallest figure that this part of all does not exceed.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank among few runs"
    )]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Storage servers with the volumes of a VM.
pub fn fleet(dir: &Path, servers: usize, volumes: usize) -> Result<Fleet> {
    Fleet::start(dir, servers, volumes, DISK_BYTES)
}

/// The same for clients to whom a message takes so long.
pub fn distant_fleet(
    dir: &Path,
    servers: usize,
    volumes: usize,
    one_way: Duration,
) -> Result<Fleet> {
    let mut fleet = fleet(dir, servers, volumes)?;
    let way = |server: &Storage| Distance::start(server.data_address(), one_way);
    let ways = fleet.servers.iter().map(way).collect::<Result<Vec<_>>>()?;
    fleet.through = ways.iter().map(Distance::address).collect();
    Ok(fleet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_figures_that_were_measured() {
        let figures = Figures((1..=100).rev().map(f64::from).collect());
        assert_eq!([0.5, 0.99, 1.0].map(|part| figures.quantile(part)), [50.0, 99.0, 100.0]);
        assert!(Figures::default().quantile(0.5).is_nan());
    }
}
