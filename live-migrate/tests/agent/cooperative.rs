//! What an agent proves of a backend whose storage keeps nobody out, and what it refuses.

use baton_live_migrate::client::CallError;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Agent, WEB, pid_of, refused, runs, signal, wait};

const ONE: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1";
const TWO: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV/2";

async fn order(agent: &Agent, what: &str, attempt: &str) -> Result<Value, CallError> {
    agent.post(&format!("/v1/vms/web/backend/{what}"), json!({"try": attempt})).await
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
        assert_eq!(kind(order(&agent, "restore", TWO).await), "baton:stale-attempt");
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
    // Nor is one that hangs: it is killed for that before it has sealed.
    std::fs::remove_file(agent.path("run/web/control.refuses")).expect("removed");
    signal(next, Signal::SIGSTOP);
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:backend-broken");
    agent.wait_successor(next).await;
    assert_eq!(agent.backend().await["run"], "running", "nothing was given up");
}

#[tokio::test]
async fn a_try_that_was_called_off_ends_nothing_any_more() {
    let agent = Agent::start().await;
    let pid = pid_of(&agent.start_backend("owner").await);
    // Before its order to end has arrived: it comes too late.
    order(&agent, "restore", ONE).await.expect("noted");
    assert_eq!(kind(order(&agent, "end", ONE).await), "baton:stale-attempt");
    assert!(runs(pid));
    // And after it: the source has a backend again.
    order(&agent, "end", TWO).await.expect("proven");
    order(&agent, "restore", TWO).await.expect("restored");
    assert_eq!(agent.backend().await["run"], "running");
    assert_eq!(role(&agent).await, json!(false));
    assert_eq!(kind(order(&agent, "end", TWO).await), "baton:stale-attempt");
    order(&agent, "restore", TWO).await.expect("said again");
}

#[tokio::test]
async fn only_the_standby_of_the_very_try_is_permitted() {
    let mut agent = Agent::start().await;
    assert_eq!(kind(order(&agent, "permit", ONE).await), "baton:stale-attempt", "none stands by");
    let pid = pid_of(&agent.start_for(TWO).await);
    assert_eq!(kind(order(&agent, "permit", ONE).await), "baton:stale-attempt");
    assert!(!agent.path("run/web/control.permitted").exists());
    order(&agent, "permit", TWO).await.expect("permitted");
    let told = std::fs::read_to_string(agent.path("run/web/control.permitted")).expect("told");
    assert_eq!((told.as_str(), role(&agent).await), (TWO, json!(true)));
    order(&agent, "permit", TWO).await.expect("said again");
    assert_eq!(kind(order(&agent, "restore", TWO).await), "baton:stale-attempt");
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
    for what in ["end", "restore", "permit"] {
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
