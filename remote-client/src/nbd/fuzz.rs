//! What a server may send, for the fuzzer.

use std::time::Instant;

use super::session::{Opened, Session, Wishes};
use crate::baton::Timing;
use crate::volume::{Extent, Op, Tag};

/// A session in the middle of a READ, a WRITE, a FLUSH and a BLOCK_STATUS is told `answer`, in two
/// pieces, after a handshake in which the server says `handshake`.
pub fn session(cut: usize, handshake: &[u8], answer: &[u8]) {
    let now = Instant::now();
    let mut buffer = vec![0u8; 8192];
    let data = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let mut session =
        Session::new(Wishes { export: "disk", map: true, tls: false }, Timing::default(), 1, now);
    session.set_opened(Opened { size_bytes: 1 << 20, block_bytes: 512, read_only: false });
    session.submit(Tag(1), Op::Read { offset: 4096 }, &data);
    session.submit(Tag(2), Op::Write { offset: 4096 }, &data);
    session.submit(Tag(3), Op::Flush, &[]);
    let mut holes = [Extent::default(); 4];
    assert!(session.submit_map(Tag(4), 0, 1 << 20, &mut holes));
    session.connecting(now);
    session.connected(now);
    session.ingest(now, handshake);
    let mut iov = Vec::new();
    let bytes = session.gather(&mut iov, 64);
    session.sent(bytes);
    let (first, second) = answer.split_at(cut.min(answer.len()));
    session.ingest(now, first);
    session.ingest(now, second);
    let mut done = Vec::new();
    session.take_completions(&mut done);
    assert!(done.len() <= 4 && done.len() + session.in_flight() == 4);
}
