//! Bad peers get a clear answer or none, and never disturb the others.

mod common;

use std::time::{Duration, Instant};

use baton_protocol::frame::{FLAG_CRC, PAYLOAD_BYTES_MAX};
use baton_protocol::{
    AccessMode, EventKind, Opcode, QueueId, RequestHeader, Seq, SessionId, Status,
};
use common::{Client, Fixture, greeting, metric, wait_for};

const SIZE: u64 = 64 << 20;

fn served(fixture: &Fixture) {
    let mut honest = fixture.owner("d", "honest", 77);
    assert_eq!(honest.write(0, &[7; 512]), Status::Ok);
    assert_eq!(honest.read(0, 512), [7; 512]);
}

#[test]
fn what_is_not_a_hello_is_refused_or_closed() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    for garbage in
        [&[0u8; 64][..], b"GET / HTTP/1.1\r\nHost: storage.example\r\n\r\nand some more text"]
    {
        let mut client = Client::connect(fixture.data);
        client.raw(garbage);
        assert!(client.is_closed());
    }
    let good = greeting("d", "h", 1).bytes();
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    for (what, bytes, status, names) in [
        ("READ first", changed(4, 2), Status::Protocol, "HELLO"),
        ("an unknown opcode", changed(4, 99), Status::Protocol, "99"),
        ("a mode that is not", changed(68, 9), Status::Protocol, "access mode 9"),
        ("no owner", greeting("d", "", 1).bytes(), Status::Protocol, "owner"),
        ("no session", greeting("d", "h", 0).bytes(), Status::Protocol, "session"),
        ("a long body", changed(49, 9), Status::Protocol, "bytes"),
        ("no such volume", greeting("nope", "h", 1).bytes(), Status::NoSuchVolume, "nope"),
    ] {
        let mut client = Client::connect(fixture.data);
        client.raw(&bytes);
        let (header, body) = client.reply();
        let text = String::from_utf8(body).expect("a sentence");
        assert_eq!(header.status, status, "{what}: {text}");
        assert!(text.contains(names), "{what}: {text}");
        assert!(client.is_closed(), "{what}");
    }
    let mut future = greeting("d", "h", 1);
    future.versions = (3, 5);
    let (status, text) = Client::greet(fixture.data, &future).err().expect("refused");
    assert_eq!(status, Status::Version);
    assert!(text.contains("1 to 1"), "{text}");
    served(&fixture);
}

#[test]
fn a_hello_may_come_byte_by_byte_but_not_for_ever() {
    let fixture = Fixture::with(&[], |config| {
        config.hello_timeout = Duration::from_millis(700);
    });
    fixture.create("d", SIZE);
    let hello = greeting("d", "slow", 5);
    let mut client = Client::connect(fixture.data);
    for byte in hello.bytes() {
        client.raw(&[byte]);
    }
    client.welcome(&hello).expect("welcomed");
    // And so may requests.
    let header = client.header(Opcode::Ping, 0, 0);
    for byte in header.encode() {
        client.raw(&[byte]);
    }
    assert_eq!(client.answer(header.seq.0).0, Status::Ok);

    let mut half = Client::connect(fixture.data);
    half.raw(&hello.bytes()[..70]);
    let begun = Instant::now();
    assert!(half.is_closed());
    assert!(begun.elapsed() >= Duration::from_millis(500), "not at once");
    assert_eq!(metric(fixture.admin, "baton_silent_total"), 1);
}

#[test]
fn a_thousand_silent_connections_do_not_keep_an_honest_one_out() {
    let fixture = Fixture::with(&[], |config| config.hello_timeout = Duration::from_secs(60));
    fixture.create("d", SIZE);
    let mut working = fixture.owner("d", "before", 1);
    let silent: Vec<_> = (0..1000).map(|_| Client::connect(fixture.data)).collect();
    assert_eq!(working.write(0, &[1; 4096]), Status::Ok, "the one before goes on");
    drop(working);
    let mut honest = fixture.owner("d", "before", 2);
    assert_eq!(honest.read(0, 4096), [1; 4096]);
    wait_for("the oldest are dropped", || {
        metric(fixture.admin, "baton_silent_total") >= 1000 - 256
    });
    drop(silent);
}

#[test]
fn too_many_connections_are_told_so() {
    let fixture = Fixture::with(&[], |config| config.connections_max = 2);
    fixture.create("d", SIZE);
    let one = fixture.owner("d", "h", 1);
    let mut second = greeting("d", "h", 1);
    (second.queue, second.epoch) = (1, 1);
    let two = Client::greet(fixture.data, &second).expect("welcomed");
    let (status, text) = Client::greet(fixture.data, &greeting("d", "h", 2)).err().expect("full");
    assert_eq!(status, Status::Busy, "{text}");
    drop((one, two));
    wait_for("room again", || Client::greet(fixture.data, &greeting("d", "h", 3)).is_ok());
}

/// Each way to break the protocol after WELCOME: a reply that says so, then the end.
#[test]
fn a_broken_request_is_answered_and_ends_its_connection_only() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let good = |client: &mut Client| client.header(Opcode::Read, 0, 512);
    type Change = Box<dyn Fn(RequestHeader) -> RequestHeader>;
    let cases: Vec<(&str, Change, &str)> = vec![
        ("foreign session", Box::new(|h| RequestHeader { session: SessionId(99), ..h }), "session"),
        ("foreign queue", Box::new(|h| RequestHeader { queue: QueueId(9), ..h }), "queue 9"),
        ("a second hello", Box::new(|h| RequestHeader { opcode: Opcode::Hello, ..h }), "HELLO"),
        (
            "a read too long",
            Box::new(|h| RequestHeader { len: u64::from(PAYLOAD_BYTES_MAX) + 512, ..h }),
            "READ",
        ),
        ("a read with payload", Box::new(|h| RequestHeader { payload_len: 512, ..h }), "payload"),
        ("a write without", Box::new(|h| RequestHeader { opcode: Opcode::Write, ..h }), "payload"),
        (
            "a payload over the limit",
            Box::new(|h| RequestHeader {
                opcode: Opcode::Write,
                len: 2 << 20,
                payload_len: 2 << 20,
                ..h
            }),
            "2097152",
        ),
        ("checksums nobody agreed", Box::new(|h| RequestHeader { flags: FLAG_CRC, ..h }), "flags"),
        ("sequence zero", Box::new(|h| RequestHeader { seq: Seq(0), ..h }), "number 0"),
        ("far ahead", Box::new(|h| RequestHeader { seq: Seq(1 << 40), ..h }), "ahead"),
    ];
    let mut other = fixture.owner("d", "h", 1);
    for (number, (what, change, names)) in (10u16..).zip(cases) {
        let mut hello = greeting("d", "h", 1);
        (hello.queue, hello.epoch) = (number, 1);
        let (mut client, _) = Client::greet(fixture.data, &hello).expect("welcomed");
        let header = good(&mut client);
        client.raw(&change(header).encode());
        let (reply, body) = client.reply();
        let text = String::from_utf8(body).expect("a sentence");
        assert_eq!(reply.status, Status::Protocol, "{what}: {text}");
        assert!(text.contains(names), "{what}: {text}");
        assert!(client.is_closed(), "{what}");
        assert_eq!(other.call(Opcode::Ping, 0, 0).0, Status::Ok, "{what}: the others go on");
    }
    // Ours no more: no reply, just the end.
    let mut hello = greeting("d", "h", 1);
    (hello.queue, hello.epoch) = (50, 1);
    let (mut client, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    client.raw(&[0xee; 200]);
    assert!(client.is_closed());
    assert_eq!(metric(fixture.admin, "baton_protocol_violations_total"), 11);
}

/// It may read the reply in peace, and then its place is needed.
#[test]
fn one_that_broke_the_protocol_and_stays_is_closed() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut client = fixture.owner("d", "h", 1);
    let header = client.header(Opcode::Hello, 0, 0);
    client.raw(&header.encode());
    assert_eq!(client.reply().0.status, Status::Protocol);
    wait_for("nobody is connected", || metric(fixture.admin, "baton_connections") == 0);
    drop(client);
}

#[test]
fn a_payload_that_is_cut_off_is_never_written() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "h", 1);
    assert_eq!(owner.write(0, &[1; 8192]), Status::Ok);
    let mut header = owner.header(Opcode::Write, 0, 8192);
    header.payload_len = 8192;
    owner.raw(&header.encode());
    owner.raw(&[2; 8191]);
    drop(owner);
    let mut hello = greeting("d", "h", 1);
    (hello.epoch, hello.resume_from) = (1, 2);
    let (mut again, _) = Client::greet(fixture.data, &hello).expect("welcomed");
    assert_eq!(again.read(0, 8192), [1; 8192]);
}

#[test]
fn ranges_and_modes_are_answered_and_go_on() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "h", 1);
    for (offset, len) in
        [(SIZE, 512), (SIZE - 512, 1024), (1, 512), (0, 100), (u64::MAX - 511, 512)]
    {
        for opcode in [Opcode::Read, Opcode::Discard, Opcode::WriteZeroes] {
            let (status, _) = owner.call(opcode, offset, len);
            assert_eq!(status, Status::OutOfRange, "{opcode:?} {offset}+{len}");
        }
    }
    assert_eq!(owner.write(SIZE, &[0; 512]), Status::OutOfRange);
    let mut reader = greeting("d", "other", 2);
    reader.mode = AccessMode::ReadOnly;
    let (mut reader, welcome) = Client::greet(fixture.data, &reader).expect("beside the owner");
    assert!(welcome.read_only);
    assert_eq!(reader.write(0, &[9; 512]), Status::NotPermitted);
    assert_eq!(reader.call(Opcode::Discard, 0, 512).0, Status::NotPermitted);
    assert_eq!(reader.call(Opcode::Release, 0, 0).0, Status::NotPermitted);
    assert_eq!(reader.read(0, 512), [0; 512]);
    assert_eq!(reader.call(Opcode::Flush, 0, 0).0, Status::Ok);
    let mut standby = greeting("d", "third", 3);
    standby.mode = AccessMode::Standby;
    let (mut standby, welcome) = Client::greet(fixture.data, &standby).expect("beside the owner");
    assert_eq!(welcome.size_bytes, SIZE);
    assert_eq!(standby.call(Opcode::Read, 0, 512).0, Status::NotPermitted);
    assert_eq!(standby.call(Opcode::Ping, 0, 0).0, Status::Ok);
}

/// A client that does not read its answers is not read any more; others on the
/// same worker are served, and it gets everything when it reads again.
#[test]
fn a_client_that_does_not_read_harms_nobody() {
    for cold in [false, true] {
        let fixture = Fixture::with(&["--workers", "1"], |config| config.cold_reads = cold);
        fixture.create("d", SIZE);
        fixture.create("e", SIZE);
        let mut lazy = fixture.owner("d", "lazy", 1);
        let pattern: Vec<u8> =
            (0..1 << 20).map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        assert_eq!(lazy.write(0, &pattern), Status::Ok);
        let mut asked = Vec::new();
        for _ in 0..200 {
            let header = lazy.header(Opcode::Read, 0, 1 << 20);
            asked.extend_from_slice(&header.encode());
        }
        lazy.raw(&asked);
        let mut other = fixture.owner("e", "other", 2);
        for n in 0..200u8 {
            assert_eq!(other.write(0, &[n; 4096]), Status::Ok);
            assert_eq!(other.read(0, 4096), [n; 4096]);
        }
        assert!(
            metric(fixture.admin, "baton_read_bytes_total") < 150 << 20,
            "it is not served ahead"
        );
        let mut seqs: Vec<u64> = (0..200)
            .map(|_| {
                let (header, body) = lazy.reply();
                assert_eq!(header.status, Status::Ok);
                assert!(body == pattern, "the right data");
                header.seq.0
            })
            .collect();
        seqs.sort_unstable();
        assert_eq!(seqs, (2..202).collect::<Vec<_>>(), "each once");
    }
}

#[test]
fn events_wait_until_there_is_news() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut hello = greeting("d", "h", 1);
    hello.queue = QueueId::CONTROL.0;
    let (mut control, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    let seq = control.send(Opcode::Event, welcome.event_id, 0);
    assert_eq!(control.call(Opcode::Ping, 0, 0).0, Status::Ok, "a parked event blocks nothing");
    assert!(control.is_quiet(Duration::from_millis(50)));
    let (status, text) = common::http(
        fixture.admin,
        "POST",
        "/v1/volumes/d/resize",
        &format!("{{\"size_bytes\":{}}}", 2 * SIZE),
    );
    assert_eq!(status, 200, "{text}");
    let (status, body) = control.answer(seq);
    assert_eq!(status, Status::Ok);
    let event = baton_protocol::Event::decode(&body).expect("an event");
    assert_eq!((event.kind, event.value), (EventKind::Resized, 2 * SIZE));
    // The new end is there, and a listener that knows less hears of it at once.
    assert_eq!(control.read(2 * SIZE - 512, 512), [0; 512]);
    let (_, body) = control.call(Opcode::Event, event.id - 1, 0);
    assert_eq!(baton_protocol::Event::decode(&body).expect("an event"), event);
    control.send(Opcode::Event, event.id, 0);
    let second = control.send(Opcode::Event, event.id, 0);
    assert_eq!(control.answer(second).0, Status::Protocol, "one is parked at a time");
}
