//! The mark: the number of the last change of `meta.redb` that was acknowledged, kept outside that file.
//!
//! After a crash the engine falls back to the last commit that it finds whole, and cannot know that there was one
//! behind it. So every change carries a number, and when it is durable, before anybody is told, the number is written
//! into `pool.dat`. An opening pool whose `meta.redb` is at a lower number is missing something that was acknowledged:
//! an access right, a volume, a size.
//!
//! Written without a sync of its own: it survives a kill at once, and a power loss as soon as a guest flushes or the
//! kernel writes the page back (half a minute). It is never ahead of what is durable, so a mark that was lost makes an
//! opening less strict and never refuses a sound pool.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use super::layout::{MARK_BYTES, MARK_OFFSETS, PoolId, decode_mark, encode_mark};

#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    pool_id: PoolId,
    /// What was written last. Held while writing, so that a lower number never covers a higher one.
    change: Mutex<u64>,
}

impl Mark {
    /// The mark in this `pool.dat`; 0 if there is none, as in a new pool or one of an older server.
    pub(super) fn read(file: File, pool_id: PoolId) -> io::Result<Self> {
        let mut change = 0;
        for at in MARK_OFFSETS {
            let mut bytes = [0; MARK_BYTES];
            match file.read_exact_at(&mut bytes, at) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => bytes.fill(0),
                read => read?,
            }
            match decode_mark(&bytes, &pool_id) {
                Some(found) => change = change.max(found),
                None if bytes == [0; MARK_BYTES] => {}
                None => tracing::warn!(
                    offset = at,
                    "a mark in pool.dat is damaged: the other one, or nothing, tells whether meta.redb is as new as it was; check the disk"
                ),
            }
        }
        Ok(Self { file, pool_id, change: Mutex::new(change) })
    }

    pub(super) fn change(&self) -> u64 {
        *self.lock()
    }

    /// This change and all before it are durable. Written in turn at two places on pages of their own, so that a torn
    /// write leaves one.
    pub(super) fn durable(&self, change: u64) -> io::Result<()> {
        let mut last = self.lock();
        if change > *last {
            let at = MARK_OFFSETS[usize::from(change % 2 == 1)];
            self.file.write_all_at(&encode_mark(change, &self.pool_id), at)?;
            *last = change;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.change.lock().expect("nothing panics under this lock")
    }
}
