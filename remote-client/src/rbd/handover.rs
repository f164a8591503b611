//! An image's part in a handoff: the right to write it moves with its access
//! record, its lock and the cluster's blocklist.
//!
//! ```text
//!   port (any thread) --- course ----> queues: hold, go
//!                    \--- errands ---> access thread --- events ---> listener
//!   queues --- rested ---------------> access thread: SEAL
//! ```
//!
//! The record is on the image and changed by comparing and swapping, so it
//! decides once whoever asks; there is no server that could forget it. A seal
//! is given when nothing of this client is under way and its lock is given back.
//! A thread of its own does all that may wait for the cluster, one thing after
//! the other.

use std::collections::{BTreeMap, VecDeque};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use baton_fault_point as fault_point;
use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal};
use baton_protocol::handoff::role::Asked;
use baton_protocol::handoff::{Answer, Open, Outcome, Side, Try};
use baton_protocol::{Epoch, VolumeId};

use super::register::{Register, SeatError};
use super::seat::Seat;
use super::volume::{Hub, Shared};
use crate::handoff::{HandoffEvent, HandoffListener, HandoffPort, Opening};

/// Records on images are not frozen and not forgotten: there is one incarnation.
const BOOT_ID: u64 = 1;
/// After a step that failed.
const PAUSE: Duration = Duration::from_millis(200);
/// After somebody who is not ours was found with the lock.
const IN_USE_PAUSE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
enum Errand {
    Ask(Try, Asked),
    Open(Open),
    Go(Option<Opening>),
}

enum Due {
    Errand(Errand),
    Look,
}

/// What the access thread is told and tells. Lives in the volume's hub, under
/// its lock.
#[derive(Default)]
pub(super) struct Handover {
    errands: VecDeque<Errand>,
    /// The queues are to be let go, unless they are held again before.
    going: bool,
    /// In which course each queue has come to rest.
    rested: BTreeMap<u16, u64>,
    news: Vec<HandoffEvent>,
    view: Option<AccessRecord>,
    listener: Option<HandoffListener>,
}

impl Handover {
    pub(super) fn new(view: AccessRecord) -> Self {
        Self { view: Some(view), ..Self::default() }
    }

    pub(super) fn closed(&mut self, queue: u16) {
        self.rested.remove(&queue);
    }
}

/// How long until the record is looked at again. A guest stands still while a
/// seal is waited for; nobody waits for a handoff to be planned.
fn look_after(record: Option<&AccessRecord>, owner: bool) -> Duration {
    Duration::from_millis(match record.map(|record| record.phase) {
        Some(Phase::Sealed) => 5,
        Some(Phase::Armed) if !owner => 10,
        Some(Phase::Armed) => 100,
        _ => 500,
    })
}

impl Shared {
    /// The access thread, until the volume is closed. A client that the cluster
    /// refuses hears nothing of the record any more: `observer` makes another,
    /// that only reads, so that the VM's role learns who has won.
    pub(super) fn attend(&self, register: &Register, observer: impl Fn() -> Option<Register>) {
        let mut observing = None;
        let mut look = Instant::now();
        while let Some(due) = self.next_due(look) {
            if !self.is_over() {
                match due {
                    Due::Errand(errand) => self.run(register, errand),
                    Due::Look => self.look(register),
                }
            } else if self.is_fenced() {
                observing = observing.or_else(&observer);
                if let Some(register) = &observing {
                    self.look(register);
                }
            }
            self.tell_of_handoff();
            let view = self.hub().handover.view.clone();
            look = Instant::now() + look_after(view.as_ref(), !self.is_held());
        }
    }

    /// Waits for what is next; `None`: the volume is to be closed.
    fn next_due(&self, look: Instant) -> Option<Due> {
        let mut hub = self.hub();
        while !hub.is_closing() {
            if let Some(errand) = self.next_errand(&mut hub) {
                return Some(Due::Errand(errand));
            }
            let wait = look.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return Some(Due::Look);
            }
            hub = self.work.wait_timeout(hub, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    /// The first errand that can be done now. A seal waits for the queues.
    fn next_errand(&self, hub: &mut Hub) -> Option<Errand> {
        let (serial, held) = self.course();
        let Handover { errands, rested, .. } = &mut hub.handover;
        let all_rest = hub.queues.keys().all(|queue| rested.get(queue) == Some(&serial));
        let can = |errand: &Errand| match errand {
            Errand::Ask(_, Asked::Seal) => !held || (all_rest && self.is_quiet()),
            _ => true,
        };
        let at = errands.iter().position(can)?;
        errands.remove(at)
    }

    fn run(&self, register: &Register, errand: Errand) {
        let done = match errand {
            // The source went on before its queues had come to rest.
            Errand::Ask(attempt, Asked::Seal) if !self.is_held() => {
                let record = self.hub().handover.view.clone();
                if let Some(record) = record {
                    let answer = (Outcome::Refused, None, record);
                    self.answered(attempt, Asked::Seal, answer);
                }
                Ok(())
            }
            Errand::Ask(attempt, ask) => self.ask_record(register, attempt, ask),
            Errand::Open(open) => self.show(register, open).map(drop),
            // Held again before it was let go.
            Errand::Go(_) if !self.hub().handover.going => Ok(()),
            Errand::Go(opening) => self.go_on(register, opening),
        };
        if let Err(error) = done {
            self.stumbled(&error);
            // Until it is answered, whatever happens to the cluster.
            if !self.is_over() {
                self.hub().handover.errands.push_front(errand);
            }
        }
    }

    /// Says what hinders, and waits a little.
    fn stumbled(&self, error: &SeatError) {
        let image = self.spec();
        let pause = match error {
            SeatError::Ceph(what, source) => {
                self.judge_client(source);
                tracing::warn!(image, error = %source, "Ceph failed to {what}; it is tried again");
                PAUSE
            }
            SeatError::InUse(client) => {
                tracing::error!(
                    image,
                    client,
                    "another Ceph client has the image's lock; the guest's requests wait: stop \
                     that client (`rbd status` shows it)"
                );
                IN_USE_PAUSE
            }
            SeatError::Note => {
                tracing::error!(
                    image,
                    "the image's note `baton.access` cannot be read; the guest's requests wait"
                );
                IN_USE_PAUSE
            }
            SeatError::Refused(refusal, _) => {
                tracing::warn!(image, %refusal, "the image's access record refuses");
                PAUSE
            }
        };
        let until = Instant::now() + pause;
        let mut hub = self.hub();
        while !hub.is_closing() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            hub = self.work.wait_timeout(hub, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn look(&self, register: &Register) {
        match register.read() {
            Ok(seat) => self.saw(&seat),
            Err(error) => self.stumbled(&error),
        }
    }

    fn saw(&self, seat: &Seat) {
        let record = seat.record.without_keys();
        let mut hub = self.hub();
        if hub.handover.view.as_ref() != Some(&record) {
            hub.handover.view = Some(record.clone());
            let record = Box::new(record);
            hub.handover.news.push(HandoffEvent::View { boot_id: BOOT_ID, record });
        }
    }

    fn answered(
        &self,
        attempt: Try,
        ask: Asked,
        (outcome, seat, record): (Outcome, Option<&Seat>, AccessRecord),
    ) {
        let won = outcome == Outcome::Granted && matches!(ask, Asked::Activate | Asked::Reclaim);
        let proof = seat.filter(|_| won).and_then(|seat| seat.record.proof(attempt));
        let answer = Box::new(Answer { outcome, boot_id: BOOT_ID, proof, record: record.clone() });
        let mut hub = self.hub();
        hub.handover.view = Some(record);
        hub.handover.news.push(HandoffEvent::Answered { attempt, ask, answer });
    }

    fn ask_record(&self, register: &Register, attempt: Try, ask: Asked) -> Result<(), SeatError> {
        if ask == Asked::Seal {
            // Nothing is under way, and nothing is sent until the record says so again.
            register.leave()?;
            fault_point::at("lock.left");
        }
        let (name, session) = (self.owner(), self.session());
        let by = By::Backend { name, session };
        let input = match ask {
            Asked::Seal => Input::Sealed { attempt, session },
            Asked::Activate => Input::Activate { attempt, name, session },
            Asked::Reclaim => Input::Reclaim { attempt, by },
            Asked::Abdicate => Input::Abdicate { attempt, by },
            Asked::Unfreeze { boot_id } => {
                Input::Unfreeze { attempt, session, boot_id, boot_id_now: BOOT_ID }
            }
        };
        let client = register.client();
        // A frozen record or one that is given up does not exist on images.
        let [swapping, swapped] = match ask {
            Asked::Seal => ["seal.swapping", "seal.swapped"],
            Asked::Activate => ["activate.swapping", "activate.swapped"],
            Asked::Reclaim | Asked::Abdicate | Asked::Unfreeze { .. } => {
                ["reclaim.swapping", "reclaim.swapped"]
            }
        };
        let step = |seat: &Seat| {
            let next = seat.step(input, Some(client));
            fault_point::at(swapping);
            next
        };
        let (outcome, seat) = match register.change(step) {
            Ok(seat) => {
                fault_point::at(swapped);
                let side = match ask {
                    Asked::Activate => Some(Side::Destination),
                    Asked::Reclaim => Some(Side::Source),
                    _ => None,
                };
                // Asked for and not won: the destination has to speak first.
                let open = side.is_some() && seat.record.winner(attempt) != side;
                (if open { Outcome::Unknown } else { Outcome::Granted }, seat)
            }
            Err(SeatError::Refused(refusal, seat)) => (Outcome::from(&refusal), *seat),
            Err(error) => return Err(error),
        };
        self.answered(attempt, ask, (outcome, Some(&seat), seat.record.without_keys()));
        Ok(())
    }

    /// Shows the anchor's decision to the image's own record; the epoch.
    fn show(&self, register: &Register, open: Open) -> Result<Option<Epoch>, SeatError> {
        let session = self.session();
        let input = Input::Open { attempt: open.attempt, session, proof: open.proof };
        let client = register.client();
        let step = |seat: &Seat| {
            let next = seat.step(input, Some(client));
            fault_point::at("open.swapping");
            next
        };
        let epoch = match register.change(step) {
            Ok(seat) => {
                fault_point::at("open.swapped");
                self.saw(&seat);
                Some(seat.record.epoch)
            }
            Err(SeatError::Refused(refusal, seat)) => {
                tracing::warn!(image = self.spec(), %refusal, "the decision is not taken here");
                self.saw(&seat);
                None
            }
            Err(error) => return Err(error),
        };
        self.hub().handover.news.push(HandoffEvent::Opened(epoch));
        Ok(epoch)
    }

    /// The guest's requests flow, once everybody else is kept out.
    fn go_on(&self, register: &Register, opening: Option<Opening>) -> Result<(), SeatError> {
        if let Some(opening) = opening
            && self.show(register, opening.open)?.is_none()
        {
            return Ok(());
        }
        match register.enter(self.session()) {
            Ok(seat) => {
                fault_point::at("image.entered");
                self.saw(&seat);
            }
            // The record has gone on: the role hears of it, and asks or parks.
            Err(SeatError::Refused(Refusal::StaleEpoch { .. }, seat)) => {
                self.saw(&seat);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let mut hub = self.hub();
        if std::mem::take(&mut hub.handover.going) {
            self.turn(&mut hub, false);
        }
        Ok(())
    }

    fn tell_of_handoff(&self) {
        let (listener, events) = {
            let mut hub = self.hub();
            let Some(listener) = hub.handover.listener.clone() else {
                return hub.handover.news.clear();
            };
            (listener, std::mem::take(&mut hub.handover.news))
        };
        for event in events {
            listener(event);
        }
    }

    /// A queue sends nothing in the course with this serial.
    pub(super) fn rested(&self, queue: u16, serial: u64) {
        self.hub().handover.rested.insert(queue, serial);
        self.work.notify_all();
    }

    /// The first request since the queues were let go was answered.
    pub(super) fn first_answer(&self) {
        let listener = self.hub().handover.listener.clone();
        if let Some(listener) = listener {
            listener(HandoffEvent::FirstAnswer);
        }
    }

    fn send_for(&self, errand: Errand) {
        self.hub().handover.errands.push_back(errand);
        self.work.notify_all();
    }
}

impl HandoffPort for Shared {
    fn volume(&self) -> VolumeId {
        self.volume_id()
    }

    fn claimed(&self) -> Option<Epoch> {
        self.claimed_epoch()
    }

    fn welcomed_after(&self) -> Duration {
        self.opened_after()
    }

    fn listen(&self, listener: HandoffListener) -> Option<(u64, AccessRecord)> {
        let mut hub = self.hub();
        let handover = &mut hub.handover;
        handover.listener = Some(listener);
        handover.news.clear();
        handover.view.clone().map(|record| (BOOT_ID, record))
    }

    fn ask(&self, attempt: Try, ask: Asked) {
        self.send_for(Errand::Ask(attempt, ask));
    }

    fn post(&self, attempt: Try, ask: Asked) {
        self.ask(attempt, ask);
    }

    fn open(&self, open: Open) {
        self.send_for(Errand::Open(open));
    }

    fn open_later(&self, open: Open) {
        self.send_for(Errand::Open(open));
    }

    fn hold(&self) {
        let mut hub = self.hub();
        hub.handover.going = false;
        if !self.is_held() {
            self.turn(&mut hub, true);
        }
    }

    fn is_held(&self) -> bool {
        self.course().1
    }

    fn go(&self, _epoch: Epoch, opening: Option<Opening>) {
        self.hub().handover.going = true;
        self.send_for(Errand::Go(opening));
    }

    fn park(&self) {
        self.give_up_for_good();
    }
}
