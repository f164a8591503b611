//! Guest memory: the regions a front-end shares, and bounds-checked
//! translation of guest addresses to pointers.
//!
//! Memory is shared with a guest that may change it at any time, so nothing
//! here makes a Rust reference to it: only raw pointers, copies and atomics.
//! A [`GuestMemory`] is immutable; a new table is a new value, and the old one
//! lives until the last request that points into it has completed.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::vhost_user::message::Region;

/// Size of a page of the dirty log and of the smallest mapping, bytes.
pub const PAGE_BYTES: u64 = 4096;

/// A mapping of a shared descriptor, unmapped on drop.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory of the process, bound to no thread; all access
// goes through raw pointers whose users keep to atomics or copies.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.len)
    }
}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, shared, for reading and writing.
    ///
    /// # Errors
    /// When `len` is zero, the descriptor holds fewer bytes (touching the rest
    /// would be a SIGBUS), or the kernel refuses.
    pub fn new(fd: &OwnedFd, len: u64) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let len = usize::try_from(len).map_err(|_| invalid("the region is too large"))?;
        if len == 0 {
            return Err(invalid("the region is empty"));
        }
        let stat = nix::sys::stat::fstat(fd.as_fd())?;
        let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        if is_file && u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            return Err(invalid("the descriptor holds fewer bytes than the region"));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| invalid("mapped at address zero"))?;
        Ok(Self { base, len })
    }

    /// First byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty mapping cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length, unmapped once.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// One region of guest memory.
#[derive(Debug)]
pub struct MemoryRegion {
    description: Region,
    mapping: Mapping,
}

impl MemoryRegion {
    /// Maps a region.
    ///
    /// # Errors
    /// When its numbers overflow or the descriptor cannot be mapped.
    pub fn map(description: Region, fd: &OwnedFd) -> io::Result<Self> {
        let invalid =
            || io::Error::new(io::ErrorKind::InvalidInput, "the region's addresses overflow");
        let Region { guest_addr, size, user_addr, mmap_offset } = description;
        guest_addr.checked_add(size).ok_or_else(invalid)?;
        user_addr.checked_add(size).ok_or_else(invalid)?;
        let len = mmap_offset.checked_add(size).ok_or_else(invalid)?;
        if size == 0 {
            return Err(invalid());
        }
        // From offset zero, because huge-page files allow no other alignment.
        Ok(Self { description, mapping: Mapping::new(fd, len)? })
    }

    /// Where the front-end says the region is.
    #[must_use]
    pub fn description(&self) -> Region {
        self.description
    }

    /// Pointer to byte `offset` of the region, which must be below its size.
    fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.description.size);
        let offset =
            usize::try_from(self.description.mmap_offset + offset).expect("checked by map");
        // SAFETY: the mapping has mmap_offset + size bytes.
        unsafe { self.mapping.as_ptr().add(offset) }
    }
}

/// All regions, sorted by guest address, without overlap.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<MemoryRegion>>,
}

/// Two regions overlap, or there are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("memory regions overlap")]
pub struct Overlap;

impl GuestMemory {
    /// A table of these regions.
    ///
    /// # Errors
    /// [`Overlap`] when two regions share a guest address.
    pub fn new(mut regions: Vec<Arc<MemoryRegion>>) -> Result<Self, Overlap> {
        regions.sort_by_key(|region| region.description.guest_addr);
        let overlapping = regions.windows(2).any(|pair| {
            let first = pair[0].description;
            first.guest_addr + first.size > pair[1].description.guest_addr
        });
        if overlapping { Err(Overlap) } else { Ok(Self { regions }) }
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &[Arc<MemoryRegion>] {
        &self.regions
    }

    /// Cuts the guest range `addr..addr + len` into pieces that are contiguous
    /// here, and hands each to `piece`. Returns false, possibly after some
    /// pieces, when a byte of the range is not in any region.
    #[must_use]
    pub fn for_each_piece(
        &self,
        mut addr: u64,
        mut len: u64,
        mut piece: impl FnMut(*mut u8, usize),
    ) -> bool {
        let mut next = self.regions.partition_point(|region| region.description.guest_addr <= addr);
        while len > 0 {
            let Some(region) = next.checked_sub(1).and_then(|at| self.regions.get(at)) else {
                return false;
            };
            let Region { guest_addr, size, .. } = region.description;
            let offset = addr - guest_addr;
            if offset >= size {
                return false;
            }
            let take = len.min(size - offset);
            piece(region.at(offset), usize::try_from(take).expect("mapped"));
            addr += take;
            len -= take;
            next += 1;
            if len > 0
                && self.regions.get(next - 1).is_none_or(|r| r.description.guest_addr != addr)
            {
                return false;
            }
        }
        true
    }

    /// Pointer to the guest range, if it lies in one region.
    #[must_use]
    pub fn contiguous(&self, addr: u64, len: u64) -> Option<NonNull<u8>> {
        let at =
            self.regions.partition_point(|r| r.description.guest_addr <= addr).checked_sub(1)?;
        let region = &self.regions[at];
        let offset = addr - region.description.guest_addr;
        let end = offset.checked_add(len)?;
        if offset < region.description.size && end <= region.description.size {
            NonNull::new(region.at(offset))
        } else {
            None
        }
    }

    /// Pointer to a range given in the front-end's own addresses (ring
    /// addresses are), if it lies in one region.
    #[must_use]
    pub fn contiguous_user(&self, addr: u64, len: u64) -> Option<NonNull<u8>> {
        let region = self.regions.iter().find(|region| {
            let Region { user_addr, size, .. } = region.description;
            addr.checked_sub(user_addr).is_some_and(|offset| offset < size)
        })?;
        let offset = addr - region.description.user_addr;
        self.contiguous(region.description.guest_addr + offset, len)
    }

    /// Guest address of a pointer that came from this table; `None` for any
    /// other pointer. Linear: used only while the dirty log is on.
    #[must_use]
    pub fn guest_addr_of(&self, pointer: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (pointer as usize).checked_sub(region.at(0) as usize)? as u64;
            (offset < region.description.size).then(|| region.description.guest_addr + offset)
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::fs::File;

    /// A region of zeros backed by an unnamed file.
    pub(crate) fn region(guest_addr: u64, size: u64) -> Arc<MemoryRegion> {
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(size + PAGE_BYTES).expect("size");
        let description = Region {
            guest_addr,
            size,
            user_addr: 0x7000_0000_0000 + guest_addr,
            mmap_offset: PAGE_BYTES,
        };
        Arc::new(MemoryRegion::map(description, &OwnedFd::from(file)).expect("map"))
    }

    fn pieces(memory: &GuestMemory, addr: u64, len: u64) -> Option<Vec<usize>> {
        let mut lens = vec![];
        memory.for_each_piece(addr, len, |_, len| lens.push(len)).then_some(lens)
    }

    #[test]
    fn ranges_are_cut_at_region_borders_and_holes_are_refused() {
        let memory = GuestMemory::new(vec![
            region(0x4000, 0x1000),
            region(0x0, 0x2000),
            region(0x2000, 0x1000),
        ])
        .expect("no overlap");
        assert_eq!(pieces(&memory, 0x1000, 0x1800), Some(vec![0x1000, 0x800]));
        assert_eq!(pieces(&memory, 0x0, 0x3000), Some(vec![0x2000, 0x1000]));
        assert_eq!(pieces(&memory, 0x2fff, 2), None, "runs into a hole");
        assert_eq!(pieces(&memory, 0x3000, 1), None, "in a hole");
        assert_eq!(pieces(&memory, 0x4fff, 1), Some(vec![1]));
        assert_eq!(pieces(&memory, 0x5000, 1), None, "behind the end");
        assert_eq!(pieces(&memory, u64::MAX, u64::MAX), None);
        assert_eq!(pieces(&memory, 0x9999, 0), Some(vec![]));
        assert!(memory.contiguous(0x1fff, 1).is_some());
        assert!(memory.contiguous(0x1fff, 2).is_none(), "crosses regions");
        assert!(memory.contiguous(0x1000, u64::MAX).is_none());
        assert!(memory.contiguous_user(0x7000_0000_4000, 0x1000).is_some());
        assert!(memory.contiguous_user(0x7000_0000_4000, 0x1001).is_none());
        assert!(memory.contiguous_user(0x4000, 1).is_none());
    }

    #[test]
    fn a_pointer_leads_back_to_its_guest_address() {
        let memory =
            GuestMemory::new(vec![region(0x0, 0x2000), region(0x8000, 0x1000)]).expect("table");
        let pointer = memory.contiguous(0x8123, 1).expect("mapped").as_ptr();
        assert_eq!(memory.guest_addr_of(pointer), Some(0x8123));
        assert_eq!(memory.guest_addr_of(ptr::null()), None);
    }

    #[test]
    fn bad_regions_are_refused() {
        assert_eq!(
            GuestMemory::new(vec![region(0, 0x2000), region(0x1000, 0x1000)]).err(),
            Some(Overlap)
        );
        let file = |len| {
            let file: File = tempfile::tempfile().expect("temp file");
            file.set_len(len).expect("size");
            OwnedFd::from(file)
        };
        let of =
            |guest_addr, size, mmap_offset| Region { guest_addr, size, user_addr: 0, mmap_offset };
        assert!(MemoryRegion::map(of(0, 0x2000, 0), &file(0x1000)).is_err(), "file too short");
        assert!(
            MemoryRegion::map(of(0, 0x1000, u64::MAX), &file(0x1000)).is_err(),
            "offset overflows"
        );
        assert!(
            MemoryRegion::map(of(u64::MAX, 0x1000, 0), &file(0x1000)).is_err(),
            "address overflows"
        );
        assert!(MemoryRegion::map(of(0, 0, 0), &file(0x1000)).is_err(), "empty");
    }
}
