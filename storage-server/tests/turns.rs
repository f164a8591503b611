//! Whose turn it is, on real sockets: between two turns of those who ask for much, a worker looks at all its connections.

mod common;

use std::io::{BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use baton_protocol::frame::REPLY_HEADER_BYTES;
use baton_protocol::{Opcode, ReplyHeader, Status};
use common::{Client, Fixture, Greeting, greeting, wait_for};

const GREEDY: u16 = 2;
/// What each of the greedy asks for before it has had enough: seconds of work, while what the modest asks for
/// is done within milliseconds.
const MUCH: u64 = 400_000;
/// Of the modest, each sent when the one before it is answered: so each has to be found by another look.
const LITTLE: usize = 50;
/// Of one `send`.
const BATCH: u64 = 500;
/// The largest request that a worker carries out by itself and that fits a header: much work for few bytes, so that
/// the queue never runs dry.
const ZEROED: u64 = 64 << 10;

/// Both have their requests in the server's socket all the time. A worker that served them for as long as they have
/// more, without a look at its other sockets, would be done with all of it first.
#[test]
fn little_is_answered_while_others_have_much_queued() {
    let server = Fixture::with(&[], |config| config.workers = 1);
    server.create("vol", 4 << 20);
    let connect = |queue| {
        let hello = Greeting { queue, ..greeting("vol", "a", 1) };
        Client::greet(server.data, &hello).expect("welcomed").0
    };
    let mut modest = connect(GREEDY);
    // Zeros take no time where nothing was ever written.
    assert_eq!(modest.write(0, &[7; 64 << 10]), Status::Ok);
    let (enough, answered, dry) =
        (AtomicBool::new(false), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for queue in 0..GREEDY {
            let mut greedy = connect(queue);
            let mut answers = BufReader::new(greedy.stream.try_clone().expect("cloned"));
            let (enough, answered, dry) = (&enough, &answered, &dry);
            scope.spawn(move || {
                while !enough.load(Ordering::Relaxed) && greedy.seq < MUCH {
                    let header = |_| greedy.header(Opcode::WriteZeroes, 0, ZEROED).encode();
                    let batch: Vec<u8> = (0..BATCH).flat_map(header).collect();
                    greedy.stream.write_all(&batch).expect("sent");
                }
                greedy.stream.shutdown(std::net::Shutdown::Write).expect("said");
            });
            scope.spawn(move || {
                let mut header = [0; REPLY_HEADER_BYTES];
                while answers.read_exact(&mut header).is_ok() {
                    let header = ReplyHeader::decode(&header).expect("a reply");
                    assert_eq!(header.status, Status::Ok);
                    answered.fetch_add(1, Ordering::Relaxed);
                    dry.fetch_or(header.seq.0 == MUCH, Ordering::Relaxed);
                }
            });
        }
        wait_for("both are being served", || answered.load(Ordering::Relaxed) >= 2 * BATCH);
        for _ in 0..LITTLE {
            assert_eq!(modest.read(1 << 20, 512), vec![0; 512]);
        }
        enough.store(true, Ordering::Relaxed);
    });
    assert!(!dry.load(Ordering::Relaxed), "somebody's {MUCH} requests were all done before");
}
