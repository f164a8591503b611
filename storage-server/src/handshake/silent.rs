//! Connections that have not said HELLO: a bounded list; a new one drives out
//! the oldest, so that a flood of silent ones does not keep honest ones away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// The list.
#[derive(Debug)]
pub(crate) struct SilentList {
    max: usize,
    waiting: Mutex<VecDeque<Arc<Notify>>>,
}

/// A place on the list until it is dropped.
#[derive(Debug)]
pub(crate) struct SilentSeat {
    list: Arc<SilentList>,
    evict: Arc<Notify>,
}

impl SilentList {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: max.max(1), waiting: Mutex::default() })
    }

    /// Enters a new connection; the oldest goes if there are too many.
    pub(crate) fn enter(self: &Arc<Self>) -> SilentSeat {
        let evict = Arc::new(Notify::new());
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= self.max
            && let Some(oldest) = waiting.pop_front()
        {
            oldest.notify_one();
        }
        waiting.push_back(Arc::clone(&evict));
        SilentSeat { list: Arc::clone(self), evict }
    }
}

impl SilentSeat {
    /// Ends when the place is lost.
    pub(crate) async fn evicted(&self) {
        self.evict.notified().await;
    }
}

impl Drop for SilentSeat {
    fn drop(&mut self) {
        let mut waiting = self.list.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = waiting.iter().position(|other| Arc::ptr_eq(other, &self.evict)) {
            waiting.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_silent_one_goes() {
        let list = SilentList::new(2);
        let first = list.enter();
        let second = list.enter();
        drop(second);
        let third = list.enter();
        // Two wait: first and third.
        let fourth = list.enter();
        first.evicted().await;
        drop(first);
        for still in [&third, &fourth] {
            let wait = tokio::time::timeout(std::time::Duration::from_millis(5), still.evicted());
            assert!(wait.await.is_err(), "not driven out");
        }
        drop((third, fourth));
        assert!(list.waiting.lock().expect("no panic").is_empty());
    }
}
