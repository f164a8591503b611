//! FLUSHes over a restart of the server with another durability generation.

use baton_protocol::{AccessMode, Status};

use super::super::*;
use super::{Memory, Pair, Server, identity, pattern};

fn flush(p: &mut Pair, tag: u32) -> Result<(), IoError> {
    p.submit(tag, Op::Flush, Memory::new(&[], None));
    p.settle();
    p.finish(tag).0
}

/// The machine went down; its next life keeps `disk` or not, which is not the point.
fn lose_power(p: &mut Pair) {
    p.server.restart();
    p.server.generation += 1;
    p.cut();
}

/// Changes reported lost, one entry a report.
fn reports(p: &Pair) -> Vec<u64> {
    let lost = |n: &Notice| if let Notice::WritesLost(lost) = n { Some(*lost) } else { None };
    p.notices.iter().filter_map(lost).collect()
}

fn write(p: &mut Pair, tag: u32) {
    p.write(tag, u64::from(tag) * 512, &pattern(512, tag as usize));
    p.settle();
    assert_eq!(p.finish(tag).0, Ok(()));
}

#[test]
fn unflushed_changes_of_every_kind_fail_the_next_flush_once() {
    for kind in 0..3 {
        let mut p = Pair::new(8192, 8);
        assert_eq!(flush(&mut p, 9), Ok(()));
        match kind {
            0 => p.write(1, 0, &[1; 512]),
            1 => p.submit(1, Op::Discard { offset: 0, len: 512 }, Memory::new(&[], None)),
            _ => {
                let op = Op::WriteZeroes { offset: 0, len: 512, unmap: false };
                p.submit(1, op, Memory::new(&[], None));
            }
        }
        p.settle();
        lose_power(&mut p);
        assert_eq!(flush(&mut p, 2), Err(IoError::Io), "{kind}");
        assert_eq!(reports(&p), [1]);
        assert_eq!(flush(&mut p, 3), Ok(()));
        lose_power(&mut p);
        assert_eq!(flush(&mut p, 4), Ok(()));
        assert_eq!(reports(&p), [1]);
    }
}

#[test]
fn nothing_happens_when_nothing_was_lost() {
    let mut p = Pair::new(8192, 8);
    // Flushed.
    write(&mut p, 1);
    assert_eq!(flush(&mut p, 2), Ok(()));
    p.read(3, 0, 512);
    p.settle();
    lose_power(&mut p);
    assert_eq!(flush(&mut p, 4), Ok(()));
    // A kill of the process.
    write(&mut p, 5);
    p.server.restart();
    p.cut();
    assert_eq!(flush(&mut p, 6), Ok(()));
    // Not acknowledged: it is sent again.
    p.write(7, 0, &[1; 512]);
    p.send(usize::MAX);
    p.serve(usize::MAX);
    lose_power(&mut p);
    p.settle();
    assert_eq!(flush(&mut p, 8), Ok(()));
    // Refused.
    p.server.refuse_requests = Some(Status::NoSpace);
    p.write(9, 0, &[1; 512]);
    p.settle();
    p.server.refuse_requests = None;
    lose_power(&mut p);
    assert_eq!(flush(&mut p, 10), Ok(()));
    assert!(reports(&p).is_empty());
}

#[test]
fn a_flush_that_is_sent_again_fails_too() {
    let mut p = Pair::new(8192, 8);
    write(&mut p, 1);
    p.submit(2, Op::Flush, Memory::new(&[], None));
    p.submit(3, Op::Flush, Memory::new(&[], None));
    p.send(usize::MAX);
    p.serve(usize::MAX);
    lose_power(&mut p);
    p.settle();
    assert_eq!(p.finish(2).0, Err(IoError::Io));
    assert_eq!(p.finish(3).0, Err(IoError::Io));
    assert_eq!(flush(&mut p, 4), Ok(()));
}

/// Its first part went down with the server's page cache, its last came after.
#[test]
fn a_request_that_was_half_answered_is_half_lost() {
    let mut p = Pair::new(64 << 10, 8);
    p.server.payload_max = 4096;
    p.write(1, 0, &pattern(8192, 3));
    p.connect();
    p.send(usize::MAX);
    p.serve(usize::MAX);
    p.answer(0);
    p.receive(usize::MAX);
    p.send(usize::MAX);
    p.serve(usize::MAX);
    p.answer(0);
    p.receive(usize::MAX);
    assert_eq!(p.done, []);
    lose_power(&mut p);
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_eq!(flush(&mut p, 2), Err(IoError::Io));
}

#[test]
fn queues_of_a_volume_share_their_losses() {
    let mut a = Pair::new(8192, 8);
    let mut b = Pair::new(8192, 8).beside(&a);
    write(&mut a, 1);
    write(&mut b, 1);
    assert_eq!(flush(&mut a, 2), Ok(()), "covers both");
    lose_power(&mut a);
    lose_power(&mut b);
    assert_eq!(flush(&mut b, 3), Ok(()));
    write(&mut a, 4);
    lose_power(&mut b);
    assert_eq!(flush(&mut b, 5), Err(IoError::Io));
    // `a` hears of it now.
    lose_power(&mut a);
    assert_eq!(flush(&mut a, 6), Ok(()));
    assert_eq!((reports(&a), reports(&b)), (vec![], vec![1]));
}

/// The control connection hears of it first, and no queue is connected yet.
#[test]
fn the_control_connection_notices_for_all() {
    let mut queue = Pair::new(8192, 8);
    let control = identity(AccessMode::Owner, true);
    let mut control = Pair::with(Server::new(8192), control, 0).beside(&queue);
    control.drive();
    write(&mut queue, 1);
    lose_power(&mut control);
    control.advance(Duration::from_secs(1));
    control.drive();
    assert_eq!(reports(&control), [1]);
    lose_power(&mut queue);
    assert_eq!(flush(&mut queue, 2), Err(IoError::Io));
    assert!(reports(&queue).is_empty());
}
