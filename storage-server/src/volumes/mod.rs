//! The volumes as the server runs them: the store's volume, its access record
//! and gate, who is connected, and news. Does not know sockets or HTTP.
//!
//! | module | noun |
//! |---|---|
//! | [`running`] | one volume as it is served |
//! | [`change`] | a change of its access record: the one place that applies a step |
//! | [`request`] | what may be asked of the record, with its names owned |
//! | [`seal`] | SEAL, which waits for what the source sent |
//! | [`keeper`] | access records on disk: at once, or soon |
//! | [`audit`] | the last changes of a record, for people |
//! | [`seat`] | a place for one connection of a queue, and its window |
//! | [`events`] | news for EVENT requests |
//! | `quiet` | news that nobody waits for |
//! | [`incarnations`] | which process of an owner name came last |

mod audit;
mod change;
mod events;
mod incarnations;
mod keeper;
mod quiet;
mod request;
mod running;
mod seal;
mod seat;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use baton_protocol::access::{Phase, RecordError};
use baton_protocol::{AccessMode, EventKind, VolumeId};

use crate::metrics::AccessMetrics;
use crate::store::{Store, VolumeError};

use keeper::Keeper;
use quiet::Quiet;

pub use audit::Entry;
pub use change::{Begun, ChangeError, Control};
pub use events::Events;
pub use incarnations::Incarnations;
pub use request::{Asker, Request, SeenOwner};
pub use running::{Connection, Ears, RunningVolume};
pub use seal::{Arrivals, SealWait, Sealing};
pub use seat::{Killer, Lease, NoSeat, Seat};

/// Most queues of one session. A client needs one per virtqueue and one more.
pub const QUEUES_MAX: usize = 512;

/// Has a worker look at a volume's parked requests, after something was published.
pub type Announce = Arc<dyn Fn(usize, VolumeId) + Send + Sync>;

/// Tells workers that there is something to look at.
#[derive(Clone)]
pub(crate) struct Announcer {
    slots: usize,
    announce: Announce,
}

impl Announcer {
    pub(crate) fn to_all(&self, volume: VolumeId) {
        (0..self.slots).for_each(|worker| self.to(worker, volume));
    }

    pub(crate) fn to(&self, worker: usize, volume: VolumeId) {
        (self.announce)(worker, volume);
    }
}

/// What all volumes of a server share.
pub(crate) struct Common {
    pub(crate) store: Arc<Store>,
    /// This incarnation of the server.
    pub(crate) boot_id: u64,
    pub(crate) announce: Announcer,
    pub(crate) quiet: Arc<Quiet>,
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) metrics: Arc<AccessMetrics>,
}

/// All volumes of the server.
pub struct Volumes {
    common: Arc<Common>,
    slots: usize,
    running: RwLock<BTreeMap<String, Arc<RunningVolume>>>,
    /// Serializes creating and deleting.
    changes: Arc<tokio::sync::Mutex<()>>,
}

/// Why the volumes could not be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "the access record of volume `{name}` cannot be used; restore the data directory from a copy"
)]
pub struct DamagedRecord {
    name: String,
    source: RecordError,
}

/// Why a volume could not be deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Somebody uses it.
    #[error("volume `{name}` is in use by {who}; {remedy}")]
    InUse {
        /// The volume.
        name: String,
        /// The clients.
        who: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The store's reason.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The server is stopping.
    #[error("the server is going away")]
    Stopped,
}

impl Volumes {
    /// Serves what the store has. `slots` is the number of threads that admit
    /// requests. Inside a runtime.
    ///
    /// # Errors
    /// [`DamagedRecord`] when an access record cannot be read.
    pub fn new(
        store: Arc<Store>,
        slots: usize,
        boot_id: u64,
        announce: Announce,
    ) -> Result<Self, DamagedRecord> {
        let metrics = Arc::new(AccessMetrics::default());
        let keeper = Arc::new(Keeper::new(Arc::<Store>::clone(&store), Arc::clone(&metrics)));
        let announce = Announcer { slots, announce };
        let quiet = Arc::new(Quiet::new(announce.clone()));
        let common = Arc::new(Common { store, boot_id, announce, quiet, keeper, metrics });
        let mut running = BTreeMap::new();
        for info in common.store.list() {
            let Some(data) = common.store.volume(&info.name) else { continue };
            let volume = RunningVolume::new(Arc::clone(&common), data, slots)
                .map_err(|source| DamagedRecord { name: info.name.clone(), source })?;
            running.insert(info.name, Arc::new(volume));
        }
        Ok(Self { common, slots, running: RwLock::new(running), changes: Arc::default() })
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.common.store
    }

    /// This incarnation of the server.
    #[must_use]
    pub fn boot_id(&self) -> u64 {
        self.common.boot_id
    }

    /// What changes of access records are counted in.
    #[must_use]
    pub fn metrics(&self) -> &AccessMetrics {
        &self.common.metrics
    }

    /// Writes what was to be written soon; for the end of the server.
    pub fn keep_all(&self) {
        self.common.keeper.drain();
    }

    /// The volume of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<RunningVolume>> {
        self.running.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All volumes, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<RunningVolume>> {
        self.running.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// The store's reason.
    pub async fn create(
        self: &Arc<Self>,
        name: String,
        size_bytes: u64,
    ) -> Result<Arc<RunningVolume>, CreateError> {
        let changes = Arc::clone(&self.changes).lock_owned().await;
        let volumes = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _changes = changes;
            let info = volumes.common.store.create_volume(&name, size_bytes)?;
            let data = volumes.common.store.volume(&info.name).ok_or(CreateError::Stopped)?;
            let common = Arc::clone(&volumes.common);
            let volume = RunningVolume::new(common, data, volumes.slots)
                .map_err(|_| CreateError::Stopped)?;
            let volume = Arc::new(volume);
            let mut running = volumes.running.write().unwrap_or_else(PoisonError::into_inner);
            running.insert(info.name, Arc::clone(&volume));
            Ok(volume)
        })
        .await
        .map_err(|_| CreateError::Stopped)?
    }

    /// Grows a volume and tells its clients.
    ///
    /// # Errors
    /// The store's reason.
    pub async fn resize(&self, name: &str, size_bytes: u64) -> Result<(), CreateError> {
        let volume = self.get(name).ok_or_else(|| VolumeError::NotFound { name: name.into() })?;
        // Held so that a deletion and a resize do not cross.
        let control = volume.control().await;
        let store = Arc::clone(&self.common.store);
        tokio::task::spawn_blocking(move || {
            let _control = control;
            let before = volume.data.size_bytes();
            let info = store.resize_volume(volume.data.name(), size_bytes)?;
            if info.size_bytes != before {
                volume.publish(EventKind::Resized, info.size_bytes);
            }
            Ok(())
        })
        .await
        .map_err(|_| CreateError::Stopped)?
    }

    /// Deletes a volume nobody uses. `force` does not mind read-only and standby
    /// connections; an owner must be fenced first.
    ///
    /// # Errors
    /// [`DeleteError`]; the volume is still there.
    pub async fn delete(self: &Arc<Self>, name: &str, force: bool) -> Result<(), DeleteError> {
        let changes = Arc::clone(&self.changes).lock_owned().await;
        let volume = self.get(name).ok_or_else(|| VolumeError::NotFound { name: name.into() })?;
        let control = volume.control().await;
        let record = &control.record;
        let owner = record.owner.as_ref().map(|owner| owner.session);
        let (owners, others): (Vec<_>, Vec<_>) = volume
            .connections()
            .into_iter()
            .filter(|c| match c.mode {
                AccessMode::Owner => Some(c.session) == owner,
                AccessMode::Standby => true,
                AccessMode::ReadOnly => c.epoch == record.epoch,
            })
            .partition(|c| c.mode == AccessMode::Owner);
        let in_use = |who: &[Connection], remedy| {
            let mut names: Vec<_> =
                who.iter().map(|c| format!("`{}` at {}", c.owner, c.peer)).collect();
            names.sort();
            names.dedup();
            names.truncate(4);
            Err(DeleteError::InUse { name: name.into(), who: names.join(", "), remedy })
        };
        if let Some(handoff) = &record.handoff {
            let who = format!("handoff {} of `{}`", handoff.plan.attempt.id, handoff.plan.vm);
            let remedy = "finish or cancel it, or fence the volume first";
            return Err(DeleteError::InUse { name: name.into(), who, remedy });
        }
        if record.phase == Phase::Owned && !owners.is_empty() {
            return in_use(&owners, "stop that client, or fence the volume first");
        }
        if !force && !others.is_empty() {
            return in_use(&others, "stop that client, or delete with force=true");
        }
        let volumes = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let (_changes, control) = (changes, control);
            volume.deleted.store(true, Ordering::Release);
            volume.drain("a deletion");
            let name = volume.data.name();
            match volumes.common.store.delete_volume(name) {
                Ok(()) => {}
                Err(error @ VolumeError::Reclaim(_)) => {
                    tracing::warn!(volume = name, %error, "deleted");
                }
                Err(error) => {
                    // Still there: serve it on.
                    volume.deleted.store(false, Ordering::Release);
                    volume.open_for(&control.record);
                    return Err(error.into());
                }
            }
            let mut running = volumes.running.write().unwrap_or_else(PoisonError::into_inner);
            running.remove(name);
            drop(running);
            volume.publish(EventKind::Deleted, 0);
            volume.wake_watchers();
            Ok(())
        })
        .await
        .map_err(|_| DeleteError::Stopped)?
    }
}

/// Why a volume could not be made or grown.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The store's reason.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The server is stopping.
    #[error("the server is going away")]
    Stopped,
}

impl std::fmt::Debug for Volumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volumes").field("volumes", &self.list().len()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Common {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Common").field("boot_id", &self.boot_id).finish_non_exhaustive()
    }
}
