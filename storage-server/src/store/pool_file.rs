//! `pool.dat`: reading, writing, giving space to and taking it from byte ranges of the file.
//!
//! Knows what the filesystem can do (probed once at open) and nothing of volumes or maps.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SpliceFFlags, fallocate, fcntl, splice};

use super::layout::EXTENT_BYTES;
use super::pool_map::PoolMap;

/// Below this, zeros are written: cheaper than changing the file's extents in the filesystem's journal.
const ZERO_BY_WRITING_MAX: u64 = 64 << 10;
/// Discards work on whole pages; a smaller hole would free nothing.
pub(super) const PUNCH_ALIGN: u64 = 4096;
/// Where the probes work: inside slot 0, behind the header.
const PROBE_OFFSET: u64 = EXTENT_BYTES / 2;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Debug)]
pub(super) struct PoolFile {
    file: File,
    map: PoolMap,
    len: AtomicU64,
    nowait: bool,
    punch: bool,
    zero_range: bool,
    preallocate: bool,
    takes_pipes: bool,
}

pub(super) fn slot_offset(slot: u32) -> u64 {
    u64::from(slot) * EXTENT_BYTES
}

impl PoolFile {
    /// `file` is at least one extent long (the header slot).
    pub(super) fn new(file: File) -> io::Result<Self> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let preallocate = supported(&file, keep)?;
        let zero_range = supported(&file, keep | FallocateFlags::FALLOC_FL_ZERO_RANGE)?;
        let punch = supported(&file, keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE)?;
        let nowait = match read_nowait(&file, 0, &mut [0; 64]) {
            Ok(_) => true,
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN) => true,
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => false,
                _ => return Err(e),
            },
        };
        let takes_pipes = takes_pipes(&file)?;
        let _ = forget_reads(&file);
        let (map, len) = (PoolMap::default(), AtomicU64::new(file.metadata()?.len()));
        Ok(Self { file, map, len, nowait, punch, zero_range, preallocate, takes_pipes })
    }

    /// Whether the filesystem lets the file be written by splice(2).
    pub(super) fn takes_pipes(&self) -> bool {
        self.takes_pipes
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// One more than the last slot that lies at least partly inside the file.
    pub(super) fn end_slot(&self) -> u64 {
        self.len.load(Ordering::Relaxed).div_ceil(EXTENT_BYTES)
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Reads only what the page cache holds. `Ok(false)`: not all of it was there, `buf` is of no use.
    /// On a filesystem that cannot tell (it has no disk behind it, or is an old one) this is a plain read.
    pub(super) fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if !self.nowait {
            return self.read(offset, buf).map(|()| true);
        }
        loop {
            match read_nowait(&self.file, offset, buf) {
                Ok(n) => return Ok(n == buf.len()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }

    /// Where the bytes are in memory, if they are; see [`PoolMap::resident`].
    pub(super) fn resident(&self, offset: u64, len: usize) -> Option<*const u8> {
        self.map.resident(&self.file, offset, len)
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Gives a zero slot its disk space, so that a full filesystem shows here and not at writeback.
    pub(super) fn allocate(&self, slot: u32) -> io::Result<()> {
        let offset = slot_offset(slot);
        let done = if self.preallocate {
            retry(|| fallocate(&self.file, FallocateFlags::empty(), off(offset), off(EXTENT_BYTES)))
        } else {
            self.write_zeros(offset, EXTENT_BYTES)
        };
        if done.is_ok() {
            self.len.fetch_max(offset + EXTENT_BYTES, Ordering::Relaxed);
        } else if self.punch {
            // Half an extent may have been had; give it back. A second failure changes nothing.
            let _ = self.punch(offset, EXTENT_BYTES);
        }
        done
    }

    /// Makes the file reach the end of `slot`, for a map that survived a power loss which the file's length did not.
    pub(super) fn extend_to(&self, slot: u32) -> io::Result<()> {
        let len = slot_offset(slot) + EXTENT_BYTES;
        if len > self.len.load(Ordering::Relaxed) {
            self.file.set_len(len)?;
            self.len.store(len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Zeros the range and gives its space back where the filesystem can.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.punch {
            return self.write_zeros_inside(offset, len);
        }
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    /// Zeros exactly these bytes of the file and keeps their space.
    pub(super) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if len <= ZERO_BY_WRITING_MAX || !self.zero_range {
            return self.write_zeros_inside(offset, len);
        }
        self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
    }

    /// Zeros exactly these bytes of the file and gives space back where that is worth it.
    pub(super) fn zero_and_release(&self, offset: u64, len: u64) -> io::Result<()> {
        if len <= ZERO_BY_WRITING_MAX {
            return self.write_zeros_inside(offset, len);
        }
        self.punch(offset, len)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Bytes an unprivileged process may still write to the filesystem.
    pub(super) fn available_bytes(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(&self.file)?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        retry(|| fallocate(&self.file, mode, off(offset), off(len)))
    }

    /// Like `write_zeros` but never makes the file longer (behind its end everything is zero).
    fn write_zeros_inside(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = (offset + len).min(self.len.load(Ordering::Relaxed));
        self.write_zeros(offset, end.saturating_sub(offset))
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = usize::try_from(end - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(at, &ZEROS[..n])?;
            at += n as u64;
        }
        Ok(())
    }
}

/// File offsets stay below 2^32 slots x 1 MiB = 2^52.
#[allow(clippy::cast_possible_wrap, reason = "offsets are below 2^52")]
fn off(bytes: u64) -> libc::off_t {
    bytes as libc::off_t
}

fn retry(mut call: impl FnMut() -> nix::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            done => return done.map_err(io::Error::from),
        }
    }
}

/// Asks the filesystem by doing it to an unused page. Only "not supported" means no: a full disk says nothing.
fn supported(file: &File, mode: FallocateFlags) -> io::Result<bool> {
    match retry(|| fallocate(file, mode, off(PROBE_OFFSET), off(PUNCH_ALIGN))) {
        Ok(()) => Ok(true),
        Err(e) => match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(false),
            Some(libc::ENOSPC | libc::EDQUOT) => Ok(true),
            _ => Err(e),
        },
    }
}

/// Asks the filesystem, too.
fn takes_pipes(file: &File) -> io::Result<bool> {
    let (out, into) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::unistd::write(&into, &[0])?;
    let mut offset = off(PROBE_OFFSET);
    match splice(&out, None, file, Some(&mut offset), 1, SpliceFFlags::empty()) {
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM) => Ok(false),
        Ok(_) | Err(Errno::ENOSPC | Errno::EDQUOT) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Has the filesystem not note when the file was last read, which nobody asks and each read would pay for. Only the
/// file's owner may; to others it is noted.
fn forget_reads(file: &File) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME)).map(drop)
}

fn read_nowait(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: `iov` names `buf`, which is exclusively borrowed and outlives the call.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), &iov, 1, off(offset), libc::RWF_NOWAIT) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> PoolFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(EXTENT_BYTES).unwrap();
        PoolFile::new(file).unwrap()
    }

    /// The same promises with every filesystem feature, and with none.
    fn both(test: impl Fn(&PoolFile)) {
        test(&pool());
        let mut plain = pool();
        (plain.punch, plain.zero_range) = (false, false);
        (plain.preallocate, plain.nowait) = (false, false);
        test(&plain);
    }

    /// A file for appending refuses splice(2) as a filesystem does that cannot; nothing is written by asking.
    #[test]
    fn whether_a_pipe_may_be_spliced_is_asked_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.dat");
        let open = |append: bool| {
            let mut options = File::options();
            options.create(true).read(true).write(!append).append(append).open(&path).unwrap()
        };
        assert!(takes_pipes(&open(false)).unwrap());
        let before = std::fs::metadata(&path).unwrap().len();
        assert!(!takes_pipes(&open(true)).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), before);
    }

    #[test]
    fn reads_are_not_noted_by_the_filesystem() {
        use std::os::unix::fs::MetadataExt;
        let pool = pool();
        // Older than the data, so that the usual `relatime` would note the next read.
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30);
        pool.file.set_times(std::fs::FileTimes::new().set_accessed(long_ago)).unwrap();
        let read_at = || pool.file.metadata().unwrap().atime();
        let before = read_at();
        pool.read(0, &mut [0; 4096]).unwrap();
        assert!(pool.try_read(0, &mut [0; 4096]).unwrap());
        assert_eq!((before, read_at()), (1 << 30, 1 << 30));
    }

    #[test]
    fn zeroing_is_exact_to_the_byte() {
        both(|pool| {
            pool.allocate(1).unwrap();
            type Zero = fn(&PoolFile, u64, u64) -> io::Result<()>;
            for zero in [PoolFile::zero as Zero, PoolFile::zero_and_release] {
                for (from, len) in [(0, 1), (511, 4098), (4095, 200_001), (0, EXTENT_BYTES)] {
                    pool.write(EXTENT_BYTES, &vec![0xAB; 1 << 20]).unwrap();
                    zero(pool, EXTENT_BYTES + from, len).unwrap();
                    let mut seen = vec![1; 1 << 20];
                    pool.read(EXTENT_BYTES, &mut seen).unwrap();
                    for (at, byte) in (0u64..).zip(seen) {
                        let inside = at >= from && at < from + len;
                        assert_eq!(byte, if inside { 0 } else { 0xAB }, "byte {at}");
                    }
                }
            }
        });
    }

    #[test]
    fn zeroing_never_lengthens_the_file() {
        both(|pool| {
            pool.punch(slot_offset(3), EXTENT_BYTES).unwrap();
            pool.zero(slot_offset(3), EXTENT_BYTES).unwrap();
            assert_eq!(pool.end_slot(), 1);
            assert_eq!(pool.file.metadata().unwrap().len(), EXTENT_BYTES);
        });
    }

    #[test]
    fn allocated_slots_are_zero_and_punched_ones_give_space_back() {
        use std::os::unix::fs::MetadataExt;
        both(|pool| {
            let blocks = || pool.file.metadata().unwrap().blocks() * 512;
            let before = blocks();
            pool.allocate(2).unwrap();
            assert_eq!(pool.end_slot(), 3);
            assert!(blocks() >= before + EXTENT_BYTES);
            let mut seen = vec![1; 1 << 20];
            assert!(pool.try_read(slot_offset(2), &mut seen).unwrap_or(true));
            pool.read(slot_offset(2), &mut seen).unwrap();
            assert!(seen.iter().all(|b| *b == 0));
            pool.write(slot_offset(2), &[9; 5000]).unwrap();
            pool.punch(slot_offset(2), EXTENT_BYTES).unwrap();
            pool.read(slot_offset(2), &mut seen).unwrap();
            assert!(seen.iter().all(|b| *b == 0));
            if pool.punch {
                assert!(blocks() < before + EXTENT_BYTES);
            }
        });
    }
}
