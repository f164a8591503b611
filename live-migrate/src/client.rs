//! Calls a daemon's HTTP API: over TCP with mutual TLS, plaintext on loopback,
//! or a unix socket.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
pub use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::http::{self, ExchangeError};
use crate::identity::Identity;
use crate::tls::{Credentials, HandshakeError};
use crate::unix;

/// Long enough for a slow network, short enough to try something else.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `https://HOST:PORT`; with certificates.
    Tls(String),
    /// `http://IP:PORT`; on this host only.
    Loopback(SocketAddr),
    /// `unix:/PATH`.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no endpoint; write https://HOST:PORT, http://127.0.0.1:PORT or unix:/PATH"
            )
        };
        if let Some(authority) = text.strip_prefix("https://") {
            let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
            let good = !host.is_empty() && !authority.contains(['/', '@', '?', '#', ' ']);
            return match port.parse::<u16>() {
                Ok(port) if good && port != 0 => Ok(Self::Tls(authority.to_owned())),
                _ => Err(wrong()),
            };
        }
        if let Some(address) = text.strip_prefix("http://") {
            let address: SocketAddr = address.parse().map_err(|_| wrong())?;
            if !address.ip().is_loopback() {
                return Err(format!(
                    "plaintext leaves this host at {address}; use https:// there, with certificates"
                ));
            }
            return Ok(Self::Loopback(address));
        }
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tls(authority) => write!(f, "https://{authority}"),
            Self::Loopback(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why a call did not work.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody there.
    #[error("cannot reach {who} at {endpoint}; is it running, and is this its address?")]
    Unreachable {
        /// Whom.
        who: Identity,
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: std::io::Error,
    },
    /// One of the two does not trust the other.
    #[error("{who} at {endpoint} and we do not trust each other")]
    Distrust {
        /// Whom.
        who: Identity,
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: Box<HandshakeError>,
    },
    /// Certificates are needed and there are none.
    #[error("{endpoint} needs certificates and there are none; add [tls] to the configuration")]
    NoCredentials {
        /// Where.
        endpoint: Endpoint,
    },
    /// Somebody there who does not finish.
    #[error("{who} at {endpoint} did not answer within {} ms; it may still carry the call out", after.as_millis())]
    Silent {
        /// Whom.
        who: Identity,
        /// Where.
        endpoint: Endpoint,
        /// How long it had.
        after: Duration,
    },
    /// It understood and refused, or failed.
    #[error("{title}: {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Stable type of the problem.
        kind: String,
        /// In words.
        title: String,
        /// What happened and what to do.
        detail: String,
        /// Where the coordinator is that leads, from one that does not.
        leader: Option<String>,
    },
    /// Not one of ours.
    #[error("{endpoint} does not answer as {who} would; check the address")]
    Foreign {
        /// Whom.
        who: Identity,
        /// Where.
        endpoint: Endpoint,
        /// What came instead.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// RFC 9457.
#[derive(Debug, Deserialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: String,
    title: String,
    #[serde(default)]
    detail: String,
    leader: Option<String>,
}

/// Calls one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    who: Identity,
    endpoint: Endpoint,
    credentials: Option<Arc<Credentials>>,
    timeout: Duration,
    /// As text, for the header.
    term: Option<Arc<str>>,
}

/// Header with the term of the coordinator that calls an agent.
pub const TERM_HEADER: &str = "baton-coordinator-term";

impl Client {
    /// Calls `who` at `endpoint`; each answer may take `timeout`. Who answers is
    /// checked where there are certificates.
    #[must_use]
    pub fn new(
        who: Identity,
        endpoint: Endpoint,
        credentials: Option<Arc<Credentials>>,
        timeout: Duration,
    ) -> Self {
        Self { who, endpoint, credentials, timeout, term: None }
    }

    /// Says with every call that the coordinator of this term calls.
    #[must_use]
    pub fn of_term(mut self, term: u64) -> Self {
        self.term = Some(term.to_string().into());
        self
    }

    /// Where it calls.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// One call. An empty answer is `null`.
    ///
    /// # Errors
    /// [`CallError`], by who is to blame.
    ///
    /// # Cancel safety
    /// The daemon may carry the call out all the same.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, CallError> {
        self.call_within(method, path, body, self.timeout).await
    }

    /// [`Self::call`] that may take another time, for long polls.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_within(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Value, CallError> {
        let what = (method, path);
        let term = self.term.as_deref().map(|term| (TERM_HEADER, term));
        let headers = term.as_slice();
        let limits = (timeout, http::ANSWER_BYTES_MAX);
        let answer = match &self.endpoint {
            Endpoint::Tls(authority) => {
                let credentials = self
                    .credentials
                    .as_ref()
                    .ok_or_else(|| CallError::NoCredentials { endpoint: self.endpoint.clone() })?;
                let stream = in_time(TcpStream::connect(authority.as_str()))
                    .await
                    .map_err(|source| self.unreachable(source))?;
                let greeting = credentials.connect(stream, &self.who);
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, greeting)
                    .await
                    .map_err(|_| self.silent(CONNECT_TIMEOUT))?
                    .map_err(|source| self.distrust(source))?;
                http::exchange_with(stream, authority, what, headers, body, limits).await
            }
            Endpoint::Loopback(address) => {
                let stream = in_time(TcpStream::connect(address))
                    .await
                    .map_err(|source| self.unreachable(source))?;
                http::exchange_with(stream, &address.to_string(), what, headers, body, limits).await
            }
            Endpoint::Unix(path) => {
                let connected = tokio::time::timeout(CONNECT_TIMEOUT, unix::connect(path)).await;
                let stream = connected
                    .map_err(|_| self.silent(CONNECT_TIMEOUT))?
                    .map_err(|source| self.unreachable(source))?;
                http::exchange_with(stream, "localhost", what, headers, body, limits).await
            }
        };
        match answer {
            Ok((status, body)) => self.understand(status, &body),
            Err(ExchangeError::Silent(after)) => Err(self.silent(after)),
            Err(error) => match HandshakeError::within(&error) {
                Some(source) => Err(self.distrust(source)),
                None => Err(self.foreign(error)),
            },
        }
    }

    fn understand(&self, status: StatusCode, body: &Bytes) -> Result<Value, CallError> {
        if status.is_success() {
            if body.is_empty() {
                return Ok(Value::Null);
            }
            return serde_json::from_slice(body).map_err(|error| self.foreign(error));
        }
        match serde_json::from_slice(body) {
            Ok(Problem { kind, title, detail, leader }) => {
                Err(CallError::Refused { status: status.as_u16(), kind, title, detail, leader })
            }
            Err(_) => Err(self.foreign(format!("status {status} without a reason"))),
        }
    }

    fn unreachable(&self, source: std::io::Error) -> CallError {
        CallError::Unreachable { who: self.who.clone(), endpoint: self.endpoint.clone(), source }
    }

    fn distrust(&self, source: HandshakeError) -> CallError {
        let source = Box::new(source);
        CallError::Distrust { who: self.who.clone(), endpoint: self.endpoint.clone(), source }
    }

    fn silent(&self, after: Duration) -> CallError {
        CallError::Silent { who: self.who.clone(), endpoint: self.endpoint.clone(), after }
    }

    fn foreign(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> CallError {
        let source = source.into();
        CallError::Foreign { who: self.who.clone(), endpoint: self.endpoint.clone(), source }
    }
}

async fn in_time<T>(connect: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
    connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_does_not_leave_the_host() {
        for good in
            ["https://h:1", "https://[::1]:1", "http://127.0.0.1:1", "http://[::1]:1", "unix:/a"]
        {
            assert_eq!(good.parse::<Endpoint>().expect(good).to_string(), good);
        }
        for bad in
            ["", "h:1", "https://h", "https://h:0", "https://u@h:1", "https://h:1/x", "unix:a"]
        {
            assert!(bad.parse::<Endpoint>().expect_err(bad).contains("is no endpoint"), "{bad}");
        }
        let refused = "http://192.0.2.1:1".parse::<Endpoint>().expect_err("plaintext");
        assert!(refused.contains("https://"), "{refused}");
    }
}
