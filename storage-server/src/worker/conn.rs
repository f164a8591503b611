//! One connection as its worker holds it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_protocol::frame::{REPLY_HEADER_BYTES, REQUEST_HEADER_BYTES};
use baton_protocol::window::Window;
use baton_protocol::{AccessMode, Event, Opcode, ReplyHeader, Seq, Status};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use tokio::sync::OwnedSemaphorePermit;

use crate::gate::Principal;
use crate::listeners::Listening;
use crate::metrics::WorkerMetrics;
use crate::session::{self, Front, Identity};
use crate::volumes::{Ears, Lease, RunningVolume};

use super::ask::Asks;
use super::buffers::{InBuf, OutBuf, read_ahead};
use super::large_writes::{Filled, LargeWrites};
use super::rounds::Share;

/// Where the window of a connection lives.
#[derive(Debug)]
pub(crate) enum Place {
    /// The owner's: outlives the connection.
    Owner(Lease),
    /// A reader's or standby's: of this connection only.
    Other(Box<Window>),
}

impl Place {
    /// Everything up to `seq` was admitted or answered.
    pub(super) fn carried_in(&self, seq: Seq) {
        if let Self::Owner(lease) = self {
            lease.carried_in(seq);
        }
    }

    pub(super) fn window(&mut self) -> &mut Window {
        match self {
            Self::Owner(lease) => lease.window(),
            Self::Other(window) => window,
        }
    }
}

/// Shows the connection in the volume's list while it lives.
#[derive(Debug)]
pub(crate) struct Presence {
    pub(crate) id: u64,
    /// The client's name for itself.
    pub(crate) owner: Arc<str>,
    pub(crate) volume: Arc<RunningVolume>,
    /// Load of the worker that serves it, in `weight`s.
    pub(crate) load: Arc<AtomicUsize>,
    pub(crate) weight: usize,
    /// One of the connections the server may have.
    pub(crate) _permit: OwnedSemaphorePermit,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.load.fetch_sub(self.weight, Ordering::Relaxed);
        self.volume.disconnected(self.id);
    }
}

/// A connection that said HELLO and may be welcomed.
#[derive(Debug)]
pub(crate) struct Newcomer {
    pub(crate) socket: OwnedFd,
    pub(crate) identity: Identity,
    pub(crate) place: Place,
    pub(crate) presence: Presence,
    /// The WELCOME to send.
    pub(crate) welcome: Vec<u8>,
}

/// How a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Served.
    Open,
    /// Nothing is read any more; goes when its answers are sent.
    Closing,
    /// The peer broke the protocol and was told; what it sends is dropped until
    /// it closes, so that the reply is not lost to a reset.
    Lingering,
    /// The socket is useless; goes when its work elsewhere has ended.
    Dead,
}

/// A request that is answered when there is news.
#[derive(Debug)]
pub(super) struct Parked<K> {
    pub(super) seq: Seq,
    /// What its sender knows.
    pub(super) known: K,
    /// Has the worker told.
    pub(super) _listening: Listening<Ears>,
}

#[derive(Debug)]
pub(super) struct Conn {
    // Dropped first to last: the socket is closed before the place is free.
    pub(super) socket: OwnedFd,
    pub(super) identity: Identity,
    pub(super) input: InBuf,
    pub(super) large: LargeWrites,
    pub(super) output: OutBuf,
    /// Bytes that make the request at the front whole.
    pub(super) need: usize,
    pub(super) life: Life,
    /// Requests at other threads or the kernel.
    pub(super) inflight: usize,
    /// Bytes of read answers that are being read or wait in `late`.
    pub(super) held_bytes: usize,
    /// Whole answers that found no room in `output`.
    pub(super) late: VecDeque<Vec<u8>>,
    /// A parked EVENT and the last event its sender knows.
    pub(super) parked: Option<Parked<u64>>,
    /// A parked ACCESS: the version and the boot id that its sender knows.
    pub(super) access: Option<Parked<(u64, u64)>>,
    /// What was asked of the access record.
    pub(super) asks: Asks,
    /// The socket takes no more for now.
    pub(super) blocked: bool,
    /// In the worker's list of connections to look at.
    pub(super) queued: bool,
    /// For its next turn, among the worker's rounds.
    pub(super) waits: bool,
    /// There may be more to receive in that turn.
    pub(super) readable: bool,
    /// Of the worker's time.
    pub(super) share: Share,
    /// Something happened since the last sweep.
    pub(super) active: bool,
    /// Sweeps spent lingering or closing.
    pub(super) sweeps: u32,
    /// The last recv filled the receive buffer.
    pub(super) filled: bool,
    /// Our direction of a lingering connection is closed.
    said_last: bool,
    /// What epoll watches, reading and writing; `None` when it is not asked any more.
    pub(super) watching: Option<(bool, bool)>,
    // Before the place: when the next connection gets that, this one is not listed.
    pub(super) presence: Presence,
    pub(super) place: Place,
}

/// Requests of one connection that may be elsewhere at once.
pub(super) const INFLIGHT_MAX: usize = 256;
/// Bytes of read answers that one connection may hold outside its buffers.
pub(super) const HELD_BYTES_MAX: usize = 2 << 20;

impl Conn {
    pub(super) fn new(newcomer: Newcomer, piped_writes: bool) -> Self {
        let Newcomer { socket, identity, place, presence, welcome } = newcomer;
        let mut output = OutBuf::default();
        output.push(&welcome);
        Self {
            socket,
            identity,
            input: InBuf::default(),
            large: if piped_writes { LargeWrites::default() } else { LargeWrites::unused() },
            output,
            need: 0,
            life: Life::Open,
            inflight: 0,
            held_bytes: 0,
            late: VecDeque::new(),
            parked: None,
            access: None,
            asks: Asks::default(),
            blocked: false,
            queued: false,
            waits: false,
            readable: false,
            share: Share::default(),
            active: true,
            sweeps: 0,
            filled: false,
            said_last: false,
            watching: Some((true, false)),
            presence,
            place,
        }
    }

    pub(super) fn volume(&self) -> &Arc<RunningVolume> {
        &self.presence.volume
    }

    pub(super) fn principal(&self) -> Principal {
        if self.identity.mode == AccessMode::Owner { Principal::Owner } else { Principal::Reader }
    }

    /// Whether it must wait for its own earlier requests.
    pub(super) fn is_throttled(&self) -> bool {
        self.asks.opening
            || self.inflight >= INFLIGHT_MAX
            || self.held_bytes >= HELD_BYTES_MAX
            || !self.late.is_empty()
    }

    /// Nobody waits for what is parked any more.
    pub(super) fn forget_parked(&mut self) {
        self.parked = None;
        self.access = None;
        self.asks.give_up_seals();
    }

    /// What stands at the front.
    pub(super) fn front(&self) -> Front {
        session::front(self.input.unread(), self.large.held())
    }

    /// One call that receives so many payload bytes, unless one request needs more or a large write is expected. Says
    /// whether there is something new to look at.
    pub(super) fn receive(&mut self, payload_bytes: u64) -> bool {
        let received = self.input.unread().len();
        let alone = received == REQUEST_HEADER_BYTES;
        if (alone || self.large.are_expected())
            && let Front::Partial { need } = self.front()
        {
            self.need = need;
            if alone && self.large.take(need) {
                return self.receive_large();
            }
            if self.large.are_expected() {
                // Nothing of what follows.
                return self.receive_most(need - received);
            }
        }
        if self.large.held() > 0 {
            // A whole one, which comes first.
            return false;
        }
        self.receive_most(read_ahead(payload_bytes).max(self.need.saturating_sub(received)))
    }

    fn receive_most(&mut self, most: usize) -> bool {
        let room = self.input.room(self.need);
        let share = room.len().min(most);
        if share == 0 {
            return false;
        }
        match recv(self.socket.as_raw_fd(), &mut room[..share], MsgFlags::MSG_DONTWAIT) {
            Ok(0) => {
                self.end_of_input();
                true
            }
            Ok(n) => {
                self.active = true;
                self.input.received(n);
                self.filled = n == share;
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {
                self.filled = false;
                false
            }
            Err(_) => {
                self.life = Life::Dead;
                false
            }
        }
    }

    /// More of the large write whose header is at the front.
    fn receive_large(&mut self) -> bool {
        let missing = self.need - REQUEST_HEADER_BYTES - self.large.held();
        match self.large.fill(&self.socket, missing) {
            Ok(filled @ (Filled::Whole | Filled::Part(_))) => {
                self.active = true;
                self.filled = filled == Filled::Whole;
                self.filled
            }
            Ok(Filled::End) => {
                self.end_of_input();
                true
            }
            Ok(Filled::Unfit) => {
                let room = self.input.room(self.need);
                match self.large.give_up(room) {
                    Ok(n) => self.input.received(n),
                    Err(_) => self.life = Life::Dead,
                }
                true
            }
            Err(_) => {
                self.life = Life::Dead;
                false
            }
        }
    }

    fn end_of_input(&mut self) {
        self.life = Life::Closing;
        self.forget_parked();
    }

    /// Memory that it needs only while it is busy.
    pub(super) fn holds_much(&self) -> bool {
        self.input.is_large() || self.output.is_large() || self.large.has_pipe()
    }

    /// Reads and forgets; for a peer that lingers.
    pub(super) fn discard_input(&mut self) {
        let mut scrap = [0; 4096];
        match recv(self.socket.as_raw_fd(), &mut scrap, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(0) | Err(_) => self.life = Life::Dead,
        }
    }

    /// Sends what there is until the socket takes no more.
    pub(super) fn send(&mut self) {
        loop {
            while self.late.front().is_some_and(|answer| self.output.has_room(answer.len()))
                && let Some(answer) = self.late.pop_front()
            {
                self.output.push(&answer);
                self.held_bytes = self.held_bytes.saturating_sub(answer.len());
            }
            if self.output.is_empty() || self.life == Life::Dead {
                self.blocked = false;
                self.finish_lingering();
                return;
            }
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), self.output.unsent(), flags) {
                Ok(n) => {
                    self.active = true;
                    self.output.sent(n);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.blocked = true;
                    return;
                }
                Err(_) => self.life = Life::Dead,
            }
        }
    }

    /// Sends what there is, `head` behind it, and then `len` bytes from `payload`, which only the kernel looks at: one
    /// call. Says how many bytes of head and payload went; zero if the socket or the payload's memory would not have it.
    pub(super) fn send_from(&mut self, head: &[u8], payload: *const u8, len: usize) -> usize {
        let waiting = self.output.unsent();
        let part =
            |base: *const u8, len| libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len };
        let mut parts = [
            part(waiting.as_ptr(), waiting.len()),
            part(head.as_ptr(), head.len()),
            part(payload, len),
        ];
        // SAFETY: zeros are a message without anything.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (parts.as_mut_ptr(), parts.len());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the header names three buffers that live over the call and are only read; the kernel checks the last.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) };
        let Ok(sent) = usize::try_from(sent) else {
            // What it means is for `send` to say, which is next.
            return 0;
        };
        self.active = true;
        let before = sent.min(waiting.len());
        self.output.sent(before);
        sent - before
    }

    /// Adds an answer without payload.
    pub(super) fn answer(&mut self, opcode: Opcode, seq: Seq, status: Status) {
        let header = self.header(opcode, seq, status, 0);
        self.output.push(&header);
    }

    /// Adds an answer with a sentence.
    pub(super) fn answer_with(&mut self, opcode: Opcode, seq: Seq, status: Status, text: &str) {
        let text = text.as_bytes();
        let header = self.header(opcode, seq, status, text.len());
        self.output.push(&header);
        self.output.push(text);
    }

    pub(super) fn answer_event(&mut self, seq: Seq, event: &Event) {
        let body = event.encode();
        let header = self.header(Opcode::Event, seq, Status::Ok, body.len());
        self.output.push(&header);
        self.output.push(&body);
    }

    pub(super) fn header(
        &self,
        opcode: Opcode,
        seq: Seq,
        status: Status,
        payload: usize,
    ) -> [u8; REPLY_HEADER_BYTES] {
        reply_header(self.volume(), opcode, seq, status, payload)
    }

    /// After the reply to a violation: no more requests, and the peer's bytes are
    /// dropped until it has read the reply and closes.
    pub(super) fn linger(&mut self, metrics: &WorkerMetrics) {
        crate::metrics::add(&metrics.violations, 1);
        self.life = Life::Lingering;
        self.forget_parked();
        self.send();
    }

    /// The reply to a violation is the last thing we say.
    fn finish_lingering(&mut self) {
        if self.life != Life::Lingering || self.said_last {
            return;
        }
        self.said_last = true;
        if shutdown(self.socket.as_raw_fd(), Shutdown::Write).is_err() {
            self.life = Life::Dead;
        }
    }

    /// Whether nothing holds it any more.
    pub(super) fn is_over(&self) -> bool {
        match self.life {
            Life::Open | Life::Lingering => false,
            Life::Closing => self.inflight == 0 && self.late.is_empty() && self.output.is_empty(),
            Life::Dead => self.inflight == 0,
        }
    }
}

/// The bytes of a reply's header.
pub(super) fn reply_header(
    volume: &RunningVolume,
    opcode: Opcode,
    seq: Seq,
    status: Status,
    payload: usize,
) -> [u8; REPLY_HEADER_BYTES] {
    ReplyHeader {
        opcode,
        flags: 0,
        status,
        seq,
        epoch: volume.epoch(),
        payload_len: u32::try_from(payload).expect("no reply is longer than a frame may be"),
        payload_crc32c: 0,
    }
    .encode()
}
