//! A queue on its thread: the life of its ring.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, mpsc};

use baton_remote_client::{Completion, VolumeQueue};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::mailbox::{Command, Mailbox};
use super::order::Order;
use super::pending::{Held, Pending, Stage};
use super::thread::Source;
use super::{Disk, RingSetup, RingStart};
use crate::inflight::InflightRing;
use crate::log_limit::LogLimit;
use crate::virtqueue::{Chain, Virtqueue};

#[derive(Debug)]
pub(super) struct Running {
    pub(super) queue: Virtqueue,
    pub(super) setup: RingSetup,
    /// While a migration runs, which is while there is a log.
    pub(super) order: Option<Order>,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) inflight: Option<InflightRing>,
    pub(super) memory: Rc<Held>,
    /// The guest broke the ring: nothing more is taken from it.
    pub(super) broken: bool,
    /// Set while the ring is being stopped.
    pub(super) draining: Option<mpsc::SyncSender<Option<u16>>>,
}

pub(super) struct Worker {
    pub(super) index: u16,
    /// Among the queues of its thread.
    slot: usize,
    pub(super) disk: Arc<Disk>,
    mailbox: Arc<Mailbox>,
    /// Its thread's.
    epoll: Rc<Epoll>,
    pub(super) ring: Option<Running>,
    pub(super) io: Option<Box<dyn VolumeQueue>>,
    /// Requests that `io` was opened for.
    depth: usize,
    pub(super) pending: Vec<Pending>,
    pub(super) in_flight: usize,
    /// Counts requests taken.
    pub(super) taken: u64,
    /// Something was submitted and not yet sent.
    pub(super) unsent: bool,
    pub(super) chain: Chain,
    pub(super) completions: Vec<Completion>,
    /// Heads put into the used ring and not yet published.
    pub(super) batch: Vec<u16>,
    pub(super) guest_errors: LogLimit,
    /// Apart, so that a flood of bad requests does not hide the end of a ring.
    pub(super) breaks: LogLimit,
    /// It was given up.
    pub(super) exit: bool,
}

impl Worker {
    pub(super) fn new(
        index: u16,
        slot: usize,
        disk: Arc<Disk>,
        mailbox: Arc<Mailbox>,
        epoll: Rc<Epoll>,
    ) -> Self {
        Self {
            index,
            slot,
            disk,
            mailbox,
            epoll,
            ring: None,
            io: None,
            depth: 0,
            pending: Vec::new(),
            in_flight: 0,
            taken: 0,
            unsent: false,
            chain: Chain::default(),
            completions: Vec::new(),
            batch: Vec::new(),
            guest_errors: LogLimit::default(),
            breaks: LogLimit::default(),
            exit: false,
        }
    }

    pub(super) fn read_mailbox(&mut self) {
        let _ = self.mailbox.wake.read();
        loop {
            let command = self.mailbox.commands.lock().expect("no panic while held").pop_front();
            match command {
                None => return,
                Some(Command::Start(start, answer)) => {
                    let _ = answer.send(self.start(*start));
                }
                Some(Command::Prepare(depth)) => {
                    // The ring's start tries again and says why it cannot.
                    let _ = self.connect(depth);
                    self.make_room(depth);
                }
                Some(Command::Apply(setup, answer)) => {
                    self.apply(*setup);
                    let _ = answer.send(());
                }
                Some(Command::Drain(answer)) => match &mut self.ring {
                    Some(ring) => {
                        ring.draining = Some(answer);
                        self.rest();
                        self.finish_drain();
                    }
                    None => drop(answer.send(None)),
                },
                Some(Command::Abandon(answer)) => {
                    let _ = answer.send(self.abandon());
                }
                Some(Command::Exit) => self.give_up(),
            }
        }
    }

    /// Nothing of it is left on a thread that goes on for others.
    fn give_up(&mut self) {
        self.exit = true;
        self.stop_ring();
        // With what is in flight: nothing touches the guest's memory any more.
        self.io = None;
        self.in_flight = 0;
        self.pending.clear();
        let _ = self.epoll.delete(&self.mailbox.wake);
    }

    pub(super) fn start(&mut self, start: RingStart) -> io::Result<()> {
        let RingStart { setup, kick, base, mut inflight } = start;
        // A ring that is still there was never stopped by the front-end.
        self.stop_ring();
        let size = setup.addresses.size();
        if self.in_flight > 0 || self.depth < usize::from(size) {
            self.io = None;
            self.in_flight = 0;
            self.pending.clear();
        }
        self.make_room(usize::from(size));
        self.connect(usize::from(size))?;
        // Edge-triggered: a kick need not be read to be forgotten.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll.add(kick.as_fd(), EpollEvent::new(flags, Source::Kick.token(self.slot)))?;
        let used_idx = setup.addresses.used_idx();
        let mut again = inflight.as_mut().map(|table| table.resume(used_idx)).unwrap_or_default();
        again.retain(|head| *head < size);
        // What was taken is what is done plus what is in flight. The front-end's
        // own idea of it is only right for a ring that completed in order.
        let next_avail = match &inflight {
            Some(_) => {
                used_idx.wrapping_add(u16::try_from(again.len()).expect("at most the ring's size"))
            }
            None => base,
        };
        if !again.is_empty() {
            tracing::info!(
                disk = self.disk.name,
                queue = self.index,
                requests = again.len(),
                "doing requests again that an earlier process left in flight"
            );
        }
        // An earlier process may have been killed between publishing completions
        // and telling the guest of them; one call too many does no harm.
        if let Some(call) = &setup.call {
            signal(call);
        }
        let memory = Rc::new(Held(Arc::clone(setup.addresses.memory())));
        let queue = Virtqueue::new(setup.addresses.clone(), setup.event_idx, next_avail);
        let order = setup.log.is_some().then(|| Order::new(size, &[]));
        self.ring = Some(Running {
            queue,
            setup,
            order,
            kick,
            inflight,
            memory,
            broken: false,
            draining: None,
        });
        for head in again {
            self.take(head);
        }
        Ok(())
    }

    /// A place for each request that a ring of this size can have.
    fn make_room(&mut self, size: usize) {
        if self.pending.len() != size {
            self.pending.clear();
            self.pending.resize_with(size, Pending::default);
        }
    }

    /// Opens the volume's queue, unless it is open.
    fn connect(&mut self, depth: usize) -> io::Result<()> {
        if self.io.is_some() {
            return Ok(());
        }
        let mut io = self.disk.volume.open_queue(self.index, depth).map_err(io::Error::other)?;
        io.watch_in(&self.epoll, Source::Volume.token(self.slot))?;
        (self.io, self.depth) = (Some(io), depth);
        Ok(())
    }

    /// Tells the volume that nothing more will be submitted, once that is so: the
    /// ring is being stopped and no write is to be followed by its flush.
    pub(super) fn rest(&mut self) {
        let stopping = self.ring.as_ref().is_some_and(|ring| ring.draining.is_some());
        if stopping
            && !self.pending.iter().any(|pending| pending.stage == Stage::ThenFlush)
            && let Some(io) = &mut self.io
        {
            io.rest();
        }
    }

    fn apply(&mut self, setup: RingSetup) {
        let Some(ring) = &mut self.ring else { return };
        ring.queue.relocate(setup.addresses.clone(), setup.event_idx);
        if !Arc::ptr_eq(&ring.memory.0, setup.addresses.memory()) {
            ring.memory = Rc::new(Held(Arc::clone(setup.addresses.memory())));
        }
        // What the old event was told, nobody may have heard.
        if let Some(call) = &setup.call
            && ring.setup.call.as_ref().is_none_or(|old| !Arc::ptr_eq(old, call))
        {
            signal(call);
        }
        ring.setup = setup;
        self.follow_log();
    }

    /// Begins to keep the order of completions when a log came, ends it when
    /// the log went. What was shown before the order began cannot be taken
    /// back; the used index is exact once the requests older than it are done.
    fn follow_log(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        if ring.setup.log.is_some() == ring.order.is_some() {
            return;
        }
        if ring.order.is_none() {
            let heads = at_storage(&self.pending);
            ring.order = Some(Order::new(ring.queue.size(), &heads));
            return;
        }
        let mut order = ring.order.take();
        while let Some((head, written)) = order.as_mut().and_then(Order::pop_any) {
            self.show(head, written);
        }
        self.publish();
    }

    /// Drops what is in flight. The number is where a front-end that moves on
    /// without the in-flight table has to begin: at the used index if that is
    /// an exact boundary, or else behind everything taken.
    fn abandon(&mut self) -> Option<u16> {
        self.io = None;
        self.mark_abandoned();
        // What was answered without the storage.
        self.publish();
        let again = self.ring.as_ref().map_or_else(Vec::new, |ring| match &ring.order {
            Some(order) => order.outstanding().collect(),
            None => at_storage(&self.pending),
        });
        self.in_flight = 0;
        self.disk.status.set_in_flight(self.index, 0);
        self.pending.iter_mut().for_each(|pending| *pending = Pending::default());
        let used = self.ring.as_ref().map(|ring| ring.queue.next_used());
        let exact = self.ring.as_ref().is_some_and(|ring| ring.queue.ends_with(&again));
        let next_avail = self.stop_ring();
        if exact { used } else { next_avail }
    }

    /// Ends the ring; the number is the next available entry.
    fn stop_ring(&mut self) -> Option<u16> {
        // Requests answered since the last look at the ring.
        self.publish();
        let ring = self.ring.take()?;
        // Gone already if the front-end closed the last copy of the event.
        let _ = self.epoll.delete(ring.kick.as_fd());
        Some(ring.queue.next_avail())
    }

    pub(super) fn finish_drain(&mut self) {
        if self.in_flight > 0 {
            return;
        }
        if let Some(ring) = &mut self.ring
            && let Some(answer) = ring.draining.take()
        {
            // Whoever hears that it is drained may ask how many are in flight.
            self.disk.status.set_in_flight(self.index, 0);
            let _ = answer.send(self.stop_ring());
        }
    }

    /// Asks for a kick at the next request. True: there are more, which no kick will
    /// tell of: one ring full at most was taken. They have to wait for a look at
    /// answers and commands, or a guest that refills the ring as fast as it is emptied
    /// could keep those waiting for ever.
    pub(super) fn ask_for_kicks(&mut self) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        if ring.broken || ring.draining.is_some() {
            return false;
        }
        let more = ring.queue.enable_kicks();
        if let (Some(log), Some(used)) = (&ring.setup.log, ring.setup.log_used_at) {
            let (offset, len) = ring.queue.kick_wish_range();
            log.mark(used.wrapping_add(offset), len);
        }
        more
    }

    /// Sends what was submitted; a driver that answers at once may make a
    /// flush follow, which is to be sent too.
    pub(super) fn send(&mut self) {
        while std::mem::take(&mut self.unsent) {
            if let Some(io) = &mut self.io {
                io.send(&mut self.completions);
            }
            self.complete_all();
        }
        // Requests that were answered without the storage.
        self.publish();
        self.disk.status.set_in_flight(self.index, self.in_flight);
    }
}

/// Heads of the requests that the storage has, oldest first.
fn at_storage(pending: &[Pending]) -> Vec<u16> {
    let mut heads: Vec<u16> =
        (0..).zip(pending).filter(|(_, p)| p.is_at_storage()).map(|(head, _)| head).collect();
    heads.sort_unstable_by_key(|head| pending[usize::from(*head)].taken);
    heads
}

/// Adds to an eventfd. It may be non-blocking and full, which is as good as
/// signalled, or gone, which is the front-end's matter.
pub(super) fn signal(event: &OwnedFd) {
    let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
}
