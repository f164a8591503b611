//! Lists of buffers in guest memory: counting and cutting, and the few copies
//! that are small. The guest may write meanwhile, so bytes are copied once and
//! judged afterwards.

use std::ptr;

use libc::iovec;

/// Bytes in all buffers.
#[must_use]
pub fn total(buffers: &[iovec]) -> u64 {
    buffers.iter().map(|buffer| buffer.iov_len as u64).sum()
}

/// Cuts the last byte off. `None` when there is none.
pub fn take_last_byte(buffers: &mut Vec<iovec>) -> Option<*mut u8> {
    let last = buffers.last_mut()?;
    last.iov_len -= 1;
    // SAFETY: inside the buffer, which had at least one byte.
    let byte = unsafe { last.iov_base.cast::<u8>().add(last.iov_len) };
    if last.iov_len == 0 {
        buffers.pop();
    }
    Some(byte)
}

/// Copies the first bytes out without cutting them off. Returns how many there
/// were; the rest of `into` is left as it was.
pub fn peek_front(buffers: &[iovec], into: &mut [u8]) -> usize {
    let mut done = 0;
    for buffer in buffers {
        let take = buffer.iov_len.min(into.len() - done);
        // SAFETY: both sides have `take` bytes and guest memory never overlaps
        // our own.
        unsafe {
            ptr::copy_nonoverlapping(buffer.iov_base.cast::<u8>(), into[done..].as_mut_ptr(), take)
        };
        done += take;
    }
    done
}

/// Copies the first bytes out and cuts them off.
pub fn take_front(buffers: &mut Vec<iovec>, into: &mut [u8]) -> usize {
    let done = peek_front(buffers, into);
    let mut left = done;
    let mut empty = 0;
    for buffer in buffers.iter_mut() {
        let take = buffer.iov_len.min(left);
        // SAFETY: stays inside the buffer or at its end.
        buffer.iov_base = unsafe { buffer.iov_base.cast::<u8>().add(take) }.cast();
        buffer.iov_len -= take;
        left -= take;
        if buffer.iov_len > 0 {
            break;
        }
        empty += 1;
    }
    buffers.drain(..empty);
    done
}

/// Copies `bytes` into the buffers as far as they reach; returns how many.
pub fn fill(buffers: &[iovec], bytes: &[u8]) -> u32 {
    let mut done = 0;
    for buffer in buffers {
        let take = buffer.iov_len.min(bytes.len() - done);
        // SAFETY: both sides have `take` bytes and guest memory never overlaps
        // our own.
        unsafe {
            ptr::copy_nonoverlapping(bytes[done..].as_ptr(), buffer.iov_base.cast::<u8>(), take)
        };
        done += take;
    }
    u32::try_from(done).expect("the device ID is short")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn over(parts: &mut [Vec<u8>]) -> Vec<iovec> {
        parts
            .iter_mut()
            .filter(|part| !part.is_empty())
            .map(|part| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
            .collect()
    }

    fn contents(buffers: &[iovec]) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(total(buffers)).expect("small")];
        assert_eq!(peek_front(buffers, &mut bytes), bytes.len());
        bytes
    }

    proptest! {
        /// However a request is cut into buffers, the same bytes come out.
        #[test]
        fn cutting_keeps_the_bytes(mut parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..6), n in 0usize..40) {
            let flat: Vec<u8> = parts.concat();
            let mut buffers = over(&mut parts);
            let mut front = vec![0; n];
            let got = take_front(&mut buffers, &mut front);
            prop_assert_eq!(got, n.min(flat.len()));
            prop_assert_eq!(&front[..got], &flat[..got]);
            prop_assert_eq!(contents(&buffers), &flat[got..]);
            let last = take_last_byte(&mut buffers);
            // SAFETY: points into `parts`.
            prop_assert_eq!(last.map(|byte| unsafe { *byte }), flat[got..].last().copied());
            prop_assert_eq!(contents(&buffers), &flat[got..flat.len().saturating_sub(usize::from(last.is_some())).max(got)]);
            prop_assert!(buffers.iter().all(|buffer| buffer.iov_len > 0));
        }

        #[test]
        fn filling_stops_at_the_shorter_side(mut parts in prop::collection::vec(prop::collection::vec(Just(0u8), 0..9), 0..5)) {
            let room: usize = parts.iter().map(Vec::len).sum();
            let bytes: Vec<u8> = (1..=20).collect();
            let done = fill(&over(&mut parts), &bytes) as usize;
            prop_assert_eq!(done, room.min(20));
            prop_assert_eq!(&parts.concat()[..done], &bytes[..done]);
        }
    }
}
