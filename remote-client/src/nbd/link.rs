//! NBD's session on a [`link`](crate::link), in clear text or through TLS.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::session::{DropReason, Session, State};
use super::tls::{Channel, TlsError, TlsSettings};
use crate::link::{Conversation, End, GOODBYE_BYTES_MAX, Seal};
use crate::volume::Completion;

pub(crate) type Link = crate::link::Link<Session>;

impl Link {
    /// Connected, and nothing is under way.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.session_ref().is_at_rest()
    }

    /// Requests may reach so far.
    pub(crate) fn has_size(&self, size_bytes: u64) -> bool {
        self.session_ref().has_size(size_bytes)
    }
}

impl Conversation for Session {
    type Seal = Box<Channel>;
    type State = State;

    fn state(&self) -> State {
        self.state()
    }
    fn is_connecting(&self) -> bool {
        matches!(self.state(), State::Connecting { .. })
    }
    fn is_ready(&self) -> bool {
        self.is_ready()
    }
    fn is_open(&self) -> bool {
        self.is_open()
    }
    fn has_socket(&self) -> bool {
        self.has_socket()
    }
    fn is_over(&self) -> bool {
        self.state() == State::Lost
    }
    fn in_flight(&self) -> usize {
        self.in_flight()
    }
    fn take_completions(&mut self, completions: &mut Vec<Completion>) {
        self.take_completions(completions);
    }

    fn wants_connect(&self, now: Instant) -> bool {
        self.wants_connect(now)
    }
    fn connecting(&mut self, now: Instant) {
        self.connecting(now);
    }
    fn connected(&mut self, now: Instant) {
        self.connected(now);
    }
    fn ended(&mut self, now: Instant, end: End) {
        self.dropped(
            now,
            match end {
                End::Connect(error) => DropReason::Connect(error),
                End::Closed => DropReason::Closed,
                End::Broken(error) => DropReason::Broken(error),
            },
        );
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline()
    }
    fn on_timer(&mut self, now: Instant) {
        self.on_timer(now);
    }

    fn has_unsent(&self) -> bool {
        self.has_unsent()
    }
    fn gather(&mut self, _: Instant, iov: &mut Vec<libc::iovec>, max: usize) -> usize {
        self.gather(iov, max)
    }
    fn sent(&mut self, _: Instant, n: usize) {
        self.sent(n);
    }
    fn blocked(&mut self) {
        self.blocked();
    }

    fn payload_target(&self, iov: &mut Vec<libc::iovec>, max: usize) -> (usize, bool) {
        self.payload_target(iov, max)
    }
    fn payload_received(&mut self, now: Instant, n: usize) {
        if let Err(reason) = self.payload_received(n) {
            self.dropped(now, reason);
        }
    }
    fn prefers_direct(&self) -> bool {
        self.prefers_direct()
    }
    fn ingest(&mut self, now: Instant, bytes: &[u8]) {
        self.ingest(now, bytes);
    }

    fn take_seal(&mut self) -> bool {
        self.take_secure()
    }
    fn sealed(&mut self) {
        self.secured();
    }
    fn unsealed(&mut self, now: Instant, why: TlsError) {
        self.dropped(now, DropReason::Tls(why));
    }

    fn goodbye(&self) -> Option<([u8; GOODBYE_BYTES_MAX], usize)> {
        self.goodbye()
    }
}

impl Seal for Box<Channel> {
    type Settings = TlsSettings;
    type Error = TlsError;
    const RECEIVE_BYTES: usize = Channel::RECEIVE_BYTES;

    fn start(settings: &TlsSettings) -> Result<Self, TlsError> {
        settings.start().map(Box::new)
    }
    fn is_open(&self) -> bool {
        Channel::is_open(self)
    }
    fn shake(&mut self) -> Result<(), TlsError> {
        Channel::shake(self)
    }
    fn has_sealed(&self) -> bool {
        Channel::has_sealed(self)
    }
    fn seal(&mut self, iov: &[libc::iovec], bytes: usize) -> Result<usize, TlsError> {
        Channel::seal(self, iov, bytes)
    }
    fn flush(&mut self, fd: &OwnedFd) -> nix::Result<bool> {
        Channel::flush(self, fd)
    }
    fn receive(&mut self, fd: &OwnedFd) -> nix::Result<usize> {
        Channel::receive(self, fd)
    }
    fn open(&mut self, into: &mut [u8]) -> Result<Option<usize>, TlsError> {
        Channel::open(self, into)
    }
    fn close(&mut self) {
        Channel::close(self);
    }
    fn hung_up(&self) -> TlsError {
        Channel::hung_up(self)
    }
}

#[cfg(test)]
mod tests;
