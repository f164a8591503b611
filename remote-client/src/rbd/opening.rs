//! Connects to a cluster, opens an image, and makes it this owner's.
//!
//! Every step may wait for the cluster, so all of it runs in a thread of its
//! own, which is left behind when the time is over; what it still gets by then
//! it gives back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::claim::{CLAIM_NOTE, Claim, Step, next};
use super::error::RbdError;
use super::image::{Cluster, Image};
use super::library::{Api, FEATURE_EXCLUSIVE_LOCK};
use crate::open::{OpenError, OpenOptions};
use crate::uri::RbdUri;

/// Ten years, s. The entry of a client that may only be frozen must not end
/// before the client does: what it has queued is accepted from then on.
const FENCE_S: u32 = 315_360_000;
/// What opening and claiming may take after the monitors have answered.
const IMAGE_WAIT: Duration = Duration::from_secs(15);

/// What this driver counts on, whatever the host's configuration says.
const SETTINGS: [(&str, &str); 8] = [
    // A flush and a handoff are not to depend on what this process has in memory.
    ("rbd_cache", "false"),
    // Writes are copied when they are submitted: a guest may change or take
    // away its memory at any time.
    ("rbd_disable_zero_copy_writes", "true"),
    // Submission never waits for room.
    ("rbd_non_blocking_aio", "true"),
    // A discard of any size does what it says; 4096 is the least that is allowed.
    ("rbd_discard_granularity_bytes", "4096"),
    ("rbd_skip_partial_discard", "false"),
    // Whoever's lock is broken was fenced by `claim` before, for good. The
    // library's own entry would replace that one and end after an hour; and
    // with an expiry set for it, Pacific's monitors refuse it (EINVAL: the
    // number is sent as a text).
    ("rbd_blocklist_on_break_lock", "false"),
    // A request that is given up may still be carried out later.
    ("rados_osd_op_timeout", "0"),
    ("rados_mon_op_timeout", "0"),
];
/// Of these, the ones that an image or its pool may have of its own, which wins.
const IMAGE_SETTINGS: usize = 6;

/// An open image, and what is known of it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) image: Image,
    /// Unique in the pool.
    pub(super) id: String,
    pub(super) size_bytes: u64,
    /// Not locked and not claimed.
    pub(super) read_only: bool,
}

/// Opens within a bounded time.
pub(super) fn open(uri: &RbdUri, options: &OpenOptions) -> Result<Opened, OpenError> {
    if options.standby {
        return Err(RbdError::Standby(uri.spec()).into());
    }
    let api = Api::loaded()?;
    // Ceph's time-out has whole seconds.
    let connect = options.connect_timeout.max(Duration::from_secs(1));
    let opening = Opening {
        api,
        uri: uri.clone(),
        owner: options.owner.clone(),
        read_only: options.read_only || uri.snapshot.is_some(),
        connect,
        connected: Arc::new(AtomicBool::new(false)),
    };
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

struct Opening {
    api: &'static Api,
    uri: RbdUri,
    owner: String,
    read_only: bool,
    connect: Duration,
    connected: Arc<AtomicBool>,
}

impl Opening {
    fn run(&self) -> Result<Opened, RbdError> {
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
        let image = pool.image(&uri.image, uri.snapshot.as_deref(), self.read_only);
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
        if !self.read_only {
            self.claim(&image)?;
        }
        let size_bytes = image.size_bytes().map_err(|e| self.failed("read the size", e))?;
        let id = image.id().map_err(|e| self.failed("read the identity", e))?;
        if size_bytes < baton_protocol::units::SECTOR_BYTES {
            return Err(RbdError::Empty(uri.spec()));
        }
        Ok(Opened { image, id, size_bytes, read_only: self.read_only })
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

    /// Makes the image this owner's, and this client the one that may write it.
    fn claim(&self, image: &Image) -> Result<(), RbdError> {
        let spec = || self.uri.spec();
        let features = image.features().map_err(|e| self.failed("read the features", e))?;
        if features & FEATURE_EXCLUSIVE_LOCK == 0 {
            return Err(RbdError::NoLock(spec()));
        }
        let lock = image.lock_owner().map_err(|e| self.failed("look at the lock", e))?;
        let alive = image.watchers().map_err(|e| self.failed("look for other clients", e))?;
        let claim = self.claim_on(image)?;
        match next(&self.owner, claim.as_ref(), lock.as_deref(), &alive) {
            Step::Acquire => {}
            Step::InUse(client) => return Err(RbdError::InUse { spec: spec(), client }),
            Step::NotOwner(owner) => return Err(RbdError::NotOwner { spec: spec(), owner }),
            Step::TakeOver(client) => {
                tracing::warn!(
                    image = spec(),
                    client,
                    "an earlier backend of this VM has not given the image back; it is fenced"
                );
                let cluster = &image.pool.cluster;
                let fenced = cluster.blocklist(&client, FENCE_S);
                fenced.map_err(|e| self.failed("fence the earlier client", e))?;
                let broken = image.break_lock(&client);
                broken.map_err(|e| self.failed("break the earlier client's lock", e))?;
            }
        }
        image.lock().map_err(|e| match e.raw_os_error() {
            // Somebody was faster, and keeps it.
            Some(libc::EROFS | libc::EBUSY) => {
                let other = image.lock_owner().ok().flatten();
                RbdError::InUse { spec: spec(), client: other.unwrap_or_else(|| "?".to_owned()) }
            }
            _ => self.failed("take the exclusive lock", e),
        })?;
        // Another owner may have come and gone between the look and the lock.
        if let Some(claim) = self.claim_on(image)?
            && claim.owner != self.owner
        {
            let _ = image.unlock();
            return Err(RbdError::NotOwner { spec: spec(), owner: claim.owner });
        }
        let client = image.pool.cluster.address();
        let client = client.map_err(|e| self.failed("tell this client's address", e))?;
        let claim = Claim { client, owner: self.owner.clone() };
        let noted = image.set_note(CLAIM_NOTE, &claim.to_string());
        noted.map_err(|e| self.failed("note the owner", e))
    }

    fn claim_on(&self, image: &Image) -> Result<Option<Claim>, RbdError> {
        let note = image.note(CLAIM_NOTE).map_err(|e| self.failed("read the owner", e))?;
        // One of a later version is somebody's as well.
        let unknown = |text: &str| Claim { client: String::new(), owner: text.to_owned() };
        Ok(note.map(|text| text.parse().unwrap_or_else(|()| unknown(&text))))
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
