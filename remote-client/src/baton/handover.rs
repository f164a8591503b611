//! What the links of one volume know of a handoff: whether they may send and
//! under which epoch, what they sent before they were held, and what the control
//! connection has to ask.
//!
//! ```text
//!   port (any thread) --- course ----> queues: hold (seen when they rest), go (wakes them)
//!                    \--- errands ---> control: ask, open
//!   queues --- counts ---> control: SEAL       control --- events ---> listener
//! ```
//!
//! Decides nothing. Lives in the volume's hub, under its lock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_protocol::access::AccessRecord;
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Count, Open, Outcome, Try};
use baton_protocol::{AccessMode, Epoch, VolumeId};

use super::session::{Notice, Session};
use super::volume::{Shared, wake_queues};
use crate::handoff::{HandoffEvent, HandoffListener, HandoffPort, Opening};

/// What the data path may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Course {
    /// Rises with every change.
    pub(crate) serial: u64,
    pub(crate) held: bool,
    /// The session has owned the volume: its connections come as the owner's.
    pub(crate) owner: bool,
    pub(crate) epoch: Epoch,
    /// Shown by connections in standby.
    pub(crate) open: Option<Open>,
}

#[derive(Debug)]
enum Errand {
    Ask(Try, Asked),
    Open(Open),
    OpenLater(Open),
}

/// A SEAL that waits for the queues' counts.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    attempt: Try,
    /// The queues were asked for them.
    called: bool,
}

/// See the module's documentation.
pub(crate) struct Handover {
    course: Course,
    /// What each queue sent before it was held in this course.
    counts: BTreeMap<u16, Count>,
    errands: Vec<Errand>,
    seal: Option<Waiting>,
    news: Vec<HandoffEvent>,
    view: Option<(u64, AccessRecord)>,
    listener: Option<HandoffListener>,
}

impl Handover {
    pub(crate) fn new(mode: AccessMode, epoch: Epoch, view: Option<(u64, AccessRecord)>) -> Self {
        let owner = mode != AccessMode::Standby;
        Self {
            course: Course { serial: 0, held: !owner, owner, epoch, open: None },
            counts: BTreeMap::new(),
            errands: Vec::new(),
            seal: None,
            news: Vec::new(),
            view,
            listener: None,
        }
    }

    pub(crate) fn course(&self) -> Course {
        self.course
    }

    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    fn turn(&mut self, change: impl FnOnce(&mut Course)) {
        change(&mut self.course);
        self.course.serial += 1;
        self.counts.clear();
    }
}

/// The control connection's memory of what it was sent for.
#[derive(Debug, Default)]
pub(crate) struct Errands {
    serial: u64,
}

impl Errands {
    /// Does what was asked of the control connection since the last call.
    pub(crate) fn run(&mut self, session: &mut Session, shared: &Shared) {
        let now = Instant::now();
        let mut hub = shared.hub();
        let open_queues = hub.open_queues();
        let handover = &mut hub.handover;
        let course = handover.course;
        if self.serial != course.serial {
            self.serial = course.serial;
            if !course.held {
                session.go(now, course.epoch, course.open);
            }
        }
        for errand in handover.errands.drain(..) {
            match errand {
                Errand::Ask(attempt, Asked::Seal) => {
                    handover.seal = Some(Waiting { attempt, called: false });
                }
                Errand::Ask(attempt, ask) => session.ask(now, attempt, ask),
                Errand::Open(open) => session.open(now, open),
                Errand::OpenLater(open) => session.open_later(now, open),
            }
        }
        if !course.held {
            // The source went on before its queues had come to rest.
            if let (Some(Waiting { attempt, .. }), Some((boot_id, record))) =
                (handover.seal.take(), &handover.view)
            {
                let (outcome, record) = (Outcome::Refused, record.clone());
                let answer = Answer { outcome, boot_id: *boot_id, proof: None, record };
                let (ask, answer) = (Asked::Seal, Box::new(answer));
                handover.news.push(HandoffEvent::Answered { attempt, ask, answer });
            }
            return;
        }
        // Later counts may show more answers than earlier ones. What was sent on a
        // queue that is closed nobody waits for.
        let counts = open_queues.iter().filter_map(|queue| handover.counts.get(queue)).copied();
        session.set_counts(counts.collect());
        let Some(waiting) = &mut handover.seal else { return };
        if open_queues.iter().all(|queue| handover.counts.contains_key(queue)) {
            session.ask(now, waiting.attempt, Asked::Seal);
            handover.seal = None;
        } else if !std::mem::replace(&mut waiting.called, true) {
            wake_queues(hub);
        }
    }
}

impl Shared {
    /// What the control connection had to tell of a handoff, and the queues.
    pub(crate) fn tell_of_handoff(&self, notices: Vec<Notice>) {
        let (listener, events) = {
            let mut hub = self.hub();
            for notice in notices {
                let told = match &notice {
                    Notice::View { boot_id, record } => Some((*boot_id, (**record).clone())),
                    // The server does not push what an answer says.
                    Notice::Answered { answer, .. } => {
                        Some((answer.boot_id, answer.record.clone()))
                    }
                    _ => None,
                };
                if told.is_some() {
                    hub.handover.view = told;
                    // What was refused before may be granted now.
                    hub.wake_down();
                }
                hub.handover.news.extend(event(notice));
            }
            let Some(listener) = hub.handover.listener.clone() else {
                return hub.handover.news.clear();
            };
            (listener, std::mem::take(&mut hub.handover.news))
        };
        for event in events {
            listener(event);
        }
    }

    /// A queue's news of a handoff. The control thread tells what may lead to
    /// more; the first answer is told here, which wakes nobody while the guest's
    /// other disks start.
    pub(crate) fn pass_on(&self, notice: Notice) {
        match event(notice) {
            Some(event @ HandoffEvent::Stuck) => {
                self.hub().handover.news.push(event);
                self.wake_control();
            }
            Some(event @ HandoffEvent::FirstAnswer) => {
                let listener = self.hub().handover.listener.clone();
                if let Some(listener) = listener {
                    listener(event);
                }
            }
            _ => {}
        }
    }

    /// A queue is held in the course with this serial, and sent that much.
    pub(crate) fn counted(&self, serial: u64, count: Count) {
        let mut hub = self.hub();
        if hub.handover.course.serial == serial {
            hub.handover.counts.insert(count.queue.0, count);
            let sealing = hub.handover.seal.is_some();
            drop(hub);
            // The last of them lets a SEAL leave.
            if sealing {
                self.run_errands();
            }
        }
    }

    pub(crate) fn course(&self) -> Course {
        self.hub().handover.course
    }

    fn send_for(&self, errand: Errand) {
        self.hub().handover.errands.push(errand);
        self.run_errands();
    }
}

fn event(notice: Notice) -> Option<HandoffEvent> {
    Some(match notice {
        Notice::View { boot_id, record } => HandoffEvent::View { boot_id, record },
        Notice::Answered { attempt, ask, answer } => {
            HandoffEvent::Answered { attempt, ask, answer }
        }
        Notice::Opened(epoch) => HandoffEvent::Opened(epoch),
        Notice::Stuck => HandoffEvent::Stuck,
        Notice::FirstAnswer => HandoffEvent::FirstAnswer,
        _ => return None,
    })
}

impl HandoffPort for Shared {
    fn volume(&self) -> VolumeId {
        self.grant().volume
    }

    fn claimed(&self) -> Option<Epoch> {
        (self.mode() == AccessMode::Owner).then_some(self.grant().epoch)
    }

    fn welcomed_after(&self) -> Duration {
        Shared::welcomed_after(self)
    }

    fn listen(&self, listener: HandoffListener) -> Option<(u64, AccessRecord)> {
        let mut hub = self.hub();
        let handover = &mut hub.handover;
        handover.listener = Some(listener);
        handover.news.clear();
        handover.view.clone()
    }

    fn ask(&self, attempt: Try, ask: Asked) {
        self.send_for(Errand::Ask(attempt, ask));
    }

    fn post(&self, attempt: Try, ask: Asked) {
        self.hub().handover.errands.push(Errand::Ask(attempt, ask));
        self.wake_control();
    }

    fn open(&self, open: Open) {
        self.send_for(Errand::Open(open));
    }

    fn open_later(&self, open: Open) {
        self.send_for(Errand::OpenLater(open));
    }

    // The queues see it when they rest, or when a SEAL asks for their counts: who holds a volume stops its rings, which
    // wakes them anyway.
    fn hold(&self) {
        let mut hub = self.hub();
        if !hub.handover.course.held {
            hub.handover.turn(|course| course.held = true);
        }
    }

    fn is_held(&self) -> bool {
        self.course().held
    }

    fn go(&self, epoch: Epoch, opening: Option<Opening>) {
        if let Some(opening) = opening
            && !self.course().owner
        {
            self.ledger().inherit(opening.generation);
        }
        let mut hub = self.hub();
        hub.handover.turn(|course| {
            let open = opening.map(|opening| opening.open);
            *course = Course { held: false, owner: true, epoch, open, ..*course };
        });
        wake_queues(hub);
        self.run_errands();
    }

    fn park(&self) {
        self.halt(super::queue::Halt::Fenced);
    }
}
