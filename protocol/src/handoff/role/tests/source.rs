//! The source: when it seals, comes back, unfreezes.

use super::*;

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
fn seals_leave_together_when_the_last_ring_of_the_vm_has_stopped() {
    for last in [ANCHOR, OTHER] {
        let mut bench = Bench::armed_source();
        let first = if last == ANCHOR { OTHER } else { ANCHOR };
        let outputs = bench.role.step(Input::Stopped { member: first, migrating: true });
        assert_eq!(outputs, [Output::Hold { member: first }]);
        assert_eq!(bench.views(), [], "news of any member changes nothing");
        assert_eq!(bench.role.standing(), Standing::Serving);
        let outputs = bench.role.step(Input::Stopped { member: last, migrating: true });
        assert_eq!(asks(&outputs, Asked::Seal), 2, "{outputs:?}");
        assert!(outputs.contains(&Output::Hold { member: last }), "{outputs:?}");
        assert_eq!(bench.role.standing(), Standing::Sealing);
    }
}

#[test]
fn a_disk_whose_rings_start_again_before_the_others_stopped_goes_on_and_so_does_the_handoff() {
    let mut bench = Bench::armed_source();
    bench.role.step(Input::Stopped { member: OTHER, migrating: true });
    let go = Output::Go { member: OTHER, epoch: Epoch(1), open: None };
    assert_eq!(bench.role.step(Input::Started { member: OTHER }), [go]);
    assert_eq!(bench.role.standing(), Standing::Serving);
    assert_eq!(asks(&bench.stop(), Asked::Seal), 2);
    // After its seal was sent only the anchor can say so.
    let started = bench.role.step(Input::Started { member: OTHER });
    assert_eq!(started, [ask(ANCHOR, 1, Asked::Reclaim)]);
}

#[test]
fn a_member_that_freezes_before_the_others_stopped_is_told_that_it_was_not_sealed() {
    let mut bench = Bench::armed_source();
    bench.role.step(Input::Stopped { member: OTHER, migrating: true });
    bench.crash(OTHER);
    assert_eq!(bench.view(OTHER), [ask(OTHER, 1, Asked::Unfreeze { boot_id: 2 })]);
    assert!(bench.role.is_held(OTHER), "it will be sealed");
}

#[test]
fn a_winner_that_is_the_next_source_shows_no_old_decision_when_a_disk_goes_on() {
    let (mut bench, _) = Bench::granted();
    bench.role.step(Input::Opened { member: OTHER, epoch: Some(Epoch(2)) });
    bench.role.step(Input::Started { member: ANCHOR });
    let attempt = attempt_of(1);
    let proof = bench.records[ANCHOR].proof(attempt).expect("it has won");
    bench.at(OTHER, RecordInput::Open { attempt, session: D1, proof });
    let plan = Plan { from: DESTINATION.to_owned(), to: SOURCE.to_owned(), ..plan(2) };
    for member in [ANCHOR, OTHER] {
        bench.at(member, RecordInput::Settle { attempt, term: 1, proof: Some((D1, proof)) });
        let next_epoch = bench.records[member].next_epoch;
        bench.at(member, RecordInput::Arm { plan: &plan, term: 1, next_epoch, generation: 1 });
    }
    assert_eq!(bench.views(), []);
    assert_eq!(
        bench.role.step(Input::Stopped { member: OTHER, migrating: true }),
        [Output::Hold { member: OTHER }]
    );
    let go = Output::Go { member: OTHER, epoch: Epoch(2), open: None };
    assert_eq!(bench.role.step(Input::Started { member: OTHER }), [go]);
}

#[test]
fn a_process_whose_machine_never_came_does_not_seal_by_order() {
    // The one before it was killed with requests in flight, and the VMM took
    // them for done.
    let mut bench = Bench::with(SOURCE, S1);
    for member in [ANCHOR, OTHER] {
        bench.role.step(Input::Claimed { member, epoch: Epoch(1) });
    }
    bench.arm(1);
    assert_eq!(bench.views(), []);
    assert_eq!(bench.role.step(Input::Order(Order::Seal)), []);
    // A disk that the guest does not use is sealed with the others.
    bench.role.step(Input::Started { member: ANCHOR });
    bench.role.step(Input::Stopped { member: ANCHOR, migrating: true });
    assert_eq!(asks(&bench.role.step(Input::Order(Order::Seal)), Asked::Seal), 1);
}

#[test]
fn a_source_that_stopped_before_it_was_armed_seals_when_it_is() {
    let mut bench = Bench::source();
    assert_eq!(bench.stop(), []);
    bench.arm(1);
    assert_eq!(asks(&bench.views(), Asked::Seal), 2);
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
fn a_source_that_a_coordinator_settled_while_held_goes_on() {
    let mut bench = Bench::sealed_source();
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    bench.settle_for_source(3);
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
    bench.settle_for_source(1);
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
    bench.settle_for_source(1);
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
