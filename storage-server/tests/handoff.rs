//! Handoffs over real sockets: source and destination by raw wire, the
//! coordinator by HTTP.

mod common;

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::access::Phase;
use baton_protocol::handoff::{Ask, HandoffId, Outcome, Proof, Side, Try};
use baton_protocol::{AccessMode, Epoch, Opcode, SessionId, Status};
use baton_storage_server::gate::{Gate, Principal};
use common::handoff::{
    Backend, D, DESTINATION, Member, S, SOURCE, TRY, arm, arm_try, count, plan, which, which_try,
};
use common::{Client, Fixture, greeting, http, json, metric, wait_for};

const MODES: [&str; 2] = ["fast", "base"];

fn member(fixture: &Fixture, name: &str) -> Member {
    Member::create(fixture.data, fixture.admin, name)
}

/// A volume with its source and its destination, armed.
fn armed(fixture: &Fixture, mode: &str) -> (Member, Backend, Backend) {
    let volume = member(fixture, "d");
    let source = volume.source();
    let destination = volume.destination();
    arm(&[&volume], mode);
    (volume, source, destination)
}

/// The whole way: write, arm, seal, watch, activate, open, read, settle.
#[test]
fn a_volume_moves_and_the_source_is_out() {
    for mode in MODES {
        let fixture = Fixture::start();
        let (volume, mut source, mut destination) = armed(&fixture, mode);
        assert_eq!(source.queue.write(0, &[1; 4096]), Status::Ok, "armed, the source goes on");
        let before = destination.control.access();
        assert_eq!(before.record.phase, Phase::Armed);
        assert_eq!(before.record.handoff.as_ref().expect("armed").plan.key, Default::default());
        let parked = destination.control.watch(&before);
        assert_eq!(destination.queue.call(Opcode::Read, 0, 512).0, Status::NotPermitted);
        let early = destination.control.send_ask(Ask::Activate);
        assert_eq!(destination.control.told(early).outcome, Outcome::NotSealed);

        let sealed = source.seal();
        assert_eq!((sealed.outcome, sealed.record.phase), (Outcome::Granted, Phase::Sealed));
        assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch, "sealed");
        let mut news = destination.control.told(parked);
        while news.record.phase != Phase::Sealed {
            let parked = destination.control.watch(&news);
            news = destination.control.told(parked);
        }
        let proof = destination.control.wins(Ask::Activate);
        assert_eq!(proof.side, Side::Destination);
        assert_eq!(destination.control.wins(Ask::Activate), proof, "the same answer again");
        destination.open(proof);
        assert_eq!(destination.queue.epoch, Epoch(2));
        assert_eq!(destination.queue.read(0, 4096), [1; 4096]);
        assert_eq!(destination.queue.write(0, &[2; 512]), Status::Ok);

        // Late packets of the source, on whatever connection, bounce.
        for opcode in [Opcode::Read, Opcode::Flush, Opcode::Discard, Opcode::WriteZeroes] {
            let len = if opcode == Opcode::Flush { 0 } else { 512 };
            assert_eq!(source.queue.call(opcode, 0, len).0, Status::StaleEpoch, "{opcode:?}");
        }
        assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch);
        assert_eq!(source.control.ask(Ask::Reclaim).outcome, Outcome::Lost);
        let (status, problem) = volume.post("reclaim", &which(1));
        assert_eq!((status, problem["type"].as_str()), (409, Some("baton:lost-race")));
        let mut hello = greeting("d", SOURCE, S);
        hello.epoch = 1;
        assert_eq!(Client::greet(fixture.data, &hello).err().expect("out").0, Status::StaleEpoch);

        let (status, decision) = volume.get(&format!("proof?id={}&attempt=1", TRY.id));
        assert_eq!((status, decision["winner"].as_str()), (200, Some("destination")));
        assert_eq!(decision["session"], format!("{D:016x}"));
        let (status, record) = volume.post("settle", &which(1));
        assert_eq!((status, record["phase"].as_str()), (200, Some("owned")));
        assert_eq!(record["owner"]["name"], DESTINATION);
        assert_eq!(record["decided"]["winner"], "destination");
        assert_eq!(destination.queue.read(0, 512), [2; 512], "nothing is interrupted");
        assert_eq!(volume.post("settle", &which(1)).0, 200, "again");
    }
}

/// The source comes back: before its seal with its epoch, after it with another.
#[test]
fn a_source_that_reclaims_goes_on() {
    for mode in MODES {
        for sealed in [false, true] {
            let fixture = Fixture::start();
            let (volume, mut source, mut destination) = armed(&fixture, mode);
            assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
            if sealed {
                assert_eq!(source.seal().outcome, Outcome::Granted);
            }
            let proof = source.control.wins(Ask::Reclaim);
            assert_eq!(proof.side, Side::Source);
            assert_eq!(source.control.wins(Ask::Reclaim), proof, "the same answer again");
            if sealed {
                assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch, "its old epoch");
            } else {
                assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok, "nothing interrupted it");
            }
            source.open(proof);
            assert_eq!(source.queue.epoch, Epoch(if sealed { 3 } else { 1 }));
            assert_eq!(source.queue.write(0, &[2; 512]), Status::Ok);
            assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::Lost);
            assert_eq!(destination.queue.open(TRY, proof), Status::StaleEpoch, "not its proof");
            assert_eq!(volume.post("settle", &which(1)).1["phase"], "owned");
            assert_eq!(source.queue.read(0, 512), [2; 512]);
            // And the same handoff may be tried again, under the next number.
            let (status, _) = volume.post("arm", &volume.arming(1, &plan(&[&volume], mode, TRY)));
            assert_eq!(status, 404, "the old try is over");
            arm_try(&[&volume], mode, Try { attempt: 2, ..TRY });
            assert_eq!(source.control.ask(Ask::Reclaim).outcome, Outcome::NoSuchHandoff);
        }
    }
}

/// SEAL waits for what is still on its way on another connection, and nothing
/// of it is lost.
#[test]
fn a_seal_waits_for_what_was_sent_and_has_not_arrived() {
    for mode in MODES {
        let fixture = Fixture::start();
        let (_, mut source, _) = armed(&fixture, mode);
        assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
        // Three writes that are still in the network when the seal arrives.
        let mut late = Vec::new();
        for n in 2..=4u8 {
            let mut header = source.queue.header(Opcode::Write, u64::from(n) * 512, 512);
            header.payload_len = 512;
            late.extend_from_slice(&header.encode());
            late.extend_from_slice(&[n; 512]);
        }
        let last = source.queue.seq;
        let seal = source.control.send_ask(Ask::Seal(vec![count(0, last, 2)]));
        assert!(source.control.is_quiet(Duration::from_millis(100)), "not sealed yet");
        // All but the last byte: the last request has not arrived.
        source.queue.raw(&late[..late.len() - 1]);
        for seq in 2..=3 {
            assert_eq!(source.queue.answer(seq).0, Status::Ok);
        }
        assert!(source.control.is_quiet(Duration::from_millis(100)), "not sealed yet");
        source.queue.raw(&late[late.len() - 1..]);
        assert_eq!(source.control.told(seal).outcome, Outcome::Granted);
        assert_eq!(source.queue.answer(4).0, Status::Ok, "what was sent before is done");
        assert_eq!(source.queue.write(0, &[9; 512]), Status::StaleEpoch);
        for n in 2..=4u8 {
            let volume = fixture.volume("d");
            let mut data = [0; 512];
            volume.data.read(u64::from(n) * 512, &mut data).expect("read");
            assert_eq!(data, [n; 512]);
        }
    }
}

/// What has arrived and is at the disk is waited for, too.
#[test]
fn a_seal_waits_for_what_is_at_the_disk() {
    let fixture = Fixture::start();
    let (_, mut source, _) = armed(&fixture, "fast");
    let volume = fixture.volume("d");
    let admitted = Gate::admit(Arc::clone(&volume.gate), 0, Principal::Owner, Epoch(1));
    let admitted = admitted.expect("armed");
    let counts = source.drained();
    let seal = source.control.send_ask(Ask::Seal(counts));
    assert!(source.control.is_quiet(Duration::from_millis(200)), "one is inside");
    volume.data.write(0, &[3; 512]).expect("takes effect");
    drop(admitted);
    assert_eq!(source.control.told(seal).outcome, Outcome::Granted);
}

#[test]
fn a_seal_that_waits_is_overtaken() {
    for mode in MODES {
        // By the source's own reclaim, on the same connection.
        let fixture = Fixture::start();
        let (volume, mut source, _) = armed(&fixture, mode);
        let seal = source.control.send_ask(Ask::Seal(vec![count(0, 9, 1)]));
        let reclaim = source.control.send_ask(Ask::Reclaim);
        let mut answers = [source.control.reply(), source.control.reply()];
        answers.sort_by_key(|(header, _)| header.seq);
        assert_eq!([answers[0].0.seq.0, answers[1].0.seq.0], [seal, reclaim]);
        let outcome = |n: usize| {
            let (_, body): &(_, Vec<u8>) = &answers[n];
            baton_protocol::handoff::Answer::decode(body).expect("an answer").outcome
        };
        assert_eq!((outcome(0), outcome(1)), (Outcome::Refused, Outcome::Granted));
        assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
        assert_eq!(volume.phase(), "reclaimed");
        drop((source, volume));

        // By the coordinator's, and by a fence.
        for what in ["reclaim", "fence"] {
            let fixture = Fixture::start();
            let (volume, mut source, _) = armed(&fixture, mode);
            let seal = source.control.send_ask(Ask::Seal(vec![count(0, 9, 1)]));
            wait_for("the seal is noted", || volume.record()["handoff"]["seal_seen"] == true);
            let body = match what {
                "fence" => serde_json::json!({"term": 1, "reason": "test"}),
                _ => which(1),
            };
            assert_eq!(volume.post(what, &body).0, 200);
            let expected = if what == "fence" { Outcome::NoSuchHandoff } else { Outcome::Refused };
            assert_eq!(source.control.told(seal).outcome, expected, "{what}");
        }
    }
}

/// Two volumes on two servers and one on each: the anchor decides, the others
/// follow its proof and nothing else.
#[test]
fn members_follow_the_anchors_proof() {
    for mode in MODES {
        for servers in [1, 2] {
            let fixtures: Vec<_> = (0..servers).map(|_| Fixture::start()).collect();
            let anchor = member(&fixtures[0], "boot");
            let other = member(&fixtures[servers - 1], "data");
            let mut sources = [anchor.source(), other.source()];
            let mut destinations = [anchor.destination(), other.destination()];
            arm(&[&anchor, &other], mode);
            assert_eq!(sources[1].queue.write(0, &[7; 512]), Status::Ok);
            for source in &mut sources {
                assert_eq!(source.seal().outcome, Outcome::Granted);
            }
            let [at_anchor, at_other] = &mut destinations;
            assert_eq!(at_other.control.ask(Ask::Activate).outcome, Outcome::Refused);
            let (status, problem) = other.get(&format!("proof?id={}&attempt=1", TRY.id));
            assert_eq!((status, problem["type"].as_str()), (409, Some("baton:not-anchor")));
            let (status, problem) = anchor.get(&format!("proof?id={}&attempt=1", TRY.id));
            assert_eq!((status, problem["type"].as_str()), (409, Some("baton:undecided")));
            let (status, problem) = other.post("settle", &which(1));
            assert_eq!((status, problem["type"].as_str()), (409, Some("baton:undecided")));
            let forged = Proof { side: Side::Destination, grant: 2, mac: [1; 32] };
            assert_eq!(at_other.queue.open(TRY, forged), Status::StaleEpoch);

            let proof = at_anchor.control.wins(Ask::Activate);
            assert_eq!(sources[1].queue.open(TRY, proof), Status::StaleEpoch, "another's proof");
            at_anchor.open(proof);
            at_other.open(proof);
            assert_eq!(at_other.queue.read(0, 512), [7; 512]);
            for member in [&anchor, &other] {
                let (status, record) = member.post("settle", &which(1));
                assert_eq!((status, record["owner"]["name"].as_str()), (200, Some(DESTINATION)));
            }
        }
    }
}

/// A member that the winner never reached is settled with the proof.
#[test]
fn a_member_that_nobody_opened_is_settled_with_the_proof() {
    let fixture = Fixture::start();
    let (anchor, other) = (member(&fixture, "boot"), member(&fixture, "data"));
    let (mut source, mut at_other) = (anchor.source(), other.source());
    let _destination = anchor.destination();
    arm(&[&anchor, &other], "fast");
    assert_eq!(at_other.seal().outcome, Outcome::Granted);
    assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
    let (status, answer) = anchor.post("reclaim", &which(1));
    assert_eq!((status, answer["outcome"].as_str()), (200, Some("source")), "{answer}");
    let mut body = which(1);
    body["proof"] = answer["proof"].clone();
    let (status, problem) = other.post("settle", &body);
    assert_eq!((status, problem["type"].as_str()), (400, Some("baton:bad-request")));
    body["session"] = format!("{D:016x}").into();
    let (status, problem) = other.post("settle", &body);
    assert_eq!((status, problem["type"].as_str()), (409, Some("baton:bad-proof")));
    body["session"] = answer["session"].clone();
    let (status, record) = other.post("settle", &body);
    assert_eq!((status, record["phase"].as_str()), (200, Some("owned")), "{record}");
    assert_eq!(record["owner"]["name"], SOURCE);
    // Its connections are of the session that owns the volume and need only its epoch.
    at_other.queue.epoch = Epoch(record["epoch"].as_u64().expect("an epoch"));
    assert_eq!(at_other.queue.write(0, &[2; 512]), Status::Ok);
}

/// Its source goes on without a break, and whatever comes of the handoff afterwards finds none; a volume that is
/// sealed, and the one that decides, are not disarmed.
#[test]
fn a_disarmed_volume_goes_on_and_takes_nothing_of_its_handoff() {
    for mode in MODES {
        let fixture = Fixture::start();
        let (anchor, other) = (member(&fixture, "boot"), member(&fixture, "data"));
        let (_at_anchor, mut source) = (anchor.source(), other.source());
        let mut destination = other.destination();
        let late = other.arming(1, &plan(&[&anchor, &other], mode, TRY));
        arm(&[&anchor, &other], mode);
        let refused = |member: &Member, term: u64| {
            let (status, problem) = member.post("disarm", &which(term));
            (status, problem["type"].as_str().expect("a problem").to_owned())
        };
        assert_eq!(refused(&anchor, 1), (409, "baton:cannot-disarm".to_owned()));
        assert_eq!(refused(&other, 0), (409, "baton:stale-term".to_owned()));
        // One that waits for what the source sent is overtaken.
        let seal = source.control.send_ask(Ask::Seal(vec![count(0, 9, 1)]));
        wait_for("the seal is noted", || other.record()["handoff"]["seal_seen"] == true);
        let epoch = source.queue.epoch;
        let (status, record) = other.post("disarm", &which(1));
        assert_eq!((status, record["phase"].as_str()), (200, Some("owned")), "{record}");
        assert_eq!((&record["handoff"], &record["decided"]), (&().into(), &().into()), "{record}");
        assert_eq!(source.control.told(seal).outcome, Outcome::NoSuchHandoff);
        assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
        assert_eq!((source.queue.epoch, record["epoch"].as_u64()), (epoch, Some(epoch.0)));

        assert_eq!(refused(&other, 1), (404, "baton:no-such-handoff".to_owned()));
        let (status, problem) = other.post("arm", &late);
        assert_eq!((status, problem["type"].as_str()), (409, Some("baton:stale-plan")));
        assert_eq!(source.seal().outcome, Outcome::NoSuchHandoff);
        assert_eq!(destination.control.ask(Ask::Activate).outcome, Outcome::NoSuchHandoff);
        assert_eq!(source.queue.write(0, &[2; 512]), Status::Ok);
        let entries = other.get("audit").1["entries"].take();
        let last = entries.as_array().and_then(|entries| entries.last()).expect("an entry").clone();
        assert_eq!(
            (&last["what"], &last["who"]),
            (&"disarm".into(), &"coordinator (term 1)".into())
        );

        let next = Try { id: HandoffId(0x1235), attempt: 1 };
        let plan = plan(&[&anchor, &other], mode, next);
        assert_eq!(other.post("arm", &other.arming(1, &plan)).0, 200);
        let counts = source.drained();
        assert_eq!(source.control.ask_of(next, Ask::Seal(counts)).outcome, Outcome::Granted);
        let (status, problem) = other.post("disarm", &which_try(1, next));
        assert_eq!((status, problem["type"].as_str()), (409, Some("baton:cannot-disarm")));
        assert_eq!(other.phase(), "sealed");
    }
}

/// What is behind OPEN on its connection waits for it and runs under its epoch.
#[test]
fn open_is_a_barrier_and_gives_the_connection_a_place() {
    let fixture = Fixture::start();
    let (anchor, volume) = (member(&fixture, "boot"), member(&fixture, "d"));
    let (mut at_anchor, mut source) = (anchor.source(), volume.source());
    let (mut decides, mut destination) = (anchor.destination(), volume.destination());
    arm(&[&anchor, &volume], "fast");
    assert_eq!(at_anchor.seal().outcome, Outcome::Granted);
    assert_eq!(source.seal().outcome, Outcome::Granted);
    let proof = decides.control.wins(Ask::Activate);
    // A read of a reader that is at the disk: OPEN cannot be over before it.
    let gate = Arc::clone(&fixture.volume("d").gate);
    let inside = Gate::admit(gate, 0, Principal::Reader, Epoch(1)).expect("readers go on");
    // A standby's window is its connection's; from OPEN on the seat's.
    assert_eq!(destination.queue.call(Opcode::Ping, 0, 0).0, Status::Ok);
    let open = destination.queue.send_open(TRY, proof);
    destination.queue.epoch = Epoch(2);
    let write = destination.queue.send_write(0, &[5; 512]);
    let read = destination.queue.send(Opcode::Read, 0, 512);
    assert!(destination.queue.is_quiet(Duration::from_millis(100)), "all of it waits");
    drop(inside);
    assert_eq!(destination.queue.answer(open).0, Status::Ok);
    assert_eq!(destination.queue.answer(write).0, Status::Ok);
    assert_eq!(destination.queue.answer(read).1, [5; 512]);
    // It is an owner's now: a reconnect gets the window, and a repeated write does not run.
    let mut hello = greeting("d", DESTINATION, D);
    (hello.epoch, hello.resume_from) = (2, write);
    let (mut again, welcome) = Client::greet(fixture.data, &hello).expect("rejoins");
    assert_eq!(welcome.epoch, Epoch(2));
    again.seq = write - 1;
    assert_eq!(again.write(0, &[6; 512]), Status::Ok, "answered, as done before");
    assert_eq!(again.read(0, 512), [5; 512], "and not run again");
    assert!(destination.queue.is_closed(), "one connection of a queue");
}

#[test]
fn who_may_not_claim_during_a_handoff_is_told_to_stand_by() {
    for mode in MODES {
        let fixture = Fixture::start();
        let (_, mut source, _) = armed(&fixture, mode);
        let refused = |who: &str, session| {
            Client::greet(fixture.data, &greeting("d", who, session)).err().expect("refused").0
        };
        assert_eq!(refused(DESTINATION, 0xb2), Status::InHandoff);
        assert_eq!(refused("host-c/vm", 0xc), Status::NotOwner);
        // The source's queue may come again, whatever epoch it names.
        assert_eq!(source.seal().outcome, Outcome::Granted);
        assert_eq!(refused(SOURCE, 0xa2), Status::InHandoff);
        assert_eq!(refused(DESTINATION, 0xb2), Status::InHandoff);
        let proof = source.control.wins(Ask::Reclaim);
        source.control.open(TRY, proof);
        let mut hello = greeting("d", SOURCE, S);
        (hello.epoch, hello.resume_from) = (1, source.queue.seq + 1);
        let (mut again, welcome) = Client::greet(fixture.data, &hello).expect("rejoins");
        assert_eq!(welcome.epoch, Epoch(3), "told the epoch it has now");
        assert_eq!(again.write(0, &[1; 512]), Status::Ok);
        // A restarted winner claims, and is another incarnation.
        let restarted = fixture.owner("d", SOURCE, 0xa3);
        assert_eq!(restarted.epoch, Epoch(4));
        assert_eq!(again.write(0, &[9; 512]), Status::StaleEpoch);
    }
}

/// A dead backend's RECLAIM, ACTIVATE or OPEN, read after its successor has come,
/// wins nothing: nobody would run the VM.
#[test]
fn a_process_that_has_a_successor_is_not_heard() {
    for mode in MODES {
        let fixture = Fixture::start();
        let (volume, mut dead, mut dead_destination) = armed(&fixture, mode);
        assert_eq!(dead.seal().outcome, Outcome::Granted);
        // It may not claim now, so it stands by; its predecessor's connections are still there.
        let mut source = volume.standby(SOURCE, 0xa2);
        assert_eq!(dead.control.ask(Ask::Reclaim).outcome, Outcome::NotNominated);
        let mut destination = volume.standby(DESTINATION, 0xb2);
        let late = dead_destination.control.ask(Ask::Activate);
        assert_eq!((late.outcome, late.proof), (Outcome::NotNominated, None));
        assert_eq!(volume.phase(), "sealed", "nobody has won");
        let proof = destination.control.wins(Ask::Activate);
        // Neither does a proof help the dead.
        assert_eq!(dead_destination.queue.open(TRY, proof), Status::StaleEpoch);
        destination.open(proof);
        assert_eq!(destination.queue.write(0, &[1; 512]), Status::Ok);
        assert_eq!(source.control.ask(Ask::Reclaim).outcome, Outcome::Lost);
    }
}

/// A process that only comes again has no successor by that, and is none.
#[test]
fn a_reconnect_of_the_old_process_does_not_silence_the_new_one() {
    let fixture = Fixture::start();
    let (volume, mut dead, _destination) = armed(&fixture, "fast");
    assert_eq!(dead.seal().outcome, Outcome::Granted);
    let mut source = volume.standby(SOURCE, 0xa2);
    let _again = volume.control(SOURCE, S, AccessMode::Standby, 0);
    let proof = source.control.wins(Ask::Reclaim);
    source.open(proof);
}

/// Nothing is synced in a blackout of fast mode; the decision is stored behind
/// the answer.
#[test]
fn fast_mode_syncs_nothing_before_the_answer() {
    let fixture = Fixture::start();
    let (volume, mut source, mut destination) = armed(&fixture, "fast");
    let first = || metric(fixture.admin, "baton_access_stores_total{when=\"first\"}");
    let before = first();
    assert_eq!(source.seal().outcome, Outcome::Granted);
    let later = || metric(fixture.admin, "baton_access_stores_total{when=\"later\"}");
    assert_eq!((first(), later()), (before, 0), "SEAL is in memory only");
    let proof = destination.control.wins(Ask::Activate);
    destination.open(proof);
    assert_eq!(first(), before);
    wait_for("the decision is stored soon", || later() == 1);
    let running = fixture.volume("d");
    assert_eq!(volume.phase(), "active");
    assert_eq!(running.record().owner.as_ref().expect("won").session, SessionId(D));
}

#[test]
fn refusals_have_types_that_programs_can_tell_apart() {
    let fixture = Fixture::start();
    let volume = member(&fixture, "d");
    let one = plan(&[&volume], "fast", TRY);
    let refused = |what: &str, body: serde_json::Value| {
        let (status, problem) = volume.post(what, &body);
        let kind = problem["type"].as_str().expect("a problem").to_owned();
        (status, kind, problem)
    };
    let arming = |plan: &serde_json::Value| volume.arming(5, plan);
    let kind = |(status, kind, _): (u16, String, _)| (status, kind);
    let problem = |status: u16, kind: &str| (status, format!("baton:{kind}"));
    assert_eq!(kind(refused("arm", arming(&one))), problem(409, "not-owner"));
    let _source = volume.source();
    let mut bad = one.clone();
    bad["to"] = SOURCE.into();
    assert_eq!(kind(refused("arm", arming(&bad))), problem(400, "bad-request"));
    for (field, value) in [("key", "5a"), ("id", "x"), ("mode", "slow"), ("anchor", "12")] {
        let mut bad = one.clone();
        bad[field] = value.into();
        assert_eq!(kind(refused("arm", arming(&bad))), problem(400, "bad-request"), "{field}");
    }
    assert_eq!(kind(refused("reclaim", which(5))), problem(404, "no-such-handoff"));
    assert_eq!(volume.post("arm", &arming(&one)).0, 200);
    assert_eq!(volume.post("arm", &arming(&one)).0, 200, "again");
    assert_eq!(kind(refused("reclaim", which(4))), problem(409, "stale-term"));
    let second = plan(&[&volume], "fast", Try { id: HandoffId(9), attempt: 1 });
    let (status, text, body) = refused("arm", arming(&second));
    assert_eq!((status, text), problem(409, "handoff-in-progress"));
    assert_eq!(body["handoff"], TRY.id.to_string());
    let other = which_try(5, Try { attempt: 2, ..TRY });
    assert_eq!(kind(refused("settle", other)), problem(404, "no-such-handoff"));
    assert_eq!(kind(refused("settle", which(5))), problem(409, "undecided"));
    assert_eq!(volume.post("reclaim", &which(5)).0, 200);
    let (status, record) = volume.post("abdicate", &which(5));
    assert_eq!((status, record["phase"].as_str()), (200, Some("reclaimed")));
    let (status, _) = http(fixture.admin, "DELETE", "/v1/volumes/d?force=true", "");
    assert_eq!(status, 409, "a volume that moves is not deleted");
    let (_, text) = http(fixture.admin, "GET", "/v1/volumes/none/audit", "");
    assert_eq!(json(&text)["type"], "baton:no-such-volume");
    let (_, audit) = volume.get("audit");
    let entries = audit["entries"].as_array().expect("entries");
    let what: Vec<_> = entries.iter().map(|e| e["what"].as_str().expect("what")).collect();
    assert_eq!(what, ["start", "claim", "arm", "reclaim"]);
    assert_eq!(entries[3]["who"], "coordinator (term 5)");
}

/// The record's long poll is answered by a change, also by one in memory only.
#[test]
fn the_long_poll_hears_of_every_change() {
    let fixture = Fixture::start();
    let (volume, mut source, _) = armed(&fixture, "fast");
    let (_, now) = volume.get("access");
    let query = format!(
        "access?boot_id={}&version={}&wait_ms=",
        now["boot_id"].as_str().expect("text"),
        now["record"]["version"]
    );
    assert_eq!(volume.get(&format!("{query}1")).1, now, "the time is over");
    assert_eq!(volume.get(&format!("{query}60001")).0, 400);
    let polled = std::thread::spawn({
        let (volume, query) = (volume.clone(), format!("{query}20000"));
        move || volume.get(&query).1
    });
    source.control.send_ask(Ask::Seal(vec![count(0, 5, 1)]));
    assert_eq!(polled.join().expect("answered")["record"]["handoff"]["seal_seen"], true);
    // Another incarnation of the server is news, too.
    let (status, again) = volume.get("access?boot_id=0000000000000001&version=0&wait_ms=20000");
    assert_eq!((status, again["boot_id"].clone()), (200, now["boot_id"].clone()));
}

/// A client without the feature sees nothing of it.
#[test]
fn sessions_without_the_feature_are_as_before() {
    let fixture = Fixture::start();
    let _ = member(&fixture, "d");
    let mut hello = greeting("d", SOURCE, S);
    hello.features = 0;
    let (mut old, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert_eq!(welcome.features.0, 0);
    assert_eq!(old.call(Opcode::Access, 0, 0).0, Status::NotPermitted);
    assert_eq!(old.write(0, &[1; 512]), Status::Ok);
    let new = fixture.owner("d", SOURCE, S + 1);
    assert_eq!(new.epoch, Epoch(2));
    let (_, welcome) = Client::greet(fixture.data, &greeting("d", SOURCE, S + 2)).expect("in");
    assert_eq!(welcome.features, baton_protocol::Features::HANDOFF);
}
