//! Three coordinators on etcd, and a cable: the one that leads is cut off from etcd by a network that answers nothing,
//! while it goes on to reach agents, storage servers and its operators.

#[path = "support/trio.rs"]
mod trio;

use baton_integration::etcd::{Etcd, skip_without_etcd};
use baton_integration::faults::cluster::{Place, VM};
use baton_integration::island::{FIXED, ISLAND, Island, LOOSE, skip_without_network};
use baton_integration::proxy::Proxy;
use serde_json::{Value, json};
use trio::stage::Stage;
use trio::{SOON, TTL, Trio, path, quick};

/// The one on the island.
const CUT: usize = 0;

/// A trio whose first coordinator is on an island, and leads.
fn start(island: &Island, stage: Stage, more: &str) -> (Trio, Vec<Proxy>) {
    let mut stage = stage;
    stage.world.retire_coordinator().unwrap();
    let etcd = Etcd::start(stage.dir.path(), 3).unwrap();
    let relay = |ip, server| Proxy::of_bytes_at(ip, server).unwrap();
    let doors: Vec<_> =
        stage.world.doors().into_iter().map(|door| (door, relay(FIXED, door))).collect();
    let through = doors.iter().map(|(door, proxy)| (*door, proxy.address())).collect();
    let place = Place { prefix: island.prefix(), ip: ISLAND, through };
    let to_etcd: Vec<Proxy> =
        etcd.clients().into_iter().map(|client| relay(LOOSE, client)).collect();
    let section = |endpoints: Vec<String>| {
        format!("endpoints = {endpoints:?}\nlease_ttl_s = {}\n{more}", TTL.as_secs())
    };
    let by_cable = to_etcd.iter().map(|proxy| format!("http://{}", proxy.address())).collect();
    let cut = stage.world.one_of_several_at(&place, "c0", &section(by_cable)).unwrap();
    let (proxies, coordinators) = (Vec::new(), vec![cut]);
    let mut trio = Trio { stage, etcd, proxies, coordinators, deposed: 0, watched: None };
    trio.until("the one on the island leads", |trio| {
        Ok((quick(trio.coordinators[CUT].client(), "/v1/leader")?["role"] == "leader")
            .then_some(()))
    });
    for name in ["c1", "c2"] {
        let section = section(trio.etcd.endpoints());
        trio.coordinators.push(trio.stage.world.one_of_several(name, &section).unwrap());
    }
    (trio, to_etcd)
}

/// It takes no notice of its lease: only etcd, the servers and the agents are left to stop it.
#[test]
fn a_leader_behind_a_pulled_cable_can_do_nothing_and_follows_when_it_is_back() {
    let name = "a_leader_behind_a_pulled_cable_can_do_nothing_and_follows_when_it_is_back";
    if skip_without_etcd(name) || skip_without_network(name) {
        return;
    }
    let scratch = baton_integration::workspace::TestDir::new("island").unwrap();
    let island = Island::make(scratch.path()).unwrap();
    let more = "[danger_zone]\nenabled = true\nignore_lease = true\n";
    let (mut trio, to_etcd) = start(&island, Stage::new("etcd-cable"), more);
    let (old, term) = trio.leader();
    assert_eq!(old, CUT);
    trio.watched = Some(CUT);
    let id = trio.prepare(None);
    let door = to_etcd[0].address();
    assert!(island.is_answered(door).unwrap());

    island.pull().unwrap();
    assert!(!island.is_answered(door).unwrap(), "who connects is answered");
    // It is reached by its operators, and says nothing to what it cannot write down.
    let client = trio.coordinators[CUT].client();
    let cancel = {
        let path = path(&id, ":cancel?timeout=5s");
        std::thread::spawn(move || client.call("POST", &path, None))
    };
    let (_, next) = trio.leader_but(CUT);
    assert!(next > term, "term {next} after {term}");
    let from = trio.stage.at;
    trio.stage.switch().unwrap();
    let row = trio.end(&id, "finish", Some(CUT));
    assert_eq!(row["outcome"], "destination", "{row:#}");
    let records = |trio: &Trio| -> Vec<Value> {
        (0..2).map(|n| trio.stage.world.fleet.record(n).unwrap()).collect()
    };
    let (journal, before) = (trio.journal(), records(&trio));
    assert!(before.iter().all(|record| record["coordinator_term"] == next), "{before:#?}");
    // Has no row in the journal: only the servers can refuse it, if agents and servers have not told it yet.
    let fence = json!({"dead_host": "host-b", "reason": "a test", "force": true});
    let fenced = client.call("POST", &format!("/v1/vms/{VM}:fence"), Some(&fence));
    assert!(fenced.is_err(), "it was obeyed: {fenced:?}");
    let exit = trio.coordinators[CUT].daemon.wait_exit(SOON).unwrap();
    let log = trio.coordinators[CUT].daemon.log();
    assert_eq!(exit.code(), Some(6), "{log}");
    assert!(log.contains(&format!("{next}")), "{log}");
    let cancelled = cancel.join().unwrap();
    assert!(cancelled.is_err(), "it was obeyed: {cancelled:?}");
    assert_eq!((trio.journal(), records(&trio)), (journal, before), "something has changed");

    // Its supervisor starts it again, on the island: it leads nothing, and says why.
    trio.watched = None;
    trio.mend();
    trio.until("it says that it cannot reach etcd", |trio| {
        let error = quick(trio.coordinators[CUT].client(), "/v1/handoffs").expect_err("no leader");
        let said = format!("{error:#}");
        let parts = ["503", "baton:no-leader", "etcd cannot be reached"];
        Ok(parts.iter().all(|part| said.contains(part)).then_some(()))
    });
    island.plug().unwrap();
    trio.until("it follows", |trio| {
        let answer = quick(trio.coordinators[CUT].client(), "/v1/leader")?;
        Ok((answer["role"] == "follower" && answer["leader"]["term"] == next).then_some(()))
    });
    trio.goes_on_there();
    trio.stage.land();
    assert_ne!(trio.stage.at, from);
    // The next handoff has all three.
    let id = trio.prepare(None);
    trio.stage.switch().unwrap();
    assert_eq!(trio.end(&id, "finish", None)["outcome"], "destination");
    trio.stage.land();
    assert_eq!(trio.stage.at, from);
    assert!(trio.stage.judge() > 20);
}
