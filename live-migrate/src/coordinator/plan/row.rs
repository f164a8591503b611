//! A row of the journal: a handoff, its volumes, and who they are.

use baton_protocol::VolumeId;
use baton_protocol::handoff::{HandoffId, Key, Members, Try};
use baton_remote_client::{Engine, Fence};
use serde::{Deserialize, Serialize};

use super::codec::{hex, text};
use super::{
    Because, Cooperation, Grant, Progress, Seen, Standing, State, Timings, Trigger, Trouble, Winner,
};

/// A volume of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Name of the disk in the VM.
    pub disk: String,
    /// What its storage is. Rows of before know only Baton's own.
    #[serde(default, with = "text")]
    pub engine: Engine,
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
    /// The next epoch that its record would have given out when the try was
    /// planned: every ARM of the try shows it, so that one that comes late
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
    /// The volumes were taken by a fence, in the middle of it or after it.
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
    /// No other try follows this one, whatever becomes of it.
    #[serde(default)]
    pub last: bool,
    /// The loser's backend is gone, or is nobody's business any more.
    pub loser_gone: bool,
    /// What hinders it now.
    pub trouble: Option<Trouble>,
    /// How long the parts of the switch took; known when the source's backend is ended.
    #[serde(default)]
    pub timings: Timings,
    /// Where no storage fences.
    #[serde(default)]
    pub cooperation: Cooperation,
    /// The coordinator drives the whole migration, see `migration`.
    pub driven: Option<serde_json::Value>,
    /// Counts changes; the API's ETag.
    pub version: u64,
    /// Term of the coordinator that wrote this.
    pub term: u64,
    /// When it reached each state, microseconds since 1970. For people.
    pub reached: Vec<(State, u64)>,
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

    /// How the loser is kept from the volumes: all in one way, or there is no row.
    #[must_use]
    pub fn fence(&self) -> Fence {
        let anchor = self.anchor().map(|anchor| anchor.engine).unwrap_or_default();
        anchor.capabilities().fence
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
            _ if self.fenced => None,
            Some(winner) => Some(winner),
            None if self.unknown => None,
            None => Some(Winner::Source),
        }
    }
}

/// Owner name of a VM's backend on a host.
#[must_use]
pub fn owner(host: &str, vm: &str) -> String {
    format!("{host}/{vm}")
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
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
