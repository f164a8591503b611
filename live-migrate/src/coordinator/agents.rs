//! The hosts' agents, as the coordinator uses them, and what they say of VMs.
//!
//! An agent's word is a report. Nothing here decides who owns a volume.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::config::{Config, Host};
use super::plan::{Row, Standing, Trouble};
use crate::client::{CallError, Client, Method};
use crate::identity::{Identity, Role};
use crate::problem::Problem;
use crate::tls::Credentials;

/// Between two tries to reach an agent that is being waited for.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Why an agent did not do what it was told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgentError {
    /// No answer: it may be tried again.
    #[error("{}", .0.detail)]
    Unreachable(Trouble),
    /// It answered that it failed, or is not done yet: it may be tried again.
    #[error("{}", .0.detail)]
    Failed(Trouble),
    /// It understood and refused.
    #[error("{}", .trouble.detail)]
    Refused {
        /// HTTP status.
        status: u16,
        /// Type and sentence.
        trouble: Trouble,
    },
}

impl AgentError {
    /// Type and sentence.
    #[must_use]
    pub fn trouble(&self) -> &Trouble {
        match self {
            Self::Unreachable(trouble) | Self::Failed(trouble) | Self::Refused { trouble, .. } => {
                trouble
            }
        }
    }

    /// There is no such VM or backend there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

/// One host's agent.
#[derive(Clone, Debug)]
pub struct Agent {
    /// The host.
    pub host: Host,
    client: Client,
    timeout: Duration,
    superseded: watch::Sender<bool>,
}

/// All agents.
#[derive(Clone, Debug)]
pub struct Agents {
    all: Vec<Agent>,
    superseded: watch::Sender<bool>,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskView {
    /// Its name in the VM.
    pub name: String,
    /// URI of its volume.
    pub volume: String,
}

/// A VM at one host, as its agent tells it.
#[derive(Clone, Debug)]
pub struct VmView(pub Value);

impl VmView {
    fn definition(&self) -> &Value {
        // What was remembered is a definition alone.
        if self.0["definition"].is_object() { &self.0["definition"] } else { &self.0 }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.definition()["name"].as_str().unwrap_or_default()
    }

    /// Its disks that it may write: only those move.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskView> {
        let disks = self.definition()["disk"].as_array().map_or(&[][..], Vec::as_slice);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let writable = disks.iter().filter(|disk| disk["read_only"] != Value::Bool(true));
        writable
            .map(|disk| DiskView { name: text(&disk["name"]), volume: text(&disk["volume"]) })
            .collect()
    }

    /// What defines it, for another host: nothing that is a path of this one.
    #[must_use]
    pub fn portable(&self) -> Value {
        const OF_THE_VM: [&str; 4] = ["name", "disk", "vmm", "poll_us"];
        const OF_A_DISK: [&str; 5] = ["name", "volume", "read_only", "num_queues", "queue_size"];
        let mut vm = self.definition().clone();
        if let Some(vm) = vm.as_object_mut() {
            vm.retain(|key, _| OF_THE_VM.contains(&key.as_str()));
            for disk in vm.get_mut("disk").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(disk) = disk.as_object_mut() {
                    disk.retain(|key, _| OF_A_DISK.contains(&key.as_str()));
                }
            }
        }
        vm
    }

    /// What the backend says of itself; null when it does not answer.
    #[must_use]
    pub fn status(&self) -> &Value {
        &self.0["status"]
    }

    /// The backend's part of the handoff.
    #[must_use]
    pub fn handoff(&self) -> &Value {
        &self.status()["handoff"]
    }

    /// What the backend does in the handoff.
    #[must_use]
    pub fn standing_word(&self) -> Option<&str> {
        self.handoff()["standing"].as_str()
    }

    /// It waits for a machine, in another handoff than this one.
    #[must_use]
    pub fn waits_in_another(&self, id: &str, attempt: u32) -> bool {
        matches!(self.standing_word(), Some("ready" | "activating")) && !self.is_in(id, attempt)
    }

    fn is_in(&self, id: &str, attempt: u32) -> bool {
        let handoff = self.handoff();
        handoff["id"].as_str() == Some(id)
            && handoff["attempt"].as_u64() == Some(u64::from(attempt))
    }

    /// The number of the last try that its agent has heard of, where no storage fences; 0: of none.
    #[must_use]
    pub fn turn(&self) -> u64 {
        self.0["ledger"]["turn"].as_u64().unwrap_or(0)
    }

    /// The backend's process, and how often rings were started in it, where no storage
    /// fences.
    #[must_use]
    pub fn starts(&self) -> Option<(i32, u32)> {
        let pid = i32::try_from(self.status()["pid"].as_i64()?).ok()?;
        Some((pid, u32::try_from(self.handoff()["starts"].as_u64()?).ok()?))
    }

    /// The backend's process is there, or may be.
    #[must_use]
    pub fn backend_runs(&self) -> bool {
        !matches!(self.0["backend"]["run"].as_str(), Some("stopped" | "failed"))
    }

    /// What the machine does, in the agent's words: `running`, `paused`, ...
    #[must_use]
    pub fn run(&self) -> &str {
        self.0["vmm"]["run"].as_str().unwrap_or("unknown")
    }

    /// Its monitor can wait between the stop and the switch. cloud-hypervisor
    /// switches by itself, and has no cancel.
    #[must_use]
    pub fn can_pause(&self) -> bool {
        self.definition()["vmm"] != "cloud-hypervisor"
    }

    /// Somebody else drives the machine's monitor; the agent knows nothing of it.
    #[must_use]
    pub fn monitor_is_foreign(&self) -> bool {
        self.definition()["vmm"].as_str().is_none_or(|kind| kind == "none")
    }

    /// The machine's last migration.
    #[must_use]
    pub fn migration(&self) -> &Value {
        &self.0["vmm"]["migration"]
    }

    /// As the plan takes it, for one handoff.
    #[must_use]
    pub fn standing(&self, id: &str, attempt: u32) -> Standing {
        if !self.backend_runs() {
            // A machine that runs, or of which nobody says how it is, may have
            // activated before its backend died.
            let runs = matches!(self.run(), "running" | "unknown");
            return if runs { Standing::Unknown } else { Standing::Dead };
        }
        let same = self.is_in(id, attempt);
        match self.standing_word() {
            Some("ready") if same => Standing::Ready,
            Some("activating") if same => Standing::Active,
            Some("serving") => Standing::Active,
            Some("parked") => Standing::Parked,
            _ => Standing::Starting,
        }
    }
}

impl Agents {
    /// Of the configuration, for the coordinator of this term.
    #[must_use]
    pub fn new(config: &Config, credentials: Option<&Arc<Credentials>>, term: u64) -> Self {
        let (superseded, _) = watch::channel(false);
        let agent = |host: &Host| Agent {
            host: host.clone(),
            client: Client::new(
                Identity { role: Role::Host, name: host.name.clone() },
                host.agent.clone(),
                credentials.cloned(),
                config.call_timeout,
            )
            .of_term(term),
            timeout: config.call_timeout,
            superseded: superseded.clone(),
        };
        Self { all: config.hosts.iter().map(agent).collect(), superseded }
    }

    /// Highest term that any of these hosts has heard. All are asked at once, by
    /// somebody without a term.
    pub async fn term_seen(config: &Config, credentials: Option<&Arc<Credentials>>) -> u64 {
        let terms = config.hosts.iter().map(async |host| {
            let who = Identity { role: Role::Host, name: host.name.clone() };
            let (agent, within) = (host.agent.clone(), config.agent_patience);
            let client = Client::new(who, agent, credentials.cloned(), within);
            match client.call(Method::GET, "/v1/host", None).await {
                Ok(facts) => facts["coordinator_term"].as_u64().unwrap_or(0),
                Err(error) => {
                    tracing::warn!(host = host.name, %error, "cannot ask for its term");
                    0
                }
            }
        });
        futures_util::future::join_all(terms).await.into_iter().max().unwrap_or(0)
    }

    /// True once an agent has heard a higher term.
    #[must_use]
    pub fn superseded(&self) -> watch::Receiver<bool> {
        self.superseded.subscribe()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Agent> {
        self.all.iter()
    }

    /// The one of a host.
    #[must_use]
    pub fn of(&self, host: &str) -> Option<&Agent> {
        self.all.iter().find(|agent| agent.host.name == host)
    }
}

impl Agent {
    /// The VMs it knows.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn vms(&self) -> Result<Vec<VmView>, AgentError> {
        let answer = self.call(Method::GET, "/v1/vms", None).await?;
        let vms = answer["vms"].as_array().or(answer.as_array());
        Ok(vms.cloned().unwrap_or_default().into_iter().map(VmView).collect())
    }

    /// One VM.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn vm(&self, vm: &str) -> Result<VmView, AgentError> {
        self.call(Method::GET, &format!("/v1/vms/{vm}"), None).await.map(VmView)
    }

    /// [`Self::vm`], not waited for longer than this.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn vm_within(&self, vm: &str, within: Duration) -> Result<VmView, AgentError> {
        let within = self.timeout.min(within);
        let answer =
            self.client.call_within(Method::GET, &format!("/v1/vms/{vm}"), None, within).await;
        answer.map(VmView).map_err(|error| self.judge(error))
    }

    /// [`Self::vm`], asked again for at most `patience` while nobody answers.
    ///
    /// # Errors
    /// [`AgentError`]; unreachable says for how long it was tried.
    pub async fn vm_patiently(&self, vm: &str, patience: Duration) -> Result<VmView, AgentError> {
        let path = format!("/v1/vms/{vm}");
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let within = self.timeout.min(left.max(ASK_AGAIN));
            let answer = self.client.call_within(Method::GET, &path, None, within).await;
            let error = match answer {
                Ok(view) => return Ok(VmView(view)),
                Err(error) => self.judge(error),
            };
            let AgentError::Unreachable(Trouble { kind, detail }) = error else {
                return Err(error);
            };
            if tokio::time::Instant::now() + ASK_AGAIN > deadline {
                let detail = format!("{detail} (tried for {} ms)", patience.as_millis());
                return Err(AgentError::Unreachable(Trouble { kind, detail }));
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Tells it of a VM.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn define(&self, vm: &str, definition: &Value) -> Result<(), AgentError> {
        self.call(Method::PUT, &format!("/v1/vms/{vm}"), Some(definition)).await.map(drop)
    }

    /// Starts a backend that claims nothing and is good for this try only.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stand_by(&self, row: &Row) -> Result<(), AgentError> {
        let path = format!("/v1/vms/{}/backend", row.vm);
        let mut told = json!({"role": "standby", "try": row.attempt().to_string()});
        if row.is_cooperative() {
            told["turn"] = row.cooperation.turn.into();
            return self.call(Method::PUT, &path, Some(&told)).await.map(drop);
        }
        match self.call(Method::PUT, &path, Some(&told)).await {
            // An agent from before there was a try to tell. Its backends take the first
            // of which they hear.
            Err(AgentError::Refused { trouble, .. }) if trouble.kind == "baton:bad-request" => {
                self.call(Method::PUT, &path, Some(&json!({"role": "standby"}))).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Stops the backend; there may be none. Whether the end of its process was seen.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stop_backend(&self, vm: &str) -> Result<bool, AgentError> {
        match self.call(Method::DELETE, &format!("/v1/vms/{vm}/backend"), None).await {
            Err(error) if error.is_missing() => Ok(false),
            other => other.map(|proof| proof["seen_by"].is_string()),
        }
    }

    /// Orders the backend: `seal`, `activate`, ...
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn order(&self, vm: &str, what: &str) -> Result<Value, AgentError> {
        self.call(Method::POST, &format!("/v1/vms/{vm}/backend/{what}"), Some(&json!({}))).await
    }

    /// An order of a handoff that no storage fences: `end`, `keep`, `permit`, `dismiss`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn order_of_try(&self, row: &Row, what: &str) -> Result<Value, AgentError> {
        let path = format!("/v1/vms/{}/backend/{what}", row.vm);
        let mut body = json!({"try": row.attempt().to_string(), "turn": row.cooperation.turn});
        if what == "end" {
            body["pid"] = row.cooperation.source_pid.into();
            body["starts"] = row.cooperation.source_starts.into();
        }
        if what == "permit" {
            body["forced"] = row.is_forced().into();
        }
        // A backend may be started or ended first.
        let within = self.timeout * 4;
        let answer = self.client.call_within(Method::POST, &path, Some(&body), within).await;
        answer.map_err(|error| self.judge(error))
    }

    /// How long the guest's requests took; they are timed for `watch_s` more.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn latency(&self, vm: &str, watch_s: u32) -> Result<Value, AgentError> {
        let path = format!("/v1/vms/{vm}/backend/latency");
        self.call(Method::POST, &path, Some(&json!({"watch_s": watch_s}))).await
    }

    /// What the agent did by itself after event `since` of its start `boot`, as
    /// soon as there is something, or nothing after `wait`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn events(
        &self,
        boot: &str,
        since: u64,
        wait: Duration,
    ) -> Result<Value, AgentError> {
        let path = format!("/v1/events?boot={boot}&since={since}&wait_ms={}", wait.as_millis());
        let answer = self.client.call_within(Method::GET, &path, None, self.timeout + wait).await;
        answer.map_err(|error| self.judge(error))
    }

    /// Tells the machine's monitor: `incoming`, `migrate`, `continue`, ...
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn monitor(&self, vm: &str, what: &str, body: &Value) -> Result<Value, AgentError> {
        let path = format!("/v1/vms/{vm}/vmm/{what}");
        // A monitor may be started first, and a drain of slow disks holds it up.
        let within = self.timeout * 4;
        let answer = self.client.call_within(Method::POST, &path, Some(body), within).await;
        answer.map_err(|error| self.judge(error))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, AgentError> {
        self.client.call(method, path, body).await.map_err(|error| self.judge(error))
    }

    fn judge(&self, error: CallError) -> AgentError {
        match error {
            CallError::Refused { kind, detail, .. } if kind == "baton:stale-term" => {
                self.superseded.send_replace(true);
                AgentError::Failed(Trouble {
                    kind: "baton:agent-failed".to_owned(),
                    detail: format!("agent of {}: {detail}", self.host.name),
                })
            }
            // A full disk is an answer, though the caller is not to blame for it.
            CallError::Refused { status, kind, detail, .. }
                if status < 500 || kind == "baton:state-full" =>
            {
                AgentError::Refused { status, trouble: Trouble { kind, detail } }
            }
            CallError::Refused { detail, .. } => AgentError::Failed(Trouble {
                kind: "baton:agent-failed".to_owned(),
                detail: format!("agent of {}: {detail}", self.host.name),
            }),
            other => AgentError::Unreachable(Trouble {
                kind: "baton:agent-unreachable".to_owned(),
                detail: format!("agent of {}: {}", self.host.name, Problem::described(&other)),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(vm: Value) -> Standing {
        VmView(vm).standing("ID", 1)
    }

    #[test]
    fn what_an_agent_says_of_the_destination() {
        let backend = |standing: &str, id: &str| {
            json!({"backend": {"run": "running"}, "vmm": {"run": "incoming"},
                "status": {"handoff": {"standing": standing, "id": id, "attempt": 1}}})
        };
        assert_eq!(standing(backend("ready", "ID")), Standing::Ready);
        assert_eq!(standing(backend("ready", "OTHER")), Standing::Starting);
        assert_eq!(standing(backend("standby", "ID")), Standing::Starting);
        assert_eq!(standing(backend("activating", "ID")), Standing::Active);
        assert_eq!(standing(backend("serving", "OTHER")), Standing::Active);
        assert_eq!(standing(backend("parked", "ID")), Standing::Parked);
        let stopped = |vmm: Value| standing(json!({"backend": {"run": "stopped"}, "vmm": vmm}));
        assert_eq!(stopped(json!({"run": "gone"})), Standing::Dead);
        assert_eq!(stopped(json!({"run": "incoming"})), Standing::Dead);
        // Not proven: its machine runs, or nobody says.
        assert_eq!(stopped(json!({"run": "running"})), Standing::Unknown);
        assert_eq!(stopped(Value::Null), Standing::Unknown);
    }

    /// It is to make room for this one; one that starts, or has the volumes, is not.
    #[test]
    fn who_waits_in_another_handoff_is_told_from_who_waits_in_this_one() {
        let waits = |standing: &str, id: &str| {
            let handoff = json!({"standing": standing, "id": id, "attempt": 1});
            VmView(json!({"status": {"handoff": handoff}})).waits_in_another("ID", 1)
        };
        assert!(waits("ready", "OTHER") && waits("activating", "OTHER"));
        assert!(!waits("ready", "ID") && !waits("serving", "OTHER") && !waits("sealed", "OTHER"));
        assert!(!VmView(Value::Null).waits_in_another("ID", 1));
    }

    #[test]
    fn another_host_gets_no_paths_of_this_one() {
        let vm =
            VmView(json!({"backend": {}, "definition": {"name": "web", "qmp": "/x", "vmm": "qemu",
            "disk": [{"name": "root", "volume": "baton://s:1/v", "socket": "/y", "num_queues": 2},
                     {"name": "cd", "volume": "file:///z", "read_only": true}]}}));
        assert_eq!(
            vm.portable(),
            json!({"name": "web", "vmm": "qemu",
            "disk": [{"name": "root", "volume": "baton://s:1/v", "num_queues": 2},
                     {"name": "cd", "volume": "file:///z", "read_only": true}]})
        );
        assert_eq!(vm.disks().len(), 1);
    }

    #[test]
    fn another_host_gets_everything_that_is_no_path() {
        use crate::agent::definition::{Disk, VmDefinition, VmmKind};
        // Every field, so that a new one does not get lost on the way unseen.
        let whole = VmDefinition {
            name: "web".to_owned(),
            disks: vec![Disk {
                name: "root".to_owned(),
                volume: "baton://s:1/v".to_owned(),
                socket: Some("/y".into()),
                read_only: true,
                num_queues: Some(2),
                queue_size: Some(64),
            }],
            vmm: VmmKind::Qemu,
            qmp: Some("/x".into()),
            api_socket: Some("/z".into()),
            incoming_command: Some(vec!["/q".to_owned()]),
            poll_us: Some(30),
        };
        let mut portable = whole.clone();
        portable.disks[0].socket = None;
        (portable.qmp, portable.api_socket, portable.incoming_command) = (None, None, None);
        let sent = VmView(serde_json::to_value(&whole).expect("JSON")).portable();
        assert_eq!(serde_json::from_value::<VmDefinition>(sent).expect("a definition"), portable);
    }
}
