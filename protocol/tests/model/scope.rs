//! What a run explores: how many members, what may go wrong and how often.

use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Try};
use baton_protocol::{SessionId, VolumeId};

use crate::mutant::Mutant;

pub(crate) const S: usize = 0;
pub(crate) const D: usize = 1;
pub(crate) const NAMES: [&str; 2] = ["s", "d"];
/// Who gets the volumes by force.
pub(crate) const THIRD: &str = "x";
pub(crate) const THIRD_SESSION: SessionId = SessionId(99);
/// Numbers written by S count from 1; these say whose the others are.
pub(crate) const FIRST_OF_D: u8 = 10;
pub(crate) const OF_ROGUE: u8 = 30;
pub(crate) const OF_THIRD: u8 = 40;
pub(crate) const TERM: u64 = 1;
/// In the kernel of a server that was killed: no gate knows of it.
pub(crate) const OF_THE_DEAD: u64 = 0;

/// What a run explores.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    pub name: &'static str,
    pub members: usize,
    pub mode: Mode,
    /// How often servers may crash, all together.
    pub server_crashes: u8,
    /// How often the backends of each side may crash.
    pub backend_crashes: [u8; 2],
    /// How many answers may be lost or messages be delivered twice.
    pub net_faults: u8,
    /// How often an ARM that was sent before may arrive again, however late.
    pub late_arms: u8,
    /// Each try is a handoff of its own, not another attempt of the first.
    pub fresh_ids: bool,
    /// How often the source VM may stop under a migration.
    pub stops: u8,
    /// How often its rings may start again.
    pub starts: u8,
    /// The destination VM may be started.
    pub start_d: bool,
    /// Writes of each VM to each member.
    pub writes: [u8; 2],
    /// Tries of the handoff.
    pub attempts: u32,
    /// The coordinator may reclaim, abdicate for a dead destination, settle.
    pub coordinator: bool,
    /// Agents may order to abdicate and to reclaim.
    pub orders: bool,
    /// The members may be fenced for somebody else.
    pub fence: bool,
    /// A coordinator whose journal is lost arms the anchor for another try although
    /// a member is still in the one before, which the anchor then forgets.
    pub forgets: bool,
    /// Members are disarmed whenever anybody likes, not only where the anchor has
    /// forgotten their handoff.
    pub disarms: bool,
    /// The destination's host shows decisions that it made up.
    pub rogue: bool,
    /// The handoff is armed and both sides know when the run begins.
    pub armed: bool,
    /// Requests spend time inside the gate, and their answers on the way.
    pub slow_io: bool,
    /// Answers of the members spend time on the way.
    pub slow_answers: bool,
    /// What a dead process said is still heard after its successor has
    /// introduced itself. A server that listens to the newest incarnation only
    /// does not; safety must hold even so.
    pub ghosts: bool,
    /// The orchestrator waits until the destination is ready.
    pub waits: bool,
    /// A backend may be replaced while it only hangs, and go on later.
    pub zombies: bool,
    pub mutant: Option<Mutant>,
}

impl Scope {
    pub(crate) fn new(name: &'static str, mode: Mode) -> Self {
        Self {
            name,
            members: 2,
            mode,
            server_crashes: 1,
            backend_crashes: [0, 0],
            net_faults: 0,
            late_arms: 0,
            fresh_ids: false,
            stops: 1,
            starts: 1,
            start_d: true,
            writes: [1, 1],
            attempts: 1,
            coordinator: false,
            orders: false,
            fence: false,
            forgets: false,
            disarms: false,
            rogue: false,
            armed: true,
            slow_io: false,
            slow_answers: false,
            ghosts: false,
            waits: false,
            zombies: false,
            mutant: None,
        }
    }

    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(crate) fn volume(at: usize) -> VolumeId {
        VolumeId(at as u64 + 1)
    }

    pub(crate) fn volumes(&self) -> Vec<VolumeId> {
        (0..self.members).map(Self::volume).collect()
    }

    pub(crate) fn plan(&self, attempt: u32) -> Plan {
        Plan {
            attempt: if self.fresh_ids {
                Try { id: HandoffId(u128::from(attempt)), attempt: 1 }
            } else {
                Try { id: HandoffId(1), attempt }
            },
            vm: "v".to_owned(),
            from: NAMES[S].to_owned(),
            to: NAMES[D].to_owned(),
            anchor: Self::volume(ANCHOR),
            members: Members::of(self.volumes()),
            mode: self.mode,
            key: Key([7; 32]),
        }
    }
}

/// Position of the anchor.
pub(crate) const ANCHOR: usize = 0;
