//! One case from start to end: the story, the accident in it, the orchestrator who brings it to an end, the judge.

use super::case::{Case, Fault, Story};
use super::history::{Event, Judge, What, now_ns};
use super::injector::{Injector, Order, Progress};
use super::world::{Side, World};
use crate::handoff::Attempt;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For one step of a story before the orchestrator gives up. Longer than a short freeze.
const STEP: Duration = Duration::from_secs(8);
/// In which one side must go on once everything that was hurt is up again.
const GO_ON: Duration = Duration::from_secs(25);
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
pub fn run(case: Case, times: Times, dir: &Path, hits: &Path) -> Result<Outcome> {
    let mut world = World::start(dir, case, hits)?;
    world.start_host(Side::Source)?;
    world.vmm_mut(Side::Source)?.wait_ready()?;
    world.vmm(Side::Source)?.order("run")?;
    world.vmm(Side::Source)?.wait_progress(20, GO_ON)?;

    let hold = if case.fault == Fault::Freeze { times.freeze } else { times.dead };
    let order = Order { owner: case.owner, victim: case.victim, fault: case.fault, hold };
    let injector = Injector::start(order, &world.register);
    let mut play = Play {
        world,
        injector,
        attempt: None,
        fork: None,
        saved: dir.join("saved"),
        started: [true, false],
    };
    let told = play.tell(case.story);
    let winner = play.end(told.is_ok())?;
    let accident = match play.injector.stop() {
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
    attempt: Option<Attempt>,
    /// When the guest was copied.
    fork: Option<u64>,
    saved: PathBuf,
    /// Whose VMM was told to run the guest.
    started: [bool; 2],
}

impl Play {
    /// What the orchestrator does until something keeps it from it.
    fn tell(&mut self, story: Story) -> Result<()> {
        self.prepare()?;
        self.order(Side::Source, "log")?;
        if story == Story::Restart {
            self.world.restart_anchor()?;
        }
        self.order(Side::Source, "stop")?;
        self.world.vmm(Side::Source)?.save(&self.saved)?;
        self.fork = Some(now_ns());
        match story {
            Story::Move | Story::Restart => {
                self.start_destination()?;
                self.wait_serving(Side::Destination)?;
                self.settle()
            }
            Story::Return => {
                self.order(Side::Source, "run")?;
                self.wait_serving(Side::Source)?;
                self.settle()
            }
            Story::Race => {
                self.order(Side::Source, "run")?;
                self.start_destination()?;
                self.wait("the race is decided", |play| Ok(play.decided()?.is_some()))?;
                self.settle()
            }
            Story::Frozen => {
                self.wait("the destination sees the seal", |play| {
                    let status = play.world.host(Side::Destination)?.status()?;
                    let members = status["handoff"]["members"].as_array();
                    Ok(members.is_some_and(|all| all.iter().all(|m| m["phase"] == "sealed")))
                })?;
                self.world.restart_anchor()?;
                self.order(Side::Source, "run")?;
                self.wait_serving(Side::Source)?;
                self.settle()
            }
        }
    }

    fn prepare(&mut self) -> Result<()> {
        self.world.start_host(Side::Destination)?;
        let fleet = &self.world.fleet;
        self.attempt = Some(fleet.name_attempt());
        for member in 0..self.world.fleet.members.len() {
            self.wait("the volume is armed", |play| {
                let attempt = play.attempt.as_ref().context("just made")?;
                let plan =
                    play.world.fleet.plan(attempt, Side::Source.owner(), Side::Destination.owner());
                play.world.fleet.post(member, "arm", &json!({ "plan": plan })).map(|_| true)
            })?;
        }
        self.wait("the destination is ready", |play| {
            Ok(play.world.host(Side::Destination)?.standing()? == "ready")
        })?;
        self.world.vmm_mut(Side::Destination)?.wait_ready()
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
        let mut over = self.injector.progress() >= Progress::Absent;
        loop {
            let answer = holds(self);
            if matches!(answer, Ok(true)) {
                return Ok(());
            }
            let now_over = self.injector.progress() != Progress::Hurt;
            if now_over {
                self.world.mend();
            }
            if now_over && !over {
                // The accident has just ended: from now on it counts.
                deadline = Instant::now() + patience;
            }
            over = now_over;
            if Instant::now() > deadline {
                return match answer {
                    Err(error) => Err(error.context(format!("in vain: {what}"))),
                    Ok(_) => bail!("in vain: {what}"),
                };
            }
            std::thread::sleep(POLL);
        }
    }

    /// How the anchor decided, if it has.
    fn decided(&self) -> Result<Option<(Side, Value)>> {
        let Some(attempt) = &self.attempt else { return Ok(None) };
        let record = self.world.fleet.record(0)?;
        let decided = matches!(record["phase"].as_str(), Some("active" | "reclaimed"))
            || record["decided"]["id"] == attempt.id.as_str();
        if !decided {
            return Ok(None);
        }
        let proof = self.world.fleet.proof(attempt)?;
        let winner = match proof["winner"].as_str() {
            Some("source") => Side::Source,
            Some("destination") => Side::Destination,
            other => bail!("the anchor says that {other:?} has won"),
        };
        Ok(Some((winner, proof)))
    }

    fn settle(&mut self) -> Result<()> {
        self.wait("all volumes are settled", |play| {
            let attempt = play.attempt.clone().context("a handoff was armed")?;
            play.world.fleet.settle(&attempt).map(|_| true)
        })
    }

    /// The orchestrator finds out who has the VM: it waits if the story went well, and calls the handoff off if not.
    fn end(&mut self, told: bool) -> Result<Side> {
        // Whatever was done to a process is over before anybody judges who is gone.
        self.wait_for("the accident ends", GO_ON, |play| {
            Ok(matches!(
                play.injector.progress(),
                Progress::Waiting | Progress::Absent | Progress::Over
            ))
        })?;
        let mut winner = Side::Source;
        self.wait_for("the handoff is decided", GO_ON, |play| {
            let armed = (0..play.world.fleet.members.len())
                .map(|member| Ok(!play.world.fleet.record(member)?["handoff"].is_null()))
                .collect::<Result<Vec<_>>>()?;
            match play.decided()? {
                Some((side, _)) => winner = side,
                None if !armed.contains(&true) => return Ok(true),
                None => {
                    if !told {
                        play.call_off()?;
                    }
                    return Ok(false);
                }
            }
            let attempt = play.attempt.clone().context("it is decided")?;
            play.world.fleet.settle(&attempt)?;
            Ok(true)
        })?;
        Ok(winner)
    }

    fn call_off(&self) -> Result<()> {
        let attempt = self.attempt.as_ref().context("there is a handoff")?;
        // Lost, unknown and won are told apart by the record.
        self.world.fleet.reclaim(attempt).map(drop)
    }

    /// The winner's guest runs, and the loser's does not although it is told to.
    fn go_on(&mut self, winner: Side) -> Result<&'static str> {
        let loser = winner.other();
        for member in 0..self.world.fleet.members.len() {
            let record = self.world.fleet.record(member)?;
            if record["owner"]["name"] != winner.owner() || !record["handoff"].is_null() {
                bail!("the {winner:?} has won, and volume {member} says {record}");
            }
        }
        self.world.serve_on(winner)?;
        if self.world.vmm_lives(loser) && self.started[loser as usize] {
            // The worst orchestrator starts it again. It may be stuck in what it asked of its backend.
            let _ = self.world.vmm(loser)?.order("run");
        }
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
        self.wait_for("the winner's guest goes on", GO_ON, |play| {
            let now = play.world.vmm(winner)?.answered()?;
            Ok(now.iter().zip(&before).all(|(now, before)| *now >= before + 20))
        })
        .with_context(|| {
            let status = self.world.host(winner).and_then(|host| host.status());
            format!("the {winner:?}'s backend says {status:?}")
        })?;
        Ok(guest)
    }

    fn judge(&mut self, winner: Side, guest: &'static str) -> Result<u64> {
        let seen = self.world.look(GO_ON)?;
        let histories = self.world.histories()?;
        let mut judge = Judge::default();
        let source = histories.first().context("the source has a history")?;
        let fork = self.fork.filter(|_| self.started[Side::Destination as usize]);
        match (winner, fork) {
            (Side::Destination, Some(fork)) => {
                let (before, after): (Vec<Event>, Vec<Event>) =
                    source.iter().cloned().partition(|event| event.at_ns <= fork);
                judge.follow(&before)?;
                silent(&after, "source")?;
                judge.follow(histories.get(1).context("the destination has a history")?)?;
            }
            (Side::Destination, None) => bail!("the destination has won, and was never started"),
            (Side::Source, _) => {
                judge.follow(source)?;
                silent(histories.get(1).map_or(&[], Vec::as_slice), "destination")?;
            }
        }
        if guest == "booted" {
            judge.lose_guest();
            judge.follow(histories.get(2).context("the guest booted again")?)?;
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
