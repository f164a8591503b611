//! The journal: rows of handoffs, the coordinator's term, events, and the VMs it
//! has heard of; all that a coordinator knows about who is where. It lives in a
//! [`Store`]: a file on this host ([`file`]), or etcd, which several coordinators
//! share ([`super::etcd`]).
//!
//! A write that was answered is durable. One that failed has changed nothing,
//! and the next one tries again (a full disk that has room again needs no
//! restart), but for [`EtcdError::Unknown`](super::etcd::EtcdError::Unknown),
//! after which this coordinator writes nothing any more. One thread writes what
//! came together at once. Knows rows as JSON, not what they mean.

pub mod file;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::etcd::EtcdError;
use super::plan::Row;

/// Events kept; the oldest go first. About 5 MB.
pub const EVENTS_MAX: u64 = 10_000;
/// Writes that are told to the store at once.
const BATCH_MAX: usize = 256;
/// Of rows, VMs and events, in either store.
pub(super) const FORMAT: u64 = 1;

/// Why the journal did not take a write.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// No room.
    #[error("no room for the journal {}; make room on its disk and ask again, nothing was started", .0.display())]
    Full(PathBuf),
    /// Another coordinator has it.
    #[error("the journal {} is in use by another coordinator on this host", .0.display())]
    InUse(PathBuf),
    /// A format of the future, or not a journal.
    #[error("the journal {at} is of format {found}; this program knows {FORMAT}")]
    Format {
        /// Which.
        at: String,
        /// What it says.
        found: u64,
    },
    /// Anything else of a file.
    #[error(
        "the journal {} cannot be used: {what}; see to its disk and permissions, or name another file with `journal`: handoffs under way are in it",
        path.display()
    )]
    Failed {
        /// Which.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// The store that is shared did not take it.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The thread that writes is gone.
    #[error("the journal is written no more: its thread has ended; start the coordinator again")]
    Ended,
}

/// An event, as watchers get it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the log: the cursor. Grows by one.
    pub seq: u64,
    /// Kind, such as `baton.handoff.state`.
    pub kind: String,
    /// `vms/VM/handoffs/ID` or `vms/VM`.
    pub subject: String,
    /// Microseconds since 1970.
    pub at_unix_us: u64,
    /// What happened.
    pub data: Value,
}

/// What one write changes.
#[derive(Debug, Default)]
pub struct Change {
    /// Written.
    pub row: Option<Row>,
    /// Told; their `seq` is given by the journal.
    pub events: Vec<Event>,
    /// What a VM looks like.
    pub vm: Option<(String, Value)>,
    /// Rows that nobody needs any more.
    pub forget: Vec<String>,
}

/// What a start finds.
#[derive(Debug)]
pub struct Found {
    /// The term of this start; durable.
    pub term: u64,
    /// All rows.
    pub rows: Vec<Row>,
    /// VMs by name.
    pub vms: HashMap<String, Value>,
    /// Number of the last event.
    pub seq: u64,
}

/// When a test wants the process to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// At which write, from 1.
    pub write: u64,
    /// After it is durable, instead of before.
    pub after: bool,
}

/// Where a journal is kept. One term's coordinator writes at a time; a store that
/// is shared refuses all others.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync {
    /// How many of these, from the first, one commit takes; at least one.
    fn batch(&self, changes: &[&Change]) -> usize {
        changes.len()
    }

    /// Makes all of them durable, or none; the number of the last event. Called by
    /// the journal's own thread alone, which may be held up.
    async fn commit(&self, changes: &[&Change]) -> Result<u64, JournalError>;

    /// At most `limit` events after `cursor`, and the number of the oldest kept.
    async fn events_after(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, u64), JournalError>;
}

struct Job {
    change: Change,
    done: oneshot::Sender<Result<(), JournalError>>,
}

/// A handle to the journal; clones share it.
#[derive(Clone, Debug)]
pub struct Journal {
    jobs: mpsc::Sender<Job>,
    store: Arc<dyn Store>,
    latest: watch::Receiver<u64>,
    writes: Arc<AtomicU64>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.change.fmt(f)
    }
}

impl Journal {
    /// Opens or makes a file, and takes the next term, at least `term_min`.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was started.
    pub fn open(
        path: &Path,
        term_min: u64,
        death: Option<Death>,
    ) -> Result<(Self, Found), JournalError> {
        let (store, found) = file::FileStore::open(path, term_min)?;
        let journal = Self::of(Arc::new(store), found.seq, death)?;
        Ok((journal, found))
    }

    /// Of a store whose last event was `seq`.
    ///
    /// # Errors
    /// No thread.
    pub fn of(store: Arc<dyn Store>, seq: u64, death: Option<Death>) -> Result<Self, JournalError> {
        let (tell, latest) = watch::channel(seq);
        let (jobs, queue) = mpsc::channel::<Job>(BATCH_MAX);
        let writes = Arc::new(AtomicU64::new(0));
        let writer = Writer { store: Arc::clone(&store), writes: Arc::clone(&writes), tell, death };
        // A disk's sync holds up nobody else.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|_| JournalError::Ended)?;
        std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || runtime.block_on(writer.run(queue)))
            .map_err(|_| JournalError::Ended)?;
        Ok(Self { jobs, store, latest, writes })
    }

    /// Writes, and returns when it is durable.
    ///
    /// # Errors
    /// [`JournalError`].
    ///
    /// # Cancel safety
    /// It is written all the same.
    pub async fn write(&self, change: Change) -> Result<(), JournalError> {
        let (done, answer) = oneshot::channel();
        self.jobs.send(Job { change, done }).await.map_err(|_| JournalError::Ended)?;
        answer.await.map_err(|_| JournalError::Ended)?
    }

    /// Number of the last event; changes as events come.
    #[must_use]
    pub fn latest(&self) -> watch::Receiver<u64> {
        self.latest.clone()
    }

    /// Commits so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// At most `limit` events after `cursor`, and the number of the oldest kept.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn events_after(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, u64), JournalError> {
        self.store.events_after(cursor, limit).await
    }
}

struct Writer {
    store: Arc<dyn Store>,
    writes: Arc<AtomicU64>,
    tell: watch::Sender<u64>,
    death: Option<Death>,
}

impl Writer {
    /// Ends when nobody can send any more.
    async fn run(self, mut queue: mpsc::Receiver<Job>) {
        let mut jobs = Vec::new();
        while queue.recv_many(&mut jobs, BATCH_MAX).await > 0 {
            while !jobs.is_empty() {
                let changes: Vec<&Change> = jobs.iter().map(|job| &job.change).collect();
                let count = self.store.batch(&changes).clamp(1, changes.len());
                let answer = self.commit(&changes[..count]).await;
                if let Err(error) = &answer {
                    tracing::error!(%error, "a write of the journal failed");
                }
                for job in jobs.drain(..count) {
                    // Who asked may have gone.
                    let _ = job.done.send(answer.clone());
                }
            }
        }
    }

    async fn commit(&self, changes: &[&Change]) -> Result<(), JournalError> {
        let number = self.writes.load(Ordering::Relaxed) + 1;
        let dies = self.death.filter(|death| death.write == number);
        if dies.is_some_and(|death| !death.after) {
            std::process::abort();
        }
        let seq = self.store.commit(changes).await?;
        if dies.is_some() {
            std::process::abort();
        }
        self.writes.store(number, Ordering::Relaxed);
        self.tell.send_if_modified(|latest| std::mem::replace(latest, seq) != seq);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u64) -> Event {
        Event {
            seq: 0,
            kind: "test".to_owned(),
            subject: String::new(),
            at_unix_us: n,
            data: Value::Null,
        }
    }

    #[tokio::test]
    async fn the_term_grows_with_every_start_and_events_keep_their_numbers() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("journal.redb");
        let (journal, found) = Journal::open(&path, 0, None).expect("new");
        assert_eq!(found.term, 1);
        let change = Change { events: vec![event(1), event(2)], ..Change::default() };
        journal.write(change).await.expect("written");
        assert!(matches!(Journal::open(&path, 0, None), Err(JournalError::InUse(_))));
        drop(journal);
        let (journal, found) = reopened(&path, 7);
        assert_eq!(found.term, 7, "a higher one was seen at a server");
        let change = Change { events: vec![event(3)], ..Change::default() };
        journal.write(change).await.expect("written");
        let (events, oldest) = journal.events_after(1, 10).await.expect("read");
        let seen: Vec<_> = events.iter().map(|event| (event.seq, event.at_unix_us)).collect();
        assert_eq!((seen, oldest), (vec![(2, 2), (3, 3)], 1));
        drop(journal);
        assert_eq!(reopened(&path, 0).1.term, 8);
    }

    /// The thread that held the file ends soon after its last handle.
    fn reopened(path: &Path, term_min: u64) -> (Journal, Found) {
        let start = std::time::Instant::now();
        loop {
            match Journal::open(path, term_min, None) {
                Err(JournalError::InUse(_)) if start.elapsed().as_secs() < 20 => {
                    std::thread::yield_now();
                }
                opened => return opened.expect("opened"),
            }
        }
    }

    #[tokio::test]
    async fn the_event_log_has_a_bound() {
        let dir = tempfile::tempdir().expect("a directory");
        let (journal, _) = Journal::open(&dir.path().join("j"), 0, None).expect("new");
        for _ in 0..3 {
            let events = (0..EVENTS_MAX / 2).map(event).collect();
            journal.write(Change { events, ..Change::default() }).await.expect("written");
        }
        let (events, oldest) = journal.events_after(0, usize::MAX).await.expect("read");
        assert_eq!((events.len() as u64, oldest), (EVENTS_MAX, EVENTS_MAX / 2 + 1));
        assert_eq!(*journal.latest().borrow(), 3 * (EVENTS_MAX / 2));
    }

    /// As the example of docs/operations.md is tried out, without systemd's StateDirectory.
    #[test]
    fn its_directory_is_made_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("coordinator/journal.redb");
        Journal::open(&path, 0, None).expect("new");
        let made = path.parent().expect("a parent").metadata().expect("made").permissions();
        assert_eq!(made.mode() & 0o777, 0o700);
    }

    #[test]
    fn what_is_not_a_journal_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("j");
        std::fs::write(&path, vec![7; 10_000]).expect("written");
        let error = Journal::open(&path, 0, None).expect_err("not one").to_string();
        assert!(error.contains("cannot be used") && error.contains("name another"), "{error}");
        let error = Journal::open(dir.path(), 0, None).expect_err("a directory").to_string();
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
    }
}
