//! A volume on a local file or block device: for `--blk-file`, tests, and disks
//! that need no storage server.
//!
//! I/O is done inside [`VolumeQueue::submit`], with plain system calls through
//! the page cache: a cold read blocks the queue's thread until the disk has
//! answered. That is the price of a driver without threads; a volume that has
//! to be fast on a cold disk belongs on a storage server.
//!
//! Knows nothing of other hosts: the lock keeps processes of this host apart,
//! nothing more.

use std::fs::{File, OpenOptions as FsOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::{Capabilities, Support};
use crate::fence::Fence;
use crate::open::OpenError;
use crate::volume::{
    Completion, EventListener, Extent, Geometry, IoError, Op, QueueError, Tag, Volume, VolumeQueue,
    VolumeState,
};

/// What this driver can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    fence: Fence::None,
    handoff: false,
    queues: Support::Yes,
    discard: Support::Yes,
    growth: Support::No,
    waits: Support::No,
    encrypted: Support::No,
};

const SECTOR_BYTES: u64 = baton_protocol::units::SECTOR_BYTES;

/// The most iovecs one system call takes on Linux.
pub(crate) const IOV_MAX: usize = 1024;

/// Written over and over where the file system cannot zero a range, bytes.
const ZEROS_BYTES: usize = 64 << 10;
static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];

/// `_IOR(0x12, 114, size_t)` of linux/fs.h: size of a block device, bytes.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
/// `_IO(0x12, 104)` of linux/fs.h: logical block size, bytes, as `int`.
const BLKSSZGET: libc::Ioctl = 0x1268;

/// A local file or block device. Its size is the one it had when it was opened.
#[derive(Debug)]
pub struct FileVolume {
    file: Arc<File>,
    geometry: Geometry,
}

impl FileVolume {
    /// Opens `path`; with write access it is locked against other openers that
    /// lock (OFD lock, so it ends with this process whatever happens).
    ///
    /// # Errors
    /// [`OpenError`] when the file cannot be opened, locked, or is no disk.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let failed = |source: io::Error| OpenError::File { path: path.to_owned(), source };
        // NONBLOCK: a FIFO must be refused below, not waited for.
        let file = FsOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path);
        let file = match file {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
                return Err(OpenError::NotAFile(path.to_owned()));
            }
            other => other.map_err(failed)?,
        };
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        let (bytes, block_bytes) = if kind.is_block_device() {
            device_size(&file).map_err(failed)?
        } else if kind.is_file() {
            (metadata.len(), 512)
        } else {
            return Err(OpenError::NotAFile(path.to_owned()));
        };
        if !read_only {
            lock_file(&file).map_err(|e| match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => OpenError::Locked(path.to_owned()),
                _ => failed(e),
            })?;
        }
        let size_bytes = bytes / SECTOR_BYTES * SECTOR_BYTES;
        if size_bytes == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        if size_bytes != bytes {
            tracing::warn!(
                "the last {} bytes of `{}` do not fill a sector and are left out",
                bytes - size_bytes,
                path.display()
            );
        }
        let geometry = Geometry {
            id: id_of(path),
            size_bytes,
            block_bytes,
            discard_bytes: u32::try_from(metadata.blksize()).unwrap_or(4096).max(512),
            read_only,
        };
        Ok(Self { file: Arc::new(file), geometry })
    }
}

fn device_size(file: &File) -> io::Result<(u64, u32)> {
    let (mut bytes, mut block) = (0u64, 512 as libc::c_int);
    // SAFETY: the kernel fills one integer of the type it documents for each.
    let done = unsafe {
        [
            libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes),
            libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block),
        ]
    };
    if done != [0, 0] {
        return Err(io::Error::last_os_error());
    }
    Ok((bytes, u32::try_from(block).unwrap_or(512)))
}

/// Locks a file for writing, against everybody else who does, until the last copy of the descriptor is closed.
///
/// # Errors
/// EAGAIN or EACCES: it is locked.
#[allow(clippy::cast_possible_truncation, reason = "the constants are below 3")]
pub fn lock_file(file: &File) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: a valid descriptor and a whole `flock`.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The end of the file's name: what tells two disks of a guest apart.
fn id_of(path: &Path) -> [u8; 20] {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut start = name.len().saturating_sub(20);
    while !name.is_char_boundary(start) {
        start += 1;
    }
    let tail = &name.as_bytes()[start..];
    let mut id = [0; 20];
    id[..tail.len()].copy_from_slice(tail);
    id
}

impl Volume for FileVolume {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn blocks(&self) -> bool {
        true
    }

    fn state(&self) -> VolumeState {
        VolumeState::Connected
    }

    fn open_queue(&self, _index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(io::Error::from)?;
        Ok(Box::new(FileQueue {
            file: Arc::clone(&self.file),
            geometry: self.geometry,
            done: Vec::with_capacity(depth),
            iov: Vec::with_capacity(IOV_MAX),
            wake,
        }))
    }

    /// Nothing ever happens to a local file.
    fn set_listener(&self, _listener: EventListener) {}

    fn close(&self, _give_back: bool) {}
}

/// One queue of a [`FileVolume`].
struct FileQueue {
    file: Arc<File>,
    geometry: Geometry,
    done: Vec<Completion>,
    /// Scratch: what is left of a request's buffers.
    iov: Vec<libc::iovec>,
    /// Never readable: a request is done when `submit` returns, and the
    /// submitter polls next anyway.
    wake: EventFd,
}

// SAFETY: `iov` is scratch that is filled and used within one call; the pointers
// left in it are never followed.
unsafe impl Send for FileQueue {}

impl VolumeQueue for FileQueue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        let result = self.run(op, data);
        if let Err(error) = result {
            tracing::debug!(?op, %error, "request failed");
        }
        self.done.push(Completion { tag, result });
    }

    unsafe fn submit_map(&mut self, tag: Tag, offset: u64, len: u64, into: &mut [Extent]) -> bool {
        let result = self.check(offset, len).and_then(|()| {
            if len == 0 || into.is_empty() {
                return Err(IoError::OutOfRange);
            }
            map(&self.file, offset, offset + len, into).map_err(|e| io_error(&e))
        });
        self.done.push(Completion { tag, result });
        true
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

impl FileQueue {
    fn run(&mut self, op: Op, data: &[libc::iovec]) -> Result<(), IoError> {
        match op {
            Op::Read { offset } => self.transfer(offset, data, libc::preadv64),
            Op::Write { offset } => {
                self.writable()?;
                self.transfer(offset, data, libc::pwritev64)
            }
            Op::Flush if self.geometry.read_only => Ok(()),
            Op::Flush => self.file.sync_data().map_err(|e| io_error(&e)),
            Op::Discard { offset, len } => {
                self.writable()?;
                self.check(offset, len)?;
                match self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len) {
                    // Discard is a hint: a file that cannot give space back keeps it.
                    Err(e) if unsupported(&e) => Ok(()),
                    other => other.map_err(|e| io_error(&e)),
                }
            }
            Op::WriteZeroes { offset, len, unmap } => {
                self.writable()?;
                self.check(offset, len)?;
                let mode =
                    if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                match self.allocate(mode, offset, len) {
                    Err(e) if unsupported(&e) => self.write_zeros(offset, len),
                    other => other,
                }
                .map_err(|e| io_error(&e))
            }
        }
    }

    fn writable(&self) -> Result<(), IoError> {
        if self.geometry.read_only { Err(IoError::ReadOnly) } else { Ok(()) }
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let aligned = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        match offset.checked_add(len) {
            Some(end) if aligned && end <= self.geometry.size_bytes => Ok(()),
            _ => Err(IoError::OutOfRange),
        }
    }

    fn transfer(
        &mut self,
        offset: u64,
        data: &[libc::iovec],
        call: unsafe extern "C" fn(
            libc::c_int,
            *const libc::iovec,
            libc::c_int,
            libc::off64_t,
        ) -> isize,
    ) -> Result<(), IoError> {
        let len = data.iter().fold(0u64, |sum, v| sum.saturating_add(v.iov_len as u64));
        self.check(offset, len)?;
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(IOV_MAX));
            rest = later;
            self.iov.clear();
            self.iov.extend_from_slice(now);
            at = self.transfer_group(at, call)?;
        }
        Ok(())
    }

    /// Transfers all of `self.iov` at `at`; returns where it ended.
    fn transfer_group(
        &mut self,
        mut at: u64,
        call: unsafe extern "C" fn(
            libc::c_int,
            *const libc::iovec,
            libc::c_int,
            libc::off64_t,
        ) -> isize,
    ) -> Result<u64, IoError> {
        let mut first = 0;
        loop {
            while first < self.iov.len() && self.iov[first].iov_len == 0 {
                first += 1;
            }
            let iov = &self.iov[first..];
            if iov.is_empty() {
                return Ok(at);
            }
            let count = libc::c_int::try_from(iov.len()).expect("at most IOV_MAX");
            let position = libc::off64_t::try_from(at).map_err(|_| IoError::OutOfRange)?;
            // SAFETY: the submitter vouches for the memory until completion; the
            // kernel checks each address and answers EFAULT for a bad one.
            let n = unsafe { call(self.file.as_raw_fd(), iov.as_ptr(), count, position) };
            let Ok(n) = usize::try_from(n) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(io_error(&error));
            };
            if n == 0 {
                // Somebody shortened the file under us.
                return Err(IoError::Io);
            }
            at += n as u64;
            first += advance(&mut self.iov[first..], n);
        }
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let bad = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let (offset, len) = (
            libc::off64_t::try_from(offset).map_err(bad)?,
            libc::off64_t::try_from(len).map_err(bad)?,
        );
        loop {
            // SAFETY: plain integers and a valid descriptor.
            let done = unsafe {
                libc::fallocate64(
                    self.file.as_raw_fd(),
                    mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset,
                    len,
                )
            };
            if done == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        while len > 0 {
            let n = len.min(ZEROS_BYTES as u64);
            let part = usize::try_from(n).expect("at most ZEROS_BYTES");
            self.file.write_all_at(&ZEROS[..part], offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }
}

/// Tells of `from..to`, which is not empty. A file system that knows nothing of
/// holes says that all is data.
fn map(file: &File, from: u64, to: u64, into: &mut [Extent]) -> io::Result<()> {
    let (mut at, mut told) = (from, 0);
    while at < to && told < into.len() {
        // Behind the last byte of data: ENXIO.
        let data = seek(file, at, libc::SEEK_DATA)?.map_or(to, |data| data.clamp(at, to));
        if data > at {
            // Not a whole sector at the front may be data: those bytes go with it.
            let hole = (data - at) / SECTOR_BYTES * SECTOR_BYTES;
            if hole > 0 {
                into[told] = Extent { len: hole, zeros: 1 };
                (at, told) = (at + hole, told + 1);
                continue;
            }
        }
        let end = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(to);
        let end = end.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(to).clamp(at, to);
        if end == at {
            // The file was shortened or filled meanwhile; reading will tell.
            into[told] = Extent { len: to - at, zeros: 0 };
            (at, told) = (to, told + 1);
            continue;
        }
        into[told] = Extent { len: end - at, zeros: 0 };
        (at, told) = (end, told + 1);
    }
    into[told..].fill(Extent::default());
    Ok(())
}

/// `None`: there is nothing more behind `from`.
fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let from = libc::off64_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: plain integers and a valid descriptor, whose position nobody uses.
    let at = unsafe { libc::lseek64(file.as_raw_fd(), from, whence) };
    if let Ok(at) = u64::try_from(at) {
        return Ok(Some(at));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

/// Takes `n` bytes off the front; returns how many iovecs are used up.
fn advance(iov: &mut [libc::iovec], mut n: usize) -> usize {
    for (i, v) in iov.iter_mut().enumerate() {
        if n < v.iov_len {
            v.iov_base = v.iov_base.wrapping_byte_add(n);
            v.iov_len -= n;
            return i;
        }
        n -= v.iov_len;
    }
    iov.len()
}

fn unsupported(error: &io::Error) -> bool {
    // ENODEV: fallocate on a device that cannot; ENOTTY and ENOSYS: old kernels.
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOTTY | libc::ENOSYS)
    )
}

/// The one place where a system error becomes a request's outcome.
fn io_error(error: &io::Error) -> IoError {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => IoError::NoSpace,
        Some(libc::EROFS | libc::EPERM | libc::EBADF) => IoError::ReadOnly,
        _ => IoError::Io,
    }
}

#[cfg(test)]
mod tests;
