//! What all of the coordinator shares: its term, its journal, who can be called,
//! and the handoffs that are kept.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use baton_protocol::handoff::HandoffId;
use serde_json::Value;
use tokio::sync::watch;

use super::agents::{AgentError, Agents};
use super::config::{Config, Keep};
use super::journal::{Change, Journal, JournalError};
use super::keeper::{self, Handle};
use super::plan::{Row, State, Trouble};
use super::storages::Storages;
use super::vm_view::VmView;

/// Rows kept after their end; the oldest go first.
const ROWS_MAX: usize = 2_000;
/// Rows taken out with one write.
const FORGET_MAX: usize = 100;
/// Places where requests about one VM wait for each other.
const STRIPES: usize = 64;

/// The shared part.
#[derive(Debug)]
pub struct Core {
    /// As started.
    pub config: Config,
    /// Of this start; what a lower one says is refused by every server.
    pub term: u64,
    /// Written first.
    pub journal: Journal,
    /// Storage servers.
    pub storages: Storages,
    /// Hosts.
    pub agents: Agents,
    /// Counted.
    pub metrics: Counters,
    handoffs: Mutex<Handoffs>,
    vms: Mutex<HashMap<String, Value>>,
    stripes: [tokio::sync::Mutex<()>; STRIPES],
    down: watch::Sender<Option<Down>>,
}

/// Why a coordinator must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Down {
    /// For people.
    pub why: &'static str,
    /// It may be started again: it follows then.
    pub again: bool,
}

#[derive(Debug, Default)]
struct Handoffs {
    by_id: HashMap<HandoffId, Handle>,
    latest: HashMap<String, HandoffId>,
}

/// For `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    reached: [AtomicU64; State::ALL.len()],
    /// Requests answered with a problem.
    pub problems: AtomicU64,
    /// VMs fenced.
    pub fences: AtomicU64,
}

impl Counters {
    pub(super) fn reached(&self, state: State) {
        if let Some(place) = State::ALL.iter().position(|known| *known == state) {
            self.reached[place].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often a state was reached since the start.
    pub fn all_reached(&self) -> impl Iterator<Item = (State, u64)> {
        State::ALL.into_iter().zip(self.reached.iter().map(|count| count.load(Ordering::Relaxed)))
    }
}

impl Core {
    pub(super) fn new(
        config: Config,
        term: u64,
        journal: Journal,
        (storages, agents): (Storages, Agents),
        vms: HashMap<String, Value>,
    ) -> Self {
        Self {
            config,
            term,
            journal,
            storages,
            agents,
            metrics: Counters::default(),
            handoffs: Mutex::default(),
            vms: Mutex::new(vms),
            stripes: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            down: watch::channel(None).0,
        }
    }

    /// Ends the whole coordinator: another has taken over.
    pub(super) fn step_down(&self, why: &'static str) {
        let again = matches!(self.config.journal, Keep::Etcd(_));
        self.down.send_replace(Some(Down { why, again }));
    }

    /// Why it must end, once it must.
    #[must_use]
    pub fn down(&self) -> watch::Receiver<Option<Down>> {
        self.down.subscribe()
    }

    /// One request at a time about a VM.
    pub(super) async fn turn(&self, vm: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        vm.hash(&mut hasher);
        let stripe = usize::try_from(hasher.finish() % STRIPES as u64).unwrap_or(0);
        self.stripes[stripe].lock().await
    }

    /// Begins to keep a handoff.
    ///
    /// # Errors
    /// The journal did not take it; nothing was started.
    pub(super) async fn keep(self: &Arc<Self>, row: Row) -> Result<Handle, keeper::AskError> {
        let (id, vm) = (row.id, row.vm.clone());
        let handle = keeper::keep(self, row).await?;
        let forget = {
            let mut all = self.handoffs.lock().unwrap_or_else(PoisonError::into_inner);
            all.by_id.insert(id, handle.clone());
            let current = all.latest.get(&vm).and_then(|id| all.by_id.get(id));
            let newer = current.is_none_or(|current| {
                current.row().created_unix_us <= handle.row().created_unix_us
            });
            if newer {
                all.latest.insert(vm, id);
            }
            all.surplus()
        };
        // A transaction of etcd has a limit.
        for forget in forget.chunks(FORGET_MAX) {
            let change = Change { forget: forget.to_vec(), ..Change::default() };
            if let Err(error) = self.journal.write(change).await {
                tracing::warn!(%error, "old handoffs stay in the journal");
            }
        }
        Ok(handle)
    }

    /// A handoff.
    #[must_use]
    pub fn handoff(&self, id: HandoffId) -> Option<Handle> {
        let all = self.handoffs.lock().unwrap_or_else(PoisonError::into_inner);
        all.by_id.get(&id).cloned()
    }

    /// The last handoff of a VM.
    #[must_use]
    pub fn latest(&self, vm: &str) -> Option<Handle> {
        let all = self.handoffs.lock().unwrap_or_else(PoisonError::into_inner);
        all.by_id.get(all.latest.get(vm)?).cloned()
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn rows(&self) -> Vec<Arc<Row>> {
        let mut rows: Vec<_> = {
            let all = self.handoffs.lock().unwrap_or_else(PoisonError::into_inner);
            all.by_id.values().map(Handle::row).collect()
        };
        rows.sort_by_key(|row| (row.created_unix_us, row.id));
        rows
    }

    /// What a VM is, for another host.
    pub(super) async fn definition(&self, vm: &str, from: &str) -> Result<Value, AgentError> {
        if let Some(agent) = self.agents.of(from)
            && let Ok(view) = agent.vm(vm).await
        {
            return Ok(view.portable());
        }
        self.remembered(vm).map(|view| view.portable()).ok_or_else(|| {
            AgentError::Unreachable(Trouble {
                kind: "baton:agent-unreachable".to_owned(),
                detail: format!("the agent of {from} does not say what VM `{vm}` is"),
            })
        })
    }

    /// The VM as some agent told it last; it may be long ago.
    #[must_use]
    pub fn remembered(&self, vm: &str) -> Option<VmView> {
        let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        vms.get(vm).cloned().map(VmView)
    }

    /// Keeps what an agent told of a VM, so that it can be fenced when its host
    /// is dead.
    ///
    /// # Errors
    /// The journal did not take it.
    pub(super) async fn remember(&self, view: &VmView) -> Result<(), JournalError> {
        let (name, portable) = (view.name().to_owned(), view.portable());
        {
            let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
            if vms.get(&name) == Some(&portable) || view.disks().is_empty() {
                return Ok(());
            }
        }
        let change = Change { vm: Some((name.clone(), portable.clone())), ..Change::default() };
        self.journal.write(change).await?;
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(name, portable);
        Ok(())
    }

    /// Names of all VMs ever heard of.
    #[must_use]
    pub fn known_vms(&self) -> Vec<String> {
        let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<_> = vms.keys().cloned().collect();
        names.sort_unstable();
        names
    }
}

impl Handoffs {
    /// Takes out those that are over and too many, oldest first; their ids.
    fn surplus(&mut self) -> Vec<String> {
        // A few at a time, so that not every new one looks at all.
        if self.by_id.len() < ROWS_MAX + ROWS_MAX / 10 {
            return Vec::new();
        }
        let mut over: Vec<Arc<Row>> =
            self.by_id.values().map(Handle::row).filter(|row| row.is_over()).collect();
        over.sort_by_key(|row| row.created_unix_us);
        over.truncate(self.by_id.len() - ROWS_MAX);
        for row in &over {
            self.by_id.remove(&row.id);
            if self.latest.get(&row.vm) == Some(&row.id) {
                self.latest.remove(&row.vm);
            }
        }
        over.iter().map(|row| row.id.to_string()).collect()
    }
}

/// Now, for people and logs.
pub(super) fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
