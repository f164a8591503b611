//! A handoff of volumes whose storage keeps nobody out. There is no access record:
//! the decision is this row, and it is made once, in [`Row::derive_cooperative`].
//!
//! ```text
//!   PREPARING -- destination stands by --> READY -- source's backend proven gone --> SEALED
//!       |                                    |                                         |
//!       +---- cancelled, failed -------------+-----------------------------------------+
//!       |                                    |                       its machine waits |
//!       v                                    +---- forced --> ACTIVE <-----------------+
//!    RECLAIMED -- backend at the source again --> SETTLED or FAILED
//! ```
//!
//! Rules:
//! - The destination is permitted only by a row that says it won, and it wins only
//!   with a proof that the source's backend has stopped for good, or when a person
//!   takes the proof's place.
//! - Whoever is not decided for in time is not decided for: a cancel before the
//!   decision gives the volumes to the source, after it comes too late. The row is
//!   in the journal before anybody is told.
//! - The source gets a backend again only from a row that says it won; and before the
//!   handoff is over its agent knows that an order to end it, which may still be on
//!   its way, is void.

use baton_remote_client::Fence;
use serde::{Deserialize, Serialize};

use super::{Action, Because, Refusal, Row, Standing, State, Trigger, Trouble, Winner};

/// What a handoff without a fence notes. Rows of before, and others, have none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cooperation {
    /// The place of this try among all of the VM, from 1: the agents refuse what an
    /// earlier one asks of them, however late.
    pub turn: u64,
    /// The process of the source's backend when the try was planned.
    pub source_pid: i32,
    /// How often rings had been started in it then. Whoever has stopped and gone on since may
    /// have left a copy of the machine at the destination that is out of date.
    pub source_starts: u32,
    /// The source's backend may have been ordered to end.
    pub end_asked: bool,
    /// The agent's proof that it has, as it was told.
    pub proof: Option<serde_json::Value>,
    /// Why a person took the proof's place.
    pub forced: Option<String>,
    /// The destination's backend was told.
    pub permitted: bool,
    /// The source's agent knows that it keeps the volumes.
    pub restored: bool,
}

impl Row {
    /// The row decides, no storage.
    #[must_use]
    pub fn is_cooperative(&self) -> bool {
        self.fence() == Fence::Cooperative
    }

    /// A person took the place of the proof, so nobody knows whether the memory of a
    /// machine that waits at the destination is of when the source stopped.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        self.cooperation.forced.is_some() && self.cooperation.proof.is_none()
    }

    /// The source's backend was proven gone.
    pub(super) fn ended(&mut self, proof: serde_json::Value) {
        if self.winner.is_none() {
            self.cooperation.proof.get_or_insert(proof);
        }
    }

    /// The source's guest went on in the middle of the try, or may have.
    pub(super) fn came_back(&mut self, trouble: Trouble) {
        if self.winner.is_none() && self.cooperation.proof.is_none() && !self.state.is_over() {
            self.fail(trouble);
        }
    }

    /// A person says that the source cannot reach the storage.
    pub(super) fn force(&mut self, reason: String) -> Result<(), Refusal> {
        if !self.is_cooperative() {
            return Err(Refusal::Fenced);
        }
        match self.winner {
            Some(Winner::Destination) => {
                self.finish = true;
                Ok(())
            }
            None if self.back.is_none() && !self.fenced && !self.state.is_over() => {
                // Only who stands by can be permitted.
                if !self.state.reached(State::Ready) {
                    return Err(self.early(State::Ready));
                }
                self.finish = true;
                self.cooperation.forced = Some(reason);
                Ok(())
            }
            _ => Err(Refusal::Over),
        }
    }

    /// What follows from what is known.
    pub(super) fn derive_cooperative(&mut self) {
        if self.fenced || self.state.is_over() {
            return;
        }
        if self.winner.is_none() {
            self.come_forward();
        }
        let failed = matches!(self.back, Some(Because::Failed(_)));
        match self.winner {
            Some(Winner::Destination) if self.cooperation.permitted => {
                self.state = State::Settled;
                self.trouble = None;
                // It was ended before there was a decision, or is out of reach.
                self.loser_gone = true;
            }
            Some(Winner::Source) if self.cooperation.restored || !self.cooperation.end_asked => {
                self.state = if failed { State::Failed } else { State::Settled };
                self.trouble = None;
            }
            _ => {}
        }
    }

    fn come_forward(&mut self) {
        // Nobody was permitted: that takes a row with a winner.
        if self.back.is_some() {
            return self.win(Winner::Source);
        }
        if self.cooperation.forced.is_some() {
            return self.win(Winner::Destination);
        }
        let proven = self.cooperation.proof.is_some();
        let ready = matches!(self.standing, Standing::Ready | Standing::Active);
        match self.state {
            State::Preparing if ready => {
                self.state = State::Ready;
                self.trouble = None;
            }
            State::Ready if !ready && self.standing != Standing::Unknown && !proven => {
                self.state = State::Preparing;
            }
            _ => {}
        }
        if self.state == State::Ready && proven {
            self.state = State::Sealed;
        }
        let wanted = match self.trigger {
            Trigger::Implicit => self.standing == Standing::Active,
            Trigger::Explicit => self.activate,
        };
        if self.state == State::Sealed && wanted {
            self.win(Winner::Destination);
        }
    }

    /// What is to be done, from what is known.
    pub(super) fn due_cooperative(&self) -> Vec<Action> {
        let Cooperation { end_asked, proof, permitted, restored, .. } = &self.cooperation;
        let mut due = Vec::new();
        match self.winner {
            None if self.state.is_over() || self.back.is_some() => {}
            None => {
                if self.state == State::Preparing {
                    due.push(Action::Countdown);
                }
                due.push(if self.state == State::Sealed { Action::Inspect } else { Action::Stand });
                let asked = self.trigger == Trigger::Implicit || self.switchover;
                if self.state == State::Ready && proof.is_none() && asked {
                    due.push(Action::EndSource);
                }
            }
            Some(Winner::Destination) if !permitted => due.push(Action::Permit),
            Some(Winner::Destination) => {}
            Some(Winner::Source) => {
                if *end_asked && !restored {
                    due.push(Action::Keep);
                }
                if self.stood && !self.loser_gone {
                    due.push(Action::Dismiss);
                }
            }
        }
        due.sort_unstable();
        due
    }
}

#[cfg(test)]
mod tests {
    use super::super::{tests as plan_tests, *};
    use super::*;
    use baton_remote_client::Engine;
    use serde_json::json;
    use std::collections::{HashSet, VecDeque};

    fn fresh(trigger: Trigger) -> Row {
        let mut row = Row { trigger, ..plan_tests::fresh() };
        row.members.truncate(1);
        row.members[0].engine = Engine::Nbd;
        row
    }

    fn trouble() -> Trouble {
        Trouble { kind: "t".to_owned(), detail: String::new() }
    }

    fn inputs() -> Vec<Input> {
        let standings = [
            Standing::Unknown,
            Standing::Starting,
            Standing::Ready,
            Standing::Active,
            Standing::Dead,
        ];
        let mut inputs = vec![
            Input::Start,
            Input::CannotStand(trouble()),
            Input::Ended(json!({"pid": 1})),
            Input::CameBack(trouble()),
            Input::Permitted,
            Input::Restored,
            Input::LoserGone,
            Input::Late,
            Input::Cancel,
            Input::Finish,
            Input::Force("why".to_owned()),
            Input::Switchover,
            Input::Activate,
            Input::Fenced,
            Input::StaleTerm,
        ];
        inputs.extend(standings.map(Input::Standing));
        inputs
    }

    /// What of a row decides what it does.
    fn key(row: &Row) -> String {
        let back = row.back.as_ref().map(|because| match because {
            Because::Failed(_) => Because::Failed(trouble()),
            other => other.clone(),
        });
        // For people, and for handoffs with access records.
        let (trouble, version, was_active, last) = (None, 0, false, false);
        let row = Row { back, trouble, version, was_active, last, ..row.clone() };
        serde_json::to_string(&row).expect("JSON")
    }

    /// Every row that can be reached x every input.
    #[test]
    fn every_row_and_every_input() {
        let mut known = HashSet::new();
        let mut todo: VecDeque<Row> =
            [Trigger::Implicit, Trigger::Explicit].map(fresh).into_iter().collect();
        let (mut permitted, mut restored) = (0, 0);
        while let Some(row) = todo.pop_front() {
            if !known.insert(key(&row)) {
                continue;
            }
            for input in inputs() {
                let Ok(step) = row.step(input.clone()) else { continue };
                let next = step.row;
                let begins = |action| step.outputs.contains(&Output::Begin(action));
                let journal = step.outputs.iter().position(|o| *o == Output::Journal);
                let first = step.outputs.iter().position(|o| matches!(o, Output::Begin(_)));
                if next != row {
                    assert!(
                        journal < first.or(Some(usize::MAX)),
                        "in the journal first: {input:?}"
                    );
                }
                // One decision, never undone.
                if row.winner.is_some() {
                    assert_eq!(next.winner, row.winner, "{input:?}");
                }
                if next.winner == Some(Winner::Destination) {
                    let Cooperation { proof, forced, .. } = &next.cooperation;
                    assert!(proof.is_some() || forced.is_some(), "{input:?}");
                }
                if begins(Action::Permit) {
                    permitted += 1;
                    assert_eq!(next.winner, Some(Winner::Destination));
                }
                if begins(Action::Keep) {
                    restored += 1;
                    assert_eq!(next.winner, Some(Winner::Source));
                }
                // An order to end the source leaves only where the row says so, and
                // never over a decision.
                if begins(Action::EndSource) {
                    assert!(next.cooperation.end_asked && next.winner.is_none());
                }
                // It is over only when the winner's agent knows.
                if next.state.is_over() && !next.fenced {
                    let done = match next.winner {
                        Some(Winner::Destination) => next.cooperation.permitted,
                        Some(Winner::Source) => {
                            next.cooperation.restored || !next.cooperation.end_asked
                        }
                        None => false,
                    };
                    assert!(done, "{input:?}: {next:?}");
                }
                // Nothing that needs an access record.
                assert!(!next.due().iter().any(|action| matches!(
                    action,
                    Action::Arm(_)
                        | Action::Watch(_)
                        | Action::Reclaim
                        | Action::Abdicate
                        | Action::Prove
                        | Action::Settle(_)
                        | Action::OrderSeal
                        | Action::OrderActivate
                        | Action::StopSource
                        | Action::StopDestination
                )));
                todo.push_back(next);
            }
        }
        assert!(permitted > 3 && restored > 3 && known.len() > 100, "{}", known.len());
    }

    fn after(row: &Row, inputs: &[Input]) -> Row {
        inputs.iter().fold(row.clone(), |row, input| row.step(input.clone()).expect("granted").row)
    }

    #[test]
    fn the_way_of_a_handoff() {
        let start = after(&fresh(Trigger::Implicit), &[Input::Start]);
        assert_eq!(start.due(), [Action::Stand, Action::Countdown]);
        let ready = after(&start, &[Input::Standing(Standing::Ready)]);
        assert_eq!(
            (ready.state, ready.due()),
            (State::Ready, vec![Action::Stand, Action::EndSource])
        );
        // Its machine may run before the proof is there: it waits.
        let early = after(&ready, &[Input::Standing(Standing::Active)]);
        assert_eq!((early.state, early.winner), (State::Ready, None));
        // Nobody stands by yet who could be permitted.
        assert!(matches!(
            start.step(Input::Force("why".to_owned())),
            Err(Refusal::NotReady { .. })
        ));
        let sealed = after(&ready, &[Input::Ended(json!({}))]);
        assert_eq!((sealed.state, sealed.winner), (State::Sealed, None));
        for row in [
            after(&early, &[Input::Ended(json!({}))]),
            after(&sealed, &[Input::Standing(Standing::Active)]),
        ] {
            assert_eq!((row.state, row.due()), (State::Active, vec![Action::Permit]));
            assert_eq!(row.step(Input::Cancel), Err(Refusal::LostRace));
            assert!(after(&row, &[Input::Permitted]).is_over());
        }
        // A guest that went on has left a copy behind: that try is over.
        let gone_on = after(&early, &[Input::CameBack(trouble())]);
        assert_eq!((gone_on.state, gone_on.winner), (State::Reclaimed, Some(Winner::Source)));
        assert_eq!(after(&sealed, &[Input::CameBack(trouble())]).winner, None, "it was proven");
        // A cancel in time gives the source a backend again.
        let back = after(&sealed, &[Input::Cancel]);
        assert_eq!(
            (back.state, back.due()),
            (State::Reclaimed, vec![Action::Keep, Action::Dismiss])
        );
        assert!(after(&back, &[Input::Restored, Input::LoserGone]).is_over());
        let forced = after(&ready, &[Input::Force("host-a lost power".to_owned())]);
        assert_eq!(
            (forced.winner, forced.due()),
            (Some(Winner::Destination), vec![Action::Permit])
        );
        assert_eq!(back.step(Input::Force("too late".to_owned())), Err(Refusal::Over));
    }

    /// Where a storage decides, nobody else does.
    #[test]
    fn what_is_fenced_is_not_forced() {
        let row = after(&plan_tests::fresh(), &[Input::Start]);
        assert_eq!(row.step(Input::Force("why".to_owned())), Err(Refusal::Fenced));
        let ended = after(&row, &[Input::Ended(json!({})), Input::Permitted, Input::Restored]);
        assert_eq!((ended.state, ended.winner), (row.state, None));
    }
}
