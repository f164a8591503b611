//! A VM on one host: the VMM, its guest's memory, and the rings that the guest
//! shares with the backend. Both hosts have one; a migration copies the memory
//! from one to the other, and nothing here keeps both from running.

use std::collections::{BTreeMap, VecDeque};

use crate::agenda::Time;
use crate::history::{Instant, Kind, OperationId};
use crate::stage::{Stage, note};

/// Requests in one ring, taken or not.
const RING_REQUESTS: usize = 4;

/// One request of the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) id: OperationId,
    pub(crate) kind: Kind,
}

/// One queue, in guest memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ring {
    pub(crate) available: VecDeque<Request>,
    /// Taken and not completed, in the order in which they were taken. The
    /// backend's inflight area, which outlives it.
    pub(crate) taken: BTreeMap<u64, Request>,
    next: u64,
}

impl Ring {
    /// The backend takes a request.
    pub(crate) fn take(&mut self) -> Option<(u64, Request)> {
        let request = self.available.pop_front()?;
        let place = self.next;
        self.next += 1;
        self.taken.insert(place, request);
        Some((place, request))
    }
}

/// The guest's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    /// Answers behind it, see [`crate::watch::Watch::guest_goes_on`].
    base: u64,
    /// Per volume, per queue.
    pub(crate) rings: Vec<Vec<Ring>>,
    /// Requests that the VMM took for completed when it could not ask.
    assumed: Vec<OperationId>,
    /// When the guest could first act on that.
    assumed_at: Option<Instant>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Vm {
    pub(crate) host: usize,
    pub(crate) running: bool,
    pub(crate) image: Option<Image>,
    /// Which volumes' rings the VMM has stopped and the backend has drained.
    pub(crate) drained: Vec<bool>,
    /// A migration runs: the dirty log is on.
    pub(crate) migrating: bool,
    /// Per volume, how many answers the guest has got while it ran.
    pub(crate) answered: Vec<u64>,
    /// The host hangs, and its guests with it.
    pub(crate) frozen_until: Time,
    /// Since when all volumes are fenced and somebody else's.
    pub(crate) over_since: Option<Instant>,
}

impl Image {
    pub(crate) fn new(volumes: usize, queues: usize) -> Self {
        Self { rings: vec![vec![Ring::default(); queues]; volumes], ..Self::default() }
    }

    /// The machine starts from its disks: nothing of an earlier memory is left.
    pub(crate) fn booted(volumes: usize, queues: usize, answers: u64) -> Self {
        Self { base: answers, ..Self::new(volumes, queues) }
    }

    /// No request of this volume is taken and not completed.
    pub(crate) fn is_drained(&self, volume: usize) -> bool {
        self.rings[volume].iter().all(|ring| ring.taken.is_empty())
    }

    /// Whether a request is still to be taken, or taken.
    pub(crate) fn has(&self, id: OperationId) -> bool {
        self.rings.iter().flatten().any(|ring| {
            ring.available.iter().chain(ring.taken.values()).any(|request| request.id == id)
        })
    }

    fn is_written(&self, volume: usize, at: usize) -> bool {
        self.rings[volume].iter().any(|ring| {
            ring.available
                .iter()
                .chain(ring.taken.values())
                .any(|request| matches!(request.kind, Kind::Write { sector, .. } if sector == at))
        })
    }

    /// As the other host gets it from a VMM whose backend did not answer.
    pub(crate) fn guessed(mut self, done: bool) -> Self {
        for ring in self.rings.iter_mut().flatten() {
            let taken = std::mem::take(&mut ring.taken);
            if done {
                // A read that never came back leaves the guest waiting for ever,
                // which no storage can help; a write is believed.
                let (reads, rest): (Vec<_>, Vec<_>) = taken
                    .into_values()
                    .partition(|request| matches!(request.kind, Kind::Read { .. }));
                self.assumed.extend(rest.iter().map(|request| request.id));
                reads.into_iter().rev().for_each(|request| ring.available.push_front(request));
            } else {
                let again = taken.into_values().rev();
                again.for_each(|request| ring.available.push_front(request));
            }
        }
        self
    }
}

impl Vm {
    pub(crate) fn new(host: usize, volumes: usize) -> Self {
        let (drained, answered) = (vec![false; volumes], vec![0; volumes]);
        Self { host, drained, answered, ..Self::default() }
    }

    /// The vCPUs run.
    pub(crate) fn run(&mut self, stage: &mut Stage) {
        self.running = true;
        self.migrating = false;
        self.drained.iter_mut().for_each(|drained| *drained = false);
        if let Some(image) = &mut self.image
            && !image.assumed.is_empty()
        {
            image.assumed_at.get_or_insert_with(|| stage.history.tick());
        }
    }

    /// The vCPUs stop, under a migration; the rings are to drain.
    pub(crate) fn stop(&mut self) {
        self.running = false;
        self.migrating = true;
        self.drained.iter_mut().for_each(|drained| *drained = false);
    }

    /// The guest asks for something, if there is room for it.
    pub(crate) fn ask(&mut self, stage: &mut Stage) {
        let Some(image) = self.image.as_mut().filter(|_| self.running) else { return };
        let volume = stage.rng.usize(..image.rings.len());
        let queue = stage.rng.usize(..image.rings[volume].len());
        let sector = stage.rng.usize(..stage.setting.sectors);
        let ring = &image.rings[volume][queue];
        if ring.available.len() + ring.taken.len() >= RING_REQUESTS {
            return;
        }
        let kind = match stage.rng.u8(..20) {
            0 => Kind::Flush,
            1..=9 => Kind::Read { sector, value: 0 },
            _ if !stage.setting.overlaps && image.is_written(volume, sector) => return,
            _ => Kind::Write { sector, value: stage.history.tick() },
        };
        let id = stage.history.invoke(volume, kind);
        note!(stage, "guest {} asks volume {volume}: #{id} {kind:?}", self.host);
        image.rings[volume][queue].available.push_back(Request { id, kind });
    }

    /// The backend puts an answer into the used ring.
    pub(crate) fn complete(
        &mut self,
        stage: &mut Stage,
        (volume, queue, place): (usize, usize, u64),
        read: u64,
    ) {
        let Some(image) = &mut self.image else { return };
        let Some(request) = image.rings[volume][queue].taken.remove(&place) else { return };
        if let Some(since) = self.over_since {
            // What was done before the fence may be answered after it; what was
            // asked after it never is.
            if stage.history.operations()[request.id].invoked > since {
                let what = format!("a fenced guest on host {} goes on", self.host);
                stage.watch.broken("I6", what);
            }
        } else if self.running {
            self.answered[volume] += 1;
            image.base = stage.watch.guest_goes_on(self.host, image.base);
            if let Some(at) = image.assumed_at.take() {
                for id in image.assumed.drain(..) {
                    stage.history.answer_at(id, 0, at);
                }
            }
        }
        note!(stage, "guest {} has the answer of #{}: {read}", self.host, request.id);
        stage.history.answer(request.id, read);
    }

    /// Requests of the guest that a backend has taken and not answered.
    pub(crate) fn taken(&self) -> impl Iterator<Item = Request> {
        let rings = self.image.iter().flat_map(|image| image.rings.iter().flatten());
        rings.flat_map(|ring| ring.taken.values().copied())
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.drained.iter().all(|drained| *drained)
    }
}
