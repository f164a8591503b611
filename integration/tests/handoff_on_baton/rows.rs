//! Rows of the failure table in docs/handoff.md that need real processes, and no VMM.

use super::event_names;
use super::scene::{A_WHILE, QUEUES, SOON, Scene, Side, block, connect, is_parked, options};
use baton_integration::baton::wait_until;
use baton_integration::blk::{OK, Request};
use baton_integration::handoff::{Begin, Fleet, Host};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};

/// The next answer of the disk's first queue is good.
fn answers(disk: &mut RawFrontend) {
    let done = disk.queue(0).wait_completion(SOON).unwrap().expect("an answer");
    assert_eq!(done.status, OK);
}

/// A process that stood by all the time, or for a try that was called off, is not
/// asked when another is nominated, and gets nothing when its VMM starts all the same.
#[test]
fn row_08_a_stale_standby_is_not_nominated() {
    let mut scene = Scene::new(2, 2, "fast");
    let idle =
        Host::start_with(scene.dir.path(), "c", "host-c/vm", &scene.fleet, Begin::Standby, QUEUES)
            .unwrap();
    // The first try is called off; its standby is left running.
    scene.fleet.reclaim(&scene.attempt).unwrap();
    scene.fleet.settle(&scene.attempt).unwrap();
    scene.destination.wait_standing("parked").unwrap();
    // Another, to the same host, with a process of its own for it.
    let next =
        Host::start_with(scene.dir.path(), "b2", "host-b/vm", &scene.fleet, Begin::Standby, QUEUES)
            .unwrap();
    scene.attempt = scene.fleet.arm("host-a/vm", "host-b/vm").unwrap();
    next.wait_standing("ready").unwrap();
    let mut stale = connect(&idle, 2, options());
    stale.extend(scene.start_there());
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    // Everything is sealed, and both VMMs have started their rings.
    stale.iter_mut().for_each(is_parked);
    assert_ne!(idle.standing().unwrap(), "serving", "nobody named it");
    assert_eq!(scene.destination.standing().unwrap(), "parked");
    scene.fleet.wait_phase(&["sealed"]).unwrap();
    let mut new = connect(&next, 2, options());
    Scene::check(&mut new);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    stale.iter_mut().for_each(is_parked);
    Scene::check(&mut new);
}

/// A process that was frozen before its server said anything of its try, with a machine that
/// has started its rings, thaws in the next try of the VM to its host. It has never heard of
/// its own, not even in what lay in its connections, for these are gone; it was told which
/// that is when it was started.
#[test]
fn row_08_a_standby_that_froze_before_it_heard_of_its_try_takes_no_other() {
    let (mut scene, proxies) = Scene::proxied(2, 2, Side::Destination);
    scene.fleet.reclaim(&scene.attempt).unwrap();
    scene.fleet.settle(&scene.attempt).unwrap();
    scene.destination.daemon.kill().unwrap();
    let standby = |scene: &Scene, label| {
        let (dir, fleet) = (scene.dir.path(), &scene.fleet);
        Host::start_for(dir, label, "host-b/vm", fleet, &scene.attempt, QUEUES).unwrap()
    };
    scene.attempt = Fleet::attempt();
    scene.fleet.through = proxies.iter().map(Proxy::address).collect();
    let frozen = standby(&scene, "b1");
    scene.fleet.through.clear();
    let mut stale = connect(&frozen, 2, options());
    frozen.daemon.freeze().unwrap();
    proxies.iter().for_each(Proxy::cut);
    scene.fleet.arm_try(&scene.attempt, "host-a/vm", "host-b/vm").unwrap();
    assert_eq!(scene.fleet.reclaim(&scene.attempt).unwrap()["outcome"], "source");
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "source");

    // Nobody has started the next try's process yet: the old one is the newest there is.
    scene.attempt = Fleet::attempt();
    scene.fleet.arm_try(&scene.attempt, "host-a/vm", "host-b/vm").unwrap();
    frozen.daemon.thaw().unwrap();
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    frozen.wait_standing("parked").unwrap();
    stale.iter_mut().for_each(is_parked);
    scene.fleet.wait_phase(&["sealed"]).unwrap();

    let next = standby(&scene, "b2");
    Scene::check(&mut connect(&next, 2, options()));
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    stale.iter_mut().for_each(is_parked);
}

/// It holds no epoch. A VMM that goes on waits for the anchor's answer, whichever it is.
#[test]
fn row_10_a_source_that_is_cut_off_behind_its_seal_waits_for_the_anchor() {
    for destination_started in [false, true] {
        let (mut scene, proxies) = Scene::proxied(2, 2, Side::Source);
        scene.write_more();
        scene.stop();
        scene.source.wait_standing("sealed").unwrap();
        proxies.iter().for_each(|proxy| proxy.hold_requests());
        scene.resume();
        scene.source.wait_standing("reclaiming").unwrap();
        scene.guest.iter_mut().for_each(is_parked);
        assert!(scene.fleet.phase(0).is_ok_and(|phase| phase == "sealed"));
        let mut there = if destination_started { scene.start_there() } else { Vec::new() };
        Scene::check(&mut there);
        proxies.iter().for_each(|proxy| proxy.release_requests());
        if destination_started {
            scene.source.wait_standing("parked").unwrap();
            scene.guest.iter_mut().for_each(|disk| {
                assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "answered");
            });
            assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
            Scene::check(&mut there);
        } else {
            scene.source.wait_standing("serving").unwrap();
            for (disk, salt) in scene.guest.iter_mut().zip(1..) {
                answers(disk);
                // What waited was written; the rest is there.
                assert_eq!(disk.queue(0).read(0, 4096).unwrap(), block(0xbd));
                assert_eq!(disk.queue(1).read(8, 4096).unwrap(), block(salt + 100));
            }
            assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "source");
        }
    }
}

/// A write is under way to one server, which is frozen.
fn write_to_the_frozen(scene: &mut Scene, which: usize) {
    scene.write_more();
    scene.fleet.servers[which].daemon.freeze().unwrap();
    let data = block(77);
    for disk in &mut scene.guest {
        disk.queue(0).submit(&Request::Write { sector: 24, data: &data }).unwrap();
        disk.queue(0).kick().unwrap();
    }
    let source = &scene.source;
    let taken = || source.status().is_ok_and(|s| s["disks"][which]["in_flight"] == 1);
    wait_until("the write is under way", SOON, taken).unwrap();
}

fn wrote(disk: &mut RawFrontend) {
    assert_eq!(disk.queue(0).read(24, 4096).unwrap(), block(77));
}

/// The server dies with requests that it never answered, and with the seal that waited
/// for them: nobody can say what was done, so the destination gives up and the source
/// does them again.
#[test]
fn row_21_a_server_that_dies_in_the_seal_gives_the_vm_back_to_the_source() {
    for which in [0, 1] {
        let mut scene = Scene::new(2, 2, "fast");
        write_to_the_frozen(&mut scene, which);
        let source = &scene.source;
        std::thread::scope(|scope| {
            // Seals leave when the last disk stops, and the VMM waits for it: its last request is not answered.
            let (last, first) = (&scene.guest[which], &scene.guest[1 - which]);
            let stops = scope.spawn(move || [first, last].map(Scene::stop_one));
            let sent = || source.status().is_ok_and(|s| event_names(&s).contains(&"seal-sent"));
            wait_until("seals were sent", SOON, sent).unwrap();
            scene.fleet.servers[which].kill_and_restart().unwrap();
            stops.join().unwrap();
        });
        scene.destination.wait_standing("parked").unwrap();
        // A frozen anchor wants the destination's word; any other decides at once.
        let audit = scene.fleet.server(0).get("/v1/volumes/disk0/audit").unwrap();
        let entries = audit["entries"].as_array().unwrap();
        let abdicated = entries.iter().any(|entry| entry["what"] == "abdicate");
        assert_eq!(abdicated, which == 0, "{audit:#}");
        scene.source.wait_standing("serving").unwrap();
        for disk in &mut scene.guest {
            answers(disk);
        }
        scene.start_there().iter_mut().for_each(is_parked);
        scene.resume();
        scene.guest.iter_mut().for_each(wrote);
        Scene::check(&mut scene.guest);
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "source");
    }
}

/// The same before the last disk stops: nothing was sealed, so the source says so, its
/// requests are done, and the VM moves.
#[test]
fn row_19_a_server_that_dies_while_the_first_disk_drains_does_not_stop_the_move() {
    for which in [0, 1] {
        let mut scene = Scene::new(2, 2, "fast");
        write_to_the_frozen(&mut scene, which);
        let source = &scene.source;
        std::thread::scope(|scope| {
            let (last, first) = (&scene.guest[1 - which], &scene.guest[which]);
            let stops = scope.spawn(move || [first, last].map(Scene::stop_one));
            let stops_now =
                || source.status().is_ok_and(|s| event_names(&s).contains(&"rings-stopped"));
            wait_until("the first disk stops", SOON, stops_now).unwrap();
            let status = source.status().unwrap();
            assert!(!event_names(&status).contains(&"seal-sent"), "{status:#}");
            assert_eq!(source.standing().unwrap(), "serving");
            scene.fleet.servers[which].kill_and_restart().unwrap();
            stops.join().unwrap();
        });
        for disk in &mut scene.guest {
            answers(disk);
        }
        let mut there = scene.start_there();
        there.iter_mut().for_each(wrote);
        Scene::check(&mut there);
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    }
}

/// A guest that resets a disk, as a driver that is loaded again does, is no migration that ended.
#[test]
fn a_disk_that_is_reset_before_the_vm_stops_does_not_end_the_move() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.write_more();
    for at in [0, 1] {
        Scene::stop_one(&scene.guest[at]);
        Scene::resume_one(&mut scene.guest[at]);
        scene.guest[at].queue(0).write(32, &block(9)).unwrap();
    }
    let status = scene.source.status().unwrap();
    for event in ["seal-sent", "reclaim-sent", "reclaimed"] {
        assert!(!event_names(&status).contains(&event), "{status:#}");
    }
    scene.stop();
    let mut there = scene.start_there();
    for disk in &mut there {
        assert_eq!(disk.queue(0).read(32, 4096).unwrap(), block(9));
    }
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}

/// Nothing was under way to it, so it does not matter whether it comes back with its
/// memory or without; until it does, the destination waits.
#[test]
fn row_25_a_member_that_is_away_in_the_seal_is_waited_for() {
    for which in [0, 1] {
        for killed in [false, true] {
            let mut scene = Scene::new(2, 2, "fast");
            scene.write_more();
            scene.fleet.servers[which].daemon.freeze().unwrap();
            // All was answered: the VMM does not wait for the seals.
            scene.stop();
            let mut there = scene.start_there();
            there.iter_mut().for_each(|disk| {
                disk.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
                disk.queue(0).kick().unwrap();
                assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "not sealed");
            });
            assert_eq!(scene.source.standing().unwrap(), "sealing");
            if killed {
                scene.fleet.servers[which].kill_and_restart().unwrap();
            } else {
                scene.fleet.servers[which].daemon.thaw().unwrap();
            }
            for disk in &mut there {
                answers(disk);
            }
            Scene::check(&mut there);
            scene.source.wait_standing("parked").unwrap();
            assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
        }
    }
}

/// What the server had to say went into a network that swallows it. Nobody says it
/// again; the next connection asks.
#[test]
fn row_26_a_push_of_sealed_that_is_lost_is_told_by_the_next_connection() {
    let (mut scene, proxies) = Scene::proxied(2, 2, Side::Destination);
    scene.write_more();
    proxies.iter().for_each(|proxy| proxy.fall_silent());
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let mut there = scene.start_there();
    there.iter_mut().for_each(|disk| {
        disk.queue(0).submit(&Request::Read { sector: 0, len: 4096 }).unwrap();
        disk.queue(0).kick().unwrap();
        assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "told nothing");
    });
    let status = scene.destination.status().unwrap();
    assert_eq!(status["handoff"]["standing"], "activating");
    for member in status["handoff"]["members"].as_array().unwrap() {
        assert_eq!(member["phase"], "armed", "the push was lost: {member}");
    }
    proxies.iter().for_each(|proxy| {
        proxy.speak();
        proxy.cut();
    });
    for disk in &mut there {
        answers(disk);
    }
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}

/// The anchor has decided, and a member's server, or the winner's process, dies before
/// the member heard of it.
#[test]
fn row_30_a_crash_between_volumes_leaves_them_with_one_side() {
    for server_dies in [false, true] {
        let mut scene = Scene::new(2, 2, "fast");
        scene.write_more();
        scene.stop();
        scene.source.wait_standing("sealed").unwrap();
        let unstarted = Options { start: false, ..options() };
        let mut there = connect(&scene.destination, 2, unstarted);
        scene.fleet.servers[1].daemon.freeze().unwrap();
        there.iter_mut().for_each(|disk| disk.start().unwrap());
        // The anchor's volume is used while the other's server does not answer.
        assert_eq!(there[0].queue(0).read(0, 4096).unwrap(), block(1));
        assert_eq!(scene.fleet.phase(0).unwrap(), "active");
        if server_dies {
            scene.fleet.servers[1].kill_and_restart().unwrap();
        } else {
            scene.destination.daemon.kill().unwrap();
            scene.fleet.servers[1].daemon.thaw().unwrap();
            scene.destination.set_begin(Begin::Claim).unwrap();
            scene.destination.restart().unwrap();
            drop(there);
            there = scene.start_there();
        }
        // The source wants both back and gets neither.
        scene.resume();
        scene.source.wait_standing("parked").unwrap();
        scene.guest.iter_mut().for_each(is_parked);
        Scene::check(&mut there);
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
        for member in 0..2 {
            assert_eq!(scene.fleet.owner(member).unwrap(), "host-b/vm");
        }
        Scene::check(&mut there);
    }
}

/// The source's backend is replaced by a newer one while the handoff waits for the
/// VM, and the destination's when it has become the owner.
#[test]
fn row_35_a_backend_that_is_updated_in_a_handoff_goes_on() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.source.daemon.kill().unwrap();
    scene.source.restart().unwrap();
    assert_eq!(scene.source.standing().unwrap(), "serving", "armed, and a process of the owner");
    scene.fleet.wait_phase(&["armed"]).unwrap();
    scene.guest.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    scene.write_more();
    scene.stop();
    scene.source.wait_standing("sealed").unwrap();
    let mut there = scene.start_there();
    Scene::check(&mut there);
    // Active and not settled: as its host's supervisor restarts it.
    scene.destination.daemon.kill().unwrap();
    scene.destination.restart().unwrap();
    there.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    // And settled.
    scene.destination.daemon.kill().unwrap();
    scene.destination.set_begin(Begin::Claim).unwrap();
    scene.destination.restart().unwrap();
    there.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    Scene::check(&mut there);
}

/// The winner dies before its agent saw it serve, so the next process is started for the same try, which is over; and
/// the VM's next handoff is armed already. It takes nothing for its own. When that handoff is called off, a process that
/// claims the volumes goes on with the machine.
#[test]
fn row_35_a_winner_that_dies_before_it_was_seen_waits_for_the_next_handoff_to_be_called_off() {
    let mut scene = Scene::new(2, 2, "fast");
    scene.destination.daemon.kill().unwrap();
    let (dir, fleet) = (scene.dir.path(), &scene.fleet);
    let mut winner =
        Host::start_for(dir, "b1", "host-b/vm", fleet, &scene.attempt, QUEUES).unwrap();
    scene.write_more();
    scene.stop();
    let mut there = connect(&winner, 2, options());
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");

    let next = scene.fleet.arm("host-b/vm", "host-c/vm").unwrap();
    winner.daemon.kill().unwrap();
    winner.restart().unwrap();
    winner.wait_standing("parked").unwrap();
    assert_eq!(scene.fleet.owner(0).unwrap(), "host-b/vm");
    // Its host has the volumes, and it does not say otherwise.
    assert_eq!(winner.status().unwrap()["handoff"]["parked"], "other-try");
    let told = format!("{:#}", winner.order("reclaim").unwrap_err());
    assert!(told.contains("and never held the volumes"), "{told}");

    assert_eq!(scene.fleet.reclaim(&next).unwrap()["outcome"], "source");
    assert_eq!(scene.fleet.settle(&next).unwrap(), "source");
    winner.daemon.kill().unwrap();
    winner.set_begin(Begin::Claim).unwrap();
    winner.restart().unwrap();
    there.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    Scene::check(&mut there);
}

/// The machine had started the rings of both disks, or of one only. The next process knows it by the try in which it
/// arrived, and that it is not one of another try; what its guest had asked for is done once the volumes are granted.
#[test]
fn row_14_a_standby_that_dies_under_a_started_machine_goes_on_with_it() {
    for started in [1, 2] {
        let mut scene = Scene::new(2, 2, "fast");
        let mut there = connect(&scene.destination, 2, Options { start: false, ..options() });
        there[..started].iter_mut().for_each(|disk| disk.start().unwrap());
        scene.destination.wait_standing("activating").unwrap();
        let asked = block(0x77);
        there[0].queue(0).submit(&Request::Write { sector: 512, data: &asked }).unwrap();
        there[0].queue(0).kick().unwrap();
        std::thread::sleep(A_WHILE);
        scene.destination.daemon.kill().unwrap();
        scene.destination.restart().unwrap();
        scene.destination.wait_standing("ready").unwrap();
        there[..started].iter_mut().for_each(|disk| disk.reconnect().unwrap());
        scene.destination.wait_standing("activating").unwrap();
        for disk in &mut there[started..] {
            disk.attach().unwrap();
            disk.start().unwrap();
        }
        scene.write_more();
        scene.stop();
        let done = there[0].queue(0).wait_completion(SOON).unwrap().expect("done");
        done.ok().unwrap();
        Scene::check(&mut there);
        assert_eq!(there[0].queue(0).read(512, 4096).unwrap(), asked);
        assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
    }
}

/// The process dies when the machine has its in-flight region and before the first ring starts; the machine runs.
#[test]
fn row_14_a_standby_that_dies_while_a_machine_starts_goes_on_with_it() {
    let mut scene = Scene::new(2, 2, "fast");
    let mut there = connect(&scene.destination, 2, Options { start: false, ..options() });
    there[0].take_inflight().unwrap();
    there[1].start().unwrap();
    scene.destination.wait_standing("activating").unwrap();
    scene.destination.daemon.kill().unwrap();
    scene.destination.restart().unwrap();
    scene.destination.wait_standing("ready").unwrap();
    there.iter_mut().for_each(|disk| disk.reconnect().unwrap());
    scene.write_more();
    scene.stop();
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}

/// One that has not started its rings is as good for the next process as for the one
/// that died.
#[test]
fn row_14_a_standby_that_dies_under_a_waiting_machine_is_no_matter() {
    let mut scene = Scene::new(2, 2, "fast");
    let unstarted = Options { start: false, ..options() };
    let mut there = connect(&scene.destination, 2, unstarted);
    there.iter().for_each(|disk| assert!(disk.capacity().is_ok()));
    scene.destination.daemon.kill().unwrap();
    scene.destination.restart().unwrap();
    scene.destination.wait_standing("ready").unwrap();
    for disk in &mut there {
        disk.attach().unwrap();
        assert!(disk.capacity().is_ok());
    }
    scene.write_more();
    scene.stop();
    there.iter_mut().for_each(|disk| disk.start().unwrap());
    Scene::check(&mut there);
    assert_eq!(scene.fleet.settle(&scene.attempt).unwrap(), "destination");
}
