//! One volume as it is served.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use baton_protocol::access::{AccessRecord, RecordError};
use baton_protocol::{AccessMode, Epoch, EventKind, QueueId, SessionId, VolumeId};
use tokio::sync::{OwnedMutexGuard, watch};

use crate::gate::Gate;
use crate::listeners::{Listeners, Listening};
use crate::metrics::AccessMetrics;
use crate::store;

use super::audit::{Audit, Entry};
use super::change::Control;
use super::keeper::Kept;
use super::{Arrivals, Common, Events, Incarnations};

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
    /// Under which epoch it was welcomed, or granted since.
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
    /// Wakes a SEAL that waits.
    pub arrivals: Arrivals,
    listeners: Listeners,
    /// Who of an owner name is heard in a handoff.
    pub incarnations: Incarnations,
    pub(super) common: Arc<Common>,
    pub(super) kept: Arc<Kept>,
    pub(super) audit: Audit,
    pub(super) epoch: AtomicU64,
    pub(super) deleted: AtomicBool,
    control: Arc<tokio::sync::Mutex<Control>>,
    connections: Mutex<HashMap<u64, Connection>>,
    /// The record for those who only look or wait for a change: who changes it
    /// may hold the control as long as the disk takes.
    pub(super) shown: watch::Sender<Arc<AccessRecord>>,
}

/// The listeners of a volume that cannot go before them.
#[derive(Debug)]
pub struct Ears(Arc<RunningVolume>);

impl Deref for Ears {
    type Target = Listeners;

    fn deref(&self) -> &Listeners {
        &self.0.listeners
    }
}

impl RunningVolume {
    pub(super) fn new(
        common: Arc<Common>,
        data: Arc<store::Volume>,
        slots: usize,
    ) -> Result<Self, RecordError> {
        let id = VolumeId(data.id().0);
        let record = match common.store.access(data.id()) {
            None => AccessRecord::new(id),
            Some(bytes) => AccessRecord::decode(&bytes)?.after_restart(),
        };
        if record.volume != id {
            return Err(RecordError);
        }
        let audit = Audit::default();
        audit.note(&record, "start", "this server".to_owned());
        let volume = Self {
            data,
            gate: Arc::new(Gate::new(slots)),
            events: Events::default(),
            arrivals: Arrivals::default(),
            listeners: Listeners::new(slots),
            incarnations: Incarnations::default(),
            common,
            kept: Arc::default(),
            audit,
            epoch: AtomicU64::new(record.epoch.0),
            deleted: AtomicBool::new(false),
            shown: watch::Sender::new(Arc::new(record.clone())),
            control: Arc::new(tokio::sync::Mutex::new(Control::new(record))),
            connections: Mutex::new(HashMap::new()),
        };
        volume.open_for(&volume.record());
        Ok(volume)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        VolumeId(self.data.id().0)
    }

    /// This incarnation of the server.
    #[must_use]
    pub fn boot_id(&self) -> u64 {
        self.common.boot_id
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

    /// [`RunningVolume::control`] if nobody has it or waits for it.
    #[must_use]
    pub fn try_control(&self) -> Option<OwnedMutexGuard<Control>> {
        Arc::clone(&self.control).try_lock_owned().ok()
    }

    /// The access record, as of the last finished change.
    #[must_use]
    pub fn record(&self) -> Arc<AccessRecord> {
        Arc::clone(&self.shown.borrow())
    }

    /// Tells of every change of the record, and of a deletion.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<AccessRecord>> {
        self.shown.subscribe()
    }

    /// The last changes of the record, oldest first.
    #[must_use]
    pub fn audit(&self) -> Vec<Entry> {
        self.audit.entries()
    }

    /// Records an event and wakes those who wait for one.
    pub fn publish(&self, kind: EventKind, value: u64) {
        self.events.publish(kind, value);
        self.announce();
    }

    /// Has every worker look at this volume's connections.
    pub(super) fn announce(&self) {
        self.common.announce.to_all(self.id());
    }

    /// Has the workers look at this volume's connections where one of them waits for
    /// news.
    pub(super) fn announce_to_listeners(&self) {
        for worker in self.listeners.to_tell() {
            self.common.announce.to(worker, self.id());
        }
    }

    /// Somebody waits for news at this worker, as long as what is returned lives.
    pub fn listen(self: &Arc<Self>, worker: usize) -> Listening<Ears> {
        Listeners::listen(Ears(Arc::clone(self)), worker)
    }

    pub(super) fn wake_watchers(&self) {
        self.shown.send_modify(|_| ());
    }

    /// Opens a closed gate for whom the record names.
    pub(super) fn open_for(&self, record: &AccessRecord) {
        let admits = record.admits();
        self.gate.open(admits.owner, admits.reader);
    }

    /// Closes the gate and waits until nothing is inside; `what` waits.
    pub(super) fn drain(&self, what: &str) {
        let begun = Instant::now();
        self.gate.close(|inside| {
            tracing::warn!(
                volume = self.data.name(),
                inside,
                what,
                "waits for requests that are still at the disk"
            );
        });
        AccessMetrics::waited(&self.common.metrics.draining_us, begun);
    }

    /// Notes a connection until [`RunningVolume::disconnected`].
    pub fn connected(&self, id: u64, connection: Connection) {
        self.locked_connections().insert(id, connection);
    }

    /// The connection owns the volume now, under this epoch.
    pub fn opened(&self, id: u64, epoch: Epoch) {
        if let Some(connection) = self.locked_connections().get_mut(&id) {
            connection.mode = AccessMode::Owner;
            connection.epoch = epoch;
        }
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
