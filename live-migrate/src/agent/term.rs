//! The highest term of a coordinator that this agent has heard. What a lower one
//! asks for is refused: it was deposed, though it may not know it yet.
//!
//! Kept over restarts. On a full disk the new term counts all the same, until the
//! agent is started again: a refusal would hinder the one that leads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use axum::http::StatusCode;

use super::inventory::{InventoryError, write_durably};
use crate::problem::Problem;

/// See the module.
#[derive(Debug)]
pub(crate) struct Terms {
    path: PathBuf,
    highest: Mutex<u64>,
}

impl Terms {
    pub(super) fn open(state_dir: &Path) -> Result<Self, InventoryError> {
        let path = state_dir.join("coordinator-term");
        let highest = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|error| InventoryError::Damaged {
                path: path.clone(),
                source: Box::new(error),
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(source) => return Err(InventoryError::Disk { path, source }),
        };
        Ok(Self { path, highest: Mutex::new(highest) })
    }

    /// The highest so far.
    pub(super) fn highest(&self) -> u64 {
        *self.highest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody of this term calls.
    pub(super) fn hear(&self, term: u64) -> Result<(), Problem> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if term < *highest {
            return Err(Problem::new(
                StatusCode::CONFLICT,
                "baton:stale-term",
                "A newer coordinator has spoken",
                format!(
                    "the coordinator of term {term} leads no more: this host has heard term {highest}; nothing was done"
                ),
            ));
        }
        if term > *highest {
            if let Err(error) = write_durably(&self.path, format!("{term}\n").as_bytes()) {
                tracing::error!(%error, path = %self.path.display(), "cannot keep the coordinator's term");
            }
            tracing::info!(term, "a new coordinator");
            *highest = term;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_term_is_refused_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let terms = Terms::open(dir.path()).expect("new");
        for term in [1, 4, 4] {
            terms.hear(term).expect("higher or the same");
        }
        let refused = terms.hear(3).expect_err("lower");
        assert_eq!((refused.kind.as_ref(), refused.status), ("baton:stale-term", 409));
        drop(terms);
        let terms = Terms::open(dir.path()).expect("again");
        assert_eq!(terms.highest(), 4);
        terms.hear(3).expect_err("lower, after a restart");
        terms.hear(5).expect("higher");
        fs::write(dir.path().join("coordinator-term"), "nonsense").expect("written");
        let error = Terms::open(dir.path()).expect_err("damaged").to_string();
        assert!(error.contains("coordinator-term"), "{error}");
    }
}
