//! The admin API of a storage server, as this command uses it.
//!
//! Answers stay JSON, so that `--json` prints what the server said and not what this version understood of it.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::{Response, Uri};

/// Long enough for a slow network, short enough for a person.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A delete frees space and a fence waits for requests that are at the disk; both take seconds at worst.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A list of 100,000 volumes fits.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Where a storage server's admin API is: `http://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server(String);

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not an admin address; write HOST:PORT or http://HOST:PORT, such as 127.0.0.1:7701"
            )
        };
        if text.starts_with("https://") {
            return Err(
                "the admin API speaks plain HTTP; write http:// and keep it on a trusted network"
                    .to_owned(),
            );
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let uri: Uri = format!("http://{address}").parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        // No path, no user, and a port somebody chose: port 80 is never what was meant.
        if authority.as_str() != address || authority.port().is_none() || address.contains('@') {
            return Err(wrong());
        }
        Ok(Self(format!("http://{address}")))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a command did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The server understood and refused.
    #[error("{title}: {detail} ({kind})")]
    Refused { kind: String, title: String, detail: String },
    /// Nobody there.
    #[error(
        "cannot reach the storage server at {server} ({source}); is it running, and is --server or BATON_SERVER its admin address?"
    )]
    Unreachable { server: Server, source: Box<ureq::Error> },
    /// Somebody there who does not finish.
    #[error("the storage server at {server} did not answer within {} s; it may still carry the command out: look with `baton volume list`", ANSWER_TIMEOUT.as_secs())]
    Silent { server: Server },
    /// Not the admin API.
    #[error(
        "{server} answered, but not as a Baton storage server does ({what}); check the address: the admin port is not the data port"
    )]
    Foreign { server: Server, what: String },
    /// The server failed.
    #[error("the storage server at {server} failed: {detail}")]
    Failed { server: Server, detail: String },
}

/// RFC 9457.
#[derive(Debug, Deserialize)]
struct Problem {
    #[serde(rename = "type", default)]
    kind: String,
    title: String,
    #[serde(default)]
    detail: String,
}

/// Calls one server.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    server: Server,
}

impl Client {
    pub(crate) fn new(server: &Server) -> Self {
        let config = Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(ANSWER_TIMEOUT))
            // A refusal has a body that says why.
            .http_status_as_error(false)
            .max_redirects(0)
            // Storage servers are neighbours: a proxy for the web does not know them.
            .proxy(None)
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), server: server.clone() }
    }

    pub(crate) fn list(&self) -> Result<Value, CallError> {
        self.answer(self.agent.get(self.url("")).call())
    }

    pub(crate) fn show(&self, name: &str) -> Result<Value, CallError> {
        self.answer(self.agent.get(self.url(&format!("/{name}"))).call())
    }

    pub(crate) fn create(&self, name: &str, size_bytes: u64) -> Result<Value, CallError> {
        self.post("", &json!({"name": name, "size_bytes": size_bytes}))
    }

    pub(crate) fn resize(&self, name: &str, size_bytes: u64) -> Result<Value, CallError> {
        self.post(&format!("/{name}/resize"), &json!({"size_bytes": size_bytes}))
    }

    pub(crate) fn fence(
        &self,
        name: &str,
        reason: &str,
        nominee: Option<&str>,
    ) -> Result<Value, CallError> {
        let mut body = json!({"reason": reason});
        if let Some(nominee) = nominee {
            body["nominee"] = nominee.into();
        }
        self.post(&format!("/{name}/fence"), &body)
    }

    pub(crate) fn delete(&self, name: &str, force: bool) -> Result<Value, CallError> {
        let force = if force { "?force=true" } else { "" };
        self.answer(self.agent.delete(self.url(&format!("/{name}{force}"))).call())
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v1/volumes{path}", self.server)
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value, CallError> {
        self.answer(self.agent.post(self.url(path)).send_json(body))
    }

    fn answer(&self, sent: Result<Response<ureq::Body>, ureq::Error>) -> Result<Value, CallError> {
        let mut response = sent.map_err(|error| self.not_answered(error))?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|error| self.not_answered(error))?;
        if status.is_success() {
            if text.is_empty() {
                return Ok(Value::Null);
            }
            return serde_json::from_str(&text)
                .map_err(|_| self.foreign("an answer that is not JSON"));
        }
        match serde_json::from_str::<Problem>(&text) {
            // Every path of this command is one of a storage server's.
            Ok(Problem { kind, .. }) if kind == "baton:no-such-route" => {
                Err(self.foreign("it has no volumes"))
            }
            Ok(Problem { kind, title, detail }) if status.is_client_error() => {
                Err(CallError::Refused { kind, title, detail })
            }
            Ok(Problem { title, detail, .. }) => {
                let detail = format!("{title}: {detail}");
                Err(CallError::Failed { server: self.server.clone(), detail })
            }
            Err(_) => Err(self.foreign(&format!("status {status} without a reason"))),
        }
    }

    fn foreign(&self, what: &str) -> CallError {
        CallError::Foreign { server: self.server.clone(), what: what.to_owned() }
    }

    fn not_answered(&self, error: ureq::Error) -> CallError {
        let server = self.server.clone();
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
                CallError::Unreachable { server, source: Box::new(error) }
            }
            ureq::Error::Timeout(_) => CallError::Silent { server },
            ureq::Error::Http(_) | ureq::Error::Protocol(_) | ureq::Error::BodyExceedsLimit(_) => {
                self.foreign(&error.to_string())
            }
            // A data port closes at the first word of HTTP.
            ureq::Error::Io(ref io) if closed_early(io.kind()) => {
                self.foreign("it closed the connection")
            }
            _ => CallError::Unreachable { server, source: Box::new(error) },
        }
    }
}

fn closed_early(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_people_write_them() {
        for text in ["127.0.0.1:7701", "http://127.0.0.1:7701", "http://127.0.0.1:7701/"] {
            assert_eq!(text.parse(), Ok(Server("http://127.0.0.1:7701".to_owned())), "{text}");
        }
        assert!("[::1]:7701".parse::<Server>().is_ok());
        assert!("storage-1.example:7701".parse::<Server>().is_ok());
        for text in [
            "",
            ":",
            "host",
            "http://host",
            "host:port",
            "host:99999",
            "https://host:1",
            "http://host:1/v1",
            "user@host:1",
            "ftp://host:1",
            "a b:1",
        ] {
            assert!(text.parse::<Server>().is_err(), "{text}");
        }
    }
}
