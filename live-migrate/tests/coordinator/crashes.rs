//! The coordinator dies, is doubled, or has no room for its journal.

use std::process::Command;

use baton_live_migrate::client::Method;
use serde_json::json;

use super::support::{Cluster, id, kind};

/// What the caller wants in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wish {
    Move,
    Cancel,
}

/// Rows 1 to 4 of the failure table: killed at every write of its journal,
/// before and after, it ends what it began.
#[tokio::test]
async fn row_01_to_04_a_coordinator_killed_at_any_write_ends_what_it_began() {
    for wish in [Wish::Move, Wish::Cancel] {
        let mut write = 1;
        loop {
            let mut lived = false;
            for when in ["before", "after"] {
                lived = killed_at(wish, write, when).await;
            }
            if lived {
                break;
            }
            write += 1;
            assert!(write < 60, "it never gets through");
        }
        assert!(write > 5, "only {write} writes were tried");
    }
}

/// Whether it lived through it all.
async fn killed_at(wish: Wish, write: u64, when: &str) -> bool {
    let cluster = Cluster::new().await;
    let danger = format!("[danger_zone]\nenabled = true\ndie_{when}_write = {write}\n");
    let id = id();
    let mut first = cluster.coordinator("c", &danger).await;
    // Each call may be the one it dies in.
    let asked = first.prepare(&id).await.is_ok();
    if asked && wish == Wish::Move {
        cluster.switch();
    }
    let verb = if wish == Wish::Move { "finish" } else { "cancel" };
    let _ = first.post(&id, verb).await;
    let path = format!("/v1/vms/web/handoffs/{id}?wait=OVER&timeout=1s");
    let lived = first
        .call(Method::GET, &path, serde_json::Value::Null)
        .await
        .is_ok_and(|row| row["over"] == true)
        && first.ended().is_none();
    if !lived {
        first.exit().await;
    }
    drop(first);
    let second = cluster.coordinator("c", "").await;
    if !asked && wish == Wish::Move {
        // The caller asks again: same id, same handoff.
        second.prepare(&id).await.expect("READY");
        cluster.switch();
    }
    let answer = second.post(&id, verb).await;
    let known = second.get("/v1/handoffs").await["handoffs"].as_array().expect("a list").len();
    if known == 0 {
        // It died before it had written anything: nothing was begun.
        assert_eq!(kind(answer).0, "baton:stale-attempt");
        assert_eq!(cluster.owner(), "host-a/web");
        return lived;
    }
    let row = second.over(&id).await;
    let (owner, outcome) = match wish {
        Wish::Move => ("host-b/web", "destination"),
        Wish::Cancel => ("host-a/web", "source"),
    };
    assert_eq!(row["outcome"], outcome, "{wish:?} {when} {write}: {row:#}");
    assert_eq!(cluster.owner(), owner, "{wish:?} {when} {write}");
    lived
}

/// Row 5 of the failure table.
#[tokio::test]
async fn row_05_the_older_of_two_coordinators_steps_down() {
    let cluster = Cluster::new().await;
    let mut old = cluster.coordinator("old", "").await;
    let first = id();
    old.prepare(&first).await.expect("READY");
    // With a journal of its own: it learns the term from the servers.
    let new = cluster.coordinator("new", "").await;
    // It knows nothing of the handoff, and takes it for another's.
    new.prepare(&first).await.expect("asked");
    let row = new.over(&first).await;
    assert_eq!(
        (&row["state"], &row["because"]["type"]),
        (&json!("FAILED"), &json!("baton:handoff-in-progress"))
    );
    assert!(cluster.storages[0].record("root").handoff.is_some(), "it is the old one's still");
    let _ = new
        .call(
            Method::POST,
            "/v1/vms/web:fence",
            json!({"dead_host": "host-a", "reason": "row 5", "force": true}),
        )
        .await
        .expect("fenced");
    let _ = old.post(&first, "cancel").await;
    assert_eq!(old.exit().await.code(), Some(5), "{}", old.log());
    assert!(old.log().contains("a newer coordinator has taken over"), "{}", old.log());
}

#[tokio::test]
async fn a_journal_in_use_is_refused_and_named() {
    let cluster = Cluster::new().await;
    let _first = cluster.coordinator("c", "").await;
    let config = cluster.dir.path().join("c.toml");
    let other = cluster.dir.path().join("d.toml");
    let text = std::fs::read_to_string(&config).expect("read").replacen("c.sock", "d.sock", 1);
    std::fs::write(&other, text).expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_baton-coordinator"))
        .arg("--config")
        .arg(&other)
        .output()
        .expect("it runs");
    let text = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("in use by another coordinator"), "{text}");
}

/// Fault F20: no room for the journal.
#[tokio::test]
async fn a_full_journal_starts_nothing_and_recovers() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.without_limit_signal("c").await;
    let limit = |bytes: &str| {
        let status = Command::new("prlimit")
            .args(["--pid", &coordinator.pid().to_string(), &format!("--fsize={bytes}")])
            .status()
            .expect("prlimit runs");
        assert!(status.success());
    };
    limit("0:unlimited");
    let (problem, detail) = kind(coordinator.prepare(&id()).await);
    assert_eq!(problem, "baton:journal-full");
    for part in ["nothing was started", "the source host-a owns the volumes of `web`"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert!(cluster.storages[0].record("root").handoff.is_none());
    limit("unlimited:unlimited");
    let id = id();
    assert_eq!(coordinator.prepare(&id).await.expect("READY")["state"], "READY");
    // Full again in the middle of it: a cancel is refused, and nothing is lost.
    limit("0:unlimited");
    let (problem, detail) = kind(coordinator.post(&id, "cancel").await);
    assert_eq!(problem, "baton:journal-full");
    assert!(detail.contains("the source host-a owns the volumes of `web`"), "{detail}");
    limit("unlimited:unlimited");
    assert_eq!(coordinator.post(&id, "cancel").await.expect("cancelled")["outcome"], "source");
    assert_eq!(cluster.owner(), "host-a/web");
}
