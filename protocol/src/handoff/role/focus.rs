//! Which handoff concerns this VM, as its members' records show it.

use super::{Focus, Role};
use crate::access::Phase;
use crate::handoff::Try;

impl Role {
    /// The try that names this VM's owner name: one that is not decided before
    /// one that is, the newest of several, and only then one that is over.
    pub(super) fn find_focus(&self) -> Option<Focus> {
        self.open_focus().or_else(|| {
            let over = (0..self.members.len()).filter_map(|at| {
                let record = &self.views[at].as_ref()?.record;
                let mine = record.owner.as_ref().is_some_and(|owner| owner.name == self.name);
                let decided = record.decided.as_ref().filter(|decided| mine && decided.anchor)?;
                let (attempt, side) = (decided.attempt, decided.winner);
                Some(Focus { attempt, side, anchor: Some(at) })
            });
            over.max_by_key(|focus| focus.attempt)
        })
    }

    fn open_focus(&self) -> Option<Focus> {
        let mine = (0..self.members.len()).filter_map(|at| {
            let view = self.views[at].as_ref()?;
            let (plan, side) = (&view.record.handoff.as_ref()?.plan, view.side?);
            let phase = view.record.phase;
            let undecided = matches!(phase, Phase::Armed | Phase::Sealed | Phase::Frozen);
            Some((undecided, plan.attempt, side, plan.anchor))
        });
        let newest = mine.max_by_key(|(undecided, attempt, ..)| (*undecided, *attempt));
        let (_, attempt, side, anchor) = newest?;
        let anchor = self.members.iter().position(|member| member.volume == anchor);
        Some(Focus { attempt, side, anchor })
    }

    /// All members show this try, and they are the ones that were planned.
    pub(super) fn is_complete(&self, focus: Focus) -> bool {
        self.views.iter().all(|view| {
            view.as_ref().is_some_and(|view| {
                let handoff = view.record.handoff.as_ref();
                view.whole && handoff.is_some_and(|h| h.plan.attempt == focus.attempt)
            })
        })
    }

    pub(super) fn is_ready(&self, focus: Focus) -> bool {
        // Unless it has witnessed the try undecided it could not abdicate, and
        // a source could be locked out by one more accident.
        focus.anchor.is_some() && self.is_complete(focus) && self.witnessed == Some(focus.attempt)
    }

    pub(super) fn all_sealed(&self, attempt: Try) -> bool {
        self.members.iter().all(|member| member.sealed.is_some_and(|(seen, _)| seen == attempt))
    }
}
