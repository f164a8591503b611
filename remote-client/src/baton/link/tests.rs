//! Baton's end of a connection, for the tests of the link.

use std::time::Duration;

use baton_protocol::frame::REQUEST_HEADER_BYTES;
use baton_protocol::message::Welcome;
use baton_protocol::{
    AccessMode, Epoch, Features, Opcode, QueueId, ReplyHeader, RequestHeader, Seq, SessionId,
    Status, VolumeId,
};

use super::super::session::{Grant, Identity, Timing};
use super::*;
use crate::link::tests as link;
use crate::link::tests::{DEPTH, Frame, SIZE_BYTES, Server, What};
use crate::volume::{Op, Tag};

const EPOCH: Epoch = Epoch(5);

struct Storage {
    payload_max: u32,
    welcomed: bool,
    inbox: Vec<u8>,
    heard: Vec<(u64, Frame)>,
}

fn reply(opcode: Opcode, seq: u64, body: &[u8]) -> Vec<u8> {
    let header = ReplyHeader {
        opcode,
        flags: 0,
        status: Status::Ok,
        seq: Seq(seq),
        epoch: EPOCH,
        payload_len: u32::try_from(body.len()).expect("short"),
        payload_crc32c: 0,
    };
    [&header.encode()[..], body].concat()
}

impl Storage {
    fn welcome(&self) -> Vec<u8> {
        let welcome = Welcome {
            version: 1,
            mode: AccessMode::Owner,
            read_only: false,
            block_bytes: 512,
            volume: VolumeId(0xabc),
            epoch: EPOCH,
            size_bytes: SIZE_BYTES,
            features: Features::default(),
            payload_bytes_max: self.payload_max,
            window_requests: 1024,
            discard_bytes: 4096,
            boot_id: 1,
            event_id: 0,
            durability_generation: 1,
        };
        reply(Opcode::Hello, 0, &welcome.encode())
    }

    fn head(&self) -> Option<(RequestHeader, usize)> {
        let head = self.inbox.first_chunk::<REQUEST_HEADER_BYTES>()?;
        let header = RequestHeader::decode(head).expect("a frame begins here");
        Some((header, REQUEST_HEADER_BYTES + header.payload_len as usize))
    }
}

impl Server for Storage {
    type Session = Session;
    const WHOLE: bool = false;

    fn session() -> Session {
        let who = Identity {
            owner: "host/vm".to_owned(),
            session: SessionId(77),
            queue: QueueId(0),
            mode: AccessMode::Owner,
            volume: "vol".to_owned(),
            watch: false,
            handoff: false,
        };
        let grant = Grant {
            volume: VolumeId(0xabc),
            epoch: EPOCH,
            block_bytes: 512,
            size_bytes: SIZE_BYTES,
            handoff: false,
        };
        let timing = Timing { backoff_min: Duration::ZERO, ..Timing::default() };
        let now = Instant::now();
        let mut session = Session::new(who, timing, Some(grant), DEPTH, Seq(1), 7, now);
        session.start(now);
        session
    }

    fn submit(session: &mut Session, tag: Tag, op: Op, data: &[libc::iovec]) {
        session.submit(tag, op, data);
    }

    fn new(payload_max: u32) -> Self {
        Self { payload_max, welcomed: false, inbox: Vec::new(), heard: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.inbox.extend_from_slice(bytes);
        let mut out = Vec::new();
        while let Some((header, whole)) = self.head().filter(|(_, n)| self.inbox.len() >= *n) {
            let frame: Vec<u8> = self.inbox.drain(..whole).collect();
            let what = match header.opcode {
                Opcode::Hello if !self.welcomed => {
                    self.welcomed = true;
                    out = self.welcome();
                    continue;
                }
                Opcode::Read => What::Read,
                Opcode::Write => What::Write,
                Opcode::Flush => What::Flush,
                other => panic!("nobody asked for {other:?}"),
            };
            assert!(self.welcomed && header.epoch == EPOCH, "{header:?}");
            let payload = frame[REQUEST_HEADER_BYTES..].to_vec();
            let (offset, len) = (header.offset, header.len);
            self.heard.push((header.seq.0, Frame { what, offset, len, payload }));
        }
        out
    }

    fn heard(&self) -> &[(u64, Frame)] {
        &self.heard
    }

    fn tail(&self) -> &[u8] {
        if self.welcomed { self.inbox.get(REQUEST_HEADER_BYTES..).unwrap_or_default() } else { &[] }
    }

    fn answer(&mut self, number: u64, frame: &Frame) -> Vec<u8> {
        match frame.what {
            What::Read => reply(Opcode::Read, number, &link::bytes(frame.offset, frame.len)),
            What::Write => reply(Opcode::Write, number, &[]),
            What::Flush => reply(Opcode::Flush, number, &[]),
        }
    }
}

#[test]
fn a_break_at_each_byte_says_nothing_twice() {
    link::a_break_at_each_byte_says_nothing_twice::<Storage>(1);
}

#[test]
fn pieces_of_any_size_are_put_together() {
    link::pieces_of_any_size_are_put_together::<Storage>(1);
}

#[test]
fn a_batch_of_several_calls_is_said_once() {
    link::a_batch_of_several_calls_is_said_once::<Storage>(13);
}

#[test]
fn more_than_the_socket_holds_is_said_once() {
    link::more_than_the_socket_holds_is_said_once::<Storage>();
}
