//! A backend that was fenced on a real Ceph cluster: what it still has to say when it comes back changes no byte.

use baton_integration::baton::{Backend, wait_until};
use baton_integration::blk::Request;
use baton_integration::ceph::{Ceph, Objects, skip_without_ceph};
use baton_integration::handoff::ask;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use serde_json::json;
use std::fs;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
/// For what must not happen.
const MOMENT: Duration = Duration::from_millis(500);
const BLOCKS: u64 = 16;
const BLOCK: usize = 4096;
const SECTORS: u64 = 8;

fn write_all(disk: &mut RawFrontend, salt: u8) {
    for block in 0..BLOCKS {
        disk.queue(0).write(block * SECTORS, &[salt; BLOCK]).unwrap();
    }
    disk.queue(0).flush().unwrap();
}

/// The trap of Ceph's blocklist: an entry that ends lets in what a frozen client has kept. Here all entries that Ceph
/// makes by itself end after two seconds, and the frozen backend finds its guest's writes when it thaws.
#[test]
fn a_frozen_backend_writes_nothing_when_it_thaws_after_every_default_entry_has_ended() {
    let name = "a_frozen_backend_writes_nothing_when_it_thaws_after_every_default_entry_has_ended";
    if skip_without_ceph(name) {
        return;
    }
    let dir = TestDir::new("expiry").unwrap();
    let short = "mon osd blocklist default expire = 2\nmon tick interval = 1";
    let ceph = Ceph::start_with(dir.path(), Objects::Memory, short).unwrap();
    ceph.create_image("v", 4 << 20).unwrap();
    let uri = ceph.uri("v");
    let control = dir.join("control");
    let more = ["--owner", "host/vm", "--control", control.to_str().unwrap()];
    let source = Backend::start(dir.path(), "a", &uri, &more).unwrap();
    let mut guest = RawFrontend::connect(&source.socket, Options::default()).unwrap();
    write_all(&mut guest, 1);
    source.daemon.freeze().unwrap();
    for block in 0..BLOCKS {
        let write = Request::Write { sector: block * SECTORS, data: &[2; BLOCK] };
        guest.queue(0).submit(&write).unwrap();
    }
    guest.queue(0).kick_anyway().unwrap();

    // The next process of the same owner fences the frozen one and writes.
    let next = Backend::start(dir.path(), "b", &uri, &["--owner", "host/vm"]).unwrap();
    let mut other = RawFrontend::connect(&next.socket, Options::default()).unwrap();
    write_all(&mut other, 3);
    let somebody = "127.0.0.1:0/7";
    ceph.ceph(&["osd", "blocklist", "add", somebody]).unwrap();
    wait_until("an entry with Ceph's own expiry has ended", SOON, || {
        !ceph.blocklisted().unwrap().contains_key(somebody)
    })
    .unwrap();
    let before = ceph.export("v").unwrap();
    let written = usize::try_from(BLOCKS).unwrap() * BLOCK;
    assert!(before[..written].iter().all(|byte| *byte == 3));

    source.daemon.thaw().unwrap();
    wait_until("the old backend notices", SOON, || {
        let status = ask(&control, &json!({ "cmd": "status" }), SOON).unwrap();
        status["disks"][0]["state"] == "fenced"
    })
    .unwrap();
    assert_eq!(guest.queue(0).wait_used(MOMENT).unwrap(), None, "a zombie's write was answered");
    assert!(ceph.export("v").unwrap() == before, "a zombie's write landed");
}

/// The entry of an earlier client may have been made by somebody else a moment ago, and an OSD may not have heard of it.
/// Whoever gets the image asks the monitors for the latest map before its first request to the data, so that each OSD
/// hears of the entry by that request at the latest. What it says to the cluster, and when, is in Ceph's own log of it.
#[test]
fn who_gets_an_image_has_the_latest_map_before_it_writes() {
    if skip_without_ceph("who_gets_an_image_has_the_latest_map_before_it_writes") {
        return;
    }
    let dir = TestDir::new("map").unwrap();
    let logs =
        format!("[client]\nlog file = {}/client.$pid.log\ndebug ms = 1", dir.path().display());
    let ceph = Ceph::start_with(dir.path(), Objects::Memory, &logs).unwrap();
    ceph.create_image("v", 4 << 20).unwrap();
    let owner = ["--owner", "host/vm"];
    let start = |name| Backend::start(dir.path(), name, &ceph.uri("v"), &owner).unwrap();
    let mut first = start("a");
    first.daemon.kill().unwrap();
    // This one makes the entry, and gives the image back; it is not the business of the next any more.
    let mut second = start("b");
    assert!(second.daemon.terminate(SOON).unwrap().success());
    let third = start("c");
    let mut guest = RawFrontend::connect(&third.socket, Options::default()).unwrap();
    write_all(&mut guest, 1);

    let log = dir.join(&format!("client.{}.log", third.daemon.pid()));
    let mut lines = Vec::new();
    let said = |line: &String, what: &str| line.contains(" --> ") && line.contains(what);
    wait_until("the first write is in the log", SOON, || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        lines = text.lines().map(str::to_owned).collect();
        lines.iter().any(|line| said(line, ":::rbd_data."))
    })
    .unwrap();
    let write = lines.iter().position(|line| said(line, ":::rbd_data.")).unwrap();
    let asked = lines[..write].iter().position(|line| said(line, "mon_get_version(what=osdmap"));
    let answer = |line: &String| line.contains("<== mon.") && line.contains("get_version_reply");
    let answered = lines[..write].iter().position(answer);
    assert!(asked.is_some() && answered > asked, "{asked:?} {answered:?}\n{}", lines.join("\n"));
}
