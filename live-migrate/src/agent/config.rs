//! The agent's configuration, checked once: [`Config`] is what it runs with.
//!
//! `RawConfig` is the TOML as written; every wrong key or value is one sentence.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::definition::{DefinitionError, VmDefinition};
use crate::door::{self, Address, DoorError};
use crate::identity::is_name;
use crate::supervisor::Manager;
use crate::tls::TlsFiles;

/// Where the API is unless said otherwise.
pub const DEFAULT_LISTEN: &str = "unix:/run/baton/agent.sock";
/// There where systemd is the init of this host.
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// The file as written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    host: String,
    #[serde(default)]
    listen: RawListen,
    tls: Option<RawTls>,
    #[serde(default)]
    paths: RawPaths,
    #[serde(default)]
    backend: RawBackend,
    #[serde(default)]
    vmm: RawVmm,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    danger_zone: RawDangerZone,
    #[serde(default)]
    vm: Vec<VmDefinition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    address: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPaths {
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawManager {
    #[default]
    Auto,
    Child,
    Systemd,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawBackend {
    manager: RawManager,
    program: Option<PathBuf>,
    systemctl: Option<PathBuf>,
    start_limit_ms: Option<u64>,
    stop_grace_ms: Option<u64>,
    hang_ms: Option<u64>,
    socket_mode: Option<String>,
    socket_group: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawVmm {
    command_timeout_ms: Option<u64>,
    incoming_command: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    format: LogFormat,
    level: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawDangerZone {
    enabled: bool,
    remote_commands: bool,
    remote_files: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// What the agent runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this host.
    pub host: String,
    /// Where the API is.
    pub listen: Address,
    /// Certificates; without them the API is for this host only.
    pub tls: Option<TlsFiles>,
    /// What outlives the host's boots.
    pub state_dir: PathBuf,
    /// Sockets, and what backends are started with.
    pub run_dir: PathBuf,
    /// Who keeps backends.
    pub manager: Manager,
    /// The backend's program.
    pub backend_program: PathBuf,
    /// For a backend, or a monitor, to answer for the first time.
    pub start_limit: Duration,
    /// For a backend to end when asked.
    pub stop_grace: Duration,
    /// Silence after which a backend is killed.
    pub hang: Duration,
    /// Who may connect to the sockets of disks, as `660`; the backend's default if absent.
    pub socket_mode: Option<String>,
    /// Their group, by its name.
    pub socket_group: Option<String>,
    /// For each command to a monitor.
    pub vmm_timeout: Duration,
    /// Starts a monitor for a VM that has no command of its own.
    pub incoming_command: Option<Vec<String>>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Least severe level logged.
    pub log_level: tracing::Level,
    /// A definition that is sent may hold a command.
    pub remote_commands: bool,
    /// A definition that is sent may name local files as volumes.
    pub remote_files: bool,
    /// VMs of this host.
    pub vms: Vec<VmDefinition>,
}

/// Why the agent cannot run with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}; give a readable file to --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("configuration file {} is wrong", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("{what} `{value}` cannot be used; {hint}")]
    Value {
        /// Which.
        what: &'static str,
        /// As given.
        value: String,
        /// What would be right.
        hint: String,
    },
    /// Plaintext where others could read it.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// A VM.
    #[error("VM `{vm}` cannot be used")]
    Vm {
        /// Which.
        vm: String,
        /// Why.
        source: DefinitionError,
    },
}

impl Config {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ConfigError`], one sentence for each kind of mistake.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let raw: RawConfig = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        Self::try_from(raw)
    }

    pub(super) fn vm_dir(&self, vm: &str) -> PathBuf {
        self.run_dir.join(vm)
    }

    pub(super) fn control_socket(&self, vm: &str) -> PathBuf {
        self.vm_dir(vm).join("control.sock")
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let RawConfig { host, listen, tls, paths, backend, vmm, log, danger_zone, vm } = raw;
        if !is_name(&host) {
            let hint = "use a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`";
            return Err(wrong("host", host, hint));
        }
        let address = listen.address.unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
        let listen = address
            .parse()
            .map_err(|hint: String| wrong("listen address", address.clone(), hint))?;
        door::check(&listen, tls.is_some())?;
        if !danger_zone.enabled && (danger_zone.remote_commands || danger_zone.remote_files) {
            let key = if danger_zone.remote_commands { "remote_commands" } else { "remote_files" };
            let hint = "set enabled = true in [danger_zone] too, or remove it";
            return Err(wrong("danger zone setting", key, hint));
        }
        check_vms(&vm, &vmm)?;
        let level = log.level.unwrap_or_else(|| "info".to_owned());
        let directory = |what, path: Option<PathBuf>, default: &str| {
            let path = path.unwrap_or_else(|| default.into());
            if path.is_absolute() {
                return Ok(path);
            }
            Err(wrong(what, path.display(), "write an absolute path"))
        };
        Ok(Self {
            host,
            listen,
            tls: tls.map(|RawTls { ca, cert, key }| TlsFiles { ca, cert, key }),
            state_dir: directory("state directory", paths.state_dir, "/var/lib/baton/agent")?,
            run_dir: directory("run directory", paths.run_dir, "/run/baton")?,
            manager: manager(backend.manager, backend.systemctl, Path::new(SYSTEMD_RUNS).exists()),
            backend_program: backend.program.unwrap_or_else(|| "baton-backend".into()),
            start_limit: ms("start limit", backend.start_limit_ms, 15_000, 10..=600_000)?,
            stop_grace: ms("stop grace", backend.stop_grace_ms, 10_000, 10..=600_000)?,
            hang: ms("hang time", backend.hang_ms, 5000, 80..=600_000)?,
            socket_mode: socket_mode(backend.socket_mode)?,
            socket_group: backend.socket_group,
            vmm_timeout: ms("command timeout", vmm.command_timeout_ms, 10_000, 10..=600_000)?,
            incoming_command: vmm.incoming_command,
            log_format: log.format,
            log_level: level.parse().map_err(|_| {
                wrong("log level", level.clone(), "write error, warn, info, debug or trace")
            })?,
            remote_commands: danger_zone.remote_commands,
            remote_files: danger_zone.remote_files,
            vms: vm,
        })
    }
}

/// As the backend will read it: better refused here than by every backend.
fn socket_mode(text: Option<String>) -> Result<Option<String>, ConfigError> {
    match text {
        Some(text) if u32::from_str_radix(&text, 8).map_or(true, |mode| mode > 0o777) => {
            Err(wrong("socket mode", text, "write permissions in octal, such as 660"))
        }
        text => Ok(text),
    }
}

fn check_vms(vms: &[VmDefinition], vmm: &RawVmm) -> Result<(), ConfigError> {
    let mut names = HashSet::new();
    for vm in vms {
        vm.check().map_err(|source| ConfigError::Vm { vm: vm.name.clone(), source })?;
        if !names.insert(&vm.name) {
            return Err(wrong("VM name", &vm.name, "it is there twice; remove one"));
        }
    }
    if let Some(command) = &vmm.incoming_command
        && command.first().is_none_or(String::is_empty)
    {
        return Err(wrong("incoming_command", "[]", "name a program, or leave the key out"));
    }
    Ok(())
}

fn manager(wanted: RawManager, systemctl: Option<PathBuf>, systemd_runs: bool) -> Manager {
    match wanted {
        RawManager::Child => Manager::Child,
        RawManager::Auto if !systemd_runs => Manager::Child,
        RawManager::Auto | RawManager::Systemd => {
            Manager::Systemd(systemctl.unwrap_or_else(|| "systemctl".into()))
        }
    }
}

fn wrong(what: &'static str, value: impl ToString, hint: impl Into<String>) -> ConfigError {
    ConfigError::Value { what, value: value.to_string(), hint: hint.into() }
}

fn ms(
    what: &'static str,
    given: Option<u64>,
    default: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Duration, ConfigError> {
    let value = given.unwrap_or(default);
    if range.contains(&value) {
        return Ok(Duration::from_millis(value));
    }
    let hint = format!("give milliseconds from {} to {}", range.start(), range.end());
    Err(wrong(what, value, hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        Config::try_from(raw).map_err(|error| crate::problem::Problem::described(&error))
    }

    #[test]
    fn defaults_run_with_a_host_only() {
        let config = parse("host = \"a\"").expect("good");
        assert_eq!(config.listen.to_string(), DEFAULT_LISTEN);
        assert_eq!(config.hang, Duration::from_secs(5));
        assert!(!config.remote_commands && !config.remote_files && config.vms.is_empty());
        assert_eq!(config.control_socket("web"), Path::new("/run/baton/web/control.sock"));
    }

    #[test]
    fn auto_looks_for_systemd() {
        let own = Some(PathBuf::from("/x"));
        assert_eq!(manager(RawManager::Auto, None, false), Manager::Child);
        assert_eq!(manager(RawManager::Auto, None, true), Manager::Systemd("systemctl".into()));
        assert_eq!(manager(RawManager::Child, None, true), Manager::Child);
        assert_eq!(manager(RawManager::Systemd, own, false), Manager::Systemd("/x".into()));
    }

    #[test]
    fn each_mistake_is_one_sentence_that_names_it() {
        let vm = "[[vm]]\nname = \"w\"\n[[vm.disk]]\nname = \"d\"\nvolume = \"baton://s:1/v\"\n";
        let twice = format!("host = \"a\"\n{vm}{vm}");
        for (text, names) in [
            ("", "host"),
            ("host = \"a/b\"", "a/b"),
            ("host = \"a\"\nhots = 1", "hots"),
            ("host = \"a\"\n[listen]\naddress = \"localhost:1\"", "localhost:1"),
            ("host = \"a\"\n[listen]\naddress = \"0.0.0.0:1\"", "add [tls]"),
            ("host = \"a\"\n[tls]\nca = \"x\"", "cert"),
            ("host = \"a\"\n[paths]\nrun_dir = \"r\"", "absolute"),
            ("host = \"a\"\n[backend]\nmanager = \"init\"", "init"),
            ("host = \"a\"\n[backend]\nhang_ms = 1", "from 80 to"),
            ("host = \"a\"\n[vmm]\nincoming_command = []", "incoming_command"),
            ("host = \"a\"\n[log]\nlevel = \"loud\"", "loud"),
            ("host = \"a\"\n[danger_zone]\nremote_commands = true", "enabled = true"),
            ("host = \"a\"\n[danger_zone]\nremote_files = true", "enabled = true"),
            ("host = \"a\"\n[[vm]]\nname = \"w\"\ndisk = []", "1 to 256 disks"),
            (&twice, "twice"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }

    #[test]
    fn the_example_file_is_good() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/baton-agent.toml");
        Config::load(Path::new(path)).expect("the example can be used as it is");
        // With every key that is commented out switched on.
        let text = std::fs::read_to_string(path).expect("readable");
        let all: String = text
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        assert!(all.len() < text.len(), "the example shows optional keys as `#: key = value`");
        let config = parse(&all).expect("every commented key is real");
        assert!(config.tls.is_some() && config.remote_files && config.vms.len() == 2);
    }
}
