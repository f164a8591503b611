//! The accidents that `splitbrain_on_qsd.rs` shows on the peer, on Baton: one side is parked, the volume is intact.

use baton_integration::guest::skip_without_qemu;
use baton_integration::splitbrain::baton::BatonStack;
use baton_integration::splitbrain::{
    Outcome, Stack, Step, Story, Verification, replay_dead_source_backend,
    replay_frozen_destination,
};
use baton_integration::workspace::TestDir;
use std::path::Path;

fn replay(
    name: &str,
    run: fn(&Path, &mut dyn Stack, &mut Story<'_>) -> anyhow::Result<Outcome>,
) -> Outcome {
    let dir = TestDir::new(name).unwrap();
    let mut stack = BatonStack::start(dir.path()).unwrap();
    let mut watch = |step: &Step| eprintln!("{:6} ms  {}", step.at_ms, step.text);
    let outcome = run(dir.path(), &mut stack, &mut Story::new(&mut watch)).unwrap();
    eprintln!("{outcome:?}");
    outcome
}

/// Both QEMUs run the guest; the storage lets one of them write.
#[test]
fn row_18_a_frozen_destination_is_parked_when_it_thaws() {
    if skip_without_qemu("row_18_a_frozen_destination_is_parked_when_it_thaws") {
        return;
    }
    let outcome = replay("baton-frozen", replay_frozen_destination);
    assert_eq!((&*outcome.source.vm, &*outcome.destination.vm), ("running", "running"));
    assert!(outcome.source.writes > 0, "{outcome:?}");
    assert_eq!(outcome.destination.writes, 0, "{outcome:?}");
    assert_eq!(outcome.source.verification, Verification::Good);
    assert_eq!(outcome.destination.verification, Verification::Stalled);
}

/// QEMU completes the migration although the source never sealed; the guest goes on on the source.
#[test]
fn row_11_a_dead_source_backend_lets_nobody_activate() {
    if skip_without_qemu("row_11_a_dead_source_backend_lets_nobody_activate") {
        return;
    }
    let outcome = replay("baton-dead", replay_dead_source_backend);
    assert_eq!(outcome.destination.writes, 0, "{outcome:?}");
    assert!(outcome.source.writes > 0, "{outcome:?}");
    assert_eq!(outcome.source.verification, Verification::Good);
    assert_eq!(outcome.destination.verification, Verification::Stalled);
}
