//! The row of the handoff, and the orders that it makes due.

use std::sync::Arc;

use baton_protocol::handoff::HandoffId;
use baton_protocol::handoff::cooperative::Standing as Stands;
use baton_remote_client::Engine;
use serde_json::json;

use super::host::Answer;
use super::mutant::Mutant;
use super::world::{Kept, NAMES, Order, Run, What, World, turn};
use crate::coordinator::plan::{
    Action, Cooperation, Input, Member, Row, Standing, State, Trigger, Trouble, Winner, fresh,
};

fn trouble() -> Trouble {
    Trouble { kind: String::new(), detail: String::new() }
}

fn host(name: &str) -> usize {
    usize::from(name == NAMES[1])
}

impl World {
    /// Where the volumes are to go, and from where.
    pub(super) fn sides(&self) -> Option<(usize, usize)> {
        self.row().map(|row| (host(&row.from), host(&row.to)))
    }

    pub(super) fn is_over(&self) -> bool {
        self.row().is_none_or(|row| row.is_over())
    }

    /// A new handoff from this host, if the agents say what they must.
    pub(super) fn prepare(&mut self, from: usize) -> bool {
        let to = 1 - from;
        let runs = self.hosts[to].machine.is_some_and(|m| m.run == Run::Running);
        let dead = self.hosts[from].dead || self.hosts[to].dead;
        let source = &self.hosts[from];
        if !self.is_over() || !source.serves() || self.hosts[to].serves() || runs || dead {
            return false;
        }
        let Some(backend) = &source.backend else { return false };
        self.number += 1;
        let cooperation = Cooperation {
            turn: turn(self.number).number,
            source_pid: i32::from(backend.process),
            source_starts: backend.vm.starts(),
            ..Cooperation::default()
        };
        let mut row = Row {
            id: HandoffId(u128::from(self.number)),
            from: NAMES[from].to_owned(),
            to: NAMES[to].to_owned(),
            trigger: Trigger::Implicit,
            cooperation,
            ..fresh()
        };
        row.members.truncate(1);
        row.members.iter_mut().for_each(|member: &mut Member| member.engine = Engine::Nbd);
        let row = Arc::new(row);
        self.kept = Some(Kept { journal: Arc::clone(&row), row });
        self.learn(Input::Start);
        true
    }

    /// The row takes an input. False: refused.
    pub(super) fn learn(&mut self, input: Input) -> bool {
        let unjournaled = self.is(Mutant::PermitsUnjournaled);
        let unproven = self.is(Mutant::DecidesUnproven);
        let skips = self.is(Mutant::KeepSkipped);
        let Some(kept) = &mut self.kept else { return false };
        let before = kept.row.winner;
        let Ok(step) = kept.row.step(input) else { return false };
        let mut row = step.row;
        // For people.
        (row.version, row.trouble) = (0, None);
        if unproven && row.standing == Standing::Active && row.state == State::Ready {
            row.cooperation.proof.get_or_insert(json!({}));
            if let Ok(step) = row.step(Input::Standing(Standing::Active)) {
                row = Row { version: 0, ..step.row };
            }
        }
        if skips && row.winner == Some(Winner::Source) {
            row.cooperation.restored = true;
            if let Ok(step) = row.step(Input::Restored) {
                row = Row { version: 0, ..step.row };
            }
        }
        kept.row = Arc::new(row);
        let decided = kept.row.winner.filter(|winner| before != Some(*winner));
        if !(unjournaled && decided == Some(Winner::Destination)) {
            kept.journal = Arc::clone(&kept.row);
        }
        if let (Some(winner), Some((from, to))) = (decided, self.sides()) {
            let won = if winner == Winner::Source { from } else { to };
            self.closed[won] = false;
        }
        true
    }

    /// Memory is lost; the journal is not, and orders on their way arrive.
    pub(super) fn restart_coordinator(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.row = Arc::clone(&kept.journal);
        }
        self.learn(Input::Start);
    }

    /// What it sends now, if it likes.
    pub(super) fn due(&self) -> Vec<Order> {
        let (Some(row), Some((from, to))) = (self.row(), self.sides()) else { return Vec::new() };
        let order = |to, what| Order { number: self.number, to, what };
        let end = What::End {
            process: u8::try_from(row.cooperation.source_pid).unwrap_or(0),
            starts: row.cooperation.source_starts,
        };
        let permit = What::Permit { forced: row.is_forced() };
        let mut orders: Vec<Order> = row
            .due()
            .into_iter()
            .filter_map(|action| match action {
                Action::Stand if self.wants_standby(to) => Some(order(to, What::Stand)),
                Action::EndSource => Some(order(from, end)),
                Action::Permit => Some(order(to, permit)),
                Action::Keep => Some(order(from, What::Keep)),
                Action::Dismiss => Some(order(to, What::Dismiss)),
                _ => None,
            })
            .collect();
        let active = row.standing == Standing::Active && row.winner.is_none();
        if self.is(Mutant::PermitsUndecided) && active && !row.is_over() {
            orders.push(order(to, permit));
        }
        orders
    }

    /// There is none, or it is of another try.
    fn wants_standby(&self, to: usize) -> bool {
        let Some(backend) = &self.hosts[to].backend else { return true };
        let waits = matches!(backend.vm.standing(), Stands::Ready | Stands::Activating);
        waits && backend.vm.attempt() != Some(turn(self.number).attempt)
    }

    /// What the destination's agent would say.
    pub(super) fn standing(&self, to: usize) -> Standing {
        let host = &self.hosts[to];
        let same = host
            .backend
            .as_ref()
            .is_some_and(|backend| backend.vm.attempt() == Some(turn(self.number).attempt));
        let runs = host.machine.is_some_and(|m| m.run == Run::Running);
        match host.standing() {
            None if runs => Standing::Unknown,
            None => Standing::Dead,
            Some(Stands::Ready) if same => Standing::Ready,
            Some(Stands::Activating) if same => Standing::Active,
            Some(Stands::Serving) => Standing::Active,
            Some(_) => Standing::Starting,
        }
    }

    /// The coordinator hears an answer to what it asked for.
    pub(super) fn hear(&mut self, order: Order, answer: &Answer) {
        if order.number != self.number || !self.due().contains(&order) {
            return;
        }
        match (order.what, answer) {
            (What::End { .. }, Answer::Proven(_)) => {
                self.learn(Input::Ended(json!({})));
            }
            (What::End { .. }, Answer::CameBack) => {
                self.learn(Input::CameBack(trouble()));
            }
            (What::Permit { .. }, Answer::Done) => {
                self.learn(Input::Permitted);
            }
            (What::Keep, Answer::Done) => {
                self.learn(Input::Restored);
            }
            (What::Dismiss, Answer::Done) => {
                self.learn(Input::LoserGone);
            }
            (What::Dismiss, _) => {
                self.learn(Input::LoserLeft(trouble()));
            }
            (What::Stand, Answer::Refused) => {
                self.learn(Input::CannotStand(trouble()));
            }
            _ => {}
        }
    }
}
