//! One handoff after another of the same volume: who was named once is not named for ever.

mod common;

use baton_protocol::handoff::{Ask, HandoffId, Outcome, Try};
use baton_protocol::{AccessMode, Opcode, Status};
use common::Fixture;
use common::handoff::{
    Backend, DESTINATION, Member, S, SOURCE, TRY, arm_try, plan, which, which_try,
};

const NEXT: Try = Try { attempt: 2, ..TRY };
const THIRD_HOST: &str = "host-c/vm";

fn volume(fixture: &Fixture) -> (Member, Backend) {
    let volume = Member::create(fixture.data, fixture.admin, "d");
    let source = volume.source();
    (volume, source)
}

/// Whatever it says and under whichever try, it gets nothing.
fn has_no_right(standby: &mut Backend, attempts: &[Try]) {
    for &attempt in attempts {
        let told = standby.control.ask_of(attempt, Ask::Activate);
        assert!(
            !matches!(told.outcome, Outcome::Granted | Outcome::NotSealed),
            "{attempt:?}: {told:?}"
        );
        assert_eq!(told.proof, None);
    }
    for opcode in [Opcode::Read, Opcode::Flush, Opcode::Discard] {
        let len = if opcode == Opcode::Flush { 0 } else { 512 };
        assert_eq!(standby.queue.call(opcode, 0, len).0, Status::NotPermitted);
    }
    assert_eq!(standby.queue.write(0, &[9; 512]), Status::NotPermitted);
}

/// One that idles, one of a host that is not named now, one of a try that is over, and
/// one whose host has a newer process for this try.
#[test]
fn row_08_a_standby_that_is_not_named_has_no_right() {
    for mode in ["fast", "base"] {
        let fixture = Fixture::start();
        let (volume, mut source) = volume(&fixture);
        let mut idle = volume.standby(THIRD_HOST, 0xc);
        let mut aborted = volume.destination();
        has_no_right(&mut idle, &[TRY]);
        arm_try(&[&volume], mode, TRY);
        assert_eq!(volume.post("reclaim", &which(1)).0, 200);
        assert_eq!(volume.post("settle", &which(1)).0, 200);
        has_no_right(&mut aborted, &[TRY, NEXT]);

        arm_try(&[&volume], mode, NEXT);
        let counts = source.drained();
        // While it is armed, when it is sealed, and when it is decided.
        let mut named = volume.standby(DESTINATION, 0xb2);
        has_no_right(&mut idle, &[TRY, NEXT]);
        has_no_right(&mut aborted, &[TRY, NEXT]);
        let sealed = source.control.ask_of(NEXT, Ask::Seal(counts));
        assert_eq!(sealed.outcome, Outcome::Granted);
        has_no_right(&mut idle, &[TRY, NEXT]);
        has_no_right(&mut aborted, &[TRY, NEXT]);
        assert_eq!(volume.phase(), "sealed");
        let won = named.control.ask_of(NEXT, Ask::Activate);
        assert_eq!(won.outcome, Outcome::Granted);
        assert_eq!(idle.queue.open(NEXT, won.proof.expect("the winner's")), Status::StaleEpoch);
        assert_eq!(aborted.queue.open(NEXT, won.proof.expect("the winner's")), Status::StaleEpoch);
        has_no_right(&mut idle, &[TRY, NEXT]);
    }
}

/// From host to host to host: the next may be armed when the last is settled, and
/// from the host that won it.
#[test]
fn row_34_the_next_handoff_needs_the_last_one_settled() {
    for mode in ["fast", "base"] {
        for returns in [false, true] {
            let fixture = Fixture::start();
            let (volume, mut source) = volume(&fixture);
            let mut second = volume.destination();
            let mut third = volume.standby(THIRD_HOST, 0xc);
            arm_try(&[&volume], mode, TRY);
            assert_eq!(source.queue.write(0, &[1; 512]), Status::Ok);
            let onward = Try { id: HandoffId(0x9999), attempt: 1 };
            let winner = if returns { SOURCE } else { DESTINATION };
            let mut next = plan(&[&volume], mode, onward);
            (next["from"], next["to"]) = (winner.into(), THIRD_HOST.into());
            let refused = |phase: &str| {
                assert_eq!(volume.phase(), phase);
                let (status, problem) = volume.post("arm", &volume.arming(1, &next));
                let kind = problem["type"].as_str();
                assert_eq!((status, kind), (409, Some("baton:handoff-in-progress")), "{phase}");
                assert_eq!(problem["handoff"], TRY.id.to_string());
            };
            refused("armed");
            assert_eq!(source.seal().outcome, Outcome::Granted);
            refused("sealed");
            let owner = if returns {
                let proof = source.control.wins(Ask::Reclaim);
                source.open(proof);
                refused("reclaimed");
                &mut source
            } else {
                let proof = second.control.wins(Ask::Activate);
                second.open(proof);
                refused("active");
                &mut second
            };
            assert_eq!(volume.post("settle", &which(1)).0, 200);
            // Not from a host that is not the owner.
            let mut wrong = next.clone();
            wrong["from"] = if returns { DESTINATION } else { SOURCE }.into();
            let (status, problem) = volume.post("arm", &volume.arming(1, &wrong));
            assert_eq!((status, problem["type"].as_str()), (409, Some("baton:not-owner")));
            let (status, record) = volume.post("arm", &volume.arming(1, &next));
            assert_eq!((status, record["phase"].as_str()), (200, Some("armed")));

            let counts = owner.drained();
            let sealed = owner.control.ask_of(onward, Ask::Seal(counts));
            assert_eq!(sealed.outcome, Outcome::Granted);
            let won = third.control.ask_of(onward, Ask::Activate);
            assert_eq!(third.queue.open(onward, won.proof.expect("granted")), Status::Ok);
            assert_eq!(third.queue.read(0, 512), [1; 512]);
            // Nobody of the hosts before gets anything.
            let mut late = volume.control(SOURCE, S, AccessMode::Standby, 0);
            for attempt in [TRY, onward] {
                let told = late.ask_of(attempt, Ask::Reclaim);
                assert_eq!(told.proof, None, "{told:?}");
            }
            assert_eq!(volume.post("settle", &which_try(1, onward)).0, 200);
            assert_eq!(volume.record()["owner"]["name"], THIRD_HOST);
            assert_eq!(third.queue.write(0, &[2; 512]), Status::Ok);
        }
    }
}
