//! Promise: whatever goes wrong during handoffs, no rule of the protocol is
//! broken; and a world in which the glue breaks one is noticed.
//!
//! A failure names its seed; `baton-sim --seed SEED --trace` prints that world.

use baton_simulator::bug::Bug;
use baton_simulator::fault::Hits;
use baton_simulator::run;

const HANDOFFS: u64 = 10_000;

#[test]
fn no_rule_is_broken_in_ten_thousand_handoffs() {
    let (mut hits, mut handoffs) = (Hits::default(), 0);
    for seed in 1.. {
        if handoffs >= HANDOFFS {
            break;
        }
        let report = run(seed, None, false);
        let step = report.trace.steps();
        if let Some(violation) = report.violation {
            panic!("seed={seed} step={step} {violation}; baton-sim --seed {seed} --trace");
        }
        hits.add(&report.hits);
        handoffs += report.handoffs;
    }
    // What never went wrong was not tested.
    assert_eq!(hits.missing(), Vec::<String>::new());
}

#[test]
fn a_seed_gives_the_same_world_again() {
    let hashes =
        |keep| -> Vec<u64> { (1..50).map(|seed| run(seed, None, keep).trace.hash()).collect() };
    let first = hashes(false);
    assert_eq!(first, hashes(true));
    let mut different = first.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), first.len(), "two seeds gave one world");
}

/// A bug must be found, and by the rule that it breaks.
fn found(bug: Bug, seeds: u64, rules: &[&str]) {
    let violation = (1..=seeds).find_map(|seed| run(seed, Some(bug), false).violation);
    let Some(violation) = violation else { panic!("{bug} was not found in {seeds} worlds") };
    assert!(rules.contains(&violation.rule), "{bug} was found as {violation}");
}

#[test]
fn a_server_that_ignores_epochs_is_found() {
    found(Bug::EpochIgnored, 2_000, &["I1", "I4", "I7"]);
}

#[test]
fn a_seal_before_the_drain_is_found() {
    found(Bug::NoDrain, 500, &["I1", "I4"]);
}

#[test]
fn a_destination_that_trusts_the_anchors_seal_alone_is_found() {
    // Or nobody gets out of it any more.
    found(Bug::AnchorSealOnly, 10_000, &["I3", "I4", "I5", "I7", "end"]);
}

#[test]
fn a_source_that_resumes_without_asking_is_found() {
    found(Bug::NoReclaim, 500, &["I4", "I6", "I9"]);
}

#[test]
fn a_restart_that_forgets_the_freeze_is_found() {
    found(Bug::FrozenForgotten, 2_000, &["I4", "I6"]);
}

#[test]
fn a_seal_that_ignores_counts_is_found() {
    found(Bug::CountsIgnored, 10_000, &["I2", "I3", "I5"]);
}

#[test]
fn reserved_epochs_that_stay_behind_a_claim_are_found() {
    found(Bug::EpochsKept, 2_000, &["I1", "I4"]);
}

#[test]
fn a_server_that_carries_out_twice_is_found() {
    found(Bug::WindowForgotten, 20_000, &["I3"]);
}

#[test]
fn an_arm_that_comes_late_is_found() {
    found(Bug::LateArm, 5_000, &["I1", "I6", "I7", "I9"]);
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    found(Bug::FlushForgotten, 500, &["I2"]);
}
