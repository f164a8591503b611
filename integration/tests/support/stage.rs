//! A guest that is moved between two hosts, as an orchestrator would do it, and judged at the end.
#![allow(dead_code, reason = "not every test needs all of it")]

use anyhow::{Result, bail};
use baton_integration::faults::history::{Event, Judge, What, now_ns};
use baton_integration::faults::world::{Side, World};
use baton_integration::workspace::TestDir;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For a step that several processes have to take, on a busy machine, while one of them keeps dying.
pub(crate) const SOON: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(10);

/// The guest, and all that is around it.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) dir: TestDir,
    /// Where the guest runs.
    pub(crate) at: Side,
    /// When it was copied to the other side, if it was.
    pub(crate) fork: Option<u64>,
    /// What it did in the VMMs that it has left.
    pub(crate) past: Vec<Event>,
    pub(crate) copies: u64,
}

impl Stage {
    pub(crate) fn new(name: &str) -> Self {
        let dir = TestDir::new(name).unwrap();
        let mut world = World::undisturbed(dir.path(), 2).unwrap();
        world.vmm_mut(Side::Source).unwrap().wait_ready().unwrap();
        world.vmm(Side::Source).unwrap().order("run").unwrap();
        world.vmm(Side::Source).unwrap().wait_progress(20, SOON).unwrap();
        Self { world, dir, at: Side::Source, fork: None, past: Vec::new(), copies: 0 }
    }

    /// Asks until the answer is what is wished; who died is started again meanwhile.
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut ask: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> T {
        let deadline = Instant::now() + SOON;
        loop {
            let answer = ask(self);
            if let Ok(Some(answer)) = answer {
                return answer;
            }
            assert!(Instant::now() < deadline, "in vain: {what}: {:?}", answer.err());
            self.world.mend();
            std::thread::sleep(POLL);
        }
    }

    /// The guest stops here and is told to run there: what a VMM does when its migration ends.
    pub(crate) fn switch(&mut self) -> Result<()> {
        let saved = self.leave()?;
        self.arrive(&saved)
    }

    /// The guest stops here: the first half of [`Self::switch`].
    pub(crate) fn leave(&mut self) -> Result<PathBuf> {
        let (from, to) = (self.at, self.at.other());
        self.world.start_vmm(to)?;
        self.world.vmm_mut(to)?.wait_ready()?;
        self.copies += 1;
        let saved = self.dir.join(&format!("saved-{}", self.copies));
        self.world.vmm(from)?.order("log")?;
        self.world.vmm(from)?.order("stop")?;
        self.world.vmm(from)?.save(&saved)?;
        Ok(saved)
    }

    /// It is told to run there: the second half.
    pub(crate) fn arrive(&mut self, saved: &Path) -> Result<()> {
        let to = self.at.other();
        self.world.vmm(to)?.load(saved)?;
        self.fork = Some(now_ns());
        self.world.vmm(to)?.order("run").map(drop)
    }

    /// Every handoff is over: all volumes have one owner, whose guest goes on; the other was never answered.
    pub(crate) fn land(&mut self) {
        let owner = self.until("all volumes have one owner", |stage| {
            let records = (0..stage.world.fleet.members.len()).map(|n| stage.world.fleet.record(n));
            let records = records.collect::<Result<Vec<_>>>()?;
            let owner = records[0]["owner"]["name"].clone();
            for record in &records {
                if !record["handoff"].is_null() || record["owner"]["name"] != owner {
                    bail!("left armed, or owned by another: {record}");
                }
            }
            Ok(Some(owner))
        });
        let winner = if owner == self.at.owner() { self.at } else { self.at.other() };
        assert_eq!(owner, winner.owner());
        let fork = self.fork.take();
        if winner != self.at {
            let fork = fork.expect("the guest was copied before the other side won");
            let (before, after): (Vec<Event>, Vec<Event>) =
                self.history(self.at).into_iter().partition(|event| event.at_ns <= fork);
            assert_silent(&after);
            self.past.extend(before);
            self.at = winner;
        } else if fork.is_some() {
            assert_silent(&self.history(self.at.other()));
        }
        // Who is not to run is ended: no backend waits for another machine beside it.
        self.world.end_vmm(self.at.other()).unwrap();
        self.world.vmm(self.at).unwrap().order("run").unwrap();
        self.world.vmm(self.at).unwrap().wait_progress(20, SOON).unwrap();
    }

    pub(crate) fn history(&self, side: Side) -> Vec<Event> {
        self.world.vmm(side).unwrap().history().unwrap()
    }

    /// The whole life of the guest, and what a fresh one sees at the end. Returns how many answers were judged.
    pub(crate) fn judge(&mut self) -> u64 {
        let seen = self.world.look(SOON).unwrap();
        let mut judge = Judge::default();
        judge.follow(&self.past).unwrap();
        judge.follow(&self.history(self.at)).unwrap();
        judge.lose_guest();
        judge.follow(&seen.history().unwrap()).unwrap();
        judge.completed()
    }
}

pub(crate) fn assert_silent(events: &[Event]) {
    let answered = events.iter().find(|event| event.what == What::Complete);
    assert_eq!(answered, None, "the loser was answered");
}
