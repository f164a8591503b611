//! cloud-hypervisor, over the HTTP API on its unix socket.
//!
//! It has no pause before the switch and no cancel, so it is driven in implicit
//! mode only: the back-end seals when its rings stop. `vm.send-migration` and
//! `vm.receive-migration` are answered when the migration is over; they run in a
//! task here, and the API may be silent meanwhile. If the agent dies in between,
//! the migration goes on, and `vm.info` on both sides tells how it ended.
//!
//! Tested against a server that follows the published API description, not
//! against the program: it needs KVM.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Incoming, Migration, MigrationPhase, Outgoing, RunState, Vmm, VmmError, VmmStatus};
use crate::http::{self, ExchangeError, Method, StatusCode};
use crate::unix;

const NAME: &str = "cloud-hypervisor";
/// A migration of a large machine over a slow network.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// A cloud-hypervisor process.
#[derive(Debug)]
pub struct CloudHypervisor {
    socket: PathBuf,
    timeout: Duration,
    flight: Arc<watch::Sender<Flight>>,
}

/// The migration that this process asked for.
#[derive(Clone, Debug, Default)]
struct Flight {
    phase: MigrationPhase,
    error: Option<String>,
    receiving: bool,
}

impl CloudHypervisor {
    /// One that listens on `socket`; `timeout` is for each call.
    #[must_use]
    pub fn new(socket: PathBuf, timeout: Duration) -> Self {
        Self { socket, timeout, flight: Arc::new(watch::Sender::new(Flight::default())) }
    }

    async fn put(&self, command: &'static str) -> Result<(), VmmError> {
        call(&self.socket, (Method::PUT, command), None, self.timeout).await.map(drop)
    }

    /// Starts a call that lasts as long as the migration.
    fn fly(&self, command: &'static str, body: Value, receiving: bool) -> Result<(), VmmError> {
        let mut free = false;
        self.flight.send_if_modified(|flight| {
            free = flight.phase != MigrationPhase::Active;
            if free {
                *flight = Flight { phase: MigrationPhase::Active, error: None, receiving };
            }
            free
        });
        if !free {
            let detail = "a migration of this machine is under way".to_owned();
            return Err(VmmError::Refused { vmm: NAME, command, detail });
        }
        let (socket, flight) = (self.socket.clone(), Arc::clone(&self.flight));
        tokio::spawn(async move {
            let told = call(&socket, (Method::PUT, command), Some(&body), MIGRATION_TIMEOUT).await;
            let (phase, error) = match told {
                Ok(_) => (MigrationPhase::Completed, None),
                Err(error) => (MigrationPhase::Failed, Some(describe(&error))),
            };
            flight.send_replace(Flight { phase, error, receiving });
        });
        Ok(())
    }
}

#[async_trait]
impl Vmm for CloudHypervisor {
    async fn status(&self) -> Result<VmmStatus, VmmError> {
        let flight = self.flight.borrow().clone();
        let under_way = flight.phase == MigrationPhase::Active;
        let answer = call(&self.socket, (Method::GET, "vm.info"), None, self.timeout).await;
        let (run, detail) = match answer {
            Ok(body) => match state(&body) {
                Some(state) => (run_state(&state), state),
                None => return Err(foreign(&self.socket, "vm.info")),
            },
            Err(VmmError::Unreachable { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                (RunState::Gone, "nobody listens on the API socket".to_owned())
            }
            Err(VmmError::Refused { .. }) if under_way && flight.receiving => {
                (RunState::Incoming, "waits for a migration".to_owned())
            }
            Err(VmmError::Refused { detail, .. }) => (RunState::Gone, detail),
            Err(VmmError::Silent { .. }) if under_way => {
                (RunState::Unknown, "busy with a migration".to_owned())
            }
            Err(error) => return Err(error),
        };
        let migration =
            Migration { phase: flight.phase, error: flight.error, ..Migration::default() };
        Ok(VmmStatus { run, detail, migration, version: None })
    }

    async fn incoming(&self, incoming: &Incoming) -> Result<(), VmmError> {
        self.fly("vm.receive-migration", json!({"receiver_url": incoming.uri}), true)
    }

    async fn migrate(&self, outgoing: &Outgoing) -> Result<(), VmmError> {
        if outgoing.pause_before_switchover {
            return Err(VmmError::Unsupported {
                vmm: NAME,
                what: "pause before the switch",
                instead: "use implicit mode: \"pause_before_switchover\": false",
            });
        }
        let mut body = json!({"destination_url": outgoing.uri});
        if let Some(limit) = outgoing.downtime_limit_ms {
            body["downtime_ms"] = limit.into();
        }
        self.fly("vm.send-migration", body, false)
    }

    async fn wait(&self, limit: Duration) -> Result<VmmStatus, VmmError> {
        let mut flight = self.flight.subscribe();
        let landed = flight.wait_for(|flight| flight.phase.is_decided());
        // Decided or not, the caller gets what is known now.
        let _ = tokio::time::timeout(limit, landed).await;
        self.status().await
    }

    async fn proceed(&self) -> Result<(), VmmError> {
        Err(VmmError::Unsupported {
            vmm: NAME,
            what: "wait for a `continue`",
            instead: "it switches by itself (implicit mode)",
        })
    }

    async fn cancel(&self) -> Result<(), VmmError> {
        Err(VmmError::Unsupported {
            vmm: NAME,
            what: "cancel a migration",
            instead: "end the destination's monitor (quit): vm.send-migration then fails and the source resumes by itself; if it stays paused, resume it once the storage names the source",
        })
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.put("vm.resume").await
    }

    async fn stop(&self) -> Result<(), VmmError> {
        self.put("vm.pause").await
    }

    async fn quit(&self) -> Result<(), VmmError> {
        match self.put("vmm.shutdown").await {
            // It may be gone before its answer is.
            Ok(()) | Err(VmmError::Broken { .. } | VmmError::Unreachable { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

async fn call(
    socket: &Path,
    (method, command): (Method, &'static str),
    body: Option<&Value>,
    timeout: Duration,
) -> Result<Bytes, VmmError> {
    let silent = |after| VmmError::Silent { vmm: NAME, socket: socket.to_owned(), command, after };
    let connected = tokio::time::timeout(timeout, unix::connect(socket)).await;
    let stream = connected
        .map_err(|_| silent(timeout))?
        .map_err(|source| VmmError::Unreachable { vmm: NAME, socket: socket.to_owned(), source })?;
    let path = format!("/api/v1/{command}");
    match http::exchange(stream, "localhost", (method, &path), body, timeout).await {
        Ok((status, body)) if status.is_success() => Ok(body),
        Ok((status, body)) => {
            let detail = refusal(status, &body);
            Err(VmmError::Refused { vmm: NAME, command, detail })
        }
        Err(ExchangeError::Silent(after)) => Err(silent(after)),
        Err(error) => Err(VmmError::Broken {
            vmm: NAME,
            socket: socket.to_owned(),
            command,
            source: error.into(),
        }),
    }
}

/// Newer versions send a list of causes, older ones a sentence or nothing.
fn refusal(status: StatusCode, body: &[u8]) -> String {
    let said = match serde_json::from_slice(body) {
        Ok(Value::Array(causes)) => {
            causes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(": ")
        }
        Ok(Value::String(sentence)) => sentence,
        _ => String::from_utf8_lossy(body).trim().to_owned(),
    };
    match (said.is_empty(), status) {
        (false, _) => said,
        (true, StatusCode::NOT_FOUND) => "there is no machine".to_owned(),
        (true, StatusCode::METHOD_NOT_ALLOWED) => "the machine is not in a state for it".to_owned(),
        (true, status) => status.to_string(),
    }
}

fn state(body: &[u8]) -> Option<String> {
    let info: Value = serde_json::from_slice(body).ok()?;
    info["state"].as_str().map(str::to_owned)
}

fn run_state(state: &str) -> RunState {
    match state {
        "Running" => RunState::Running,
        "Created" | "Paused" | "BreakPoint" => RunState::Paused,
        "Shutdown" => RunState::Shutdown,
        _ => RunState::Unknown,
    }
}

fn foreign(socket: &Path, command: &'static str) -> VmmError {
    VmmError::Broken {
        vmm: NAME,
        socket: socket.to_owned(),
        command,
        source: "the answer names no state".into(),
    }
}

/// An error with its causes, for the record of a migration.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
