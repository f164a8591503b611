//! A guest under load moves to and fro between two hosts, its disks on Baton: nothing it wrote is lost, stale or
//! corrupt, and it never sees an error.
//!
//! The guest re-reads what it wrote, and checks its RAM copies of what it has read: stale RAM would be a hole in the
//! dirty log.

use baton_integration::baton::wait_until;
use baton_integration::guest::skip_without_qemu;
use baton_integration::handoff::{Begin, Fleet, Host};
use baton_integration::migration::{Migration, Pace, destination, run_state};
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::workspace::TestDir;
use std::path::Path;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 << 20;
const OWNERS: [&str; 2] = ["host-a/vm", "host-b/vm"];

/// Moves so many; `BATON_MOVES` changes it.
fn moves() -> usize {
    std::env::var("BATON_MOVES").ok().and_then(|text| text.parse().ok()).unwrap_or(50)
}

/// One move as an orchestrator that knows nothing of storage does it (implicit mode), prepared and finished by the
/// coordinator that the test plays.
fn move_once(
    dir: &Path,
    fleet: &Fleet,
    from: &Host,
    to: &Host,
    source: Guest,
    config: &GuestConfig,
) -> Guest {
    let attempt = fleet.arm(&from.owner, &to.owner).unwrap();
    to.wait_standing("ready").unwrap();
    let mut guest = destination(dir, config).unwrap();
    let mut migration = Migration::begin(&source, &guest, Pace::FULL).unwrap();
    migration.wait_pre_switchover().unwrap();
    let status = from.status().unwrap();
    let drained = |disk: &serde_json::Value| disk["drained"] == true;
    assert!(status["disks"].as_array().unwrap().iter().all(drained), "{status}");
    migration.switch_over().unwrap();
    migration.wait_completed().unwrap();
    // QEMU says "completed" a moment before its run state follows.
    wait_until("the source has let the guest go", SOON, || {
        run_state(&mut migration.source).is_ok_and(|state| state == "postmigrate")
    })
    .unwrap();
    drop(source);
    to.wait_standing("serving").unwrap();
    assert_eq!(fleet.settle(&attempt).unwrap(), "destination");
    guest.resynchronise().unwrap();
    guest
}

fn to_and_fro(name: &str, volumes: usize, servers: usize, queues: u16) {
    if skip_without_qemu(name) {
        return;
    }
    let dir = TestDir::new(name).unwrap();
    let fleet = Fleet::start(dir.path(), servers, volumes, DISK_BYTES).unwrap();
    let mut here =
        Host::start_with(dir.path(), "backend-0", OWNERS[0], &fleet, Begin::Claim, queues).unwrap();
    let mut config = GuestConfig {
        name: "guest-0".to_owned(),
        sockets: here.sockets(),
        queues,
        cpus: 2,
        ..GuestConfig::new(here.socket(0))
    };
    let mut guest = Guest::boot(dir.path(), &config).unwrap();
    // Sixteen requests at a time on each disk.
    let devices = ["vda", "vdb", "vdc"][..volumes].join(",");
    guest.ask(&format!("load dev={devices} threads=4 depth=4 flush-every=50")).unwrap();
    guest.wait_progress(300, SOON).unwrap();
    for number in 1..=moves() {
        let owner = OWNERS[number % 2];
        let label = format!("backend-{number}");
        let there =
            Host::start_with(dir.path(), &label, owner, &fleet, Begin::Standby, queues).unwrap();
        config.name = format!("guest-{number}");
        config.sockets = there.sockets();
        guest = move_once(dir.path(), &fleet, &here, &there, guest, &config);
        guest.wait_progress(50, SOON).unwrap();
        here = there;
    }
    let totals = guest.stop_load().unwrap();
    assert_eq!((totals.errs, totals.stale, totals.corrupt), (0, 0, 0), "{totals}");
    eprintln!("{} moves, {totals}", moves());
    guest.power_off().unwrap();
}

#[test]
fn one_volume_moves_to_and_fro() {
    to_and_fro("one_volume_moves_to_and_fro", 1, 1, 2);
}

#[test]
fn three_volumes_on_two_servers_move_together() {
    to_and_fro("three_volumes_on_two_servers_move_together", 3, 2, 1);
}
