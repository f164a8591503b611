//! What a caller sees when all goes well, or when it changes its mind.

use std::time::Duration;

use baton_live_migrate::client::{CallError, Method};
use baton_protocol::access::Phase;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::support::{Cluster, id, kind, wait};

#[tokio::test]
async fn a_handoff_from_prepare_to_finish() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    let row = coordinator.prepare(&id).await.expect("READY");
    assert_eq!((&row["state"], &row["outcome"]), (&json!("READY"), &json!("source")));
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!(access["owner_host"], "host-a");
    assert_eq!(access["phase"], "armed");
    assert_eq!(access["handoff"]["id"], id);
    // Nothing is decided: finishing says so, and is noted.
    let (problem, detail) = kind(
        coordinator
            .call(
                Method::POST,
                &format!("/v1/vms/web/handoffs/{id}:finish?timeout=10ms"),
                Value::Null,
            )
            .await,
    );
    assert_eq!(problem, "baton:not-ready", "{detail}");
    // The machines switch by themselves.
    let client = coordinator.client.clone();
    let path = format!("/v1/vms/web/handoffs/{id}?wait=ACTIVE&timeout=30s");
    let waiting = tokio::spawn(async move { client.call(Method::GET, &path, None).await });
    cluster.switch();
    let row = waiting.await.expect("no panic").expect("ACTIVE");
    assert_eq!(row["outcome"], "destination");
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("SETTLED"), &json!("destination")));
    assert_eq!(cluster.owner(), "host-b/web");
    assert_eq!(cluster.a.machine("web").backend, None, "the source's backend was stopped");
    let timings = json!({"drain_us": 210, "seal_us": 300, "activate_us": 260, "vmm_gap_us": 700});
    assert_eq!(row["timings"], timings, "measured before it was stopped");
    assert_eq!(cluster.b.machine("web").backend, Some("standby"));
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!((&access["owner_host"], &access["phase"]), (&json!("host-b"), &json!("owned")));
    assert_eq!(access["decided_by"]["winner"], "destination");
    // Too late to cancel; finishing again changes nothing.
    let (problem, detail) = kind(coordinator.post(&id, "cancel").await);
    assert_eq!(problem, "baton:lost-race");
    assert!(detail.contains("do not resume the source"), "{detail}");
    assert_eq!(coordinator.post(&id, "finish").await.expect("again")["outcome"], "destination");
    // What was measured outlives backend and coordinator.
    drop(coordinator);
    let next = cluster.coordinator("c", "").await;
    assert_eq!(next.over(&id).await["timings"], timings);
}

#[tokio::test]
async fn row_28_a_cancelled_handoff_leaves_everything_as_it_was() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    let row = coordinator.post(&id, "cancel").await.expect("cancelled");
    assert_eq!((&row["state"], &row["outcome"]), (&json!("SETTLED"), &json!("source")));
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.b.machine("web").backend, None);
    assert_eq!(cluster.a.machine("web").backend, Some("owner"));
    assert_eq!(cluster.storages[0].record("root").epoch.0, 1, "the guest never noticed");
    assert_eq!(row["timings"]["seal_us"], Value::Null, "of another handoff, if of any");
    // Again is the same; and so is another one.
    assert_eq!(coordinator.post(&id, "cancel").await.expect("again")["outcome"], "source");
    let other = super::support::id();
    assert_eq!(coordinator.prepare(&other).await.expect("READY")["state"], "READY");
}

/// The destination has the volumes, and nothing is settled yet.
#[tokio::test]
async fn row_28_a_cancel_that_comes_too_late_says_who_owns_the_vm() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    cluster.switch();
    for _ in 0..2 {
        let refused = coordinator.post(&id, "cancel").await;
        let Err(CallError::Refused { status, .. }) = &refused else { panic!("{refused:?}") };
        assert_eq!(*status, 409);
        let (problem, detail) = kind(refused);
        assert_eq!(problem, "baton:lost-race");
        assert!(detail.contains("host-b owns the volumes of `web`"), "{detail}");
        assert!(detail.contains("do not resume the source on host-a"), "{detail}");
    }
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("SETTLED"), &json!("destination")));
    assert_eq!(cluster.owner(), "host-b/web");
}

/// Row 6 of the failure table.
#[tokio::test]
async fn row_06_the_same_request_again_is_the_same_handoff() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    let first = coordinator.prepare(&id).await.expect("READY");
    let again = coordinator.prepare(&id).await.expect("the same");
    assert_eq!(first["version"], again["version"]);
    let path = format!("/v1/vms/web/handoffs/{id}");
    let other = json!({"from": "host-a", "to": "host-b", "mode": "explicit"});
    let (problem, detail) = kind(coordinator.call(Method::PUT, &path, other).await);
    assert_eq!(problem, "baton:id-in-use");
    assert!(detail.contains("the source host-a owns"), "{detail}");
    let (problem, detail) = kind(coordinator.prepare(&super::support::id()).await);
    assert_eq!(problem, "baton:handoff-in-progress");
    assert!(detail.contains(&id), "{detail}");
}

#[tokio::test]
async fn explicit_mode_switches_when_it_is_told() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    let path = format!("/v1/vms/web/handoffs/{id}?wait=READY");
    let body = json!({"to": "host-b", "mode": "explicit"});
    let row = coordinator.call(Method::PUT, &path, body).await.expect("READY");
    assert_eq!(row["from"], "host-a", "found by the volumes' owner");
    let (problem, _) = kind(coordinator.post(&id, "activate").await);
    assert_eq!(problem, "baton:not-ready");
    assert_eq!(coordinator.post(&id, "switchover").await.expect("sealed")["state"], "SEALED");
    let row = coordinator.post(&id, "activate").await.expect("active");
    assert_eq!(row["outcome"], "destination");
    assert_eq!(coordinator.post(&id, "finish").await.expect("finished")["state"], "SETTLED");
    assert_eq!(cluster.owner(), "host-b/web");
}

#[tokio::test]
async fn ten_clients_that_repeat_themselves_get_one_answer() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let ids: Vec<String> = (0..3).map(|_| id()).collect();
    let clients = (0..10).map(|n| {
        let (client, id) = (coordinator.client.clone(), ids[n % ids.len()].clone());
        tokio::spawn(async move {
            let path = format!("/v1/vms/web/handoffs/{id}");
            let body = json!({"from": "host-a", "to": "host-b"});
            for _ in 0..5 {
                let _ = client.call(Method::PUT, &path, Some(&body)).await;
                let _ = client.call(Method::POST, &format!("{path}:cancel"), None).await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.expect("no panic");
    }
    let all = coordinator.get("/v1/handoffs").await;
    for row in all["handoffs"].as_array().expect("handoffs") {
        assert!(ids.contains(&row["id"].as_str().expect("an id").to_owned()));
        assert_eq!(row["outcome"], "source");
        coordinator.over(row["id"].as_str().expect("an id")).await;
    }
    assert_eq!(cluster.owner(), "host-a/web");
}

#[tokio::test]
async fn a_poll_with_an_etag_answers_when_something_changed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    let path = format!("/v1/vms/web/handoffs/{id}");
    let (head, _) = raw(&cluster, &format!("GET {path} HTTP/1.1")).await;
    let etag = head.lines().find_map(|l| l.strip_prefix("etag: ")).expect("an etag").to_owned();
    let ask = format!("GET {path} HTTP/1.1\r\nIf-None-Match: {etag}");
    assert!(raw(&cluster, &ask).await.0.starts_with("HTTP/1.1 304"));
    let ask = format!("GET {path}?timeout=30s HTTP/1.1\r\nIf-None-Match: {etag}");
    let (changed, cancelled) = tokio::join!(raw(&cluster, &ask), coordinator.post(&id, "cancel"));
    assert!(changed.0.starts_with("HTTP/1.1 200"), "{}", changed.0);
    cancelled.expect("cancelled");
}

#[tokio::test]
async fn events_are_numbered_and_can_be_resumed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    coordinator.post(&id, "cancel").await.expect("cancelled");
    let all = events(&cluster, "since=0", "SETTLED").await;
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
    let rest = events(&cluster, &format!("since={seen}"), "SETTLED").await;
    assert_eq!(rest, all[2..]);
    // A cursor of a journal that was lost: told at once, not silent until the numbers meet.
    let id = super::support::id();
    let asked = async {
        coordinator.prepare(&id).await.expect("READY");
        coordinator.post(&id, "cancel").await.expect("cancelled");
    };
    let both = async { tokio::join!(events(&cluster, "since=1000", "SETTLED"), asked) };
    let (told, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("in time");
    assert_eq!(told[0]["type"], "baton.events.lost");
    assert_eq!(told[1]["data"]["state"], "PREPARING");
}

/// Row 37 of the failure table: what an agent did by itself is told here, once.
#[tokio::test]
async fn row_37_what_an_agent_did_is_among_the_events_once() {
    let cluster = Cluster::new().await;
    let did = |at: u64| {
        json!({"seq": at, "at_unix_us": at, "kind": "baton.vm.stopped", "vm": "web",
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
async fn events(cluster: &Cluster, query: &str, until: &str) -> Vec<Value> {
    let socket = cluster.dir.path().join("c.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    let ask = format!("GET /v1/events?{query} HTTP/1.1\r\nHost: c\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.expect("asked");
    let mut lines = BufReader::new(stream).lines();
    let mut events = Vec::new();
    loop {
        let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line());
        let line = line.await.expect("in time").expect("read").expect("more");
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let event: Value = serde_json::from_str(data).expect("JSON");
        let last = event["data"]["state"] == until;
        events.push(event);
        if last {
            return events;
        }
    }
}

/// Head and body of one exchange.
async fn raw(cluster: &Cluster, ask: &str) -> (String, String) {
    let socket = cluster.dir.path().join("c.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    let ask = format!("{ask}\r\nHost: c\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.expect("asked");
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

/// Row 17 of the failure table: the source's machine is resumed.
#[tokio::test]
async fn row_17_a_source_that_comes_back_by_itself_settles_the_handoff() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    cluster.source_comes_back();
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["because"]["type"]), (&json!("SETTLED"), &json!("taken-back")));
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.b.machine("web").backend, None);
}

/// Row 31 of the failure table: the guest resets in the copy of memory, twice. Each
/// attempt has a backend of its own at the destination.
#[tokio::test]
async fn row_31_an_explicit_handoff_is_tried_again_with_another_backend() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    let path = format!("/v1/vms/web/handoffs/{id}");
    let body = json!({"to": "host-b", "mode": "explicit"});
    coordinator.call(Method::PUT, &format!("{path}?wait=READY"), body).await.expect("READY");
    for attempt in 2..=3 {
        cluster.source_comes_back();
        wait("the next attempt is ready", async || {
            let row = coordinator.get(&path).await;
            (&row["attempt"], &row["state"]) == (&json!(attempt), &json!("READY"))
        })
        .await;
        assert_eq!(cluster.b.machine("web").stood_by, attempt, "a destination is good for one try");
    }
    let tries = [1, 2, 3].map(|attempt| json!(format!("{id}/{attempt}")));
    assert_eq!(cluster.b.machine("web").stood_for, tries);
    assert_eq!(coordinator.post(&id, "switchover").await.expect("sealed")["state"], "SEALED");
    let row = coordinator.post(&id, "activate").await.expect("active");
    assert_eq!((&row["outcome"], &row["attempt"]), (&json!("destination"), &json!(3)));
    coordinator.post(&id, "finish").await.expect("finished");
    assert_eq!(cluster.owner(), "host-b/web");
}

#[tokio::test]
async fn row_31_a_guest_that_resets_for_ever_stays_where_it_is() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    let path = format!("/v1/vms/web/handoffs/{id}");
    let body = json!({"to": "host-b", "mode": "explicit"});
    coordinator.call(Method::PUT, &path, body).await.expect("asked");
    for attempt in 1..=3 {
        wait("ready", async || {
            let row = coordinator.get(&path).await;
            (&row["attempt"], &row["state"]) == (&json!(attempt), &json!("READY"))
        })
        .await;
        cluster.source_comes_back();
    }
    let row = coordinator.over(&id).await;
    assert_eq!((&row["outcome"], &row["attempt"]), (&json!("source"), &json!(3)));
    let detail = row["because"]["detail"].as_str().expect("a sentence");
    assert!(detail.contains("the last of 3 attempts; begin another handoff"), "{detail}");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// Row 32 of the failure table: an administrator stops and continues the source in
/// an implicit handoff, whose destination nobody here can end.
#[tokio::test]
async fn row_32_an_implicit_handoff_ends_with_a_sentence_and_nothing_armed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    cluster.source_comes_back();
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["attempt"]), (&json!("SETTLED"), &json!(1)));
    let detail = row["because"]["detail"].as_str().expect("a sentence");
    for part in ["`web` goes on at host-a", "is not tried again", "begin another handoff"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.b.machine("web").stood_by, 1);
}

#[tokio::test]
async fn a_standby_backend_that_dies_is_started_again() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    cluster.b.with("web", |machine| machine.backend = None);
    wait("it is started again", async || cluster.b.machine("web").backend.is_some()).await;
    let row = coordinator.get(&format!("/v1/vms/web/handoffs/{id}?wait=READY")).await;
    assert_eq!(row["outcome"], "source");
    assert_eq!(cluster.storages[0].record("root").phase, Phase::Armed);
}

/// One from before a backend could be told its try.
#[tokio::test]
async fn an_old_agent_starts_a_backend_without_its_try() {
    let cluster = Cluster::new().await;
    cluster.b.is_old.store(true, std::sync::atomic::Ordering::SeqCst);
    let coordinator = cluster.coordinator("c", "").await;
    coordinator.prepare(&id()).await.expect("READY");
    let machine = cluster.b.machine("web");
    assert_eq!((machine.backend, machine.stood_for), (Some("standby"), vec![]));
}
