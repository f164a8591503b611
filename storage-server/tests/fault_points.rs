//! Every fault point of the server, each passed with a kill and with a stop: the
//! step that was hit is said again, or goes on, and the handoff ends.
//!
//! `cargo test -p baton-storage-server --features fault-points --test fault_points`

#![cfg(feature = "fault-points")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use baton_protocol::handoff::{Ask, Outcome};
use baton_protocol::{AccessMode, Epoch, Status};
use common::handoff::{DESTINATION, Member, S, SOURCE, count, plan, which};
use common::restart::Mortal;
use common::wait_for;
use nix::sys::signal::Signal;

/// A part of a handoff that may be repeated whatever became of it. Each makes
/// its own connections.
type Step = fn(&Member, &str);

const TO_DESTINATION: [Step; 4] = [arms, seals, activates, settles];
const BACK_TO_SOURCE: [Step; 3] = [arms, reclaims, settles];
const FENCED: [Step; 2] = [arms, fences];

/// The points, and a way that leads by each. `unfreeze.answered` and `abdicate.answered` come after a restart of the
/// server, which is this test's accident; `make faults` stops there.
const POINTS: [(&str, &[Step]); 12] = [
    ("arm.stored", &TO_DESTINATION),
    ("seal.requested", &TO_DESTINATION),
    ("seal.closed", &TO_DESTINATION),
    ("seal.answered", &TO_DESTINATION),
    ("activate.stepped", &TO_DESTINATION),
    ("activate.answered", &TO_DESTINATION),
    ("open.stepped", &TO_DESTINATION),
    ("open.answered", &TO_DESTINATION),
    ("settle.stored", &TO_DESTINATION),
    ("reclaim.stored", &BACK_TO_SOURCE),
    ("reclaim.answered", &BACK_TO_SOURCE),
    ("fence.stored", &FENCED),
];

fn arms(volume: &Member, mode: &str) {
    let plan = plan(&[volume], mode, common::handoff::TRY);
    let (status, answer) = volume.post("arm", &volume.arming(1, &plan));
    if status == 200 {
        return;
    }
    // Armed before the kill, and frozen by it.
    assert_eq!(answer["type"], "baton:handoff-in-progress");
    let mut control = volume.rejoin(SOURCE, S, 1);
    let boot_id = control.access().boot_id;
    assert_eq!(control.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Granted);
}

fn seals(volume: &Member, _: &str) {
    let sealed = volume.rejoin(SOURCE, S, 1).ask(Ask::Seal(vec![count(0, 1, 2)]));
    assert_eq!(sealed.outcome, Outcome::Granted);
}

fn activates(volume: &Member, _: &str) {
    let mut destination = volume.destination();
    let proof = destination.control.wins(Ask::Activate);
    destination.open(proof);
    assert_eq!(destination.queue.read(0, 512), [1; 512]);
    assert_eq!(destination.queue.write(512, &[2; 512]), Status::Ok);
}

fn reclaims(volume: &Member, _: &str) {
    // The control connection is an owner's before and after.
    let mut control = volume.rejoin(SOURCE, S, 1);
    if volume.phase() == "frozen" {
        let boot_id = control.access().boot_id;
        assert_eq!(control.ask(Ask::Unfreeze { boot_id }).outcome, Outcome::Granted);
    }
    control.wins(Ask::Reclaim);
}

fn settles(volume: &Member, _: &str) {
    assert_eq!(volume.post("settle", &which(1)).0, 200);
}

fn fences(volume: &Member, _: &str) {
    let body = serde_json::json!({"term": 1, "reason": "test"});
    assert_eq!(volume.post("fence", &body).0, 200);
    assert_eq!(volume.phase(), "free");
}

/// A server that has the point set, and a volume with a source that wrote once.
fn server(point: &str, what: &str, hits: &Path) -> (Mortal, Member) {
    let server = Mortal::with(|command| {
        command.env("BATON_FAULT_POINT", format!("{point}={what}")).env("BATON_FAULT_HITS", hits);
    });
    let volume = server.create("d");
    assert_eq!(volume.source().queue.write(0, &[1; 512]), Status::Ok);
    (server, volume)
}

fn was_hit(hits: &Path, point: &str) -> bool {
    std::fs::read_to_string(hits).is_ok_and(|text| text.lines().any(|line| line == point))
}

/// Who has the volume in the end, and nobody else.
fn is_over(volume: &Member, steps: &[Step]) {
    let record = volume.record();
    let owner = record["owner"]["name"].as_str();
    match steps.len() {
        4 => assert_eq!(owner, Some(DESTINATION)),
        3 => assert_eq!(owner, Some(SOURCE)),
        _ => assert_eq!(owner, None),
    }
    let mut late = volume.control(SOURCE, S, AccessMode::Standby, 0);
    late.epoch = Epoch(1);
    assert_eq!(late.write(0, &[9; 512]), Status::NotPermitted);
}

#[test]
fn a_kill_at_each_point() {
    let files = tempfile::tempdir().expect("a directory");
    for mode in ["fast", "base"] {
        for (point, steps) in POINTS {
            let hits = files.path().join(format!("{mode}.{point}"));
            let (mut server, mut volume) = server(point, "kill", &hits);
            let mut killed = false;
            for step in steps {
                let (at, how) = (volume.clone(), mode.to_owned());
                let done = std::thread::spawn(move || step(&at, &how)).join();
                if !killed && was_hit(&hits, point) {
                    killed = true;
                    assert_eq!(server.died().signal(), Some(9), "{point} {mode}");
                    server.kill(&mut [&mut volume]);
                    // Said again, also if its answer had come.
                    step(&volume, mode);
                } else {
                    done.unwrap_or_else(|_| panic!("{point} {mode}: the step failed"));
                }
            }
            assert!(killed, "{point} was never passed");
            is_over(&volume, steps);
        }
    }
}

#[test]
fn a_stop_at_each_point() {
    let files = tempfile::tempdir().expect("a directory");
    for (point, steps) in POINTS {
        let hits = files.path().join(point);
        let (server, volume) = server(point, "stop", &hits);
        let pid = server.daemon().child.id();
        let mut stopped = false;
        for step in steps {
            let at = volume.clone();
            let running = std::thread::spawn(move || step(&at, "fast"));
            wait_for("it ends or stops", || running.is_finished() || is_stopped(pid));
            if is_stopped(pid) {
                stopped = true;
                assert!(was_hit(&hits, point));
                server.daemon().signal(Signal::SIGCONT);
            }
            running.join().unwrap_or_else(|_| panic!("{point}: the step failed"));
        }
        if !stopped {
            // The step had been answered just before.
            wait_for("it stops", || is_stopped(pid));
            server.daemon().signal(Signal::SIGCONT);
        }
        is_over(&volume, steps);
    }
}

/// The state in /proc/PID/stat is behind the name in parentheses.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}
