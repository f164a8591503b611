//! NBD URIs, by the NBD URI specification (NetworkBlockDevice/nbd, doc/uri.md). Pure
//! text.
//!
//! | form | server |
//! |---|---|
//! | `nbd://HOST[:PORT]/EXPORT` | over TCP, port 10809 unless named |
//! | `nbd+unix:///EXPORT?socket=PATH` | over a Unix socket |
//! | `nbds://[USER@]HOST[:PORT]/EXPORT`, `nbds+unix://[USER@]/EXPORT?socket=PATH` | the same through TLS |
//!
//! Of the standard's parameters: `tls-type=x509|psk`, `tls-hostname=NAME`,
//! `tls-verify-peer=0|1`; as libnbd has them: `tls-certificates=FOLDER`,
//! `tls-psk-file=FILE`.
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

/// How the two ends know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsAs {
    /// By certificates.
    X509 {
        /// Folder with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` for a
        /// server that asks for them. `None`: the authorities that this host trusts.
        certificates: Option<PathBuf>,
    },
    /// By a key that both have.
    Psk {
        /// Lines `USER:HEX`.
        file: PathBuf,
        /// Which of them.
        user: String,
    },
}

/// What a URI says of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsUri {
    /// How the two ends know each other.
    pub auth: TlsAs,
    /// Whom the certificate is for, if not the server's host.
    pub hostname: Option<String>,
    /// The certificate is looked at.
    pub verify: bool,
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
    /// `nbds`: nothing is said in clear text.
    pub tls: Option<TlsUri>,
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

/// What follows `nbd://` or `nbds://`.
pub(crate) fn tcp(rest: &str, scheme: &'static str) -> Result<NbdUri, UriError> {
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let bad = || UriError::Server(authority.to_owned());
    let (user, place) = user_of(authority, scheme).ok_or_else(bad)?;
    let has_port = match place.rsplit_once(']') {
        Some((_, behind)) => behind.starts_with(':'),
        None => place.contains(':'),
    };
    let server = match has_port {
        true => server(place),
        false => server(&format!("{place}:{PORT}")),
    };
    let server = server.map_err(|_| bad())?;
    let mut query = Query::parse(query, scheme)?;
    if let Some(socket) = query.socket.take() {
        let text = format!("socket={}", socket.display());
        return Err(UriError::Unexpected(text, scheme));
    }
    let tls = query.tls(user)?;
    Ok(NbdUri { tls, server: NbdServer::Tcp(server), export: export(path)? })
}

/// What follows `nbd+unix://` or `nbds+unix://`, in `text`.
pub(crate) fn unix(text: &str, rest: &str, scheme: &'static str) -> Result<NbdUri, UriError> {
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let elsewhere = || UriError::Unexpected(authority.to_owned(), scheme);
    let (user, place) = user_of(authority, scheme).ok_or_else(elsewhere)?;
    let path = rest[authority.len()..].strip_prefix('/').filter(|_| place.is_empty());
    let path = path.ok_or_else(elsewhere)?;
    let no_socket = || UriError::NoSocket(text.to_owned());
    let (name, query) = path.split_once('?').ok_or_else(no_socket)?;
    let mut query = Query::parse(Some(query), scheme)?;
    let server = NbdServer::Unix(query.socket.take().ok_or_else(no_socket)?);
    let tls = query.tls(user)?;
    if let Some(TlsUri { auth: TlsAs::X509 { .. }, hostname: None, verify: true }) = &tls {
        return Err(UriError::NoHostname(text.to_owned()));
    }
    Ok(NbdUri { tls, server, export: export(name)? })
}

/// The user and the rest of an authority. Only TLS knows users.
fn user_of<'a>(authority: &'a str, scheme: &str) -> Option<(Option<String>, &'a str)> {
    match authority.rsplit_once('@') {
        None => Some((None, authority)),
        Some((user, place)) if scheme.starts_with("nbds") && !user.is_empty() => {
            Some((Some(unescape(user).ok()?), place))
        }
        Some(_) => None,
    }
}

/// What follows the question mark.
struct Query {
    scheme: &'static str,
    socket: Option<PathBuf>,
    kind: Option<String>,
    hostname: Option<String>,
    verify: Option<bool>,
    certificates: Option<PathBuf>,
    psk_file: Option<PathBuf>,
}

impl Query {
    fn parse(text: Option<&str>, scheme: &'static str) -> Result<Self, UriError> {
        let mut query = Self {
            scheme,
            socket: None,
            kind: None,
            hostname: None,
            verify: None,
            certificates: None,
            psk_file: None,
        };
        for pair in text.into_iter().flat_map(|text| text.split('&')) {
            let unexpected = || UriError::Unexpected(pair.to_owned(), scheme);
            let (key, value) = pair.split_once('=').ok_or_else(unexpected)?;
            if value.is_empty() || (key != "socket" && !scheme.starts_with("nbds")) {
                return Err(unexpected());
            }
            let before = match key {
                "socket" => query.socket.replace(absolute(value)?).is_some(),
                "tls-type" => query.kind.replace(unescape(value)?).is_some(),
                "tls-hostname" => query.hostname.replace(unescape(value)?).is_some(),
                "tls-verify-peer" => {
                    let verify = match value {
                        "1" | "true" => true,
                        "0" | "false" => false,
                        _ => return Err(UriError::Tls(pair.to_owned(), "write 0 or 1")),
                    };
                    query.verify.replace(verify).is_some()
                }
                "tls-certificates" => query.certificates.replace(absolute(value)?).is_some(),
                "tls-psk-file" => query.psk_file.replace(absolute(value)?).is_some(),
                _ => return Err(unexpected()),
            };
            if before {
                return Err(unexpected());
            }
        }
        Ok(query)
    }

    fn tls(self, user: Option<String>) -> Result<Option<TlsUri>, UriError> {
        let wrong = |what: &str, why| Err(UriError::Tls(what.to_owned(), why));
        if !self.scheme.starts_with("nbds") {
            return Ok(None);
        }
        let kind = match (self.kind.as_deref(), &self.psk_file) {
            (Some(kind), _) => kind,
            (None, Some(_)) => "psk",
            (None, None) => "x509",
        };
        let auth = match (kind, self.psk_file.clone(), self.certificates) {
            ("psk", Some(file), None) => {
                let Some(user) = user.or_else(local_user) else {
                    return wrong("tls-type=psk", "name the user: nbds://USER@HOST/EXPORT");
                };
                if self.hostname.is_some() || self.verify.is_some() {
                    return wrong(
                        "tls-psk-file",
                        "a key needs neither a host's name nor tls-verify-peer",
                    );
                }
                TlsAs::Psk { file, user }
            }
            ("psk", None, _) => return wrong("tls-type=psk", "add tls-psk-file=/PATH"),
            ("x509", None, certificates) if user.is_none() => TlsAs::X509 { certificates },
            ("x509", None, _) => return wrong("a user", "only tls-psk-file knows users"),
            ("psk" | "x509", ..) => {
                return wrong("tls-psk-file", "choose a key or certificates");
            }
            // It protects from nobody who can change packets.
            _ => return wrong(&format!("tls-type={kind}"), "use x509 or psk"),
        };
        Ok(Some(TlsUri { auth, hostname: self.hostname, verify: self.verify.unwrap_or(true) }))
    }
}

/// As the standard has it: "a local operating system credential".
fn local_user() -> Option<String> {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten()?;
    Some(user.name)
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
        f.write_str(if self.tls.is_some() { "nbds" } else { "nbd" })?;
        f.write_str(if matches!(self.server, NbdServer::Unix(_)) { "+unix://" } else { "://" })?;
        if let Some(TlsUri { auth: TlsAs::Psk { user, .. }, .. }) = &self.tls {
            write!(f, "{}@", Word(user))?;
        }
        if let NbdServer::Tcp(server) = &self.server {
            write!(f, "{server}")?;
        }
        write!(f, "/{}", Escaped(&self.export))?;
        let mut mark = '?';
        let mut pair = |key: &str, value: &dyn fmt::Display| -> fmt::Result {
            write!(f, "{mark}{key}={value}")?;
            mark = '&';
            Ok(())
        };
        if let NbdServer::Unix(path) = &self.server {
            pair("socket", &Escaped(&path.to_string_lossy()))?;
        }
        let Some(tls) = &self.tls else { return Ok(()) };
        match &tls.auth {
            TlsAs::X509 { certificates: Some(folder) } => {
                pair("tls-certificates", &Escaped(&folder.to_string_lossy()))?;
            }
            TlsAs::X509 { certificates: None } => {}
            TlsAs::Psk { file, .. } => pair("tls-psk-file", &Escaped(&file.to_string_lossy()))?,
        }
        if let Some(name) = &tls.hostname {
            pair("tls-hostname", &Escaped(name))?;
        }
        if !tls.verify {
            pair("tls-verify-peer", &0)?;
        }
        Ok(())
    }
}

/// Escapes what would end a user's name.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '@' | '/' | ':' => write!(f, "%{:02X}", u32::from(c))?,
                c => write!(f, "{}", Escaped(c.encode_utf8(&mut [0; 4])))?,
            }
        }
        Ok(())
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
            ("nbds://h", "nbds://h:10809/"),
            ("nbds://h/e?tls-type=x509&tls-verify-peer=1", "nbds://h:10809/e"),
            (
                "nbds://h/e?tls-verify-peer=0&tls-hostname=a.b&tls-certificates=/c%20d",
                "nbds://h:10809/e?tls-certificates=/c%20d&tls-hostname=a.b&tls-verify-peer=0",
            ),
            ("nbds://a%40b@h/e?tls-psk-file=/k", "nbds://a%40b@h:10809/e?tls-psk-file=/k"),
            ("nbds://u@[::1]:9/e?tls-psk-file=/k", "nbds://u@[::1]:9/e?tls-psk-file=/k"),
            (
                "nbds+unix://u@/e?tls-type=psk&tls-psk-file=/k&socket=/s",
                "nbds+unix://u@/e?socket=/s&tls-psk-file=/k",
            ),
            ("nbds+unix:///?socket=/s&tls-hostname=h", "nbds+unix:///?socket=/s&tls-hostname=h"),
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
            ("nbd://h/x?socket=/s", "`socket=/s` has no place"),
            ("nbd+unix:///x?socket=/s&tls-hostname=h", "`tls-hostname=h` has no place"),
            ("nbd+unix://u@/x?socket=/s", "`u@` has no place"),
            ("nbds://h/x?tls-type=anon", "use x509 or psk"),
            ("nbds://h/x?tls-type=psk", "add tls-psk-file=/PATH"),
            ("nbds://u@h/x", "only tls-psk-file knows users"),
            ("nbds://@h/x?tls-psk-file=/k", "not a server"),
            ("nbds://h/x?tls-psk-file=/k&tls-certificates=/c", "choose a key or certificates"),
            ("nbds://h/x?tls-type=x509&tls-psk-file=/k", "choose a key or certificates"),
            ("nbds://u@h/x?tls-psk-file=/k&tls-verify-peer=0", "needs neither"),
            ("nbds://h/x?tls-verify-peer=no", "write 0 or 1"),
            ("nbds://h/x?tls-hostname=a&tls-hostname=b", "`tls-hostname=b` has no place"),
            ("nbds://h/x?tls-priority=NORMAL", "`tls-priority=NORMAL` has no place"),
            ("nbds://h/x?tls-certificates=c", "not an absolute path"),
            ("nbds+unix:///x?socket=/s", "add &tls-hostname=NAME"),
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
