//! Backends of this host: at most one for each VM, started and stopped on
//! demand, started again when they die, killed when they hang, and found again
//! when the agent itself was restarted.
//!
//! Knows nothing of volumes or handoffs. A restart is always safe: storage
//! decides who may write, and the guest's requests wait meanwhile.

mod backoff;
pub mod control;
mod front_ends;
mod keeper;
mod process;
mod runner;
pub mod watchdog;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_protocol::handoff::Try;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use utoipa::ToSchema;

use crate::problem::found_no_room;

use front_ends::FrontEnds;
use keeper::Keeper;
pub use keeper::{BackendState, Run};
use process::Record;
pub(crate) use runner::Ending;
pub use runner::{Launch, Manager};

/// How a backend starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Claims its volumes.
    Owner,
    /// Claims nothing and waits for a handoff.
    Standby,
}

impl Role {
    fn of(standby: bool) -> Self {
        if standby { Self::Standby } else { Self::Owner }
    }
}

/// How backends are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// By whom.
    pub manager: Manager,
    /// Pid files; survives the agent, not the host.
    pub state_dir: PathBuf,
    /// To answer for the first time.
    pub start_limit: Duration,
    /// To end when asked, before it is killed.
    pub stop_grace: Duration,
    /// Silence after which it is killed.
    pub hang: Duration,
    /// Gets each status a backend gives, unread, with its VM's name. What does
    /// not fit is left out: the next one follows.
    pub heard: Option<mpsc::Sender<(String, Value)>>,
}

impl Settings {
    fn record(&self, vm: &str) -> PathBuf {
        self.state_dir.join(format!("{vm}.backend.json"))
    }
}

/// Why a backend does not run as it was told.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// It could not be started, or died at its start.
    #[error("the backend of {vm} does not start: {reason}")]
    Failed {
        /// Whose.
        vm: String,
        /// Its last words.
        reason: String,
    },
    /// It runs and does not answer yet.
    #[error("the backend of {vm} runs but did not answer within {} ms; it goes on starting: is its storage reachable?", after.as_millis())]
    Slow {
        /// Whose.
        vm: String,
        /// How long it had.
        after: Duration,
    },
    /// It would run, and an agent after this one would not know.
    #[error("no room to remember the backend of {vm} in {}", path.display())]
    Full {
        /// Whose.
        vm: String,
        /// Where.
        path: PathBuf,
    },
    /// A backend that waits for a machine would be found by one that must not run.
    #[error(
        "process {pid} ({name}) was at the disks of {vm} before and still runs on this host: a machine of an earlier try, with memory that is out of date, and the VM is another host's; end process {pid}, then begin again"
    )]
    EarlierMachine {
        /// Whose.
        vm: String,
        /// Which process.
        pid: i32,
        /// Its program.
        name: String,
    },
    /// It could not be stopped.
    #[error("the backend of {vm} cannot be stopped: {reason}")]
    Stuck {
        /// Whose.
        vm: String,
        /// Why.
        reason: String,
    },
}

#[derive(Debug)]
struct Kept {
    keeper: Arc<Keeper>,
    task: JoinHandle<()>,
    /// The task did all it will.
    over: watch::Receiver<bool>,
}

/// A backend that is being started.
#[derive(Debug)]
pub(crate) struct Started {
    vm: String,
    state: watch::Receiver<BackendState>,
    after: Duration,
}

impl Started {
    /// Until it answers.
    ///
    /// # Errors
    /// [`SuperviseError`].
    pub(crate) async fn wait(self) -> Result<BackendState, SuperviseError> {
        let Self { vm, mut state, after } = self;
        let settled =
            state.wait_for(|state| matches!(state.run, Run::Running | Run::Failed | Run::Stopped));
        match tokio::time::timeout(after, settled).await {
            Ok(Ok(state)) if state.run == Run::Running => Ok(state.clone()),
            Ok(Ok(state)) => {
                let reason =
                    state.reason.clone().unwrap_or_else(|| "it was stopped meanwhile".to_owned());
                Err(SuperviseError::Failed { vm, reason })
            }
            Ok(Err(_)) | Err(_) => Err(SuperviseError::Slow { vm, after }),
        }
    }
}

/// All backends of this host. Dropping it leaves them running.
#[derive(Debug)]
pub struct Supervisor {
    settings: Arc<Settings>,
    front_ends: Arc<FrontEnds>,
    kept: Mutex<HashMap<String, Kept>>,
}

impl Supervisor {
    /// Keeps none yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let front_ends = Arc::new(FrontEnds::new(settings.state_dir.clone()));
        Self { settings: Arc::new(settings), front_ends, kept: Mutex::default() }
    }

    /// What the backend of a VM does.
    pub fn state(&self, vm: &str) -> BackendState {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(vm).map_or_else(BackendState::default, |kept| kept.keeper.state.borrow().clone())
    }

    /// How the backend of a VM was started by an agent before this one, on this boot of
    /// the host; and for which try, if it stands by for one only.
    #[must_use]
    pub fn remembered(&self, vm: &str) -> Option<(Role, Option<Try>)> {
        let record = Record::read(&self.settings.record(vm))?;
        let only_for = record.only_for.and_then(|attempt| attempt.parse().ok());
        record.process.is_of_this_boot().then_some((Role::of(record.standby), only_for))
    }

    /// Takes over a backend that [is remembered](Self::remembered): keeps the
    /// process if it still runs, else starts it again.
    pub fn adopt(&self, launch: Launch) {
        let found = self.found(&launch.vm);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.get(&launch.vm).is_none_or(|kept| *kept.over.borrow()) {
            tracing::info!(vm = launch.vm, runs = found.is_some(), "a backend is taken over");
            self.keep(&mut kept, launch, found, true);
        }
    }

    /// Starts a backend and waits until it answers. One that runs already is left
    /// alone; the role counts when it starts the next time. A new one that waits
    /// for a machine is not started while one from before is left.
    ///
    /// # Errors
    /// [`SuperviseError`].
    pub async fn start(&self, launch: Launch) -> Result<BackendState, SuperviseError> {
        self.begin(launch)?.wait().await
    }

    /// [`Self::start`] without the wait: from now on it is kept, and can be stopped.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn begin(&self, launch: Launch) -> Result<Started, SuperviseError> {
        let vm = launch.vm.clone();
        if !self.is_kept(&vm) && self.found(&vm).is_none() {
            self.may_begin(&launch)?;
        }
        let state = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            match kept.get(&vm) {
                Some(Kept { keeper, over, .. }) if !*over.borrow() => {
                    keeper.set(launch);
                    keeper.state.subscribe()
                }
                _ => {
                    // One that could not be stopped, or that nobody took over.
                    let found = self.found(&vm);
                    let was_up = found.is_some();
                    self.keep(&mut kept, launch, found, was_up)
                }
            }
        };
        Ok(Started { vm, state, after: self.settings.start_limit })
    }

    /// How the backend of a VM is started the next time, while it is kept running.
    pub(crate) fn launch_of(&self, vm: &str) -> Option<Launch> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(vm).filter(|kept| !*kept.over.borrow()).map(|kept| kept.keeper.launch())
    }

    /// Stops a backend and waits until it is gone. None is stopped already.
    ///
    /// # Errors
    /// [`SuperviseError::Stuck`]; it runs then.
    pub async fn stop(&self, vm: &str) -> Result<(), SuperviseError> {
        self.end(vm).await.map(drop)
    }

    /// [`Self::stop`], with the process that was stopped and how its end was learned.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn end(&self, vm: &str) -> Result<Option<(i32, Ending)>, SuperviseError> {
        let (keeper, mut over) = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(Kept { keeper, over, .. }) = kept.get(vm) else { return Ok(None) };
            keeper.stop.send_replace(true);
            (Arc::clone(keeper), over.clone())
        };
        // An error is a task that was aborted, which is over, too.
        let _ = over.wait_for(|over| *over).await;
        let state = keeper.state.borrow().clone();
        match (state.pid, state.reason) {
            (Some(_), Some(reason)) => Err(SuperviseError::Stuck { vm: vm.to_owned(), reason }),
            _ => Ok(*keeper.ended.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    /// Whether a backend may be started where there is none.
    fn may_begin(&self, launch: &Launch) -> Result<(), SuperviseError> {
        let vm = launch.vm.clone();
        if launch.standby {
            self.no_machine_is_left(&vm)?;
        }
        let path = self.settings.record(&vm);
        match Record::make_room(&path) {
            Err(error) if found_no_room(&error) => Err(SuperviseError::Full { vm, path }),
            // Whatever else there is to say is said when it is written.
            _ => Ok(()),
        }
    }

    /// Of those that were at the VM's disks here.
    ///
    /// # Errors
    /// [`SuperviseError::EarlierMachine`].
    pub(crate) fn no_machine_is_left(&self, vm: &str) -> Result<(), SuperviseError> {
        let Some(left) = self.front_ends.left(vm) else { return Ok(()) };
        let (vm, pid, name) = (vm.to_owned(), left.process.pid, left.name);
        Err(SuperviseError::EarlierMachine { vm, pid, name })
    }

    /// Somebody keeps one running, also while it is down between two lives: whoever
    /// is at its disks belongs there.
    fn is_kept(&self, vm: &str) -> bool {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(vm).is_some_and(|kept| !*kept.over.borrow())
    }

    /// The process that a record names, if it runs.
    fn found(&self, vm: &str) -> Option<process::ProcessId> {
        let record = Record::read(&self.settings.record(vm))?;
        Some(record.process).filter(process::ProcessId::runs)
    }

    fn keep(
        &self,
        kept: &mut HashMap<String, Kept>,
        launch: Launch,
        found: Option<process::ProcessId>,
        was_up: bool,
    ) -> watch::Receiver<BackendState> {
        let vm = launch.vm.clone();
        let starting = BackendState { run: Run::Starting, ..BackendState::default() };
        let keeper = Arc::new(Keeper {
            settings: Arc::clone(&self.settings),
            front_ends: Arc::clone(&self.front_ends),
            launch: Mutex::new(launch),
            state: watch::Sender::new(starting),
            stop: watch::Sender::new(false),
            ended: Mutex::default(),
        });
        let state = keeper.state.subscribe();
        let (ended, over) = watch::channel(false);
        let keeping = Arc::clone(&keeper).keep(found, was_up);
        let task = tokio::spawn(async move {
            keeping.await;
            ended.send_replace(true);
        });
        kept.insert(vm, Kept { keeper, task, over });
        state
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
        for Kept { task, .. } in kept.values() {
            task.abort();
        }
    }
}
