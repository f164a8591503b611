//! Named moments in the pool's work, where tests look on or make the next step fail. Nothing outside of tests.

use std::io;

/// The order of these steps is what `docs/on-disk.md` promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    SyncPool,
    SyncJournal,
    Journal,
    Space,
    CheckpointSwapped,
    CheckpointCommit,
    CheckpointCommitted,
    VolumeDeleted,
    Punch,
}

#[cfg(not(test))]
#[derive(Debug)]
pub(super) struct Probe;

#[cfg(not(test))]
impl Probe {
    pub(super) fn new() -> Self {
        Self
    }

    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests use both")]
    #[inline(always)]
    pub(super) fn at(&self, _step: Step) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
type Watch = Box<dyn FnMut(Step) -> io::Result<()> + Send>;

#[cfg(test)]
#[derive(Default)]
pub(super) struct Probe(std::sync::Mutex<Option<Watch>>);

#[cfg(test)]
impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Probe")
    }
}

#[cfg(test)]
impl Probe {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn watch(&self, watch: impl FnMut(Step) -> io::Result<()> + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(watch));
    }

    pub(super) fn at(&self, step: Step) -> io::Result<()> {
        self.0.lock().unwrap().as_mut().map_or(Ok(()), |w| w(step))
    }
}
