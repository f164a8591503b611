//! A test per rule of the machine, against real records; and its standing x
//! input matrix.
//!
//! | module | noun |
//! |---|---|
//! | `source` | when it seals, comes back, unfreezes |
//! | `destination` | when it activates, opens, abdicates |
//! | `loss` | who is parked, and who is not |
//! | `matrix` | every standing x every input |

mod destination;
mod loss;
mod matrix;
mod source;

use super::*;
use crate::access::Phase;
use crate::access::{By, Input as RecordInput};
use crate::handoff::Members;
use crate::handoff::message::{Answer, Outcome};
use crate::handoff::{HandoffId, Key, Mode, Plan};

const SOURCE: &str = "a";
const DESTINATION: &str = "b";
const S1: SessionId = SessionId(1);
const S2: SessionId = SessionId(2);
const D1: SessionId = SessionId(3);
const D2: SessionId = SessionId(4);
const VOLUMES: [VolumeId; 2] = [VolumeId(7), VolumeId(8)];
const ANCHOR: usize = 0;
const OTHER: usize = 1;

fn plan(attempt: u32) -> Plan {
    Plan {
        attempt: attempt_of(attempt),
        vm: "vm".to_owned(),
        from: SOURCE.to_owned(),
        to: DESTINATION.to_owned(),
        anchor: VOLUMES[ANCHOR],
        members: Members::of(VOLUMES),
        mode: Mode::Fast,
        key: Key([7; 32]),
    }
}

fn attempt_of(attempt: u32) -> Try {
    Try { id: HandoffId(1), attempt }
}

/// Two members at two servers, and one backend that hears of them.
#[derive(Clone)]
struct Bench {
    records: [AccessRecord; 2],
    boots: [u64; 2],
    role: Role,
    session: SessionId,
}

impl Bench {
    fn with(name: &str, session: SessionId) -> Self {
        let claim = RecordInput::Claim { name: SOURCE, session: S1 };
        let record = |volume| AccessRecord::new(volume).step(claim).expect("free").record;
        let role = Role::new(name, session, &VOLUMES);
        Self { records: VOLUMES.map(record), boots: [1, 1], role, session }
    }

    /// The source, running.
    fn source() -> Self {
        let mut bench = Self::with(SOURCE, S1);
        for member in [ANCHOR, OTHER] {
            bench.role.step(Input::Claimed { member, epoch: Epoch(1) });
            bench.role.step(Input::Started { member });
            assert_eq!(bench.view(member), []);
        }
        bench
    }

    /// The source with a handoff planned.
    fn armed_source() -> Self {
        let mut bench = Self::source();
        bench.arm(1);
        assert_eq!(bench.views(), []);
        bench
    }

    /// The source, sealed.
    fn sealed_source() -> Self {
        let mut bench = Self::armed_source();
        bench.stop();
        bench.seal(S1);
        bench.views();
        bench
    }

    /// A destination that is ready.
    fn destination() -> Self {
        let mut bench = Self::with(DESTINATION, D1);
        bench.arm(1);
        assert_eq!(bench.views(), []);
        assert_eq!(bench.role.standing(), Standing::Ready);
        bench
    }

    /// A destination that has asked to activate, and has not been answered.
    fn activating() -> Self {
        let mut bench = Self::destination();
        bench.seal(S1);
        bench.views();
        let asks = bench.role.step(Input::Started { member: OTHER });
        assert_eq!(asks, [ask(ANCHOR, 1, Asked::Activate)]);
        bench
    }

    /// A destination that was granted the volumes; the other member does not know.
    fn granted() -> (Self, Vec<Output>) {
        let mut bench = Self::activating();
        let activate = RecordInput::Activate {
            attempt: attempt_of(1),
            name: DESTINATION,
            session: bench.session,
        };
        let outputs = bench.asked(ANCHOR, 1, Asked::Activate, activate);
        (bench, outputs)
    }

    fn at(&mut self, member: usize, input: RecordInput<'_>) {
        let step = self.records[member].step(input);
        self.records[member] = step.unwrap_or_else(|refusal| panic!("{refusal}")).record;
    }

    fn arm(&mut self, attempt: u32) {
        for member in [ANCHOR, OTHER] {
            let plan = plan(attempt);
            let next_epoch = self.records[member].next_epoch;
            self.at(member, RecordInput::Arm { plan: &plan, term: 1, next_epoch, generation: 1 });
        }
    }

    fn seal_one(&mut self, member: usize, session: SessionId) {
        let attempt = attempt_of(1);
        self.at(member, RecordInput::Seal { attempt, session });
        self.at(member, RecordInput::Sealed { attempt, session });
    }

    fn seal(&mut self, session: SessionId) {
        self.seal_one(ANCHOR, session);
        self.seal_one(OTHER, session);
    }

    fn crash(&mut self, member: usize) {
        self.boots[member] += 1;
        let mut armed = self.records[member].clone();
        // What is on the disk in fast mode.
        armed.phase = Phase::Armed;
        self.records[member] = armed.after_restart();
    }

    fn view(&mut self, member: usize) -> Vec<Output> {
        let record = Box::new(self.records[member].without_keys());
        self.role.step(Input::View { member, boot_id: self.boots[member], record })
    }

    fn views(&mut self) -> Vec<Output> {
        let mut outputs = self.view(ANCHOR);
        outputs.extend(self.view(OTHER));
        outputs
    }

    fn stop(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        for member in [ANCHOR, OTHER] {
            outputs.extend(self.role.step(Input::Stopped { member, migrating: true }));
        }
        outputs
    }

    fn answer(&self, member: usize, attempt: u32, outcome: Outcome) -> Box<Answer> {
        let record = &self.records[member];
        let mine = record.owner.as_ref().is_some_and(|o| o.session == self.session);
        let proof = if mine && member == ANCHOR { record.proof(attempt_of(attempt)) } else { None };
        let boot_id = self.boots[member];
        Box::new(Answer { outcome, boot_id, proof, record: record.without_keys() })
    }

    /// A record judges what was asked, and the answer arrives.
    fn asked(
        &mut self,
        member: usize,
        attempt: u32,
        ask: Asked,
        input: RecordInput<'_>,
    ) -> Vec<Output> {
        let outcome = match self.records[member].step(input) {
            Ok(step) => {
                self.records[member] = step.record;
                Outcome::Granted
            }
            Err(refusal) => Outcome::from(&refusal),
        };
        self.hear(member, attempt, ask, outcome)
    }

    fn hear(&mut self, member: usize, attempt: u32, ask: Asked, outcome: Outcome) -> Vec<Output> {
        let answer = self.answer(member, attempt, outcome);
        self.role.step(Input::Answered { member, attempt: attempt_of(attempt), ask, answer })
    }

    fn reclaim_by(&self, session: SessionId) -> RecordInput<'static> {
        let by = By::Backend { name: SOURCE, session };
        RecordInput::Reclaim { attempt: attempt_of(1), by }
    }

    /// The coordinator ends the first try, which the source has won, at both members.
    fn settle_for_source(&mut self, grant: u64) {
        let attempt = attempt_of(1);
        let proof = Proof::new(&plan(1).key, attempt, Side::Source, grant, S1);
        for member in [ANCHOR, OTHER] {
            self.at(member, RecordInput::Settle { attempt, term: 1, proof: Some((S1, proof)) });
        }
    }
}

fn ask(member: usize, attempt: u32, ask: Asked) -> Output {
    Output::Ask { member, attempt: attempt_of(attempt), ask }
}

fn asks(outputs: &[Output], wanted: Asked) -> usize {
    let is = |output: &&Output| matches!(output, Output::Ask { ask, .. } if *ask == wanted);
    outputs.iter().filter(is).count()
}
