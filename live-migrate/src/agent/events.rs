//! What happened on this host by the agent's own doing, for whoever watches it.
//!
//! The last [`KEPT`] events, in memory: an agent that is started again has a new
//! `boot` and begins at 1.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use utoipa::ToSchema;

/// Events kept; a host has a few a year.
const KEPT: usize = 256;

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(super) struct Event {
    /// Its number; grows by one.
    seq: u64,
    /// When, microseconds since 1970.
    at_unix_us: u64,
    /// Stable kind, such as `baton.vm.stopped`.
    kind: &'static str,
    /// About this VM.
    vm: String,
    /// One sentence.
    detail: String,
    /// More, for programs.
    #[schema(value_type = Object)]
    data: Value,
}

/// Events after a cursor.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventList {
    /// Of this start of the agent; numbers of another say nothing here.
    boot: String,
    /// Number of the last event.
    latest: u64,
    /// Oldest first.
    events: Vec<Event>,
}

/// All that are kept.
#[derive(Debug)]
pub(super) struct Events {
    boot: String,
    kept: Mutex<VecDeque<Event>>,
    latest: watch::Sender<u64>,
}

pub(super) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

impl Events {
    pub(super) fn new() -> Self {
        let boot = format!("{:x}-{:x}", std::process::id(), now_us());
        Self { boot, kept: Mutex::default(), latest: watch::channel(0).0 }
    }

    pub(super) fn tell(&self, kind: &'static str, vm: &str, detail: String, data: Value) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = *self.latest.borrow() + 1;
        kept.push_back(Event { seq, at_unix_us: now_us(), kind, vm: vm.to_owned(), detail, data });
        if kept.len() > KEPT {
            kept.pop_front();
        }
        self.latest.send_replace(seq);
    }

    /// What came after `since` of start `boot`, all that are kept for another;
    /// waits at most `wait` while there is nothing.
    pub(super) async fn after(&self, boot: &str, since: u64, wait: Duration) -> EventList {
        let since = if boot == self.boot { since } else { 0 };
        let mut latest = self.latest.subscribe();
        // None in time is an answer, too.
        let _ = tokio::time::timeout(wait, latest.wait_for(|seq| *seq > since)).await;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let events = kept.iter().filter(|event| event.seq > since).cloned().collect();
        EventList { boot: self.boot.clone(), latest: *self.latest.borrow(), events }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn seqs(events: &Events, boot: &str, since: u64) -> Vec<u64> {
        let list = events.after(boot, since, Duration::ZERO).await;
        list.events.iter().map(|event| event.seq).collect()
    }

    #[tokio::test]
    async fn a_cursor_of_another_start_sees_all_that_are_kept() {
        let events = Events::new();
        for _ in 0..KEPT + 2 {
            events.tell("test", "web", String::new(), Value::Null);
        }
        let boot = events.boot.clone();
        let last = KEPT as u64 + 2;
        assert_eq!(seqs(&events, &boot, last - 1).await, [last]);
        assert_eq!(seqs(&events, &boot, last).await, [0; 0]);
        assert_eq!(seqs(&events, "other", last).await.len(), KEPT);
        assert_eq!(seqs(&events, &boot, 0).await[0], 3, "the oldest are forgotten");
    }
}
