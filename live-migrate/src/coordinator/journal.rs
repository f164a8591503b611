//! The journal: rows of handoffs, the coordinator's term, events, and the VMs it
//! has heard of. One file (redb), written by one thread that commits what came
//! together with one sync.
//!
//! A write that was answered is durable. A write that failed has changed
//! nothing, and the next one opens the file anew: a full disk that has room
//! again needs no restart. Knows rows as JSON, not what they mean.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use super::plan::Row;

/// Events kept; the oldest go first. About 5 MB.
pub const EVENTS_MAX: u64 = 10_000;
/// Writes that share one sync.
const BATCH_MAX: usize = 256;
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ROWS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("handoffs");
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");

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
    #[error("the journal {} is of format {found}; this program knows {FORMAT}", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// What it says.
        found: u64,
    },
    /// Anything else.
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
}

/// When a test wants the process to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// At which write, from 1.
    pub write: u64,
    /// After it is durable, instead of before.
    pub after: bool,
}

struct Job {
    change: Change,
    done: oneshot::Sender<Result<(), JournalError>>,
}

/// A handle to the journal; clones share it.
#[derive(Clone)]
pub struct Journal {
    path: PathBuf,
    jobs: mpsc::SyncSender<Job>,
    database: Arc<Mutex<Option<Database>>>,
    latest: watch::Receiver<u64>,
    writes: Arc<AtomicU64>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens or makes it, and takes the next term, at least `term_min`.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was started.
    pub fn open(
        path: &Path,
        term_min: u64,
        death: Option<Death>,
    ) -> Result<(Self, Found), JournalError> {
        let database = open(path)?;
        let (found, seq) = start(&database, term_min).map_err(|error| error.at(path))?;
        let (tell, latest) = watch::channel(seq);
        let (jobs, queue) = mpsc::sync_channel::<Job>(BATCH_MAX);
        let database = Arc::new(Mutex::new(Some(database)));
        let writes = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            path: path.to_owned(),
            database: Arc::clone(&database),
            writes: Arc::clone(&writes),
            tell,
            death,
        };
        std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|error| failed(path, &error))?;
        Ok((Self { path: path.to_owned(), jobs, database, latest, writes }, found))
    }

    /// Writes, and returns when it is durable.
    ///
    /// # Errors
    /// [`JournalError`]; nothing has changed.
    ///
    /// # Cancel safety
    /// It is written all the same.
    pub async fn write(&self, change: Change) -> Result<(), JournalError> {
        let (done, answer) = oneshot::channel();
        let gone = || failed(&self.path, &"its thread has ended");
        let mut job = Job { change, done };
        loop {
            match self.jobs.try_send(job) {
                Ok(()) => break,
                Err(mpsc::TrySendError::Full(back)) => {
                    job = back;
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                Err(mpsc::TrySendError::Disconnected(_)) => return Err(gone()),
            }
        }
        answer.await.map_err(|_| gone())?
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
    pub fn events_after(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, u64), JournalError> {
        let database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = &*database else {
            return Err(failed(&self.path, &"it is being opened again"));
        };
        events(database, cursor, limit).map_err(|error| error.at(&self.path))
    }
}

struct Writer {
    path: PathBuf,
    database: Arc<Mutex<Option<Database>>>,
    writes: Arc<AtomicU64>,
    tell: watch::Sender<u64>,
    death: Option<Death>,
}

impl Writer {
    /// Ends when nobody can send any more.
    fn run(self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut jobs = vec![first];
            while jobs.len() < BATCH_MAX
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            let answer = self.commit(&jobs);
            if let Err(error) = &answer {
                tracing::error!(%error, "a write of the journal failed");
            }
            for job in jobs {
                // Who asked may have gone.
                let _ = job.done.send(answer.clone());
            }
        }
    }

    fn commit(&self, jobs: &[Job]) -> Result<(), JournalError> {
        let number = self.writes.load(Ordering::Relaxed) + 1;
        let dies = self.death.filter(|death| death.write == number);
        if dies.is_some_and(|death| !death.after) {
            std::process::abort();
        }
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        // After a failure redb wants to be opened again.
        let open = match database.take() {
            Some(open) => open,
            None => open(&self.path)?,
        };
        let seq = write(&open, jobs).map_err(|error| error.at(&self.path))?;
        *database = Some(open);
        drop(database);
        if dies.is_some() {
            std::process::abort();
        }
        self.writes.store(number, Ordering::Relaxed);
        self.tell.send_if_modified(|latest| std::mem::replace(latest, seq) != seq);
        Ok(())
    }
}

fn open(path: &Path) -> Result<Database, JournalError> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| Fault::Io(error).at(path))?;
    }
    // Keys of handoffs are in it.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| Fault::Io(error).at(path))?;
    let judge = |error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => JournalError::InUse(path.to_owned()),
        other => Fault::Redb(other.into()).at(path),
    };
    let backend = redb::backends::FileBackend::new(file).map_err(judge)?;
    Database::builder().create_with_backend(backend).map_err(judge)
}

fn start(database: &Database, term_min: u64) -> Result<(Found, u64), Fault> {
    let write = database.begin_write()?;
    let term = {
        let mut meta = write.open_table(META)?;
        let format = meta.get("format")?.map_or(FORMAT, |found| found.value());
        if format != FORMAT {
            return Err(Fault::Format(format));
        }
        let term = meta.get("term")?.map_or(0, |term| term.value()).saturating_add(1).max(term_min);
        meta.insert("format", FORMAT)?;
        meta.insert("term", term)?;
        term
    };
    let mut rows = Vec::new();
    for entry in write.open_table(ROWS)?.iter()? {
        rows.push(serde_json::from_slice(entry?.1.value())?);
    }
    let mut vms = HashMap::new();
    for entry in write.open_table(VMS)?.iter()? {
        let (name, vm) = entry?;
        vms.insert(name.value().to_owned(), serde_json::from_slice(vm.value())?);
    }
    let seq = write.open_table(EVENTS)?.last()?.map_or(0, |(seq, _)| seq.value());
    write.commit()?;
    Ok((Found { term, rows, vms }, seq))
}

/// The number of the last event.
fn write(database: &Database, jobs: &[Job]) -> Result<u64, Fault> {
    let write = database.begin_write()?;
    let seq = {
        let mut rows = write.open_table(ROWS)?;
        let mut vms = write.open_table(VMS)?;
        let mut events = write.open_table(EVENTS)?;
        let mut seq = events.last()?.map_or(0, |(seq, _)| seq.value());
        for Job { change, .. } in jobs {
            if let Some(row) = &change.row {
                rows.insert(row.id.to_string().as_str(), serde_json::to_vec(row)?.as_slice())?;
            }
            if let Some((name, vm)) = &change.vm {
                vms.insert(name.as_str(), serde_json::to_vec(vm)?.as_slice())?;
            }
            for id in &change.forget {
                rows.remove(id.as_str())?;
            }
            for event in &change.events {
                seq += 1;
                let event = Event { seq, ..event.clone() };
                events.insert(seq, serde_json::to_vec(&event)?.as_slice())?;
            }
        }
        let keep = seq.saturating_sub(EVENTS_MAX);
        events.retain_in(..=keep, |_, _| false)?;
        seq
    };
    write.commit()?;
    Ok(seq)
}

fn events(database: &Database, cursor: u64, limit: usize) -> Result<(Vec<Event>, u64), Fault> {
    let read = database.begin_read()?;
    let table = read.open_table(EVENTS)?;
    let oldest = table.first()?.map_or(1, |(seq, _)| seq.value());
    let mut events = Vec::new();
    for entry in table.range(cursor.saturating_add(1)..)?.take(limit) {
        events.push(serde_json::from_slice(entry?.1.value())?);
    }
    Ok((events, oldest))
}

/// What can go wrong, before the path is known.
#[derive(Debug)]
enum Fault {
    Redb(redb::Error),
    Json(serde_json::Error),
    Io(io::Error),
    Format(u64),
}

impl Fault {
    fn at(self, path: &Path) -> JournalError {
        match self {
            Self::Redb(redb::Error::Io(error)) | Self::Io(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::StorageFull
                        | io::ErrorKind::QuotaExceeded
                        | io::ErrorKind::FileTooLarge
                ) =>
            {
                JournalError::Full(path.to_owned())
            }
            Self::Redb(error) => failed(path, &error),
            Self::Json(error) => failed(path, &error),
            Self::Io(error) => failed(path, &error),
            Self::Format(found) => JournalError::Format { path: path.to_owned(), found },
        }
    }
}

fn failed(path: &Path, what: &dyn std::fmt::Display) -> JournalError {
    JournalError::Failed { path: path.to_owned(), what: what.to_string() }
}

macro_rules! from {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Fault {
            fn from(error: $kind) -> Self {
                Self::Redb(error.into())
            }
        }
    )*};
}
from!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

impl From<serde_json::Error> for Fault {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
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
        let (events, oldest) = journal.events_after(1, 10).expect("read");
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
        let (events, oldest) = journal.events_after(0, usize::MAX).expect("read");
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
