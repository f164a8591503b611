//! News about one volume, for EVENT requests.
//!
//! Kept: the latest event of each kind. A client that was away learns every
//! fact, not every step, so the memory is bounded. Does not know who listens.

use std::sync::{Mutex, PoisonError};

use baton_protocol::{Event, EventKind};

const KINDS: usize = 4;

/// The latest event of each kind, and the counter.
#[derive(Debug, Default)]
pub struct Events(Mutex<Log>);

#[derive(Debug, Default)]
struct Log {
    last_id: u64,
    latest: [Option<Event>; KINDS],
}

impl Events {
    /// Records an event. The caller wakes the workers afterwards.
    pub fn publish(&self, kind: EventKind, value: u64) {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.last_id += 1;
        let event = Event { id: log.last_id, kind, value };
        log.latest[kind as usize - 1] = Some(event);
    }

    /// The oldest event kept that is newer than `known`.
    #[must_use]
    pub fn after(&self, known: u64) -> Option<Event> {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.latest.iter().flatten().filter(|event| event.id > known).min_by_key(|e| e.id).copied()
    }

    /// Number of the last event; 0 when there was none.
    #[must_use]
    pub fn last_id(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last_id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_was_away_learns_every_fact_in_order() {
        let events = Events::default();
        assert_eq!((events.after(0), events.last_id()), (None, 0));
        for (kind, value) in [
            (EventKind::Resized, 10),
            (EventKind::EpochChanged, 2),
            (EventKind::Resized, 20),
            (EventKind::GoingAway, 0),
        ] {
            events.publish(kind, value);
        }
        let mut known = 0;
        let mut seen = Vec::new();
        while let Some(event) = events.after(known) {
            known = event.id;
            seen.push((event.kind, event.value));
        }
        assert_eq!(
            seen,
            [(EventKind::EpochChanged, 2), (EventKind::Resized, 20), (EventKind::GoingAway, 0)]
        );
        assert_eq!((known, events.last_id()), (4, 4));
    }
}
