//! What an agent proves of a backend whose storage keeps nobody out, and what it refuses.

use baton_live_migrate::client::CallError;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Agent, Machine, WEB, pid_of, refused, runs, signal, wait};

const ONE: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1";
const TWO: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/2";
const THREE: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/3";

async fn order(agent: &Agent, what: &str, attempt: &str) -> Result<Value, CallError> {
    let mut told = json!({"try": attempt, "turn": turn_of(attempt)});
    if what == "end" {
        // As the plan would have found it.
        told["pid"] = agent.backend().await["pid"].as_i64().unwrap_or(0).into();
        told["starts"] = 3.into();
    }
    agent.post(&format!("/v1/vms/web/backend/{what}"), told).await
}

/// The tests' tries are numbered as their attempts are.
fn turn_of(attempt: &str) -> u64 {
    attempt.rsplit('/').next().and_then(|number| number.parse().ok()).expect("a number")
}

async fn stand(agent: &Agent, attempt: &str) -> Result<Value, CallError> {
    let told = json!({"role": "standby", "try": attempt, "turn": turn_of(attempt)});
    agent.put("/v1/vms/web/backend", told).await
}

async fn claim(agent: &Agent, force: bool) -> Result<Value, CallError> {
    agent.put("/v1/vms/web/backend", json!({"role": "owner", "force": force})).await
}

async fn ledger(agent: &Agent) -> (String, u64) {
    let ledger = agent.get("/v1/vms/web").await.expect("a view")["ledger"].take();
    let state = ledger["state"].as_str().unwrap_or("none").to_owned();
    (state, ledger["turn"].as_u64().unwrap_or(0))
}

fn kind(answer: Result<Value, CallError>) -> String {
    refused(answer).1
}

async fn role(agent: &Agent) -> Value {
    agent.get("/v1/vms/web").await.expect("a view")["status"]["standby"].take()
}

#[tokio::test]
async fn the_end_of_a_sealed_backend_is_proven_once_and_kept() {
    let mut agent = Agent::start().await;
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:not-proven", "there is none");
    let pid = pid_of(&agent.start_backend("owner").await);
    std::fs::write(agent.path("run/web/control.refuses"), "still-serving").expect("written");
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:still-serving");
    assert!(runs(pid), "one that serves is left alone");
    std::fs::remove_file(agent.path("run/web/control.refuses")).expect("removed");

    let proof = order(&agent, "end", ONE).await.expect("proven");
    assert_eq!((&proof["pid"], &proof["seen_by"]), (&json!(pid), &json!("waitpid")));
    assert!(!runs(pid));
    // An agent after this one knows, and nobody starts what was given up.
    for _ in 0..2 {
        assert_eq!(order(&agent, "end", ONE).await.expect("again"), proof);
        assert_eq!(kind(order(&agent, "end", TWO).await), "baton:stale-attempt");
        assert_eq!(kind(order(&agent, "keep", TWO).await), "baton:stale-attempt");
        let claim = json!({"role": "owner"});
        assert_eq!(kind(agent.put("/v1/vms/web/backend", claim).await), "baton:given-away");
        assert_eq!(agent.backend().await["run"], "stopped");
        agent.end(Signal::SIGKILL);
        agent.run().await;
    }
    let claim = json!({"role": "owner", "force": true});
    agent.put("/v1/vms/web/backend", claim).await.expect("forced");
    assert_eq!(agent.backend().await["run"], "running");
}

/// By its descriptor, since it is no child of this agent's.
#[tokio::test]
async fn a_backend_of_an_earlier_agent_is_proven_gone_too() {
    let mut agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    agent.end(Signal::SIGKILL);
    agent.run().await;
    wait("taken over", async || agent.backend().await["run"] == "running").await;
    let proof = order(&agent, "end", ONE).await.expect("proven");
    assert_eq!((&proof["pid"], &proof["seen_by"]), (&json!(pid), &json!("pidfd")));
}

/// What the guest had under way may still reach the storage.
#[tokio::test]
async fn a_backend_that_did_not_seal_is_not_proven() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 2000\n", WEB);
    agent.run().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    std::fs::write(agent.path("run/web/control.refuses"), "not-proven").expect("written");
    signal(pid, Signal::SIGKILL);
    let next = agent.wait_successor(pid).await;
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:not-proven");
    assert!(runs(next), "the machine goes on");
    // Nor is one that hangs when it is asked: it is killed for that before it has sealed.
    std::fs::remove_file(agent.path("run/web/control.refuses")).expect("removed");
    std::fs::write(agent.path("run/web/control.hangs"), "").expect("written");
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:backend-broken");
    agent.wait_successor(next).await;
    assert_eq!(agent.backend().await["run"], "running", "nothing was given up");
}

#[tokio::test]
async fn a_try_that_was_called_off_ends_nothing_any_more() {
    let agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    // Before its order to end has arrived: it comes too late.
    order(&agent, "keep", ONE).await.expect("noted");
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:stale-attempt");
    assert!(runs(pid));
    // And after it: the source has a backend again.
    order(&agent, "end", TWO).await.expect("proven");
    order(&agent, "keep", TWO).await.expect("restored");
    assert_eq!(agent.backend().await["run"], "running");
    assert_eq!(role(&agent).await, json!(false));
    assert_eq!(kind(order(&agent, "end", TWO).await), "baton:stale-attempt");
    order(&agent, "keep", TWO).await.expect("said again");
}

#[tokio::test]
async fn only_the_standby_of_the_very_try_is_permitted() {
    let mut agent = Agent::start().await;
    assert_eq!(kind(order(&agent, "permit", ONE).await), "baton:stale-attempt", "none stands by");
    let pid = pid_of(&stand(&agent, TWO).await.expect("stands by"));
    assert_eq!(kind(order(&agent, "permit", ONE).await), "baton:stale-attempt");
    assert!(!agent.path("run/web/control.permitted").exists());
    order(&agent, "permit", TWO).await.expect("permitted");
    let told = std::fs::read_to_string(agent.path("run/web/control.permitted")).expect("told");
    assert_eq!((told.as_str(), role(&agent).await), (TWO, json!(true)));
    order(&agent, "permit", TWO).await.expect("said again");
    assert_eq!(kind(order(&agent, "keep", TWO).await), "baton:stale-attempt");
    // What comes after it claims, whoever starts it.
    signal(pid, Signal::SIGKILL);
    let next = agent.wait_successor(pid).await;
    assert_eq!(role(&agent).await, json!(false));
    agent.end(Signal::SIGKILL);
    signal(next, Signal::SIGKILL);
    agent.run().await;
    agent.wait_successor(next).await;
    assert_eq!(role(&agent).await, json!(false));
}

/// It may say that the volumes left.
#[tokio::test]
async fn a_note_that_cannot_be_read_is_not_passed_over() {
    let mut agent = Agent::start().await;
    agent.start_backend("owner").await;
    order(&agent, "end", ONE).await.expect("proven");
    agent.end(Signal::SIGKILL);
    std::fs::write(agent.path("state/web.cooperative.json"), "{").expect("written");
    agent.run().await;
    for what in ["end", "keep", "permit", "dismiss"] {
        assert_eq!(kind(order(&agent, what, ONE).await), "baton:state-failed", "{what}");
    }
    let claim = json!({"role": "owner"});
    let (_, kind, detail) = refused(agent.put("/v1/vms/web/backend", claim).await);
    assert_eq!(kind, "baton:state-failed");
    assert!(
        detail.contains("web.cooperative.json") && detail.contains("then remove it"),
        "{detail}"
    );
    assert_eq!(agent.backend().await["run"], "stopped");
}

/// Two backends on one export would destroy it, so an end is on the disk before anybody hears of it.
#[tokio::test]
async fn an_end_that_cannot_be_remembered_is_not_proven() {
    let agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    let in_the_way = agent.path("state/web.cooperative.new");
    std::fs::create_dir(&in_the_way).expect("made");
    for _ in 0..2 {
        assert_eq!(kind(order(&agent, "end", ONE).await), "baton:state-failed");
        assert!(!runs(pid), "it is over for all that");
    }
    std::fs::remove_dir(&in_the_way).expect("removed");
    let proof = order(&agent, "end", ONE).await.expect("proven");
    assert_eq!((&proof["pid"], &proof["seen_by"]), (&json!(pid), &json!("waitpid")));
    assert!(agent.path("state/web.cooperative.json").exists());
}

/// Orders that were sent in an earlier try, or were sent twice, may arrive at any time.
#[tokio::test]
async fn orders_of_an_earlier_try_change_nothing_however_late_they_come() {
    let mut agent = Agent::start().await;
    stand(&agent, ONE).await.expect("stands by");
    order(&agent, "dismiss", ONE).await.expect("dismissed");
    assert_eq!(agent.backend().await["run"], "stopped");
    for (late, answer) in
        [("permit", order(&agent, "permit", ONE).await), ("stand", stand(&agent, ONE).await)]
    {
        assert_eq!(kind(answer), "baton:stale-attempt", "{late}");
    }
    assert_eq!(agent.backend().await["run"], "stopped");
    assert_eq!(kind(claim(&agent, false).await), "baton:given-away", "they stayed elsewhere");

    let late_orders = async |agent: &Agent, attempt| {
        for what in ["end", "keep", "permit"] {
            assert_eq!(kind(order(agent, what, attempt).await), "baton:stale-attempt", "{what}");
        }
        assert_eq!(kind(stand(agent, attempt).await), "baton:stale-attempt");
        order(agent, "dismiss", attempt).await.expect("nothing of it is here");
    };
    stand(&agent, TWO).await.expect("stands by");
    late_orders(&agent, ONE).await;
    assert_eq!(ledger(&agent).await, ("standby".to_owned(), 2));
    order(&agent, "permit", TWO).await.expect("permitted");
    let pid = pid_of(&agent.backend().await);
    late_orders(&agent, ONE).await;
    // A copy of the order that made it a standby.
    assert_eq!(kind(stand(&agent, TWO).await), "baton:stale-attempt");
    assert_eq!(ledger(&agent).await, ("permitted".to_owned(), 2));
    assert_eq!(pid_of(&agent.backend().await), pid);

    order(&agent, "end", THREE).await.expect("proven");
    for _ in 0..2 {
        late_orders(&agent, TWO).await;
        assert_eq!(ledger(&agent).await, ("ended".to_owned(), 3));
        assert_eq!(agent.backend().await["run"], "stopped");
        agent.end(Signal::SIGKILL);
        agent.run().await;
    }
    order(&agent, "keep", THREE).await.expect("called off");
    late_orders(&agent, TWO).await;
    assert_eq!(kind(order(&agent, "end", THREE).await), "baton:stale-attempt");
    assert_eq!(ledger(&agent).await, ("restored".to_owned(), 3));
    assert_eq!(agent.backend().await["run"], "running");
}

/// Whoever called the try before off did not reach this host.
#[tokio::test]
async fn what_stands_by_for_an_earlier_try_makes_room_for_the_next() {
    let agent = Agent::start().await;
    let first = pid_of(&stand(&agent, ONE).await.expect("stands by"));
    assert_eq!(pid_of(&stand(&agent, ONE).await.expect("again")), first);
    assert_eq!(kind(claim(&agent, false).await), "baton:given-away", "it waits for them");
    let second = pid_of(&stand(&agent, TWO).await.expect("stands by"));
    assert!(second != first && !runs(first));
    assert_eq!(agent.get("/v1/vms/web").await.expect("a view")["status"]["only_for"], TWO);
    assert_eq!(kind(order(&agent, "permit", ONE).await), "baton:stale-attempt");
    order(&agent, "permit", TWO).await.expect("permitted");
    // Where the volumes are, nobody waits for them.
    assert_eq!(kind(stand(&agent, THREE).await), "baton:destination-runs-vm");
    assert_eq!(pid_of(&agent.backend().await), second);
}

/// Its memory is of then, and no storage would keep its requests out: neither in the next try,
/// which may be forced, nor behind a backend that is started by force.
#[tokio::test]
async fn a_machine_of_a_try_that_was_called_off_never_meets_a_backend() {
    let agent = Agent::start().await;
    stand(&agent, ONE).await.expect("stands by");
    let machine = Machine::at_the_disks_of(&agent);
    for is_dismissed in [false, true] {
        // The order that calls ONE off may not have arrived.
        if is_dismissed {
            order(&agent, "dismiss", ONE).await.expect("dismissed");
        }
        assert_eq!(kind(stand(&agent, TWO).await), "baton:earlier-machine");
        assert_eq!(kind(order(&agent, "permit", TWO).await), "baton:stale-attempt");
        assert_eq!(kind(claim(&agent, true).await), "baton:earlier-machine");
        assert_eq!(agent.backend().await["run"], "stopped");
    }
    drop(machine);
    stand(&agent, TWO).await.expect("stands by");
    order(&agent, "permit", TWO).await.expect("permitted");
}

/// Nobody knows whether the source went on after it was copied, so the VM starts from its disks.
#[tokio::test]
async fn a_machine_that_waits_is_not_let_run_by_force() {
    let agent = Agent::start().await;
    let pid = pid_of(&stand(&agent, ONE).await.expect("stands by"));
    let machine = Machine::at_the_disks_of(&agent);
    let force = async || {
        let told = json!({"try": ONE, "turn": 1, "forced": true});
        agent.post("/v1/vms/web/backend/permit", told).await
    };
    assert_eq!(kind(force().await), "baton:earlier-machine");
    assert_eq!(ledger(&agent).await, ("standby".to_owned(), 1));
    drop(machine);
    std::fs::remove_file(agent.path("run/web/control.front-end")).expect("removed");
    force().await.expect("permitted");
    assert_eq!(ledger(&agent).await, ("permitted".to_owned(), 1));
    assert!(!runs(pid));
    assert_eq!(role(&agent).await, json!(false), "it claims");
}

/// Somebody asks for a backend, and its agent is held up after it has seen that the volumes are
/// here: what is proven meanwhile must stay true.
#[tokio::test]
async fn nobody_claims_between_a_look_at_the_note_and_the_proof() {
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    let agent = Agent::start().await;
    agent.start_backend("owner").await;
    // Where the backend's configuration is written.
    let pipe = agent.path("run/launch/web.toml.new");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("pipe");
    let mut options = std::fs::OpenOptions::new();
    let options = options.read(true).write(true).custom_flags(nix::libc::O_NONBLOCK);
    let mut full = options.open(&pipe).expect("opened");
    while full.write(&[b' '; 4096]).is_ok() {}
    let (_, ended) = tokio::join!(claim(&agent, false), async {
        wait("it is held up", async || agent.holds_open(&pipe)).await;
        let end = order(&agent, "end", ONE);
        tokio::pin!(end);
        // One that does not wait for the claim is through by then.
        let early = tokio::time::timeout(std::time::Duration::from_millis(500), &mut end).await;
        let mut room = [0; 4096];
        while full.read(&mut room).is_ok() {}
        match early {
            Ok(ended) => ended,
            Err(_) => end.await,
        }
    });
    ended.expect("proven");
    assert_eq!(agent.backend().await["run"], "stopped");
    assert_eq!(ledger(&agent).await, ("ended".to_owned(), 1));
}

/// The guest may have been stopped and gone on meanwhile, and the destination have a copy of it that is out of date.
#[tokio::test]
async fn a_source_is_ended_in_a_try_that_its_process_has_seen_begin() {
    let agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    signal(pid, Signal::SIGKILL);
    let next = agent.wait_successor(pid).await;
    let end = async |pid| {
        let told = json!({"try": ONE, "turn": 1, "pid": pid, "starts": 3});
        agent.post("/v1/vms/web/backend/end", told).await
    };
    assert_eq!(kind(end(pid).await), "baton:came-back");
    assert!(runs(next));
    end(next).await.expect("proven");
    // And the process is told how often rings had been started.
    let told = std::fs::read_to_string(agent.path("run/web/control.sealed")).expect("told");
    assert_eq!(told, "3");
}

/// A backend that has sealed serves nobody, and one that does not answer may have.
#[tokio::test]
async fn a_source_that_keeps_its_volumes_has_a_backend_that_serves() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "hang_ms = 600000\n", WEB);
    agent.run().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    std::fs::write(agent.path("run/web/control.handoff"), "{\"standing\": \"sealed\"}")
        .expect("written");
    crate::support::freeze(pid).await;
    order(&agent, "keep", ONE).await.expect_err("it does not say whether it has sealed");
    signal(pid, Signal::SIGCONT);
    order(&agent, "keep", ONE).await.expect("kept");
    assert!(!runs(pid));
    assert_eq!(agent.backend().await["run"], "running");
}

/// The record of its process may outlive it, on a disk that fails.
#[tokio::test]
async fn an_agent_that_comes_later_does_not_start_again_what_was_given_up() {
    let mut agent = Agent::start().await;
    agent.start_backend("owner").await;
    let record = agent.path("state/web.backend.json");
    let remembered = std::fs::read(&record).expect("a record");
    order(&agent, "end", ONE).await.expect("proven");
    agent.end(Signal::SIGKILL);
    std::fs::write(&record, remembered).expect("written");
    agent.run().await;
    assert_eq!(agent.backend().await["run"], "stopped");
    assert!(agent.log().contains("not taken over"), "{}", agent.log());
}
