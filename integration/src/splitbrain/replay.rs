//! The two accidents, and the count of what each guest did afterwards.

use super::{Outcome, QUEUES, Replay, Side, Stack, Story, Verification};
use crate::baton::wait_until;
use crate::migration::{Migration, Pace, STEP_TIMEOUT, destination, run_state};
use crate::qemu::{Guest, GuestConfig};
use crate::qmp::Qmp;
use anyhow::{Context, Result};
use std::path::Path;
use std::time::{Duration, Instant};

/// Two workers on a few blocks, so that two guests soon write the same ones.
const LOAD: &str = "load threads=2 depth=1 blocks=64 slots=16 flush-every=50";

/// Requests of [`LOAD`] that can be under way at once.
const IN_FLIGHT: u64 = 2;

/// Requests before the migration begins.
const OPS_BEFORE: u64 = 300;

/// So many writes of both guests are enough to call it what it is.
const WRITES_ENOUGH: u64 = 300;

/// How long a guest may take to show that it writes, after the decision.
const OBSERVE: Duration = Duration::from_secs(6);

/// Little to send at the end, as on a real network that keeps up with the guest.
const LITTLE_LEFT: Pace = Pace { bytes_per_s: 80 << 20, downtime_ms: 8 };

/// Slow enough that the guest's RAM is still being copied when the accident happens.
const CRAWL: Pace = Pace { bytes_per_s: 16 << 20, downtime_ms: 300 };

/// The two QEMUs of a replay, with the guest under load.
struct Pair {
    source: Guest,
    destination: Guest,
    migration: Migration,
}

/// The destination's QEMU is frozen at the switch-over, the orchestrator gives up and continues the guest on the
/// source, and then the destination wakes up with everything it needs to run the guest, too.
pub fn replay_frozen_destination(
    dir: &Path,
    stack: &mut dyn Stack,
    story: &mut Story<'_>,
) -> Result<Outcome> {
    let mut pair = start(dir, stack, story, LITTLE_LEFT)?;
    pair.migration.wait_pre_switchover()?;
    story.tell("the guest stands still on the source (pre-switchover); the destination's QEMU is frozen (SIGSTOP)");
    pair.destination.process().freeze()?;
    pair.migration.switch_over()?;
    // An orchestrator waits for its time-out instead, which is seconds.
    pair.migration.wait_all_sent()?;
    story.tell("the orchestrator says migrate-continue; the source sends all that was left; no answer comes");
    pair.migration.cancel().context("the orchestrator gives up")?;
    let decided = pair.mark();
    story.tell("the orchestrator gives up: migrate_cancel, then cont on the source. Its decision: the guest is here");
    if let Some(told) = stack.gave_up()?.told {
        story.tell(told);
    }
    pair.destination.process().thaw()?;
    story.tell("the destination's QEMU thaws (SIGCONT) and reads what had arrived");
    pair.finish(stack, story, Replay::FrozenDestination, decided)
}

/// The source's backend is killed when QEMU asks it for the state of its rings, which is how a guest's disk is stopped.
pub fn replay_dead_source_backend(
    dir: &Path,
    stack: &mut dyn Stack,
    story: &mut Story<'_>,
) -> Result<Outcome> {
    let mut pair = start(dir, stack, story, CRAWL)?;
    pair.migration.wait_active()?;
    // Frozen first, so that it certainly dies inside the stop and not before or after.
    stack.source_backend().freeze()?;
    story.tell("the source's backend hangs (SIGSTOP); RAM goes on being copied");
    pair.migration.set_pace(Pace::FULL)?;
    let qemu = pair.source.process();
    // Where a thread cannot be looked at, this says so.
    qemu.thread_is_in(MIGRATION_THREAD, libc::SYS_recvmsg)?;
    wait_until("the source's QEMU waits for its backend", STEP_TIMEOUT, || {
        // The migration's thread stops the guest, and only a vhost-user answer makes it receive anything.
        qemu.thread_is_in(MIGRATION_THREAD, libc::SYS_recvmsg).unwrap_or(false)
    })?;
    stack.source_backend().kill()?;
    story.tell("QEMU stops the guest and asks the backend where its rings stand; the backend is killed (SIGKILL)");
    pair.migration.wait_pre_switchover()?;
    pair.migration.switch_over()?;
    pair.migration.wait_completed()?;
    let decided = pair.mark();
    story.tell("QEMU reports the migration as completed: the orchestrator lets the guest run on the destination");
    let advice = stack.completed()?;
    if let Some(told) = advice.told {
        story.tell(told);
    }
    if advice.continue_source {
        pair.migration.source.execute("cont", serde_json::json!({}))?;
    }
    pair.finish(stack, story, Replay::DeadSourceBackend, decided)
}

/// QEMU's name for the thread that sends.
const MIGRATION_THREAD: &str = "mig/src/main";

fn start(dir: &Path, stack: &mut dyn Stack, story: &mut Story<'_>, pace: Pace) -> Result<Pair> {
    let config = GuestConfig {
        name: "source".to_owned(),
        queues: QUEUES,
        ..GuestConfig::new(&stack.source_socket())
    };
    let mut source = Guest::boot(dir, &config)?;
    source.ask(LOAD)?;
    source.wait_progress(OPS_BEFORE, STEP_TIMEOUT)?;
    story.tell(format!("a guest runs on the source and writes its volume ({})", stack.name()));
    let config = GuestConfig {
        name: "destination".to_owned(),
        sockets: vec![stack.prepare_destination()?],
        ..config
    };
    let destination = destination(dir, &config)?;
    let migration = Migration::begin(&source, &destination, pace)?;
    story.tell(
        "live migration begins: QEMU copies the guest's RAM to the destination while it runs",
    );
    Ok(Pair { source, destination, migration })
}

/// How many lines each probe had said when the orchestrator decided.
struct Decision {
    source: usize,
    destination: usize,
    at: Instant,
}

impl Pair {
    fn mark(&self) -> Decision {
        Decision {
            source: self.source.heard_so_far(),
            destination: self.destination.heard_so_far(),
            at: Instant::now(),
        }
    }

    /// Watches both guests, then asks each that works what it finds on the volume.
    fn finish(
        mut self,
        stack: &mut dyn Stack,
        story: &mut Story<'_>,
        replay: Replay,
        decided: Decision,
    ) -> Result<Outcome> {
        let count = |pair: &Self| {
            (
                writes_since(&pair.source, decided.source),
                writes_since(&pair.destination, decided.destination),
            )
        };
        // Not reaching it is the good outcome.
        let _ = wait_until("both guests write", OBSERVE, || {
            let (source, destination) = count(&self);
            source >= WRITES_ENOUGH && destination >= WRITES_ENOUGH
        });
        let seconds = decided.at.elapsed().as_secs_f64();
        let (source_writes, destination_writes) = count(&self);
        // Both before either stops its load: the state is that of two guests that were left alone.
        let source_vm = vm(&mut self.source, &mut self.migration.source);
        let destination_vm = vm(&mut self.destination, &mut self.migration.destination);
        story.tell(format!(
            "{seconds:.1} s after the decision: source {source_vm}, {source_writes} writes; destination {destination_vm}, {destination_writes} writes"
        ));
        let verdict = stack.verdict()?;
        let side = |guest: &mut Guest, vm: String, writes: u64| -> Result<Side> {
            let verification = verify(guest, &vm, writes)?;
            Ok(Side { vm, writes, verification })
        };
        let source = side(&mut self.source, source_vm, source_writes)?;
        let destination = side(&mut self.destination, destination_vm, destination_writes)?;
        story.tell("each guest that works reads back all it has written");
        let steps = std::mem::take(&mut story.steps);
        Ok(Outcome { stack: stack.name(), replay, source, destination, verdict, steps })
    }
}

fn vm(guest: &mut Guest, qmp: &mut Qmp) -> String {
    let gone = "gone".to_owned();
    if !guest.process().is_running().unwrap_or(false) {
        return gone;
    }
    run_state(qmp).unwrap_or(gone)
}

/// Writes begun and acknowledged between the first and the last report after line `from`; never too large. What was
/// under way when the guest stopped is not counted: its acknowledgement may lie in the RAM that was copied, and then a
/// guest that never reached its disk counts a write of the other side's backend.
fn writes_since(guest: &Guest, from: usize) -> u64 {
    let reports = guest.reports(from);
    match (reports.first(), reports.last()) {
        (Some(first), Some(last)) => last.writes.saturating_sub(first.writes + IN_FLIGHT),
        _ => 0,
    }
}

fn verify(guest: &mut Guest, vm: &str, writes: u64) -> Result<Verification> {
    if vm != "running" {
        return Ok(Verification::NotRunning);
    }
    // A load that waits for a disk that does not answer cannot be ended.
    if writes == 0 {
        return Ok(Verification::Stalled);
    }
    guest.resynchronise()?;
    // Its backend may have given up meanwhile: qemu-storage-daemon does now and then, with a guest that came back.
    let totals = match guest.end_load() {
        Ok(totals) => totals,
        Err(e) => {
            eprintln!("a guest that wrote does not read back: {e:#}");
            return Ok(Verification::Stalled);
        }
    };
    if totals.errs + totals.stale + totals.corrupt == 0 {
        return Ok(Verification::Good);
    }
    Ok(Verification::Bad {
        errors: totals.errs,
        stale: totals.stale,
        corrupt: totals.corrupt,
        first: guest.complaints().into_iter().next().unwrap_or_default(),
    })
}
