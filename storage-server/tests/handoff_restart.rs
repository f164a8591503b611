//! The server is killed with -9 in each phase of a handoff, and comes again:
//! nobody may write who might not be the only one, and nothing is stuck.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use baton_protocol::access::{AccessRecord, Phase};
use baton_protocol::handoff::{Answer, Ask, Outcome, Side};
use baton_protocol::{Epoch, Status};
use common::handoff::{Backend, D, DESTINATION, Member, S, SOURCE, arm, count, which};
use common::restart::Mortal;
use common::{Client, greeting, metric, wait_for};

const MODES: [&str; 2] = ["fast", "base"];

/// A server with a volume, armed, and one answered write of the source.
fn armed(mode: &str) -> (Mortal, Member, Backend) {
    let server = Mortal::start();
    let volume = server.create("d");
    let mut source = volume.source();
    arm(&[&volume], mode);
    assert_eq!(source.queue.write(0, &[1; 4096]), Status::Ok);
    (server, volume, source)
}

/// The same, killed and come again.
fn armed_and_killed(mode: &str) -> (Mortal, Member, u64) {
    let (mut server, mut volume, source) = armed(mode);
    server.kill(&mut [&mut volume]);
    (server, volume, source.queue.seq)
}

/// The source's queue as it would come again.
fn queue_refused(volume: &Member, epoch: u64) -> Status {
    let mut hello = greeting(&volume.name, SOURCE, S);
    hello.epoch = epoch;
    Client::greet(volume.data, &hello).err().expect("refused").0
}

/// Waits at a control connection until the record is as wanted.
fn hears(control: &mut Client, wanted: impl Fn(&AccessRecord) -> bool) -> Answer {
    let mut news = control.access();
    while !wanted(&news.record) {
        let parked = control.watch(&news);
        news = control.told(parked);
    }
    news
}

/// The destination wins under `epoch` and sees what the source wrote.
fn goes_over(volume: &Member, destination: &mut Backend, epoch: u64) {
    let proof = destination.control.wins(Ask::Activate);
    assert_eq!(proof.side, Side::Destination);
    destination.open(proof);
    assert_eq!(destination.queue.epoch, Epoch(epoch));
    assert_eq!(destination.queue.read(0, 4096), [1; 4096]);
    assert_eq!(destination.queue.write(0, &[2; 512]), Status::Ok);
    assert_eq!(volume.phase(), "active");
}

#[test]
fn row_19_armed_is_frozen_in_fast_mode_until_the_source_says_it_never_sealed() {
    let (mut server, mut volume, seq) = armed_and_killed("fast");
    assert_eq!(volume.phase(), "frozen");
    // The control connection is let in, to say how it stood; no data.
    let mut control = volume.rejoin(SOURCE, S, 1);
    assert_eq!(queue_refused(&volume, 1), Status::Busy);
    let mut hello = greeting("d", SOURCE, 0xa2);
    hello.epoch = 0;
    let refused = Client::greet(volume.data, &hello).err().expect("refused");
    assert_eq!(refused.0, Status::InHandoff, "another process of the source cannot know");
    assert_eq!(control.write(0, &[9; 512]), Status::StaleEpoch);

    let now = control.access();
    assert_eq!(now.record.phase, Phase::Frozen);
    let wrong = Ask::Unfreeze { boot_id: now.boot_id ^ 1 };
    assert_eq!(control.ask(wrong).outcome, Outcome::Refused, "another incarnation is meant");
    let mut destination = volume.destination();
    let before = destination.control.access();
    let parked = destination.control.watch(&before);
    let unfrozen = control.ask(Ask::Unfreeze { boot_id: now.boot_id });
    assert_eq!((unfrozen.outcome, unfrozen.record.phase), (Outcome::Granted, Phase::Armed));
    assert_eq!(destination.control.told(parked).record.phase, Phase::Armed);
    let again = control.ask(Ask::Unfreeze { boot_id: now.boot_id });
    assert_eq!(again.outcome, Outcome::Granted, "the same answer again");
    drop(control);
    let mut source = volume.source_again(1, seq);
    assert_eq!(source.queue.epoch, Epoch(1), "it never lost its epoch");
    assert_eq!(source.queue.write(512, &[1; 512]), Status::Ok);

    // UNFREEZE is in memory only: another kill freezes it again.
    let seq = source.queue.seq;
    server.kill(&mut [&mut volume]);
    assert_eq!(volume.phase(), "frozen");
    let mut control = volume.rejoin(SOURCE, S, 1);
    let stale = control.ask(Ask::Unfreeze { boot_id: now.boot_id });
    assert_eq!(stale.outcome, Outcome::Refused, "the last incarnation is meant");
    let boot_id = control.access().boot_id;
    assert_eq!(control.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Granted);
    // And the handoff goes on as if nothing had been.
    let mut source = volume.source_again(1, seq);
    let mut destination = volume.destination();
    assert_eq!(source.seal().outcome, Outcome::Granted);
    goes_over(&volume, &mut destination, 2);
    assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch);
}

#[test]
fn armed_is_armed_in_base_mode() {
    let (_server, volume, seq) = armed_and_killed("base");
    assert_eq!(volume.phase(), "armed");
    let mut source = volume.source_again(1, seq);
    assert_eq!(source.queue.write(512, &[1; 512]), Status::Ok);
    let boot_id = source.control.access().boot_id;
    assert_eq!(source.control.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Granted);
    let mut destination = volume.destination();
    assert_eq!(source.seal().outcome, Outcome::Granted);
    goes_over(&volume, &mut destination, 2);
}

/// The destination had seen SEALED: it activates whatever the server remembers.
#[test]
fn row_20_sealed_then_killed_the_destination_activates_anyway() {
    for mode in MODES {
        let (mut server, mut volume, mut source) = armed(mode);
        assert_eq!(source.seal().outcome, Outcome::Granted);
        hears(&mut volume.destination().control, |record| record.phase == Phase::Sealed);
        server.kill(&mut [&mut volume]);
        let fast = mode == "fast";
        assert_eq!(volume.phase(), if fast { "frozen" } else { "sealed" });
        // Its numbers may have been granted before the kill, so fast mode takes a fresh one.
        goes_over(&volume, &mut volume.destination(), if fast { 4 } else { 2 });
        let mut late = volume.control(SOURCE, S, baton_protocol::AccessMode::Standby, 0);
        assert_eq!(late.ask(Ask::Reclaim).outcome, Outcome::Lost);
        assert_eq!(queue_refused(&volume, 1), Status::StaleEpoch);
        assert_eq!(volume.post("settle", &which(1)).1["owner"]["name"], DESTINATION);
    }
}

/// ACTIVE of fast mode is stored behind its answer. Stored: it stands. Lost
/// with the kill: the destination asks again and is told the same.
#[test]
fn row_22_active_stored_or_lost_it_is_the_destinations() {
    for mode in MODES {
        for lost in [false, true] {
            let (mut server, mut volume, mut source) = armed(mode);
            assert_eq!(source.seal().outcome, Outcome::Granted);
            // Nothing is written to it between here and the decision.
            let meta = server.dir.path().join("data/meta.redb");
            let before = server.dir.path().join("before");
            std::fs::copy(&meta, &before).expect("copied");
            // And the pool's mark of how new meta.redb is (docs/on-disk.md).
            let pool = server.dir.path().join("data/pool.dat");
            let pool = File::options().read(true).write(true).open(pool).expect("a pool");
            let mut marks = vec![0; 8192];
            pool.read_exact_at(&mut marks, 4096).expect("marks");
            let mut destination = volume.destination();
            goes_over(&volume, &mut destination, 2);
            if mode == "fast" {
                let admin = volume.admin;
                let stored = "baton_access_stores_total{when=\"later\"}";
                wait_for("the decision is stored", || metric(admin, stored) == 1);
            }
            let lost = lost && mode == "fast";
            server.kill_and(&mut [&mut volume], |_| {
                if lost {
                    std::fs::copy(&before, &meta).expect("restored");
                    pool.write_all_at(&marks, 4096).expect("restored");
                }
            });
            let epoch = if lost {
                assert_eq!(volume.phase(), "frozen");
                let mut hello = greeting("d", DESTINATION, D);
                hello.epoch = 2;
                let refused = Client::greet(volume.data, &hello).err().expect("refused");
                assert_eq!(refused.0, Status::StaleEpoch, "stand by and ask again");
                4
            } else {
                assert_eq!(volume.phase(), "active");
                2
            };
            // Nothing of the source gets in meanwhile.
            let mut late = volume.control(SOURCE, S, baton_protocol::AccessMode::Standby, 0);
            let reclaimed = late.ask(Ask::Reclaim).outcome;
            assert_eq!(reclaimed, if lost { Outcome::Unknown } else { Outcome::Lost });
            let mut again = volume.destination();
            let proof = again.control.wins(Ask::Activate);
            again.open(proof);
            assert_eq!(again.queue.epoch, Epoch(epoch));
            assert_eq!(again.queue.read(0, 512), [2; 512], "what it wrote before the kill");
            assert_eq!(late.ask(Ask::Reclaim).outcome, Outcome::Lost);
        }
    }
}

#[test]
fn reclaimed_survives_a_kill() {
    for mode in MODES {
        for sealed in [false, true] {
            let (mut server, mut volume, mut source) = armed(mode);
            if sealed {
                assert_eq!(source.seal().outcome, Outcome::Granted);
            }
            let proof = source.control.wins(Ask::Reclaim);
            server.kill(&mut [&mut volume]);
            assert_eq!(volume.phase(), "reclaimed");
            let mut destination = volume.destination();
            assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::Lost);
            let mut source = volume.source_again(1, source.queue.seq);
            assert_eq!(source.queue.epoch, Epoch(if sealed { 3 } else { 1 }));
            assert_eq!(source.queue.write(0, &[2; 512]), Status::Ok);
            assert_eq!(source.control.wins(Ask::Reclaim), proof, "the same answer again");
            assert_eq!(volume.post("settle", &which(1)).1["owner"]["name"], SOURCE);
            server.kill(&mut [&mut volume]);
            assert_eq!(volume.phase(), "owned", "settled is durable, too");
        }
    }
}

/// A source whose seal was lost with the server's memory says it again.
#[test]
fn row_25_a_seal_with_drain_certificates_counts_in_a_frozen_volume() {
    let (_server, volume, seq) = armed_and_killed("fast");
    let mut destination = volume.destination();
    let before = destination.control.access();
    assert!(!before.record.handoff.as_ref().expect("armed").sealed);
    let mut control = volume.rejoin(SOURCE, S, 1);
    let sealed = control.ask(Ask::Seal(vec![count(0, seq, seq + 1)]));
    assert_eq!((sealed.outcome, sealed.record.phase), (Outcome::Granted, Phase::Frozen));
    hears(&mut destination.control, |record| {
        record.handoff.as_ref().is_some_and(|handoff| handoff.sealed)
    });
    let boot_id = sealed.boot_id;
    assert_eq!(control.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Refused);
    goes_over(&volume, &mut destination, 4);
}

/// What was under way at the kill can never be counted: it is said at once.
#[test]
fn row_21_a_seal_of_what_was_lost_is_refused_in_a_frozen_volume() {
    let (_server, volume, seq) = armed_and_killed("fast");
    let mut control = volume.rejoin(SOURCE, S, 1);
    let told = control.ask(Ask::Seal(vec![count(0, seq + 1, seq + 1)]));
    assert_eq!((told.outcome, told.record.phase), (Outcome::NotSealed, Phase::Frozen));
    let handoff = told.record.handoff.expect("armed");
    assert!(handoff.seal_seen && !handoff.sealed);
    // It has stopped; it cannot say any more that it never did.
    let unfrozen = control.ask(Ask::Unfreeze { boot_id: told.boot_id });
    assert_eq!(unfrozen.outcome, Outcome::Refused);
}

#[test]
fn row_21_reclaim_of_a_frozen_volume_waits_for_the_destinations_word() {
    for by_coordinator in [false, true] {
        let (mut server, mut volume, mut source) = armed("fast");
        assert_eq!(source.seal().outcome, Outcome::Granted);
        server.kill(&mut [&mut volume]);
        let mut destination = volume.destination();
        let before = destination.control.access();
        let parked = destination.control.watch(&before);
        let mut control = volume.rejoin(SOURCE, S, 1);
        if by_coordinator {
            let (status, told) = volume.post("reclaim", &which(1));
            assert_eq!((status, told["outcome"].as_str()), (200, Some("unknown")));
            assert!(told["proof"].is_null());
        } else {
            let told = control.ask(Ask::Reclaim);
            assert_eq!((told.outcome, told.proof), (Outcome::Unknown, None));
        }
        // The destination hears that it is asked.
        let asked = destination.control.told(parked);
        assert!(asked.record.handoff.expect("armed").wanted_back);
        assert_eq!(control.ask(Ask::Reclaim).outcome, Outcome::Unknown, "still");
        assert_eq!(destination.control.ask(Ask::Abdicate).outcome, Outcome::Granted);
        assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::Lost, "its own word");
        // It is durable.
        server.kill(&mut [&mut volume]);
        assert_eq!(volume.phase(), "sealed");
        let mut control = volume.rejoin(SOURCE, S, 1);
        let proof = control.wins(Ask::Reclaim);
        assert_eq!(proof.side, Side::Source);
        let mut source = volume.source_again(1, source.queue.seq);
        assert_eq!(source.queue.epoch, Epoch(3));
        assert_eq!(source.queue.read(0, 4096), [1; 4096]);
        assert_eq!(source.queue.write(0, &[2; 512]), Status::Ok);
        let mut destination = volume.destination();
        assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::Lost);
    }
}

/// The source said that it had not sealed, and then it did. A copy of what it said
/// comes out of the network after the server was killed once more: it must not open
/// to the source what the destination has seen sealed.
#[test]
fn row_27_an_unfreeze_that_arrives_an_incarnation_late_opens_nothing() {
    let (mut server, mut volume, seq) = armed_and_killed("fast");
    let mut source = volume.rejoin(SOURCE, S, 1);
    let boot_id = source.access().boot_id;
    assert_eq!(source.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Granted);
    drop(source);
    let mut source = volume.source_again(1, seq);
    assert_eq!(source.seal().outcome, Outcome::Granted);
    hears(&mut volume.destination().control, |record| record.phase == Phase::Sealed);
    server.kill(&mut [&mut volume]);
    let mut late = volume.rejoin(SOURCE, S, 1);
    assert_eq!(late.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Refused);
    assert_eq!(volume.phase(), "frozen");
    assert_eq!(queue_refused(&volume, 1), Status::Busy);
    goes_over(&volume, &mut volume.destination(), 4);
    // Nor does it later, when all is decided.
    let mut late = volume.control(SOURCE, S, baton_protocol::AccessMode::Standby, 0);
    assert_eq!(late.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::NotNominated);
    assert_eq!(volume.phase(), "active");
}

/// It is on disk before it is told: a server that comes again knows of no handoff, and does not freeze.
#[test]
fn a_disarmed_volume_is_nobodys_handoff_after_a_kill() {
    for mode in MODES {
        let mut server = Mortal::start();
        let (mut anchor, mut volume) = (server.create("a"), server.create("d"));
        let (_at_anchor, mut source) = (anchor.source(), volume.source());
        arm(&[&anchor, &volume], mode);
        assert_eq!(source.queue.write(0, &[1; 4096]), Status::Ok);
        assert_eq!(volume.post("disarm", &which(1)).0, 200);
        server.kill(&mut [&mut anchor, &mut volume]);
        assert_eq!(volume.phase(), "owned", "{mode}");
        let mut hello = greeting(&volume.name, SOURCE, S);
        (hello.epoch, hello.resume_from) = (1, source.queue.seq + 1);
        let mut again = Client::greet(volume.data, &hello).expect("its session").0;
        assert_eq!(again.write(0, &[2; 4096]), Status::Ok);
    }
}
