//! What each input does to a row.

use super::{
    Action, Because, Grant, Progress, Row, Seen, Standing, State, Timings, Trigger, Trouble, Winner,
};

/// What the coordinator learns, or is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The row is new, or the coordinator has restarted.
    Start,
    /// A member's record has the handoff.
    Armed(usize),
    /// A member's server says no, for good.
    CannotArm(usize, Trouble),
    /// What the destination's agent says of the backend there.
    Standing(Standing),
    /// The destination's agent says no, for good.
    CannotStand(Trouble),
    /// Somebody does not answer, or not as wished; it is being tried again.
    Hindered(Trouble),
    /// A member's record, and its epoch.
    Seen(usize, Seen, u64),
    /// RECLAIM was granted.
    Reclaimed(Grant),
    /// RECLAIM came too late: the destination has the volumes.
    ReclaimLost,
    /// The anchor cannot say who has them.
    ReclaimUnknown,
    /// The anchor does not know the handoff.
    ReclaimForeign,
    /// ABDICATE was granted.
    Abdicated,
    /// The proof.
    Proved(Grant),
    /// The proof is not the anchor's latest.
    ProofStale,
    /// A member knows who won, and what its record says the next epoch is; `None`
    /// from one that did not know the handoff.
    Settled(usize, Option<u64>),
    /// The source's backend was ordered to seal.
    SealOrdered,
    /// The destination's backend was ordered to activate.
    ActivateOrdered,
    /// The source's backend is proven gone.
    Ended(serde_json::Value),
    /// The source's guest was stopped and went on, where no storage fences.
    CameBack(Trouble),
    /// The destination's backend serves.
    Permitted,
    /// The source's agent has a backend again.
    Restored,
    /// What both backends have measured of the switch.
    Measured(Timings),
    /// The loser's backend is gone.
    LoserGone,
    /// The loser's agent does not answer.
    LoserLeft(Trouble),
    /// The time to prepare is over.
    Late,
    /// Asked: the source keeps its volumes.
    Cancel,
    /// Asked: clean up behind the decision.
    Finish,
    /// Asked, where no storage fences: the destination wins without a proof.
    Force(String),
    /// Asked, explicit: seal.
    Switchover,
    /// Asked, explicit: activate.
    Activate,
    /// The VM was fenced.
    Fenced,
    /// The coordinator notes how far a migration is that it drives.
    Driven(serde_json::Value),
    /// A newer coordinator has spoken.
    StaleTerm,
}

/// What is to be done now, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write the row, and only then go on.
    Journal,
    /// Tell those who watch: the handoff is now in this state.
    Tell(State),
    /// Tell those who watch what hinders it.
    TellTrouble(Trouble),
    /// Begin.
    Begin(Action),
    /// End: not due any more. What was sent may still arrive.
    End(Action),
    /// The whole coordinator ends.
    StepDown,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Cancelled too late.
    #[error("the destination owns the volumes: do not resume the source")]
    LostRace,
    /// Not yet.
    #[error("the handoff is {state}, not {needed}; the source owns the volumes")]
    NotReady {
        /// Where it stands.
        state: State,
        /// Where it must be.
        needed: State,
    },
    /// Implicit.
    #[error("the handoff is implicit: the machines' rings switch it, nobody orders it")]
    Implicit,
    /// Nobody may take the storage's place.
    #[error("the storage decides who has the volumes, so nothing is forced")]
    Fenced,
    /// Over or going back.
    #[error("the handoff is over or being cancelled")]
    Over,
}

/// A granted input.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The row afterwards.
    pub row: Row,
    /// What to do.
    pub outputs: Vec<Output>,
}

impl Row {
    /// Judges an input. Pure.
    ///
    /// # Errors
    /// [`Refusal`] of a request; the row stays as it is.
    pub fn step(&self, input: Input) -> Result<Step, Refusal> {
        if input == Input::StaleTerm {
            return Ok(Step { row: self.clone(), outputs: vec![Output::StepDown] });
        }
        let start = input == Input::Start;
        let mut next = self.clone();
        next.take(input)?;
        next.derive();
        let mut due = next.due();
        // In the journal before it leaves.
        for action in &due {
            match *action {
                Action::Arm(place) => next.with(place, |member| {
                    if member.progress == Progress::Planned {
                        member.progress = Progress::Asked;
                    }
                }),
                Action::Stand => next.stood = true,
                Action::EndSource => next.cooperation.end_asked = true,
                _ => {}
            }
        }
        let mut before = if start { Vec::new() } else { self.due() };
        let mut outputs = Vec::new();
        if next != *self || start {
            next.version = self.version + 1;
            outputs.push(Output::Journal);
        }
        if next.state != self.state || (start && self.version == 0) {
            outputs.push(Output::Tell(next.state));
        }
        if let Some(trouble) = next.trouble.clone().filter(|t| Some(t) != self.trouble.as_ref()) {
            outputs.push(Output::TellTrouble(trouble));
        }
        let kept: Vec<Action> = due.iter().filter(|a| before.contains(a)).copied().collect();
        due.retain(|action| !kept.contains(action));
        before.retain(|action| !kept.contains(action));
        outputs.extend(before.into_iter().map(Output::End));
        outputs.extend(due.into_iter().map(Output::Begin));
        Ok(Step { row: next, outputs })
    }

    fn take(&mut self, input: Input) -> Result<(), Refusal> {
        match input {
            Input::Start | Input::StaleTerm => {}
            Input::Armed(place) => self.with(place, |member| {
                if matches!(member.progress, Progress::Planned | Progress::Asked) {
                    member.progress = Progress::Armed;
                }
            }),
            Input::CannotArm(place, trouble) => {
                self.with(place, |member| {
                    if matches!(member.progress, Progress::Planned | Progress::Asked) {
                        member.progress = Progress::Refused;
                    }
                });
                if self.undecided() {
                    self.fail(trouble);
                }
            }
            Input::Standing(standing) => {
                self.standing = standing;
                self.was_active |= standing == Standing::Active;
            }
            Input::CannotStand(trouble) => {
                if self.undecided() && self.state == State::Preparing {
                    self.fail(trouble);
                } else {
                    self.trouble = Some(trouble);
                }
            }
            Input::Hindered(trouble) => {
                if !self.state.is_over() {
                    self.trouble = Some(trouble);
                }
            }
            Input::Seen(place, seen, epoch) => self.see(place, seen, epoch),
            Input::Reclaimed(grant) | Input::Proved(grant) => {
                self.win(grant.winner);
                if self.winner == Some(grant.winner) {
                    self.proof = Some(grant);
                }
            }
            Input::ReclaimLost => self.win(Winner::Destination),
            Input::ReclaimUnknown => {
                if self.undecided() && self.back.is_some() {
                    self.unknown = true;
                }
            }
            Input::ReclaimForeign => self.see(0, Seen::Nothing, 0),
            Input::Abdicated => self.abdicated = true,
            Input::ProofStale => self.proof = None,
            Input::Settled(place, next_epoch) => {
                if self.winner.is_some() {
                    self.with(place, |member| {
                        member.progress = Progress::Settled;
                        // What another try shows. Without it somebody else was at the volume,
                        // and the record refuses what is out of date.
                        member.next_epoch = next_epoch.unwrap_or(member.next_epoch);
                    });
                }
            }
            Input::Ended(proof) => self.ended(proof),
            Input::CameBack(trouble) => self.came_back(trouble),
            Input::Permitted => {
                self.cooperation.permitted |= self.winner == Some(Winner::Destination);
            }
            Input::Restored => self.cooperation.restored |= self.winner == Some(Winner::Source),
            Input::Force(reason) => self.force(reason)?,
            Input::SealOrdered => self.seal_ordered = true,
            Input::ActivateOrdered => self.activate_ordered = true,
            Input::Measured(timings) => {
                if self.winner == Some(Winner::Destination) {
                    self.timings = timings.or(std::mem::take(&mut self.timings));
                }
            }
            Input::LoserGone | Input::LoserLeft(_) if self.winner.is_none() => {}
            Input::LoserGone => self.loser_gone = true,
            Input::LoserLeft(trouble) => {
                self.last |= self.goes_again();
                self.loser_gone = true;
                self.trouble = Some(trouble);
            }
            Input::Late => {
                if self.undecided() && self.state == State::Preparing {
                    let trouble = self.trouble.clone().unwrap_or_else(|| self.not_ready());
                    self.fail(trouble);
                }
            }
            Input::Cancel => match self.winner {
                Some(Winner::Destination) => return Err(Refusal::LostRace),
                Some(Winner::Source) => self.last |= self.goes_again(),
                None if self.state.is_over() => {}
                None => {
                    self.back.get_or_insert(Because::Cancelled);
                }
            },
            Input::Finish => self.finish = true,
            Input::Switchover => {
                self.explicit()?;
                if !self.state.reached(State::Ready) {
                    return Err(self.early(State::Ready));
                }
                self.still_on()?;
                self.switchover = true;
            }
            Input::Activate => {
                self.explicit()?;
                if !self.state.reached(State::Sealed) {
                    return Err(self.early(State::Sealed));
                }
                self.still_on()?;
                self.activate = true;
            }
            Input::Fenced => {
                if self.state.is_over() {
                    // What it decided is not what is any more.
                    self.fenced = true;
                } else {
                    self.end_by_fence();
                }
            }
            Input::Driven(note) => self.driven = Some(note),
        }
        Ok(())
    }

    fn see(&mut self, place: usize, seen: Seen, epoch: u64) {
        self.with(place, |member| {
            member.seen = seen;
            member.epoch = epoch;
        });
        if !self.undecided() {
            return;
        }
        let armed = self.members.get(place).is_some_and(|m| m.progress == Progress::Armed);
        if place == 0 {
            self.unknown = matches!(seen, Seen::Frozen | Seen::FrozenSealed) && self.back.is_some();
            match seen {
                Seen::Active | Seen::OverDestination => self.win(Winner::Destination),
                Seen::Reclaimed | Seen::OverSource => self.win(Winner::Source),
                Seen::Nothing if armed => self.end_by_fence(),
                _ => {}
            }
        } else if seen == Seen::Nothing && armed && self.back.is_none() {
            let volume = self.members.get(place).map_or("", |member| &member.volume);
            self.fail(Trouble {
                kind: "baton:fenced".to_owned(),
                detail: format!("volume `{volume}` was fenced during the handoff"),
            });
        }
    }

    /// What follows from what is known.
    fn derive(&mut self) {
        if self.is_cooperative() {
            return self.derive_cooperative();
        }
        if self.fenced || self.state.is_over() {
            return;
        }
        if self.winner.is_some() {
            self.unknown = false;
            let settled = |m: &super::Member| {
                matches!(m.progress, Progress::Settled | Progress::Refused | Progress::Planned)
            };
            let over = self.members.iter().all(settled);
            if over && (self.go_again() || self.goes_again()) {
                return;
            }
            if over {
                let failed = matches!(self.back, Some(Because::Failed(_)));
                let source = self.winner == Some(Winner::Source);
                self.state = if failed && source { State::Failed } else { State::Settled };
                if !self.last {
                    self.trouble = None;
                }
            }
            return;
        }
        if let Some(because) = &self.back {
            let anchor = self.members.first().map(|anchor| anchor.progress);
            if matches!(anchor, Some(Progress::Planned | Progress::Refused) | None) {
                // Nothing was armed: the anchor is first.
                let failed = matches!(because, Because::Failed(_));
                self.state = if failed { State::Failed } else { State::Settled };
                self.winner = Some(Winner::Source);
            }
            return;
        }
        let sealed = |m: &super::Member| matches!(m.seen, Seen::Sealed | Seen::FrozenSealed);
        let armed = self.members.iter().all(|member| member.progress == Progress::Armed);
        let ready = armed && matches!(self.standing, Standing::Ready | Standing::Active);
        match self.state {
            State::Preparing if ready => {
                self.state = State::Ready;
                self.trouble = None;
            }
            State::Ready if !ready && self.standing != Standing::Unknown => {
                self.state = State::Preparing;
            }
            _ => {}
        }
        if self.state == State::Ready && self.members.iter().all(sealed) {
            self.state = State::Sealed;
        }
    }

    pub(super) fn win(&mut self, winner: Winner) {
        if !self.undecided() {
            return;
        }
        self.winner = Some(winner);
        self.trouble = None;
        self.state = match winner {
            Winner::Source => State::Reclaimed,
            Winner::Destination => State::Active,
        };
        if winner == Winner::Source {
            self.back.get_or_insert(Because::TakenBack);
        }
    }

    pub(super) fn fail(&mut self, trouble: Trouble) {
        self.back.get_or_insert(Because::Failed(trouble.clone()));
        self.trouble = Some(trouble);
    }

    fn end_by_fence(&mut self) {
        self.fenced = true;
        self.state = State::Failed;
        self.trouble = Some(Trouble {
            kind: "baton:fenced".to_owned(),
            detail: "the volumes were fenced during the handoff; `access` says who may have them"
                .to_owned(),
        });
        self.back.get_or_insert_with(|| {
            Because::Failed(Trouble {
                kind: "baton:fenced".to_owned(),
                detail: "the volumes were fenced".to_owned(),
            })
        });
    }

    fn undecided(&self) -> bool {
        self.winner.is_none() && !self.fenced && !self.state.is_over()
    }

    fn explicit(&self) -> Result<(), Refusal> {
        if self.trigger == Trigger::Explicit { Ok(()) } else { Err(Refusal::Implicit) }
    }

    fn still_on(&self) -> Result<(), Refusal> {
        match self.winner {
            Some(Winner::Destination) => Ok(()),
            None if self.back.is_none() => Ok(()),
            _ => Err(Refusal::Over),
        }
    }

    pub(super) fn early(&self, needed: State) -> Refusal {
        Refusal::NotReady { state: self.state, needed }
    }

    fn not_ready(&self) -> Trouble {
        let waits = |m: &&super::Member| !matches!(m.progress, Progress::Armed);
        let detail = match self.members.iter().find(waits) {
            Some(member) => format!(
                "volume `{}` at {} was not armed in time; the source owns the volumes",
                member.volume, member.storage
            ),
            None => format!(
                "the backend at `{}` did not stand by in time; the source owns the volumes",
                self.to
            ),
        };
        Trouble { kind: "baton:not-ready".to_owned(), detail }
    }

    fn with(&mut self, place: usize, change: impl FnOnce(&mut super::Member)) {
        if let Some(member) = self.members.get_mut(place) {
            change(member);
        }
    }
}
