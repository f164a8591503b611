//! A VM that moves to and fro, and what its guest sees of it.

use super::meter::Meter;
use super::{Figures, PATIENCE, us};
use crate::baton::Storage;
use crate::bench::cpu::cpus;
use crate::bench::standstill::Standstills;
use crate::blk::Request;
use crate::handoff::{Attempt, Begin, Fleet, Host};
use crate::memory::BASE;
use crate::raw_frontend::{Options, RawFrontend};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Requests under way on each disk when it is stopped.
const UNDER_WAY: u64 = 4;

/// What runs of one kind showed; all times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// Runs that others disturbed and that were made again.
    pub disturbed: usize,
    /// Gap of a stop and start on one backend.
    pub paused: Figures,
    /// Gap of a move that nothing guards.
    pub unguarded: Figures,
    /// Gap of a move.
    pub moved: Figures,
    /// What the guard adds: move less unguarded move, run by run.
    pub added: Figures,
    /// The same of runs in which no CPU stood still. Empty where nobody may watch that.
    pub added_awake: Figures,
    /// Move less pause, run by run: with what a process costs that serves nobody yet.
    pub over_pause: Figures,
    /// First SEAL to the last member's SEALED, as the source saw it.
    pub seal: Figures,
    /// Ring stop to the last request's end, as the source saw it.
    pub drain: Figures,
    /// ACTIVATE to its answer, as the destination saw it.
    pub activate: Figures,
    /// CPU time of the backends and servers in an unguarded move.
    pub unguarded_cpu: Figures,
    /// The same in a move.
    pub moved_cpu: Figures,
}

fn options() -> Options {
    Options { memory_bytes: 2 << 20, start: false, inflight: false, ..Options::default() }
}

/// A VM that moves to and fro.
pub(super) struct Vm<'a> {
    fleet: &'a Fleet,
    dir: &'a Path,
    host: Host,
    pub(super) disks: Vec<RawFrontend>,
    moves: usize,
}

impl<'a> Vm<'a> {
    pub(super) fn start(fleet: &'a Fleet, dir: &'a Path) -> Result<Self> {
        let host = Host::start(dir, "host-0", "host-0/vm", fleet, Begin::Claim)?;
        let mut disks = connect(&host)?;
        for disk in &mut disks {
            start_ring(disk)?;
            disk.queue(0).write(0, &[1; 4096])?;
        }
        Ok(Self { fleet, dir, host, disks, moves: 0 })
    }

    /// Stops the rings as a VMM does, with requests under way.
    fn stop(&mut self) -> Result<Instant> {
        for disk in &mut self.disks {
            for n in 0..UNDER_WAY {
                disk.queue(0).submit(&Request::Write { sector: 64 + 8 * n, data: &[2; 4096] })?;
            }
            disk.queue(0).kick()?;
            // The backend has fetched them; the others are under way.
            let done = disk.queue(0).wait_completion(PATIENCE)?;
            done.context("no answer to a write")?.ok()?;
        }
        let start = Instant::now();
        for disk in &self.disks {
            disk.enable(0, false)?;
        }
        for disk in &self.disks {
            disk.get_vring_base(0)?;
        }
        Ok(start)
    }

    /// Takes what was completed before the rings were stopped.
    fn reap(disks: &mut [RawFrontend]) -> Result<()> {
        for disk in disks {
            while let Some(done) = disk.queue(0).wait_completion(Duration::ZERO)? {
                done.ok()?;
            }
        }
        Ok(())
    }

    /// The gap of a stop and a start with no handoff.
    fn pause(&mut self) -> Result<Duration> {
        let start = self.stop()?;
        Self::reap(&mut self.disks)?;
        run(&mut self.disks, start)
    }

    /// The gap of the same move with the fence off: the rings stop here and start on a backend that serves nobody yet,
    /// and what passes the volumes on takes place in between, unmeasured.
    fn move_unguarded(&mut self, meter: &mut Meter<'_>) -> Result<Duration> {
        let pids = self.pids(&self.host);
        let stopped = meter.during(&pids, || {
            let start = self.stop()?;
            Self::reap(&mut self.disks)?;
            anyhow::Ok(start.elapsed())
        })??;
        let (label, owner) = self.next_host();
        for member in 0..self.fleet.members.len() {
            self.fleet.fence(member, &owner)?;
        }
        self.host = Host::start(self.dir, &label, &owner, self.fleet, Begin::Claim)?;
        self.host.wait_standing("serving")?;
        self.disks = connect(&self.host)?;
        // As a standby's do long before its rings start.
        crate::baton::wait_until("all connections stand", PATIENCE, || self.is_connected())?;
        let pids = self.pids(&self.host);
        let started = meter.during(&pids, || run(&mut self.disks, Instant::now()))??;
        Ok(stopped + started)
    }

    /// Each volume has its control connection and its queue's, and nobody else is there.
    fn is_connected(&self) -> bool {
        let stands = |(n, server): (usize, &Storage)| {
            let volumes = self.fleet.members.iter().filter(|member| member.server == n).count();
            server.metric("baton_connections").is_ok_and(|now| now == 2.0 * volumes as f64)
        };
        self.fleet.servers.iter().enumerate().all(stands)
    }

    /// The processes of the servers and of a host.
    fn pids(&self, host: &Host) -> Vec<u32> {
        let servers = self.fleet.servers.iter().map(|server| server.daemon.pid());
        servers.chain([host.daemon.pid()]).collect()
    }

    fn next_host(&mut self) -> (String, String) {
        self.moves += 1;
        let label = format!("host-{}", self.moves);
        let owner = format!("{label}/vm");
        (label, owner)
    }

    fn start_logging(&mut self) -> Result<()> {
        self.disks.iter_mut().try_for_each(RawFrontend::start_logging)
    }

    /// Up to the moment before the VM stops.
    pub(super) fn prepare(&mut self) -> Result<(Attempt, Host, Vec<RawFrontend>)> {
        let (label, owner) = self.next_host();
        let there = Host::start(self.dir, &label, &owner, self.fleet, Begin::Standby)?;
        let attempt = self.fleet.arm(&self.host.owner, &owner)?;
        there.wait_standing("ready")?;
        // A backend that was just granted its volumes hears other news of them a little later, and between two moves
        // of a real VM lies more.
        let known = || self.host.status().is_ok_and(|s| s["handoff"]["id"] == attempt.id.as_str());
        crate::baton::wait_until("the source knows of the handoff", PATIENCE, known)?;
        let disks = connect(&there)?;
        Ok((attempt, there, disks))
    }

    /// The gap of the move.
    pub(super) fn go(&mut self, disks: &mut [RawFrontend]) -> Result<Duration> {
        let start = self.stop()?;
        Self::reap(&mut self.disks)?;
        run(disks, start)
    }

    pub(super) fn arrived(
        &mut self,
        attempt: &Attempt,
        there: Host,
        disks: Vec<RawFrontend>,
    ) -> Result<(Value, Value)> {
        // It may hear of its seal later than the destination.
        let has_seal =
            || self.host.status().is_ok_and(|s| s["handoff"]["timings"]["seal_us"].is_u64());
        let _ = crate::baton::wait_until("SEAL is answered", Duration::from_secs(1), has_seal);
        let status = (self.host.status()?, there.status()?);
        let winner = self.fleet.settle(attempt)?;
        if winner != "destination" {
            bail!("the {winner} won a move that nobody disturbed");
        }
        self.host = there;
        self.disks = disks;
        Ok(status)
    }
}

/// Up to rings that can be started: negotiated, with the guest's memory.
pub(super) fn connect(host: &Host) -> Result<Vec<RawFrontend>> {
    let ready = |socket: &PathBuf| {
        let mut disk = RawFrontend::connect(socket, options())?;
        disk.set_features(disk.features())?;
        disk.send_memory()?;
        // A VMM that takes a machine in has written its memory by the time it starts the rings.
        let map = disk.memory().map();
        disk.memory().write(BASE, &vec![0; map.len()]);
        Ok(disk)
    };
    host.sockets().iter().map(ready).collect()
}

pub(super) fn start_ring(disk: &mut RawFrontend) -> Result<()> {
    let base = disk.queue(0).ring.used_index();
    disk.set_up_queue(0, base)?;
    disk.enable(0, true)?;
    disk.queue(0).kick_anyway()
}

/// Starts all disks and waits for a read on each.
fn run(disks: &mut [RawFrontend], start: Instant) -> Result<Duration> {
    for disk in disks.iter_mut() {
        disk.queue(0).submit(&Request::Read { sector: 0, len: 4096 })?;
        start_ring(disk)?;
    }
    for disk in disks.iter_mut() {
        // Writes that were not fetched before the stop come first.
        let mut data = Vec::new();
        while data.is_empty() {
            data = disk.queue(0).wait_completion(PATIENCE)?.context("no answer")?.ok()?;
        }
        if data != [1; 4096] {
            bail!("the disk has other data than was written");
        }
    }
    Ok(start.elapsed())
}

/// Moves the VM of these volumes to and fro. A run beside which other programs had the processors for long is made again,
/// but not for ever.
pub fn moves(fleet: &Fleet, dir: &Path, runs: usize) -> Result<Moves> {
    let mut vm = Vm::start(fleet, dir)?;
    let mut out = Moves::default();
    let watch = Standstills::watch(cpus()).ok();
    let mut left = runs;
    while left > 0 {
        let mut meter = Meter::new(watch.as_ref());
        // Whoever moves away has stopped its rings once before, here and below: what is done for the first time is dear.
        vm.start_logging()?;
        vm.pause()?;
        let unguarded = vm.move_unguarded(&mut meter)?;
        let unguarded_cpu = meter.take_used_us();
        vm.start_logging()?;
        let pids = vm.pids(&vm.host);
        let paused = meter.during(&pids, || vm.pause())??;
        meter.take_used_us();
        let (attempt, there, mut disks) = vm.prepare()?;
        let pids = [pids, vec![there.daemon.pid()]].concat();
        let moved = meter.during(&pids, || vm.go(&mut disks))??;
        let moved_cpu = meter.take_used_us();
        let (source, destination) = vm.arrived(&attempt, there, disks)?;
        if meter.is_disturbed() && out.disturbed < runs {
            out.disturbed += 1;
            continue;
        }
        left -= 1;
        out.paused.push(us(paused));
        out.unguarded.push(us(unguarded));
        out.moved.push(us(moved));
        out.added.push(us(moved) - us(unguarded));
        out.over_pause.push(us(moved) - us(paused));
        if meter.ran_all_the_time() {
            out.added_awake.push(us(moved) - us(unguarded));
        }
        out.unguarded_cpu.push(unguarded_cpu);
        out.moved_cpu.push(moved_cpu);
        // A source that hears that it has lost before its SEAL is answered has no figure for it: fewer runs in the table.
        for (figures, status, name) in [
            (&mut out.seal, &source, "seal_us"),
            (&mut out.drain, &source, "drain_us"),
            (&mut out.activate, &destination, "activate_us"),
        ] {
            if let Some(figure) = status["handoff"]["timings"][name].as_f64() {
                figures.push(figure);
            }
        }
    }
    Ok(out)
}
