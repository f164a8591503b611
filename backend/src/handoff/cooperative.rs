//! The VM's part in a handoff of volumes whose storage keeps nobody out: the pure
//! machine of `baton_protocol::handoff::cooperative`, and its edges.
//!
//! ```text
//!   disk threads --started, stopped, drained--> +---------+ --open, shut--> gates
//!   control socket --seal, permit-------------> | machine |
//!                                               +---------+
//! ```
//!
//! A gate moves under the machine's lock: an order that was answered is in effect.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::handoff::cooperative::{Input, Output, Refusal, Standing};
use baton_protocol::handoff::{Cooperative, Try};
use baton_remote_client::Volume;
use serde::Serialize;

use super::MemberHandle;

/// See the module's documentation. One per process.
#[derive(Debug)]
pub struct CooperativeVm {
    owner: String,
    /// It began as a standby for this try.
    standby: Option<Try>,
    volumes: Vec<Arc<dyn Volume>>,
    machine: Mutex<Cooperative>,
}

/// How the VM stands, for the control socket: the words of a storage's own handoff.
#[derive(Debug, Serialize)]
pub struct ShownCooperative {
    fence: &'static str,
    standing: Standing,
    only_for: Option<String>,
    id: Option<String>,
    attempt: u32,
    /// How often a disk's rings were started, in this process.
    starts: u32,
}

impl CooperativeVm {
    /// Of all volumes that have a gate and may be written, with every volume's place.
    /// `None`: there are none. Standbys are for one try.
    #[must_use]
    pub fn new(
        owner: &str,
        standby: Option<Try>,
        volumes: &[Arc<dyn Volume>],
    ) -> (Option<Arc<Self>>, Vec<Option<MemberHandle>>) {
        let moves =
            |volume: &&Arc<dyn Volume>| volume.gate().is_some() && !volume.geometry().read_only;
        let members: Vec<_> = volumes.iter().filter(moves).cloned().collect();
        if members.is_empty() {
            return (None, volumes.iter().map(|_| None).collect());
        }
        let machine = match standby {
            Some(attempt) => Cooperative::standby(members.len(), attempt),
            None => Cooperative::serving(members.len()),
        };
        let vm = Arc::new(Self {
            owner: owner.to_owned(),
            standby,
            volumes: members,
            machine: Mutex::new(machine),
        });
        let mut places = 0..;
        let handles = volumes.iter().map(|volume| {
            let at = moves(&volume).then(|| places.next()).flatten()?;
            Some(MemberHandle::Cooperative { vm: Arc::clone(&vm), at })
        });
        let handles = handles.collect();
        (Some(vm), handles)
    }

    fn machine(&self) -> MutexGuard<'_, Cooperative> {
        // The machine is a value that is replaced by whole steps.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, input: Input) -> Result<(), Refusal> {
        let mut machine = self.machine();
        let before = machine.standing();
        let output = machine.step(input)?;
        for gate in self.volumes.iter().filter_map(|volume| volume.gate()) {
            match output {
                Some(Output::Open) => gate.open(),
                Some(Output::Shut) => gate.shut(),
                None => {}
            }
        }
        let standing = machine.standing();
        if standing != before {
            tracing::info!(owner = self.owner, ?before, ?standing, "handoff");
        }
        Ok(())
    }

    /// Stop for good, for the sake of this try, which began when rings had been started so often.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    pub fn seal(&self, attempt: Try, starts: u32) -> Result<(), Refusal> {
        self.feed(Input::Seal { attempt, starts })
    }

    /// The source is proven gone.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    pub fn permit(&self, attempt: Try) -> Result<(), Refusal> {
        self.feed(Input::Permit(attempt))
    }

    /// How the VM stands.
    #[must_use]
    pub fn show(&self) -> ShownCooperative {
        let machine = self.machine();
        let attempt = machine.attempt();
        ShownCooperative {
            fence: "cooperative",
            standing: machine.standing(),
            only_for: self.standby.map(|attempt| attempt.to_string()),
            id: attempt.map(|attempt| attempt.id.to_string()),
            attempt: attempt.map_or(0, |attempt| attempt.attempt),
            starts: machine.starts(),
        }
    }

    pub(super) fn started(&self, at: usize) {
        let _ = self.feed(Input::Started(at));
    }

    pub(super) fn stopped(&self, at: usize, migrating: bool) {
        let _ = self.feed(Input::Stopped { disk: at, migrating });
    }

    pub(super) fn drained(&self, at: usize) {
        let _ = self.feed(Input::Drained(at));
    }

    pub(super) fn given_up(&self, at: usize) {
        let _ = self.feed(Input::GivenUp(at));
    }

    pub(super) fn is_shut(&self) -> bool {
        self.machine().is_shut()
    }

    pub(super) fn arrival(&self) -> Option<Try> {
        self.standby
    }
}
