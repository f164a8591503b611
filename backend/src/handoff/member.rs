//! A disk's place in its VM's handoff: what it tells and what it must know, however
//! its storage hands over.

use std::sync::Arc;

use baton_protocol::handoff::Try;

use super::{CooperativeVm, VmHandoff};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub enum MemberHandle {
    /// Its storage decides.
    Stored {
        /// Of all volumes of the VM.
        vm: Arc<VmHandoff>,
        /// Its place there.
        at: usize,
    },
    /// Its storage keeps nobody out.
    Cooperative {
        /// Of all volumes of the VM.
        vm: Arc<CooperativeVm>,
        /// Its place there.
        at: usize,
    },
}

impl MemberHandle {
    /// The VMM is about to start the disk's first ring, which takes no request yet:
    /// what seals must know before the first could be sent.
    pub(crate) fn starting(&self) {
        if let Self::Cooperative { vm, at } = self {
            vm.started(*at);
        }
    }

    /// What [`Self::starting`] said has not come to be: no ring runs. Not that everything is answered, which
    /// nobody knows here; the next start and stop of the disk says it.
    pub(crate) fn not_started(&self) {
        if let Self::Cooperative { vm, at } = self {
            vm.stopped(*at, false);
        }
    }

    /// The VMM has started the disk's first ring.
    pub(crate) fn started(&self) {
        if let Self::Stored { vm, at } = self {
            vm.started(*at);
        }
    }

    /// No ring of the disk takes requests any more.
    pub(crate) fn stopped(&self, migrating: bool) {
        match self {
            Self::Stored { vm, at } => vm.stopped(*at, migrating),
            Self::Cooperative { vm, at } => vm.stopped(*at, migrating),
        }
    }

    /// Everything that the disk's rings had taken is answered.
    pub(crate) fn drained(&self) {
        match self {
            Self::Stored { vm, at } => vm.drained(*at),
            Self::Cooperative { vm, at } => vm.drained(*at),
        }
    }

    /// The disk's rings have let requests go that the storage had not answered. Said
    /// when nothing more of them can be sent: a gate that opens meanwhile counts.
    pub(crate) fn given_up(&self) {
        if let Self::Cooperative { vm, at } = self {
            vm.given_up(*at);
        }
    }

    /// New requests of the disk wait for somebody's word.
    pub(crate) fn is_held(&self) -> bool {
        match self {
            Self::Stored { vm, at } => vm.state().role.is_held(*at),
            Self::Cooperative { vm, .. } => vm.is_shut(),
        }
    }

    /// The try in which a machine that starts its rings now arrives here.
    pub(crate) fn arrival(&self) -> Option<Try> {
        match self {
            Self::Stored { vm, .. } => vm.state().role.arrival(),
            Self::Cooperative { vm, .. } => vm.arrival(),
        }
    }

    /// The machine of this process comes from another host, with its memory. One that
    /// has been here before is of an earlier try, and its memory is of then, unless it
    /// arrived in the very try that this process is for: then an earlier process of
    /// that try has died under it. Also as long as the storage has not said whose the
    /// volume is.
    pub(crate) fn awaits_another_machine(&self, arrived: Option<Try>) -> bool {
        match self {
            Self::Stored { vm, at } => vm.awaits_another_machine(*at, arrived),
            Self::Cooperative { vm, .. } => {
                vm.arrival().is_some_and(|expected| arrived != Some(expected))
            }
        }
    }

    /// They wait for ever, and that was said.
    pub(crate) fn is_parked(&self) -> bool {
        match self {
            Self::Stored { vm, .. } => vm.parked().is_some(),
            Self::Cooperative { .. } => false,
        }
    }
}
