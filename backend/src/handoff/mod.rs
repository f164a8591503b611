//! The VM's part in a handoff: one role for all its volumes, and its edges.
//!
//! ```text
//!   disk threads --started, stopped--> +------+ --ask, open, hold, go--> volumes
//!   volumes --view, answer, stuck----> | role |
//!   control socket --order-----------> +------+ --parked--> log, control socket
//! ```
//!
//! The role decides, the storage decides for it; here facts are carried in and
//! orders out, under one lock that no request ever takes. Nothing here waits:
//! a volume's port takes what it is told and says later what came of it.

mod cooperative;
mod journal;
mod member;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use baton_fault_point as fault_point;
use baton_protocol::access::{AccessRecord, Phase};
use baton_protocol::handoff::role::{Asked, Input, Order, Output, Parked, Standing};
use baton_protocol::handoff::{Open, Role, Side, Try};
use baton_protocol::{Epoch, SessionId};
use baton_remote_client::{HandoffEvent, HandoffPort, Opening, Volume};
use serde::Serialize;

pub use cooperative::{CooperativeVm, ShownCooperative};
use journal::{Event, Journal, Moment, Timings};
pub use member::MemberHandle;

/// One volume that can be handed over.
#[derive(Debug)]
struct Member {
    /// Of the disk.
    name: String,
    volume: Arc<dyn Volume>,
}

impl Member {
    fn port(&self) -> &dyn HandoffPort {
        self.volume.handoff().expect("only volumes with a port are members")
    }
}

#[derive(Debug)]
struct State {
    role: Role,
    /// What each member's server said last.
    views: Vec<Option<(u64, AccessRecord)>>,
    /// Whether each member was another's when this process first saw it.
    foreign: Vec<Option<bool>>,
    /// The last handoff that named this VM.
    last: Option<(Try, Side)>,
    /// Members whose rings run, and those that have stopped but not drained.
    running: Vec<bool>,
    draining: Vec<bool>,
    /// What members whose rings do not run may do when these start, or when the server has heard the decision. A VM
    /// has many disks and starts them one after another: until then they have nothing to send, and the first ones wait
    /// for the storage.
    ready: Vec<Option<(Epoch, Option<Opening>)>>,
    journal: Journal,
    /// Of the role after its last step.
    standing: Standing,
}

impl State {
    /// A member's record says who won the last handoff.
    fn is_decided(&self) -> bool {
        let records = self.views.iter().flatten().map(|(_, record)| record);
        self.last.is_some_and(|(last, _)| records.into_iter().any(|r| r.winner(last).is_some()))
    }
}

/// See the module's documentation. One per process.
#[derive(Debug)]
pub struct VmHandoff {
    owner: String,
    /// Said at the start.
    only_for: Option<Try>,
    members: Vec<Member>,
    state: Mutex<State>,
    /// Disks were let go, and none of them has been answered since.
    answer_due: AtomicBool,
}

/// Why an order is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No member's record names a handoff of this VM.
    #[error("no handoff of this VM is under way; arm one first")]
    NoHandoff,
    /// It is over for this process.
    #[error("{0}")]
    Parked(Parked),
}

/// How the VM stands, for the control socket.
#[derive(Debug, Serialize)]
pub struct Shown {
    standing: Standing,
    parked: Option<Parked>,
    /// The try that this process was started for, as `--standby` takes it.
    only_for: Option<String>,
    /// Of the last handoff that named this VM.
    id: Option<String>,
    attempt: u32,
    side: Option<Side>,
    members: Vec<ShownMember>,
    timings: Timings,
    events: Vec<Event>,
}

#[derive(Debug, Serialize)]
struct ShownMember {
    volume: String,
    id: String,
    phase: Option<&'static str>,
    epoch: Option<Epoch>,
    held: bool,
    boot_id: Option<String>,
    /// How long the server took to welcome the control connection, µs.
    welcomed_us: u64,
}

impl VmHandoff {
    /// The role of `owner` on those of the volumes that can be handed over, each
    /// with its disk's name; with every volume's place. `None`: there are none.
    /// As a standby it may be good for one try only.
    #[must_use]
    pub fn new(
        owner: &str,
        session: SessionId,
        only_for: Option<Try>,
        volumes: &[(String, Arc<dyn Volume>)],
    ) -> (Option<Arc<Self>>, Vec<Option<MemberHandle>>) {
        let members: Vec<Member> = volumes
            .iter()
            .filter(|(_, volume)| volume.handoff().is_some())
            .map(|(name, volume)| Member { name: name.clone(), volume: Arc::clone(volume) })
            .collect();
        if members.is_empty() {
            return (None, volumes.iter().map(|_| None).collect());
        }
        let ids: Vec<_> = members.iter().map(|member| member.port().volume()).collect();
        let role = Role::new(owner, session, &ids);
        let role = match only_for {
            Some(attempt) => role.only_for(attempt),
            None => role,
        };
        let state = State {
            standing: role.standing(),
            role,
            views: vec![None; members.len()],
            foreign: vec![None; members.len()],
            last: None,
            running: vec![false; members.len()],
            draining: vec![false; members.len()],
            ready: vec![None; members.len()],
            journal: Journal::default(),
        };
        let vm = Arc::new(Self {
            owner: owner.to_owned(),
            only_for,
            members,
            state: Mutex::new(state),
            answer_due: AtomicBool::new(false),
        });
        for (at, member) in vm.members.iter().enumerate() {
            if let Some(epoch) = member.port().claimed() {
                vm.feed(Input::Claimed { member: at, epoch });
            }
        }
        // Only when all that was claimed is known: a view may decide something. And before any front-end comes: whose
        // the volume is decides what it may bring. What is news meanwhile waits for the lock.
        let mut state = vm.state();
        let known: Vec<_> = vm
            .members
            .iter()
            .enumerate()
            .map(|(at, member)| {
                let weak: Weak<Self> = Arc::downgrade(&vm);
                member.port().listen(Arc::new(move |event| {
                    if let Some(vm) = weak.upgrade() {
                        vm.hear(at, event);
                    }
                }))
            })
            .collect();
        for (member, view) in known.into_iter().enumerate() {
            if let Some((boot_id, record)) = view {
                let record = Box::new(record);
                vm.take(&mut state, Input::View { member, boot_id, record });
            }
        }
        drop(state);
        let mut places = 0..;
        let handles = volumes.iter().map(|(_, volume)| {
            volume.handoff()?;
            Some(MemberHandle::Stored { vm: Arc::clone(&vm), at: places.next()? })
        });
        let handles = handles.collect();
        (Some(vm), handles)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The role is a value that is replaced by whole steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what somebody outside orders.
    ///
    /// # Errors
    /// [`OrderError`] when there is nothing to do it to.
    pub fn order(&self, order: Order) -> Result<(), OrderError> {
        {
            let state = self.state();
            if let Some(why) = state.role.parked() {
                return Err(OrderError::Parked(why));
            }
            if state.role.attempt().is_none() {
                return Err(OrderError::NoHandoff);
            }
        }
        self.feed(Input::Order(order));
        Ok(())
    }

    /// Why the VM must not run here, if so.
    #[must_use]
    pub fn parked(&self) -> Option<Parked> {
        self.state().role.parked()
    }

    /// How the VM stands.
    #[must_use]
    pub fn show(&self) -> Shown {
        let state = self.state();
        let members = self.members.iter().enumerate().map(|(at, member)| {
            let view = state.views[at].as_ref();
            ShownMember {
                volume: member.name.clone(),
                id: member.port().volume().to_string(),
                phase: view.map(|(_, record)| record.phase.name()),
                epoch: view.map(|(_, record)| record.epoch),
                held: state.role.is_held(at),
                boot_id: view.map(|(boot_id, _)| format!("{boot_id:016x}")),
                welcomed_us: member
                    .port()
                    .welcomed_after()
                    .as_micros()
                    .try_into()
                    .unwrap_or(u64::MAX),
            }
        });
        Shown {
            standing: state.role.standing(),
            parked: state.role.parked(),
            only_for: self.only_for.map(|attempt| attempt.to_string()),
            id: state.last.map(|(attempt, _)| attempt.id.to_string()),
            attempt: state.last.map_or(0, |(attempt, _)| attempt.attempt),
            side: state.last.map(|(_, side)| side),
            members: members.collect(),
            timings: state.journal.timings(),
            events: state.journal.events(),
        }
    }

    fn hear(&self, member: usize, event: HandoffEvent) {
        let input = match event {
            HandoffEvent::View { boot_id, record } => Input::View { member, boot_id, record },
            HandoffEvent::Answered { attempt, ask, answer } => {
                Input::Answered { member, attempt, ask, answer }
            }
            HandoffEvent::Opened(epoch) => Input::Opened { member, epoch },
            HandoffEvent::Stuck => Input::Stuck { member },
            HandoffEvent::FirstAnswer => {
                // The other disks' are no news, and a disk that starts has the lock.
                if self.answer_due.swap(false, Ordering::Relaxed) {
                    self.state().journal.note_once(Moment::FirstRequest);
                }
                return;
            }
        };
        self.feed(input);
    }

    fn feed(&self, input: Input) {
        self.take(&mut self.state(), input);
    }

    fn take(&self, state: &mut State, input: Input) {
        self.keep(state, &input);
        let outputs = state.role.step(input);
        // A member that may go on shows the decision itself, in front of its requests.
        let goes: Vec<usize> = outputs.iter().filter_map(goes).collect();
        // All disks are sealed at once; the one that stopped last does not wait until all seals are sent.
        let mut asks = 0;
        for output in outputs {
            match output {
                Output::Open { member, .. } if goes.contains(&member) => {
                    fault_point::at("open.sent");
                }
                output => {
                    asks += usize::from(matches!(output, Output::Ask { .. }));
                    self.act(state, output, asks > 1);
                }
            }
        }
        let standing = state.role.standing();
        let before = std::mem::replace(&mut state.standing, standing);
        if standing != before {
            tracing::debug!(owner = self.owner, ?before, ?standing, "handoff");
            match standing {
                Standing::Ready => fault_point::at("standby.ready"),
                Standing::Sealed => fault_point::at("sealed.heard"),
                _ => {}
            }
            if standing == Standing::Sealed {
                state.journal.note(Moment::Sealed);
            }
        }
    }

    /// What is shown and not the role's affair.
    fn keep(&self, state: &mut State, input: &Input) {
        let (member, boot_id, record) = match input {
            Input::View { member, boot_id, record } => (*member, *boot_id, &**record),
            Input::Answered { member, answer, .. } => (*member, answer.boot_id, &answer.record),
            Input::Opened { member, epoch: Some(_) } => {
                // Not later than this: the decision may be forgotten when the rings start.
                self.let_go(state, *member);
                return state.journal.note(Moment::Opened);
            }
            _ => return,
        };
        if let Some(handoff) = &record.handoff {
            let plan = &handoff.plan;
            let side = if plan.from == self.owner { Some(Side::Source) } else { None };
            let side = side.or_else(|| (plan.to == self.owner).then_some(Side::Destination));
            if let Some(side) = side
                && state.last.is_none_or(|(last, _)| last <= plan.attempt)
            {
                state.last = Some((plan.attempt, side));
            }
        }
        state.foreign[member].get_or_insert_with(|| {
            let owned = record.owner.as_ref().is_some_and(|owner| owner.name == self.owner);
            let leaves = record.handoff.as_ref().is_some_and(|h| h.plan.from == self.owner);
            !owned && !leaves
        });
        state.views[member] = Some((boot_id, record.clone()));
    }

    fn let_go(&self, state: &mut State, member: usize) {
        if let Some((epoch, opening)) = state.ready[member].take() {
            self.members[member].port().go(epoch, opening);
        }
    }

    fn ask(&self, state: &mut State, member: usize, attempt: Try, ask: Asked, more: bool) {
        match ask {
            Asked::Seal => state.journal.note_once(Moment::SealSent),
            Asked::Activate => state.journal.note_once(Moment::ActivateSent),
            Asked::Reclaim => state.journal.note_once(Moment::ReclaimSent),
            Asked::Abdicate | Asked::Unfreeze { .. } => {}
        }
        let port = self.members[member].port();
        if more {
            port.post(attempt, ask)
        } else {
            port.ask(attempt, ask)
        }
        fault_point::at(match ask {
            Asked::Seal => "seal.sent",
            Asked::Activate => "activate.sent",
            Asked::Reclaim => "reclaim.sent",
            Asked::Abdicate => "abdicate.sent",
            Asked::Unfreeze { .. } => "unfreeze.sent",
        });
    }

    /// `more`: another member was asked before, in the same step.
    fn act(&self, state: &mut State, output: Output, more: bool) {
        match output {
            Output::Ask { member, attempt, ask } => self.ask(state, member, attempt, ask, more),
            Output::Open { member, attempt, proof } => {
                self.members[member].port().open(Open { attempt, proof });
                fault_point::at("open.sent");
            }
            Output::Hold { member } => {
                state.ready[member] = None;
                self.members[member].port().hold();
            }
            Output::Go { member, epoch, open } => {
                self.answer_due.store(true, Ordering::Relaxed);
                let record = state.views[member].as_ref().map(|(_, record)| record);
                match open {
                    Some((_, proof)) if proof.side == Side::Destination => {
                        fault_point::at("activated.heard");
                        state.journal.note_once(Moment::Activated);
                    }
                    // It was held for a seal that was not sent.
                    None if record.is_some_and(|record| record.phase == Phase::Armed) => {}
                    _ => {
                        fault_point::at("reclaimed.heard");
                        state.journal.note_once(Moment::Reclaimed);
                    }
                }
                let handoff = record.and_then(|record| record.handoff.as_ref());
                let generation = handoff.map_or(0, |handoff| handoff.generation);
                let opening = open
                    .map(|(attempt, proof)| Opening { open: Open { attempt, proof }, generation });
                if state.running[member] || state.draining[member] {
                    self.members[member].port().go(epoch, opening);
                } else {
                    state.ready[member] = Some((epoch, opening));
                    if let Some(Opening { open, .. }) = opening {
                        self.members[member].port().open_later(open);
                    }
                }
            }
            Output::Park(why) => {
                state.journal.note(Moment::Parked);
                for member in &self.members {
                    member.port().park();
                }
                let why = if why == Parked::Lost && !state.is_decided() {
                    // Nobody handed it over.
                    "fenced: the volume was given to another owner".to_owned()
                } else {
                    why.to_string()
                };
                tracing::error!(
                    owner = self.owner,
                    "{why}; the VM's requests wait for ever and see no error: stop this VM"
                );
            }
        }
    }
}

fn goes(output: &Output) -> Option<usize> {
    match output {
        Output::Go { member, .. } => Some(*member),
        _ => None,
    }
}

/// What the disk at a place tells and asks.
impl VmHandoff {
    fn started(&self, at: usize) {
        {
            let mut state = self.state();
            if !state.running.contains(&true) {
                state.journal.note(Moment::RingsStarted);
            }
            state.running[at] = true;
            state.draining[at] = false;
            self.let_go(&mut state, at);
        }
        self.feed(Input::Started { member: at });
    }

    fn stopped(&self, at: usize, migrating: bool) {
        {
            let mut state = self.state();
            if !state.running.contains(&false) {
                state.journal.note(Moment::RingsStopped);
            }
            state.running[at] = false;
            state.draining[at] = true;
        }
        self.feed(Input::Stopped { member: at, migrating });
    }

    fn drained(&self, at: usize) {
        let mut state = self.state();
        if std::mem::take(&mut state.draining[at])
            && !state.draining.contains(&true)
            && !state.running.contains(&true)
        {
            state.journal.note(Moment::Drained);
        }
    }

    fn awaits_another_machine(&self, at: usize, arrived: Option<Try>) -> bool {
        let claimed = self.members[at].port().claimed().is_some();
        let state = self.state();
        let expected = state.role.arrival();
        !claimed && state.foreign[at].unwrap_or(true) && (arrived.is_none() || arrived != expected)
    }
}
