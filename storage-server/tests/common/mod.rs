//! A server to test against, in this process or its own, and a client that
//! blocks and says exactly what it is told to.

#![allow(dead_code, unreachable_pub, reason = "each test file is a crate and uses its part")]

pub mod handoff;
pub mod restart;
pub mod small_disk;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::{
    AccessMode, Epoch, Features, Hello, Opcode, QueueId, ReplyHeader, RequestHeader, Seq,
    SessionId, Status, Welcome,
};
use baton_storage_server::config::{Config, Flags};
use baton_storage_server::server::{self, Server};
use baton_storage_server::volumes::RunningVolume;
use clap::Parser;
use tempfile::TempDir;

/// Longer than anything that works takes.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A server in this process.
pub struct Fixture {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    server: Option<Server>,
    runtime: tokio::runtime::Runtime,
    pub dir: TempDir,
}

/// Which way reads go.
#[derive(Clone, Copy, Debug)]
pub enum Reads {
    /// From memory, large ones straight to the socket.
    Hot,
    /// From memory, all through a buffer.
    Copied,
    /// As if from the disk, by io_uring where the kernel allows it.
    Uring,
    /// As if from the disk, by plain threads.
    Threads,
}

pub const ALL_READS: [Reads; 4] = [Reads::Hot, Reads::Copied, Reads::Uring, Reads::Threads];

pub fn config(dir: &Path, flags: &[&str]) -> Config {
    let data = dir.join("data");
    let base = ["baton-storage", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let all = base.iter().chain(flags).map(std::ffi::OsString::from);
    let data = ["--data-dir".into(), data.into_os_string()];
    Config::load(Flags::try_parse_from(all.chain(data)).expect("flags")).expect("config")
}

impl Fixture {
    pub fn start() -> Self {
        Self::with(&[], |_| ())
    }

    pub fn reading(reads: Reads) -> Self {
        Self::with(&[], |config| {
            config.cold_reads = matches!(reads, Reads::Uring | Reads::Threads);
            config.mapped_reads = !matches!(reads, Reads::Copied);
            config.io_uring = matches!(reads, Reads::Uring);
        })
    }

    pub fn with(flags: &[&str], change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = config(dir.path(), flags);
        change(&mut config);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let server = runtime.block_on(server::start(config)).expect("the server starts");
        let (data, admin) = (server.data, server.admin);
        Self { data, admin, server: Some(server), runtime, dir }
    }

    pub fn create(&self, name: &str, size: u64) {
        create(self.admin, name, size);
    }

    pub fn volume(&self, name: &str) -> Arc<RunningVolume> {
        let server = self.server.as_ref().expect("running");
        server.volumes().get(name).expect("the volume exists")
    }

    pub fn stop(&mut self) {
        let server = self.server.take().expect("running");
        self.runtime.block_on(server.stop()).expect("a clean stop");
    }

    pub fn owner(&self, volume: &str, who: &str, session: u64) -> Client {
        Client::welcomed(self.data, volume, who, session)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if self.server.is_some() && !std::thread::panicking() {
            self.stop();
        }
    }
}

pub fn create(admin: SocketAddr, name: &str, size: u64) {
    let body = format!("{{\"name\":\"{name}\",\"size_bytes\":{size}}}");
    let (status, text) = http(admin, "POST", "/v1/volumes", &body);
    assert_eq!(status, 201, "{text}");
}

/// One HTTP request, answered with status and body.
pub fn http(admin: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let (head, body) = http_whole(admin, method, path, body);
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status line");
    (status, body)
}

pub fn http_whole(admin: SocketAddr, method: &str, path: &str, body: &str) -> (String, String) {
    let mut stream = TcpStream::connect(admin).expect("the admin API listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

pub fn metric(admin: SocketAddr, name: &str) -> u64 {
    let (_, page) = http(admin, "GET", "/metrics", "");
    let line =
        page.lines().find(|line| line.strip_prefix(name).is_some_and(|l| l.starts_with(' ')));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {page}"))
}

/// Waits until `done`; panics with `what` when it takes too long.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client of one connection.
pub struct Client {
    pub stream: TcpStream,
    pub session: SessionId,
    pub queue: QueueId,
    pub epoch: Epoch,
    pub seq: u64,
}

/// What a HELLO says.
#[derive(Clone)]
pub struct Greeting {
    pub volume: String,
    pub owner: String,
    pub mode: AccessMode,
    pub session: u64,
    pub queue: u16,
    pub epoch: u64,
    pub resume_from: u64,
    pub versions: (u16, u16),
    pub features: u64,
}

pub fn greeting(volume: &str, owner: &str, session: u64) -> Greeting {
    Greeting {
        volume: volume.to_owned(),
        owner: owner.to_owned(),
        mode: AccessMode::Owner,
        session,
        queue: 0,
        epoch: 0,
        resume_from: 1,
        versions: (1, 1),
        features: u64::MAX,
    }
}

impl Greeting {
    pub fn bytes(&self) -> Vec<u8> {
        let body = Hello {
            version_oldest: self.versions.0,
            version_newest: self.versions.1,
            mode: self.mode,
            features: Features(self.features),
            resume_from: Seq(self.resume_from),
            owner: self.owner.clone(),
            volume: self.volume.clone(),
            token: Vec::new(),
        }
        .encode();
        let header = RequestHeader {
            opcode: Opcode::Hello,
            flags: 0,
            queue: QueueId(self.queue),
            seq: Seq(0),
            epoch: Epoch(self.epoch),
            session: SessionId(self.session),
            offset: 0,
            len: 0,
            payload_len: u32::try_from(body.len()).expect("short"),
            payload_crc32c: 0,
        };
        [&header.encode()[..], &body].concat()
    }
}

impl Client {
    pub fn connect(data: SocketAddr) -> Self {
        let stream = TcpStream::connect(data).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self { stream, session: SessionId(0), queue: QueueId(0), epoch: Epoch(0), seq: 0 }
    }

    pub fn welcomed(data: SocketAddr, volume: &str, who: &str, session: u64) -> Self {
        Self::greet(data, &greeting(volume, who, session)).expect("welcomed").0
    }

    /// Connects and says HELLO.
    pub fn greet(
        data: SocketAddr,
        greeting: &Greeting,
    ) -> Result<(Self, Welcome), (Status, String)> {
        let mut client = Self::connect(data);
        client.raw(&greeting.bytes());
        let welcome = client.welcome(greeting)?;
        Ok((client, welcome))
    }

    /// Reads the answer to a HELLO.
    pub fn welcome(&mut self, greeting: &Greeting) -> Result<Welcome, (Status, String)> {
        let (header, body) = self.reply();
        assert_eq!(header.opcode, Opcode::Hello);
        if header.status != Status::Ok {
            return Err((header.status, String::from_utf8(body).expect("a sentence")));
        }
        let welcome = Welcome::decode(&body).expect("a WELCOME");
        self.session = SessionId(greeting.session);
        self.queue = QueueId(greeting.queue);
        self.epoch = welcome.epoch;
        self.seq = greeting.resume_from - 1;
        Ok(welcome)
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    pub fn header(&mut self, opcode: Opcode, offset: u64, len: u64) -> RequestHeader {
        self.seq += 1;
        RequestHeader {
            opcode,
            flags: 0,
            queue: self.queue,
            seq: Seq(self.seq),
            epoch: self.epoch,
            session: self.session,
            offset,
            len,
            payload_len: 0,
            payload_crc32c: 0,
        }
    }

    pub fn send(&mut self, opcode: Opcode, offset: u64, len: u64) -> u64 {
        let header = self.header(opcode, offset, len);
        self.raw(&header.encode());
        self.seq
    }

    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> u64 {
        let request = self.write_request(offset, data);
        self.raw(&request);
        self.seq
    }

    /// The bytes of a WRITE, with the next number.
    pub fn write_request(&mut self, offset: u64, data: &[u8]) -> Vec<u8> {
        let mut header = self.header(Opcode::Write, offset, data.len() as u64);
        header.payload_len = u32::try_from(data.len()).expect("short");
        [&header.encode()[..], data].concat()
    }

    pub fn reply(&mut self) -> (ReplyHeader, Vec<u8>) {
        self.try_reply().expect("a reply")
    }

    pub fn try_reply(&mut self) -> std::io::Result<(ReplyHeader, Vec<u8>)> {
        let mut head = [0; 32];
        self.stream.read_exact(&mut head)?;
        let header = ReplyHeader::decode(&head).expect("a reply header");
        let mut body = vec![0; header.payload_len as usize];
        self.stream.read_exact(&mut body)?;
        Ok((header, body))
    }

    /// Sends one request and waits for its answer.
    pub fn call(&mut self, opcode: Opcode, offset: u64, len: u64) -> (Status, Vec<u8>) {
        let seq = self.send(opcode, offset, len);
        self.answer(seq)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Status {
        let seq = self.send_write(offset, data);
        self.answer(seq).0
    }

    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let (status, data) = self.call(Opcode::Read, offset, len);
        assert_eq!(status, Status::Ok);
        data
    }

    pub fn answer(&mut self, seq: u64) -> (Status, Vec<u8>) {
        let (header, body) = self.reply();
        assert_eq!(header.seq, Seq(seq), "the answer to another request");
        (header.status, body)
    }

    /// Whether the server closed the connection (after what it may have said).
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Whether nothing comes for a while.
    pub fn is_quiet(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).expect("a timeout");
        let mut byte = [0];
        let quiet = self.stream.peek(&mut byte).is_err();
        self.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        quiet
    }
}

/// A server in its own process.
pub struct Daemon {
    pub child: Child,
    pub data: SocketAddr,
    pub admin: SocketAddr,
    pub ready: String,
    said: Option<std::thread::JoinHandle<String>>,
}

pub fn daemon_command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton-storage"));
    arguments(&mut command, dir);
    command
}

/// What every server of a test is told.
pub fn arguments(command: &mut Command, dir: &Path) {
    command
        .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.join("data"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
}

impl Daemon {
    /// `BATON_POLL_US` starts it with busy polling.
    pub fn start(dir: &Path) -> Self {
        let mut command = daemon_command(dir);
        if let Some(poll_us) = std::env::var_os("BATON_POLL_US") {
            command.arg("--poll-us").arg(poll_us);
        }
        Self::from(command)
    }

    pub fn from(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the binary runs");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let (mut said, mut ready) = (String::new(), String::new());
        while !ready.starts_with("listening ") {
            said += &std::mem::take(&mut ready);
            assert_ne!(log.read_line(&mut ready).expect("a log"), 0, "it ended early");
        }
        // Keep the pipe from filling.
        let said = std::thread::spawn(move || {
            log.read_to_string(&mut said).expect("a log");
            said
        });
        let address = |key: &str| {
            let value = ready.split(' ').find_map(|word| word.trim().strip_prefix(key));
            value.and_then(|value| value.parse().ok()).expect("an address")
        };
        let (data, admin) = (address("data="), address("admin="));
        Self { child, data, admin, ready, said: Some(said) }
    }

    /// What it said besides that it listens; after its end.
    pub fn said(&mut self) -> String {
        self.said.take().expect("asked once").join().expect("no panic")
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("sent");
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the server ends", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        status.expect("ended")
    }

    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
