//! The section `[etcd]` of the configuration, checked whole.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::client::Endpoint;
use crate::coordinator::config::{ConfigError, parsed, value};
use crate::door::Address;
use crate::identity::is_name;

/// Keys are under it.
const DEFAULT_PREFIX: &str = "/baton/";
/// Long enough for a slow disk under etcd, short enough for a handoff that waits.
const DEFAULT_LEASE_TTL_S: u64 = 10;
/// For one answer of one member.
const DEFAULT_CALL_TIMEOUT_MS: u64 = 1_000;

/// A member of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `HOST:PORT`.
    pub authority: String,
    /// `https`.
    pub tls: bool,
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }
}

impl std::str::FromStr for Member {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("`{text}` is no endpoint of etcd; write https://HOST:PORT or http://HOST:PORT")
        };
        let (tls, authority) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(wrong()),
        };
        let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        let good = !host.is_empty() && !authority.contains(['/', '@', '?', '#', ' ', ',']);
        if !good || port.parse::<u16>().is_ok_and(|port| port == 0) || port.parse::<u16>().is_err()
        {
            return Err(wrong());
        }
        Ok(Self { tls, authority: authority.to_owned() })
    }
}

/// How to get to etcd, and who we are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Members, any of which may be asked.
    pub members: Vec<Member>,
    /// Of all keys; ends with a slash.
    pub prefix: String,
    /// Of this instance, for people.
    pub name: String,
    /// Where clients and the other coordinators find this one's API.
    pub advertise: Endpoint,
    /// Of the leader's lease, whole seconds.
    pub lease_ttl: Duration,
    /// For one answer of one member.
    pub call_timeout: Duration,
    /// User and the file of the password.
    pub user: Option<(String, PathBuf)>,
    /// Certificate of the authority of etcd's certificates.
    pub ca: Option<PathBuf>,
    /// Our certificate and key, for an etcd that wants one.
    pub cert: Option<(PathBuf, PathBuf)>,
    /// For tests: leads on when its lease is over, until it is refused.
    pub ignore_lease: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Raw {
    endpoints: Vec<String>,
    prefix: Option<String>,
    name: Option<String>,
    advertise: Option<String>,
    lease_ttl_s: Option<u64>,
    call_timeout_ms: Option<u64>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Raw {
    /// With where the API is, and whether it has certificates.
    pub(crate) fn check(self, listen: &Address, with_tls: bool) -> Result<Settings, ConfigError> {
        let members: Vec<Member> = self
            .endpoints
            .iter()
            .map(|text| parsed("etcd.endpoints", text))
            .collect::<Result<_, _>>()?;
        if members.is_empty() {
            return Err(value("etcd.endpoints", "", "name the members' client addresses"));
        }
        let prefix = self.prefix.unwrap_or_else(|| DEFAULT_PREFIX.to_owned());
        if !prefix.starts_with('/') || !prefix.ends_with('/') || prefix.len() < 3 {
            return Err(value(
                "etcd.prefix",
                &prefix,
                "it begins and ends with a slash, such as /baton/",
            ));
        }
        let advertise = match self.advertise {
            Some(text) => parsed("etcd.advertise", &text)?,
            None => advertised(listen, with_tls)?,
        };
        let name = match self.name {
            Some(name) => name,
            None => nix::unistd::gethostname()
                .ok()
                .and_then(|name| name.into_string().ok())
                .unwrap_or_default(),
        };
        if !is_name(&name) {
            return Err(value(
                "etcd.name",
                &name,
                "a name for this coordinator among the others: a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`",
            ));
        }
        let ttl = self.lease_ttl_s.unwrap_or(DEFAULT_LEASE_TTL_S);
        if !(2..=300).contains(&ttl) {
            return Err(value("etcd.lease_ttl_s", &ttl.to_string(), "2 to 300 seconds"));
        }
        let timeout = self.call_timeout_ms.unwrap_or(DEFAULT_CALL_TIMEOUT_MS);
        if !(50..=60_000).contains(&timeout) {
            return Err(value(
                "etcd.call_timeout_ms",
                &timeout.to_string(),
                "50 to 60000 milliseconds",
            ));
        }
        let user = match (self.user, self.password_file) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            (Some(user), None) => {
                return Err(value("etcd.user", &user, "it needs `password_file` beside it"));
            }
            (None, Some(file)) => {
                let file = file.display().to_string();
                return Err(value("etcd.password_file", &file, "it needs `user` beside it"));
            }
        };
        let cert = match (self.cert, self.key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(file), None) | (None, Some(file)) => {
                let file = file.display().to_string();
                return Err(value("etcd.cert", &file, "`cert` and `key` go together"));
            }
        };
        if let Some(member) = members.iter().find(|member| member.tls)
            && self.ca.is_none()
        {
            return Err(value(
                "etcd.endpoints",
                &member.to_string(),
                "https needs `ca`: the authority of etcd's certificates",
            ));
        }
        Ok(Settings {
            members,
            prefix,
            name,
            advertise,
            lease_ttl: Duration::from_secs(ttl),
            call_timeout: Duration::from_millis(timeout),
            user,
            ca: self.ca,
            cert,
            ignore_lease: false,
        })
    }
}

/// Where we listen, if that is something that others can be told.
fn advertised(listen: &Address, with_tls: bool) -> Result<Endpoint, ConfigError> {
    let text = match listen {
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Tcp(address) if address.ip().is_unspecified() || address.port() == 0 => {
            return Err(value(
                "etcd.advertise",
                "",
                "say where others reach this coordinator, such as https://10.0.0.5:7720: `listen` does not",
            ));
        }
        Address::Tcp(address) if with_tls => format!("https://{address}"),
        Address::Tcp(address) => format!("http://{address}"),
    };
    parsed("etcd.advertise", &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings, ConfigError> {
        let raw: Raw = toml::from_str(text).expect("TOML");
        raw.check(&"127.0.0.1:7720".parse().expect("an address"), false)
    }

    const GOOD: &str = "endpoints = [\"http://a:2379\"]\nname = \"c1\"\n";

    #[test]
    fn each_mistake_is_named() {
        let good = settings(GOOD).expect("good");
        assert_eq!(good.advertise.to_string(), "http://127.0.0.1:7720");
        assert_eq!((good.prefix.as_str(), good.lease_ttl.as_secs()), ("/baton/", 10));
        for (text, names) in [
            (GOOD.replace("\"http://a:2379\"", ""), "client addresses"),
            (GOOD.replace("http://a:2379", "a:2379"), "a:2379"),
            (GOOD.replace("http://a:2379", "http://a"), "no endpoint"),
            (GOOD.replace("http://a:2379", "https://a:2379"), "`ca`"),
            (GOOD.replace("c1", "c/1"), "c/1"),
            (format!("{GOOD}prefix = \"baton\"\n"), "slash"),
            (format!("{GOOD}lease_ttl_s = 1\n"), "lease_ttl_s"),
            (format!("{GOOD}call_timeout_ms = 1\n"), "call_timeout_ms"),
            (format!("{GOOD}user = \"u\"\n"), "password_file"),
            (format!("{GOOD}password_file = \"/p\"\n"), "`user`"),
            (format!("{GOOD}cert = \"/c\"\n"), "go together"),
            (format!("{GOOD}advertise = \"c1\"\n"), "c1"),
        ] {
            let error = settings(&text).expect_err(names).to_string();
            assert!(error.contains(names), "{error}");
        }
        let raw: Raw = toml::from_str(GOOD).expect("TOML");
        let error = raw.check(&"0.0.0.0:7720".parse().expect("an address"), true);
        assert!(error.expect_err("which host?").to_string().contains("advertise"));
    }
}
