//! All processes of a case: two storage servers or a Ceph cluster, a coordinator, and on each of two hosts an agent with a backend, and a
//! VMM.
//!
//! What dies is started again as its supervisor would do it, but not before the injector says so, and never a VMM: a
//! guest whose VMM is gone is gone, and boots again where its volumes are. Backends are the agents' business.

use super::case::{Actor, Case, Story};
use super::cluster::{AgentHost, Kept, Place, coordinator, one_of_several};
use super::history::{self, Event};
use super::injector::{Register, Who};
use super::stub::{Stub, history_path};
use crate::baton::{Environment, Storage};
use crate::daemon::Daemon;
use crate::handoff::{Begin, Fleet, Host};
use crate::images::SharedCeph;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Size of each volume; the guest uses a small part.
const DISK_BYTES: u64 = 16 << 20;
/// Owner name of whoever looks at the end.
const JUDGE: &str = "host-c/judge";
/// Between two tries to start something that does not start.
const RESTART: Duration = Duration::from_millis(300);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest runs at first.
    Source,
    /// Where it is to go.
    Destination,
}

impl Side {
    /// Name of the host.
    #[must_use]
    pub fn host(self) -> &'static str {
        match self {
            Self::Source => "host-a",
            Self::Destination => "host-b",
        }
    }

    /// Owner name of its backend.
    #[must_use]
    pub fn owner(self) -> &'static str {
        match self {
            Self::Source => "host-a/vm",
            Self::Destination => "host-b/vm",
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    fn backend(self) -> Actor {
        match self {
            Self::Source => Actor::SourceBackend,
            Self::Destination => Actor::DestinationBackend,
        }
    }

    fn agent(self) -> Actor {
        match self {
            Self::Source => Actor::SourceAgent,
            Self::Destination => Actor::DestinationAgent,
        }
    }

    fn vmm(self) -> Actor {
        match self {
            Self::Source => Actor::SourceVmm,
            Self::Destination => Actor::DestinationVmm,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct World {
    /// Storage servers and volumes.
    pub fleet: Fleet,
    /// Who runs, for the injector.
    pub register: Register,
    /// Its REST API is what the orchestrator uses.
    pub coordinator: Kept,
    dir: PathBuf,
    hits: PathBuf,
    hosts: [AgentHost; 2],
    vmms: [Option<Stub>; 2],
    vmms_started: u64,
    /// Of the VMMs that were started on each host.
    numbers: [Vec<u64>; 2],
    last_restart: Instant,
    /// Others coordinate.
    retired: bool,
}

impl World {
    /// Starts the servers, the agents, the coordinator, and the backend and the VMM of the source.
    pub fn start(dir: &Path, case: Case, hits: &Path) -> Result<Self> {
        let env = |actors: &[Actor]| environment(case, actors, hits);
        let fleet = Fleet::start_in(dir, case.volumes, case.volumes, DISK_BYTES, |n| {
            env(&[if n == 0 { Actor::Anchor } else { Actor::Other }])
        })?;
        Self::begin(dir, fleet, hits, case.story == Story::Evacuate, env)
    }

    /// The same with images of a cluster, named after the directory.
    pub fn start_on(ceph: &SharedCeph, dir: &Path, case: Case, hits: &Path) -> Result<Self> {
        let prefix = dir.file_name().context("the directory has a name")?.to_string_lossy();
        let fleet = Fleet::on_ceph(ceph, &prefix, case.volumes, DISK_BYTES)?;
        Self::begin(dir, fleet, hits, false, |actors| environment(case, actors, hits))
    }

    /// The same processes with no point at which anybody stops.
    pub fn undisturbed(dir: &Path, volumes: usize) -> Result<Self> {
        let hits = dir.join("hits");
        let env = |_: &[Actor]| hits_only(&hits);
        let fleet = Fleet::start_in(dir, volumes, volumes, DISK_BYTES, |_| env(&[]))?;
        Self::begin(dir, fleet, &hits, false, env)
    }

    /// `everywhere`: both hosts have the VM's definition, not only the one where it runs.
    fn begin(
        dir: &Path,
        fleet: Fleet,
        hits: &Path,
        everywhere: bool,
        env: impl Fn(&[Actor]) -> Environment,
    ) -> Result<Self> {
        let host = |side: Side| {
            let env = env(&[side.agent(), side.backend()]);
            AgentHost::start(dir, side.host(), &fleet, everywhere || side == Side::Source, &env)
        };
        let hosts = [host(Side::Source)?, host(Side::Destination)?];
        let named = [(Side::Source.host(), &hosts[0]), (Side::Destination.host(), &hosts[1])];
        let coordinator = coordinator(dir, &fleet, named, &env(&[Actor::Coordinator]))?;
        let mut world = Self {
            fleet,
            register: Register::default(),
            coordinator,
            dir: dir.to_owned(),
            hits: hits.to_owned(),
            hosts,
            vmms: [None, None],
            vmms_started: 0,
            numbers: [Vec::new(), Vec::new()],
            last_restart: Instant::now(),
            retired: false,
        };
        world.host(Side::Source).own()?;
        world.start_vmm(Side::Source)?;
        Ok(world)
    }

    /// Starts one more coordinator, with a journal of its own in `dir`.
    pub fn rival(&self, dir: &Path) -> Result<Kept> {
        fs::create_dir_all(dir)?;
        let named = [Side::Source, Side::Destination].map(|side| (side.host(), self.host(side)));
        coordinator(dir, &self.fleet, named, &hits_only(&self.hits))
    }

    /// Ends the coordinator for good: others coordinate from now on.
    pub fn retire_coordinator(&mut self) -> Result<()> {
        self.retired = true;
        self.coordinator.daemon.kill()
    }

    /// Starts one of several coordinators on one etcd; see [`one_of_several`].
    pub fn one_of_several(&self, name: &str, more: &str) -> Result<Kept> {
        let named = [Side::Source, Side::Destination].map(|side| (side.host(), self.host(side)));
        one_of_several(&self.dir, name, &self.fleet, named, more, None)
    }

    /// The same in another place.
    pub fn one_of_several_at(&self, place: &Place, name: &str, more: &str) -> Result<Kept> {
        let named = [Side::Source, Side::Destination].map(|side| (side.host(), self.host(side)));
        one_of_several(&self.dir, name, &self.fleet, named, more, Some(place))
    }

    /// Where agents and the servers' admin APIs listen.
    #[must_use]
    pub fn doors(&self) -> Vec<SocketAddr> {
        let agents = self.hosts.iter().map(|host| host.agent.address());
        agents.chain(self.fleet.servers.iter().map(Storage::admin_address)).collect()
    }

    /// Starts a VMM on a host, whose backend runs; an earlier one is killed.
    pub fn start_vmm(&mut self, side: Side) -> Result<()> {
        self.vmms[side as usize] = None;
        self.vmms_started += 1;
        let sockets = self.host(side).sockets();
        let stub = Stub::start(&self.dir, self.vmms_started, &sockets)?;
        self.vmms[side as usize] = Some(stub);
        self.numbers[side as usize].push(self.vmms_started);
        self.register();
        Ok(())
    }

    /// The VMM of a host is ended; what its guest did is kept.
    pub fn end_vmm(&mut self, side: Side) -> Result<()> {
        if let Some(vmm) = &mut self.vmms[side as usize] {
            vmm.daemon.kill()?;
        }
        Ok(())
    }

    /// The agent of a host is killed and started again.
    pub fn restart_agent(&mut self, side: Side) -> Result<()> {
        let hits = hits_only(&self.hits);
        let host = &mut self.hosts[side as usize];
        host.agent.daemon.kill()?;
        host.agent.restart(&hits)?;
        self.register();
        Ok(())
    }

    /// A host, its agent and its backend.
    #[must_use]
    pub fn host(&self, side: Side) -> &AgentHost {
        &self.hosts[side as usize]
    }

    /// A host's VMM.
    pub fn vmm(&self, side: Side) -> Result<&Stub> {
        self.vmms[side as usize].as_ref().context("the host has no VMM")
    }

    /// A host's VMM, to be waited for.
    pub fn vmm_mut(&mut self, side: Side) -> Result<&mut Stub> {
        self.vmms[side as usize].as_mut().context("the host has no VMM")
    }

    /// Whether a host's VMM lives.
    #[must_use]
    pub fn vmm_lives(&mut self, side: Side) -> bool {
        let vmm = self.vmms[side as usize].as_mut();
        vmm.is_some_and(|vmm| vmm.daemon.is_running().unwrap_or(false))
    }

    /// A storage server is killed and started again.
    pub fn restart_anchor(&mut self) -> Result<()> {
        self.fleet.servers[0].daemon.kill()?;
        // It goes on with the points of its first process: they may lie behind this.
        let register = Register::clone(&self.register);
        self.fleet.servers[0].restart_seen(|pid| {
            register.lock().expect("nobody panics here").insert(Actor::Anchor, Who::Pid(pid));
        })?;
        self.register();
        Ok(())
    }

    /// A host's backend is killed; its agent starts the next one.
    pub fn kill_backend(&self, side: Side) -> Result<()> {
        let pid = self.host(side).backend().pid().context("the host has a backend")?;
        Ok(kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?)
    }

    /// Starts what has died, as its supervisor would.
    pub fn mend(&mut self) {
        if self.last_restart.elapsed() < RESTART {
            return;
        }
        let hits = hits_only(&self.hits);
        let mut mended = false;
        let mut dead = |daemon: &mut Daemon| {
            let dead = !daemon.is_running().unwrap_or(true);
            mended |= dead;
            dead
        };
        // What does not start is tried again.
        for server in &mut self.fleet.servers {
            if dead(&mut server.daemon) {
                server.set_environment(hits.clone());
                let _ = server.restart();
            }
        }
        if let Some(images) = &self.fleet.images {
            let mut ceph = images.ceph();
            if dead(&mut ceph.mon) {
                let _ = ceph.restart_mon();
            }
            if dead(&mut ceph.osd) {
                let _ = ceph.restart_osd();
            }
        }
        for host in &mut self.hosts {
            if dead(&mut host.agent.daemon) {
                let _ = host.agent.restart(&hits);
            }
        }
        if !self.retired && dead(&mut self.coordinator.daemon) {
            let _ = self.coordinator.restart(&hits);
        }
        if mended {
            self.last_restart = Instant::now();
            self.register();
        }
    }

    /// Takes the volumes by force, and looks at every block with a guest that knows nothing. Returns what it saw.
    pub fn look(&mut self, timeout: Duration) -> Result<Stub> {
        // An image that is taken by force is anybody's, and the loser's agent may be about to start its backend again. The
        // backends that run go on.
        if self.fleet.images.is_some() {
            for host in &mut self.hosts {
                host.agent.daemon.kill()?;
            }
        }
        for member in 0..self.fleet.members.len() {
            self.fleet.fence(member, JUDGE)?;
        }
        let env = hits_only(&self.hits);
        let host = Host::start_in(&self.dir, "judge", JUDGE, &self.fleet, Begin::Claim, 1, env)?;
        self.vmms_started += 1;
        let mut stub = Stub::start(&self.dir, self.vmms_started, &host.sockets())?;
        stub.wait_ready()?;
        stub.sweep(timeout)?;
        stub.order("quit")?;
        Ok(stub)
    }

    /// What the guest of each VMM of a host did, in the order in which they were started.
    pub fn histories(&self, side: Side) -> Result<Vec<Vec<Event>>> {
        let numbers = self.numbers[side as usize].iter();
        numbers.map(|number| history::read(&history_path(&self.dir, *number))).collect()
    }

    fn register(&self) {
        let mut now = self.register.lock().expect("nobody panics here");
        now.clear();
        let child = |daemon: &Daemon| Who::Pid(daemon.pid());
        for (actor, server) in [Actor::Anchor, Actor::Other].into_iter().zip(&self.fleet.servers) {
            now.insert(actor, child(&server.daemon));
        }
        if let Some(images) = &self.fleet.images {
            let ceph = images.ceph();
            now.insert(Actor::Osd, child(&ceph.osd));
            now.insert(Actor::Monitor, child(&ceph.mon));
        }
        now.insert(Actor::Coordinator, child(&self.coordinator.daemon));
        for side in [Side::Source, Side::Destination] {
            let host = self.host(side);
            now.insert(side.agent(), child(&host.agent.daemon));
            now.insert(side.backend(), host.backend());
            if let Some(vmm) = &self.vmms[side as usize] {
                now.insert(side.vmm(), child(&vmm.daemon));
            }
        }
    }
}

fn hits_only(hits: &Path) -> Environment {
    vec![("BATON_FAULT_HITS".to_owned(), hits.into())]
}

fn environment(case: Case, actors: &[Actor], hits: &Path) -> Environment {
    let mut env = hits_only(hits);
    if actors.contains(&case.owner) {
        env.push(("BATON_FAULT_POINT".to_owned(), format!("{}=stop", case.point).into()));
    }
    env
}
