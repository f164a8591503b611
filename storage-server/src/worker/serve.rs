//! Runs the requests of one connection's turn.

use std::fs::File;
use std::sync::Arc;

use baton_protocol::frame::{FLAG_UNMAP, REPLY_HEADER_BYTES, REQUEST_HEADER_BYTES};
use baton_protocol::handoff::{HandoffRequest, Open};
use baton_protocol::{Epoch, Opcode, RequestHeader, Seq, Status};

use crate::gate::{Gate, Pass, Principal};
use crate::log::Sometimes;
use crate::metrics::{self, WorkerMetrics};
use crate::session::{self, Front, Identity, Verdict, Violation};
use crate::store::{IoError, Volume};
use crate::volumes::RunningVolume;

use super::Context;
use super::buffers::SEND_AT;
use super::conn::{Conn, HELD_BYTES_MAX, INFLIGHT_MAX, Life, Parked, reply_header};
use super::flusher::FlushJob;
use super::mailbox::Done;
use super::pool::{Job, Work};
use super::ring::ColdRead;

/// WRITE_ZEROES up to this many bytes are run on the spot: the store writes them
/// to the page cache. More, and any DISCARD, punches holes, which took ext4 4 to
/// 6 ms each: too long for the other connections of a worker.
const INLINE_ZERO_BYTES: u64 = 64 << 10;
/// READs from this many bytes on are sent from where they are. What that gains was measured at 128 KiB; where it stops to
/// pay was not.
const MAPPED_READ_BYTES: usize = 64 << 10;
/// The largest answer besides READ's: a header and a sentence.
const SMALL_ANSWER: usize = 512;

/// One admission for the requests of a turn.
struct Turn<'a> {
    gate: &'a Gate,
    slot: usize,
    principal: Principal,
    admitted: Option<(Epoch, Pass<&'a Gate>)>,
    /// Highest number that was admitted or answered.
    newest: Seq,
}

impl Turn<'_> {
    fn admits(&mut self, epoch: Epoch) -> bool {
        if self.admitted.as_ref().is_some_and(|(inside, _)| *inside == epoch) {
            return true;
        }
        match Gate::admit(self.gate, self.slot, self.principal, epoch) {
            Some(pass) => {
                self.admitted = Some((epoch, pass));
                true
            }
            None => false,
        }
    }

    /// A pass for work that outlives the turn.
    fn share(&self, volume: &RunningVolume) -> Pass<Arc<Gate>> {
        let (_, pass) = self.admitted.as_ref().expect("judged as admitted");
        pass.share(Arc::clone(&volume.gate))
    }
}

impl Context {
    /// Receives if `readable`, runs whole requests until something stops it, and
    /// sends the answers.
    pub(super) fn serve(&mut self, index: usize, conn: &mut Conn, readable: bool) {
        // Answers that came from elsewhere first: they may make room.
        conn.send();
        conn.answer_parked(&self.setup.metrics);
        conn.share.renew(&mut self.rounds);
        if readable && !conn.blocked && !conn.is_throttled() {
            if conn.share.is_used_up() {
                conn.readable = true;
                return self.wait(index, conn);
            }
            conn.receive(self.rounds.share_bytes());
        }
        let volume = Arc::clone(conn.volume());
        let mut turn = Turn {
            gate: &volume.gate,
            slot: self.setup.number,
            principal: conn.principal(),
            admitted: None,
            newest: Seq(0),
        };
        while conn.life != Life::Dead && !conn.blocked && !conn.is_throttled() {
            match conn.front() {
                Front::Partial { need } => {
                    conn.need = need;
                    if conn.large.are_expected() {
                        // Header and payload come by a call each.
                        let goes_on = conn.life == Life::Open && !conn.share.is_used_up();
                        if goes_on && conn.receive(self.rounds.share_bytes()) {
                            continue;
                        }
                    } else if conn.filled {
                        conn.input.read_further_ahead();
                    }
                    break;
                }
                Front::Broken { why, answer } => {
                    if let Some((opcode, seq)) = answer {
                        self.setup.metrics.answered(opcode, Status::Protocol);
                        conn.answer_with(opcode, seq, Status::Protocol, &why.to_string());
                    }
                    self.end(conn, &why);
                    break;
                }
                Front::Whole { .. } if conn.share.is_used_up() => break,
                Front::Whole { header, bytes } => {
                    let held = conn.large.held();
                    let answer = answer_bytes(&header);
                    if !conn.output.has_room(answer) || conn.output.unsent().len() >= SEND_AT {
                        conn.send();
                        if !conn.output.has_room(answer) {
                            break;
                        }
                    }
                    conn.share.take(bytes - REQUEST_HEADER_BYTES + read_bytes(&header));
                    if let Err(why) = self.request(index, conn, &volume, &mut turn, &header, bytes)
                    {
                        self.setup.metrics.answered(header.opcode, Status::Protocol);
                        let text = why.to_string();
                        conn.answer_with(header.opcode, header.seq, Status::Protocol, &text);
                        self.end(conn, &why);
                        break;
                    }
                    // OPEN may have made it the owner's.
                    turn.principal = conn.principal();
                    conn.input.consume(bytes - held);
                    conn.large.end();
                    conn.large.expect_another(bytes);
                }
            }
        }
        conn.place.carried_in(turn.newest);
        drop(turn);
        volume.arrivals.look();
        conn.send();
        conn.asks.sent();
        if conn.blocked || conn.is_throttled() || conn.life != Life::Open {
            return;
        }
        // A socket that filled the buffer most likely has more.
        let more = conn.filled && conn.share.is_used_up();
        conn.readable |= more;
        if more || !matches!(conn.front(), Front::Partial { .. }) {
            self.wait(index, conn);
        }
    }

    /// It has more to do, when it is its turn again.
    fn wait(&mut self, index: usize, conn: &mut Conn) {
        if !conn.waits {
            conn.waits = true;
            self.rounds.wait(index);
        }
    }

    /// Puts a connection on the list of those to look at before waiting.
    pub(super) fn queue(&mut self, index: usize, conn: &mut Conn) {
        if !conn.queued {
            conn.queued = true;
            self.ready.push(index);
        }
    }

    fn end(&self, conn: &mut Conn, why: &Violation) {
        static BROKEN: Sometimes = Sometimes::new();
        let volume = conn.volume().data.name();
        let Identity { session, queue, .. } = conn.identity;
        BROKEN.say(|missed| {
            tracing::warn!(
                volume, %session, %queue, %why, missed,
                "connection closed: the peer broke the protocol"
            );
        });
        conn.linger(&self.setup.metrics);
    }

    /// Runs or answers one whole request; `bytes` of input are its own.
    fn request(
        &mut self,
        index: usize,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        turn: &mut Turn<'_>,
        header: &RequestHeader,
        bytes: usize,
    ) -> Result<(), Violation> {
        let size = volume.data.size_bytes();
        let verdict = session::judge(&conn.identity, conn.place.window(), header, size, |epoch| {
            turn.admits(epoch)
        });
        match verdict {
            Verdict::Break(why) => return Err(why),
            Verdict::Answer(Status::StaleEpoch | Status::NotPermitted) => {}
            Verdict::Run | Verdict::Answer(_) => turn.newest = turn.newest.max(header.seq),
        }
        let status = match verdict {
            Verdict::Break(why) => return Err(why),
            Verdict::Answer(Status::StaleEpoch) if volume.is_deleted() => Some(Status::Gone),
            Verdict::Answer(status) => Some(status),
            Verdict::Run => match header.opcode {
                Opcode::Read => self.read(index, conn, volume, turn, header),
                Opcode::Write => Some(self.write(conn, &volume.data, header, bytes)),
                Opcode::Discard | Opcode::WriteZeroes => {
                    self.zero(index, conn, volume, turn, header)
                }
                Opcode::Flush => {
                    self.lend(conn);
                    self.setup.flusher.push(FlushJob {
                        answer_to: Arc::clone(&self.setup.mailbox),
                        done: Done::new(index, header, Status::Ok),
                        pass: turn.share(volume),
                    });
                    None
                }
                Opcode::Ping => Some(Status::Ok),
                Opcode::Event => {
                    if conn.parked.is_some() {
                        return Err(Violation::SecondParked(Opcode::Event));
                    }
                    conn.parked = Some(self.park(volume, header.seq, header.offset));
                    conn.answer_parked(&self.setup.metrics);
                    None
                }
                Opcode::Release => {
                    self.release(conn, volume, header);
                    None
                }
                Opcode::Hello => return Err(Violation::SecondHello),
                Opcode::Access => {
                    if conn.access.is_some() {
                        return Err(Violation::SecondParked(Opcode::Access));
                    }
                    conn.access = Some(self.park(volume, header.seq, (header.offset, header.len)));
                    conn.answer_parked(&self.setup.metrics);
                    None
                }
                Opcode::Handoff => {
                    let body = &conn.input.unread()[REQUEST_HEADER_BYTES..bytes];
                    let request = HandoffRequest::decode(body)?;
                    self.handoff(conn, volume, header, request)?;
                    None
                }
                Opcode::Open => {
                    let open = Open::decode(&conn.input.unread()[REQUEST_HEADER_BYTES..bytes])?;
                    self.open(conn, volume, header, open);
                    None
                }
            },
        };
        if let Some(status) = status {
            if status == Status::Ok && header.opcode.is_mutation() {
                conn.place.window().complete(header.seq);
            }
            self.setup.metrics.answered(header.opcode, status);
            conn.answer(header.opcode, header.seq, status);
        }
        Ok(())
    }

    fn write(
        &self,
        conn: &mut Conn,
        data: &Volume,
        header: &RequestHeader,
        bytes: usize,
    ) -> Status {
        let metrics = &self.setup.metrics;
        metrics::add(&metrics.written_bytes, header.len);
        let done = if conn.large.held() > 0 {
            metrics::add(&metrics.piped_writes, 1);
            let pour = |pool: &File, at, len| conn.large.pour(pool, at, len);
            data.write_with(header.offset, header.len, pour)
        } else {
            data.write(header.offset, &conn.input.unread()[REQUEST_HEADER_BYTES..bytes])
        };
        outcome(data, header, done)
    }

    /// Straight into the reply when the data is in memory.
    fn read(
        &mut self,
        index: usize,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        turn: &Turn<'_>,
        header: &RequestHeader,
    ) -> Option<Status> {
        let len = usize::try_from(header.len).expect("judged to fit a frame");
        let whole = REPLY_HEADER_BYTES + len;
        if len >= MAPPED_READ_BYTES && self.reads_mapped() && pass_on(conn, volume, header, len) {
            metrics::add(&self.setup.metrics.mapped_reads, 1);
            self.answered_read(len);
            return None;
        }
        let room = conn.output.room(whole);
        let now = if self.setup.cold_reads {
            Ok(false)
        } else {
            volume.data.try_read(header.offset, &mut room[REPLY_HEADER_BYTES..])
        };
        match now {
            Ok(true) => {
                let head = reply_header(volume, Opcode::Read, header.seq, Status::Ok, len);
                room[..REPLY_HEADER_BYTES].copy_from_slice(&head);
                conn.output.keep(whole);
                self.answered_read(len);
                None
            }
            Ok(false) => {
                metrics::add(&self.setup.metrics.cold_reads, 1);
                self.read_cold(index, conn, volume, turn, header, len)
            }
            Err(error) => Some(outcome(&volume.data, header, Err(error))),
        }
    }

    fn reads_mapped(&self) -> bool {
        self.setup.mapped_reads && !self.setup.cold_reads
    }

    fn answered_read(&self, len: usize) {
        metrics::add(&self.setup.metrics.read_bytes, len as u64);
        self.setup.metrics.answered(Opcode::Read, Status::Ok);
    }

    fn read_cold(
        &mut self,
        index: usize,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        turn: &Turn<'_>,
        header: &RequestHeader,
        len: usize,
    ) -> Option<Status> {
        let pass = turn.share(volume);
        if let Some(ring) = self.ring.as_mut().filter(|ring| ring.has_room()) {
            match volume.data.plan_read(header.offset, len) {
                Ok(plan) => ring.read(index, *header, plan, len, pass),
                Err(error) => return Some(outcome(&volume.data, header, Err(error))),
            }
        } else {
            let buffer = vec![0; REPLY_HEADER_BYTES + len];
            self.push_read(volume, index, *header, buffer, pass);
        }
        debug_assert!(conn.held_bytes < HELD_BYTES_MAX, "throttled before");
        conn.held_bytes += REPLY_HEADER_BYTES + len;
        self.lend(conn);
        None
    }

    /// A read that io_uring could not do.
    pub(super) fn read_in_pool(&self, conn: &Conn, read: ColdRead) {
        let (index, header, buffer, pass) = read.into_parts();
        self.push_read(conn.volume(), index, header, buffer, pass);
    }

    fn push_read(
        &self,
        volume: &RunningVolume,
        index: usize,
        header: RequestHeader,
        mut buffer: Vec<u8>,
        pass: Pass<Arc<Gate>>,
    ) {
        let data = Arc::clone(&volume.data);
        let work = move |mut done: Done| {
            let result = data.read(header.offset, &mut buffer[REPLY_HEADER_BYTES..]);
            done.status = outcome(&data, &header, result);
            done.reply = Some(buffer);
            done
        };
        self.give(index, &header, pass, Box::new(work));
    }

    fn zero(
        &mut self,
        index: usize,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        turn: &Turn<'_>,
        header: &RequestHeader,
    ) -> Option<Status> {
        let header = *header;
        let run = move |data: &Volume| {
            let result = if header.opcode == Opcode::Discard {
                data.discard(header.offset, header.len)
            } else {
                data.write_zeroes(header.offset, header.len, header.flags & FLAG_UNMAP != 0)
            };
            outcome(data, &header, result)
        };
        if header.opcode == Opcode::WriteZeroes && header.len <= INLINE_ZERO_BYTES {
            return Some(run(&volume.data));
        }
        let data = Arc::clone(&volume.data);
        let work = move |mut done: Done| {
            done.status = run(&data);
            done
        };
        self.lend(conn);
        self.give(index, &header, turn.share(volume), Box::new(work));
        None
    }

    fn give(&self, index: usize, header: &RequestHeader, pass: Pass<Arc<Gate>>, work: Work) {
        self.setup.pool.push(Job {
            answer_to: Arc::clone(&self.setup.mailbox),
            done: Done::new(index, header, Status::Ok),
            work,
            pass,
        });
    }

    /// A request that waits for news. Whether there are some already is looked at after
    /// this.
    fn park<K>(&self, volume: &Arc<RunningVolume>, seq: Seq, known: K) -> Parked<K> {
        Parked { seq, known, _listening: volume.listen(self.setup.number) }
    }

    /// Counts a request that is handed away.
    pub(super) fn lend(&self, conn: &mut Conn) {
        debug_assert!(conn.inflight < INFLIGHT_MAX, "throttled before");
        conn.inflight += 1;
        metrics::add(&self.setup.metrics.inflight, 1);
    }
}

impl Conn {
    /// A request came back from another thread. Returns a buffer to use again.
    pub(super) fn finish(&mut self, done: Done, metrics: &WorkerMetrics) -> Option<Vec<u8>> {
        let Done { opcode, seq, status, reply, .. } = done;
        self.inflight -= 1;
        metrics::sub(&metrics.inflight, 1);
        if status == Status::Ok && opcode.is_mutation() {
            self.place.window().complete(seq);
        }
        metrics.answered(opcode, status);
        let held = reply.as_ref().map_or(0, Vec::len);
        let Some(mut answer) = reply.filter(|_| status == Status::Ok) else {
            self.held_bytes = self.held_bytes.saturating_sub(held);
            self.late_answer(self.header(opcode, seq, status, 0).to_vec(), 0);
            return None;
        };
        let len = answer.len() - REPLY_HEADER_BYTES;
        metrics::add(&metrics.read_bytes, len as u64);
        answer[..REPLY_HEADER_BYTES].copy_from_slice(&self.header(opcode, seq, status, len));
        self.late_answer(answer, held)
    }

    /// `held` bytes of it are counted in `held_bytes`.
    pub(super) fn late_answer(&mut self, answer: Vec<u8>, held: usize) -> Option<Vec<u8>> {
        if self.life == Life::Dead {
            self.held_bytes = self.held_bytes.saturating_sub(held);
            return Some(answer);
        }
        if self.late.is_empty() && self.output.has_room(answer.len()) {
            self.output.push(&answer);
            self.held_bytes = self.held_bytes.saturating_sub(held);
            return Some(answer);
        }
        // Counted until it goes to the output.
        self.held_bytes += answer.len() - held;
        self.late.push_back(answer);
        None
    }

    /// Answers a parked EVENT or ACCESS if there is news. A queue's connection has none.
    #[inline]
    pub(super) fn answer_parked(&mut self, metrics: &WorkerMetrics) {
        if self.access.is_some() || self.parked.is_some() {
            self.answer_news(metrics);
        }
    }

    fn answer_news(&mut self, metrics: &WorkerMetrics) {
        self.answer_access(metrics);
        let Some(&Parked { seq, known, .. }) = self.parked.as_ref() else { return };
        let Some(event) = self.volume().events.after(known) else { return };
        if !self.output.has_room(SMALL_ANSWER) {
            // Looked at again when the socket takes bytes.
            return;
        }
        self.parked = None;
        metrics.answered(Opcode::Event, Status::Ok);
        self.answer_event(seq, &event);
    }
}

/// Answers a READ from the page cache, without a copy in between. What the socket does not take is copied at once: later
/// the place may be another volume's. False: nothing of the answer went, and it is to be made in another way.
fn pass_on(conn: &mut Conn, volume: &RunningVolume, header: &RequestHeader, len: usize) -> bool {
    let head = reply_header(volume, Opcode::Read, header.seq, Status::Ok, len);
    let data = &volume.data;
    let passed = data.with_resident(header.offset, len, |payload| {
        let sent = conn.send_from(&head, payload, len);
        let rest = REPLY_HEADER_BYTES + len - sent;
        if sent == 0 || rest == 0 {
            return sent > 0;
        }
        let room = conn.output.room(rest);
        let (of_head, of_data) = room.split_at_mut(rest.saturating_sub(len));
        of_head.copy_from_slice(&head[sent.min(REPLY_HEADER_BYTES)..]);
        let at = header.offset + (len - of_data.len()) as u64;
        match data.read(at, of_data) {
            Ok(()) => conn.output.keep(rest),
            // Half an answer went, and it has no other end: the client asks again on its next connection.
            Err(_) => conn.life = Life::Dead,
        }
        true
    });
    passed.unwrap_or(false)
}

/// Bytes the answer may take in the output.
fn answer_bytes(header: &RequestHeader) -> usize {
    if header.opcode == Opcode::Read {
        REPLY_HEADER_BYTES + read_bytes(header)
    } else {
        SMALL_ANSWER
    }
}

/// Payload of the answer.
fn read_bytes(header: &RequestHeader) -> usize {
    match header.opcode {
        Opcode::Read => usize::try_from(header.len).expect("judged to fit a frame"),
        _ => 0,
    }
}

/// The one table from the store's errors to the wire.
fn outcome(volume: &Volume, header: &RequestHeader, result: Result<(), IoError>) -> Status {
    let Err(error) = result else { return Status::Ok };
    match error {
        IoError::OutOfRange { .. } => Status::OutOfRange,
        IoError::Deleted => Status::Gone,
        IoError::NoSpace => {
            static NO_SPACE: Sometimes = Sometimes::new();
            NO_SPACE.say(|missed| {
                tracing::warn!(volume = volume.name(), offset = header.offset, %error, missed, "a request found no space");
            });
            Status::NoSpace
        }
        IoError::PoolFailed(_) | IoError::Io(_) => {
            static DISK: Sometimes = Sometimes::new();
            DISK.say(|missed| {
                tracing::error!(
                    volume = volume.name(), opcode = ?header.opcode, offset = header.offset,
                    error = &error as &dyn std::error::Error, missed, "a request failed at the disk"
                );
            });
            Status::Io
        }
    }
}
