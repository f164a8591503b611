//! What a copy does, in order: a look at both ends when it goes on, the copy, the verification.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use super::digests::Digests;
use super::piece::{Marks, NO_DIGEST, Pieces, ZeroDigests, sample};
use super::progress::{Audience, Progress};
use super::reader::{Found, Reader, SLOTS};
use super::side::Side;
use super::state::State;
use super::writer::{Writer, Written, ZEROS};
use super::{CopyError, Role, Sums};

/// Between two looks at signals, at the ends and at the clock, while nothing else happens.
const TICK: Duration = Duration::from_millis(100);
/// What is done is made durable and noted so often; less often where a flush is slow.
const CHECKPOINT: Duration = Duration::from_secs(1);
/// A flush takes at most this part of the time.
const FLUSH_SHARE: u32 = 10;
/// How long an interrupted copy waits to note what it has done.
const LAST_FLUSH: Duration = Duration::from_secs(5);
/// Pieces that are compared before a copy goes on.
const SAMPLE: u64 = 32;
/// Pieces found and not yet taken by the writer.
const FOUND_MAX: usize = ZEROS;

pub(super) struct Phases<'a> {
    pub(super) source: &'a Side,
    pub(super) destination: &'a Side,
    pub(super) state: &'a State,
    pub(super) pieces: Pieces,
    pub(super) audience: Audience,
    pub(super) signals: &'a SignalFd,
}

impl Phases<'_> {
    /// Compares some of what was copied with what both ends have now.
    pub(super) fn look_again(&self) -> Result<(), CopyError> {
        let done = self.done()?;
        let set = (0..self.pieces.count()).filter(|piece| done.is_set(*piece)).count() as u64;
        let chosen = sample(set, SAMPLE);
        let mut wanted = Marks::new(self.pieces.count());
        let of_done = (0..self.pieces.count()).filter(|piece| done.is_set(*piece));
        for (n, piece) in (0..).zip(of_done) {
            if chosen(n) {
                wanted.set(piece);
            }
        }
        for side in [self.source, self.destination] {
            let differs = Cell::new(None);
            self.compare(side, "comparing", &|piece| wanted.is_set(piece), &mut |piece| {
                differs.set(differs.get().or(Some(piece)));
                Ok(())
            })?;
            if let Some(piece) = differs.get() {
                let (role, offset) = (side.role, self.pieces.offset(piece));
                let state = self.state.path().to_owned();
                return Err(CopyError::Changed { role, offset, state });
            }
        }
        Ok(())
    }

    fn done(&self) -> Result<Marks, CopyError> {
        let mut done = Marks::new(self.pieces.count());
        self.state.each(|piece, digest| {
            if *digest != NO_DIGEST {
                done.set(piece);
            }
        })?;
        Ok(done)
    }

    /// Reads the destination again, and compares it with what was read of the source.
    pub(super) fn verify(&self) -> Result<(), CopyError> {
        let bad = RefCell::new(Vec::new());
        self.compare(self.destination, "verifying", &|_| true, &mut |piece| {
            bad.borrow_mut().push(piece);
            // To be copied again.
            self.state.write(piece, 1, |_| NO_DIGEST).map_err(CopyError::from)
        })?;
        let bad = bad.into_inner();
        match bad.iter().min() {
            None => Ok(()),
            Some(first) => {
                self.state.sync()?;
                let offset = self.pieces.offset(*first);
                Err(CopyError::Differs { pieces: bad.len() as u64, offset })
            }
        }
    }

    /// Reads what is `wanted` of `side`, and tells which pieces are not as noted.
    fn compare(
        &self,
        side: &Side,
        phase: &'static str,
        wanted: &dyn Fn(u64) -> bool,
        differs: &mut dyn FnMut(u64) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let zeros = ZeroDigests::new(self.pieces);
        let block = side.volume.geometry().block_bytes;
        let mut reader = Reader::new(side.queue(Reader::DEPTH)?, side.role, self.pieces, block);
        let total = match phase {
            "verifying" => self.pieces.size_bytes,
            // A few; their bytes are of no interest.
            _ => 0,
        };
        let mut progress = Progress::new(self.audience, phase, total, 0);
        let mut found = Vec::new();
        // By slot; dropped before the reader's buffers.
        let mut under_way = [None; SLOTS];
        let digests = Digests::new().map_err(CopyError::System)?;
        while !reader.is_done() || under_way.iter().any(Option::is_some) {
            let mut moved = reader.pump(wanted, FOUND_MAX, &mut found)?;
            for found in found.drain(..) {
                match found {
                    Found::Zeros { first, count } => {
                        for piece in first..first + count {
                            if self.state.read(piece)? != zeros.of(piece) {
                                differs(piece)?;
                            }
                        }
                        progress.add(self.pieces.bytes(first, count));
                    }
                    Found::Data { piece, slot } => {
                        let len = usize::try_from(self.pieces.bytes(piece, 1)).expect("a piece");
                        under_way[slot] = Some(piece);
                        // SAFETY: the slot is released when its digest is there.
                        unsafe { digests.ask(slot, &reader.buffer(slot)[..len]) };
                    }
                }
            }
            while let Some((slot, digest)) = digests.take() {
                let Some(piece) = under_way[slot].take() else { continue };
                if self.state.read(piece)? != digest {
                    differs(piece)?;
                }
                reader.release(slot);
                progress.add(self.pieces.bytes(piece, 1));
                moved = true;
            }
            if self.attend(&[side], &mut progress)? {
                return Err(self.interrupted(phase, &progress));
            }
            if !moved {
                self.wait(&[reader.wake_fd(), digests.wake_fd()])?;
            }
        }
        Ok(())
    }

    /// Copies what is not noted as done.
    pub(super) fn copy(&self) -> Result<Sums, CopyError> {
        let done = self.done()?;
        let wanted = |piece| !done.is_set(piece);
        let mut sums = Sums::default();
        for piece in 0..self.pieces.count() {
            if done.is_set(piece) {
                sums.before += self.pieces.bytes(piece, 1);
            }
        }
        let mut progress =
            Progress::new(self.audience, "copying", self.pieces.size_bytes, sums.before);
        let blocks = [self.source, self.destination].map(|s| s.volume.geometry().block_bytes);
        let from = self.source.queue(Reader::DEPTH)?;
        let to = self.destination.queue(Writer::DEPTH)?;
        let reader = Reader::new(from, Role::Source, self.pieces, blocks[0]);
        let digests = Digests::new().map_err(CopyError::System)?;
        let writer = Writer::new(to, self.pieces, blocks[1], digests);
        let mut pipe =
            Pipe { writer, reader, found: VecDeque::new(), zeros: ZeroDigests::new(self.pieces) };
        let mut last = (Instant::now(), CHECKPOINT);
        let mut flushed_at = None;
        loop {
            let mut moved = pipe.read(&wanted)?;
            moved |= pipe.write(self.state, &mut sums, &mut progress)?;
            if let (Some(begun), false) = (flushed_at, pipe.writer.is_flushing()) {
                let took: Duration = Instant::now().saturating_duration_since(begun);
                last = (Instant::now(), CHECKPOINT.max(took * FLUSH_SHARE));
                flushed_at = None;
            }
            let whole = pipe.reader.is_done() && pipe.found.is_empty();
            if whole && pipe.writer.is_idle() && !pipe.writer.has_volatile() {
                return Ok(sums);
            }
            let due = last.0.elapsed() >= last.1 || (whole && pipe.writer.is_idle());
            if due && flushed_at.is_none() && pipe.writer.has_volatile() {
                pipe.writer.flush();
                flushed_at = Some(Instant::now());
                moved = true;
            }
            if self.attend(&[self.source, self.destination], &mut progress)? {
                pipe.note(self, &mut sums, &mut progress)?;
                return Err(self.interrupted("copying", &progress));
            }
            if !moved {
                let [written, digested] = pipe.writer.wake_fds();
                self.wait(&[pipe.reader.wake_fd(), written, digested])?;
            }
        }
    }

    /// Looks at the ends, tells how far it is; true: a signal asks to stop.
    fn attend(&self, sides: &[&Side], progress: &mut Progress) -> Result<bool, CopyError> {
        let mut away = None;
        for side in sides {
            if side.is_away()? {
                away = away.or(Some(side.role.word()));
            }
        }
        progress.tell(away).map_err(CopyError::Output)?;
        let signal = self.signals.read_signal().map_err(|e| CopyError::System(e.into()))?;
        Ok(signal.is_some())
    }

    fn interrupted(&self, phase: &'static str, progress: &Progress) -> CopyError {
        let (percent, state) = (progress.percent(), self.state.path().to_owned());
        CopyError::Interrupted { phase, percent, state }
    }

    fn wait(&self, queues: &[BorrowedFd<'_>]) -> Result<(), CopyError> {
        let mut fds: Vec<_> = queues.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(self.signals.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::try_from(TICK).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(CopyError::System(error.into())),
        }
    }
}

/// Both ends at work.
struct Pipe {
    // Before the reader, whose buffers it writes from.
    writer: Writer,
    reader: Reader,
    found: VecDeque<Found>,
    zeros: ZeroDigests,
}

impl Pipe {
    fn read(&mut self, wanted: &dyn Fn(u64) -> bool) -> Result<bool, CopyError> {
        let mut found = Vec::new();
        let room = FOUND_MAX.saturating_sub(self.found.len());
        let moved = self.reader.pump(wanted, room, &mut found)?;
        self.found.extend(found);
        Ok(moved)
    }

    fn write(
        &mut self,
        state: &State,
        sums: &mut Sums,
        progress: &mut Progress,
    ) -> Result<bool, CopyError> {
        let mut moved = false;
        while let Some(found) = self.found.front() {
            match *found {
                Found::Zeros { first, count } => {
                    if !self.writer.zeros(first, count) {
                        break;
                    }
                }
                Found::Data { piece, slot } => {
                    let buffer = self.reader.buffer(slot);
                    // SAFETY: the slot is released when the writer says that it is done, and the writer is dropped
                    // before the reader's buffers.
                    unsafe { self.writer.data(slot, piece, buffer) };
                }
            }
            self.found.pop_front();
            moved = true;
        }
        let (mut free, mut durable) = (Vec::new(), Vec::new());
        moved |= self.writer.pump(&mut free, &mut durable)?;
        progress.add(self.writer.take_bytes());
        for slot in free {
            self.reader.release(slot);
        }
        if !durable.is_empty() {
            self.durable(&durable, state, sums)?;
        }
        Ok(moved)
    }

    fn durable(
        &self,
        durable: &[Written],
        state: &State,
        sums: &mut Sums,
    ) -> Result<(), CopyError> {
        for written in durable {
            let (first, count) = written.pieces();
            state.write(first, count, |piece| written.digest(piece, &self.zeros))?;
            let pieces = self.reader.pieces();
            let bytes = pieces.bytes(first, count);
            match written {
                Written::Zeros { .. } => sums.zeros += bytes,
                Written::Data { .. } => sums.data += bytes,
            }
        }
        state.sync()?;
        Ok(())
    }

    /// Before an interrupted copy ends: notes what is done, as far as the destination answers soon.
    fn note(
        &mut self,
        phases: &Phases<'_>,
        sums: &mut Sums,
        progress: &mut Progress,
    ) -> Result<(), CopyError> {
        let until = Instant::now() + LAST_FLUSH;
        // What was found and not written yet will be read again.
        self.found.clear();
        while Instant::now() < until && (!self.writer.is_idle() || self.writer.has_volatile()) {
            if self.writer.is_idle() {
                self.writer.flush();
            }
            if !self.write(phases.state, sums, progress)? {
                phases.wait(&self.writer.wake_fds())?;
            }
        }
        Ok(())
    }
}
