//! Carries out one action of a row: calls servers and agents until it is done,
//! and reports what it learns. It may be aborted at any await: everything it
//! does may be done again.

use std::sync::Arc;
use std::time::Duration;

use baton_fault_point as fault_point;

use super::agents::{Agent, AgentError, VmView};
use super::clients;
use super::core::Core;
use super::fault::while_storage_is_away;
use super::keeper::Reports;
use super::plan::{Action, Input, Member, Row, Standing, Trouble};
use super::storages::{Reclaimed, StorageError};

/// Between two tries, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Between two looks at a standby backend, while it starts and afterwards.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Between two looks at a source that is to stop, and at a destination that may have
/// started then: the machine stands still meanwhile.
const LOOK_FOR_STOP: Duration = Duration::from_millis(20);

pub(super) async fn carry_out(core: Arc<Core>, row: Arc<Row>, action: Action, reports: Reports) {
    let work = Work { core, row, reports };
    match action {
        Action::Arm(place) => work.arm(place).await,
        Action::Watch(place) => work.watch(place).await,
        Action::Stand => work.stand(true).await,
        Action::Inspect => work.stand(false).await,
        Action::Countdown => {
            tokio::time::sleep(Duration::from_millis(work.row.ready_timeout_ms)).await;
            work.reports.tell(Input::Late).await;
        }
        Action::OrderSeal => work.order(&work.row.from, "seal", Input::SealOrdered).await,
        Action::OrderActivate => work.order(&work.row.to, "activate", Input::ActivateOrdered).await,
        Action::Reclaim => work.reclaim().await,
        Action::Abdicate => work.abdicate().await,
        Action::Prove => work.prove().await,
        Action::Settle(place) => work.settle(place).await,
        Action::EndSource => work.end_source().await,
        Action::Permit => work.tell_winner(&work.row.to, "permit", Input::Permitted).await,
        Action::Keep => work.tell_winner(&work.row.from, "keep", Input::Restored).await,
        Action::Dismiss => work.dismiss().await,
        Action::StopSource => work.stop(&work.row.from).await,
        Action::StopDestination => work.stop(&work.row.to).await,
    }
}

struct Work {
    core: Arc<Core>,
    row: Arc<Row>,
    reports: Reports,
}

/// Grows with every failure; says each new trouble once.
struct Patience {
    pause: Duration,
    told: Option<Trouble>,
}

impl Patience {
    fn new() -> Self {
        Self { pause: PAUSE.0, told: None }
    }

    async fn wait(&mut self, reports: &Reports, trouble: Option<&Trouble>) {
        if let Some(trouble) = trouble.filter(|trouble| self.told.as_ref() != Some(*trouble)) {
            self.told = Some(trouble.clone());
            reports.tell(Input::Hindered(trouble.clone())).await;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

impl Work {
    fn member(&self, place: usize) -> Option<&Member> {
        self.row.members.get(place)
    }

    /// A failure that is nobody's answer: wait, or end the coordinator.
    async fn endure(&self, patience: &mut Patience, error: StorageError) {
        match error {
            StorageError::StaleTerm(_) => {
                self.reports.tell(Input::StaleTerm).await;
                std::future::pending::<()>().await;
            }
            StorageError::Unreachable(Trouble { kind, detail }) => {
                let detail = format!("{detail}; {}", while_storage_is_away(&self.row));
                patience.wait(&self.reports, Some(&Trouble { kind, detail })).await;
            }
            StorageError::Refused { trouble } => {
                patience.wait(&self.reports, Some(&trouble)).await;
            }
        }
    }

    async fn arm(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        loop {
            let armed = match self.core.storages.of(member) {
                Ok(server) => server.arm(&self.row, member, self.core.term).await,
                Err(error) => Err(error),
            };
            fault_point::at("arm.sent");
            let input = match armed {
                Ok(()) => Input::Armed(place),
                Err(StorageError::Refused { trouble }) => match trouble.kind.as_str() {
                    // Armed before, and gone on since: the watch says how.
                    "baton:no-such-handoff" => Input::Armed(place),
                    "baton:handoff-in-progress"
                        if trouble.detail.contains(&self.row.id.to_string()) =>
                    {
                        // The same plan is granted again while it is armed.
                        match self.is_foreign(member).await {
                            Ok(false) => Input::Armed(place),
                            Ok(true) => Input::CannotArm(place, self.with_volume(member, trouble)),
                            Err(error) => {
                                self.endure(&mut patience, error).await;
                                continue;
                            }
                        }
                    }
                    "baton:handoff-in-progress" => {
                        let trouble = self.in_another(member, trouble).await;
                        Input::CannotArm(place, self.with_volume(member, trouble))
                    }
                    _ => Input::CannotArm(place, self.with_volume(member, trouble)),
                },
                Err(error) => {
                    self.endure(&mut patience, error).await;
                    continue;
                }
            };
            return self.reports.tell(input).await;
        }
    }

    /// Another coordinator armed it under the same id, with a key of its own.
    async fn is_foreign(&self, member: &Member) -> Result<bool, StorageError> {
        let server = self.core.storages.of(member)?;
        let (_, record) = server.access(&member.volume, None).await?;
        Ok(record.phase == "armed")
    }

    /// The volume is in another handoff. One that the journal does not know can be neither
    /// cancelled nor finished, whatever the storage proposes.
    async fn in_another(&self, member: &Member, trouble: Trouble) -> Trouble {
        let record = match self.core.storages.of(member) {
            Ok(server) => server.access(&member.volume, None).await,
            Err(error) => Err(error),
        };
        let other = record.ok().and_then(|(_, record)| record.handoff);
        let known = |id: &str| id.parse().is_ok_and(|id| self.core.handoff(id).is_some());
        let Some(other) = other.filter(|other| !known(&other.id)) else { return trouble };
        let vm = &self.row.vm;
        let host = other.to.split('/').next().unwrap_or_default();
        let detail = format!(
            "handoff {} (attempt {}) to {} is under way there, and this coordinator's journal does not know it, so it can be neither cancelled nor finished: `baton handoff why {vm}` says who owns the volumes, and `baton handoff fence {vm} --dead-host {host} --reason TEXT` ends it, also while {host} lives",
            other.id, other.attempt, other.to
        );
        Trouble { detail, ..trouble }
    }

    fn with_volume(&self, member: &Member, trouble: Trouble) -> Trouble {
        let kind = match trouble.kind.as_str() {
            "baton:no-such-volume" => "baton:unknown-volume".to_owned(),
            _ => trouble.kind,
        };
        Trouble {
            kind,
            detail: format!("volume `{}` at {}: {}", member.volume, member.storage, trouble.detail),
        }
    }

    async fn watch(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        let mut known = None;
        loop {
            let seen = match self.core.storages.of(member) {
                Ok(server) => server.access(&member.volume, known.as_ref()).await,
                Err(error) => Err(error),
            };
            match seen {
                Ok((_, record)) if record.coordinator_term > self.core.term => {
                    return self.reports.tell(Input::StaleTerm).await;
                }
                Ok((boot, record)) => {
                    let now = Some((boot, record.version));
                    if now != known {
                        let seen = record.seen(&self.row);
                        self.reports.tell(Input::Seen(place, seen, record.epoch)).await;
                    }
                    known = now;
                    patience = Patience::new();
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    async fn stand(&self, start: bool) {
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

    async fn order(&self, host: &str, what: &str, done: Input) {
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
    async fn end_source(&self) {
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
    async fn tell_winner(&self, host: &str, what: &str, done: Input) {
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
    async fn dismiss(&self) {
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

    async fn reclaim(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => {
                    server.reclaim(self.row.attempt(), &anchor.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(Reclaimed::Source(grant)) => {
                    return self.reports.tell(Input::Reclaimed(grant)).await;
                }
                Ok(Reclaimed::Lost) => return self.reports.tell(Input::ReclaimLost).await,
                Ok(Reclaimed::Foreign) => return self.reports.tell(Input::ReclaimForeign).await,
                Ok(Reclaimed::Unknown) => {
                    self.reports.tell(Input::ReclaimUnknown).await;
                    patience.wait(&self.reports, None).await;
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    async fn abdicate(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => {
                    server.abdicate(self.row.attempt(), &anchor.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(()) => return self.reports.tell(Input::Abdicated).await,
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    async fn prove(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => server.proof(self.row.attempt(), &anchor.volume).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(Some(grant)) => return self.reports.tell(Input::Proved(grant)).await,
                Ok(None) => patience.wait(&self.reports, None).await,
                // Settled before a restart of ours, and armed for another since.
                Err(error) if error.refusal() == "baton:no-such-handoff" => {
                    return self.reports.tell(Input::Settled(0, None)).await;
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    async fn settle(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(member) {
                Ok(server) => {
                    let proof = self.row.proof.as_ref();
                    server.settle(self.row.attempt(), proof, &member.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            fault_point::at("settle.sent");
            match answer {
                Ok(next_epoch) => {
                    if let Err(error) =
                        clients::keep_former_out(&self.core, &self.row, member).await
                    {
                        self.endure(&mut patience, error).await;
                        continue;
                    }
                    return self.reports.tell(Input::Settled(place, next_epoch)).await;
                }
                Err(error) => match error.refusal() {
                    // Fenced, or deleted: nothing is armed there.
                    "baton:no-such-handoff" | "baton:no-such-volume" => {
                        return self.reports.tell(Input::Settled(place, None)).await;
                    }
                    "baton:bad-proof" => return self.reports.tell(Input::ProofStale).await,
                    _ => self.endure(&mut patience, error).await,
                },
            }
        }
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

    /// Stops the loser's backend, and no other.
    async fn stop(&self, host: &str) {
        let Some(agent) = self.core.agents.of(host) else {
            return self.reports.tell(Input::LoserGone).await;
        };
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
