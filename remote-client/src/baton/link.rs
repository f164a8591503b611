//! Baton's session on a [`link`](crate::link).

use std::convert::Infallible;
use std::time::Instant;

use super::session::{DropReason, Session, State};
use crate::link::{Conversation, End};
use crate::volume::Completion;

pub(crate) type Link = crate::link::Link<Session>;

impl Conversation for Session {
    type Seal = Infallible;
    type State = State;

    #[inline]
    fn state(&self) -> State {
        self.state()
    }
    #[inline]
    fn is_connecting(&self) -> bool {
        matches!(self.state(), State::Connecting { .. })
    }
    #[inline]
    fn is_ready(&self) -> bool {
        self.is_ready()
    }
    #[inline]
    fn is_open(&self) -> bool {
        self.is_open()
    }
    #[inline]
    fn has_socket(&self) -> bool {
        self.has_socket()
    }
    #[inline]
    fn is_over(&self) -> bool {
        matches!(self.state(), State::Fenced | State::Lost)
    }
    #[inline]
    fn in_flight(&self) -> usize {
        self.in_flight()
    }
    #[inline]
    fn take_completions(&mut self, completions: &mut Vec<Completion>) {
        self.take_completions(completions);
    }

    #[inline]
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

    #[inline]
    fn deadline(&self) -> Option<Instant> {
        self.deadline()
    }
    fn on_timer(&mut self, now: Instant) {
        self.on_timer(now);
    }

    #[inline]
    fn has_unsent(&self) -> bool {
        self.has_unsent()
    }
    #[inline]
    fn gather(&mut self, now: Instant, iov: &mut Vec<libc::iovec>, max: usize) -> usize {
        self.gather(now, iov, max)
    }
    #[inline]
    fn sent(&mut self, now: Instant, n: usize) {
        self.sent(now, n);
    }
    #[inline]
    fn blocked(&mut self) {
        self.blocked();
    }

    #[inline]
    fn payload_target(&self, iov: &mut Vec<libc::iovec>, max: usize) -> (usize, bool) {
        self.payload_target(iov, max)
    }
    #[inline]
    fn payload_received(&mut self, now: Instant, n: usize) {
        self.payload_received(now, n);
    }
    #[inline]
    fn prefers_direct(&self) -> bool {
        self.prefers_direct()
    }
    #[inline]
    fn ingest(&mut self, now: Instant, bytes: &[u8]) {
        self.ingest(now, bytes);
    }
    /// A near server's WELCOME may be there already, and how long it took is told.
    #[inline]
    fn times_answers(&self) -> bool {
        matches!(self.state(), State::Hello { .. })
    }

    fn unsealed(&mut self, _: Instant, why: Infallible) {
        match why {}
    }
}

#[cfg(test)]
mod tests;
