//! The coordinator's API, as this command uses it: one call at a time, waited for.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_live_migrate::client::{CallError, Client, Endpoint, Method};
use baton_live_migrate::identity::{Identity, IdentityError, Role};
use baton_live_migrate::problem::Problem;
use baton_live_migrate::tls::{Credentials, CredentialsError, TlsFiles};
use baton_protocol::handoff::HandoffId;
use serde_json::Value;

use crate::args::Coordinated;

/// Long polls ask for less; what an operator wants to wait is added.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

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
    /// Stable type of a refusal.
    pub(crate) fn kind(&self) -> Option<&str> {
        match self {
            Self::Call(CallError::Refused { kind, .. }) => Some(kind),
            _ => None,
        }
    }
}

/// Calls one coordinator.
pub(crate) struct Coordinator {
    runtime: tokio::runtime::Runtime,
    client: Client,
    endpoint: Endpoint,
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
        let client = Client::new(who, common.coordinator.clone(), credentials, ANSWER_TIMEOUT);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, client, endpoint: common.coordinator.clone() })
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
        let limit = ANSWER_TIMEOUT + wait;
        let answer = self.runtime.block_on(self.client.call_within(method, path, body, limit));
        answer.map_err(|error| match error {
            CallError::NoCredentials { endpoint } => CoordinatorError::NoCredentials(endpoint),
            // Every path of this command is one of a coordinator's.
            CallError::Refused { kind, .. } if kind == "baton:no-such-route" => {
                CoordinatorError::Foreign(self.endpoint.clone())
            }
            other => CoordinatorError::Call(other),
        })
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
