//! Which pairs of state and event a run has reached: the access record's phase x
//! what is asked of it, and a backend's standing x what it is told. A pair that
//! is never reached is one of which the run says nothing; it must be explained,
//! or the run fails. The pure code's answer to every pair is held by the matrices
//! of `protocol`; what is counted here is that the world gets there.

use std::fmt;

use baton_protocol::access::{self, By, Phase};
use baton_protocol::handoff::Side;
use baton_protocol::handoff::role::{self, Asked, Order, Standing};

/// Not free: a volume is until its first claim, before which nothing comes.
const PHASES: [Phase; 6] =
    [Phase::Owned, Phase::Armed, Phase::Sealed, Phase::Active, Phase::Reclaimed, Phase::Frozen];

const STANDINGS: [(Standing, &str); 8] = [
    (Standing::Serving, "serving"),
    (Standing::Standby, "standby"),
    (Standing::Ready, "ready"),
    (Standing::Sealing, "sealing"),
    (Standing::Sealed, "sealed"),
    (Standing::Reclaiming, "reclaiming"),
    (Standing::Activating, "activating"),
    (Standing::Parked, "parked"),
];

const ASKED_OF_RECORD: [&str; 16] = [
    "claim",
    "rejoin",
    "fence",
    "arm",
    "seal",
    "sealed",
    "activate",
    "reclaim by a backend",
    "reclaim by a coordinator",
    "abdicate by a backend",
    "abdicate by a coordinator",
    "open for the source",
    "open for the destination",
    "unfreeze",
    "settle",
    "disarm",
];

const TOLD_BACKEND: [&str; 15] = [
    "view",
    "claimed",
    "started",
    "stopped",
    "seal answered",
    "activate answered",
    "reclaim answered",
    "abdicate answered",
    "unfreeze answered",
    "opened",
    "stuck",
    "order seal",
    "order activate",
    "order abdicate",
    "order reclaim",
];

/// State and event that do not meet in the simulator, and why. One that does is a
/// failure too: somebody has learned something.
const NEVER: &[(&str, &str, &str)] = &[
    ("owned", "sealed", "a seal that waits is answered as soon as its handoff is over"),
    ("active", "sealed", "the same"),
    ("reclaimed", "sealed", "the same"),
    ("active", "unfreeze", "whoever unfreezes has not sealed, so nobody activates before it"),
    ("serving", "claimed", "a claim is granted to a process that has nothing"),
    ("ready", "claimed", "a destination claims nothing"),
    ("sealed", "claimed", "a sealed volume is not granted to a claim"),
    ("serving", "abdicate answered", "who was granted the volumes has not abdicated"),
    ("standby", "seal answered", "only a source asks, and it stands at least at sealing"),
    ("standby", "unfreeze answered", "only a source asks, and it stands at least at sealing"),
    ("standby", "opened", "only a winner opens, and it serves"),
    ("standby", "stuck", "only requests that were sent can be refused"),
    ("ready", "stopped", "rings that ran have made it activating"),
    ("ready", "seal answered", "a destination does not seal"),
    ("ready", "activate answered", "who has asked is activating"),
    ("ready", "reclaim answered", "a destination does not reclaim"),
    ("ready", "unfreeze answered", "a destination does not unfreeze"),
    ("ready", "opened", "only a winner opens, and it serves"),
    ("ready", "stuck", "only requests that were sent can be refused"),
    ("sealing", "activate answered", "a source does not activate"),
    ("sealing", "abdicate answered", "a source does not abdicate"),
    ("sealed", "activate answered", "a source does not activate"),
    ("sealed", "abdicate answered", "a source does not abdicate"),
    ("sealed", "unfreeze answered", "who sealed everything unfreezes nothing"),
    ("sealed", "stopped", "a source stands at sealed after its last ring has stopped"),
    ("reclaiming", "abdicate answered", "a source does not abdicate"),
    ("activating", "stopped", "nobody stops a destination that has just been started"),
    ("activating", "seal answered", "a destination does not seal"),
    ("activating", "reclaim answered", "a destination does not reclaim"),
    ("activating", "unfreeze answered", "a destination does not unfreeze"),
];

/// Pairs that need two or three accidents in one handoff. Thirty thousand handoffs
/// may pass by them; a hundred thousand reach each.
const RARE: &[(&str, &str)] = &[
    ("parked", "stopped"),
    ("standby", "reclaim answered"),
    ("active", "abdicate by a backend"),
    ("owned", "abdicate by a backend"),
    ("owned", "unfreeze"),
    ("armed", "activate"),
    ("armed", "unfreeze"),
    ("sealed", "unfreeze"),
    ("sealed", "abdicate by a coordinator"),
    ("active", "abdicate by a coordinator"),
    ("reclaimed", "abdicate by a backend"),
    ("reclaimed", "open for the destination"),
    ("reclaimed", "unfreeze"),
    ("frozen", "arm"),
    ("sealed", "disarm"),
    ("active", "disarm"),
    ("reclaimed", "disarm"),
    ("frozen", "disarm"),
    ("standby", "stopped"),
    ("standby", "activate answered"),
    ("standby", "abdicate answered"),
    ("standby", "order seal"),
    ("standby", "order abdicate"),
    ("standby", "order reclaim"),
    ("sealing", "unfreeze answered"),
    ("reclaiming", "activate answered"),
    ("reclaiming", "unfreeze answered"),
    ("activating", "stuck"),
    ("parked", "claimed"),
    ("parked", "unfreeze answered"),
    ("parked", "opened"),
    ("parked", "abdicate answered"),
];

/// How often each pair was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    record: [[u64; ASKED_OF_RECORD.len()]; PHASES.len()],
    backend: [[u64; TOLD_BACKEND.len()]; STANDINGS.len()],
}

impl Default for Coverage {
    fn default() -> Self {
        Self {
            record: [[0; ASKED_OF_RECORD.len()]; PHASES.len()],
            backend: [[0; TOLD_BACKEND.len()]; STANDINGS.len()],
        }
    }
}

impl Coverage {
    pub(crate) fn asked(&mut self, phase: Phase, input: &access::Input<'_>) {
        let row = PHASES.iter().position(|known| *known == phase);
        if let (Some(row), Some(column)) = (row, asked(input)) {
            self.record[row][column] += 1;
        }
    }

    pub(crate) fn told(&mut self, standing: Standing, input: &role::Input) {
        let row = STANDINGS.iter().position(|(known, _)| *known == standing).unwrap_or_default();
        self.backend[row][told(input)] += 1;
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let mine = self.record.iter_mut().flatten().chain(self.backend.iter_mut().flatten());
        let theirs = other.record.iter().flatten().chain(other.backend.iter().flatten());
        mine.zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// State, event, how often.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let record = self.record.iter().zip(PHASES).flat_map(|(row, phase)| {
            row.iter().zip(ASKED_OF_RECORD).map(move |(hits, asked)| (phase.name(), asked, *hits))
        });
        let backend = self.backend.iter().zip(STANDINGS).flat_map(|(row, (_, standing))| {
            row.iter().zip(TOLD_BACKEND).map(move |(hits, told)| (standing, told, *hits))
        });
        record.chain(backend)
    }

    /// Pairs that were not reached though nothing explains it, and explanations
    /// that are wrong.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let unexplained = self.pairs().filter_map(|(state, event, hits)| {
            let never = NEVER.iter().find(|(s, e, _)| (*s, *e) == (state, event));
            match (hits, never) {
                (0, None) if RARE.contains(&(state, event)) => None,
                (0, None) => Some(format!("{event} while {state}")),
                (1.., Some((.., why))) => {
                    Some(format!("{event} while {state} was, {hits} times; yet {why}"))
                }
                _ => None,
            }
        });
        unexplained.collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (state, event, hits) in self.pairs() {
            writeln!(f, "  {hits:8} {event} while {state}")?;
        }
        Ok(())
    }
}

fn asked(input: &access::Input<'_>) -> Option<usize> {
    use access::Input;
    let backend = |by: &By<'_>| matches!(by, By::Backend { .. });
    Some(match input {
        Input::Claim { .. } => 0,
        Input::Rejoin { .. } => 1,
        // No client of the simulator gives its volumes back.
        Input::Release { .. } => return None,
        Input::Fence { .. } => 2,
        Input::Arm { .. } => 3,
        Input::Seal { .. } => 4,
        Input::Sealed { .. } => 5,
        Input::Activate { .. } => 6,
        Input::Reclaim { by, .. } if backend(by) => 7,
        Input::Reclaim { .. } => 8,
        Input::Abdicate { by, .. } if backend(by) => 9,
        Input::Abdicate { .. } => 10,
        Input::Open { proof, .. } if proof.side == Side::Source => 11,
        Input::Open { .. } => 12,
        Input::Unfreeze { .. } => 13,
        Input::Settle { .. } => 14,
        Input::Disarm { .. } => 15,
    })
}

fn told(input: &role::Input) -> usize {
    use role::Input;
    match input {
        Input::View { .. } => 0,
        Input::Claimed { .. } => 1,
        Input::Started { .. } => 2,
        Input::Stopped { .. } => 3,
        Input::Answered { ask, .. } => match ask {
            Asked::Seal => 4,
            Asked::Activate => 5,
            Asked::Reclaim => 6,
            Asked::Abdicate => 7,
            Asked::Unfreeze { .. } => 8,
        },
        Input::Opened { .. } => 9,
        Input::Stuck { .. } => 10,
        Input::Order(order) => match order {
            Order::Seal => 11,
            Order::Activate => 12,
            Order::Abdicate => 13,
            Order::Reclaim => 14,
        },
    }
}
