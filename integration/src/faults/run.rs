//! One case from start to end: the story, the accident in it, the orchestrator who brings it to an end, the judge.

use super::case::{Actor, Case, Engine, Fault, Story};
use super::cluster::VM;
use super::history::{Event, Judge, What, now_ns};
use super::injector::{Injector, Order, Progress};
use super::recovery::Recovery;
use super::world::{Side, World};
use crate::images::SharedCeph;
use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For one step of a story before the orchestrator gives up. Longer than a short freeze.
const STEP: Duration = Duration::from_secs(8);
/// In which one side must go on once everything that was hurt is up again.
const GO_ON: Duration = Duration::from_secs(25);
/// The same on RBD, where each look at a record is a program of Ceph's.
const GO_ON_RBD: Duration = Duration::from_secs(60);
/// How often conditions are looked at.
const POLL: Duration = Duration::from_millis(10);

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A frozen process stays so.
    pub freeze: Duration,
    /// A dead process stays so.
    pub dead: Duration,
}

/// What came of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// `hurt`, `absent` (no victim at that moment) or `missed` (the point was not passed).
    pub accident: &'static str,
    /// Who has the VM.
    pub winner: &'static str,
    /// How the story went, as the orchestrator saw it.
    pub story: String,
    /// The guest went on, or booted again.
    pub guest: &'static str,
    /// From the end of the accident until the guest was served.
    pub recovery_ms: u128,
    /// Answers the guests have seen.
    pub answers: u64,
}

/// Runs a case in a directory of its own. An error is a broken promise, or a harness that is broken.
/// A case on images has a cluster, which it leaves as it found it.
pub fn run(
    case: Case,
    times: Times,
    dir: &Path,
    hits: &Path,
    ceph: Option<&SharedCeph>,
) -> Result<Outcome> {
    let mut world = match ceph {
        Some(ceph) => World::start_on(ceph, dir, case, hits)?,
        None => World::start(dir, case, hits)?,
    };
    world.vmm_mut(Side::Source)?.wait_ready()?;
    world.vmm(Side::Source)?.order("run")?;
    world.vmm(Side::Source)?.wait_progress(20, GO_ON)?;

    let hold = if case.fault == Fault::Freeze { times.freeze } else { times.dead };
    let order = Order { owner: case.owner, victim: case.victim, fault: case.fault, hold };
    let id = crate::handoff::Fleet::attempt().id;
    let injector = Injector::start(order, &world.register);
    let (fork, saved, started) = (None, dir.join("saved"), [true, false]);
    let go_on_within = if case.engine == Engine::Rbd { GO_ON_RBD } else { GO_ON };
    let recovery = Recovery::new(matches!(case.victim, Actor::Osd | Actor::Monitor));
    let (story, fenced) = (case.story, None);
    let mut play =
        Play { world, injector, recovery, story, id, fork, fenced, saved, started, go_on_within };
    let told = play.tell(case.story);
    let winner = play.end(told.is_ok())?;
    let accident = match play.injector.progress() {
        Progress::Waiting => "missed",
        Progress::Absent => "absent",
        Progress::Hurt | Progress::Over => "hurt",
    };
    let since = Instant::now();
    let guest = play.go_on(winner)?;
    let recovery_ms = since.elapsed().as_millis();
    let answers = play.judge(winner, guest)?;
    let story = told.map_or_else(|error| format!("{error:#}"), |()| "done".to_owned());
    let winner = match winner {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    Ok(Outcome { accident, winner, story, guest, recovery_ms, answers })
}

struct Play {
    world: World,
    injector: Injector,
    recovery: Recovery,
    story: Story,
    /// Of the handoff.
    id: String,
    /// When the guest was copied.
    fork: Option<u64>,
    /// When its volumes had been taken from the source.
    fenced: Option<u64>,
    saved: PathBuf,
    /// Whose VMM was told to run the guest.
    started: [bool; 2],
    /// In which one side must go on.
    go_on_within: Duration,
}

impl Play {
    /// What the orchestrator does until something keeps it from it.
    fn tell(&mut self, story: Story) -> Result<()> {
        if story == Story::Evacuate {
            return self.evacuate(STEP);
        }
        self.prepare()?;
        self.order(Side::Source, "log")?;
        if story == Story::Cancel {
            self.call_off()?;
            return self.wait_serving(Side::Source);
        }
        if story == Story::Restart {
            self.world.restart_anchor()?;
            // The source says that it never sealed, and goes on.
            self.wait_serving(Side::Source)?;
        }
        if story == Story::Successor {
            self.world.kill_backend(Side::Source)?;
            self.wait_serving(Side::Source)?;
        }
        self.order(Side::Source, "stop")?;
        self.world.vmm(Side::Source)?.save(&self.saved)?;
        self.fork = Some(now_ns());
        match story {
            Story::Move | Story::Restart | Story::Successor => {
                self.start_destination()?;
                self.wait_serving(Side::Destination)?;
                self.finish()
            }
            Story::Return => {
                self.order(Side::Source, "run")?;
                self.wait_serving(Side::Source)?;
                self.finish()
            }
            Story::Race => {
                self.order(Side::Source, "run")?;
                self.start_destination()?;
                self.wait("the race is decided", |play| Ok(play.decided()?.is_some()))?;
                self.finish()
            }
            Story::Frozen => {
                self.wait("the destination sees the seal", |play| {
                    let status = play.world.host(Side::Destination).status()?;
                    let members = status["handoff"]["members"].as_array();
                    Ok(members.is_some_and(|all| all.iter().all(|m| m["phase"] == "sealed")))
                })?;
                self.world.restart_anchor()?;
                self.order(Side::Source, "run")?;
                self.wait_serving(Side::Source)?;
                self.finish()
            }
            Story::Cancel | Story::Evacuate => unreachable!("they have ended above"),
        }
    }

    /// The volumes are taken from the source, whoever runs there, and the destination's backend claims them.
    fn evacuate(&mut self, patience: Duration) -> Result<()> {
        let (from, to) = (Side::Source.host(), Side::Destination.host());
        let body = json!({ "dead_host": from, "nominee": to, "reason": "test", "force": true });
        let path = format!("/v1/vms/{VM}:fence");
        self.wait_for("every volume is taken from the source", patience, |play| {
            play.world.coordinator.call("POST", &path, Some(&body)).map(|_| true)
        })?;
        self.fenced.get_or_insert_with(now_ns);
        self.wait_for("the destination claims the volumes", patience, |play| {
            play.world.host(Side::Destination).own().map(|()| true)
        })
    }

    fn call_off(&mut self) -> Result<()> {
        let path = self.path(":cancel");
        self.wait("the handoff is called off", |play| {
            let shown = play.world.coordinator.call("POST", &path, None)?;
            Ok(shown["outcome"] == "source")
        })
    }

    fn prepare(&mut self) -> Result<()> {
        let body = json!({ "from": Side::Source.host(), "to": Side::Destination.host() });
        let path = self.path("?wait=READY&timeout=2s");
        self.wait("the handoff is ready", |play| {
            let shown = play.world.coordinator.call("PUT", &path, Some(&body))?;
            match shown["state"].as_str() {
                Some("READY") => Ok(true),
                Some("PREPARING") => Ok(false),
                _ => bail!("it is {shown}"),
            }
        })?;
        self.world.start_vmm(Side::Destination)?;
        self.world.vmm_mut(Side::Destination)?.wait_ready()
    }

    fn path(&self, more: &str) -> String {
        format!("/v1/vms/{VM}/handoffs/{}{more}", self.id)
    }

    fn start_destination(&mut self) -> Result<()> {
        let saved = self.saved.clone();
        self.world.vmm(Side::Destination)?.load(&saved)?;
        self.started[Side::Destination as usize] = true;
        self.order(Side::Destination, "run")
    }

    /// An order is given again until it is answered: all of them may be.
    fn order(&mut self, side: Side, order: &str) -> Result<()> {
        self.wait(&format!("`{order}` at the {side:?}"), |play| {
            play.world.vmm(side)?.order(order).map(|_| true)
        })
    }

    fn wait_serving(&mut self, side: Side) -> Result<()> {
        let before = self.world.vmm(side)?.answered()?;
        self.wait(&format!("the guest runs on the {side:?}"), |play| {
            let now = play.world.vmm(side)?.answered()?;
            Ok(now.iter().zip(&before).all(|(now, before)| *now >= before + 10))
        })
    }

    /// Waits for something, while what has died is started again. An answer that is an error is asked for again.
    fn wait(&mut self, what: &str, holds: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        self.wait_for(what, STEP, holds)
    }

    fn wait_for(
        &mut self,
        what: &str,
        patience: Duration,
        mut holds: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let mut deadline = Instant::now() + patience;
        loop {
            let answer = holds(self);
            if matches!(answer, Ok(true)) {
                return Ok(());
            }
            if !self.is_all_up()? {
                // Time counts from the end of the accident.
                deadline = Instant::now() + patience;
            }
            if Instant::now() > deadline {
                return match answer {
                    Err(error) => Err(error.context(format!("in vain: {what}"))),
                    Ok(_) => bail!("in vain: {what}"),
                };
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether nobody is hurt any more, or nobody was yet; starts again what has died.
    fn is_all_up(&mut self) -> Result<bool> {
        let progress = self.injector.progress();
        if progress == Progress::Hurt {
            return Ok(false);
        }
        self.world.mend();
        match &self.world.fleet.images {
            Some(images) if progress == Progress::Over => self.recovery.is_over(&images.ceph()),
            _ => Ok(true),
        }
    }

    /// How the anchor decided, if it has.
    fn decided(&self) -> Result<Option<Side>> {
        let record = self.world.fleet.record(0)?;
        if record["decided"]["id"] == self.id.as_str() {
            return Ok(match record["decided"]["winner"].as_str() {
                Some("source") => Some(Side::Source),
                Some("destination") => Some(Side::Destination),
                other => bail!("the anchor says that {other:?} has won"),
            });
        }
        let mine = record["handoff"]["id"] == self.id.as_str();
        Ok(match record["phase"].as_str() {
            Some("active") if mine => Some(Side::Destination),
            Some("reclaimed") if mine => Some(Side::Source),
            _ => None,
        })
    }

    fn finish(&mut self) -> Result<()> {
        let path = self.path(":finish");
        self.wait("the handoff is finished", |play| {
            let shown = play.world.coordinator.call("POST", &path, None)?;
            Ok(shown["decided"] == true)
        })
    }

    /// The orchestrator finds out who has the VM: it waits if the story went well, and calls the handoff off if not.
    fn end(&mut self, told: bool) -> Result<Side> {
        // Whatever was done to a process is over before anybody judges who is gone.
        self.wait_for("the accident ends", self.go_on_within, |play| {
            Ok(play.injector.progress() != Progress::Hurt)
        })?;
        if self.story == Story::Evacuate {
            self.evacuate(self.go_on_within)?;
            return Ok(Side::Destination);
        }
        let mut poked = false;
        let mut outcome = None;
        self.wait_for("the handoff is decided and over", self.go_on_within, |play| {
            if let Some(winner) = play.decided()?
                && !poked
            {
                poked = true;
                play.poke(winner.other());
            }
            let shown = match play.world.coordinator.call("GET", &play.path(""), None) {
                Err(error) if format!("{error:#}").contains("404") => {
                    // It was never accepted.
                    outcome = Some(Side::Source);
                    return Ok(true);
                }
                shown => shown?,
            };
            if shown["over"] != true {
                let verb = if told && play.story != Story::Cancel { ":finish" } else { ":cancel" };
                let _ = play.world.coordinator.call("POST", &play.path(verb), None);
                return Ok(false);
            }
            outcome = match shown["outcome"].as_str() {
                Some("source") => Some(Side::Source),
                Some("destination") => Some(Side::Destination),
                other => bail!("the handoff is over and the outcome is {other:?}"),
            };
            Ok(true)
        })
        .map_err(|error| self.blame(&error))?;
        let winner = outcome.context("it is decided")?;
        let mut anchor = None;
        // Who has it may have died since.
        self.wait_for("the anchor is asked", self.go_on_within, |play| {
            anchor = play.decided()?;
            Ok(true)
        })?;
        if anchor.is_some_and(|decided| decided != winner) {
            bail!("the coordinator says {winner:?}, and the anchor another");
        }
        Ok(winner)
    }

    /// The worst orchestrator starts the loser again. It may be stuck in what it asked of its backend.
    fn poke(&mut self, loser: Side) {
        if self.world.vmm_lives(loser) && self.started[loser as usize] {
            let _ = self.world.vmm(loser).and_then(|vmm| vmm.order("run"));
        }
    }

    /// A failure with everybody's view.
    fn blame(&self, error: &anyhow::Error) -> anyhow::Error {
        let handoff = self.world.coordinator.call("GET", &self.path(""), None);
        let standing = |side| self.world.host(side).standing();
        anyhow!(
            "{error:#}; coordinator: {handoff:?}; source: {:?}; destination: {:?}; anchor: {:?}",
            standing(Side::Source),
            standing(Side::Destination),
            self.world.fleet.record(0),
        )
    }

    /// The winner's guest runs, on volumes that are all its own.
    fn go_on(&mut self, winner: Side) -> Result<&'static str> {
        // A server may have died after its part was done.
        self.wait_for("all agree on the winner", self.go_on_within, |play| play.agree(winner))?;
        self.wait_for("the winner's backend serves", self.go_on_within, |play| {
            let host = play.world.host(winner);
            if host.standing().is_ok_and(|standing| standing == "serving") {
                return Ok(true);
            }
            host.own()?;
            Ok(false)
        })
        .map_err(|error| self.blame(&error))?;
        let guest = if self.world.vmm_lives(winner) && self.started[winner as usize] {
            "went on"
        } else {
            "booted"
        };
        if guest == "booted" {
            self.world.start_vmm(winner)?;
        }
        self.world.vmm_mut(winner)?.wait_ready()?;
        self.order(winner, "run")?;
        let before = self.world.vmm(winner)?.answered()?;
        self.wait_for("the winner's guest goes on", self.go_on_within, |play| {
            let now = play.world.vmm(winner)?.answered()?;
            Ok(now.iter().zip(&before).all(|(now, before)| *now >= before + 20))
        })
        .map_err(|error| self.blame(&error))?;
        self.wait_for(
            "every backend that runs is known to its agent",
            self.go_on_within,
            |play| {
                let strays =
                    [Side::Source, Side::Destination].map(|side| play.world.host(side).strays());
                if strays.iter().all(Vec::is_empty) {
                    Ok(true)
                } else {
                    bail!("of nobody: {strays:?}")
                }
            },
        )?;
        Ok(guest)
    }

    /// All volumes and the coordinator name the winner, and nothing is left armed.
    fn agree(&self, winner: Side) -> Result<bool> {
        for member in 0..self.world.fleet.members.len() {
            let record = self.world.fleet.record(member)?;
            if record["owner"]["name"] != winner.owner() || !record["handoff"].is_null() {
                bail!("the {winner:?} has won, and volume {member} says {record}");
            }
        }
        let access = self.world.coordinator.call("GET", &format!("/v1/vms/{VM}/access"), None)?;
        if access["owner_host"] != winner.host() {
            bail!("the {winner:?} has won, and the coordinator says {access}");
        }
        Ok(true)
    }

    fn judge(&mut self, winner: Side, guest: &'static str) -> Result<u64> {
        let seen = self.world.look(self.go_on_within)?;
        let sources = self.world.histories(Side::Source)?;
        let destinations = self.world.histories(Side::Destination)?;
        let mut judge = Judge::default();
        let source = sources.first().context("the source has a history")?;
        let destination = destinations.first();
        let fork = self.fork.filter(|_| self.started[Side::Destination as usize]);
        match (winner, fork) {
            (Side::Destination, Some(fork)) => {
                let (before, after): (Vec<Event>, Vec<Event>) =
                    source.iter().cloned().partition(|event| event.at_ns <= fork);
                judge.follow(&before)?;
                silent(&after, "source")?;
                judge.follow(destination.context("the destination has a history")?)?;
            }
            (Side::Destination, None) => {
                let Some(fenced) = self.fenced else {
                    bail!("the destination has won, and was never started")
                };
                // What storage had done by then may be heard later, by a host that stood still.
                let sent: BTreeSet<u64> = source
                    .iter()
                    .filter(|event| event.what == What::Submit && event.at_ns <= fenced)
                    .map(|event| event.op)
                    .collect();
                let (before, after): (Vec<Event>, Vec<Event>) = source
                    .iter()
                    .cloned()
                    .partition(|event| event.at_ns <= fenced || sent.contains(&event.op));
                judge.follow(&before)?;
                silent(&after, "source")?;
            }
            (Side::Source, _) => {
                judge.follow(source)?;
                silent(destination.map_or(&[], Vec::as_slice), "destination")?;
            }
        }
        if guest == "booted" {
            judge.lose_guest();
            let booted = if winner == Side::Source { sources.last() } else { destinations.last() };
            judge.follow(booted.context("the guest booted again")?)?;
        }
        judge.lose_guest();
        judge.follow(&seen.history()?).context("what a fresh guest sees at the end")?;
        Ok(judge.completed())
    }
}

/// The loser's guest may send what it likes; it gets no answer.
fn silent(events: &[Event], who: &str) -> Result<()> {
    match events.iter().find(|event| event.what == What::Complete) {
        Some(event) => bail!("the {who} lost, and was answered: {event:?}"),
        None => Ok(()),
    }
}
