//! TLS for the NBD driver, by STARTTLS: bytes in, bytes out, over the link's socket.
//!
//! OpenSSL, because the servers' other way of knowing a client, a pre-shared key, is
//! not in rustls; one library for both. It never sees the socket: the link moves
//! ciphertext between socket and [`Pipe`], as it moves everything else.
//!
//! ```text
//!  guest memory -> seal -> outbox -> socket        socket -> inbox -> open -> session
//! ```
//!
//! Certificates and keys are read for each connection, so that renewed ones are used.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use openssl::error::ErrorStack;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslStream,
    SslVerifyMode, SslVersion,
};
use openssl::x509::X509VerifyResult;

use super::uri::{TlsAs, TlsUri};
use crate::cursor::Cursor;
use crate::socket::{recvmsg, sendmsg};

/// A record of TLS holds so much, bytes.
const RECORD_BYTES: usize = 16 << 10;
/// Sealed and not yet sent: enough for the socket to be kept full, bytes.
const OUTBOX_BYTES: usize = 256 << 10;
/// One receive, bytes.
const INBOX_BYTES: usize = 128 << 10;
/// Longest pre-shared key that OpenSSL takes, bytes.
const KEY_BYTES_MAX: usize = 256;

/// Why there is no TLS with a server. Each is a sentence that goes on from "no TLS
/// with the server: ".
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot read {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} holds no usable certificate or key: {text}", path.display())]
    Certificate { path: PathBuf, text: String },
    #[error("the key {} does not belong to the certificate beside it", .0.display())]
    Pair(PathBuf),
    #[error("{} has no user `{user}`; add a line `{user}:KEY`, as psktool does", path.display())]
    NoUser { path: PathBuf, user: String },
    #[error("the key of user `{user}` in {} is not hexadecimal, or too long", path.display())]
    Key { path: PathBuf, user: String },
    #[error("its certificate has expired")]
    Expired,
    #[error("its certificate is not valid yet; compare the clocks")]
    NotYetValid,
    #[error("its certificate is not for `{0}`; name what it is for with tls-hostname=NAME")]
    OtherHost(String),
    #[error("no authority that we trust has signed its certificate ({0}); check tls-certificates")]
    Untrusted(String),
    #[error("it does not take user `{0}` with this key; check the user and the key at both ends")]
    KeyRefused(String),
    #[error("it refuses our certificate, or the lack of one ({0})")]
    ClientRefused(String),
    #[error(
        "it hung up without a reason; its log has one: perhaps it wants a certificate of ours, or has keys and no certificates"
    )]
    HungUp,
    #[error("the handshake failed: {0}")]
    Handshake(String),
    #[error("TLS cannot be set up: {0}")]
    Library(#[from] ErrorStack),
}

/// How to begin TLS with a server.
#[derive(Clone, Debug)]
pub(crate) struct TlsSettings {
    uri: TlsUri,
    /// Whom the server's certificate has to be for; `None`: anybody.
    name: Option<String>,
}

impl TlsSettings {
    pub(super) fn new(uri: &TlsUri, host: Option<&str>) -> Self {
        let name = uri.hostname.as_deref().or(host).filter(|_| uri.verify);
        Self { uri: uri.clone(), name: name.map(str::to_owned) }
    }

    /// Begins on a new connection.
    pub(super) fn start(&self) -> Result<Channel, TlsError> {
        let mut context = SslContextBuilder::new(SslMethod::tls_client())?;
        context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        // Buffers of an idle connection are given back.
        context.set_mode(SslMode::RELEASE_BUFFERS);
        let verify = if self.uri.verify { SslVerifyMode::PEER } else { SslVerifyMode::NONE };
        context.set_verify(verify);
        match &self.uri.auth {
            TlsAs::X509 { certificates } => x509(&mut context, certificates.as_deref())?,
            TlsAs::Psk { file, user } => psk(&mut context, file, user)?,
        }
        let context: SslContext = context.build();
        let mut ssl = Ssl::new(&context)?;
        if let (Some(name), TlsAs::X509 { .. }) = (&self.name, &self.uri.auth) {
            match name.parse() {
                Ok(address) => ssl.param_mut().set_ip(address)?,
                Err(_) => {
                    ssl.param_mut().set_host(name)?;
                    ssl.set_hostname(name)?;
                }
            }
        }
        ssl.set_connect_state();
        Ok(Channel {
            settings: self.clone(),
            stream: SslStream::new(ssl, Pipe::default())?,
            is_open: false,
            record: Vec::with_capacity(RECORD_BYTES),
        })
    }
}

/// The names of the files are libvirt's, QEMU's and libnbd's.
fn x509(context: &mut SslContextBuilder, folder: Option<&Path>) -> Result<(), TlsError> {
    let Some(folder) = folder else { return Ok(context.set_default_verify_paths()?) };
    let [ca, cert, key] =
        ["ca-cert.pem", "client-cert.pem", "client-key.pem"].map(|name| folder.join(name));
    let bad = |path: &Path| {
        let path = path.to_owned();
        move |error: ErrorStack| TlsError::Certificate { path, text: text_of(&error) }
    };
    readable(&ca)?;
    context.set_ca_file(&ca).map_err(bad(&ca))?;
    // A client without a certificate is one that the server may not ask for one.
    if cert.exists() || key.exists() {
        readable(&cert)?;
        readable(&key)?;
        context.set_certificate_chain_file(&cert).map_err(bad(&cert))?;
        let set = context.set_private_key_file(&key, SslFiletype::PEM);
        set.map_err(|error| match text_of(&error) {
            text if text.contains("mismatch") => TlsError::Pair(key.clone()),
            text => TlsError::Certificate { path: key.clone(), text },
        })?;
    }
    Ok(())
}

/// OpenSSL would say only that there is "no such file".
fn readable(path: &Path) -> Result<(), TlsError> {
    std::fs::File::open(path)
        .map(|_| ())
        .map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn psk(context: &mut SslContextBuilder, file: &Path, user: &str) -> Result<(), TlsError> {
    let text = std::fs::read_to_string(file)
        .map_err(|source| TlsError::File { path: file.to_owned(), source })?;
    let key = key_of(&text, user)
        .ok_or_else(|| TlsError::NoUser { path: file.to_owned(), user: user.to_owned() })?;
    let key = key.ok_or_else(|| TlsError::Key { path: file.to_owned(), user: user.to_owned() })?;
    // TLS 1.2: nothing but keys. TLS 1.3 has no such names: a server that does not take
    // the key shows a certificate, which nobody here has signed.
    context.set_cipher_list("kECDHEPSK:kDHEPSK:kPSK:!eNULL:!aNULL+kECDHE")?;
    context.set_verify(SslVerifyMode::PEER);
    let user = user.to_owned();
    context.set_psk_client_callback(move |_, _, identity, out| {
        // Room for the zero behind it.
        if identity.len() > user.len() && out.len() >= key.len() {
            identity[..user.len()].copy_from_slice(user.as_bytes());
            identity[user.len()] = 0;
            out[..key.len()].copy_from_slice(&key);
            return Ok(key.len());
        }
        Ok(0)
    });
    Ok(())
}

/// The key of `user` in a file of lines `USER:HEX`: `None` without such a line,
/// `Some(None)` when what follows is no key.
fn key_of(text: &str, user: &str) -> Option<Option<Vec<u8>>> {
    let line = text.lines().find_map(|line| {
        line.split_once(':').filter(|(name, _)| *name == user).map(|(_, key)| key.trim())
    })?;
    let digits: Option<Vec<u8>> =
        line.chars().map(|c| c.to_digit(16).and_then(|n| u8::try_from(n).ok())).collect();
    let digits = digits.filter(|d| !d.is_empty() && d.len() % 2 == 0);
    let key = digits.map(|d| d.chunks(2).map(|two| two[0] << 4 | two[1]).collect::<Vec<u8>>());
    Some(key.filter(|key| key.len() <= KEY_BYTES_MAX))
}

/// What OpenSSL reads and writes instead of a socket.
#[derive(Debug, Default)]
struct Pipe {
    inbox: Vec<u8>,
    /// Of the inbox, read.
    read: usize,
    outbox: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let rest = &self.inbox[self.read..];
        if rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = rest.len().min(out.len());
        out[..n].copy_from_slice(&rest[..n]);
        self.read += n;
        if self.read == self.inbox.len() {
            self.inbox.clear();
            self.read = 0;
        }
        Ok(n)
    }
}

impl Write for Pipe {
    /// Takes everything: who seals looks at the outbox before.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outbox.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// TLS on one connection.
pub(crate) struct Channel {
    settings: TlsSettings,
    stream: SslStream<Pipe>,
    is_open: bool,
    /// Scratch: what is sealed next.
    record: Vec<u8>,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("is_open", &self.is_open).finish_non_exhaustive()
    }
}

impl Channel {
    /// The handshake is done.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Sealed, and not sent.
    pub(super) fn has_sealed(&self) -> bool {
        !self.stream.get_ref().outbox.is_empty()
    }

    /// Goes on with the handshake as far as it goes.
    pub(super) fn shake(&mut self) -> Result<(), TlsError> {
        match self.stream.do_handshake() {
            Ok(()) => {
                self.is_open = true;
                Ok(())
            }
            Err(error) if is_wait(&error) => Ok(()),
            Err(error) => Err(self.why(&error)),
        }
    }

    /// Seals some of the bytes that `iov` names; how many.
    pub(super) fn seal(&mut self, iov: &[libc::iovec], mut left: usize) -> Result<usize, TlsError> {
        let (mut at, mut sealed) = (Cursor::START, 0);
        while left > 0 && self.stream.get_ref().outbox.len() < OUTBOX_BYTES {
            self.record.clear();
            while left > 0 && self.record.len() < RECORD_BYTES {
                let part = at.part(iov, left.min(RECORD_BYTES - self.record.len()));
                let begin = self.record.len();
                self.record.resize(begin + part.iov_len, 0);
                // SAFETY: the session's own memory, or the guest's, which the submitter
                // vouches for until completion. The guest may change it meanwhile: it is
                // read through a raw pointer, once.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        part.iov_base.cast::<u8>(),
                        self.record[begin..].as_mut_ptr(),
                        part.iov_len,
                    );
                }
                at.advance(iov, part.iov_len);
                left -= part.iov_len;
            }
            // Everything is taken: the pipe never blocks.
            self.stream.ssl_write(&self.record).map_err(|error| self.why(&error))?;
            sealed += self.record.len();
        }
        Ok(sealed)
    }

    /// Sends what is sealed; true: all of it.
    pub(super) fn flush(&mut self, fd: &OwnedFd) -> nix::Result<bool> {
        let outbox = &mut self.stream.get_mut().outbox;
        let mut sent = 0;
        while sent < outbox.len() {
            let rest = &mut outbox[sent..];
            let iov_base = rest.as_mut_ptr().cast();
            match sendmsg(fd, &mut [libc::iovec { iov_base, iov_len: rest.len() }]) {
                Ok(n) => sent += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        outbox.drain(..sent);
        Ok(outbox.is_empty())
    }

    /// Takes in what arrived; how many bytes, zero at the end of the connection.
    pub(super) fn receive(&mut self, fd: &OwnedFd) -> nix::Result<usize> {
        let inbox = &mut self.stream.get_mut().inbox;
        let begin = inbox.len();
        inbox.resize(begin + INBOX_BYTES, 0);
        let iov_base = inbox[begin..].as_mut_ptr().cast();
        let got = recvmsg(fd, &mut [libc::iovec { iov_base, iov_len: INBOX_BYTES }]);
        inbox.truncate(begin + *got.as_ref().unwrap_or(&0));
        got
    }

    /// What a full [`Channel::receive`] takes, bytes.
    pub(super) const RECEIVE_BYTES: usize = INBOX_BYTES;

    /// Plain bytes of what arrived: `None`, there are no more for now; zero, the server
    /// has ended the conversation.
    pub(super) fn open(&mut self, into: &mut [u8]) -> Result<Option<usize>, TlsError> {
        match self.stream.ssl_read(into) {
            Ok(n) => Ok(Some(n)),
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(Some(0)),
            Err(error) if is_wait(&error) => Ok(None),
            Err(error) => Err(self.why(&error)),
        }
    }

    /// Says goodbye, as TLS has it.
    pub(super) fn close(&mut self) {
        let _ = self.stream.shutdown();
    }

    /// The server closed the connection before there was an export: GnuTLS servers
    /// say nothing else to a key or a certificate that they do not take.
    pub(super) fn hung_up(&self) -> TlsError {
        match &self.settings.uri.auth {
            TlsAs::Psk { user, .. } if !self.is_open => TlsError::KeyRefused(user.clone()),
            _ => TlsError::HungUp,
        }
    }

    fn why(&self, error: &openssl::ssl::Error) -> TlsError {
        let text = error.ssl_error().map_or_else(|| error.to_string(), text_of);
        let verified = self.stream.ssl().verify_result();
        match &self.settings.uri.auth {
            TlsAs::Psk { user, .. } => {
                // The server showed a certificate, or ended the handshake.
                let refused = verified != X509VerifyResult::OK || text.contains("alert");
                if refused { TlsError::KeyRefused(user.clone()) } else { TlsError::Handshake(text) }
            }
            TlsAs::X509 { .. } if self.settings.uri.verify && verified != X509VerifyResult::OK => {
                untrusted(verified, self.settings.name.as_deref())
            }
            TlsAs::X509 { .. } if text.contains("alert") => TlsError::ClientRefused(text),
            TlsAs::X509 { .. } => TlsError::Handshake(text),
        }
    }
}

/// Numbers of x509_vfy.h.
fn untrusted(verified: X509VerifyResult, name: Option<&str>) -> TlsError {
    match verified.as_raw() {
        9 => TlsError::NotYetValid,
        10 => TlsError::Expired,
        62 | 64 => TlsError::OtherHost(name.unwrap_or_default().to_owned()),
        _ => TlsError::Untrusted(verified.error_string().to_owned()),
    }
}

fn is_wait(error: &openssl::ssl::Error) -> bool {
    matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE)
}

/// The library's reasons, without its codes and files.
fn text_of(error: &ErrorStack) -> String {
    let reasons: Vec<_> = error.errors().iter().filter_map(openssl::error::Error::reason).collect();
    if reasons.is_empty() { error.to_string() } else { reasons.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_file_as_psktool_writes_it() {
        let text = "alice:00ff10\nbob:xyz\ncarol:123\ndave:\n";
        assert_eq!(key_of(text, "alice"), Some(Some(vec![0, 255, 16])));
        for user in ["bob", "carol", "dave"] {
            assert_eq!(key_of(text, user), Some(None), "{user}");
        }
        assert_eq!(key_of(text, "ali"), None);
        let long = format!("long:{}", "ab".repeat(257));
        assert_eq!(key_of(&long, "long"), Some(None));
    }
}
