//! What may be asked of an access record, with its names owned so that it can
//! wait for the lock.

use baton_protocol::access::{By, Input, Seen};
use baton_protocol::handoff::{Open, Plan, Proof, Try};
use baton_protocol::{Epoch, SessionId};

use crate::metrics::AccessStep;

/// [`By`] with its name owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A backend.
    Backend {
        /// Its owner name.
        name: String,
        /// Its incarnation.
        session: SessionId,
    },
    /// The coordinator of this term.
    Coordinator {
        /// Its term.
        term: u64,
    },
}

/// [`Seen`] with its name owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenOwner {
    /// See [`Seen::owner`].
    pub owner: Option<String>,
    /// See [`Seen::next_epoch`].
    pub next_epoch: Epoch,
}

/// [`Input`] with its names owned.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields are those of `Input`, where they are explained")]
pub enum Request {
    /// See [`Input::Claim`].
    Claim { name: String, session: SessionId },
    /// See [`Input::Rejoin`].
    Rejoin { session: SessionId, epoch: Epoch },
    /// See [`Input::Release`].
    Release { session: SessionId, epoch: Epoch },
    /// See [`Input::Fence`].
    Fence { term: Option<u64>, nominee: Option<String>, seen: Option<SeenOwner> },
    /// See [`Input::Arm`].
    Arm { plan: Box<Plan>, term: u64, next_epoch: Epoch },
    /// See [`Input::Seal`].
    Seal { attempt: Try, session: SessionId },
    /// See [`Input::Sealed`].
    Sealed { attempt: Try, session: SessionId },
    /// See [`Input::Activate`].
    Activate { attempt: Try, name: String, session: SessionId },
    /// See [`Input::Reclaim`].
    Reclaim { attempt: Try, by: Asker },
    /// See [`Input::Abdicate`].
    Abdicate { attempt: Try, by: Asker },
    /// See [`Input::Open`].
    Open { open: Open, session: SessionId },
    /// See [`Input::Unfreeze`].
    Unfreeze { attempt: Try, session: SessionId, boot_id: u64 },
    /// See [`Input::Settle`].
    Settle { attempt: Try, term: u64, proof: Option<(SessionId, Proof)> },
    /// See [`Input::Disarm`].
    Disarm { attempt: Try, term: u64 },
}

/// What the record needs to know of the server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) boot_id: u64,
    pub(super) generation: u64,
}

impl Asker {
    fn by(&self) -> By<'_> {
        match self {
            Self::Backend { name, session } => By::Backend { name, session: *session },
            Self::Coordinator { term } => By::Coordinator { term: *term },
        }
    }

    fn who(&self) -> String {
        match self {
            Self::Backend { name, session } => format!("{name} (session {session})"),
            Self::Coordinator { term } => coordinator(*term),
        }
    }
}

fn coordinator(term: u64) -> String {
    format!("coordinator (term {term})")
}

impl Request {
    pub(super) fn input(&self, facts: Facts) -> Input<'_> {
        match self {
            Self::Claim { name, session } => Input::Claim { name, session: *session },
            Self::Rejoin { session, epoch } => Input::Rejoin { session: *session, epoch: *epoch },
            Self::Release { session, epoch } => Input::Release { session: *session, epoch: *epoch },
            Self::Fence { term, nominee, seen } => {
                let seen = seen
                    .as_ref()
                    .map(|seen| Seen { owner: seen.owner.as_deref(), next_epoch: seen.next_epoch });
                Input::Fence { term: *term, nominee: nominee.as_deref(), seen }
            }
            Self::Arm { plan, term, next_epoch } => Input::Arm {
                plan,
                term: *term,
                next_epoch: *next_epoch,
                generation: facts.generation,
            },
            Self::Seal { attempt, session } => Input::Seal { attempt: *attempt, session: *session },
            Self::Sealed { attempt, session } => {
                Input::Sealed { attempt: *attempt, session: *session }
            }
            Self::Activate { attempt, name, session } => {
                Input::Activate { attempt: *attempt, name, session: *session }
            }
            Self::Reclaim { attempt, by } => Input::Reclaim { attempt: *attempt, by: by.by() },
            Self::Abdicate { attempt, by } => Input::Abdicate { attempt: *attempt, by: by.by() },
            Self::Open { open, session } => {
                Input::Open { attempt: open.attempt, session: *session, proof: open.proof }
            }
            Self::Unfreeze { attempt, session, boot_id } => Input::Unfreeze {
                attempt: *attempt,
                session: *session,
                boot_id: *boot_id,
                boot_id_now: facts.boot_id,
            },
            Self::Settle { attempt, term, proof } => {
                Input::Settle { attempt: *attempt, term: *term, proof: *proof }
            }
            Self::Disarm { attempt, term } => Input::Disarm { attempt: *attempt, term: *term },
        }
    }

    /// Its kind, as it is counted.
    pub(super) fn step(&self) -> AccessStep {
        match self {
            Self::Claim { .. } => AccessStep::Claim,
            Self::Rejoin { .. } => AccessStep::Rejoin,
            Self::Release { .. } => AccessStep::Release,
            Self::Fence { .. } => AccessStep::Fence,
            Self::Arm { .. } => AccessStep::Arm,
            Self::Seal { .. } => AccessStep::Seal,
            Self::Sealed { .. } => AccessStep::Sealed,
            Self::Activate { .. } => AccessStep::Activate,
            Self::Reclaim { .. } => AccessStep::Reclaim,
            Self::Abdicate { .. } => AccessStep::Abdicate,
            Self::Open { .. } => AccessStep::Open,
            Self::Unfreeze { .. } => AccessStep::Unfreeze,
            Self::Settle { .. } => AccessStep::Settle,
            Self::Disarm { .. } => AccessStep::Disarm,
        }
    }

    /// Who asks, for people.
    pub(super) fn who(&self) -> String {
        match self {
            Self::Claim { name, session } | Self::Activate { name, session, .. } => {
                format!("{name} (session {session})")
            }
            Self::Rejoin { session, .. }
            | Self::Release { session, .. }
            | Self::Seal { session, .. }
            | Self::Sealed { session, .. }
            | Self::Open { session, .. }
            | Self::Unfreeze { session, .. } => format!("session {session}"),
            Self::Fence { term: None, .. } => "operator".to_owned(),
            Self::Fence { term: Some(term), .. }
            | Self::Arm { term, .. }
            | Self::Settle { term, .. }
            | Self::Disarm { term, .. } => coordinator(*term),
            Self::Reclaim { by, .. } | Self::Abdicate { by, .. } => by.who(),
        }
    }
}
