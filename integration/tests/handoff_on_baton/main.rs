//! Disks change hands between two backends with no VMM in between: a raw front-end plays both ends, and the real storage
//! servers decide. What a guest wrote before is there after, and whoever lost waits and sees no error.

mod rows;
mod scene;

use baton_integration::baton::wait_until;
use baton_integration::bench::handoff::{Syncs, syncs};
use baton_integration::blk::{OK, Request};
use baton_integration::daemon::Daemon;
use baton_integration::handoff::{Begin, Fleet, Host};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use scene::{A_WHILE, QUEUES, SOON, Scene, block, connect, is_parked, options};
use serde_json::Value;
use std::time::Duration;

/// The process ends by itself, soon and without an error.
fn ends_promptly(daemon: &mut Daemon) {
    let status = daemon.terminate(Duration::from_secs(3)).unwrap();
    assert!(status.success(), "{status}");
}

fn event_names(status: &Value) -> Vec<&str> {
    let events = status["handoff"]["events"].as_array().expect("events");
    events.iter().map(|event| event["event"].as_str().expect("a name")).collect()
}

#[test]
fn a_vm_moves_with_its_writes_and_back_again() {
    for (mode, servers, disks) in [("fast", 1, 1), ("base", 2, 2), ("fast", 2, 3)] {
        let mut scene = Scene::new(servers, disks, mode);
        scene.write_more();
        scene.stop();
        // Milliseconds; a seal that nobody is woken for leaves with the next heartbeat, seconds later.
        let sealed = || scene.source.standing().is_ok_and(|now| now == "sealed");
        wait_until("all disks are sealed", Duration::from_secs(4), sealed).unwrap();
        let mut there = scene.start_there();
        Scene::check(&mut there);
        assert_eq!(scene.destination.standing().unwrap(), "serving");
        scene.source.wait_standing("parked").unwrap();
        let status = scene.source.status().unwrap();
        assert_eq!(status["handoff"]["parked"], "lost");
        assert_eq!(status["handoff"]["id"], Value::from(scene.attempt.id.clone()));
        let names = event_names(&status);
        for name in ["rings-stopped", "seal-sent", "sealed", "drained", "parked"] {
            assert!(names.contains(&name), "no {name} in {names:?}");
        }
        let status = scene.destination.status().unwrap();
        let timings = &status["handoff"]["timings"];
        assert!(timings["first_io_us"].is_u64() && timings["activate_us"].is_u64(), "{timings}");
        let welcomed = &status["handoff"]["members"][0]["welcomed_us"];
        assert!(welcomed.as_u64().is_some_and(|us| us > 0), "{welcomed}");
        let log = scene.source.daemon.log();
        assert_eq!(log.matches("stop this VM").count(), 1, "said once, for all disks: {log}");
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
        ends_promptly(&mut scene.source.daemon);
        assert_eq!(scene.fleet.owner(0).unwrap(), "host-b/vm", "nothing was given back");

        // And back, to a new process on the first host.
        let back = Host::start_with(
            scene.dir.path(),
            "a2",
            "host-a/vm",
            &scene.fleet,
            Begin::Standby,
            QUEUES,
        )
        .unwrap();
        let attempt = scene.fleet.arm("host-b/vm", "host-a/vm").unwrap();
        back.wait_standing("ready").unwrap();
        for disk in &mut there {
            disk.start_logging().unwrap();
        }
        scene.guest = there;
        scene.stop();
        let mut again = connect(&back, disks, options());
        Scene::check(&mut again);
        assert_eq!(scene.fleet.settle(&attempt).unwrap(), "destination");
    }
}

/// Whoever starts its rings must not wait for connections then, neither after a move nor after a restart of the backend.
#[test]
fn connections_stand_before_the_rings_start() {
    let dir = TestDir::new("early").unwrap();
    let fleet = Fleet::start(dir.path(), 1, 1, 1 << 20).unwrap();
    let stand = |count| {
        let is_so = || fleet.servers[0].metric("baton_connections").is_ok_and(|n| n == count);
        wait_until("the control connection and all queues' stand", SOON, is_so).unwrap();
    };
    let dir = dir.path();
    let begin = |label, owner, how| Host::start_with(dir, label, owner, &fleet, how, QUEUES);
    let each = 1.0 + f64::from(QUEUES);
    let _owner = begin("a", "host-a/vm", Begin::Claim).unwrap();
    stand(each);
    let _standby = begin("b", "host-b/vm", Begin::Standby).unwrap();
    stand(2.0 * each);
}

/// A standby opens all queues; the guest may use one.
#[test]
fn a_queue_that_the_guest_does_not_use_holds_up_no_seal() {
    let mut scene = Scene::new(1, 1, "fast");
    scene.stop();
    let one = Options { queues: 1, ..options() };
    let mut there = connect(&scene.destination, 1, one);
    there[0].queue(0).write(40, &block(40)).unwrap();
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    let (dir, owner) = (scene.dir.path(), "host-a/vm");
    let back = Host::start_with(dir, "a2", owner, &scene.fleet, Begin::Standby, QUEUES).unwrap();
    let attempt = scene.fleet.arm("host-b/vm", owner).unwrap();
    back.wait_standing("ready").unwrap();
    there[0].start_logging().unwrap();
    there[0].enable(0, false).unwrap();
    there[0].get_vring_base(0).unwrap();
    let mut again = connect(&back, 1, one);
    assert_eq!(again[0].queue(0).read(40, 4096).unwrap(), block(40));
    assert_eq!(scene.fleet.settle(&attempt).unwrap(), "destination");
}

#[test]
fn a_cancelled_move_goes_on_at_the_source_and_parks_the_destination() {
    for mode in ["fast", "base"] {
        let mut scene = Scene::new(2, 2, mode);
        scene.write_more();
        scene.stop();
        scene.source.wait_standing("sealed").unwrap();
        scene.resume();
        Scene::check(&mut scene.guest);
        assert_eq!(scene.source.standing().unwrap(), "serving");
        scene.destination.wait_standing("parked").unwrap();
        let mut there = scene.start_there();
        there.iter_mut().for_each(is_parked);
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "source");
        Scene::check(&mut scene.guest);
        ends_promptly(&mut scene.destination.daemon);
    }
}

#[test]
fn a_destination_that_was_frozen_meanwhile_writes_nothing() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    let unstarted = Options { start: false, ..options() };
    let mut there = connect(&scene.destination, 2, unstarted);
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    scene.destination.daemon.freeze().unwrap();
    // The destination's VMM starts its guest, and nothing comes of it; the source's goes on.
    let starting = std::thread::spawn(move || {
        there.iter_mut().for_each(|disk| disk.start().unwrap());
        there
    });
    scene.resume();
    Scene::check(&mut scene.guest);
    scene.destination.daemon.thaw().unwrap();
    let mut there = starting.join().unwrap();
    there.iter_mut().for_each(is_parked);
    scene.destination.wait_standing("parked").unwrap();
    Scene::check(&mut scene.guest);
}

#[test]
fn a_source_killed_before_its_seal_is_not_succeeded() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.source.daemon.kill().unwrap();
    let mut there = scene.start_there();
    there.iter_mut().for_each(is_parked);
    assert_eq!(scene.destination.standing().unwrap(), "activating");
    assert_eq!(scene.fleet.reclaim(&scene.attempt).unwrap()["outcome"], "source");
    scene.destination.wait_standing("parked").unwrap();
    ends_promptly(&mut scene.destination.daemon);
    scene.source.restart().unwrap();
    let mut again = connect(&scene.source, 2, options());
    Scene::check(&mut again);
}

/// Row 12 of the failure table. Before its seal: the test above.
#[test]
fn row_12_a_source_killed_behind_its_seal_is_succeeded() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    scene.source.daemon.kill().unwrap();
    Scene::check(&mut scene.start_there());
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}

/// Row 13 of the failure table.
#[test]
fn row_13_a_source_that_hangs_behind_its_seal_is_no_matter() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    scene.source.daemon.freeze().unwrap();
    let mut there = scene.start_there();
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    scene.source.daemon.thaw().unwrap();
    scene.source.wait_standing("parked").unwrap();
    Scene::check(&mut there);
}

/// Row 14 of the failure table.
#[test]
fn row_14_a_destination_that_dies_before_it_activated_costs_nothing() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    scene.destination.daemon.kill().unwrap();
    scene.resume();
    Scene::check(&mut scene.guest);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "source");
    // And the next attempt, with the next process, works.
    scene.destination.restart().unwrap();
    scene.attempt = scene.fleet.arm("host-a/vm", "host-b/vm").unwrap();
    scene.destination.wait_standing("ready").unwrap();
    scene.guest.iter_mut().for_each(|disk| disk.start_logging().unwrap());
    scene.stop();
    Scene::check(&mut scene.start_there());
}

/// Rows 15 and 16 of the failure table: killed when it has activated and written
/// nothing, and when it has written. The volumes are its host's for good.
fn a_destination_that_dies_active(wrote: bool) {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let mut there = scene.start_there();
    scene.destination.wait_standing("serving").unwrap();
    if wrote {
        Scene::check(&mut there);
    }
    scene.destination.daemon.kill().unwrap();
    drop(there);
    // Its VMM comes back, and must not.
    scene.resume();
    scene.source.wait_standing("parked").unwrap();
    scene.guest.iter_mut().for_each(is_parked);
    // A crash of the VM on its new host: it is started there, from its disks.
    scene.destination.set_begin(Begin::Claim).unwrap();
    scene.destination.restart().unwrap();
    Scene::check(&mut scene.start_there());
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}

#[test]
fn row_15_a_destination_that_dies_before_its_first_write_keeps_the_volumes() {
    a_destination_that_dies_active(false);
}

#[test]
fn row_16_a_destination_that_dies_after_its_first_write_keeps_the_volumes() {
    a_destination_that_dies_active(true);
}

/// Row 23 of the failure table: both wait for the anchor, neither guesses.
#[test]
fn row_23_while_the_anchor_is_down_both_sides_wait_and_one_gets_the_volumes() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let unstarted = Options { start: false, ..options() };
    let mut there = connect(&scene.destination, 2, unstarted);
    scene.fleet.servers[0].daemon.freeze().unwrap();
    there.iter_mut().for_each(|disk| disk.start().unwrap());
    scene.resume();
    scene.source.wait_standing("reclaiming").unwrap();
    scene.destination.wait_standing("activating").unwrap();
    for disk in there.iter_mut().chain(&mut scene.guest) {
        disk.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
        disk.queue(0).kick().unwrap();
        assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "nobody was asked");
    }
    scene.fleet.servers[0].daemon.thaw().unwrap();
    let (source, destination) = (&scene.source, &scene.destination);
    let serves = |host: &Host| host.standing().is_ok_and(|standing| standing == "serving");
    wait_until("one has the volumes", SOON, || serves(source) || serves(destination)).unwrap();
    let (won, lost, winner) = match serves(source) {
        true => (source, destination, "source"),
        false => (destination, source, "destination"),
    };
    lost.wait_standing("parked").unwrap();
    assert!(serves(won));
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), winner);
}

#[test]
fn row_20_a_server_that_restarts_after_the_seal_does_not_stop_the_move() {
    for which in [0, 1] {
        let mut scene = Scene::new(2, 2, "fast");
        scene.write_more();
        scene.stop();
        scene.source.wait_standing("sealed").unwrap();
        scene.fleet.servers[which].kill_and_restart().unwrap();
        let mut there = scene.start_there();
        Scene::check(&mut there);
        scene.source.wait_standing("parked").unwrap();
    }
}

#[test]
fn row_19_a_server_that_restarts_before_the_seal_goes_on_with_the_source() {
    for which in [0, 1] {
        let mut scene = Scene::new(2, 2, "fast");
        scene.fleet.servers[which].kill_and_restart().unwrap();
        scene.write_more();
        scene.stop();
        let mut there = scene.start_there();
        Scene::check(&mut there);
    }
}

/// A disk is let go when its rings start, and its volume follows the decision whether they ever do.
#[test]
fn disks_that_start_late_or_never_follow_the_decision() {
    let mut scene = Scene::new(2, 4, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let start =
        |scene: &Scene, n| RawFrontend::connect(scene.destination.socket(n), options()).unwrap();
    let mut first = start(&scene, 0);
    assert_eq!(first.queue(0).read(0, 4096).unwrap(), block(1));
    scene.fleet.wait_phase(&["active"]).unwrap();
    assert_eq!(scene.destination.standing().unwrap(), "serving");
    scene.source.wait_standing("parked").unwrap();
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    let mut second = start(&scene, 1);
    assert_eq!(second.queue(0).read(0, 4096).unwrap(), block(2));
    assert_eq!(second.queue(1).read(8, 4096).unwrap(), block(102));
    second.queue(1).write(16, &block(52)).unwrap();
    // The next handoff has begun when the third one starts.
    scene.fleet.arm("host-b/vm", "host-c/vm").unwrap();
    let mut third = start(&scene, 2);
    assert_eq!(third.queue(1).read(8, 4096).unwrap(), block(103));
    ends_promptly(&mut scene.destination.daemon);
    assert_eq!(scene.fleet.phase(3).unwrap(), "free", "the disk that nobody used was given back");
}

#[test]
fn a_disk_that_starts_after_its_vm_was_fenced_waits() {
    let mut scene = Scene::new(1, 2, "fast");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let mut first = RawFrontend::connect(scene.destination.socket(0), options()).unwrap();
    assert_eq!(first.queue(0).read(0, 4096).unwrap(), block(1));
    scene.fleet.wait_phase(&["active"]).unwrap();
    let volume = scene.fleet.members[1].volume.clone();
    scene.fleet.server(1).fence(&volume, None).unwrap();
    scene.destination.wait_standing("parked").unwrap();
    is_parked(&mut first);
    let mut second = RawFrontend::connect(scene.destination.socket(1), options()).unwrap();
    is_parked(&mut second);
}

#[test]
fn whoever_waits_ends_promptly_and_gives_nothing_back() {
    let mut scene = Scene::new(1, 1, "base");
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    ends_promptly(&mut scene.source.daemon);
    assert_eq!(scene.fleet.phase(0).unwrap(), "sealed");
    assert_eq!(scene.fleet.owner(0).unwrap(), "host-a/vm");
    ends_promptly(&mut scene.destination.daemon);
    assert_eq!(scene.fleet.phase(0).unwrap(), "sealed");
    // A new process of the source stands by, and its rings call the move off.
    scene.source.restart().unwrap();
    assert_ne!(scene.source.standing().unwrap(), "serving");
    let mut again = connect(&scene.source, 1, options());
    Scene::check(&mut again);
}

#[test]
fn a_vm_that_stops_at_a_seal_with_requests_under_way_loses_none() {
    let mut scene = Scene::new(1, 1, "fast");
    let data = block(7);
    for slot in 0..60 {
        let queue = scene.guest[0].queue(if slot % 2 == 0 { 0 } else { 1 });
        queue.submit(&Request::Write { sector: 80 + slot * 8, data: &data }).unwrap();
        queue.kick().unwrap();
    }
    for queue in 0..QUEUES {
        scene.guest[0].enable(queue, false).unwrap();
    }
    for queue in 0..QUEUES {
        let base = scene.guest[0].get_vring_base(queue).unwrap();
        let used = scene.guest[0].queue(queue).ring.used_index();
        assert_eq!(base, used, "what was taken from ring {queue} was answered");
        for _ in 1..used {
            let done = scene.guest[0].queue(queue).wait_completion(SOON).unwrap().unwrap();
            assert_eq!(done.status, OK);
        }
    }
    scene.source.wait_standing("sealed").unwrap();
    let mut there = scene.start_there();
    assert_eq!(there[0].queue(0).read(0, 4096).unwrap(), block(1));
}

/// Fast mode calls no disk in the blackout, nor while the guest waits for its first answer: shown by strace. The
/// decision is stored later.
#[test]
fn no_sync_between_the_stop_and_the_first_answer() {
    // The store waits 200 ms; a machine that is slower than that shows nothing.
    let quick = |syncs: &Syncs| syncs.slowest_s < 0.1;
    let traced = (0..5).map(|_| {
        let dir = TestDir::new("handoff-syncs").unwrap();
        syncs(dir.path(), 2).unwrap().expect("strace is installed")
    });
    let syncs = traced.into_iter().find(quick).expect("a move of less than 100 ms in five tries");
    assert_eq!((syncs.before_decision, syncs.before_first_io), (0, 0), "{syncs:?}");
    assert!(syncs.later > 0, "the decision is stored all the same: {syncs:?}");
}

/// It would go on with the memory and the requests of then, as soon as the new backend is granted the volumes.
#[test]
fn row_08_a_machine_of_an_earlier_try_is_turned_away() {
    let mut scene = Scene::new(1, 1, "fast");
    let mut old = scene.start_there();
    let stale = block(0xee);
    old[0].queue(0).submit(&Request::Write { sector: 0, data: &stale }).unwrap();
    old[0].queue(0).kick().unwrap();
    scene.fleet.reclaim(&scene.attempt).unwrap();
    scene.fleet.settle(&scene.attempt).unwrap();
    scene.destination.wait_standing("parked").unwrap();

    // The next try has a backend of its own, at the same socket.
    scene.destination.daemon.kill().unwrap();
    scene.destination.restart().unwrap();
    scene.attempt = scene.fleet.arm("host-a/vm", "host-b/vm").unwrap();
    scene.destination.wait_standing("ready").unwrap();
    for _ in 0..3 {
        let turned_away = old[0].reconnect().and_then(|()| old[0].capacity());
        assert!(turned_away.is_err(), "{turned_away:?}");
    }
    assert!(scene.destination.daemon.log().contains("the old machine must not run here"));
    assert_eq!(scene.destination.standing().unwrap(), "ready", "its rings were not started");

    scene.write_more();
    scene.stop();
    let mut new = scene.start_there();
    Scene::check(&mut new);
    // The machine that is at home here may come back.
    new[0].reconnect().unwrap();
    Scene::check(&mut new);
}
