//! Writes of 64 KiB and more, whether they go through a pipe or a buffer, and whatever pieces they come in.

mod common;

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use baton_protocol::{Opcode, RequestHeader, Status};
use baton_storage_server::config::Config;
use common::{Client, Fixture, greeting, metric};
use proptest::prelude::RngExt as _;
use proptest::test_runner::{RngAlgorithm, TestRng};

const SIZE: u64 = 64 << 20;
const LARGE: usize = 128 << 10;
/// Through a pipe, and through the buffer.
const WAYS: [bool; 2] = [true, false];

fn fixture(piped: bool) -> Fixture {
    let fixture = Fixture::with(&[], |config| set(config, piped));
    fixture.create("d", SIZE);
    fixture
}

fn set(config: &mut Config, piped: bool) {
    config.piped_writes = piped;
    config.listen_unix = Some(config.data_dir.with_file_name("data.sock"));
}

/// A client over the Unix socket.
fn on_unix(fixture: &Fixture) -> Client {
    let path = fixture.dir.path().join("data.sock");
    let socket = UnixStream::connect(path).expect("the server listens");
    let mut client = Client {
        // Only reads, writes and time-outs, which all sockets have.
        stream: TcpStream::from(OwnedFd::from(socket)),
        ..Client::connect(fixture.data)
    };
    client.stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    client.stream.set_write_timeout(Some(common::PATIENCE)).expect("a timeout");
    let hello = greeting("d", "h", 1);
    client.raw(&hello.bytes());
    client.welcome(&hello).expect("welcomed");
    client
}

fn piped(fixture: &Fixture) -> u64 {
    metric(fixture.admin, "baton_piped_writes_total")
}

/// After one large write the next is expected to be one, and goes through the pipe.
fn warm_up(client: &mut Client) {
    assert_eq!(client.write(SIZE / 2, &vec![0xaa; LARGE]), Status::Ok);
}

#[test]
fn they_may_come_in_any_pieces() {
    for (way, unix) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let fixture = fixture(way);
        let mut owner = if unix { on_unix(&fixture) } else { fixture.owner("d", "h", 1) };
        let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut model = vec![0u8; 8 << 20];
        for round in 0..40u64 {
            let mut bytes = Vec::new();
            let mut asked = Vec::new();
            for n in 0..6u8 {
                let sectors = if random.random_bool(0.7) {
                    random.random_range(128..1025)
                } else {
                    random.random_range(1..20)
                };
                let len = sectors * 512;
                let at = random.random_range(0..(model.len() - len) / 512) * 512;
                let mut data = vec![n; len];
                for sector in data.chunks_mut(512) {
                    sector[..8].copy_from_slice(&random.random::<u64>().to_le_bytes());
                }
                model[at..at + len].copy_from_slice(&data);
                bytes.extend(owner.write_request(at as u64, &data));
                asked.push(owner.seq);
                if n == 3 {
                    let ping = owner.header(Opcode::Ping, 0, 0);
                    bytes.extend(ping.encode());
                    asked.push(owner.seq);
                }
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let most = if round % 2 == 0 { 400_000 } else { 40_000 };
                let n = random.random_range(1..most).min(rest.len());
                owner.raw(&rest[..n]);
                rest = &rest[n..];
            }
            for seq in asked {
                assert_eq!(owner.answer(seq).0, Status::Ok);
            }
        }
        for (n, expected) in (0u64..).zip(model.chunks(1 << 20)) {
            assert!(owner.read(n << 20, 1 << 20) == expected, "piped {way}, Unix {unix}: MiB {n}");
        }
        assert_eq!(piped(&fixture) > 0, way && !unix, "Unix {unix}: the path under test was taken");
    }
}

/// The client is gone in the middle of a write. It sends it again, and only then there is something new.
#[test]
fn half_of_one_changes_nothing() {
    for way in WAYS {
        let fixture = fixture(way);
        let mut old = fixture.owner("d", "h", 1);
        assert_eq!(old.write(0, &vec![1; LARGE]), Status::Ok);
        let request = old.write_request(0, &vec![2; LARGE]);
        old.raw(&request[..LARGE - 700]);
        old.stream.shutdown(std::net::Shutdown::Write).expect("shut down");
        assert!(old.is_closed());
        let mut hello = greeting("d", "h", 1);
        hello.epoch = old.epoch.0;
        hello.resume_from = old.seq;
        let (mut new, _) = Client::greet(fixture.data, &hello).expect("welcomed");
        assert!(new.read(0, LARGE as u64) == vec![1; LARGE], "piped {way}");
        assert_eq!(piped(&fixture), 0);
    }
}

/// Admitted is who has sent the whole of it.
#[test]
fn one_whose_sender_is_fenced_in_the_middle_changes_nothing() {
    for way in WAYS {
        let fixture = fixture(way);
        let mut old = fixture.owner("d", "h", 1);
        warm_up(&mut old);
        let request = old.write_request(0, &vec![2; LARGE]);
        let (first, second) = request.split_at(LARGE / 2 + 33);
        old.raw(first);
        let mut new = fixture.owner("d", "h", 2);
        assert_eq!(new.write(0, &vec![3; LARGE]), Status::Ok);
        let seq = old.seq;
        old.raw(second);
        assert_eq!(old.answer(seq).0, Status::StaleEpoch);
        assert!(new.read(0, LARGE as u64) == vec![3; LARGE], "piped {way}");
        // What was not wanted is not taken for a request.
        let before = piped(&fixture);
        let again = old.write(0, &vec![4; LARGE]);
        assert_eq!((again, old.call(Opcode::Ping, 0, 0).0), (Status::StaleEpoch, Status::Ok));
        assert!(new.read(0, LARGE as u64) == vec![3; LARGE], "piped {way}");
        assert_eq!(piped(&fixture), before);
    }
}

/// As small ones: an answer that was lost does not make a write run twice.
#[test]
fn one_that_was_done_does_not_run_again() {
    for way in WAYS {
        let fixture = fixture(way);
        let mut old = fixture.owner("d", "h", 1);
        for byte in [1, 2, 3] {
            assert_eq!(old.write(0, &vec![byte; LARGE]), Status::Ok);
        }
        let mut hello = greeting("d", "h", 1);
        hello.epoch = old.epoch.0;
        let (mut new, _) = Client::greet(fixture.data, &hello).expect("welcomed");
        let before = piped(&fixture);
        for byte in [1, 2, 3] {
            assert_eq!(new.write(0, &vec![byte; LARGE]), Status::Ok);
            let mut now = vec![0; LARGE];
            fixture.volume("d").data.read(0, &mut now).expect("read");
            assert!(now == vec![3; LARGE], "piped {way}: after {byte} came again");
        }
        assert_eq!(piped(&fixture), before, "none of them was run");
        assert_eq!(new.write(0, &vec![4; LARGE]), Status::Ok);
        assert!(new.read(0, LARGE as u64) == vec![4; LARGE]);
        assert_eq!(piped(&fixture) > before, way);
    }
}

/// What no longer fits is refused, and the next request is found where it begins.
#[test]
fn one_that_finds_no_space_is_refused() {
    for way in WAYS {
        let fixture = Fixture::with(&["--pool-size", "2M"], |config| set(config, way));
        fixture.create("d", SIZE);
        let mut owner = fixture.owner("d", "h", 1);
        assert_eq!(owner.write(0, &vec![1; LARGE]), Status::Ok);
        assert_eq!(owner.write(1 << 20, &vec![2; LARGE]), Status::Ok);
        // Its first half has space, the second has not.
        let over = (2 << 20) - LARGE as u64 / 2;
        assert_eq!(owner.write(over, &vec![3; LARGE]), Status::NoSpace);
        assert_eq!(owner.write(0, &vec![4; LARGE]), Status::Ok);
        assert_eq!(owner.write(SIZE - 512, &vec![5; LARGE]), Status::OutOfRange);
        assert_eq!(owner.write(1 << 20, &vec![6; LARGE]), Status::Ok);
        assert!(owner.read(0, LARGE as u64) == vec![4; LARGE]);
        assert!(owner.read(1 << 20, LARGE as u64) == vec![6; LARGE]);
        assert_eq!(piped(&fixture) > 0, way);
    }
}

/// Each piece takes one place in the pipe however small it is, and there are fewer places than this has pieces.
#[test]
fn one_in_very_small_pieces_goes_through_the_buffer() {
    let fixture = fixture(true);
    let mut owner = fixture.owner("d", "h", 1);
    warm_up(&mut owner);
    let data: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let before = piped(&fixture);
    let mut between = Between::start();
    for _ in 0..2 {
        let request = owner.write_request(0, &data);
        for piece in request.chunks(512) {
            owner.raw(piece);
            between.send();
        }
        assert_eq!(owner.answer(owner.seq).0, Status::Ok);
        assert!(owner.read(0, 1 << 20) == data);
    }
    assert_eq!(piped(&fixture), before);
    // And all others of this connection.
    assert_eq!(owner.write(0, &vec![7; LARGE]), Status::Ok);
    assert_eq!(owner.write(0, &vec![8; LARGE]), Status::Ok);
    assert!(owner.read(0, LARGE as u64) == vec![8; LARGE]);
    assert_eq!(piped(&fixture), before);
}

/// The kernel puts what a thread sends one behind the other in memory, and joins there again what lies together. So
/// something goes to somebody else in between.
struct Between(TcpStream);

impl Between {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        stream.set_nodelay(true).expect("an option");
        let (mut there, _) = listener.accept().expect("connected");
        std::thread::spawn(move || std::io::copy(&mut there, &mut std::io::sink()));
        Self(stream)
    }

    fn send(&mut self) {
        self.0.write_all(&[0; 16]).expect("sent");
    }
}

/// A small request between large ones, in one piece with them: its payload is its own.
#[test]
fn small_requests_between_them_are_served() {
    let fixture = fixture(true);
    let mut owner = fixture.owner("d", "h", 1);
    let mut all = Vec::new();
    for n in 0..8u8 {
        let len = if n % 2 == 0 { LARGE } else { 512 };
        all.extend(owner.write_request(u64::from(n) << 20, &vec![n; len]));
    }
    owner.raw(&all);
    for seq in owner.seq - 7..=owner.seq {
        assert_eq!(owner.answer(seq).0, Status::Ok);
    }
    for n in 0..8u8 {
        let len = if n % 2 == 0 { LARGE } else { 512 };
        assert!(owner.read(u64::from(n) << 20, len as u64) == vec![n; len], "{n}");
    }
    let broken = RequestHeader { payload_len: 512, ..owner.header(Opcode::Ping, 0, 0) };
    warm_up(&mut owner);
    owner.raw(&broken.encode());
    assert_eq!(owner.reply().0.status, Status::Protocol, "a header is looked at when it is there");
}
