//! What goes wrong together. Some harm needs two or three accidents of a kind in
//! one handoff, which chance alone brings about once in tens of thousands; a
//! world with a theme draws most of its faults from a few that belong together.
//! No theme knows of a [`crate::bug::Bug`].

use crate::fault::{Fault, Point};
use crate::stage::{DeadBackend, Setting};

/// What a world's faults have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Theme {
    /// Nothing: any fault at any time.
    Mixed,
    /// Messages arrive twice, the second time in another handoff.
    Late,
    /// Connections break under a guest that writes the same sector from two queues.
    Connections,
    /// The source dies while it seals, and its VMM guesses what was done.
    DyingSource,
    /// The source's process is replaced before it seals.
    NewSource,
    /// Servers restart around the decision.
    Servers,
    /// A standby whose machine runs already hangs before it has heard anything, and
    /// its host goes on in another handoff.
    Hung,
    /// Handoffs that are given up leave volumes armed, and others follow.
    Forgotten,
}

impl Theme {
    /// Of twenty worlds; every seeded bug is to be found a few dozen times in ten
    /// thousand handoffs.
    pub(crate) fn draw(rng: &mut fastrand::Rng) -> Self {
        match rng.u8(..20) {
            0..=4 => Self::Mixed,
            5..=7 => Self::Late,
            8..=9 => Self::Connections,
            10..=12 => Self::DyingSource,
            13..=14 => Self::NewSource,
            15 => Self::Servers,
            16..=17 => Self::Hung,
            _ => Self::Forgotten,
        }
    }

    /// The world as the theme needs it.
    pub(crate) fn set(self, setting: &mut Setting, rng: &mut fastrand::Rng) {
        match self {
            Self::Mixed | Self::Servers | Self::Hung => {}
            Self::Late | Self::NewSource => setting.overlaps = false,
            Self::Forgotten => {
                setting.overlaps = false;
                setting.volumes = rng.usize(2..=3);
                setting.servers = rng.usize(1..=setting.volumes);
            }
            Self::Connections => {
                setting.overlaps = true;
                setting.queues = 2;
                setting.sectors = rng.usize(1..=2);
            }
            Self::DyingSource => {
                setting.overlaps = false;
                setting.volumes = 3;
                setting.servers = rng.usize(2..=3);
                setting.dead_backend = if rng.bool() {
                    DeadBackend::TakesForUndone
                } else {
                    DeadBackend::TakesForDone
                };
            }
        }
    }

    /// How many handoffs a world has, at least and at most.
    pub(crate) fn handoffs(self) -> [u64; 2] {
        // What is late for one comes in another.
        if matches!(self, Self::Late | Self::Hung | Self::Forgotten) { [4, 8] } else { [2, 5] }
    }

    /// How many faults a handoff has, at least and at most.
    pub(crate) fn faults(self) -> [usize; 2] {
        match self {
            Self::Mixed => [0, 7],
            Self::Connections => [4, 12],
            Self::Hung => [1, 4],
            _ => [2, 7],
        }
    }

    /// Which faults, and at which steps; `None`: any.
    pub(crate) fn pool(self) -> Option<(&'static [Fault], &'static [Point])> {
        match self {
            Self::Mixed => None,
            Self::Late => Some((
                &[
                    Fault::MessagesDoubled,
                    Fault::MessagesDoubled,
                    Fault::Cancelled,
                    Fault::FenceForced,
                    Fault::FenceForced,
                ],
                &[Point::ArmArrived, Point::Armed, Point::RingsStopped, Point::FenceArrived],
            )),
            Self::Connections => Some((
                &[Fault::ConnectionReset, Fault::ConnectionCut],
                &[Point::ArmArrived, Point::Armed, Point::Opened, Point::RingsStarted],
            )),
            Self::DyingSource => Some((
                &[
                    Fault::SourceKilled,
                    Fault::SourceKilled,
                    Fault::SourceUnheard,
                    Fault::SourceUnheard,
                    Fault::ConnectionReset,
                    Fault::DiskSlow,
                    Fault::ServerFrozen,
                ],
                &[Point::RingsStopped, Point::SealArrived, Point::SealWaits, Point::Sealed],
            )),
            Self::NewSource => Some((
                &[
                    Fault::SourceKilled,
                    Fault::SourceKilled,
                    Fault::SourceFrozen,
                    Fault::MessagesLost,
                    Fault::CoordinatorFrozen,
                ],
                &[Point::ArmArrived, Point::Armed],
            )),
            Self::Forgotten => Some((
                &[
                    Fault::JournalLost,
                    Fault::JournalLost,
                    Fault::Cancelled,
                    Fault::Cancelled,
                    Fault::MessagesDoubled,
                    Fault::ServerKilled,
                ],
                &[Point::ArmArrived, Point::Armed, Point::DisarmArrived, Point::Disarmed],
            )),
            Self::Hung => {
                Some((&[Fault::DestinationDiedAndHung], &[Point::ImageSent, Point::RingsStarted]))
            }
            Self::Servers => Some((
                &[Fault::ServerKilled, Fault::PowerLost, Fault::DestinationKilled],
                &[
                    Point::Armed,
                    Point::Sealed,
                    Point::ActivateArrived,
                    Point::Activated,
                    Point::Opened,
                    Point::UnfreezeArrived,
                ],
            )),
        }
    }
}
