//! Keeps one backend running: starts it, watches it, starts it again.
//!
//! ```text
//!            start                first answer
//!  stopped ---------> starting ----------------> running
//!     ^                  |  ^                       |
//!     | stop             |  | pause over            | died, or hung and killed
//!     |                  |  +------ waiting <-------+
//!     +---- any          +--> failed: died before it ever answered, or said
//!                             that its configuration is wrong (exit code 2)
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_fault_point as fault_point;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::backoff::Backoff;
use super::control::{Control, ControlError};
use super::front_ends::FrontEnds;
use super::process::{ProcessId, Record};
use super::runner::{Ending, Launch, Process};
use super::watchdog::{Decision, Observation, Watchdog};
use super::{Role, Settings};

/// How often a backend that starts is asked whether it is there.
const STARTING_PERIOD: Duration = Duration::from_millis(20);
/// Exit code of the backend for wrong flags or configuration.
const EXIT_USAGE: i32 = 2;
/// For the last question to a backend that is to end.
const LAST_LOOK_LIMIT: Duration = Duration::from_millis(500);

/// What a backend's process does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Run {
    /// There is none, and none is wanted.
    #[default]
    Stopped,
    /// It runs and has not answered yet.
    Starting,
    /// It answers, or has.
    Running,
    /// It died and is started again soon.
    Waiting,
    /// It cannot be started; see the reason.
    Failed,
}

/// A backend's process, for a person.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendState {
    /// What it does.
    pub run: Run,
    /// How it was started; after a handoff storage knows better who owns.
    pub role: Option<Role>,
    /// Its process.
    pub pid: Option<i32>,
    /// It ran before this agent did.
    pub adopted: bool,
    /// Times it died and was started again.
    pub restarts: u64,
    /// Times it was killed because it hung.
    pub hung: u64,
    /// Why it failed or waits.
    pub reason: Option<String>,
}

#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) settings: Arc<Settings>,
    pub(super) front_ends: Arc<FrontEnds>,
    pub(super) launch: Mutex<Launch>,
    pub(super) state: watch::Sender<BackendState>,
    pub(super) stop: watch::Sender<bool>,
    /// The process that was stopped, and how its end was learned.
    pub(super) ended: Mutex<Option<(i32, Ending)>>,
}

impl Keeper {
    pub(super) fn launch(&self) -> Launch {
        self.launch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the next start is like; the process that runs is left alone.
    pub(super) fn set(&self, launch: Launch) {
        let mut now = self.launch.lock().unwrap_or_else(PoisonError::into_inner);
        self.take(&mut now, launch);
    }

    /// A backend that serves has had its try: whichever comes after it is no
    /// destination of that one, and may be the source of another.
    fn has_served(&self) {
        let mut now = self.launch.lock().unwrap_or_else(PoisonError::into_inner);
        if now.only_for.is_some() {
            let launch = Launch { only_for: None, ..now.clone() };
            self.take(&mut now, launch);
        }
    }

    fn take(&self, now: &mut Launch, launch: Launch) {
        if let Some(record) = Record::read(&self.settings.record(&launch.vm)) {
            let next = Record::of(record.process.clone(), &launch);
            if next != record {
                self.remember(&launch, &next);
            }
        }
        self.show(|state| state.role = Some(Role::of(launch.standby)));
        *now = launch;
    }

    fn show(&self, change: impl FnOnce(&mut BackendState)) {
        self.state.send_modify(change);
    }

    /// Until it is told to stop or cannot go on. `found` is a process of an agent
    /// before this one; `was_up` says that one answered once.
    pub(super) async fn keep(self: Arc<Self>, mut found: Option<ProcessId>, mut was_up: bool) {
        let mut backoff = Backoff::default();
        let mut stop = self.stop.subscribe();
        loop {
            let launch = self.launch();
            let adopted = found.is_some();
            let started = match found.take() {
                Some(process) => Ok(Process::other(process)),
                None => self.settings.manager.start(&launch).await,
            };
            let began = Instant::now();
            let died = match started {
                Err(error) => format!("cannot start {}: {error}", launch.program.display()),
                Ok(mut process) => {
                    if !adopted {
                        fault_point::at("backend.started");
                    }
                    self.note(&launch, &process, adopted);
                    process.begin().await;
                    let up = Mutex::new(false);
                    let hang = self.settings.hang;
                    let dog =
                        if adopted { Watchdog::of_adopted(hang) } else { Watchdog::new(hang) };
                    let watching = self.watch(&launch, process.id().cloned(), dog, &up);
                    let status = tokio::select! {
                        ending = process.ended() => ending.status(),
                        () = watching => None,
                        () = told(&mut stop) => {
                            self.end(&launch, &mut process).await;
                            return;
                        }
                    };
                    was_up |= up.into_inner().unwrap_or_else(PoisonError::into_inner);
                    if status.and_then(|status| status.code()) == Some(EXIT_USAGE) {
                        return self.fail(&launch, self.settings.manager.tail(&launch).await);
                    }
                    let tail = self.settings.manager.tail(&launch).await;
                    match status {
                        Some(status) => format!("it ended ({status}): {tail}"),
                        None => format!("it ended: {tail}"),
                    }
                }
            };
            if !was_up {
                return self.fail(&launch, died);
            }
            let pause = backoff.on_death(began.elapsed());
            tracing::warn!(vm = launch.vm, died, ?pause, "a backend ended; it is started again");
            self.show(|state| {
                state.run = Run::Waiting;
                state.pid = None;
                state.restarts += 1;
                state.reason = Some(died);
            });
            if tokio::time::timeout(pause, told(&mut stop)).await.is_ok() {
                self.forget(&launch);
                return self.show(|state| *state = BackendState::default());
            }
        }
    }

    fn note(&self, launch: &Launch, process: &Process, adopted: bool) {
        if let Some(process) = process.id() {
            self.remember(launch, &Record::of(process.clone(), launch));
        }
        self.show(|state| {
            state.run = Run::Starting;
            state.role = Some(Role::of(launch.standby));
            state.pid = process.id().map(|process| process.pid);
            state.adopted = adopted;
        });
    }

    /// For an agent after this one.
    fn remember(&self, launch: &Launch, record: &Record) {
        if let Err(error) = record.write(&self.settings.record(&launch.vm)) {
            // It runs; only an agent that restarts would not find it.
            tracing::error!(vm = launch.vm, %error, "cannot write the pid file of a backend");
        }
    }

    async fn end(&self, launch: &Launch, process: &mut Process) {
        // Who is at its disks now is left behind by it.
        let control = Control::new(launch.control.clone());
        if let Ok(status) = control.ask(&json!({"cmd": "status"}), LAST_LOOK_LIMIT).await {
            self.front_ends.hear(&launch.vm, &status);
        }
        let grace = self.settings.stop_grace;
        match self.settings.manager.stop(launch, process, grace).await {
            Ok(ending) => {
                fault_point::at("backend.stopped");
                let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
                *ended = process.id().map(|process| (process.pid, ending));
            }
            Err(error) => {
                tracing::error!(vm = launch.vm, %error, "cannot stop a backend");
                return self.show(|state| state.reason = Some(error.to_string()));
            }
        }
        self.forget(launch);
        self.show(|state| *state = BackendState::default());
    }

    fn fail(&self, launch: &Launch, reason: String) {
        tracing::error!(vm = launch.vm, reason, "a backend failed");
        self.forget(launch);
        self.show(|state| {
            state.run = Run::Failed;
            state.pid = None;
            state.reason = Some(reason);
        });
    }

    fn forget(&self, launch: &Launch) {
        Record::remove(&self.settings.record(&launch.vm));
    }

    /// Asks it for ever how it is; kills it when it hangs.
    async fn watch(
        &self,
        launch: &Launch,
        process: Option<ProcessId>,
        mut dog: Watchdog,
        up: &Mutex<bool>,
    ) {
        let hang = self.settings.hang;
        let control = Control::new(launch.control.clone());
        let mut period = STARTING_PERIOD;
        loop {
            let began = Instant::now();
            let answer = control.ask(&json!({"cmd": "status"}), Watchdog::period(hang)).await;
            if let Ok(status) = &answer {
                self.front_ends.hear(&launch.vm, status);
                if status["handoff"]["standing"] == "serving" {
                    self.has_served();
                }
                if let Some(heard) = &self.settings.heard {
                    let _ = heard.try_send((launch.vm.clone(), status.clone()));
                }
            }
            let seen = match answer {
                Ok(_) | Err(ControlError::Refused { .. }) => Observation::Answered,
                Err(ControlError::Silent { .. }) => Observation::Silent,
                Err(ControlError::Absent { .. } | ControlError::Broken { .. }) => {
                    Observation::Absent
                }
            };
            if seen == Observation::Answered && period == STARTING_PERIOD {
                period = Watchdog::period(hang);
                *up.lock().unwrap_or_else(PoisonError::into_inner) = true;
                self.show(|state| {
                    state.run = Run::Running;
                    state.reason = None;
                });
            }
            if let Decision::Kill { silent } = dog.on_probe(began, Instant::now(), seen) {
                tracing::error!(vm = launch.vm, ?silent, "a backend hangs; it is killed");
                self.show(|state| state.hung += 1);
                if let Err(error) = self.settings.manager.kill(launch, process.as_ref()).await {
                    tracing::error!(vm = launch.vm, %error, "cannot kill a backend that hangs");
                }
            }
            tokio::time::sleep(period).await;
        }
    }
}

/// Waits until it is told to stop.
async fn told(stop: &mut watch::Receiver<bool>) {
    // The sender lives as long as the keeper that waits here.
    let _ = stop.wait_for(|stop| *stop).await;
}
