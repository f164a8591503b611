//! Storage servers die, and their disks are slow.

use crate::scene::{OWNERS, SOON, Scene};
use baton_integration::baton::wait_until;
use baton_integration::faults::history::{Event, Kind, What, now_ns};
use baton_integration::handoff::Fleet;
use baton_integration::raw_wire::{Ask, Control, Mode, OK, Queue, STALE_EPOCH, Who};
use baton_integration::slow_disk::{StalledThread, open_file_of};
use baton_integration::workspace::TestDir;
use nix::sys::signal::Signal;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// The server's thread that waits for the disk.
const DISK_THREAD: &str = "flusher";

/// The kernel goes on with what a killed server had asked of a slow disk, and keeps its files open as long.
#[test]
fn f5_a_server_killed_over_a_slow_disk_has_no_successor_until_its_files_are_gone() {
    let (mut scene, _) = Scene::new("f5", 1, 1, false);
    let pool = scene.dir.path().canonicalize().unwrap().join("storage-0/data/pool.dat");
    for _ in 0..5 {
        let server = &mut scene.fleet.servers[0];
        let stalled = StalledThread::stop(&server.daemon, DISK_THREAD).unwrap();
        let since = now_ns();
        wait_until("a flush is at the disk, and writes around it", SOON, || {
            is_flush_open(&scene.guest.history().unwrap(), since)
        })
        .unwrap();
        let kept = open_file_of(&server.daemon, &pool).unwrap();
        server.daemon.signal(Signal::SIGKILL).unwrap();
        drop(stalled);
        server.daemon.kill().unwrap();
        let under_way = std::fs::read(&pool).unwrap();

        let refused = format!("{:#}", server.restart().unwrap_err());
        assert!(refused.contains("is in use by another storage server"), "{refused}");
        // The last of it lands. Had a successor served by now, this would bring back what its clients wrote over.
        kept.write_all_at(&under_way, 0).unwrap();
        drop(kept);
        server.restart().unwrap();
        scene.guest.wait_progress(20, SOON).unwrap();
    }
    assert!(scene.judge() > 100);
}

/// Sent after that moment, and not answered.
fn is_flush_open(events: &[Event], since: u64) -> bool {
    let flushes = || events.iter().filter(|event| event.kind == Kind::Flush);
    let answered = |op| flushes().any(|event| event.op == op && event.what == What::Complete);
    flushes().any(|event| event.at_ns > since && !answered(event.op))
}

/// A drain takes as long as the disk does, and is not acknowledged before.
#[test]
fn f6_a_seal_and_a_fence_wait_for_a_disk_that_does_not_answer() {
    let dir = TestDir::new("f6").unwrap();
    let fleet = Fleet::start(dir.path(), 1, 1, 16 << 20).unwrap();
    let (server, volume) = (&fleet.servers[0], fleet.members[0].volume.as_str());
    let (address, owner) = (server.data_address(), OWNERS[0]);
    let mut control = Control::connect(address, volume, owner, 1, Mode::Owner).unwrap();
    let who = Who { owner, volume, session: 1 };
    let mut queue = Queue::join(address, who, control.epoch(), 0).unwrap();
    let dirty_flush = |queue: &mut Queue| {
        queue.send_write(0, &[7; 4096]).unwrap();
        assert_eq!(queue.status().unwrap(), OK);
        let stalled = StalledThread::stop(&server.daemon, DISK_THREAD).unwrap();
        queue.send_flush().unwrap();
        queue.ping().unwrap();
        stalled
    };

    let attempt = fleet.arm(owner, OWNERS[1]).unwrap();
    let id = attempt.number().unwrap();
    let stalled = dirty_flush(&mut queue);
    control.send_ask(id, Ask::Seal).unwrap();
    // Asked behind it, answered before it.
    control.ping().unwrap();
    assert_eq!(fleet.phase(0).unwrap(), "armed");
    control.ping().unwrap();
    drop(stalled);
    control.granted().unwrap();
    assert_eq!(queue.status().unwrap(), OK);
    assert_eq!(fleet.phase(0).unwrap(), "sealed");
    control.ask(id, Ask::Reclaim).unwrap();
    assert_eq!(fleet.settle(&attempt).unwrap(), "source");

    let mut queue = Queue::join(address, who, control.epoch(), 1).unwrap();
    let stalled = dirty_flush(&mut queue);
    std::thread::scope(|scope| {
        let fence = scope.spawn(|| fleet.fence(0, OWNERS[1]));
        // From then on it waits for the drain alone.
        wait_until("the gate is shut", SOON, || {
            queue.send_write(4096, &[8; 4096]).unwrap();
            queue.status().unwrap() == STALE_EPOCH
        })
        .unwrap();
        assert_eq!(fleet.owner(0).unwrap(), owner);
        assert!(!fence.is_finished(), "a fence was answered with a flush at the disk");
        drop(stalled);
        fence.join().unwrap().unwrap();
    });
    assert_eq!(queue.status().unwrap(), OK);
    assert_eq!(fleet.owner(0).unwrap(), OWNERS[1]);
}

/// How much of F9 is done: `BATON_VOLUMES` of the VM, which moves `BATON_MOVES` times.
fn by_wish(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| text.parse().expect("a number"))
}

/// Two servers die in each move, and in four moves one at each of eight moments between the stop of the rings and the
/// grant of the volumes. The moments are parts of what an undisturbed move takes. In 32 moves each server dies at each.
#[test]
fn f9_many_volumes_on_eight_servers_move_as_one_while_servers_die() {
    const SERVERS: usize = 8;
    let (volumes, moves) = (by_wish("BATON_VOLUMES", 64), by_wish("BATON_MOVES", SERVERS / 2));
    let (mut scene, _) = Scene::new("f9", SERVERS, volumes, false);
    scene.stand_by();
    let undisturbed = {
        let moving = scene.prepare();
        let begun = Instant::now();
        moving.switch(&scene);
        let took = begun.elapsed();
        assert!(scene.land(moving), "nobody died");
        took
    };
    let (mut moved, mut in_time) = (0, 0);
    for number in 0..moves {
        scene.stand_by_again();
        let moving = scene.prepare();
        let mut servers = std::mem::take(&mut scene.fleet.servers);
        std::thread::scope(|scope| {
            let begun = Instant::now();
            let mover = scope.spawn(|| moving.switch(&scene));
            for half in 0..2 {
                let moment = number % 4 + 4 * half;
                let at = undisturbed.mul_f64((moment as f64 + 0.5) / SERVERS as f64);
                std::thread::sleep(at.saturating_sub(begun.elapsed()));
                in_time += usize::from(!mover.is_finished());
                servers[(moment + number / 4) % SERVERS].kill_and_restart().unwrap();
            }
            mover.join().unwrap();
        });
        scene.fleet.servers = servers;
        moved += usize::from(scene.land(moving));
        let owners: Vec<String> = (0..volumes).map(|m| scene.fleet.owner(m).unwrap()).collect();
        assert_eq!(owners, vec![OWNERS[scene.at]; volumes]);
    }
    eprintln!(
        "{undisturbed:?} undisturbed; {in_time} servers died in time, {moved} of {moves} moves went through"
    );
    assert!(in_time > 0, "nobody died in a move");
    assert!(scene.judge() > 500);
}
