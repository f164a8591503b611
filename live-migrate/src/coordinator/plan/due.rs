//! What is to be done about a handoff, from its row alone.

use super::{Member, Progress, Row, Seen, Standing, State, Trigger, Winner};

/// What is to be done about a handoff. All may be done twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// ARM a member.
    Arm(usize),
    /// Look at a member's record and say when it changes.
    Watch(usize),
    /// Have a standby backend at the destination, and look at it.
    Stand,
    /// Look at the destination's backend.
    Inspect,
    /// Count down to [`Input::Late`].
    Countdown,
    /// Order the source's backend to seal.
    OrderSeal,
    /// Order the destination's backend to activate.
    OrderActivate,
    /// RECLAIM at the anchor, until it says who has the volumes.
    Reclaim,
    /// ABDICATE at the anchor.
    Abdicate,
    /// Read the proof at the anchor.
    Prove,
    /// SETTLE a member.
    Settle(usize),
    /// Have the source's backend seal and end, and its agent prove it.
    EndSource,
    /// Let the destination's backend serve.
    Permit,
    /// Let the source's agent keep its volumes: an order to end that is still on its way
    /// is void.
    Keep,
    /// Let the destination's agent end what stands by, for good.
    Dismiss,
    /// Stop the source's backend.
    StopSource,
    /// Stop the destination's backend.
    StopDestination,
}

impl Row {
    /// What is to be done, from what is known.
    #[must_use]
    pub fn due(&self) -> Vec<Action> {
        let mut due = Vec::new();
        // Fenced in the middle; after its end the loser's backend is still to be stopped.
        if self.fenced && self.state == State::Failed {
            return due;
        }
        if self.is_cooperative() {
            return self.due_cooperative();
        }
        let of = |progress: Progress| {
            move |(place, member): (usize, &Member)| (member.progress == progress).then_some(place)
        };
        let members = || self.members.iter().enumerate();
        match self.winner {
            None if self.state.is_over() => {}
            None => {
                due.extend(members().filter_map(of(Progress::Armed)).map(Action::Watch));
                if self.back.is_some() {
                    self.due_back(&mut due);
                } else {
                    self.due_forth(&mut due);
                }
            }
            Some(winner) => {
                // An ARM that is still on its way must find the handoff over. The
                // destination won only because all are armed, whoever knows it.
                let armed = match winner {
                    Winner::Source => {
                        due.extend(members().filter_map(of(Progress::Asked)).map(Action::Arm));
                        [Progress::Armed, Progress::Armed]
                    }
                    Winner::Destination => [Progress::Armed, Progress::Asked],
                };
                let is_armed = |member: &Member| armed.contains(&member.progress);
                let others: Vec<usize> = members()
                    .skip(1)
                    .filter_map(|(place, member)| is_armed(member).then_some(place))
                    .collect();
                let anchor = self.anchor().is_some_and(is_armed);
                let asked = self.members.iter().any(|m| m.progress == Progress::Asked);
                if self.proof.is_none() && anchor {
                    due.push(Action::Prove);
                } else if !others.is_empty() {
                    due.extend(others.into_iter().map(Action::Settle));
                } else if anchor && (!asked || winner == Winner::Destination) {
                    // Last: as long as one member does not know, this one does.
                    due.push(Action::Settle(0));
                }
                match winner {
                    _ if self.loser_gone => {}
                    // Not one that was there before us.
                    Winner::Source if self.stood => due.push(Action::StopDestination),
                    Winner::Source => {}
                    Winner::Destination if self.finish && self.state.is_over() => {
                        due.push(Action::StopSource);
                    }
                    Winner::Destination => {}
                }
            }
        }
        due.sort_unstable();
        due
    }

    fn due_forth(&self, due: &mut Vec<Action>) {
        let waits =
            |member: &Member| matches!(member.progress, Progress::Planned | Progress::Asked);
        if self.state == State::Preparing {
            due.push(Action::Countdown);
        }
        // One anchor that says no leaves nothing behind at the others.
        if self.anchor().is_some_and(waits) {
            due.push(Action::Arm(0));
            return;
        }
        let waiting = self.members.iter().enumerate().filter(|(_, member)| waits(member));
        let before = due.len();
        due.extend(waiting.map(|(place, _)| Action::Arm(place)));
        if due.len() > before {
            return;
        }
        due.push(if self.state == State::Sealed { Action::Inspect } else { Action::Stand });
        if self.trigger == Trigger::Explicit {
            if self.state == State::Ready && self.switchover && !self.seal_ordered {
                due.push(Action::OrderSeal);
            }
            if self.state == State::Sealed && self.activate && !self.activate_ordered {
                due.push(Action::OrderActivate);
            }
        }
    }

    fn due_back(&self, due: &mut Vec<Action>) {
        match self.anchor().map(|anchor| anchor.progress) {
            Some(Progress::Asked) => due.push(Action::Arm(0)),
            Some(Progress::Armed) => {
                due.push(Action::Reclaim);
                if self.unknown && !self.abdicated {
                    let active = self.members.iter().any(|m| m.seen == Seen::Active);
                    if self.standing == Standing::Dead && !active && !self.was_active {
                        due.push(Action::Abdicate);
                    } else {
                        due.push(Action::Inspect);
                    }
                }
            }
            Some(Progress::Planned | Progress::Refused | Progress::Settled) | None => {}
        }
    }
}
