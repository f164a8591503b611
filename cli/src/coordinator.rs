//! The coordinator's API, as this command uses it: one call at a time, waited for.

use std::cell::RefCell;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use baton_live_migrate::client::{CallError, Client, Endpoint, Method};
use baton_live_migrate::identity::{Identity, IdentityError, Role};
use baton_live_migrate::problem::Problem;
use baton_live_migrate::tls::{Credentials, CredentialsError, TlsFiles};
use baton_protocol::handoff::HandoffId;
use serde_json::Value;

use crate::args::Coordinated;

/// Long polls ask for less; what an operator wants to wait is added.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// For a coordinator to say whether it leads.
const WHO_LEADS_TIMEOUT: Duration = Duration::from_secs(2);
/// For one of several to lead: a lease has to end first.
const LEADER_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks for it.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// From one that does not lead to the one that it names.
const HOPS_MAX: u32 = 3;

/// Why a command did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoordinatorError {
    /// A name or certificate that cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The name of the coordinator.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It refused, or failed, and says so.
    #[error("{}{}", Problem::described(.0), stable_type(.0))]
    Call(CallError),
    /// Called without certificates.
    #[error(
        "{0} needs certificates; give --tls-ca, --tls-cert and --tls-key, or set BATON_TLS_CA, BATON_TLS_CERT and BATON_TLS_KEY"
    )]
    NoCredentials(Endpoint),
    /// Another daemon of ours.
    #[error(
        "what answers at {0} is not a coordinator; check the address: --coordinator, or BATON_COORDINATOR"
    )]
    Foreign(Endpoint),
    /// No runtime, no random bytes.
    #[error("this host has not what the command needs: {0}")]
    Host(#[from] std::io::Error),
    /// None of several.
    #[error("none of the coordinators leads: {why}")]
    NoLeader {
        /// What each says.
        why: String,
    },
    /// A VM without a handoff.
    #[error("VM `{0}` has no handoff; prepare one, or name its id")]
    NoHandoff(String),
}

/// What programs go by, behind the sentence for people.
fn stable_type(error: &CallError) -> String {
    match error {
        CallError::Refused { kind, .. } => format!(" ({kind})"),
        _ => String::new(),
    }
}

impl CoordinatorError {
    /// Another coordinator may answer soon. All that is asked may be asked twice: a handoff has an id, and what is done
    /// already is answered as done.
    fn may_pass(&self) -> bool {
        match self {
            Self::NoLeader { .. }
            | Self::Call(CallError::Unreachable { .. } | CallError::Foreign { .. }) => true,
            Self::Call(CallError::Refused { kind, .. }) => [
                "baton:not-leader",
                "baton:no-leader",
                "baton:stopping",
                "baton:journal-unreachable",
            ]
            .contains(&kind.as_str()),
            _ => false,
        }
    }

    /// Stable type of a refusal.
    pub(crate) fn kind(&self) -> Option<&str> {
        match self {
            Self::Call(CallError::Refused { kind, .. }) => Some(kind),
            _ => None,
        }
    }
}

/// Calls the coordinator, or of several the one that leads.
pub(crate) struct Coordinator {
    runtime: tokio::runtime::Runtime,
    who: Identity,
    credentials: Option<Arc<Credentials>>,
    endpoints: Vec<Endpoint>,
    /// The one that leads, once it was found.
    leader: RefCell<Option<Endpoint>>,
}

impl Coordinator {
    pub(crate) fn new(common: &Coordinated) -> Result<Self, CoordinatorError> {
        let credentials = match (&common.tls_ca, &common.tls_cert, &common.tls_key) {
            (Some(ca), Some(cert), Some(key)) => {
                let files = TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() };
                Some(Arc::new(Credentials::load(&files)?))
            }
            _ => None,
        };
        let who = Identity::new(Role::Coordinator, &common.coordinator_name)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoints = common.coordinator.clone();
        // Of one there is nothing to choose.
        let only = match &endpoints[..] {
            [only] => Some(only.clone()),
            _ => None,
        };
        Ok(Self { runtime, who, credentials, endpoints, leader: RefCell::new(only) })
    }

    /// What each of them says of itself, or why it does not.
    pub(crate) fn everyone(&self) -> Value {
        let all = self.runtime.block_on(self.ask_everyone());
        let all = all.into_iter().map(|(endpoint, answer)| {
            let mut one = answer
                .unwrap_or_else(|error| serde_json::json!({"trouble": Problem::described(&error)}));
            one["address"] = endpoint.to_string().into();
            one
        });
        serde_json::json!({"coordinators": all.collect::<Vec<_>>()})
    }

    async fn ask_everyone(&self) -> Vec<(Endpoint, Result<Value, CallError>)> {
        let asked = self.endpoints.iter().map(|endpoint| {
            let client = self.client(endpoint, WHO_LEADS_TIMEOUT);
            let endpoint = endpoint.clone();
            tokio::spawn(
                async move { (endpoint, client.call(Method::GET, "/v1/leader", None).await) },
            )
        });
        let asked: Vec<_> = asked.collect();
        let mut answers = Vec::new();
        for one in asked {
            // They do not panic.
            answers.extend(one.await.ok());
        }
        answers
    }

    fn client(&self, endpoint: &Endpoint, timeout: Duration) -> Client {
        Client::new(self.who.clone(), endpoint.clone(), self.credentials.clone(), timeout)
    }

    /// The one that leads with the highest term: another may not know yet that it leads no more.
    fn find_leader(&self) -> Result<Endpoint, CoordinatorError> {
        let answers = self.runtime.block_on(self.ask_everyone());
        let leads = answers.iter().filter_map(|(endpoint, answer)| {
            let answer = answer.as_ref().ok().filter(|answer| answer["role"] == "leader")?;
            Some((answer["term"].as_u64().unwrap_or(0), endpoint))
        });
        if let Some((_, endpoint)) = leads.max_by_key(|(term, _)| *term) {
            return Ok(endpoint.clone());
        }
        let why = answers.iter().map(|(endpoint, answer)| match answer {
            Ok(answer) => match answer["trouble"].as_str() {
                Some(trouble) => format!("{endpoint} follows ({trouble})"),
                None => format!("{endpoint} follows"),
            },
            Err(error) => Problem::described(error),
        });
        Err(CoordinatorError::NoLeader { why: why.collect::<Vec<_>>().join("; ") })
    }

    pub(crate) fn get(&self, path: &str) -> Result<Value, CoordinatorError> {
        self.call(Method::GET, path, None, Duration::ZERO)
    }

    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<Value, CoordinatorError> {
        self.call(Method::PUT, path, Some(body), Duration::ZERO)
    }

    pub(crate) fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, CoordinatorError> {
        self.call(Method::POST, path, body, Duration::ZERO)
    }

    /// Orders something whose outcome the coordinator itself waits for, so long.
    pub(crate) fn order(
        &self,
        path: &str,
        body: Option<&Value>,
        wait: Duration,
    ) -> Result<Value, CoordinatorError> {
        self.call(Method::POST, path, body, wait)
    }

    /// The last handoff of a VM.
    pub(crate) fn latest(&self, vm: &str) -> Result<HandoffId, CoordinatorError> {
        let answer = self.get(&format!("/v1/handoffs?vm={vm}"))?;
        let last = answer["handoffs"].as_array().and_then(|all| all.last());
        let id = last.and_then(|row| row["id"].as_str()?.parse().ok());
        id.ok_or_else(|| CoordinatorError::NoHandoff(vm.to_owned()))
    }

    fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        wait: Duration,
    ) -> Result<Value, CoordinatorError> {
        let deadline = Instant::now() + LEADER_PATIENCE;
        let several = self.endpoints.len() > 1;
        let mut hops = 0;
        loop {
            let known = self.leader.borrow().clone();
            let found = known.map_or_else(|| self.find_leader(), Ok);
            let error = match found {
                Ok(endpoint) => {
                    let client = self.client(&endpoint, ANSWER_TIMEOUT);
                    let limit = ANSWER_TIMEOUT + wait;
                    let asked = client.call_within(method.clone(), path, body, limit);
                    match self.runtime.block_on(asked) {
                        Ok(answer) => {
                            *self.leader.borrow_mut() = Some(endpoint);
                            return Ok(answer);
                        }
                        Err(CallError::Refused { kind, leader: Some(leader), .. })
                            if kind == "baton:not-leader" && hops < HOPS_MAX =>
                        {
                            hops += 1;
                            // Told by one whom we believe.
                            *self.leader.borrow_mut() = leader.parse().ok();
                            continue;
                        }
                        Err(error) => described(error, &endpoint),
                    }
                }
                Err(error) => error,
            };
            let one_follows = error.kind() == Some("baton:no-leader");
            if !(several || one_follows) || !error.may_pass() || Instant::now() > deadline {
                return Err(error);
            }
            hops = 0;
            if several {
                *self.leader.borrow_mut() = None;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

fn described(error: CallError, endpoint: &Endpoint) -> CoordinatorError {
    match error {
        CallError::NoCredentials { endpoint } => CoordinatorError::NoCredentials(endpoint),
        // Every path of this command is one of a coordinator's.
        CallError::Refused { kind, .. } if kind == "baton:no-such-route" => {
            CoordinatorError::Foreign(endpoint.clone())
        }
        other => CoordinatorError::Call(other),
    }
}

/// A ULID: milliseconds since 1970, then 80 random bits.
pub(crate) fn new_id() -> Result<HandoffId, CoordinatorError> {
    let mut random = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random[6..])?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(HandoffId(since.as_millis() << 80 | u128::from_be_bytes(random)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_ordered_by_time_and_differ() {
        let (first, second) = (new_id().expect("an id"), new_id().expect("an id"));
        assert_ne!(first, second);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
        assert!(now - (first.0 >> 80) < 60_000);
    }
}
