//! A frozen host that comes back: what it had on its way to the storage bounces.
//!
//! The control step of CI runs this on a server that lets every epoch in, and there it must fail: a test of fencing
//! that cannot fail proves nothing.

use baton_integration::baton::{Backend, Storage, wait_until};
use baton_integration::blk::Request;
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
/// For what must not happen.
const MOMENT: Duration = Duration::from_millis(200);
const BLOCKS: u64 = 8;
const BLOCK: usize = 4096;
const SECTORS: u64 = 8;

fn write_all(disk: &mut RawFrontend, salt: u8) {
    for block in 0..BLOCKS {
        disk.queue(0).write(block * SECTORS, &[salt; BLOCK]).unwrap();
    }
}

#[test]
fn row_27_writes_of_a_frozen_source_bounce_when_it_thaws() {
    let dir = TestDir::new("zombie").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 16 << 20).unwrap();
    let proxy = Proxy::start(storage.data_address(), 3).unwrap();
    let through = storage.uri("v", Some(proxy.address()));
    let source = Backend::start(dir.path(), "a", &through, &["--owner", "host-a/vm"]).unwrap();
    let mut guest = RawFrontend::connect(&source.socket, Options::default()).unwrap();
    write_all(&mut guest, 1);

    // Requests are in the socket when the host freezes.
    proxy.hold_requests();
    let before = proxy.request_bytes();
    for block in 0..BLOCKS {
        let write = Request::Write { sector: block * SECTORS, data: &[2; BLOCK] };
        guest.queue(0).submit(&write).unwrap();
    }
    guest.queue(0).kick().unwrap();
    let all = BLOCKS * BLOCK as u64;
    wait_until("the writes are on their way", SOON, || proxy.request_bytes() >= before + all)
        .unwrap();
    source.daemon.freeze().unwrap();

    // Nobody waits for it: the volume goes to another host, which writes.
    storage.fence("v", Some("host-b/vm")).unwrap();
    let direct = storage.uri("v", None);
    let next = Backend::start(dir.path(), "b", &direct, &["--owner", "host-b/vm"]).unwrap();
    let mut other = RawFrontend::connect(&next.socket, Options::default()).unwrap();
    write_all(&mut other, 3);

    let count = |name| storage.metric(name).unwrap_or(0.0);
    let told = || (count("baton_stale_requests_total"), count("baton_written_bytes_total"));
    let before = told();
    source.daemon.thaw().unwrap();
    proxy.release_requests();
    wait_until("the old writes arrive", SOON, || told() != before).unwrap();
    for block in 0..BLOCKS {
        let found = other.queue(0).read(block * SECTORS, BLOCK).unwrap();
        assert!(found == [3; BLOCK], "a zombie's write landed in block {block}: {:?}", &found[..4]);
    }
    let answer = guest.queue(0).wait_used(MOMENT).unwrap();
    assert_eq!(answer, None, "a zombie's write was acknowledged");
    assert_eq!(told().1, before.1, "a zombie's write was carried out");
}
