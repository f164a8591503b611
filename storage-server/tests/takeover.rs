//! One owner at a time: takeovers drain, fences hold, old requests change nothing.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use baton_protocol::{AccessMode, Epoch, Event, EventKind, Opcode, QueueId, Status};
use baton_storage_server::gate::{Gate, Principal};
use common::{Client, Fixture, greeting, http, json, metric, wait_for};

const SIZE: u64 = 64 << 20;

fn fence(fixture: &Fixture, body: &str) -> serde_json::Value {
    let (status, text) = http(fixture.admin, "POST", "/v1/volumes/d/fence", body);
    assert_eq!(status, 200, "{text}");
    json(&text)
}

/// What the old owner had admitted is finished before the new one is welcomed.
#[test]
fn a_takeover_waits_for_what_was_admitted() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut old = fixture.owner("d", "h", 1);
    assert_eq!(old.epoch, Epoch(1));
    let volume = fixture.volume("d");
    // A request of the old owner that is at the disk.
    let admitted = Gate::admit(Arc::clone(&volume.gate), 0, Principal::Owner, Epoch(1));
    let admitted = admitted.expect("the old owner is admitted");
    let hello = greeting("d", "h", 2);
    let mut new = Client::connect(fixture.data);
    new.raw(&hello.bytes());
    wait_for("the record is durable and the gate closed", || {
        Gate::admit(&*volume.gate, 0, Principal::Owner, Epoch(1)).is_none()
    });
    let (_, text) = http(fixture.admin, "GET", "/v1/volumes/d", "");
    assert_eq!(json(&text)["access"]["epoch"], 1, "shown while it waits, as it was");
    assert!(new.is_quiet(Duration::from_millis(200)), "not welcomed while one is inside");
    assert_eq!(old.write(0, &[1; 512]), Status::StaleEpoch, "closed meanwhile");
    volume.data.write(0, &[2; 512]).expect("the admitted request takes effect");
    drop(admitted);
    assert_eq!(new.welcome(&hello).expect("welcomed").epoch, Epoch(2));
    assert_eq!(new.read(0, 512), [2; 512], "and is seen");
    for opcode in [Opcode::Read, Opcode::Flush, Opcode::Discard, Opcode::WriteZeroes] {
        let len = if opcode == Opcode::Flush { 0 } else { 512 };
        let (status, body) = old.call(opcode, 0, len);
        assert_eq!((status, body.len()), (Status::StaleEpoch, 0), "{opcode:?}");
    }
    assert_eq!(old.call(Opcode::Ping, 0, 0).0, Status::Ok, "the connection stays open");
    assert_eq!(new.read(0, 512), [2; 512], "nothing of the old owner came through");
    assert_eq!(metric(fixture.admin, "baton_stale_requests_total"), 5);
}

/// The same without a helping hand: the old owner writes as fast as it can.
#[test]
fn nothing_changes_after_the_welcome_of_a_new_owner() {
    for round in 0..10u64 {
        let fixture = Fixture::start();
        fixture.create("d", SIZE);
        let mut old = fixture.owner("d", "h", 1);
        let stop = Arc::new(AtomicBool::new(false));
        let (begun, wait) = mpsc::channel();
        let writer = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut stale = 0u64;
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) || stale == 0 {
                    for _ in 0..16 {
                        n += 1;
                        old.send_write(n % 64 * 4096, &[n.to_le_bytes()[0]; 4096]);
                    }
                    for _ in 0..16 {
                        match old.reply().0.status {
                            Status::Ok => assert_eq!(stale, 0, "one admitted after one refused"),
                            Status::StaleEpoch => stale += 1,
                            other => panic!("{other:?}"),
                        }
                    }
                    let _ = begun.send(());
                }
            }
        });
        wait.recv().expect("the old owner writes");
        std::thread::sleep(Duration::from_millis(round));
        let mut new = fixture.owner("d", "h", 2);
        let first = new.read(0, 64 * 4096);
        std::thread::sleep(Duration::from_millis(20));
        let second = new.read(0, 64 * 4096);
        assert!(first == second, "round {round}: a late write got through");
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the old owner saw the fence");
        assert!(new.read(0, 64 * 4096) == first, "round {round}: a late write got through");
    }
}

#[test]
fn only_the_owner_and_its_restarts_get_in() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let owner = fixture.owner("d", "host-a/vm", 1);
    let refused =
        |hello: &common::Greeting| Client::greet(fixture.data, hello).err().expect("refused");
    let (status, text) = refused(&greeting("d", "host-b/vm", 2));
    assert_eq!(status, Status::NotOwner);
    assert!(text.contains("host-a/vm") && text.contains("fence"), "{text}");
    // A rejoin with a wrong epoch or session is fenced.
    for (session, epoch) in [(1, 2), (1, 99), (3, 1)] {
        let mut hello = greeting("d", "host-a/vm", session);
        (hello.epoch, hello.queue) = (epoch, 1);
        assert_eq!(refused(&hello).0, Status::StaleEpoch, "session {session} epoch {epoch}");
    }
    // The same process that lost our answer keeps its epoch; a restarted one gets the next.
    assert_eq!(fixture.owner("d", "host-a/vm", 1).epoch, Epoch(1));
    assert_eq!(fixture.owner("d", "host-a/vm", 9).epoch, Epoch(2));
    drop(owner);
}

#[test]
fn a_fence_takes_the_volume_away() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut hello = greeting("d", "a", 1);
    hello.queue = QueueId::CONTROL.0;
    let (mut control, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    let event = control.send(Opcode::Event, welcome.event_id, 0);
    (hello.queue, hello.epoch) = (0, 1);
    let (mut queue, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert_eq!(queue.write(0, &[1; 512]), Status::Ok);

    let view = fence(&fixture, r#"{"reason":"host a does not answer","nominee":"b","term":4}"#);
    assert_eq!(view["access"]["epoch"], 2);
    assert_eq!(view["access"]["phase"], "owned");
    assert_eq!(view["access"]["owner"], "b");
    assert_eq!(view["access"]["session"], serde_json::Value::Null);
    assert_eq!(view["access"]["barred"], "a");

    let (status, body) = control.answer(event);
    let event = Event::decode(&body).expect("an event");
    assert_eq!((status, event.kind, event.value), (Status::Ok, EventKind::EpochChanged, 2));
    assert_eq!(queue.write(0, &[9; 512]), Status::StaleEpoch);
    // Not by guessing the epoch either: nobody owns it before the nominee comes.
    queue.epoch = Epoch(2);
    assert_eq!(queue.write(0, &[9; 512]), Status::StaleEpoch);

    let (status, text) = Client::greet(fixture.data, &greeting("d", "a", 5)).err().expect("barred");
    assert_eq!(status, Status::NotOwner, "{text}");
    let (status, text) = Client::greet(fixture.data, &greeting("d", "c", 6)).err().expect("not it");
    assert_eq!(status, Status::NotOwner, "{text}");
    let mut nominee = fixture.owner("d", "b", 7);
    assert_eq!(nominee.epoch, Epoch(3));
    assert_eq!(nominee.read(0, 512), [1; 512]);
    let (status, problem) =
        http(fixture.admin, "POST", "/v1/volumes/d/fence", r#"{"reason":"late","term":3}"#);
    assert_eq!((status, json(&problem)["type"].as_str()), (409, Some("baton:stale-term")));
}

#[test]
fn a_release_gives_the_volume_back_and_closes_it_behind() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut hello = greeting("d", "a", 1);
    hello.queue = QueueId::CONTROL.0;
    let (mut control, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    (hello.queue, hello.epoch) = (0, 1);
    let (mut queue, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    let mut reader = greeting("d", "r", 3);
    reader.mode = AccessMode::ReadOnly;
    let (mut reader, _) = Client::greet(fixture.data, &reader).expect("welcomed");
    assert_eq!(queue.write(0, &[1; 512]), Status::Ok);
    assert_eq!(control.call(Opcode::Release, 0, 0).0, Status::Ok);
    assert_eq!(queue.write(0, &[2; 512]), Status::StaleEpoch, "same epoch, but given back");
    assert_eq!(control.call(Opcode::Release, 0, 0).0, Status::StaleEpoch);
    assert_eq!(reader.read(0, 512), [1; 512], "readers of the epoch go on");
    let (status, _) = Client::greet(fixture.data, &hello).err().expect("no way back");
    assert_eq!(status, Status::StaleEpoch);
    assert_eq!(fixture.owner("d", "anybody", 4).epoch, Epoch(2));
    assert_eq!(reader.call(Opcode::Read, 0, 512).0, Status::StaleEpoch, "and say HELLO again then");
}

#[test]
fn a_reader_of_an_old_epoch_says_hello_again() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut hello = greeting("d", "r", 1);
    hello.mode = AccessMode::ReadOnly;
    let (mut reader, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert_eq!(welcome.epoch, Epoch(0), "nobody has claimed yet");
    assert_eq!(reader.read(0, 512), [0; 512]);
    let _owner = fixture.owner("d", "o", 2);
    assert_eq!(reader.call(Opcode::Read, 0, 512).0, Status::StaleEpoch);
    let (mut again, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert_eq!(welcome.epoch, Epoch(1));
    assert_eq!(again.read(0, 512), [0; 512]);
    hello.epoch = 9;
    let (status, text) = Client::greet(fixture.data, &hello).err().expect("refused");
    assert_eq!(status, Status::StaleEpoch, "{text}");
}

/// The next connection of a queue is welcomed when the last one is dead, however
/// often and fast that happens.
#[test]
fn reconnects_of_one_queue_do_not_overlap() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut last = fixture.owner("d", "h", 1);
    for n in 0..50u64 {
        // Left with writes under way that nobody waits for.
        for _ in 0..8 {
            last.send_write(0, &[0xff; 4096]);
        }
        let mut hello = greeting("d", "h", 1);
        (hello.epoch, hello.resume_from) = (1, last.seq + 1);
        let (mut next, _) = Client::greet(fixture.data, &hello).expect("welcomed");
        let (_, text) = http(fixture.admin, "GET", "/v1/volumes/d", "");
        let sessions = json(&text)["sessions"].as_array().map(Vec::len);
        assert_eq!(sessions, Some(1), "round {n}: the old connection is still there");
        let byte = n.to_le_bytes()[0];
        assert_eq!(next.write(0, &[byte; 4096]), Status::Ok);
        assert_eq!(next.read(0, 4096), [byte; 4096], "round {n}: an old write ran late");
        last = next;
    }
    wait_for("the old ones are gone", || metric(fixture.admin, "baton_connections") == 1);
}

/// A fence that is repeated, or arrives late, fences nobody but whom it was meant for.
#[test]
fn a_fence_that_comes_late_spares_the_next_owner() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let _old = fixture.owner("d", "h", 1);
    let (_, text) = http(fixture.admin, "GET", "/v1/volumes/d", "");
    let access = json(&text)["access"].clone();
    let body = serde_json::json!({
        "reason": "test",
        "nominee": "next",
        "seen": {"owner": access["owner"], "next_epoch": access["next_epoch"]},
    });
    fence(&fixture, &body.to_string());
    let mut next = fixture.owner("d", "next", 2);
    let (status, text) = http(fixture.admin, "POST", "/v1/volumes/d/fence", &body.to_string());
    let problem = json(&text);
    assert_eq!((status, &problem["type"]), (409, &"baton:stale-fence".into()), "{text}");
    let detail = problem["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("`next` owns it") && detail.contains("look"), "{detail}");
    assert_eq!(next.write(0, &[1; 512]), Status::Ok, "the next owner has not noticed");
}
