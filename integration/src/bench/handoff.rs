//! What a handoff costs: the gap that a guest sees, and the messages inside it.
//!
//! ```text
//!   one run:  stop and start on one backend  (the base)
//!             stop here, start there         (the move)    gap = first stop to first completion on every disk
//! ```
//!
//! Both of a run send the same vhost-user messages with the same requests under way; the difference is what the handoff
//! adds. The front-end that takes over is connected before, as an incoming VMM's is.

use crate::baton::Storage;
use crate::bench::cpu::{Snapshot, cpus};
use crate::bench::standstill::Standstills;
use crate::blk::Request;
use crate::daemon::Daemon;
use crate::distance::Distance;
use crate::handoff::{Attempt, Begin, Fleet, Host};
use crate::memory::BASE;
use crate::raw_frontend::{Options, RawFrontend};
use crate::raw_wire::{Answer, Ask, Control, Mode};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const DISK_BYTES: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests under way on each disk when it is stopped.
const UNDER_WAY: u64 = 4;

/// Figures of one kind, one a run.
#[derive(Clone, Debug, Default)]
pub struct Figures(Vec<f64>);

impl Figures {
    /// Another run's.
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The smallest figure that this part of all does not exceed.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank among few runs"
    )]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }
}

/// What runs of one kind showed; all times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// Gap of a stop and start on one backend.
    pub base: Figures,
    /// Gap of a move.
    pub moved: Figures,
    /// Their difference, run by run.
    pub added: Figures,
    /// The same of runs in which no CPU stood still. Empty where nobody may watch that.
    pub added_awake: Figures,
    /// First SEAL to the last member's SEALED, as the source saw it.
    pub seal: Figures,
    /// Ring stop to the last request's end, as the source saw it.
    pub drain: Figures,
    /// ACTIVATE to its answer, as the destination saw it.
    pub activate: Figures,
    /// CPU time of the backends and servers in a pause, and in a move.
    pub base_cpu: Figures,
    /// See there.
    pub moved_cpu: Figures,
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn options() -> Options {
    Options { memory_bytes: 2 << 20, start: false, inflight: false, ..Options::default() }
}

/// A VM that moves to and fro.
struct Vm<'a> {
    fleet: &'a Fleet,
    dir: &'a Path,
    host: Host,
    disks: Vec<RawFrontend>,
    moves: usize,
}

impl<'a> Vm<'a> {
    fn start(fleet: &'a Fleet, dir: &'a Path) -> Result<Self> {
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

    /// Up to the moment before the VM stops.
    fn prepare(&mut self) -> Result<(Attempt, Host, Vec<RawFrontend>)> {
        self.moves += 1;
        let label = format!("host-{}", self.moves);
        let owner = format!("{label}/vm");
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
    fn go(&mut self, disks: &mut [RawFrontend]) -> Result<Duration> {
        let start = self.stop()?;
        Self::reap(&mut self.disks)?;
        run(disks, start)
    }

    fn arrived(
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
fn connect(host: &Host) -> Result<Vec<RawFrontend>> {
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

fn start_ring(disk: &mut RawFrontend) -> Result<()> {
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

/// Whether a CPU stood still in any of the times that it was asked about.
struct Stillness<'a> {
    watch: Option<&'a Standstills>,
    seen: bool,
}

impl<'a> Stillness<'a> {
    fn of(watch: Option<&'a Standstills>) -> Self {
        Self { watch, seen: false }
    }

    fn during<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let from = Instant::now();
        let done = work();
        self.seen |= self.watch.is_some_and(|watch| watch.any_in(from, Instant::now()));
        done
    }

    fn ran_all_the_time(&self) -> bool {
        self.watch.is_some() && !self.seen
    }
}

/// Storage servers with the volumes of a VM.
pub fn fleet(dir: &Path, servers: usize, volumes: usize) -> Result<Fleet> {
    Fleet::start(dir, servers, volumes, DISK_BYTES)
}

/// The same for clients to whom a message takes so long.
pub fn distant_fleet(
    dir: &Path,
    servers: usize,
    volumes: usize,
    one_way: Duration,
) -> Result<Fleet> {
    let mut fleet = fleet(dir, servers, volumes)?;
    let way = |server: &Storage| Distance::start(server.data_address(), one_way);
    let ways = fleet.servers.iter().map(way).collect::<Result<Vec<_>>>()?;
    fleet.through = ways.iter().map(Distance::address).collect();
    Ok(fleet)
}

/// Moves the VM of these volumes to and fro.
pub fn moves(fleet: &Fleet, dir: &Path, runs: usize) -> Result<Moves> {
    let mut vm = Vm::start(fleet, dir)?;
    let mut out = Moves::default();
    let watch = Standstills::watch(cpus()).ok();
    for _ in 0..runs {
        for disk in &mut vm.disks {
            disk.start_logging()?;
        }
        let mut pids: Vec<u32> = fleet.servers.iter().map(|s| s.daemon.pid()).collect();
        pids.push(vm.host.daemon.pid());
        let before = Snapshot::take(&pids)?;
        let mut is_still = Stillness::of(watch.as_ref());
        let base = is_still.during(|| vm.pause())?;
        let base_cpu = Snapshot::take(&pids)?.since(&before);
        let (attempt, there, mut disks) = vm.prepare()?;
        pids.push(there.daemon.pid());
        let before = Snapshot::take(&pids)?;
        let moved = is_still.during(|| vm.go(&mut disks))?;
        let moved_cpu = Snapshot::take(&pids)?.since(&before);
        let (source, destination) = vm.arrived(&attempt, there, disks)?;
        out.base.push(us(base));
        out.moved.push(us(moved));
        out.added.push(us(moved) - us(base));
        if is_still.ran_all_the_time() {
            out.added_awake.push(us(moved) - us(base));
        }
        out.base_cpu.push(base_cpu.processes_s.iter().sum::<f64>() * 1e6);
        out.moved_cpu.push(moved_cpu.processes_s.iter().sum::<f64>() * 1e6);
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

/// Calls to the disk by the storage server around one move: while nobody may write, from the decision to the guest's
/// first answer, and later.
#[derive(Clone, Copy, Debug, Default)]
pub struct Syncs {
    /// From the stop to the answer of ACTIVATE.
    pub before_decision: usize,
    /// From there to the first answer.
    pub before_first_io: usize,
    /// After that: the decision is stored behind its answer.
    pub later: usize,
    /// The longest time from the answer of ACTIVATE to the guest's first, in s.
    pub slowest_s: f64,
}

/// Watches a storage server with strace through some moves. `None` without strace.
pub fn syncs(dir: &Path, runs: usize) -> Result<Option<Syncs>> {
    let fleet = Fleet::start(dir, 1, 1, DISK_BYTES)?;
    let mut vm = Vm::start(&fleet, dir)?;
    let mut out = Syncs::default();
    for _ in 0..runs {
        for disk in &mut vm.disks {
            disk.start_logging()?;
        }
        let (attempt, there, mut disks) = vm.prepare()?;
        let trace = dir.join("strace");
        let Some(tracer) = Tracer::attach(&fleet.servers[0].daemon, &trace)? else {
            return Ok(None);
        };
        let stop = unix_s()?;
        vm.go(&mut disks)?;
        let first_io = unix_s()?;
        let stored = || fs::read_to_string(&trace).is_ok_and(|text| text.contains("sync("));
        crate::baton::wait_until("the decision is stored", PATIENCE, stored)?;
        drop(tracer);
        let (_, destination) = vm.arrived(&attempt, there, disks)?;
        let activated = event_s(&destination, "activated")?;
        out.slowest_s = out.slowest_s.max(first_io - activated);
        for at in fs::read_to_string(&trace)?.lines().filter_map(sync_at) {
            if at > stop && at < activated {
                out.before_decision += 1;
            } else if at >= activated && at < first_io {
                out.before_first_io += 1;
            } else {
                out.later += 1;
            }
        }
    }
    Ok(Some(out))
}

/// "PID 1700000000.123456 fdatasync(4) = 0": when. A call that another thread interrupts has a second line, which
/// does not begin one.
fn sync_at(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once(' ')?;
    let (at, call) = rest.trim_start().split_once(' ')?;
    let (name, _) = call.split_once('(')?;
    let syncs = ["fsync", "fdatasync", "sync_file_range", "msync"].contains(&name);
    syncs.then(|| at.parse().ok())?
}

fn unix_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

fn event_s(status: &Value, name: &str) -> Result<f64> {
    let events = status["handoff"]["events"].as_array().context("no events")?;
    let event = events.iter().rev().find(|event| event["event"] == name);
    let at = event.and_then(|event| event["at_unix_us"].as_f64());
    Ok(at.with_context(|| format!("no event {name}"))? / 1e6)
}

struct Tracer(Child);

impl Tracer {
    fn attach(daemon: &Daemon, to: &Path) -> Result<Option<Self>> {
        let pid = daemon.pid();
        let child = Command::new("strace")
            .args(["-f", "-ttt", "-e", "trace=fsync,fdatasync,sync_file_range,msync", "-p"])
            .arg(pid.to_string())
            .arg("-o")
            .arg(to)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else { return Ok(None) };
        let tracer = Self(child);
        let all = || all_traced(pid).unwrap_or(false);
        crate::baton::wait_until("strace has every thread of the server", PATIENCE, all)?;
        Ok(Some(tracer))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

fn all_traced(pid: u32) -> Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        if status.lines().any(|line| line == "TracerPid:\t0") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Nothing comes for so long before a message of which it is said.
const SILENCE: Duration = Duration::from_millis(20);

/// What single messages cost on one server; times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    /// PING and its answer.
    pub rtt: Figures,
    /// The same after [`SILENCE`], as the messages of a handoff come.
    pub rtt_idle: Figures,
    /// An overwrite of 4 KiB and fdatasync, where the server's data is.
    pub sync: Figures,
    /// FENCE of an owner, over HTTP with a connection of its own.
    pub fence: Figures,
    /// Of that, the wait for the record to be durable, as the server counted it.
    pub fence_store: Figures,
    /// Of that, the wait for requests inside the gate.
    pub fence_drain: Figures,
    /// RECLAIM after a seal.
    pub reclaim: Figures,
}

/// Measures them on the server of one volume.
pub fn messages(fleet: &Fleet, dir: &Path, runs: usize) -> Result<Messages> {
    let (server, volume) = (&fleet.servers[0], fleet.members[0].volume.as_str());
    let mut out = Messages::default();
    let file = fs::File::create(dir.join("sync"))?;
    file.write_all_at(&[1; 4096], 0)?;
    file.sync_all()?;
    let address = fleet.through.first().copied().unwrap_or(server.data_address());
    let connect = |session, mode| Control::connect(address, volume, "host-a/vm", session, mode);
    let mut standby = connect(u64::MAX, Mode::Standby)?;
    for run in 0..runs {
        out.rtt.push(timed(|| standby.ping())?);
        thread::sleep(SILENCE);
        out.rtt_idle.push(timed(|| standby.ping())?);
        out.sync.push(timed(|| Ok(file.write_all_at(&[2; 4096], 0).and(file.sync_data())?))?);
        let mut source = connect(run as u64 + 1, Mode::Owner)?;
        let attempt = fleet.arm("host-a/vm", "host-b/vm")?;
        let id = id(&attempt.id)?;
        source.ask(id, Ask::Seal)?;
        out.reclaim.push(timed(|| source.ask(id, Ask::Reclaim).map(drop))?);
        fleet.settle(&attempt)?;
        let waited = |why| server.metric_of("baton_access_wait_seconds_total", "for", why);
        let (store, drain) = (waited("store")?, waited("drain")?);
        out.fence.push(timed(|| server.fence(volume, Some("host-a/vm")).map(drop))?);
        out.fence_store.push((waited("store")? - store) * 1e6);
        out.fence_drain.push((waited("drain")? - drain) * 1e6);
    }
    Ok(out)
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(us(start.elapsed()))
}

/// A ULID's number.
fn id(text: &str) -> Result<u128> {
    const DIGITS: &str = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    text.chars().try_fold(0, |id, c| {
        let digit = DIGITS.find(c).context("a digit of base 32")?;
        Ok(id << 5 | digit as u128)
    })
}

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
    let ids = attempts.iter().map(|a| id(&a.id)).collect::<Result<Vec<_>>>()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_figures_that_were_measured() {
        let figures = Figures((1..=100).rev().map(f64::from).collect());
        assert_eq!([0.5, 0.99, 1.0].map(|part| figures.quantile(part)), [50.0, 99.0, 100.0]);
        assert!(Figures::default().quantile(0.5).is_nan());
    }

    #[test]
    fn begun_calls_of_a_trace_count_once() {
        assert_eq!(sync_at("12 1700000000.500000 fdatasync(9) = 0"), Some(1_700_000_000.5));
        assert_eq!(sync_at("12 1.5 fdatasync(9 <unfinished ...>"), Some(1.5));
        assert_eq!(sync_at("12 1.5 <... fdatasync resumed>) = 0"), None);
        assert_eq!(sync_at("12 1.5 +++ exited with 0 +++"), None);
    }
}
