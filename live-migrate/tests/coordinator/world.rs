//! Storage servers and agents to coordinate: the servers hold real access
//! records behind the admin API, the agents pretend backends and machines.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{ErrorResponse, IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router, middleware};
use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal, Seen};
use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Incarnation of the backend on a host.
pub(crate) fn session(host: &str) -> SessionId {
    SessionId(host.bytes().fold(17, |hash, byte| hash * 31 + u64::from(byte)))
}

/// A storage server.
pub(crate) struct Storage {
    pub(crate) address: SocketAddr,
    records: Mutex<BTreeMap<String, AccessRecord>>,
    boot: AtomicU64,
    changed: watch::Sender<u64>,
    /// Answers nobody, and drops what is asked.
    pub(crate) silent: AtomicBool,
    /// Has no room to record a change, and makes none.
    pub(crate) full: AtomicBool,
    hang: watch::Sender<Option<&'static str>>,
    /// Calls that hang, or have.
    pub(crate) hung: AtomicU64,
}

impl Storage {
    /// Takes this call, and goes on with it only after [`Self::thaw`].
    pub(crate) fn hang_on(&self, call: &'static str) {
        self.hang.send_replace(Some(call));
    }

    pub(crate) fn thaw(&self) {
        self.hang.send_replace(None);
    }

    /// With volumes owned by `owner`.
    pub(crate) async fn start(volumes: &[(&str, Option<&str>)]) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let record = |(place, (name, owner)): (usize, &(&str, Option<&str>))| {
            let id = u64::from(address.port()) << 16 | (place as u64 + 1);
            let mut record = AccessRecord::new(VolumeId(id));
            if let Some(owner) = owner {
                let host = owner.split('/').next().expect("a host");
                let claim = Input::Claim { name: owner, session: session(host) };
                record = record.step(claim).expect("free").record;
            }
            ((*name).to_owned(), record)
        };
        let records = volumes.iter().enumerate().map(record).collect();
        let storage = Arc::new(Self {
            address,
            records: Mutex::new(records),
            boot: AtomicU64::new(1),
            changed: watch::channel(0).0,
            silent: AtomicBool::new(false),
            full: AtomicBool::new(false),
            hang: watch::channel(None).0,
            hung: AtomicU64::new(0),
        });
        let app = Router::new()
            .route("/v1/volumes", get(list))
            .route("/v1/volumes/{name}", get(show))
            .route("/v1/volumes/{name}/access", get(access))
            .route("/v1/volumes/{name}/audit", get(audit))
            .route("/v1/volumes/{name}/proof", get(proof))
            .route("/v1/volumes/{name}/{what}", post(change))
            .layer(middleware::from_fn_with_state(Arc::clone(&storage), hush))
            .with_state(Arc::clone(&storage));
        tokio::spawn(async move { axum::serve(listener, app).await });
        storage
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, AccessRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, name: &str) -> AccessRecord {
        self.lock()[name].clone()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub(crate) fn step(&self, name: &str, input: Input<'_>) -> Result<AccessRecord, Refusal> {
        let mut records = self.lock();
        let record = records.get_mut(name).expect("a volume");
        let step = record.step(input)?;
        *record = step.record.clone();
        drop(records);
        self.changed.send_modify(|count| *count += 1);
        Ok(step.record)
    }

    /// A restart in fast mode.
    pub(crate) fn restart(&self) {
        for record in self.lock().values_mut() {
            let mut disk = record.clone();
            // A seal in fast mode was in memory only.
            if let (Phase::Sealed, Some(handoff)) = (disk.phase, &mut disk.handoff) {
                disk.phase = Phase::Armed;
                (handoff.sealed, handoff.seal_seen) = (false, false);
            }
            *record = disk.after_restart();
        }
        self.boot.fetch_add(1, Ordering::SeqCst);
        self.changed.send_modify(|count| *count += 1);
    }

    fn boot(&self) -> String {
        format!("{:016x}", self.boot.load(Ordering::SeqCst))
    }
}

async fn hush(State(storage): State<Arc<Storage>>, request: Request, next: Next) -> Response {
    if storage.silent.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
    let path = request.uri().path().to_owned();
    // Like a process that was stopped: what has arrived is done later, whether
    // or not somebody still waits for the answer.
    let storage = Arc::clone(&storage);
    let answer = tokio::spawn(async move {
        let mut hang = storage.hang.subscribe();
        if hang.borrow().is_some_and(|call| path.ends_with(call)) {
            storage.hung.fetch_add(1, Ordering::SeqCst);
        }
        let _ = hang.wait_for(|call| call.is_none_or(|call| !path.ends_with(call))).await;
        next.run(request).await
    });
    answer.await.expect("no panic")
}

type Answer = Result<Json<Value>, ErrorResponse>;

fn problem(status: u16, kind: &str, detail: impl ToString) -> Response {
    let body = json!({"type": kind, "title": kind, "status": status, "detail": detail.to_string()});
    (StatusCode::from_u16(status).expect("a status"), Json(body)).into_response()
}

fn refused(refusal: &Refusal) -> Response {
    let kind = match refusal {
        Refusal::StaleTerm { .. } => "baton:stale-term",
        Refusal::HandoffInProgress(_) => "baton:handoff-in-progress",
        Refusal::NoSuchHandoff(_) => return problem(404, "baton:no-such-handoff", refusal),
        Refusal::StalePlan { .. } => "baton:stale-plan",
        Refusal::StaleFence { .. } => "baton:stale-fence",
        Refusal::NotOwner { .. } => "baton:not-owner",
        Refusal::Lost { .. } => "baton:lost-race",
        Refusal::Undecided => "baton:undecided",
        Refusal::UnknownFrozen => "baton:unknown-frozen",
        Refusal::TooLate => "baton:too-late",
        Refusal::BadProof => "baton:bad-proof",
        _ => "baton:refused",
    };
    problem(409, kind, refusal)
}

fn view(record: &AccessRecord) -> Value {
    json!({
        "volume": record.volume.to_string(), "version": record.version, "epoch": record.epoch.0,
        "next_epoch": record.next_epoch.0,
        "phase": record.phase.name(), "barred": record.barred,
        "coordinator_term": record.coordinator_term,
        "owner": record.owner.as_ref().map(|o| json!({"name": o.name, "session": o.session.to_string()})),
        "handoff": record.handoff.as_ref().map(|h| json!({"id": h.plan.attempt.id.to_string(),
            "attempt": h.plan.attempt.attempt, "anchor": h.plan.anchor.to_string(), "from": h.plan.from, "to": h.plan.to, "sealed": h.sealed, "wanted_back": h.wanted_back})),
        "decided": record.decided.as_ref().map(|d| json!({"id": d.attempt.id.to_string(),
            "attempt": d.attempt.attempt, "winner": d.winner})),
    })
}

async fn list(State(storage): State<Arc<Storage>>) -> Json<Value> {
    let records = storage.lock();
    let volumes: Vec<Value> =
        records.iter().map(|(name, r)| json!({"name": name, "access": view(r)})).collect();
    Json(json!({"volumes": volumes}))
}

fn found(storage: &Storage, name: &str) -> Result<AccessRecord, Box<Response>> {
    let record = storage.lock().get(name).cloned();
    record.ok_or_else(|| {
        Box::new(problem(404, "baton:no-such-volume", format!("no volume `{name}`")))
    })
}

async fn show(State(storage): State<Arc<Storage>>, Path(name): Path<String>) -> Answer {
    let record = found(&storage, &name).map_err(|response| *response)?;
    Ok(Json(json!({"id": record.volume.to_string(), "name": name, "access": {
        "owner": record.owner.as_ref().map(|o| &o.name), "epoch": record.epoch.0,
        "next_epoch": record.next_epoch.0,
        "phase": record.phase.name(), "barred": record.barred}})))
}

async fn access(
    State(storage): State<Arc<Storage>>,
    Path(name): Path<String>,
    Query(known): Query<HashMap<String, String>>,
) -> Answer {
    let mut changed = storage.changed.subscribe();
    let wait = known.get("wait_ms").map_or(0, |ms| ms.parse().expect("a number"));
    let deadline = tokio::time::Instant::now() + Duration::from_millis(wait);
    loop {
        changed.borrow_and_update();
        let record = found(&storage, &name).map_err(|response| *response)?;
        let same = known.get("boot_id") == Some(&storage.boot())
            && known.get("version") == Some(&record.version.to_string());
        if !same || tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
            return Ok(Json(json!({"boot_id": storage.boot(), "record": view(&record)})));
        }
    }
}

async fn audit(State(storage): State<Arc<Storage>>, Path(name): Path<String>) -> Answer {
    let record = found(&storage, &name).map_err(|response| *response)?;
    Ok(Json(
        json!({"entries": [{"at_unix_us": 1_700_000_000_000_000_u64, "version": record.version,
        "epoch": record.epoch.0, "phase": record.phase.name(), "what": "claim", "who": "host-a/web"}]}),
    ))
}

fn grant(record: &AccessRecord, attempt: Try) -> Option<Value> {
    let (side, proof) = (record.winner(attempt)?, record.proof(attempt)?);
    let session = record.owner.as_ref()?.session;
    let mac: String = proof.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(json!({"outcome": side, "winner": side, "session": session.to_string(),
        "proof": {"side": side, "grant": proof.grant, "mac": mac}, "record": view(record)}))
}

fn attempt(id: &str, number: u64) -> Try {
    let id: HandoffId = id.parse().expect("an id");
    Try { id, attempt: u32::try_from(number).expect("small") }
}

async fn proof(
    State(storage): State<Arc<Storage>>,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Answer {
    let attempt = attempt(&query["id"], query["attempt"].parse().expect("a number"));
    let record = found(&storage, &name).map_err(|response| *response)?;
    grant(&record, attempt)
        .map(Json)
        .ok_or_else(|| problem(409, "baton:undecided", "undecided").into())
}

fn hex(text: &Value) -> [u8; 32] {
    let text = text.as_str().expect("digits");
    std::array::from_fn(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).expect("hex"))
}

fn number(text: &Value) -> u64 {
    u64::from_str_radix(text.as_str().expect("digits"), 16).expect("hex")
}

async fn change(
    State(storage): State<Arc<Storage>>,
    Path((name, what)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Answer {
    found(&storage, &name).map_err(|response| *response)?;
    if storage.full.load(Ordering::SeqCst) {
        return Err(problem(507, "baton:metadata-full", "the disk is full").into());
    }
    let term = body["term"].as_u64().expect("a term");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let this =
        || attempt(body["id"].as_str().expect("an id"), body["attempt"].as_u64().expect("n"));
    let by = By::Coordinator { term };
    let result = match what.as_str() {
        "arm" => {
            let plan = &body["plan"];
            let members = &plan["members"];
            let count = u16::try_from(members["count"].as_u64().expect("a count")).expect("few");
            let plan = Plan {
                attempt: attempt(
                    plan["id"].as_str().expect("an id"),
                    plan["attempt"].as_u64().expect("n"),
                ),
                vm: text(&plan["vm"]),
                from: text(&plan["from"]),
                to: text(&plan["to"]),
                anchor: VolumeId(number(&plan["anchor"])),
                members: Members { count, hash: number(&members["hash"]) },
                mode: if plan["mode"] == "fast" { Mode::Fast } else { Mode::Base },
                key: Key(hex(&plan["key"])),
            };
            let next_epoch = Epoch(body["next_epoch"].as_u64().expect("an epoch"));
            storage.step(&name, Input::Arm { plan: &plan, term, next_epoch, generation: 0 })
        }
        "reclaim" => {
            let attempt = this();
            let record = storage.step(&name, Input::Reclaim { attempt, by });
            let record = record.map_err(|refusal| refused(&refusal))?;
            let unknown = json!({"outcome": "unknown", "record": view(&record)});
            return Ok(Json(grant(&record, attempt).unwrap_or(unknown)));
        }
        "disarm" => storage.step(&name, Input::Disarm { attempt: this(), term }),
        "abdicate" => storage.step(&name, Input::Abdicate { attempt: this(), by }),
        "settle" => {
            let proof = body.get("proof").map(|proof| {
                let side = if proof["side"] == "source" { Side::Source } else { Side::Destination };
                let grant = proof["grant"].as_u64().expect("a grant");
                let proof = Proof { side, grant, mac: hex(&proof["mac"]) };
                (SessionId(number(&body["session"])), proof)
            });
            storage.step(&name, Input::Settle { attempt: this(), term, proof })
        }
        "fence" => {
            let nominee = body["nominee"].as_str();
            let next_epoch = Epoch(body["seen"]["next_epoch"].as_u64().expect("an epoch"));
            let seen = Some(Seen { owner: body["seen"]["owner"].as_str(), next_epoch });
            let record = storage.step(&name, Input::Fence { term: Some(term), nominee, seen });
            let record = record.map_err(|refusal| refused(&refusal))?;
            return Ok(Json(json!({"access": view(&record)})));
        }
        other => panic!("no such call: {other}"),
    };
    result.map(|record| Json(view(&record))).map_err(|refusal| refused(&refusal).into())
}

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
            Some((Arc::clone(storage), name.to_owned()))
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
            "events": [{"at_unix_us": 1_700_000_000_000_000_u64, "event": "rings-stopped"}]})
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
