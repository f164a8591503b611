//! An NBD server's end of a connection, for the tests of the link: in clear text here,
//! through TLS in `sealed`.

mod sealed;

use std::time::Duration;

use super::super::session::{Opened, Wishes};
use super::super::wire::{self, REQUEST_BYTES};
use super::*;
use crate::baton::Timing;
use crate::link::tests as link;
use crate::link::tests::{DEPTH, Frame, SIZE_BYTES, Server, What};
use crate::volume::{Op, Tag};

/// HAS_FLAGS, FLUSH.
const FLAGS: u16 = 0b101;

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Begin,
    Flags,
    Options,
    Export,
}

/// A server in clear text.
struct Plain {
    payload_max: u32,
    at: At,
    tls: bool,
    inbox: Vec<u8>,
    heard: Vec<(u64, Frame)>,
    /// The client said goodbye.
    parted: bool,
}

fn option_reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for n in [option, kind, u32::try_from(body.len()).expect("short")] {
        bytes.extend(n.to_be_bytes());
    }
    bytes.extend(body);
    bytes
}

impl Plain {
    fn session(tls: bool) -> Session {
        let timing = Timing { backoff_min: Duration::ZERO, ..Timing::default() };
        let wishes = Wishes { export: "disk", map: false, tls };
        let mut session = Session::new(wishes, timing, 7, Instant::now());
        let opened = Opened { size_bytes: SIZE_BYTES, block_bytes: 512, read_only: false };
        session.set_opened(opened);
        session.set_depth(DEPTH);
        session
    }

    /// Takes `n` bytes off the front, when they are there.
    fn pull(&mut self, n: usize) -> Option<Vec<u8>> {
        (self.inbox.len() >= n).then(|| self.inbox.drain(..n).collect())
    }

    /// Takes one piece; what is to be sent for it. `None`: none is whole.
    fn step(&mut self) -> Option<Vec<u8>> {
        match self.at {
            At::Begin => {
                self.at = At::Flags;
                Some(b"NBDMAGICIHAVEOPT\0\x03".to_vec())
            }
            At::Flags => {
                assert_eq!(self.pull(4)?, [0, 0, 0, 3]);
                self.at = At::Options;
                Some(vec![])
            }
            At::Options => {
                let len = self.inbox.get(..16).map(|head| wire::u32_at(head, 12))?;
                let option = self.pull(16 + len as usize)?;
                let kind = wire::u32_at(&option, 8);
                match kind {
                    wire::OPT_STARTTLS if self.tls => Some(option_reply(kind, wire::REP_ACK, &[])),
                    wire::OPT_GO => {
                        self.at = At::Export;
                        Some(self.export())
                    }
                    _ => Some(option_reply(kind, wire::REP_ERR_UNSUP, &[])),
                }
            }
            At::Export => {
                let len = match self.inbox.get(..REQUEST_BYTES)? {
                    head if head[7] == 1 => wire::u32_at(head, 24),
                    _ => 0,
                };
                let frame = self.pull(REQUEST_BYTES + len as usize)?;
                assert_eq!(frame[..6], [0x25, 0x60, 0x95, 0x13, 0, 0], "a frame begins here");
                assert!(!self.parted, "something behind the goodbye");
                let what = match frame[7] {
                    2 => {
                        self.parted = true;
                        return Some(vec![]);
                    }
                    0 => What::Read,
                    1 => What::Write,
                    3 => What::Flush,
                    other => panic!("nobody asked for {other}"),
                };
                let (offset, len) = (wire::u64_at(&frame, 16), u64::from(wire::u32_at(&frame, 24)));
                let payload = frame[REQUEST_BYTES..].to_vec();
                self.heard.push((wire::u64_at(&frame, 8), Frame { what, offset, len, payload }));
                Some(vec![])
            }
        }
    }

    fn export(&self) -> Vec<u8> {
        let info = [&[0, 0][..], &SIZE_BYTES.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
        let mut blocks = vec![0, 3];
        for n in [512, 4096, self.payload_max] {
            blocks.extend(n.to_be_bytes());
        }
        [(wire::REP_INFO, info), (wire::REP_INFO, blocks), (wire::REP_ACK, vec![])]
            .map(|(kind, body)| option_reply(wire::OPT_GO, kind, &body))
            .concat()
    }
}

impl Server for Plain {
    type Session = Session;
    const WHOLE: bool = true;

    fn session() -> Session {
        Self::session(false)
    }

    fn submit(session: &mut Session, tag: Tag, op: Op, data: &[libc::iovec]) {
        session.submit(tag, op, data);
    }

    fn new(payload_max: u32) -> Self {
        Self {
            payload_max,
            at: At::Begin,
            tls: false,
            inbox: Vec::new(),
            heard: Vec::new(),
            parted: false,
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.inbox.extend_from_slice(bytes);
        std::iter::from_fn(|| self.step()).flatten().collect()
    }

    fn heard(&self) -> &[(u64, Frame)] {
        &self.heard
    }

    fn tail(&self) -> &[u8] {
        let begun = self.at == At::Export;
        if begun { self.inbox.get(REQUEST_BYTES..).unwrap_or_default() } else { &[] }
    }

    fn answer(&mut self, number: u64, frame: &Frame) -> Vec<u8> {
        let head = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &number.to_be_bytes()].concat();
        match frame.what {
            What::Read => [head, link::bytes(frame.offset, frame.len)].concat(),
            _ => head,
        }
    }
}

#[test]
fn a_break_at_each_byte_says_nothing_twice() {
    link::a_break_at_each_byte_says_nothing_twice::<Plain>(1);
}

#[test]
fn pieces_of_any_size_are_put_together() {
    link::pieces_of_any_size_are_put_together::<Plain>(1);
}

#[test]
fn a_batch_of_several_calls_is_said_once() {
    link::a_batch_of_several_calls_is_said_once::<Plain>(13);
}

#[test]
fn more_than_the_socket_holds_is_said_once() {
    link::more_than_the_socket_holds_is_said_once::<Plain>();
}
