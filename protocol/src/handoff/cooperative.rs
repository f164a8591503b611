//! A backend's part in a handoff of volumes whose storage keeps nobody out: what
//! it does is all that keeps two hosts apart.
//!
//! ```text
//!   source:       serving --SEAL(try), all rings stopped by a migration and drained--> sealed
//!   destination:  standby(try) --PERMIT(try)--> serving
//! ```
//!
//! Rules:
//! - A seal is for ever. What sealed sends nothing and answers nothing any more; it
//!   is told by a process that ends then, and who has the volumes back is another
//!   process. So nothing can undo a seal that somebody has built upon.
//! - A seal needs rings that a migration stopped, and an answer of the storage to
//!   everything that they had taken: what is under way could be done after the
//!   destination's first request. What was given up unanswered, in whichever stop
//!   of the rings, nobody will ever know to be over: such a process never seals.
//! - A seal is for a try in which no rings were started: while they stood still the
//!   machine may have been copied, and once they run again that copy, at the
//!   destination, has a memory of before. Whoever orders the seal says how often rings
//!   had been started when the try began; nothing else keeps such a copy from being the
//!   one that is let run.
//! - A standby sends nothing of the guest before it is permitted, and it is good for
//!   one try. It does not judge: the one who permits has seen the proof.
//!
//! Knows no volume, no socket and no process.

use serde::Serialize;

use super::Try;

/// How the VM stands, in the words that a storage's own handoff has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It may read and write.
    Serving,
    /// It waits for permission.
    Ready,
    /// It waits for permission, and so does its machine.
    Activating,
    /// It has stopped for good.
    Sealed,
}

/// The rings of one disk, in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Rings {
    /// Never ran.
    #[default]
    Idle,
    Running,
    /// They take nothing new; not everything is answered, and may never be.
    Draining {
        migrating: bool,
    },
    /// Everything they took is answered.
    Drained {
        migrating: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Serving,
    Standby(Try),
    Sealed(Try),
}

/// What the edge tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The VMM has started a disk's first ring.
    Started(usize),
    /// The VMM stops a disk's rings; `migrating`: the dirty log was on.
    Stopped {
        /// Which disk.
        disk: usize,
        /// While a migration ran.
        migrating: bool,
    },
    /// Everything that the disk's rings had taken is answered.
    Drained(usize),
    /// The disk's rings let requests go that the storage had not answered.
    GivenUp(usize),
    /// Its agent orders: stop for good, for the sake of this try.
    Seal {
        /// Which.
        attempt: Try,
        /// [`Cooperative::starts`] when it began.
        starts: u32,
    },
    /// Its agent says: the source is proven gone.
    Permit(Try),
}

/// What the edge is to do, with every volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Send what waits.
    Open,
    /// Send nothing any more, close every connection.
    Shut,
}

/// Why an order is not carried out. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The guest may still write.
    #[error("the guest is at its disks; the seal waits until the VMM has stopped it to move it")]
    Running,
    /// The VMM stopped its rings for another reason.
    #[error("the guest has stopped, but not to be moved: no dirty log was kept")]
    NotMoving,
    /// The destination may have a copy of the machine from before.
    #[error(
        "the guest was stopped and went on since the try began, so the other host may have a copy of its memory that is out of date"
    )]
    CameBack,
    /// What was under way when its rings stopped may still be done.
    #[error(
        "the storage has not answered everything that the guest asked for, so it could still be done after the other host's first request"
    )]
    Unanswered,
    /// What was given up at an earlier stop may still be done.
    #[error(
        "requests were given up while the storage did not answer, and it may still do them, after the other host's first request; when it surely has none of them any more, stop this backend and start it again"
    )]
    GivenUp,
    /// No ring of the machine ever ran in this process: an earlier one may have
    /// left requests behind that nobody has answered.
    #[error(
        "this process has not served the guest since it started, so it cannot say that nothing of an earlier one is under way"
    )]
    NeverServed,
    /// It stands by.
    #[error("this backend stands by for try {0} and has no volumes to give up")]
    StandsBy(Try),
    /// It was sealed for another.
    #[error("the volumes were given up for try {0}")]
    Sealed(Try),
    /// It is for another.
    #[error("this backend stands by for try {0}, not for that one")]
    OtherTry(Try),
    /// It stands by for none.
    #[error("this backend serves and waits for no permission")]
    Serves,
}

/// See the module's documentation. One per process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cooperative {
    phase: Phase,
    rings: Vec<Rings>,
    /// Requests were let go that the storage may still have.
    given_up: bool,
    starts: u32,
    /// The last try that it took part in.
    attempt: Option<Try>,
}

impl Cooperative {
    /// A process that serves so many disks.
    #[must_use]
    pub fn serving(disks: usize) -> Self {
        Self::of(disks, Phase::Serving, None)
    }

    /// A process that waits for permission in this try.
    #[must_use]
    pub fn standby(disks: usize, attempt: Try) -> Self {
        Self::of(disks, Phase::Standby(attempt), Some(attempt))
    }

    fn of(disks: usize, phase: Phase, attempt: Option<Try>) -> Self {
        Self { phase, rings: vec![Rings::Idle; disks], given_up: false, starts: 0, attempt }
    }

    /// How the VM stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let waits = |rings: &Rings| matches!(rings, Rings::Running);
        match self.phase {
            Phase::Serving => Standing::Serving,
            Phase::Sealed(_) => Standing::Sealed,
            Phase::Standby(_) if self.rings.iter().any(waits) => Standing::Activating,
            Phase::Standby(_) => Standing::Ready,
        }
    }

    /// How often a disk's rings were started, in this process.
    #[must_use]
    pub fn starts(&self) -> u32 {
        self.starts
    }

    /// The last try that it took part in.
    #[must_use]
    pub fn attempt(&self) -> Option<Try> {
        self.attempt
    }

    /// Nothing of the guest may be sent.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.phase != Phase::Serving
    }

    /// Judges an input. Pure; a refused one changes nothing.
    ///
    /// # Errors
    /// [`Refusal`] of an order.
    pub fn step(&mut self, input: Input) -> Result<Option<Output>, Refusal> {
        match input {
            Input::Started(disk) => {
                let stood = |rings: &Rings| *rings != Rings::Running;
                self.starts += u32::from(self.rings.get(disk).is_some_and(stood));
                self.set(disk, Rings::Running);
            }
            Input::Stopped { disk, migrating } => self.set(disk, Rings::Draining { migrating }),
            Input::Drained(disk) => {
                if let Some(Rings::Draining { migrating }) = self.rings.get(disk).copied() {
                    self.set(disk, Rings::Drained { migrating });
                }
            }
            // Behind a shut gate nothing was sent.
            Input::GivenUp(_) => self.given_up |= !self.is_shut(),
            Input::Seal { attempt, starts } => return self.seal(attempt, starts),
            Input::Permit(attempt) => return self.permit(attempt),
        }
        Ok(None)
    }

    fn set(&mut self, disk: usize, rings: Rings) {
        if let Some(place) = self.rings.get_mut(disk) {
            *place = rings;
        }
    }

    fn seal(&mut self, attempt: Try, starts: u32) -> Result<Option<Output>, Refusal> {
        match self.phase {
            Phase::Sealed(sealed) if sealed == attempt => return Ok(None),
            Phase::Sealed(sealed) => return Err(Refusal::Sealed(sealed)),
            Phase::Standby(standby) => return Err(Refusal::StandsBy(standby)),
            Phase::Serving => {}
        }
        if self.starts != starts {
            return Err(Refusal::CameBack);
        }
        let any = |found: fn(&Rings) -> bool| self.rings.iter().any(found);
        if any(|rings| *rings == Rings::Running) {
            return Err(Refusal::Running);
        }
        if self.given_up {
            return Err(Refusal::GivenUp);
        }
        if any(|rings| matches!(rings, Rings::Draining { .. })) {
            return Err(Refusal::Unanswered);
        }
        if any(|rings| *rings == Rings::Drained { migrating: false }) {
            return Err(Refusal::NotMoving);
        }
        if !any(|rings| *rings == Rings::Drained { migrating: true }) {
            return Err(Refusal::NeverServed);
        }
        self.phase = Phase::Sealed(attempt);
        self.attempt = Some(attempt);
        Ok(Some(Output::Shut))
    }

    fn permit(&mut self, attempt: Try) -> Result<Option<Output>, Refusal> {
        match self.phase {
            Phase::Standby(standby) if standby == attempt => {
                self.phase = Phase::Serving;
                Ok(Some(Output::Open))
            }
            Phase::Standby(standby) => Err(Refusal::OtherTry(standby)),
            // Said again.
            Phase::Serving if self.attempt == Some(attempt) => Ok(None),
            Phase::Serving => Err(Refusal::Serves),
            Phase::Sealed(sealed) => Err(Refusal::Sealed(sealed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::HandoffId;
    use std::collections::HashSet;

    const ONE: Try = Try { id: HandoffId(1), attempt: 1 };
    const TWO: Try = Try { id: HandoffId(2), attempt: 1 };

    fn inputs(disks: usize) -> Vec<Input> {
        let seal = |attempt, starts| Input::Seal { attempt, starts };
        let mut inputs = vec![
            seal(ONE, 0),
            seal(ONE, 1),
            seal(TWO, 1),
            seal(ONE, 2),
            Input::Permit(ONE),
            Input::Permit(TWO),
        ];
        for disk in 0..disks {
            inputs.extend([
                Input::Started(disk),
                Input::Stopped { disk, migrating: true },
                Input::Stopped { disk, migrating: false },
                Input::Drained(disk),
                Input::GivenUp(disk),
            ]);
        }
        inputs
    }

    /// Every state that can be reached x every input, against what each rule says in
    /// other words.
    #[test]
    fn every_state_and_every_input() {
        let mut known: HashSet<Cooperative> = HashSet::new();
        let mut todo = vec![Cooperative::serving(2), Cooperative::standby(2, ONE)];
        let (mut seals, mut permits, mut refusals) = (0, 0, HashSet::new());
        while let Some(state) = todo.pop() {
            if state.starts > 3 || !known.insert(state.clone()) {
                continue;
            }
            for input in inputs(2) {
                let mut next = state.clone();
                let answer = next.step(input);
                if let Err(refusal) = answer {
                    assert_eq!(next, state, "a refused order changes nothing: {input:?}");
                    assert!(matches!(input, Input::Seal { .. } | Input::Permit(_)));
                    refusals.insert(std::mem::discriminant(&refusal));
                }
                match answer {
                    Ok(Some(Output::Shut)) => {
                        seals += 1;
                        assert!(!state.is_shut() && next.is_shut());
                        let done = |rings: &Rings| {
                            matches!(rings, Rings::Idle | Rings::Drained { migrating: true })
                        };
                        assert!(state.rings.iter().all(done), "{state:?}");
                        assert!(state.rings.iter().any(|rings| *rings != Rings::Idle));
                        assert!(!state.given_up, "{state:?}");
                        assert!(
                            matches!(input, Input::Seal { starts, .. } if starts == state.starts)
                        );
                    }
                    Ok(Some(Output::Open)) => {
                        permits += 1;
                        assert_eq!((state.phase, input), (Phase::Standby(ONE), Input::Permit(ONE)));
                        assert!(!next.is_shut());
                    }
                    Ok(None) | Err(_) => {
                        assert_eq!(state.is_shut(), next.is_shut(), "{input:?}");
                    }
                }
                assert!(next.given_up || !state.given_up, "nobody learns that it is over");
                if state.standing() == Standing::Sealed {
                    assert_eq!(next.phase, state.phase, "a seal is for ever");
                }
                todo.push(next);
            }
        }
        assert!(known.len() > 100 && seals > 0 && permits > 0, "{}", known.len());
        assert_eq!(refusals.len(), 10, "a refusal that no state gives is none");
    }

    /// In whichever way it was stopped: a copy of the machine may have been made then.
    #[test]
    fn a_guest_that_came_back_is_not_handed_over_in_that_try() {
        for migrating in [true, false] {
            let mut vm = Cooperative::serving(1);
            let stops = |vm: &mut Cooperative, migrating| {
                vm.step(Input::Started(0)).expect("no order");
                vm.step(Input::Stopped { disk: 0, migrating }).expect("no order");
                vm.step(Input::Drained(0)).expect("no order");
            };
            stops(&mut vm, migrating);
            stops(&mut vm, true);
            let seal = |attempt, starts| Input::Seal { attempt, starts };
            assert_eq!(vm.step(seal(ONE, 1)), Err(Refusal::CameBack));
            // In another try, which knows of it.
            assert_eq!(vm.step(seal(TWO, 2)), Ok(Some(Output::Shut)));
            assert_eq!(vm.step(seal(TWO, 1)), Ok(None), "said again");
        }
        // It stood still when the try began, and this process had not seen it run.
        let mut vm = Cooperative::serving(1);
        vm.step(Input::Started(0)).expect("no order");
        let seal = Input::Seal { attempt: ONE, starts: 0 };
        assert_eq!(vm.step(seal), Err(Refusal::CameBack));
    }

    /// In a stop of any kind, however cleanly the rings are stopped afterwards.
    #[test]
    fn what_was_given_up_is_never_taken_for_answered() {
        let moves = |vm: &mut Cooperative| {
            vm.step(Input::Started(0)).expect("no order");
            vm.step(Input::Stopped { disk: 0, migrating: true }).expect("no order");
            vm.step(Input::Drained(0)).expect("no order");
            vm.step(Input::Seal { attempt: TWO, starts: vm.starts() })
        };
        let mut vm = Cooperative::serving(2);
        vm.step(Input::Started(0)).expect("no order");
        vm.step(Input::Stopped { disk: 0, migrating: false }).expect("no order");
        vm.step(Input::GivenUp(0)).expect("no order");
        assert_eq!(moves(&mut vm), Err(Refusal::GivenUp));
        // One that stood by has sent nothing.
        let mut vm = Cooperative::standby(1, ONE);
        vm.step(Input::GivenUp(0)).expect("no order");
        vm.step(Input::Permit(ONE)).expect("permitted");
        assert_eq!(moves(&mut vm), Ok(Some(Output::Shut)));
    }

    #[test]
    fn the_words_for_how_it_stands() {
        let mut vm = Cooperative::standby(1, ONE);
        let seal = Input::Seal { attempt: TWO, starts: 1 };
        assert_eq!(vm.standing(), Standing::Ready);
        vm.step(Input::Started(0)).expect("no order");
        assert_eq!(vm.standing(), Standing::Activating);
        vm.step(Input::Permit(ONE)).expect("permitted");
        assert_eq!(vm.standing(), Standing::Serving);
        assert_eq!(vm.step(seal), Err(Refusal::Running));
        vm.step(Input::Stopped { disk: 0, migrating: true }).expect("no order");
        assert_eq!(vm.step(seal), Err(Refusal::Unanswered));
        vm.step(Input::Drained(0)).expect("no order");
        assert_eq!(vm.step(seal), Ok(Some(Output::Shut)));
        assert_eq!(vm.standing(), Standing::Sealed);
        // A machine that is resumed gets nothing.
        vm.step(Input::Started(0)).expect("no order");
        assert!(vm.is_shut());
    }
}
