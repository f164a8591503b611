//! A real session and a server in memory, joined by two byte pipes and virtual
//! time. The test decides how many bytes move, in which direction, in which
//! order replies leave, and when the connection breaks.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use baton_protocol::{AccessMode, Epoch, QueueId, Seq, SessionId, VolumeId};

use super::super::*;
use super::server::{Connection, Server};

/// A guest request's memory: buffers with guard bytes around each.
pub(super) struct Memory {
    bytes: Vec<u8>,
    cuts: Vec<(usize, usize)>,
}

const GUARD: usize = 16;
const GUARD_BYTE: u8 = 0xa5;

impl Memory {
    /// Buffers of the given lengths, filled from `data` or with `0xee`.
    pub(super) fn new(lens: &[usize], data: Option<&[u8]>) -> Self {
        let mut bytes = vec![GUARD_BYTE; GUARD];
        let mut cuts = Vec::new();
        let mut at = 0;
        for len in lens {
            cuts.push((bytes.len(), *len));
            match data {
                Some(data) => bytes.extend_from_slice(&data[at..at + len]),
                None => bytes.resize(bytes.len() + len, 0xee),
            }
            bytes.resize(bytes.len() + GUARD, GUARD_BYTE);
            at += len;
        }
        Self { bytes, cuts }
    }

    pub(super) fn iov(&mut self) -> Vec<libc::iovec> {
        let base = self.bytes.as_mut_ptr();
        let at = |(start, len): &(usize, usize)| libc::iovec {
            iov_base: base.wrapping_add(*start).cast(),
            iov_len: *len,
        };
        self.cuts.iter().map(at).collect()
    }

    pub(super) fn data(&self) -> Vec<u8> {
        self.cuts.iter().flat_map(|(s, n)| self.bytes[*s..s + n].to_vec()).collect()
    }

    pub(super) fn check_guards(&self) {
        let mut inside = vec![false; self.bytes.len()];
        for (start, len) in &self.cuts {
            inside[*start..start + len].fill(true);
        }
        for (at, inside) in inside.iter().enumerate() {
            assert!(*inside || self.bytes[at] == GUARD_BYTE, "guard byte {at} was overwritten");
        }
    }
}

pub(super) struct Pair {
    pub(super) now: Instant,
    pub(super) session: Session,
    pub(super) server: Server,
    pub(super) connection: Connection,
    /// On their way.
    pub(super) to_server: VecDeque<u8>,
    pub(super) to_client: VecDeque<u8>,
    /// Refuse to connect.
    pub(super) unreachable: bool,
    /// Read payloads straight into guest memory, as the driver does.
    pub(super) direct: bool,
    pub(super) flights: BTreeMap<u32, Memory>,
    pub(super) done: Vec<Completion>,
    pub(super) notices: Vec<Notice>,
    /// Bytes moved on all connections so far.
    pub(super) moved: (usize, usize),
}

pub(super) fn identity(mode: AccessMode, watch: bool) -> Identity {
    Identity {
        owner: "host/vm".to_owned(),
        session: SessionId(77),
        queue: QueueId(if watch { u16::MAX } else { 0 }),
        mode,
        volume: "vol".to_owned(),
        watch,
        handoff: false,
    }
}

impl Pair {
    pub(super) fn new(size: usize, depth: usize) -> Self {
        Self::with(Server::new(size), identity(AccessMode::Owner, false), depth)
    }

    pub(super) fn with(server: Server, who: Identity, depth: usize) -> Self {
        let now = Instant::now();
        let grant = (!who.watch).then_some(Grant {
            volume: VolumeId(0xabc),
            epoch: Epoch(5),
            block_bytes: 512,
            size_bytes: server.disk.len() as u64,
            handoff: who.handoff,
        });
        let mut session = Session::new(who, Timing::default(), grant, depth, Seq(1), 7, now);
        session.start(now);
        Self {
            now,
            session,
            server,
            connection: Connection::default(),
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            unreachable: false,
            direct: false,
            flights: BTreeMap::new(),
            done: Vec::new(),
            notices: Vec::new(),
            moved: (0, 0),
        }
    }

    /// Another session of the same volume; each pair has a server of its own.
    pub(super) fn beside(self, other: &Self) -> Self {
        Self { session: self.session.on_ledger(other.session.ledger()), ..self }
    }

    pub(super) fn submit(&mut self, tag: u32, op: Op, mut memory: Memory) {
        let iov = memory.iov();
        // The vectors move, their heap memory does not.
        assert!(self.flights.insert(tag, memory).is_none(), "tag {tag} is in use");
        self.session.submit(Tag(tag), op, &iov);
    }

    pub(super) fn write(&mut self, tag: u32, offset: u64, data: &[u8]) {
        let lens = [data.len() / 3, 0, data.len() - data.len() / 3];
        self.submit(tag, Op::Write { offset }, Memory::new(&lens, Some(data)));
    }

    pub(super) fn read(&mut self, tag: u32, offset: u64, len: usize) {
        self.submit(tag, Op::Read { offset }, Memory::new(&[len / 2, len - len / 2], None));
    }

    /// Makes connections that are due.
    pub(super) fn connect(&mut self) {
        if self.session.wants_connect(self.now) {
            self.connection = Connection::default();
            self.to_server.clear();
            self.to_client.clear();
            self.session.connecting(self.now);
            if self.unreachable {
                let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
                self.session.dropped(self.now, DropReason::Connect(refused));
            } else {
                self.session.connected(self.now);
            }
        }
    }

    /// The session sends at most `limit` bytes.
    pub(super) fn send(&mut self, limit: usize) -> usize {
        let mut iov = Vec::new();
        let offered = self.session.gather(self.now, &mut iov, 9);
        let total: usize = iov.iter().map(|v| v.iov_len).sum();
        assert_eq!(total, offered);
        let mut left = limit.min(offered);
        let sent = left;
        for v in &iov {
            let n = v.iov_len.min(left);
            // SAFETY: the session names its own or the guest's memory, all alive.
            let part = unsafe { std::slice::from_raw_parts(v.iov_base.cast::<u8>(), n) };
            self.to_server.extend(part);
            left -= n;
        }
        self.session.sent(self.now, sent);
        if sent < offered {
            self.session.blocked();
        }
        sent
    }

    /// The server takes at most `limit` of the bytes sent to it.
    pub(super) fn serve(&mut self, limit: usize) -> usize {
        let n = limit.min(self.to_server.len());
        let bytes: Vec<u8> = self.to_server.drain(..n).collect();
        self.server.feed(&mut self.connection, &bytes);
        self.moved.0 += n;
        n
    }

    /// The server puts the reply at `index` on the wire.
    pub(super) fn answer(&mut self, index: usize) {
        let reply = self.connection.take_reply(index);
        self.to_client.extend(reply);
    }

    /// The session receives at most `limit` bytes.
    pub(super) fn receive(&mut self, limit: usize) -> usize {
        let n = limit.min(self.to_client.len());
        let mut bytes: Vec<u8> = self.to_client.drain(..n).collect();
        self.moved.1 += n;
        if self.direct {
            let mut iov = Vec::new();
            let (room, _) = self.session.payload_target(&mut iov, 3);
            let n = room.min(bytes.len());
            let mut at = 0;
            for v in &iov {
                let part = v.iov_len.min(n - at);
                // SAFETY: the session names buffers of a live READ.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), v.iov_base.cast(), part);
                }
                at += part;
            }
            if n > 0 {
                self.session.payload_received(self.now, n);
            }
            // Received only when the target was filled: else the stream ends there.
            if n == room {
                bytes.drain(..n);
            } else {
                bytes.clear();
            }
        }
        self.session.ingest(self.now, &bytes);
        self.collect();
        n
    }

    pub(super) fn collect(&mut self) {
        let before = self.done.len();
        self.session.take_completions(&mut self.done);
        for c in &self.done[before..] {
            assert!(self.flights.contains_key(&c.tag.0), "{c:?} was completed before");
        }
        while let Some(notice) = self.session.pop_notice() {
            self.notices.push(notice);
        }
        // The driver closes the socket when the session has none.
        if !self.session.is_open() {
            self.to_server.clear();
            self.to_client.clear();
        }
    }

    /// The connection breaks; bytes on their way are lost.
    pub(super) fn cut(&mut self) {
        self.session.dropped(self.now, DropReason::Closed);
        self.collect();
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.now += by;
        self.session.on_timer(self.now);
        self.collect();
    }

    /// Moves everything as far as it goes, without time.
    pub(super) fn drive(&mut self) {
        loop {
            self.connect();
            let mut moved = self.send(usize::MAX) + self.serve(usize::MAX);
            while !self.connection.replies.is_empty() {
                self.answer(0);
            }
            moved += self.receive(usize::MAX);
            if self.connection.closed && self.session.is_open() {
                self.cut();
            }
            if moved == 0 && !self.session.wants_connect(self.now) {
                return;
            }
        }
    }

    /// Drives, and lets pauses pass, until nothing is in flight.
    pub(super) fn settle(&mut self) {
        for _ in 0..200 {
            self.drive();
            if self.session.in_flight() == 0 {
                return;
            }
            self.advance(Duration::from_secs(1));
        }
        panic!("requests are still in flight: {:?}", self.session);
    }

    /// Takes a completed request's memory out.
    pub(super) fn finish(&mut self, tag: u32) -> (Result<(), IoError>, Vec<u8>) {
        let found: Vec<_> = self.done.iter().filter(|c| c.tag == Tag(tag)).collect();
        assert_eq!(found.len(), 1, "tag {tag} was completed {} times", found.len());
        let result = found[0].result;
        self.done.retain(|c| c.tag != Tag(tag));
        let memory = self.flights.remove(&tag).expect("in flight");
        memory.check_guards();
        (result, memory.data())
    }
}
