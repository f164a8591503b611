//! Whether the history of one register can be put in an order, in near-linear
//! time, because every value is written once (Gibbons and Korach, "Testing
//! shared memories", 1997).
//!
//! The requests of one value form a cluster. Between the earliest answer and the
//! latest invocation of a cluster the register must hold that value: its
//! *forward zone*. If all its requests overlap instead, the value need only be
//! there at one moment between the latest invocation and the earliest answer:
//! its *backward zone*. An order exists if and only if no read is answered
//! before its value is written, no two forward zones overlap, and no backward
//! zone lies inside a forward one.

use std::collections::BTreeMap;

use crate::history::{Instant, Value};

/// A request of one value. An answer that never came is [`Instant::MAX`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) invoked: Instant,
    pub(super) answered: Instant,
}

/// The requests of one value.
#[derive(Clone, Debug, Default)]
pub(super) struct Cluster {
    pub(super) write: Option<Access>,
    pub(super) reads: Vec<Access>,
}

/// Why there is no order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoOrder {
    /// The value was read and never written before.
    OutOfNowhere(Value),
    /// While the register must have held the first, it must have held the second.
    Both(Value, Value),
}

#[derive(Clone, Copy)]
struct Zone {
    value: Value,
    low: Instant,
    high: Instant,
}

/// Judges a register.
pub(super) fn check(clusters: &BTreeMap<Value, Cluster>) -> Result<(), NoOrder> {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for (value, cluster) in clusters {
        let Some(write) = cluster.write else {
            if cluster.reads.is_empty() {
                continue;
            }
            return Err(NoOrder::OutOfNowhere(*value));
        };
        if cluster.reads.iter().any(|read| read.answered < write.invoked) {
            return Err(NoOrder::OutOfNowhere(*value));
        }
        if cluster.reads.is_empty() && write.answered == Instant::MAX {
            // It may never have happened.
            continue;
        }
        let all = || cluster.reads.iter().chain([&write]);
        let earliest = all().map(|access| access.answered).min().unwrap_or(Instant::MAX);
        let latest = all().map(|access| access.invoked).max().unwrap_or(0);
        let (low, high) = (earliest.min(latest), earliest.max(latest));
        let zone = Zone { value: *value, low, high };
        if earliest < latest { forward.push(zone) } else { backward.push(zone) }
    }
    forward.sort_unstable_by_key(|zone| zone.low);
    for pair in forward.windows(2) {
        if pair[1].low < pair[0].high {
            return Err(NoOrder::Both(pair[0].value, pair[1].value));
        }
    }
    for zone in backward {
        // Forward zones do not overlap: only the last one that begins before can
        // hold it.
        let before = forward.partition_point(|other| other.low < zone.low);
        if let Some(around) = before.checked_sub(1).map(|at| forward[at])
            && zone.high < around.high
        {
            return Err(NoOrder::Both(around.value, zone.value));
        }
    }
    Ok(())
}
