//! What happens next: a queue of events in virtual time. Events of the same
//! instant happen in the order in which they were put down, so a seed decides
//! everything.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// Virtual microseconds since the world began.
pub type Time = u64;

/// Virtual microseconds in a millisecond.
pub(crate) const MS: Time = 1000;

/// The queue. Events wait in slots, so that the heap moves only three numbers.
#[derive(Debug)]
pub(crate) struct Agenda<E> {
    heap: BinaryHeap<Reverse<(Time, u64, usize)>>,
    slots: Vec<Option<E>>,
    free: VecDeque<usize>,
    put_down: u64,
}

impl<E> Agenda<E> {
    pub(crate) fn new() -> Self {
        Self { heap: BinaryHeap::new(), slots: Vec::new(), free: VecDeque::new(), put_down: 0 }
    }

    pub(crate) fn put(&mut self, at: Time, event: E) {
        let slot = self.free.pop_front().unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(event);
        self.heap.push(Reverse((at, self.put_down, slot)));
        self.put_down += 1;
    }

    pub(crate) fn next(&mut self) -> Option<(Time, E)> {
        let Reverse((at, _, slot)) = self.heap.pop()?;
        self.free.push_back(slot);
        Some((at, self.slots[slot].take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_by_time_and_then_by_arrival() {
        let mut agenda = Agenda::new();
        for (at, event) in [(5, 'c'), (1, 'a'), (5, 'd'), (2, 'b')] {
            agenda.put(at, event);
        }
        let order: String = std::iter::from_fn(|| agenda.next()).map(|(_, event)| event).collect();
        assert_eq!(order, "abcd");
    }
}
