//! What may be between a conversation and its socket, and how a link moves bytes
//! through it.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::errno::Errno;

use super::{Conversation, End, Link, Socket};
use crate::file::IOV_MAX;

/// Turns plain bytes into sealed ones and back, on one connection.
pub(crate) trait Seal: Sized {
    /// What is needed to begin.
    type Settings;
    type Error: std::fmt::Display;
    /// What a full [`Seal::receive`] takes, bytes.
    const RECEIVE_BYTES: usize;

    fn start(settings: &Self::Settings) -> Result<Self, Self::Error>;
    /// Its handshake is done.
    fn is_open(&self) -> bool;
    /// Goes on with its handshake as far as it goes.
    fn shake(&mut self) -> Result<(), Self::Error>;
    /// There are bytes that are sealed and not sent.
    fn has_sealed(&self) -> bool;
    /// Seals some of the `bytes` that `iov` names; how many.
    fn seal(&mut self, iov: &[libc::iovec], bytes: usize) -> Result<usize, Self::Error>;
    /// Sends what is sealed; true: all of it.
    fn flush(&mut self, fd: &OwnedFd) -> nix::Result<bool>;
    /// Takes in what arrived; how many bytes, zero at the end of the connection.
    fn receive(&mut self, fd: &OwnedFd) -> nix::Result<usize>;
    /// Plain bytes of what arrived: `None`, no more for now; zero, the server has
    /// ended the conversation.
    fn open(&mut self, into: &mut [u8]) -> Result<Option<usize>, Self::Error>;
    /// Says goodbye.
    fn close(&mut self);
    /// Why a server may have closed the connection before it served.
    fn hung_up(&self) -> Self::Error;
}

/// Nothing is ever between: the compiler leaves all of this out.
impl Seal for Infallible {
    type Settings = Self;
    type Error = Self;
    const RECEIVE_BYTES: usize = 0;

    fn start(settings: &Self) -> Result<Self, Self> {
        match *settings {}
    }
    fn is_open(&self) -> bool {
        match *self {}
    }
    fn shake(&mut self) -> Result<(), Self> {
        match *self {}
    }
    fn has_sealed(&self) -> bool {
        match *self {}
    }
    fn seal(&mut self, _: &[libc::iovec], _: usize) -> Result<usize, Self> {
        match *self {}
    }
    fn flush(&mut self, _: &OwnedFd) -> nix::Result<bool> {
        match *self {}
    }
    fn receive(&mut self, _: &OwnedFd) -> nix::Result<usize> {
        match *self {}
    }
    fn open(&mut self, _: &mut [u8]) -> Result<Option<usize>, Self> {
        match *self {}
    }
    fn close(&mut self) {
        match *self {}
    }
    fn hung_up(&self) -> Self {
        match *self {}
    }
}

impl<C: Conversation> Link<C> {
    pub(super) fn has_sealed(&self) -> bool {
        let seal = self.socket.as_ref().and_then(|socket| socket.seal.as_ref());
        seal.is_some_and(|seal| seal.has_sealed())
    }

    /// As [`Link::send_queued`], through a seal.
    pub(super) fn send_sealed(&mut self, now: Instant) -> Option<Errno> {
        let blocked = loop {
            let Socket { fd, seal, .. } = self.socket.as_mut()?;
            let seal = seal.as_mut()?;
            match seal.flush(fd) {
                Ok(true) => {}
                Ok(false) => break true,
                Err(error) => return Some(error),
            }
            if !seal.is_open() {
                break false;
            }
            self.iov.clear();
            let bytes = self.session.gather(now, &mut self.iov, IOV_MAX);
            if bytes == 0 {
                break false;
            }
            match seal.seal(&self.iov, bytes) {
                Ok(n) => self.session.sent(now, n),
                Err(error) => {
                    tracing::debug!(%error, "nothing more can be sealed");
                    return Some(Errno::EPROTO);
                }
            }
        };
        self.want_room(blocked)
    }

    /// As [`Link::receive`], through a seal.
    pub(super) fn receive_sealed(&mut self, now: Instant) {
        loop {
            let Some(Socket { fd, seal: Some(seal), .. }) = &mut self.socket else { return };
            let got = match seal.receive(fd) {
                Ok(0) | Err(Errno::ECONNRESET) if !self.session.is_ready() => {
                    let why = seal.hung_up();
                    return self.session.unsealed(now, why);
                }
                Ok(0) => return self.session.ended(now, End::Closed),
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return,
                Err(error) => return self.session.ended(now, End::Broken(error.into())),
            };
            if let Err(why) = self.unseal(now) {
                // The server is told why, if it can be.
                if let Some(Socket { fd, seal: Some(seal), .. }) = &mut self.socket {
                    let _ = seal.flush(fd);
                }
                return self.session.unsealed(now, why);
            }
            if got < C::Seal::RECEIVE_BYTES || !self.session.is_open() {
                return;
            }
        }
    }

    /// Gives the session what can be read of what arrived.
    fn unseal(&mut self, now: Instant) -> Result<(), <C::Seal as Seal>::Error> {
        while let (true, Some(Socket { seal: Some(seal), .. })) =
            (self.session.is_open(), &mut self.socket)
        {
            if !seal.is_open() {
                seal.shake()?;
                if !seal.is_open() {
                    return Ok(());
                }
                self.session.sealed();
            }
            match seal.open(&mut self.buffer)? {
                None => return Ok(()),
                Some(0) if !self.session.is_ready() => return Err(seal.hung_up()),
                Some(0) => {
                    self.session.ended(now, End::Closed);
                    return Ok(());
                }
                Some(n) => self.session.ingest(now, &self.buffer[..n]),
            }
        }
        Ok(())
    }

    /// The server has agreed to a seal.
    pub(super) fn begin_seal(&mut self, now: Instant) {
        let (Some(settings), Some(socket)) = (&self.settings, &mut self.socket) else { return };
        let begun = C::Seal::start(settings).and_then(|mut seal| {
            seal.shake()?;
            Ok(seal)
        });
        match begun {
            Ok(seal) => socket.seal = Some(seal),
            Err(why) => self.session.unsealed(now, why),
        }
    }
}
