//! Flags and TOML, checked once: what leaves here is usable.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use baton_protocol::POLL_US_MAX;
use baton_protocol::handoff::Try;
use clap::Parser;
use serde::Deserialize;

use crate::disk::DiskOptions;
use crate::socket::Permissions;

/// Queues offered when nothing is said.
const NUM_QUEUES_DEFAULT: u16 = 4;
/// Most queues of a disk.
pub const NUM_QUEUES_MAX: u16 = 64;
/// Ring size assumed when nothing is said; what QEMU uses.
const QUEUE_SIZE_DEFAULT: u16 = 128;
const SOCKET_MODE_DEFAULT: u32 = 0o660;

/// Serves the disks of one VM over vhost-user-blk and forwards the I/O to
/// storage servers.
#[derive(Debug, Parser)]
#[command(
    name = "baton-backend",
    version,
    after_help = "Exit status: 0 after SIGTERM or SIGINT, 1 when a disk cannot be served, 2 for wrong flags or configuration."
)]
pub struct Args {
    /// Unix socket to listen on for the VMM
    #[arg(long, value_name = "PATH", conflicts_with_all = ["fd", "config"])]
    socket_path: Option<PathBuf>,
    /// Inherited socket to serve, listening or connected
    #[arg(long, value_name = "FDNUM", conflicts_with = "config")]
    fd: Option<RawFd>,
    /// Volume: baton://HOST:PORT/NAME, baton+unix:///NAME?socket=PATH,
    /// nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH (nbds:// through TLS),
    /// rbd://POOL/IMAGE or file:///PATH
    #[arg(long, value_name = "URI", conflicts_with_all = ["blk_file", "config"])]
    volume: Option<String>,
    /// Local file or block device to serve instead of a volume
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    blk_file: Option<PathBuf>,
    /// TOML file that names several disks
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Queues to offer, 1 to 64 [default: 4]
    #[arg(long, value_name = "N")]
    num_queues: Option<u16>,
    /// Ring size the VMM uses, a power of two from 16 to 32768 [default: 128]
    #[arg(long, value_name = "N")]
    queue_size: Option<u16>,
    /// Look for more work so long before a queue's thread sleeps, in microseconds, 0 to
    /// 100: saves wake-ups and costs CPU time [default: 0, which is off]
    #[arg(long, value_name = "N")]
    poll_us: Option<u64>,
    /// Mode of the socket, octal [default: 660]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<String>,
    /// Group of the socket, name or number
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// Unix socket for status and control, for this process's user only
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Do not claim the volumes; wait until a handoff grants them. With a try, written
    /// as its id, a slash and the number of the attempt, until that one does and no
    /// other
    #[arg(long, value_name = "ID/ATTEMPT", num_args = 0..=1, require_equals = true)]
    standby: Option<Option<Try>>,
    /// Name under which the volumes are claimed, the same after a restart and
    /// different for every other VM [default: HOSTNAME:SOCKET or HOSTNAME:CONFIG]
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// Begin when a byte comes on standard input, and end if that closes first: then
    /// whoever started this process is gone and has noted nowhere that it runs
    #[arg(long)]
    pub wait_for_stdin: bool,
    /// Log as text or JSON lines
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Least important level logged: error, warn, info, debug or trace
    #[arg(long, default_value = "info")]
    pub log_level: tracing::level_filters::LevelFilter,
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Where a disk's front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSource {
    /// A path to bind.
    Path(PathBuf),
    /// A descriptor of the command line.
    Fd(RawFd),
    /// The socket of this name from systemd, or the only one.
    Systemd,
}

/// One disk, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// What the disk offers.
    pub options: DiskOptions,
    /// Where its data is.
    pub volume: String,
    /// Where its front-ends come from.
    pub socket: SocketSource,
    /// For a socket we make.
    pub permissions: Permissions,
}

/// Everything, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name under which volumes are claimed.
    pub owner: String,
    /// Volumes are not claimed: a handoff grants them.
    pub standby: bool,
    /// The only try of a handoff that may, if it is known.
    pub only_for: Option<Try>,
    /// Control socket, if there is to be one.
    pub control: Option<PathBuf>,
    /// At least one.
    pub disks: Vec<DiskConfig>,
}

/// What is wrong with the flags or the file. One sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No volume.
    #[error(
        "name a volume with --volume URI, a file with --blk-file PATH, or several disks with --config FILE"
    )]
    NoVolume,
    /// No socket.
    #[error(
        "name a socket with --socket-path PATH or --fd FDNUM, or start from a systemd socket unit"
    )]
    NoSocket,
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {message}")]
    Toml {
        /// Which.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// Too few or too many queues.
    #[error("num-queues must be 1 to {NUM_QUEUES_MAX}, not {0}")]
    NumQueues(u16),
    /// Not a ring size.
    #[error("queue-size must be a power of two from 16 to 32768, not {0}")]
    QueueSize(u16),
    /// Longer than an idle disk may keep a core.
    #[error("poll-us must be 0 to {POLL_US_MAX} microseconds, not {0}; 0 switches polling off")]
    PollUs(u64),
    /// Not a file mode.
    #[error("socket-mode must be octal, such as 660, not `{0}`")]
    SocketMode(String),
    /// Two disks of one name or socket.
    #[error("two disks share the {what} `{value}`; each needs its own")]
    Duplicate {
        /// Name, volume or socket.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// The control socket is a disk's.
    #[error("the control socket {0} is a disk's socket too; give it a path of its own")]
    SharedControl(PathBuf),
    /// A file without disks.
    #[error("{0} names no disk; add a [[disk]] section")]
    NoDisks(PathBuf),
    /// A path that no URI can hold.
    #[error("the path {0:?} is not UTF-8")]
    Path(OsString),
    /// Nothing to derive the owner's name from, or it is too long.
    #[error("the name to claim volumes under must have 1 to 255 bytes; give one with --owner NAME")]
    Owner,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    owner: Option<String>,
    control: Option<PathBuf>,
    poll_us: Option<u64>,
    #[serde(default)]
    standby: bool,
    #[serde(default)]
    disk: Vec<RawDisk>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    name: String,
    volume: String,
    socket_path: Option<PathBuf>,
    socket_mode: Option<String>,
    socket_group: Option<String>,
    #[serde(default)]
    read_only: bool,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
}

impl Config {
    /// Checks flags and, with `--config`, the file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_args(args: &Args, activated: bool) -> Result<Self, ConfigError> {
        let config = match &args.config {
            Some(path) => Self::from_file(path, args, activated),
            None => Self::from_flags(args, activated),
        }?;
        refuse_shared_control(&config)?;
        Ok(config)
    }

    fn from_flags(args: &Args, activated: bool) -> Result<Self, ConfigError> {
        let volume = match (&args.volume, &args.blk_file) {
            (Some(uri), _) => uri.clone(),
            (None, Some(path)) => file_uri(path)?,
            (None, None) => return Err(ConfigError::NoVolume),
        };
        let socket = match (&args.socket_path, args.fd) {
            (Some(path), _) => SocketSource::Path(path.clone()),
            (None, Some(fd)) => SocketSource::Fd(fd),
            (None, None) if activated => SocketSource::Systemd,
            (None, None) => return Err(ConfigError::NoSocket),
        };
        let identity = match &socket {
            SocketSource::Path(path) => absolute(path),
            SocketSource::Fd(_) | SocketSource::Systemd => volume.clone(),
        };
        let raw = RawDisk {
            name: "disk".to_owned(),
            volume,
            socket_path: args.socket_path.clone(),
            socket_mode: args.socket_mode.clone(),
            socket_group: args.socket_group.clone(),
            read_only: args.read_only,
            num_queues: args.num_queues,
            queue_size: args.queue_size,
        };
        Ok(Self {
            owner: owner(args.owner.as_deref(), &identity)?,
            standby: args.standby.is_some(),
            only_for: args.standby.flatten(),
            control: args.control.clone(),
            disks: vec![check(raw, socket, poll_us(args.poll_us)?)?],
        })
    }

    fn from_file(path: &Path, args: &Args, activated: bool) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let raw: RawConfig = toml::from_str(&text).map_err(|error| ConfigError::Toml {
            path: path.to_owned(),
            message: located(&text, &error),
        })?;
        if raw.disk.is_empty() {
            return Err(ConfigError::NoDisks(path.to_owned()));
        }
        let poll_us = poll_us(args.poll_us.or(raw.poll_us))?;
        let mut disks = Vec::with_capacity(raw.disk.len());
        for disk in raw.disk {
            let socket = match &disk.socket_path {
                Some(path) => SocketSource::Path(path.clone()),
                None if activated => SocketSource::Systemd,
                None => return Err(ConfigError::NoSocket),
            };
            disks.push(check(disk, socket, poll_us)?);
        }
        refuse_duplicates(&disks)?;
        let named = args.owner.as_deref().or(raw.owner.as_deref());
        let control = args.control.clone().or(raw.control);
        let owner = owner(named, &absolute(path))?;
        let standby = args.standby.is_some() || raw.standby;
        Ok(Self { owner, standby, only_for: args.standby.flatten(), control, disks })
    }
}

fn check(raw: RawDisk, socket: SocketSource, poll_us: u64) -> Result<DiskConfig, ConfigError> {
    let num_queues = raw.num_queues.unwrap_or(NUM_QUEUES_DEFAULT);
    if !(1..=NUM_QUEUES_MAX).contains(&num_queues) {
        return Err(ConfigError::NumQueues(num_queues));
    }
    let queue_size = raw.queue_size.unwrap_or(QUEUE_SIZE_DEFAULT);
    if !queue_size.is_power_of_two() || !(16..=32768).contains(&queue_size) {
        return Err(ConfigError::QueueSize(queue_size));
    }
    let mode = match raw.socket_mode {
        None => SOCKET_MODE_DEFAULT,
        Some(text) => match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o777 => mode,
            _ => return Err(ConfigError::SocketMode(text)),
        },
    };
    Ok(DiskConfig {
        options: DiskOptions {
            name: raw.name,
            num_queues,
            queue_size,
            read_only: raw.read_only,
            poll_us,
        },
        volume: raw.volume,
        socket,
        permissions: Permissions { mode, group: raw.socket_group },
    })
}

fn poll_us(given: Option<u64>) -> Result<u64, ConfigError> {
    match given.unwrap_or(0) {
        us @ 0..=POLL_US_MAX => Ok(us),
        us => Err(ConfigError::PollUs(us)),
    }
}

fn refuse_duplicates(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    for (at, disk) in disks.iter().enumerate() {
        for other in &disks[..at] {
            if disk.options.name == other.options.name {
                return Err(ConfigError::Duplicate {
                    what: "name",
                    value: disk.options.name.clone(),
                });
            }
            if disk.volume == other.volume {
                return Err(ConfigError::Duplicate { what: "volume", value: disk.volume.clone() });
            }
            if let (SocketSource::Path(one), SocketSource::Path(two)) =
                (&disk.socket, &other.socket)
                && one == two
            {
                return Err(ConfigError::Duplicate {
                    what: "socket",
                    value: one.display().to_string(),
                });
            }
        }
    }
    Ok(())
}

fn refuse_shared_control(config: &Config) -> Result<(), ConfigError> {
    let Some(control) = &config.control else { return Ok(()) };
    let is_control =
        |disk: &DiskConfig| matches!(&disk.socket, SocketSource::Path(path) if path == control);
    if config.disks.iter().any(is_control) {
        return Err(ConfigError::SharedControl(control.clone()));
    }
    Ok(())
}

/// A mistake in a file, in one sentence.
fn located(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().lines().map(str::trim).collect::<Vec<_>>().join(" ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

/// The name a restarted process has again and no other VM has: host and socket.
fn owner(named: Option<&str>, identity: &str) -> Result<String, ConfigError> {
    let name = match named {
        Some(name) => name.to_owned(),
        None => {
            let host = nix::unistd::gethostname().map_err(|_| ConfigError::Owner)?;
            format!("{}:{identity}", host.to_string_lossy())
        }
    };
    if name.is_empty() || name.len() > 255 { Err(ConfigError::Owner) } else { Ok(name) }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// `file://` URI of a path, with the characters escaped that a URI gives a
/// meaning.
fn file_uri(path: &Path) -> Result<String, ConfigError> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let text = absolute.to_str().ok_or_else(|| ConfigError::Path(path.as_os_str().to_owned()))?;
    let escaped: String = text
        .chars()
        .map(|c| match c {
            '%' => "%25".to_owned(),
            '?' => "%3F".to_owned(),
            '#' => "%23".to_owned(),
            c => c.to_string(),
        })
        .collect();
    Ok(format!("file://{escaped}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let args = Args::try_parse_from([&["baton-backend"], args].concat()).expect("flags parse");
        Config::from_args(&args, false)
    }

    fn file(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, text).expect("write");
        config(&["--config", path.to_str().expect("UTF-8")])
    }

    #[test]
    fn flags_make_one_disk() {
        let made = config(&[
            "--socket-path",
            "/run/vm1.sock",
            "--volume",
            "baton://s:1/v",
            "--num-queues",
            "2",
            "--read-only",
        ])
        .expect("good");
        let disk = &made.disks[0];
        assert_eq!((disk.options.num_queues, disk.options.queue_size), (2, 128));
        assert!(disk.options.read_only);
        assert_eq!(disk.volume, "baton://s:1/v");
        assert_eq!(disk.permissions.mode, 0o660);
        assert!(made.owner.ends_with(":/run/vm1.sock"), "{}", made.owner);
        let from_file = config(&["--fd", "3", "--blk-file", "/a b%c"]).expect("good");
        assert_eq!(from_file.disks[0].volume, "file:///a b%25c");
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let message = |args: &[&str]| config(args).expect_err("refused").to_string();
        let base = ["--socket-path", "/s", "--volume", "file:///x"];
        let with = |more: &[&str]| message(&[&base, more].concat());
        assert!(message(&["--socket-path", "/s"]).contains("--volume URI"));
        assert!(message(&["--volume", "file:///x"]).contains("--socket-path PATH"));
        assert!(with(&["--num-queues", "0"]).contains("1 to 64"));
        assert!(with(&["--queue-size", "100"]).contains("power of two"));
        assert!(with(&["--socket-mode", "9z"]).contains("octal"));
        assert!(with(&["--control", "/s"]).contains("path of its own"));
        assert!(with(&["--owner", ""]).contains("--owner NAME"));
        assert!(message(&["--config", "/no/such"]).contains("/no/such"));
        for conflicting in [["--fd", "3"], ["--config", "x"], ["--blk-file", "y"]] {
            let args = [&["baton-backend"], &base[..], &conflicting].concat();
            assert!(Args::try_parse_from(args).is_err(), "{conflicting:?}");
        }
    }

    #[test]
    fn a_standby_may_be_told_its_try() {
        let base = ["--socket-path", "/s", "--volume", "baton://s:1/v"];
        let made = |more: &[&str]| {
            let made = config(&[&base, more].concat()).expect("good");
            (made.standby, made.only_for.map(|attempt| attempt.to_string()))
        };
        let attempt = "01ARZ3NDEKTSV4RRFFQ69G5FAV/2".to_owned();
        assert_eq!(made(&[]), (false, None));
        assert_eq!(made(&["--standby"]), (true, None));
        assert_eq!(made(&["--standby", "--num-queues", "1"]), (true, None));
        assert_eq!(made(&[&format!("--standby={attempt}")]), (true, Some(attempt)));
        for wrong in ["--standby=", "--standby=2", "--standby=01ARZ3NDEKTSV4RRFFQ69G5FAV/0"] {
            let args = [&["baton-backend"], &base[..], &[wrong]].concat();
            let error = Args::try_parse_from(args).expect_err("refused").to_string();
            assert!(error.contains("ID/ATTEMPT"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_file_names_several_disks() {
        let two = "owner = \"h/v\"\n[[disk]]\nname = \"a\"\nvolume = \"file:///a\"\nsocket_path = \"/a\"\n[[disk]]\nname = \"b\"\nvolume = \"file:///b\"\nsocket_path = \"/b\"\nnum_queues = 1\n";
        let made = file(two).expect("good");
        assert_eq!(made.owner, "h/v");
        assert_eq!(made.disks.len(), 2);
        assert_eq!((made.control, made.standby), (None, false));
        assert!(file(&format!("standby = true\n{two}")).expect("good").standby);
        let made = file(&format!("control = \"/c\"\n{two}")).expect("good");
        assert_eq!(made.control, Some(PathBuf::from("/c")));
        let message = |text: &str| file(text).expect_err("refused").to_string();
        assert!(message("").contains("names no disk"));
        assert!(message("[[disk]]\nname = 1\n").contains("invalid type"));
        assert!(message(&two.replace("num_queues", "num_quees")).contains("num_quees"));
        assert!(message(&two.replace("\"b\"", "\"a\"")).contains("share the name"));
        assert!(message(&two.replace("\"/b\"", "\"/a\"")).contains("share the socket"));
        assert!(message(&two.replace("///b", "///a")).contains("share the volume"));
    }
}
