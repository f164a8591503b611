//! What may be asked of the process on its control socket, and the answers.
//!
//! One JSON object per line each way: `{"cmd":"status"}`. To add a command, add
//! a variant to [`Command`] and an arm to [`Vm::run`]. Knows no socket: that is
//! [`server`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_protocol::handoff::Try;
use baton_protocol::handoff::cooperative;
use baton_protocol::handoff::role::Order;
use baton_remote_client::VolumeState;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::handoff::{CooperativeVm, OrderError, VmHandoff};
use crate::latency::SLICE;
use crate::queue::Disk;

pub mod server;

/// Longest time for which requests are timed by one command, seconds.
const WATCH_S_MAX: u32 = 3600;

/// What may be asked. `cmd` names it; the other keys are its fields.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Command {
    /// What every disk is doing.
    Status,
    /// How long requests took, and to go on timing them for a while.
    Latency {
        /// For so long from now, seconds; at most an hour.
        #[serde(default)]
        watch_s: u32,
    },
    /// How the VM stands in a handoff.
    Handoff,
    /// Source: seal as soon as the rings have stopped; where the storage keeps nobody
    /// out, now and for good, for the sake of this try.
    Seal {
        /// `ID/ATTEMPT`.
        #[serde(rename = "try", default)]
        attempt: Option<String>,
        /// With `try`: how often rings had been started when it began, by `status`.
        #[serde(default)]
        starts: u32,
    },
    /// Destination, where the storage keeps nobody out: the source is proven gone.
    Permit {
        /// `ID/ATTEMPT`.
        #[serde(rename = "try")]
        attempt: String,
    },
    /// Destination: activate without waiting for the rings.
    Activate,
    /// Destination: never activate this handoff.
    Abdicate,
    /// Source: come back.
    Reclaim,
    /// Anything else; refused.
    #[serde(other)]
    Unknown,
}

/// Why there is no answer, as the client reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// For programs; never changes its meaning.
    #[serde(rename = "type")]
    pub kind: RefusalKind,
    /// For people.
    pub detail: String,
}

/// Kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// Not a line of JSON with a `cmd`, or a field is wrong.
    BadRequest,
    /// No such command.
    UnknownCommand,
    /// All places for clients are taken.
    TooManyClients,
    /// No volume of the VM can be handed over.
    CannotHandOver,
    /// No handoff of the VM is under way.
    NoHandoff,
    /// The volumes are the other side's, for good.
    Parked,
    /// The guest is at its disks, or was stopped for another reason than to be moved.
    StillServing,
    /// What the guest had asked for may still be done by the storage.
    NotProven,
    /// The guest was stopped and went on since the try began.
    CameBack,
    /// It is for another try, or is over.
    StaleAttempt,
}

impl Refusal {
    fn new(kind: RefusalKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }
}

/// A disk and what it was configured with.
#[derive(Debug)]
pub struct VmDisk {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Where front-ends connect.
    pub socket: String,
    /// URI of the volume.
    pub volume: String,
}

/// All disks of the VM that this process serves.
#[derive(Debug)]
pub struct Vm {
    /// Name under which the volumes are claimed.
    pub owner: String,
    /// In the order of the configuration.
    pub disks: Vec<VmDisk>,
    /// Where any volume can be handed over by its storage.
    pub handoff: Option<Arc<VmHandoff>>,
    /// Where the storage keeps nobody out.
    pub cooperative: Option<Arc<CooperativeVm>>,
}

#[derive(Debug, Serialize)]
struct Status<'a> {
    pid: u32,
    owner: &'a str,
    disks: Vec<StatusOfDisk<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handoff: Option<Value>,
}

#[derive(Debug, Serialize)]
struct StatusOfDisk<'a> {
    name: &'a str,
    socket: &'a str,
    volume: &'a str,
    state: &'static str,
    rings_running: usize,
    queues: usize,
    in_flight: usize,
    logging: bool,
    drained: bool,
    size_bytes: u64,
    front_end: Option<i32>,
}

impl Vm {
    /// Does what a line asks and returns the line to answer, without its end.
    #[must_use]
    pub fn answer(&self, line: &[u8]) -> String {
        line_of(parse(line).and_then(|command| self.run(command)))
    }

    /// Does what is asked.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn run(&self, command: Command) -> Result<Value, Refusal> {
        match command {
            Command::Status => Ok(serde_json::json!(self.status())),
            Command::Latency { watch_s } => Ok(self.latency(watch_s)),
            Command::Handoff => self.ordered(None),
            Command::Seal { attempt: Some(attempt), starts } if self.cooperative.is_some() => {
                self.cooperate(|vm| vm.seal(tried(&attempt)?, starts).map_err(Refusal::from))
            }
            Command::Permit { attempt } => {
                self.cooperate(|vm| vm.permit(tried(&attempt)?).map_err(Refusal::from))
            }
            Command::Seal { .. } => self.ordered(Some(Order::Seal)),
            Command::Activate => self.ordered(Some(Order::Activate)),
            Command::Abdicate => self.ordered(Some(Order::Abdicate)),
            Command::Reclaim => self.ordered(Some(Order::Reclaim)),
            Command::Unknown => {
                Err(Refusal::new(RefusalKind::UnknownCommand, "there is no such command"))
            }
        }
    }

    fn latency(&self, watch_s: u32) -> Value {
        let time = Duration::from_secs(u64::from(watch_s.min(WATCH_S_MAX)));
        let disks: serde_json::Map<String, Value> = self
            .disks
            .iter()
            .map(|VmDisk { disk, .. }| {
                if !time.is_zero() {
                    disk.status.latency.watch(time);
                }
                (disk.name.clone(), serde_json::json!(disk.status.latency.slices()))
            })
            .collect();
        serde_json::json!({ "slice_ms": SLICE.as_millis(), "disks": disks })
    }

    fn status(&self) -> Status<'_> {
        let disks = self.disks.iter().map(VmDisk::status).collect();
        let handoff = self.handoff.as_ref().map(|handoff| serde_json::json!(handoff.show()));
        let handoff =
            handoff.or_else(|| self.cooperative.as_ref().map(|vm| serde_json::json!(vm.show())));
        Status { pid: std::process::id(), owner: &self.owner, disks, handoff }
    }

    /// Gives an order that only volumes without a fence have, and says how the VM
    /// stands then.
    fn cooperate(
        &self,
        order: impl FnOnce(&CooperativeVm) -> Result<(), Refusal>,
    ) -> Result<Value, Refusal> {
        let vm = self.cooperative.as_ref().ok_or_else(|| {
            Refusal::new(
                RefusalKind::CannotHandOver,
                "the storage of this VM's volumes hands them over by itself, or cannot; this order is for volumes on NBD servers",
            )
        })?;
        order(vm)?;
        Ok(serde_json::json!({"ok": true, "pid": std::process::id(), "handoff": vm.show()}))
    }

    /// Gives an order, if there is one, and says how the VM stands then.
    fn ordered(&self, order: Option<Order>) -> Result<Value, Refusal> {
        let Some(handoff) = &self.handoff else {
            if let (Some(vm), None) = (&self.cooperative, order) {
                return Ok(serde_json::json!({"ok": true, "handoff": vm.show()}));
            }
            if self.cooperative.is_some() {
                return Err(Refusal::new(
                    RefusalKind::CannotHandOver,
                    "NBD servers keep nobody out, so the volumes are handed over by orders that name their try: seal and permit, as the coordinator gives them",
                ));
            }
            return Err(Refusal::new(
                RefusalKind::CannotHandOver,
                "no volume of this VM can be handed over: files and read-only volumes cannot; volumes of a Baton storage server, Ceph RBD images and NBD exports can",
            ));
        };
        if let Some(order) = order {
            handoff.order(order).map_err(|error| {
                let kind = match error {
                    OrderError::NoHandoff => RefusalKind::NoHandoff,
                    OrderError::Parked(_) => RefusalKind::Parked,
                };
                Refusal::new(kind, error.to_string())
            })?;
        }
        Ok(serde_json::json!({ "ok": true, "handoff": handoff.show() }))
    }
}

impl VmDisk {
    fn status(&self) -> StatusOfDisk<'_> {
        let rings = self.disk.status.rings();
        StatusOfDisk {
            name: &self.disk.name,
            socket: &self.socket,
            volume: &self.volume,
            state: match self.disk.volume.state() {
                VolumeState::Connected => "connected",
                VolumeState::Reconnecting => "reconnecting",
                VolumeState::Fenced => "fenced",
                VolumeState::Lost => "lost",
            },
            rings_running: rings.running,
            queues: self.disk.status.queues(),
            in_flight: self.disk.status.in_flight(),
            logging: rings.logging,
            drained: rings.drained,
            size_bytes: self.disk.size_bytes.load(Ordering::Relaxed),
            front_end: self.disk.status.front_end(),
        }
    }
}

/// An answer as a line.
fn line_of(answer: Result<Value, Refusal>) -> String {
    answer.unwrap_or_else(|refusal| serde_json::json!({ "error": refusal })).to_string()
}

impl From<cooperative::Refusal> for Refusal {
    fn from(refusal: cooperative::Refusal) -> Self {
        use cooperative::Refusal as Why;
        let kind = match refusal {
            Why::Running | Why::NotMoving => RefusalKind::StillServing,
            Why::CameBack => RefusalKind::CameBack,
            Why::Unanswered | Why::GivenUp | Why::NeverServed => RefusalKind::NotProven,
            Why::StandsBy(_) | Why::Sealed(_) | Why::OtherTry(_) | Why::Serves => {
                RefusalKind::StaleAttempt
            }
        };
        Self::new(kind, refusal.to_string())
    }
}

fn tried(text: &str) -> Result<Try, Refusal> {
    text.parse().map_err(|error| Refusal::new(RefusalKind::BadRequest, format!("{error}")))
}

fn parse(line: &[u8]) -> Result<Command, Refusal> {
    let bad = |detail: String| Refusal::new(RefusalKind::BadRequest, detail);
    let request: Value = serde_json::from_slice(line).map_err(|error| {
        bad(format!(
            "a request is one JSON object on one line, such as {{\"cmd\":\"status\"}}: {error}"
        ))
    })?;
    let Some(name) = request.get("cmd").and_then(Value::as_str).map(str::to_owned) else {
        return Err(bad("a request names its command, such as {\"cmd\":\"status\"}".to_owned()));
    };
    match Command::deserialize(&request) {
        Ok(Command::Unknown) => Err(Refusal::new(
            RefusalKind::UnknownCommand,
            format!("this version of baton-backend has no command `{}`", shortened(&name)),
        )),
        Ok(command) => Ok(command),
        Err(error) => {
            Err(bad(format!("the fields of `{}` are not usable: {error}", shortened(&name))))
        }
    }
}

/// Enough of a foreign text to recognise it.
fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vm() -> Vm {
        Vm { owner: "h:vm".to_owned(), disks: Vec::new(), handoff: None, cooperative: None }
    }

    fn kind_of(answer: &str) -> Value {
        let answer: Value = serde_json::from_str(answer).expect("JSON");
        answer["error"]["type"].clone()
    }

    #[test]
    fn each_mistake_has_its_type() {
        let cases: [(&str, &str); 6] = [
            ("{\"cmd\":\"dance\"}", "unknown-command"),
            ("{\"cmd\":7}", "bad-request"),
            ("{}", "bad-request"),
            ("[\"status\"]", "bad-request"),
            ("status", "bad-request"),
            ("{\"cmd\":\"status\"", "bad-request"),
        ];
        for (line, kind) in cases {
            assert_eq!(kind_of(&vm().answer(line.as_bytes())), kind, "{line}");
        }
        let long = format!("{{\"cmd\":\"{}\"}}", "x".repeat(60_000));
        assert!(vm().answer(long.as_bytes()).len() < 400, "a foreign text is not sent back whole");
    }

    #[test]
    fn status_names_the_process_and_its_owner() {
        let answer: Value =
            serde_json::from_str(&vm().answer(b"{\"cmd\":\"status\"}")).expect("JSON");
        assert_eq!(answer["pid"], std::process::id());
        assert_eq!(answer["owner"], "h:vm");
        assert_eq!(answer["disks"], Value::Array(Vec::new()));
    }

    proptest! {
        #[test]
        fn any_line_has_one_line_of_an_answer(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let answer = vm().answer(&line);
            prop_assert!(!answer.contains('\n'));
            prop_assert!(serde_json::from_str::<Value>(&answer).is_ok());
        }
    }
}
