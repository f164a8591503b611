//! What the guests asked of their volumes and what they were answered: what the
//! checker judges. Every written value is unique, so a value says which write
//! it came from; zero is what a volume holds in the beginning.

/// Position in the history. Each event has its own, so that two are never at
/// once.
pub type Instant = u64;

/// What a sector holds.
pub type Value = u64;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was asked.
    pub kind: Kind,
    /// Of which volume.
    pub volume: usize,
    /// When it was asked.
    pub invoked: Instant,
    /// When it was answered; `None`: never, so it may have taken effect at any
    /// time since, or not at all.
    pub answered: Option<Instant>,
}

/// What a request asks and, for a read, was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The sector is to hold this.
    Write {
        /// Which.
        sector: usize,
        /// Unique in the history, not zero.
        value: Value,
    },
    /// The sector held this; says nothing while it is not answered.
    Read {
        /// Which.
        sector: usize,
        /// What it held.
        value: Value,
    },
    /// What was answered before is to survive a power loss.
    Flush,
}

/// A power loss at the server of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerLoss {
    /// Which volume.
    pub volume: usize,
    /// When.
    pub at: Instant,
}

/// A history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    operations: Vec<Operation>,
    losses: Vec<PowerLoss>,
    clock: Instant,
}

/// Names an operation of a history.
pub type OperationId = usize;

impl History {
    /// A point in time of its own.
    pub fn tick(&mut self) -> Instant {
        self.clock += 1;
        self.clock
    }

    /// A request is made.
    pub fn invoke(&mut self, volume: usize, kind: Kind) -> OperationId {
        let invoked = self.tick();
        self.operations.push(Operation { kind, volume, invoked, answered: None });
        self.operations.len() - 1
    }

    /// It is answered; `read` is what was read. Of two answers the first counts.
    pub fn answer(&mut self, id: OperationId, read: Value) {
        let at = self.tick();
        self.answer_at(id, read, at);
    }

    /// It turns out to have been answered at a point in time that is over.
    pub fn answer_at(&mut self, id: OperationId, read: Value, at: Instant) {
        let Some(operation) = self.operations.get_mut(id) else { return };
        if operation.answered.is_none() {
            operation.answered = Some(at);
            if let Kind::Read { value, .. } = &mut operation.kind {
                *value = read;
            }
        }
    }

    /// The server of a volume loses its power.
    pub fn lose_power(&mut self, volume: usize) {
        let at = self.tick();
        self.losses.push(PowerLoss { volume, at });
    }

    /// The requests, as they were made.
    #[must_use]
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// The power losses, as they happened.
    #[must_use]
    pub fn losses(&self) -> &[PowerLoss] {
        &self.losses
    }
}
