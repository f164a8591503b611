//! The last changes of an access record, for people who ask why. Memory only:
//! it begins again with the server. Bounded.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use baton_protocol::access::AccessRecord;
use serde::Serialize;
use utoipa::ToSchema;

/// Changes kept.
const ENTRIES_MAX: usize = 64;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Entry {
    /// When, microseconds since 1970.
    pub at_unix_us: u64,
    /// The record's version afterwards.
    pub version: u64,
    /// The volume's epoch afterwards.
    pub epoch: u64,
    /// The phase afterwards.
    pub phase: &'static str,
    /// What was asked.
    pub what: &'static str,
    /// By whom.
    pub who: String,
}

/// The changes, oldest first.
#[derive(Debug, Default)]
pub(super) struct Audit(Mutex<VecDeque<Entry>>);

impl Audit {
    pub(super) fn note(&self, record: &AccessRecord, what: &'static str, who: String) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let entry = Entry {
            at_unix_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            version: record.version,
            epoch: record.epoch.0,
            phase: record.phase.name(),
            what,
            who,
        };
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() == ENTRIES_MAX {
            entries.pop_front();
        }
        entries.push_back(entry);
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::VolumeId;

    #[test]
    fn the_oldest_goes_for_the_newest() {
        let audit = Audit::default();
        let mut record = AccessRecord::new(VolumeId(1));
        for version in 0..=ENTRIES_MAX as u64 {
            record.version = version;
            audit.note(&record, "claim", "me".to_owned());
        }
        let versions: Vec<_> = audit.entries().iter().map(|entry| entry.version).collect();
        assert_eq!(versions, (1..=ENTRIES_MAX as u64).collect::<Vec<_>>());
    }
}
