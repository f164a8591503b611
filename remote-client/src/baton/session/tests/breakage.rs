//! What breaks, at every place where it can break.

use std::time::Duration;

use baton_protocol::{Opcode, Seq, Status};

use super::super::*;
use super::server::frame;
use super::{Memory, Pair, pattern};

/// A few requests of every kind, some of them cut into several.
fn script(direct: bool) -> Pair {
    let mut p = Pair::new(64 << 10, 16);
    p.server.payload_max = 4096;
    p.direct = direct;
    p.server.disk[32768..40960].copy_from_slice(&pattern(8192, 2));
    p.server.disk[512..4096].fill(9);
    p.write(1, 8192, &pattern(6144, 1));
    p.read(2, 32768, 5120);
    p.submit(3, Op::Flush, Memory::new(&[], None));
    p.submit(4, Op::Discard { offset: 512, len: 1024 }, Memory::new(&[], None));
    p.submit(5, Op::WriteZeroes { offset: 2048, len: 512, unmap: true }, Memory::new(&[], None));
    p.read(6, 36864, 512);
    p
}

fn check_script(p: &mut Pair) {
    for tag in [1, 3, 4, 5] {
        assert_eq!(p.finish(tag).0, Ok(()), "tag {tag}");
    }
    assert_eq!(p.finish(2), (Ok(()), pattern(8192, 2)[..5120].to_vec()));
    assert_eq!(p.finish(6), (Ok(()), pattern(8192, 2)[4096..4608].to_vec()));
    assert!(p.done.is_empty());
    assert_eq!(p.server.disk[8192..14336], pattern(6144, 1));
    let cleared = |at: usize| (512..1536).contains(&at) || (2048..2560).contains(&at);
    for at in 512..4096 {
        assert_eq!(p.server.disk[at] == 0, cleared(at), "byte {at}");
    }
}

/// Every byte at first, where HELLO, WELCOME and most headers are; then enough
/// to meet each place inside long payloads and the headers between them.
fn positions(total: usize) -> impl Iterator<Item = usize> {
    (0..total).filter(|at| *at < 600 || at % 29 == 0)
}

#[test]
fn requests_of_every_kind_complete_with_their_data() {
    for direct in [false, true] {
        let mut p = script(direct);
        p.settle();
        check_script(&mut p);
        assert_eq!(p.server.hellos, [(0, 5, 1)]);
    }
}

#[test]
fn a_connection_that_breaks_anywhere_changes_nothing() {
    let mut clean = script(false);
    clean.settle();
    let (out, back) = clean.moved;
    for direct in [false, true] {
        for cut in positions(out) {
            let mut p = script(direct);
            p.connect();
            // Up to `cut` bytes reach the server, and no answer the client...
            while p.moved.0 < cut {
                p.send(usize::MAX);
                p.serve(cut - p.moved.0);
                // ...but WELCOME, without which nothing more is sent.
                if !p.session.is_ready() && !p.connection.replies.is_empty() {
                    p.answer(0);
                    p.receive(usize::MAX);
                }
            }
            p.cut();
            p.settle();
            check_script(&mut p);
        }
        for cut in positions(back) {
            let mut p = script(direct);
            p.connect();
            while p.moved.1 < cut {
                p.send(usize::MAX);
                p.serve(usize::MAX);
                while !p.connection.replies.is_empty() {
                    p.answer(0);
                }
                p.receive(cut - p.moved.1);
            }
            p.cut();
            p.settle();
            check_script(&mut p);
            assert_eq!(p.server.hellos.len(), if cut == 0 { 1 } else { 2 });
        }
    }
}

#[test]
fn bytes_may_come_one_at_a_time_and_replies_in_any_order() {
    for direct in [false, true] {
        let mut p = script(direct);
        for _ in 0..100_000 {
            p.connect();
            p.send(1);
            p.serve(usize::MAX);
            if let Some(last) = p.connection.replies.len().checked_sub(1)
                && p.to_client.is_empty()
            {
                p.answer(last);
            }
            p.receive(1);
            if p.session.in_flight() == 0 {
                break;
            }
        }
        check_script(&mut p);
    }
}

#[test]
fn what_was_answered_before_the_break_is_not_sent_again() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    for tag in 1..5 {
        p.write(tag, u64::from(tag) * 512, &[1; 512]);
    }
    p.send(usize::MAX);
    p.serve(usize::MAX);
    p.answer(2);
    p.answer(0);
    p.receive(usize::MAX);
    assert_eq!(p.done.iter().map(|c| c.tag.0).collect::<Vec<_>>(), [3, 1]);
    let before = p.server.requests;
    p.cut();
    p.settle();
    assert_eq!(p.server.hellos[1], (0, 5, 2), "resumes from the lowest unanswered");
    assert_eq!(p.server.requests - before, 2, "only 2 and 4 are sent again");
}

#[test]
fn a_fence_at_any_point_ends_everything_at_once() {
    let mut clean = script(false);
    clean.settle();
    for cut in positions(clean.moved.0) {
        let mut p = script(false);
        p.connect();
        while p.moved.0 < cut {
            p.send(usize::MAX);
            p.serve(cut - p.moved.0);
            if !p.session.is_ready() && !p.connection.replies.is_empty() {
                p.answer(0);
                p.receive(usize::MAX);
            }
        }
        p.server.epoch.0 += 1;
        for _ in 0..10 {
            p.drive();
            p.advance(Duration::from_secs(1));
        }
        // Everything was over before the fence, or the session is fenced.
        assert_eq!(p.session.state(), State::Fenced, "after {cut} bytes");
        assert!(matches!(p.notices.last(), Some(Notice::Fenced)));
        let (done, waiting) = (p.done.len(), p.session.in_flight());
        assert_eq!(done + waiting, 6);
        p.read(90, 0, 512);
        p.drive();
        p.advance(Duration::from_secs(3600));
        p.session
            .ingest(p.now, &frame(Opcode::Read, Status::Ok, Seq(2), p.server.epoch, &[7; 4096]));
        p.drive();
        assert_eq!((p.done.len(), p.session.in_flight()), (done, waiting + 1));
        assert!(p.session.deadline().is_none() && !p.session.has_socket());
        let untouched = p.flights.remove(&90).expect("waits for ever").data();
        assert_eq!(untouched, [0xee; 512]);
    }
}

#[test]
fn garbage_at_any_position_costs_a_connection_at_most() {
    // Small, so that every byte can have its turn: mostly headers.
    let small = |direct| {
        let mut p = Pair::new(16 << 10, 16);
        p.direct = direct;
        p.server.payload_max = 4096;
        p.write(1, 0, &pattern(6144, 1));
        p.read(2, 512, 512);
        p.submit(3, Op::Flush, Memory::new(&[], None));
        p.read(4, 1024, 512);
        p
    };
    let mut clean = small(false);
    clean.settle();
    for direct in [false, true] {
        for at in 0..clean.moved.1 {
            for flip in [0xff, 0x01, 0x80] {
                let mut p = small(direct);
                p.connect();
                p.server.lenient = true;
                while p.session.in_flight() > 0 && p.moved.1 <= at {
                    p.send(usize::MAX);
                    p.serve(usize::MAX);
                    while !p.connection.replies.is_empty() {
                        p.answer(0);
                    }
                    if let Some(byte) = p.to_client.get_mut(at - p.moved.1) {
                        *byte ^= flip;
                    }
                    let moved = p.receive(usize::MAX);
                    if moved == 0 {
                        break;
                    }
                }
                // Never a request completed twice (checked by the pair), never a
                // byte outside the buffers, and an end that can be told.
                for _ in 0..40 {
                    p.drive();
                    p.advance(Duration::from_secs(6));
                    if p.session.in_flight() == 0 {
                        break;
                    }
                }
                // A WELCOME that promised too much may have made frames that no
                // server takes; then the session keeps asking, and says why.
                let told = match p.session.state() {
                    State::Fenced | State::Lost => true,
                    _ => matches!(
                        p.notices.last(),
                        Some(Notice::Dropped(DropReason::Violation(Violation::Welcome(_))))
                    ),
                };
                assert!(
                    p.session.in_flight() == 0 || told,
                    "byte {at}, flip {flip:#x}: {:?}",
                    p.notices
                );
                p.flights.values().for_each(Memory::check_guards);
            }
        }
    }
}

/// Each lie of a server, told while one READ and one WRITE are unanswered.
#[test]
fn each_lie_is_noticed_and_the_truth_asked_for_again() {
    let ok = |opcode, seq, body: &[u8]| frame(opcode, Status::Ok, Seq(seq), Epoch(5), body);
    let lies = [
        ("a seq that was never given", ok(Opcode::Read, 9, &[0; 512])),
        ("seq zero", ok(Opcode::Read, 0, &[0; 512])),
        ("another opcode", ok(Opcode::Write, 1, b"")),
        ("a long payload", ok(Opcode::Read, 1, &[0; 1024])),
        ("a short payload", ok(Opcode::Read, 1, &[0; 511])),
        ("no payload", ok(Opcode::Read, 1, b"")),
        ("a payload for a WRITE", ok(Opcode::Write, 2, &[0; 512])),
        ("a second WELCOME", ok(Opcode::Hello, 0, &[0; 80])),
        ("an event nobody waits for", ok(Opcode::Event, 1, &[0; 32])),
        ("no owner, after WELCOME", frame(Opcode::Read, Status::NotOwner, Seq(1), Epoch(5), b"")),
        ("no space for a READ", frame(Opcode::Read, Status::NoSpace, Seq(1), Epoch(5), b"")),
        ("not permitted to READ", frame(Opcode::Read, Status::NotPermitted, Seq(1), Epoch(5), b"")),
        ("an endless sentence", frame(Opcode::Read, Status::Io, Seq(1), Epoch(5), &[b'x'; 4000])),
        ("another protocol", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec()),
    ];
    for (what, lie) in lies {
        let mut p = Pair::new(8192, 8);
        p.server.disk[..512].fill(3);
        p.drive();
        p.read(1, 0, 512);
        p.write(2, 512, &[4; 512]);
        p.send(usize::MAX);
        p.to_server.clear();
        p.to_client.extend(lie);
        p.receive(usize::MAX);
        assert!(p.done.is_empty(), "{what}");
        assert!(
            matches!(p.notices.last(), Some(Notice::Dropped(DropReason::Violation(_)))),
            "{what}: {:?}",
            p.notices
        );
        p.settle();
        assert_eq!(p.finish(1), (Ok(()), vec![3; 512]), "{what}");
        assert_eq!(p.finish(2).0, Ok(()), "{what}");
        assert_eq!(p.server.disk[512..1024], [4; 512], "{what}");
    }
}

#[test]
fn an_answer_to_a_request_that_is_still_being_sent_is_a_lie() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.write(1, 0, &[4; 4096]);
    p.send(100);
    p.to_client.extend(frame(Opcode::Write, Status::Ok, Seq(1), Epoch(5), b""));
    p.receive(usize::MAX);
    assert!(p.done.is_empty());
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_eq!(p.server.disk[..4096], [4; 4096]);
}

#[test]
fn errors_of_single_requests_reach_their_owner_and_nobody_else() {
    for (status, opcode, error) in [
        (Status::OutOfRange, Opcode::Write, IoError::OutOfRange),
        (Status::NoSpace, Opcode::Write, IoError::NoSpace),
        (Status::Io, Opcode::Write, IoError::Io),
        (Status::NotPermitted, Opcode::Write, IoError::ReadOnly),
        (Status::OutOfRange, Opcode::Read, IoError::OutOfRange),
        (Status::Io, Opcode::Read, IoError::Io),
        (Status::Io, Opcode::Flush, IoError::Io),
    ] {
        for sentence in [&b""[..], b"because of the weather"] {
            let mut p = Pair::new(8192, 8);
            p.drive();
            match opcode {
                Opcode::Read => p.read(1, 0, 512),
                Opcode::Write => p.write(1, 0, &[1; 512]),
                _ => p.submit(1, Op::Flush, Memory::new(&[], None)),
            }
            p.read(2, 0, 512);
            p.send(usize::MAX);
            p.to_server.clear();
            p.to_client.extend(frame(opcode, status, Seq(1), Epoch(5), sentence));
            p.to_client.extend(frame(Opcode::Read, Status::Ok, Seq(2), Epoch(5), &[8; 512]));
            p.receive(usize::MAX);
            assert_eq!(p.finish(1).0, Err(error), "{status:?} {opcode:?}");
            assert_eq!(p.finish(2), (Ok(()), vec![8; 512]));
            assert!(p.session.is_ready());
        }
    }
}

#[test]
fn what_cannot_be_asked_is_refused_here() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.submit(1, Op::Read { offset: 1 }, Memory::new(&[512], None));
    p.submit(2, Op::Write { offset: 0 }, Memory::new(&[511], None));
    p.submit(3, Op::Read { offset: u64::MAX - 511 }, Memory::new(&[512], None));
    p.submit(4, Op::Discard { offset: 512, len: u64::MAX - 511 }, Memory::new(&[], None));
    p.submit(5, Op::Read { offset: 512 }, Memory::new(&[0, 0], None));
    p.collect();
    for tag in 1..5 {
        assert_eq!(p.finish(tag).0, Err(IoError::OutOfRange), "{tag}");
    }
    assert_eq!(p.finish(5).0, Ok(()));
    assert_eq!(p.session.in_flight(), 0);
    assert_eq!(p.send(usize::MAX), 0);
}
