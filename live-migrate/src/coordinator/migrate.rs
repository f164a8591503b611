//! Drives a whole migration: prepares, tells both machines what to do, cleans up.
//!
//! ```text
//!  prepare -> incoming -> precopy -> switch -> activate -> cleanup -> done
//!     |          |           |         |          |
//!     +----------+-----------+---------+----------+--> rolling-back -> rolled-back
//!     |          |           |         |          |
//!     +<- again -+-----------+---------+----------+ the source came back by itself
//! ```
//!
//! It believes neither machine: it goes on when the access records say so, and
//! resumes the source only when the anchor says that the source owns the volumes.
//! After a restart of the coordinator a migration that has not switched is rolled
//! back, one that has is watched to its end. When the guest resets on the way, its
//! backend takes the volumes back, and the migration is begun anew with another
//! machine at the destination (`plan/again.rs`).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::agents::{Agent, AgentError};
use super::core::{Core, unix_us};
use super::keeper::Handle;
use super::plan::{Input, Row, State, Trigger, Trouble, Winner};
use super::prepare::{Durability, PrepareHandoff};
use super::vm_view::VmView;

/// Between two looks at a machine.
const LOOK: Duration = Duration::from_millis(50);
/// Timing of the guest's I/O ends by itself; a copy of memory may take long.
const WATCH_S: u32 = 3600;
/// Guest I/O that is timed before the copy begins, and after the switch.
const WATCH_AROUND: Duration = Duration::from_secs(3);
/// Looks at a machine that failed in a row before it counts as lost.
const SILENT_MAX: u32 = 40;
/// For the seal by a process that came in place of another just before the machine stopped: the most that a drain takes on
/// storage that answers.
const NEXT_PROCESS: Duration = Duration::from_secs(5);

/// A migration to drive.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// A ULID; makes the request idempotent.
    pub id: String,
    /// Host that runs the VM; found if absent.
    pub from: Option<String>,
    /// Host that shall run it.
    pub to: String,
    /// Where the destination's monitor listens, `tcp:HOST:PORT` or `unix:PATH`;
    /// the configuration's `migration_uri` of that host if absent.
    pub uri: Option<String>,
    /// What is on disk during the switch.
    #[serde(default)]
    pub durability: Durability,
    /// How long it may take to become READY, such as `30s`.
    pub ready_timeout: Option<String>,
    /// Most bytes of memory a second.
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Time the guest's I/O before, during and after the switch, for a report;
    /// the migration then ends a little later.
    #[serde(default)]
    pub watch_io: bool,
}

impl MigrateVm {
    /// The handoff of it.
    #[must_use]
    pub fn handoff(&self) -> PrepareHandoff {
        PrepareHandoff {
            from: self.from.clone(),
            to: self.to.clone(),
            volumes: None,
            mode: Trigger::Implicit,
            durability: self.durability,
            ready_timeout: self.ready_timeout.clone(),
            labels: std::collections::BTreeMap::new(),
        }
    }

    /// What its row notes at first.
    ///
    /// # Errors
    /// No such host, or no address for its monitor.
    pub async fn note(&self, core: &Core, vm: &str) -> Result<Value, super::fault::Fault> {
        let agent = super::prepare::agent(core, vm, &self.to).await?;
        let uri = self.uri.clone().or_else(|| agent.host.migration_uri.clone()).ok_or_else(|| {
            super::fault::Fault::bad_request(format!(
                "where does the monitor on {} listen? Say `uri`, or set `migration_uri` of that host",
                self.to
            ))
        })?;
        let uri = uri.replace("{vm}", vm);
        Ok(json!({"step": "prepare", "uri": uri, "bandwidth": self.max_bandwidth_bytes_per_s,
            "watch_io": self.watch_io,
            "at_unix_us": {"prepare": unix_us()}}))
    }
}

/// Drives the migration of a row that notes one.
pub(super) fn drive(core: &Arc<Core>, handle: Handle, restarted: bool) {
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let mut restarted = restarted;
        loop {
            let attempt = handle.row().attempt;
            let driver = Driver { core: Arc::clone(&core), handle: handle.clone(), attempt };
            let Err(trouble) = driver.run(restarted).await else { return };
            if !driver.another().await {
                return driver.roll_back(trouble).await;
            }
            restarted = false;
        }
    });
}

struct Driver {
    core: Arc<Core>,
    handle: Handle,
    /// Which one it drives.
    attempt: u32,
}

/// Why it does not go on.
type Failed = Trouble;

impl Driver {
    fn row(&self) -> Arc<Row> {
        self.handle.row()
    }

    fn step(&self) -> String {
        let row = self.row();
        row.driven.as_ref().and_then(|note| note["step"].as_str()).unwrap_or_default().to_owned()
    }

    async fn run(&self, restarted: bool) -> Result<(), Failed> {
        let switched = matches!(self.step().as_str(), "switch" | "activate" | "cleanup");
        if restarted && !switched {
            Err(trouble(
                "the coordinator restarted before the switch, so the migration was rolled back",
            ))
        } else if restarted {
            self.watch_switch().await
        } else {
            self.begin().await
        }
    }

    /// Whether another attempt follows; the source's monitor is ready for it then.
    async fn another(&self) -> bool {
        let mut shown = self.handle.watch();
        let settled = |row: &Arc<Row>| row.attempt > self.attempt || !row.goes_again();
        if shown.wait_for(settled).await.is_err() || self.row().attempt == self.attempt {
            return false;
        }
        let Ok((source, destination)) = self.agents() else { return false };
        let vm = self.row().vm.clone();
        tracing::info!(vm, attempt = self.row().attempt, "the source came back; trying again");
        self.note("again", json!({"attempt": self.row().attempt})).await;
        for _ in 0..SILENT_MAX {
            match source.vm(&vm).await {
                Ok(view)
                    if matches!(
                        view.migration()["phase"].as_str(),
                        Some("none" | "failed" | "cancelled")
                    ) =>
                {
                    return true;
                }
                Ok(_) => {
                    self.cancel(source, destination, &vm).await;
                }
                Err(error) => tracing::warn!(%error, vm, "the source does not say how it is"),
            }
            tokio::time::sleep(LOOK * 4).await;
        }
        false
    }

    async fn begin(&self) -> Result<(), Failed> {
        let (source, destination) = self.agents()?;
        let vm = self.row().vm.clone();
        self.until(State::Ready).await?;
        self.watch_io(source, destination).await;
        self.note("incoming", json!({})).await;
        let uri = self.row().driven.as_ref().map_or(Value::Null, |note| note["uri"].clone());
        // Both sides must say the same.
        let view = source.vm(&vm).await.map_err(|error| error.trouble().clone())?;
        let pauses = view.can_pause();
        destination
            .monitor(&vm, "incoming", &json!({"uri": uri, "pause_before_switchover": pauses}))
            .await
            .map_err(|error| error.trouble().clone())?;
        self.note("precopy", json!({})).await;
        let bandwidth = self.row().driven.as_ref().map_or(Value::Null, |n| n["bandwidth"].clone());
        let outgoing = json!({"uri": uri, "pause_before_switchover": pauses,
            "max_bandwidth_bytes_per_s": bandwidth});
        source.monitor(&vm, "migrate", &outgoing).await.map_err(|error| error.trouble().clone())?;
        // The machine stops, its rings with it, and the backend seals by itself.
        let (mut silent, mut stopped, mut process) = (0, None, view.backend_pid());
        loop {
            self.still_on()?;
            // One that does not pause may be past it before we look.
            if self.row().winner == Some(Winner::Destination) {
                break;
            }
            match source.vm(&vm).await {
                Ok(view) => {
                    silent = 0;
                    match view.migration()["phase"].as_str().unwrap_or_default() {
                        "pre-switchover" if self.row().state.reached(State::Sealed) => break,
                        // Its backend died in the stop, and the next process of it knows of
                        // no rings that it could seal behind: the guest would stand still for ever.
                        "pre-switchover" => {
                            let since = *stopped.get_or_insert_with(tokio::time::Instant::now);
                            let limit = self.core.config.switch_timeout;
                            if view.backend_pid() != process
                                && since.elapsed() > NEXT_PROCESS.min(limit)
                            {
                                return Err(trouble(
                                    "the source's backend ended while its machine stopped, and the next one has nothing to seal",
                                ));
                            }
                            if since.elapsed() > limit {
                                return Err(trouble(
                                    "the source's machine stopped, but its backend did not seal the volumes in time",
                                ));
                            }
                        }
                        "failed" | "cancelled" => return Err(failed(&view)),
                        // Without the pause it may be past it already.
                        "completed" | "device" => break,
                        _ => process = view.backend_pid(),
                    }
                }
                Err(error) => self.lost(&mut silent, &error)?,
            }
            tokio::time::sleep(LOOK).await;
        }
        self.note("switch", json!({})).await;
        if pauses {
            source
                .monitor(&vm, "continue", &json!({}))
                .await
                .map_err(|error| error.trouble().clone())?;
        }
        self.watch_switch().await
    }

    async fn watch_switch(&self) -> Result<(), Failed> {
        let (source, destination) = self.agents()?;
        let vm = self.row().vm.clone();
        self.note("activate", json!({})).await;
        let deadline = tokio::time::Instant::now() + self.core.config.switch_timeout;
        let mut let_go = tokio::time::Instant::now();
        loop {
            self.still_on()?;
            if self.row().winner == Some(Winner::Destination) {
                break;
            }
            match source.vm(&vm).await {
                Ok(view) => match view.migration()["phase"].as_str().unwrap_or_default() {
                    "failed" | "cancelled" => return Err(failed(&view)),
                    // The order to go on was lost with the coordinator before us.
                    "pre-switchover" if let_go.elapsed() > Duration::from_secs(1) => {
                        let_go = tokio::time::Instant::now();
                        let _ = source.monitor(&vm, "continue", &json!({})).await;
                    }
                    _ => {}
                },
                Err(error) => tracing::warn!(%error, vm, "the source does not say how it is"),
            }
            if tokio::time::Instant::now() > deadline {
                return Err(trouble("the destination did not run in time after the switch"));
            }
            tokio::time::sleep(LOOK).await;
        }
        // From here on the destination owns the volumes; nothing is rolled back.
        let mut runs = false;
        while !runs && tokio::time::Instant::now() < deadline {
            runs = destination.vm(&vm).await.is_ok_and(|view| view.run() == "running");
            if !runs {
                tokio::time::sleep(LOOK).await;
            }
        }
        let mut report = self.report(source, destination).await;
        self.note("cleanup", json!({"report": report.clone(), "destination_runs": runs})).await;
        if let Err(error) = source.monitor(&vm, "quit", &json!({})).await {
            tracing::warn!(%error, vm, "the source's machine could not be ended");
        }
        let _ = self.handle.ask(Input::Finish).await;
        self.over().await;
        if self.watches_io() {
            tokio::time::sleep(WATCH_AROUND).await;
            report["destination"]["latency"] = slices(destination, &vm).await;
        }
        self.note("done", json!({"report": report})).await;
        Ok(())
    }

    async fn roll_back(&self, why: Trouble) {
        let row = self.row();
        self.note("rolling-back", json!({"error": why})).await;
        let _ = self.handle.ask(Input::Cancel).await;
        // Nobody is told anything before the anchor has spoken.
        let mut shown = self.handle.watch();
        let decided = |row: &Arc<Row>| row.winner.is_some() || row.state.is_over();
        if shown.wait_for(decided).await.is_err() {
            return;
        }
        let outcome = self.row().outcome();
        if let (Ok((source, destination)), Some(Winner::Source)) = (self.agents(), outcome) {
            self.cancel(source, destination, &row.vm).await;
            self.resume(source, &row.vm).await;
        }
        if outcome == Some(Winner::Destination) {
            let _ = self.handle.ask(Input::Finish).await;
        }
        self.over().await;
        let step = if outcome == Some(Winner::Destination) { "done" } else { "rolled-back" };
        self.note(step, json!({})).await;
    }

    /// Ends the copy of memory. A monitor without a cancel gives up when the other
    /// side is gone, and its machine, which the source owns, goes on.
    async fn cancel(&self, source: &Agent, destination: &Agent, vm: &str) {
        if let Err(AgentError::Refused { trouble, .. }) =
            source.monitor(vm, "cancel", &json!({})).await
            && trouble.kind == "baton:vmm-unsupported"
            && let Err(error) = destination.monitor(vm, "quit", &json!({})).await
        {
            tracing::warn!(%error, vm, "the destination's machine was not ended");
        }
    }

    /// The source owns the volumes: it shall run again.
    async fn resume(&self, source: &Agent, vm: &str) {
        for _ in 0..SILENT_MAX {
            match source.vm(vm).await {
                Ok(view) if matches!(view.run(), "running" | "gone" | "shutdown") => return,
                Ok(_) => {
                    if let Err(error) = source.monitor(vm, "resume", &json!({})).await {
                        tracing::warn!(%error, vm, "the source was not resumed; trying again");
                    }
                }
                Err(error) => tracing::warn!(%error, vm, "the source does not say how it is"),
            }
            tokio::time::sleep(LOOK * 4).await;
        }
        tracing::error!(vm, "the source owns its volumes but could not be resumed");
    }

    /// What the backends measured, before one of them is stopped.
    async fn report(&self, source: &Agent, destination: &Agent) -> Value {
        let vm = self.row().vm.clone();
        let latency = if self.watches_io() { slices(source, &vm).await } else { Value::Null };
        let (source, destination) = tokio::join!(source.vm(&vm), destination.vm(&vm));
        let side = |view: Result<VmView, AgentError>| match view {
            Ok(view) => {
                let handoff = view.handoff();
                json!({"timings": handoff["timings"], "events": handoff["events"],
                    "migration": view.migration()})
            }
            Err(error) => json!({"error": error.to_string()}),
        };
        let mut source = side(source);
        source["latency"] = latency;
        json!({"source": source, "destination": side(destination)})
    }

    fn watches_io(&self) -> bool {
        self.row().driven.as_ref().is_some_and(|note| note["watch_io"] == true)
    }

    /// Has the backends time the guest's I/O, a little before anything happens.
    async fn watch_io(&self, source: &Agent, destination: &Agent) {
        if !self.watches_io() {
            return;
        }
        let vm = self.row().vm.clone();
        for agent in [source, destination] {
            if let Err(error) = agent.latency(&vm, WATCH_S).await {
                tracing::warn!(%error, vm, "the guest's I/O is not timed");
            }
        }
        tokio::time::sleep(WATCH_AROUND).await;
    }

    fn agents(&self) -> Result<(&Agent, &Agent), Failed> {
        let row = self.row();
        let of = |host: &str| {
            self.core.agents.of(host).ok_or_else(|| Trouble {
                kind: "baton:unknown-host".to_owned(),
                detail: format!("host `{host}` is not in the configuration any more"),
            })
        };
        Ok((of(&row.from)?, of(&row.to)?))
    }

    async fn until(&self, state: State) -> Result<(), Failed> {
        let mut shown = self.handle.watch();
        let reached = |row: &Arc<Row>| {
            row.state.reached(state) || row.back.is_some() || row.attempt != self.attempt
        };
        shown.wait_for(reached).await.map_err(|_| trouble("the coordinator is going away"))?;
        self.still_on()
    }

    /// The handoff is over when every member knows.
    async fn over(&self) {
        let mut shown = self.handle.watch();
        let _ = shown.wait_for(|row| row.is_over()).await;
    }

    fn still_on(&self) -> Result<(), Failed> {
        let row = self.row();
        let taken_back = || {
            trouble("the source's machine was stopped and started again before the destination ran")
        };
        if row.attempt != self.attempt {
            return Err(taken_back());
        }
        match &row.back {
            None if row.fenced => Err(trouble("the volumes were fenced")),
            None => Ok(()),
            Some(_) if row.winner == Some(Winner::Destination) => Ok(()),
            Some(super::plan::Because::Failed(trouble)) => Err(trouble.clone()),
            Some(super::plan::Because::Cancelled) => Err(trouble("somebody cancelled it")),
            Some(super::plan::Because::TakenBack) => Err(taken_back()),
        }
    }

    fn lost(&self, silent: &mut u32, error: &AgentError) -> Result<(), Failed> {
        *silent += 1;
        if *silent > SILENT_MAX { Err(error.trouble().clone()) } else { Ok(()) }
    }

    /// Notes how far it is; tried again by the next note if the journal fails.
    async fn note(&self, step: &str, more: Value) {
        let mut note = self.row().driven.clone().unwrap_or_else(|| json!({}));
        note["step"] = step.into();
        note["at_unix_us"][step] = unix_us().into();
        if let (Some(note), Value::Object(more)) = (note.as_object_mut(), more) {
            note.extend(more);
        }
        if let Err(error) = self.handle.ask(Input::Driven(note)).await {
            tracing::error!(%error, step, "a step of a migration is not in the journal");
        }
    }
}

/// What a backend timed, by disk; null when it does not say.
async fn slices(agent: &Agent, vm: &str) -> Value {
    agent.latency(vm, 0).await.map_or(Value::Null, |answer| answer["disks"].clone())
}

fn trouble(detail: &str) -> Trouble {
    Trouble { kind: "baton:migration-failed".to_owned(), detail: detail.to_owned() }
}

fn failed(view: &VmView) -> Trouble {
    let migration = view.migration();
    let error = migration["error"].as_str().unwrap_or("it gives no reason");
    trouble(&format!(
        "the source's monitor says {}: {error}",
        migration["phase"].as_str().unwrap_or("failed")
    ))
}
