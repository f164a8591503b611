//! Which side runs, from what both monitors say.
//!
//! A source that says `completed` proves nothing: its destination may have
//! failed to load the state, or may not have started. Only both together do.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{RunState, VmmStatus};

/// Which side runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The destination runs, the source does not.
    Moved,
    /// The source runs, the destination does not.
    Stayed,
    /// Both run: storage decides which one's disk works; stop the other.
    Both,
    /// Neither runs: resume the one that storage names.
    Neither,
    /// At least one does not say.
    Unknown,
}

/// Looks at both sides; `None` is a side that could not be asked.
#[must_use]
pub fn verdict(source: Option<&VmmStatus>, destination: Option<&VmmStatus>) -> Verdict {
    match (runs(source), runs(destination)) {
        (Some(true), Some(true)) => Verdict::Both,
        (Some(true), Some(false)) => Verdict::Stayed,
        (Some(false), Some(true)) => Verdict::Moved,
        (Some(false), Some(false)) => Verdict::Neither,
        (None, _) | (_, None) => Verdict::Unknown,
    }
}

fn runs(status: Option<&VmmStatus>) -> Option<bool> {
    match status?.run {
        RunState::Running => Some(true),
        RunState::Paused
        | RunState::Incoming
        | RunState::Switching
        | RunState::Migrated
        | RunState::Shutdown
        | RunState::Gone => Some(false),
        RunState::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Migration, MigrationPhase};
    use super::*;

    const RUN_STATES: [RunState; 8] = [
        RunState::Running,
        RunState::Paused,
        RunState::Incoming,
        RunState::Switching,
        RunState::Migrated,
        RunState::Shutdown,
        RunState::Gone,
        RunState::Unknown,
    ];

    fn status(run: RunState, phase: MigrationPhase) -> VmmStatus {
        let migration = Migration { phase, ..Migration::default() };
        VmmStatus { run, detail: String::new(), migration, version: None }
    }

    #[test]
    fn the_whole_matrix() {
        for source in RUN_STATES {
            for destination in RUN_STATES {
                let (s, d) = (
                    status(source, MigrationPhase::Completed),
                    status(destination, MigrationPhase::None),
                );
                let expected = match (source, destination) {
                    (RunState::Unknown, _) | (_, RunState::Unknown) => Verdict::Unknown,
                    (RunState::Running, RunState::Running) => Verdict::Both,
                    (RunState::Running, _) => Verdict::Stayed,
                    (_, RunState::Running) => Verdict::Moved,
                    _ => Verdict::Neither,
                };
                assert_eq!(verdict(Some(&s), Some(&d)), expected, "{source:?} {destination:?}");
            }
        }
        let running = status(RunState::Running, MigrationPhase::None);
        assert_eq!(verdict(None, Some(&running)), Verdict::Unknown);
        assert_eq!(verdict(Some(&running), None), Verdict::Unknown);
    }

    #[test]
    fn completed_alone_is_not_moved() {
        let source = status(RunState::Migrated, MigrationPhase::Completed);
        let destination = status(RunState::Gone, MigrationPhase::Failed);
        assert_eq!(verdict(Some(&source), Some(&destination)), Verdict::Neither);
    }
}
