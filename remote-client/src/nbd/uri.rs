//! NBD URIs, by the NBD URI specification (NetworkBlockDevice/nbd, doc/uri.md). Pure
//! text.
//!
//! | form | server |
//! |---|---|
//! | `nbd://HOST[:PORT]/EXPORT` | over TCP, port 10809 unless named |
//! | `nbd+unix:///EXPORT?socket=PATH` | over a Unix socket |
//!
//! EXPORT may be empty, which is the server's default export, and may have slashes.

use std::fmt;
use std::path::PathBuf;

use super::EXPORT_BYTES_MAX;
use crate::uri::{Escaped, HostPort, UriError, absolute, server, unescape};

/// Port of NBD servers (IANA).
const PORT: u16 = 10809;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdServer {
    /// Over TCP.
    Tcp(HostPort),
    /// Over a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for NbdServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(server) => server.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A parsed NBD URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where.
    pub server: NbdServer,
    /// Name of the export; empty: the server's default.
    pub export: String,
}

impl NbdUri {
    /// What tells two disks of a guest apart: the end of the export's name, or of
    /// the server's.
    pub(crate) fn id(&self) -> [u8; 20] {
        let name = match (self.export.as_str(), &self.server) {
            ("", NbdServer::Tcp(server)) => server.to_string(),
            ("", NbdServer::Unix(path)) => path.display().to_string(),
            (export, _) => export.to_owned(),
        };
        let mut start = name.len().saturating_sub(20);
        while !name.is_char_boundary(start) {
            start += 1;
        }
        let tail = &name.as_bytes()[start..];
        let mut id = [0; 20];
        id[..tail.len()].copy_from_slice(tail);
        id
    }
}

/// What follows `nbd://`.
pub(crate) fn tcp(rest: &str) -> Result<NbdUri, UriError> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if let Some((_, query)) = rest.split_once('?') {
        return Err(UriError::Unexpected(query.to_owned(), "nbd"));
    }
    let has_port = match authority.rsplit_once(']') {
        Some((_, behind)) => behind.starts_with(':'),
        None => authority.contains(':'),
    };
    let server = match has_port {
        true => server(authority),
        false => server(&format!("{authority}:{PORT}")),
    };
    let server = server.map_err(|_| UriError::Server(authority.to_owned()))?;
    Ok(NbdUri { server: NbdServer::Tcp(server), export: export(path)? })
}

/// What follows `nbd+unix://`, in `text`.
pub(crate) fn unix(text: &str, rest: &str) -> Result<NbdUri, UriError> {
    let Some(rest) = rest.strip_prefix('/') else {
        let host = rest.split(['/', '?']).next().unwrap_or_default();
        return Err(UriError::Unexpected(host.to_owned(), "nbd+unix"));
    };
    let no_socket = || UriError::NoSocket(text.to_owned());
    let (name, query) = rest.split_once('?').ok_or_else(no_socket)?;
    let mut socket = None;
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("socket", path)) if !path.is_empty() && socket.is_none() => {
                socket = Some(absolute(path)?);
            }
            _ => return Err(UriError::Unexpected(pair.to_owned(), "nbd+unix")),
        }
    }
    let server = NbdServer::Unix(socket.ok_or_else(no_socket)?);
    Ok(NbdUri { server, export: export(name)? })
}

fn export(text: &str) -> Result<String, UriError> {
    let name = unescape(text)?;
    if name.len() > EXPORT_BYTES_MAX {
        return Err(UriError::Export(name.len()));
    }
    Ok(name)
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            NbdServer::Tcp(server) => write!(f, "nbd://{server}/{}", Escaped(&self.export)),
            NbdServer::Unix(path) => {
                let path = path.to_string_lossy();
                write!(f, "nbd+unix:///{}?socket={}", Escaped(&self.export), Escaped(&path))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::VolumeUri;

    #[test]
    fn each_form_parses_and_prints_back() {
        for (text, shown) in [
            ("nbd://h/disk", "nbd://h:10809/disk"),
            ("nbd://h", "nbd://h:10809/"),
            ("nbd://h:1/", "nbd://h:1/"),
            ("nbd://[fe80::1]/a/b", "nbd://[fe80::1]:10809/a/b"),
            ("nbd://[fe80::1]:2/%2Fx", "nbd://[fe80::1]:2//x"),
            ("nbd+unix:///?socket=/run/a%20b", "nbd+unix:///?socket=/run/a%20b"),
            ("nbd+unix:///e?socket=/s", "nbd+unix:///e?socket=/s"),
        ] {
            let uri: VolumeUri = text.parse().expect(text);
            assert_eq!(uri.to_string(), shown);
            assert_eq!(shown.parse(), Ok(uri));
        }
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let long = format!("nbd://h/{}", "e".repeat(4097));
        for (text, part) in [
            ("nbd:///x", "not a server"),
            ("nbd://h:0/x", "not a server"),
            ("nbd://u@h/x", "not a server"),
            ("nbd://h/x?tls-type=psk", "`tls-type=psk` has no place"),
            ("nbd+unix:///x", "add ?socket=/PATH"),
            ("nbd+unix://h/x?socket=/s", "`h` has no place"),
            ("nbd+unix:///x?socket=s", "not an absolute path"),
            ("nbd://h/%zz", "percent escape"),
            (&long, "4097"),
        ] {
            let error = text.parse::<VolumeUri>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_id_tells_disks_apart() {
        let id = |text: &str| match text.parse() {
            Ok(VolumeUri::Nbd(uri)) => uri.id(),
            other => panic!("{other:?}"),
        };
        assert_eq!(&id("nbd://h/vm-1"), b"vm-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&id("nbd://h:1/"), b"h:1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&id("nbd://h/0123456789abcdefghijklm"), b"3456789abcdefghijklm");
    }
}
