//! A volume that completes every request at once and touches no data: reads leave the buffers as they are, writes are
//! forgotten. Only for measuring what is in front of it; no URI of the product names it.

use baton_remote_client::{
    Completion, EventListener, Geometry, IoError, Op, QueueError, Tag, Volume, VolumeQueue,
    VolumeState,
};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// The smallest unit of a disk, bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Nothing, of a certain size.
#[derive(Debug)]
pub(crate) struct NullVolume {
    size_bytes: u64,
}

impl NullVolume {
    /// So large, in whole sectors.
    pub(crate) fn new(size_bytes: u64) -> Self {
        Self { size_bytes: size_bytes / SECTOR_BYTES * SECTOR_BYTES }
    }
}

impl Volume for NullVolume {
    fn geometry(&self) -> Geometry {
        Geometry {
            id: *b"null\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            size_bytes: self.size_bytes,
            block_bytes: 512,
            discard_bytes: 4096,
            read_only: false,
        }
    }

    fn state(&self) -> VolumeState {
        VolumeState::Connected
    }

    fn open_queue(&self, _index: u16, depth: usize) -> Result<Box<dyn VolumeQueue>, QueueError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(io::Error::from)?;
        let done = Vec::with_capacity(depth);
        Ok(Box::new(NullQueue { size_bytes: self.size_bytes, done, wake }))
    }

    /// Nothing ever happens to it.
    fn set_listener(&self, _listener: EventListener) {}

    fn close(&self, _give_back: bool) {}
}

struct NullQueue {
    size_bytes: u64,
    done: Vec<Completion>,
    /// Never readable: a request is done when `submit` returns.
    wake: EventFd,
}

impl NullQueue {
    fn judge(&self, op: Op, data: &[libc::iovec]) -> Result<(), IoError> {
        let (offset, len) = match op {
            Op::Read { offset } | Op::Write { offset } => {
                (offset, data.iter().fold(0u64, |sum, v| sum.saturating_add(v.iov_len as u64)))
            }
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
            Op::Flush => return Ok(()),
        };
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(IoError::OutOfRange),
        }
    }
}

impl VolumeQueue for NullQueue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        let result = self.judge(op, data);
        self.done.push(Completion { tag, result });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_on_the_disk_is_done_at_once_and_nothing_beyond_it() {
        let volume = NullVolume::new(8 * SECTOR_BYTES + 1);
        assert_eq!(volume.geometry().size_bytes, 8 * SECTOR_BYTES);
        let mut queue = volume.open_queue(0, 4).unwrap();
        let mut bytes = [7u8; 1024];
        let data = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        for (tag, op) in [
            (1, Op::Read { offset: 3072 }),
            (2, Op::Write { offset: 3584 }),
            (3, Op::Read { offset: u64::MAX }),
            (4, Op::Flush),
            (5, Op::Discard { offset: 0, len: 4097 }),
        ] {
            // SAFETY: the buffer outlives the queue, which never touches it.
            unsafe { queue.submit(Tag(tag), op, &data) };
        }
        assert_eq!(queue.in_flight(), 5);
        let mut done = Vec::new();
        queue.poll(&mut done);
        let good: Vec<(u32, bool)> = done.iter().map(|c| (c.tag.0, c.result.is_ok())).collect();
        assert_eq!(good, [(1, true), (2, false), (3, false), (4, true), (5, false)]);
        assert_eq!((queue.in_flight(), bytes), (0, [7; 1024]));
    }
}
