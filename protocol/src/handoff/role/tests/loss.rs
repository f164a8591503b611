//! Who has lost and is parked, and who has not.

use super::*;

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

/// It has heard nothing of the try that it was started for, and its machine runs.
fn hung_for(name: &str, attempt: Try) -> Bench {
    let mut bench = Bench::with(name, D1);
    bench.role = bench.role.only_for(attempt);
    for member in [ANCHOR, OTHER] {
        bench.role.step(Input::Started { member });
    }
    bench
}

#[test]
fn a_standby_that_hung_before_it_heard_of_its_try_takes_no_other() {
    for attempt in [attempt_of(2), Try { id: HandoffId(9), attempt: 1 }] {
        let mut bench = hung_for(DESTINATION, attempt);
        bench.arm(1);
        bench.seal(S1);
        let outputs = bench.views();
        assert!(outputs.contains(&Output::Park(Parked::OtherTry)), "{attempt}: {outputs:?}");
        // Nor is it the source's next process, when its host's turn has come and gone.
        let mut bench = hung_for(SOURCE, attempt);
        bench.arm(1);
        let outputs = bench.views();
        assert!(outputs.contains(&Output::Park(Parked::OtherTry)), "{attempt}: {outputs:?}");
    }
}

#[test]
fn a_standby_takes_the_try_that_it_was_started_for() {
    let mut bench = hung_for(DESTINATION, attempt_of(1));
    bench.arm(1);
    bench.seal(S1);
    assert_eq!(bench.views(), [ask(ANCHOR, 1, Asked::Activate)]);
}

#[test]
fn a_standby_hears_that_its_try_is_over_though_it_never_heard_of_it() {
    let mut bench = hung_for(DESTINATION, attempt_of(1));
    bench.arm(1);
    bench.seal(S1);
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    bench.settle_for_source(1);
    let outputs = bench.view(ANCHOR);
    assert!(outputs.contains(&Output::Park(Parked::Lost)), "{outputs:?}");
}

#[test]
fn a_destination_is_good_for_one_try() {
    let mut bench = Bench::destination();
    let reclaim = bench.reclaim_by(S1);
    bench.at(ANCHOR, reclaim);
    bench.settle_for_source(1);
    bench.arm(2);
    let outputs = bench.view(ANCHOR);
    assert!(outputs.contains(&Output::Park(Parked::OtherTry)), "{outputs:?}");
}

#[test]
fn a_source_that_another_incarnation_replaced_parks() {
    let mut bench = Bench::armed_source();
    bench.at(OTHER, RecordInput::Claim { name: SOURCE, session: S2 });
    let outputs = bench.view(OTHER);
    assert!(outputs.contains(&Output::Park(Parked::Lost)), "{outputs:?}");
}

/// The record of a member after its volume was fenced for the destination's
/// host, started there from its disk, and armed for the way back.
fn on_the_way_back(bench: &Bench, member: usize) -> AccessRecord {
    let nominee = Some(DESTINATION);
    let fence = RecordInput::Fence { term: None, nominee, seen: None };
    let claim = RecordInput::Claim { name: DESTINATION, session: D2 };
    let fenced = bench.records[member].step(fence).expect("always").record;
    let claimed = fenced.step(claim).expect("nominated").record;
    let plan = Plan {
        attempt: Try { id: HandoffId(2), attempt: 1 },
        from: DESTINATION.to_owned(),
        to: SOURCE.to_owned(),
        ..plan(1)
    };
    let next_epoch = claimed.next_epoch;
    let arm = RecordInput::Arm { plan: &plan, term: 1, next_epoch, generation: 1 };
    claimed.step(arm).expect("planned for it").record
}

fn show(bench: &mut Bench, member: usize, record: &AccessRecord) -> Vec<Output> {
    let record = Box::new(record.without_keys());
    bench.role.step(Input::View { member, boot_id: 1, record })
}

#[test]
fn an_owner_that_hung_until_its_hosts_next_turn_is_parked() {
    // Its machine runs all the while; nothing but the epoch says that somebody
    // else has had the volume since.
    let mut bench = Bench::source();
    let armed = on_the_way_back(&bench, ANCHOR);
    let outputs = show(&mut bench, ANCHOR, &armed);
    assert_eq!(outputs.last(), Some(&Output::Park(Parked::Lost)));
    // Even if the handoff is sealed when it hears of it.
    let mut bench = Bench::source();
    let attempt = Try { id: HandoffId(2), attempt: 1 };
    let seal = RecordInput::Seal { attempt, session: D2 };
    let sealed = RecordInput::Sealed { attempt, session: D2 };
    let record = armed.step(seal).expect("the owner").record;
    let record = record.step(sealed).expect("the owner").record;
    assert_eq!(record.phase, Phase::Sealed);
    let outputs = show(&mut bench, ANCHOR, &record);
    assert_eq!(outputs.last(), Some(&Output::Park(Parked::Lost)));
}

#[test]
fn a_destination_that_hung_until_its_host_is_the_source_is_parked() {
    let mut bench = Bench::destination();
    bench.role.step(Input::Started { member: ANCHOR });
    let armed = on_the_way_back(&bench, ANCHOR);
    let outputs = show(&mut bench, ANCHOR, &armed);
    assert_eq!(outputs.last(), Some(&Output::Park(Parked::OtherTry)));
    assert_eq!(asks(&outputs, Asked::Reclaim), 0);
}
