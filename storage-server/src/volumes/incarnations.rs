//! Which process of an owner name came last.
//!
//! A backend that died may have left a RECLAIM, ACTIVATE or OPEN in a socket. Read
//! after its successor has come, it would win the volume for a session that nobody
//! is any more. So a process is heard in a handoff until another one of its name
//! has said HELLO, and never again.
//!
//! Kept in memory, and bounded: the oldest is forgotten first. After a restart of
//! the server nothing of before can arrive, because every connection is new. Safety
//! does not rest on this: the record decides once, whoever asks.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use baton_protocol::SessionId;

/// Owner names remembered of a volume: one per host it was on lately.
const NAMES_MAX: usize = 32;
/// Earlier processes remembered of a name: far more than have connections left.
const PAST_MAX: usize = 16;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Incarnations(Mutex<VecDeque<Owner>>);

#[derive(Debug)]
struct Owner {
    name: String,
    latest: SessionId,
    past: VecDeque<SessionId>,
}

impl Incarnations {
    /// This process said HELLO under this name.
    pub fn came(&self, name: &str, session: SessionId) {
        let mut owners = self.lock();
        let Some(owner) = owners.iter_mut().find(|owner| owner.name == name) else {
            if owners.len() == NAMES_MAX {
                owners.pop_front();
            }
            let name = name.to_owned();
            return owners.push_back(Owner { name, latest: session, past: VecDeque::new() });
        };
        if owner.latest == session || owner.past.contains(&session) {
            return;
        }
        if owner.past.len() == PAST_MAX {
            owner.past.pop_front();
        }
        owner.past.push_back(std::mem::replace(&mut owner.latest, session));
    }

    /// Whether no other process of this name has come since.
    #[must_use]
    pub fn is_latest(&self, name: &str, session: SessionId) -> bool {
        let owners = self.lock();
        let owner = owners.iter().find(|owner| owner.name == name);
        owner.is_none_or(|owner| !owner.past.contains(&session))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Owner>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_heard_until_another_of_its_name_came() {
        let incarnations = Incarnations::default();
        let heard = |name, session| incarnations.is_latest(name, SessionId(session));
        assert!(heard("a", 1), "nobody came");
        incarnations.came("a", SessionId(1));
        incarnations.came("b", SessionId(2));
        assert!(heard("a", 1) && heard("b", 2));
        incarnations.came("a", SessionId(3));
        assert!(!heard("a", 1) && heard("a", 3) && heard("b", 2));
        // A connection of the old process that comes again does not bring it back.
        incarnations.came("a", SessionId(1));
        assert!(!heard("a", 1) && heard("a", 3));
    }

    #[test]
    fn memory_is_bounded() {
        let incarnations = Incarnations::default();
        for session in 1..1000 {
            incarnations.came("a", SessionId(session));
            incarnations.came(&format!("other-{session}"), SessionId(session));
        }
        let owners = incarnations.lock();
        assert!(owners.len() <= NAMES_MAX);
        assert!(owners.iter().all(|owner| owner.past.len() <= PAST_MAX));
    }
}
