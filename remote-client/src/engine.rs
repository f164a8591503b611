//! Which storage a volume is on, and what its driver can do: each driver says so
//! itself, in its own `CAPABILITIES`; whoever plans with volumes asks here.

use std::fmt;
use std::str::FromStr;

use crate::fence::Fence;
use crate::uri::VolumeUri;
use crate::{baton, file, nbd, rbd};

/// A kind of storage; one driver each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Engine {
    /// A Baton storage server.
    #[default]
    Baton,
    /// An NBD server.
    Nbd,
    /// A Ceph cluster.
    Rbd,
    /// A file or block device of this host.
    File,
}

/// What a driver can do. The table in docs/engines.md is made of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// How a host that shall not write any more is kept from it.
    pub fence: Fence,
    /// A VM with such volumes can be handed over to another host while it runs.
    pub handoff: bool,
    /// A disk may have several queues.
    pub queues: Support,
    /// A discard gives space back.
    pub discard: Support,
    /// A guest that runs is told of a larger volume.
    pub growth: Support,
    /// Requests wait while the storage does not answer, and are no error.
    pub waits: Support,
    /// What is sent is encrypted.
    pub encrypted: Support,
}

/// Whether a driver has a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It has.
    Yes,
    /// It has not.
    No,
    /// On this condition.
    If(&'static str),
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::If(condition) => condition,
        })
    }
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Baton, Self::Nbd, Self::Rbd, Self::File];

    /// As its driver says.
    #[must_use]
    pub const fn capabilities(self) -> &'static Capabilities {
        match self {
            Self::Baton => &baton::CAPABILITIES,
            Self::Nbd => &nbd::CAPABILITIES,
            Self::Rbd => &rbd::CAPABILITIES,
            Self::File => &file::CAPABILITIES,
        }
    }

    /// One word, for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baton => "baton",
            Self::Nbd => "nbd",
            Self::Rbd => "rbd",
            Self::File => "file",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No such engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no kind of storage; there are baton, nbd, rbd and file")]
pub struct UnknownEngine(String);

impl FromStr for Engine {
    type Err = UnknownEngine;

    fn from_str(text: &str) -> Result<Self, UnknownEngine> {
        let found = Self::ALL.into_iter().find(|engine| engine.name() == text);
        found.ok_or_else(|| UnknownEngine(text.to_owned()))
    }
}

impl VolumeUri {
    /// Which storage it names.
    #[must_use]
    pub const fn engine(&self) -> Engine {
        match self {
            Self::Baton { .. } | Self::BatonUnix { .. } => Engine::Baton,
            Self::Nbd(_) => Engine::Nbd,
            Self::Rbd(_) => Engine::Rbd,
            Self::File { .. } => Engine::File,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_uri_has_its_engine_and_every_engine_its_name() {
        for (uri, engine, fence) in [
            ("baton://h:1/v", Engine::Baton, Fence::Storage),
            ("baton+unix:///v?socket=/s", Engine::Baton, Fence::Storage),
            ("nbd://h/e", Engine::Nbd, Fence::Cooperative),
            ("nbd+unix:///e?socket=/s", Engine::Nbd, Fence::Cooperative),
            ("rbd://p/i", Engine::Rbd, Fence::Blocklist),
            ("file:///f", Engine::File, Fence::None),
        ] {
            let found = uri.parse::<VolumeUri>().expect(uri).engine();
            assert_eq!((found, found.capabilities().fence), (engine, fence), "{uri}");
            assert_eq!(found.name().parse(), Ok(engine));
        }
        assert!("sheepdog".parse::<Engine>().is_err());
    }

    /// What cannot be fenced in any way cannot be handed over.
    #[test]
    fn no_handoff_without_a_fence() {
        for engine in Engine::ALL {
            let Capabilities { fence, handoff, .. } = *engine.capabilities();
            assert!(!handoff || fence != Fence::None, "{engine}");
        }
    }
}
