//! Stops a machine whose volumes are another host's.
//!
//! Storage keeps a zombie's requests out, but not its packets: a guest whose disks
//! hang may answer on the network for hours under the address of the one that runs
//! elsewhere. So the agent stops a machine by itself, once its backend says that
//! it is parked. A backend that waits, because nobody can say yet who owns the
//! volumes, is not parked, and its machine is left alone.
//!
//! Does not end the machine: its memory may be wanted for a look. Does not cut a
//! host off that does not answer; that is the orchestrator's (STONITH).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Agent;
use crate::problem::Problem;
use crate::vmm::RunState;

/// Statuses that wait to be looked at; more are left out and come again.
pub(super) const HEARD_MAX: usize = 64;

/// What is done about a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing.
    Leave,
    /// Its CPUs must stop.
    Stop,
}

/// Why a backend is parked, in its own word; `None`: it is not, or does not say.
fn parked(status: &Value) -> Option<&str> {
    let handoff = &status["handoff"];
    if handoff["standing"] != "parked" {
        return None;
    }
    handoff["parked"].as_str()
}

/// Only one that runs is stopped: one that waits for a migration, has left with
/// one, or was stopped by somebody, stays as it is.
fn verdict(parked: Option<&str>, run: RunState) -> Verdict {
    match (parked, run) {
        (Some("lost" | "abdicated" | "over" | "other-try"), RunState::Running) => Verdict::Stop,
        _ => Verdict::Leave,
    }
}

/// Why the machine must not run, and what is to be done with it once it does not.
fn because(vm: &str, parked: &str) -> (&'static str, String) {
    if parked == "other-try" {
        let then = format!(
            "if this host owns its volumes (`baton handoff why {vm}`), leave it stopped until its handoff is over and a new backend has claimed them, else end it"
        );
        return ("its backend was started for another handoff than the one that it is in", then);
    }
    let then = "its memory is out of date; do not resume it, end it".to_owned();
    ("another host owns its volumes, or may be given them", then)
}

/// What was told of a machine, so that each thing is told once.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<HashMap<String, (Option<i64>, &'static str)>>);

impl Told {
    /// Whether it is news about this process of the VM's backend.
    fn is_news(&self, vm: &str, backend: Option<i64>, what: &'static str) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.insert(vm.to_owned(), (backend, what)) != Some((backend, what))
    }
}

/// Looks at each status that a backend gives, for as long as the agent lives.
pub(super) async fn watch(agent: Arc<Agent>, mut heard: mpsc::Receiver<(String, Value)>) {
    // One look at a time for each VM: a monitor that hangs holds up nobody else.
    let busy: Arc<Mutex<HashSet<String>>> = Arc::default();
    while let Some((vm, status)) = heard.recv().await {
        let Some(why) = parked(&status).map(str::to_owned) else { continue };
        if !busy.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone()) {
            continue;
        }
        let (agent, busy) = (Arc::clone(&agent), Arc::clone(&busy));
        tokio::spawn(async move {
            agent.end_zombie(&vm, &why, &status).await;
            busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
        });
    }
}

impl Agent {
    async fn end_zombie(&self, name: &str, why: &str, status: &Value) {
        let backend = status["pid"].as_i64();
        let data = json!({"host": self.config.host, "parked": why,
            "handoff": status["handoff"]["id"], "attempt": status["handoff"]["attempt"]});
        let tell = |kind: &'static str, detail: String| {
            if self.zombies.is_news(name, backend, kind) {
                tracing::error!(vm = name, why, detail, "a machine without its volumes");
                self.events.tell(kind, name, detail, data.clone());
            }
        };
        let (owned, then) = because(name, why);
        let Some(vm) = self.inventory.find(name) else { return };
        let Some(vmm) = self.vmm(&vm) else {
            return tell(
                "baton.vm.not-stopped",
                format!(
                    "`{name}` on {} must not run: {owned}, and its monitor is not this agent's; stop it",
                    self.config.host
                ),
            );
        };
        let stopped = match vmm.status().await {
            Ok(status) if verdict(Some(why), status.run) == Verdict::Leave => return,
            Ok(_) => vmm.stop().await,
            Err(error) => Err(error),
        };
        match stopped {
            Ok(()) => tell(
                "baton.vm.stopped",
                format!("`{name}` on {} was stopped: {owned}; {then}", self.config.host),
            ),
            Err(error) => tell(
                "baton.vm.not-stopped",
                format!(
                    "`{name}` on {} must not run: {owned}, and it could not be stopped ({}); it is tried again",
                    self.config.host,
                    Problem::described(&error)
                ),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: [RunState; 8] = [
        RunState::Running,
        RunState::Paused,
        RunState::Incoming,
        RunState::Switching,
        RunState::Migrated,
        RunState::Shutdown,
        RunState::Gone,
        RunState::Unknown,
    ];

    #[test]
    fn row_37_only_a_running_machine_of_a_parked_backend_is_stopped() {
        for word in ["lost", "abdicated", "over", "other-try"] {
            for run in RUNS {
                let expected =
                    if run == RunState::Running { Verdict::Stop } else { Verdict::Leave };
                assert_eq!(verdict(Some(word), run), expected, "{word} {run:?}");
                assert_eq!(verdict(None, run), Verdict::Leave, "{run:?}");
            }
        }
    }

    /// Its host may be the one that owns the volumes, with a machine that is up to date.
    #[test]
    fn row_35_the_machine_of_a_winners_successor_is_not_called_out_of_date() {
        let (why, then) = because("web", "other-try");
        assert!(!why.contains("owns") && !then.contains("out of date"), "{why}; {then}");
        assert!(then.contains("baton handoff why web"), "{then}");
        for word in ["lost", "abdicated", "over"] {
            let (why, then) = because("web", word);
            assert!(why.contains("another host owns") && then.contains("end it"), "{why}; {then}");
        }
    }

    #[test]
    fn row_37_one_that_waits_is_not_parked() {
        let status = |standing: &str, parked: Value| json!({"handoff": {"standing": standing, "parked": parked}});
        for standing in
            ["serving", "standby", "ready", "sealing", "sealed", "activating", "reclaiming"]
        {
            assert_eq!(parked(&status(standing, Value::Null)), None, "{standing}");
            assert_eq!(parked(&status(standing, json!("lost"))), None, "{standing}");
        }
        assert_eq!(parked(&status("parked", json!("lost"))), Some("lost"));
        for vague in [json!({}), Value::Null, status("parked", Value::Null)] {
            assert_eq!(parked(&vague), None, "{vague}");
        }
        assert_eq!(verdict(Some("a word of the future"), RunState::Running), Verdict::Leave);
    }
}
