//! Connects to a cluster, opens an image, and makes it this owner's, unless it
//! stands by.
//!
//! Every step may wait for the cluster, so all of it runs in a thread of its
//! own, which is left behind when the time is over; what it still gets by then
//! it gives back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use baton_protocol::access::{AccessRecord, Input, Refusal};
use baton_protocol::{Epoch, SessionId};

use super::error::RbdError;
use super::image::{Cluster, Image};
use super::library::{Api, FEATURE_EXCLUSIVE_LOCK};
use super::objects::Objects;
use super::register::{Register, SeatError};
use super::volume::Served;
use crate::open::{OpenError, OpenOptions};
use crate::uri::RbdUri;

/// What opening and claiming may take after the monitors have answered.
const IMAGE_WAIT: Duration = Duration::from_secs(15);

/// What this driver counts on, whatever the host's configuration says.
const SETTINGS: [(&str, &str); 10] = [
    // A flush and a handoff are not to depend on what this process has in memory.
    ("rbd_cache", "false"),
    // Nor is an answered write to be in a file of this host only.
    ("rbd_persistent_cache_mode", "disabled"),
    // Writes are copied when they are submitted: a guest may change or take
    // away its memory at any time.
    ("rbd_disable_zero_copy_writes", "true"),
    // A discard of any size does what it says; 4096 is the least that is allowed.
    ("rbd_discard_granularity_bytes", "4096"),
    ("rbd_skip_partial_discard", "false"),
    // Whoever's lock is broken was fenced by `Register::enter` before, for good.
    // The library's own entry would be for an hour, which the monitors of 16.2
    // do not let replace a longer one; and with an expiry set for it they refuse
    // it (EINVAL: the number is sent as a text).
    ("rbd_blocklist_on_break_lock", "false"),
    // A request that is given up may still be carried out later.
    ("rados_osd_op_timeout", "0"),
    ("rados_mon_op_timeout", "0"),
    // No limit of the library's, whose thread that submits would wait for room:
    // `inbox::OUT_BYTES_MAX` and the queues' depths are ours.
    ("objecter_inflight_ops", "0"),
    ("objecter_inflight_op_bytes", "0"),
];
/// What makes it faster, where the library knows it and neither image nor pool
/// has its own; docs/performance.md has what each costs.
const TUNING: [(&str, &str); 4] = [
    // The scheduler holds writes back to merge them, which guests have done before.
    ("rbd_io_scheduler", "none"),
    // A queue's thread carries its requests to the messenger itself, as librados has
    // it do with direct reads. What could make it wait there is off (`SETTINGS`).
    ("rbd_non_blocking_aio", "false"),
    // Answers pass through one thread instead of two that wake each other.
    ("librados_thread_count", "1"),
    // What one receive takes of several answers, bytes. Each connection to an OSD
    // keeps twice as much; with the 4,096 there usually is each read needs two.
    ("ms_tcp_prefetch_max_size", "32768"),
];
/// Of `SETTINGS`, the ones that an image or its pool may have of its own, which wins.
const IMAGE_SETTINGS: usize = 6;

/// An open image, and what is known of it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) served: Served,
    pub(super) register: Register,
    /// As it is now, without keys.
    pub(super) record: AccessRecord,
    /// The epoch of the claim; `None`: it is only read, or stands by.
    pub(super) claimed: Option<Epoch>,
    pub(super) size_bytes: u64,
    /// Not locked and not claimed.
    pub(super) read_only: bool,
    pub(super) opened_after: Duration,
}

/// Makes a client of its own that only reads the image's access record, for when
/// the cluster refuses the one that was used.
pub(super) fn observer(
    uri: &RbdUri,
    options: &OpenOptions,
) -> impl Fn() -> Option<Register> + use<> {
    let (uri, options) = (uri.clone(), options.clone());
    move || {
        let opening = Opening::new(&uri, &options).ok()?;
        opening.register(&Arc::new(opening.image(true).ok()?)).ok()
    }
}

/// Opens within a bounded time.
pub(super) fn open(uri: &RbdUri, options: &OpenOptions) -> Result<Opened, OpenError> {
    let opening = Opening::new(uri, options)?;
    let connect = opening.connect;
    let connected = Arc::clone(&opening.connected);
    let (answer, answered) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("rbd-open".to_owned())
        // Nobody there to take it: it is closed again.
        .spawn(move || drop(answer.send(opening.run())))
        .map_err(OpenError::System)?;
    let limit = connect + IMAGE_WAIT;
    match answered.recv_timeout(limit) {
        Ok(result) => Ok(result?),
        Err(_) if connected.load(Ordering::Relaxed) => {
            Err(RbdError::NoAnswer { spec: uri.spec(), after_ms: limit.as_millis() }.into())
        }
        Err(_) => {
            Err(RbdError::NoMonitor { conf: uri.conf.clone(), after_ms: limit.as_millis() }.into())
        }
    }
}

#[derive(Debug)]
pub(super) struct Opening {
    api: &'static Api,
    uri: RbdUri,
    owner: String,
    session: SessionId,
    read_only: bool,
    standby: bool,
    handoff: bool,
    connect: Duration,
    /// For one request; `None`: for ever, since what is given up may still happen.
    patience: Option<Duration>,
    connected: Arc<AtomicBool>,
}

impl Opening {
    pub(super) fn new(uri: &RbdUri, options: &OpenOptions) -> Result<Self, RbdError> {
        Ok(Self {
            api: Api::loaded()?,
            uri: uri.clone(),
            owner: options.owner.clone(),
            session: options.session,
            read_only: options.read_only || uri.snapshot.is_some(),
            standby: options.standby,
            handoff: options.handoff,
            // Ceph's time-out has whole seconds.
            connect: options.connect_timeout.max(Duration::from_secs(1)),
            patience: None,
            connected: Arc::new(AtomicBool::new(false)),
        })
    }

    /// No request waits longer.
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self }
    }

    pub(super) fn register(&self, image: &Arc<Image>) -> Result<Register, RbdError> {
        let register = Register::new(Arc::clone(image), self.uri.namespace.as_deref());
        register.map_err(|e| self.failed("read the identity", e))
    }

    fn run(&self) -> Result<Opened, RbdError> {
        let begun = Instant::now();
        let image = Arc::new(self.image(self.read_only)?);
        let register = self.register(&image)?;
        let (record, claimed) = if self.read_only {
            (AccessRecord::new(register.volume()), None)
        } else {
            self.take(&image, &register)?
        };
        let size_bytes = image.size_bytes().map_err(|e| self.failed("read the size", e))?;
        if size_bytes < baton_protocol::units::SECTOR_BYTES {
            return Err(RbdError::Empty(self.uri.spec()));
        }
        let namespace = self.uri.namespace.as_deref();
        let objects = match self.uri.direct_reads && self.uri.snapshot.is_none() {
            true => Objects::new(&image, namespace),
            false => Ok(None),
        };
        let objects = objects.map_err(|e| self.failed("read the layout", e))?.map(Arc::new);
        let served = Served { image, objects };
        let (read_only, opened_after) = (self.read_only, begun.elapsed());
        Ok(Opened { served, register, record, claimed, size_bytes, read_only, opened_after })
    }

    pub(super) fn image(&self, read_only: bool) -> Result<Image, RbdError> {
        let uri = &self.uri;
        let cluster = self.cluster()?;
        self.connected.store(true, Ordering::Relaxed);
        let pool = cluster.pool(&uri.pool, uri.namespace.as_deref());
        let pool = pool.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => RbdError::NoPool(uri.pool.clone()),
            _ => self.failed("open the pool", e),
        })?;
        let overridden = |of, level, name: String, key| RbdError::Override { of, level, name, key };
        for (key, value) in &SETTINGS[..IMAGE_SETTINGS] {
            let note = pool.note(&format!("conf_{key}"));
            let note = note.map_err(|e| self.failed("read the pool's settings", e))?;
            if note.is_some_and(|note| note != *value) {
                return Err(overridden("pool", "pool", uri.pool.clone(), key));
            }
        }
        let image = pool.image(&uri.image, uri.snapshot.as_deref(), read_only);
        let image = image.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) if uri.snapshot.is_some() => RbdError::NoSnapshot(uri.spec()),
            Some(libc::ENOENT) => RbdError::NoImage(uri.spec()),
            _ => self.failed("open the image", e),
        })?;
        for (key, value) in &SETTINGS[..IMAGE_SETTINGS] {
            let note = image.note(&format!("conf_{key}"));
            let note = note.map_err(|e| self.failed("read the image's settings", e))?;
            if note.is_some_and(|note| note != *value) {
                return Err(overridden("image", "image", uri.spec(), key));
            }
        }
        Ok(image)
    }

    fn cluster(&self) -> Result<Cluster, RbdError> {
        let uri = &self.uri;
        let cluster =
            Cluster::new(self.api, uri.user()).map_err(|e| self.failed("make a client", e))?;
        let conf = uri.conf.as_ref().map(|path| path.to_string_lossy());
        let no_conf = |source| RbdError::Conf { conf: uri.conf.clone(), source };
        cluster.read_conf(conf.as_deref()).map_err(no_conf)?;
        for (key, value) in SETTINGS {
            cluster.set(key, value).map_err(|_| RbdError::Setting(key))?;
        }
        for (key, value) in TUNING {
            if let Err(error) = cluster.set(key, value) {
                tracing::debug!(key, %error, "the library goes without");
            }
        }
        if let Some(patience) = self.patience {
            let patience_s = patience.as_secs_f64().to_string();
            for key in ["rados_osd_op_timeout", "rados_mon_op_timeout"] {
                cluster.set(key, &patience_s).map_err(|_| RbdError::Setting(key))?;
            }
        }
        let wait_s = self.connect.as_secs_f64().ceil().to_string();
        let timeout = "client_mount_timeout";
        cluster.set(timeout, &wait_s).map_err(|_| RbdError::Setting(timeout))?;
        cluster.connect().map_err(|source| match source.raw_os_error() {
            Some(libc::ETIMEDOUT) => {
                RbdError::NoMonitor { conf: uri.conf.clone(), after_ms: self.connect.as_millis() }
            }
            _ => RbdError::Key { user: uri.user().to_owned(), conf: uri.conf.clone(), source },
        })?;
        Ok(cluster)
    }

    /// Makes the image this owner's, and this client the one that may write it,
    /// unless it stands by. The record, and the epoch of the claim.
    fn take(
        &self,
        image: &Image,
        register: &Register,
    ) -> Result<(AccessRecord, Option<Epoch>), RbdError> {
        let features = image.features().map_err(|e| self.failed("read the features", e))?;
        if features & FEATURE_EXCLUSIVE_LOCK == 0 {
            return Err(RbdError::NoLock(self.uri.spec()));
        }
        if self.standby {
            let seat = register.read().map_err(|e| self.unseated(e))?;
            return Ok((seat.record.without_keys(), None));
        }
        let (name, session, client) = (&self.owner, self.session, register.client());
        let claim = Input::Claim { name, session };
        match register.change(|seat| seat.step(claim, Some(client))) {
            Ok(_) => {}
            // Only to reclaim or to activate brings it back.
            Err(SeatError::Refused(Refusal::InHandoff(_), seat)) if self.handoff => {
                return Ok((seat.record.without_keys(), None));
            }
            Err(error) => return Err(self.unseated(error)),
        }
        let entered = register.enter(session);
        let seat = entered.map_err(|error| {
            let released = register.change(|seat| {
                let epoch = seat.record.epoch;
                seat.step(Input::Release { session, epoch }, None)
            });
            drop(released);
            self.unseated(error)
        })?;
        Ok((seat.record.without_keys(), Some(seat.record.epoch)))
    }

    pub(super) fn unseated(&self, error: SeatError) -> RbdError {
        let spec = self.uri.spec();
        match error {
            SeatError::Refused(Refusal::NotOwner { owner, .. }, _) => {
                RbdError::NotOwner { spec, owner }
            }
            SeatError::Refused(refusal, _) => RbdError::Refused { spec, refusal },
            SeatError::InUse(client) => RbdError::InUse { spec, client },
            SeatError::Note => RbdError::Note(spec),
            SeatError::Ceph(what, source) => self.failed(what, source),
        }
    }

    /// What has no sentence of its own; but a refusal has.
    fn failed(&self, what: &'static str, source: io::Error) -> RbdError {
        let uri = &self.uri;
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => RbdError::Denied {
                user: uri.user().to_owned(),
                pool: uri.pool.clone(),
                spec: uri.spec(),
            },
            _ => RbdError::Ceph { what, spec: uri.spec(), source },
        }
    }
}
