//! The hosts' agents, as the coordinator uses them.
//!
//! An agent's word is a report. Nothing here decides who owns a volume.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::config::{Config, Host};
use super::plan::{Row, Trouble};
use super::vm_view::VmView;
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
