//! Opens a volume by its URI, and says in one sentence why it cannot.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::message::OWNER_BYTES_MAX;
use baton_protocol::{SessionId, Status};

use crate::baton::Timing;
use crate::baton::{claim::Servers, volume::BatonVolume};
use crate::file::FileVolume;
use crate::nbd::volume::NbdVolume;
use crate::rbd::{RbdError, RbdVolume};
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
    /// migration before it is granted the volume). Without `handoff` no queue can
    /// be opened; with it, queues connect and take requests, which wait.
    pub standby: bool,
    /// Take part in handoffs: whoever opens the volume drives its
    /// [`crate::HandoffPort`], if there is one. A loss of the epoch is then no end
    /// by itself, and a claim during a handoff becomes a standby.
    pub handoff: bool,
    /// [`crate::VolumeQueue::submit_map`] will be used.
    pub map: bool,
    /// How long to try before opening fails.
    pub connect_timeout: Duration,
    /// How long an open volume waits for what; the defaults are right outside
    /// of tests.
    pub timing: Timing,
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
            handoff: false,
            map: false,
            connect_timeout: Duration::from_secs(5),
            timing: Timing::default(),
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
    /// The URI names no server.
    #[error("the URI names no server")]
    NoServer,
    /// The server's name means nothing.
    #[error("cannot find the storage server `{host}`; check the name in the volume's URI")]
    Resolve {
        /// Name.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing listens there, or the way is blocked.
    #[error(
        "cannot reach a storage server at {server}; check the address and that baton-storage runs there"
    )]
    Unreachable {
        /// Address.
        server: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something accepts connections and stays silent.
    #[error(
        "no answer from {server} within {after_ms} ms; check that it is a baton-storage data address and not overloaded"
    )]
    Timeout {
        /// Address.
        server: String,
        /// How long was waited, milliseconds.
        after_ms: u128,
    },
    /// The connection ended without an answer, or the server asked to come later.
    #[error("the storage server at {server} does not serve us now; look at its log")]
    NoAnswer {
        /// Address.
        server: String,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something else listens there.
    #[error("what listens at {server} is not a Baton storage server; check the port")]
    NotBaton {
        /// Address.
        server: String,
        /// What it said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Too old or too new.
    #[error(
        "the storage server at {server} speaks no common protocol version; upgrade the older side ({text})"
    )]
    Version {
        /// Address.
        server: String,
        /// The server's sentence.
        text: String,
    },
    /// No such volume.
    #[error(
        "no volume `{volume}` at {server}; create it with `baton volume create {volume} --size 10G`, or check the name"
    )]
    NoSuchVolume {
        /// Address.
        server: String,
        /// Name.
        volume: String,
    },
    /// Somebody else has it.
    #[error("volume `{volume}` at {server} is owned by another client: {text}")]
    NotOwner {
        /// Address.
        server: String,
        /// Name.
        volume: String,
        /// The server's sentence: who, and what to do.
        text: String,
    },
    /// Another refusal.
    #[error("the storage server at {server} refused volume `{volume}`: {status}: {text}")]
    Refused {
        /// Address.
        server: String,
        /// Name.
        volume: String,
        /// The server's reason.
        status: Status,
        /// The server's sentence.
        text: String,
    },
    /// This process is out of descriptors, threads or memory.
    #[error("cannot open the volume: the system is out of descriptors, threads or memory")]
    System(#[source] io::Error),
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
    /// An image of Ceph.
    #[error(transparent)]
    Rbd(#[from] RbdError),
    /// Not one sector.
    #[error("`{}` is smaller than one sector; make it larger with `truncate -s 10G`", .0.display())]
    Empty(PathBuf),
    /// Nothing listens there, or the way is blocked.
    #[error("cannot reach an NBD server at {server}; check the address and that the server runs")]
    NbdUnreachable {
        /// Address.
        server: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something accepts connections and stays silent.
    #[error(
        "no answer from {server} within {after_ms} ms; check that it is an NBD server, and that it takes one more client"
    )]
    NbdTimeout {
        /// Address.
        server: String,
        /// How long was waited, milliseconds.
        after_ms: u128,
    },
    /// Something else listens there.
    #[error("what listens at {server} is not an NBD server; check the port")]
    NotNbd {
        /// Address.
        server: String,
    },
    /// Older than the fixed newstyle handshake.
    #[error(
        "the NBD server at {server} speaks only the old style of the protocol; use one with the fixed newstyle handshake"
    )]
    NbdOldStyle {
        /// Address.
        server: String,
    },
    /// It serves nobody in clear text.
    #[error(
        "the NBD server at {server} requires TLS; write nbds:// or nbds+unix:// in the volume's URI"
    )]
    NbdTlsRequired {
        /// Address.
        server: String,
    },
    /// It serves everybody in clear text, and the URI forbids that.
    #[error(
        "the NBD server at {server} does not offer TLS, and nbds:// is never served without; start it with TLS, or write nbd:// if the network is trusted"
    )]
    NbdNoTls {
        /// Address.
        server: String,
    },
    /// One of the two ends does not trust the other.
    #[error("no TLS with the NBD server at {server}: {reason}")]
    NbdTls {
        /// Address.
        server: String,
        /// What is wrong, and with what.
        reason: String,
    },
    /// No such export.
    #[error(
        "no export `{export}` at the NBD server {server}; check the name in the URI, behind the slash that follows the server"
    )]
    NbdNoExport {
        /// Address.
        server: String,
        /// Name.
        export: String,
    },
    /// Another refusal, or something that no disk can be.
    #[error("the NBD server at {server} cannot serve export `{export}` as a disk")]
    NbdRefused {
        /// Address.
        server: String,
        /// Name.
        export: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Not one block.
    #[error(
        "`{volume}` has {size_bytes} bytes, less than one block of {block_bytes}; export a larger disk"
    )]
    NbdEmpty {
        /// URI.
        volume: String,
        /// Its size, bytes.
        size_bytes: u64,
        /// Its block, bytes.
        block_bytes: u32,
    },
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
        VolumeUri::Rbd(image) => Ok(Arc::new(RbdVolume::open(&image, options)?)),
        VolumeUri::Baton { servers, volume } => {
            Ok(Arc::new(BatonVolume::open(&Servers::Tcp(servers), &volume, options)?))
        }
        VolumeUri::Nbd(uri) => Ok(Arc::new(NbdVolume::open(&uri, options)?)),
        VolumeUri::BatonUnix { socket, volume } => {
            Ok(Arc::new(BatonVolume::open(&Servers::Unix(socket), &volume, options)?))
        }
    }
}
