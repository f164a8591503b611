//! What is on the wire. Each protocol brings its end of a connection ([`Server`]), and
//! here a real link speaks with it over a real socket that takes as much as the test
//! says, and breaks at any byte: every request is there once per connection, whole, in
//! order, with the bytes of the guest. A server that forgets nothing would hide that
//! something was said twice, so nothing but what was heard is looked at.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::socket::narrow;
use crate::volume::{Op, Tag};

/// What is asked with one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write,
    Flush,
}

/// A frame, as it is to be and as it was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) what: What,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) payload: Vec<u8>,
}

/// A protocol's other end, on one connection.
pub(crate) trait Server {
    type Session: Conversation;

    /// A request that was answered in part is asked whole on the next connection.
    const WHOLE: bool;

    /// A session of a volume of [`SIZE_BYTES`] that was opened before, with room for
    /// [`DEPTH`] requests and no pauses between connections.
    fn session() -> Self::Session;
    fn settings() -> Option<Arc<<<Self::Session as Conversation>::Seal as Seal>::Settings>> {
        None
    }
    fn submit(session: &mut Self::Session, tag: Tag, op: Op, data: &[libc::iovec]);

    /// For a new connection; frames carry so many bytes at most.
    fn new(payload_max: u32) -> Self;
    /// Takes in what arrived, first nothing; the bytes to be sent for it.
    fn take(&mut self, bytes: &[u8]) -> Vec<u8>;
    /// Whole frames and their numbers, in the order in which they came.
    fn heard(&self) -> &[(u64, Frame)];
    /// What is there of the payload of a frame that is not whole.
    fn tail(&self) -> &[u8];
    /// The answer to a frame: all is well.
    fn answer(&mut self, number: u64, frame: &Frame) -> Vec<u8>;
}

pub(crate) const SIZE_BYTES: u64 = 1 << 40;
pub(crate) const DEPTH: usize = 8;

/// What the guest asks for; a READ's and a WRITE's segments by their lengths.
#[derive(Clone, Debug)]
struct Ask {
    what: What,
    offset: u64,
    segments: Vec<usize>,
}

struct Script {
    asks: Vec<Ask>,
    payload_max: u32,
}

/// A byte of the volume, as it is read and written.
fn byte(at: u64) -> u8 {
    u8::try_from((at ^ at >> 8 ^ at >> 16) % 251).expect("small")
}

pub(crate) fn bytes(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

fn ask(what: What, offset: u64, segments: &[usize]) -> Ask {
    Ask { what, offset, segments: segments.to_vec() }
}

impl Ask {
    fn len(&self) -> u64 {
        self.segments.iter().map(|len| *len as u64).sum()
    }

    /// The frames that it is cut into.
    fn frames(&self, payload_max: u32) -> Vec<Frame> {
        let (what, end) = (self.what, self.offset + self.len());
        if what == What::Flush {
            return vec![Frame { what, offset: 0, len: 0, payload: vec![] }];
        }
        let step = payload_max as usize;
        let cut = |offset: u64| {
            let len = u64::from(payload_max).min(end - offset);
            let payload = if what == What::Write { bytes(offset, len) } else { vec![] };
            Frame { what, offset, len, payload }
        };
        (self.offset..end).step_by(step).map(cut).collect()
    }

    fn op(&self) -> Op {
        match self.what {
            What::Read => Op::Read { offset: self.offset },
            What::Write => Op::Write { offset: self.offset },
            What::Flush => Op::Flush,
        }
    }
}

/// How a connection goes.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Bytes that the socket takes at a time.
    step: usize,
    /// Bytes that the server reads at a time; the kernel decides what it takes then.
    gulp: Option<usize>,
    /// Frames are answered as they come.
    answers: bool,
}

struct World<S: Server> {
    _dir: TempDir,
    listener: UnixListener,
    link: Link<S::Session>,
    payload_max: u32,
    pace: Pace,
    connection: Option<(UnixStream, S)>,
    /// Of this connection.
    answered: usize,
    taken: usize,
    accepted: usize,
    /// Connections that there may have been by now.
    allowed: usize,
    memory: BTreeMap<u32, Vec<Vec<u8>>>,
    done: Vec<Completion>,
}

impl<S: Server> World<S> {
    fn new(payload_max: u32, pace: Pace) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("server");
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("set");
        let link = Link::new(S::session(), Arc::new(Endpoint::Unix(path)), true).expect("a link");
        Self {
            _dir: dir,
            listener,
            link: link.with(S::settings()),
            payload_max,
            pace,
            connection: None,
            answered: 0,
            taken: 0,
            accepted: 0,
            allowed: 1,
            memory: BTreeMap::new(),
            done: Vec::new(),
        }
    }

    fn submit(&mut self, tag: u32, ask: &Ask) {
        let mut at = ask.offset;
        let mut segment = |len: &usize| {
            let begin = at;
            at += *len as u64;
            match ask.what {
                What::Write => bytes(begin, *len as u64),
                _ => vec![0xee; *len],
            }
        };
        let memory: Vec<_> = ask.segments.iter().map(&mut segment).collect();
        let memory = self.memory.entry(tag).or_insert(memory);
        let iov: Vec<_> = memory
            .iter_mut()
            .map(|m| libc::iovec { iov_base: m.as_mut_ptr().cast(), iov_len: m.len() })
            .collect();
        S::submit(self.link.session(), Tag(tag), ask.op(), &iov);
    }

    /// Both sides do what they can, once, while the server has taken less than `until`
    /// bytes; whether anything moved.
    fn step(&mut self, until: usize) -> bool {
        self.link.poll(&mut self.done);
        let mut moved = false;
        if let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).expect("set");
            let mut server = S::new(self.payload_max);
            let greeting = server.take(&[]);
            (&stream).write_all(&greeting).expect("room for a greeting");
            self.connection = Some((stream, server));
            (self.answered, self.taken, moved) = (0, 0, true);
            self.accepted += 1;
            assert!(self.accepted <= self.allowed, "the link gave up a connection");
        }
        let Some((stream, server)) = &mut self.connection else { return moved };
        let limit = (until - self.taken).min(self.pace.gulp.unwrap_or(64 << 10));
        let mut buffer = vec![0; limit];
        let got = match stream.read(&mut buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => panic!("the link closed the connection: {error}"),
        };
        self.taken += got;
        let mut reply = server.take(&buffer[..got]);
        if self.pace.answers {
            for at in self.answered..server.heard().len() {
                let (number, frame) = server.heard()[at].clone();
                reply.extend(server.answer(number, &frame));
            }
            self.answered = server.heard().len();
        }
        stream.write_all(&reply).expect("room for answers");
        moved || got > 0 || !reply.is_empty()
    }

    /// As far as it goes.
    fn settle(&mut self, until: usize) {
        let mut idle = 0;
        while idle < 3 {
            idle = if self.step(until) { 0 } else { idle + 1 };
        }
    }

    /// What was heard on this connection is `expected` from its first frame on; how
    /// many frames.
    fn check(&self, expected: &[Frame], whole: bool, case: &str) -> usize {
        let Some((_, server)) = &self.connection else { return 0 };
        let heard = server.heard();
        for (at, (number, frame)) in heard.iter().enumerate() {
            let told = || format!("{case}: frame {at} of {heard:?}");
            assert!(expected.get(at).is_some_and(|e| e == frame), "{}", told());
            assert!(at == 0 || heard[at - 1].0 < *number, "{}", told());
        }
        let next = expected.get(heard.len()).map_or(&[][..], |frame| &frame.payload);
        assert!(next.starts_with(server.tail()), "{case}: {:?}", server.tail());
        assert!(!whole || heard.len() == expected.len(), "{case}: {heard:?}");
        heard.len()
    }
}

/// Runs `script` over connections of which one after the other breaks when so many
/// bytes were sent, and a last one; returns what the first one took.
fn run<S: Server>(script: &Script, breaks: &[usize], pace: Pace) -> usize {
    let case = format!("{breaks:?}, {pace:?}");
    let mut world = World::<S>::new(script.payload_max, pace);
    let (late, first) = script.asks.split_last().expect("some");
    let mut expected: Vec<(u32, Frame)> = Vec::new();
    for (tag, ask) in (0..).zip(first) {
        world.submit(tag, ask);
        expected.extend(ask.frames(script.payload_max).into_iter().map(|f| (tag, f)));
    }
    let frames = |from: &[(u32, Frame)]| from.iter().map(|(_, f)| f.clone()).collect::<Vec<_>>();
    let mut first_took = None;
    for &at in breaks {
        narrow::set(pace.step, if pace.gulp.is_some() { usize::MAX } else { at });
        world.settle(at);
        let heard = world.check(&frames(&expected), false, &case);
        first_took.get_or_insert(world.taken);
        if pace.answers {
            let rest = expected.split_off(heard);
            // Of a request whose last frame was not answered, all or the rest.
            if let (true, Some((open, _))) = (S::WHOLE, rest.first()) {
                expected.retain(|(tag, _)| tag == open);
            } else {
                expected.clear();
            }
            expected.extend(rest);
        }
        narrow::set(pace.step, usize::MAX);
        world.connection = None;
        world.allowed += 1;
    }
    narrow::set(pace.step, usize::MAX);
    world.pace.answers = false;
    // In the middle of it the guest asks for something more.
    while world.step(usize::MAX)
        && world.connection.as_ref().is_none_or(|(_, server)| server.heard().is_empty())
    {}
    let tag = u32::try_from(first.len()).expect("few");
    world.submit(tag, late);
    world.link.send(&mut world.done);
    expected.extend(late.frames(script.payload_max).into_iter().map(|f| (tag, f)));
    world.settle(usize::MAX);
    world.check(&frames(&expected), true, &case);
    assert_eq!(world.accepted, breaks.len() + 1, "{case}");
    first_took.get_or_insert(world.taken);

    world.pace.answers = true;
    world.settle(usize::MAX);
    let mut done: Vec<_> = world.done.iter().map(|c| (c.tag.0, c.result)).collect();
    done.sort_by_key(|(tag, _)| *tag);
    assert_eq!(done, (0..=tag).map(|tag| (tag, Ok(()))).collect::<Vec<_>>(), "{case}");
    for (tag, ask) in (0..).zip(&script.asks) {
        assert!(world.memory[&tag].concat() == bytes(ask.offset, ask.len()), "{case}: {tag}");
    }
    narrow::set(usize::MAX, usize::MAX);
    first_took.expect("set")
}

const QUIET: Pace = Pace { step: usize::MAX, gulp: None, answers: false };

/// Requests of each shape, small: the break can be at each byte.
fn small() -> Script {
    let asks = vec![
        ask(What::Write, 512, &[100, 0, 400, 12]),
        ask(What::Read, 8192, &[4000, 608]),
        ask(What::Write, 4096, &[1, 510, 1]),
        ask(What::Flush, 0, &[]),
        ask(What::Write, 65536, &[512]),
        ask(What::Write, 1 << 20, &[500, 12]),
    ];
    Script { asks, payload_max: 4096 }
}

/// Breaks connections at each byte that is sent, or at each `by`th, one after the other,
/// in large and in small pieces; and at some bytes with answers to what was said before.
pub(crate) fn a_break_at_each_byte_says_nothing_twice<S: Server>(by: usize) {
    let script = small();
    let total = run::<S>(&script, &[], QUIET);
    let at: Vec<usize> = (0..=total).step_by(by).collect();
    for (n, breaks) in at.chunks(10).enumerate() {
        run::<S>(&script, breaks, Pace { step: [usize::MAX, 1009, 67][n % 3], ..QUIET });
    }
    for &at in at.iter().step_by(7) {
        let pace = Pace { step: [usize::MAX, 211][at % 2], answers: true, ..QUIET };
        run::<S>(&script, &[at, (at * 7) % (total + 1)], pace);
    }
}

/// One byte at a time, then `by` more each time.
pub(crate) fn pieces_of_any_size_are_put_together<S: Server>(by: usize) {
    for step in (1..200).step_by(by) {
        run::<S>(&small(), &[1200], Pace { step, ..QUIET });
    }
}

/// More segments than one call takes, so that a batch is several.
pub(crate) fn a_batch_of_several_calls_is_said_once<S: Server>(by: usize) {
    let many = |n: u64| ask(What::Write, n << 16, &[3; 512]);
    let asks = vec![many(0), many(1), ask(What::Flush, 0, &[]), many(2), many(3), many(4)];
    let script = Script { asks, payload_max: 4096 };
    let total = run::<S>(&script, &[], QUIET);
    for at in (0..=total).step_by(by) {
        run::<S>(&script, &[at], Pace { step: [usize::MAX, 1021][at % 2], ..QUIET });
    }
}

/// A server that reads slowly: the kernel's own short writes.
pub(crate) fn more_than_the_socket_holds_is_said_once<S: Server>() {
    let big = |n: u64| ask(What::Write, n << 24, &[5 << 12, (1 << 20) - 512, 3 << 12, 512]);
    let asks = vec![big(0), ask(What::Read, 0, &[4096]), big(1), big(2), ask(What::Flush, 0, &[])];
    let script = Script { asks, payload_max: 1 << 20 };
    for (at, gulp) in [(1, 40_000), (100_000, 7919), (1_100_000, 65_536), (2_345_678, 300_007)] {
        for answers in [false, true] {
            run::<S>(&script, &[at, at / 2], Pace { step: usize::MAX, gulp: Some(gulp), answers });
        }
    }
}
