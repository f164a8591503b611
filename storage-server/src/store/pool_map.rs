//! `pool.dat` as memory, for system calls that pass bytes of the page cache on without a copy in between.
//!
//! Only the kernel follows these addresses: where the disk fails or the file ends, its call says EFAULT, and nobody gets
//! a signal. Windows are mapped when first used and stay. The server may write the file: to who may not, `mincore` says
//! that everything is in memory.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::layout::EXTENT_BYTES;

/// Bytes of one window: whole extents, so that no piece of an extent lies in two.
const WINDOW_BYTES: usize = 1 << 40;
const _: () = assert!((WINDOW_BYTES as u64).is_multiple_of(EXTENT_BYTES));
/// Windows that are used at most: an eighth of what a process can address. What lies behind is not mapped.
const WINDOWS: usize = 16;
/// What `mincore` counts in, bytes.
const PAGE_BYTES: usize = 4096;
/// Pages of an extent, and one more: a piece may begin inside a page.
const PAGES_MAX: usize = (1 << 20) / PAGE_BYTES + 1;
const _: () = assert!(((PAGES_MAX - 1) * PAGE_BYTES) as u64 == EXTENT_BYTES);

#[derive(Debug, Default)]
pub(super) struct PoolMap {
    /// `None` inside: the kernel would not map it.
    windows: [OnceLock<Option<Window>>; WINDOWS],
}

#[derive(Debug)]
struct Window(NonNull<libc::c_void>);

// SAFETY: an address that is never followed here, bound to no thread, unmapped once by its one owner.
unsafe impl Send for Window {}
// SAFETY: as above; nothing behind a shared reference changes.
unsafe impl Sync for Window {}

impl Window {
    fn map(file: &File, number: u64) -> Option<Self> {
        let len = NonZeroUsize::new(WINDOW_BYTES)?;
        let offset = libc::off_t::try_from(number * WINDOW_BYTES as u64).ok()?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file.as_fd(), offset) }.ok().map(Self)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` in this length, and nobody has an address inside any more: whoever had one borrowed
        // the map. A failure leaves it mapped, which harms nobody.
        let _ = unsafe { munmap(self.0, WINDOW_BYTES) };
    }
}

impl PoolMap {
    /// Where `len` bytes of the file are, if all of them are in memory now. They are inside one extent. For system calls
    /// only, and only while the map lives.
    pub(super) fn resident(&self, file: &File, offset: u64, len: usize) -> Option<*const u8> {
        let number = offset / WINDOW_BYTES as u64;
        let window = self.windows.get(usize::try_from(number).ok()?)?;
        let window = window.get_or_init(|| Window::map(file, number)).as_ref()?;
        let within = usize::try_from(offset % WINDOW_BYTES as u64).ok()?;
        let page = within / PAGE_BYTES * PAGE_BYTES;
        let span = within + len - page;
        let mut states = [0u8; PAGES_MAX];
        let states = states.get_mut(..span.div_ceil(PAGE_BYTES))?;
        let first = window.0.as_ptr().wrapping_byte_add(page);
        // SAFETY: the pages lie in the window, and there is a state for each.
        let known = unsafe { libc::mincore(first, span, states.as_mut_ptr()) } == 0;
        let all = known && states.iter().all(|state| state & 1 == 1);
        all.then(|| window.0.as_ptr().cast::<u8>().wrapping_add(within).cast_const())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    /// What the kernel finds there, the way a socket's call looks.
    fn bytes_at(place: *const u8, len: usize) -> std::io::Result<Vec<u8>> {
        let (read, write) = nix::unistd::pipe().expect("a pipe");
        // SAFETY: the kernel checks the place.
        let n = unsafe { libc::write(write.as_raw_fd(), place.cast(), len) };
        let n = usize::try_from(n).map_err(|_| std::io::Error::last_os_error())?;
        let mut bytes = vec![0; n];
        nix::unistd::read(&read, &mut bytes).expect("what was written");
        Ok(bytes)
    }

    #[test]
    fn what_is_in_memory_is_found_there_and_nothing_else() {
        let map = PoolMap::default();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 10_000]).expect("written");
        file.write_all_at(&[9; 4096], EXTENT_BYTES).expect("written");
        let place = map.resident(&file, 100, 9000).expect("just written");
        assert_eq!(bytes_at(place, 9000).expect("readable"), vec![7; 9000]);
        let place = map.resident(&file, EXTENT_BYTES, 4096).expect("just written");
        assert_eq!(bytes_at(place, 4096).expect("readable"), vec![9; 4096]);
        assert!(map.resident(&file, EXTENT_BYTES / 2, 4096).is_none(), "a hole");
        assert!(map.resident(&file, 0, 20_000).is_none(), "part of it is a hole");
        assert!(map.resident(&file, EXTENT_BYTES + 4096, 4096).is_none(), "behind the file");
        let end = WINDOWS as u64 * WINDOW_BYTES as u64;
        assert!(map.resident(&file, end, 4096).is_none(), "behind all windows");
        assert!(map.resident(&file, 0, 3 << 20).is_none(), "more than an extent");
    }

    #[test]
    fn a_place_that_went_away_is_an_error_of_the_call() {
        let map = PoolMap::default();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 8192]).expect("written");
        let place = map.resident(&file, 4096, 4096).expect("just written");
        file.set_len(4096).expect("cut off");
        let error = bytes_at(place, 4096).expect_err("nothing is there");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
