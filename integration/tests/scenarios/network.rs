//! The network is slow, or cuts the source off.

use crate::scene::{SOON, Scene};
use baton_integration::blk::Request;
use baton_integration::faults::history::{Event, What, now_ns};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use std::time::Duration;

fn answered_after(events: &[Event], at_ns: u64) -> Option<&Event> {
    events.iter().find(|event| event.what == What::Complete && event.at_ns > at_ns)
}

#[test]
fn f3_what_a_cut_off_source_says_too_late_changes_nothing() {
    let (mut scene, proxies) = Scene::new("f3", 1, 1, true);
    scene.stand_by();
    let moving = scene.prepare();
    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    let sealed = now_ns();
    // From now on nothing of the source arrives, and it is told to go on.
    proxies[0].hold_requests();
    scene.guest.order("run").unwrap();
    moving.next.load(&moving.saved).unwrap();
    moving.next.order("run").unwrap();
    moving.next.wait_progress(10, SOON).unwrap();
    // Its RECLAIM, and whatever it sent with it, arrive now.
    proxies[0].release_requests();
    scene.hosts[0].wait_standing("parked").unwrap();
    moving.next.wait_progress(20, SOON).unwrap();
    let source = scene.guest.history().unwrap();
    assert_eq!(answered_after(&source, sealed), None, "the source lost");
    scene.past = source.into_iter().filter(|event| event.at_ns <= sealed).collect();
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "destination");
    scene.guest = moving.next;
    assert!(scene.judge() > 50);
}

/// Row 9 of the failure table: the source is cut off before it stopped.
#[test]
fn row_09_a_source_that_is_cut_off_before_its_seal_is_not_succeeded() {
    let (mut scene, proxies) = Scene::new("row9", 1, 1, true);
    scene.stand_by();
    let moving = scene.prepare();
    proxies[0].hold_requests();
    // The orchestrator starts the other side all the same, and then gives up.
    drop(moving.next);
    let mut rogue = RawFrontend::connect(scene.there().socket(0), Options::default()).unwrap();
    rogue.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
    rogue.queue(0).kick().unwrap();
    scene.there().wait_standing("activating").unwrap();
    assert_eq!(rogue.queue(0).wait_used(Duration::from_millis(100)).unwrap(), None);
    assert_eq!(scene.fleet.reclaim(&moving.attempt).unwrap()["outcome"], "source");
    scene.there().wait_standing("parked").unwrap();
    proxies[0].release_requests();
    scene.guest.wait_progress(20, SOON).unwrap();
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "source");
    assert!(scene.judge() > 30);
}

#[test]
fn f4_a_slow_network_that_reorders_and_cuts_only_delays() {
    let (mut scene, proxies) = Scene::new("f4", 2, 2, true);
    scene.stand_by();
    let moving = scene.prepare();
    for proxy in &proxies {
        proxy.delay_replies(Duration::from_millis(500));
    }
    // Connections that break make the client send again what was not answered: duplicates, from the server's view.
    for _ in 0..3 {
        scene.guest.wait_progress(2, SOON).unwrap();
        proxies.iter().for_each(Proxy::cut);
    }
    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    scene.go_on(moving);
    assert!(scene.judge() > 50);
}
