//! A small storage server in memory, for tests: bytes in, bytes out, one volume,
//! one session, no clock. It checks what clients promise: sequence numbers stay
//! in the window, nothing is sent before WELCOME, no change runs twice.

use std::collections::{BTreeMap, BTreeSet};

use baton_protocol::access::AccessRecord;
use baton_protocol::frame::REQUEST_HEADER_BYTES;
use baton_protocol::handoff::HandoffRequest;
use baton_protocol::message::{Event, Welcome};
use baton_protocol::window::{Arrival, Window};
use baton_protocol::{
    AccessMode, Epoch, Features, Hello, Opcode, QueueId, ReplyHeader, RequestHeader, Seq, Status,
    VolumeId,
};

#[path = "record.rs"]
mod record;

/// State that outlives connections.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) disk: Vec<u8>,
    pub(crate) volume: VolumeId,
    pub(crate) epoch: Epoch,
    pub(crate) block_bytes: u32,
    pub(crate) payload_max: u32,
    pub(crate) window_requests: u32,
    pub(crate) last_event: u64,
    /// The event that a connection learns as soon as it asks, if it does not know it.
    pub(crate) latest: Option<Event>,
    /// Durability generation; zero: the server does not say.
    pub(crate) generation: u64,
    /// Answer every HELLO with this.
    pub(crate) refuse: Option<Status>,
    /// Answer every request after HELLO with this.
    pub(crate) refuse_requests: Option<Status>,
    /// By queue.
    pub(super) windows: BTreeMap<u16, Window>,
    ran: BTreeSet<(u16, u64)>,
    /// HELLOs seen: queue, epoch, resume_from.
    pub(crate) hellos: Vec<(u16, u64, u64)>,
    pub(crate) pings: usize,
    pub(crate) requests: usize,
    pub(crate) released: bool,
    /// Refuse a client that breaks the protocol instead of failing the test: it
    /// was lied to.
    pub(crate) lenient: bool,
    /// The server can hand over, and this says who may.
    pub(crate) record: Option<AccessRecord>,
    pub(crate) boot_id: u64,
    /// Every HANDOFF request that arrived.
    pub(crate) asked: Vec<HandoffRequest>,
    /// Highest seq that arrived, by queue.
    pub(super) highest: BTreeMap<u16, u64>,
    /// Epochs that requests carried.
    pub(crate) epochs: BTreeSet<u64>,
    /// OPENs that arrived.
    pub(crate) opened: usize,
}

/// One connection.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    input: Vec<u8>,
    /// Set by HELLO.
    queue: Option<QueueId>,
    /// Epoch of the WELCOME.
    epoch: Epoch,
    /// Sequence numbers whose replies are not on the wire.
    unanswered: BTreeSet<u64>,
    /// Replies in the order they were made; the test sends them as it likes.
    pub(crate) replies: Vec<Vec<u8>>,
    /// The parked EVENT: seq and last known event.
    pub(crate) parked: Option<(Seq, u64)>,
    /// The parked ACCESS: seq, boot id and version known.
    pub(crate) access: Option<(Seq, u64, u64)>,
    /// A SEAL that waits for what was sent.
    pub(crate) seal: Option<(Seq, HandoffRequest)>,
    /// As what it was welcomed, or opened since.
    pub(crate) mode: Option<AccessMode>,
    /// No more replies; close it.
    pub(crate) closed: bool,
}

impl Connection {
    /// Whose connection this is, after HELLO.
    #[allow(dead_code, reason = "used where there are several connections")]
    pub(crate) fn queue(&self) -> Option<QueueId> {
        self.queue
    }

    /// Takes the reply at `index` to put it on the wire.
    pub(crate) fn take_reply(&mut self, index: usize) -> Vec<u8> {
        let reply = self.replies.remove(index);
        if let Some(header) = reply.first_chunk().and_then(|h| ReplyHeader::decode(h).ok()) {
            self.unanswered.remove(&header.seq.0);
        }
        reply
    }
}

impl Server {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            disk: vec![0; size],
            volume: VolumeId(0xabc),
            epoch: Epoch(5),
            block_bytes: 512,
            payload_max: 1 << 20,
            window_requests: 1024,
            last_event: 0,
            latest: None,
            generation: 1,
            refuse: None,
            refuse_requests: None,
            windows: BTreeMap::new(),
            ran: BTreeSet::new(),
            hellos: Vec::new(),
            pings: 0,
            requests: 0,
            released: false,
            lenient: false,
            record: None,
            boot_id: 1,
            asked: Vec::new(),
            epochs: BTreeSet::new(),
            highest: BTreeMap::new(),
            opened: 0,
        }
    }

    /// The process was killed and started: what was only in memory is gone.
    pub(crate) fn restart(&mut self) {
        self.windows.clear();
        self.ran.clear();
        self.last_event = 0;
        self.latest = None;
    }

    /// Takes bytes of one connection.
    pub(crate) fn feed(&mut self, c: &mut Connection, bytes: &[u8]) {
        c.input.extend_from_slice(bytes);
        while !c.closed {
            let Some(head) = c.input.first_chunk::<REQUEST_HEADER_BYTES>() else { return };
            let header = RequestHeader::decode(head).expect("a client sends valid headers");
            let whole = REQUEST_HEADER_BYTES + header.payload_len as usize;
            if c.input.len() < whole {
                return;
            }
            let payload = c.input[REQUEST_HEADER_BYTES..whole].to_vec();
            c.input.drain(..whole);
            self.request(c, &header, &payload);
        }
    }

    fn request(&mut self, c: &mut Connection, h: &RequestHeader, payload: &[u8]) {
        let Some(queue) = c.queue else {
            assert_eq!(h.opcode, Opcode::Hello, "HELLO is first");
            return self.hello(c, h, payload);
        };
        self.requests += 1;
        assert_ne!(h.opcode, Opcode::Hello, "one HELLO per connection");
        assert_eq!(h.queue, queue);
        self.epochs.insert(h.epoch.0);
        let highest = self.highest.entry(queue.0).or_default();
        *highest = h.seq.0.max(*highest);
        if self.record.is_some() {
            if let Some(done) = self.handoff_request(c, h, payload) {
                return done;
            }
        } else {
            assert_eq!(h.epoch, c.epoch, "requests carry the epoch of the WELCOME");
        }
        if self.record.is_none() && h.epoch != self.epoch {
            return self.reply(c, h, Status::StaleEpoch, b"fenced");
        }
        if let Some(status) = self.refuse_requests {
            return self.reply(c, h, status, b"told to");
        }
        let window = self.windows.get_mut(&queue.0).expect("made by HELLO");
        let arrival = window.arrive(h.seq);
        c.unanswered.insert(h.seq.0);
        let oldest = c.unanswered.first().copied().unwrap_or(h.seq.0);
        let broken = if !matches!(arrival, Arrival::New | Arrival::Done) {
            Some("a number outside the window")
        } else if h.seq.0.saturating_sub(oldest) >= u64::from(self.window_requests) {
            Some("more requests than the WELCOME allowed")
        } else if matches!(h.opcode, Opcode::Read | Opcode::Write)
            && h.len > u64::from(self.payload_max)
        {
            Some("a frame larger than the WELCOME allowed")
        } else {
            None
        };
        if let Some(broken) = broken {
            assert!(self.lenient, "{broken}: {h:?} {arrival:?}");
            self.reply(c, h, Status::Protocol, broken.as_bytes());
            c.closed = true;
            return;
        }
        if h.opcode == Opcode::Event {
            c.parked = Some((h.seq, h.offset));
            // It may have happened between WELCOME and this request.
            if let Some(event) = self.latest.filter(|event| event.id > h.offset) {
                self.tell_event(c, event);
            }
            return;
        }
        if arrival == Arrival::Done && h.opcode.is_mutation() {
            return self.reply(c, h, Status::Ok, b"");
        }
        let (status, data) = self.run(queue, h, payload);
        if status == Status::Ok {
            self.windows.get_mut(&queue.0).expect("made by HELLO").complete(h.seq);
        }
        self.reply(c, h, status, &data);
    }

    fn run(&mut self, queue: QueueId, h: &RequestHeader, payload: &[u8]) -> (Status, Vec<u8>) {
        let mut range = 0..0;
        if h.opcode.has_range() {
            let size = self.disk.len() as u64;
            if h.offset.checked_add(h.len).is_none_or(|end| end > size) {
                return (Status::OutOfRange, Vec::new());
            }
            let at = |byte: u64| usize::try_from(byte).expect("in memory");
            range = at(h.offset)..at(h.offset + h.len);
        }
        if h.opcode.is_mutation() {
            assert!(self.ran.insert((queue.0, h.seq.0)), "{h:?} ran twice");
        }
        match h.opcode {
            Opcode::Read => {
                return (Status::Ok, self.disk[range].to_vec());
            }
            Opcode::Write => {
                assert_eq!(payload.len() as u64, h.len);
                self.disk[range].copy_from_slice(payload);
            }
            Opcode::Discard | Opcode::WriteZeroes => self.disk[range].fill(0),
            Opcode::Ping => self.pings += 1,
            Opcode::Access | Opcode::Handoff | Opcode::Open => panic!("not asked for yet"),
            Opcode::Release => self.released = true,
            Opcode::Flush => {}
            Opcode::Hello | Opcode::Event => unreachable!("handled before"),
        }
        (Status::Ok, Vec::new())
    }

    fn hello(&mut self, c: &mut Connection, h: &RequestHeader, payload: &[u8]) {
        let hello = Hello::decode(payload).expect("a client sends valid HELLOs");
        self.hellos.push((h.queue.0, h.epoch.0, hello.resume_from.0));
        let status = match self.refuse {
            Some(status) => status,
            None if self.record.is_none()
                && hello.mode == AccessMode::Owner
                && h.epoch.0 != 0
                && h.epoch != self.epoch =>
            {
                Status::StaleEpoch
            }
            None => Status::Ok,
        };
        let status = match self.judge_hello(h, &hello) {
            Some(judged) if status == Status::Ok => judged,
            _ => status,
        };
        if status != Status::Ok {
            self.reply(c, h, status, b"the server says no");
            c.closed = true;
            return;
        }
        c.queue = Some(h.queue);
        c.mode = Some(hello.mode);
        c.epoch = self.epoch;
        self.windows
            .entry(h.queue.0)
            .or_insert_with(|| Window::starting_at(hello.resume_from))
            .forget_below(hello.resume_from);
        let welcome = Welcome {
            version: 1,
            mode: hello.mode,
            read_only: false,
            block_bytes: self.block_bytes,
            volume: self.volume,
            epoch: self.epoch,
            size_bytes: self.disk.len() as u64,
            features: match &self.record {
                Some(_) => hello.features.common(Features::HANDOFF),
                None => Features::default(),
            },
            payload_bytes_max: self.payload_max,
            window_requests: self.window_requests,
            discard_bytes: 4096,
            boot_id: self.boot_id,
            event_id: self.last_event,
            durability_generation: self.generation,
        };
        self.reply(c, h, Status::Ok, &welcome.encode());
    }

    /// Answers the parked EVENT request with a body made by the test.
    pub(crate) fn tell(&mut self, c: &mut Connection, id: u64, body: &[u8]) {
        self.last_event = id;
        let Some((seq, known)) = c.parked.take() else { return };
        assert!(known < id, "the client knows event {known} already");
        let queue = c.queue.expect("parked after HELLO");
        self.windows.get_mut(&queue.0).expect("made by HELLO").complete(seq);
        c.replies.push(frame(Opcode::Event, Status::Ok, seq, self.epoch, body));
    }

    /// Answers the parked EVENT request.
    pub(crate) fn tell_event(&mut self, c: &mut Connection, event: Event) {
        self.tell(c, event.id, &event.encode());
    }

    pub(super) fn reply(&self, c: &mut Connection, h: &RequestHeader, status: Status, body: &[u8]) {
        c.replies.push(frame(h.opcode, status, h.seq, self.epoch, body));
    }
}

/// The bytes of a reply.
pub(crate) fn frame(
    opcode: Opcode,
    status: Status,
    seq: Seq,
    epoch: Epoch,
    body: &[u8],
) -> Vec<u8> {
    let header = ReplyHeader {
        opcode,
        flags: 0,
        status,
        seq,
        epoch,
        payload_len: u32::try_from(body.len()).expect("small"),
        payload_crc32c: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(body);
    bytes
}
