//! Opens a volume by its URI, and says in one sentence why it cannot.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::SessionId;
use baton_protocol::message::OWNER_BYTES_MAX;

use crate::file::FileVolume;
use crate::uri::{UriError, VolumeUri};
use crate::volume::Volume;

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Who claims the volume: stable over restarts of this process, different
    /// for everybody else (host and VM). 1 to 255 bytes.
    pub owner: String,
    /// This incarnation of the process: random, never zero.
    pub session: SessionId,
    /// Read beside whoever owns the volume.
    pub read_only: bool,
    /// Connect and watch without reading or writing (the destination of a
    /// migration before it is granted the volume). No queue can be opened.
    pub standby: bool,
    /// How long to try before opening fails.
    pub connect_timeout: Duration,
}

impl OpenOptions {
    /// Read and write as `owner`, in a new incarnation, trying for 5 s.
    ///
    /// # Panics
    /// When the kernel has no random numbers, which no supported kernel does.
    #[must_use]
    pub fn new(owner: impl Into<String>) -> Self {
        Self {
            owner: owner.into(),
            session: SessionId(random_nonzero()),
            read_only: false,
            standby: false,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

pub(crate) fn random_nonzero() -> u64 {
    loop {
        let mut bytes = [0u8; 8];
        // SAFETY: the buffer is valid for the length given.
        let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        assert!(
            n == 8 || io::Error::last_os_error().kind() == io::ErrorKind::Interrupted,
            "getrandom gives 8 bytes on every supported kernel"
        );
        let number = u64::from_ne_bytes(bytes);
        if n == 8 && number != 0 {
            return number;
        }
    }
}

/// Why a volume cannot be opened. Each is one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URI is wrong.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The owner's name cannot be sent.
    #[error("an owner's name must have 1 to {OWNER_BYTES_MAX} bytes; this one has {0}")]
    OwnerName(usize),
    /// Read-only and standby at once.
    #[error("a volume cannot be opened read-only and standby at once; choose one")]
    Modes,
    /// A local file cannot be opened.
    #[error("cannot open `{}`; check the path and its permissions", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is a directory, a socket or something else.
    #[error("`{}` is not a file or a block device", .0.display())]
    NotAFile(PathBuf),
    /// Another process has the file.
    #[error(
        "`{}` is in use by another process; stop it, or open the volume read-only",
        .0.display()
    )]
    Locked(PathBuf),
    /// Not one sector.
    #[error("`{}` is smaller than one sector; make it larger with `truncate -s 10G`", .0.display())]
    Empty(PathBuf),
}

/// Opens the volume `uri`. Waits for the storage for at most
/// [`OpenOptions::connect_timeout`].
///
/// # Errors
/// [`OpenError`]; nothing is left behind.
pub fn open(uri: &str, options: &OpenOptions) -> Result<Arc<dyn Volume>, OpenError> {
    let uri: VolumeUri = uri.parse()?;
    if options.owner.is_empty() || options.owner.len() > OWNER_BYTES_MAX {
        return Err(OpenError::OwnerName(options.owner.len()));
    }
    if options.read_only && options.standby {
        return Err(OpenError::Modes);
    }
    match uri {
        VolumeUri::File { path } => Ok(Arc::new(FileVolume::open(&path, options.read_only)?)),
        VolumeUri::Baton { .. } | VolumeUri::BatonUnix { .. } => {
            Err(OpenError::Uri(UriError::Scheme("baton".to_owned())))
        }
    }
}
