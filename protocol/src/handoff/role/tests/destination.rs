//! The destination: when it activates, opens the others, abdicates.

use super::*;

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
