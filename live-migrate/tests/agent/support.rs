//! An agent in a directory of its own, with pretended backends.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton_live_migrate::client::{CallError, Client, Method};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::small_disk::SmallDisk;

/// For whatever happens on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Disks of the VM `web` of the configuration.
pub(crate) const WEB: &str = "[[vm]]\nname = \"web\"\nvmm = \"qemu\"\n[[vm.disk]]\nname = \"root\"\nvolume = \"baton://s:1/root\"\n[[vm.disk]]\nname = \"data\"\nvolume = \"baton://s:1/data\"\n";

/// A process that stands for a VM's machine: the pretended backend says that it is at the disks, also when it has ended.
/// Killed when dropped.
pub(crate) struct Machine(Child);

impl Machine {
    pub(crate) fn at_the_disks_of(agent: &Agent) -> Self {
        let child = Command::new("sleep")
            .arg("600")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sleep");
        std::fs::write(agent.path("run/web/control.front-end"), child.id().to_string())
            .expect("written");
        Self(child)
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("a pid")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Killed when dropped, like its backends.
pub(crate) struct Agent {
    pub(crate) dir: TempDir,
    /// Under its state, where it has one of its own.
    pub(crate) disk: Option<SmallDisk>,
    child: Option<Child>,
}

impl Agent {
    /// With `backend` as the lines of a shell script that may end in `exec_pretended`.
    pub(crate) fn with(backend: &str, backend_keys: &str, more: &str) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let exe = std::env::current_exe().expect("this program");
        let script = format!(
            "#!/bin/sh\nexec_pretended() {{ PRETENDED_ARGUMENTS=\"$*\" exec {} --exact pretended_backend --ignored --nocapture; }}\n{backend}\n",
            exe.display()
        );
        std::fs::write(at("backend"), script).expect("write");
        std::fs::set_permissions(at("backend"), std::fs::Permissions::from_mode(0o755))
            .expect("mode");
        let manager = if backend_keys.contains("manager") { "" } else { "manager = \"child\"\n" };
        let config = format!(
            "host = \"host-a\"\n[listen]\naddress = \"unix:{}\"\n[paths]\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n[backend]\n{manager}program = \"{}\"\n{backend_keys}\n{more}",
            at("agent.sock"),
            at("state"),
            at("run"),
            at("backend"),
        );
        std::fs::write(at("agent.toml"), config).expect("write");
        Self { dir, disk: None, child: None }
    }

    /// The usual one, running.
    pub(crate) async fn start() -> Self {
        let mut agent = Self::with("exec_pretended \"$@\"", "", WEB);
        agent.run().await;
        agent
    }

    pub(crate) async fn run(&mut self) {
        self.spawn();
        wait("the agent answers", async || self.get("/healthz").await.is_ok()).await;
    }

    /// Starts it without waiting.
    pub(crate) fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("log");
        let program = env!("CARGO_BIN_EXE_baton-agent");
        let command = self.disk.as_ref().map(|disk| disk.command(program));
        let child = command
            .unwrap_or_else(|| Command::new(program))
            .arg("--config")
            .arg(self.path("agent.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("agent");
        self.child = Some(child);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("runs");
        kill(Pid::from_raw(i32::try_from(child.id()).expect("pid")), signal).expect("signal");
    }

    /// Signals the agent and waits for its end.
    pub(crate) fn end(&mut self, with: Signal) {
        self.signal(with);
        self.child.take().expect("runs").wait().expect("ended");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// On the small disk, where there is one.
    fn log_path(&self) -> PathBuf {
        match &self.disk {
            Some(disk) => disk.path("agent.log"),
            None => self.path("agent.log"),
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, CallError> {
        self.client().call(method, path, body.as_ref()).await
    }

    /// Somebody without a term.
    pub(crate) fn client(&self) -> Client {
        let endpoint = format!("unix:{}", self.path("agent.sock").display());
        let who = "baton://host/host-a".parse().expect("identity");
        Client::new(who, endpoint.parse().expect("endpoint"), None, LIMIT)
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value, CallError> {
        match self.call(Method::GET, path, None).await {
            // Plain text, which is an answer.
            Err(CallError::Foreign { .. }) if path == "/healthz" => Ok(Value::Null),
            answer => answer,
        }
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Result<Value, CallError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Result<Value, CallError> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Value, CallError> {
        self.call(Method::DELETE, path, None).await
    }

    pub(crate) async fn start_backend(&self, role: &str) -> Value {
        self.put("/v1/vms/web/backend", json!({"role": role})).await.expect("started")
    }

    /// A standby for one try.
    pub(crate) async fn start_for(&self, attempt: &str) -> Value {
        let told = json!({"role": "standby", "try": attempt});
        self.put("/v1/vms/web/backend", told).await.expect("started")
    }

    pub(crate) async fn backend(&self) -> Value {
        self.get("/v1/vms/web").await.expect("a view")["backend"].take()
    }

    /// The agent itself has this file open.
    pub(crate) fn holds_open(&self, path: &Path) -> bool {
        let child = self.child.as_ref().expect("runs");
        let Ok(open) = std::fs::read_dir(format!("/proc/{}/fd", child.id())) else { return false };
        open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).any(|at| at == path)
    }

    /// Waits until the backend runs with another process than `pid`.
    pub(crate) async fn wait_successor(&self, pid: i32) -> i32 {
        wait("a successor", async || {
            let state = self.backend().await;
            state["run"] == "running" && state["pid"] != pid
        })
        .await;
        pid_of(&self.backend().await)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // What outlives the agent must not outlive the test.
        let Ok(processes) = std::fs::read_dir("/proc") else { return };
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        for pid in pids.filter(|pid| is_ours(*pid, self.dir.path())) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Its arguments name a file of this directory.
fn is_ours(pid: i32, dir: &Path) -> bool {
    let dir = dir.display().to_string();
    ["cmdline", "environ"].iter().any(|file| {
        let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        String::from_utf8_lossy(&text).contains(&dir)
    })
}

pub(crate) fn pid_of(state: &Value) -> i32 {
    state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid")
}

/// Whether a process is there and no zombie.
pub(crate) fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal");
}

/// Stops a process. The signal takes effect in one thread after the other.
pub(crate) async fn freeze(pid: i32) {
    signal(pid, Signal::SIGSTOP);
    wait("frozen", async || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
        threads.filter_map(|thread| Some(thread.ok()?.path().join("stat"))).all(|stat| {
            let stat = std::fs::read_to_string(stat).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    })
    .await;
}

/// Waits for what must happen sooner or later.
pub(crate) async fn wait(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let until = tokio::time::Instant::now() + LIMIT;
    while !happened().await {
        assert!(tokio::time::Instant::now() < until, "{what}: not within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Status, type and detail of a refusal.
pub(crate) fn refused(result: Result<Value, CallError>) -> (u16, String, String) {
    match result {
        Err(CallError::Refused { status, kind, detail, .. }) => (status, kind, detail),
        other => panic!("{other:?}"),
    }
}
