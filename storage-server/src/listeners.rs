//! Which threads have somebody who waits for news: who has news tells only these.
//!
//! ```text
//!   listen                             tell
//!   1 counts[thread] += 1   (RMW)      1 the news are there
//!   2 look for news                    2 counts[thread] += 0   (RMW): tell it if not zero
//! ```
//!
//! Why nobody waits in vain: the two read-modify-writes have an order. If the
//! listener's comes first, it is counted and told. If the teller's comes first, the
//! listener reads what it wrote, and by that sees the news when it looks. The loom
//! tests prove it, and prove that they would see a mistake.

#[cfg(loom)]
use loom::sync::atomic;
#[cfg(not(loom))]
use std::sync::atomic;

use std::ops::Deref;

use atomic::{AtomicUsize, Ordering};

/// See the module's documentation.
#[derive(Debug)]
pub struct Listeners {
    counts: Box<[AtomicUsize]>,
}

/// Somebody listens while this lives.
#[derive(Debug)]
pub struct Listening<L: Deref<Target = Listeners>> {
    listeners: L,
    thread: usize,
}

impl Listeners {
    /// Nobody, on any of so many threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { counts: (0..threads.max(1)).map(|_| AtomicUsize::new(0)).collect() }
    }

    /// Listens on a thread from now on: news that the caller does not see after this,
    /// that thread is told of.
    pub fn listen<L: Deref<Target = Self>>(listeners: L, thread: usize) -> Listening<L> {
        let thread = thread % listeners.counts.len();
        listeners.counts[thread].fetch_add(1, Ordering::AcqRel);
        Listening { listeners, thread }
    }

    /// The threads to tell of news that are there.
    pub fn to_tell(&self) -> impl Iterator<Item = usize> {
        self.counted_by(|count| count.fetch_add(0, Ordering::AcqRel))
    }

    fn counted_by(&self, look: fn(&AtomicUsize) -> usize) -> impl Iterator<Item = usize> {
        let counts = self.counts.iter().enumerate();
        counts.filter(move |(_, count)| look(count) != 0).map(|(thread, _)| thread)
    }
}

impl<L: Deref<Target = Listeners>> Drop for Listening<L> {
    fn drop(&mut self) {
        self.listeners.counts[self.thread].fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_while_somebody_listens_there() {
        let listeners = Listeners::new(3);
        let told = || listeners.to_tell().collect::<Vec<_>>();
        assert!(told().is_empty());
        let (a, b) = (Listeners::listen(&listeners, 2), Listeners::listen(&listeners, 0));
        let again = Listeners::listen(&listeners, 2);
        assert_eq!(told(), [0, 2]);
        drop((a, b));
        assert_eq!(told(), [2]);
        drop(again);
        assert!(told().is_empty());
    }
}

#[cfg(all(test, loom))]
mod proof {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    struct Shared(Arc<Listeners>);
    impl Deref for Shared {
        type Target = Listeners;
        fn deref(&self) -> &Listeners {
            &self.0
        }
    }

    /// One has news, another listens and looks, in this order unless told otherwise.
    fn news(look_first: bool, look: fn(&AtomicUsize) -> usize) {
        loom::model(move || {
            let listeners = Arc::new(Listeners::new(1));
            let news = Arc::new(AtomicBool::new(false));
            let teller = thread::spawn({
                let (listeners, news) = (Arc::clone(&listeners), Arc::clone(&news));
                move || {
                    news.store(true, Ordering::Relaxed);
                    listeners.counted_by(look).next().is_some()
                }
            });
            let before = look_first && news.load(Ordering::Relaxed);
            let _listening = Listeners::listen(Shared(Arc::clone(&listeners)), 0);
            let seen = if look_first { before } else { news.load(Ordering::Relaxed) };
            let told = teller.join().expect("no panic");
            assert!(seen || told, "waits in vain");
        });
    }

    fn right(count: &AtomicUsize) -> usize {
        count.fetch_add(0, Ordering::AcqRel)
    }

    #[test]
    fn nobody_waits_in_vain() {
        news(false, right);
    }

    #[test]
    #[should_panic(expected = "waits in vain")]
    fn the_model_sees_a_look_before_the_count() {
        news(true, right);
    }

    #[test]
    #[should_panic(expected = "waits in vain")]
    fn the_model_sees_a_teller_that_may_see_an_old_count() {
        news(false, |count| count.load(Ordering::Acquire));
    }
}
