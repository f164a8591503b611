//! What a guest sees when a process dies, freezes or is replaced: a pause, and never an error, a lost write or old data.

use baton_integration::baton::{Backend, Storage, wait_until};
use baton_integration::blk::{IOERR, OK, Request};
use baton_integration::guest::skip_without_qemu;
use baton_integration::proxy::Proxy;
use baton_integration::qemu::{Guest, GuestConfig};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

/// A guest on a volume, its replies late and out of order.
struct Stack {
    dir: TestDir,
    storage: Storage,
    proxy: Proxy,
    backend: Backend,
}

impl Stack {
    fn new(name: &str, seed: u64) -> Self {
        let dir = TestDir::new(name).unwrap();
        let storage = Storage::start(dir.path(), &[]).unwrap();
        storage.create("v", 64 * MIB).unwrap();
        let proxy = Proxy::start(storage.data_address(), seed).unwrap();
        let uri = storage.uri("v", Some(proxy.address()));
        let backend = Backend::start(dir.path(), "vm", &uri, &["--num-queues", "2"]).unwrap();
        Self { dir, storage, proxy, backend }
    }

    fn boot(&self) -> Guest {
        let config = GuestConfig { queues: 2, cpus: 2, ..GuestConfig::new(&self.backend.socket) };
        Guest::boot(self.dir.path(), &config).unwrap()
    }
}

#[test]
fn row_35_twenty_kills_of_the_backend_lose_nothing() {
    if skip_without_qemu("row_35_twenty_kills_of_the_backend_lose_nothing") {
        return;
    }
    let mut stack = Stack::new("kill", 11);
    stack.proxy.delay_replies(Duration::from_millis(3));
    let mut guest = stack.boot();
    guest.ask("load threads=4 depth=4 flush-every=40").unwrap();
    for _ in 0..20 {
        guest.wait_progress(150, SOON).unwrap();
        stack.backend.kill_and_restart().unwrap();
    }
    guest.wait_progress(150, SOON).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 3000, "{totals}");
    guest.power_off().unwrap();
    assert!(stack.backend.daemon.terminate(SOON).unwrap().success());
    // A clean end with no guest left gives the volume back.
    assert_eq!(stack.storage.show("v").unwrap()["access"]["phase"], "free");
}

#[test]
fn a_clean_end_gives_the_volume_back_and_raises_no_alarm() {
    let mut stack = Stack::new("clean", 13);
    for _ in 0..8 {
        assert!(stack.backend.daemon.terminate(SOON).unwrap().success());
        assert_eq!(stack.storage.show("v").unwrap()["access"]["phase"], "free");
        let log = stack.backend.daemon.log();
        assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
        stack.backend.restart().unwrap();
    }
}

#[test]
fn kills_of_the_storage_server_are_a_pause() {
    if skip_without_qemu("kills_of_the_storage_server_are_a_pause") {
        return;
    }
    let mut stack = Stack::new("server", 12);
    stack.proxy.delay_replies(Duration::from_millis(1));
    let mut guest = stack.boot();
    guest.ask("load threads=4 depth=4 flush-every=40").unwrap();
    for _ in 0..6 {
        guest.wait_progress(150, SOON).unwrap();
        stack.storage.kill_and_restart().unwrap();
    }
    guest.wait_progress(150, SOON).unwrap();
    let totals = guest.stop_load().unwrap();
    assert!(totals.ops >= 1000, "{totals}");
    let report = guest.ask("fs files=2 bytes=300000").unwrap();
    assert!(report.starts_with("bytes=600000 crc="), "{report}");
    guest.power_off().unwrap();
}

#[test]
fn a_grown_volume_reaches_the_guest_and_a_discard_gives_space_back() {
    if skip_without_qemu("a_grown_volume_reaches_the_guest_and_a_discard_gives_space_back") {
        return;
    }
    let stack = Stack::new("grow", 13);
    let mut guest = stack.boot();
    assert_eq!(guest.ask("size").unwrap(), format!("bytes={}", 64 * MIB));
    stack.storage.resize("v", 96 * MIB).unwrap();
    wait_until("the guest sees the new size", SOON, || {
        guest.ask("size").unwrap() == format!("bytes={}", 96 * MIB)
    })
    .unwrap();
    guest.ask("write start=20000 count=4 seq=1").unwrap();
    guest.ask("verify start=20000 count=4 seq=1").unwrap();
    assert!(stack.storage.resize("v", 32 * MIB).is_err(), "a shrink is refused");

    // In the new part: two whole extents are written, zeroed and given back.
    let allocated = || stack.storage.show("v").unwrap()["allocated_bytes"].as_u64().unwrap();
    let before = allocated();
    guest.ask("write start=20480 count=512 seq=2").unwrap();
    guest.ask("flush").unwrap();
    assert_eq!(allocated(), before + 2 * MIB);
    guest.ask("zeroout start=20480 count=3").unwrap();
    guest.ask("verify-zero start=20480 count=3").unwrap();
    guest.ask("verify start=20483 count=509 seq=2").unwrap();
    guest.ask("discard start=20480 count=512").unwrap();
    assert_eq!(allocated(), before);
    guest.ask("verify-zero start=20480 count=512").unwrap();
    guest.power_off().unwrap();
}

fn write_all(frontend: &mut RawFrontend, byte: u8) {
    for sector in (0..64).step_by(8) {
        frontend.queue(0).write(sector, &[byte; 4096]).unwrap();
    }
}

fn assert_all(frontend: &mut RawFrontend, byte: u8) {
    for sector in (0..64).step_by(8) {
        assert_eq!(frontend.queue(0).read(sector, 4096).unwrap(), [byte; 4096], "sector {sector}");
    }
}

/// The old backend is frozen with requests in its ring and with requests on their way to the server; a new one takes
/// over and writes; then everything old wakes up.
#[test]
fn a_frozen_backend_that_was_replaced_changes_nothing() {
    let dir = TestDir::new("zombie").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    let proxy = Proxy::start(storage.data_address(), 1).unwrap();
    let owner = ["--owner", "host/vm"];
    let old = Backend::start(dir.path(), "old", &storage.uri("v", Some(proxy.address())), &owner)
        .unwrap();
    let mut late = RawFrontend::connect(&old.socket, Options::default()).unwrap();
    write_all(&mut late, 0xaa);

    proxy.hold_requests();
    let before = proxy.request_bytes();
    for sector in (0..64).step_by(8) {
        late.queue(0).submit(&Request::Write { sector, data: &[0xbb; 4096] }).unwrap();
    }
    late.queue(0).kick_anyway().unwrap();
    let sent = before + 8 * (64 + 4096);
    wait_until("the old backend has sent", SOON, || proxy.request_bytes() >= sent).unwrap();
    old.daemon.freeze().unwrap();
    for sector in (0..64).step_by(8) {
        late.queue(0).submit(&Request::Write { sector, data: &[0xcc; 4096] }).unwrap();
    }
    late.queue(0).kick_anyway().unwrap();

    let new = Backend::start(dir.path(), "new", &storage.uri("v", None), &owner).unwrap();
    let mut current = RawFrontend::connect(&new.socket, Options::default()).unwrap();
    assert_all(&mut current, 0xaa);
    write_all(&mut current, 0xdd);

    let stale = storage.metric("baton_stale_requests_total").unwrap();
    proxy.release_requests();
    old.daemon.thaw().unwrap();
    wait_until("the late requests are refused", SOON, || {
        storage.metric("baton_stale_requests_total").unwrap() > stale
    })
    .unwrap();
    wait_until("the old backend knows it was fenced", SOON, || old.daemon.log().contains("fenced"))
        .unwrap();
    assert_eq!(
        late.queue(0).wait_completion(Duration::from_secs(1)).unwrap(),
        None,
        "parked, not failed"
    );
    assert_all(&mut current, 0xdd);
    // Its rings can still be stopped, so that the VMM is not stuck.
    late.get_vring_base(0).unwrap();
    assert_all(&mut current, 0xdd);
}

#[test]
fn another_owner_is_refused_until_the_volume_is_fenced() {
    let dir = TestDir::new("owner").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    let uri = storage.uri("v", None);
    let first = Backend::start(dir.path(), "a", &uri, &["--owner", "host-a/vm"]).unwrap();
    let mut frontend = RawFrontend::connect(&first.socket, Options::default()).unwrap();
    write_all(&mut frontend, 1);
    let refused = Backend::start(dir.path(), "b", &uri, &["--owner", "host-b/vm"]).unwrap_err();
    assert!(format!("{refused:#}").contains("host-a/vm"), "{refused:#}");

    storage.fence("v", None).unwrap();
    let second = Backend::start(dir.path(), "b", &uri, &["--owner", "host-b/vm"]).unwrap();
    let mut other = RawFrontend::connect(&second.socket, Options::default()).unwrap();
    assert_all(&mut other, 1);
    write_all(&mut other, 2);
    frontend.queue(0).submit(&Request::Write { sector: 0, data: &[3; 4096] }).unwrap();
    frontend.queue(0).kick().unwrap();
    assert_eq!(frontend.queue(0).wait_completion(Duration::from_secs(1)).unwrap(), None);
    assert_all(&mut other, 2);
    // Nor does a restart on the fenced host bring it back.
    let again = Backend::start(dir.path(), "c", &uri, &["--owner", "host-a/vm"]).unwrap_err();
    assert!(format!("{again:#}").contains("host-b/vm"), "{again:#}");
}

#[test]
fn a_silent_network_is_waited_out() {
    let dir = TestDir::new("silent").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    let proxy = Proxy::start(storage.data_address(), 1).unwrap();
    let backend =
        Backend::start(dir.path(), "vm", &storage.uri("v", Some(proxy.address())), &[]).unwrap();
    let mut frontend = RawFrontend::connect(&backend.socket, Options::default()).unwrap();
    write_all(&mut frontend, 1);
    proxy.fall_silent();
    frontend.queue(0).submit(&Request::Write { sector: 0, data: &[2; 4096] }).unwrap();
    frontend.queue(0).kick().unwrap();
    assert_eq!(frontend.queue(0).wait_completion(Duration::from_secs(2)).unwrap(), None);
    proxy.speak();
    // The old connection is still mute: the client must find out by itself and make another.
    let done =
        frontend.queue(0).wait_completion(Duration::from_secs(40)).unwrap().expect("a completion");
    assert_eq!(done.status, OK);
    assert_eq!(frontend.queue(0).read(0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_volume_that_became_another_is_not_written() {
    let dir = TestDir::new("other").unwrap();
    let mut storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    let backend = Backend::start(dir.path(), "vm", &storage.uri("v", None), &[]).unwrap();
    let mut frontend = RawFrontend::connect(&backend.socket, Options::default()).unwrap();
    write_all(&mut frontend, 1);
    storage.daemon.kill().unwrap();
    frontend.queue(0).submit(&Request::Write { sector: 0, data: &[2; 4096] }).unwrap();
    frontend.queue(0).kick().unwrap();
    // The same name on the same port, but somebody else's volume, owned by nobody.
    storage.restart_on(&dir.join("data2")).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    assert_eq!(frontend.queue(0).wait_completion(Duration::from_secs(3)).unwrap(), None);
    assert_eq!(storage.show("v").unwrap()["allocated_bytes"], 0);
    // The right one again.
    storage.daemon.kill().unwrap();
    storage.restart_on(&dir.join("data")).unwrap();
    assert_eq!(storage.show("v").unwrap()["allocated_bytes"], MIB);
}

#[test]
fn a_full_pool_fails_new_space_only() {
    let dir = TestDir::new("full").unwrap();
    let storage = Storage::start(dir.path(), &["--pool-size", "8M"]).unwrap();
    storage.create("v", 64 * MIB).unwrap();
    let backend = Backend::start(dir.path(), "vm", &storage.uri("v", None), &[]).unwrap();
    let mut frontend = RawFrontend::connect(&backend.socket, Options::default()).unwrap();
    let queue = frontend.queue(0);
    let extent = |n: u64| n * MIB / 512;
    for n in 0..8 {
        queue.write(extent(n), &[1; 4096]).unwrap();
    }
    let more = Request::Write { sector: extent(8), data: &[1; 4096] };
    assert_eq!(queue.request(&more).unwrap().status, IOERR);
    queue.write(extent(3), &[2; 4096]).unwrap();
    assert_eq!(queue.read(extent(3), 4096).unwrap(), [2; 4096]);
    assert_eq!(queue.read(extent(8), 4096).unwrap(), [0; 4096]);
    queue.flush().unwrap();
    let discard = Request::Discard { sector: extent(3), sectors: 2048 };
    assert_eq!(queue.request(&discard).unwrap().status, OK);
    queue.write(extent(8), &[1; 4096]).unwrap();
    assert_eq!(queue.read(extent(3), 4096).unwrap(), [0; 4096]);
    assert!(backend.daemon.log().contains("full"), "the log says why:\n{}", backend.daemon.log());
}
