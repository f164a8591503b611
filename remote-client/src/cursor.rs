//! Positions in a request's scattered buffers, which are guest memory.

/// A position in a guest request's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    iov: usize,
    skip: usize,
}

impl Cursor {
    /// Before the first byte.
    pub(crate) const START: Self = Self { iov: 0, skip: 0 };

    /// Moves `n` bytes on.
    pub(crate) fn advance(&mut self, iov: &[libc::iovec], mut n: usize) {
        while n > 0 {
            let left = iov[self.iov].iov_len - self.skip;
            if n < left {
                self.skip += n;
                return;
            }
            n -= left;
            *self = Self { iov: self.iov + 1, skip: 0 };
        }
    }

    /// The longest piece of at most `len` bytes that is in one buffer.
    pub(crate) fn part(&self, iov: &[libc::iovec], len: usize) -> libc::iovec {
        let (mut at, mut skip) = (self.iov, self.skip);
        while iov[at].iov_len == skip {
            (at, skip) = (at + 1, 0);
        }
        libc::iovec {
            iov_base: iov[at].iov_base.wrapping_byte_add(skip),
            iov_len: (iov[at].iov_len - skip).min(len),
        }
    }

    /// Appends the next `len` bytes to `out`, which may grow to `max` entries;
    /// returns how many bytes fitted.
    pub(crate) fn push(
        mut self,
        iov: &[libc::iovec],
        len: usize,
        out: &mut Vec<libc::iovec>,
        max: usize,
    ) -> usize {
        let mut pushed = 0;
        while pushed < len && out.len() < max {
            let v = &iov[self.iov];
            let n = (v.iov_len - self.skip).min(len - pushed);
            if n > 0 {
                out.push(libc::iovec {
                    iov_base: v.iov_base.wrapping_byte_add(self.skip),
                    iov_len: n,
                });
            }
            pushed += n;
            self = Self { iov: self.iov + 1, skip: 0 };
        }
        pushed
    }
}

/// Copies received bytes to the guest's memory at a position inside it.
pub(crate) fn copy_out(buffers: &[libc::iovec], mut at: Cursor, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let part = at.part(buffers, bytes.len());
        // SAFETY: the submitter vouches for the buffers until completion. The
        // guest may touch them meanwhile; we only store through a raw pointer.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), part.iov_base.cast(), part.iov_len);
        }
        at.advance(buffers, part.iov_len);
        bytes = &bytes[part.iov_len..];
    }
}
