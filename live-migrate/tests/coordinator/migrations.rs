//! Migrations that the coordinator drives.

use baton_live_migrate::client::Method;
use serde_json::{Value, json};

use super::support::{Cluster, Coordinator, id, kind};

async fn migrate(coordinator: &Coordinator, id: &str) -> Value {
    let body = json!({"id": id, "to": "host-b"});
    let row = coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await;
    let row = row.expect("accepted");
    assert_eq!(row["migration"]["step"], "prepare");
    coordinator.over(id).await
}

#[tokio::test]
async fn a_vm_moves_and_comes_back() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let first = id();
    let row = migrate(&coordinator, &first).await;
    assert_eq!(
        (&row["migration"]["step"], &row["outcome"]),
        (&json!("done"), &json!("destination"))
    );
    assert_eq!(row["migration"]["report"]["source"]["timings"]["seal_us"], 300);
    assert_eq!(cluster.owner(), "host-b/web");
    assert_eq!(cluster.b.machine("web").run, "running");
    assert_eq!((cluster.a.machine("web").run, cluster.a.machine("web").backend), ("gone", None));
    let steps = row["migration"]["at_unix_us"].as_object().expect("times");
    for step in ["prepare", "incoming", "precopy", "switch", "activate", "cleanup", "done"] {
        assert!(steps.contains_key(step), "{step} in {steps:?}");
    }
    let back = id();
    let body = json!({"id": back, "to": "host-a"});
    coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await.expect("accepted");
    let row = coordinator.over(&back).await;
    assert_eq!(row["outcome"], "destination");
    assert_eq!(cluster.owner(), "host-a/web");
}

#[tokio::test]
async fn a_destination_that_does_not_run_costs_nothing() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "switch_timeout_ms = 300\n").await;
    cluster.b.with("web", |machine| {
        machine.definition = cluster.a.machine("web").definition;
        machine.run = "gone";
        machine.stuck = true;
    });
    let row = migrate(&coordinator, &id()).await;
    assert_eq!(
        (&row["migration"]["step"], &row["outcome"]),
        (&json!("rolled-back"), &json!("source"))
    );
    assert_eq!(row["migration"]["error"]["type"], "baton:migration-failed");
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.a.machine("web").run, "running", "the source was resumed");
    assert_eq!(cluster.b.machine("web").backend, None);
}

/// Row 31 of the failure table: the guest resets in the copy of memory. The migration
/// is begun anew, with another machine and another backend at the destination.
#[tokio::test]
async fn row_31_a_guest_that_resets_moves_with_the_next_attempt() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.a.with("web", |machine| machine.resets = 1);
    let row = migrate(&coordinator, &id()).await;
    assert_eq!((&row["outcome"], &row["attempt"]), (&json!("destination"), &json!(2)), "{row:#}");
    assert_eq!(cluster.owner(), "host-b/web");
    assert_eq!(cluster.b.machine("web").run, "running");
    assert_eq!(cluster.b.machine("web").stood_by, 2);
    assert_eq!(cluster.a.machine("web").run, "gone");
}

#[tokio::test]
async fn row_31_a_guest_that_resets_for_ever_is_rolled_back() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    cluster.a.with("web", |machine| machine.resets = 99);
    let row = migrate(&coordinator, &id()).await;
    assert_eq!((&row["outcome"], &row["attempt"]), (&json!("source"), &json!(3)), "{row:#}");
    assert_eq!(row["migration"]["step"], "rolled-back");
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.a.machine("web").run, "running");
    assert_eq!(cluster.b.machine("web").backend, None);
}

fn with_cloud_hypervisor(cluster: &Cluster) {
    cluster.a.with("web", |machine| machine.definition["vmm"] = "cloud-hypervisor".into());
}

/// A monitor that switches by itself, and whose source is gone when it has.
#[tokio::test]
async fn cloud_hypervisor_is_not_asked_to_pause() {
    let cluster = Cluster::new().await;
    with_cloud_hypervisor(&cluster);
    let coordinator = cluster.coordinator("c", "").await;
    let row = migrate(&coordinator, &id()).await;
    assert_eq!(
        (&row["migration"]["step"], &row["outcome"]),
        (&json!("done"), &json!("destination")),
        "{row:#}"
    );
    assert_eq!(cluster.owner(), "host-b/web");
    assert_eq!(cluster.b.machine("web").run, "running");
}

/// It has no cancel: its source fails, and is resumed, when the destination is gone.
#[tokio::test]
async fn cloud_hypervisors_destination_is_ended_when_it_does_not_run() {
    let cluster = Cluster::new().await;
    with_cloud_hypervisor(&cluster);
    let coordinator = cluster.coordinator("c", "switch_timeout_ms = 300\n").await;
    cluster.b.with("web", |machine| {
        machine.definition = cluster.a.machine("web").definition;
        machine.run = "gone";
        machine.stuck = true;
    });
    let id = id();
    let body = json!({"id": id, "to": "host-b"});
    coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await.expect("accepted");
    coordinator.get(&format!("/v1/vms/web/handoffs/{id}?wait=SEALED&timeout=30s")).await;
    // The copy hangs; a person loses patience.
    let _ = coordinator.post(&id, "cancel").await;
    let row = coordinator.over(&id).await;
    assert_eq!(
        (&row["migration"]["step"], &row["outcome"]),
        (&json!("rolled-back"), &json!("source")),
        "{row:#}"
    );
    assert_eq!(cluster.owner(), "host-a/web");
    assert_eq!(cluster.a.machine("web").run, "running");
    assert_eq!(cluster.b.machine("web").run, "gone");
}

#[tokio::test]
async fn a_migration_that_nobody_can_address_is_refused() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let body = json!({"id": id(), "to": "host-x"});
    let answer = coordinator.call(Method::POST, "/v1/vms/web/migrations", body).await;
    assert_eq!(kind(answer).0, "baton:unknown-host");
}

/// The coordinator dies at any write of a migration: the VM runs on exactly one
/// side, and that side owns the volumes.
#[tokio::test]
async fn killed_at_any_write_of_a_migration_the_vm_runs_on_one_side() {
    let mut write = 2;
    let mut outcomes = std::collections::BTreeSet::new();
    loop {
        let cluster = Cluster::new().await;
        let danger = format!("[danger_zone]\nenabled = true\ndie_after_write = {write}\n");
        let id = id();
        let mut first = cluster.coordinator("c", &danger).await;
        let body = json!({"id": id, "to": "host-b"});
        let _ = first.call(Method::POST, "/v1/vms/web/migrations", body).await;
        let path = format!("/v1/vms/web/handoffs/{id}?wait=OVER&timeout=5s");
        let ended = first.call(Method::GET, &path, Value::Null).await;
        let lived = ended.is_ok_and(|row| row["over"] == true) && first.ended().is_none();
        if lived {
            break;
        }
        first.exit().await;
        drop(first);
        let second = cluster.coordinator("c", "").await;
        let row = second.over(&id).await;
        let (owner, runs, other) = match row["outcome"].as_str() {
            Some("destination") => ("host-b/web", &cluster.b, &cluster.a),
            Some("source") => ("host-a/web", &cluster.a, &cluster.b),
            other => panic!("{write}: {other:?}"),
        };
        assert_eq!(cluster.owner(), owner, "write {write}");
        assert_eq!(runs.machine("web").run, "running", "write {write}: {row:#}");
        assert_ne!(other.machine("web").run, "running", "write {write}: {row:#}");
        outcomes.insert(owner);
        write += 1;
        assert!(write < 80, "it never gets through");
    }
    assert_eq!(outcomes.len(), 2, "both ways were tried: {outcomes:?}");
}
