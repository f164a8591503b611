//! All of Baton on one machine: a storage server, two hosts with an agent each, a coordinator, and the operator's command.
//!
//! ```text
//!   Operator ── baton ──> coordinator ──> agent of host-a ──> backend, QEMU
//!                              │      └──> agent of host-b ──> backend, QEMU
//!                              └─────────> storage server
//! ```
//!
//! Each host has a directory of its own, with the same VM in it. Backends and QEMUs are started by the agents and outlive
//! them, so they are found by what the agents and they themselves noted, and killed when the cluster is dropped.

use crate::baton::{READY_TIMEOUT, Storage, wait_until};
use crate::daemon::Daemon;
use crate::guest::GuestFiles;
use crate::probe::Probe;
use crate::qemu::{BOOT_TIMEOUT, GuestConfig};
use crate::stunnel::Stunnel;
use crate::workspace::{program, system_program};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The VM of a cluster.
pub const VM: &str = "web";
/// Its hosts; it starts on the first.
pub const HOSTS: [&str; 2] = ["host-a", "host-b"];

/// The host of the storage server, whose certificate its admin API shows.
const STORAGE_HOST: &str = "host-s1";
/// Stem of the files of the operator's certificate.
const OPERATOR: &str = "operator-me";
const DISK_BYTES: u64 = 64 << 20;
/// For a step that several programs have to take, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Who drives the VM's monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The agents, over QMP.
    Agent,
    /// Somebody else, such as libvirt.
    Other,
}

/// How this harness asks agents and coordinator, and how they ask each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Plaintext on loopback.
    Loopback,
    /// Mutual TLS with the certificates of `baton-agent dev-ca` in this directory; stunnel has them for the storage
    /// server, whose admin API has no TLS.
    Certificates(PathBuf),
}

impl Trust {
    /// Makes an authority and certificates for a cluster.
    pub fn certificates(dir: &Path) -> Result<Self> {
        let at = dir.join("ca");
        let made = Command::new(program("baton-agent")?)
            .args(["dev-ca", "--coordinator", "coordinator", "--operator", "me"])
            .args(["--host", HOSTS[0], "--host", HOSTS[1], "--host", STORAGE_HOST, "--dir"])
            .arg(&at)
            .output()?;
        if !made.status.success() {
            bail!("dev-ca: {}", String::from_utf8_lossy(&made.stderr));
        }
        Ok(Self::Certificates(at))
    }

    /// Authority, certificate and key of somebody, by the stem of their files.
    pub fn files(&self, who: &str) -> Option<[PathBuf; 3]> {
        let Self::Certificates(dir) = self else { return None };
        let file = |name: String| dir.join(name);
        Some([file("ca.pem".to_owned()), file(format!("{who}.pem")), file(format!("{who}.key"))])
    }

    /// The section of a configuration file.
    fn section(&self, who: &str) -> String {
        self.files(who).map_or_else(String::new, |[ca, cert, key]| {
            let (ca, cert, key) = (ca.display(), cert.display(), key.display());
            format!("[tls]\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\n")
        })
    }

    /// In front of the storage server's admin API, where it takes certificates.
    fn terminator(&self, dir: &Path, admin: SocketAddr) -> Result<Option<Stunnel>> {
        let Self::Certificates(tls) = self else { return Ok(None) };
        Stunnel::start(dir, admin, tls).map(Some)
    }

    fn url(&self, address: &str) -> String {
        let scheme = if *self == Self::Loopback { "http" } else { "https" };
        format!("{scheme}://{address}")
    }

    /// Says something as the operator; a refusal is an error.
    pub fn call(&self, method: &str, url: &str, body: Option<&Value>) -> Result<Value> {
        let Some([_, cert, key]) = self.files(OPERATOR) else { return call(method, url, body) };
        let mut curl = Command::new(system_program("curl")?);
        // Whom we ask is not the question here: the daemons check each other, and us.
        curl.args(["--insecure", "--silent", "--show-error", "--fail-with-body"])
            .args(["--max-time", "60", "--request", method, url])
            .arg("--cert")
            .arg(cert)
            .arg("--key")
            .arg(key);
        if let Some(body) = body {
            curl.args(["--header", "content-type: application/json", "--data", &body.to_string()]);
        }
        let Output { status, stdout, stderr } = curl.output()?;
        let text = String::from_utf8_lossy(&stdout);
        if !status.success() {
            bail!("{method} {url}: {text} {}", String::from_utf8_lossy(&stderr));
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name in the VM.
    pub name: String,
    /// URI of its volume.
    pub volume: String,
}

/// The agent of a host, and where its VM is.
#[derive(Debug)]
pub struct Host {
    /// Its name, as the coordinator knows it.
    pub name: &'static str,
    /// Its agent.
    pub agent: Daemon,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    dir: PathBuf,
    disks: Vec<Disk>,
    trust: Trust,
}

/// The cluster. Dropping it kills all that it started, and all that its agents did.
#[derive(Debug)]
pub struct Cluster {
    /// The storage server.
    pub storage: Storage,
    /// What the coordinator reaches its admin API through, with certificates.
    pub terminator: Option<Stunnel>,
    /// The coordinator's process.
    pub coordinator: Daemon,
    /// The hosts, as in [`HOSTS`].
    pub hosts: [Host; 2],
    url: String,
    dir: PathBuf,
    trust: Trust,
}

impl Host {
    fn start(
        dir: &Path,
        name: &'static str,
        disks: &[Disk],
        driver: Driver,
        trust: &Trust,
    ) -> Result<Self> {
        let dir = dir.join(name);
        fs::create_dir_all(dir.join("run").join(VM))?;
        let guest = guest_config(&dir, disks, true);
        let backend = program("baton-backend")?;
        let shown = dir.display();
        let mut text = format!(
            "host = \"{name}\"\n[listen]\naddress = \"127.0.0.1:0\"\n[paths]\nstate_dir = \"{shown}/state\"\nrun_dir = \"{shown}/run\"\n\
             [backend]\nmanager = \"child\"\nprogram = \"{}\"\nsocket_mode = \"666\"\n{}\n[[vm]]\nname = \"{VM}\"\n",
            backend.display(),
            trust.section(&format!("host-{name}")),
        );
        if driver == Driver::Agent {
            let mut command = vec![system_program("qemu-system-x86_64")?.display().to_string()];
            command.extend(guest.arguments(&dir, &GuestFiles::prepare(&dir)?));
            let qmp = dir.join("guest.qmp");
            // A list of JSON strings is one of TOML, too.
            write!(
                text,
                "vmm = \"qemu\"\nqmp = \"{}\"\nincoming_command = {}\n",
                qmp.display(),
                json!(command)
            )?;
        }
        for Disk { name, volume } in disks {
            write!(
                text,
                "[[vm.disk]]\nname = \"{name}\"\nvolume = \"{volume}\"\nnum_queues = 2\n",
            )?;
        }
        fs::write(dir.join("agent.toml"), text)?;
        let (agent, url) = listen(&dir, "agent", trust)?;
        Ok(Self { name, agent, url, dir, disks: disks.to_vec(), trust: trust.clone() })
    }

    /// Starts its agent again after a kill, at the same address.
    pub fn restart(&mut self) -> Result<()> {
        (self.agent, self.url) = listen(&self.dir, "agent", &self.trust)?;
        Ok(())
    }

    /// The process of its VM's backend, as its agent knows it.
    pub fn backend_pid(&self) -> Result<Pid> {
        let pid = self.vm()?["backend"]["pid"].as_i64().context("a backend runs")?;
        Ok(Pid::from_raw(i32::try_from(pid)?))
    }

    /// Kills its agent, and then what that one started.
    pub fn die(&mut self) -> Result<()> {
        self.agent.kill()?;
        for pid in self.strays() {
            kill(pid, Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// Where a monitor connects for a disk.
    #[must_use]
    pub fn socket(&self, disk: &str) -> PathBuf {
        socket(&self.dir, disk)
    }

    /// Lets its agent start a backend that claims the VM's volumes.
    pub fn claim(&self) -> Result<()> {
        let path = format!("/v1/vms/{VM}/backend");
        self.trust
            .call("PUT", &format!("{}{path}", self.url), Some(&json!({"role": "owner"})))
            .map(drop)
    }

    /// Lets its agent end the VM's backend.
    pub fn stop_backend(&self) -> Result<()> {
        let path = format!("/v1/vms/{VM}/backend");
        self.trust.call("DELETE", &format!("{}{path}", self.url), None).map(drop)
    }

    /// Boots the VM here and waits for the probe in it.
    pub fn boot(&self) -> Result<(Daemon, Probe)> {
        let files = GuestFiles::prepare(&self.dir)?;
        let arguments = guest_config(&self.dir, &self.disks, false).arguments(&self.dir, &files);
        let mut qemu =
            Daemon::start(&self.dir, "guest", &system_program("qemu-system-x86_64")?, arguments)?;
        qemu.wait_socket(&self.dir.join("guest.probe"), BOOT_TIMEOUT)?;
        let probe = self.probe()?;
        probe.wait_ready(BOOT_TIMEOUT).with_context(|| qemu.log())?;
        Ok((qemu, probe))
    }

    /// Connects to the probe in the VM that runs here.
    pub fn probe(&self) -> Result<Probe> {
        Probe::connect(&self.dir.join("guest.probe"), &self.dir.join("guest.probe.log"))
    }

    /// Its VM as its agent tells it.
    pub fn vm(&self) -> Result<Value> {
        self.trust.call("GET", &format!("{}/v1/vms/{VM}", self.url), None)
    }

    /// What its agent did by itself, once there is something.
    pub fn events(&self) -> Result<Value> {
        self.trust.call("GET", &format!("{}/v1/events?wait_ms=30000", self.url), None)
    }

    /// "running", "gone", ...: the VM's monitor.
    pub fn run_state(&self) -> Result<String> {
        let status = self.trust.call("GET", &format!("{}/v1/vms/{VM}/vmm", self.url), None)?;
        status["run"].as_str().map(str::to_owned).context("a monitor has a state")
    }

    /// "active", "pre-switchover", ...: how far its VM's monitor is with a migration.
    pub fn migration(&self) -> Result<String> {
        let status = self.trust.call("GET", &format!("{}/v1/vms/{VM}/vmm", self.url), None)?;
        status["migration"]["phase"].as_str().map(str::to_owned).context("a monitor has a phase")
    }

    /// What its agent started and what it started for it, by what was noted.
    fn strays(&self) -> Vec<Pid> {
        let note = fs::read(self.dir.join(format!("state/{VM}.backend.json")));
        let note: Option<Value> = note.ok().and_then(|text| serde_json::from_slice(&text).ok());
        let backend = note.and_then(|note| i32::try_from(note["process"]["pid"].as_i64()?).ok());
        let guest = fs::read_to_string(self.dir.join("guest.pid"));
        let guest = guest.ok().and_then(|text| text.trim().parse().ok());
        // A number may have been given to somebody else: only what has our directory in its command line is ours.
        let ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&*self.dir.to_string_lossy())
        };
        [backend, guest].into_iter().flatten().filter(ours).map(Pid::from_raw).collect()
    }
}

impl Cluster {
    /// Starts all but the VM, whose volumes its first host then owns.
    pub fn start(dir: &Path, volumes: usize, driver: Driver) -> Result<Self> {
        Self::start_with(dir, volumes, driver, Trust::Loopback)
    }

    /// The same, with what the daemons trust each other by.
    pub fn start_with(dir: &Path, volumes: usize, driver: Driver, trust: Trust) -> Result<Self> {
        Self::start_on(dir, volumes, &[], driver, trust)
    }

    /// The same, with more disks that are elsewhere than on its storage server; on Ceph they need a user `coordinator`.
    pub fn start_on(
        dir: &Path,
        volumes: usize,
        elsewhere: &[Disk],
        driver: Driver,
        trust: Trust,
    ) -> Result<Self> {
        let storage = Storage::start(dir, &[])?;
        let mut disks = Vec::new();
        for name in (0..volumes).map(|n| format!("disk{n}")) {
            storage.create(&name, DISK_BYTES)?;
            disks.push(Disk { volume: storage.uri(&name, None), name });
        }
        disks.extend_from_slice(elsewhere);
        let start = |name| Host::start(dir, name, &disks, driver, &trust);
        let hosts = [start(HOSTS[0])?, start(HOSTS[1])?];
        let terminator = trust.terminator(dir, storage.admin_address())?;
        let admin = terminator.as_ref().map_or(storage.admin_address(), |stunnel| stunnel.address);
        let mut text = format!(
            "listen = \"127.0.0.1:0\"\njournal = \"{}\"\n[[storage]]\ndata = \"{}\"\nadmin = \"{}\"\nhost = \"{STORAGE_HOST}\"\n",
            dir.join("journal.redb").display(),
            storage.data_address(),
            trust.url(&admin.to_string()),
        );
        for conf in ceph_confs(elsewhere) {
            write!(text, "[[ceph]]\nconf = \"{conf}\"\nid = \"coordinator\"\n")?;
        }
        for host in &hosts {
            // A path of a socket has at most 107 bytes.
            let stream = host.dir.join("{vm}.in");
            write!(
                text,
                "[[host]]\nname = \"{}\"\nagent = \"{}\"\nmigration_uri = \"unix:{}\"\n",
                host.name,
                host.url,
                stream.display()
            )?;
        }
        text.push_str(&trust.section("coordinator-coordinator"));
        fs::write(dir.join("coordinator.toml"), text)?;
        let (coordinator, url) = listen(dir, "coordinator", &trust)?;
        hosts[0].claim()?;
        Ok(Self { storage, terminator, coordinator, hosts, url, dir: dir.to_owned(), trust })
    }

    /// Starts the coordinator again after a kill, at the same address and with the same journal.
    pub fn restart_coordinator(&mut self) -> Result<()> {
        (self.coordinator, self.url) = listen(&self.dir, "coordinator", &self.trust)?;
        Ok(())
    }

    /// Where the coordinator is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The operator's command, not started yet.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("baton")?);
        command.args(args).env("BATON_COORDINATOR", &self.url).stdin(Stdio::null());
        if let Some(files) = self.trust.files(OPERATOR) {
            command
                .envs(["BATON_TLS_CA", "BATON_TLS_CERT", "BATON_TLS_KEY"].into_iter().zip(files));
        }
        Ok(command)
    }

    /// Runs the operator's command: exit status and what it said.
    pub fn operator(&self, args: &[&str]) -> Result<(i32, String)> {
        let Output { status, stdout, stderr } = self.command(args)?.output()?;
        let text = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok((status.code().context("the command was killed")?, text.concat()))
    }

    /// Runs the operator's command, which must work, and returns what it said.
    pub fn does(&self, args: &[&str]) -> Result<String> {
        match self.operator(args)? {
            (0, text) => Ok(text),
            (status, text) => bail!(
                "`baton {}` ended with {status}: {text}\ncoordinator:\n{}",
                args.join(" "),
                self.coordinator.log()
            ),
        }
    }

    /// Who owns the VM's volumes, as the coordinator reads it from the access records.
    pub fn access(&self) -> Result<Value> {
        self.trust.call("GET", &format!("{}/v1/vms/{VM}/access", self.url), None)
    }

    /// The VM's handoffs, oldest first.
    pub fn handoffs(&self) -> Result<Vec<Value>> {
        let answer = self.trust.call("GET", &format!("{}/v1/handoffs?vm={VM}", self.url), None)?;
        Ok(answer["handoffs"].as_array().cloned().unwrap_or_default())
    }

    /// Events of this kind in the coordinator's journal, oldest first. Without certificates.
    pub fn told(&self, kind: &str) -> Result<Vec<Value>> {
        let url = format!("{}/v1/events?since=0", self.url);
        let mut curl = Command::new(system_program("curl")?);
        // The stream goes on for ever; what is in the journal comes at once.
        let said = curl.args(["--silent", "--no-buffer", "--max-time", "1", &url]).output()?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let data = text.lines().filter_map(|line| line.strip_prefix("data:"));
        let events = data.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(events.filter(|event| event["type"] == kind).collect())
    }

    /// Waits until this host owns all volumes and no handoff is under way.
    pub fn wait_owner(&self, host: &str) -> Result<()> {
        let owner = format!("{host}/{VM}");
        let owns = |access: &Value| {
            let members = access["members"].as_array();
            members.is_some_and(|all| {
                all.iter().all(|one| one["owner"] == *owner && one["phase"] == "owned")
            })
        };
        wait_until(&format!("{host} owns all volumes"), SOON, || {
            self.access().is_ok_and(|access| owns(&access))
        })
        .with_context(|| format!("{:?}", self.access()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Those who would start them again first.
        let _ = self.coordinator.kill();
        for host in &mut self.hosts {
            let _ = host.agent.kill();
            for pid in host.strays() {
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }
}

/// Says something over HTTP; a refusal is an error.
pub fn call(method: &str, url: &str, body: Option<&Value>) -> Result<Value> {
    let config = ureq::Agent::config_builder();
    let config = config.timeout_global(Some(SOON)).http_status_as_error(false);
    let agent: ureq::Agent = config.build().into();
    let request = ureq::http::Request::builder().method(method).uri(url);
    let mut answer = match body {
        Some(body) => {
            let request = request.header("content-type", "application/json");
            agent.run(request.body(body.to_string())?)?
        }
        None => agent.run(request.body(())?)?,
    };
    let text = answer.body_mut().read_to_string()?;
    if !answer.status().is_success() {
        bail!("{method} {url}: {} {text}", answer.status());
    }
    Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
}

fn socket(host_dir: &Path, disk: &str) -> PathBuf {
    host_dir.join("run").join(VM).join(format!("{disk}.sock"))
}

/// The clusters of Ceph that disks are on, by their configurations, each once.
fn ceph_confs(disks: &[Disk]) -> Vec<String> {
    let conf = |disk: &Disk| {
        let (_, query) = disk.volume.strip_prefix("rbd://")?.split_once('?')?;
        let conf = query.split('&').find_map(|pair| pair.strip_prefix("conf="))?;
        Some(conf.to_owned())
    };
    let mut confs: Vec<String> = disks.iter().filter_map(conf).collect();
    confs.dedup();
    confs
}

/// The guest as it is on a host.
fn guest_config(host_dir: &Path, disks: &[Disk], incoming: bool) -> GuestConfig {
    let pid_file = host_dir.join("guest.pid").display().to_string();
    GuestConfig {
        sockets: disks.iter().map(|disk| socket(host_dir, &disk.name)).collect(),
        queues: 2,
        incoming,
        extra_args: vec!["-pidfile".to_owned(), pid_file],
        ..GuestConfig::new(Path::new(""))
    }
}

/// Starts `baton-NAME` with `DIR/NAME.toml`, notes there the port that it got, and returns where it listens.
fn listen(dir: &Path, name: &str, trust: &Trust) -> Result<(Daemon, String)> {
    let config = dir.join(format!("{name}.toml"));
    let args = ["--config".as_ref(), config.as_os_str()];
    let mut daemon = Daemon::start(dir, name, &program(&format!("baton-{name}"))?, args)?;
    let line = daemon.wait_line("listening api=", READY_TIMEOUT)?;
    let address = line.split_whitespace().find_map(|word| word.strip_prefix("api="));
    let address = address.context("a program that listens says where")?;
    let text = fs::read_to_string(&config)?.replace("\"127.0.0.1:0\"", &format!("\"{address}\""));
    fs::write(&config, text)?;
    let url = trust.url(address);
    Ok((daemon, url))
}
