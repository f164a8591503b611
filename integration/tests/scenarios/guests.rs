//! Guests and their VMMs that do what they should not, and one that moves all the time.

use crate::scene::{OWNERS, SOON, Scene};
use baton_integration::blk::Request;
use baton_integration::raw_frontend::{Options, RawFrontend};
use std::time::Duration;

#[test]
fn f14_a_standby_reads_and_writes_nothing_however_hard_its_vmm_tries() {
    let (mut scene, _) = Scene::new("f14", 1, 1, false);
    scene.stand_by();
    scene.fleet.arm(OWNERS[0], OWNERS[1]).unwrap();
    scene.there().wait_standing("ready").unwrap();
    // Nobody has stopped the guest; this one starts all the same.
    let mut rogue = RawFrontend::connect(scene.there().socket(0), Options::default()).unwrap();
    let requests =
        [Request::Write { sector: 0, data: &[9; 4096] }, Request::Read { sector: 0, len: 4096 }];
    for request in &requests {
        rogue.queue(0).submit(request).unwrap();
    }
    rogue.queue(0).kick().unwrap();
    scene.guest.wait_progress(50, SOON).unwrap();
    assert_eq!(rogue.queue(0).wait_used(Duration::from_millis(100)).unwrap(), None);
    assert_eq!(scene.there().standing().unwrap(), "activating");
    assert!(scene.judge() > 70);
}

#[test]
fn f16_a_guest_that_resets_its_disk_during_pre_copy_keeps_it() {
    let (mut scene, _) = Scene::new("f16", 1, 1, false);
    scene.stand_by();
    let moving = scene.prepare();
    // Rings stop and start again while the dirty log is on: to the backend each looks like the end of a migration.
    scene.guest.order("log").unwrap();
    for _ in 0..10 {
        scene.guest.order("stop").unwrap();
        scene.guest.order("run").unwrap();
        scene.guest.wait_progress(5, SOON).unwrap();
        scene.guest.order("log").unwrap();
    }
    scene.here().wait_standing("serving").unwrap();
    // The first reset ended the handoff; the guest has its disk, and another can be armed.
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "source");
    drop(moving);
    assert!(scene.judge() > 70);
    let again = scene.fleet.arm(OWNERS[0], OWNERS[1]).unwrap();
    assert_eq!(scene.fleet.reclaim(&again).unwrap()["outcome"], "source");
}

/// A hundred times in a test run; `BATON_PING_PONG` times by wish.
#[test]
fn f18_a_guest_that_moves_to_and_fro_loses_nothing() {
    let rounds = std::env::var("BATON_PING_PONG").ok().map_or(100, |text| text.parse().unwrap());
    let (mut scene, _) = Scene::new("f18", 2, 2, false);
    scene.stand_by();
    for _ in 0..rounds {
        let moving = scene.prepare();
        scene.stop_guest(&moving);
        scene.go_on(moving);
        scene.stand_by_again();
    }
    let answers = scene.judge();
    assert!(answers > 40 * rounds, "{answers}");
}
