//! Monitors are driven, and never past a drain that nobody vouches for.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::qemu::skip_without_qemu;
use crate::support::{Agent, WEB, freeze, pid_of, refused, signal, wait};

/// A machine without a guest, stopped, that waits for a migration.
const QEMU: &str = r#"["qemu-system-x86_64", "-name", "{vm}", "-accel", "tcg", "-machine", "q35", "-m", "64M", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "unix:{qmp},server=on,wait=off", "-incoming", "defer"]"#;

#[tokio::test]
async fn continue_is_refused_until_every_disk_is_drained() {
    if skip_without_qemu("continue_is_refused_until_every_disk_is_drained") {
        return;
    }
    let pair = format!("[vmm]\nincoming_command = {QEMU}\n{WEB}");
    // The watchdog must not end the backend that is frozen here, however long a busy machine takes.
    let mut source = Agent::with(
        "exec_pretended \"$@\"",
        "hang_ms = 600000",
        &pair.replace(", \"-incoming\", \"defer\"", ""),
    );
    let mut destination = Agent::with("exec_pretended \"$@\"", "", &pair);
    source.run().await;
    destination.run().await;
    let uri = format!("unix:{}", destination.path("migration").display());

    // The source's monitor is started by the same means; it listens for nothing.
    let refusal = refused(source.post("/v1/vms/web/vmm/incoming", json!({"uri": uri})).await);
    assert_eq!(refusal.1, "baton:vmm-refused", "a machine that is not incoming: {}", refusal.2);
    source.post("/v1/vms/web/vmm/resume", json!({})).await.expect("runs");
    let pid = pid_of(&source.start_backend("owner").await);

    let listens = destination.post("/v1/vms/web/vmm/incoming", json!({"uri": uri})).await;
    assert_eq!(listens.expect("listens")["run"], "incoming");
    source.post("/v1/vms/web/vmm/migrate", json!({"uri": uri})).await.expect("started");
    let paused = source.get("/v1/vms/web/vmm?wait_ms=60000").await.expect("status");
    assert_eq!(paused["migration"]["phase"], "pre-switchover", "{paused}");

    // Not drained; hung; dead: each time the monitor is not told.
    let drained = source.path("run/web/control.drained");
    let (status, kind, detail) = refused(source.post("/v1/vms/web/vmm/continue", json!({})).await);
    assert_eq!((status, kind.as_str()), (409, "baton:not-drained"));
    assert!(detail.contains("root, data"), "{detail}");
    std::fs::write(&drained, "").expect("write");
    freeze(pid).await;
    let (_, kind, detail) = refused(source.post("/v1/vms/web/vmm/continue", json!({})).await);
    assert_eq!(kind, "baton:not-drained", "{detail}");
    signal(pid, Signal::SIGCONT);
    source.delete("/v1/vms/web/backend").await.expect("stopped");
    let (_, kind, detail) = refused(source.post("/v1/vms/web/vmm/continue", json!({})).await);
    assert_eq!(kind, "baton:not-drained", "{detail}");
    let status = source.get("/v1/vms/web/vmm").await.expect("status");
    assert_eq!(status["migration"]["phase"], "pre-switchover", "the monitor was not told");

    source.start_backend("owner").await;
    source.post("/v1/vms/web/vmm/continue", json!({})).await.expect("goes on");
    wait("the source is done", async || {
        source.get("/v1/vms/web/vmm").await.expect("status")["run"] == "migrated"
    })
    .await;
    destination.post("/v1/vms/web/vmm/resume", json!({})).await.expect("runs there");
    let view = destination.get("/v1/vms/web").await.expect("a view");
    assert_eq!(view["vmm"]["run"], "running");
    for agent in [&source, &destination] {
        agent.post("/v1/vms/web/vmm/quit", json!({})).await.expect("ended");
    }
}

/// Row 37 of the failure table: a guest whose volumes another host has goes on with
/// its network until somebody stops it. One that only waits is left alone.
#[tokio::test]
async fn row_37_a_machine_that_lost_its_volumes_is_stopped_and_one_that_waits_is_not() {
    if skip_without_qemu(
        "row_37_a_machine_that_lost_its_volumes_is_stopped_and_one_that_waits_is_not",
    ) {
        return;
    }
    let command = format!("[vmm]\nincoming_command = {QEMU}\n{WEB}");
    let command = command.replace(", \"-incoming\", \"defer\"", "");
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 1000", &command);
    agent.run().await;
    // Starts it; it listens for nothing.
    let _ = agent.post("/v1/vms/web/vmm/incoming", json!({"uri": "unix:/x"})).await;
    agent.post("/v1/vms/web/vmm/resume", json!({})).await.expect("runs");
    agent.start_backend("owner").await;
    let handoff = agent.path("run/web/control.handoff");
    let asked = || std::fs::read(agent.path("run/web/control.asked")).map_or(0, |text| text.len());
    for standing in ["reclaiming", "activating", "sealed"] {
        let waits = json!({"standing": standing, "parked": null});
        std::fs::write(&handoff, waits.to_string()).expect("written");
        let before = asked();
        wait("the agent has heard it", async || asked() >= before + 3).await;
        let view = agent.get("/v1/vms/web").await.expect("a view");
        assert_eq!(view["vmm"]["run"], "running", "{standing}");
    }
    let events = agent.get("/v1/events").await.expect("events");
    assert_eq!(events["events"], json!([]));
    let lost = json!({"standing": "parked", "parked": "lost", "id": "ID", "attempt": 1});
    std::fs::write(&handoff, lost.to_string()).expect("written");
    let boot = events["boot"].as_str().expect("a boot");
    let path = format!("/v1/events?boot={boot}&since=0&wait_ms=60000");
    let events = agent.get(&path).await.expect("events");
    let event = &events["events"][0];
    assert_eq!((&event["kind"], &event["vm"]), (&json!("baton.vm.stopped"), &json!("web")));
    assert_eq!(event["data"]["parked"], "lost");
    assert!(event["detail"].as_str().expect("text").contains("do not resume it"), "{event}");
    let view = agent.get("/v1/vms/web").await.expect("a view");
    assert_eq!(view["vmm"]["run"], "paused");
    // Resumed by mistake while nothing is known of that, it is stopped again.
    std::fs::remove_file(&handoff).expect("removed");
    let resumed = agent.post("/v1/vms/web/vmm/resume", json!({})).await.expect("runs");
    assert_eq!((&resumed["run"], &resumed["standing"]), (&json!("running"), &json!(null)));
    std::fs::write(&handoff, lost.to_string()).expect("written");
    wait("it is stopped again", async || {
        agent.get("/v1/vms/web").await.expect("a view")["vmm"]["run"] == "paused"
    })
    .await;
    agent.post("/v1/vms/web/vmm/quit", json!({})).await.expect("ended");
}

/// Row 37 of the failure table: nobody is told that a VM runs which has lost its volumes.
#[tokio::test]
async fn row_37_a_machine_that_lost_its_volumes_is_not_said_to_run() {
    if skip_without_qemu("row_37_a_machine_that_lost_its_volumes_is_not_said_to_run") {
        return;
    }
    let command = format!("[vmm]\nincoming_command = {QEMU}\n{WEB}");
    let command = command.replace(", \"-incoming\", \"defer\"", "");
    // A watchdog that looks once a minute: the answer is the request's own.
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 600000", &command);
    agent.run().await;
    let _ = agent.post("/v1/vms/web/vmm/incoming", json!({"uri": "unix:/x"})).await;
    agent.start_backend("owner").await;
    let handoff = agent.path("run/web/control.handoff");
    let says = |standing: &str, parked: Option<&str>| {
        let words = json!({"standing": standing, "parked": parked, "side": "source", "id": "THIS"});
        std::fs::write(handoff.with_extension("new"), words.to_string()).expect("written");
        std::fs::rename(handoff.with_extension("new"), &handoff).expect("renamed");
    };
    let resume = || agent.post("/v1/vms/web/vmm/resume", json!({}));
    let run = async || agent.get("/v1/vms/web/vmm").await.expect("status")["run"].clone();
    let refusal_says = |refusal: (u16, String, String), done: &str| {
        let (status, kind, detail) = refusal;
        assert_eq!((status, kind.as_str()), (409, "baton:parked"), "{detail}");
        for part in [
            "`web` must not run on host-a",
            done,
            "handoff THIS: the destination won, and owns the volumes",
            "end it",
        ] {
            assert!(detail.contains(part), "{part}: {detail}");
        }
    };
    // Known before: the monitor is not told.
    says("parked", Some("lost"));
    refusal_says(refused(resume().await), "was not resumed");
    assert_eq!(run().await, "paused");
    // Known only once the rings run: it is not said to run, and stopped again.
    says("reclaiming", None);
    let (answer, ()) = tokio::join!(resume(), async {
        wait("its CPUs run", async || run().await == "running").await;
        says("parked", Some("lost"));
    });
    refusal_says(refused(answer), "was stopped again");
    assert_eq!(run().await, "paused");
    // Nobody can say yet: that is said.
    says("reclaiming", None);
    let answer = resume().await.expect("runs");
    assert_eq!((&answer["run"], &answer["standing"]), (&json!("running"), &json!("reclaiming")));
    says("serving", None);
    let answer = resume().await.expect("runs");
    assert_eq!((&answer["run"], &answer["standing"]), (&json!("running"), &json!("serving")));
    agent.post("/v1/vms/web/vmm/quit", json!({})).await.expect("ended");
}

#[tokio::test]
async fn row_37_a_machine_that_cannot_be_stopped_is_told_of_once() {
    let mut agent = Agent::with(
        "exec_pretended \"$@\"",
        "hang_ms = 1000",
        &WEB.replace("\"qemu\"", "\"none\""),
    );
    agent.run().await;
    agent.start_backend("owner").await;
    let lost = json!({"standing": "parked", "parked": "over"});
    std::fs::write(agent.path("run/web/control.handoff"), lost.to_string()).expect("written");
    let events = agent.get("/v1/events?wait_ms=60000").await.expect("events");
    assert_eq!(events["events"][0]["kind"], "baton.vm.not-stopped");
    let asked = || std::fs::read(agent.path("run/web/control.asked")).map_or(0, |text| text.len());
    let before = asked();
    wait("it is heard again", async || asked() >= before + 3).await;
    assert_eq!(agent.get("/v1/events").await.expect("events")["latest"], 1);
}

#[tokio::test]
async fn a_monitor_that_does_not_start_leaves_nothing() {
    let command =
        "[vmm]\nincoming_command = [\"/bin/sh\", \"-c\", \"echo {vm} says no; exit 3\"]\n";
    let mut agent = Agent::with("exec_pretended \"$@\"", "", &format!("{command}{WEB}"));
    agent.run().await;
    let result = agent.post("/v1/vms/web/vmm/incoming", json!({"uri": "unix:/x"})).await;
    let (status, _, detail) = refused(result);
    assert_eq!(status, 409);
    assert!(detail.contains("vmm.log"), "{detail}");
    let log = std::fs::read_to_string(agent.path("state/web.vmm.log")).expect("log");
    assert_eq!(log, "web says no\n");
    let hanging = "start_limit_ms = 200\n";
    let command = "[vmm]\nincoming_command = [\"/bin/sleep\", \"1000\"]\n";
    let mut agent = Agent::with("exec_pretended \"$@\"", hanging, &format!("{command}{WEB}"));
    agent.run().await;
    let result = agent.post("/v1/vms/web/vmm/incoming", json!({"uri": "unix:/x"})).await;
    assert_eq!(refused(result).1, "baton:vmm-absent");
}

#[tokio::test]
async fn a_monitor_of_somebody_else_is_left_alone() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "", &WEB.replace("\"qemu\"", "\"none\""));
    agent.run().await;
    for action in ["continue", "cancel", "resume", "stop", "quit"] {
        let path = format!("/v1/vms/web/vmm/{action}");
        assert_eq!(refused(agent.post(&path, json!({})).await).1, "baton:vmm-foreign");
    }
    let view = agent.get("/v1/vms/web").await.expect("a view");
    assert!(view["vmm"].is_null() && view["vmm_error"].is_null(), "{view}");
}
