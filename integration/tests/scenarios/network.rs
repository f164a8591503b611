//! The network is slow, or cuts the source off.

use crate::scene::{SOON, Scene};
use baton_integration::baton::wait_until;
use baton_integration::blk::Request;
use baton_integration::faults::guest::{BLOCK_BYTES, BLOCKS};
use baton_integration::faults::history::{Event, What, now_ns};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::raw_wire::{Queue, STALE_EPOCH, Who};
use serde_json::json;
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

/// A write that was on its way when its sender had sealed and gone, as any switch may hold one back.
#[test]
fn f3_writes_that_arrive_when_the_destination_runs_are_refused_and_counted() {
    let (mut scene, _) = Scene::new("f3-late", 1, 1, false);
    scene.stand_by();
    let moving = scene.prepare();
    let record = scene.fleet.record(0).unwrap();
    let owner = &record["owner"];
    // One more connection of the source's own session, by a way of its own.
    let way = Proxy::start(scene.fleet.servers[0].data_address(), 1).unwrap();
    let source = Who {
        owner: owner["name"].as_str().unwrap(),
        volume: &scene.fleet.members[0].volume,
        session: u64::from_str_radix(owner["session"].as_str().unwrap(), 16).unwrap(),
    };
    let epoch = record["epoch"].as_u64().unwrap();
    let mut late = Queue::join(way.address(), source, epoch, 7).unwrap();
    way.hold_requests();
    let heard = way.request_bytes();
    let poison = vec![0x66; BLOCK_BYTES];
    for block in 0..BLOCKS {
        late.send_write(u64::from(block) * BLOCK_BYTES as u64, &poison).unwrap();
    }
    let sent = u64::from(BLOCKS) * BLOCK_BYTES as u64;
    wait_until("the writes are under way", SOON, || way.request_bytes() > heard + sent).unwrap();

    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    scene.go_on(moving);
    let server = &scene.fleet.servers[0];
    let before = server.metric("baton_stale_requests_total").unwrap();
    way.release_requests();
    for block in 0..BLOCKS {
        assert_eq!(late.status().unwrap(), STALE_EPOCH, "block {block}");
    }
    let stale = server.metric("baton_stale_requests_total").unwrap();
    assert_eq!(stale - before, f64::from(BLOCKS));
    // It reads all of them once more.
    assert!(scene.judge() > 50);
}

/// Row 9 of the failure table: the source is cut off before it stopped. Its VMM waits in the stop, and what it has sent
/// may still arrive.
#[test]
fn row_09_a_source_that_is_cut_off_before_its_seal_is_not_succeeded() {
    let (mut scene, proxies) = Scene::new("row9", 1, 1, true);
    scene.stand_by();
    let moving = scene.prepare();
    proxies[0].hold_requests();
    let heard = proxies[0].request_bytes();
    wait_until("a write is under way", SOON, || {
        proxies[0].request_bytes() > heard + BLOCK_BYTES as u64
    })
    .unwrap();
    scene.guest.order("log").unwrap();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| scene.say(scene.runs, &json!({ "cmd": "stop" })));
        wait_until("the source waits for its backend", SOON, || {
            scene.guest.daemon.thread_is_in("baton-vmm-stub", libc::SYS_recvmsg).unwrap()
        })
        .unwrap();
        // The orchestrator starts the other side all the same, and then gives up.
        drop(moving.next);
        let mut rogue = RawFrontend::connect(scene.there().socket(0), Options::default()).unwrap();
        rogue.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
        rogue.queue(0).kick().unwrap();
        scene.there().wait_standing("activating").unwrap();
        assert_eq!(rogue.queue(0).wait_used(Duration::from_millis(100)).unwrap(), None);
        assert!(!stop.is_finished(), "the guest stopped with a write under way");
        assert_eq!(scene.fleet.phase(0).unwrap(), "armed");
        assert_eq!(scene.fleet.reclaim(&moving.attempt).unwrap()["outcome"], "source");
        scene.there().wait_standing("parked").unwrap();
        assert!(!stop.is_finished(), "the guest stopped with a write under way");
        proxies[0].release_requests();
        assert_eq!(stop.join().unwrap()["lost"], json!([]));
    });
    scene.guest.order("run").unwrap();
    scene.guest.wait_progress(20, SOON).unwrap();
    assert_eq!(scene.fleet.settle(&moving.attempt).unwrap(), "source");
    assert!(scene.judge() > 30);
}

/// Connections break, and the client sends again what was not answered. What was under way on the old ones comes all the
/// same, when the answers to it were given long ago and other writes followed. Then everything takes half a second.
#[test]
fn f4_a_slow_network_that_repeats_reorders_and_cuts_only_delays() {
    let (mut scene, proxies) = Scene::new("f4", 2, 2, true);
    scene.stand_by();
    let moving = scene.prepare();
    let delay = |most: Duration| {
        for proxy in &proxies {
            proxy.delay_requests(most);
            proxy.delay_replies(most);
        }
    };
    delay(Duration::from_millis(100));
    for _ in 0..8 {
        scene.guest.wait_progress(20, SOON).unwrap();
        proxies.iter().for_each(|proxy| proxy.hang_up(Duration::from_millis(600)));
    }
    delay(Duration::from_millis(500));
    proxies.iter().for_each(Proxy::cut);
    scene.guest.wait_progress(2, SOON).unwrap();
    scene.stop_guest(&moving);
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    scene.go_on(moving);
    assert!(scene.judge() > 300);
}
