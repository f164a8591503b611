//! One queue of a Baton volume: a [`Link`] that reports to its volume.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

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
}

impl BatonQueue {
    /// Begins to connect.
    pub(crate) fn start(index: u16, mut link: Link, shared: Arc<Shared>) -> Self {
        link.session().start(Instant::now());
        let mut queue = Self { index, link, shared, reporter: Reporter::default() };
        queue.poll(&mut Vec::new());
        queue
    }
}

impl BatonQueue {
    fn tell(&mut self) {
        while let Some(notice) = self.link.session().pop_notice() {
            self.reporter.report(&notice, self.link.session(), &self.shared);
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
            match self.shared.halted() {
                Some(Halt::Fenced) => self.link.session().fence(),
                Some(Halt::Lost) => self.link.session().lose(LostReason::Gone),
                None => {}
            }
        }
        self.link.poll(completions);
        self.tell();
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.link.wake_fd()
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
            Notice::Event(_) | Notice::Released => {}
        }
    }
}
