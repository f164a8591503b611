//! Sockets: binding them so that mistakes are clear, and the options that data
//! connections need.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::handshake::Socket;

/// A peer that is gone without a word is noticed after at most
/// `IDLE + PROBES * INTERVAL` when idle and `UNANSWERED` when we have sent.
const KEEPALIVE_IDLE_S: u32 = 10;
const KEEPALIVE_INTERVAL_S: u32 = 5;
const KEEPALIVE_PROBES: u32 = 4;
const UNANSWERED: Duration = Duration::from_secs(30);
/// Room for answers on their way through a Unix socket, whose buffer does not grow by itself; the kernel cuts it to its
/// limit. As much as a client makes room for requests.
const UNIX_BUFFER_BYTES: usize = 4 << 20;
/// Members of the socket's group may connect.
const SOCKET_MODE: u32 = 0o660;

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// An address.
    #[error("cannot listen on {what} address {address}; choose a free port of this host")]
    Address {
        /// Which.
        what: &'static str,
        /// As configured.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A socket that somebody uses.
    #[error("socket {} is in use by another server; stop it or choose another path", path.display())]
    SocketInUse {
        /// As configured.
        path: PathBuf,
    },
    /// Something that is not a socket.
    #[error("{} exists and is not a socket; choose another path", path.display())]
    NotASocket {
        /// As configured.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot make socket {}; choose a writable directory and a path of at most 107 bytes", path.display())]
    Socket {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on an address.
///
/// # Errors
/// [`BindError`] when the address cannot be had.
pub(crate) async fn bind(
    what: &'static str,
    address: SocketAddr,
) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError::Address { what, address, source })
}

/// A unix socket that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    path: PathBuf,
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens on a path; a socket that a killed server left is replaced.
///
/// # Errors
/// [`BindError`] when the path is in use or cannot be made.
pub(crate) fn bind_unix(path: &Path) -> Result<(UnixListener, UnixSocket), BindError> {
    let failed = |source| BindError::Socket { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(BindError::SocketInUse { path: path.to_owned() }),
        },
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let socket = UnixSocket { path: path.to_owned() };
    let mode = std::fs::Permissions::from_mode(SOCKET_MODE);
    std::fs::set_permissions(path, mode).map_err(failed)?;
    Ok((listener, socket))
}

impl Socket for TcpStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        let fd = OwnedFd::from(self.into_std()?);
        let socket = fd.as_fd();
        // A small reply must not wait for the acknowledgement of the last one.
        setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
        setsockopt(&socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
        let unanswered = u32::try_from(UNANSWERED.as_millis()).unwrap_or(u32::MAX);
        setsockopt(&socket, sockopt::TcpUserTimeout, &unanswered)?;
        Ok(fd)
    }
}

impl Socket for UnixStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        let fd = OwnedFd::from(self.into_std()?);
        setsockopt(&fd.as_fd(), sockopt::SndBuf, &UNIX_BUFFER_BYTES)?;
        Ok(fd)
    }
}

/// Raises the limit of open files to what the system allows.
pub(crate) fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the limit of open files stays as it is");
    }
}
