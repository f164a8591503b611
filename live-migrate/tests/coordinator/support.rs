//! A real coordinator on a pretended cluster.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_live_migrate::client::{CallError, Client, Endpoint, Method};
use baton_live_migrate::identity::{Identity, Role};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::world::{Agent, Storage};

/// For whatever happens on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

static IDS: AtomicU64 = AtomicU64::new(1);

/// A new handoff id.
pub(crate) fn id() -> String {
    format!("01ARZ3NDEKTSV4RRFF{:08}", IDS.fetch_add(1, Ordering::Relaxed))
}

pub(crate) struct Cluster {
    pub(crate) storages: Vec<Arc<Storage>>,
    pub(crate) a: Arc<Agent>,
    pub(crate) b: Arc<Agent>,
    pub(crate) dir: TempDir,
    /// Data and admin addresses of real servers.
    pub(crate) real: Vec<(SocketAddr, SocketAddr)>,
}

impl Cluster {
    /// `web` on host-a with a volume on each of two servers.
    pub(crate) async fn new() -> Self {
        Self::with(&[&[("root", Some("host-a/web"))], &[("data", Some("host-a/web"))]]).await
    }

    pub(crate) async fn with(servers: &[&[(&str, Option<&str>)]]) -> Self {
        let mut storages = Vec::new();
        let mut disks = Vec::new();
        for volumes in servers {
            let storage = Storage::start(volumes).await;
            for (name, _) in *volumes {
                disks.push(
                    json!({"name": name, "volume": format!("baton://{}/{name}", storage.address)}),
                );
            }
            storages.push(storage);
        }
        let a = Agent::start("host-a", &storages).await;
        let b = Agent::start("host-b", &storages).await;
        a.meet(&b);
        b.meet(&a);
        let definition = json!({"name": "web", "vmm": "qemu", "disk": disks});
        a.with("web", |machine| {
            machine.definition = definition;
            machine.backend = Some("owner");
            machine.run = "running";
            machine.phase = "none";
        });
        Self { storages, a, b, dir: tempfile::tempdir().expect("temp dir"), real: Vec::new() }
    }

    /// Starts a coordinator with a journal of this name.
    pub(crate) async fn coordinator(&self, name: &str, danger: &str) -> Coordinator {
        let mut coordinator = self.spawn(name, danger);
        coordinator.ready().await;
        coordinator
    }

    /// The same, not waited for.
    pub(crate) fn spawn(&self, name: &str, danger: &str) -> Coordinator {
        let at = |file: &str| self.dir.path().join(file).display().to_string();
        let mut config = format!(
            "listen = \"unix:{}\"\njournal = \"{}\"\ncall_timeout_ms = 1000\n",
            at(&format!("{name}.sock")),
            at(&format!("{name}.redb")),
        );
        for agent in [&self.a, &self.b] {
            config += &format!(
                "[[host]]\nname = \"{}\"\nagent = \"http://{}\"\nmigration_uri = \"tcp:127.0.0.1:1\"\n",
                agent.host, agent.address
            );
        }
        for (data, admin) in &self.real {
            config += &format!("[[storage]]\ndata = \"{data}\"\nadmin = \"http://{admin}\"\n");
        }
        for storage in &self.storages {
            let address = storage.address;
            config += &format!("[[storage]]\ndata = \"{address}\"\nadmin = \"http://{address}\"\n");
        }
        // Keys of the whole file come first.
        config =
            if danger.starts_with('[') { config + danger } else { danger.to_owned() + &config };
        let file = at(&format!("{name}.toml"));
        std::fs::write(&file, config).expect("written");
        let log = at(&format!("{name}.log"));
        let open = OpenOptions::new().create(true).append(true).open(&log).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_baton-coordinator"))
            .args(["--config", &file])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(open)
            .spawn()
            .expect("it runs");
        let who = Identity::new(Role::Coordinator, "c").expect("a name");
        let endpoint: Endpoint =
            format!("unix:{}", at(&format!("{name}.sock"))).parse().expect("an endpoint");
        Coordinator { child, client: Client::new(who, endpoint, None, LIMIT), log }
    }

    /// The same, with a process that survives a limit on its files.
    pub(crate) async fn without_limit_signal(&self, name: &str) -> Coordinator {
        drop(self.coordinator(name, "").await);
        let file = self.dir.path().join(format!("{name}.toml"));
        let mut coordinator = self.spawn(name, "");
        let _ = coordinator.child.kill();
        let _ = coordinator.child.wait();
        coordinator.child = Command::new("sh")
            .args([
                "-c",
                "trap '' XFSZ; exec \"$@\"",
                "sh",
                env!("CARGO_BIN_EXE_baton-coordinator"),
                "--config",
            ])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it runs");
        coordinator.ready().await;
        coordinator
    }

    /// The source's machine stops, as at the end of a migration.
    pub(crate) fn seal(&self) {
        self.a.seal(&self.a.machine("web").definition);
    }

    /// The machines switch.
    pub(crate) fn switch(&self) {
        self.seal();
        assert!(self.b.activate("web", &self.b.machine("web").definition), "activated");
    }

    /// The source's machine is resumed before the destination runs.
    pub(crate) fn source_comes_back(&self) {
        self.seal();
        self.a.take_back(&self.a.machine("web").definition);
    }

    /// Who owns each volume, and that nothing is half-armed.
    pub(crate) fn owner(&self) -> String {
        let mut owners: Vec<String> = Vec::new();
        for storage in &self.storages {
            for name in storage.names() {
                let record = storage.record(&name);
                assert!(record.handoff.is_none(), "left armed: {record:?}");
                owners.push(record.owner.map_or_else(String::new, |owner| owner.name));
            }
        }
        owners.dedup();
        assert_eq!(owners.len(), 1, "the volumes have different owners: {owners:?}");
        owners.remove(0)
    }
}

/// Killed when dropped.
pub(crate) struct Coordinator {
    child: Child,
    pub(crate) client: Client,
    log: String,
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

impl Coordinator {
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    pub(crate) async fn ready(&mut self) {
        let start = Instant::now();
        while self.client.call(Method::GET, "/metrics", None).await.is_err_and(unreachable) {
            assert!(self.ended().is_none(), "it ended: {}", self.log());
            assert!(start.elapsed() < LIMIT, "it does not start: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        wait("it ends", async || self.ended().is_some()).await;
        self.ended().expect("just seen")
    }

    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Value,
    ) -> Result<Value, CallError> {
        let body = if body.is_null() { None } else { Some(&body) };
        self.client.call(method, path, body).await
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.call(Method::GET, path, Value::Null).await.expect("an answer")
    }

    pub(crate) async fn prepare(&self, id: &str) -> Result<Value, CallError> {
        let path = format!("/v1/vms/web/handoffs/{id}?wait=READY&timeout=30s");
        self.call(Method::PUT, &path, json!({"from": "host-a", "to": "host-b"})).await
    }

    pub(crate) async fn post(&self, id: &str, verb: &str) -> Result<Value, CallError> {
        self.call(Method::POST, &format!("/v1/vms/web/handoffs/{id}:{verb}"), Value::Null).await
    }

    /// The handoff once nothing is left to do.
    pub(crate) async fn over(&self, id: &str) -> Value {
        let row = self.get(&format!("/v1/vms/web/handoffs/{id}?wait=OVER&timeout=60s")).await;
        assert_eq!(row["over"], true, "{row:#}\n{}", self.log());
        row
    }
}

fn unreachable(error: CallError) -> bool {
    matches!(error, CallError::Unreachable { .. } | CallError::Silent { .. })
}

/// The type of a refusal.
pub(crate) fn kind(answer: Result<Value, CallError>) -> (String, String) {
    match answer {
        Err(CallError::Refused { kind, detail, .. }) => (kind, detail),
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) async fn wait(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !done().await {
        assert!(start.elapsed() < LIMIT, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Head and body of one exchange.
pub(crate) async fn raw(cluster: &Cluster, ask: &str) -> (String, String) {
    let socket = cluster.dir.path().join("c.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    let ask = format!("{ask}\r\nHost: c\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.expect("asked");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}
