//! A backend with its storage server, started the same way for every kind: on one CPU, on data in memory.

use crate::bench::callgrind::Callgrind;
use crate::bench::cpu::pin_command;
use crate::blk::Request;
use crate::ceph::{Ceph, POOL};
use crate::daemon::Daemon;
use crate::raw_frontend::{Options, RawFrontend};
use crate::workspace::{TestDir, program, system_program};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(20);
/// The key of backend and server, in the stack's folder, where qemu-storage-daemon looks for this name.
const TLS_KEY: &str = "keys.psk";
const TLS_USER: &str = "bench";

/// What serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// baton-backend and baton-storage.
    Baton,
    /// qemu-storage-daemon's vhost-user-blk export over its NBD client to qemu-nbd.
    Qsd,
    /// The same over nbdkit's file plugin, which is faster than qemu-nbd.
    QsdNbdkit,
    /// baton-backend and baton-storage over a Unix socket.
    BatonUnix,
    /// qemu-storage-daemon and nbdkit's file plugin over a Unix socket.
    QsdNbdkitUnix,
    /// baton-backend on a local file, without a storage server: what the backend alone costs.
    BatonFile,
    /// qemu-storage-daemon on a local file, with its threads.
    QsdFile,
    /// qemu-storage-daemon on a local file through io_uring.
    QsdFileUring,
    /// Baton's backend on a volume that does nothing (`baton-bench-null`): what ring and front-end cost.
    BatonNull,
    /// qemu-storage-daemon on its null-co driver, which does nothing.
    QsdNull,
    /// baton-backend as an NBD client of nbdkit's file plugin.
    BatonNbd,
    /// The same over a Unix socket.
    BatonNbdUnix,
    /// The same over TCP through TLS, with a key that both have.
    BatonNbdTls,
    /// qemu-storage-daemon over nbdkit's file plugin through TLS, with a key that both have.
    QsdNbdkitTls,
    /// baton-backend on an image of a Ceph cluster, through librbd.
    BatonRbd,
    /// qemu-storage-daemon on an image of the same cluster, through the same library and as it, without its cache.
    QsdRbd,
}

impl Kind {
    /// Whether its disk is an image of the cluster that all stacks of a round have together.
    #[must_use]
    pub fn is_rbd(self) -> bool {
        matches!(self, Self::BatonRbd | Self::QsdRbd)
    }

    /// Whether backend and server encrypt what they say.
    fn is_tls(self) -> bool {
        matches!(self, Self::BatonNbdTls | Self::QsdNbdkitTls)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Baton => "baton",
            Self::Qsd => "qsd",
            Self::QsdNbdkit => "qsd-nbdkit",
            Self::BatonUnix => "baton-unix",
            Self::QsdNbdkitUnix => "qsd-nbdkit-unix",
            Self::BatonFile => "baton-file",
            Self::QsdFile => "qsd-file",
            Self::QsdFileUring => "qsd-file-uring",
            Self::BatonNull => "baton-null",
            Self::QsdNull => "qsd-null",
            Self::BatonNbd => "baton-nbd",
            Self::BatonNbdUnix => "baton-nbd-unix",
            Self::BatonNbdTls => "baton-nbd-tls",
            Self::QsdNbdkitTls => "qsd-nbdkit-tls",
            Self::BatonRbd => "baton-rbd",
            Self::QsdRbd => "qsd-rbd",
        })
    }
}

/// `--poll-us` of each; 0 is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PollUs {
    /// Of the backend.
    pub backend: u64,
    /// Of the storage server.
    pub server: u64,
}

/// How to start one.
#[derive(Clone, Copy, Debug)]
pub struct StackConfig<'a> {
    /// What.
    pub kind: Kind,
    /// Queues of the disk.
    pub queues: u16,
    /// Size of the disk.
    pub bytes: u64,
    /// The CPU for both processes; `None` for all.
    pub cpu: Option<usize>,
    /// Run both under callgrind.
    pub callgrind: bool,
    /// How long Baton's own look for work before they sleep.
    pub poll: PollUs,
    /// Where images of [`Kind::is_rbd`] are.
    pub ceph: Option<&'a Ceph>,
}

impl StackConfig<'_> {
    fn ceph(&self) -> Result<&Ceph> {
        self.ceph.with_context(|| format!("{} needs a cluster of Ceph", self.kind))
    }
}

/// A running pair.
#[derive(Debug)]
pub struct Stack {
    backend: Daemon,
    server: Server,
    socket: PathBuf,
    /// Data and logs; goes last.
    dir: TestDir,
}

/// What serves the data.
#[derive(Debug)]
enum Server {
    /// Nobody: it is a local file, or none.
    None,
    Own(Daemon),
    /// The OSD of the cluster, which outlives the stack.
    Shared(u32),
}

impl Server {
    fn pid(&self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Own(daemon) => Some(daemon.pid()),
            Self::Shared(pid) => Some(*pid),
        }
    }
}

impl Stack {
    /// Starts both processes on fresh data and fills the disk.
    pub fn start(config: &StackConfig<'_>) -> Result<Self> {
        let dir = TestDir::in_memory("bench")?;
        let socket = dir.join("disk.sock");
        let (server, backend) = match config.kind {
            Kind::Baton | Kind::BatonUnix => baton(config, dir.path(), &socket)?,
            Kind::BatonFile => (Server::None, baton_file(config, dir.path(), &socket)?),
            Kind::BatonNull => (Server::None, baton_null(config, dir.path(), &socket)?),
            Kind::BatonNbd | Kind::BatonNbdUnix | Kind::BatonNbdTls => {
                baton_nbd(config, dir.path(), &socket)?
            }
            Kind::BatonRbd => {
                let image = image(config, dir.path())?;
                let volume = config.ceph()?.uri(&image);
                let backend = baton_backend(config, dir.path(), &socket, &volume)?;
                (Server::Shared(config.ceph()?.osd.pid()), backend)
            }
            Kind::Qsd
            | Kind::QsdNbdkit
            | Kind::QsdNbdkitUnix
            | Kind::QsdNbdkitTls
            | Kind::QsdFile
            | Kind::QsdFileUring
            | Kind::QsdNull
            | Kind::QsdRbd => qsd(config, dir.path(), &socket)?,
        };
        fill(&socket, config.bytes)?;
        Ok(Self { backend, server, socket, dir })
    }

    /// The vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The backend and, if there is one, the storage server.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        std::iter::once(self.backend.pid()).chain(self.server.pid()).collect()
    }

    /// The backend and the storage server, if they run under callgrind.
    #[must_use]
    pub fn callgrinds(&self) -> Vec<Callgrind> {
        let (names, dir) = (["baton-backend", "baton-storage"], self.dir.path());
        let all = self.pids().into_iter().zip(names);
        all.map(|(pid, name)| Callgrind::new(pid, &profile(dir, name))).collect()
    }

    /// Resident memory of the backend, in bytes.
    pub fn backend_resident_bytes(&self) -> Result<u64> {
        self.backend.resident_bytes()
    }
}

fn start(
    config: &StackConfig<'_>,
    dir: &Path,
    name: &str,
    program: &Path,
    args: &[String],
) -> Result<Daemon> {
    let mut command = if config.callgrind {
        Callgrind::command(program, &profile(dir, name))?
    } else {
        Command::new(program)
    };
    command.args(args);
    if let Some(cpu) = config.cpu {
        pin_command(&mut command, cpu)?;
    }
    Daemon::start_command(dir, name, command)
}

/// Nothing for off, which is the default.
fn poll(us: u64) -> Vec<String> {
    if us == 0 { Vec::new() } else { vec!["--poll-us".to_owned(), us.to_string()] }
}

/// Where callgrind puts what it counted of a process.
fn profile(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.callgrind"))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn baton(config: &StackConfig<'_>, dir: &Path, socket: &Path) -> Result<(Server, Daemon)> {
    let (data, unix) = (dir.join("data"), dir.join("storage.sock"));
    let listen = "--listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --data-dir";
    let mut args = [words(listen), vec![data.display().to_string()]].concat();
    args.extend(poll(config.poll.server));
    if config.kind == Kind::BatonUnix {
        args.extend(["--listen-unix".to_owned(), unix.display().to_string()]);
    }
    let mut server = start(config, dir, "baton-storage", &program("baton-storage")?, &args)?;
    let line = server.wait_line("listening data=", START_TIMEOUT)?;
    let address = |name: &str| {
        let found = line.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
        found
            .map(str::to_owned)
            .with_context(|| format!("baton-storage did not say {name}=ADDRESS: {line}"))
    };
    let (data, admin) = (address("data")?, address("admin")?);
    let create = format!("volume create bench --size {} --server {admin}", config.bytes);
    let created = Command::new(program("baton")?)
        .args(words(&create))
        .output()
        .context("cannot run baton")?;
    if !created.status.success() {
        bail!("baton {create} failed: {}", String::from_utf8_lossy(&created.stderr));
    }
    let volume = match config.kind {
        Kind::BatonUnix => format!("baton+unix:///bench?socket={}", unix.display()),
        _ => format!("baton://{data}/bench"),
    };
    let backend = baton_backend(config, dir, socket, &volume)?;
    Ok((Server::Own(server), backend))
}

fn baton_file(config: &StackConfig<'_>, dir: &Path, socket: &Path) -> Result<Daemon> {
    let file = dir.join("disk.img");
    File::create(&file)?.set_len(config.bytes)?;
    baton_backend(config, dir, socket, &format!("file://{}", file.display()))
}

fn baton_null(config: &StackConfig<'_>, dir: &Path, socket: &Path) -> Result<Daemon> {
    let StackConfig { queues, bytes, .. } = config;
    let flags = format!("--size {bytes} --num-queues {queues} --socket-path {}", socket.display());
    let program = program("baton-bench-null")?;
    let flags = [words(&flags), poll(config.poll.backend)].concat();
    let mut backend = start(config, dir, "baton-bench-null", &program, &flags)?;
    backend.wait_line("listening socket=", START_TIMEOUT)?;
    Ok(backend)
}

fn baton_nbd(config: &StackConfig<'_>, dir: &Path, socket: &Path) -> Result<(Server, Daemon)> {
    let file = dir.join("disk.img");
    File::create(&file)?.set_len(config.bytes)?;
    let (server, to) = nbd_server(config, dir, &file)?;
    let volume = match to {
        NbdAddress::Tcp(port) if config.kind.is_tls() => {
            let key = dir.join(TLS_KEY);
            format!("nbds://{TLS_USER}@127.0.0.1:{port}/?tls-psk-file={}", key.display())
        }
        NbdAddress::Tcp(port) => format!("nbd://127.0.0.1:{port}"),
        NbdAddress::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
    };
    Ok((Server::Own(server), baton_backend(config, dir, socket, &volume)?))
}

/// A new image, called as the stack's folder.
fn image(config: &StackConfig<'_>, dir: &Path) -> Result<String> {
    let name = dir.file_name().context("a folder without a name")?.to_string_lossy().into_owned();
    config.ceph()?.create_image(&name, config.bytes)?;
    Ok(name)
}

fn baton_backend(
    config: &StackConfig<'_>,
    dir: &Path,
    socket: &Path,
    volume: &str,
) -> Result<Daemon> {
    let queues = config.queues;
    let flags =
        format!("--volume {volume} --num-queues {queues} --socket-path {}", socket.display());
    let program = program("baton-backend")?;
    let flags = [words(&flags), poll(config.poll.backend)].concat();
    let mut backend = start(config, dir, "baton-backend", &program, &flags)?;
    backend.wait_line("listening socket=", START_TIMEOUT)?;
    Ok(backend)
}

fn qsd(config: &StackConfig<'_>, dir: &Path, socket: &Path) -> Result<(Server, Daemon)> {
    let file = dir.join("disk.img");
    File::create(&file)?.set_len(config.bytes)?;
    let path = file.display();
    let (server, blockdev) = match config.kind {
        Kind::QsdFile => (Server::None, format!("driver=file,node-name=disk,filename={path}")),
        Kind::QsdFileUring => {
            (Server::None, format!("driver=file,aio=io_uring,node-name=disk,filename={path}"))
        }
        // What is read is left as it was in the guest's memory, as baton-bench-null leaves it.
        Kind::QsdNull => {
            let size = config.bytes;
            (Server::None, format!("driver=null-co,node-name=disk,size={size},read-zeroes=off"))
        }
        // Without librbd's cache, as Baton has it: a write is done when the cluster has it.
        Kind::QsdRbd => {
            let (ceph, image) = (config.ceph()?, image(config, dir)?);
            let conf = ceph.conf();
            let blockdev = format!(
                "driver=rbd,node-name=disk,pool={POOL},image={image},conf={},cache.direct=on",
                conf.display()
            );
            (Server::Shared(ceph.osd.pid()), blockdev)
        }
        _ => {
            let (server, to) = nbd_server(config, dir, &file)?;
            let to = match to {
                NbdAddress::Tcp(port) => {
                    format!("server.type=inet,server.host=127.0.0.1,server.port={port}")
                }
                NbdAddress::Unix(path) => {
                    format!("server.type=unix,server.path={}", path.display())
                }
            };
            let tls = if config.kind.is_tls() { ",tls-creds=tls" } else { "" };
            (Server::Own(server), format!("driver=nbd,node-name=disk,{to}{tls}"))
        }
    };
    let export = format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={}",
        socket.display(),
        config.queues
    );
    let mut args = Vec::new();
    if config.kind.is_tls() {
        let key = format!(
            "tls-creds-psk,id=tls,endpoint=client,username={TLS_USER},dir={}",
            dir.display()
        );
        args.extend(["--object".to_owned(), key]);
    }
    args.extend(["--blockdev".to_owned(), blockdev, "--export".to_owned(), export]);
    let program = system_program("qemu-storage-daemon")?;
    let mut backend = start(config, dir, "qemu-storage-daemon", &program, &args)?;
    backend.wait_socket(socket, START_TIMEOUT)?;
    Ok((server, backend))
}

/// Where an NBD server is.
enum NbdAddress {
    /// On 127.0.0.1.
    Tcp(u16),
    Unix(PathBuf),
}

fn nbd_server(config: &StackConfig<'_>, dir: &Path, file: &Path) -> Result<(Daemon, NbdAddress)> {
    if matches!(config.kind, Kind::QsdNbdkitUnix | Kind::BatonNbdUnix) {
        let (unix, file) = (dir.join("nbd.sock"), file.display());
        let args = format!("--foreground --exit-with-parent --unix {} file {file}", unix.display());
        let mut server = start(config, dir, "nbdkit", &system_program("nbdkit")?, &words(&args))?;
        server.wait_socket(&unix, START_TIMEOUT)?;
        return Ok((server, NbdAddress::Unix(unix)));
    }
    // Free a moment ago; somebody else taking it meanwhile shows as a server that does not start.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let file = file.display();
    let (name, args) = if config.kind != Kind::Qsd {
        let listen = format!("-i 127.0.0.1 -p {port}{}", tls_server(config, dir)?);
        ("nbdkit", format!("--foreground --exit-with-parent {listen} file {file}"))
    } else {
        let listen = format!("--bind=127.0.0.1 --port={port}");
        ("qemu-nbd", format!("--format=raw --persistent --shared=16 {listen} {file}"))
    };
    let mut server = start(config, dir, name, &system_program(name)?, &words(&args))?;
    wait_port(&mut server, port)?;
    Ok((server, NbdAddress::Tcp(port)))
}

/// What a server that encrypts is told; makes the key.
fn tls_server(config: &StackConfig<'_>, dir: &Path) -> Result<String> {
    if !config.kind.is_tls() {
        return Ok(String::new());
    }
    let key = dir.join(TLS_KEY);
    // Of a machine that talks to itself; what it is makes no difference to the speed.
    std::fs::write(&key, format!("{TLS_USER}:{}\n", "5a".repeat(32)))?;
    Ok(format!(" --tls=require --tls-psk={}", key.display()))
}

/// Waits for a TCP server without talking to it.
fn wait_port(server: &mut Daemon, port: u16) -> Result<()> {
    let deadline = std::time::Instant::now() + START_TIMEOUT;
    // local address, remote address, state; 0A is LISTEN.
    let wanted = format!("0100007F:{port:04X} 00000000:0000 0A");
    loop {
        if std::fs::read_to_string("/proc/net/tcp")?.contains(&wanted) {
            return Ok(());
        }
        if !server.is_running()? || std::time::Instant::now() > deadline {
            bail!("the NBD server does not listen on port {port}:\n{}", server.log());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes every block once, so that no run measures the first write of one.
pub(super) fn fill(socket: &Path, bytes: u64) -> Result<()> {
    fill_every(socket, bytes, 1 << 20, 1 << 20)
}

/// Fills `chunk` bytes at the start of each `stride` of the first `bytes`; a chunk at most 1 MiB.
pub(super) fn fill_every(socket: &Path, bytes: u64, chunk: usize, stride: u64) -> Result<()> {
    let mut frontend =
        RawFrontend::connect(socket, Options { memory_bytes: 32 << 20, ..Options::default() })?;
    let data: Vec<u8> = (0..=250).cycle().take(chunk).collect();
    let queue = frontend.queue(0);
    let mut next = 0;
    while next < bytes || queue.ring.outstanding() > 0 {
        while next < bytes && queue.ring.outstanding() < 16 {
            let len = usize::try_from(bytes - next).unwrap_or(chunk).min(chunk);
            queue.submit(&Request::Write { sector: next / 512, data: &data[..len] })?;
            next += stride;
        }
        queue.kick()?;
        let done =
            queue.wait_completion(START_TIMEOUT)?.context("the disk does not take its data")?;
        done.ok().context("filling the disk")?;
    }
    queue.flush()
}
