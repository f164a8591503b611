//! A test per rule of the machine, against real records; and its standing x
//! input matrix.

use std::fmt::Write;
use std::path::Path;

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
}

fn ask(member: usize, attempt: u32, ask: Asked) -> Output {
    Output::Ask { member, attempt: attempt_of(attempt), ask }
}

fn asks(outputs: &[Output], wanted: Asked) -> usize {
    let is = |output: &&Output| matches!(output, Output::Ask { ask, .. } if *ask == wanted);
    outputs.iter().filter(is).count()
}

#[test]
fn rings_that_stop_under_a_migration_seal_and_others_do_not() {
    let mut bench = Bench::armed_source();
    let reset = Input::Stopped { member: ANCHOR, migrating: false };
    assert_eq!(bench.role.step(reset), []);
    assert_eq!(
        bench.role.step(Input::Stopped { member: OTHER, migrating: true }),
        [Output::Hold { member: OTHER }, ask(OTHER, 1, Asked::Seal)]
    );
    assert!(bench.role.is_held(OTHER) && !bench.role.is_held(ANCHOR));
    // By order, without a migration that the rings could see.
    assert_eq!(
        bench.role.step(Input::Order(Order::Seal)),
        [Output::Hold { member: ANCHOR }, ask(ANCHOR, 1, Asked::Seal)]
    );
}

#[test]
fn a_source_that_stopped_before_it_was_armed_seals_when_it_is() {
    let mut bench = Bench::source();
    assert_eq!(bench.stop(), []);
    bench.arm(1);
    assert_eq!(asks(&bench.views(), Asked::Seal), 2);
}

#[test]
fn a_destination_activates_when_all_are_sealed_and_it_runs() {
    let mut bench = Bench::destination();
    assert_eq!(bench.role.step(Input::Started { member: ANCHOR }), []);
    bench.seal_one(ANCHOR, S1);
    assert_eq!(bench.view(ANCHOR), []);
    bench.seal_one(OTHER, S1);
    assert_eq!(bench.view(OTHER), [ask(ANCHOR, 1, Asked::Activate)]);
    assert!(bench.role.is_held(ANCHOR), "it asks; the anchor decides");
}

#[test]
fn a_destination_with_other_volumes_than_planned_never_activates() {
    let mut bench = Bench::with(DESTINATION, D1);
    bench.role = Role::new(DESTINATION, D1, &VOLUMES[..1]);
    bench.arm(1);
    bench.seal(S1);
    assert_eq!(bench.view(ANCHOR), []);
    assert_eq!(bench.role.step(Input::Started { member: ANCHOR }), []);
    assert_eq!(bench.role.standing(), Standing::Activating);
}

#[test]
fn the_winner_opens_the_others_and_goes_ahead_under_the_reserved_epoch() {
    let (mut bench, outputs) = Bench::granted();
    let proof = bench.records[ANCHOR].proof(attempt_of(1)).expect("decided");
    let open = Some((attempt_of(1), proof));
    assert_eq!(
        outputs,
        [
            Output::Go { member: ANCHOR, epoch: Epoch(2), open },
            Output::Open { member: OTHER, attempt: attempt_of(1), proof },
            Output::Go { member: OTHER, epoch: Epoch(2), open },
        ]
    );
    assert_eq!(bench.role.standing(), Standing::Serving);
    assert_eq!(bench.view(OTHER), [], "nothing twice");
}

#[test]
fn an_open_that_grants_another_epoch_than_guessed_is_obeyed() {
    let (mut bench, _) = Bench::granted();
    let go = bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(4)) });
    assert!(matches!(go[..], [Output::Go { member: OTHER, epoch: Epoch(4), .. }]), "{go:?}");
    assert_eq!(bench.role.granted(OTHER), Some(Epoch(4)));
}

#[test]
fn a_view_that_is_older_than_the_grant_is_no_loss() {
    let mut bench = Bench::activating();
    // An earlier incarnation had the other member opened for it.
    let plan = plan(1);
    let earlier = Proof::new(&plan.key, plan.attempt, Side::Destination, 1, D2);
    bench.at(OTHER, RecordInput::Open { attempt: plan.attempt, session: D2, proof: earlier });
    bench.view(OTHER);
    let attempt = attempt_of(1);
    let activate = RecordInput::Activate { attempt, name: DESTINATION, session: D1 };
    bench.asked(ANCHOR, 1, Asked::Activate, activate);
    bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(4)) });
    assert_eq!(bench.role.parked(), None);
    // But what comes after it is.
    bench.at(OTHER, RecordInput::Claim { name: DESTINATION, session: SessionId(9) });
    let outputs = bench.view(OTHER);
    assert!(outputs.contains(&Output::Park(Parked::Lost)), "{outputs:?}");
}

#[test]
fn who_lost_is_parked_for_ever() {
    let mut bench = Bench::sealed_source();
    let attempt = attempt_of(1);
    bench.at(ANCHOR, RecordInput::Activate { attempt, name: DESTINATION, session: D1 });
    let outputs = bench.view(ANCHOR);
    assert_eq!(
        outputs,
        [
            Output::Hold { member: ANCHOR },
            Output::Hold { member: OTHER },
            Output::Park(Parked::Lost)
        ]
    );
    for input in [
        Input::Started { member: ANCHOR },
        Input::Order(Order::Reclaim),
        Input::Claimed { member: ANCHOR, epoch: Epoch(9) },
        Input::Opened { member: OTHER, epoch: Some(Epoch(9)) },
    ] {
        assert_eq!(bench.role.step(input.clone()), [], "{input:?}");
        assert!(bench.role.is_held(ANCHOR) && bench.role.is_held(OTHER), "{input:?}");
    }
}

#[test]
fn a_source_whose_rings_start_again_reclaims() {
    let mut bench = Bench::sealed_source();
    let started = bench.role.step(Input::Started { member: OTHER });
    assert_eq!(started, [ask(ANCHOR, 1, Asked::Reclaim)]);
    let reclaim = bench.reclaim_by(S1);
    let outputs = bench.asked(ANCHOR, 1, Asked::Reclaim, reclaim);
    assert!(matches!(
        outputs[..],
        [Output::Go { member: ANCHOR, epoch: Epoch(3), .. }, Output::Open { member: OTHER, .. }]
    ));
    // It sealed the other member, so it may not guess: it waits for the answer.
    assert!(bench.role.is_held(OTHER));
    bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(3)) });
    assert_eq!(bench.role.standing(), Standing::Serving);
}

#[test]
fn a_new_process_of_the_source_reclaims_though_its_rings_started_before_it_knew() {
    let mut bench = Bench::with(SOURCE, S2);
    bench.arm(1);
    bench.seal(S1);
    assert_eq!(bench.role.step(Input::Started { member: ANCHOR }), []);
    assert_eq!(bench.view(ANCHOR), [ask(ANCHOR, 1, Asked::Reclaim)]);
}

#[test]
fn a_source_never_denies_a_seal_that_it_sent() {
    let mut bench = Bench::armed_source();
    bench.crash(OTHER);
    assert_eq!(bench.view(OTHER), [ask(OTHER, 1, Asked::Unfreeze { boot_id: 2 })]);

    let mut bench = Bench::sealed_source();
    bench.crash(OTHER);
    let outputs = bench.view(OTHER);
    assert_eq!(asks(&outputs, Asked::Unfreeze { boot_id: 2 }), 0, "{outputs:?}");

    // Nor when it has come back since: the member may have admitted its later epoch.
    let mut bench = Bench::sealed_source();
    bench.role.step(Input::Started { member: ANCHOR });
    let reclaim = bench.reclaim_by(S1);
    bench.asked(ANCHOR, 1, Asked::Reclaim, reclaim);
    bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(3)) });
    bench.crash(OTHER);
    let outputs = bench.view(OTHER);
    assert!(matches!(outputs[..], [Output::Open { member: OTHER, .. }]), "{outputs:?}");
}

#[test]
fn an_unfreeze_meant_for_an_earlier_incarnation_is_asked_again() {
    let mut bench = Bench::armed_source();
    bench.crash(OTHER);
    bench.view(OTHER);
    bench.crash(OTHER);
    assert_eq!(bench.view(OTHER), [], "one at a time");
    let outputs = bench.hear(OTHER, 1, Asked::Unfreeze { boot_id: 2 }, Outcome::Refused);
    assert_eq!(outputs, [ask(OTHER, 1, Asked::Unfreeze { boot_id: 3 })]);
}

#[test]
fn a_destination_that_is_asked_back_abdicates_unless_it_has_activated() {
    let mut bench = Bench::destination();
    bench.seal(S1);
    bench.crash(ANCHOR);
    let wanted_back = bench.reclaim_by(S1);
    bench.at(ANCHOR, wanted_back);
    assert_eq!(bench.views(), [ask(ANCHOR, 1, Asked::Abdicate)]);
    bench.role.step(Input::Started { member: ANCHOR });
    let outputs = bench.hear(ANCHOR, 1, Asked::Abdicate, Outcome::Granted);
    assert!(outputs.contains(&Output::Park(Parked::Abdicated)), "{outputs:?}");

    let mut bench = Bench::activating();
    bench.crash(ANCHOR);
    let wanted_back = bench.reclaim_by(S1);
    bench.at(ANCHOR, wanted_back);
    assert_eq!(asks(&bench.views(), Asked::Abdicate), 0);
}

#[test]
fn a_destination_promises_nothing_for_those_before_it() {
    // It has seen the anchor frozen only: another incarnation may have run.
    let mut bench = Bench::with(DESTINATION, D2);
    bench.arm(1);
    bench.seal(S1);
    bench.crash(ANCHOR);
    let wanted_back = bench.reclaim_by(S1);
    bench.at(ANCHOR, wanted_back);
    assert_eq!(bench.views(), []);
    assert_eq!(bench.role.step(Input::Order(Order::Abdicate)), []);
    assert_eq!(bench.role.standing(), Standing::Standby, "nor is it ready");

    // Nor has it given the try up: with the anchor's seal known it may still win.
    let mut bench = Bench::with(DESTINATION, D2);
    bench.arm(1);
    bench.seal(S1);
    bench.crash(ANCHOR);
    let wanted_back = bench.reclaim_by(S1);
    bench.at(ANCHOR, wanted_back);
    bench.views();
    bench.role.step(Input::Started { member: ANCHOR });
    bench.seal_one(ANCHOR, S1);
    assert_eq!(bench.view(ANCHOR), [ask(ANCHOR, 1, Asked::Activate)]);
}

#[test]
fn who_was_ordered_to_abdicate_never_activates() {
    let mut bench = Bench::destination();
    let order = bench.role.step(Input::Order(Order::Abdicate));
    assert_eq!(order, [ask(ANCHOR, 1, Asked::Abdicate)]);
    bench.seal(S1);
    bench.role.step(Input::Started { member: ANCHOR });
    assert_eq!(asks(&bench.views(), Asked::Activate), 0);
}

#[test]
fn a_destination_is_good_for_one_try() {
    let mut bench = Bench::destination();
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    for member in [ANCHOR, OTHER] {
        let (attempt, plan) = (attempt_of(1), plan(1));
        let proof = Proof::new(&plan.key, attempt, Side::Source, 1, S1);
        let settle = RecordInput::Settle { attempt, term: 1, proof: Some((S1, proof)) };
        bench.at(member, settle);
    }
    bench.arm(2);
    let outputs = bench.view(ANCHOR);
    assert!(outputs.contains(&Output::Park(Parked::Over)), "{outputs:?}");
}

#[test]
fn the_winner_reminds_a_frozen_anchor_when_the_others_are_settled() {
    let (mut bench, _) = Bench::granted();
    let proof = bench.records[ANCHOR].proof(attempt_of(1)).expect("decided");
    let attempt = attempt_of(1);
    bench.at(OTHER, RecordInput::Open { attempt, session: D1, proof });
    bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(2)) });
    bench.at(OTHER, RecordInput::Settle { attempt, term: 1, proof: None });
    bench.view(OTHER);
    bench.role.step(Input::Stopped { member: OTHER, migrating: false });
    let owner = bench.records[ANCHOR]
        .owner
        .replace(crate::access::Owner { name: SOURCE.to_owned(), session: S1 });
    assert_eq!(owner.map(|owner| owner.session), Some(D1));
    bench.crash(ANCHOR);
    assert_eq!(bench.view(ANCHOR), [ask(ANCHOR, 1, Asked::Activate)]);
}

#[test]
fn a_source_that_a_coordinator_settled_while_held_goes_on() {
    let mut bench = Bench::sealed_source();
    let (attempt, plan) = (attempt_of(1), plan(1));
    let proof = Proof::new(&plan.key, attempt, Side::Source, 3, S1);
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    for member in [ANCHOR, OTHER] {
        let settle = RecordInput::Settle { attempt, term: 1, proof: Some((S1, proof)) };
        bench.at(member, settle);
    }
    let outputs = bench.views();
    let goes = outputs.iter().filter(|o| matches!(o, Output::Go { epoch: Epoch(3), .. }));
    assert_eq!(goes.count(), 2, "{outputs:?}");
    assert_eq!(bench.role.standing(), Standing::Serving);
}

#[test]
fn a_wish_to_come_back_does_not_cancel_the_next_try() {
    let mut bench = Bench::armed_source();
    assert_eq!(bench.role.step(Input::Order(Order::Reclaim)), [ask(ANCHOR, 1, Asked::Reclaim)]);
    let reclaim = bench.reclaim_by(S1);
    bench.asked(ANCHOR, 1, Asked::Reclaim, reclaim);
    for member in [ANCHOR, OTHER] {
        let (attempt, plan) = (attempt_of(1), plan(1));
        let proof = Proof::new(&plan.key, attempt, Side::Source, 1, S1);
        let settle = RecordInput::Settle { attempt, term: 1, proof: Some((S1, proof)) };
        bench.at(member, settle);
    }
    bench.views();
    bench.arm(2);
    assert_eq!(asks(&bench.views(), Asked::Reclaim), 0);
    // Without a handoff there is nothing to come back from.
    let mut bench = Bench::source();
    bench.role.step(Input::Order(Order::Reclaim));
    bench.arm(1);
    assert_eq!(asks(&bench.views(), Asked::Reclaim), 0);
}

#[test]
fn a_refused_seal_of_an_older_try_does_not_stand_for_the_new_one() {
    let mut bench = Bench::armed_source();
    bench.stop();
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    for member in [ANCHOR, OTHER] {
        let (attempt, plan) = (attempt_of(1), plan(1));
        let proof = Proof::new(&plan.key, attempt, Side::Source, 1, S1);
        let settle = RecordInput::Settle { attempt, term: 1, proof: Some((S1, proof)) };
        bench.at(member, settle);
    }
    bench.arm(2);
    bench.views();
    let outputs = bench.hear(OTHER, 1, Asked::Seal, Outcome::NoSuchHandoff);
    assert!(outputs.contains(&ask(OTHER, 2, Asked::Seal)), "{outputs:?}");
}

#[test]
fn a_count_that_can_never_be_reached_brings_the_source_back() {
    let mut bench = Bench::armed_source();
    bench.stop();
    let outputs = bench.hear(OTHER, 1, Asked::Seal, Outcome::NotSealed);
    assert_eq!(outputs, [ask(ANCHOR, 1, Asked::Reclaim)]);
    let mut bench = Bench::sealed_source();
    let outputs = bench.role.step(Input::Stuck { member: OTHER });
    assert_eq!(outputs, [ask(ANCHOR, 1, Asked::Reclaim)]);
}

#[test]
fn a_source_that_another_incarnation_replaced_parks() {
    let mut bench = Bench::armed_source();
    bench.at(OTHER, RecordInput::Claim { name: SOURCE, session: S2 });
    let outputs = bench.view(OTHER);
    assert!(outputs.contains(&Output::Park(Parked::Lost)), "{outputs:?}");
}

/// Every standing against every input, as text.
#[test]
fn the_whole_matrix() {
    let mut parked = Bench::sealed_source();
    parked.hear(ANCHOR, 1, Asked::Reclaim, Outcome::Lost);
    let mut sealing = Bench::armed_source();
    sealing.stop();
    let mut reclaiming = Bench::sealed_source();
    reclaiming.role.step(Input::Started { member: ANCHOR });
    let benches = [
        ("serving", Bench::source()),
        ("serving, armed", Bench::armed_source()),
        ("sealing", sealing),
        ("sealed", Bench::sealed_source()),
        ("reclaiming", reclaiming),
        ("standby", Bench::with(DESTINATION, D1)),
        ("ready", Bench::destination()),
        ("activating", Bench::activating()),
        ("granted", Bench::granted().0),
        ("parked", parked),
    ];
    let mut table = String::new();
    for (name, bench) in &benches {
        for (input_name, input) in inputs(bench) {
            let mut role = bench.role.clone();
            let outputs = role.step(input);
            let outputs: Vec<String> = outputs.iter().map(say).collect();
            let outputs = if outputs.is_empty() { "-".to_owned() } else { outputs.join(", ") };
            let standing = role.standing();
            let _ = writeln!(table, "{name} + {input_name} -> {standing:?}: {outputs}");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/handoff/role/matrix.txt");
    if std::env::var_os("BATON_BLESS").is_some() {
        std::fs::write(&path, &table).expect("the source tree can be written");
    }
    let written = std::fs::read_to_string(&path).expect("the file is in the source tree");
    let differs = written.lines().zip(table.lines()).find(|(written, now)| written != now);
    assert_eq!(differs, None, "the matrix differs from the code");
    assert_eq!(written.lines().count(), table.lines().count());
}

fn inputs(bench: &Bench) -> Vec<(&'static str, Input)> {
    let (member, attempt) = (OTHER, attempt_of(1));
    let view = |record: AccessRecord, boot_id| Input::View {
        member,
        boot_id,
        record: Box::new(record.without_keys()),
    };
    let now = bench.records[OTHER].clone();
    let fence = RecordInput::Fence { term: None, nominee: None, seen: None };
    let fenced = now.step(fence).expect("always").record;
    let answered = |member, ask, outcome| Input::Answered {
        member,
        attempt,
        ask,
        answer: bench.answer(member, 1, outcome),
    };
    vec![
        ("view, the same", view(now.clone(), 1)),
        ("view, fenced", view(fenced, 1)),
        ("view, after a restart", view(now.after_restart(), 2)),
        ("claimed", Input::Claimed { member, epoch: Epoch(9) }),
        ("started", Input::Started { member }),
        ("stopped", Input::Stopped { member, migrating: false }),
        ("stopped under a migration", Input::Stopped { member, migrating: true }),
        ("seal: not sealed", answered(OTHER, Asked::Seal, Outcome::NotSealed)),
        ("seal: refused", answered(OTHER, Asked::Seal, Outcome::Refused)),
        ("activate: granted, unproven", answered(ANCHOR, Asked::Activate, Outcome::Granted)),
        ("activate: lost", answered(ANCHOR, Asked::Activate, Outcome::Lost)),
        ("activate: no such", answered(ANCHOR, Asked::Activate, Outcome::NoSuchHandoff)),
        ("reclaim: unknown", answered(ANCHOR, Asked::Reclaim, Outcome::Unknown)),
        ("reclaim: lost", answered(ANCHOR, Asked::Reclaim, Outcome::Lost)),
        ("abdicate: granted", answered(ANCHOR, Asked::Abdicate, Outcome::Granted)),
        ("opened", Input::Opened { member, epoch: Some(Epoch(9)) }),
        ("open refused", Input::Opened { member, epoch: None }),
        ("stuck", Input::Stuck { member }),
        ("order seal", Input::Order(Order::Seal)),
        ("order activate", Input::Order(Order::Activate)),
        ("order abdicate", Input::Order(Order::Abdicate)),
        ("order reclaim", Input::Order(Order::Reclaim)),
        ("a member that is not there", Input::Started { member: 9 }),
    ]
}

fn say(output: &Output) -> String {
    match output {
        Output::Ask { member, attempt, ask } => {
            format!("ask {member} {ask:?} try {}", attempt.attempt)
        }
        Output::Open { member, .. } => format!("open {member}"),
        Output::Hold { member } => format!("hold {member}"),
        Output::Go { member, epoch, open } => {
            format!("go {member} e{epoch}{}", if open.is_some() { " with proof" } else { "" })
        }
        Output::Park(why) => format!("park {why:?}"),
    }
}
