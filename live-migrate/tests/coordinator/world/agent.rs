//! A host's agent: its machines and backends are pretended.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post, put};
use axum::{Json, Router, middleware};
use baton_protocol::access::{AccessRecord, By, Input};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::storage::Storage;
use super::{Answer, problem, session};

/// A VM at a host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) definition: Value,
    /// `owner`, `standby`, or none.
    pub(crate) backend: Option<&'static str>,
    pub(crate) run: &'static str,
    pub(crate) phase: &'static str,
    /// Overrides what the backend would say.
    pub(crate) standing: Option<&'static str>,
    /// Overrides all that it would say of the handoff.
    pub(crate) handoff: Option<Value>,
    /// An incoming migration that never starts to run.
    pub(crate) stuck: bool,
    /// So often its guest resets in the copy of memory.
    pub(crate) resets: u32,
    /// Standby backends started so far.
    pub(crate) stood_by: u32,
    /// For which tries, where that was said.
    pub(crate) stood_for: Vec<Value>,
}

/// A host's agent, with its backends and machines.
pub(crate) struct Agent {
    pub(crate) host: String,
    pub(crate) address: SocketAddr,
    pub(crate) vms: Mutex<BTreeMap<String, Machine>>,
    storages: Vec<Arc<Storage>>,
    peers: Mutex<Vec<Arc<Agent>>>,
    pub(crate) silent: AtomicBool,
    /// Takes no VM from outside.
    pub(crate) refuses: AtomicBool,
    /// Starts no backend, for it has no room to remember it.
    pub(crate) full: AtomicBool,
    /// Knows of no try that a backend is started for.
    pub(crate) is_old: AtomicBool,
    /// What it did by itself.
    pub(crate) did: Mutex<Vec<Value>>,
}

impl Agent {
    pub(crate) async fn start(host: &str, storages: &[Arc<Storage>]) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let agent = Arc::new(Self {
            host: host.to_owned(),
            address: listener.local_addr().expect("an address"),
            vms: Mutex::default(),
            storages: storages.to_vec(),
            peers: Mutex::default(),
            silent: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
            full: AtomicBool::new(false),
            is_old: AtomicBool::new(false),
            did: Mutex::default(),
        });
        let app = Router::new()
            .route("/v1/events", get(agent_events))
            .route("/v1/vms", get(agent_list))
            .route("/v1/vms/{vm}", get(agent_show).put(agent_define))
            .route("/v1/vms/{vm}/backend", put(agent_start).delete(agent_stop))
            .route("/v1/vms/{vm}/backend/{what}", post(agent_order))
            .route("/v1/vms/{vm}/vmm/{what}", post(agent_monitor))
            .layer(middleware::from_fn_with_state(Arc::clone(&agent), agent_hush))
            .with_state(Arc::clone(&agent));
        tokio::spawn(async move { axum::serve(listener, app).await });
        agent
    }

    pub(crate) fn meet(&self, peer: &Arc<Agent>) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(peer));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Machine>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn with<T>(&self, vm: &str, act: impl FnOnce(&mut Machine) -> T) -> T {
        act(self.lock().entry(vm.to_owned()).or_default())
    }

    pub(crate) fn machine(&self, vm: &str) -> Machine {
        self.lock().get(vm).cloned().unwrap_or_default()
    }

    /// What it has sent arrives: the machine that waits for it runs, if it can.
    fn switch_peers(&self, vm: &str) -> bool {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut moved = false;
        for peer in peers {
            let there = peer.machine(vm);
            if there.run == "incoming" && !there.stuck && peer.activate(vm, &there.definition) {
                peer.with(vm, |m| (m.run, m.phase) = ("running", "completed"));
                moved = true;
            }
        }
        moved
    }

    /// The VM's volumes, by its definition.
    fn volumes(&self, definition: &Value) -> Vec<(Arc<Storage>, String)> {
        let disks = definition["disk"].as_array().cloned().unwrap_or_default();
        let place = |disk: &Value| {
            let uri = disk["volume"].as_str().expect("a volume");
            let (data, name) = uri.strip_prefix("baton://")?.split_once('/')?;
            let storage = self.storages.iter().find(|s| s.address.to_string() == data)?;
            let there = storage.names().iter().any(|known| known == name);
            there.then(|| (Arc::clone(storage), name.to_owned()))
        };
        disks.iter().filter_map(place).collect()
    }

    fn handoff(&self, vm: &str, machine: &Machine) -> Value {
        if let Some(handoff) = &machine.handoff {
            return handoff.clone();
        }
        let volumes = self.volumes(&machine.definition);
        let me = format!("{}/{vm}", self.host);
        let records: Vec<AccessRecord> = volumes.iter().map(|(s, n)| s.record(n)).collect();
        let mine = |r: &AccessRecord| {
            r.owner.as_ref().is_some_and(|o| o.name == me && o.session == session(&self.host))
        };
        let armed = records.iter().all(|r| r.handoff.as_ref().is_some_and(|h| h.plan.to == me));
        let id = records.first().and_then(|r| r.handoff.as_ref()).map(|h| h.plan.attempt);
        let standing = match machine.backend {
            _ if machine.standing.is_some() => machine.standing.expect("just seen"),
            Some(_) if records.iter().all(mine) => "serving",
            Some("standby") if armed => "ready",
            Some("standby") => "standby",
            Some(_) => "parked",
            None => return Value::Null,
        };
        json!({"standing": standing, "id": id.map(|t| t.id.to_string()), "attempt": id.map(|t| t.attempt),
            "timings": {"stop_us": 120, "seal_us": 300, "drain_us": 210, "activate_us": 260},
            "events": [{"at_unix_us": 1_700_000_000_000_000_u64, "event": "rings-stopped"},
                {"at_unix_us": 1_700_000_000_000_700_u64, "event": "rings-started"},
                {"at_unix_us": 1_700_000_000_000_900_u64, "event": "activated"}]})
    }

    /// The machine's rings stop: the backend seals what is armed.
    pub(crate) fn seal(&self, definition: &Value) {
        for (storage, name) in self.volumes(definition) {
            if let Some(handoff) = storage.record(&name).handoff {
                let (attempt, session) = (handoff.plan.attempt, session(&self.host));
                let _ = storage.step(&name, Input::Seal { attempt, session });
                let _ = storage.step(&name, Input::Sealed { attempt, session });
            }
        }
    }

    /// The source's rings start again: the backend asks the anchor.
    pub(crate) fn take_back(&self, definition: &Value) {
        let Some((storage, name)) = self.volumes(definition).into_iter().next() else { return };
        let attempt = storage.record(&name).handoff.expect("armed").plan.attempt;
        let me = format!("{}/web", self.host);
        let by = By::Backend { name: &me, session: session(&self.host) };
        storage.step(&name, Input::Reclaim { attempt, by }).expect("reclaimed");
    }

    /// The machine's rings start: the backend asks the anchor.
    pub(crate) fn activate(&self, vm: &str, definition: &Value) -> bool {
        let volumes = self.volumes(definition);
        let me = format!("{}/{vm}", self.host);
        let Some((storage, name)) = volumes.first() else { return false };
        let Some(handoff) = storage.record(name).handoff else { return false };
        let (attempt, session) = (handoff.plan.attempt, session(&self.host));
        let sealed = volumes.iter().all(|(s, n)| s.record(n).handoff.is_some_and(|h| h.sealed));
        sealed && storage.step(name, Input::Activate { attempt, name: &me, session }).is_ok()
    }
}

async fn agent_hush(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    if agent.silent.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
    next.run(request).await
}

fn shown(agent: &Agent, vm: &str, machine: &Machine) -> Value {
    json!({"definition": machine.definition,
        "backend": {"run": if machine.backend.is_some() { "running" } else { "stopped" }, "role": machine.backend},
        "status": {"handoff": agent.handoff(vm, machine)},
        "vmm": {"run": machine.run, "migration": {"phase": machine.phase}}})
}

async fn agent_events(
    State(agent): State<Arc<Agent>>,
    Query(query): Query<HashMap<String, String>>,
) -> Json<Value> {
    let since: usize = query["since"].parse().expect("a number");
    loop {
        let did = agent.did.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if did.len() > since || query["boot"] != "1" {
            let events = did.get(since.min(did.len())..).unwrap_or_default();
            return Json(json!({"boot": "1", "latest": did.len(), "events": events}));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn agent_list(State(agent): State<Arc<Agent>>) -> Json<Value> {
    let vms: Vec<Value> = agent.lock().iter().map(|(vm, m)| shown(&agent, vm, m)).collect();
    Json(json!({"host": agent.host, "vms": vms}))
}

async fn agent_show(State(agent): State<Arc<Agent>>, Path(vm): Path<String>) -> Answer {
    let machine = agent.lock().get(&vm).cloned();
    let machine = machine.ok_or_else(|| problem(404, "baton:no-such-vm", "no such VM"))?;
    Ok(Json(shown(&agent, &vm, &machine)))
}

async fn agent_define(
    State(agent): State<Arc<Agent>>,
    Path(vm): Path<String>,
    Json(definition): Json<Value>,
) -> Answer {
    if agent.refuses.load(Ordering::SeqCst) {
        return Err(problem(403, "baton:not-from-outside", "a disk is of this host").into());
    }
    agent.with(&vm, |machine| {
        machine.definition = definition;
        machine.run = "gone";
        machine.phase = "none";
    });
    Ok(Json(json!({})))
}

async fn agent_start(
    State(agent): State<Arc<Agent>>,
    Path(vm): Path<String>,
    Json(body): Json<Value>,
) -> Answer {
    if agent.full.load(Ordering::SeqCst) {
        return Err(problem(507, "baton:state-full", "the disk is full").into());
    }
    let told = body.get("try");
    if told.is_some() && agent.is_old.load(Ordering::SeqCst) {
        return Err(problem(400, "baton:bad-request", "unknown field `try`").into());
    }
    let standby = body["role"] == "standby";
    agent.with(&vm, |machine| {
        machine.stood_for.extend(told.filter(|_| machine.backend.is_none()).cloned());
        machine.stood_by += u32::from(standby && machine.backend.is_none());
        machine.backend.get_or_insert(if standby { "standby" } else { "owner" });
    });
    Ok(Json(json!({"run": "running"})))
}

async fn agent_stop(State(agent): State<Arc<Agent>>, Path(vm): Path<String>) -> StatusCode {
    agent.with(&vm, |machine| machine.backend = None);
    StatusCode::NO_CONTENT
}

async fn agent_order(
    State(agent): State<Arc<Agent>>,
    Path((vm, what)): Path<(String, String)>,
) -> Json<Value> {
    if what == "latency" {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = u64::try_from(now.expect("after 1970").as_micros()).expect("small");
        let slice =
            json!({"at_unix_us": now, "ops": 9, "p50_us": 100, "p99_us": 200, "max_us": 300});
        return Json(json!({"slice_ms": 100, "disks": {"root": [slice]}}));
    }
    let definition = agent.machine(&vm).definition;
    match what.as_str() {
        "seal" => agent.seal(&definition),
        "activate" => {
            agent.activate(&vm, &definition);
        }
        other => panic!("no such order: {other}"),
    }
    Json(json!({"ok": true}))
}

async fn agent_monitor(
    State(agent): State<Arc<Agent>>,
    Path((vm, what)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Answer {
    let machine = agent.machine(&vm);
    let pauses = machine.definition["vmm"] != "cloud-hypervisor";
    let unsupported = || problem(409, "baton:vmm-unsupported", "it cannot");
    let set = |run, phase| agent.with(&vm, |m| (m.run, m.phase) = (run, phase));
    match what.as_str() {
        "migrate" | "incoming" if !pauses && body["pause_before_switchover"] != false => {
            return Err(unsupported().into());
        }
        "incoming" => set("incoming", "none"),
        "continue" | "cancel" if !pauses => return Err(unsupported().into()),
        "migrate" if !pauses => {
            agent.seal(&machine.definition);
            // Ends with the answer of the other side.
            set("switching", "active");
            if agent.switch_peers(&vm) {
                set("gone", "completed");
            }
        }
        "migrate" => {
            agent.seal(&machine.definition);
            if machine.resets > 0 {
                agent.take_back(&machine.definition);
                agent.with(&vm, |m| m.resets -= 1);
                set("running", "active");
            } else {
                set("switching", "pre-switchover");
            }
        }
        "continue" => {
            set("migrated", "completed");
            agent.switch_peers(&vm);
        }
        "cancel" => agent.with(&vm, |m| m.phase = "cancelled"),
        "resume" => set("running", "cancelled"),
        "quit" => {
            set("gone", "none");
            // The other side of a copy that nobody cancels fails.
            let peers = agent.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for peer in peers.iter().filter(|peer| peer.machine(&vm).phase == "active") {
                peer.with(&vm, |m| (m.run, m.phase) = ("paused", "failed"));
            }
        }
        other => return Err(problem(404, "baton:no-such-route", other).into()),
    }
    Ok(Json(json!({"run": agent.machine(&vm).run})))
}
