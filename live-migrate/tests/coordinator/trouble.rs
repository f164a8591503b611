//! Trouble and bad input: a stable type, who owns the VM, nothing half-armed.

use std::sync::atomic::Ordering;

use baton_live_migrate::client::Method;
use baton_protocol::access::{Input, Phase};
use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Try};
use baton_protocol::{SessionId, VolumeId};
use serde_json::{Value, json};

use super::support::{Cluster, id, kind, wait};

#[tokio::test]
async fn each_mistake_has_its_type_and_starts_nothing() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let versions = || cluster.storages.iter().map(|s| s.record(&s.names()[0]).version);
    let before: Vec<u64> = versions().collect();
    let web = |id: &str| format!("/v1/vms/web/handoffs/{id}");
    let ab = json!({"from": "host-a", "to": "host-b"});
    let put = Method::PUT;
    for (method, path, body, expected) in [
        (
            &put,
            "/v1/vms/nobody/handoffs/01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned(),
            ab.clone(),
            "baton:unknown-vm",
        ),
        (&put, web(&id()), json!({"from": "host-a", "to": "host-x"}), "baton:unknown-host"),
        (&put, web(&id()), json!({"from": "host-x", "to": "host-b"}), "baton:unknown-host"),
        (&put, web(&id()), json!({"from": "host-b", "to": "host-a"}), "baton:unknown-vm"),
        (&put, web(&id()), json!({"from": "host-a", "to": "host-a"}), "baton:destination-runs-vm"),
        (&put, web(&id()), json!({"to": "host-b", "volumes": ["nothing"]}), "baton:unknown-volume"),
        (&put, web(&id()), json!({"to": "host-b", "volumes": ["root"]}), "baton:bad-request"),
        (&put, web(&id()), json!({"to": "host-b", "colour": "red"}), "baton:bad-request"),
        (&put, web(&id()), json!({"to": "host-b", "ready_timeout": "soon"}), "baton:bad-request"),
        (&put, web("not-a-ulid"), ab.clone(), "baton:bad-request"),
        (&Method::GET, web(&id()), Value::Null, "baton:stale-attempt"),
        (&Method::GET, format!("{}?wait=TEATIME", web(&id())), Value::Null, "baton:bad-request"),
        (&Method::POST, format!("{}:explode", web(&id())), Value::Null, "baton:no-such-route"),
        (&Method::POST, format!("{}:cancel", web(&id())), Value::Null, "baton:stale-attempt"),
        (&Method::GET, "/v1/vms/nobody/access".to_owned(), Value::Null, "baton:unknown-vm"),
        (&Method::GET, "/v1/handoffs?state=ODD".to_owned(), Value::Null, "baton:bad-request"),
        (
            &Method::POST,
            "/v1/vms/web:fence".to_owned(),
            json!({"dead_host": "host-a", "reason": " "}),
            "baton:bad-request",
        ),
        (
            &Method::POST,
            "/v1/vms/web:fence".to_owned(),
            json!({"dead_host": "host-a", "reason": "r"}),
            "baton:host-alive",
        ),
        (
            &Method::POST,
            "/v1/vms/web:fence".to_owned(),
            json!({"dead_host": "host-x", "reason": "r"}),
            "baton:unknown-host",
        ),
        (
            &Method::POST,
            "/v1/vms/web:fence".to_owned(),
            json!({"dead_host": "host-b", "reason": "r", "nominee": "host-x"}),
            "baton:unknown-host",
        ),
        (
            &Method::POST,
            "/v1/vms/web/migrations".to_owned(),
            json!({"id": id(), "to": "host-x"}),
            "baton:unknown-host",
        ),
        (&Method::GET, "/nowhere".to_owned(), Value::Null, "baton:no-such-route"),
        (&Method::DELETE, "/v1/vms".to_owned(), Value::Null, "baton:method"),
    ] {
        let (problem, detail) = kind(coordinator.call(method.clone(), &path, body).await);
        assert_eq!(problem, expected, "{path}: {detail}");
        let known = ["baton:unknown-host", "baton:unknown-volume", "baton:host-alive"];
        if known.contains(&expected) {
            assert!(detail.contains("host-a") && detail.contains(" owns "), "{path}: {detail}");
        }
    }
    // Already there, and running.
    cluster.b.with("web", |machine| {
        machine.backend = Some("owner");
        machine.run = "running";
    });
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:destination-runs-vm");
    assert!(detail.contains("host-a owns"), "{detail}");
    assert_eq!(cluster.b.machine("web").backend, Some("owner"), "it was left alone");
    assert_eq!(versions().collect::<Vec<_>>(), before, "nothing was armed");
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
    assert_eq!(cluster.owner(), "host-a/web");
}

#[tokio::test]
async fn who_cannot_be_reached_is_named() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.a.silent.store(true, Ordering::SeqCst);
    let (problem, detail) = match coordinator.prepare(&id()).await {
        Err(baton_live_migrate::client::CallError::Refused { status, kind, detail, .. }) => {
            assert_eq!(status, 503);
            (kind, detail)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(problem, "baton:agent-unreachable");
    assert!(detail.contains("host-a"), "{detail}");
    cluster.a.silent.store(false, Ordering::SeqCst);
    cluster.storages[1].silent.store(true, Ordering::SeqCst);
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:storage-unreachable");
    assert!(detail.contains(&cluster.storages[1].address.to_string()), "{detail}");
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
}

/// A volume of somebody else's, or of nobody.
#[tokio::test]
async fn a_source_that_does_not_own_everything_hands_nothing_off() {
    for (other, whose) in [
        (Some("host-c/web"), "no host owns all volumes of `web`"),
        (None, "`host-a/web` owns the volume before it"),
    ] {
        let cluster = Cluster::with(&[&[("root", Some("host-a/web")), ("data", other)]]).await;
        let coordinator = cluster.coordinator("c", "").await;
        let version = cluster.storages[0].record("root").version;
        let (problem, detail) = kind(coordinator.prepare(&id()).await);
        assert_eq!(problem, "baton:not-owner");
        for part in ["`data`", whose, "nothing was armed"] {
            assert!(detail.contains(part), "{part}: {detail}");
        }
        assert_eq!(cluster.storages[0].record("root").version, version);
    }
}

/// Refused before anything is armed, with the owner that the volumes name, whoever is
/// asked to give them away.
#[tokio::test]
async fn who_asks_the_wrong_host_or_for_a_lost_volume_is_told_who_owns_the_vm() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let version = cluster.storages[0].record("root").version;
    let definition = cluster.a.machine("web").definition;
    cluster.b.with("web", |machine| {
        machine.definition = definition;
        machine.run = "gone";
    });
    let path = format!("/v1/vms/web/handoffs/{}", id());
    let body = json!({"from": "host-b", "to": "host-a"});
    let (problem, detail) = kind(coordinator.call(Method::PUT, &path, body).await);
    assert_eq!(problem, "baton:not-owner");
    assert!(detail.contains("`host-a/web` owns the volumes of `web`"), "{detail}");
    let lost = format!("baton://{}/lost", cluster.storages[0].address);
    cluster.a.with("web", |machine| machine.definition["disk"][1]["volume"] = lost.into());
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:unknown-volume");
    for part in ["`data`", "host-a says that it owns the volumes of `web`", "nothing was armed"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
    assert_eq!(cluster.storages[0].record("root").version, version);
}

/// Row 29 of the failure table.
#[tokio::test]
async fn row_29_a_volume_that_cannot_be_armed_takes_all_back() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    // Somebody armed it behind this coordinator's back.
    let record = cluster.storages[1].record("data");
    let (data, next_epoch) = (record.volume, record.next_epoch);
    let plan = Plan {
        attempt: Try { id: HandoffId(99), attempt: 1 },
        vm: "web".to_owned(),
        from: "host-a/web".to_owned(),
        to: "host-z/web".to_owned(),
        anchor: data,
        members: Members::of([VolumeId(data.0)]),
        mode: Mode::Fast,
        key: Key([1; 32]),
    };
    let arm = Input::Arm { plan: &plan, term: 1, next_epoch, generation: 0 };
    cluster.storages[1].step("data", arm).expect("armed");
    let id = id();
    let row = coordinator.prepare(&id).await.expect("asked");
    assert_ne!(row["state"], "READY");
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")));
    assert_eq!(row["because"]["type"], "baton:handoff-in-progress");
    assert!(cluster.storages[0].record("root").handoff.is_none());
    assert_eq!(cluster.b.machine("web").backend, None, "nothing was started");
}

/// F20: a storage server without room for the record takes the others back at once, and a
/// decision that cannot be recorded is asked for until it is.
#[tokio::test]
async fn f20_a_storage_server_that_is_full_is_said_to_be_and_waited_for() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.storages[1].full.store(true, Ordering::SeqCst);
    let refused = id();
    coordinator.prepare(&refused).await.expect("asked");
    let row = coordinator.over(&refused).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")));
    assert_eq!(row["because"]["type"], "baton:metadata-full");
    assert!(cluster.storages[0].record("root").handoff.is_none());

    cluster.storages[1].full.store(false, Ordering::SeqCst);
    let id = id();
    assert_eq!(coordinator.prepare(&id).await.expect("READY")["state"], "READY");
    cluster.storages[0].full.store(true, Ordering::SeqCst);
    let path = format!("/v1/vms/web/handoffs/{id}:cancel?timeout=300ms");
    let _ = coordinator.call(Method::POST, &path, Value::Null).await;
    let row = coordinator.get(&format!("/v1/vms/web/handoffs/{id}")).await;
    assert_eq!((&row["over"], &row["decided"]), (&json!(false), &json!(false)), "{row:#}");
    assert_eq!(row["trouble"]["type"], "baton:metadata-full");
    cluster.storages[0].full.store(false, Ordering::SeqCst);
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("SETTLED"), &json!("source")));
}

/// F20: an agent without room to remember a backend is not waited for.
#[tokio::test]
async fn f20_a_destination_that_is_full_is_given_up_at_once() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "ready_timeout_ms = 3600000\n").await;
    cluster.b.full.store(true, Ordering::SeqCst);
    let refused = id();
    coordinator.prepare(&refused).await.expect("asked");
    let row = coordinator.over(&refused).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")));
    assert_eq!(row["because"]["type"], "baton:state-full");
    assert!(row["because"]["detail"].to_string().contains("host-a owns the volumes"), "{row:#}");
    assert!(cluster.storages[0].record("root").handoff.is_none(), "nothing is left armed");
    cluster.b.full.store(false, Ordering::SeqCst);
    assert_eq!(coordinator.prepare(&id()).await.expect("READY")["state"], "READY");
}

/// Row 7 of the failure table: the destination never comes up.
#[tokio::test]
async fn row_07_a_destination_that_does_not_come_up_fails_in_time() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.b.with("web", |machine| {
        machine.definition = json!({"name": "web", "disk": []});
        machine.standing = Some("standby");
        machine.run = "gone";
    });
    let id = id();
    let path = format!("/v1/vms/web/handoffs/{id}?wait=READY&timeout=30s");
    let body = json!({"to": "host-b", "ready_timeout": "300ms"});
    coordinator.call(Method::PUT, &path, body).await.expect("asked");
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")));
    assert_eq!(row["because"]["type"], "baton:not-ready");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// Row 7 of the failure table: the destination's agent is dead, or hangs, before
/// anything is armed.
#[tokio::test]
async fn row_07_a_destination_without_an_agent_is_refused_before_anything_is_armed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "agent_patience_ms = 300\n").await;
    let version = cluster.storages[0].record("root").version;
    cluster.b.silent.store(true, Ordering::SeqCst);
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:agent-unreachable");
    for part in ["host-b", "tried for 300 ms", "host-a owns the volumes of `web`", "ask again"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
    assert_eq!(cluster.storages[0].record("root").version, version, "nothing was armed");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// Row 7 of the failure table: it dies, or refuses, once the volumes are armed.
#[tokio::test]
async fn row_07_a_destination_that_is_lost_in_prepare_is_given_up_at_once() {
    for refuses in [true, false] {
        let cluster = Cluster::new().await;
        let danger = "agent_patience_ms = 300\nready_timeout_ms = 3600000\n";
        let coordinator = cluster.coordinator("c", danger).await;
        let storage = &cluster.storages[1];
        storage.hang_on("arm");
        let id = id();
        let path = format!("/v1/vms/web/handoffs/{id}");
        let body = json!({"to": "host-b"});
        coordinator.call(Method::PUT, &path, body).await.expect("asked");
        cluster.b.refuses.store(refuses, Ordering::SeqCst);
        cluster.b.silent.store(!refuses, Ordering::SeqCst);
        storage.thaw();
        // Nothing waits for the hour that it may take to get ready.
        let row = coordinator.get(&format!("{path}?wait=ACTIVE&timeout=60s")).await;
        assert_eq!(row["outcome"], "source", "{row:#}");
        let (kind, detail) = (&row["because"]["type"], row["because"]["detail"].to_string());
        assert_eq!(
            kind,
            if refuses { "baton:not-from-outside" } else { "baton:agent-unreachable" }
        );
        for part in ["host-a owns the volumes", "see to host-b and ask again"] {
            assert!(detail.contains(part), "{part}: {detail}");
        }
        cluster.b.silent.store(false, Ordering::SeqCst);
        assert_eq!(coordinator.over(&id).await["state"], "FAILED");
        assert_eq!(cluster.owner(), "host-a/web", "nothing is left armed");
    }
}

/// A server that hangs while it is armed, and arms after all when it thaws.
#[tokio::test]
async fn an_arm_that_arrives_late_leaves_nothing_armed() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    // It answers what the plan needs, and then not its ARM.
    let id = id();
    let path = format!("/v1/vms/web/handoffs/{id}");
    let body = json!({"to": "host-b", "ready_timeout": "500ms"});
    let storage = &cluster.storages[1];
    storage.hang_on("arm");
    coordinator.call(Method::PUT, &path, body).await.expect("asked");
    let row = coordinator.get(&format!("{path}?wait=ACTIVE")).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("RECLAIMED"), &json!("source")));
    assert_eq!(row["over"], false, "the other member may still become armed");
    storage.thaw();
    let row = coordinator.over(&id).await;
    assert_eq!(row["state"], "FAILED");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// Rows 22 and 23 of the failure table: the anchor cannot say who has the volumes.
#[tokio::test]
async fn row_22_a_frozen_anchor_is_not_guessed_at() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    cluster.seal();
    coordinator.get(&format!("/v1/vms/web/handoffs/{id}?wait=SEALED")).await;
    cluster.storages[0].restart();
    wait("the anchor is frozen", async || {
        cluster.storages[0].record("root").phase == Phase::Frozen
    })
    .await;
    let path = format!("/v1/vms/web/handoffs/{id}:cancel?timeout=300ms");
    let (problem, detail) = kind(coordinator.call(Method::POST, &path, Value::Null).await);
    assert_eq!(problem, "baton:unknown-frozen");
    assert!(detail.contains("resume neither side"), "{detail}");
    let row = coordinator.get(&format!("/v1/vms/web/handoffs/{id}")).await;
    assert_eq!(row["outcome"], "unknown");
    // That its backend is dead does not say that it had not activated.
    cluster.b.with("web", |machine| {
        machine.backend = None;
        machine.run = "gone";
    });
    let (problem, _) = kind(coordinator.call(Method::POST, &path, Value::Null).await);
    assert_eq!(problem, "baton:unknown-frozen");
    // A person decides.
    let fence = json!({"dead_host": "host-a", "reason": "row 22", "force": true});
    coordinator.call(Method::POST, "/v1/vms/web:fence", fence).await.expect("fenced");
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("unknown")));
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!((&access["phase"], &access["barred"]), (&json!("free"), &json!("host-a/web")));
}

/// Row 36 of the failure table: the source's host is dead.
#[tokio::test]
async fn row_36_a_fence_takes_all_volumes_and_spares_the_next_owner() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    // Heard of while it lived.
    coordinator.get("/v1/vms").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    cluster.a.silent.store(true, Ordering::SeqCst);
    let fence = json!({"dead_host": "host-a", "reason": "row 36", "nominee": "host-b"});
    let path = "/v1/vms/web:fence";
    cluster.storages[1].silent.store(true, Ordering::SeqCst);
    let (problem, detail) = kind(coordinator.call(Method::POST, path, fence.clone()).await);
    assert_eq!(problem, "baton:fence-incomplete");
    assert!(detail.contains("do not start `web` elsewhere"), "{detail}");
    cluster.storages[1].silent.store(false, Ordering::SeqCst);
    let done = coordinator.call(Method::POST, path, fence.clone()).await.expect("fenced");
    assert_eq!(done["done"], true);
    for (storage, name) in [(0, "root"), (1, "data")] {
        let record = cluster.storages[storage].record(name);
        assert_eq!(record.barred.as_deref(), Some("host-a/web"));
        assert_eq!(record.owner.expect("nominated").name, "host-b/web");
    }
    let row = coordinator.over(&handoff).await;
    assert_eq!(
        (&row["state"], &row["trouble"]["type"]),
        (&json!("FAILED"), &json!("baton:fenced"))
    );
    // Asked again, it does not take the volumes from who has them now.
    let epoch = cluster.storages[0].record("root").epoch;
    let again = coordinator.call(Method::POST, path, fence).await.expect("again");
    assert_eq!(cluster.storages[0].record("root").epoch, epoch);
    assert_eq!(
        (&again["volumes"][0]["taken"], &again["volumes"][0]["belongs_to"]),
        (&json!(false), &json!("host-b/web"))
    );
}

/// A handoff that is over tells who owns the volumes until a fence takes them.
#[tokio::test]
async fn after_a_fence_the_last_handoff_names_no_owner() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    coordinator.post(&handoff, "cancel").await.expect("cancelled");
    assert_eq!(coordinator.over(&handoff).await["outcome"], "source");
    let path = "/v1/vms/web:fence";
    // Of a host that has nothing of it: that changes nothing, and says whose they are.
    let fence = json!({"dead_host": "host-b", "reason": "the wrong one"});
    let done = coordinator.call(Method::POST, path, fence).await.expect("fenced");
    assert_eq!(done["volumes"][0]["belongs_to"], "host-a/web");
    assert_eq!(coordinator.over(&handoff).await["outcome"], "source");
    let fence =
        json!({"dead_host": "host-a", "reason": "a test", "force": true, "nominee": "host-b"});
    coordinator.call(Method::POST, path, fence).await.expect("fenced");
    let row = coordinator.over(&handoff).await;
    let owner = row["owner"].as_str().expect("a sentence");
    assert_eq!((&row["outcome"], &row["state"]), (&json!("unknown"), &json!("SETTLED")));
    assert!(owner.contains("were fenced") && owner.contains("why web"), "{owner}");
}

/// Nothing is armed for a machine that nobody here can move.
#[tokio::test]
async fn a_machine_that_somebody_else_drives_is_not_migrated() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.a.with("web", |machine| machine.definition["vmm"] = json!("none"));
    let body = json!({"id": id(), "to": "host-b"});
    let asked = coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await;
    let (problem, detail) = kind(asked);
    assert_eq!(problem, "baton:vmm-unsupported");
    assert!(detail.contains("host-a owns") && detail.contains("nothing was armed"), "{detail}");
    assert_eq!(coordinator.get("/v1/handoffs").await["handoffs"], json!([]));
    assert_eq!(cluster.storages[0].record("root").epoch.0, 1);
}

/// Row 29 of the failure table: a volume that decides and refuses has left no trace at the others, not even for a moment.
#[tokio::test]
async fn row_29_nothing_was_armed_when_the_anchor_refuses() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let before = cluster.storages[1].record("data");
    let (anchor, id) = (&cluster.storages[0], id());
    anchor.hang_on("arm");
    let (prepared, ()) = tokio::join!(coordinator.prepare(&id), async {
        wait("the anchor is being armed", async || anchor.hung.load(Ordering::SeqCst) > 0).await;
        // An epoch since the handoff was planned: refused as a stale plan.
        let claim = Input::Claim { name: "host-a/web", session: SessionId(77) };
        anchor.step("root", claim).expect("the next process");
        anchor.thaw();
    });
    prepared.expect("asked");
    let row = coordinator.over(&id).await;
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")), "{row:#}");
    assert_eq!(row["because"]["type"], "baton:stale-plan", "{row:#}");
    assert_eq!(cluster.storages[1].record("data"), before);
}
