//! Somebody who is needed is away: refused before anything is armed where that can
//! be, and said who owns the VM, what may be armed and what to do.

use std::sync::atomic::Ordering;

use baton_live_migrate::client::Method;
use serde_json::{Value, json};

use super::support::{Cluster, Coordinator, id, kind, wait};

/// The destination has seen the VM before, so that there is somebody to say what it is.
fn known_at_the_destination(cluster: &Cluster) {
    cluster.b.with("web", |machine| {
        machine.definition = cluster.a.machine("web").definition;
        machine.run = "gone";
    });
}

async fn nothing_was_armed(cluster: &Cluster, coordinator: &Coordinator, version: u64) {
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
    assert_eq!(cluster.storages[0].record("root").version, version, "something was armed");
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.b.machine("web").backend, None, "nothing was started");
}

#[tokio::test]
async fn a_source_whose_agent_is_down_is_refused_before_anything_is_armed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "agent_patience_ms = 300\n").await;
    known_at_the_destination(&cluster);
    let version = cluster.storages[0].record("root").version;
    cluster.a.silent.store(true, Ordering::SeqCst);
    let explicit = json!({"to": "host-b", "mode": "explicit"});
    let put = format!("/v1/vms/web/handoffs/{}", id());
    for (method, path, body) in [
        (Method::POST, "/v1/vms/web/migrations", json!({"id": id(), "to": "host-b"})),
        (Method::PUT, &put, explicit),
    ] {
        let (problem, detail) = kind(coordinator.call(method, path, body).await);
        assert_eq!(problem, "baton:agent-unreachable", "{path}: {detail}");
        for part in [
            "agent of host-a",
            "tried for 300 ms",
            "host-a owns the volumes of `web`",
            "nothing was armed",
            "see to baton-agent on host-a and ask again",
            "baton handoff fence web --dead-host host-a --nominee host-b",
        ] {
            assert!(detail.contains(part), "{path}: {part}: {detail}");
        }
        nothing_was_armed(&cluster, &coordinator, version).await;
    }
    // One answer names both.
    cluster.b.silent.store(true, Ordering::SeqCst);
    let remembered = "/v1/vms/web/access";
    coordinator.call(Method::GET, remembered, Value::Null).await.expect_err("nobody knows it");
    cluster.a.silent.store(false, Ordering::SeqCst);
    coordinator.get("/v1/vms").await;
    cluster.a.silent.store(true, Ordering::SeqCst);
    let body = json!({"id": id(), "from": "host-a", "to": "host-b"});
    let (problem, detail) =
        kind(coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await);
    assert_eq!(problem, "baton:agent-unreachable");
    assert!(detail.contains("see to baton-agent on host-a and host-b"), "{detail}");
    nothing_was_armed(&cluster, &coordinator, version).await;
}

/// The rings switch it and somebody else drives the machines: nothing is asked of the
/// source's agent, so a dead one is in nobody's way.
#[tokio::test]
async fn an_implicit_handoff_does_without_the_sources_agent() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "agent_patience_ms = 300\n").await;
    coordinator.get("/v1/vms").await;
    cluster.a.silent.store(true, Ordering::SeqCst);
    let handoff = id();
    assert_eq!(coordinator.prepare(&handoff).await.expect("READY")["state"], "READY");
    cluster.switch();
    let done = coordinator.post(&handoff, "finish").await.expect("decided");
    assert_eq!(done["outcome"], "destination");
    assert_eq!(cluster.owner(), "host-b/web");
}

/// A host that is dead is fenced, whatever its agent does not say.
#[tokio::test]
async fn a_fence_does_not_wait_for_the_dead_hosts_agent() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "agent_patience_ms = 300\n").await;
    coordinator.get("/v1/vms").await;
    cluster.a.silent.store(true, Ordering::SeqCst);
    let fence = json!({"dead_host": "host-a", "reason": "power", "nominee": "host-b"});
    coordinator.call(Method::POST, "/v1/vms/web:fence", fence).await.expect("fenced");
    assert_eq!(cluster.owner(), "host-b/web");
}

#[tokio::test]
async fn a_storage_server_that_is_away_is_named_with_who_owns_the_vm() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let version = cluster.storages[0].record("root").version;
    cluster.storages[1].silent.store(true, Ordering::SeqCst);
    let address = cluster.storages[1].address.to_string();
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:storage-unreachable");
    for part in [
        address.as_str(),
        "the agent of host-a says that it owns the volumes of `web`",
        "nothing was armed",
        "see to that server and ask again",
    ] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    nothing_was_armed(&cluster, &coordinator, version).await;
    // Nobody is there to say it: it is not made up.
    cluster.storages[1].silent.store(false, Ordering::SeqCst);
    cluster.storages[0].silent.store(true, Ordering::SeqCst);
    cluster.a.silent.store(true, Ordering::SeqCst);
    coordinator.get("/v1/vms").await;
    known_at_the_destination(&cluster);
    let answer = coordinator.call(Method::GET, "/v1/vms/web/access", Value::Null).await;
    let (problem, detail) = kind(answer);
    assert_eq!(problem, "baton:storage-unreachable");
    assert!(detail.contains("is not known here: `baton handoff why web`"), "{detail}");
}

/// In the middle it says what may be armed, and afterwards how it ended.
#[tokio::test]
async fn a_storage_server_that_is_lost_in_a_handoff_is_named_with_what_is_armed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let storage = &cluster.storages[1];
    storage.hang_on("arm");
    let handoff = id();
    let path = format!("/v1/vms/web/handoffs/{handoff}");
    coordinator.call(Method::PUT, &path, json!({"to": "host-b"})).await.expect("asked");
    storage.silent.store(true, Ordering::SeqCst);
    let mut row = Value::Null;
    wait("it is hindered", async || {
        row = coordinator.get(&path).await;
        row["trouble"]["type"] == "baton:storage-unreachable"
    })
    .await;
    let detail = row["trouble"]["detail"].to_string();
    for part in [
        storage.address.to_string().as_str(),
        "the source host-a owns the volumes of `web`, which goes on there",
        "armed for host-b, or about to be: root, data",
        "baton handoff cancel web",
    ] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    storage.silent.store(false, Ordering::SeqCst);
    storage.thaw();
    // Sealed, and the anchor away: it may be the destination's, and nobody says it is not.
    coordinator.get(&format!("{path}?wait=READY&timeout=30s")).await;
    cluster.seal();
    coordinator.get(&format!("{path}?wait=SEALED&timeout=30s")).await;
    cluster.storages[0].silent.store(true, Ordering::SeqCst);
    let cancel = format!("{path}:cancel?timeout=100ms");
    let _ = coordinator.call(Method::POST, &cancel, Value::Null).await;
    wait("it is hindered", async || {
        row = coordinator.get(&path).await;
        row["trouble"]["type"] == "baton:storage-unreachable"
    })
    .await;
    let detail = row["trouble"]["detail"].to_string();
    assert!(detail.contains("resume neither side until that server answers"), "{detail}");
    cluster.storages[0].silent.store(false, Ordering::SeqCst);
    assert_eq!(coordinator.over(&handoff).await["outcome"], "source");
    assert_eq!(cluster.owner(), "host-a/web");
}
