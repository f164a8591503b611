//! Where front-ends connect: a path we make, a descriptor passed with `--fd`,
//! or one from systemd.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};

/// Mode and group of a socket we make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// File mode.
    pub mode: u32,
    /// Group name or number.
    pub group: Option<String>,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers at the path.
    #[error("{0} is in use: another process serves it; stop that one or choose another path")]
    InUse(PathBuf),
    /// Something that is not a socket is at the path.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The path cannot be bound.
    #[error("cannot listen on {path}; its directory must exist and be writable")]
    Bind {
        /// Path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The group does not exist or may not be given.
    #[error("cannot give {path} to group {group}")]
    Group {
        /// Path.
        path: PathBuf,
        /// Group.
        group: String,
        /// Why not.
        source: io::Error,
    },
    /// The descriptor is not a unix stream socket.
    #[error("file descriptor {0} is not an open unix stream socket")]
    BadFd(RawFd),
}

/// A socket file we made. Removed only if it is still ours: a process that was
/// killed or stopped may have been replaced at the same path.
#[derive(Debug, PartialEq, Eq)]
pub struct Made {
    path: PathBuf,
    inode: (u64, u64),
}

impl Made {
    fn at(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), inode: (found.dev(), found.ino()) })
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A source of front-ends.
#[derive(Debug)]
pub enum FrontEnds {
    /// One after another, for ever.
    Listener {
        /// The socket.
        listener: UnixListener,
        /// What we made, to be removed at the end.
        made: Option<Made>,
    },
    /// One that is connected already.
    Connected(Option<UnixStream>),
}

impl FrontEnds {
    /// Listens at a path. A socket that nobody serves any more is replaced, so
    /// that a killed process can be started again.
    ///
    /// # Errors
    /// [`SocketError`]; nothing is left behind.
    pub fn bind(path: &Path, permissions: &Permissions) -> Result<Self, SocketError> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(SocketError::InUse(path.to_owned()));
            }
            Ok(_) | Err(_) => {}
        }
        // Bind beside the path and move into place when it is ready: a
        // front-end sees the old socket or the finished new one.
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        let bind_error = |source| SocketError::Bind { path: path.to_owned(), source };
        let _ = fs::remove_file(&beside);
        let listener = UnixListener::bind(&beside).map_err(bind_error)?;
        let made = set_permissions(&beside, permissions)
            .and_then(|()| fs::rename(&beside, path).map_err(bind_error));
        if let Err(error) = made {
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        let made = Made::at(path).map_err(bind_error)?;
        Ok(Self::Listener { listener, made: Some(made) })
    }

    /// Takes over a passed descriptor: a listening socket is listened on, a
    /// connected one is served until it closes.
    ///
    /// # Errors
    /// [`SocketError::BadFd`].
    pub fn from_fd(raw: RawFd) -> Result<Self, SocketError> {
        let bad = || SocketError::BadFd(raw);
        // SAFETY: fcntl does not touch memory; a closed descriptor is an error.
        if raw < 0 || unsafe { libc::fcntl(raw, libc::F_GETFD) } < 0 {
            return Err(bad());
        }
        // SAFETY: open, and given to us by whoever started the process.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let listening = getsockopt(&fd, sockopt::AcceptConn).map_err(|_| bad())?;
        let family =
            nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(fd.as_raw_fd());
        if !family.is_ok_and(|address| address.as_unix_addr().is_some()) {
            return Err(bad());
        }
        let _ =
            nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
        Ok(if listening {
            Self::Listener { listener: UnixListener::from(fd), made: None }
        } else {
            Self::Connected(Some(UnixStream::from(fd)))
        })
    }

    /// What to wait on for the next front-end; `None` when there is none to
    /// come.
    #[must_use]
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listener { listener, .. } => Some(listener.as_fd()),
            Self::Connected(stream) => stream.as_ref().map(AsFd::as_fd),
        }
    }

    /// The next front-end, once [`FrontEnds::as_fd`] is readable.
    ///
    /// # Errors
    /// When it went away again or the process is out of descriptors.
    pub fn accept(&mut self) -> io::Result<UnixStream> {
        match self {
            Self::Listener { listener, .. } => listener.accept().map(|(stream, _)| stream),
            Self::Connected(stream) => {
                stream.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
            }
        }
    }
}

fn set_permissions(path: &Path, permissions: &Permissions) -> Result<(), SocketError> {
    fs::set_permissions(path, fs::Permissions::from_mode(permissions.mode))
        .map_err(|source| SocketError::Bind { path: path.to_owned(), source })?;
    let Some(group) = &permissions.group else { return Ok(()) };
    let error = |source| SocketError::Group { path: path.to_owned(), group: group.clone(), source };
    let gid = match group.parse::<u32>() {
        Ok(number) => number,
        Err(_) => match nix::unistd::Group::from_name(group) {
            Ok(Some(found)) => found.gid.as_raw(),
            Ok(None) => {
                return Err(error(io::Error::new(io::ErrorKind::NotFound, "no such group")));
            }
            Err(errno) => return Err(error(errno.into())),
        },
    };
    std::os::unix::fs::chown(path, None, Some(gid)).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Permissions = Permissions { mode: 0o660, group: None };

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        let first = FrontEnds::bind(&path, &PLAIN).expect("bind");
        assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o777, 0o660);
        assert!(matches!(FrontEnds::bind(&path, &PLAIN), Err(SocketError::InUse(_))));
        // As after a kill: the file stays, nobody listens.
        let FrontEnds::Listener { listener, .. } = &first else { panic!("a listener") };
        nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both)
            .expect("shutdown");
        let second = FrontEnds::bind(&path, &PLAIN).expect("replace");
        assert!(UnixStream::connect(&path).is_ok());
        drop(first);
        assert!(path.exists(), "the replaced one must not remove its successor's socket");
        drop(second);
        assert!(!path.exists(), "removed at the end");
    }

    #[test]
    fn what_is_not_ours_stays() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("precious");
        fs::write(&path, "data").expect("write");
        assert!(matches!(FrontEnds::bind(&path, &PLAIN), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).expect("read"), b"data");
        let missing = dir.path().join("no/such/dir");
        assert!(matches!(FrontEnds::bind(&missing, &PLAIN), Err(SocketError::Bind { .. })));
        let nobody = Permissions { group: Some("no-such-group-here".to_owned()), ..PLAIN };
        assert!(matches!(
            FrontEnds::bind(&dir.path().join("g"), &nobody),
            Err(SocketError::Group { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 1, "nothing left behind");
    }

    #[test]
    fn only_unix_sockets_are_taken_as_descriptors() {
        assert!(matches!(FrontEnds::from_fd(-1), Err(SocketError::BadFd(_))));
        assert!(matches!(FrontEnds::from_fd(9999), Err(SocketError::BadFd(_))));
        use std::os::fd::IntoRawFd;
        let file = fs::File::open("/dev/null").expect("open").into_raw_fd();
        assert!(matches!(FrontEnds::from_fd(file), Err(SocketError::BadFd(_))));
        let (ours, _theirs) = UnixStream::pair().expect("pair");
        assert!(matches!(
            FrontEnds::from_fd(ours.into_raw_fd()),
            Ok(FrontEnds::Connected(Some(_)))
        ));
    }
}
