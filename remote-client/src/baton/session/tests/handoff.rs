//! Sessions in a handoff, each rule by itself, against the real access record.

use baton_protocol::access::{AccessRecord, By, Input, Phase};
use baton_protocol::handoff::message::OPEN_BYTES;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{
    Ask, Count, HandoffId, Key, Members, Mode, Open, Outcome, Plan, Proof, Side, Try,
};
use baton_protocol::{AccessMode, Epoch, Event, EventKind, QueueId, SessionId, Status, VolumeId};

use super::super::handoff::LATER;
use super::super::*;
use super::{Memory, Pair, Server, identity, pattern};

const TRY: Try = Try { id: HandoffId(7), attempt: 1 };
const KEY: Key = Key([3; 32]);
const ME: SessionId = SessionId(77);
const OTHER: SessionId = SessionId(5);

fn plan(from: &str, to: &str, anchor: VolumeId, mode: Mode) -> Plan {
    Plan {
        attempt: TRY,
        vm: "vm".to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        anchor,
        members: Members::of([VolumeId(0xabc)]),
        mode,
        key: KEY,
    }
}

fn arm(server: &mut Server, plan: &Plan) {
    let next_epoch = server.record.as_ref().expect("claimed").next_epoch;
    server.step(Input::Arm { plan, term: 1, next_epoch, generation: 1 }).expect("owned");
}

/// A server whose volume is armed, owned by the source.
fn armed(from: (&str, SessionId), to: &str, mode: Mode) -> Server {
    let mut server = Server::new(8192);
    server.record = Some(AccessRecord::new(VolumeId(0xabc)));
    server.step(Input::Claim { name: from.0, session: from.1 }).expect("free");
    let plan = plan(from.0, to, VolumeId(0xabc), mode);
    arm(&mut server, &plan);
    server
}

fn source(mode: Mode) -> Server {
    armed(("host/vm", ME), "other/vm", mode)
}

fn destination(mode: Mode) -> Server {
    armed(("other/vm", OTHER), "host/vm", mode)
}

fn phase(p: &Pair) -> Phase {
    p.server.record.as_ref().expect("a record").phase
}

fn epoch(p: &Pair) -> Epoch {
    p.server.record.as_ref().expect("a record").epoch
}

/// A session of the server's volume: `watch` is the control connection.
fn pair(server: Server, mode: AccessMode, watch: bool) -> Pair {
    let who = Identity { handoff: true, ..identity(mode, watch) };
    let granted = server.record.as_ref().expect("a record").epoch;
    let mut p = Pair::with(server, who, 8);
    if !watch {
        p.session.adopt(p.now, granted);
    }
    p.drive();
    p
}

fn change(p: &mut Pair, input: Input<'_>) {
    p.server.step(input).expect("granted");
    p.server.show_record(&mut p.connection);
}

fn seal_by_hand(server: &mut Server, session: SessionId) {
    server.step(Input::Seal { attempt: TRY, session }).expect("armed");
    server.step(Input::Sealed { attempt: TRY, session }).expect("armed");
}

fn open(p: &Pair) -> Open {
    let record = p.server.record.as_ref().expect("a record");
    Open { attempt: TRY, proof: record.proof(TRY).expect("decided") }
}

fn views(p: &mut Pair) -> Vec<(u64, u64)> {
    let mut seen = Vec::new();
    p.notices.retain(|notice| match notice {
        Notice::View { boot_id, record } => {
            seen.push((*boot_id, record.version));
            false
        }
        _ => true,
    });
    seen
}

fn answers(p: &mut Pair) -> Vec<(Asked, Outcome)> {
    let mut seen = Vec::new();
    p.notices.retain(|notice| match notice {
        Notice::Answered { ask, answer, .. } => {
            seen.push((*ask, answer.outcome));
            false
        }
        _ => true,
    });
    seen
}

fn is_stuck(p: &Pair) -> bool {
    p.notices.iter().any(|notice| matches!(notice, Notice::Stuck))
}

#[test]
fn the_record_is_told_once_per_change_and_again_after_a_restart() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, true);
    let version = p.server.record.as_ref().expect("a record").version;
    assert_eq!(views(&mut p), [(1, version)]);
    change(&mut p, Input::Seal { attempt: TRY, session: ME });
    p.drive();
    assert_eq!(views(&mut p), [(1, version + 1)]);
    p.cut();
    p.drive();
    assert_eq!(views(&mut p), [], "a new connection alone is no news");
    p.server.boot_id = 2;
    p.cut();
    p.advance(Duration::from_secs(1));
    p.drive();
    assert_eq!(views(&mut p), [(2, version + 1)]);
}

#[test]
fn a_record_that_is_no_news_is_a_lie() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, true);
    let (seq, ..) = p.connection.access.expect("parked");
    p.connection.access = Some((seq, 9, 9));
    p.server.show_record(&mut p.connection);
    p.drive();
    let dropped =
        |n: &Notice| matches!(n, Notice::Dropped(DropReason::Violation(Violation::OldRecord)));
    assert!(p.notices.iter().any(dropped), "{:?}", p.notices);
}

#[test]
fn parked_requests_never_use_up_the_window() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, true);
    // Asks are refused and answered; the EVENT stays parked all the while.
    for round in 0..1500 {
        p.session.ask(p.now, TRY, Asked::Unfreeze { boot_id: 1 });
        p.settle();
        p.drive();
        p.advance(Duration::from_millis(20));
        p.drive();
        assert_eq!(answers(&mut p).len(), 1, "round {round}");
    }
}

#[test]
fn a_claim_during_a_handoff_stands_by() {
    for mode in [Mode::Base, Mode::Fast] {
        let p = pair(destination(mode), AccessMode::Owner, true);
        assert_eq!(p.session.who().mode, AccessMode::Standby);
        assert!(p.session.is_ready(), "{:?}", p.notices);
        assert!(p.notices.iter().any(|n| matches!(n, Notice::StandsBy)));
        assert!(p.session.hands_over());
    }
}

#[test]
fn without_the_feature_a_claim_during_a_handoff_is_refused() {
    let mut p = Pair::with(destination(Mode::Fast), identity(AccessMode::Owner, true), 8);
    p.drive();
    assert!(matches!(p.session.state(), State::Lost), "{:?}", p.session);
}

#[test]
fn a_hold_lets_through_what_was_submitted_and_nothing_after() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, false);
    p.server.window_requests = 64;
    p.write(1, 0, &pattern(512, 1));
    p.session.hold();
    assert_eq!(p.session.held_count(), None, "the submitter has not come to rest");
    p.write(2, 512, &pattern(512, 2));
    p.session.rest();
    assert_eq!(p.session.held_count(), None, "not everything is cut");
    p.settle();
    let count = p.session.held_count().expect("held");
    assert_eq!(count, Count { queue: QueueId(0), last: Seq(2), lowest: Seq(3) });
    assert_eq!((p.finish(1).0, p.finish(2).0), (Ok(()), Ok(())));
    p.write(3, 1024, &pattern(512, 3));
    p.drive();
    assert_eq!(p.server.disk[1024..1536], [0; 512], "held back");
    assert_eq!(p.session.held_count(), Some(count), "nothing more was sent");
    let epoch = epoch(&p);
    p.session.go(p.now, epoch, None);
    p.settle();
    assert_eq!(p.finish(3).0, Ok(()));
    assert_eq!(p.server.disk[1024..1536], pattern(512, 3));
}

#[test]
fn the_count_says_what_is_unanswered_and_is_sent_again_while_held() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, false);
    for tag in 1..4 {
        p.write(tag, u64::from(tag) * 512, &pattern(512, 1));
    }
    p.send(usize::MAX);
    p.session.hold();
    p.session.rest();
    p.serve(64 + 512);
    p.answer(0);
    p.receive(usize::MAX);
    let count = p.session.held_count().expect("all are cut");
    assert_eq!((count.last, count.lowest), (Seq(3), Seq(2)));
    p.cut();
    p.settle();
    let count = p.session.held_count().expect("held");
    assert_eq!((count.last, count.lowest), (Seq(3), Seq(4)), "answered on the next connection");
}

#[test]
fn a_seal_says_the_newest_counts_after_a_reconnect() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, true);
    let count = |lowest| Count { queue: QueueId(0), last: Seq(3), lowest: Seq(lowest) };
    p.session.set_counts(vec![count(2)]);
    p.session.ask(p.now, TRY, Asked::Seal);
    p.drive();
    assert_eq!(p.server.asked.last().expect("asked").ask, Ask::Seal(vec![count(2)]));
    assert_eq!(answers(&mut p), [], "the server waits for what was sent");
    p.session.set_counts(vec![count(3), Count { queue: QueueId(1), ..count(4) }]);
    p.cut();
    p.drive();
    p.session.set_counts(vec![count(4)]);
    p.cut();
    p.drive();
    p.advance(Duration::from_secs(1));
    p.drive();
    assert_eq!(p.server.asked.last().expect("asked again").ask, Ask::Seal(vec![count(4)]));
    assert_eq!(answers(&mut p), [(Asked::Seal, Outcome::Granted)]);
    assert_eq!(phase(&p), Phase::Sealed);
}

#[test]
fn an_answer_lost_behind_a_seal_is_stuck_and_flows_after_the_reclaim() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, false);
    p.write(1, 0, &pattern(512, 1));
    p.session.hold();
    p.session.rest();
    p.send(usize::MAX);
    p.serve(usize::MAX);
    p.session.held_count().expect("held");
    seal_by_hand(&mut p.server, ME);
    p.cut();
    for _ in 0..5 {
        p.drive();
        p.advance(Duration::from_secs(1));
    }
    p.drive();
    assert!(matches!(p.session.state(), State::Backoff { .. }), "it pauses");
    assert!(is_stuck(&p), "{:?}", p.notices);
    assert!(!matches!(p.session.state(), State::Fenced | State::Lost));
    assert_eq!(p.session.in_flight(), 1);
    let by = By::Backend { name: "host/vm", session: ME };
    change(&mut p, Input::Reclaim { attempt: TRY, by });
    let epoch = epoch(&p);
    p.write(2, 512, &pattern(512, 2));
    p.session.go(p.now, epoch, Some(open(&p)));
    p.drive();
    assert_eq!((p.finish(1).0, p.finish(2).0), (Ok(()), Ok(())), "at once, without a pause");
    assert_eq!(p.server.opened, 0, "an owner's connection shows nothing");
    assert!(p.notices.iter().any(|n| matches!(n, Notice::FirstAnswer)));
}

#[test]
fn a_reclaim_keeps_the_connection_even_in_the_middle_of_a_request() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, false);
    for cut in [10, 63, 64, 100] {
        let mut q = pair(source(Mode::Base), AccessMode::Owner, false);
        q.write(1, 0, &pattern(512, 1));
        q.send(cut);
        seal_by_hand(&mut q.server, ME);
        let by = By::Backend { name: "host/vm", session: ME };
        change(&mut q, Input::Reclaim { attempt: TRY, by });
        let epoch = epoch(&q);
        q.session.go(q.now, epoch, None);
        q.settle();
        assert_eq!(q.finish(1).0, Ok(()), "{cut} bytes were sent before");
        assert_eq!(q.server.disk[..512], pattern(512, 1));
    }
    let hellos = p.server.hellos.len();
    p.session.hold();
    p.session.rest();
    seal_by_hand(&mut p.server, ME);
    change(
        &mut p,
        Input::Reclaim { attempt: TRY, by: By::Backend { name: "host/vm", session: ME } },
    );
    let epoch = epoch(&p);
    p.session.go(p.now, epoch, None);
    p.write(1, 0, &pattern(512, 1));
    p.drive();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_eq!(p.server.hellos.len(), hellos, "on the same connection");
}

#[test]
fn no_request_ever_carries_an_epoch_that_nobody_had() {
    // 0xff and 0x101 differ in two bytes: half of each would be a third one.
    for cut in 1..64 {
        let mut server = Server::new(8192);
        let record = AccessRecord { next_epoch: Epoch(0xff), ..AccessRecord::new(VolumeId(0xabc)) };
        server.record = Some(record);
        server.step(Input::Claim { name: "host/vm", session: ME }).expect("free");
        let plan = plan("host/vm", "other/vm", VolumeId(0xabc), Mode::Base);
        arm(&mut server, &plan);
        let mut p = pair(server, AccessMode::Owner, false);
        p.write(1, 0, &pattern(512, 1));
        p.send(cut);
        seal_by_hand(&mut p.server, ME);
        let by = By::Backend { name: "host/vm", session: ME };
        change(&mut p, Input::Reclaim { attempt: TRY, by });
        let epoch = epoch(&p);
        p.session.go(p.now, epoch, None);
        p.settle();
        assert_eq!(p.finish(1).0, Ok(()));
        let had = |epoch: &u64| [0xff, 0x101].contains(epoch);
        assert!(p.server.epochs.iter().all(had), "{cut}: {:x?}", p.server.epochs);
    }
}

#[test]
fn a_new_epoch_told_by_an_event_is_no_end() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, true);
    let event = Event { id: 1, kind: EventKind::EpochChanged, value: 99 };
    p.server.tell_event(&mut p.connection, event);
    p.drive();
    assert!(p.session.is_ready(), "{:?}", p.session);
}

/// A destination's queue in standby, with a request, and the decision.
fn activated(mode: Mode) -> (Pair, Open, Epoch) {
    let mut p = pair(destination(mode), AccessMode::Standby, false);
    p.write(1, 0, &pattern(512, 1));
    p.drive();
    assert_eq!(p.server.disk[..512], [0; 512], "a standby writes nothing");
    seal_by_hand(&mut p.server, OTHER);
    change(&mut p, Input::Activate { attempt: TRY, name: "host/vm", session: ME });
    let (open, epoch) = (open(&p), epoch(&p));
    (p, open, epoch)
}

#[test]
fn a_standby_shows_the_decision_and_its_first_data_behind_it() {
    let (mut p, open, epoch) = activated(Mode::Fast);
    let hellos = p.server.hellos.len();
    p.session.go(p.now, epoch, Some(open));
    // OPEN and the write leave together, before anything is answered.
    assert_eq!(p.send(usize::MAX), 64 + OPEN_BYTES + 64 + 512);
    p.drive();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_eq!((p.server.opened, p.server.hellos.len()), (1, hellos));
    assert_eq!(p.session.who().mode, AccessMode::Owner);
    p.cut();
    p.write(2, 512, &pattern(512, 2));
    p.settle();
    assert_eq!((p.finish(2).0, p.server.opened), (Ok(()), 1), "rejoined as the owner");
}

#[test]
fn a_standby_that_is_not_connected_shows_the_decision_when_it_is() {
    let (mut p, open, epoch) = activated(Mode::Fast);
    p.server.refuse = Some(Status::Busy);
    p.cut();
    p.drive();
    p.session.go(p.now, epoch, Some(open));
    p.drive();
    p.server.refuse = None;
    p.settle();
    assert_eq!((p.finish(1).0, p.server.opened), (Ok(()), 1));
}

#[test]
fn an_open_whose_answer_is_lost_is_shown_again_before_the_data() {
    let (mut p, open, epoch) = activated(Mode::Fast);
    p.session.go(p.now, epoch, Some(open));
    p.send(usize::MAX);
    p.serve(usize::MAX);
    p.cut();
    p.settle();
    assert_eq!((p.finish(1).0, p.server.opened), (Ok(()), 2));
    assert_eq!(p.server.disk[..512], pattern(512, 1));
}

#[test]
fn a_decision_that_is_not_the_anchors_writes_nothing_and_ends_nothing() {
    let (mut p, _, epoch) = activated(Mode::Fast);
    let proof = Proof { side: Side::Destination, grant: 9, mac: [0; 32] };
    p.session.go(p.now, epoch, Some(Open { attempt: TRY, proof }));
    for _ in 0..5 {
        p.drive();
        p.advance(Duration::from_secs(1));
    }
    assert_eq!(p.server.disk[..512], [0; 512]);
    assert!(!matches!(p.session.state(), State::Fenced | State::Lost));
    assert_eq!((p.session.in_flight(), p.done.len()), (1, 0), "the guest sees no error");
}

#[test]
fn an_open_granted_under_another_epoch_takes_the_data_with_it() {
    let (mut p, open, epoch) = activated(Mode::Fast);
    // The server restarts and remembers the handoff as it was armed.
    let record = destination(Mode::Fast).record.expect("a record").after_restart();
    p.server.record = Some(record);
    p.server.restart();
    p.server.boot_id = 2;
    p.cut();
    p.session.go(p.now, epoch, Some(open));
    p.settle();
    assert_eq!(p.finish(1).0, Ok(()));
    assert_ne!(p.session.grant().expect("granted").epoch, epoch);
    assert_eq!(p.server.disk[..512], pattern(512, 1));
}

#[test]
fn the_control_connection_watches_when_the_volume_is_anothers() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, true);
    seal_by_hand(&mut p.server, ME);
    change(&mut p, Input::Activate { attempt: TRY, name: "other/vm", session: OTHER });
    p.drive();
    assert!(p.session.is_ready(), "an event or a record is no end");
    views(&mut p);
    p.cut();
    p.drive();
    assert_eq!((p.session.who().mode, p.session.is_ready()), (AccessMode::Standby, true));
    p.session.ask(p.now, TRY, Asked::Reclaim);
    p.drive();
    assert_eq!(answers(&mut p), [(Asked::Reclaim, Outcome::Lost)]);
}

/// While the guest's disks start, the control connection of each has nothing to add.
#[test]
fn a_control_connection_keeps_back_what_nobody_waits_for() {
    let short = Duration::from_millis(1);
    let mut p = pair(destination(Mode::Fast), AccessMode::Standby, true);
    views(&mut p);
    seal_by_hand(&mut p.server, OTHER);
    p.server.show_record(&mut p.connection);
    p.drive();
    let version = p.server.record.as_ref().expect("a record").version;
    assert_eq!(views(&mut p), [(1, version)], "a seal is told at once");
    change(&mut p, Input::Activate { attempt: TRY, name: "host/vm", session: ME });
    let (open, epoch) = (open(&p), epoch(&p));
    p.session.go(p.now, epoch, Some(open));
    p.advance(LATER - short);
    p.drive();
    assert_eq!((p.server.opened, views(&mut p)), (0, vec![]));
    p.advance(2 * short);
    p.drive();
    assert_eq!((p.server.opened, views(&mut p)), (1, vec![(1, version + 1)]));
    assert_eq!(p.session.who().mode, AccessMode::Owner);
}

#[test]
fn what_a_control_connection_keeps_back_leaves_with_its_next_connection() {
    let mut p = pair(destination(Mode::Fast), AccessMode::Standby, true);
    seal_by_hand(&mut p.server, OTHER);
    change(&mut p, Input::Activate { attempt: TRY, name: "host/vm", session: ME });
    let open = open(&p);
    p.session.open_later(p.now, open);
    p.cut();
    p.drive();
    p.advance(LATER / 2);
    p.drive();
    assert_eq!(p.server.opened, 1);
}

#[test]
fn a_frozen_server_is_waited_for_and_a_wake_ends_the_pause() {
    let mut p = pair(source(Mode::Fast), AccessMode::Owner, false);
    p.server.record = p.server.record.take().map(AccessRecord::after_restart);
    p.server.restart();
    p.write(1, 0, &pattern(512, 1));
    p.cut();
    for _ in 0..8 {
        p.drive();
        p.advance(Duration::from_secs(1));
    }
    p.drive();
    let boot_id = p.server.boot_id;
    change(&mut p, Input::Unfreeze { attempt: TRY, session: ME, boot_id, boot_id_now: boot_id });
    p.drive();
    assert_eq!(p.session.in_flight(), 1, "it pauses");
    p.session.hurry(p.now);
    p.drive();
    assert_eq!(p.finish(1).0, Ok(()));
}

fn flush(p: &mut Pair, tag: u32) -> Result<(), IoError> {
    p.submit(tag, Op::Flush, Memory::new(&[], None));
    p.settle();
    p.finish(tag).0
}

#[test]
fn a_power_loss_between_the_hosts_fails_the_destinations_first_flush() {
    // Before the destination connected, before it was granted, after, or never.
    for lost in [Some(0), Some(1), Some(2), None] {
        let mut server = destination(Mode::Base);
        if lost == Some(0) {
            server.generation += 1;
        }
        let mut p = pair(server, AccessMode::Standby, false);
        let lose = |p: &mut Pair| {
            p.server.restart();
            p.server.generation += 1;
            p.cut();
            p.drive();
        };
        if lost == Some(1) {
            lose(&mut p);
        }
        seal_by_hand(&mut p.server, OTHER);
        change(&mut p, Input::Activate { attempt: TRY, name: "host/vm", session: ME });
        p.session.ledger().inherit(1);
        let (open, epoch) = (open(&p), epoch(&p));
        p.session.go(p.now, epoch, Some(open));
        p.drive();
        if lost == Some(2) {
            lose(&mut p);
        }
        let expected = if lost.is_some() { Err(IoError::Io) } else { Ok(()) };
        assert_eq!(flush(&mut p, 1), expected, "{lost:?}");
        assert_eq!(flush(&mut p, 2), Ok(()), "{lost:?}");
        lose(&mut p);
        assert_eq!(flush(&mut p, 3), Ok(()), "covered: {lost:?}");
    }
}

/// The server's disk is full, say: it has broken no rule, and is asked again a while later.
#[test]
fn a_decision_that_could_not_be_recorded_is_asked_for_again() {
    let mut p = pair(source(Mode::Base), AccessMode::Owner, true);
    seal_by_hand(&mut p.server, ME);
    p.server.show_record(&mut p.connection);
    p.drive();
    p.server.refuse_requests = Some(Status::Io);
    p.session.ask(p.now, TRY, Asked::Reclaim);
    p.drive();
    assert_eq!(answers(&mut p), []);
    let refused = |n: &Notice| matches!(n, Notice::Dropped(DropReason::Refused { .. }));
    assert!(p.notices.iter().any(refused), "{:?}", p.notices);
    p.server.refuse_requests = None;
    p.advance(Duration::from_secs(1));
    p.drive();
    assert_eq!(answers(&mut p), [(Asked::Reclaim, Outcome::Granted)]);
}
