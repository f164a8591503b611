//! When what happened in the handoffs of this process, for people and for the
//! coordinator. The last of each kind counts.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Events kept: several handoffs there and back.
const EVENTS_MAX: usize = 64;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Moment {
    RingsStopped,
    SealSent,
    Sealed,
    Drained,
    RingsStarted,
    ActivateSent,
    Activated,
    Opened,
    FirstRequest,
    ReclaimSent,
    Reclaimed,
    Parked,
}

const MOMENTS: usize = Moment::Parked as usize + 1;

/// An event as it is shown.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Event {
    at_unix_us: u64,
    event: Moment,
}

/// Durations, microseconds; `None`: not happened, or not in this order.
#[derive(Debug, Serialize)]
pub(super) struct Timings {
    /// From the rings' stop until all is drained and sealed.
    stop_us: Option<u64>,
    /// From sending the first SEAL until all volumes are sealed.
    seal_us: Option<u64>,
    /// From the rings' stop until all their requests are answered.
    drain_us: Option<u64>,
    /// From ACTIVATE until it was granted.
    activate_us: Option<u64>,
    /// From the rings' start until the first request was answered.
    first_io_us: Option<u64>,
    /// From RECLAIM until it was granted.
    reclaim_us: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Journal {
    events: VecDeque<Event>,
    /// When each moment was last, in the run of rings that it belongs to.
    marks: [Option<Instant>; MOMENTS],
}

impl Journal {
    pub(super) fn note(&mut self, moment: Moment) {
        // A run of the rings begins or ends: what it brings is yet to come.
        let cleared: &[Moment] = match moment {
            Moment::RingsStopped => {
                &[Moment::SealSent, Moment::Sealed, Moment::Drained, Moment::ReclaimSent]
            }
            Moment::RingsStarted => &[
                Moment::ActivateSent,
                Moment::Activated,
                Moment::Opened,
                Moment::FirstRequest,
                Moment::ReclaimSent,
                Moment::Reclaimed,
            ],
            _ => &[],
        };
        for moment in cleared {
            self.marks[*moment as usize] = None;
        }
        self.marks[moment as usize] = Some(Instant::now());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { at_unix_us: micros(now), event: moment });
    }

    /// Only the first time in this run of the rings.
    pub(super) fn note_once(&mut self, moment: Moment) {
        if self.marks[moment as usize].is_none() {
            self.note(moment);
        }
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }

    pub(super) fn timings(&self) -> Timings {
        let at = |moment: Moment| self.marks[moment as usize];
        let between = |from, to| Some(micros(at(to)?.checked_duration_since(at(from)?)?));
        let seal_us = between(Moment::RingsStopped, Moment::Sealed);
        let drain_us = between(Moment::RingsStopped, Moment::Drained);
        Timings {
            stop_us: seal_us.zip(drain_us).map(|(seal, drain)| seal.max(drain)),
            seal_us: between(Moment::SealSent, Moment::Sealed),
            drain_us,
            activate_us: between(Moment::ActivateSent, Moment::Activated),
            first_io_us: between(Moment::RingsStarted, Moment::FirstRequest),
            reclaim_us: between(Moment::ReclaimSent, Moment::Reclaimed),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings(journal: &Journal) -> serde_json::Value {
        serde_json::to_value(journal.timings()).expect("numbers")
    }

    #[test]
    fn a_duration_needs_both_its_ends_in_order() {
        let mut journal = Journal::default();
        assert!(timings(&journal)["drain_us"].is_null());
        journal.note(Moment::Drained);
        journal.note(Moment::RingsStopped);
        assert!(timings(&journal)["drain_us"].is_null(), "of an earlier stop");
        journal.note(Moment::Drained);
        assert!(timings(&journal)["drain_us"].is_u64());
        assert!(timings(&journal)["stop_us"].is_null(), "not sealed");
        journal.note(Moment::Sealed);
        assert!(timings(&journal)["stop_us"].is_u64());
    }

    #[test]
    fn events_are_bounded_and_named() {
        let mut journal = Journal::default();
        for _ in 0..3 * EVENTS_MAX {
            journal.note(Moment::SealSent);
            journal.note_once(Moment::FirstRequest);
        }
        let events = serde_json::to_value(journal.events()).expect("events");
        let events = events.as_array().expect("a list");
        assert_eq!(events.len(), EVENTS_MAX);
        assert!(events.iter().all(|event| event["event"] == "seal-sent"));
        assert!(events[0]["at_unix_us"].is_u64());
    }
}
