//! Handoffs of volumes whose storage keeps nobody out: what this host's agent has
//! proven, and what it was told of the decision.
//!
//! ```text
//!   source:       end(try): backend sealed -> process ended, its end seen -> note `ended`
//!                 restore(try): note `restored` -> backend started again
//!   destination:  permit(try): note `permitted` -> standby serves, and what comes after it claims
//! ```
//!
//! Rules:
//! - A proof is of one process: the one that said that it is sealed is the one whose
//!   end the kernel told ([`Ending`]). Anything less is no proof.
//! - The note is on disk before anybody is told. What a host gave up, it does not
//!   start again by itself, nor for who does not know of the try.
//! - A try that was called off ends nothing any more, however late it asks.
//!
//! Does not decide who has the volumes: the coordinator does, once.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use baton_protocol::handoff::Try;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::definition::VmDefinition;
use super::events::now_us;
use super::inventory::write_durably;
use super::{Agent, COMMAND_LIMIT, STATUS_LIMIT};
use crate::problem::{Problem, found_no_room};
use crate::supervisor::control::{Control, ControlError};
use crate::supervisor::{Ending, Role, Run};

/// That the source's backend has stopped for good, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct Proof {
    /// The process that had sealed, by its number then.
    pub pid: i32,
    /// How its end was seen: `waitpid` or `pidfd`.
    pub seen_by: String,
    /// How it ended, if that was ours to learn.
    pub status: Option<String>,
    /// Microseconds since 1970. For people.
    pub at_unix_us: u64,
}

/// The last thing that happened to a VM here, durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
enum Note {
    /// Its volumes left.
    Ended {
        #[serde(rename = "try")]
        attempt: String,
        proof: Proof,
    },
    /// They did not, or came back.
    Restored {
        #[serde(rename = "try")]
        attempt: String,
    },
    /// They came.
    Permitted {
        #[serde(rename = "try")]
        attempt: String,
    },
}

type Slot = Arc<tokio::sync::Mutex<Option<Note>>>;

/// Notes of all VMs. One change of a VM at a time.
#[derive(Debug)]
pub(super) struct Notes {
    dir: PathBuf,
    slots: Mutex<HashMap<String, Slot>>,
}

impl Notes {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, slots: Mutex::default() }
    }

    fn path(&self, vm: &str) -> PathBuf {
        self.dir.join(format!("{vm}.cooperative.json"))
    }

    /// A VM's note, as an agent before this one left it.
    ///
    /// # Errors
    /// It is there and cannot be read: it may say that the volumes left.
    fn slot(&self, vm: &str) -> Result<Slot, Problem> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(vm) {
            return Ok(Arc::clone(slot));
        }
        let path = self.path(vm);
        let note = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::from),
        };
        let note = note.map_err(|error| {
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "baton:state-failed",
                "The agent cannot tell who has the volumes",
                format!(
                    "cannot read {}: {error}; it may say that the volumes of {vm} left this host, so nothing is done with them here: make sure that no other host has them, then remove it",
                    path.display()
                ),
            )
        })?;
        let slot = Arc::new(tokio::sync::Mutex::new(note));
        slots.insert(vm.to_owned(), Arc::clone(&slot));
        Ok(slot)
    }

    fn write(&self, vm: &str, note: &Note) -> Result<(), Problem> {
        let path = self.path(vm);
        let text = serde_json::to_vec(note).map_err(io::Error::from);
        text.and_then(|text| write_durably(&path, &text)).map_err(|error| {
            if found_no_room(&error) {
                let what = format!("the agent cannot remember who has the volumes of {vm}");
                return Problem::state_full(&what, &path);
            }
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "baton:state-failed",
                "The agent cannot remember it",
                format!("cannot write {}: {error}", path.display()),
            )
        })
    }
}

fn stale(detail: String) -> Problem {
    Problem::new(StatusCode::CONFLICT, "baton:stale-attempt", "The try is over", detail)
}

fn not_proven(detail: String) -> Problem {
    Problem::new(
        StatusCode::CONFLICT,
        "baton:not-proven",
        "Nobody has proven that the source has stopped",
        detail,
    )
}

impl Agent {
    /// Has the backend of a VM seal, ends it, and proves that. Said again it shows the
    /// same proof.
    pub(super) async fn end_for(&self, vm: &VmDefinition, attempt: Try) -> Result<Proof, Problem> {
        let (name, host) = (&vm.name, &self.config.host);
        let slot = self.cooperative.slot(name)?;
        let mut note = slot.lock().await;
        let this = attempt.to_string();
        match &*note {
            Some(known @ Note::Ended { attempt, proof }) if *attempt == this => {
                // It may be known and not on the disk, for want of room when it became true.
                self.cooperative.write(name, known)?;
                return Ok(proof.clone());
            }
            Some(Note::Ended { attempt, .. }) => {
                return Err(stale(format!("the volumes of {name} left {host} in try {attempt}")));
            }
            Some(Note::Restored { attempt }) if *attempt == this => {
                return Err(stale(format!(
                    "try {this} was called off, and {host} has the volumes of {name}"
                )));
            }
            _ => {}
        }
        let state = self.supervisor.state(name);
        let (Run::Running, Some(_)) = (state.run, state.pid) else {
            return Err(not_proven(format!(
                "no backend of {name} runs on {host} that could say that nothing of the guest is under way to the storage"
            )));
        };
        let control = Control::new(self.config.control_socket(name));
        let order = json!({"cmd": "seal", "try": this});
        let answer = match control.ask(&order, COMMAND_LIMIT).await {
            Err(error @ (ControlError::Silent { .. } | ControlError::Absent { .. })) => {
                return Err(not_proven(format!(
                    "the backend of {name} on {host} does not say that it has sealed: {error}"
                )));
            }
            answer => answer?,
        };
        let sealed = answer["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let proof = match self.supervisor.end(name).await? {
            // Another process than the one that had sealed may have served meanwhile.
            Some((pid, ending)) if Some(pid) == sealed && sealed == state.pid => {
                proof_of(pid, ending)
            }
            _ => None,
        };
        let Some(proof) = proof else {
            return Err(not_proven(format!(
                "the backend of {name} on {host} is gone, but nobody saw the end of the process that had sealed: make sure that {host} does not reach the storage any more, then force, or cancel"
            )));
        };
        let ended = Note::Ended { attempt: this, proof: proof.clone() };
        // It is true whether or not there is room for it.
        *note = Some(ended.clone());
        self.cooperative.write(name, &ended)?;
        tracing::info!(vm = name, %attempt, ?proof, "the volumes were given up");
        Ok(proof)
    }

    /// The source has its volumes back, unless they left in another try.
    pub(super) async fn restore(&self, vm: &VmDefinition, attempt: Try) -> Result<(), Problem> {
        let (name, host) = (&vm.name, &self.config.host);
        let slot = self.cooperative.slot(name)?;
        let mut note = slot.lock().await;
        let this = attempt.to_string();
        match &*note {
            Some(Note::Ended { attempt, .. }) if *attempt != this => {
                return Err(stale(format!("the volumes of {name} left {host} in try {attempt}")));
            }
            Some(Note::Permitted { attempt }) if *attempt == this => {
                return Err(stale(format!(
                    "{host} is where the volumes of {name} went in that try"
                )));
            }
            _ => {}
        }
        let restored = Note::Restored { attempt: this };
        self.cooperative.write(name, &restored)?;
        *note = Some(restored);
        // One that has sealed and could not be ended serves nobody any more.
        if self.handoff_of(name).await["standing"] == "sealed" {
            self.supervisor.stop(name).await?;
        }
        self.started(vm).await
    }

    /// The destination may serve: its standby goes on, and what comes after it claims.
    pub(super) async fn permit(&self, vm: &VmDefinition, attempt: Try) -> Result<(), Problem> {
        let (name, host) = (&vm.name, &self.config.host);
        let slot = self.cooperative.slot(name)?;
        let mut note = slot.lock().await;
        let permitted = Note::Permitted { attempt: attempt.to_string() };
        if note.as_ref() != Some(&permitted) {
            let stands_by = self
                .supervisor
                .launch_of(name)
                .is_some_and(|launch| launch.standby && launch.only_for == Some(attempt));
            if !stands_by {
                return Err(stale(format!(
                    "no backend of {name} stands by on {host} for try {attempt}"
                )));
            }
            self.cooperative.write(name, &permitted)?;
            *note = Some(permitted);
        }
        self.started(vm).await?;
        let control = Control::new(self.config.control_socket(name));
        let order = json!({"cmd": "permit", "try": attempt.to_string()});
        match control.ask(&order, COMMAND_LIMIT).await {
            // Its next process, which claimed by itself.
            Err(ControlError::Refused { .. })
                if self.handoff_of(name).await["standing"] == "serving" =>
            {
                Ok(())
            }
            answer => Ok(answer.map(drop)?),
        }
    }

    /// Whether a backend may claim the volumes here.
    ///
    /// # Errors
    /// They left this host.
    pub(super) async fn may_claim(&self, name: &str, force: bool) -> Result<(), Problem> {
        let slot = self.cooperative.slot(name)?;
        let mut note = slot.lock().await;
        let Some(Note::Ended { attempt, .. }) = &*note else { return Ok(()) };
        let (attempt, host) = (attempt.clone(), &self.config.host);
        if !force {
            return Err(Problem::new(
                StatusCode::CONFLICT,
                "baton:given-away",
                "The volumes left this host",
                format!(
                    "the volumes of {name} left {host} in try {attempt}, and their storage keeps nobody out: two backends would destroy them; hand the VM back from where it runs, or, if it runs nowhere and the other host cannot reach the storage, say `force`"
                ),
            ));
        }
        tracing::warn!(vm = name, attempt, "volumes that were given up are claimed by force");
        let restored = Note::Restored { attempt };
        self.cooperative.write(name, &restored)?;
        *note = Some(restored);
        Ok(())
    }

    /// The VM's backend was proven gone, for a handoff that was not called off.
    pub(super) async fn has_given_up(&self, name: &str) -> Result<bool, Problem> {
        let slot = self.cooperative.slot(name)?;
        let note = slot.lock().await;
        Ok(matches!(&*note, Some(Note::Ended { .. })))
    }

    async fn handoff_of(&self, name: &str) -> Value {
        let control = Control::new(self.config.control_socket(name));
        let status = control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await;
        status.map_or(Value::Null, |mut status| status["handoff"].take())
    }

    /// A backend that claims, if none runs; one that runs does so from its next start on.
    async fn started(&self, vm: &VmDefinition) -> Result<(), Problem> {
        let launch = self.launch(vm, Role::Owner, None).map_err(|error| {
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "baton:state-failed",
                "The agent cannot write what the backend needs",
                format!("cannot write in {}: {error}", self.config.run_dir.display()),
            )
        })?;
        Ok(self.supervisor.start(launch).await.map(drop)?)
    }
}

pub(super) fn proof_of(pid: i32, ending: Ending) -> Option<Proof> {
    let (seen_by, status) = match ending {
        Ending::Waited(status) => ("waitpid", Some(status.to_string())),
        Ending::Told => ("pidfd", None),
        Ending::Unseen => return None,
    };
    Some(Proof { pid, seen_by: seen_by.to_owned(), status, at_unix_us: now_us() })
}
