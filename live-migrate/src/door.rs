//! Where a daemon's HTTP API is served: TCP with mutual TLS, a unix socket, or
//! plaintext on loopback; and who came in.
//!
//! Plaintext is for this host only. On loopback every user of the host is let
//! in, on a unix socket those whom the mode of its file lets in.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;

use crate::identity::{Identity, Role};
use crate::problem::Problem;
use crate::tls::Credentials;

/// Handshakes at once; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// For a peer that connects and says nothing.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Members of the socket's group may connect.
const SOCKET_MODE: u32 = 0o660;

/// An address to serve at: `IP:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err("a unix socket needs an absolute path: unix:/run/...".to_owned()),
            None => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| "write IP:PORT, such as 127.0.0.1:7710, or unix:/PATH".to_owned()),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Who came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Somebody with a certificate.
    Tls(Identity),
    /// A process of this host that may open the socket.
    Unix {
        /// Its user.
        uid: u32,
    },
    /// Any process of this host.
    Loopback,
}

impl Peer {
    /// Whether it may, by its role. Those of this host who got this far may.
    ///
    /// # Errors
    /// A [`Problem`] of type `baton:forbidden` that says who it is and who may.
    pub fn require(&self, roles: &[Role]) -> Result<(), Problem> {
        match self {
            Self::Tls(identity) if !roles.contains(&identity.role) => {
                let allowed: Vec<_> = roles.iter().map(|role| role.name()).collect();
                let detail = format!(
                    "you are {identity}; only {} may do this: call with such a certificate",
                    allowed.join(" or ")
                );
                Err(Problem::forbidden(detail))
            }
            Self::Tls(_) | Self::Unix { .. } | Self::Loopback => Ok(()),
        }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tls(identity) => identity.fmt(f),
            Self::Unix { uid } => write!(f, "user {uid} of this host"),
            Self::Loopback => f.write_str("somebody on this host"),
        }
    }
}

/// Why nobody can come in.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Plaintext where others could read it.
    #[error(
        "{0} can be reached from other hosts and there are no certificates; add [tls], or listen on loopback or unix:/PATH"
    )]
    Plaintext(SocketAddr),
    /// The address is taken or not ours.
    #[error("cannot listen on {address}; choose a free port of this host")]
    Address {
        /// As configured.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The path is taken.
    #[error("{} is in use, or is not a socket; stop its owner or choose another path", .0.display())]
    Taken(PathBuf),
    /// The socket cannot be made.
    #[error("cannot make socket {}; choose a writable directory and a path of at most 107 bytes", path.display())]
    Socket {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Refuses plaintext where others could read it.
///
/// # Errors
/// [`DoorError::Plaintext`].
pub fn check(address: &Address, with_tls: bool) -> Result<(), DoorError> {
    match address {
        Address::Tcp(address) if !with_tls && !address.ip().is_loopback() => {
            Err(DoorError::Plaintext(*address))
        }
        Address::Tcp(_) | Address::Unix(_) => Ok(()),
    }
}

/// An open door. Dropping it closes it and removes its socket.
#[derive(Debug)]
pub struct Door {
    address: Address,
    came: mpsc::Receiver<(Stream, Peer)>,
    accepting: JoinHandle<()>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.accepting.abort();
        if let Address::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Door {
    /// Listens.
    ///
    /// # Errors
    /// [`DoorError`]; nothing listens then.
    pub async fn open(
        address: &Address,
        credentials: Option<&Credentials>,
    ) -> Result<Self, DoorError> {
        check(address, credentials.is_some())?;
        let (send, came) = mpsc::channel(16);
        match address {
            Address::Tcp(wanted) => {
                let failed = |source| DoorError::Address { address: *wanted, source };
                let listener = TcpListener::bind(wanted).await.map_err(failed)?;
                let address = Address::Tcp(listener.local_addr().map_err(failed)?);
                let accepting = tokio::spawn(accept_tcp(listener, credentials.cloned(), send));
                Ok(Self { address, came, accepting })
            }
            Address::Unix(path) => {
                let listener = bind_unix(path)?;
                let accepting = tokio::spawn(accept_unix(listener, send));
                Ok(Self { address: address.clone(), came, accepting })
            }
        }
    }

    /// Where it is; the port that was chosen for port 0.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }
}

/// A socket that a killed process left is replaced.
fn bind_unix(path: &Path) -> Result<UnixListener, DoorError> {
    let failed = |source| DoorError::Socket { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(DoorError::Taken(path.to_owned())),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(DoorError::Taken(path.to_owned())),
        },
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mode = std::fs::Permissions::from_mode(SOCKET_MODE);
    std::fs::set_permissions(path, mode).map_err(failed)?;
    Ok(listener)
}

async fn accept_unix(listener: UnixListener, send: mpsc::Sender<(Stream, Peer)>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without a name nobody comes in.
                let Ok(cred) = stream.peer_cred() else { continue };
                let peer = Peer::Unix { uid: cred.uid() };
                if send.send((Stream::Unix(stream), peer)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept_tcp(
    listener: TcpListener,
    credentials: Option<Credentials>,
    send: mpsc::Sender<(Stream, Peer)>,
) {
    let permits = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (credentials, send) = (credentials.clone(), send.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let Some(credentials) = credentials else {
                let _ = send.send((Stream::Plain(stream), Peer::Loopback)).await;
                return;
            };
            let handshake = credentials.accept(stream);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                Ok(Ok((stream, identity))) => {
                    let _ = send.send((Stream::Tls(Box::new(stream)), Peer::Tls(identity))).await;
                }
                Ok(Err(error)) => tracing::warn!(%from, %error, "a connection was refused"),
                Err(_) => tracing::warn!(%from, "a connection said nothing and was closed"),
            }
        });
    }
}

impl Listener for Door {
    type Io = Stream;
    type Addr = Peer;

    async fn accept(&mut self) -> (Stream, Peer) {
        match self.came.recv().await {
            Some(came) => came,
            // The task that accepts ends only when this is dropped.
            None => std::future::pending().await,
        }
    }

    /// The type is axum's; nobody asks.
    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer::Loopback)
    }
}

impl Connected<IncomingStream<'_, Door>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        stream.remote_addr().clone()
    }
}

/// A connection of any kind.
#[derive(Debug)]
pub enum Stream {
    /// Loopback.
    Plain(TcpStream),
    /// With certificates.
    Tls(Box<TlsStream<TcpStream>>),
    /// This host.
    Unix(UnixStream),
}

macro_rules! each {
    ($self:ident, $inner:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Plain($inner) => {
                let $inner = Pin::new($inner);
                $call
            }
            Stream::Tls($inner) => {
                let $inner = Pin::new($inner.as_mut());
                $call
            }
            Stream::Unix($inner) => {
                let $inner = Pin::new($inner);
                $call
            }
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, inner => inner.poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, inner => inner.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => inner.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => inner.poll_shutdown(cx))
    }
}
