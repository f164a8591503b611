//! A guest that stamps its disks, on one of two hosts, and its moves between them step by step.

use baton_integration::baton::wait_until;
use baton_integration::faults::history::{Event, Judge, What};
use baton_integration::faults::stub::Stub;
use baton_integration::handoff::{Attempt, Begin, Fleet, Host, ask};
use baton_integration::proxy::Proxy;
use baton_integration::workspace::TestDir;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const DISK_BYTES: u64 = 16 << 20;
pub(crate) const SOON: Duration = Duration::from_secs(30);
pub(crate) const OWNERS: [&str; 2] = ["host-a/vm", "host-b/vm"];

/// A VM on one of two hosts, and the servers of its volumes.
pub(crate) struct Scene {
    pub(crate) dir: TestDir,
    pub(crate) fleet: Fleet,
    pub(crate) hosts: Vec<Host>,
    pub(crate) vmms: u64,
    /// The VMM that runs the guest, and its number.
    pub(crate) guest: Stub,
    pub(crate) runs: u64,
    /// Where it is.
    pub(crate) at: usize,
    /// Histories of the VMMs that the guest has left.
    pub(crate) past: Vec<Event>,
}

/// A guest that has stopped and is to go on elsewhere.
pub(crate) struct Moving {
    pub(crate) attempt: Attempt,
    pub(crate) saved: PathBuf,
    pub(crate) next: Stub,
    pub(crate) number: u64,
}

impl Moving {
    /// All that a VMM does from the stop of its rings to their start at the other side.
    pub(crate) fn switch(&self, scene: &Scene) {
        scene.say(scene.runs, &json!({ "cmd": "log" }));
        scene.say(scene.runs, &json!({ "cmd": "stop" }));
        scene.say(scene.runs, &json!({ "cmd": "save", "dir": self.saved }));
        scene.say(self.number, &json!({ "cmd": "load", "dir": self.saved }));
        scene.say(self.number, &json!({ "cmd": "run" }));
    }
}

impl Scene {
    /// With the source's connections by way of proxies, if there are any.
    pub(crate) fn new(
        name: &str,
        servers: usize,
        volumes: usize,
        proxied: bool,
    ) -> (Self, Vec<Proxy>) {
        let dir = TestDir::new(name).unwrap();
        let mut fleet = Fleet::start(dir.path(), servers, volumes, DISK_BYTES).unwrap();
        let proxy = |(server, seed): (SocketAddr, u64)| Proxy::start(server, seed).unwrap();
        let addresses = fleet.servers.iter().map(|server| server.data_address());
        let proxies: Vec<Proxy> =
            if proxied { addresses.zip(1..).map(proxy).collect() } else { Vec::new() };
        fleet.through = proxies.iter().map(Proxy::address).collect();
        let source = Host::start(dir.path(), "a", OWNERS[0], &fleet, Begin::Claim).unwrap();
        fleet.through.clear();
        (Self::begin(dir, fleet, source), proxies)
    }

    /// With a guest that runs at the source.
    pub(crate) fn begin(dir: TestDir, fleet: Fleet, source: Host) -> Self {
        let mut guest = Stub::start(dir.path(), 1, &source.sockets()).unwrap();
        guest.wait_ready().unwrap();
        guest.order("run").unwrap();
        guest.wait_progress(20, SOON).unwrap();
        let hosts = vec![source];
        Self { dir, fleet, hosts, vmms: 1, guest, runs: 1, at: 0, past: Vec::new() }
    }

    pub(crate) fn stand_by(&mut self) {
        let host =
            Host::start(self.dir.path(), "b", OWNERS[1], &self.fleet, Begin::Standby).unwrap();
        self.hosts.push(host);
    }

    /// The backend that the guest has left ends, or the one that lost it, and the next one of that host stands by.
    pub(crate) fn stand_by_again(&mut self) {
        let left = &mut self.hosts[1 - self.at];
        left.daemon.kill().unwrap();
        left.set_begin(Begin::Standby).unwrap();
        left.restart().unwrap();
    }

    pub(crate) fn here(&self) -> &Host {
        &self.hosts[self.at]
    }

    pub(crate) fn there(&self) -> &Host {
        &self.hosts[1 - self.at]
    }

    /// Arms a move and waits until the other host is ready for it.
    pub(crate) fn prepare(&mut self) -> Moving {
        let attempt = self.fleet.arm(OWNERS[self.at], OWNERS[1 - self.at]).unwrap();
        self.there().wait_standing("ready").unwrap();
        self.vmms += 1;
        let mut next = Stub::start(self.dir.path(), self.vmms, &self.there().sockets()).unwrap();
        next.wait_ready().unwrap();
        let saved = self.dir.join(&format!("saved-{}", self.vmms));
        Moving { attempt, saved, next, number: self.vmms }
    }

    /// Gives a VMM an order that may have to wait for a server that is away: longer than [`Stub`] waits.
    pub(crate) fn say(&self, vmm: u64, order: &Value) -> Value {
        let control = self.dir.join(&format!("vmm-{vmm}.control"));
        ask(&control, order, SOON).unwrap()
    }

    pub(crate) fn stop_guest(&self, moving: &Moving) {
        self.guest.order("log").unwrap();
        self.guest.order("stop").unwrap();
        self.guest.save(&moving.saved).unwrap();
    }

    /// The guest goes on over there, and only there.
    pub(crate) fn go_on(&mut self, moving: Moving) {
        moving.next.load(&moving.saved).unwrap();
        moving.next.order("run").unwrap();
        assert!(self.land(moving), "the source has it");
    }

    /// The guest has been told to run there: it goes on where the anchor says, and nowhere else. Whether it has moved.
    pub(crate) fn land(&mut self, moving: Moving) -> bool {
        let Moving { attempt, next, number, .. } = moving;
        wait_until("the anchor has decided", SOON, || self.fleet.proof(&attempt).is_ok()).unwrap();
        let winner = self.fleet.proof(&attempt).unwrap()["winner"].clone();
        let moved = winner == "destination";
        if moved {
            next.wait_progress(10, SOON).unwrap();
            self.past.extend(self.guest.history().unwrap());
            (self.guest, self.runs) = (next, number);
            self.at = 1 - self.at;
        } else {
            let there = next.history().unwrap();
            assert_eq!(there.iter().find(|event| event.what == What::Complete), None);
            drop(next);
            self.guest.order("run").unwrap();
            self.guest.wait_progress(10, SOON).unwrap();
        }
        assert_eq!(winner, self.fleet.settle(&attempt).unwrap());
        moved
    }

    /// The whole life of the guest was as it should be; the last word is a fresh look at every block.
    pub(crate) fn judge(&self) -> u64 {
        self.guest.sweep(SOON).unwrap();
        let mut judge = Judge::default();
        judge.follow(&self.past).unwrap();
        judge.follow(&self.guest.history().unwrap()).unwrap();
        assert_eq!(judge.unanswered(), 0);
        judge.completed()
    }
}
