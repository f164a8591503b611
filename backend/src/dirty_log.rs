//! The dirty log of a migration: one bit per page of guest memory that this
//! process has written (vhost-user.rst, "Migration").
//!
//! Marking happens at completion: after the bytes are in memory and before the
//! used ring says so. A new log replaces the old one with a grace period: a
//! queue takes it over between two batches and says so, and only then is the
//! front-end answered, so nobody marks the old log any more.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::memory::{Mapping, PAGE_BYTES};

/// A mapped log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    offset: usize,
    len: usize,
}

impl DirtyLog {
    /// Maps a log of `size` bytes at `offset` of `fd`.
    ///
    /// # Errors
    /// When the numbers overflow or the descriptor cannot be mapped.
    pub fn map(fd: &OwnedFd, size: u64, offset: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::new(io::ErrorKind::InvalidInput, "the log is too large");
        let end = size.checked_add(offset).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the log's size overflows")
        })?;
        let mapping = Mapping::new(fd, end)?;
        Ok(Self {
            mapping,
            offset: usize::try_from(offset).map_err(invalid)?,
            len: usize::try_from(size).map_err(invalid)?,
        })
    }

    /// Marks the pages of a range of guest memory. Pages behind the end of the
    /// log are passed over: the front-end does not track them.
    pub fn mark(&self, guest_addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = guest_addr.saturating_add(len - 1) / PAGE_BYTES;
        for page in guest_addr / PAGE_BYTES..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.len {
                return;
            }
            // SAFETY: inside the mapping; the front-end changes it only with
            // atomic operations, as we do.
            let cell = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(self.offset + byte)) };
            // Release: the page's new bytes are visible to whoever sees the bit.
            cell.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn each_touched_page_is_marked_and_no_other() {
        let mut file = tempfile::tempfile().expect("temp file");
        file.set_len(4096).expect("size");
        let log = DirtyLog::map(&file.try_clone().expect("dup").into(), 4, 16).expect("map");
        log.mark(0, 0);
        log.mark(4095, 2); // pages 0 and 1
        log.mark(9 * 4096, 4096); // page 9
        log.mark(31 * 4096, 1 << 40); // page 31 and far behind the end
        log.mark(u64::MAX, 1);
        let mut bytes = vec![];
        file.rewind().expect("rewind");
        file.read_to_end(&mut bytes).expect("read");
        assert_eq!(&bytes[16..20], [0b11, 0b10, 0, 0x80]);
        assert!(bytes[..16].iter().chain(&bytes[20..]).all(|b| *b == 0), "wrote outside the log");
    }
}
