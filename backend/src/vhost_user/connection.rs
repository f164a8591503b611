//! The socket of one front-end: frames with passed descriptors in, replies out.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags};

use super::message::{BODY_BYTES_MAX, HEADER_BYTES, Header, MessageError, Request};
use super::refused::Refused;

/// How long the rest of a message may take once its first byte is there, and a
/// reply to be taken: a front-end that stalls in between is broken.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The most descriptors the kernel passes at once (SCM_MAX_FD). With less room
/// the ones that do not fit would make those that do unreadable, and leak them.
const SCM_MAX_FDS: usize = 253;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The front-end closed it between two messages.
    #[error("the front-end closed the connection")]
    Closed,
    /// The socket failed, or the front-end stopped in the middle of a message.
    #[error("the connection to the front-end failed")]
    Socket(#[from] io::Error),
    /// The front-end does not speak the protocol.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A request whose answer the front-end waits for was refused.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// A connected front-end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the socket cannot be configured.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        Ok(Self { stream })
    }

    /// The socket, to wait on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.stream)
    }

    /// The process that connected. `None`: the kernel does not say, or it is in
    /// another namespace of processes.
    #[must_use]
    pub fn peer(&self) -> Option<i32> {
        let credentials =
            socket::getsockopt(&self.stream, socket::sockopt::PeerCredentials).ok()?;
        Some(credentials.pid()).filter(|pid| *pid > 0)
    }

    /// Reads one message. Call when the socket is readable: the first byte is
    /// waited for at most [`MESSAGE_TIMEOUT`].
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is to be dropped then.
    pub fn receive(&mut self) -> Result<(Header, Request), ConnectionError> {
        let mut bytes = [0; HEADER_BYTES];
        let mut fds = Vec::new();
        let got = self.receive_some(&mut bytes, &mut fds)?;
        if got == 0 {
            return Err(ConnectionError::Closed);
        }
        self.stream.read_exact(&mut bytes[got..])?;
        let header = Header::decode(&bytes)?;
        let mut body = [0; BODY_BYTES_MAX];
        let body = &mut body[..header.size];
        if header.size > 0 {
            let got = self.receive_some(body, &mut fds)?;
            self.stream.read_exact(&mut body[got..])?;
        }
        let request = Request::decode(header, body, fds)?;
        Ok((header, request))
    }

    /// One recvmsg, collecting passed descriptors.
    fn receive_some(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut space = nix::cmsg_space!([RawFd; SCM_MAX_FDS]);
        loop {
            let mut iov = [IoSliceMut::new(into)];
            let received = socket::recvmsg::<()>(
                self.stream.as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            );
            let message = match received {
                Ok(message) => message,
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel just made these descriptors for us.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            return Ok(message.bytes);
        }
    }

    /// Sends a reply.
    ///
    /// # Errors
    /// When the socket fails; the connection is to be dropped then.
    pub fn reply(
        &mut self,
        request: u32,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let header = Header::encode(request, true, body.len());
        send(&mut self.stream, &header, body, fd)
    }
}

/// The socket for messages of our own (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub struct BackendChannel(UnixStream);

impl BackendChannel {
    /// Takes over the passed descriptor.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        let stream = UnixStream::from(fd);
        // A front-end that does not read this socket must not stop the device.
        let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
        Self(stream)
    }

    /// Says that the configuration space changed. The front-end reads it anew.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn config_changed(&mut self) -> io::Result<()> {
        let header = Header::encode(super::message::BACKEND_CONFIG_CHANGE, false, 0);
        send(&mut self.0, &header, &[], None)
    }
}

fn send(
    stream: &mut UnixStream,
    header: &[u8],
    body: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| [ControlMessage::ScmRights(raw)]);
    let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |rights| rights.as_slice());
    let total = header.len() + body.len();
    let sent = loop {
        let iov = [IoSlice::new(header), IoSlice::new(body)];
        match socket::sendmsg::<()>(stream.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(sent) => break sent,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if sent == total {
        return Ok(());
    }
    let rest: Vec<u8> = header.iter().chain(body).skip(sent).copied().collect();
    stream.write_all(&rest)
}
