//! What happens, told to whoever follows it.

use std::time::Duration;

use baton_live_migrate::coordinator::journal::{Change, EVENTS_MAX, Event, Journal};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::support::{Cluster, LIMIT, id, raw, wait};

#[tokio::test]
async fn events_are_numbered_and_can_be_resumed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    coordinator.post(&id, "cancel").await.expect("cancelled");
    let all = events(&cluster, "since=0", "", "SETTLED").await;
    let states: Vec<_> =
        all.iter().map(|e| e["data"]["state"].as_str().unwrap_or_default()).collect();
    assert_eq!(states, ["PREPARING", "READY", "RECLAIMED", "SETTLED"]);
    let first = &all[0];
    assert_eq!(
        (&first["specversion"], &first["type"]),
        (&json!("1.0"), &json!("baton.handoff.state"))
    );
    assert_eq!(first["subject"], format!("vms/web/handoffs/{id}"));
    let seen = all[1]["id"].as_str().expect("a cursor");
    let rest = events(&cluster, &format!("since={seen}"), "", "SETTLED").await;
    assert_eq!(rest, all[2..]);
    // As browsers say it; that is newer than what the address says.
    let header = format!("Last-Event-ID: {seen}\r\n");
    for query in ["", "since=0"] {
        assert_eq!(events(&cluster, query, &header, "SETTLED").await, all[2..], "{query}");
    }
    let odd = raw(&cluster, "GET /v1/events HTTP/1.1\r\nLast-Event-ID: odd").await;
    assert!(odd.0.starts_with("HTTP/1.1 400") && odd.1.contains("Last-Event-ID"), "{odd:?}");
    // A cursor of a journal that was lost: told at once, not silent until the numbers meet.
    let id = super::support::id();
    let asked = async {
        coordinator.prepare(&id).await.expect("READY");
        coordinator.post(&id, "cancel").await.expect("cancelled");
    };
    let both = async { tokio::join!(events(&cluster, "since=1000", "", "SETTLED"), asked) };
    let (told, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("in time");
    assert_eq!(told[0]["type"], "baton.events.lost");
    assert_eq!(told[1]["data"]["state"], "PREPARING");
}

/// The next coordinator on the journal goes on where the one before it ended.
#[tokio::test]
async fn a_cursor_outlives_the_coordinator() {
    let cluster = Cluster::new().await;
    let first = cluster.coordinator("c", "").await;
    let handoff = id();
    first.prepare(&handoff).await.expect("READY");
    first.post(&handoff, "cancel").await.expect("cancelled");
    let before = events(&cluster, "since=0", "", "SETTLED").await;
    let seen = number(before.last().expect("events"));
    drop(first);
    let second = cluster.coordinator("c", "").await;
    let handoff = id();
    second.prepare(&handoff).await.expect("READY");
    second.post(&handoff, "cancel").await.expect("cancelled");
    let rest = events(&cluster, &format!("since={seen}"), "", "SETTLED").await;
    let numbers: Vec<u64> = rest.iter().map(number).collect();
    assert_eq!(numbers, (seen + 1..=seen + rest.len() as u64).collect::<Vec<_>>(), "none is lost");
    assert!(rest.iter().all(|event| event["data"]["id"] == handoff.as_str()), "{rest:#?}");
    drop(second);
}

/// Who has slept too long hears first that events are missing, and then those that are not.
#[tokio::test]
async fn a_cursor_from_before_the_log_is_told_of_the_gap() {
    let cluster = Cluster::new().await;
    let journal = cluster.dir.path().join("c.redb");
    let event = |n: u64| Event {
        seq: 0,
        kind: "test".to_owned(),
        subject: String::new(),
        at_unix_us: n,
        data: json!({"state": if n == EVENTS_MAX + 5 { "END" } else { "" }}),
    };
    {
        let (journal, _) = Journal::open(&journal, 0, None).expect("new");
        for events in [1..=EVENTS_MAX / 2, EVENTS_MAX / 2 + 1..=EVENTS_MAX + 5] {
            let events = events.map(event).collect();
            journal.write(Change { events, ..Change::default() }).await.expect("written");
        }
    }
    // Its thread lets go of the file a little later.
    let free = || std::fs::File::open(&journal).expect("there").try_lock().is_ok();
    wait("the journal is free", async || free()).await;
    let _coordinator = cluster.coordinator("c", "").await;
    let told = events(&cluster, "since=2", "", "END").await;
    assert_eq!(told[0]["type"], "baton.events.lost");
    assert_eq!(told[0]["data"], json!({"from": 3, "to": 5, "kept": EVENTS_MAX}));
    assert_eq!((number(&told[1]), told.len() as u64), (6, EVENTS_MAX + 1));
    // The oldest that is kept is the next one: nothing is missing.
    let all = events(&cluster, "since=5", "", "END").await;
    assert_eq!((&all[0]["type"], number(&all[0])), (&json!("test"), 6));
}

fn number(event: &Value) -> u64 {
    event["id"].as_str().expect("a cursor").parse().expect("a number")
}

/// Row 37 of the failure table: what an agent did by itself is told here, once.
#[tokio::test]
async fn row_37_what_an_agent_did_is_among_the_events_once() {
    let cluster = Cluster::new().await;
    // The host's clock is set back between them.
    let did = |at: u64| {
        json!({"seq": at, "at_unix_us": 10 - at, "kind": "baton.vm.stopped", "vm": "web",
            "detail": "it was stopped", "data": {"parked": "lost"}})
    };
    cluster.b.did.lock().expect("lock").push(did(1));
    let first = cluster.coordinator("c", "").await;
    wait("it is told", async || raw_events(&cluster).await.contains("\"baton.vm.stopped\"")).await;
    drop(first);
    // The next one is told all again, and knows what it has.
    let coordinator = cluster.coordinator("c", "").await;
    cluster.b.did.lock().expect("lock").push(did(2));
    let mut text = String::new();
    wait("both are told", async || {
        text = raw_events(&cluster).await;
        text.matches("\"baton.vm.stopped\"").count() >= 2
    })
    .await;
    assert_eq!(text.matches("\"baton.vm.stopped\"").count(), 2, "{text}");
    assert!(text.contains("\"host\":\"host-b\"") && text.contains("\"parked\":\"lost\""), "{text}");
    drop(coordinator);
}

/// All that are kept, as they are sent at once.
async fn raw_events(cluster: &Cluster) -> String {
    let socket = cluster.dir.path().join("c.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    stream.write_all(b"GET /v1/events?since=0 HTTP/1.1\r\nHost: c\r\n\r\n").await.expect("asked");
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    let pause = Duration::from_millis(200);
    while let Ok(Ok(read @ 1..)) =
        tokio::time::timeout(pause, tokio::io::AsyncReadExt::read(&mut stream, &mut chunk)).await
    {
        text.extend_from_slice(&chunk[..read]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Reads events until one of a state.
async fn events(cluster: &Cluster, query: &str, headers: &str, until: &str) -> Vec<Value> {
    let socket = cluster.dir.path().join("c.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    let ask = format!("GET /v1/events?{query} HTTP/1.1\r\nHost: c\r\n{headers}\r\n");
    stream.write_all(ask.as_bytes()).await.expect("asked");
    let mut lines = BufReader::new(stream).lines();
    let mut events: Vec<Value> = Vec::new();
    // Of all of them: the stream is kept alive with lines that say nothing.
    let read = tokio::time::timeout(LIMIT, async {
        while events.last().is_none_or(|event| event["data"]["state"] != until) {
            let line = lines.next_line().await.expect("read").expect("more");
            if let Some(data) = line.strip_prefix("data: ") {
                events.push(serde_json::from_str(data).expect("JSON"));
            }
        }
    });
    assert!(read.await.is_ok(), "no {until} in {events:?}");
    events
}
