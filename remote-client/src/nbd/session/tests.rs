use super::super::wire::{self, ExportFlags};
use super::*;

const BLOCK: usize = 4096;

struct Peer {
    session: Session,
    now: Instant,
    map: bool,
    memory: Vec<u8>,
}

fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(u32::try_from(body.len()).expect("short").to_be_bytes());
    bytes.extend(body);
    bytes
}

fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, 1, cookie, &[&offset.to_be_bytes(), bytes].concat())
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&0x6744_6698u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

/// With `map`, the context has number 9.
fn handshake(size: u64, flags: u16, structured: bool, map: bool) -> Vec<u8> {
    let reply = |option: u32, kind: u32, body: &[u8]| {
        let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for n in [option, kind, u32::try_from(body.len()).expect("short")] {
            bytes.extend(n.to_be_bytes());
        }
        bytes.extend(body);
        bytes
    };
    let info = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        reply(11, wire::REP_ERR_UNSUP, &[]),
        reply(8, if structured { 1 } else { wire::REP_ERR_UNSUP }, &[]),
        if map { reply(10, 4, b"\0\0\0\x09base:allocation") } else { vec![] },
        if map { reply(10, 1, &[]) } else { vec![] },
        reply(7, 3, &info),
        reply(7, 1, &[]),
    ]
    .concat()
}

const FLAGS: u16 = 0b0000_0110_1101;

impl Peer {
    fn new(structured: bool) -> Self {
        Self::with(structured, false)
    }

    fn with(structured: bool, map: bool) -> Self {
        let now = Instant::now();
        let mut session =
            Session::new(Wishes { export: "disk", map, tls: false }, Timing::default(), 7, now);
        session.set_opened(Opened { size_bytes: 1 << 20, block_bytes: 512, read_only: false });
        session.set_depth(8);
        let mut peer = Self { session, now, map, memory: vec![0xee; 8 * BLOCK] };
        peer.reconnect(1 << 20, FLAGS, structured);
        peer
    }

    fn reconnect(&mut self, size: u64, flags: u16, structured: bool) {
        self.session.connecting(self.now);
        self.session.connected(self.now);
        self.session.ingest(self.now, &handshake(size, flags, structured, self.map));
    }

    fn submit(&mut self, tag: u32, op: Op) {
        let part = &mut self.memory[tag as usize * BLOCK..][..BLOCK];
        let data = [libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }];
        self.session.submit(Tag(tag), op, &data);
    }

    /// Sends everything; the cookies and commands on the wire.
    fn sent(&mut self) -> Vec<(u64, u8)> {
        let mut iov = Vec::new();
        let bytes = self.session.gather(&mut iov, 1024);
        let mut found = Vec::new();
        for part in iov.iter().filter(|part| part.iov_len == 28) {
            // SAFETY: names memory of the session, which was not touched since.
            let head = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), 28) };
            let cookie = head[8..16].try_into().expect("eight");
            found.push((u64::from_be_bytes(cookie), head[7]));
        }
        self.session.sent(bytes);
        found
    }

    fn done(&mut self) -> Vec<(u32, Result<(), IoError>)> {
        let mut done = Vec::new();
        self.session.take_completions(&mut done);
        done.iter().map(|c| (c.tag.0, c.result)).collect()
    }

    fn told(&mut self, bytes: &[u8]) {
        self.session.ingest(self.now, bytes);
    }

    fn dropped(&mut self) -> Option<String> {
        let mut last = None;
        while let Some(notice) = self.session.pop_notice() {
            if let Notice::Dropped(reason) = notice {
                last = Some(reason.to_string());
            }
        }
        last
    }
}

#[test]
fn a_read_in_pieces_with_a_hole_arrives_whole() {
    let mut peer = Peer::new(true);
    peer.submit(1, Op::Read { offset: 8192 });
    assert_eq!(peer.sent(), [(1, 0)]);
    let hole = [&(8192u64 + 1024).to_be_bytes()[..], &2048u32.to_be_bytes()].concat();
    let answer =
        [data(0, 1, 8192 + 3072, &[3; 1024]), chunk(0, 2, 1, &hole), data(1, 1, 8192, &[1; 1024])]
            .concat();
    // Byte by byte is the worst that can happen.
    for byte in &answer {
        assert_eq!(peer.done(), []);
        peer.told(&[*byte]);
    }
    assert_eq!(peer.done(), [(1, Ok(()))]);
    let want = [[1u8; 1024], [0; 1024], [0; 1024], [3; 1024]].concat();
    assert_eq!(peer.memory[BLOCK..2 * BLOCK], want);
    assert!(peer.memory[..BLOCK].iter().chain(&peer.memory[2 * BLOCK..]).all(|b| *b == 0xee));
}

#[test]
fn what_a_server_must_not_say_ends_the_connection_and_touches_nothing() {
    let at = |offset: u64| data(1, 1, offset, &[7; 512]);
    let hole = |offset: u64, len: u32| {
        chunk(1, 2, 1, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
    };
    for (answer, why) in [
        (at(8191), "outside"),
        (at(8192 + 4096), "outside"),
        (at(8192 + 3585), "outside"),
        (at(u64::MAX), "outside"),
        (hole(8192, 4097), "outside"),
        (hole(8192, 0), "outside"),
        (hole(8192 + 4096, 1), "outside"),
        (data(1, 1, 8192, &[7; 4097]), "outside"),
        (data(1, 2, 8192, &[7; 512]), "cannot be"),
        (data(1, 3, 8192, &[7; 512]), "nothing that was asked"),
        (chunk(1, 1, 1, &[0; 8]), "cannot be"),
        (chunk(1, 2, 1, &[0; 13]), "cannot be"),
        (chunk(0, 0, 1, &[]), "cannot be"),
        (chunk(1, 0, 1, &[]), "in part"),
        (chunk(1, 0x8001, 1, &[0, 0, 0, 5, 0, 9]), "cannot be"),
        (chunk(1, 0x8001, 1, &[0; 5000]), "cannot be"),
        (simple(0, 1), "nothing that was asked"),
        (vec![1, 2, 3, 4], "begins with 0x01020304"),
    ] {
        let mut peer = Peer::new(true);
        peer.submit(1, Op::Read { offset: 8192 });
        peer.submit(2, Op::Write { offset: 8192 });
        peer.sent();
        peer.told(&answer);
        let reason = peer.dropped().unwrap_or_default();
        assert!(reason.contains(why), "{answer:?}: {reason}");
        assert_eq!(peer.done(), []);
        assert_eq!(peer.session.in_flight(), 2);
        assert!(peer.memory.iter().all(|b| *b == 0xee), "{answer:?}");
    }
}

#[test]
fn an_answer_to_what_was_not_sent_whole_is_none() {
    let mut peer = Peer::new(false);
    peer.submit(1, Op::Write { offset: 0 });
    let mut iov = Vec::new();
    let bytes = peer.session.gather(&mut iov, 1024);
    assert_eq!(bytes, 28 + BLOCK);
    peer.session.sent(bytes - 1);
    peer.told(&simple(0, 1));
    assert!(peer.dropped().expect("dropped").contains("nothing that was asked"));
    assert_eq!(peer.done(), []);
}

#[test]
fn errors_reach_the_guest_and_a_shutdown_does_not() {
    let mut peer = Peer::new(true);
    for (tag, op) in [(1, Op::Read { offset: 0 }), (2, Op::Write { offset: 0 }), (3, Op::Flush)] {
        peer.submit(tag, op);
    }
    peer.sent();
    peer.told(&data(0, 1, 0, &[1; 512]));
    peer.told(&chunk(0, 0x8002, 1, &[0, 0, 0, 5, 0, 2, b'n', b'o', 0, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(peer.done(), [], "an answer goes on until it says that it is done");
    peer.told(&chunk(1, 0, 1, &[]));
    peer.told(&simple(28, 2));
    assert_eq!(peer.done(), [(1, Err(IoError::Io)), (2, Err(IoError::NoSpace))]);
    peer.told(&simple(108, 3));
    assert!(peer.dropped().expect("dropped").contains("shutting down"));
    assert_eq!((peer.done(), peer.session.in_flight()), (vec![], 1));
}

#[test]
fn everything_unanswered_is_sent_again_in_order() {
    let mut peer = Peer::new(true);
    for tag in 1..5 {
        peer.submit(tag, Op::Write { offset: u64::from(tag) * 4096 });
    }
    assert_eq!(peer.sent(), [(1, 1), (2, 1), (3, 1), (4, 1)]);
    peer.told(&simple(0, 3));
    assert_eq!(peer.done(), [(3, Ok(()))]);
    peer.session.dropped(peer.now, DropReason::Closed);
    peer.submit(5, Op::Flush);
    assert_eq!(peer.sent(), [], "nowhere to send");
    peer.reconnect(1 << 20, FLAGS, true);
    assert_eq!(peer.sent(), [(5, 1), (6, 1), (7, 1), (8, 3)]);
    peer.told(&simple(0, 2));
    assert!(peer.dropped().is_some_and(|why| why.contains("nothing")), "an old number");
    peer.reconnect(1 << 20, FLAGS, false);
    assert_eq!(peer.sent().len(), 4);
    for cookie in [12, 9, 11, 10] {
        peer.told(&simple(0, cookie));
    }
    assert_eq!(peer.done(), [(5, Ok(())), (1, Ok(())), (4, Ok(())), (2, Ok(()))]);
    assert_eq!(peer.session.in_flight(), 0);
}

#[test]
fn another_export_than_the_one_that_was_opened_is_lost() {
    for (size, flags, why) in [
        ((1 << 20) - 512, FLAGS, Some("shrank from 1048576 to 1048064 bytes")),
        (1 << 20, FLAGS | 2, Some("read-only")),
        ((1 << 20) + 700, FLAGS, None),
    ] {
        let mut peer = Peer::new(true);
        peer.submit(1, Op::Write { offset: 0 });
        peer.session.dropped(peer.now, DropReason::Closed);
        while peer.session.pop_notice().is_some() {}
        peer.reconnect(size, flags, true);
        match (why, peer.session.pop_notice()) {
            (Some(why), Some(Notice::Lost(reason))) => {
                assert!(reason.to_string().contains(why), "{reason}");
                assert_eq!(peer.session.deadline(), None, "it waits for ever");
            }
            (None, Some(Notice::Ready(_))) => {
                peer.submit(2, Op::Write { offset: (1 << 20) - 4096 + 512 });
                assert_eq!(peer.sent().len(), 2, "the new sector is the guest's, too");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(peer.done(), []);
    }
}

#[test]
fn what_is_not_on_the_export_is_refused_before_it_is_sent() {
    let mut peer = Peer::new(true);
    for op in [
        Op::Read { offset: 1 << 20 },
        Op::Write { offset: (1 << 20) - 512 },
        Op::Write { offset: 511 },
        Op::Discard { offset: u64::MAX - 511, len: 512 },
        Op::WriteZeroes { offset: 0, len: (1 << 20) + 512, unmap: true },
    ] {
        peer.submit(1, op);
        assert_eq!(peer.done(), [(1, Err(IoError::OutOfRange))], "{op:?}");
    }
    // Blocks of 4096 bytes: a discard shrinks, anything else is refused.
    let opened = Opened { size_bytes: 1 << 20, block_bytes: 4096, read_only: false };
    peer.session.set_opened(opened);
    peer.submit(1, Op::Discard { offset: 512, len: 4096 });
    assert_eq!(peer.done(), [(1, Ok(()))]);
    peer.submit(1, Op::WriteZeroes { offset: 512, len: 4096, unmap: false });
    assert_eq!(peer.done(), [(1, Err(IoError::Unsupported))]);
    peer.session.set_opened(Opened { read_only: true, ..opened });
    peer.submit(1, Op::Flush);
    peer.submit(2, Op::Write { offset: 0 });
    assert_eq!(peer.done(), [(1, Ok(())), (2, Err(IoError::ReadOnly))]);
    assert_eq!(peer.sent(), []);
}

#[test]
fn only_the_way_to_an_export_has_a_time_limit() {
    let mut peer = Peer::new(true);
    peer.submit(1, Op::Flush);
    peer.sent();
    assert_eq!(peer.session.deadline(), None, "a silent server is waited for");
    peer.session.dropped(peer.now, DropReason::Closed);
    peer.session.connecting(peer.now);
    peer.session.connected(peer.now);
    let limit = peer.session.deadline().expect("a limit");
    peer.session.on_timer(limit);
    assert!(peer.dropped().expect("dropped").contains("no export within 10000 ms"));
    assert!(ExportFlags::default() == ExportFlags(0) && peer.session.in_flight() == 1);
}

#[test]
fn holes_are_told_as_far_as_there_is_room() {
    let mut peer = Peer::with(true, true);
    let mut into = [Extent { len: 7, zeros: 7 }; 3];
    assert!(peer.session.submit_map(Tag(1), 4096, 8192, &mut into));
    assert_eq!(peer.sent(), [(1, 7)]);
    let answer = |pairs: &[(u32, u32)]| {
        let mut body = vec![0, 0, 0, 9];
        for (len, flags) in pairs {
            body.extend(len.to_be_bytes());
            body.extend(flags.to_be_bytes());
        }
        body
    };
    // A hole whose contents nobody knows is data.
    let five = answer(&[(512, 3), (1024, 1), (512, 2), (512, 0), (512, 0)]);
    // The connection breaks after some of it; what was told of that goes.
    let whole = chunk(1, 5, 1, &five);
    peer.told(&whole[..whole.len() - 1]);
    peer.session.dropped(peer.now, DropReason::Closed);
    peer.reconnect(1 << 20, FLAGS, true);
    assert_eq!((peer.done(), peer.sent()), (vec![], vec![(2, 7)]));
    for byte in chunk(1, 5, 2, &answer(&[(512, 2), (512, 0)])) {
        assert_eq!(peer.done(), []);
        peer.told(&[byte]);
    }
    assert_eq!(peer.done(), [(1, Ok(()))]);
    let extent = |len, zeros| Extent { len, zeros };
    assert_eq!(into, [extent(512, 1), extent(512, 0), extent(0, 0)]);
    assert!(peer.session.submit_map(Tag(2), 4096, 8192, &mut into));
    peer.sent();
    peer.told(&chunk(0, 5, 3, &five));
    peer.told(&chunk(1, 0, 3, &[]));
    assert_eq!(peer.done(), [(2, Ok(()))]);
    assert_eq!(into, [extent(512, 1), extent(1024, 0), extent(512, 1)]);
}

#[test]
fn what_is_no_answer_about_holes_ends_the_connection() {
    let one = [0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 0];
    let other = [&[0, 0, 0, 8][..], &one[4..]].concat();
    let empty = [0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0];
    for (answer, why) in [
        (chunk(1, 5, 1, &one[..4]), "cannot be"),
        (chunk(1, 5, 1, &one[..11]), "cannot be"),
        (chunk(1, 5, 1, &other), "nothing that was asked"),
        ([chunk(0, 5, 1, &one), chunk(1, 5, 1, &one)].concat(), "nothing that was asked"),
        (chunk(1, 5, 1, &empty), "outside"),
        (chunk(1, 5, 2, &one), "cannot be"),
        (chunk(1, 6, 1, &one), "unknown kind 6"),
        (chunk(1, 0, 1, &[]), "in part"),
        (simple(0, 1), "in part"),
        (data(1, 1, 0, &[7; 512]), "cannot be"),
    ] {
        let mut peer = Peer::with(true, true);
        let mut into = [Extent::default(); 4];
        assert!(peer.session.submit_map(Tag(1), 0, 8192, &mut into));
        peer.submit(2, Op::Read { offset: 8192 });
        peer.sent();
        peer.told(&answer);
        let reason = peer.dropped().unwrap_or_default();
        assert!(reason.contains(why), "{answer:?}: {reason}");
        assert_eq!((peer.done(), peer.session.in_flight()), (vec![], 2));
    }
    let mut peer = Peer::with(true, true);
    let mut into = [Extent::default(); 4];
    assert!(peer.session.submit_map(Tag(1), 0, 8192, &mut into));
    peer.sent();
    peer.told(&chunk(1, 0x8001, 1, &[0, 0, 0, 22, 0, 0]));
    assert_eq!(peer.done(), [(1, Err(IoError::Io))]);
}
