//! An image of a real cluster, and requests of it.

use baton_integration::ceph::{Ceph, skip_without_ceph};
use baton_integration::workspace::TestDir;
use baton_remote_client::{IoError, Op, OpenOptions, Tag, Volume, VolumeQueue, open};
use std::sync::Arc;
use std::time::Duration;

use super::completions::collect;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const IMAGE_BYTES: u64 = 64 * MIB;
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// A cluster with an image `v`; `None`: it cannot be had here.
pub(crate) fn cluster(test: &str) -> Option<(TestDir, Ceph)> {
    if skip_without_ceph(test) {
        return None;
    }
    let dir = TestDir::new("rbd").unwrap();
    let ceph = Ceph::start(dir.path()).unwrap();
    ceph.create_image("v", IMAGE_BYTES).unwrap();
    Some((dir, ceph))
}

pub(crate) fn opened(uri: &str) -> Arc<dyn Volume> {
    open(uri, &OpenOptions::new("host/vm")).unwrap()
}

/// Odd parts, as a guest's may be.
pub(crate) fn parts(data: &mut [u8]) -> Vec<libc::iovec> {
    let (mut parts, mut rest) = (Vec::new(), data);
    for len in [1, 511, 700, 4096, 9000].into_iter().cycle() {
        let (now, later) = rest.split_at_mut(len.min(rest.len()));
        parts.push(libc::iovec { iov_base: now.as_mut_ptr().cast(), iov_len: now.len() });
        rest = later;
        if rest.is_empty() {
            return parts;
        }
    }
    parts
}

pub(crate) fn run(queue: &mut dyn VolumeQueue, op: Op, data: &mut [u8]) -> Result<(), IoError> {
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Tag(1), op, &parts(data)) };
    let done = collect(queue, 1, SOON);
    assert_eq!(done.len(), 1, "{op:?} was not answered");
    done[0].result
}

#[allow(dead_code, reason = "not every test needs other data than its own")]
pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 512 + seed) % 251 + 1).unwrap()).collect()
}
