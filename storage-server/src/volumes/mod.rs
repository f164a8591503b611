//! The volumes as the server runs them: the store's volume, its access record
//! and gate, who is connected, and news.
//!
//! Every change of an access record goes through [`RunningVolume::change`]:
//! durable, then the gate closed and drained, then told. Does not know sockets
//! or HTTP.

mod events;
mod seat;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use baton_protocol::access::{AccessRecord, Input, Phase, RecordError, Refusal};
use baton_protocol::{AccessMode, Epoch, EventKind, QueueId, SessionId, VolumeId};
use tokio::sync::OwnedMutexGuard;

use crate::gate::Gate;
use crate::store::{self, Store, VolumeError};

pub use events::Events;
pub use seat::{Killer, Lease, NoSeat, Seat};

/// Most queues of one session. A client needs one per virtqueue and one more.
pub const QUEUES_MAX: usize = 512;

/// Told after something was published, so that parked EVENTs are looked at.
pub type Announce = Arc<dyn Fn(VolumeId) + Send + Sync>;

/// A connection as the admin API shows it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The client's name for itself.
    pub owner: String,
    /// Its incarnation.
    pub session: SessionId,
    /// Which queue.
    pub queue: QueueId,
    /// What it may do.
    pub mode: AccessMode,
    /// Under which epoch it was welcomed.
    pub epoch: Epoch,
    /// Where it comes from.
    pub peer: String,
}

/// A volume that is being served.
pub struct RunningVolume {
    /// Its data.
    pub data: Arc<store::Volume>,
    /// Who may do I/O now.
    pub gate: Arc<Gate>,
    /// News.
    pub events: Events,
    store: Arc<Store>,
    announce: Announce,
    epoch: AtomicU64,
    deleted: AtomicBool,
    control: Arc<tokio::sync::Mutex<Control>>,
    connections: Mutex<HashMap<u64, Connection>>,
    /// Copy of the record for those who only look: a change may hold the control
    /// as long as the disk takes.
    shown: Mutex<AccessRecord>,
}

/// What only one task at a time may change.
#[derive(Debug)]
pub struct Control {
    /// The access record as last made durable.
    pub record: AccessRecord,
    /// Seats of the current owner's queues.
    seats: HashMap<QueueId, Arc<Seat>>,
}

/// Why an access record did not change.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The record says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be made durable.
    #[error("the access record could not be stored; see the server's log")]
    Store(#[source] VolumeError),
    /// The volume is gone.
    #[error("the volume was deleted")]
    Deleted,
    /// The server is stopping.
    #[error("the server is going away")]
    Stopped,
}

impl RunningVolume {
    fn new(
        store: Arc<Store>,
        data: Arc<store::Volume>,
        slots: usize,
        announce: Announce,
    ) -> Result<Self, RecordError> {
        let id = VolumeId(data.id().0);
        let record = match store.access(data.id()) {
            None => AccessRecord::new(id),
            Some(bytes) => AccessRecord::decode(&bytes)?,
        };
        if record.volume != id {
            return Err(RecordError);
        }
        let gate = Arc::new(Gate::new(slots));
        open_for(&gate, &record);
        Ok(Self {
            data,
            gate,
            events: Events::default(),
            store,
            announce,
            epoch: AtomicU64::new(record.epoch.0),
            shown: Mutex::new(record.clone()),
            deleted: AtomicBool::new(false),
            control: Arc::new(tokio::sync::Mutex::new(Control { record, seats: HashMap::new() })),
            connections: Mutex::new(HashMap::new()),
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        VolumeId(self.data.id().0)
    }

    /// The epoch as of now; for replies, the gate decides.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Whether it was deleted.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    /// The right to change the record and the seats.
    pub async fn control(&self) -> OwnedMutexGuard<Control> {
        Arc::clone(&self.control).lock_owned().await
    }

    /// Asks the record. When it changes, the change is durable and everything of
    /// the old epoch has drained when this returns.
    ///
    /// # Errors
    /// [`ChangeError`] when the record stays as it is.
    ///
    /// # Cancel safety
    /// A change that has begun is carried through.
    pub async fn change(self: &Arc<Self>, request: Request) -> Result<AccessRecord, ChangeError> {
        let control = self.control().await;
        self.change_locked(control, request).await.map(|(_, record)| record)
    }

    /// [`RunningVolume::change`] for who holds the control; gives it back.
    ///
    /// # Errors
    /// [`ChangeError`] when the record stays as it is.
    pub async fn change_locked(
        self: &Arc<Self>,
        mut control: OwnedMutexGuard<Control>,
        request: Request,
    ) -> Result<(OwnedMutexGuard<Control>, AccessRecord), ChangeError> {
        if self.is_deleted() {
            return Err(ChangeError::Deleted);
        }
        let step = control.record.step(request.input())?;
        if !step.changed {
            return Ok((control, step.record));
        }
        let volume = Arc::clone(self);
        // On a thread of its own: it waits for the disk and for requests that
        // are inside, and must not be dropped half way with its caller.
        tokio::task::spawn_blocking(move || {
            let record = step.record;
            volume.store.put_access(volume.data.id(), &record.encode())?;
            volume.gate.close(|inside| {
                tracing::warn!(
                    volume = volume.data.name(), inside, epoch = %record.epoch,
                    "a change of access waits for requests that are still at the disk"
                );
            });
            let moved = record.epoch != control.record.epoch;
            open_for(&volume.gate, &record);
            volume.epoch.store(record.epoch.0, Ordering::Release);
            // Those who held them are of an old epoch; they keep their leases
            // but nobody asks for them again.
            control.seats.clear();
            control.record = record.clone();
            *volume.shown() = record.clone();
            if moved {
                volume.publish(EventKind::EpochChanged, record.epoch.0);
            }
            Ok((control, record))
        })
        .await
        .map_err(|_| ChangeError::Stopped)?
        .map_err(ChangeError::Store)
    }

    /// The access record, as of the last finished change.
    #[must_use]
    pub fn record(&self) -> AccessRecord {
        self.shown().clone()
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, AccessRecord> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an event and wakes those who wait for one.
    pub fn publish(&self, kind: EventKind, value: u64) {
        self.events.publish(kind, value);
        (self.announce)(self.id());
    }

    /// Notes a connection until [`RunningVolume::disconnected`].
    pub fn connected(&self, id: u64, connection: Connection) {
        self.locked_connections().insert(id, connection);
    }

    /// The connection is gone.
    pub fn disconnected(&self, id: u64) {
        self.locked_connections().remove(&id);
    }

    /// Who is connected.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        let mut all: Vec<_> = self.locked_connections().values().cloned().collect();
        all.sort_by_key(|c| (c.session.0, c.queue.0));
        all
    }

    fn locked_connections(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for RunningVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunningVolume").field("name", &self.data.name()).finish_non_exhaustive()
    }
}

impl Control {
    /// The seat of one of the owner's queues, or `None` when the session has too
    /// many queues.
    pub fn seat(&mut self, queue: QueueId) -> Option<Arc<Seat>> {
        if self.seats.len() >= QUEUES_MAX && !self.seats.contains_key(&queue) {
            return None;
        }
        Some(Arc::clone(self.seats.entry(queue).or_default()))
    }
}

/// [`Input`] that owns its names, so that it can wait for the lock.
#[derive(Clone, Debug)]
pub enum Request {
    /// See [`Input::Claim`].
    Claim {
        /// The claimant.
        name: String,
        /// Its incarnation.
        session: SessionId,
    },
    /// See [`Input::Rejoin`].
    Rejoin {
        /// The incarnation.
        session: SessionId,
        /// What it was granted.
        epoch: Epoch,
    },
    /// See [`Input::Release`].
    Release {
        /// The incarnation.
        session: SessionId,
        /// What it was granted.
        epoch: Epoch,
    },
    /// See [`Input::Fence`].
    Fence {
        /// Term of the coordinator.
        term: Option<u64>,
        /// Who may claim.
        nominee: Option<String>,
    },
}

impl Request {
    fn input(&self) -> Input<'_> {
        match self {
            Self::Claim { name, session } => Input::Claim { name, session: *session },
            Self::Rejoin { session, epoch } => Input::Rejoin { session: *session, epoch: *epoch },
            Self::Release { session, epoch } => Input::Release { session: *session, epoch: *epoch },
            Self::Fence { term, nominee } => {
                Input::Fence { term: *term, nominee: nominee.as_deref() }
            }
        }
    }
}

/// Opens a closed gate for whom the record names.
fn open_for(gate: &Gate, record: &AccessRecord) {
    // A nominee of a fence has session zero until it claims: nobody may write.
    let claimed = record.owner.as_ref().is_some_and(|owner| owner.session.0 != 0);
    let owner = (record.phase == Phase::Owned && claimed).then_some(record.epoch);
    gate.open(owner, Some(record.epoch));
}

/// All volumes of the server.
pub struct Volumes {
    store: Arc<Store>,
    slots: usize,
    announce: Announce,
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
    /// requests.
    ///
    /// # Errors
    /// [`DamagedRecord`] when an access record cannot be read.
    pub fn new(store: Arc<Store>, slots: usize, announce: Announce) -> Result<Self, DamagedRecord> {
        let mut running = BTreeMap::new();
        for info in store.list() {
            let Some(data) = store.volume(&info.name) else { continue };
            let volume = RunningVolume::new(Arc::clone(&store), data, slots, Arc::clone(&announce))
                .map_err(|source| DamagedRecord { name: info.name.clone(), source })?;
            running.insert(info.name, Arc::new(volume));
        }
        let changes = Arc::default();
        Ok(Self { store, slots, announce, running: RwLock::new(running), changes })
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
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
            let info = volumes.store.create_volume(&name, size_bytes)?;
            let data = volumes.store.volume(&info.name).ok_or(CreateError::Stopped)?;
            let announce = Arc::clone(&volumes.announce);
            let store = Arc::clone(&volumes.store);
            let volume = RunningVolume::new(store, data, volumes.slots, announce)
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
        let store = Arc::clone(&self.store);
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
        let epoch = control.record.epoch;
        let (owners, others): (Vec<_>, Vec<_>) = volume
            .connections()
            .into_iter()
            .filter(|c| c.epoch == epoch)
            .partition(|c| c.mode == AccessMode::Owner);
        let in_use = |who: &[Connection], remedy| {
            let mut names: Vec<_> =
                who.iter().map(|c| format!("`{}` at {}", c.owner, c.peer)).collect();
            names.sort();
            names.dedup();
            names.truncate(4);
            Err(DeleteError::InUse { name: name.into(), who: names.join(", "), remedy })
        };
        if control.record.phase == Phase::Owned && !owners.is_empty() {
            return in_use(&owners, "stop that client, or fence the volume first");
        }
        if !force && !others.is_empty() {
            return in_use(&others, "stop that client, or delete with force=true");
        }
        let volumes = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let (_changes, _control) = (changes, control);
            volume.deleted.store(true, Ordering::Release);
            volume.gate.close(|inside| {
                tracing::warn!(
                    volume = volume.data.name(),
                    inside,
                    "a deletion waits for requests that are still at the disk"
                );
            });
            let name = volume.data.name();
            match volumes.store.delete_volume(name) {
                Ok(()) => {}
                Err(error @ VolumeError::Reclaim(_)) => {
                    tracing::warn!(volume = name, %error, "deleted");
                }
                Err(error) => {
                    // Still there: serve it on.
                    volume.deleted.store(false, Ordering::Release);
                    open_for(&volume.gate, &_control.record);
                    return Err(error.into());
                }
            }
            let mut running = volumes.running.write().unwrap_or_else(PoisonError::into_inner);
            running.remove(name);
            drop(running);
            volume.publish(EventKind::Deleted, 0);
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
