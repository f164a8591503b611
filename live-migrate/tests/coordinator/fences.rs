//! A FENCE in the middle of a handoff: one call of the operator is enough, all volumes
//! have one owner afterwards, and whoever has won meanwhile keeps them.

use std::sync::atomic::Ordering;

use baton_live_migrate::client::{CallError, Method};
use baton_protocol::SessionId;
use baton_protocol::access::{Input, Phase};
use serde_json::{Value, json};

use super::support::{Cluster, Coordinator, id, kind, wait};

async fn fence(coordinator: &Coordinator, dead: &str, nominee: &str) -> Result<Value, CallError> {
    let body = json!({"dead_host": dead, "reason": "a test", "nominee": nominee, "force": true});
    coordinator.call(Method::POST, "/v1/vms/web:fence", body).await
}

/// Fences, and does something after the record was read and before the FENCE is there.
async fn fence_while(
    cluster: &Cluster,
    coordinator: &Coordinator,
    (dead, nominee): (&str, &str),
    meanwhile: impl FnOnce(),
) -> Result<Value, CallError> {
    let anchor = &cluster.storages[0];
    anchor.hang_on("fence");
    let before = anchor.hung.load(Ordering::SeqCst);
    let (done, ()) = tokio::join!(fence(coordinator, dead, nominee), async {
        wait("a fence is on its way", async || anchor.hung.load(Ordering::SeqCst) > before).await;
        meanwhile();
        anchor.thaw();
    });
    done
}

/// The dead host's supervisor starts another backend, which claims: its next epoch.
#[tokio::test]
async fn row_36_a_fence_that_a_claim_overtakes_is_said_again() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    coordinator.prepare(&id()).await.expect("READY");
    let done = fence_while(&cluster, &coordinator, ("host-a", "host-b"), || {
        let claim = Input::Claim { name: "host-a/web", session: SessionId(77) };
        cluster.storages[0].step("root", claim).expect("the next process");
    })
    .await
    .expect("fenced with one call");
    assert_eq!(done["volumes"][0]["taken"], true, "{done:#}");
    assert_eq!(cluster.owner(), "host-b/web");
    assert_eq!(cluster.storages[0].record("root").barred.as_deref(), Some("host-a/web"));
}

/// The destination wins before the FENCE is there: it keeps all volumes, not one of them.
#[tokio::test]
async fn row_36_a_fence_that_the_destination_overtakes_takes_nothing_from_it() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    cluster.seal();
    let done = fence_while(&cluster, &coordinator, ("host-a", "host-a"), || {
        assert!(cluster.b.activate("web", &cluster.b.machine("web").definition), "activated");
    })
    .await
    .expect("nothing of host-a can reach them");
    for volume in done["volumes"].as_array().expect("volumes") {
        assert_eq!(
            (&volume["taken"], &volume["belongs_to"]),
            (&json!(false), &json!("host-b/web")),
            "{done:#}"
        );
    }
    assert_eq!(coordinator.over(&handoff).await["outcome"], "destination");
    assert_eq!(cluster.owner(), "host-b/web");
}

/// The dead host is the destination, and nothing is decided: it shall not win later.
#[tokio::test]
async fn row_36_a_fence_of_the_destination_takes_the_handoff_back() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    cluster.seal();
    coordinator.get(&format!("/v1/vms/web/handoffs/{handoff}?wait=SEALED&timeout=30s")).await;
    cluster.b.silent.store(true, Ordering::SeqCst);
    let done = fence(&coordinator, "host-b", "host-a").await.expect("fenced");
    assert!(!cluster.b.activate("web", &cluster.b.machine("web").definition), "{done:#}");
    assert_eq!(done["volumes"][1]["belongs_to"], "host-a/web", "{done:#}");
    assert_eq!(cluster.owner(), "host-a/web");
    cluster.b.silent.store(false, Ordering::SeqCst);
    assert_eq!(coordinator.over(&handoff).await["outcome"], "source");
}

/// It has won, and a member does not know it yet: the member is not left for it to open.
#[tokio::test]
async fn row_36_a_fence_of_a_winner_takes_also_what_was_not_settled() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    cluster.storages[1].hang_on("settle");
    cluster.switch();
    coordinator.get(&format!("/v1/vms/web/handoffs/{handoff}?wait=ACTIVE&timeout=30s")).await;
    let done = fence(&coordinator, "host-b", "host-a").await.expect("fenced");
    for volume in done["volumes"].as_array().expect("volumes") {
        assert_eq!(volume["taken"], true, "{done:#}");
    }
    // What was on its way to settle it for the dead host arrives.
    cluster.storages[1].thaw();
    let row = coordinator.over(&handoff).await;
    assert_eq!(row["outcome"], "unknown", "{row:#}");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// The source has won, and a member does not know it yet: nothing is taken from it.
#[tokio::test]
async fn row_36_a_fence_of_a_loser_takes_nothing_from_the_winner() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let handoff = id();
    coordinator.prepare(&handoff).await.expect("READY");
    cluster.storages[1].hang_on("settle");
    let cancel = format!("/v1/vms/web/handoffs/{handoff}:cancel?wait=RECLAIMED&timeout=30s");
    coordinator.call(Method::POST, &cancel, Value::Null).await.expect("the source's");
    let epoch = cluster.storages[0].record("root").epoch;
    let done = fence(&coordinator, "host-b", "host-b").await.expect("it has nothing");
    for volume in done["volumes"].as_array().expect("volumes") {
        assert_eq!(
            (&volume["taken"], &volume["belongs_to"]),
            (&json!(false), &json!("host-a/web")),
            "{done:#}"
        );
    }
    assert_eq!(cluster.storages[0].record("root").epoch, epoch);
    cluster.storages[1].thaw();
    assert_eq!(coordinator.over(&handoff).await["outcome"], "source");
    assert_eq!(cluster.owner(), "host-a/web");
}

/// Without the volume that decides, the others are left as they are: they may be the
/// destination's already.
#[tokio::test]
async fn row_36_no_volume_is_fenced_before_the_one_that_decides() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    coordinator.prepare(&id()).await.expect("READY");
    cluster.storages[0].silent.store(true, Ordering::SeqCst);
    let (problem, detail) = kind(fence(&coordinator, "host-a", "host-b").await);
    assert_eq!(problem, "baton:fence-incomplete");
    assert!(detail.contains("`data`: is in a handoff, and waits"), "{detail}");
    assert_eq!(cluster.storages[1].record("data").phase, Phase::Armed);
    cluster.storages[0].silent.store(false, Ordering::SeqCst);
    fence(&coordinator, "host-a", "host-b").await.expect("fenced");
    assert_eq!(cluster.owner(), "host-b/web");
}

/// Gives `web` one more disk.
fn add_disk(cluster: &Cluster, disk: Value) {
    cluster.a.with("web", |machine| {
        machine.definition["disk"].as_array_mut().expect("disks").push(disk);
    });
}

/// A disk in a file of the host goes with the host, and one that nobody writes needs no
/// fence: neither holds up what can be taken.
#[tokio::test]
async fn a_scratch_disk_of_the_host_and_a_read_only_one_hold_up_no_fence() {
    let cluster = Cluster::new().await;
    add_disk(&cluster, json!({"name": "scratch", "volume": "file:///scratch/web.raw"}));
    let cd = json!({"name": "cd", "volume": "nbd://images:10809/cd", "read_only": true});
    add_disk(&cluster, cd);
    let coordinator = cluster.coordinator("c", "").await;
    let done = fence(&coordinator, "host-a", "host-b").await.expect("fenced");
    let volumes = done["volumes"].as_array().expect("volumes");
    let taken = |volume: &Value| (volume["volume"].clone(), volume["taken"].clone());
    let want = [(json!("root"), json!(true)), (json!("data"), json!(true))];
    assert_eq!(volumes.iter().map(taken).collect::<Vec<_>>(), want, "{done:#}");
    assert_eq!(cluster.owner(), "host-b/web");
}

/// Half of a VM taken would look like all of it.
#[tokio::test]
async fn of_a_vm_that_mixes_baton_and_nbd_nothing_is_fenced() {
    let cluster = Cluster::new().await;
    add_disk(&cluster, json!({"name": "logs", "volume": "nbd://nas:10809/web-logs"}));
    let coordinator = cluster.coordinator("c", "").await;
    let before = [("root", 0), ("data", 1)].map(|(name, at)| cluster.storages[at].record(name));
    let (problem, detail) = kind(fence(&coordinator, "host-a", "host-b").await);
    assert_eq!(problem, "baton:no-fence", "{detail}");
    for part in ["disk `logs`", "nbd://nas:10809/web-logs", "took nothing", "baton volume fence"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    let after = [("root", 0), ("data", 1)].map(|(name, at)| cluster.storages[at].record(name));
    assert_eq!(after, before);
}

/// It was said to be fenced, with no volume in the answer.
#[tokio::test]
async fn a_vm_that_is_all_on_files_of_its_host_is_not_said_to_be_fenced() {
    let cluster = Cluster::new().await;
    cluster.a.with("web", |machine| machine.definition["disk"] = json!([]));
    add_disk(&cluster, json!({"name": "root", "volume": "file:///images/web.raw"}));
    let coordinator = cluster.coordinator("c", "").await;
    let (problem, detail) = kind(fence(&coordinator, "host-a", "host-b").await);
    assert_eq!(problem, "baton:no-fence", "{detail}");
    assert!(detail.contains("nothing was taken from host-a"), "{detail}");
}
