//! The incoming half of a session: whatever bytes arrive, in whatever pieces.
//! Everything a server says is checked against what was asked.

use super::allocation::{Form, Partial, bytes_of};
use super::errno::{Outcome, outcome};
use super::session::{DropReason, Session, State, Violation};
use super::wire::{
    ChunkKind, Command, Dialect, REPLY_BYTES_MAX, ReplyHead, error_chunk, hole_chunk, reply_bytes,
};
use crate::cursor::{Cursor, copy_out};

/// Longest body other than data: an error with its offset and a sentence.
const BODY_BYTES_MAX: usize = 6 + 4096 + 8;

/// Where the incoming stream is.
#[derive(Clone, Copy, Debug)]
enum At {
    Head {
        filled: usize,
    },
    /// A small body, in `Receive::body`.
    Body {
        number: u64,
        kind: ChunkKind,
        done: bool,
        len: usize,
        filled: usize,
    },
    /// READ data on its way to guest memory; `left` bytes are missing.
    Data {
        number: u64,
        at: Cursor,
        left: usize,
        done: bool,
    },
    /// Descriptors; `left` bytes are missing.
    Map {
        number: u64,
        form: Form,
        left: usize,
        done: bool,
    },
}

#[derive(Debug)]
pub(super) struct Receive {
    at: At,
    head: [u8; REPLY_BYTES_MAX],
    body: Box<[u8; BODY_BYTES_MAX]>,
    /// Of a chunk of data or descriptors: its bytes behind the head.
    data_bytes: usize,
    partial: Partial,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            at: At::Head { filled: 0 },
            head: [0; REPLY_BYTES_MAX],
            body: Box::new([0; BODY_BYTES_MAX]),
            data_bytes: 0,
            partial: Partial::default(),
        }
    }
}

impl Receive {
    pub(super) fn reset(&mut self) {
        self.at = At::Head { filled: 0 };
    }
}

impl Session {
    /// Takes some bytes; how many.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<usize, DropReason> {
        match self.receive.at {
            At::Head { filled } => self.take_head(filled, bytes),
            At::Body { number, kind, done, len, filled } => {
                let n = (len - filled).min(bytes.len());
                self.receive.body[filled..filled + n].copy_from_slice(&bytes[..n]);
                if filled + n < len {
                    self.receive.at = At::Body { number, kind, done, len, filled: filled + n };
                } else {
                    self.receive.reset();
                    self.on_body(number, kind, done, len)?;
                }
                Ok(n)
            }
            At::Data { number, at, left, done } => {
                let n = left.min(bytes.len());
                if let Some(child) = self.table.unanswered(number) {
                    copy_out(self.table.buffers(child), at, &bytes[..n]);
                }
                self.data_arrived(number, at, left, done, n)?;
                Ok(n)
            }
            At::Map { number, form, left, done } => self.take_map(number, form, left, done, bytes),
        }
    }

    /// Appends the guest memory that the next bytes belong to; the bytes, and
    /// whether they reach the end of the payload.
    pub(crate) fn payload_target(&self, iov: &mut Vec<libc::iovec>, max: usize) -> (usize, bool) {
        match self.receive.at {
            At::Data { number, at, left, .. } if matches!(self.state, State::Ready { .. }) => {
                let Some(child) = self.table.unanswered(number) else { return (0, true) };
                let n = at.push(self.table.buffers(child), left, iov, max);
                (n, n == left)
            }
            _ => (0, true),
        }
    }

    /// `n` bytes were read into the [`Session::payload_target`].
    pub(crate) fn payload_received(&mut self, n: usize) -> Result<(), DropReason> {
        match self.receive.at {
            At::Data { number, at, left, done } => {
                self.data_arrived(number, at, left, done, n.min(left))
            }
            _ => Ok(()),
        }
    }

    /// Whether payloads are expected that are worth reading straight into guest
    /// memory.
    pub(crate) fn prefers_direct(&self) -> bool {
        self.table.has_direct_read()
    }

    fn data_arrived(
        &mut self,
        number: u64,
        mut at: Cursor,
        left: usize,
        done: bool,
        n: usize,
    ) -> Result<(), DropReason> {
        if n < left {
            if let Some(child) = self.table.unanswered(number) {
                at.advance(self.table.buffers(child), n);
            }
            self.receive.at = At::Data { number, at, left: left - n, done };
            return Ok(());
        }
        self.receive.reset();
        if done { self.conclude(number) } else { Ok(()) }
    }

    fn take_head(&mut self, filled: usize, bytes: &[u8]) -> Result<usize, DropReason> {
        let dialect = self.export.map_or(Dialect::Simple, |export| export.dialect);
        let (mut filled, mut used) = (filled, 0);
        // First the magic, which says how long the head is.
        for magic_only in [true, false] {
            let head = &mut self.receive.head;
            let whole = match magic_only {
                true => 4,
                false => reply_bytes([head[0], head[1], head[2], head[3]], dialect)
                    .map_err(Violation::from)?,
            };
            let n = whole.saturating_sub(filled).min(bytes.len() - used);
            head[filled..filled + n].copy_from_slice(&bytes[used..used + n]);
            (filled, used) = (filled + n, used + n);
            if filled < whole {
                self.receive.at = At::Head { filled };
                return Ok(used);
            }
        }
        self.receive.reset();
        let head = ReplyHead::decode(&self.receive.head, dialect).map_err(Violation::from)?;
        self.on_head(head, dialect)?;
        Ok(used)
    }

    fn on_head(&mut self, head: ReplyHead, dialect: Dialect) -> Result<(), DropReason> {
        let (ReplyHead::Simple { cookie: number, .. } | ReplyHead::Chunk { cookie: number, .. }) =
            head;
        // An answer before the request was sent whole cannot be one to it.
        let child = self.table.unanswered(number).filter(|_| self.has_sent(number));
        let child = *child.ok_or(Violation::NotAsked)?;
        match head {
            ReplyHead::Simple { error: 0, .. } if child.command == Command::Read => {
                // proto.md: READ is answered in chunks once they were agreed.
                if dialect != Dialect::Simple {
                    return Err(Violation::NotAsked.into());
                }
                let left = child.len as usize;
                self.set_received(number, child.len);
                self.receive.at = At::Data { number, at: child.at, left, done: true };
            }
            ReplyHead::Simple { error: 0, .. } if child.command == Command::BlockStatus => {
                return Err(Violation::Short.into());
            }
            ReplyHead::Simple { error: 0, .. } => self.finish(number, Ok(())),
            ReplyHead::Simple { error, .. } => match outcome(child.command, error) {
                Outcome::Answer(result) => self.finish(number, result),
                Outcome::GoingAway => return Err(DropReason::GoingAway),
            },
            ReplyHead::Chunk { done, kind, len, .. } => {
                return self.on_chunk(number, child.command, done, kind, len);
            }
        }
        Ok(())
    }

    fn on_chunk(
        &mut self,
        number: u64,
        command: Command,
        done: bool,
        kind: ChunkKind,
        len: u64,
    ) -> Result<(), DropReason> {
        let wrong = Violation::ChunkLength(len);
        let len = usize::try_from(len).map_err(|_| wrong)?;
        let is_read = command == Command::Read;
        let body = match kind {
            ChunkKind::None if len == 0 && done => return self.conclude(number),
            ChunkKind::OffsetData if is_read && len > 8 => {
                self.receive.data_bytes = len - 8;
                8
            }
            ChunkKind::OffsetHole if is_read && len == 12 => 12,
            ChunkKind::BlockStatus(form) if command == Command::BlockStatus && form.fits(len) => {
                self.receive.data_bytes = len - form.head_bytes();
                form.head_bytes()
            }
            ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError(_)
                if (4..=BODY_BYTES_MAX).contains(&len) =>
            {
                len
            }
            _ => return Err(wrong.into()),
        };
        self.receive.at = At::Body { number, kind, done, len: body, filled: 0 };
        Ok(())
    }

    fn on_body(
        &mut self,
        number: u64,
        kind: ChunkKind,
        done: bool,
        len: usize,
    ) -> Result<(), DropReason> {
        let child = *self.table.unanswered(number).ok_or(Violation::NotAsked)?;
        match kind {
            ChunkKind::OffsetData | ChunkKind::OffsetHole => {
                let body: &[u8; 12] = self.receive.body.first_chunk().expect("longer than 12");
                let (from, hole) = hole_chunk(body);
                let bytes = match kind {
                    ChunkKind::OffsetHole => u64::from(hole),
                    _ => self.receive.data_bytes as u64,
                };
                let first = from.checked_sub(child.offset).ok_or(Violation::Range)?;
                let room = u64::from(child.len - child.received)
                    .min(u64::from(child.len).checked_sub(first).ok_or(Violation::Range)?);
                if bytes == 0 || bytes > room {
                    return Err(Violation::Range.into());
                }
                let fits = |n: u64| usize::try_from(n).expect("within the request");
                let (mut at, left) = (child.at, fits(bytes));
                at.advance(self.table.buffers(&child), fits(first));
                self.set_received(number, child.received + u32::try_from(bytes).expect("fits"));
                if kind == ChunkKind::OffsetData {
                    self.receive.at = At::Data { number, at, left, done };
                    return Ok(());
                }
                zero(self.table.buffers(&child), at, left);
            }
            ChunkKind::BlockStatus(form) => {
                let left = self.receive.data_bytes;
                let context = form.context(&self.receive.body[..len], left);
                let asked = self.export.and_then(|export| export.allocation);
                // One chunk for the one context.
                if context.is_none() || context != asked || child.received > 0 {
                    return Err(Violation::NotAsked.into());
                }
                self.receive.partial.reset();
                self.receive.at = At::Map { number, form, left, done };
                return Ok(());
            }
            _ => {
                let (errno, text) = error_chunk(&self.receive.body[..len])
                    .ok_or(Violation::ChunkLength(len as u64))?;
                let Outcome::Answer(result) = outcome(child.command, errno) else {
                    return Err(DropReason::GoingAway);
                };
                tracing::debug!(errno, text, command = ?child.command, "the server failed a request");
                if let (Some(child), Err(error)) = (self.table.unanswered_mut(number), result) {
                    child.failed.get_or_insert(error);
                }
            }
        }
        if done { self.conclude(number) } else { Ok(()) }
    }

    fn set_received(&mut self, number: u64, received: u32) {
        if let Some(child) = self.table.unanswered_mut(number) {
            child.received = received;
        }
    }

    /// Takes descriptors; what the asker has no room for is read and forgotten.
    fn take_map(
        &mut self,
        number: u64,
        form: Form,
        left: usize,
        done: bool,
        bytes: &[u8],
    ) -> Result<usize, DropReason> {
        let (n, extent) = self.receive.partial.take(form, &bytes[..left.min(bytes.len())]);
        let child = *self.table.unanswered(number).ok_or(Violation::NotAsked)?;
        if let Some(extent) = extent {
            if extent.len == 0 {
                return Err(Violation::Range.into());
            }
            let (buffers, extent) = (self.table.buffers(&child), bytes_of(extent));
            if child.received as usize + extent.len() <= room(buffers) {
                copy_out(buffers, child.at, &extent);
                let mut at = child.at;
                at.advance(buffers, extent.len());
                if let Some(child) = self.table.unanswered_mut(number) {
                    child.at = at;
                    child.received += u32::try_from(extent.len()).expect("16");
                }
            }
        }
        if n < left {
            self.receive.at = At::Map { number, form, left: left - n, done };
            return Ok(n);
        }
        self.receive.reset();
        if done {
            self.conclude(number)?;
        }
        Ok(n)
    }

    /// The last chunk of an answer is there.
    fn conclude(&mut self, number: u64) -> Result<(), DropReason> {
        let child = self.table.unanswered(number).ok_or(Violation::NotAsked)?;
        let result = match child.failed {
            Some(error) => Err(error),
            None if child.command == Command::Read && child.received < child.len => {
                return Err(Violation::Short.into());
            }
            None if child.command == Command::BlockStatus => {
                if child.received == 0 {
                    return Err(Violation::Short.into());
                }
                // What an earlier connection told goes.
                let buffers = self.table.buffers(child);
                zero(buffers, child.at, room(buffers) - child.received as usize);
                Ok(())
            }
            None => Ok(()),
        };
        self.finish(number, result);
        Ok(())
    }
}

fn room(buffers: &[libc::iovec]) -> usize {
    buffers.iter().map(|part| part.iov_len).sum()
}

/// Zeroes `len` bytes of the guest's memory.
fn zero(buffers: &[libc::iovec], mut at: Cursor, mut len: usize) {
    while len > 0 {
        let part = at.part(buffers, len);
        // SAFETY: the submitter vouches for the buffers until completion. The
        // guest may touch them meanwhile; we only store through a raw pointer.
        unsafe { std::ptr::write_bytes(part.iov_base.cast::<u8>(), 0, part.iov_len) };
        at.advance(buffers, part.iov_len);
        len -= part.iov_len;
    }
}
