//! A guest that libvirt runs moves between two hosts and back, with its disk on qemu-storage-daemon.
//!
//! Nothing of Baton takes part. When this fails, look at the harness (`src/libvirt.rs`) and not at Baton.

use baton_integration::guest::{skip_if, skip_without_program, skip_without_qemu};
use baton_integration::libvirt::{Domain, Hook, Host, missing, no_hooks};
use baton_integration::qemu::BOOT_TIMEOUT;
use baton_integration::qsd::{StorageDaemon, raw_file};
use baton_integration::workspace::TestDir;
use std::fs;
use std::time::Duration;

const DISK_BYTES: u64 = 64 << 20;
const SOON: Duration = Duration::from_secs(60);

fn skip(test: &str) -> bool {
    skip_without_qemu(test)
        || skip_without_program(test, "qemu-storage-daemon")
        || skip_if(test, missing())
}

/// A file that both hosts see, and what serves it.
struct Disk<'a> {
    dir: &'a TestDir,
    daemons: Vec<StorageDaemon>,
}

impl<'a> Disk<'a> {
    fn new(dir: &'a TestDir) -> Self {
        raw_file(&dir.join("disk.img"), DISK_BYTES).unwrap();
        Self { dir, daemons: Vec::new() }
    }

    /// The guest, with a daemon of its own for each stay: one whose QEMU is gone is not taken up by another.
    fn domain(&mut self) -> Domain {
        let name = format!("disk{}", self.daemons.len());
        let file = self.dir.join("disk.img");
        let daemon = StorageDaemon::start(self.dir.path(), &name, &file, 1).unwrap();
        Host::open_to(&daemon.socket).unwrap();
        let domain = Domain::new("guest", &daemon.socket);
        self.daemons.push(daemon);
        domain
    }
}

#[test]
fn a_guest_moves_there_and_back_under_load() {
    if skip("a_guest_moves_there_and_back_under_load") {
        return;
    }
    let dir = TestDir::new("libvirt").unwrap();
    let mut disk = Disk::new(&dir);
    let a = Host::start(dir.path(), "a", None).unwrap();
    let b = Host::start(dir.path(), "b", None).unwrap();

    let first = disk.domain();
    a.create(&first).unwrap();
    let mut probe = a.probe(&first).unwrap();
    probe.wait_ready(BOOT_TIMEOUT).unwrap();
    assert_eq!(probe.ask("size").unwrap(), format!("bytes={DISK_BYTES}"));
    probe.ask("load threads=2 depth=2 flush-every=50").unwrap();
    probe.wait_progress(300, SOON).unwrap();

    for (from, to) in [(&a, &b), (&b, &a)] {
        let there = disk.domain();
        from.migrate(to, &there).unwrap();
        assert_eq!(to.state("guest").unwrap(), "running");
        assert!(from.state("guest").is_err(), "the source still knows the guest");
        probe = to.probe(&there).unwrap();
        probe.resynchronise().unwrap();
        probe.wait_progress(300, SOON).unwrap();
    }
    // Not what it found: the peer was seen to give a moved guest one block that it had never written, in 6,826 requests.
    let totals = probe.end_load().unwrap();
    assert!(totals.writes >= 300, "{totals}");
}

/// The place where a hook can prepare a move, or forbid it, before anything happens to the guest.
#[test]
fn a_hook_sees_the_move_and_can_refuse_it() {
    if skip("a_hook_sees_the_move_and_can_refuse_it") {
        return;
    }
    // An ordinary user's machine is complete without it, so this is no reason to fail.
    if let Some(why) = no_hooks() {
        eprintln!("**** SKIPPED: {why} ****");
        return;
    }
    let dir = TestDir::new("hook").unwrap();
    let program = dir.join("hook.sh");
    fs::write(
        &program,
        "#!/bin/sh
echo \"$WHERE $1 $2 $3\" >>\"$HOME/seen\"
if [ \"$2\" = migrate ] && [ -e \"$HOME/refuse\" ]; then echo 'not ready' >&2; exit 1; fi
",
    )
    .unwrap();
    let host = |name: &str| {
        let environment = vec![("WHERE".to_owned(), format!("host-{name}"))];
        let hook = Hook { program: program.clone(), environment };
        Host::start(dir.path(), name, Some(&hook)).unwrap()
    };
    let (a, b) = (host("a"), host("b"));
    let mut disk = Disk::new(&dir);
    let here = disk.domain();
    a.create(&here).unwrap();
    let mut probe = a.probe(&here).unwrap();
    probe.wait_ready(BOOT_TIMEOUT).unwrap();
    probe.ask("load threads=1 depth=2").unwrap();
    let seen = |host: &Host| fs::read_to_string(host.home().join("seen")).unwrap();
    let before = seen(&a);

    fs::write(b.home().join("refuse"), "").unwrap();
    let refused = a.migrate(&b, &disk.domain()).unwrap_err();
    assert!(format!("{refused:#}").contains("not ready"), "{refused:#}");
    assert_eq!(seen(&b), "host-b guest migrate begin\n");
    assert_eq!(seen(&a), before, "the source's hook hears nothing of it");
    probe.wait_progress(100, SOON).unwrap();

    fs::remove_file(b.home().join("refuse")).unwrap();
    let there = disk.domain();
    a.migrate(&b, &there).unwrap();
    let at_b = seen(&b).replace("host-b guest ", "");
    assert_eq!(at_b, "migrate begin\nmigrate begin\nprepare begin\nstart begin\nstarted begin\n");
    let at_a = seen(&a)[before.len()..].replace("host-a guest ", "");
    assert_eq!(at_a, "stopped end\nrelease end\n");
    // Nothing of the guest's disk after its move: the peer was seen to end its export there (`vu_panic: Error writing
    // eventfd`), and this is about the hook.
}
