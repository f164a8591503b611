//! Another try of a handoff whose source came back by itself: its guest reset in
//! the copy of memory, or somebody stopped and continued it.
//!
//! ```text
//!  attempt n: READY or SEALED -- source reclaims --> RECLAIMED -- all settled, the
//!     destination of n is gone --> PREPARING, attempt n + 1
//! ```
//!
//! A destination is good for one try: a machine that has the memory of attempt n
//! may still start its rings, and would be granted attempt n + 1. So there is
//! another try only where somebody ends that machine first: the coordinator, when
//! it drives the migration, or the caller of an explicit handoff. Where the
//! machines move by themselves nobody here can say that the old one will never
//! run, and the handoff ends with the source as the owner.

use super::{Because, Progress, Row, Seen, Standing, State, Trigger, Winner};

/// Tries of one handoff. A guest that resets for ever must not keep its VM half
/// on its way for ever; two resets in one copy of memory are rare enough.
pub const ATTEMPTS_MAX: u32 = 3;

impl Row {
    /// Somebody ends the destination's machine between two tries.
    #[must_use]
    pub fn can_be_tried_again(&self) -> bool {
        self.trigger == Trigger::Explicit || self.driven.is_some()
    }

    /// The source has taken its volumes back, and another try follows as soon as
    /// nothing is left of this one.
    #[must_use]
    pub fn goes_again(&self) -> bool {
        self.back == Some(Because::TakenBack)
            && self.winner == Some(Winner::Source)
            && self.can_be_tried_again()
            && self.attempt < ATTEMPTS_MAX
            && !(self.last || self.finish || self.fenced || self.state.is_over())
    }

    /// Begins the next try, if it is time: every member knows who won, and the
    /// backend of this try is gone.
    pub(super) fn go_again(&mut self) -> bool {
        let left = self.stood && !self.loser_gone;
        if !self.goes_again() || left {
            return false;
        }
        self.attempt += 1;
        for member in &mut self.members {
            member.progress = Progress::Planned;
            member.seen = Seen::Nothing;
        }
        self.state = State::Preparing;
        self.standing = Standing::Unknown;
        (self.stood, self.was_active, self.loser_gone) = (false, false, false);
        (self.back, self.winner, self.proof, self.trouble) = (None, None, None, None);
        (self.unknown, self.abdicated) = (false, false);
        // Said of the try that is over; the caller says it again.
        (self.switchover, self.seal_ordered) = (false, false);
        (self.activate, self.activate_ordered) = (false, false);
        true
    }
}
