//! One end of a copy: an open volume, its queue, and what can be wrong with it.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use baton_remote_client::{OpenOptions, Volume, VolumeQueue, VolumeState, VolumeUri, open};

use super::CopyError;
use super::piece::hex;
use super::state::End;

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// An open end.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) role: Role,
    pub(super) uri: VolumeUri,
    pub(super) volume: Arc<dyn Volume>,
}

impl Side {
    pub(super) fn open(role: Role, uri: &VolumeUri, owner: &str) -> Result<Self, CopyError> {
        let read_only = role == Role::Source;
        let options = OpenOptions { read_only, map: true, ..OpenOptions::new(owner) };
        let volume = open(&uri.to_string(), &options).map_err(|source| CopyError::Open {
            role,
            uri: uri.to_string(),
            source: Box::new(source),
        })?;
        Ok(Self { role, uri: uri.clone(), volume })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.volume.geometry().size_bytes
    }

    /// What it must be again for a copy to go on.
    pub(super) fn end(&self) -> End {
        let mark = match &self.uri {
            VolumeUri::File { path } => match std::fs::metadata(path) {
                // Writing is what the destination is there for.
                Ok(file) if self.role == Role::Destination => {
                    format!("{}:{}", file.dev(), file.ino())
                }
                Ok(file) => {
                    let (at, ns) = (file.mtime(), file.mtime_nsec());
                    format!("{}:{}:{at}.{ns:09}", file.dev(), file.ino())
                }
                Err(_) => "gone".to_owned(),
            },
            _ => hex(&self.volume.geometry().id),
        };
        End { uri: self.uri.to_string(), size_bytes: self.size_bytes(), mark }
    }

    pub(super) fn queue(&self, depth: usize) -> Result<Box<dyn VolumeQueue>, CopyError> {
        self.volume
            .open_queue(0, depth)
            .map_err(|source| CopyError::Queue { role: self.role, source })
    }

    /// Whether it is away and may come back; an error when it will not.
    pub(super) fn is_away(&self) -> Result<bool, CopyError> {
        match self.volume.state() {
            VolumeState::Connected => Ok(false),
            VolumeState::Reconnecting => Ok(true),
            VolumeState::Fenced => Err(CopyError::Fenced(self.role)),
            VolumeState::Lost => Err(CopyError::Lost(self.role)),
        }
    }
}
