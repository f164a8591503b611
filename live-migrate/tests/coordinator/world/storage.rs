//! A storage server: access records as they are, behind the admin API.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal, Seen};
use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{Answer, problem, session};

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
