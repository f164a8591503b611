//! Three coordinators on three real members of etcd, with all of Baton running and a guest whose every answer is judged:
//! whoever of them dies, freezes or is cut off in the middle of a handoff, another goes on with it, and one that leads no
//! more changes nothing.

#[path = "support/trio.rs"]
mod trio;

use baton_integration::etcd::skip_without_etcd;
use baton_integration::faults::cluster::VM;
use baton_integration::handoff::Fleet;
use baton_integration::proxy::Proxy;
use baton_integration::workspace::program;
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::time::Instant;
use trio::{COORDINATORS, POLL, SOON, Trio, path};

/// Where a handoff stands when its coordinator is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Ready,
    ReadyThenCancel,
    Sealed,
    Active,
}

#[test]
fn a_leader_that_is_killed_in_a_handoff_has_a_successor_who_ends_it() {
    if skip_without_etcd("a_leader_that_is_killed_in_a_handoff_has_a_successor_who_ends_it") {
        return;
    }
    let mut trio = Trio::start("etcd-kill", "");
    let mut last = trio.leader();
    for at in [At::Ready, At::Sealed, At::ReadyThenCancel, At::Active] {
        let from = trio.stage.at;
        let id = trio.prepare(None);
        let saved = match at {
            At::Ready | At::ReadyThenCancel => None,
            At::Sealed => {
                let saved = trio.stage.leave().unwrap();
                trio.until("it is sealed", |trio| {
                    Ok((trio.row(&id, None)?["state"] == "SEALED").then_some(()))
                });
                Some(saved)
            }
            At::Active => {
                trio.stage.switch().unwrap();
                trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
                None
            }
        };
        let killed = Instant::now();
        trio.kill(last.0);
        // The switch needs no coordinator.
        match (at, &saved) {
            (At::Sealed, Some(saved)) => trio.stage.arrive(saved).unwrap(),
            (At::Ready, _) => trio.stage.switch().unwrap(),
            _ => {}
        }
        if at != At::ReadyThenCancel {
            trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
        }
        // It may be the same one, which was started again.
        let term = last.1;
        let next = trio.until("a successor leads", |trio| {
            Ok(trio.leading(None).ok().filter(|(_, next)| *next > term))
        });
        eprintln!(
            "{at:?}: {} leads {} ms after the kill of {}",
            next.0,
            killed.elapsed().as_millis(),
            last.0
        );
        last = next;
        let verb = if at == At::ReadyThenCancel { "cancel" } else { "finish" };
        let row = trio.end(&id, verb, None);
        let outcome = if at == At::ReadyThenCancel { "source" } else { "destination" };
        assert_eq!(row["outcome"], outcome, "{at:?}: {row:#}");
        trio.stage.land();
        assert_eq!(trio.stage.at == from, at == At::ReadyThenCancel, "{at:?}");
    }
    assert!(trio.stage.judge() > 40);
}

#[test]
fn the_coordinators_go_on_while_etcd_loses_its_leader() {
    if skip_without_etcd("the_coordinators_go_on_while_etcd_loses_its_leader") {
        return;
    }
    let mut trio = Trio::start("etcd-leader", "");
    let before = trio.leader();
    let id = trio.prepare(None);
    let member = trio.etcd.leader().unwrap();
    trio.etcd.kill(member).unwrap();
    trio.stage.switch().unwrap();
    let from = trio.stage.at;
    trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
    let row = trio.end(&id, "finish", None);
    assert_eq!(row["outcome"], "destination", "{row:#}");
    trio.stage.land();
    // A lease outlives the choice of another leader of etcd; one that does not, on a busy machine, is no harm.
    eprintln!("before: {before:?}, after: {:?}", trio.leader());
    trio.etcd.restart(member).unwrap();
    assert!(trio.stage.judge() > 20);
}

/// The machines run on, nothing new begins and says why, and what was under way ends when etcd is back.
#[test]
fn without_a_majority_of_etcd_nothing_begins_and_nothing_is_lost() {
    if skip_without_etcd("without_a_majority_of_etcd_nothing_begins_and_nothing_is_lost") {
        return;
    }
    let mut trio = Trio::start("etcd-majority", "");
    let (leader, term) = trio.leader();
    let id = trio.prepare(None);
    let kept = trio.etcd.values("/baton/handoffs/").unwrap();
    for member in [0, 1] {
        trio.etcd.freeze(member).unwrap();
    }
    // The switch has no need of it either.
    let from = trio.stage.at;
    trio.stage.switch().unwrap();
    trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
    let exit = trio.coordinators[leader].daemon.wait_exit(SOON).unwrap();
    assert_eq!(exit.code(), Some(6), "{}", trio.coordinators[leader].daemon.log());
    trio.mend();
    let new = Fleet::attempt().id;
    let body = json!({"from": from.host(), "to": from.other().host()});
    for kept in &trio.coordinators {
        // It takes a follower a moment to see that it does not know any more.
        let deadline = Instant::now() + SOON;
        let said = loop {
            let error =
                kept.call("PUT", &path(&new, ""), Some(&body)).expect_err("no handoff begins");
            let said = format!("{error:#}");
            if said.contains("etcd cannot be reached") || Instant::now() > deadline {
                break said;
            }
            std::thread::sleep(POLL);
        };
        for part in ["503", "baton:no-leader", "etcd cannot be reached", "VMs run on"] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    trio.stage.world.vmm(from.other()).unwrap().wait_progress(20, SOON).unwrap();
    for member in [0, 1] {
        trio.etcd.thaw(member).unwrap();
    }
    let (_, next) = trio.leader();
    assert!(next > term, "term {next} after {term}");
    assert!(trio.row(&new, None).is_err(), "what was refused has not begun");
    let row = trio.end(&id, "finish", None);
    assert_eq!(row["outcome"], "destination", "{row:#}");
    assert_eq!(kept.len(), trio.etcd.values("/baton/handoffs/").unwrap().len());
    trio.stage.land();
    assert_ne!(trio.stage.at, from);
    assert!(trio.stage.judge() > 20);
}

/// The one that leads is cut off from etcd, with a write of its journal on the way, which arrives when another leads.
#[test]
fn a_leader_that_is_cut_off_from_etcd_ends_and_its_late_writes_are_refused() {
    if skip_without_etcd("a_leader_that_is_cut_off_from_etcd_ends_and_its_late_writes_are_refused")
    {
        return;
    }
    // It would end in time. This one does not know what time it is: only etcd, the servers and the agents are left.
    let more = "[danger_zone]\nenabled = true\nignore_lease = true\n";
    let mut trio = Trio::start("etcd-cut", more);
    let (old, _) = trio.leader();
    trio.watched = Some(old);
    let id = trio.prepare(None);
    for proxy in &trio.proxies[old] {
        proxy.hold_requests();
    }
    // To be journalled: it waits there.
    let client = trio.coordinators[old].client();
    let sent: u64 = trio.proxies[old].iter().map(Proxy::request_bytes).sum();
    let late = {
        let path = path(&id, ":cancel?timeout=5s");
        std::thread::spawn(move || client.call("POST", &path, None))
    };
    trio.until("its write is on the way", |trio| {
        let now: u64 = trio.proxies[old].iter().map(Proxy::request_bytes).sum();
        Ok((now > sent + 1000).then_some(()))
    });
    let (new, _) = trio.leader_but(old);
    assert_ne!(old, new);
    // It ends the handoff the other way.
    trio.stage.switch().unwrap();
    let from = trio.stage.at;
    trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
    let row = trio.end(&id, "finish", Some(old));
    assert_eq!(row["outcome"], "destination", "{row:#}");
    let before = trio.journal();
    for proxy in &trio.proxies[old] {
        proxy.release_requests();
    }
    let exit = trio.coordinators[old].daemon.wait_exit(SOON).unwrap();
    assert_eq!(exit.code(), Some(6), "{}", trio.coordinators[old].daemon.log());
    assert!(late.join().unwrap().is_err(), "the cancel was not carried out");
    assert_eq!(trio.journal(), before, "a late write has changed the journal");
    trio.stage.land();
    assert_ne!(trio.stage.at, from);
    assert!(trio.stage.judge() > 20);
}

/// A leader is frozen in the middle of a handoff, with requests before it that it has not read, and thawed when another
/// has ended the handoff. It takes no notice of its lease. Whether it comes to read them before etcd tells it that
/// another leads, nobody decides here: either way nothing may come of them.
#[test]
fn a_leader_that_was_frozen_and_thaws_can_do_nothing() {
    if skip_without_etcd("a_leader_that_was_frozen_and_thaws_can_do_nothing") {
        return;
    }
    let more = "[danger_zone]\nenabled = true\nignore_lease = true\n";
    let mut trio = Trio::start("etcd-frozen", more);
    let (old, term) = trio.leader();
    trio.watched = Some(old);
    let id = trio.prepare(None);
    trio.coordinators[old].daemon.freeze().unwrap();
    let client = trio.coordinators[old].client().within(SOON);
    let ask = |path: String, body: Option<Value>| {
        std::thread::spawn(move || client.call("POST", &path, body.as_ref()))
    };
    let fence = json!({"dead_host": "host-b", "reason": "a test", "force": true});
    let late = [
        ask(path(&id, ":cancel"), None),
        // Has no row in the journal: if it is read at all, only the servers can refuse it.
        ask(format!("/v1/vms/{VM}:fence"), Some(fence)),
    ];
    let (_, next) = trio.leader_but(old);
    assert!(next > term);
    trio.stage.switch().unwrap();
    let from = trio.stage.at;
    trio.stage.world.vmm(from.other()).unwrap().wait_progress(10, SOON).unwrap();
    let row = trio.end(&id, "finish", Some(old));
    assert_eq!(row["outcome"], "destination", "{row:#}");
    let records = |trio: &Trio| -> Vec<Value> {
        (0..2).map(|n| trio.stage.world.fleet.record(n).unwrap()).collect()
    };
    let (journal, before) = (trio.journal(), records(&trio));
    assert!(
        before.iter().all(|record| record["coordinator_term"].as_u64() == Some(next)),
        "{before:#?}"
    );
    trio.coordinators[old].daemon.thaw().unwrap();
    let exit = trio.coordinators[old].daemon.wait_exit(SOON).unwrap();
    let log = trio.coordinators[old].daemon.log();
    assert_eq!(exit.code(), Some(6), "{log}");
    for late in late {
        let answer = late.join().unwrap();
        assert!(answer.is_err(), "it was obeyed: {answer:?}");
    }
    assert_eq!(records(&trio), before, "an access record has changed");
    assert_eq!(trio.journal(), journal, "the journal has changed");
    trio.goes_on_there();
    trio.stage.land();
    assert_ne!(trio.stage.at, from);
    assert!(trio.stage.judge() > 20);
}

/// The command finds the one that leads among the addresses it was given, also when the first is frozen or dead.
#[test]
fn the_command_goes_on_to_the_leader_by_itself() {
    if skip_without_etcd("the_command_goes_on_to_the_leader_by_itself") {
        return;
    }
    let mut trio = Trio::start("etcd-cli", "");
    let (leader, _) = trio.leader();
    let url = |trio: &Trio, n: usize| format!("http://{}", trio.coordinators[n].address());
    let follower = (leader + 1) % COORDINATORS;
    let third = (leader + 2) % COORDINATORS;
    let says = |coordinators: &str, args: &[&str]| {
        let output = Command::new(program("baton").unwrap())
            .args(args)
            .env("BATON_COORDINATOR", coordinators)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (output.status.code(), text.concat())
    };
    // Of a follower alone it learns where the leader is, as soon as that one knows.
    let (code, text) = says(&url(&trio, follower), &["vm", "list"]);
    assert!(code == Some(0) && text.contains(VM), "{code:?} {text}");

    trio.coordinators[leader].daemon.freeze().unwrap();
    let all = [leader, follower, third].map(|n| url(&trio, n)).join(",");
    let begun = Instant::now();
    let to = trio.stage.at.other().host();
    // It waits for the next leader.
    let (code, text) = says(&all, &["handoff", "prepare", VM, "--to", to, "--wait"]);
    eprintln!("{:?}: {text}", begun.elapsed());
    assert!(code == Some(0) && text.contains("READY"), "{code:?} {text}");
    trio.kill(leader);
    let (code, text) = says(&all, &["handoff", "cancel", VM]);
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = says(&all, &["coordinator", "list"]);
    assert!(code == Some(0) && text.contains("leader") && text.contains("follower"), "{text}");
    assert!(text.contains("cannot reach"), "the dead one is named: {text}");

    for member in 0..3 {
        trio.etcd.kill(member).unwrap();
    }
    for n in [follower, third] {
        let _ = trio.coordinators[n].daemon.kill();
    }
    let (code, text) = says(&url(&trio, third), &["vm", "list"]);
    assert!(code == Some(3) && text.contains("cannot reach"), "{code:?} {text}");
    trio.goes_on();
}
