//! What a caller sees when all goes well, or when it changes its mind.

use baton_live_migrate::client::{CallError, Method};
use baton_protocol::access::Phase;
use serde_json::{Value, json};

use super::support::{Cluster, id, kind, raw, wait};

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
async fn handoffs_are_listed_by_state_and_vm() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let (first, second) = (id(), id());
    coordinator.prepare(&first).await.expect("READY");
    coordinator.post(&first, "cancel").await.expect("cancelled");
    coordinator.over(&first).await;
    coordinator.prepare(&second).await.expect("READY");
    for (query, expected) in [
        ("", vec![&first, &second]),
        ("?state=READY", vec![&second]),
        ("?state=settled", vec![&first]),
        ("?state=SEALED", vec![]),
        ("?vm=web&state=READY", vec![&second]),
        ("?vm=other", vec![]),
    ] {
        let answer = coordinator.get(&format!("/v1/handoffs{query}")).await;
        let rows = answer["handoffs"].as_array().expect("a list");
        let ids: Vec<&str> = rows.iter().filter_map(|row| row["id"].as_str()).collect();
        assert_eq!(ids, expected, "{query}");
    }
}

/// Every order is idempotent by the handoff's state, with the header and without it.
#[tokio::test]
async fn an_idempotency_key_is_taken_and_changes_nothing() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    let path = format!("/v1/vms/web/handoffs/{id}");
    let ask = |key: &str| {
        format!("POST {path}:cancel HTTP/1.1\r\nIdempotency-Key: {key}\r\nContent-Length: 0")
    };
    let mut seen = Vec::new();
    for key in ["one", "one", "two"] {
        let (head, body) = raw(&cluster, &ask(key)).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}\n{body}");
        let row: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((&row["state"], &row["outcome"]), (&json!("SETTLED"), &json!("source")));
        seen.push(row["version"].clone());
    }
    assert!(seen.iter().all(|version| *version == seen[0]), "{seen:?}");
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
