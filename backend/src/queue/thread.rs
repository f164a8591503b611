//! A thread and the queues that it serves: what wakes it, and in which order it
//! does what there is.

use std::rc::Rc;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};

use super::Disk;
use super::mailbox::Mailbox;
use super::polling::Polling;
use super::worker::Worker;

/// What woke the thread, of one queue.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Source {
    Mailbox = 0,
    Kick = 1,
    Volume = 2,
}

impl Source {
    /// What an event carries.
    pub(super) fn token(self, slot: usize) -> u64 {
        (slot as u64) << 2 | self as u64
    }
}

/// How the thread waits for the next thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Not at all: there is more to do, or soon will be.
    Look,
    /// Until something wakes it.
    Sleep,
}

pub(super) struct QueueThread {
    epoll: Rc<Epoll>,
    /// By slot.
    pub(super) workers: Vec<Worker>,
    /// Mailbox, kick, and what a volume has: a socket, a timer and a notification.
    /// What does not fit comes with the next round.
    events: [EpollEvent; 32],
    /// `None`: sleeps at once when there is nothing to do.
    polling: Option<Polling>,
}

impl QueueThread {
    /// Of the queues with these numbers. Their mailboxes are watched, with the
    /// place in the list as the slot.
    pub(super) fn new(
        disk: &Arc<Disk>,
        queues: Vec<(u16, Arc<Mailbox>)>,
        epoll: Epoll,
        polling: Option<Polling>,
    ) -> Self {
        let epoll = Rc::new(epoll);
        let worker = |(slot, (index, mailbox))| {
            Worker::new(index, slot, Arc::clone(disk), mailbox, Rc::clone(&epoll))
        };
        let workers: Vec<_> = queues.into_iter().enumerate().map(worker).collect();
        // A set of them is a word of bits.
        assert!((1..=64).contains(&workers.len()), "a disk has 1 to 64 queues");
        Self { epoll, workers, events: [EpollEvent::empty(); 32], polling }
    }

    /// Until all queues are given up.
    pub(super) fn run(mut self) {
        let mut next = Next::Sleep;
        while !self.workers.iter().all(|worker| worker.exit) {
            next = self.round(next);
        }
    }

    /// Waits as said, and does what there is then. The result is how to wait next.
    pub(super) fn round(&mut self, how: Next) -> Next {
        let timeout = match how {
            // Only look at what else is there.
            Next::Look => EpollTimeout::ZERO,
            Next::Sleep => EpollTimeout::NONE,
        };
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => return how,
            // The descriptor is ours and valid: nothing else can happen.
            Err(error) => panic!("epoll_wait on the queues' own descriptor: {error}"),
        };
        let woken_at = self.polling.as_ref().map(Polling::now);
        let before = taken(&self.workers);
        let (mut told, mut answered, mut due) = (0, 0, 0);
        for event in &self.events[..count] {
            let bit = 1_u64 << (event.data() >> 2 & 63);
            due |= bit;
            match event.data() & 3 {
                source if source == Source::Mailbox as u64 => told |= bit,
                source if source == Source::Volume as u64 => answered |= bit,
                _ => {}
            }
        }
        if how == Next::Look {
            due = u64::MAX >> (64 - self.workers.len());
        }
        // First what all have got, then what all send: who is on the other side of a volume, on the
        // same CPU perhaps, meets as many requests as there are.
        for slot in slots(due) {
            let worker = &mut self.workers[slot];
            if told & 1 << slot != 0 {
                worker.read_mailbox();
            }
            if answered & 1 << slot != 0 {
                worker.poll_volume();
            }
            worker.take_all();
        }
        slots(due).for_each(|slot| self.workers[slot].send());
        if let (Some(polling), Some(woken_at)) = (&mut self.polling, woken_at) {
            if count > 0 || taken(&self.workers) != before {
                polling.found(woken_at);
            }
            // Kicks stay unwanted: the look finds the request.
            if polling.look_again(self.workers.iter().map(|worker| worker.in_flight).sum()) {
                return Next::Look;
            }
        }
        // Who was not looked at has asked before.
        let mut more = false;
        for slot in slots(due) {
            more |= self.workers[slot].ask_for_kicks();
        }
        if more { Next::Look } else { Next::Sleep }
    }
}

/// Counts requests taken, of all queues.
fn taken(workers: &[Worker]) -> u64 {
    workers.iter().map(|worker| worker.taken).sum()
}

/// The places of the bits that are set.
fn slots(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let slot = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(slot)
    })
}

#[cfg(test)]
mod tests;
