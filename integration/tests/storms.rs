//! Coordinators that die all the time, that are two, and that are asked everything at once by everybody: F10, F11 and
//! F12 of docs/scenarios.md, with all of Baton running and a guest whose every answer is judged.
//!
//! However the orchestration goes, the guest goes on at one side, no answer is wrong, and nothing is left armed.

#[path = "support/stage.rs"]
mod stage;

use anyhow::Result;
use baton_integration::baton::wait_until;
use baton_integration::faults::case::Actor;
use baton_integration::faults::cluster::{Client, Kept, VM};
use baton_integration::faults::guest::mix;
use baton_integration::faults::injector::Register;
use baton_integration::faults::world::Side;
use baton_integration::handoff::Fleet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use stage::{SOON, Stage};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// So many times, or `BATON_STORM` times by wish.
fn rounds(most: u64) -> u64 {
    std::env::var("BATON_STORM").map_or(most, |text| text.parse().expect("a number"))
}

fn path(id: &str, more: &str) -> String {
    format!("/v1/vms/{VM}/handoffs/{id}{more}")
}

fn put(client: Client, id: &str, from: Side) -> Result<Value> {
    let body = json!({ "from": from.host(), "to": from.other().host() });
    client.call("PUT", &path(id, "?wait=READY&timeout=1s"), Some(&body))
}

fn post(client: Client, id: &str, verb: &str) -> Result<Value> {
    client.call("POST", &path(id, &format!(":{verb}?timeout=500ms")), None)
}

fn is_unknown(answer: &Result<Value>) -> bool {
    answer.as_ref().is_err_and(|error| format!("{error:#}").contains("baton:stale-attempt"))
}

/// Kills a process again and again, a while after it is up.
struct Killer {
    /// Lives since the last step forward: each is a little longer than the one before, so that there is one.
    lives: Arc<AtomicU64>,
    kills: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Killer {
    fn start(register: &Register, victim: Actor) -> Self {
        let (lives, kills) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let stop = Arc::<AtomicBool>::default();
        let (register, theirs) =
            (Arc::clone(register), (lives.clone(), kills.clone(), stop.clone()));
        let thread = std::thread::spawn(move || {
            let (lives, kills, stop) = theirs;
            while !stop.load(Ordering::Relaxed) {
                let found = register.lock().unwrap().get(&victim).and_then(|who| who.pid());
                if let Some(pid) = found {
                    let grown = 10 * lives.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(50 + grown));
                    // It may be gone already: a process takes a while to die.
                    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
                    kills.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { lives, kills, stop, thread: Some(thread) }
    }

    fn step(&self) {
        self.lives.store(0, Ordering::Relaxed);
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn f10_a_coordinator_that_is_killed_all_the_time_still_moves_the_guest() {
    let mut stage = Stage::new("f10");
    let killer = Killer::start(&stage.world.register, Actor::Coordinator);
    let client = stage.world.coordinator.client();
    let handoffs = rounds(5);
    for _ in 0..handoffs {
        let (from, mut id) = (stage.at, Fleet::attempt().id);
        let id = stage.until("the handoff is ready", |_| {
            let row = put(client, &id, from)?;
            if row["over"] == true {
                // It was called off, by who found it half done: ask for another.
                id = Fleet::attempt().id;
            }
            Ok((row["state"] == "READY").then(|| id.clone()))
        });
        killer.step();
        stage.switch().unwrap();
        stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
        stage.until("the handoff is over", |_| {
            let row = post(client, &id, "finish")?;
            assert_ne!(row["outcome"], "source", "{row}");
            Ok((row["over"] == true).then_some(()))
        });
        killer.step();
        stage.land();
        assert_eq!(stage.at, from.other(), "the guest has moved");
    }
    let kills = killer.kills.load(Ordering::Relaxed);
    drop(killer);
    eprintln!("{handoffs} handoffs, the coordinator was killed {kills} times");
    assert!(kills >= handoffs, "{kills}");
    assert!(stage.judge() > 40 * handoffs);
}

/// Each has a journal of its own, and each is started again when it has stepped down: the worst set-up there is.
#[test]
fn f11_two_coordinators_move_the_guest_once_or_not_at_all() {
    let mut stage = Stage::new("f11");
    let mut rival = stage.world.rival(&stage.dir.join("rival")).unwrap();
    let clients = [stage.world.coordinator.client(), rival.client()];
    let mut moved = 0;
    for _ in 0..rounds(6) {
        let from = stage.at;
        let ids = [Fleet::attempt().id, Fleet::attempt().id];
        std::thread::scope(|scope| {
            for (client, id) in clients.iter().zip(&ids) {
                // One of them may be refused, or end.
                scope.spawn(|| put(*client, id, from));
            }
        });
        let ready = stage.until("one is ready, or none will be", |stage| {
            revive(&mut rival);
            let rows = [0, 1].map(|n| clients[n].call("GET", &path(&ids[n], ""), None));
            let record = stage.world.fleet.record(0)?;
            for n in 0..2 {
                let ready = rows[n].as_ref().is_ok_and(|row| row["state"] == "READY");
                if ready && record["handoff"]["id"] == ids[n].as_str() {
                    return Ok(Some(Some(n)));
                }
            }
            let out = |row: &Result<Value>| {
                is_unknown(row) || row.as_ref().is_ok_and(|row| row["over"] == true)
            };
            Ok(rows.iter().all(out).then_some(None))
        });
        if let Some(winner) = ready {
            stage.switch().unwrap();
            stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
            stage.until("the handoff is over", |_| {
                revive(&mut rival);
                let row = post(clients[winner], &ids[winner], "finish")?;
                assert_ne!(row["outcome"], "source", "{row}");
                Ok((row["over"] == true).then_some(()))
            });
            moved += 1;
        }
        for n in 0..2 {
            call_off(&mut stage, clients[n], &ids[n], || revive(&mut rival));
        }
        stage.land();
        assert_eq!(stage.at == from, ready.is_none());
    }
    eprintln!("{moved} moves");
    assert!(moved > 0, "nothing has moved");
    assert!(stage.judge() > 40);
}

fn revive(rival: &mut Kept) {
    if !rival.daemon.is_running().unwrap() {
        // A start that fails is tried again.
        let _ = rival.restart(&Vec::new());
    }
}

/// Until this handoff is over, or was never known.
fn call_off(stage: &mut Stage, client: Client, id: &str, mut each: impl FnMut()) {
    stage.until("everything is called off", |_| {
        each();
        let row = client.call("GET", &path(id, ""), None);
        if is_unknown(&row) {
            return Ok(Some(()));
        }
        if row?["over"] == true {
            return Ok(Some(()));
        }
        post(client, id, "cancel").map(|_| None)
    });
}

/// In every other round nobody cancels, so that the guest moves.
#[test]
fn f12_ten_clients_that_ask_everything_at_once_move_the_guest_once_or_not_at_all() {
    let mut stage = Stage::new("f12");
    let client = stage.world.coordinator.client();
    let mut moved = 0;
    for round in 0..rounds(6) {
        let from = stage.at;
        let cancels = round % 2 == 1;
        let ids = [Fleet::attempt().id, Fleet::attempt().id];
        let (stop, switched) = (AtomicBool::new(false), AtomicBool::new(false));
        let asked = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for number in 0..10 {
                let (ids, stop, switched, asked) = (&ids, &stop, &switched, &asked);
                scope.spawn(move || {
                    let mut random = mix(round << 32 | number);
                    while !stop.load(Ordering::Relaxed) {
                        random = mix(random);
                        let id = &ids[usize::from(random & 8 != 0)];
                        let answer = match random % 8 {
                            0..=2 => put(client, id, from),
                            // Another body under the same id.
                            3 => put(client, id, from.other()),
                            4 if cancels => post(client, id, "cancel"),
                            // A finish before the guest has moved calls it off as well.
                            4 | 5 if cancels || switched.load(Ordering::Relaxed) => {
                                post(client, id, "finish")
                            }
                            _ => client.call("GET", &path(id, ""), None),
                        };
                        asked.fetch_add(1, Ordering::Relaxed);
                        if let Err(error) = answer {
                            let text = format!("{error:#}");
                            let said = text.contains("baton:") && !text.contains(" 500 ");
                            assert!(said, "no answer for a person: {text}");
                        }
                    }
                });
            }
            let ready = wait_until(
                "one is ready",
                Duration::from_secs(if cancels { 5 } else { 60 }),
                || {
                    ids.iter().any(|id| {
                        let row = client.call("GET", &path(id, ""), None);
                        row.is_ok_and(|row| row["state"] == "READY")
                    })
                },
            );
            if ready.is_ok() {
                // A cancel may come between any two of its steps.
                if let Err(error) = stage.switch() {
                    eprintln!("the switch was broken off: {error:#}");
                }
                switched.store(true, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(300));
            }
            stop.store(true, Ordering::Relaxed);
        });
        if cancels {
            let _ = stage.world.vmm(from).unwrap().order("run");
        }
        for id in &ids {
            // What has moved has moved: a cancel comes too late for it.
            stage.until("it is finished or called off", |_| {
                let row = client.call("GET", &path(id, ""), None);
                if is_unknown(&row) || row.as_ref().is_ok_and(|row| row["over"] == true) {
                    return Ok(Some(()));
                }
                let verb = if cancels { "cancel" } else { "finish" };
                if post(client, id, verb).is_err() {
                    post(client, id, "cancel")?;
                }
                Ok(None)
            });
        }
        stage.land();
        moved += u64::from(stage.at != from);
        eprintln!("round {round}: {} requests, now at the {:?}", asked.into_inner(), stage.at);
    }
    assert!(moved > 0, "nothing has moved");
    assert!(stage.judge() > 40);
}
