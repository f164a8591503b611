//! Plays the coordinator of one VM's handoffs, without a coordinator: arms, watches and settles over the storage servers'
//! admin API, and talks to backends on their control sockets. For tests that put accidents between two steps.
//!
//! ```text
//!   Fleet: storage servers, volumes            Host: a backend with all disks of the VM
//!     arm(from, to) ──> Attempt ── settle         status(), order("reclaim"), socket(disk)
//! ```
//!
//! Knows the wire of neither; what it says is what `docs/handoff.md` and the admin API's document say.

use crate::baton::{Environment, READY_TIMEOUT, Storage, wait_until, with_polling};
use crate::daemon::Daemon;
use crate::images::{Images, SharedCeph};
use crate::workspace::program;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// For one step of a handoff, on a busy machine.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// For an answer on a control socket.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// A volume of the VM and the server that has it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Position of its server in the fleet.
    pub server: usize,
    /// Its name.
    pub volume: String,
    /// Its id, 16 hexadecimal digits.
    pub id: String,
}

/// Storage servers with the volumes of one VM, or a Ceph cluster with its images.
#[derive(Debug)]
pub struct Fleet {
    /// The servers; none where there are images.
    pub servers: Vec<Storage>,
    /// The images.
    pub images: Option<Images>,
    /// The VM's volumes; the first is the anchor.
    pub members: Vec<Member>,
    /// Where clients of each server connect instead, such as a proxy; empty for no such thing.
    pub through: Vec<SocketAddr>,
    /// "fast" or "base".
    pub mode: &'static str,
    term: u64,
}

const ULID_DIGITS: &str = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// One try of a handoff.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// A ULID.
    pub id: String,
    /// From 1.
    pub attempt: u32,
}

impl Attempt {
    /// The id as the wire has it.
    pub fn number(&self) -> Result<u128> {
        self.id.chars().try_fold(0, |id, c| {
            let digit = ULID_DIGITS.find(c).context("a digit of base 32")?;
            Ok(id << 5 | digit as u128)
        })
    }
}

/// As `--standby` takes it.
impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.id, self.attempt)
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Fleet {
    /// Servers in `dir/storage-N`, and volumes on them in turn.
    pub fn start(dir: &Path, servers: usize, volumes: usize, size_bytes: u64) -> Result<Self> {
        Self::start_in(dir, servers, volumes, size_bytes, |_| Environment::new())
    }

    /// [`Self::start`] with environment variables for each server.
    pub fn start_in(
        dir: &Path,
        servers: usize,
        volumes: usize,
        size_bytes: u64,
        env: impl Fn(usize) -> Environment,
    ) -> Result<Self> {
        let servers = (0..servers)
            .map(|n| {
                let dir = dir.join(format!("storage-{n}"));
                fs::create_dir_all(&dir)?;
                Storage::start_in(&dir, &[], env(n))
            })
            .collect::<Result<Vec<_>>>()?;
        let members = (0..volumes)
            .map(|n| {
                let server = n % servers.len();
                let volume = format!("disk{n}");
                let made = servers[server].create(&volume, size_bytes)?;
                let id = made["id"].as_str().context("a volume has an id")?.to_owned();
                Ok(Member { server, volume, id })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { servers, images: None, members, through: Vec::new(), mode: "fast", term: 1 })
    }

    /// Images of a cluster, whose names begin with what no other VM has.
    pub fn on_ceph(ceph: &SharedCeph, prefix: &str, volumes: usize, bytes: u64) -> Result<Self> {
        let names: Vec<String> = (0..volumes).map(|n| format!("disk{n}")).collect();
        let images = Some(Images::create(ceph, prefix, &names, bytes)?);
        let member = |volume: String| Member { server: 0, volume, id: String::new() };
        let members = names.into_iter().map(member).collect();
        Ok(Self {
            servers: Vec::new(),
            images,
            members,
            through: Vec::new(),
            mode: "fast",
            term: 1,
        })
    }

    /// The server of a member.
    #[must_use]
    pub fn server(&self, member: usize) -> &Storage {
        &self.servers[self.members[member].server]
    }

    /// URI of a member.
    #[must_use]
    pub fn uri(&self, member: usize) -> String {
        if let Some(images) = &self.images {
            return images.uri(&self.members[member].volume);
        }
        let through = self.through.get(self.members[member].server).copied();
        self.server(member).uri(&self.members[member].volume, through)
    }

    /// Plans a move of all volumes between two owner names: the anchor first, then the others.
    pub fn arm(&self, from: &str, to: &str) -> Result<Attempt> {
        let attempt = Self::attempt();
        self.arm_try(&attempt, from, to)?;
        Ok(attempt)
    }

    /// [`Self::arm`] for a try that somebody was told before.
    pub fn arm_try(&self, attempt: &Attempt, from: &str, to: &str) -> Result<()> {
        let plan = self.plan(attempt, from, to);
        for member in 0..self.members.len() {
            self.post(member, "arm", &self.arming(member, &plan)?)?;
        }
        Ok(())
    }

    /// Body of an ARM that is planned now.
    fn arming(&self, member: usize, plan: &Value) -> Result<Value> {
        Ok(json!({ "next_epoch": self.record(member)?["next_epoch"], "plan": plan }))
    }

    /// A first try of a new handoff.
    #[must_use]
    pub fn attempt() -> Attempt {
        Attempt { id: ulid(NEXT_ID.fetch_add(1, Ordering::Relaxed)), attempt: 1 }
    }

    /// Plans a move of one volume, as if it were all of a VM's.
    pub fn arm_alone(&self, member: usize, attempt: &Attempt, from: &str, to: &str) -> Result<()> {
        let plan = self.plan_of(&self.members[member..=member], attempt, from, to);
        self.post(member, "arm", &self.arming(member, &plan)?).map(drop)
    }

    /// The plan of a try, as ARM takes it.
    #[must_use]
    pub fn plan(&self, attempt: &Attempt, from: &str, to: &str) -> Value {
        self.plan_of(&self.members, attempt, from, to)
    }

    fn plan_of(&self, members: &[Member], attempt: &Attempt, from: &str, to: &str) -> Value {
        let ids: Vec<u64> = members.iter().map(|m| hex(&m.id)).collect();
        json!({
            "id": attempt.id,
            "attempt": attempt.attempt,
            "vm": "vm",
            "from": from,
            "to": to,
            "anchor": members[0].id,
            "members": { "count": ids.len(), "hash": members_hash(&ids) },
            "mode": self.mode,
            "key": format!("{:064x}", hex(&members[0].id) | 1),
        })
    }

    /// Says something to a member as the coordinator; the term is added.
    pub fn post(&self, member: usize, what: &str, body: &Value) -> Result<Value> {
        let mut body = body.clone();
        body["term"] = json!(self.term);
        let path = format!("/v1/volumes/{}/{what}", self.members[member].volume);
        self.server(member).post(&path, &body)
    }

    /// The access record of a member.
    pub fn record(&self, member: usize) -> Result<Value> {
        if let Some(images) = &self.images {
            return images.record(&self.members[member].volume);
        }
        let path = format!("/v1/volumes/{}/access", self.members[member].volume);
        let mut answer = self.server(member).get(&path)?;
        Ok(answer["record"].take())
    }

    /// Takes a member from its owner by force, for `nominee`.
    pub fn fence(&self, member: usize, nominee: &str) -> Result<()> {
        let volume = &self.members[member].volume;
        match &self.images {
            Some(images) => images.fence(volume),
            None => self.server(member).fence(volume, Some(nominee)).map(drop),
        }
    }

    /// "armed", "sealed", ...
    pub fn phase(&self, member: usize) -> Result<String> {
        let record = self.record(member)?;
        Ok(record["phase"].as_str().context("a record has a phase")?.to_owned())
    }

    /// Waits until all members are in one of these phases.
    pub fn wait_phase(&self, phases: &[&str]) -> Result<()> {
        let what = format!("all members are {}", phases.join(" or "));
        wait_until(&what, STEP_TIMEOUT, || {
            (0..self.members.len())
                .all(|m| self.phase(m).is_ok_and(|phase| phases.contains(&&*phase)))
        })
    }

    /// Calls the handoff off: the anchor decides. "source" or "unknown"; an error when the destination won.
    pub fn reclaim(&self, attempt: &Attempt) -> Result<Value> {
        let body = json!({ "id": attempt.id, "attempt": attempt.attempt });
        self.post(0, "reclaim", &body)
    }

    /// How the anchor decided: "winner", "session", "proof". An error while it has not.
    pub fn proof(&self, attempt: &Attempt) -> Result<Value> {
        let path = format!(
            "/v1/volumes/{}/proof?id={}&attempt={}",
            self.members[0].volume, attempt.id, attempt.attempt
        );
        self.server(0).get(&path)
    }

    /// Ends a decided handoff at all members, and says who won.
    pub fn settle(&self, attempt: &Attempt) -> Result<String> {
        let decision = self.proof(attempt)?;
        let winner = decision["winner"].as_str().context("a decision has a winner")?.to_owned();
        for member in 0..self.members.len() {
            let body = json!({
                "id": attempt.id,
                "attempt": attempt.attempt,
                "session": decision["session"],
                "proof": decision["proof"],
            });
            self.post(member, "settle", &body)?;
        }
        Ok(winner)
    }

    /// The owner of a member and its phase, as a person would say it.
    pub fn owner(&self, member: usize) -> Result<String> {
        let record = self.record(member)?;
        Ok(record["owner"]["name"].as_str().unwrap_or("nobody").to_owned())
    }
}

/// A backend with all disks of the VM, as one host runs it. Killed when dropped.
#[derive(Debug)]
pub struct Host {
    /// Its process.
    pub daemon: Daemon,
    /// Its owner name.
    pub owner: String,
    sockets: Vec<PathBuf>,
    control: PathBuf,
    config: PathBuf,
    dir: PathBuf,
    label: String,
    env: Environment,
    /// More of the command line.
    flags: Vec<String>,
}

/// How a backend begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It claims the volumes.
    Claim,
    /// It waits for a handoff.
    Standby,
}

impl Host {
    /// Starts a backend `label` with owner name `owner` on all volumes of `fleet`.
    pub fn start(
        dir: &Path,
        label: &str,
        owner: &str,
        fleet: &Fleet,
        begin: Begin,
    ) -> Result<Self> {
        Self::start_with(dir, label, owner, fleet, begin, 1)
    }

    /// [`Self::start`] with so many queues for each disk.
    pub fn start_with(
        dir: &Path,
        label: &str,
        owner: &str,
        fleet: &Fleet,
        begin: Begin,
        queues: u16,
    ) -> Result<Self> {
        Self::start_in(dir, label, owner, fleet, begin, queues, Environment::new())
    }

    /// A backend that stands by for one try only.
    pub fn start_for(
        dir: &Path,
        label: &str,
        owner: &str,
        fleet: &Fleet,
        attempt: &Attempt,
        queues: u16,
    ) -> Result<Self> {
        let flags = vec![format!("--standby={attempt}")];
        Self::begin(dir, (label, owner), fleet, Begin::Claim, queues, Environment::new(), flags)
    }

    /// [`Self::start_with`] environment variables, which a restarted process gets too.
    pub fn start_in(
        dir: &Path,
        label: &str,
        owner: &str,
        fleet: &Fleet,
        begin: Begin,
        queues: u16,
        env: Environment,
    ) -> Result<Self> {
        Self::begin(dir, (label, owner), fleet, begin, queues, env, Vec::new())
    }

    fn begin(
        dir: &Path,
        (label, owner): (&str, &str),
        fleet: &Fleet,
        begin: Begin,
        queues: u16,
        env: Environment,
        flags: Vec<String>,
    ) -> Result<Self> {
        let control = dir.join(format!("{label}.control"));
        let mut text = format!("owner = \"{owner}\"\ncontrol = \"{}\"\n", control.display());
        if begin == Begin::Standby {
            text.push_str("standby = true\n");
        }
        let mut sockets = Vec::new();
        for (n, member) in fleet.members.iter().enumerate() {
            let socket = dir.join(format!("{label}-{n}.sock"));
            write!(
                text,
                "\n[[disk]]\nname = \"{}\"\nvolume = \"{}\"\nsocket_path = \"{}\"\nnum_queues = {queues}\n",
                member.volume,
                fleet.uri(n),
                socket.display()
            )?;
            sockets.push(socket);
        }
        let config = dir.join(format!("{label}.toml"));
        fs::write(&config, text)?;
        let daemon = launch(dir, label, &config, &env, &flags)?;
        let (dir, label, owner) = (dir.to_owned(), label.to_owned(), owner.to_owned());
        Ok(Self { daemon, owner, sockets, control, config, dir, label, env, flags })
    }

    /// Starts it again with the same configuration, after a kill or an end.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = launch(&self.dir, &self.label, &self.config, &self.env, &self.flags)?;
        Ok(())
    }

    /// Environment variables of the process that is started next.
    pub fn set_environment(&mut self, env: Environment) {
        self.env = env;
    }

    /// How the process that is started next begins; not for one try only.
    pub fn set_begin(&mut self, begin: Begin) -> Result<()> {
        self.flags.clear();
        let text = fs::read_to_string(&self.config)?.replace("standby = true\n", "");
        let first = if begin == Begin::Standby { "standby = true\n" } else { "" };
        Ok(fs::write(&self.config, format!("{first}{text}"))?)
    }

    /// Where a VMM connects for disk `n`.
    #[must_use]
    pub fn socket(&self, n: usize) -> &Path {
        &self.sockets[n]
    }

    /// All of them, in the order of the disks.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        self.sockets.clone()
    }

    /// Says a command on the control socket.
    pub fn order(&self, command: &str) -> Result<Value> {
        ask(&self.control, &json!({ "cmd": command }), CONTROL_TIMEOUT)
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<Value> {
        self.order("status")
    }

    /// "serving", "ready", "sealed", "parked", ...
    pub fn standing(&self) -> Result<String> {
        let status = self.status()?;
        let standing = status["handoff"]["standing"].as_str();
        Ok(standing.context("a status has a standing")?.to_owned())
    }

    /// Waits until it stands so.
    pub fn wait_standing(&self, standing: &str) -> Result<()> {
        let what = format!("{} is {standing}", self.label);
        wait_until(&what, STEP_TIMEOUT, || self.standing().is_ok_and(|now| now == standing))
            .with_context(|| format!("it is {:?}", self.standing()))
    }
}

/// Says one order on a socket that takes and answers JSON lines, and waits so long for its answer.
pub fn ask(socket: &Path, order: &Value, timeout: Duration) -> Result<Value> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("no control socket at {}", socket.display()))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    writeln!(&stream, "{order}")?;
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .with_context(|| format!("no answer to {order} in {timeout:?}"))?;
    let answer: Value =
        serde_json::from_str(&line).with_context(|| format!("{order} was answered `{line}`"))?;
    if answer.get("error").is_some() {
        bail!("{order} was refused: {}", answer["error"]);
    }
    Ok(answer)
}

fn launch(
    dir: &Path,
    label: &str,
    config: &Path,
    env: &Environment,
    flags: &[String],
) -> Result<Daemon> {
    let mut command = Command::new(program("baton-backend")?);
    let flags = with_polling(flags.iter().map(OsString::from).collect());
    command
        .arg("--config")
        .arg(config)
        .args(flags)
        .envs(env.iter().map(|(name, value)| (name, value)));
    let mut daemon = Daemon::start_command(dir, label, command)?;
    daemon.wait_line("listening socket=", READY_TIMEOUT)?;
    Ok(daemon)
}

/// A ULID whose time is now and whose random part is `number` and this process.
fn ulid(number: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let ms = now.map_or(0, |since| since.as_millis()) & ((1 << 48) - 1);
    ulid_text(ms << 80 | u128::from(std::process::id()) << 48 | u128::from(number))
}

/// A ULID as text.
#[must_use]
pub(crate) fn ulid_text(id: u128) -> String {
    (0..26)
        .rev()
        .map(|place| {
            let digit = usize::try_from(id >> (5 * place) & 31).expect("5 bits");
            char::from(ULID_DIGITS.as_bytes()[digit])
        })
        .collect()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("an id has 16 hexadecimal digits")
}

/// FNV-1a over the ids in rising order: the plan's guard against a mistake.
fn members_hash(ids: &[u64]) -> String {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    let hash =
        ids.iter().flat_map(|id| id.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}
