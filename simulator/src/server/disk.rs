//! The sectors of one volume: as its server reads them, and as they would be
//! after a power loss.

use crate::history::{Kind, Value};

#[derive(Debug)]
struct Sector {
    now: Value,
    /// What it may hold after a power loss: as of the last flush, and every
    /// write since.
    survivors: Vec<Value>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Disk(Vec<Sector>);

impl Disk {
    pub(super) fn new(sectors: usize) -> Self {
        Self((0..sectors).map(|_| Sector { now: 0, survivors: vec![0] }).collect())
    }

    /// Carries out a request; what a read finds.
    pub(super) fn run(&mut self, kind: Kind, forgets_flushes: bool) -> Value {
        match kind {
            Kind::Read { sector, .. } => return self.0[sector].now,
            Kind::Write { sector, value } => {
                let sector = &mut self.0[sector];
                sector.now = value;
                sector.survivors.push(value);
            }
            Kind::Flush if forgets_flushes => {}
            Kind::Flush => {
                for sector in &mut self.0 {
                    sector.survivors = vec![sector.now];
                }
            }
        }
        0
    }

    pub(super) fn lose_power(&mut self, rng: &mut fastrand::Rng) {
        for sector in &mut self.0 {
            sector.now = sector.survivors[rng.usize(..sector.survivors.len())];
            sector.survivors = vec![sector.now];
        }
    }
}
