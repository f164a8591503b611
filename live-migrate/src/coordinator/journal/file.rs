//! A journal in one file of this host (redb): the default. One coordinator at a
//! time has it open.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Change, EVENTS_MAX, Event, FORMAT, Found, JournalError, Store};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ROWS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("handoffs");
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");

/// The file, open.
pub struct FileStore {
    path: PathBuf,
    /// `None` after a failure: redb wants to be opened again.
    database: Arc<Mutex<Option<Database>>>,
}

impl std::fmt::Debug for FileStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl FileStore {
    /// Opens or makes it, and takes the next term, at least `term_min`.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was started.
    pub fn open(path: &Path, term_min: u64) -> Result<(Self, Found), JournalError> {
        let database = open(path)?;
        let found = start(&database, term_min).map_err(|error| error.at(path))?;
        let database = Arc::new(Mutex::new(Some(database)));
        Ok((Self { path: path.to_owned(), database }, found))
    }
}

#[async_trait]
impl Store for FileStore {
    async fn commit(&self, changes: &[&Change]) -> Result<u64, JournalError> {
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match database.take() {
            Some(open) => open,
            None => open(&self.path)?,
        };
        let seq = write(&open, changes).map_err(|error| error.at(&self.path))?;
        *database = Some(open);
        Ok(seq)
    }

    async fn events_after(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, u64), JournalError> {
        let (path, database) = (self.path.clone(), Arc::clone(&self.database));
        // It waits for a commit that is under way.
        let read = tokio::task::spawn_blocking(move || {
            let database = database.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(database) = &*database else {
                return Err(failed(&path, &"it is being opened again"));
            };
            events(database, cursor, limit).map_err(|error| error.at(&path))
        });
        read.await.map_err(|_| JournalError::Ended)?
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

fn start(database: &Database, term_min: u64) -> Result<Found, Fault> {
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
    Ok(Found { term, rows, vms, seq })
}

/// The number of the last event.
fn write(database: &Database, changes: &[&Change]) -> Result<u64, Fault> {
    let write = database.begin_write()?;
    let seq = {
        let mut rows = write.open_table(ROWS)?;
        let mut vms = write.open_table(VMS)?;
        let mut events = write.open_table(EVENTS)?;
        let mut seq = events.last()?.map_or(0, |(seq, _)| seq.value());
        for change in changes {
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
            Self::Format(found) => JournalError::Format { at: path.display().to_string(), found },
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
