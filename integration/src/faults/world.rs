//! All processes of a case: two storage servers, a backend and a VMM on each of two hosts, and who supervises them.
//!
//! What dies is started again as its supervisor would do it, but not before the injector says so, and never a VMM: a
//! guest whose VMM is gone is gone, and boots again where its volumes are.

use super::case::{Actor, Case};
use super::history::{self, Event};
use super::injector::Register;
use super::stub::{Stub, history_path};
use crate::baton::Environment;
use crate::daemon::Daemon;
use crate::handoff::{Begin, Fleet, Host};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Size of each volume; the guest uses a small part.
const DISK_BYTES: u64 = 16 << 20;
/// Owner name of the source.
pub const SOURCE: &str = "host-a/vm";
/// Owner name of the destination.
pub const DESTINATION: &str = "host-b/vm";
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
    /// Its owner name.
    #[must_use]
    pub fn owner(self) -> &'static str {
        match self {
            Self::Source => SOURCE,
            Self::Destination => DESTINATION,
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
    dir: PathBuf,
    case: Case,
    hits: PathBuf,
    hosts: [Option<Host>; 2],
    vmms: [Option<Stub>; 2],
    vmms_started: u64,
    last_restart: Instant,
    /// Backends are started again only as long as nobody knows who has the volumes.
    keep_backends: bool,
}

impl World {
    /// Starts the servers and makes the volumes.
    pub fn start(dir: &Path, case: Case, hits: &Path) -> Result<Self> {
        let env = |actor| environment(case, actor, hits);
        let fleet = Fleet::start_in(dir, case.volumes, case.volumes, DISK_BYTES, |n| {
            env(if n == 0 { Actor::Anchor } else { Actor::Other })
        })?;
        let world = Self {
            fleet,
            register: Register::default(),
            dir: dir.to_owned(),
            case,
            hits: hits.to_owned(),
            hosts: [None, None],
            vmms: [None, None],
            vmms_started: 0,
            last_restart: Instant::now(),
            keep_backends: true,
        };
        world.register();
        Ok(world)
    }

    /// Starts the backend of a host, with its VMM, whose rings do not run.
    pub fn start_host(&mut self, side: Side) -> Result<()> {
        let (label, begin) = match side {
            Side::Source => ("source", Begin::Claim),
            Side::Destination => ("destination", Begin::Standby),
        };
        let env = environment(self.case, side.backend(), &self.hits);
        let host = Host::start_in(&self.dir, label, side.owner(), &self.fleet, begin, 1, env)?;
        self.hosts[side as usize] = Some(host);
        self.register();
        self.start_vmm(side)
    }

    /// Starts a VMM on a host; an earlier one is killed.
    pub fn start_vmm(&mut self, side: Side) -> Result<()> {
        self.vmms[side as usize] = None;
        self.vmms_started += 1;
        let sockets = self.host(side)?.sockets();
        let stub = Stub::start(&self.dir, self.vmms_started, &sockets)?;
        self.vmms[side as usize] = Some(stub);
        self.register();
        Ok(())
    }

    /// A host's backend.
    pub fn host(&self, side: Side) -> Result<&Host> {
        self.hosts[side as usize].as_ref().context("the host has no backend")
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
        self.fleet.servers[0].restart()?;
        self.register();
        Ok(())
    }

    /// Starts what has died, as its supervisor would: servers always, backends until the outcome is known.
    pub fn mend(&mut self) {
        if self.last_restart.elapsed() < RESTART {
            return;
        }
        let hits = hits_only(&self.hits);
        let mut mended = false;
        for server in &mut self.fleet.servers {
            if !server.daemon.is_running().unwrap_or(true) {
                server.set_environment(hits.clone());
                // Tried again if it fails.
                let _ = server.restart();
                mended = true;
            }
        }
        for side in [Side::Source, Side::Destination].into_iter().filter(|_| self.keep_backends) {
            let dead = self.hosts[side as usize]
                .as_mut()
                .is_some_and(|host| !host.daemon.is_running().unwrap_or(true));
            if dead {
                let begin = self.begin_of(side);
                let host = self.hosts[side as usize].as_mut().expect("it is dead");
                host.set_environment(hits.clone());
                let _ = host.set_begin(begin).and_then(|()| host.restart());
                mended = true;
            }
        }
        if mended {
            self.last_restart = Instant::now();
            self.register();
        }
    }

    /// A backend of the owner claims; any other stands by. The source's finds out by itself.
    fn begin_of(&self, side: Side) -> Begin {
        let owned = self.fleet.owner(0).is_ok_and(|owner| owner == DESTINATION);
        if side == Side::Source || owned { Begin::Claim } else { Begin::Standby }
    }

    /// The outcome is known: the loser's backend stays as it is, the winner's is started again if it does not serve.
    pub fn serve_on(&mut self, side: Side) -> Result<()> {
        self.keep_backends = false;
        let host = self.hosts[side as usize].as_mut().context("the winner has a backend")?;
        if host.daemon.is_running()? && host.standing().is_ok_and(|standing| standing == "serving")
        {
            return Ok(());
        }
        host.daemon.kill()?;
        host.set_environment(hits_only(&self.hits));
        host.set_begin(Begin::Claim)?;
        host.restart()?;
        self.register();
        Ok(())
    }

    /// Takes the volumes by force, and looks at every block with a guest that knows nothing. Returns what it saw.
    pub fn look(&mut self, timeout: Duration) -> Result<Stub> {
        for member in &self.fleet.members {
            self.fleet.servers[member.server].fence(&member.volume, Some(JUDGE))?;
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

    /// What each VMM's guest did, in the order in which they were started.
    pub fn histories(&self) -> Result<Vec<Vec<Event>>> {
        (1..=self.vmms_started).map(|n| history::read(&history_path(&self.dir, n))).collect()
    }

    fn register(&self) {
        let mut now = self.register.lock().expect("nobody panics here");
        now.clear();
        let mut add = |actor: Actor, daemon: &Daemon| now.insert(actor, daemon.pid());
        for (actor, server) in [Actor::Anchor, Actor::Other].into_iter().zip(&self.fleet.servers) {
            add(actor, &server.daemon);
        }
        for side in [Side::Source, Side::Destination] {
            if let Some(host) = &self.hosts[side as usize] {
                add(side.backend(), &host.daemon);
            }
            if let Some(vmm) = &self.vmms[side as usize] {
                add(side.vmm(), &vmm.daemon);
            }
        }
    }
}

fn hits_only(hits: &Path) -> Environment {
    vec![("BATON_FAULT_HITS".to_owned(), hits.into())]
}

fn environment(case: Case, actor: Actor, hits: &Path) -> Environment {
    let mut env = hits_only(hits);
    if actor == case.owner {
        env.push(("BATON_FAULT_POINT".to_owned(), format!("{}=stop", case.point).into()));
    }
    env
}
