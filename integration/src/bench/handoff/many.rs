//! Very many handoffs at once on one server.

use crate::handoff::{Attempt, Fleet};
use crate::raw_wire::{Answer, Ask, Control, Mode};
use anyhow::Result;
use std::path::Path;
use std::thread;
use std::time::Instant;

/// Handoffs of so many volumes at once; times in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Many {
    /// ARM of all.
    pub arm_s: f64,
    /// First SEAL sent to the last ACTIVATE answered.
    pub blackout_s: f64,
    /// SETTLE of all.
    pub settle_s: f64,
}

/// One server moves `count` volumes of as many VMs at the same time.
pub fn many(dir: &Path, count: usize) -> Result<Many> {
    let fleet = Fleet::start(dir, 1, count, 1 << 20)?;
    let server = fleet.servers[0].data_address();
    let connect = |owner: &str, session, mode| {
        let control =
            |m: &crate::handoff::Member| Control::connect(server, &m.volume, owner, session, mode);
        fleet.members.iter().map(control).collect::<Result<Vec<_>>>()
    };
    let mut sources = connect("host-a/vm", 1, Mode::Owner)?;
    let mut destinations = connect("host-b/vm", 2, Mode::Standby)?;
    let attempts: Vec<Attempt> = fleet.members.iter().map(|_| Fleet::attempt()).collect();
    let pairs: Vec<(usize, &Attempt)> = attempts.iter().enumerate().collect();
    let arm_s = at_once(&pairs, |(member, attempt)| {
        fleet.arm_alone(*member, attempt, "host-a/vm", "host-b/vm")
    })?;
    let ids = attempts.iter().map(Attempt::number).collect::<Result<Vec<_>>>()?;
    for destination in &mut destinations {
        let now = destination.access()?;
        destination.watch(&now)?;
    }
    let start = Instant::now();
    for (source, id) in sources.iter_mut().zip(&ids) {
        source.send_ask(*id, Ask::Seal)?;
    }
    for (destination, id) in destinations.iter_mut().zip(&ids) {
        until_sealed(destination)?;
        destination.send_ask(*id, Ask::Activate)?;
    }
    for destination in &mut destinations {
        destination.granted()?;
    }
    let blackout_s = start.elapsed().as_secs_f64();
    for source in &mut sources {
        source.granted()?;
    }
    let settle_s = at_once(&pairs, |(member, attempt)| {
        let body = serde_json::json!({"id": attempt.id, "attempt": attempt.attempt});
        fleet.post(*member, "settle", &body).map(drop)
    })?;
    Ok(Many { arm_s, blackout_s, settle_s })
}

fn until_sealed(destination: &mut Control) -> Result<Answer> {
    const SEALED: u8 = 3;
    let mut news = destination.answer()?;
    while news.phase != SEALED {
        destination.watch(&news)?;
        news = destination.answer()?;
    }
    Ok(news)
}

/// Runs all by 64 callers; how long it took, in seconds.
fn at_once<T: Sync>(all: &[T], act: impl Fn(&T) -> Result<()> + Sync) -> Result<f64> {
    let start = Instant::now();
    let results = thread::scope(|scope| {
        let act = &act;
        let callers: Vec<_> = all
            .chunks(all.len().div_ceil(64))
            .map(|part| scope.spawn(move || part.iter().try_for_each(act)))
            .collect();
        callers.into_iter().map(|c| c.join().expect("no panic in a caller")).collect::<Vec<_>>()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(start.elapsed().as_secs_f64())
}
