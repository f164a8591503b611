//! The order in which requests of one connection get to the record.

use tokio::sync::{OwnedMutexGuard, oneshot};

use crate::volumes::{Control, RunningVolume};

/// Of the requests of a connection.
#[derive(Debug, Default)]
pub(super) struct Turns {
    last: Option<oneshot::Receiver<()>>,
}

/// How a request gets to the record.
pub(super) enum Entry {
    /// It has it.
    Now(OwnedMutexGuard<Control>),
    /// It waits for it.
    Later(Turn),
}

impl Turns {
    /// The record itself if nobody has it and nothing of this connection is in
    /// front, else a turn.
    pub(super) fn enter(&mut self, volume: &RunningVolume) -> Entry {
        let is_first = self.is_first();
        match volume.try_control() {
            Some(control) if is_first => Entry::Now(control),
            _ => Entry::Later(self.take()),
        }
    }

    /// Whether everything in front has got the record.
    fn is_first(&mut self) -> bool {
        let waits = |last: &mut oneshot::Receiver<()>| {
            matches!(last.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        };
        // What has answered once must not be asked again.
        self.last = self.last.take().and_then(|mut last| waits(&mut last).then_some(last));
        self.last.is_none()
    }

    /// The turn of a request: it comes when the one before has got the record.
    pub(super) fn take(&mut self) -> Turn {
        let (done, next) = oneshot::channel();
        Turn { before: self.last.replace(next), done }
    }
}

/// Dropping it lets the next one start.
pub(super) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    done: oneshot::Sender<()>,
}

impl Turn {
    /// Waits for the one before and gets the record.
    pub(super) async fn control(self, volume: &RunningVolume) -> OwnedMutexGuard<Control> {
        if let Some(before) = self.before {
            // An error means that it has ended.
            let _ = before.await;
        }
        let control = volume.control().await;
        // The receiver may be gone with its connection.
        let _ = self.done.send(());
        control
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_turn_behind_one_that_has_ended_does_not_wait() {
        let mut turns = Turns::default();
        assert!(turns.is_first());
        let before = turns.take();
        assert!(!turns.is_first());
        let _ = before.done.send(());
        assert!(turns.is_first());
        // Somebody else has the record: a turn all the same, behind nobody.
        let turn = turns.take();
        assert!(turn.before.is_none());
        assert!(!turns.is_first(), "it has not got the record");
    }
}
