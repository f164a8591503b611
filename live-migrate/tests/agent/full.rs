//! The disk of the agent's state is full (F20 of docs/scenarios.md): it starts nothing that it could not
//! find again, and what runs goes on.

use std::io::Write;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::small_disk::SmallDisk;
use crate::support::{Agent, Machine, WEB, pid_of, refused, runs, signal, wait};

/// Also has the agent's own log.
const DISK_BYTES: u64 = 1 << 20;

/// An agent whose state is on a small disk. `None` where none can be made, which is said.
async fn start() -> Option<Agent> {
    let mut agent = Agent::with("exec_pretended \"$@\" 2>/dev/null >/dev/null", "", WEB);
    let Some(disk) = SmallDisk::mount(&agent.path("state"), DISK_BYTES) else {
        eprintln!("skipped: this machine makes no namespaces");
        return None;
    };
    agent.disk = Some(disk);
    agent.run().await;
    Some(agent)
}

fn disk(agent: &Agent) -> &SmallDisk {
    agent.disk.as_ref().expect("there is one")
}

async fn finds_no_room(agent: &Agent, path: &str, body: Value) {
    let (status, kind, detail) = refused(agent.put(path, body).await);
    assert_eq!((status, kind.as_str()), (507, "baton:state-full"), "{detail}");
    for part in ["is full", "nothing was started", "the VM goes on where it is", "make room"] {
        assert!(detail.contains(part), "{detail}");
    }
}

#[tokio::test]
async fn f20_nothing_is_begun_that_cannot_be_remembered() {
    let Some(agent) = start().await else { return };
    disk(&agent).fill();
    let other = json!({"disks": [{"name": "root", "volume": "baton://s:1/other"}]});
    for _ in 0..2 {
        finds_no_room(&agent, "/v1/vms/other", other.clone()).await;
        assert_eq!(refused(agent.get("/v1/vms/other").await).0, 404, "nor is half of it there");
        for role in ["standby", "owner"] {
            finds_no_room(&agent, "/v1/vms/web/backend", json!({"role": role})).await;
            assert_eq!(agent.backend().await["run"], "stopped");
        }
    }
    assert!(!agent.path("run/web/control.sock").exists(), "no process was started");
    disk(&agent).free();
    agent.put("/v1/vms/other", other).await.expect("defined");
    agent.start_backend("standby").await;
}

#[tokio::test]
async fn f20_what_runs_goes_on_and_is_found_again() {
    let Some(mut agent) = start().await else { return };
    let first = pid_of(&agent.start_backend("owner").await);
    disk(&agent).fill();
    // The log has no room either, in the page that it has begun.
    let mut log = std::fs::File::options().append(true).open(disk(&agent).path("agent.log"));
    while log.as_mut().expect("a log").write_all(b"\n").is_ok() {}
    // From its next start on it stands by, which is shorter to write; it dies, and is started again.
    agent.start_backend("standby").await;
    signal(first, Signal::SIGKILL);
    let second = agent.wait_successor(first).await;
    // A machine comes, which cannot be remembered yet.
    let machine = Machine::at_the_disks_of(&agent);
    // The agent finds it after a kill, as it was told.
    agent.end(Signal::SIGKILL);
    agent.run().await;
    wait("taken over", async || agent.backend().await["run"] == "running").await;
    let state = agent.backend().await;
    assert_eq!((pid_of(&state), &state["role"]), (second, &json!("standby")), "{state}");
    assert!(runs(second));

    // With room again everything is remembered.
    disk(&agent).free();
    let known = disk(&agent).path("web.front-ends.json");
    wait("the machine is remembered", async || known.exists()).await;
    agent.delete("/v1/vms/web/backend").await.expect("stopped");
    let result = agent.put("/v1/vms/web/backend", json!({"role": "standby"})).await;
    assert_eq!(refused(result).1, "baton:earlier-machine");
    drop(machine);
    agent.start_backend("standby").await;
}
