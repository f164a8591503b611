//! Configuration of `baton-coordinator`: TOML, checked whole, never re-checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::etcd;
use super::journal::Death;
use crate::client::Endpoint;
use crate::door::{self, Address};
use crate::identity::is_name;
use crate::tls::TlsFiles;

const DEFAULT_LISTEN: &str = "127.0.0.1:7720";
const DEFAULT_JOURNAL: &str = "/var/lib/baton/coordinator/journal.redb";

/// A host with an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, as in owner names and certificates.
    pub name: String,
    /// Its agent.
    pub agent: Endpoint,
    /// Where its monitors listen for a migration; `{vm}` is replaced.
    pub migration_uri: Option<String>,
}

/// A storage server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// As in volume URIs: `HOST:PORT`, or `unix:PATH`.
    pub data: Vec<String>,
    /// Its admin API.
    pub admin: Endpoint,
    /// Whose certificate is shown there, `baton://host/NAME`, where it is reached through TLS.
    pub host: String,
}

/// A Ceph cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Its configuration, the same path as in volume URIs.
    pub conf: PathBuf,
    /// The coordinator's user, without `client.`.
    pub id: String,
}

/// Where the journal is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// In a file of this host: the only coordinator.
    File(PathBuf),
    /// In etcd: one of several.
    Etcd(Box<etcd::settings::Settings>),
}

/// The configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the API is.
    pub listen: Address,
    /// Certificates.
    pub tls: Option<TlsFiles>,
    /// Where the journal is.
    pub journal: Keep,
    /// Hosts by name.
    pub hosts: Vec<Host>,
    /// Storage servers.
    pub storages: Vec<Storage>,
    /// Ceph clusters.
    pub cephs: Vec<Cluster>,
    /// For one answer of an agent or a storage server.
    pub call_timeout: Duration,
    /// For a destination's agent to answer at all, before a handoff is refused.
    pub agent_patience: Duration,
    /// For a handoff to become READY, unless it says otherwise.
    pub ready_timeout: Duration,
    /// In a driven migration: for the volumes to be sealed once the source stands
    /// still, and for the destination to run once the source was let go.
    pub switch_timeout: Duration,
    /// For tests: when to die.
    pub death: Option<Death>,
    /// error, warn, info, debug or trace.
    pub log_level: tracing::Level,
    /// JSON instead of text.
    pub log_json: bool,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No file.
    #[error("cannot read {}", path.display())]
    Read {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a key that does not exist.
    #[error("{} is wrong", path.display())]
    Parse {
        /// As given.
        path: PathBuf,
        /// Where.
        source: Box<toml::de::Error>,
    },
    /// A value.
    #[error("`{key}` cannot be `{value}`: {why}")]
    Value {
        /// Its key.
        key: String,
        /// As written.
        value: String,
        /// What it must be.
        why: String,
    },
    /// Plaintext where others could read it.
    #[error(transparent)]
    Door(#[from] door::DoorError),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    listen: Option<String>,
    journal: Option<PathBuf>,
    call_timeout_ms: Option<u64>,
    agent_patience_ms: Option<u64>,
    ready_timeout_ms: Option<u64>,
    switch_timeout_ms: Option<u64>,
    tls: Option<RawTls>,
    etcd: Option<etcd::settings::Raw>,
    #[serde(default)]
    host: Vec<RawHost>,
    #[serde(default)]
    storage: Vec<RawStorage>,
    #[serde(default)]
    ceph: Vec<RawCeph>,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    danger_zone: RawDanger,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    name: String,
    agent: String,
    migration_uri: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStorage {
    data: OneOrMore,
    admin: String,
    host: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCeph {
    conf: PathBuf,
    id: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLog {
    format: Option<String>,
    level: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDanger {
    #[serde(default)]
    enabled: bool,
    die_before_write: Option<u64>,
    die_after_write: Option<u64>,
    ignore_lease: Option<bool>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let raw: Raw = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        raw.try_into()
    }
}

impl TryFrom<Raw> for Config {
    type Error = ConfigError;

    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        let tls = raw.tls.map(|RawTls { ca, cert, key }| TlsFiles { ca, cert, key });
        let listen = raw.listen.unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
        let listen: Address = parsed("listen", &listen)?;
        door::check(&listen, tls.is_some())?;
        let journal = match (raw.journal, raw.etcd) {
            (Some(file), Some(_)) => {
                let why = "the journal is in etcd when there is [etcd]; leave one of the two out";
                return Err(value("journal", &file.display().to_string(), why));
            }
            (_, Some(etcd)) => {
                let mut settings = etcd.check(&listen, tls.is_some())?;
                settings.ignore_lease = raw.danger_zone.ignore_lease == Some(true);
                Keep::Etcd(Box::new(settings))
            }
            (file, None) => Keep::File(file.unwrap_or_else(|| DEFAULT_JOURNAL.into())),
        };
        let mut hosts: Vec<Host> = Vec::new();
        for RawHost { name, agent, migration_uri } in raw.host {
            if !is_name(&name) || hosts.iter().any(|host| host.name == name) {
                let why = "a host's name is unique and has a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`";
                return Err(value("host.name", &name, why));
            }
            let agent = endpoint("host.agent", &agent, tls.is_some())?;
            hosts.push(Host { name, agent, migration_uri });
        }
        let mut storages: Vec<Storage> = Vec::new();
        for RawStorage { data, admin, host } in raw.storage {
            let data = match data {
                OneOrMore::One(one) => vec![one],
                OneOrMore::More(more) => more,
            };
            let known = |data: &&String| storages.iter().any(|other| other.data.contains(data));
            if let Some(twice) = data.iter().find(known) {
                return Err(value(
                    "storage.data",
                    twice,
                    "another storage server has this address",
                ));
            }
            if data.iter().any(String::is_empty) || data.is_empty() {
                return Err(value(
                    "storage.data",
                    "",
                    "write HOST:PORT as in the volume URIs, or unix:PATH",
                ));
            }
            let admin = endpoint("storage.admin", &admin, tls.is_some())?;
            let host = host.unwrap_or_else(|| "storage".to_owned());
            if !is_name(&host) {
                return Err(value("storage.host", &host, "the NAME of baton://host/NAME"));
            }
            storages.push(Storage { data, admin, host });
        }
        let mut cephs: Vec<Cluster> = Vec::new();
        for RawCeph { conf, id } in raw.ceph {
            let shown = conf.display().to_string();
            if !conf.is_absolute() || cephs.iter().any(|other| other.conf == conf) {
                let why = "the absolute path of a cluster's configuration, each once";
                return Err(value("ceph.conf", &shown, why));
            }
            if id.is_empty() {
                let why = "the coordinator's user in the cluster, without `client.`";
                return Err(value("ceph.id", &id, why));
            }
            cephs.push(Cluster { conf, id });
        }
        let death = match (raw.danger_zone.die_before_write, raw.danger_zone.die_after_write) {
            (None, None) if raw.danger_zone.ignore_lease.is_none() => None,
            _ if !raw.danger_zone.enabled => {
                return Err(value(
                    "danger_zone.enabled",
                    "false",
                    "set it to true, or leave the section out",
                ));
            }
            (Some(write), _) => Some(Death { write, after: false }),
            (_, Some(write)) => Some(Death { write, after: true }),
            (None, None) => None,
        };
        let log_json = match raw.log.format.as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => return Err(value("log.format", other, "write text or json")),
        };
        let level = raw.log.level.unwrap_or_else(|| "info".to_owned());
        Ok(Self {
            listen,
            tls,
            journal,
            hosts,
            storages,
            cephs,
            call_timeout: millis("call_timeout_ms", raw.call_timeout_ms, 10_000)?,
            agent_patience: millis("agent_patience_ms", raw.agent_patience_ms, 3_000)?,
            ready_timeout: millis("ready_timeout_ms", raw.ready_timeout_ms, 30_000)?,
            switch_timeout: millis("switch_timeout_ms", raw.switch_timeout_ms, 60_000)?,
            death,
            log_level: level.parse().map_err(|_| {
                value("log.level", &level, "write error, warn, info, debug or trace")
            })?,
            log_json,
        })
    }
}

fn endpoint(key: &str, text: &str, with_tls: bool) -> Result<Endpoint, ConfigError> {
    let endpoint: Endpoint = parsed(key, text)?;
    if matches!(endpoint, Endpoint::Tls(_)) && !with_tls {
        return Err(value(key, text, "it needs certificates; add [tls]"));
    }
    Ok(endpoint)
}

fn millis(key: &str, given: Option<u64>, default: u64) -> Result<Duration, ConfigError> {
    let ms = given.unwrap_or(default);
    if (10..=3_600_000).contains(&ms) {
        Ok(Duration::from_millis(ms))
    } else {
        Err(value(key, &ms.to_string(), "10 to 3600000 milliseconds"))
    }
}

pub(super) fn parsed<T: std::str::FromStr<Err = String>>(
    key: &str,
    text: &str,
) -> Result<T, ConfigError> {
    text.parse().map_err(|why: String| value(key, text, &why))
}

pub(super) fn value(key: &str, value: &str, why: &str) -> ConfigError {
    ConfigError::Value { key: key.to_owned(), value: value.to_owned(), why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, ConfigError> {
        toml::from_str::<Raw>(text).expect("TOML").try_into()
    }

    const GOOD: &str = "[[host]]\nname = \"a\"\nagent = \"http://127.0.0.1:1\"\n[[storage]]\ndata = \"s:1\"\nadmin = \"http://127.0.0.1:2\"\n";

    #[test]
    fn each_mistake_is_named() {
        config(GOOD).expect("good");
        config("").expect("a coordinator of nothing");
        for (text, names) in [
            (format!("listen = \"nonsense\"\n{GOOD}"), "nonsense"),
            (format!("listen = \"192.0.2.1:1\"\n{GOOD}"), "certificates"),
            (format!("call_timeout_ms = 0\n{GOOD}"), "call_timeout_ms"),
            (format!("agent_patience_ms = 0\n{GOOD}"), "agent_patience_ms"),
            (GOOD.replace("\"a\"", "\"a/b\""), "a/b"),
            (format!("{GOOD}[[host]]\nname = \"a\"\nagent = \"unix:/x\"\n"), "unique"),
            (GOOD.replace("http://127.0.0.1:1", "https://h:1"), "[tls]"),
            (GOOD.replace("http://127.0.0.1:2", "http://192.0.2.1:2"), "plaintext"),
            (
                format!("{GOOD}[[storage]]\ndata = [\"s:1\"]\nadmin = \"unix:/x\"\n"),
                "another storage",
            ),
            (format!("{GOOD}host = \"a/b\"\n"), "storage.host"),
            (format!("{GOOD}[[ceph]]\nconf = \"ceph.conf\"\nid = \"x\"\n"), "ceph.conf"),
            (format!("{GOOD}[[ceph]]\nconf = \"/c\"\nid = \"\"\n"), "ceph.id"),
            (format!("{GOOD}[danger_zone]\ndie_after_write = 1\n"), "danger_zone"),
            (
                format!("journal = \"/j\"\n{GOOD}[etcd]\nendpoints = [\"http://a:1\"]\n"),
                "leave one of the two out",
            ),
            (format!("{GOOD}[etcd]\nendpoints = [\"a\"]\n"), "etcd.endpoints"),
            (format!("{GOOD}[danger_zone]\nignore_lease = true\n"), "danger_zone"),
            (format!("{GOOD}[log]\nlevel = \"loud\"\n"), "loud"),
        ] {
            let error = config(&text).expect_err(names).to_string();
            assert!(error.contains(names), "{error}");
        }
        assert!(toml::from_str::<Raw>("jornal = 1").is_err());
        let hosts = |text: &str| {
            let storages = config(text).expect("good").storages;
            storages.into_iter().map(|storage| storage.host).collect::<Vec<_>>()
        };
        assert_eq!(hosts(GOOD), ["storage"]);
        assert_eq!(hosts(&format!("{GOOD}host = \"host-s1\"\n")), ["host-s1"]);
    }
}
