//! A block device, or a file that stands in for one, with direct I/O and the requests that Linux has for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Direct I/O and device DMA want buffers aligned to a page.
const ALIGN: usize = 4096;

// From the kernel's uapi header linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Something with sectors. The load is written against this so that its checks can be tried on disks that lie.
pub trait Disk: Send + Sync {
    /// Fills `buf` from byte `at`.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all of `buf` at byte `at`.
    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()>;
    /// Returns once all acknowledged writes are durable.
    fn flush(&self) -> io::Result<()>;
}

/// A block device or a regular file.
#[derive(Debug)]
pub struct Device {
    file: File,
}

impl Device {
    /// Opens for direct I/O, or for buffered I/O where the filesystem has no direct I/O and `direct` is false.
    pub fn open(path: &Path, direct: bool) -> io::Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
            Ok(file) => Ok(Self { file }),
            // A read-only disk refuses to be opened for writing; what may be read may still be checked.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM)) =>
            {
                Ok(Self { file: OpenOptions::new().read(true).custom_flags(flags).open(path)? })
            }
            Err(e) => Err(e),
        }
    }

    /// Discards `len` bytes from byte `at`.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.range_ioctl(BLKDISCARD, at, len)
    }

    /// Makes `len` bytes from byte `at` read as zeros.
    pub fn zero_out(&self, at: u64, len: u64) -> io::Result<()> {
        self.range_ioctl(BLKZEROOUT, at, len)
    }

    fn range_ioctl(&self, request: libc::c_ulong, at: u64, len: u64) -> io::Result<()> {
        let range = [at, len];
        // SAFETY: both requests read two u64 from the pointer, which outlives the call.
        let rc = unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Disk for Device {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(buf, at)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A zeroed buffer whose first byte is page-aligned.
#[derive(Debug)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start, len }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_of_the_asked_length() {
        for len in [512, 4096, 131_072] {
            let buf = AlignedBuf::new(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
        }
    }
}
