//! The dirty log under a load: it is kept, its marks are taken as a VMM takes them, and what must be marked was.
//!
//! A log that nobody writes costs nothing, and a benchmark of it would be proud of that. So the pages that the device
//! must have written are known beforehand, and each has to be marked at least once.

use crate::raw_frontend::{LOG_PAGE, RawFrontend};
use crate::vhost_user::{feature, protocol};
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two times that the marks are taken: a mark that is there costs the device less than one it has to set, and a
/// VMM takes them about once in each pass over the memory.
const TAKE_EVERY: Duration = Duration::from_millis(50);

/// Turns the log on.
pub(super) fn start(frontend: &mut RawFrontend) -> Result<()> {
    let (features, more) = frontend.offered();
    if features & feature::LOG_ALL == 0 || more & protocol::LOG_SHMFD == 0 {
        bail!("the back-end keeps no dirty log");
    }
    frontend.start_logging()
}

/// Pages marked so far, and those that have to be.
#[derive(Debug)]
pub(super) struct DirtyPages {
    expected: BTreeSet<u64>,
    marked: BTreeSet<u64>,
}

impl DirtyPages {
    /// The pages of these addresses are written by the device.
    pub(super) fn expect(addresses: Vec<u64>) -> Self {
        let page = |address: u64| address / LOG_PAGE * LOG_PAGE;
        Self { expected: addresses.into_iter().map(page).collect(), marked: BTreeSet::new() }
    }

    fn mark(&mut self, pages: Vec<u64>) {
        self.marked.extend(pages);
    }

    /// How many pages were marked, if all that had to be were.
    fn finish(self) -> Result<u64> {
        let mut missing = self.expected.difference(&self.marked);
        if let Some(first) = missing.next() {
            bail!(
                "{} of {} pages that the device wrote are not in the dirty log, {first:#x} among them",
                1 + missing.count(),
                self.expected.len()
            );
        }
        Ok(self.marked.len() as u64)
    }
}

/// Takes the marks while a load runs; sleeps only, where there is no log.
pub(super) struct Taker<'a> {
    pub(super) frontend: &'a RawFrontend,
    pub(super) log: Option<DirtyPages>,
}

impl Taker<'_> {
    pub(super) fn sleep(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let Some(log) = &mut self.log else {
                std::thread::sleep(left);
                continue;
            };
            std::thread::sleep(left.min(TAKE_EVERY));
            log.mark(self.frontend.take_dirty()?);
        }
    }

    /// When nothing is in flight any more: pages marked in all. `None` without a log.
    pub(super) fn finish(self) -> Result<Option<u64>> {
        let Some(mut log) = self.log else { return Ok(None) };
        log.mark(self.frontend.take_dirty()?);
        log.finish().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_written_has_to_be_marked_at_some_time() {
        let expected = || DirtyPages::expect(vec![0x1000_0010, 0x1000_0fff, 0x1000_3000]);
        let mut log = expected();
        log.mark(vec![0x1000_0000, 0x1000_9000]);
        log.mark(vec![0x1000_3000]);
        assert_eq!(log.finish().unwrap(), 3);
        let mut half = expected();
        half.mark(vec![0x1000_0000]);
        let error = half.finish().unwrap_err().to_string();
        assert!(error.starts_with("1 of 2 pages") && error.contains("0x10003000"), "{error}");
        assert!(expected().finish().is_err(), "a log that nobody writes");
    }
}
