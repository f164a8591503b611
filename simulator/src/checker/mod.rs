//! Whether a history can be: each sector is a register, so it is judged alone.
//!
//! A power loss at the server ends an era. Within an era a sector must be
//! linearizable. What it holds when the next era begins is one of the values of
//! before, and not one that was overwritten before a flush that was answered.
//! What was under way at a power loss may have taken effect before or after it,
//! or both times.
//!
//! Does not know where a history comes from.

#[cfg(test)]
mod tests;
mod zones;

use std::collections::BTreeMap;
use std::fmt;

use crate::history::{History, Instant, Kind, Operation, Value};
use zones::{Access, Cluster, NoOrder};

/// What cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Of which volume.
    pub volume: usize,
    /// Which sector.
    pub sector: usize,
    /// Why.
    pub why: Why,
}

/// Why a history cannot be. Values say which writes are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The value was read and not written before.
    OutOfNowhere(Value),
    /// The sector must have held both at once: one was read too late, or lost.
    Both(Value, Value),
    /// Two values from before a power loss were read after it.
    TwoSurvivors(Value, Value),
    /// The first was read after a power loss, though the second had replaced it
    /// and was flushed.
    FlushLost(Value, Value),
}

impl Broken {
    /// Number of the rule in `docs/handoff.md`.
    #[must_use]
    pub fn rule(&self) -> &'static str {
        match self.why {
            Why::OutOfNowhere(_) => "I8",
            Why::Both(..) => "I3",
            Why::TwoSurvivors(..) | Why::FlushLost(..) => "I2",
        }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}, sector {}: ", self.volume, self.sector)?;
        match self.why {
            Why::OutOfNowhere(value) => write!(f, "{value} was read and not written before"),
            Why::Both(one, other) => write!(f, "no order of {one} and {other} explains the reads"),
            Why::TwoSurvivors(one, other) => {
                write!(f, "both {one} and {other} were read after a power loss")
            }
            Why::FlushLost(read, lost) => {
                write!(f, "{read} was read after a power loss, but {lost} was flushed")
            }
        }
    }
}

/// A write, with its place in time.
#[derive(Clone, Copy, Debug)]
struct Write {
    value: Value,
    at: Access,
}

/// One sector's requests.
#[derive(Clone, Debug, Default)]
struct Sector {
    writes: Vec<Write>,
    reads: Vec<(Value, Access)>,
}

/// Judges a history.
///
/// # Errors
/// [`Broken`] names the first sector whose history cannot be.
pub fn check(history: &History) -> Result<(), Broken> {
    let mut sectors: BTreeMap<(usize, usize), Sector> = BTreeMap::new();
    let mut flushes: BTreeMap<usize, Vec<Access>> = BTreeMap::new();
    for operation in history.operations() {
        let Operation { kind, volume, invoked, answered } = *operation;
        let at = Access { invoked, answered: answered.unwrap_or(Instant::MAX) };
        match kind {
            Kind::Write { sector, value } => {
                let sector = sectors.entry((volume, sector)).or_default();
                sector.writes.push(Write { value, at });
            }
            Kind::Read { sector, value } if answered.is_some() => {
                sectors.entry((volume, sector)).or_default().reads.push((value, at));
            }
            Kind::Flush if answered.is_some() => flushes.entry(volume).or_default().push(at),
            Kind::Read { .. } | Kind::Flush => {}
        }
    }
    for ((volume, sector), requests) in &sectors {
        let losses: Vec<Instant> = history
            .losses()
            .iter()
            .filter(|loss| loss.volume == *volume)
            .map(|loss| loss.at)
            .collect();
        let flushes = flushes.get(volume).map_or(&[][..], Vec::as_slice);
        check_sector(requests, &losses, flushes).map_err(|why| Broken {
            volume: *volume,
            sector: *sector,
            why,
        })?;
    }
    Ok(())
}

fn check_sector(sector: &Sector, losses: &[Instant], flushes: &[Access]) -> Result<(), Why> {
    let begins = std::iter::once(0).chain(losses.iter().copied());
    let ends = losses.iter().copied().chain([Instant::MAX]);
    // What the sector held when the era began, where a read tells.
    let mut survivor = Some(0);
    for (number, (begin, end)) in begins.zip(ends).enumerate() {
        let mut clusters: BTreeMap<Value, Cluster> = BTreeMap::new();
        for write in &sector.writes {
            if write.at.invoked < end && write.at.answered > begin {
                let open = write.at.answered > end;
                let answered = if open { Instant::MAX } else { write.at.answered };
                let at = Access { invoked: write.at.invoked, answered };
                clusters.entry(write.value).or_default().write = Some(at);
            }
        }
        // A read across a power loss may have been carried out on either side.
        let inside = |at: &Access| at.invoked > begin && at.answered < end;
        for (value, at) in sector.reads.iter().filter(|(_, at)| inside(at)) {
            clusters.entry(*value).or_default().reads.push(*at);
        }
        if number > 0 {
            survivor = find_survivor(&clusters, sector, begin)?;
            if let Some(survivor) = survivor {
                let last = number.checked_sub(2).map_or(0, |before| losses[before]);
                check_flushed(survivor, sector, flushes, (last, begin))?;
            }
        }
        if let Some(survivor) = survivor {
            let at = Access { invoked: 0, answered: begin };
            clusters.entry(survivor).or_default().write.get_or_insert(at);
        }
        zones::check(&clusters).map_err(|why| match why {
            NoOrder::OutOfNowhere(value) => Why::OutOfNowhere(value),
            NoOrder::Both(one, other) => Why::Both(one, other),
        })?;
    }
    Ok(())
}

/// The value from before `begin` that was read after it.
fn find_survivor(
    clusters: &BTreeMap<Value, Cluster>,
    sector: &Sector,
    begin: Instant,
) -> Result<Option<Value>, Why> {
    let mut found = None;
    for (value, cluster) in clusters {
        let before = *value == 0
            || sector.writes.iter().any(|w| w.value == *value && w.at.answered <= begin);
        if cluster.write.is_none() && !cluster.reads.is_empty() && before {
            if let Some(other) = found {
                return Err(Why::TwoSurvivors(other, *value));
            }
            found = Some(*value);
        }
    }
    Ok(found)
}

/// `value` was there after the power loss at the end of the era: nothing that
/// came after it was flushed in that era.
fn check_flushed(
    value: Value,
    sector: &Sector,
    flushes: &[Access],
    (begin, end): (Instant, Instant),
) -> Result<(), Why> {
    let written = sector.writes.iter().find(|write| write.value == value);
    let over = written.map_or(0, |write| write.at.answered).max(begin);
    let inside = flushes.iter().filter(|flush| flush.invoked > begin && flush.answered < end);
    let Some(last) = inside.map(|flush| flush.invoked).max() else { return Ok(()) };
    let lost = sector
        .writes
        .iter()
        .find(|write| write.value != value && write.at.invoked > over && write.at.answered < last);
    // If the survivor itself was written in the era and read later than that
    // write, the zones of the era have found it.
    lost.map_or(Ok(()), |lost| Err(Why::FlushLost(value, lost.value)))
}
