//! Real NBD servers as processes, which can be killed with SIGKILL and started again.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// True when a test has to be skipped because the machine lacks a program; says so,
/// loudly. Never where tests must not be skipped (BATON_REQUIRE_QEMU=1, as in CI).
pub(crate) fn skip_without(test: &str, program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()));
    if found {
        return false;
    }
    assert!(
        std::env::var_os("BATON_REQUIRE_QEMU").is_none_or(|v| v != "1"),
        "BATON_REQUIRE_QEMU=1 forbids to skip {test}: there is no {program}; run scripts/setup.sh"
    );
    let _ = writeln!(std::io::stderr(), "\n**** SKIPPED: {test}: there is no {program} ****\n");
    true
}

/// A server on a Unix socket, or on a TCP port of this host.
pub(crate) struct NbdServer {
    program: &'static str,
    args: Vec<String>,
    socket: PathBuf,
    port: Option<u16>,
    process: Option<Child>,
}

impl NbdServer {
    /// nbdkit with these arguments, in the folder `dir`.
    pub(crate) fn nbdkit(dir: &Path, args: &[&str]) -> Self {
        let socket = dir.join("nbd.sock");
        let listen = ["-f", "--exit-with-parent", "-U", socket.to_str().expect("UTF-8")];
        Self::start("nbdkit", &[&listen[..], args].concat(), socket.clone())
    }

    /// The same on a TCP port of 127.0.0.1.
    pub(crate) fn nbdkit_tcp(dir: &Path, args: &[&str]) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let text = port.to_string();
        let listen = ["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &text];
        let args = [&listen[..], args].concat();
        let mut server = Self::new("nbdkit", &args, dir.join("none"));
        server.port = Some(port);
        server.restart();
        server
    }

    /// qemu-nbd with these arguments and the export `disk`.
    pub(crate) fn qemu(dir: &Path, args: &[&str]) -> Self {
        let socket = dir.join("nbd.sock");
        let path = socket.to_str().expect("UTF-8");
        let listen = ["--persistent", "-f", "raw", "-x", "disk", "-k", path];
        Self::start("qemu-nbd", &[&listen[..], args].concat(), socket.clone())
    }

    fn start(program: &'static str, args: &[&str], socket: PathBuf) -> Self {
        let mut server = Self::new(program, args, socket);
        server.restart();
        server
    }

    fn new(program: &'static str, args: &[&str], socket: PathBuf) -> Self {
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Self { program, args, socket, port: None, process: None }
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        match self.port {
            Some(port) => format!("nbd://127.0.0.1:{port}/{export}"),
            None => format!("nbd+unix:///{export}?socket={}", self.socket.display()),
        }
    }

    /// Through TLS; `user` is empty or ends with an at sign.
    pub(crate) fn tls_uri(&self, user: &str, export: &str, more: &str) -> String {
        match self.port {
            Some(port) => format!("nbds://{user}127.0.0.1:{port}/{export}?{more}"),
            None => {
                let socket = self.socket.display();
                format!("nbds+unix://{user}/{export}?socket={socket}&{more}")
            }
        }
    }

    /// Starts it on its socket, and waits until it listens.
    pub(crate) fn restart(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let process = Command::new(self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program));
        let process = self.process.insert(process);
        let until = Instant::now() + Duration::from_secs(10);
        // qemu-nbd with one place would count a look at its socket as its client.
        let (socket, port) = (self.socket.clone(), self.port);
        let is_there = move || match port {
            Some(port) => std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(),
            None => socket.exists(),
        };
        while !is_there() {
            assert!(Instant::now() < until, "{} does not listen", self.program);
            if let Some(status) = process.try_wait().expect("wait") {
                panic!("{} ended: {status}: {:?}", self.program, self.args);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// From the next start on, in front of all others.
    pub(crate) fn add_argument(&mut self, arg: &str) {
        self.args.insert(0, arg.to_owned());
    }

    /// Starts it again if it has ended.
    pub(crate) fn revive(&mut self) {
        let ended = |process: &mut Child| process.try_wait().is_ok_and(|status| status.is_some());
        if self.process.as_mut().is_some_and(ended) {
            self.restart();
        }
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let process = self.process.as_ref().expect("running");
        let pid = nix::unistd::Pid::from_raw(process.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("our child");
        if signal != nix::sys::signal::Signal::SIGSTOP {
            return;
        }
        // Each thread stops when it is next seen by the kernel, which takes a while on a busy machine.
        let until = Instant::now() + Duration::from_secs(10);
        let stopped = || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("tasks");
            tasks.flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
            })
        };
        while !stopped() {
            assert!(Instant::now() < until, "it does not stop");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether somebody could connect.
    pub(crate) fn listens(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A file of zeros.
pub(crate) fn disk(dir: &Path, bytes: u64) -> String {
    let path = dir.join("disk.img");
    std::fs::File::create(&path).expect("create").set_len(bytes).expect("size");
    path.to_str().expect("UTF-8").to_owned()
}
