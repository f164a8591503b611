//! Flags and file, checked once: [`Config`] is what the daemon runs with.
//!
//! Flags override the file, the file overrides the defaults. `RawConfig` is the
//! TOML as written; every wrong key or value is one sentence.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_protocol::{ByteSize, POLL_US_MAX};
use clap::{Parser, ValueEnum};
use serde::Deserialize;

/// Where clients connect unless said otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7700";
/// Where the admin API listens unless said otherwise.
pub const DEFAULT_ADMIN_LISTEN: &str = "127.0.0.1:7701";
/// More workers than this do not help one pool.
const WORKERS_MAX: usize = 64;

/// The storage server of Baton: serves volumes from an extent pool.
///
/// Exit codes: 0 stopped by a signal, 1 could not start or failed while running,
/// 2 wrong flags or configuration.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "baton-storage", version)]
pub struct Flags {
    /// TOML file; flags override it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address for clients [default: 127.0.0.1:7700]; port 0 picks one.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Unix socket for clients, beside the address.
    #[arg(long, value_name = "PATH")]
    pub listen_unix: Option<PathBuf>,
    /// Address of the admin API [default: 127.0.0.1:7701]; port 0 picks one.
    #[arg(long, value_name = "ADDR")]
    pub admin_listen: Option<String>,
    /// Directory of the pool; made if it is missing.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Most bytes of data, such as 10G [default: what the filesystem has].
    #[arg(long, value_name = "SIZE")]
    pub pool_size: Option<String>,
    /// Threads that serve I/O [default: the number of cores, at most 8].
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// Read with plain threads where io_uring would be used.
    #[arg(long)]
    pub no_io_uring: bool,
    /// Copy large reads into a buffer before they are sent, also when they are in memory.
    #[arg(long)]
    pub no_mapped_reads: bool,
    /// Receive large writes into a buffer instead of passing them from the socket to the file.
    #[arg(long)]
    pub no_piped_writes: bool,
    /// Leave workers the time slice that all threads have; they ask for a short one.
    #[arg(long)]
    pub no_short_slice: bool,
    /// Look for more work so long before a worker sleeps, in microseconds, 0 to 100: saves
    /// wake-ups and costs CPU time [default: 0, which is off].
    #[arg(long, value_name = "N")]
    pub poll_us: Option<u64>,
    /// How log lines look [default: text].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Least severe level that is logged: error, warn, info, debug, trace [default: info].
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// The file as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    listen: RawListen,
    pool: RawPool,
    workers: RawWorkers,
    limits: RawLimits,
    log: RawLog,
    danger_zone: RawDangerZone,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    data: Option<String>,
    unix: Option<PathBuf>,
    admin: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPool {
    data_dir: Option<PathBuf>,
    size: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawWorkers {
    count: Option<usize>,
    io_uring: Option<bool>,
    mapped_reads: Option<bool>,
    piped_writes: Option<bool>,
    short_slice: Option<bool>,
    poll_us: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    connections: Option<usize>,
    silent_connections: Option<usize>,
    hello_timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    format: Option<LogFormat>,
    level: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawDangerZone {
    enabled: bool,
    cold_reads: bool,
}

/// What the daemon runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// For clients.
    pub listen: SocketAddr,
    /// For clients on this host.
    pub listen_unix: Option<PathBuf>,
    /// For the admin API.
    pub admin_listen: SocketAddr,
    /// Of the pool.
    pub data_dir: PathBuf,
    /// Most bytes of data.
    pub pool_bytes: Option<u64>,
    /// Threads that serve I/O, 1 to 64.
    pub workers: usize,
    /// Use io_uring where the kernel allows it.
    pub io_uring: bool,
    /// Send large reads that are in memory from where they are.
    pub mapped_reads: bool,
    /// Pass large writes from the socket to the file through a pipe, where the filesystem allows it.
    pub piped_writes: bool,
    /// Workers ask for a short time slice.
    pub short_slice: bool,
    /// Longest time that a worker looks for more work before it sleeps, in us; 0: it
    /// sleeps at once.
    pub poll_us: u64,
    /// Welcomed connections at once.
    pub connections_max: usize,
    /// Connections at once that have not said HELLO.
    pub silent_max: usize,
    /// Time to say HELLO.
    pub hello_timeout: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Least severe level logged.
    pub log_level: tracing::Level,
    /// Treat every read as one that waits for the disk (tests).
    pub cold_reads: bool,
}

/// Why the daemon cannot run with this configuration.
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
    /// A value is missing.
    #[error(
        "no data directory is given; use --data-dir DIR, or data_dir in section [pool] of the configuration file"
    )]
    NoDataDir,
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
}

impl Config {
    /// Reads the file the flags name, if any, and puts the flags over it.
    ///
    /// # Errors
    /// [`ConfigError`], one sentence for each kind of mistake.
    pub fn load(flags: Flags) -> Result<Self, ConfigError> {
        let raw = match &flags.config {
            None => RawConfig::default(),
            Some(path) => RawConfig::read(path)?,
        };
        Self::try_from(raw.overridden(flags))
    }
}

impl RawConfig {
    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    fn overridden(self, flags: Flags) -> Self {
        let Self { mut listen, mut pool, mut workers, limits, mut log, danger_zone } = self;
        listen.data = flags.listen.or(listen.data);
        listen.unix = flags.listen_unix.or(listen.unix);
        listen.admin = flags.admin_listen.or(listen.admin);
        pool.data_dir = flags.data_dir.or(pool.data_dir);
        pool.size = flags.pool_size.or(pool.size);
        workers.count = flags.workers.or(workers.count);
        if flags.no_io_uring {
            workers.io_uring = Some(false);
        }
        if flags.no_mapped_reads {
            workers.mapped_reads = Some(false);
        }
        if flags.no_piped_writes {
            workers.piped_writes = Some(false);
        }
        if flags.no_short_slice {
            workers.short_slice = Some(false);
        }
        workers.poll_us = flags.poll_us.or(workers.poll_us);
        log.format = flags.log_format.or(log.format);
        log.level = flags.log_level.or(log.level);
        Self { listen, pool, workers, limits, log, danger_zone }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let RawConfig { listen, pool, workers, limits, log, danger_zone } = raw;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let level = log.level.unwrap_or_else(|| "info".to_owned());
        let config = Self {
            listen: address("listen address", listen.data, DEFAULT_LISTEN)?,
            listen_unix: listen.unix,
            admin_listen: address("admin listen address", listen.admin, DEFAULT_ADMIN_LISTEN)?,
            data_dir: pool.data_dir.ok_or(ConfigError::NoDataDir)?,
            pool_bytes: pool.size.map(pool_bytes).transpose()?,
            workers: within("worker count", workers.count, cores.min(8), 1..=WORKERS_MAX)?,
            io_uring: workers.io_uring.unwrap_or(true),
            mapped_reads: workers.mapped_reads.unwrap_or(true),
            piped_writes: workers.piped_writes.unwrap_or(true),
            short_slice: workers.short_slice.unwrap_or(true),
            poll_us: within("polling time in microseconds", workers.poll_us, 0, 0..=POLL_US_MAX)?,
            connections_max: within("connection limit", limits.connections, 4096, 1..=1_000_000)?,
            silent_max: within(
                "silent connection limit",
                limits.silent_connections,
                256,
                1..=100_000,
            )?,
            hello_timeout: Duration::from_millis(within(
                "hello timeout",
                limits.hello_timeout_ms,
                5000,
                10..=600_000,
            )?),
            log_format: log.format.unwrap_or_default(),
            log_level: level.parse().map_err(|_| ConfigError::Value {
                what: "log level",
                value: level,
                hint: "write error, warn, info, debug or trace".to_owned(),
            })?,
            cold_reads: danger_zone.cold_reads,
        };
        if danger_zone.cold_reads && !danger_zone.enabled {
            return Err(ConfigError::Value {
                what: "danger zone setting",
                value: "cold_reads".to_owned(),
                hint: "set enabled = true in [danger_zone] too, or remove it".to_owned(),
            });
        }
        Ok(config)
    }
}

fn address(
    what: &'static str,
    given: Option<String>,
    default: &str,
) -> Result<SocketAddr, ConfigError> {
    let value = given.unwrap_or_else(|| default.to_owned());
    value.parse().map_err(|_| ConfigError::Value {
        what,
        value,
        hint: "write an IP address and a port, such as 127.0.0.1:7700 or [::]:7700".to_owned(),
    })
}

fn pool_bytes(value: String) -> Result<u64, ConfigError> {
    let wrong = |hint: String| ConfigError::Value { what: "pool size", value: value.clone(), hint };
    let ByteSize(bytes) = value.parse().map_err(|_| {
        wrong("write a whole number with an optional K, M, G or T, such as 10G".to_owned())
    })?;
    if bytes < crate::store::EXTENT_BYTES {
        return Err(wrong(format!(
            "give at least one extent, {}",
            ByteSize(crate::store::EXTENT_BYTES)
        )));
    }
    Ok(bytes)
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(
    what: &'static str,
    given: Option<T>,
    default: T,
    range: std::ops::RangeInclusive<T>,
) -> Result<T, ConfigError> {
    let value = given.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::Value {
        what,
        value: value.to_string(),
        hint: format!("give a number from {} to {}", range.start(), range.end()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        Config::try_from(raw).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_run_with_a_data_directory_only() {
        let config = parse("[pool]\ndata_dir = \"d\"").expect("good");
        assert_eq!(config.listen.to_string(), DEFAULT_LISTEN);
        assert_eq!(config.admin_listen.to_string(), DEFAULT_ADMIN_LISTEN);
        assert!(config.admin_listen.ip().is_loopback());
        assert!(
            config.io_uring
                && config.mapped_reads
                && config.piped_writes
                && config.short_slice
                && !config.cold_reads
                && config.pool_bytes.is_none()
        );
        assert!((1..=8).contains(&config.workers));
        assert_eq!(config.poll_us, 0, "off");
    }

    #[test]
    fn flags_win_over_the_file() {
        let raw: RawConfig = toml::from_str(
            "[listen]\ndata = \"127.0.0.1:1\"\n[pool]\ndata_dir = \"d\"\nsize = \"1G\"\n[workers]\ncount = 3\npoll_us = 20",
        )
        .expect("good");
        let flags = Flags::try_parse_from([
            "baton-storage",
            "--listen",
            "127.0.0.1:2",
            "--pool-size",
            "2G",
            "--no-io-uring",
            "--no-mapped-reads",
            "--no-piped-writes",
            "--no-short-slice",
            "--poll-us",
            "30",
            "--log-format",
            "json",
        ])
        .expect("good flags");
        let config = Config::try_from(raw.overridden(flags)).expect("good");
        assert_eq!(config.listen.port(), 2);
        assert_eq!(config.pool_bytes, Some(2 << 30));
        assert_eq!((config.workers, config.io_uring, config.poll_us), (3, false, 30));
        assert!(!config.mapped_reads && !config.piped_writes && !config.short_slice);
        assert_eq!(config.log_format, LogFormat::Json);
    }

    #[test]
    fn each_mistake_is_one_sentence_that_names_it() {
        for (text, names) in [
            ("", "--data-dir"),
            ("[pool]\ndata_dir = \"d\"\nsize = \"10X\"", "10X"),
            ("[pool]\ndata_dir = \"d\"\nsize = \"4K\"", "at least one extent"),
            ("[pool]\ndata_dir = \"d\"\n[listen]\ndata = \"localhost\"", "localhost"),
            ("[pool]\ndata_dir = \"d\"\n[workers]\ncount = 0", "from 1 to 64"),
            ("[pool]\ndata_dir = \"d\"\n[workers]\npoll_us = 101", "from 0 to 100"),
            ("[pool]\ndata_dir = \"d\"\n[log]\nlevel = \"loud\"", "loud"),
            ("[pool]\ndata_dir = \"d\"\n[danger_zone]\ncold_reads = true", "enabled = true"),
            ("[pool]\ndata_dirr = \"d\"", "data_dirr"),
            ("[limits]\nhello_timeout_ms = -1", "hello_timeout_ms"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }

    #[test]
    fn the_example_file_is_good() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/baton-storage.toml");
        let flags = Flags { config: Some(path.into()), ..Flags::default() };
        Config::load(flags).expect("the example can be used as it is");
        // With every key that is commented out switched on.
        let text = std::fs::read_to_string(path).expect("readable");
        let all: String = text
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        assert!(all.len() < text.len(), "the example shows optional keys as `#: key = value`");
        parse(&all).expect("every commented key is real");
    }
}
