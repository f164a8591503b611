//! What can go wrong in the extent pool, one enum per operation.
//!
//! Every text is one sentence that says what to do; sources are kept and not repeated.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why the metadata could not be read or written.
#[derive(Debug, Error)]
pub enum MetaError {
    /// Boxed: the engine's own type is large.
    #[error(transparent)]
    Engine(Box<redb::Error>),
    /// It was closed when its disk was full, and is opened by the next change.
    #[error("the metadata is closed since its disk was full")]
    Closed,
    /// What is there after a full disk is older than what was there before.
    #[error("the metadata is at change {found} although change {acknowledged} was acknowledged")]
    Behind { found: u64, acknowledged: u64 },
    /// The change is durable and may be there after a restart, although its caller is told that it failed.
    #[error("cannot note in pool.dat that the change is durable")]
    Mark(#[source] io::Error),
}

impl MetaError {
    /// There was no room for the change; it was not made.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let Self::Engine(error) = self else { return false };
        let redb::Error::Io(error) = &**error else { return false };
        matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        )
    }
}

impl<E: Into<redb::Error>> From<E> for MetaError {
    fn from(source: E) -> Self {
        Self::Engine(Box::new(source.into()))
    }
}

/// Why a data directory could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error(
        "data directory {} is in use by another storage server; stop that server or choose another directory", dir.display()
    )]
    InUse { dir: PathBuf },
    #[error("cannot create data directory {}; create its parent or choose a writable place", dir.display())]
    CreateDir {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a directory; give a directory as the data directory", dir.display())]
    NotADirectory { dir: PathBuf },
    #[error("cannot {op} {}; check its permissions and the disk under it", path.display())]
    File {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is missing although the pool's other files are there; restore it or use an empty directory", path.display()
    )]
    Missing { path: PathBuf },
    #[error("{} is damaged ({what}); restore the data directory from a replica or a copy", path.display())]
    Corrupt { path: PathBuf, what: String },
    #[error(
        "{} was written in format {found}, this server knows formats up to {known}; run a newer server", path.display()
    )]
    NewerFormat { path: PathBuf, found: u64, known: u64 },
    #[error(
        "{} uses extents of {found} bytes, this server uses {expected}; run the server that made it", path.display()
    )]
    ExtentSize { path: PathBuf, found: u64, expected: u64 },
    #[error("{} belongs to another pool than the files beside it; restore files of one pool together", path.display())]
    ForeignFile { path: PathBuf },
    #[error(
        "{} is at change {found} although change {acknowledged} was acknowledged: its disk lost a write, damaged the last one, or the file was put back from a copy; restore all files of the pool together from the newest copy", path.display()
    )]
    RolledBack { path: PathBuf, found: u64, acknowledged: u64 },
    #[error("cannot read or write the metadata in {}; check the disk under it", path.display())]
    Metadata {
        path: PathBuf,
        #[source]
        source: MetaError,
    },
}

/// Why a volume could not be made, changed or removed.
#[derive(Debug, Error)]
pub enum VolumeError {
    #[error("volume {name} already exists; choose another name or delete it first")]
    Exists { name: String },
    #[error("there is no volume {name}; list the volumes to see their names")]
    NotFound { name: String },
    #[error("there is no volume with id {id:016x}; it was deleted or never existed")]
    UnknownId { id: u64 },
    #[error(
        "volume name {name:?} is not usable; start with a letter or digit and use at most 64 of letters, digits, '.', '_' and '-'"
    )]
    BadName { name: String },
    #[error(
        "volume size {size_bytes} is not usable; give a multiple of 512 bytes from 512 bytes to 1 PiB"
    )]
    BadSize { size_bytes: u64 },
    #[error(
        "a volume cannot shrink from {current} to {asked} bytes; give at least its current size"
    )]
    ShrinkRefused { current: u64, asked: u64 },
    #[error(
        "no room to record the change: the disk under the data directory is full; nothing was changed, and whoever owns the volume goes on; make room there and ask again"
    )]
    Full(#[source] MetaError),
    #[error(
        "cannot record the change in the pool's metadata; check the disk under the data directory"
    )]
    Metadata(#[source] MetaError),
    #[error("no random number for a volume id could be had from the system")]
    Random(#[source] io::Error),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(
        "the volume is gone but its space could not be given back; it is given back at the next start"
    )]
    Reclaim(#[source] IoError),
}

impl From<MetaError> for VolumeError {
    fn from(source: MetaError) -> Self {
        if source.is_full() { Self::Full(source) } else { Self::Metadata(source) }
    }
}

/// Why the pool as a whole could not do something.
#[derive(Debug, Error)]
pub enum PoolError {
    /// Latched: after a failed fdatasync nobody knows which pages reached the disk, so success is never claimed again.
    #[error("the pool has failed ({reason}); check the disk, then restart the storage server")]
    Failed { reason: String },
    /// Nothing is lost: the records are durable in the journal, and the next open replays them.
    #[error(
        "the disk under the data directory is full: the map's last changes stay in the journal; make room before or after the next start"
    )]
    NoRoom,
}

/// Why the journal could not be applied to the metadata.
#[derive(Debug, Error)]
pub(super) enum CheckpointError {
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Metadata(#[from] MetaError),
    #[error("cannot read the journal")]
    Journal(#[source] io::Error),
}

impl CheckpointError {
    /// The metadata had no room; what it took already is as if the same records were applied twice.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Metadata(error) if error.is_full())
    }
}

/// Why one I/O on a volume failed.
#[derive(Debug, Error)]
pub enum IoError {
    #[error(
        "{len} bytes at offset {offset} reach past the volume's end at {size_bytes}; stay inside the volume"
    )]
    OutOfRange { offset: u64, len: u64, size_bytes: u64 },
    #[error(
        "the pool has no space for a new extent; free space by discarding or deleting, or enlarge the pool"
    )]
    NoSpace,
    #[error("the volume was deleted")]
    Deleted,
    #[error(transparent)]
    PoolFailed(#[from] PoolError),
    #[error("the pool's data file could not be read or written")]
    Io(#[source] io::Error),
}

impl From<io::Error> for IoError {
    fn from(source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace,
            _ => Self::Io(source),
        }
    }
}
