//! Volume URIs: which driver, which storage, which volume. Pure text; nothing
//! here resolves a name or opens a file.
//!
//! | form | driver |
//! |---|---|
//! | `baton://HOST:PORT/VOLUME`, `baton://A:P,B:P/VOLUME` | Baton over TCP |
//! | `baton+unix:///VOLUME?socket=PATH` | Baton over a Unix socket |
//! | `nbd://HOST[:PORT]/EXPORT` | NBD over TCP: [`NbdUri`] |
//! | `nbd+unix:///EXPORT?socket=PATH` | NBD over a Unix socket |
//! | `nbds://...`, `nbds+unix://...` | the same through TLS |
//! | `file:///PATH` | a local file or block device |
//! | `rbd://POOL/IMAGE`, `rbd://POOL/IMAGE@SNAPSHOT` | Ceph RBD |

mod rbd;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use baton_protocol::message::VOLUME_NAME_BYTES_MAX;

use crate::nbd::uri as nbd;
pub use crate::nbd::uri::{NbdServer, NbdUri, TlsAs, TlsUri};
pub use rbd::RbdUri;

/// Where a storage server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Name or address, without the brackets of an IPv6 address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A parsed volume URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeUri {
    /// A volume on storage servers reached over TCP.
    Baton {
        /// At least one; tried in this order.
        servers: Vec<HostPort>,
        /// Name of the volume.
        volume: String,
    },
    /// A volume on the storage server of this host.
    BatonUnix {
        /// The server's socket.
        socket: PathBuf,
        /// Name of the volume.
        volume: String,
    },
    /// An export of an NBD server.
    Nbd(NbdUri),
    /// A local file or block device.
    File {
        /// Absolute.
        path: PathBuf,
    },
    /// A block image of a Ceph cluster.
    Rbd(RbdUri),
}

/// Why a text is not a volume URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// No `SCHEME://`.
    #[error(
        "`{0}` is not a volume URI; write baton://HOST:PORT/VOLUME, baton+unix:///VOLUME?socket=PATH, nbd://HOST/EXPORT, rbd://POOL/IMAGE or file:///PATH"
    )]
    NoScheme(String),
    /// A scheme that this build has no driver for.
    #[error(
        "no driver for `{0}://` volumes; use baton://, baton+unix://, nbd://, nbd+unix://, nbds://, nbds+unix://, rbd:// or file://"
    )]
    Scheme(String),
    /// A server without a host or a port.
    #[error("`{0}` is not a server; write HOST:PORT, with an IPv6 address in brackets")]
    Server(String),
    /// No volume name, or one that no server accepts.
    #[error("`{0}` is not a volume name; it needs 1 to {VOLUME_NAME_BYTES_MAX} bytes without `/`")]
    Volume(String),
    /// No pool, image, snapshot, user or namespace, or one that Ceph's tools cannot name.
    #[error(
        "`{0}` is not a name in Ceph; write rbd://POOL/IMAGE or rbd://POOL/IMAGE@SNAPSHOT, and a namespace as ?namespace=NAME"
    )]
    RbdName(String),
    /// Longer than the protocol allows.
    #[error("an export's name may have 4096 bytes; this one has {0}")]
    Export(usize),
    /// A Unix socket has no name that a certificate could be for.
    #[error("`{0}` does not say whom the server's certificate is for; add &tls-hostname=NAME")]
    NoHostname(String),
    /// What a TLS parameter cannot be.
    #[error("`{0}` is not a setting of TLS; {1}")]
    Tls(String, &'static str),
    /// `baton+unix` without `?socket=`.
    #[error("`{0}` does not name the server's socket; add ?socket=/PATH")]
    NoSocket(String),
    /// A path that depends on where the program was started.
    #[error("`{0}` is not an absolute path")]
    Relative(String),
    /// Something this scheme has no use for.
    #[error("`{0}` has no place in a {1}:// URI")]
    Unexpected(String, &'static str),
    /// A `%` that is not followed by two hexadecimal digits, or a zero byte.
    #[error("`{0}` has a bad percent escape; write a percent sign as %25")]
    Escape(String),
}

impl FromStr for VolumeUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| UriError::NoScheme(text.to_owned()))?;
        match scheme {
            "baton" => baton(rest),
            "baton+unix" => baton_unix(text, rest),
            "nbd" => nbd::tcp(rest, "nbd").map(VolumeUri::Nbd),
            "nbds" => nbd::tcp(rest, "nbds").map(VolumeUri::Nbd),
            "nbd+unix" => nbd::unix(text, rest, "nbd+unix").map(VolumeUri::Nbd),
            "nbds+unix" => nbd::unix(text, rest, "nbds+unix").map(VolumeUri::Nbd),
            "file" => file(rest),
            "rbd" => rbd::parse(rest),
            _ => Err(UriError::Scheme(scheme.to_owned())),
        }
    }
}

fn baton(rest: &str) -> Result<VolumeUri, UriError> {
    let (servers, volume) = rest.split_once('/').unwrap_or((rest, ""));
    let servers = servers.split(',').map(server).collect::<Result<_, _>>()?;
    if let Some((_, query)) = volume.split_once('?') {
        return Err(UriError::Unexpected(query.to_owned(), "baton"));
    }
    Ok(VolumeUri::Baton { servers, volume: volume_name(volume)? })
}

pub(crate) fn server(text: &str) -> Result<HostPort, UriError> {
    let bad = || UriError::Server(text.to_owned());
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or_else(bad)?,
        // Two colons without brackets: where does the address end?
        None if host.contains(':') => return Err(bad()),
        None => host,
    };
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || "@?#%[]".contains(c)) {
        return Err(bad());
    }
    Ok(HostPort { host: host.to_owned(), port })
}

fn volume_name(text: &str) -> Result<String, UriError> {
    let name = unescape(text)?;
    if name.is_empty() || name.len() > VOLUME_NAME_BYTES_MAX || name.contains('/') {
        return Err(UriError::Volume(name));
    }
    Ok(name)
}

fn baton_unix(text: &str, rest: &str) -> Result<VolumeUri, UriError> {
    let Some(rest) = rest.strip_prefix('/') else {
        let host = rest.split(['/', '?']).next().unwrap_or_default();
        return Err(UriError::Unexpected(host.to_owned(), "baton+unix"));
    };
    let no_socket = || UriError::NoSocket(text.to_owned());
    let (volume, query) = rest.split_once('?').ok_or_else(no_socket)?;
    let mut socket = None;
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("socket", path)) if !path.is_empty() && socket.is_none() => {
                socket = Some(absolute(path)?);
            }
            _ => return Err(UriError::Unexpected(pair.to_owned(), "baton+unix")),
        }
    }
    Ok(VolumeUri::BatonUnix { socket: socket.ok_or_else(no_socket)?, volume: volume_name(volume)? })
}

fn file(rest: &str) -> Result<VolumeUri, UriError> {
    // `file://PATH` with a host part would silently name another file.
    Ok(VolumeUri::File { path: absolute(rest)? })
}

pub(crate) fn absolute(text: &str) -> Result<PathBuf, UriError> {
    let path = unescape(text)?;
    if !path.starts_with('/') || path.len() == 1 {
        return Err(UriError::Relative(path));
    }
    Ok(PathBuf::from(path))
}

pub(crate) fn unescape(text: &str) -> Result<String, UriError> {
    let bad = || UriError::Escape(text.to_owned());
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
            let (high, low) = (digit().ok_or_else(bad)?, digit().ok_or_else(bad)?);
            u8::try_from(high << 4 | low).map_err(|_| bad())?
        } else {
            byte
        };
        if byte == 0 {
            return Err(bad());
        }
        out.push(byte);
    }
    String::from_utf8(out).map_err(|_| bad())
}

/// Escapes what would end a path or a name early.
pub(crate) struct Escaped<'a>(pub(crate) &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '%' | '?' | '&' | '#' | ' ' => write!(f, "%{:02X}", u32::from(c))?,
                _ => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

fn shown(path: &Path) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}

impl fmt::Display for VolumeUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Baton { servers, volume } => {
                f.write_str("baton://")?;
                for (i, server) in servers.iter().enumerate() {
                    write!(f, "{}{server}", if i == 0 { "" } else { "," })?;
                }
                write!(f, "/{}", Escaped(volume))
            }
            Self::BatonUnix { socket, volume } => {
                let socket = shown(socket);
                write!(f, "baton+unix:///{}?socket={}", Escaped(volume), Escaped(&socket))
            }
            Self::Nbd(uri) => uri.fmt(f),
            Self::File { path } => write!(f, "file://{}", Escaped(&shown(path))),
            Self::Rbd(uri) => uri.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<VolumeUri, UriError> {
        text.parse()
    }

    fn at(host: &str, port: u16) -> HostPort {
        HostPort { host: host.to_owned(), port }
    }

    #[test]
    fn each_form_parses_and_prints_back() {
        for (text, uri) in [
            (
                "baton://store1:7000/vm-1",
                VolumeUri::Baton { servers: vec![at("store1", 7000)], volume: "vm-1".to_owned() },
            ),
            (
                "baton://10.0.0.1:1,[fe80::1]:2/d",
                VolumeUri::Baton {
                    servers: vec![at("10.0.0.1", 1), at("fe80::1", 2)],
                    volume: "d".to_owned(),
                },
            ),
            (
                "baton+unix:///vm?socket=/run/a%20b.sock",
                VolumeUri::BatonUnix {
                    socket: PathBuf::from("/run/a b.sock"),
                    volume: "vm".to_owned(),
                },
            ),
            ("file:///tmp/x%25y", VolumeUri::File { path: PathBuf::from("/tmp/x%y") }),
        ] {
            assert_eq!(parse(text), Ok(uri.clone()), "{text}");
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let long = format!("baton://h:1/{}", "v".repeat(65));
        for (text, part) in [
            ("", "not a volume URI"),
            ("/dev/sda", "not a volume URI"),
            ("sheepdog://pool/image", "no driver for `sheepdog://`"),
            ("baton://h/v", "not a server"),
            ("baton://h:0/v", "not a server"),
            ("baton://h:65536/v", "not a server"),
            ("baton://:1/v", "not a server"),
            ("baton://h:1,/v", "not a server"),
            ("baton://fe80::1:2/v", "IPv6 address in brackets"),
            ("baton://u@h:1/v", "not a server"),
            ("baton://h:1", "not a volume name"),
            ("baton://h:1/", "not a volume name"),
            ("baton://h:1/a/b", "not a volume name"),
            (&long, "not a volume name"),
            ("baton://h:1/v?x=1", "`x=1` has no place in a baton:// URI"),
            ("baton+unix:///v", "add ?socket=/PATH"),
            ("baton+unix://h/v?socket=/s", "`h` has no place"),
            ("baton+unix:///v?socket=s", "not an absolute path"),
            ("baton+unix:///v?sock=/s", "`sock=/s` has no place"),
            ("baton+unix:///?socket=/s", "not a volume name"),
            ("file://x", "not an absolute path"),
            ("file:///", "not an absolute path"),
            ("file:///a%2", "percent escape"),
            ("file:///a%00", "percent escape"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "(baton|baton\\+unix|file)://[ -~]{0,40}") {
            if let Ok(uri) = parse(&text) {
                prop_assert_eq!(parse(&uri.to_string()), Ok(uri));
            }
        }
    }
}
