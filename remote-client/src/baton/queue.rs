//! One queue of a Baton volume: a [`Link`] that reports to its volume.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use baton_protocol::handoff::Count;
use nix::sys::epoll::Epoll;

use super::handover::Course;
use super::link::Link;
use super::session::{LostReason, Notice, Session, State};
use super::volume::Shared;
use crate::volume::{Completion, Op, Tag, VolumeQueue};

#[derive(Debug)]
pub(crate) struct BatonQueue {
    index: u16,
    link: Link,
    shared: Arc<Shared>,
    reporter: Reporter,
    course: Course,
    /// What was said of what was sent, in this course.
    counted: Option<Count>,
}

impl BatonQueue {
    /// Begins to connect, in the course for which the session was made.
    pub(crate) fn start(index: u16, mut link: Link, shared: Arc<Shared>, course: Course) -> Self {
        if course.held {
            link.session().hold();
        }
        link.session().start(Instant::now());
        let reporter = Reporter::default();
        let mut queue = Self { index, link, shared, reporter, course, counted: None };
        queue.poll(&mut Vec::new());
        queue
    }

    /// Somebody changed something for all queues.
    fn follow(&mut self) {
        match self.shared.halted() {
            Some(Halt::Fenced) => self.link.session().fence(),
            Some(Halt::Lost) => self.link.session().lose(LostReason::Gone),
            None => {}
        }
        let (now, course) = (Instant::now(), self.shared.course());
        let session = self.link.session();
        if course.serial != self.course.serial {
            // A go between two holds may have been missed.
            if !course.held || course.epoch != self.course.epoch {
                session.go(now, course.epoch, course.open);
            }
            if course.held {
                session.hold();
            }
            (self.course, self.counted) = (course, None);
        }
        session.hurry(now);
    }

    fn count(&mut self) {
        if self.course.held
            && let Some(count) = self.link.session().held_count()
            && self.counted != Some(count)
        {
            self.counted = Some(count);
            self.shared.counted(self.course.serial, count);
        }
    }
}

impl BatonQueue {
    fn tell(&mut self) {
        while let Some(notice) = self.link.session().pop_notice() {
            self.reporter.report(&notice, self.link.session(), &self.shared);
            self.shared.pass_on(notice);
        }
    }
}

impl VolumeQueue for BatonQueue {
    unsafe fn submit(&mut self, tag: Tag, op: Op, data: &[libc::iovec]) {
        self.link.session().submit(tag, op, data);
    }

    fn send(&mut self, completions: &mut Vec<Completion>) {
        self.link.send(completions);
        self.tell();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        if self.link.wake().take() {
            self.follow();
        }
        self.link.poll(completions);
        self.count();
        self.tell();
    }

    fn rest(&mut self) {
        // A hold wakes nobody.
        if self.shared.course().serial != self.course.serial {
            self.follow();
        }
        self.link.session().rest();
        self.count();
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.link.wake_fd()
    }

    fn watch_in(&mut self, epoll: &Epoll, data: u64) -> io::Result<()> {
        self.link.watch_in(epoll, data)
    }

    fn in_flight(&self) -> usize {
        self.link.in_flight()
    }
}

impl Drop for BatonQueue {
    fn drop(&mut self) {
        let next = self.link.session().next_seq();
        self.shared.queue_closed(self.index, next);
    }
}

/// Why a volume is not served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Halt {
    Fenced,
    Lost,
}

/// Logs what happens to one connection and tells the volume. One line when a
/// connection is lost and one when it is back, however long it takes.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    lost_at: Option<Instant>,
}

impl Reporter {
    pub(crate) fn report(&mut self, notice: &Notice, session: &Session, shared: &Shared) {
        let who = session.who();
        let (volume, queue) = (who.volume.as_str(), who.queue);
        let server = shared.endpoint();
        match notice {
            Notice::Welcomed(_) => {
                if let Some(lost_at) = self.lost_at.take() {
                    tracing::info!(
                        volume, %queue, %server,
                        after_ms = lost_at.elapsed().as_millis(),
                        requests = session.in_flight(),
                        "connected again; unanswered requests are sent again"
                    );
                }
                shared.set_down(queue, false);
            }
            Notice::Dropped(reason) => {
                if self.lost_at.is_none() {
                    self.lost_at = Some(Instant::now());
                    tracing::warn!(
                        volume, %queue, %server, %reason,
                        requests = session.in_flight(),
                        "no connection to the storage server; requests wait until it is back"
                    );
                } else if let State::Backoff { .. } = session.state() {
                    tracing::debug!(volume, %queue, %server, %reason, "still no connection");
                }
                shared.set_down(queue, true);
            }
            Notice::Fenced => {
                if shared.halt(Halt::Fenced) {
                    tracing::error!(
                        volume, %server,
                        "fenced: the storage server gave the volume to another owner; \
                         this client's I/O stops for good and its guest should be stopped"
                    );
                }
            }
            Notice::Lost(reason) => {
                if shared.halt(Halt::Lost) {
                    tracing::error!(
                        volume, %server, %reason,
                        "the volume is lost; its I/O waits for ever, and a person must look"
                    );
                }
            }
            Notice::WritesLost(changes) => tracing::error!(
                volume, %queue, %server, changes,
                "the storage server went down without a clean stop, and changes that it had \
                 acknowledged but no flush had covered may be gone; the guest's next flush \
                 fails so that it knows: check the guest's filesystem and applications"
            ),
            Notice::StandsBy => tracing::info!(
                volume, %server,
                "the volume is not this client's now; standing by"
            ),
            Notice::Event(_)
            | Notice::Released
            | Notice::View { .. }
            | Notice::Answered { .. }
            | Notice::Opened(_)
            | Notice::Stuck
            | Notice::FirstAnswer => {}
        }
    }
}
