//! The coordinator: arms, watches, cancels, settles. It decides nothing, may be
//! killed at any time, and may have a successor that it does not know of.

use baton_protocol::access::Refusal;
use baton_protocol::handoff::{Plan, Proof, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};

use crate::agenda::{MS, Time};
use crate::bug::Bug;
use crate::stage::{Call, Event, Reply, Stage, note};

/// How long the members may take to be armed.
const ARMING: Time = 80 * MS;
/// How long a handoff may take from then on.
const WATCHING: Time = 250 * MS;

/// What it does with a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    Arming,
    Watching,
    Cancelling,
    Settling { winner: Side, session: SessionId, proof: Option<Proof> },
}

/// One handoff in the journal.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) round: u64,
    pub(crate) plan: Plan,
    pub(crate) stand: Stand,
    since: Time,
    /// Each member's next epoch when it was planned.
    next_epochs: Vec<Epoch>,
    armed: Vec<bool>,
    settled: Vec<bool>,
    /// Once the source has won, it is settled at the anchor alone and then lost with
    /// the journal.
    pub(crate) is_to_be_lost: bool,
}

/// What outlives a coordinator.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    pub(crate) term: u64,
    pub(crate) row: Option<Row>,
    /// Round and winner of the last handoff that is over.
    pub(crate) finished: Option<(u64, Side)>,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) number: usize,
    pub(crate) up: bool,
    pub(crate) frozen_until: Time,
    pub(crate) term: u64,
}

/// What it has agents do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Start a standby backend on the destination.
    StartStandby,
}

pub(crate) fn place(volume: VolumeId) -> usize {
    usize::try_from(volume.0).expect("few volumes") - 1
}

impl Row {
    pub(crate) fn new(round: u64, plan: Plan, next_epochs: Vec<Epoch>, now: Time) -> Self {
        let volumes = next_epochs.len();
        let (armed, settled) = (vec![false; volumes], vec![false; volumes]);
        let is_to_be_lost = false;
        let stand = Stand::Arming;
        Self { round, plan, stand, since: now, next_epochs, armed, settled, is_to_be_lost }
    }

    pub(crate) fn anchor(&self) -> usize {
        place(self.plan.anchor)
    }

    fn arm(&self, volume: usize) -> Call {
        Call::Arm { plan: Box::new(self.plan.clone()), next_epoch: self.next_epochs[volume] }
    }

    /// It is settled at the anchor alone.
    fn is_lost(&self) -> bool {
        self.is_to_be_lost && matches!(self.stand, Stand::Settling { winner: Side::Source, .. })
    }

    /// The orchestrator gives up.
    pub(crate) fn cancel(&mut self) {
        if matches!(self.stand, Stand::Arming | Stand::Watching) {
            self.stand = Stand::Cancelling;
        }
    }
}

impl Coordinator {
    pub(crate) fn start(stage: &mut Stage, journal: &mut Journal, number: usize) -> Self {
        journal.term += 1;
        if let Some(row) = &mut journal.row {
            // Only the plan and the decision are in the journal.
            row.armed.iter_mut().chain(&mut row.settled).for_each(|known| *known = false);
        }
        note!(stage, "coordinator {number} starts with term {}", journal.term);
        stage.after(MS, Event::CoordinatorTick { coordinator: number });
        Self { number, up: true, frozen_until: 0, term: journal.term }
    }

    /// `is_dead`: the destination's agent says that its backend is gone.
    pub(crate) fn tick(
        &mut self,
        stage: &mut Stage,
        journal: &mut Journal,
        is_dead: bool,
    ) -> Option<Order> {
        stage.after(3 * MS, Event::CoordinatorTick { coordinator: self.number });
        let row = journal.row.as_mut()?;
        let (anchor, attempt) = (row.anchor(), row.plan.attempt);
        let waited = stage.now.saturating_sub(row.since);
        match row.stand {
            Stand::Arming => {
                if !row.armed[anchor] {
                    self.call(stage, anchor, row.arm(anchor));
                } else {
                    for volume in 0..row.armed.len() {
                        if !row.armed[volume] {
                            self.call(stage, volume, row.arm(volume));
                        }
                    }
                }
                if row.armed.iter().all(|armed| *armed) {
                    row.stand = Stand::Watching;
                    row.since = stage.now;
                    note!(stage, "all members are armed");
                    return Some(Order::StartStandby);
                }
                if waited > ARMING {
                    row.stand = Stand::Cancelling;
                }
            }
            Stand::Watching => {
                self.call(stage, anchor, Call::View);
                if waited > WATCHING {
                    row.stand = Stand::Cancelling;
                }
            }
            Stand::Cancelling => {
                if stage.has(Bug::DisarmSealed) {
                    for volume in (0..row.armed.len()).filter(|volume| *volume != anchor) {
                        self.call(stage, volume, Call::Disarm(attempt));
                    }
                }
                if is_dead {
                    self.call(stage, anchor, Call::Abdicate(attempt));
                }
                self.call(stage, anchor, Call::Reclaim(attempt));
            }
            Stand::Settling { session, proof, .. } => {
                let shown = proof.map(|proof| (session, proof));
                let mut others = false;
                for volume in 0..row.settled.len() {
                    if volume != anchor && !row.settled[volume] && !row.is_lost() {
                        others = true;
                        self.call(stage, volume, Call::Settle(attempt, shown));
                    }
                }
                if !others || row.is_lost() {
                    self.call(stage, anchor, Call::Settle(attempt, shown));
                } else if stage.chance(0.2) {
                    // A later incarnation of the winner has a later proof.
                    self.call(stage, anchor, Call::View);
                }
            }
        }
        None
    }

    fn call(&self, stage: &mut Stage, volume: usize, call: Call) {
        stage.call(self.number, self.term, volume, call);
    }

    pub(crate) fn hear(&mut self, stage: &mut Stage, journal: &mut Journal, reply: Reply) {
        if let Some(Refusal::StaleTerm { .. }) = reply.refused {
            note!(stage, "coordinator {} is over", self.number);
            self.up = false;
            return;
        }
        let Some(row) = &mut journal.row else { return };
        let (anchor, attempt) = (row.anchor(), row.plan.attempt);
        if let (Call::Disarm(other), Some(Refusal::TooLate)) = (&reply.call, &reply.refused)
            && *other != attempt
        {
            // Its winner has opened it: that says how the forgotten one ended.
            return self.call(stage, reply.volume, Call::Settle(*other, None));
        }
        let asked = match &reply.call {
            Call::Arm { plan, .. } => Some(plan.attempt),
            Call::Reclaim(attempt)
            | Call::Abdicate(attempt)
            | Call::Settle(attempt, _)
            | Call::Disarm(attempt) => Some(*attempt),
            Call::View | Call::Fence { .. } => reply.armed,
            Call::Ask { attempt, member } => {
                return self.tidy(stage, *attempt, *member, &reply);
            }
        };
        if asked != Some(attempt) {
            return;
        }
        if reply.volume == anchor
            && let Some((winner, session, proof)) = reply.decided
        {
            if !matches!(row.stand, Stand::Settling { .. }) {
                note!(stage, "the coordinator learns that the {winner:?} has won");
            }
            row.stand = Stand::Settling { winner, session, proof };
        }
        match (&reply.call, &reply.refused) {
            // Another handoff, which the journal does not know, is in the way.
            (Call::Arm { .. }, Some(Refusal::HandoffInProgress(other)))
                if *other != attempt && !stage.has(Bug::NeverDisarms) =>
            {
                if let Some(decides) = reply.anchor {
                    let member = reply.volume;
                    self.call(stage, decides, Call::Ask { attempt: *other, member });
                }
            }
            (Call::Arm { .. }, None) => row.armed[reply.volume] = true,
            (Call::Arm { .. }, Some(Refusal::NotOwner { .. } | Refusal::StalePlan { .. })) => {
                // It was settled, or never armed, and it cannot be armed any more.
                if matches!(row.stand, Stand::Settling { .. }) {
                    row.settled[reply.volume] = true;
                } else if reply.volume == anchor && reply.decided.is_none() {
                    note!(stage, "round {} cannot begin", row.round);
                    journal.finished = Some((row.round, Side::Source));
                    journal.row = None;
                    return;
                } else {
                    row.stand = Stand::Cancelling;
                }
            }
            (Call::Settle(..), None) => row.settled[reply.volume] = true,
            // So that a late ARM finds the try decided.
            (Call::Settle(..) | Call::Reclaim(_), Some(Refusal::NoSuchHandoff(_))) => {
                self.call(stage, reply.volume, row.arm(reply.volume));
            }
            (Call::Settle(..), Some(Refusal::BadProof)) => self.call(stage, anchor, Call::View),
            _ => {}
        }
        if let Stand::Settling { winner, .. } = row.stand
            && (row.settled.iter().all(|settled| *settled)
                || (row.is_lost() && row.settled[anchor]))
        {
            note!(stage, "round {} is settled for the {winner:?}", row.round);
            journal.finished = Some((row.round, winner));
            journal.row = None;
        }
    }

    /// What the anchor says of a try that a member is still in.
    fn tidy(&self, stage: &mut Stage, attempt: Try, member: usize, reply: &Reply) {
        if let Some((_, session, proof)) = reply.decided {
            let shown = proof.map(|proof| (session, proof));
            self.call(stage, member, Call::Settle(attempt, shown));
        } else if reply.armed != Some(attempt) && member != reply.volume {
            note!(stage, "nobody can win {} at volume {member} any more", attempt.id.0);
            self.call(stage, member, Call::Disarm(attempt));
        }
    }
}
