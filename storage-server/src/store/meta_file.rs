//! The file under `meta.redb`'s engine, with one difference to the engine's own: a sync that fails is never taken for
//! a disk that is full.
//!
//! The engine refuses everything after a failure until it is opened anew. After a write that found no room that is
//! safe: what was committed before is whole. After a sync that failed it is not, because the kernel then takes pages
//! for clean that never reached the disk, and some file systems say that they are full only at a sync.

use std::fs::File;
use std::io;
use std::ops::Bound;

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

#[derive(Debug)]
pub(super) struct MetaFile<Inner = FileBackend>(Inner);

impl MetaFile {
    pub(super) fn new(file: File) -> Result<Self, DatabaseError> {
        Ok(Self(FileBackend::new(file)?))
    }
}

impl<Inner: StorageBackend> StorageBackend for MetaFile<Inner> {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data().map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.0.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use redb::backends::InMemoryBackend;

    use super::*;
    use crate::store::error::MetaError;

    /// Full at every write, or only when it is synced.
    #[derive(Debug)]
    struct Full(InMemoryBackend, bool);

    impl Full {
        fn unless(fine: bool) -> io::Result<()> {
            if fine { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
        }
    }

    impl StorageBackend for Full {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            Self::unless(!self.1)
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            Self::unless(self.1)?;
            self.0.write(offset, data)
        }
    }

    #[test]
    fn only_a_write_finds_a_disk_full() {
        for at_sync in [false, true] {
            let file = MetaFile(Full(InMemoryBackend::new(), at_sync));
            let made = redb::Builder::new().create_with_backend(file);
            let error = MetaError::from(made.expect_err("full"));
            assert_eq!(error.is_full(), !at_sync, "{error}");
        }
    }
}
