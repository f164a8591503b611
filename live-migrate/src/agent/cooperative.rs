//! Handoffs of volumes whose storage keeps nobody out: carries out what the ledger
//! allows.
//!
//! ```text
//!   source:       end(try): backend sealed -> process ended, its end seen -> note
//!                 keep(try): note -> backend started again
//!   destination:  stand(try): note -> backend that waits    dismiss(try): note -> ended
//!                 permit(try): note -> it serves, and what comes after it claims
//! ```
//!
//! Rules:
//! - A proof is of one process: the one that said that it is sealed is the one whose
//!   end the kernel told ([`Ending`]). Anything less is no proof.
//! - The note is on disk before anything starts, and before anybody is told.
//! - One order of a VM at a time, and no backend of it is started meanwhile: between a
//!   look at the note and what follows from it nobody else acts.
//!
//! Does not decide who has the volumes: the coordinator does, once. What an order does
//! to a note: `ledger`.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::definition::VmDefinition;
use super::events::now_us;
use super::inventory::write_durably;
use super::ledger::{self, Fate, Note, Order, Proof, Refusal, Turn, Verdict};
use super::{Agent, COMMAND_LIMIT, STATUS_LIMIT};
use crate::problem::{Problem, found_no_room};
use crate::supervisor::control::{Control, ControlError};
use crate::supervisor::{BackendState, Ending, Role, Run};

/// The source's backend when a try began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Since {
    /// Its process.
    pub pid: i32,
    /// How often rings had been started in it.
    pub starts: u32,
}

/// A VM's note.
#[derive(Debug)]
struct Slot {
    /// Held while an order is carried out, which may take a while.
    orders: tokio::sync::Mutex<()>,
    note: Mutex<Option<Note>>,
}

impl Slot {
    fn note(&self) -> Option<Note> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, note: Note) {
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
    }
}

/// Notes of all VMs. One change of a VM at a time.
#[derive(Debug)]
pub(super) struct Notes {
    dir: PathBuf,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
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
    fn slot(&self, vm: &str) -> Result<Arc<Slot>, Problem> {
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
        let slot = Arc::new(Slot { orders: tokio::sync::Mutex::default(), note: Mutex::new(note) });
        slots.insert(vm.to_owned(), Arc::clone(&slot));
        Ok(slot)
    }

    /// What was heard last, for who only looks; none where it cannot be read.
    pub(super) fn last_heard(&self, vm: &str) -> Option<Note> {
        self.slot(vm).ok()?.note()
    }

    /// Whether a backend that an agent before this one kept is kept on. It may have died, and what came in
    /// its place would claim.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn may_be_kept(&self, vm: &str, role: Role) -> Result<(), String> {
        let note = self.slot(vm).map_err(|problem| problem.detail)?.note();
        match note.filter(|note| role == Role::Owner && !note.is_here()) {
            Some(note) => Err(format!("its volumes are elsewhere since try {}", note.turn.attempt)),
            None => Ok(()),
        }
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
    /// The ledger's word, or its refusal for people.
    fn judge(&self, name: &str, note: Option<Note>, order: Order) -> Result<Verdict, Problem> {
        let serves = self.supervisor.launch_of(name).is_some_and(|launch| !launch.standby);
        let refusal = match ledger::step(note.as_ref(), serves, order) {
            Ok(verdict) => return Ok(verdict),
            Err(refusal) => refusal,
        };
        let host = &self.config.host;
        let last = note.map_or("none that is known".to_owned(), |n| n.turn.attempt.to_string());
        Err(match (order, refusal) {
            (Order::Claim { .. }, _) => Problem::new(
                StatusCode::CONFLICT,
                "baton:given-away",
                "The volumes are another host's",
                format!(
                    "the volumes of {name} left {host}, or never came, in try {last}, and their storage keeps nobody out: two backends would destroy them; hand the VM over from where it runs, or, if it runs nowhere and the other host cannot reach the storage, say `force`"
                ),
            ),
            (_, Refusal::Here) => Problem::new(
                StatusCode::CONFLICT,
                "baton:destination-runs-vm",
                "The destination has the volumes already",
                format!(
                    "the volumes of {name} are on {host} already; a backend that waits for them would wait for nobody"
                ),
            ),
            (order, refusal) => stale(format!(
                "{order} is refused on {host}: {refusal} (last try of {name} here: {last})"
            )),
        })
    }

    /// Has the backend of a VM seal, ends it, and proves that. Said again it shows the
    /// same proof.
    pub(super) async fn end_for(
        &self,
        vm: &VmDefinition,
        turn: Turn,
        since: Since,
    ) -> Result<Proof, Problem> {
        let (name, host) = (&vm.name, &self.config.host);
        let slot = self.cooperative.slot(name)?;
        let _alone = slot.orders.lock().await;
        if let Verdict::Proven(proof) = self.judge(name, slot.note(), Order::End(turn))? {
            // It may be known and not on the disk, for want of room when it became true.
            self.cooperative.write(name, &Note::ended(turn, proof.clone()))?;
            return Ok(proof);
        }
        let state = self.supervisor.state(name);
        let (Run::Running, Some(_)) = (state.run, state.pid) else {
            return Err(not_proven(format!(
                "no backend of {name} runs on {host} that could say that nothing of the guest is under way to the storage"
            )));
        };
        if state.pid != Some(since.pid) {
            return Err(Problem::new(
                StatusCode::CONFLICT,
                "baton:came-back",
                "The guest may have come back in this try",
                format!(
                    "another process of the backend of {name} runs on {host} than when the try began, so nobody knows whether the guest was stopped and went on meanwhile, and left a copy of its memory behind: begin another handoff"
                ),
            ));
        }
        let control = Control::new(self.config.control_socket(name));
        let order = json!({"cmd": "seal", "try": turn.attempt.to_string(), "starts": since.starts});
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
        let ended = Note::ended(turn, proof.clone());
        // It is true whether or not there is room for it.
        slot.set(ended.clone());
        self.cooperative.write(name, &ended)?;
        tracing::info!(vm = name, attempt = %turn.attempt, ?proof, "the volumes were given up");
        Ok(proof)
    }

    /// The source keeps its volumes, or has them back.
    pub(super) async fn keep(&self, vm: &VmDefinition, turn: Turn) -> Result<(), Problem> {
        let name = &vm.name;
        let slot = self.cooperative.slot(name)?;
        let _alone = slot.orders.lock().await;
        self.obey(name, &slot, Order::Keep(turn))?;
        self.serve(vm).await?;
        // One that has sealed and could not be ended serves nobody any more. One that
        // does not answer may have: it is asked again.
        let control = Control::new(self.config.control_socket(name));
        let status = control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await?;
        if status["handoff"]["standing"] == "sealed" {
            self.supervisor.stop(name).await?;
            self.serve(vm).await?;
        }
        Ok(())
    }

    /// A backend that waits for this try; one that waits for another is ended first.
    pub(super) async fn stand(
        &self,
        vm: &VmDefinition,
        turn: Turn,
    ) -> Result<BackendState, Problem> {
        let name = &vm.name;
        let settled = {
            let slot = self.cooperative.slot(name)?;
            let _alone = slot.orders.lock().await;
            self.judge(name, slot.note(), Order::Stand(turn))?;
            let launch = self.supervisor.launch_of(name);
            if launch.as_ref().is_none_or(|launch| launch.only_for != Some(turn.attempt)) {
                self.supervisor.stop(name).await?;
                // Nobody can be permitted whom an old machine could find.
                self.supervisor.no_machine_is_left(name)?;
            }
            self.obey(name, &slot, Order::Stand(turn))?;
            self.supervisor.begin(self.to_launch(vm, Role::Standby, Some(turn.attempt))?)?
        };
        Ok(settled.wait().await?)
    }

    /// The destination's try was called off: what stands by is ended.
    pub(super) async fn dismiss(&self, vm: &VmDefinition, turn: Turn) -> Result<(), Problem> {
        let name = &vm.name;
        let slot = self.cooperative.slot(name)?;
        let _alone = slot.orders.lock().await;
        if self.obey(name, &slot, Order::Dismiss(turn))? {
            self.supervisor.stop(name).await?;
        }
        Ok(())
    }

    /// The destination may serve: its standby goes on, and what comes after it claims.
    /// `forced`: nobody has proven when the source stopped, so nobody knows whether the
    /// memory of a machine that waits here is of then.
    pub(super) async fn permit(
        &self,
        vm: &VmDefinition,
        turn: Turn,
        forced: bool,
    ) -> Result<(), Problem> {
        let name = &vm.name;
        let slot = self.cooperative.slot(name)?;
        let _alone = slot.orders.lock().await;
        let verdict = self.judge(name, slot.note(), Order::Permit(turn))?;
        if forced && matches!(verdict, Verdict::Note(_)) {
            self.stop_without_machine(name).await?;
        }
        self.obey(name, &slot, Order::Permit(turn))?;
        self.serve(vm).await?;
        let control = Control::new(self.config.control_socket(name));
        let order = json!({"cmd": "permit", "try": turn.attempt.to_string()});
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

    /// A backend that claims the volumes, which somebody asks for.
    pub(super) async fn claim(
        &self,
        vm: &VmDefinition,
        force: bool,
    ) -> Result<BackendState, Problem> {
        let name = &vm.name;
        // Held until it is being kept: from then on an order to end it finds it.
        let settled = {
            let slot = self.cooperative.slot(name)?;
            let _alone = slot.orders.lock().await;
            let order = Order::Claim { force };
            if matches!(self.judge(name, slot.note(), order)?, Verdict::Note(_)) {
                self.stop_without_machine(name).await?;
                self.obey(name, &slot, order)?;
                tracing::warn!(vm = name, "volumes that are elsewhere are claimed by force");
            }
            self.supervisor.begin(self.to_launch(vm, Role::Owner, None)?)?
        };
        Ok(settled.wait().await?)
    }

    /// The backend is stopped, and no machine is left that it could come back to: its memory may be of before,
    /// and nobody would keep its requests out. One that is there leaves all as it is.
    async fn stop_without_machine(&self, name: &str) -> Result<(), Problem> {
        self.supervisor.no_machine_is_left(name)?;
        self.supervisor.stop(name).await?;
        Ok(self.supervisor.no_machine_is_left(name)?)
    }

    /// Writes what an order changes. False: there is nothing to do.
    fn obey(&self, name: &str, slot: &Slot, order: Order) -> Result<bool, Problem> {
        match self.judge(name, slot.note(), order)? {
            Verdict::Void => return Ok(false),
            Verdict::Go | Verdict::Proven(_) => {}
            Verdict::Note(next) => {
                self.cooperative.write(name, &next)?;
                slot.set(next);
            }
        }
        Ok(true)
    }

    /// The VM's backend was proven gone, for a handoff that was not called off.
    pub(super) async fn has_given_up(&self, name: &str) -> Result<bool, Problem> {
        let slot = self.cooperative.slot(name)?;
        let _alone = slot.orders.lock().await;
        Ok(slot.note().is_some_and(|note| matches!(note.fate, Fate::Ended { .. })))
    }

    async fn handoff_of(&self, name: &str) -> Value {
        let control = Control::new(self.config.control_socket(name));
        let status = control.ask(&json!({"cmd": "status"}), STATUS_LIMIT).await;
        status.map_or(Value::Null, |mut status| status["handoff"].take())
    }

    /// A backend that claims, if none runs; one that runs does so from its next start on.
    async fn serve(&self, vm: &VmDefinition) -> Result<(), Problem> {
        let launch = self.to_launch(vm, Role::Owner, None)?;
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
