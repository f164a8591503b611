//! `baton-backend`: see the library's documentation.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use baton_backend::config::{Args, Config, DiskConfig, LogFormat, SocketSource};
use baton_backend::control::server::ControlServer;
use baton_backend::control::{Vm, VmDisk};
use baton_backend::descriptors;
use baton_backend::disk::{DiskServer, Shutdown};
use baton_backend::handoff::{CooperativeVm, MemberHandle, VmHandoff};
use baton_backend::socket::{FrontEnds, Permissions};
use baton_remote_client::{Fence, OpenOptions, Volume, VolumeUri};
use clap::Parser;
// Its `malloc` is the process's: what one of Ceph's threads takes another gives back, which costs
// the C library's a tenth of all that a request of an image takes (docs/performance.md).
use mimalloc as _;
use nix::sys::signal::{SigSet, Signal};

/// Wrong flags or configuration.
const EXIT_USAGE: u8 = 2;
/// Whoever controls the backend controls the disks: its own user only.
const CONTROL_PERMISSIONS: Permissions = Permissions { mode: 0o600, group: None };

fn main() -> ExitCode {
    // Conventions of vhost-user programs: this flag makes the others void.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        #[allow(clippy::print_stdout, reason = "the contract of --print-capabilities")]
        {
            println!(
                "{}",
                serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
            );
        }
        return ExitCode::SUCCESS;
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        // Help and version, which are no mistakes.
        Err(asked) if !asked.use_stderr() => asked.exit(),
        Err(error) => {
            eprintln!("baton-backend: {}; see --help", first_sentence(&error.to_string()));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    init_log(&args);
    let activated = std::env::var_os("LISTEN_FDS").is_some();
    let config = match Config::from_args(&args, activated) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("baton-backend: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let begun = if args.wait_for_stdin { wait_for_stdin() } else { Ok(()) };
    match begun.and_then(|()| run(&config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Before anything is opened or claimed.
fn wait_for_stdin() -> anyhow::Result<()> {
    let mut byte = [0];
    std::io::stdin().read_exact(&mut byte).context(
        "nobody said on standard input to begin, and nothing was done; leave out --wait-for-stdin to begin at once",
    )
}

/// What is wrong, without the usage text that follows it.
fn first_sentence(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.trim().is_empty());
    let sentence = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    sentence.trim_start_matches("error: ").to_owned()
}

fn init_log(args: &Args) {
    // A log that cannot be written, on a full disk, must not end who writes it.
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(args.log_level)
        .log_internal_errors(false);
    match args.log_format {
        LogFormat::Text => log.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

fn run(config: &Config) -> anyhow::Result<()> {
    // Blocked before any thread exists, so that all threads have them blocked
    // and only the wait below takes them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;
    if let Err(error) = descriptors::make_room(&config.disks) {
        tracing::debug!(%error, "no room was made for open files");
    }

    let control = config.control.as_ref().map(|path| FrontEnds::bind(path, &CONTROL_PERMISSIONS));
    let control = control.transpose()?;
    let mut activated = Activated::take();
    // The sockets first: a mistake there must not claim a volume.
    let front_ends = config.disks.iter().map(|disk| front_ends(disk, &mut activated));
    let front_ends = front_ends.collect::<anyhow::Result<Vec<_>>>()?;
    // One incarnation for all volumes: a handoff moves them together.
    let options = OpenOptions { handoff: true, ..OpenOptions::new(config.owner.clone()) };
    let volumes = config.disks.iter().map(|disk| {
        let volume = open(disk, config.standby, &options)?;
        Ok((disk.options.name.clone(), volume))
    });
    let volumes = volumes.collect::<anyhow::Result<Vec<_>>>()?;
    let (handoff, members) =
        VmHandoff::new(&config.owner, options.session, config.only_for, &volumes);
    let (cooperative, members) = match handoff {
        Some(_) if config.standby => {
            moves_as_one(config, &volumes)?;
            (None, members)
        }
        Some(_) => (None, members),
        None => cooperative(config, &volumes)?,
    };
    let mut ready = Vec::new();
    for (((disk, front_ends), (name, volume)), member) in
        config.disks.iter().zip(front_ends).zip(volumes).zip(members)
    {
        let server = DiskServer::new(volume, &disk.options, member)
            .with_context(|| format!("disk {name}"))?;
        ready.push((server, front_ends, describe(&disk.socket)));
    }

    // Ends with this function.
    let _control = match control {
        Some(socket) => {
            let vm = Arc::new(vm_of(
                config,
                ready.iter().map(|(server, ..)| server),
                handoff,
                cooperative,
            ));
            let server = ControlServer::spawn(socket, vm);
            Some(server.context("cannot serve the control socket")?)
        }
        None => None,
    };
    let shutdown = Arc::new(Shutdown::new()?);
    let mut threads = Vec::new();
    for ((server, front_ends, socket), disk) in ready.into_iter().zip(&config.disks) {
        let shutdown = Arc::clone(&shutdown);
        let served = std::thread::Builder::new()
            .name(disk.options.name.clone())
            .stack_size(256 << 10)
            .spawn(move || server.run(front_ends, &shutdown))?;
        threads.push(served);
        let _ = writeln!(std::io::stderr(), "listening socket={socket}");
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    // Disks on a connected descriptor end by themselves; the signal wait must
    // notice, so a thread turns the end of all disks into the same signal.
    let waiter = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        let failed = threads.into_iter().filter_map(|thread| thread.join().err()).count();
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), Signal::SIGTERM);
        failed
    })?;
    let signal = signals.wait().context("cannot wait for signals")?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::debug!(%signal, "ending");
    shutdown.set();
    match waiter.join() {
        Ok(0) => Ok(()),
        _ => anyhow::bail!("a disk's thread panicked; please report the lines above"),
    }
}

fn open(
    disk: &DiskConfig,
    standby: bool,
    options: &OpenOptions,
) -> anyhow::Result<Arc<dyn Volume>> {
    let name = &disk.options.name;
    let read_only = disk.options.read_only;
    let standby = standby && !read_only;
    let options = OpenOptions { read_only, standby, ..options.clone() };
    let volume = baton_remote_client::open(&disk.volume, &options)
        .with_context(|| format!("disk {name}: volume {}", disk.volume))?;
    if standby && volume.handoff().is_none() && volume.gate().is_none() {
        anyhow::bail!(
            "disk {name}: volume {} cannot be handed over, so there is nothing to stand by for; \
             use a storage server that can, or leave out --standby",
            disk.volume
        );
    }
    Ok(volume)
}

/// One decision covers every volume that may be written, or there is nothing to stand
/// by for.
fn moves_as_one(config: &Config, volumes: &[(String, Arc<dyn Volume>)]) -> anyhow::Result<()> {
    let fence = |disk: &DiskConfig| {
        let uri = disk.volume.parse::<VolumeUri>();
        uri.map_or(Fence::None, |uri| uri.engine().capabilities().fence)
    };
    let disks = config.disks.iter().zip(volumes);
    let mut written = disks.filter(|(_, (_, volume))| !volume.geometry().read_only);
    let Some((first, _)) = written.next() else { return Ok(()) };
    match written.find(|(disk, _)| !fence(first).moves_with(fence(disk))) {
        Some((disk, (name, _))) => anyhow::bail!(
            "disk {name}: volume {} is fenced in another way than the VM's other volumes, so they cannot be handed over together; bring them to one kind of storage, or leave out --standby",
            disk.volume
        ),
        None => Ok(()),
    }
}

/// The part in a handoff of volumes whose storage keeps nobody out.
#[allow(clippy::type_complexity, reason = "as VmHandoff::new has it")]
fn cooperative(
    config: &Config,
    volumes: &[(String, Arc<dyn Volume>)],
) -> anyhow::Result<(Option<Arc<CooperativeVm>>, Vec<Option<MemberHandle>>)> {
    let volumes: Vec<_> = volumes.iter().map(|(_, volume)| Arc::clone(volume)).collect();
    let standby = config.standby.then_some(config.only_for).flatten();
    let made = CooperativeVm::new(&config.owner, standby, &volumes);
    if config.standby && standby.is_none() && made.0.is_some() {
        anyhow::bail!(
            "to stand by for volumes of an NBD server, which keeps nobody out, a backend must know the try: --standby=ID/ATTEMPT"
        );
    }
    Ok(made)
}

fn vm_of<'a>(
    config: &Config,
    servers: impl Iterator<Item = &'a DiskServer>,
    handoff: Option<Arc<VmHandoff>>,
    cooperative: Option<Arc<CooperativeVm>>,
) -> Vm {
    let disks = servers.zip(&config.disks).map(|(server, disk)| VmDisk {
        disk: Arc::clone(server.disk()),
        socket: describe(&disk.socket),
        volume: disk.volume.clone(),
    });
    Vm { owner: config.owner.clone(), disks: disks.collect(), handoff, cooperative }
}

fn describe(socket: &SocketSource) -> String {
    match socket {
        SocketSource::Path(path) => path.display().to_string(),
        SocketSource::Fd(fd) => format!("fd:{fd}"),
        SocketSource::Systemd => "systemd".to_owned(),
    }
}

fn front_ends(disk: &DiskConfig, activated: &mut Activated) -> anyhow::Result<FrontEnds> {
    let front_ends = match &disk.socket {
        SocketSource::Path(path) => FrontEnds::bind(path, &disk.permissions)?,
        SocketSource::Fd(fd) => FrontEnds::from_fd(*fd)?,
        SocketSource::Systemd => FrontEnds::from_fd(activated.claim(&disk.options.name)?)?,
    };
    Ok(front_ends)
}

/// Sockets from systemd (`LISTEN_FDS`), found by name or, where the unit gives
/// none, in order.
struct Activated(Vec<(String, i32)>);

impl Activated {
    /// First passed descriptor (sd_listen_fds(3)).
    const FIRST: i32 = 3;

    fn take() -> Self {
        let var = |name| std::env::var(name).unwrap_or_default();
        if var("LISTEN_PID").parse() != Ok(std::process::id()) {
            return Self(Vec::new());
        }
        let count: i32 = var("LISTEN_FDS").parse().unwrap_or(0);
        let names = var("LISTEN_FDNAMES");
        let mut names = names.split(':');
        Self(
            (0..count)
                .map(|at| (names.next().unwrap_or("").to_owned(), Self::FIRST + at))
                .collect(),
        )
    }

    fn claim(&mut self, disk: &str) -> anyhow::Result<i32> {
        let named = self.0.iter().position(|(name, _)| name == disk);
        let unnamed = || (!self.0.is_empty()).then_some(0);
        let at = named.or_else(unnamed).with_context(|| {
            format!("disk {disk}: systemd passed no socket for it; add FileDescriptorName={disk} to a socket unit")
        })?;
        Ok(self.0.remove(at).1)
    }
}
