use super::*;
use baton_protocol::frame::WINDOW_REQUESTS;
use proptest::prelude::*;

const ME: Identity = Identity {
    session: SessionId(7),
    queue: QueueId(2),
    mode: AccessMode::Owner,
    features: Features::HANDOFF,
};
const SIZE: u64 = 1 << 20;

fn request(opcode: Opcode, seq: u64) -> RequestHeader {
    RequestHeader {
        opcode,
        flags: 0,
        queue: ME.queue,
        seq: Seq(seq),
        epoch: Epoch(5),
        session: ME.session,
        offset: if matches!(opcode, Opcode::Handoff | Opcode::Open) { 0 } else { 512 },
        len: if opcode.has_range() { 1024 } else { 0 },
        payload_len: match opcode {
            Opcode::Write => 1024,
            Opcode::Handoff => 40,
            Opcode::Open => OPEN_BYTES.try_into().expect("small"),
            _ => 0,
        },
        payload_crc32c: 0,
    }
}

fn judged(window: &mut Window, header: &RequestHeader) -> Verdict {
    judge(&ME, window, header, SIZE, |epoch| epoch == Epoch(5))
}

const AFTER_HELLO: [Opcode; 11] = [
    Opcode::Read,
    Opcode::Write,
    Opcode::Flush,
    Opcode::Discard,
    Opcode::WriteZeroes,
    Opcode::Ping,
    Opcode::Event,
    Opcode::Release,
    Opcode::Access,
    Opcode::Handoff,
    Opcode::Open,
];

fn all_sessions() -> Vec<(AccessMode, bool, Features)> {
    let mut all = Vec::new();
    for mode in [AccessMode::Owner, AccessMode::Standby, AccessMode::ReadOnly] {
        for fresh in [true, false] {
            for features in [Features::HANDOFF, Features::default()] {
                all.push((mode, fresh, features));
            }
        }
    }
    all
}

/// The whole matrix of opcode x (mode, epoch, sequence) with its expected verdicts.
#[test]
fn every_opcode_in_every_mode_and_epoch() {
    for opcode in AFTER_HELLO {
        for (mode, fresh, features) in all_sessions() {
            {
                let identity = Identity { mode, features, ..ME };
                let mut window = Window::default();
                let verdict = judge(&identity, &mut window, &request(opcode, 1), SIZE, |_| fresh);
                let of_handoffs = matches!(opcode, Opcode::Access | Opcode::Handoff | Opcode::Open);
                let known = !of_handoffs || features == Features::HANDOFF;
                let expected = if !mode.permits(opcode) || !known {
                    Verdict::Answer(Status::NotPermitted)
                } else if touches_data(opcode) && !fresh {
                    Verdict::Answer(Status::StaleEpoch)
                } else {
                    Verdict::Run
                };
                assert_eq!(verdict, expected, "{opcode:?} {mode:?} fresh={fresh}");
            }
        }
    }
}

#[test]
fn a_done_mutation_is_answered_and_not_run() {
    for opcode in AFTER_HELLO {
        let mut window = Window::default();
        window.complete(Seq(1));
        let expected =
            if opcode.is_mutation() { Verdict::Answer(Status::Ok) } else { Verdict::Run };
        assert_eq!(judged(&mut window, &request(opcode, 1)), expected, "{opcode:?}");
        // Of an old epoch it is stale, not done.
        let stale = RequestHeader { epoch: Epoch(4), ..request(opcode, 1) };
        if touches_data(opcode) {
            assert_eq!(judged(&mut window, &stale), Verdict::Answer(Status::StaleEpoch));
        }
    }
}

#[test]
fn numbers_outside_the_window_break() {
    let mut window = Window::starting_at(Seq(10));
    for opcode in AFTER_HELLO {
        assert_eq!(
            judged(&mut window, &request(opcode, 9)),
            Verdict::Break(Violation::TooOld(9)),
            "{opcode:?}"
        );
        let far = 10 + 2 * WINDOW_REQUESTS;
        assert_eq!(
            judged(&mut window, &request(opcode, far)),
            Verdict::Break(Violation::TooNew(far))
        );
    }
}

#[test]
fn another_session_or_queue_breaks() {
    for opcode in AFTER_HELLO {
        let mut window = Window::default();
        let foreign = RequestHeader { session: SessionId(8), ..request(opcode, 1) };
        assert!(matches!(
            judged(&mut window, &foreign),
            Verdict::Break(Violation::Identity { .. })
        ));
        let foreign = RequestHeader { queue: QueueId(3), ..request(opcode, 1) };
        assert!(matches!(
            judged(&mut window, &foreign),
            Verdict::Break(Violation::Identity { .. })
        ));
    }
}

#[test]
fn ranges_are_whole_sectors_on_the_volume() {
    for (offset, len, good) in [
        (0, SIZE, true),
        (SIZE - 512, 512, true),
        (SIZE, 0, true),
        (SIZE - 512, 1024, false),
        (SIZE, 512, false),
        (1, 512, false),
        (0, 511, false),
        (u64::MAX - 511, 512, false),
        (512, u64::MAX - 511, false),
    ] {
        let header = RequestHeader { offset, len, ..request(Opcode::Discard, 1) };
        let expected = if good { Verdict::Run } else { Verdict::Answer(Status::OutOfRange) };
        assert_eq!(judged(&mut Window::default(), &header), expected, "{offset}+{len}");
    }
}

#[test]
fn what_a_header_alone_may_not_say() {
    let broken = |header: RequestHeader| match front(&header.encode(), 0) {
        Front::Broken { why, answer } => {
            assert_eq!(answer, Some((header.opcode, header.seq)), "the sender is told");
            why
        }
        other => panic!("{header:?} gave {other:?}"),
    };
    let write = request(Opcode::Write, 3);
    assert!(matches!(
        broken(RequestHeader { payload_len: 512, ..write }),
        Violation::Payload { payload: 512, .. }
    ));
    let read = request(Opcode::Read, 3);
    assert!(matches!(broken(RequestHeader { payload_len: 1, ..read }), Violation::Payload { .. }));
    let long = u64::from(PAYLOAD_BYTES_MAX) + 512;
    assert_eq!(broken(RequestHeader { len: long, ..read }), Violation::ReadTooLong(long));
    assert_eq!(broken(RequestHeader { flags: FLAG_CRC, ..read }), Violation::Flags(FLAG_CRC));
    assert_eq!(broken(RequestHeader { flags: FLAG_UNMAP, ..read }), Violation::Flags(FLAG_UNMAP));
    assert_eq!(broken(request(Opcode::Hello, 3)), Violation::SecondHello);
    let handoff = request(Opcode::Handoff, 3);
    let longest = u32::try_from(ASK_BYTES_MAX).expect("small");
    assert!(matches!(
        broken(RequestHeader { payload_len: longest + 1, ..handoff }),
        Violation::Payload { .. }
    ));
    assert_eq!(broken(RequestHeader { offset: 1, ..handoff }), Violation::Range(Opcode::Handoff));
    let open = request(Opcode::Open, 3);
    assert!(matches!(
        broken(RequestHeader { payload_len: open.payload_len - 1, ..open }),
        Violation::Payload { .. }
    ));
    assert_eq!(broken(RequestHeader { len: 1, ..open }), Violation::Range(Opcode::Open));
    let access = request(Opcode::Access, 3);
    assert!(matches!(
        broken(RequestHeader { payload_len: 1, ..access }),
        Violation::Payload { .. }
    ));
    // What the client knows, not a range: a version and a boot id.
    let access = RequestHeader { offset: u64::MAX, len: u64::MAX, ..access };
    assert!(matches!(front(&access.encode(), 0), Front::Whole { .. }));
    assert_eq!(judged(&mut Window::default(), &access), Verdict::Run);
    let unmap = RequestHeader { flags: FLAG_UNMAP, ..request(Opcode::WriteZeroes, 3) };
    assert!(matches!(front(&unmap.encode(), 0), Front::Whole { .. }));
}

#[test]
fn only_our_own_peers_are_answered() {
    let mut bytes = request(Opcode::Read, 9).encode();
    bytes[4] = 77;
    assert!(matches!(
        front(&bytes, 0),
        Front::Broken { answer: Some((Opcode::Hello, Seq(9))), .. }
    ));
    bytes[0] = b'X';
    assert!(matches!(front(&bytes, 0), Front::Broken { answer: None, .. }));
}

/// What a stream of good requests decodes to, however it is cut.
fn decode_in_pieces(stream: &[u8], cuts: &[usize]) -> Vec<(RequestHeader, Vec<u8>)> {
    let mut received = Vec::new();
    let mut rest = stream;
    let mut out = Vec::new();
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let cut = (*cuts.next().unwrap_or(&1)).clamp(1, rest.len());
        received.extend_from_slice(&rest[..cut]);
        rest = &rest[cut..];
        loop {
            match front(&received, 0) {
                Front::Partial { need } => {
                    assert!(need > received.len(), "it would never get on");
                    break;
                }
                Front::Whole { header, bytes } => {
                    out.push((header, received[REQUEST_HEADER_BYTES..bytes].to_vec()));
                    received.drain(..bytes);
                }
                Front::Broken { why, .. } => panic!("{why}"),
            }
        }
    }
    assert!(received.is_empty());
    out
}

prop_compose! {
    fn any_request()(which in 0..AFTER_HELLO.len(), seq: u64, epoch: u64, offset: u64, sectors in 0u32..9)
        -> (RequestHeader, Vec<u8>) {
        let opcode = AFTER_HELLO[which];
        let header = request(opcode, seq);
        let (offset, len) = match opcode {
            Opcode::Handoff | Opcode::Open => (0, 0),
            _ => (offset, u64::from(sectors) * 512),
        };
        let payload_len = if opcode == Opcode::Write { 512 * sectors } else { header.payload_len };
        let payload = vec![seq.to_le_bytes()[0]; payload_len as usize];
        (RequestHeader { epoch: Epoch(epoch), offset, len, payload_len, ..header }, payload)
    }
}

proptest! {
    #[test]
    fn any_split_of_the_stream_gives_the_same_requests(
        requests in prop::collection::vec(any_request(), 1..12),
        cuts in prop::collection::vec(1usize..700, 1..20),
    ) {
        let mut stream = Vec::new();
        for (header, payload) in &requests {
            stream.extend_from_slice(&header.encode());
            stream.extend_from_slice(payload);
        }
        prop_assert_eq!(decode_in_pieces(&stream, &cuts), requests);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), ours: bool) {
        let mut bytes = bytes;
        if ours && bytes.len() >= 64 {
            bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
            bytes[4] %= 14;
            bytes[5] &= 3;
            bytes[56..64].fill(0);
        }
        if let Front::Whole { header, bytes: n } = front(&bytes, 0) {
            prop_assert!(n <= bytes.len());
            let _ = judge(&ME, &mut Window::default(), &header, SIZE, |_| true);
        }
    }
}
