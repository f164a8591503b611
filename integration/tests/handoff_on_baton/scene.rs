//! Two hosts with the disks of one VM, which a raw front-end plays on both.

use baton_integration::blk::Request;
use baton_integration::handoff::{Attempt, Begin, Fleet, Host};
use baton_integration::proxy::Proxy;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::time::Duration;

const DISK_BYTES: u64 = 16 << 20;
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// For things that must not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(300);
pub(crate) const QUEUES: u16 = 2;

/// Of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Two hosts with the VM's disks, a handoff from the first to the second, and the VM running on the first.
pub(crate) struct Scene {
    pub(crate) fleet: Fleet,
    pub(crate) source: Host,
    pub(crate) destination: Host,
    /// The VM on the source, by disk.
    pub(crate) guest: Vec<RawFrontend>,
    pub(crate) attempt: Attempt,
    pub(crate) dir: TestDir,
}

pub(crate) fn options() -> Options {
    Options { queues: QUEUES, ..Options::default() }
}

pub(crate) fn connect(host: &Host, disks: usize, options: Options) -> Vec<RawFrontend> {
    (0..disks).map(|disk| RawFrontend::connect(host.socket(disk), options).unwrap()).collect()
}

pub(crate) fn block(salt: u8) -> Vec<u8> {
    vec![salt; 4096]
}

impl Scene {
    /// Up to the moment before the VM stops: armed, ready, a dirty log kept.
    pub(crate) fn new(servers: usize, disks: usize, mode: &'static str) -> Self {
        Self::begin(servers, disks, mode, None).0
    }

    /// [`Self::new`] in fast mode, with the connections of one host by way of proxies, one for each server.
    pub(crate) fn proxied(servers: usize, disks: usize, host: Side) -> (Self, Vec<Proxy>) {
        Self::begin(servers, disks, "fast", Some(host))
    }

    fn begin(
        servers: usize,
        disks: usize,
        mode: &'static str,
        proxied: Option<Side>,
    ) -> (Self, Vec<Proxy>) {
        let dir = TestDir::new("handoff").unwrap();
        let mut fleet = Fleet::start(dir.path(), servers, disks, DISK_BYTES).unwrap();
        fleet.mode = mode;
        let host = |fleet: &Fleet, label, owner, begin| {
            Host::start_with(dir.path(), label, owner, fleet, begin, QUEUES).unwrap()
        };
        let proxies: Vec<Proxy> = match proxied {
            Some(_) => fleet
                .servers
                .iter()
                .zip(1..)
                .map(|(server, seed)| Proxy::start(server.data_address(), seed).unwrap())
                .collect(),
            None => Vec::new(),
        };
        let through = |side| match proxied == Some(side) {
            true => proxies.iter().map(Proxy::address).collect(),
            false => Vec::new(),
        };
        fleet.through = through(Side::Source);
        let source = host(&fleet, "a", "host-a/vm", Begin::Claim);
        let mut guest = connect(&source, disks, options());
        for (disk, salt) in guest.iter_mut().zip(1..) {
            disk.queue(0).write(0, &block(salt)).unwrap();
        }
        fleet.through = through(Side::Destination);
        let destination = host(&fleet, "b", "host-b/vm", Begin::Standby);
        let attempt = fleet.arm("host-a/vm", "host-b/vm").unwrap();
        destination.wait_standing("ready").unwrap();
        for disk in &mut guest {
            disk.start_logging().unwrap();
        }
        fleet.through.clear();
        (Self { fleet, source, destination, guest, attempt, dir }, proxies)
    }

    pub(crate) fn write_more(&mut self) {
        for (disk, salt) in self.guest.iter_mut().zip(101..) {
            disk.queue(1).write(8, &block(salt)).unwrap();
        }
    }

    /// The VMM on the source stops its guest.
    pub(crate) fn stop(&mut self) {
        self.guest.iter().for_each(Self::stop_one);
    }

    pub(crate) fn stop_one(disk: &RawFrontend) {
        for queue in 0..QUEUES {
            disk.enable(queue, false).unwrap();
        }
        for queue in 0..QUEUES {
            disk.get_vring_base(queue).unwrap();
        }
    }

    /// The VMM on the source was told to cancel, and goes on with its guest.
    pub(crate) fn resume(&mut self) {
        self.guest.iter_mut().for_each(Self::resume_one);
    }

    pub(crate) fn resume_one(disk: &mut RawFrontend) {
        for index in 0..QUEUES {
            let base = disk.queue(index).ring.used_index();
            disk.set_up_queue(index, base).unwrap();
            disk.enable(index, true).unwrap();
            disk.queue(index).kick_anyway().unwrap();
        }
    }

    /// The VMM on the destination starts it.
    pub(crate) fn start_there(&self) -> Vec<RawFrontend> {
        connect(&self.destination, self.guest.len(), options())
    }

    pub(crate) fn check(guest: &mut [RawFrontend]) {
        for (disk, salt) in guest.iter_mut().zip(1..) {
            assert_eq!(disk.queue(0).read(0, 4096).unwrap(), block(salt));
            assert_eq!(disk.queue(1).read(8, 4096).unwrap(), block(salt + 100));
            disk.queue(1).write(16, &block(salt + 50)).unwrap();
            disk.queue(0).flush().unwrap();
            assert_eq!(disk.queue(0).read(16, 4096).unwrap(), block(salt + 50));
        }
    }
}

/// The disk's requests wait and get no answer.
pub(crate) fn is_parked(disk: &mut RawFrontend) {
    let data = block(0xbd);
    disk.queue(0).submit(&Request::Write { sector: 0, data: &data }).unwrap();
    disk.queue(0).kick().unwrap();
    assert!(disk.queue(0).wait_completion(A_WHILE).unwrap().is_none(), "answered");
}
