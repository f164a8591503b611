//! One queue of an image.
//!
//! Requests go to the library in pieces, as far as there is room for them, and
//! their pieces come back through the [`Inbox`]. What does not come back stays
//! in flight: there is no time-out, for what was given up could still happen.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::inbox::{Flight, Inbox, io_error};
use super::request::{Piece, Request, check};
use super::volume::{Served, Shared};
use crate::socket::Timer;
use crate::volume::{Completion, Op, Tag, VolumeQueue};

/// A request older than this means that the cluster does not answer.
pub(super) const SLOW_AFTER: Duration = Duration::from_secs(5);

/// Whether pieces are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Free,
    /// As soon as the submitter rests and all it submitted was sent.
    Wanted,
    Held,
}

#[derive(Debug)]
pub(super) struct RbdQueue {
    index: u16,
    shared: Arc<Shared>,
    served: Served,
    inbox: Arc<Inbox>,
    requests: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Requests of which not all pieces were sent, oldest first.
    waiting: VecDeque<usize>,
    /// The next piece of the first of them, if there was no room for it.
    held: Option<Piece>,
    done: Vec<Completion>,
    /// Scratch.
    back: Vec<Flight>,
    /// Of the inbox and the timer; it may be another's.
    epoll: Epoll,
    timer: Timer,
    /// Said to be slow.
    down: bool,
    hold: Hold,
    /// Of the course that `hold` follows.
    serial: u64,
    /// Nothing was submitted since the submitter said that it rests.
    resting: bool,
    /// That it is held in this course was told.
    told_rest: bool,
    /// The next answer is the first since the queue was let go.
    first_due: bool,
}

// SAFETY: the buffers of requests are followed only while their submitter
// vouches for them, whichever thread the queue is on.
unsafe impl Send for RbdQueue {}

impl RbdQueue {
    pub(super) fn new(
        index: u16,
        shared: &Arc<Shared>,
        served: Served,
        inbox: Arc<Inbox>,
    ) -> io::Result<Self> {
        let (timer, epoll) = (Timer::new()?, Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        watch([inbox.event(), timer.as_fd()], &epoll, 0)?;
        let (serial, held) = shared.course();
        let mut queue = Self {
            index,
            shared: Arc::clone(shared),
            served,
            inbox,
            requests: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            held: None,
            done: Vec::new(),
            back: Vec::new(),
            epoll,
            timer,
            down: false,
            hold: if held { Hold::Held } else { Hold::Free },
            serial,
            resting: true,
            told_rest: false,
            first_due: false,
        };
        queue.follow();
        Ok(queue)
    }

    /// What wakes it.
    fn events(&self) -> [BorrowedFd<'_>; 2] {
        [self.inbox.event(), self.timer.as_fd()]
    }

    /// Does as the volume's course says.
    fn follow(&mut self) {
        let (serial, held) = self.shared.course();
        if self.serial != serial {
            (self.serial, self.told_rest) = (serial, false);
            if !held {
                self.first_due |= self.hold != Hold::Free;
                self.hold = Hold::Free;
            } else if self.hold == Hold::Free {
                self.hold = Hold::Wanted;
            }
        }
        if self.hold == Hold::Wanted && self.resting && self.waiting.is_empty() {
            self.hold = Hold::Held;
        }
        if self.hold == Hold::Held && !std::mem::replace(&mut self.told_rest, true) {
            self.shared.rested(self.index, self.serial);
        }
    }

    fn keep(&mut self, request: Request) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[slot] = Some(request);
        slot
    }

    fn request(&mut self, slot: usize) -> &mut Request {
        self.requests[slot].as_mut().expect("its pieces are out or to be sent")
    }

    /// Sends what waits, as far as there is room.
    fn pump(&mut self) {
        while !self.shared.is_over()
            && self.hold != Hold::Held
            && let Some(&slot) = self.waiting.front()
        {
            let piece = self.held.take().or_else(|| self.request(slot).next_piece());
            let Some(piece) = piece else {
                self.waiting.pop_front();
                self.finish(slot);
                continue;
            };
            if !self.shared.budget().take(piece.cost()) {
                self.held = Some(piece);
                return;
            }
            self.send_piece(slot, piece);
        }
    }

    fn send_piece(&mut self, slot: usize, piece: Piece) {
        let image = &self.served.image;
        let direct = self.served.objects.as_deref();
        let direct = direct.and_then(|objects| Some((objects, objects.place(&piece)?)));
        let flight = Flight::new(&self.inbox, slot, piece, image);
        let sent = match direct {
            Some((objects, place)) => flight.send_to(objects, place),
            // SAFETY: the submitter vouches for the buffers until the request is done.
            None => unsafe { flight.send(image) },
        };
        if let Err(error) = sent {
            tracing::warn!(image = self.shared.spec(), %error, "a request could not be sent");
            self.shared.judge(&error);
            self.request(slot).came_back(Err(io_error(&error)));
        }
    }

    /// Answers a request that is done.
    fn finish(&mut self, slot: usize) {
        if let Some(request) = &self.requests[slot]
            && let Some(result) = request.outcome()
        {
            self.done.push(Completion { tag: request.tag, result });
            self.requests[slot] = None;
            self.free.push(slot);
            if std::mem::take(&mut self.first_due) {
                self.shared.first_answer();
            }
        }
    }

    fn take_back(&mut self) {
        let mut back = std::mem::take(&mut self.back);
        self.inbox.take(&mut back);
        for flight in back.drain(..) {
            // The guest sees nothing of what came after the end.
            if self.shared.is_over() {
                continue;
            }
            let (slot, result) = (flight.slot, flight.outcome());
            if let Err(error) = result {
                let op = flight.piece.op;
                tracing::debug!(image = self.shared.spec(), ?op, %error, "request failed");
            }
            if let Some(objects) = &self.served.objects {
                objects.changed(flight.piece.op, flight.piece.len);
            }
            let is_read = matches!(flight.piece.op, Op::Read { .. });
            let request = self.request(slot);
            if result.is_ok() && is_read {
                // SAFETY: it is not answered, so the submitter vouches for its buffers.
                unsafe { request.fill(flight.piece.at, &flight.read) };
            }
            request.came_back(result);
            self.finish(slot);
        }
        self.back = back;
    }

    /// What is held does not wait for the cluster.
    fn oldest(&self) -> Option<Instant> {
        if self.hold == Hold::Held {
            return None;
        }
        self.requests.iter().flatten().map(|request| request.since).min()
    }

    /// Says when the cluster does not answer, and when it does again. The timer
    /// is set only while something is in flight.
    fn watch_time(&mut self) {
        if !self.timer.is_armed() && !self.down && self.in_flight() == 0 {
            return;
        }
        let now = Instant::now();
        if self.shared.is_over() {
            return self.timer.disarm();
        }
        if !self.timer.is_due(now) && self.timer.is_armed() {
            return;
        }
        let oldest = self.oldest();
        let slow = oldest.is_some_and(|since| now.duration_since(since) >= SLOW_AFTER);
        if slow != self.down {
            self.down = slow;
            self.shared.set_down(self.index, slow);
        }
        // While it is slow, the next answer is what is waited for.
        if let (Some(since), false) = (oldest, slow) {
            self.timer.arm(now, since + SLOW_AFTER);
        }
    }
}

/// All of them or none.
fn watch(events: [BorrowedFd<'_>; 2], epoll: &Epoll, data: u64) -> io::Result<()> {
    let added = events
        .iter()
        .try_for_each(|event| epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, data)));
    Ok(added.inspect_err(|_| leave(events, epoll))?)
}

fn leave(events: [BorrowedFd<'_>; 2], epoll: &Epoll) {
    for event in events {
        let _ = epoll.delete(event);
    }
}

impl VolumeQueue for RbdQueue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        match check(op, data, self.shared.size_bytes(), self.shared.read_only()) {
            // Nothing is written where nothing can be.
            Ok(_) if op == Op::Flush && self.shared.read_only() => {
                self.done.push(Completion { tag, result: Ok(()) });
            }
            Ok(len) => {
                self.resting = false;
                self.follow();
                let slot = self.keep(Request::new(tag, op, data, len, Instant::now()));
                self.waiting.push_back(slot);
                self.pump();
            }
            Err(error) => self.done.push(Completion { tag, result: Err(error) }),
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        self.take_back();
        self.follow();
        self.pump();
        // What a hold waited for may have been sent now.
        self.follow();
        self.watch_time();
        completions.append(&mut self.done);
    }

    fn rest(&mut self) {
        self.resting = true;
        self.follow();
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn watch_in(&mut self, epoll: &Epoll, data: u64) -> io::Result<()> {
        let epoll = Epoll(epoll.0.try_clone()?);
        watch(self.events(), &epoll, data)?;
        let before = std::mem::replace(&mut self.epoll, epoll);
        leave(self.events(), &before);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len() + self.done.len()
    }
}

impl Drop for RbdQueue {
    fn drop(&mut self) {
        // What is still out keeps the inbox and its event.
        leave(self.events(), &self.epoll);
        self.inbox.close();
        self.shared.queue_closed(self.index);
    }
}
