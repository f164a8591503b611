//! Backends are started, watched, and outlive the agent.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Agent, Machine, WEB, freeze, pid_of, refused, runs, signal, wait};

/// Of a handoff.
const TRY: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/2";

#[tokio::test]
async fn a_backend_is_started_shown_and_stopped() {
    let agent = Agent::start().await;
    assert_eq!(agent.backend().await["run"], "stopped");
    let started = agent.start_backend("standby").await;
    assert_eq!((&started["run"], &started["role"]), (&json!("running"), &json!("standby")));
    let view = agent.get("/v1/vms/web").await.expect("a view");
    assert_eq!(view["status"]["standby"], true);
    assert_eq!(view["status"]["owner"], "host-a/web");
    assert_eq!(view["status"]["disks"][1]["name"], "data");
    // The same again, and another role, leave the process alone.
    for role in ["standby", "owner"] {
        let again = agent.start_backend(role).await;
        assert_eq!((&again["pid"], again["role"].as_str()), (&started["pid"], Some(role)));
    }
    let pid = pid_of(&started);
    // The role counts from the next start on.
    signal(pid, Signal::SIGKILL);
    let pid = agent.wait_successor(pid).await;
    let view = agent.get("/v1/vms/web").await.expect("a view");
    assert_eq!(
        (&view["status"]["standby"], &view["backend"]["restarts"]),
        (&json!(false), &json!(1))
    );
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    assert!(!runs(pid));
    assert_eq!(agent.backend().await["run"], "stopped");
    agent.delete("/v1/vms/web/backend").await.expect("what is stopped stays so");
}

/// A coordinator that was killed, the one in its place, and a person: none of them is in the others' way.
#[tokio::test]
async fn who_asks_at_the_same_moment_gets_the_same_backend() {
    let agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    let ask = async || {
        for _ in 0..50 {
            assert_eq!(pid_of(&agent.start_backend("owner").await), pid);
        }
    };
    tokio::join!(ask(), ask(), ask(), ask(), ask(), ask(), ask(), ask());
}

#[tokio::test]
async fn backends_outlive_the_agent_and_are_found_again() {
    let mut agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("standby").await);
    for end in [Signal::SIGKILL, Signal::SIGTERM] {
        agent.end(end);
        assert!(runs(pid), "{end}");
        agent.run().await;
        wait("taken over", async || agent.backend().await["run"] == "running").await;
        let state = agent.backend().await;
        assert_eq!(
            (pid_of(&state), &state["adopted"], &state["role"]),
            (pid, &json!(true), &json!("standby"))
        );
    }
    // One that died meanwhile is started again, in its role.
    agent.end(Signal::SIGKILL);
    signal(pid, Signal::SIGKILL);
    wait("dead", async || !runs(pid)).await;
    agent.run().await;
    let next = agent.wait_successor(pid).await;
    assert_eq!(agent.get("/v1/vms/web").await.expect("a view")["status"]["standby"], true);
    // And one that was taken over can be stopped.
    agent.end(Signal::SIGKILL);
    agent.run().await;
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    assert!(!runs(next));
    // After which nobody starts it again.
    agent.end(Signal::SIGKILL);
    agent.run().await;
    assert_eq!(agent.backend().await["run"], "stopped");
}

/// Whichever process comes after one, and whichever agent starts it, until one has served: what
/// comes then is the owner's next process, in any handoff.
#[tokio::test]
async fn a_standby_is_told_its_try_until_it_has_served() {
    let mut agent = Agent::start().await;
    let told = async |agent: &Agent| {
        let view = agent.get("/v1/vms/web").await.expect("a view");
        (view["status"]["standby"].clone(), view["status"]["only_for"].clone())
    };
    let mut pid = pid_of(&agent.start_for(TRY).await);
    for is_taken_over in [false, true] {
        if is_taken_over {
            agent.end(Signal::SIGKILL);
        }
        signal(pid, Signal::SIGKILL);
        if is_taken_over {
            agent.run().await;
        }
        pid = agent.wait_successor(pid).await;
        assert_eq!(told(&agent).await, (json!(true), json!(TRY)));
    }
    std::fs::write(agent.path("run/web/control.handoff"), "{\"standing\": \"serving\"}")
        .expect("written");
    let record = agent.path("state/web.backend.json");
    wait("the try is had", async || {
        !std::fs::read_to_string(&record).is_ok_and(|text| text.contains(TRY))
    })
    .await;
    signal(pid, Signal::SIGKILL);
    agent.wait_successor(pid).await;
    assert_eq!(told(&agent).await, (json!(true), Value::Null));
}

#[tokio::test]
async fn a_try_is_for_a_standby_and_is_written_as_one() {
    let agent = Agent::start().await;
    for (role, attempt, part) in
        [("owner", TRY, "leave it out"), ("standby", "2", "ID/ATTEMPT"), ("standby", "", "ULID")]
    {
        let result = agent.put("/v1/vms/web/backend", json!({"role": role, "try": attempt})).await;
        let (status, kind, detail) = refused(result);
        assert_eq!((status, &*kind), (400, "baton:bad-request"));
        assert!(detail.contains(part), "{detail}");
    }
    assert_eq!(agent.backend().await["run"], "stopped");
}

#[tokio::test]
async fn a_recycled_number_is_not_taken_for_a_backend() {
    let mut agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    agent.end(Signal::SIGKILL);
    // As if the number were given to another process: this one, which was born at another time.
    let path = agent.path("state/web.backend.json");
    let mut record: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("record")).expect("JSON");
    record["process"]["pid"] = std::process::id().into();
    std::fs::write(&path, record.to_string()).expect("write");
    signal(pid, Signal::SIGKILL);
    agent.run().await;
    wait("another one", async || agent.backend().await["run"] == "running").await;
    let state = agent.backend().await;
    assert_eq!(state["adopted"], false);
    assert_ne!(state["pid"], std::process::id());
    agent.delete("/v1/vms/web/backend").await.expect("stopped, and this test lives");
}

#[tokio::test]
async fn a_backend_that_hangs_is_killed_and_started_again() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 800\n", WEB);
    agent.run().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    freeze(pid).await;
    agent.wait_successor(pid).await;
    assert!(!runs(pid));
    let state = agent.backend().await;
    assert_eq!((&state["hung"], &state["restarts"]), (&json!(1), &json!(1)));
    assert!(agent.log().contains("hangs"), "{}", agent.log());
}

#[tokio::test]
async fn one_that_hangs_while_its_agent_is_away_is_killed_by_the_next() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 800\n", WEB);
    agent.run().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    agent.end(Signal::SIGKILL);
    freeze(pid).await;
    agent.run().await;
    agent.wait_successor(pid).await;
    assert!(!runs(pid));
    assert_eq!(agent.backend().await["hung"], json!(1));
}

#[tokio::test]
async fn one_that_does_not_end_is_ended() {
    let mut agent =
        Agent::with("trap '' TERM\nexec_pretended \"$@\"", "stop_grace_ms = 100\n", WEB);
    agent.run().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    assert!(!runs(pid));
}

#[tokio::test]
async fn one_that_cannot_start_says_why_and_is_not_tried_again() {
    for (backend, says) in [
        ("echo 'no such volume: root' >&2; exit 1", "no such volume: root"),
        ("echo 'wrong flag' >&2; exit 2", "wrong flag"),
    ] {
        let mut agent = Agent::with(backend, "", WEB);
        agent.run().await;
        let result = agent.put("/v1/vms/web/backend", json!({"role": "owner"})).await;
        let (status, kind, detail) = refused(result);
        assert_eq!((status, kind.as_str()), (409, "baton:backend-failed"));
        assert!(detail.contains(says), "{detail}");
        let state = agent.backend().await;
        assert_eq!((&state["run"], &state["restarts"]), (&json!("failed"), &json!(0)));
        assert!(!agent.path("state/web.backend.json").exists());
    }
    let mut agent = Agent::with("", "", WEB);
    std::fs::remove_file(agent.path("backend")).expect("removed");
    agent.run().await;
    let result = agent.put("/v1/vms/web/backend", json!({"role": "owner"})).await;
    assert!(refused(result).2.contains("cannot start"));
}

/// An agent whose `systemctl` is this script, with `journalctl` beside it; DIR in both is the agent's directory.
fn with_systemctl(systemctl: &str, journalctl: &str) -> Agent {
    use std::os::unix::fs::PermissionsExt;
    let settings = "manager = \"systemd\"\nsystemctl = \"SYSTEMCTL\"\nstop_grace_ms = 3000\n";
    let agent = Agent::with("exec_pretended \"$@\"", settings, WEB);
    let dir = agent.dir.path().display().to_string();
    for (name, script) in [("systemctl", systemctl), ("journalctl", journalctl)] {
        let script = format!("#!/bin/sh\n{}\n", script.replace("DIR", &dir));
        std::fs::write(agent.path(name), script).expect("write");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(agent.path(name), mode).expect("mode");
    }
    let config = std::fs::read_to_string(agent.path("agent.toml")).expect("read");
    let config = config.replace("SYSTEMCTL", &format!("{dir}/systemctl"));
    std::fs::write(agent.path("agent.toml"), config).expect("write");
    agent
}

#[tokio::test]
async fn a_unit_that_does_not_start_is_told_of_with_its_last_words() {
    // It ended before systemd had looked at it, and after.
    for systemctl in [
        "test $1 != start || { echo 'Job for web failed' >&2; exit 1; }",
        "test $1 != show || echo 0",
    ] {
        let journalctl = "case $1 in\n--sync) touch DIR/synced ;;\n*) test -e DIR/synced && echo 'no such volume: root' ;;\nesac";
        let mut agent = with_systemctl(systemctl, journalctl);
        agent.run().await;
        let result = agent.put("/v1/vms/web/backend", json!({"role": "owner"})).await;
        let (status, kind, detail) = refused(result);
        assert_eq!((status, kind.as_str()), (409, "baton:backend-failed"));
        assert!(detail.contains("no such volume: root"), "{detail}");
    }
}

#[tokio::test]
async fn a_unit_of_systemd_is_started_found_and_stopped() {
    // As systemctl would: `start` starts the unit with the arguments of its environment file, whose syntax is not the
    // shell's.
    let systemctl = "echo \"$@\" >> DIR/told\ncase $1 in\nstart) BATON_ARGS=$(sed s/BATON_ARGS=// DIR/run/launch/web.env); DIR/backend $BATON_ARGS >/dev/null 2>&1 & echo $! > DIR/main ;;\nshow) cat DIR/main ;;\nstop) kill $(cat DIR/main) ;;\nkill) kill -9 $(cat DIR/main) ;;\nesac";
    let mut agent = with_systemctl(systemctl, "");
    // Made by systemd, for the unit.
    std::fs::create_dir_all(agent.path("run/web")).expect("directory");

    agent.run().await;
    let pid = pid_of(&agent.start_for(TRY).await);
    assert_eq!(agent.get("/v1/vms/web").await.expect("a view")["status"]["only_for"], TRY);
    agent.end(Signal::SIGKILL);
    agent.run().await;
    wait("taken over", async || agent.backend().await["run"] == "running").await;
    assert_eq!(pid_of(&agent.backend().await), pid);
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    assert!(!runs(pid));
    let told = std::fs::read_to_string(agent.path("told")).expect("told");
    let told: Vec<&str> = told.lines().collect();
    assert_eq!(
        told,
        [
            "start baton-agent-backend@web.service",
            "show --property=MainPID --value baton-agent-backend@web.service",
            "stop baton-agent-backend@web.service",
        ]
    );
}

/// A machine of an earlier try would come to the backend that waits for another. Whoever
/// belongs to the backend that is there is left alone.
#[tokio::test]
async fn row_08_no_backend_waits_while_an_earlier_machine_runs() {
    let mut agent = Agent::start().await;
    let first = pid_of(&agent.start_backend("standby").await);
    let machine = Machine::at_the_disks_of(&agent);
    let pid = machine.pid();
    let at_the_disk = agent.path("run/web/control.front-end");
    let known = agent.path("state/web.front-ends.json");
    wait("it is seen", async || known.exists()).await;

    // The same try: asked for again, and started again when it died.
    assert_eq!(pid_of(&agent.start_backend("standby").await), first);
    std::fs::remove_file(&at_the_disk).expect("removed");
    signal(first, Signal::SIGKILL);
    agent.start_backend("standby").await;
    agent.wait_successor(first).await;
    agent.start_backend("standby").await;

    // The next try, also when another agent is asked for it.
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    for _ in 0..2 {
        let result = agent.put("/v1/vms/web/backend", json!({"role": "standby"})).await;
        let (status, kind, detail) = refused(result);
        assert_eq!((status, kind.as_str()), (409, "baton:earlier-machine"));
        let says = format!("process {pid} (sleep) was at the disks of web before");
        assert!(
            detail.contains(&says) && detail.contains(&format!("end process {pid}")),
            "{detail}"
        );
        assert_eq!(agent.backend().await["run"], "stopped");
        agent.end(Signal::SIGKILL);
        agent.run().await;
    }
    // Who claims is told by the storage.
    agent.start_backend("owner").await;
    agent.delete("/v1/vms/web/backend").await.expect("stopped");

    drop(machine);
    agent.start_backend("standby").await;
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
}

/// It is at the disks in the moment in which the backend is stopped, and was not before.
#[tokio::test]
async fn a_machine_that_has_just_come_is_seen_and_one_that_went_is_not() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 600000\n", WEB);
    agent.run().await;
    agent.start_backend("standby").await;
    let at_the_disk = agent.path("run/web/control.front-end");
    let me = std::process::id();
    std::fs::write(&at_the_disk, me.to_string()).expect("written");
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    let result = agent.put("/v1/vms/web/backend", json!({"role": "standby"})).await;
    assert_eq!(refused(result).1, "baton:earlier-machine");
    // It comes to a backend that is not asked for a machine, and leaves while that runs.
    agent.start_backend("owner").await;
    std::fs::remove_file(&at_the_disk).expect("removed");
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    agent.start_backend("standby").await;
}
