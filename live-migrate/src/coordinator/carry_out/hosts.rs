//! What is done at the two hosts: standing by, orders to backends, proofs, and the loser's end.

use std::time::Duration;

use baton_fault_point as fault_point;

use super::{PAUSE, Patience, Work};
use crate::coordinator::agents::{Agent, AgentError};
use crate::coordinator::clients;
use crate::coordinator::plan::{Input, Row, Standing, Timings, Trouble};
use crate::coordinator::vm_view::VmView;

/// For what a backend has measured, before the loser's is ended.
const MEASURE_LIMIT: Duration = Duration::from_secs(1);
/// Between two looks at a standby backend, while it starts and afterwards.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Between two looks at a source that is to stop, and at a destination that may have
/// started then: the machine stands still meanwhile.
const LOOK_FOR_STOP: Duration = Duration::from_millis(20);

impl Work {
    pub(super) async fn stand(&self, start: bool) {
        let Some(agent) = self.core.agents.of(&self.row.to) else {
            let detail = format!("host `{}` is not in the configuration any more", self.row.to);
            let trouble = Trouble { kind: "baton:unknown-host".to_owned(), detail };
            return self.reports.tell(Input::CannotStand(trouble)).await;
        };
        let id = self.row.id.to_string();
        let mut patience = Patience::new();
        let mut told = None;
        let mut look = LOOK.0;
        let mut heard = tokio::time::Instant::now();
        let mut occupied = None;
        loop {
            match self.look(agent, start, &id, &mut heard).await {
                Ok(standing) => {
                    if told != Some(standing) {
                        self.reports.tell(Input::Standing(standing)).await;
                        if standing == Standing::Ready {
                            fault_point::at("ready.told");
                        }
                        told = Some(standing);
                        look = LOOK.0;
                    }
                    let most = if self.row.is_cooperative() { LOOK_FOR_STOP } else { LOOK.1 };
                    tokio::time::sleep(look.min(most)).await;
                    look = (look * 3 / 2).min(most);
                }
                // Whoever ends the machine of the try before may be about to: its memory takes a while.
                Err(AgentError::Refused { trouble, .. })
                    if start
                        && trouble.kind == "baton:earlier-machine"
                        && occupied.get_or_insert_with(tokio::time::Instant::now).elapsed()
                            < self.core.config.agent_patience =>
                {
                    patience.wait(&self.reports, Some(&trouble)).await;
                }
                Err(AgentError::Refused { trouble, .. }) if start => {
                    return self.reports.tell(Input::CannotStand(self.owned(&trouble))).await;
                }
                // Nobody there. A copy of memory that is under way does not need it.
                Err(AgentError::Unreachable(trouble))
                    if start
                        && told != Some(Standing::Ready)
                        && heard.elapsed() > self.core.config.agent_patience =>
                {
                    self.reports.tell(Input::CannotStand(self.owned(&trouble))).await;
                    patience.wait(&self.reports, None).await;
                }
                Err(error) => patience.wait(&self.reports, Some(error.trouble())).await,
            }
        }
    }

    /// With who owns the VM and what to do.
    fn owned(&self, trouble: &Trouble) -> Trouble {
        let Row { vm, from, to, .. } = &*self.row;
        Trouble {
            kind: trouble.kind.clone(),
            detail: format!(
                "{}; the source {from} owns the volumes of `{vm}`, which goes on there: see to {to} and ask again",
                trouble.detail
            ),
        }
    }

    /// One look at the destination; starts what is missing. Notes when its agent
    /// was heard.
    async fn look(
        &self,
        agent: &Agent,
        start: bool,
        id: &str,
        heard: &mut tokio::time::Instant,
    ) -> Result<Standing, AgentError> {
        let found = agent.vm(&self.row.vm).await;
        if !matches!(found, Err(AgentError::Unreachable(_))) {
            *heard = tokio::time::Instant::now();
        }
        let vm = match found {
            Ok(vm) => vm,
            Err(error) if error.is_missing() && start => {
                let definition = self.core.definition(&self.row.vm, &self.row.from).await?;
                agent.define(&self.row.vm, &definition).await?;
                agent.stand_by(&self.row).await?;
                return Ok(Standing::Starting);
            }
            // Its machine may run all the same.
            Err(error) if error.is_missing() => return Ok(Standing::Unknown),
            Err(error) => return Err(error),
        };
        let standing = vm.standing(id, self.row.attempt);
        if !start {
            return Ok(standing);
        }
        match standing {
            Standing::Active if vm.standing_word() == Some("serving") => {
                Err(AgentError::Refused { status: 409, trouble: self.runs_there(&vm) })
            }
            // Of a handoff before this one.
            Standing::Parked => {
                agent.stop_backend(&self.row.vm).await?;
                agent.stand_by(&self.row).await?;
                Ok(Standing::Starting)
            }
            // Its agent may not have heard that the try before this one is over.
            _ if !vm.backend_runs()
                || (self.row.is_cooperative() && vm.waits_in_another(id, self.row.attempt)) =>
            {
                agent.stand_by(&self.row).await?;
                Ok(Standing::Starting)
            }
            other => Ok(other),
        }
    }

    fn runs_there(&self, vm: &VmView) -> Trouble {
        Trouble {
            kind: "baton:destination-runs-vm".to_owned(),
            detail: format!(
                "the backend of `{}` on {} serves already (its machine: {}): it must be stopped first",
                self.row.vm,
                self.row.to,
                vm.run(),
            ),
        }
    }

    pub(super) async fn order(&self, host: &str, what: &str, done: Input) {
        let mut patience = Patience::new();
        loop {
            let Some(agent) = self.core.agents.of(host) else { return };
            match agent.order(&self.row.vm, what).await {
                Ok(_) => return self.reports.tell(done).await,
                Err(error) => patience.wait(&self.reports, Some(error.trouble())).await,
            }
        }
    }

    /// Until the source's agent has proven it, or the handoff goes another way.
    pub(super) async fn end_source(&self) {
        let mut patience = Patience::new();
        loop {
            let Some(agent) = self.core.agents.of(&self.row.from) else { return };
            match agent.order_of_try(&self.row, "end").await {
                Ok(proof) => return self.reports.tell(Input::Ended(proof)).await,
                Err(AgentError::Refused { trouble, .. }) if trouble.kind == "baton:came-back" => {
                    let trouble = self.owned(&trouble);
                    return self.reports.tell(Input::CameBack(trouble)).await;
                }
                // The machine goes on: that is what is waited for.
                Err(AgentError::Refused { trouble, .. })
                    if trouble.kind == "baton:still-serving" =>
                {
                    tokio::time::sleep(LOOK_FOR_STOP).await;
                }
                Err(error) => {
                    let trouble = self.unproven(error.trouble());
                    patience.wait(&self.reports, Some(&trouble)).await;
                }
            }
        }
    }

    /// With who owns the VM and what to do.
    fn unproven(&self, trouble: &Trouble) -> Trouble {
        let Row { vm, from, to, .. } = &*self.row;
        Trouble {
            kind: trouble.kind.clone(),
            detail: format!(
                "{}; the source {from} owns the volumes of `{vm}`, and {to} waits for a proof that the backend on {from} has stopped: see to {from}, or `baton handoff cancel {vm}`; only if {from} surely cannot reach the storage any more: `baton handoff finish {vm} --force --reason TEXT`",
                trouble.detail
            ),
        }
    }

    /// Until the winner's agent has done it.
    pub(super) async fn tell_winner(&self, host: &str, what: &str, done: Input) {
        let mut patience = Patience::new();
        loop {
            let Some(agent) = self.core.agents.of(host) else { return };
            match agent.order_of_try(&self.row, what).await {
                Ok(_) => return self.reports.tell(done).await,
                Err(error) => patience.wait(&self.reports, Some(error.trouble())).await,
            }
        }
    }

    /// Ends what stands by, unless it serves.
    pub(super) async fn dismiss(&self) {
        let Some(agent) = self.core.agents.of(&self.row.to) else {
            return self.reports.tell(Input::LoserGone).await;
        };
        let input = match agent.order_of_try(&self.row, "dismiss").await {
            Ok(_) => Input::LoserGone,
            // It was never told of the VM.
            Err(error) if error.is_missing() => Input::LoserGone,
            Err(error) => Input::LoserLeft(error.trouble().clone()),
        };
        self.reports.tell(input).await;
    }

    /// Ends the destination's machine, whose memory is of a try that is over: the
    /// next one's backend must not meet it.
    async fn end_machine(&self, agent: &Agent, vm: &VmView) -> Result<(), AgentError> {
        if vm.monitor_is_foreign() || vm.run() == "gone" {
            return Ok(());
        }
        let told = agent.monitor(&self.row.vm, "quit", &serde_json::json!({})).await;
        let mut pause = PAUSE.0;
        while pause < PAUSE.1 {
            if agent.vm(&self.row.vm).await.is_ok_and(|vm| vm.run() == "gone") {
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        told?;
        Err(AgentError::Refused {
            status: 409,
            trouble: Trouble {
                kind: "baton:destination-runs-vm".to_owned(),
                detail: format!(
                    "the machine of `{}` on {} does not end, so there is no other try",
                    self.row.vm, self.row.to
                ),
            },
        })
    }

    /// Takes down what both backends have measured, while both are there.
    async fn measure(&self) {
        let Row { vm, from, to, .. } = &*self.row;
        // For people: who does not answer soon is not waited for.
        let said = async |host: &str| {
            let view = self.core.agents.of(host)?.vm(vm);
            let view = tokio::time::timeout(MEASURE_LIMIT, view).await.ok()?.ok()?;
            Some(view.handoff().clone())
        };
        let (source, destination) = tokio::join!(said(from), said(to));
        let timings = Timings::of(&source.unwrap_or_default(), &destination.unwrap_or_default());
        self.reports.tell(Input::Measured(timings)).await;
    }

    /// Stops the loser's backend, and no other.
    pub(super) async fn stop(&self, host: &str) {
        let Some(agent) = self.core.agents.of(host) else {
            return self.reports.tell(Input::LoserGone).await;
        };
        // A destination that lost has switched nothing.
        if host == self.row.from {
            self.measure().await;
        }
        let stopped = async {
            match agent.vm(&self.row.vm).await {
                Ok(vm) if vm.standing_word() == Some("serving") => Err(AgentError::Refused {
                    status: 409,
                    trouble: Trouble {
                        kind: "baton:loser-serves".to_owned(),
                        detail: format!(
                            "the backend of `{}` on {host} serves, so it was left alone",
                            self.row.vm
                        ),
                    },
                }),
                // Nobody ended it: that is no proof that it is dead.
                Err(error) if error.is_missing() => Ok(false),
                Ok(vm) => {
                    if self.row.goes_again() && host == self.row.to {
                        self.end_machine(agent, &vm).await?;
                    }
                    agent.stop_backend(&self.row.vm).await
                }
                Err(error) => Err(error),
            }
        };
        let input = match stopped.await {
            Ok(ended) => {
                if ended {
                    clients::bury(&self.core, &self.row, host).await;
                }
                Input::LoserGone
            }
            Err(error) => Input::LoserLeft(error.trouble().clone()),
        };
        self.reports.tell(input).await;
    }
}
