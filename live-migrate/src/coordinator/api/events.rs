//! Events as a stream that can be resumed: server-sent events whose ids are
//! cursors, and whose data are CloudEvents 1.0 in JSON.
//!
//! The log is bounded ([`EVENTS_MAX`]): who comes back with a cursor older than
//! the oldest event kept gets `baton.events.lost` first, and must look at
//! `/v1/handoffs` and `/v1/vms` anew. So does who comes with a cursor that is
//! newer than the newest: the journal was lost in between.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use futures_util::stream::{Stream, unfold};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::{Api, may_look, query};
use crate::coordinator::fault::Fault;
use crate::coordinator::journal::{EVENTS_MAX, Event, Journal};
use crate::door::Peer;

/// Read at once.
const BATCH: usize = 256;
/// Without it a proxy in between forgets the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Between two tries at a journal that cannot be read.
const PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    since: Option<u64>,
}

struct Tail {
    journal: Journal,
    latest: watch::Receiver<u64>,
    cursor: u64,
    ready: VecDeque<SseEvent>,
    resumed: bool,
}

/// Follows what happens. `Last-Event-ID`, or `since`, is the last event seen;
/// without them it begins with what happens next. The last 10,000 events are
/// kept; after a gap `baton.events.lost` comes first.
#[utoipa::path(get, path = "/v1/events", params(("since" = Option<u64>, Query, description = "Cursor: the last event seen; 0 for all that are kept."),
    ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it.")),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 400, body = Fault)))]
pub(super) async fn events(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    since: Result<Query<Since>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, Fault> {
    may_look(&peer)?;
    let header = headers.get("last-event-id").map(|id| {
        let id = id.to_str().ok().and_then(|id| id.parse().ok());
        id.ok_or_else(|| Fault::bad_request("Last-Event-ID is not the id of an event"))
    });
    let cursor = match header {
        Some(id) => Some(id?),
        None => query(since)?.since,
    };
    let latest = core.journal.latest();
    let newest = *latest.borrow();
    let resumed = cursor.is_some();
    let mut ready = VecDeque::new();
    let cursor = match cursor {
        // The journal was lost and begun anew: that number's event will be another one.
        Some(cursor) if cursor > newest => {
            ready.push_back(lost(cursor.saturating_add(1), newest));
            newest
        }
        Some(cursor) => cursor,
        None => newest,
    };
    let tail = Tail { journal: core.journal.clone(), latest, cursor, ready, resumed };
    Ok(Sse::new(unfold(tail, next)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

async fn next(mut tail: Tail) -> Option<(Result<SseEvent, Infallible>, Tail)> {
    loop {
        if let Some(event) = tail.ready.pop_front() {
            return Some((Ok(event), tail));
        }
        tail.latest.borrow_and_update();
        match tail.journal.events_after(tail.cursor, BATCH).await {
            Ok((events, oldest)) => {
                if tail.resumed && tail.cursor.saturating_add(1) < oldest {
                    tail.ready.push_back(lost(tail.cursor + 1, oldest - 1));
                }
                tail.resumed = false;
                if let Some(last) = events.last() {
                    tail.cursor = last.seq;
                }
                tail.ready.extend(events.iter().map(sent));
                if !tail.ready.is_empty() {
                    continue;
                }
                // The journal ends with the coordinator.
                tail.latest.changed().await.ok()?;
            }
            Err(error) => {
                tracing::warn!(%error, "events cannot be read");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Who hears it has missed events, and looks anew.
fn lost(from: u64, to: u64) -> SseEvent {
    let data = json!({"from": from, "to": to, "kept": EVENTS_MAX});
    let data = cloud_event("baton.events.lost", to, "", None, &data);
    SseEvent::default().event("baton.events.lost").data(data.to_string())
}

fn sent(event: &Event) -> SseEvent {
    let at = Duration::from_micros(event.at_unix_us);
    let time = OffsetDateTime::from(SystemTime::UNIX_EPOCH + at);
    let data = cloud_event(&event.kind, event.seq, &event.subject, Some(time), &event.data);
    SseEvent::default().id(event.seq.to_string()).event(&event.kind).data(data.to_string())
}

fn cloud_event(
    kind: &str,
    seq: u64,
    subject: &str,
    time: Option<OffsetDateTime>,
    data: &Value,
) -> Value {
    let mut event = json!({"specversion": "1.0", "type": kind, "source": "/baton/coordinator",
        "id": seq.to_string(), "datacontenttype": "application/json", "data": data});
    if !subject.is_empty() {
        event["subject"] = subject.into();
    }
    if let Some(time) = time {
        event["time"] = rfc_3339(time).into();
    }
    event
}

fn rfc_3339(time: OffsetDateTime) -> String {
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.microsecond()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_as_rfc_3339_wants_it() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042);
        assert_eq!(rfc_3339(at.into()), "2023-11-14T22:13:20.000042Z");
    }
}
