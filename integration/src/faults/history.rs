//! What a stamping guest did, line by line in a file, and the judge of it.
//!
//! Every write carries a stamp that no other write has, and a guest has at most one request in flight for a block. So
//! for each block the values that a read may show are known exactly: the last acknowledged stamp, and those of writes
//! whose guest died before they were answered, until somebody has looked.
//!
//! Lines are written before a request is shown to the device, and after an answer is seen: a process that is killed
//! leaves at most answers unwritten that nobody has seen.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A block is stamped.
    Write,
    /// A block's stamp is looked at.
    Read,
    /// All acknowledged writes become durable.
    Flush,
}

/// Whether it was sent or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Shown to the device.
    Submit,
    /// Answered.
    Complete,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Of the machine's monotonic clock, nanoseconds.
    pub at_ns: u64,
    /// Number of the process, which is also in the stamps it makes.
    pub vmm: u64,
    /// Position of the disk.
    pub disk: usize,
    /// Sent or answered.
    pub what: What,
    /// Unique within the guest and what it inherited.
    pub op: u64,
    /// What it was.
    pub kind: Kind,
    /// Of which block; 0 for a flush.
    pub block: u32,
    /// Of a write: written. Of an answered read: found.
    pub stamp: u64,
    /// Of an answer: virtio's status byte.
    pub status: u8,
}

/// The file.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    lines: Vec<u8>,
}

impl Recorder {
    /// Appends to the file at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, lines: Vec::new() })
    }

    /// Takes a line; it is in the file after [`Self::write_out`].
    pub fn record(&mut self, event: &Event) -> Result<()> {
        serde_json::to_writer(&mut self.lines, event)?;
        self.lines.push(b'\n');
        Ok(())
    }

    /// Hands all lines to the kernel, which outlives this process.
    pub fn write_out(&mut self) -> Result<()> {
        self.file.write_all(&self.lines)?;
        self.lines.clear();
        Ok(())
    }
}

/// All whole lines of a file; none when there is no file.
pub fn read(path: &Path) -> Result<Vec<Event>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Now, as [`Event::at_ns`] counts.
#[must_use]
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = now.expect("every Linux has this clock");
    let (seconds, nanos) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

/// The values that reads of the disks may show.
#[derive(Debug, Default)]
pub struct Judge {
    /// By disk and block: the stamps that the block may hold. A block that is not here holds 0, what it was made with.
    may_hold: BTreeMap<(usize, u32), BTreeSet<u64>>,
    /// Requests sent and not answered, by process-independent number.
    open: BTreeMap<(usize, u64), Event>,
    /// Answers seen.
    completed: u64,
}

impl Judge {
    /// Takes what a guest did, in its order; a guest that goes on elsewhere is one guest.
    pub fn follow(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            match event.what {
                What::Submit => self.submit(event),
                What::Complete => self.complete(event)?,
            }
        }
        Ok(())
    }

    /// The guest is gone, with what it had in flight: that may have been carried out, or not.
    pub fn lose_guest(&mut self) {
        self.open.clear();
    }

    /// How many answers were seen.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Requests that were sent and never answered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.open.len()
    }

    fn submit(&mut self, event: &Event) {
        if event.kind == Kind::Write {
            self.block(event).insert(event.stamp);
        }
        self.open.insert((event.disk, event.op), event.clone());
    }

    fn complete(&mut self, event: &Event) -> Result<()> {
        if self.open.remove(&(event.disk, event.op)).is_none() {
            bail!("a request was answered that was not sent, or twice: {event:?}");
        }
        if event.status != crate::blk::OK {
            bail!("the guest got an error: {event:?}");
        }
        self.completed += 1;
        match event.kind {
            Kind::Flush => {}
            // Whatever else was possible is over: an old write that lands later is resurrected.
            Kind::Write => *self.block(event) = BTreeSet::from([event.stamp]),
            Kind::Read => {
                let block = self.block(event);
                if !block.contains(&event.stamp) {
                    bail!(
                        "disk {} block {} shows {}; it may hold {}: {event:?}",
                        event.disk,
                        event.block,
                        stamp(event.stamp),
                        block.iter().map(|s| stamp(*s)).collect::<Vec<_>>().join(" or "),
                    );
                }
                *block = BTreeSet::from([event.stamp]);
            }
        }
        Ok(())
    }

    fn block(&mut self, event: &Event) -> &mut BTreeSet<u64> {
        self.may_hold.entry((event.disk, event.block)).or_insert_with(|| BTreeSet::from([0]))
    }
}

/// Bits of a stamp below the number of the process that made it.
pub const STAMP_BITS: u32 = 40;

/// A stamp that is not torn, for people: who made it, and its number.
fn stamp(stamp: u64) -> String {
    match stamp {
        0 => "nothing".to_owned(),
        TORN => "a torn block".to_owned(),
        _ => format!("{}#{}", stamp >> STAMP_BITS, stamp & ((1 << STAMP_BITS) - 1)),
    }
}

/// What a guest records for a block whose parts do not belong together.
pub const TORN: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: What, op: u64, kind: Kind, stamp: u64) -> Event {
        Event { at_ns: op, vmm: 1, disk: 0, what, op, kind, block: 7, stamp, status: 0 }
    }

    fn sent(op: u64, kind: Kind, stamp: u64) -> Event {
        event(What::Submit, op, kind, stamp)
    }

    fn done(op: u64, kind: Kind, stamp: u64) -> Event {
        event(What::Complete, op, kind, stamp)
    }

    fn whole(op: u64, kind: Kind, stamp: u64) -> [Event; 2] {
        [sent(op, kind, stamp), done(op, kind, stamp)]
    }

    #[test]
    fn a_good_history_passes_and_its_answers_are_counted() {
        let mut judge = Judge::default();
        judge.follow(&whole(1, Kind::Read, 0)).unwrap();
        judge.follow(&whole(2, Kind::Write, 5)).unwrap();
        judge.follow(&whole(3, Kind::Flush, 0)).unwrap();
        judge.follow(&whole(4, Kind::Read, 5)).unwrap();
        assert_eq!((judge.completed(), judge.unanswered()), (4, 0));
    }

    #[test]
    fn lost_stale_and_foreign_values_are_caught() {
        for seen in [0, 5, 99, TORN] {
            let mut judge = Judge::default();
            judge.follow(&whole(1, Kind::Write, 5)).unwrap();
            judge.follow(&whole(2, Kind::Write, 6)).unwrap();
            let error = judge.follow(&whole(3, Kind::Read, seen)).unwrap_err().to_string();
            assert!(error.contains("may hold 0#6"), "{error}");
        }
    }

    #[test]
    fn a_write_of_a_dead_guest_is_there_or_not_but_does_not_come_back() {
        let mut judge = Judge::default();
        judge.follow(&whole(1, Kind::Write, 5)).unwrap();
        judge.follow(&[sent(2, Kind::Write, 6)]).unwrap();
        judge.lose_guest();
        judge.follow(&whole(3, Kind::Read, 5)).unwrap();
        assert!(judge.follow(&whole(4, Kind::Read, 6)).is_err());
        let mut judge = Judge::default();
        judge.follow(&[sent(2, Kind::Write, 6)]).unwrap();
        judge.lose_guest();
        judge.follow(&whole(3, Kind::Read, 6)).unwrap();
        assert!(judge.follow(&whole(4, Kind::Read, 0)).is_err());
    }

    #[test]
    fn errors_and_answers_out_of_nothing_are_caught() {
        let mut judge = Judge::default();
        assert!(judge.follow(&[done(1, Kind::Read, 0)]).is_err());
        judge.follow(&whole(2, Kind::Write, 5)).unwrap();
        assert!(judge.follow(&[done(2, Kind::Write, 5)]).is_err());
        let failed = Event { status: 1, ..done(3, Kind::Write, 6) };
        assert!(judge.follow(&[sent(3, Kind::Write, 6), failed]).is_err());
    }

    #[test]
    fn what_is_recorded_is_read_and_half_a_line_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        assert!(read(&path).unwrap().is_empty());
        let events = whole(1, Kind::Write, 5);
        let mut recorder = Recorder::open(&path).unwrap();
        for event in &events {
            recorder.record(event).unwrap();
        }
        recorder.write_out().unwrap();
        recorder.file.write_all(b"{\"at_ns\":1").unwrap();
        assert_eq!(read(&path).unwrap(), events);
    }
}
