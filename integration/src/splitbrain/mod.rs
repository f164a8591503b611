//! Two accidents of live migration, replayed on a real guest, and what became of its volume.
//!
//! | replay | the accident | the question |
//! |---|---|---|
//! | [`Replay::FrozenDestination`] | the destination freezes at the switch-over, the orchestrator gives up and lets the guest run on the source, the destination thaws | how many guests write? |
//! | [`Replay::DeadSourceBackend`] | the source's backend dies while the guest is being stopped | may the destination write, though nobody ever said that the source had finished? |
//!
//! Neither needs a broken orchestrator: all it can know is what the two QEMUs tell it. So what is replayed is the same
//! for every [`Stack`], and the stack decides what becomes of it. Knows no stack but the trait; [`peer`] is one.

pub mod baton;
pub mod peer;
mod replay;

use crate::daemon::Daemon;
use anyhow::Result;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

pub use replay::{replay_dead_source_backend, replay_frozen_destination};

/// Queues of the guest's disk on every stack.
pub const QUEUES: u16 = 1;

/// A volume that two hosts can reach, with a backend on each.
///
/// The calls come in this order: `source_socket`, `prepare_destination`, one accident, `gave_up` or `completed`,
/// `verdict`.
pub trait Stack {
    /// In the report: "qemu-storage-daemon".
    fn name(&self) -> String;

    /// Where the source's QEMU connects; its backend runs.
    fn source_socket(&self) -> PathBuf;

    /// Starts what the destination needs, as an orchestrator would before a migration, and says where its QEMU
    /// connects.
    fn prepare_destination(&mut self) -> Result<PathBuf>;

    /// The source's backend, for an accident.
    fn source_backend(&mut self) -> &mut Daemon;

    /// The orchestrator has cancelled the migration and let the guest run on the source.
    fn gave_up(&mut self) -> Result<Advice> {
        Ok(Advice::default())
    }

    /// QEMU has told the orchestrator that the migration is complete.
    fn completed(&mut self) -> Result<Advice> {
        Ok(Advice::default())
    }

    /// Whom the stack lets write now, in one sentence; `None` for a stack that has no opinion.
    fn verdict(&mut self) -> Result<Option<String>> {
        Ok(None)
    }
}

/// What a stack answers an orchestrator that asks it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// For the story; nothing from a stack that has no opinion.
    pub told: Option<String>,
    /// The guest belongs on the source: let it run there.
    pub continue_source: bool,
}

/// Which accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Replay {
    /// See the head of this module.
    FrozenDestination,
    /// See the head of this module.
    DeadSourceBackend,
}

impl std::fmt::Display for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::FrozenDestination => "frozen destination",
            Self::DeadSourceBackend => "dead source backend",
        })
    }
}

/// What a guest found when it read everything back that it knew to be written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Verification {
    /// All of it, as it was written.
    Good,
    /// Something else.
    Bad {
        /// Requests that failed.
        errors: u64,
        /// Acknowledged writes that were gone.
        stale: u64,
        /// Data that this guest never wrote there.
        corrupt: u64,
        /// The first of it, in words.
        first: String,
    },
    /// The guest completes no requests, so it cannot read anything.
    Stalled,
    /// The guest does not run.
    NotRunning,
}

/// One of the two guests at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// What its QEMU says: "running", "paused", "postmigrate", ...; "gone" when QEMU has ended.
    pub vm: String,
    /// Writes that were acknowledged to it after the decision: not fewer than this.
    pub writes: u64,
    /// What it found on the volume.
    pub verification: Verification,
}

/// How a replay ended.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// On what.
    pub stack: String,
    /// Which accident.
    pub replay: Replay,
    /// Where the guest was.
    pub source: Side,
    /// Where it should go.
    pub destination: Side,
    /// What the stack says of it.
    pub verdict: Option<String>,
    /// What was done and seen, in order.
    pub steps: Vec<Step>,
}

impl Outcome {
    /// Both guests changed the volume: it is lost.
    #[must_use]
    pub fn is_split_brain(&self) -> bool {
        self.source.writes > 0 && self.destination.writes > 0
    }
}

/// A line of the story.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Since the beginning of the replay, in ms.
    pub at_ms: u128,
    /// What was done or seen.
    pub text: String,
}

/// Collects the steps, and tells them to whoever wants to watch.
pub struct Story<'a> {
    started: Instant,
    steps: Vec<Step>,
    watch: &'a mut dyn FnMut(&Step),
}

impl std::fmt::Debug for Story<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Story").field("steps", &self.steps).finish_non_exhaustive()
    }
}

impl<'a> Story<'a> {
    /// A story that begins now; `watch` sees every step when it happens.
    pub fn new(watch: &'a mut dyn FnMut(&Step)) -> Self {
        Self { started: Instant::now(), steps: Vec::new(), watch }
    }

    fn tell(&mut self, text: impl Into<String>) {
        let step = Step { at_ms: self.started.elapsed().as_millis(), text: text.into() };
        (self.watch)(&step);
        self.steps.push(step);
    }
}
