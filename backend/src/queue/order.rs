//! The order in which completions are shown while a migration runs: the order
//! in which the guest made the requests available.
//!
//! Then the used index is an exact boundary: everything before it is done and
//! nothing behind it was shown. A front-end that lost its back-end and guesses
//! from the used index where the ring goes on has the rest done again, and
//! loses nothing. The price is that a request that does not complete holds back
//! those behind it.
//!
//! Knows heads and lengths, neither rings nor memory. Bounded by the ring: a
//! head is in it at most once. Allocates only in [`Order::new`].

use std::collections::VecDeque;

/// Requests taken and not yet shown, oldest first.
#[derive(Debug)]
pub(super) struct Order {
    /// Their heads.
    taken: VecDeque<u16>,
    /// By head: bytes written, once completed.
    completed: Vec<Option<u32>>,
}

impl Order {
    /// For a ring of `size` entries of which `outstanding` are in flight
    /// already, oldest first.
    pub(super) fn new(size: u16, outstanding: &[u16]) -> Self {
        let mut taken = VecDeque::with_capacity(usize::from(size));
        taken.extend(outstanding);
        Self { taken, completed: vec![None; usize::from(size)] }
    }

    /// A request was taken from the available ring. Its head must not be in the
    /// order already.
    pub(super) fn take(&mut self, head: u16) {
        self.taken.push_back(head);
    }

    /// A request that was taken is completed.
    pub(super) fn complete(&mut self, head: u16, written: u32) {
        self.completed[usize::from(head)] = Some(written);
    }

    /// The next one to show, if the oldest is completed.
    pub(super) fn pop(&mut self) -> Option<(u16, u32)> {
        let head = *self.taken.front()?;
        let written = self.completed[usize::from(head)].take()?;
        self.taken.pop_front();
        Some((head, written))
    }

    /// Everything completed, whatever it waits for: the order ends.
    pub(super) fn pop_any(&mut self) -> Option<(u16, u32)> {
        let is_completed = |head: &u16| self.completed[usize::from(*head)].is_some();
        let at = self.taken.iter().position(is_completed)?;
        let head = self.taken.remove(at)?;
        self.completed[usize::from(head)].take().map(|written| (head, written))
    }

    /// Heads taken and not yet shown, oldest first.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = u16> {
        self.taken.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u16 = 8;

    /// Slow and plain: the whole history, looked through for every question.
    #[derive(Default)]
    struct Oracle {
        /// Head, bytes written once completed, whether it was shown.
        history: Vec<(u16, Option<u32>, bool)>,
    }

    impl Oracle {
        fn holds(&self, head: u16) -> bool {
            self.history.iter().any(|(h, _, shown)| *h == head && !shown)
        }

        fn complete(&mut self, head: u16, written: u32) -> bool {
            let open = self.history.iter_mut().find(|(h, w, _)| *h == head && w.is_none());
            open.map(|entry| entry.1 = Some(written)).is_some()
        }

        /// All that may be shown: no older one is missing.
        fn show(&mut self) -> Vec<(u16, u32)> {
            let mut shown = Vec::new();
            for entry in &mut self.history {
                let Some(written) = entry.1 else { break };
                if !std::mem::replace(&mut entry.2, true) {
                    shown.push((entry.0, written));
                }
            }
            shown
        }

        fn show_any(&mut self) -> Vec<(u16, u32)> {
            let ready =
                self.history.iter_mut().filter(|(_, written, shown)| written.is_some() && !shown);
            ready
                .map(|entry| {
                    entry.2 = true;
                    (entry.0, entry.1.expect("filtered"))
                })
                .collect()
        }

        fn outstanding(&self) -> Vec<u16> {
            self.history.iter().filter(|(.., shown)| !shown).map(|(head, ..)| *head).collect()
        }
    }

    proptest! {
        /// Any mixture of takes and completions, from any state in which the
        /// order begins, to its end.
        #[test]
        fn it_shows_what_the_oracle_shows(
            before in Just((0..SIZE).collect::<Vec<u16>>()).prop_shuffle(),
            in_flight in 0..=usize::from(SIZE),
            steps in prop::collection::vec((any::<bool>(), 0..SIZE, 0..9_u32), 0..200),
        ) {
            let before = &before[..in_flight];
            let mut oracle = Oracle::default();
            oracle.history.extend(before.iter().map(|head| (*head, None, false)));
            let mut order = Order::new(SIZE, before);
            for (take, head, written) in steps {
                if take {
                    if oracle.holds(head) {
                        continue;
                    }
                    oracle.history.push((head, None, false));
                    order.take(head);
                } else if oracle.complete(head, written) {
                    order.complete(head, written);
                }
                let shown: Vec<_> = std::iter::from_fn(|| order.pop()).collect();
                prop_assert_eq!(shown, oracle.show());
                prop_assert_eq!(order.outstanding().collect::<Vec<_>>(), oracle.outstanding());
                prop_assert!(order.taken.capacity() < 2 * usize::from(SIZE) + 1, "it grew");
            }
            let rest: Vec<_> = std::iter::from_fn(|| order.pop_any()).collect();
            prop_assert_eq!(rest, oracle.show_any());
            prop_assert_eq!(order.outstanding().collect::<Vec<_>>(), oracle.outstanding());
        }
    }
}
