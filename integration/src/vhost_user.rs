//! vhost-user messages as a front-end sends them: bytes and descriptors on a Unix socket.
//!
//! Written from the text of the specification and on purpose without the crate that Baton's backend uses, so that a
//! misreading there is not shared here. Checks nothing before it sends: a test may send whatever it likes.
//!
//! A message is a header of three little-endian u32 (request, flags, payload bytes), then the payload.

use anyhow::{Context, Result, bail};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Request numbers, front-end to back-end.
#[allow(missing_docs, reason = "names of the specification")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Requests of the back-end.
#[allow(missing_docs, reason = "names of the specification")]
pub mod backend_request {
    pub const CONFIG_CHANGE_MSG: u32 = 2;
}

/// Protocol feature bits.
#[allow(missing_docs, reason = "names of the specification")]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Virtio and vhost feature bits.
#[allow(missing_docs, reason = "names of the specification")]
pub mod feature {
    pub const BLK_SIZE_MAX: u64 = 1 << 1;
    pub const BLK_SEG_MAX: u64 = 1 << 2;
    pub const BLK_RO: u64 = 1 << 5;
    pub const BLK_BLK_SIZE: u64 = 1 << 6;
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const BLK_TOPOLOGY: u64 = 1 << 10;
    pub const BLK_CONFIG_WCE: u64 = 1 << 11;
    pub const BLK_MQ: u64 = 1 << 12;
    pub const BLK_DISCARD: u64 = 1 << 13;
    pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

const HEADER_BYTES: usize = 12;
const FLAG_VERSION: u32 = 1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// No message of the protocol is longer; more means that the stream is out of step.
const PAYLOAD_MAX: usize = 1 << 16;
/// The most descriptors in a message.
const FDS_MAX: usize = 32;

/// One received message.
#[derive(Debug)]
pub struct Message {
    /// Request number.
    pub request: u32,
    /// Flags with the version.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one u64.
    pub fn u64(&self) -> Result<u64> {
        let bytes = self.payload.get(..8).and_then(|b| b.try_into().ok());
        let bytes =
            bytes.with_context(|| format!("the reply to request {} has no u64", self.request))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// A connection to a back-end, or the other end of its request channel.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Connects to a back-end's socket.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        Self::new(stream)
    }

    /// Wraps a connected socket.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut channel = Self { stream };
        channel.set_timeout(Duration::from_secs(20))?;
        Ok(channel)
    }

    /// How long a reply is waited for.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))?;
        Ok(())
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends one well-formed message; `flags` are added to the version.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let size = u32::try_from(payload.len()).context("a payload is short")?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [request, FLAG_VERSION | flags, size] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds).with_context(|| format!("cannot send request {request}"))
    }

    /// Sends any bytes.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control: &[ControlMessage<'_>] =
            if raw.is_empty() { &[] } else { &[ControlMessage::ScmRights(&raw)] };
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        if sent == bytes.len() {
            Ok(())
        } else {
            bail!("only {sent} of {} bytes were sent", bytes.len())
        }
    }

    /// Receives one message.
    pub fn receive(&self) -> Result<Message> {
        let mut header = [0; HEADER_BYTES];
        let mut space = cmsg_space!([RawFd; FDS_MAX]);
        let mut fds = Vec::new();
        let received = {
            let mut buffers = [IoSliceMut::new(&mut header)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(self.stream.as_raw_fd(), &mut buffers, Some(&mut space), flags)
                    .context("no message came")?;
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            message.bytes
        };
        if received == 0 {
            bail!("the other side closed the connection");
        }
        (&self.stream).read_exact(&mut header[received..])?;
        let word =
            |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().expect("four bytes"));
        let size = word(2) as usize;
        if word(1) & 3 != FLAG_VERSION || size > PAYLOAD_MAX {
            bail!("this is no vhost-user message: {header:02x?}");
        }
        let mut payload = vec![0; size];
        (&self.stream).read_exact(&mut payload).context("the message is cut short")?;
        Ok(Message { request: word(0), flags: word(1), payload, fds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_and_its_descriptors_arrive() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        let file = tempfile::tempfile().unwrap();
        a.send(request::SET_VRING_KICK, FLAG_NEED_REPLY, &7_u64.to_le_bytes(), &[file.as_fd()])
            .unwrap();
        let message = b.receive().unwrap();
        assert_eq!((message.request, message.flags), (12, 1 | 8));
        assert_eq!(message.u64().unwrap(), 7);
        assert_eq!(message.fds.len(), 1);
    }

    #[test]
    fn garbage_and_silence_are_errors() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, mut b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        a.send_bytes(&[0xff; HEADER_BYTES], &[]).unwrap();
        assert!(b.receive().unwrap_err().to_string().contains("no vhost-user message"));
        b.set_timeout(Duration::from_millis(20)).unwrap();
        assert!(b.receive().is_err());
        drop(a);
        assert!(b.receive().unwrap_err().to_string().contains("closed"));
    }
}
