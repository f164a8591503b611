//! Windows, splits, time, reconnects, events, modes.

use std::time::Duration;

use baton_protocol::message::{Event, EventKind};
use baton_protocol::{AccessMode, QueueId, Status, VolumeId};

use super::super::*;
use super::{Memory, Pair, Server, identity, pattern};

fn flush(p: &mut Pair, tag: u32) {
    p.submit(tag, Op::Flush, Memory::new(&[], None));
}

#[test]
fn a_request_larger_than_a_frame_is_cut_and_completed_once() {
    for direct in [false, true] {
        let mut p = Pair::new(4 << 20, 4);
        p.direct = direct;
        let data = pattern((3 << 20) + 512, 5);
        p.write(1, 1024, &data);
        p.drive();
        assert_eq!(p.server.requests, 4);
        assert_eq!(p.finish(1).0, Ok(()));
        assert!(p.server.disk[1024..][..data.len()] == data);
        p.read(2, 1024, data.len());
        p.settle();
        let (result, back) = p.finish(2);
        assert!(result == Ok(()) && back == data);
    }
}

#[test]
fn the_window_holds_and_everything_passes_in_order() {
    for window in [1, 2, 40, 1024] {
        let mut p = Pair::new(1 << 20, 2000);
        p.server.window_requests = window;
        p.drive();
        for tag in 0..1500 {
            p.write(tag, u64::from(tag) * 512, &pattern(512, tag as usize));
        }
        while p.session.in_flight() > 0 {
            p.send(usize::MAX);
            p.serve(usize::MAX);
            assert!(p.connection.replies.len() <= window as usize);
            // The oldest is answered last.
            while let Some(last) = p.connection.replies.len().checked_sub(1) {
                p.answer(last);
            }
            assert!(p.receive(usize::MAX) > 0);
        }
        for tag in 0..1500 {
            assert_eq!(p.finish(tag).0, Ok(()));
            assert!(p.server.disk[tag as usize * 512..][..512] == pattern(512, tag as usize));
        }
    }
}

#[test]
fn silence_is_met_with_a_ping_and_then_with_a_new_connection() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.advance(Duration::from_secs(3600));
    assert_eq!(p.session.deadline(), None, "idle: nobody is woken");

    p.read(1, 0, 512);
    p.send(usize::MAX);
    p.serve(usize::MAX);
    let asked = p.now;
    assert_eq!(p.session.deadline(), Some(asked + Duration::from_secs(5)));
    p.advance(Duration::from_millis(4999));
    assert_eq!(p.send(usize::MAX), 0);
    p.advance(Duration::from_millis(1));
    assert_eq!(p.send(usize::MAX), 64, "PING");
    p.serve(usize::MAX);
    assert_eq!(p.server.pings, 1);
    // The answer to PING alone keeps the connection.
    p.answer(1);
    p.receive(usize::MAX);
    assert!(p.done.is_empty());
    p.advance(Duration::from_secs(4));
    assert!(p.session.is_ready());
    // Then nothing at all: PING, and 5 s later the connection is gone.
    p.advance(Duration::from_secs(1));
    p.send(usize::MAX);
    p.advance(Duration::from_millis(4999));
    assert!(p.session.is_ready());
    p.advance(Duration::from_millis(1));
    assert!(matches!(p.notices.last(), Some(Notice::Dropped(DropReason::Silent(_)))));
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_eq!(p.session.deadline(), None);
}

#[test]
fn a_ping_gets_through_a_full_window() {
    let mut p = Pair::new(1 << 20, 2000);
    p.server.window_requests = 64;
    p.drive();
    for tag in 0..200 {
        p.read(tag, 0, 512);
    }
    p.send(usize::MAX);
    p.serve(usize::MAX);
    for round in 1..=5 {
        p.advance(Duration::from_secs(5));
        p.send(usize::MAX);
        p.serve(usize::MAX);
        assert_eq!(p.server.pings, round);
        let ping = p.connection.replies.len() - 1;
        p.answer(ping);
        p.receive(usize::MAX);
        assert!(p.session.is_ready());
    }
    p.settle();
    assert_eq!(p.done.len(), 200);
}

#[test]
fn a_slow_peer_that_takes_bytes_is_alive() {
    let mut p = Pair::new(1 << 20, 8);
    p.drive();
    p.write(1, 0, &pattern(1 << 19, 1));
    for _ in 0..100 {
        p.send(4000);
        p.serve(usize::MAX);
        p.advance(Duration::from_secs(4));
    }
    assert!(p.session.is_ready());
    assert_eq!(p.server.hellos.len(), 1);
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
}

#[test]
fn an_unreachable_server_is_asked_with_growing_pauses_and_then_found() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.read(1, 0, 512);
    p.unreachable = true;
    p.cut();
    let start = p.now;
    let mut tries = 0;
    while p.now < start + Duration::from_secs(60) {
        p.connect();
        p.collect();
        tries += 1;
        let next = p.session.deadline().expect("another attempt");
        assert!(next <= p.now + Duration::from_secs(1));
        p.now = next.max(p.now);
    }
    assert!((60..150).contains(&tries), "{tries} attempts in a minute");
    assert!(p.done.is_empty());
    p.unreachable = false;
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
}

#[test]
fn a_connection_or_hello_without_answer_is_given_up() {
    let mut p = Pair::new(8192, 8);
    p.session.connecting(p.now);
    p.advance(Duration::from_secs(5));
    assert!(matches!(p.notices.last(), Some(Notice::Dropped(DropReason::ConnectTimeout(_)))));
    p.advance(Duration::from_secs(1));
    p.connect();
    p.send(usize::MAX);
    p.advance(Duration::from_millis(9999));
    assert!(p.session.is_open());
    p.advance(Duration::from_millis(1));
    assert!(matches!(p.notices.last(), Some(Notice::Dropped(DropReason::HelloTimeout(_)))));
    p.read(1, 0, 512);
    p.settle();
}

/// Welcomed, then closed, for ever: not at the speed of the network.
#[test]
fn a_server_that_welcomes_and_leaves_is_not_hammered() {
    let mut p = Pair::new(8192, 8);
    p.read(1, 0, 512);
    let start = p.now;
    while p.now < start + Duration::from_secs(30) {
        p.connect();
        p.send(usize::MAX);
        p.serve(usize::MAX);
        while !p.connection.replies.is_empty() {
            p.answer(0);
        }
        p.receive(112);
        p.cut();
        p.now = p.session.deadline().expect("another attempt").max(p.now);
    }
    assert!(p.server.hellos.len() < 100, "{} connections in 30 s", p.server.hellos.len());
}

#[test]
fn a_busy_server_is_left_alone_for_a_while() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.read(1, 0, 512);
    p.server.refuse_requests = Some(Status::Busy);
    p.drive();
    assert!(matches!(p.notices.last(), Some(Notice::Dropped(DropReason::Refused { .. }))));
    assert!(p.session.deadline().expect("later") >= p.now + Duration::from_millis(5));
    p.server.refuse_requests = None;
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
}

/// What a server may have become while the connection was away.
#[test]
fn requests_are_never_replayed_onto_something_else() {
    type Change = fn(&mut Server);
    let changes: [(&str, Change, State); 8] = [
        ("another volume", |s| s.volume = VolumeId(2), State::Lost),
        ("smaller", |s| s.disk.truncate(4096), State::Lost),
        ("other blocks", |s| s.block_bytes = 4096, State::Lost),
        ("no volume", |s| s.refuse = Some(Status::NoSuchVolume), State::Lost),
        ("deleted", |s| s.refuse = Some(Status::Gone), State::Lost),
        ("another owner", |s| s.refuse = Some(Status::NotOwner), State::Fenced),
        ("stale", |s| s.refuse = Some(Status::StaleEpoch), State::Fenced),
        ("another epoch", |s| s.epoch.0 += 1, State::Fenced),
    ];
    for (what, change, state) in changes {
        let mut p = Pair::new(8192, 8);
        p.drive();
        p.write(1, 0, &[1; 512]);
        p.send(usize::MAX);
        p.cut();
        change(&mut p.server);
        for _ in 0..5 {
            p.drive();
            p.advance(Duration::from_secs(2));
        }
        assert_eq!(p.session.state(), state, "{what}");
        assert_eq!(p.server.requests, 0, "{what}: replayed");
        assert!(p.done.is_empty() && p.session.in_flight() == 1, "{what}");
        assert_eq!(p.session.deadline(), None, "{what}");
        let last = p.notices.last().expect("said so");
        assert!(matches!(last, Notice::Fenced | Notice::Lost(_)), "{what}: {last:?}");
    }
}

#[test]
fn a_volume_deleted_under_load_is_lost() {
    let mut p = Pair::new(8192, 8);
    p.drive();
    p.read(1, 0, 512);
    p.server.refuse_requests = Some(Status::Gone);
    p.drive();
    assert_eq!(p.session.state(), State::Lost);
    assert_eq!(p.session.in_flight(), 1);
}

#[test]
fn a_server_with_smaller_limits_gets_what_fits_and_no_more() {
    let mut p = Pair::new(1 << 20, 400);
    p.drive();
    for tag in 0..300 {
        p.write(tag, u64::from(tag) * 512, &[7; 512]);
    }
    p.send(usize::MAX);
    p.cut();
    // A narrower window than what is unanswered: sent again piece by piece.
    p.server.window_requests = 16;
    p.settle();
    assert_eq!(p.done.len(), 300);
    // Frames smaller than what was cut: wait until the old limit is back.
    p.read(900, 0, 65536);
    p.send(usize::MAX);
    p.cut();
    p.server.payload_max = 4096;
    for _ in 0..5 {
        p.drive();
        p.advance(Duration::from_secs(2));
    }
    assert_eq!(p.session.in_flight(), 1);
    p.server.payload_max = 1 << 20;
    p.settle();
    assert_eq!(p.finish(900).0, Ok(()));
}

#[test]
fn a_reader_follows_the_epoch() {
    let mut p = Pair::with(Server::new(8192), identity(AccessMode::ReadOnly, false), 8);
    p.drive();
    assert_eq!(p.server.hellos, [(0, 0, 1)]);
    p.server.disk.fill(6);
    p.read(1, 0, 512);
    p.send(usize::MAX);
    p.server.epoch.0 += 1;
    p.settle();
    assert_eq!(p.finish(1), (Ok(()), vec![6; 512]));
    assert_eq!(p.server.hellos.len(), 2);
    p.write(2, 0, &[1; 512]);
    p.submit(3, Op::Discard { offset: 0, len: 512 }, Memory::new(&[], None));
    flush(&mut p, 4);
    p.settle();
    assert_eq!(p.finish(2).0, Err(IoError::ReadOnly));
    assert_eq!(p.finish(3).0, Err(IoError::ReadOnly));
    assert_eq!(p.finish(4).0, Ok(()));
}

fn control() -> Pair {
    let mut p = Pair::with(Server::new(8192), identity(AccessMode::Owner, true), 0);
    p.drive();
    assert!(matches!(p.notices[..], [Notice::Welcomed(_)]));
    assert!(p.connection.parked.is_some(), "an EVENT request waits");
    assert_eq!(p.session.deadline(), None, "a parked EVENT wakes nobody");
    p.notices.clear();
    p
}

#[test]
fn the_control_connection_claims_watches_and_comes_back() {
    let mut p = control();
    assert_eq!(p.server.hellos, [(QueueId::CONTROL.0, 0, 1)], "a claim");
    p.server.disk.resize(16384, 0);
    p.server.tell_event(&mut p.connection, Event { id: 4, kind: EventKind::Resized, value: 16384 });
    p.drive();
    assert!(matches!(p.notices[..], [Notice::Event(Event { value: 16384, .. })]));
    assert_eq!(p.connection.parked.map(|(_, known)| known), Some(4), "parked again");
    p.cut();
    // The server counts events anew after a restart.
    p.server.restart();
    p.server.last_event = 1;
    p.drive();
    assert_eq!(p.server.hellos[1].1, 5, "a rejoin, with the epoch granted");
    assert_eq!(p.connection.parked.map(|(_, known)| known), Some(1));
    p.server.tell_event(&mut p.connection, Event { id: 2, kind: EventKind::GoingAway, value: 0 });
    p.drive();
    assert!(p.connection.parked.is_some());
    // Below the size that was told: another volume, or a broken server.
    p.server.disk.truncate(8192);
    p.cut();
    p.drive();
    assert_eq!(p.session.state(), State::Lost);
}

#[test]
fn an_event_of_a_later_version_is_passed_over_once() {
    let mut p = control();
    let mut body = Event { id: 9, kind: EventKind::GoingAway, value: 0 }.encode();
    body[8] = 200;
    p.server.tell(&mut p.connection, 9, &body);
    p.drive();
    assert!(p.notices.is_empty() && p.session.is_ready());
    assert_eq!(p.connection.parked.map(|(_, known)| known), Some(9));
}

#[test]
fn an_event_that_is_no_news_is_a_lie() {
    let mut p = control();
    p.server.tell_event(&mut p.connection, Event { id: 3, kind: EventKind::GoingAway, value: 0 });
    p.drive();
    let (seq, _) = p.connection.parked.expect("parked");
    let body = Event { id: 3, kind: EventKind::GoingAway, value: 0 }.encode();
    let bytes =
        super::server::frame(baton_protocol::Opcode::Event, Status::Ok, seq, Epoch(5), &body);
    p.to_client.extend(bytes);
    p.receive(usize::MAX);
    assert!(matches!(
        p.notices.last(),
        Some(Notice::Dropped(DropReason::Violation(Violation::EventOrder { .. })))
    ));
}

#[test]
fn events_that_end_the_service() {
    for (kind, value, state) in [
        (EventKind::EpochChanged, 6, Some(State::Fenced)),
        (EventKind::EpochChanged, 5, None),
        (EventKind::Deleted, 0, Some(State::Lost)),
    ] {
        let mut p = control();
        p.server.tell_event(&mut p.connection, Event { id: 1, kind, value });
        p.drive();
        match state {
            Some(state) => assert_eq!(p.session.state(), state),
            None => assert!(p.session.is_ready()),
        }
    }
}

#[test]
fn the_volume_is_given_back_even_after_a_break() {
    let mut p = control();
    p.session.release();
    p.session.release();
    p.send(usize::MAX);
    p.cut();
    assert!(!p.server.released);
    p.drive();
    assert!(p.server.released);
    let told = p.notices.iter().filter(|n| matches!(n, Notice::Released)).count();
    assert_eq!(told, 1);
}

/// Every refusal of the very first HELLO is told with the server's sentence.
#[test]
fn a_first_hello_that_is_refused_ends_with_the_reason() {
    for status in [Status::NotOwner, Status::NoSuchVolume, Status::Version, Status::Protocol] {
        let mut server = Server::new(8192);
        server.refuse = Some(status);
        let mut p = Pair::with(server, identity(AccessMode::Owner, true), 0);
        p.drive();
        assert_eq!(p.session.state(), State::Lost);
        assert!(matches!(
            p.notices.last(),
            Some(Notice::Lost(LostReason::Refused { status: s, text }))
                if *s == status && text == "the server says no"
        ));
    }
}
