//! A guest that libvirt runs is moved by an unmodified `virsh migrate --live`, with all of Baton running and its hook
//! installed: there and back under load, and not at all while the coordinator is away.

use baton_integration::cluster::{Cluster, Driver, HOSTS, VM};
use baton_integration::guest::{skip_if, skip_without_qemu};
use baton_integration::libvirt::{Domain, Hook, Host, missing, no_hooks};
use baton_integration::probe::Probe;
use baton_integration::qemu::BOOT_TIMEOUT;
use baton_integration::workspace::{TestDir, program};
use std::fs;
use std::path::Path;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

/// True when this cannot run here; hooks are no reason to fail, since an ordinary user's machine is complete without.
fn skip(test: &str) -> bool {
    if skip_without_qemu(test) || skip_if(test, missing()) {
        return true;
    }
    let why = no_hooks();
    if let Some(why) = &why {
        eprintln!("**** SKIPPED: {test}: {why} ****");
    }
    why.is_some()
}

/// The two hosts as libvirt sees them, each with the hook that is shipped.
fn hosts(dir: &TestDir, cluster: &Cluster) -> [Host; 2] {
    // The user of libvirtd may not reach where it was built.
    let baton = dir.join("baton");
    fs::copy(program("baton").unwrap(), &baton).unwrap();
    HOSTS.map(|name| {
        let environment = [
            ("BATON", baton.to_str().unwrap()),
            ("BATON_HOST", name),
            ("BATON_COORDINATOR", cluster.url()),
        ];
        let hook = Hook {
            program: Path::new(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../configs/libvirt-hook-qemu"
            ))
            .to_owned(),
            environment: environment.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        };
        Host::start(dir.path(), &format!("libvirt-{name}"), Some(&hook)).unwrap()
    })
}

fn start(cluster: &Cluster, host: &Host, domain: &Domain) -> Probe {
    host.create(domain).unwrap();
    let mut probe = host.probe(domain).unwrap();
    probe.wait_ready(BOOT_TIMEOUT).unwrap();
    probe.ask("load threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(300, SOON).unwrap();
    assert_eq!(cluster.access().unwrap()["owner_host"], HOSTS[0]);
    probe
}

#[test]
fn virsh_moves_a_guest_there_and_back() {
    if skip("virsh_moves_a_guest_there_and_back") {
        return;
    }
    let dir = TestDir::new("virsh").unwrap();
    let cluster = Cluster::start(dir.path(), 1, Driver::Other).unwrap();
    let hosts = hosts(&dir, &cluster);
    let domain =
        |n: usize| Domain { queues: 2, ..Domain::new(VM, &cluster.hosts[n].socket("disk0")) };
    let mut probe = start(&cluster, &hosts[0], &domain(0));

    for (from, to) in [(0, 1), (1, 0)] {
        let there = domain(to);
        hosts[from].migrate(&hosts[to], &there).unwrap();
        assert_eq!(hosts[to].state(VM).unwrap(), "running");
        // The hook on the source has finished the handoff before virsh came back.
        let last = cluster.handoffs().unwrap().pop().unwrap();
        assert_eq!((&last["over"], &last["to"]), (&true.into(), &HOSTS[to].into()), "{last:#}");
        cluster.wait_owner(HOSTS[to]).unwrap();
        probe = hosts[to].probe(&there).unwrap();
        probe.resynchronise().unwrap();
        probe.wait_progress(300, SOON).unwrap();
    }
    let totals = probe.stop_load().unwrap();
    assert!(totals.writes >= 300, "{totals}");
}

#[test]
fn virsh_is_refused_while_nothing_can_be_prepared() {
    if skip("virsh_is_refused_while_nothing_can_be_prepared") {
        return;
    }
    let dir = TestDir::new("unprepared").unwrap();
    let mut cluster = Cluster::start(dir.path(), 1, Driver::Other).unwrap();
    let hosts = hosts(&dir, &cluster);
    let [here, there] = [0, 1]
        .map(|n: usize| Domain { queues: 2, ..Domain::new(VM, &cluster.hosts[n].socket("disk0")) });
    let mut probe = start(&cluster, &hosts[0], &here);

    cluster.coordinator.kill().unwrap();
    let refused = format!("{:#}", hosts[0].migrate(&hosts[1], &there).unwrap_err());
    assert!(refused.contains("the coordinator does not answer"), "{refused}");
    probe.wait_progress(100, SOON).unwrap();

    // A migration that fails after it was prepared: the hook gives the volumes back.
    cluster.restart_coordinator().unwrap();
    // QEMU cannot make its socket where a directory is.
    let in_the_way = hosts[1].home().join("../guest/web.probe");
    fs::create_dir(&in_the_way).unwrap();
    let failed = format!("{:#}", hosts[0].migrate(&hosts[1], &there).unwrap_err());
    assert!(failed.contains("web.probe"), "{failed}");
    fs::remove_dir(&in_the_way).unwrap();
    probe.wait_progress(100, SOON).unwrap();
    cluster.wait_owner(HOSTS[0]).unwrap();
    let last = cluster.handoffs().unwrap().pop().unwrap();
    assert_eq!((&last["over"], &last["outcome"]), (&true.into(), &"source".into()), "{last:#}");

    hosts[0].migrate(&hosts[1], &there).unwrap();
    cluster.wait_owner(HOSTS[1]).unwrap();
    probe = hosts[1].probe(&there).unwrap();
    probe.resynchronise().unwrap();
    probe.stop_load().unwrap();
}
