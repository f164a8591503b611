//! One handoff as the coordinator sees it: a row of its journal, and the pure
//! function that says what is to be done about it.
//!
//! ```text
//!              all armed, destination stands by      all sealed        anchor: destination
//!  PREPARING --------------------------------> READY ---------> SEALED ------------------> ACTIVE
//!      |  ^                                      |                 |                         |
//!      |  +---- the destination's backend died --+                 |            all settled  v
//!      |                                         |                 |                      SETTLED
//!      +--- refused, late, cancelled ------------+-----------------+                         ^
//!                             |                                                              |
//!                             v   anchor: source                         all settled         |
//!                          RECLAIMED ---------------------------------------------- or FAILED
//! ```
//!
//! Rules:
//! - What is due follows from the row alone ([`Row::due`]). A restart loses
//!   nothing: whoever has the row does what is due, and everything that is due
//!   may be done twice.
//! - The row is written before anything that it makes due is begun: a member is
//!   marked asked before the ARM leaves, so that a restart knows of every record
//!   that may be armed.
//! - The coordinator decides nothing. Who won is what the anchor's record says,
//!   and a row without that answer stays open for ever, whatever times out.
//! - Nothing stays half-armed: a member that was asked and has not answered is
//!   asked again after the decision, then settled, so that an ARM that is still
//!   on its way finds the handoff over.
//! - The destination is abdicated for only when its backend is dead, its machine
//!   does not run, and nothing has shown it active. A server that restarted does
//!   not take even that for an answer: then a person fences.
//!
//! Does not know clocks, sockets or the journal's file.

mod step;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;

use std::fmt;

use baton_protocol::handoff::{HandoffId, Key, Members, Side, Try};
use baton_protocol::{SessionId, VolumeId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use step::{Input, Output, Refusal, Step};

/// Where a handoff stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Members are being armed, or the destination's backend is not there yet.
    Preparing,
    /// The machine may be migrated.
    Ready,
    /// The source has stopped, and everything it sent is done.
    Sealed,
    /// The destination has the volumes.
    Active,
    /// The source has the volumes.
    Reclaimed,
    /// Over: it could not be prepared. The source has the volumes, nothing is
    /// left armed.
    Failed,
    /// Over: every member knows who won.
    Settled,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Preparing,
        Self::Ready,
        Self::Sealed,
        Self::Active,
        Self::Reclaimed,
        Self::Failed,
        Self::Settled,
    ];

    /// As the API shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preparing => "PREPARING",
            Self::Ready => "READY",
            Self::Sealed => "SEALED",
            Self::Active => "ACTIVE",
            Self::Reclaimed => "RECLAIMED",
            Self::Failed => "FAILED",
            Self::Settled => "SETTLED",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name().eq_ignore_ascii_case(name))
    }

    /// Nothing happens any more.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Settled)
    }

    /// How far it is; a wait for a state ends at any that is as far.
    const fn rank(self) -> u8 {
        match self {
            Self::Preparing => 0,
            Self::Ready => 1,
            Self::Sealed => 2,
            Self::Active | Self::Reclaimed => 3,
            Self::Failed | Self::Settled => 4,
        }
    }

    /// A wait for `wanted` is over.
    #[must_use]
    pub const fn reached(self, wanted: Self) -> bool {
        self.rank() >= wanted.rank()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who says when the volumes switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    /// The rings of the two machines.
    #[default]
    Implicit,
    /// The caller, by `:switchover` and `:activate`.
    Explicit,
}

/// What went wrong, as a problem document says it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct Trouble {
    /// Stable type.
    #[serde(rename = "type")]
    pub kind: String,
    /// One sentence.
    pub detail: String,
}

/// Why the source is to have its volumes back.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Because {
    /// Somebody cancelled.
    Cancelled,
    /// It came back by itself: its machine was resumed.
    TakenBack,
    /// The handoff cannot be.
    Failed(Trouble),
}

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// No ARM has left.
    Planned,
    /// An ARM may have left, and may still arrive.
    Asked,
    /// Its record has the handoff.
    Armed,
    /// Its record says no, and has no such handoff.
    Refused,
    /// Its record knows who won.
    Settled,
}

/// A member's record, as far as it concerns this try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seen {
    /// The source writes.
    Armed,
    /// Nobody does.
    Sealed,
    /// The destination does.
    Active,
    /// The source does again.
    Reclaimed,
    /// The server restarted and knows of no seal.
    Frozen,
    /// The server restarted, and the source has sealed.
    FrozenSealed,
    /// It is over; the source won.
    OverSource,
    /// It is over; the destination won.
    OverDestination,
    /// The record does not know this try: not armed, or fenced.
    Nothing,
}

/// The destination's backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Not heard of yet.
    #[default]
    Unknown,
    /// It runs and does not see all members yet.
    Starting,
    /// It stands by at all members.
    Ready,
    /// It activates, or serves.
    Active,
    /// It gave up, or lost.
    Parked,
    /// Its process is gone and its machine does not run.
    Dead,
}

/// The anchor's decision, to show to the members.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// The winner's incarnation.
    #[serde(with = "hex")]
    pub session: u64,
    /// Who won.
    pub winner: Winner,
    /// Number of the grant.
    pub grant: u64,
    /// 64 hexadecimal digits.
    pub mac: String,
}

/// [`Side`], as the journal writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Winner {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Winner {
    /// As the API shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl From<Winner> for Side {
    fn from(winner: Winner) -> Self {
        match winner {
            Winner::Source => Self::Source,
            Winner::Destination => Self::Destination,
        }
    }
}

/// A volume of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Name of the disk in the VM.
    pub disk: String,
    /// Data address of its storage server, as the coordinator is configured.
    pub storage: String,
    /// Its name there.
    pub volume: String,
    /// Its id there.
    #[serde(with = "hex")]
    pub id: u64,
    /// How far it is.
    pub progress: Progress,
    /// What its record said last.
    pub seen: Seen,
    /// The epoch its record had then.
    pub epoch: u64,
    /// The next epoch that its record would have given out when the handoff was
    /// planned: every ARM of the handoff shows it, so that one that comes late
    /// arms nothing. Rows of before have none, and are not armed any more.
    #[serde(default)]
    pub next_epoch: u64,
}

/// A handoff. The whole of it is in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Which.
    #[serde(with = "text")]
    pub id: HandoffId,
    /// The try, from 1.
    pub attempt: u32,
    /// Whose volumes move.
    pub vm: String,
    /// From this host.
    pub from: String,
    /// To this host.
    pub to: String,
    /// SHA-256 of the request that made it.
    pub request_hash: String,
    /// Who says when.
    pub trigger: Trigger,
    /// No fsync inside the blackout.
    pub fast: bool,
    /// Makes the anchor's decision provable, 64 hexadecimal digits. A secret.
    pub key: String,
    /// What the caller noted.
    pub labels: std::collections::BTreeMap<String, String>,
    /// When it was asked for, microseconds since 1970. For people.
    pub created_unix_us: u64,
    /// How long it may take to prepare, milliseconds.
    pub ready_timeout_ms: u64,
    /// The volumes; the first is the anchor.
    pub members: Vec<Member>,
    /// Where it stands.
    pub state: State,
    /// The destination's backend.
    pub standing: Standing,
    /// A standby backend may have been started at the destination.
    pub stood: bool,
    /// It was seen to activate.
    pub was_active: bool,
    /// The source is to have its volumes back.
    pub back: Option<Because>,
    /// Who won, once the anchor has said so.
    pub winner: Option<Winner>,
    /// The anchor's proof of that.
    pub proof: Option<Grant>,
    /// The anchor's server restarted and cannot say who won.
    pub unknown: bool,
    /// The anchor knows that the destination never activated.
    pub abdicated: bool,
    /// The volumes were taken by a fence in the middle of it.
    pub fenced: bool,
    /// Explicit: the caller said `:switchover`.
    pub switchover: bool,
    /// Explicit: the source was ordered to seal.
    pub seal_ordered: bool,
    /// Explicit: the caller said `:activate`.
    pub activate: bool,
    /// Explicit: the destination was ordered to activate.
    pub activate_ordered: bool,
    /// The caller said `:finish`.
    pub finish: bool,
    /// The loser's backend is gone, or is nobody's business any more.
    pub loser_gone: bool,
    /// What hinders it now.
    pub trouble: Option<Trouble>,
    /// The coordinator drives the whole migration, see `migration`.
    pub driven: Option<serde_json::Value>,
    /// Counts changes; the API's ETag.
    pub version: u64,
    /// Term of the coordinator that wrote this.
    pub term: u64,
    /// When it reached each state, microseconds since 1970. For people.
    pub reached: Vec<(State, u64)>,
}

/// What is to be done about a handoff. All may be done twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// ARM a member.
    Arm(usize),
    /// Look at a member's record and say when it changes.
    Watch(usize),
    /// Have a standby backend at the destination, and look at it.
    Stand,
    /// Look at the destination's backend.
    Inspect,
    /// Count down to [`Input::Late`].
    Countdown,
    /// Order the source's backend to seal.
    OrderSeal,
    /// Order the destination's backend to activate.
    OrderActivate,
    /// RECLAIM at the anchor, until it says who has the volumes.
    Reclaim,
    /// ABDICATE at the anchor.
    Abdicate,
    /// Read the proof at the anchor.
    Prove,
    /// SETTLE a member.
    Settle(usize),
    /// Stop the source's backend.
    StopSource,
    /// Stop the destination's backend.
    StopDestination,
}

impl Row {
    /// The try.
    #[must_use]
    pub fn attempt(&self) -> Try {
        Try { id: self.id, attempt: self.attempt }
    }

    /// Owner name of the source.
    #[must_use]
    pub fn from_owner(&self) -> String {
        owner(&self.from, &self.vm)
    }

    /// Owner name of the destination.
    #[must_use]
    pub fn to_owner_name(&self) -> String {
        owner(&self.to, &self.vm)
    }

    /// Members as every server checks them.
    #[must_use]
    pub fn members_digest(&self) -> Members {
        Members::of(self.members.iter().map(|member| VolumeId(member.id)))
    }

    /// The volume that decides.
    #[must_use]
    pub fn anchor(&self) -> Option<&Member> {
        self.members.first()
    }

    /// Nothing is left to do.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state.is_over() && self.due().is_empty()
    }

    /// Who owns the volumes: the one bit every orchestrator lacks. `None`: the
    /// anchor cannot say, or was fenced.
    #[must_use]
    pub fn outcome(&self) -> Option<Winner> {
        match self.winner {
            Some(winner) => Some(winner),
            None if self.unknown || self.fenced => None,
            None => Some(Winner::Source),
        }
    }

    /// What is to be done, from what is known.
    #[must_use]
    pub fn due(&self) -> Vec<Action> {
        let mut due = Vec::new();
        if self.fenced {
            return due;
        }
        let of = |progress: Progress| {
            move |(place, member): (usize, &Member)| (member.progress == progress).then_some(place)
        };
        let members = || self.members.iter().enumerate();
        match self.winner {
            None if self.state.is_over() => {}
            None => {
                due.extend(members().filter_map(of(Progress::Armed)).map(Action::Watch));
                if self.back.is_some() {
                    self.due_back(&mut due);
                } else {
                    self.due_forth(&mut due);
                }
            }
            Some(winner) => {
                // An ARM that is still on its way must find the handoff over. The
                // destination won only because all are armed, whoever knows it.
                let armed = match winner {
                    Winner::Source => {
                        due.extend(members().filter_map(of(Progress::Asked)).map(Action::Arm));
                        [Progress::Armed, Progress::Armed]
                    }
                    Winner::Destination => [Progress::Armed, Progress::Asked],
                };
                let is_armed = |member: &Member| armed.contains(&member.progress);
                let others: Vec<usize> = members()
                    .skip(1)
                    .filter_map(|(place, member)| is_armed(member).then_some(place))
                    .collect();
                let anchor = self.anchor().is_some_and(is_armed);
                let asked = self.members.iter().any(|m| m.progress == Progress::Asked);
                if self.proof.is_none() && anchor {
                    due.push(Action::Prove);
                } else if !others.is_empty() {
                    due.extend(others.into_iter().map(Action::Settle));
                } else if anchor && (!asked || winner == Winner::Destination) {
                    // Last: as long as one member does not know, this one does.
                    due.push(Action::Settle(0));
                }
                match winner {
                    _ if self.loser_gone => {}
                    // Not one that was there before us.
                    Winner::Source if self.stood => due.push(Action::StopDestination),
                    Winner::Source => {}
                    Winner::Destination if self.finish && self.state.is_over() => {
                        due.push(Action::StopSource);
                    }
                    Winner::Destination => {}
                }
            }
        }
        due.sort_unstable();
        due
    }

    fn due_forth(&self, due: &mut Vec<Action>) {
        let waits =
            |member: &Member| matches!(member.progress, Progress::Planned | Progress::Asked);
        if self.state == State::Preparing {
            due.push(Action::Countdown);
        }
        // One anchor that says no leaves nothing behind at the others.
        if self.anchor().is_some_and(waits) {
            due.push(Action::Arm(0));
            return;
        }
        let waiting = self.members.iter().enumerate().filter(|(_, member)| waits(member));
        let before = due.len();
        due.extend(waiting.map(|(place, _)| Action::Arm(place)));
        if due.len() > before {
            return;
        }
        due.push(if self.state == State::Sealed { Action::Inspect } else { Action::Stand });
        if self.trigger == Trigger::Explicit {
            if self.state == State::Ready && self.switchover && !self.seal_ordered {
                due.push(Action::OrderSeal);
            }
            if self.state == State::Sealed && self.activate && !self.activate_ordered {
                due.push(Action::OrderActivate);
            }
        }
    }

    fn due_back(&self, due: &mut Vec<Action>) {
        match self.anchor().map(|anchor| anchor.progress) {
            Some(Progress::Asked) => due.push(Action::Arm(0)),
            Some(Progress::Armed) => {
                due.push(Action::Reclaim);
                if self.unknown && !self.abdicated {
                    let active = self.members.iter().any(|m| m.seen == Seen::Active);
                    if self.standing == Standing::Dead && !active && !self.was_active {
                        due.push(Action::Abdicate);
                    } else {
                        due.push(Action::Inspect);
                    }
                }
            }
            Some(Progress::Planned | Progress::Refused | Progress::Settled) | None => {}
        }
    }
}

/// Owner name of a VM's backend on a host.
#[must_use]
pub fn owner(host: &str, vm: &str) -> String {
    format!("{host}/{vm}")
}

impl Grant {
    /// The winner's incarnation.
    #[must_use]
    pub fn session(&self) -> SessionId {
        SessionId(self.session)
    }
}

/// A random key for a new handoff.
///
/// # Errors
/// The kernel has no random bytes.
pub fn random_key() -> std::io::Result<String> {
    let mut key = [0; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut key)?;
    debug_assert_ne!(Key(key), Key::default());
    Ok(hex_of(&key))
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex_of(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Numbers as 16 hexadecimal digits.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{number:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        u64::from_str_radix(&String::deserialize(from)?, 16).map_err(D::Error::custom)
    }
}

/// What prints and parses.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}
