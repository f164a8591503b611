//! Memory that plays a guest's RAM: a memfd that the back-end maps too.
//!
//! Addresses are guest-physical. Everything is read and written through raw copies and atomics, because the back-end
//! changes it at any time.

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;
use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32};

/// Where the guest's memory begins. Not 0, so that a front-end address, a guest address and an offset that are mixed
/// up do not agree by luck.
pub const BASE: u64 = 0x1000_0000;

/// A mapped memfd.
#[derive(Debug)]
pub struct SharedMap {
    fd: OwnedFd,
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping lives as long as the value, and every access is an atomic or a raw copy of bytes.
unsafe impl Send for SharedMap {}
// SAFETY: as above; racing copies of plain bytes are what shared guest memory is.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// A zeroed map of `len` bytes.
    pub fn new(name: &str, len: usize) -> Result<Self> {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC).context("cannot make a memfd")?;
        ftruncate(&fd, i64::try_from(len)?)?;
        Self::of_fd(fd, len)
    }

    /// Maps the first `len` bytes of a descriptor that came from elsewhere.
    pub fn of_fd(fd: OwnedFd, len: usize) -> Result<Self> {
        let length = NonZeroUsize::new(len).context("cannot map nothing")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &fd, 0) }
            .context("cannot map memory")?;
        Ok(Self { fd, at: at.cast(), len })
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: see [`Self::of_fd`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A pointer to `len` bytes at `offset`.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn ptr(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} are outside"
        );
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.at.as_ptr().add(offset) }
    }

    /// A byte that the other side may change.
    #[must_use]
    pub fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the mapping, which lives as long as self; any address is aligned for a byte.
        unsafe { AtomicU8::from_ptr(self.ptr(offset, 1)) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: our own mapping, with no reference left. It cannot fail for a valid mapping.
        let _ = unsafe { munmap(self.at.cast(), self.len) };
    }
}

/// A guest's RAM, in one region from [`BASE`] on.
#[derive(Debug)]
pub struct GuestMemory {
    map: SharedMap,
    next: Mutex<usize>,
}

impl GuestMemory {
    /// RAM of `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        Ok(Self { map: SharedMap::new("guest-ram", len)?, next: Mutex::new(0) })
    }

    /// RAM of `len` bytes that is a file, so that another process can copy it. What the file holds is kept.
    pub fn of_file(path: &Path, len: usize) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        file.set_len(len as u64)?;
        Ok(Self { map: SharedMap::of_fd(file.into(), len)?, next: Mutex::new(0) })
    }

    /// Takes `len` zeroed bytes that nobody else uses, for good.
    pub fn alloc(&self, len: usize, align: usize) -> Result<u64> {
        let mut next = self.next.lock().expect("nobody panics with this");
        let start = next.next_multiple_of(align);
        if start + len > self.map.len() {
            bail!(
                "the front-end's memory of {} bytes is too small; raise Options::memory_bytes",
                self.map.len()
            );
        }
        *next = start + len;
        Ok(BASE + start as u64)
    }

    /// The memory behind it.
    #[must_use]
    pub fn map(&self) -> &SharedMap {
        &self.map
    }

    /// The address that the front-end uses for a guest address, in messages that want such.
    #[must_use]
    pub fn user_address(&self, gpa: u64) -> u64 {
        self.ptr(gpa, 0) as u64
    }

    /// A pointer to `len` bytes.
    ///
    /// # Panics
    /// When they are outside.
    #[must_use]
    pub fn ptr(&self, gpa: u64, len: usize) -> *mut u8 {
        let offset = gpa
            .checked_sub(BASE)
            .and_then(|o| usize::try_from(o).ok())
            .expect("an address of this memory");
        self.map.ptr(offset, len)
    }

    /// Copies bytes in.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let to = self.ptr(gpa, bytes.len());
        // SAFETY: checked by ptr; a slice of ours does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out.
    #[must_use]
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let from = self.ptr(gpa, len);
        // SAFETY: checked by ptr; a vector of ours does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
        bytes
    }

    /// One byte as it is now.
    #[must_use]
    pub fn read_byte(&self, gpa: u64) -> u8 {
        // SAFETY: checked by ptr; any address is aligned for a byte.
        unsafe { AtomicU8::from_ptr(self.ptr(gpa, 1)) }.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// A word that the other side may change.
    #[must_use]
    pub fn u16(&self, gpa: u64) -> &AtomicU16 {
        let at = self.ptr(gpa, 2).cast::<u16>();
        assert!(at.is_aligned(), "{gpa:#x} is odd");
        // SAFETY: inside the mapping, which lives as long as self, and aligned.
        unsafe { AtomicU16::from_ptr(at) }
    }

    /// A double word that the other side may change.
    #[must_use]
    pub fn u32(&self, gpa: u64) -> &AtomicU32 {
        let at = self.ptr(gpa, 4).cast::<u32>();
        assert!(at.is_aligned(), "{gpa:#x} is not aligned");
        // SAFETY: inside the mapping, which lives as long as self, and aligned.
        unsafe { AtomicU32::from_ptr(at) }
    }
}
