//! `baton-coordinator` and an agent on each of two hosts, and what an orchestrator says to them.
//!
//! Backends are the agents': they start them, watch them, and start them again. A backend outlives its agent, so what
//! is left of it is killed when this is dropped.

use super::injector::Who;
use crate::baton::{Environment, READY_TIMEOUT};
use crate::daemon::Daemon;
use crate::handoff::{Fleet, ask};
use crate::images::COORDINATOR_USER;
use crate::port::free_port;
use crate::workspace::program;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The VM.
pub const VM: &str = "vm";
/// For a control socket.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(2);
/// For an answer over HTTP; longer than what is waited for over there.
const HTTP_TIMEOUT: Duration = Duration::from_secs(8);

/// A daemon that is started again with what it was started with.
#[derive(Debug)]
pub struct Kept {
    /// Its process.
    pub daemon: Daemon,
    dir: PathBuf,
    name: &'static str,
    label: String,
    config: PathBuf,
    address: SocketAddr,
    /// What its command begins with; empty where everybody else is.
    prefix: Vec<String>,
}

/// Where a coordinator runs that does not run where everybody else does.
#[derive(Clone, Debug)]
pub struct Place {
    /// What its command begins with.
    pub prefix: Vec<String>,
    /// Where it listens.
    pub ip: IpAddr,
    /// Where it reaches each agent and each server's admin API, by where that one listens.
    pub through: Vec<(SocketAddr, SocketAddr)>,
}

impl Kept {
    fn start(
        dir: &Path,
        name: &'static str,
        label: &str,
        config: &str,
        address: SocketAddr,
        env: &Environment,
    ) -> Result<Self> {
        Self::start_in(dir, (name, label), config, address, env, Vec::new())
    }

    fn start_in(
        dir: &Path,
        (name, label): (&'static str, &str),
        config: &str,
        address: SocketAddr,
        env: &Environment,
        prefix: Vec<String>,
    ) -> Result<Self> {
        let path = dir.join(format!("{label}.toml"));
        fs::write(&path, config)?;
        let daemon = launch(dir, &prefix, (name, label), &path, env)?;
        let (dir, label) = (dir.to_owned(), label.to_owned());
        Ok(Self { daemon, dir, name, label, config: path, address, prefix })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts it again.
    pub fn restart(&mut self, env: &Environment) -> Result<()> {
        let names = (self.name, &*self.label);
        self.daemon = launch(&self.dir, &self.prefix, names, &self.config, env)?;
        Ok(())
    }

    /// Asks something; an answer that is no success is an error with its text.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        self.client().call(method, path, body)
    }

    /// Somebody who asks it, whichever process it is at that moment.
    #[must_use]
    pub fn client(&self) -> Client {
        Client { address: self.address, timeout: HTTP_TIMEOUT }
    }
}

/// Asks a daemon that is [`Kept`].
#[derive(Clone, Copy, Debug)]
pub struct Client {
    address: SocketAddr,
    timeout: Duration,
}

impl Client {
    /// The same, not waited for longer than this.
    #[must_use]
    pub fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// See [`Kept::call`].
    pub fn call(self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let config = ureq::Agent::config_builder().timeout_global(Some(self.timeout));
        let agent: ureq::Agent = config.http_status_as_error(false).max_redirects(0).build().into();
        let url = format!("http://{}{path}", self.address);
        let mut response = match (method, body) {
            ("GET", _) => agent.get(&url).call()?,
            ("PUT", Some(body)) => agent.put(&url).send_json(body)?,
            ("POST", _) => agent.post(&url).send_json(body.unwrap_or(&json!({})))?,
            _ => bail!("nothing is asked with {method} here"),
        };
        let text = response.body_mut().read_to_string()?;
        if !response.status().is_success() {
            bail!("{method} {path}: {} {text}", response.status());
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

fn launch(
    dir: &Path,
    prefix: &[String],
    (name, label): (&str, &str),
    config: &Path,
    env: &Environment,
) -> Result<Daemon> {
    let mut command = match prefix {
        [] => Command::new(program(name)?),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program(name)?);
            command
        }
    };
    command.arg("--config").arg(config).envs(env.iter().map(|(name, value)| (name, value)));
    let mut daemon = Daemon::start_command(dir, label, command)?;
    daemon.wait_line("listening api=", READY_TIMEOUT)?;
    Ok(daemon)
}

/// A host with its agent.
#[derive(Debug)]
pub struct AgentHost {
    /// The agent.
    pub agent: Kept,
    dir: PathBuf,
    disks: Vec<String>,
}

impl AgentHost {
    /// Starts the agent of host `name`. Its backends get its environment.
    pub fn start(
        dir: &Path,
        name: &str,
        fleet: &Fleet,
        defined: bool,
        env: &Environment,
    ) -> Result<Self> {
        let at = dir.join(name);
        fs::create_dir_all(&at)?;
        let address = free_port()?;
        let mut config = format!(
            "host = \"{name}\"\n[listen]\naddress = \"{address}\"\n[paths]\nstate_dir = \"{0}/state\"\nrun_dir = \"{0}\"\n\
             [backend]\nmanager = \"child\"\nprogram = \"{1}\"\n",
            at.display(),
            program("baton-backend")?.display(),
        );
        if defined {
            writeln!(config, "[[vm]]\nname = \"{VM}\"")?;
            for (n, member) in fleet.members.iter().enumerate() {
                let (name, uri) = (&member.volume, fleet.uri(n));
                writeln!(
                    config,
                    "[[vm.disk]]\nname = \"{name}\"\nvolume = \"{uri}\"\nnum_queues = 1"
                )?;
            }
        }
        let agent = Kept::start(dir, "baton-agent", name, &config, address, env)?;
        let disks = fleet.members.iter().map(|member| member.volume.clone()).collect();
        Ok(Self { agent, dir: at, disks })
    }

    /// Has the agent start the VM's backend as the owner.
    pub fn own(&self) -> Result<()> {
        let path = format!("/v1/vms/{VM}/backend");
        self.agent.call("PUT", &path, Some(&json!({ "role": "owner" }))).map(drop)
    }

    /// Where a VMM connects, by disk.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        let socket = |disk: &String| self.dir.join(VM).join(format!("{disk}.sock"));
        self.disks.iter().map(socket).collect()
    }

    /// What the backend says of itself.
    pub fn status(&self) -> Result<Value> {
        ask(&self.dir.join(VM).join("control.sock"), &json!({ "cmd": "status" }), CONTROL_TIMEOUT)
    }

    /// "serving", "parked", ...
    pub fn standing(&self) -> Result<String> {
        let status = self.status()?;
        Ok(status["handoff"]["standing"].as_str().context("a status has a standing")?.to_owned())
    }

    /// Where the process id of the backend is found.
    #[must_use]
    pub fn backend(&self) -> Who {
        Who::Noted(self.dir.join("state").join(format!("{VM}.backend.json")))
    }
}

impl AgentHost {
    /// Backends of this host that run and that its agent has not noted, so that nobody will end them.
    #[must_use]
    pub fn strays(&self) -> Vec<Pid> {
        let noted = self.backend().pid().and_then(|pid| i32::try_from(pid).ok());
        self.backends().into_iter().filter(|pid| Some(pid.as_raw()) != noted).collect()
    }

    /// Every backend of this host that runs.
    fn backends(&self) -> Vec<Pid> {
        let control = self.dir.join(VM).join("control.sock");
        let control = control.as_os_str().as_encoded_bytes();
        let is_one = |pid: &i32| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.split(|byte| *byte == 0).any(|argument| argument == control)
        };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(is_one).map(Pid::from_raw).collect()
    }
}

impl Drop for AgentHost {
    fn drop(&mut self) {
        // First the agent, which would start it again.
        let _ = self.agent.daemon.kill();
        for pid in self.backends() {
            // Gone already, or killed by this.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Starts the coordinator of these hosts and servers.
pub fn coordinator(
    dir: &Path,
    fleet: &Fleet,
    hosts: [(&str, &AgentHost); 2],
    env: &Environment,
) -> Result<Kept> {
    let address = free_port()?;
    let journal = format!("journal = \"{}\"\n", dir.join("journal.redb").display());
    let config = configuration(address, &journal, fleet, hosts)?;
    Kept::start(dir, "baton-coordinator", "coordinator", &config, address, env)
}

/// Starts one of several coordinators. `more` is the section `[etcd]` without its name, and what comes behind.
pub fn one_of_several(
    dir: &Path,
    name: &str,
    fleet: &Fleet,
    hosts: [(&str, &AgentHost); 2],
    more: &str,
    place: Option<&Place>,
) -> Result<Kept> {
    let mut address = free_port()?;
    let mut prefix = Vec::new();
    if let Some(place) = place {
        address.set_ip(place.ip);
        prefix.clone_from(&place.prefix);
    }
    let mut config = configuration(address, "", fleet, hosts)?;
    for (from, to) in place.iter().flat_map(|place| &place.through) {
        config = config.replace(&format!("http://{from}"), &format!("http://{to}"));
    }
    write!(config, "[etcd]\nname = \"{name}\"\n{more}")?;
    let names = ("baton-coordinator", name);
    Kept::start_in(dir, names, &config, address, &Vec::new(), prefix)
}

fn configuration(
    address: SocketAddr,
    keys: &str,
    fleet: &Fleet,
    hosts: [(&str, &AgentHost); 2],
) -> Result<String> {
    let mut config = format!("listen = \"{address}\"\n{keys}call_timeout_ms = 1000\n");
    for (name, host) in hosts {
        writeln!(config, "[[host]]\nname = \"{name}\"\nagent = \"http://{}\"", host.agent.address)?;
    }
    for server in &fleet.servers {
        let (data, admin) = (server.data_address(), server.admin_address());
        writeln!(config, "[[storage]]\ndata = \"{data}\"\nadmin = \"http://{admin}\"")?;
    }
    if let Some(images) = &fleet.images {
        let conf = images.ceph().conf();
        writeln!(config, "[[ceph]]\nconf = \"{}\"\nid = \"{COORDINATOR_USER}\"", conf.display())?;
    }
    Ok(config)
}
