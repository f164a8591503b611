//! The coordinator with Baton's own storage servers; backends speak the wire by hand.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use baton_live_migrate::client::{Client, Method};
use baton_protocol::handoff::{Answer, Ask, HandoffRequest, Open, Outcome, Proof, Try};
use baton_protocol::{
    AccessMode, Epoch, Features, Hello, Opcode, QueueId, ReplyHeader, RequestHeader, Seq,
    SessionId, Status,
};
use baton_storage_server::config::{Config, Flags};
use baton_storage_server::server::{self, Server};
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::{Cluster, Coordinator, id};

/// A backend's control connection.
struct Control {
    stream: TcpStream,
    session: SessionId,
    epoch: Epoch,
    seq: u64,
}

impl Control {
    async fn open(data: SocketAddr, volume: &str, owner: &str, mode: AccessMode) -> Self {
        let stream = TcpStream::connect(data).await.expect("connected");
        let session = super::world::session(owner.split('/').next().expect("a host"));
        let mut control = Self { stream, session, epoch: Epoch(0), seq: 0 };
        let hello = Hello {
            version_oldest: 1,
            version_newest: 1,
            mode,
            features: Features(u64::MAX),
            resume_from: Seq(1),
            owner: owner.to_owned(),
            volume: volume.to_owned(),
            token: Vec::new(),
        };
        let (header, _) = control.exchange(Opcode::Hello, Seq(0), &hello.encode()).await;
        control.epoch = header.epoch;
        control
    }

    async fn exchange(&mut self, opcode: Opcode, seq: Seq, body: &[u8]) -> (ReplyHeader, Vec<u8>) {
        let header = RequestHeader {
            opcode,
            flags: 0,
            queue: QueueId::CONTROL,
            seq,
            epoch: self.epoch,
            session: self.session,
            offset: 0,
            len: 0,
            payload_len: u32::try_from(body.len()).expect("short"),
            payload_crc32c: 0,
        };
        self.stream.write_all(&[&header.encode()[..], body].concat()).await.expect("sent");
        let mut head = [0; 32];
        self.stream.read_exact(&mut head).await.expect("answered");
        let header = ReplyHeader::decode(&head).expect("a reply");
        let mut body = vec![0; header.payload_len as usize];
        self.stream.read_exact(&mut body).await.expect("a body");
        assert_eq!(header.status, Status::Ok, "{}", String::from_utf8_lossy(&body));
        (header, body)
    }

    async fn ask(&mut self, id: &str, ask: Ask) -> Answer {
        self.seq += 1;
        let attempt = Try { id: id.parse().expect("an id"), attempt: 1 };
        let body = HandoffRequest { attempt, ask }.encode();
        let (_, body) = self.exchange(Opcode::Handoff, Seq(self.seq), &body).await;
        Answer::decode(&body).expect("an answer")
    }
}

impl Control {
    /// OPEN, which must be granted.
    async fn open_with(&mut self, id: &str, proof: Proof) {
        self.seq += 1;
        let attempt = Try { id: id.parse().expect("an id"), attempt: 1 };
        self.exchange(Opcode::Open, Seq(self.seq), &Open { attempt, proof }.encode()).await;
    }
}

struct Real {
    server: Server,
    _dir: TempDir,
}

async fn storage(volume: &str) -> Real {
    let dir = tempfile::tempdir().expect("temp dir");
    let data = dir.path().join("data");
    let flags = ["baton-storage", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let flags = flags.iter().map(std::ffi::OsString::from);
    let flags = Flags::try_parse_from(flags.chain(["--data-dir".into(), data.into()]));
    let config = Config::load(flags.expect("flags")).expect("a configuration");
    let server = server::start(config).await.expect("it starts");
    post(server.admin, "/v1/volumes", &json!({"name": volume, "size_bytes": 1 << 20})).await;
    Real { server, _dir: dir }
}

/// Calls a server's API, as an operator does.
async fn post(admin: SocketAddr, path: &str, body: &Value) {
    admin_client(admin).call(Method::POST, path, Some(body)).await.expect("done");
}

async fn get(admin: SocketAddr, path: &str) -> Value {
    admin_client(admin).call(Method::GET, path, None).await.expect("an answer")
}

fn admin_client(admin: SocketAddr) -> Client {
    let who = "baton://host/storage".parse().expect("an identity");
    let admin = format!("http://{admin}").parse().expect("an endpoint");
    Client::new(who, admin, None, super::support::LIMIT)
}

/// `web` on host-a with a volume on each of two servers, whose backend is `source`.
async fn cluster() -> (Cluster, Vec<Real>, Vec<Control>) {
    let servers = vec![storage("root").await, storage("data").await];
    let mut cluster = Cluster::with(&[]).await;
    let mut disks = Vec::new();
    let mut source = Vec::new();
    for (real, name) in servers.iter().zip(["root", "data"]) {
        let (data, admin) = (real.server.data, real.server.admin);
        cluster.real.push((data, admin));
        disks.push(json!({"name": name, "volume": format!("baton://{data}/{name}")}));
        source.push(Control::open(data, name, "host-a/web", AccessMode::Owner).await);
    }
    let definition = json!({"name": "web", "vmm": "qemu", "disk": disks});
    for agent in [&cluster.a, &cluster.b] {
        agent.with("web", |machine| {
            machine.definition = definition.clone();
            (machine.run, machine.phase) = ("gone", "none");
        });
    }
    cluster.a.with("web", |machine| {
        machine.backend = Some("owner");
        machine.run = "running";
        machine.handoff = Some(json!({"standing": "serving"}));
    });
    (cluster, servers, source)
}

/// READY, and then its coordinator is killed; another follows, whose journal is empty.
async fn prepared_by_another(cluster: &Cluster, id: &str) -> Coordinator {
    let first = cluster.coordinator("c", "").await;
    stands(cluster, "ready", id);
    assert_eq!(first.prepare(id).await.expect("READY")["state"], "READY");
    drop(first);
    cluster.coordinator("other", "").await
}

async fn fence(coordinator: &Coordinator, dead: &str, nominee: &str) -> Value {
    let body = json!({"dead_host": dead, "reason": "a test", "nominee": nominee});
    let done = coordinator.call(Method::POST, "/v1/vms/web:fence", body).await;
    done.expect("one call is enough")
}

/// All volumes are this host's, and nothing is armed.
async fn belongs_to(coordinator: &Coordinator, host: &str) {
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!(access["handoff"], Value::Null, "{access:#}");
    assert_eq!(access["members"].as_array().map(Vec::len), Some(2), "{access:#}");
    for member in access["members"].as_array().expect("members") {
        let found = (&member["owner"], &member["phase"]);
        assert_eq!(found, (&json!(format!("{host}/web")), &json!("owned")), "{access:#}");
    }
}

/// What the backend on host-b says.
fn stands(cluster: &Cluster, standing: &str, id: &str) {
    let handoff = json!({"standing": standing, "id": id, "attempt": 1});
    cluster.b.with("web", |machine| machine.handoff = Some(handoff));
}

async fn stop(servers: Vec<Real>) {
    for real in servers {
        real.server.stop().await.expect("a clean stop");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_destination_wins_at_the_anchor_and_everybody_learns_of_it() {
    let (cluster, servers, mut source) = cluster().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    stands(&cluster, "ready", &id);
    assert_eq!(coordinator.prepare(&id).await.expect("READY")["state"], "READY");
    let mut anchor =
        Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
    for control in &mut source {
        assert_eq!(control.ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
    }
    let path = format!("/v1/vms/web/handoffs/{id}?wait=SEALED&timeout=30s");
    assert_eq!(coordinator.get(&path).await["state"], "SEALED");
    assert_eq!(anchor.ask(&id, Ask::Activate).await.outcome, Outcome::Granted);
    stands(&cluster, "serving", &id);
    let row = coordinator.post(&id, "finish").await.expect("decided");
    assert_eq!(row["outcome"], "destination");
    coordinator.over(&id).await;
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!((&access["owner_host"], &access["phase"]), (&json!("host-b"), &json!("owned")));
    for member in access["members"].as_array().expect("members") {
        assert_eq!((&member["owner"], &member["phase"]), (&json!("host-b/web"), &json!("owned")));
    }
    let why = coordinator.get("/v1/vms/web/why").await;
    let entries = why["audit"][0]["entries"].as_array().expect("an audit trail").len();
    assert!(entries >= 4, "{why:#}");
    stop(servers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_28_a_cancel_after_the_seal_gives_all_volumes_back() {
    let (cluster, servers, mut source) = cluster().await;
    let coordinator = cluster.coordinator("c", "").await;
    let id = id();
    stands(&cluster, "ready", &id);
    coordinator.prepare(&id).await.expect("READY");
    for control in &mut source {
        assert_eq!(control.ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
    }
    let row = coordinator.post(&id, "cancel").await.expect("cancelled");
    assert_eq!((&row["outcome"], &row["state"]), (&json!("source"), &json!("SETTLED")));
    let access = coordinator.get("/v1/vms/web/access").await;
    for member in access["members"].as_array().expect("members") {
        assert_eq!((&member["owner"], &member["phase"]), (&json!("host-a/web"), &json!("owned")));
    }
    // And fenced, for good measure.
    let fence =
        json!({"dead_host": "host-a", "reason": "a test", "force": true, "nominee": "host-b"});
    let done = coordinator.call(Method::POST, "/v1/vms/web:fence", fence).await.expect("fenced");
    assert_eq!(done["done"], Value::Bool(true));
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!(
        (&access["owner_host"], &access["barred"]),
        (&json!("host-b"), &json!("host-a/web"))
    );
    stop(servers).await;
}

/// Armed by a coordinator whose journal is lost: the records are enough to take it back
/// from a dead destination, also when the VM's disks are told in another order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_a_fence_takes_back_a_handoff_that_the_journal_does_not_know() {
    for (sealed, turned) in [(false, false), (false, true), (true, true)] {
        let (cluster, servers, mut source) = cluster().await;
        let id = id();
        let coordinator = prepared_by_another(&cluster, &id).await;
        let mut late =
            Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
        if sealed {
            for control in &mut source {
                assert_eq!(control.ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
            }
        }
        if turned {
            cluster.a.with("web", |machine| {
                machine.definition["disk"].as_array_mut().expect("disks").reverse();
            });
        }
        cluster.b.silent.store(true, Ordering::SeqCst);
        let done = fence(&coordinator, "host-b", "host-a").await;
        for volume in done["volumes"].as_array().expect("volumes") {
            assert_eq!(volume["taken"], false, "{done:#}");
        }
        belongs_to(&coordinator, "host-a").await;
        // It comes too late, wherever it was.
        assert_ne!(late.ask(&id, Ask::Activate).await.outcome, Outcome::Granted);
        belongs_to(&coordinator, "host-a").await;
        stop(servers).await;
    }
}

/// The destination has won, and only the anchor knows: it keeps all volumes if the source
/// is dead, and loses all of them if it is dead itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_a_fence_settles_a_handoff_that_the_journal_does_not_know() {
    for (dead, other) in [("host-a", "host-b"), ("host-b", "host-a")] {
        let (cluster, servers, mut source) = cluster().await;
        let id = id();
        let coordinator = prepared_by_another(&cluster, &id).await;
        let mut anchor =
            Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
        for control in &mut source {
            assert_eq!(control.ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
        }
        assert_eq!(anchor.ask(&id, Ask::Activate).await.outcome, Outcome::Granted);
        cluster.a.with("web", |machine| {
            machine.run = "paused";
            machine.handoff = Some(json!({"standing": "sealed"}));
            machine.definition["disk"].as_array_mut().expect("disks").reverse();
        });
        coordinator.get("/v1/vms").await;
        let host = if dead == "host-a" { &cluster.a } else { &cluster.b };
        host.silent.store(true, Ordering::SeqCst);
        let done = fence(&coordinator, dead, other).await;
        for volume in done["volumes"].as_array().expect("volumes") {
            assert_eq!(volume["taken"], dead == "host-b", "{done:#}");
        }
        belongs_to(&coordinator, other).await;
        stop(servers).await;
    }
}

/// Its anchor was fenced by hand and claimed again, so it knows of no handoff, while the other volume is armed for one.
/// A dead destination has no way to that: its fence ends it under the source, which runs on. What the source has sealed
/// is kept for its next process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_a_fence_ends_a_handoff_that_its_anchor_does_not_know_any_more() {
    for sealed in [false, true] {
        let (cluster, servers, mut source) = cluster().await;
        let id = id();
        let coordinator = prepared_by_another(&cluster, &id).await;
        let mut late =
            Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
        if sealed {
            assert_eq!(source[1].ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
        }
        let admin = servers[0].server.admin;
        let by_hand = json!({"reason": "a test", "nominee": "host-a/web"});
        post(admin, "/v1/volumes/root/fence", &by_hand).await;
        source[0] =
            Control::open(servers[0].server.data, "root", "host-a/web", AccessMode::Owner).await;
        cluster.b.silent.store(true, Ordering::SeqCst);

        let done = fence(&coordinator, "host-b", "host-a").await;
        let member = &done["volumes"][1];
        assert_eq!((&member["volume"], &member["fenced"]), (&json!("data"), &json!(true)));
        assert_eq!(done["volumes"][0]["belongs_to"], "host-a/web", "{done:#}");
        // What was sealed is not its session's any more, and is kept for the next one.
        assert_eq!(member["taken"], sealed, "{done:#}");
        belongs_to(&coordinator, "host-a").await;
        assert_ne!(late.ask(&id, Ask::Activate).await.outcome, Outcome::Granted);
        if !sealed {
            assert_eq!(member["belongs_to"], "host-a/web", "{done:#}");
            let detail = member["detail"].as_str().expect("a sentence");
            assert!(detail.contains(&id) && detail.contains("is ended here"), "{detail}");
            goes_on(&coordinator, &source).await;
            // Nothing is in the way of the next one, which goes through.
            cluster.b.silent.store(false, Ordering::SeqCst);
            moves(&cluster, &servers, &coordinator, &mut source).await;
        }
        stop(servers).await;
    }
}

/// The data volume's epoch is the one that its session has.
async fn goes_on(coordinator: &Coordinator, source: &[Control]) {
    let access = coordinator.get("/v1/vms/web/access").await;
    assert_eq!(access["members"][1]["epoch"], source[1].epoch.0, "it goes on: {access:#}");
}

/// A handoff from host-a to host-b, by the sessions that the source has had all the time.
async fn moves(
    cluster: &Cluster,
    servers: &[Real],
    coordinator: &Coordinator,
    source: &mut [Control],
) {
    let next = id();
    stands(cluster, "ready", &next);
    assert_eq!(coordinator.prepare(&next).await.expect("READY")["state"], "READY");
    goes_on(coordinator, source).await;
    for control in source {
        assert_eq!(control.ask(&next, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
    }
    let mut anchor =
        Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
    assert_eq!(anchor.ask(&next, Ask::Activate).await.outcome, Outcome::Granted);
    stands(cluster, "serving", &next);
    assert_eq!(coordinator.post(&next, "finish").await.expect("decided")["outcome"], "destination");
    coordinator.over(&next).await;
    belongs_to(coordinator, "host-b").await;
}

/// What a coordinator without the journal may do, and one of before did: it takes the handoff back and settles it at
/// the anchor alone, and has the anchor forget it by another one.
async fn forget(servers: &[Real], id: &str) {
    let admin = servers[0].server.admin;
    let record = get(admin, "/v1/volumes/root/access").await["record"].clone();
    let term = record["coordinator_term"].as_u64().expect("a term");
    let which = |id: &str| json!({"term": term, "id": id, "attempt": 1});
    post(admin, "/v1/volumes/root/reclaim", &which(id)).await;
    post(admin, "/v1/volumes/root/settle", &which(id)).await;
    let other = super::support::id();
    let plan = json!({"id": other, "attempt": 1, "vm": "web", "from": "host-a/web", "to": "host-b/web",
        "anchor": record["volume"], "members": {"count": 1, "hash": "0000000000000001"}, "mode": "fast", "key": "07".repeat(32)});
    let arm = json!({"term": term, "next_epoch": record["next_epoch"], "plan": plan});
    post(admin, "/v1/volumes/root/arm", &arm).await;
    post(admin, "/v1/volumes/root/reclaim", &which(&other)).await;
    post(admin, "/v1/volumes/root/settle", &which(&other)).await;
}

/// The source was never fenced nor stopped: its sessions are the same from the first handoff to the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_the_next_handoff_ends_what_its_anchor_has_forgotten() {
    for opened in [false, true] {
        let (cluster, servers, mut source) = cluster().await;
        let id = id();
        let coordinator = prepared_by_another(&cluster, &id).await;
        let mut late =
            Control::open(servers[0].server.data, "root", "host-b/web", AccessMode::Standby).await;
        if opened {
            let answer = source[0].ask(&id, Ask::Reclaim).await;
            source[1].open_with(&id, answer.proof.expect("it has won")).await;
        }
        forget(&servers, &id).await;
        let why = coordinator.get("/v1/vms/web/why").await;
        assert_eq!(why["forgotten"], json!([{"id": id, "attempt": 1}]), "{why:#}");
        let data = &why["access"]["members"][1];
        let phase = if opened { "reclaimed" } else { "armed" };
        assert_eq!((&data["phase"], &data["handoff"]), (&json!(phase), &why["forgotten"][0]));

        moves(&cluster, &servers, &coordinator, &mut source).await;
        assert_ne!(late.ask(&id, Ask::Activate).await.outcome, Outcome::Granted);
        let why = coordinator.get("/v1/vms/web/why").await;
        assert_eq!(why["forgotten"], json!([]), "{why:#}");
        let entries = why["audit"][1]["entries"].as_array().expect("an audit trail");
        let disarmed = entries.iter().any(|entry| entry["what"] == "disarm");
        assert_eq!(disarmed, !opened, "{why:#}");
        stop(servers).await;
    }
}

/// Settled at the anchor alone, which still knows how it ended: the other volume learns it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_the_next_handoff_settles_what_its_anchor_has_decided() {
    let (cluster, servers, mut source) = cluster().await;
    let id = id();
    let coordinator = prepared_by_another(&cluster, &id).await;
    let record = get(servers[0].server.admin, "/v1/volumes/root/access").await["record"].clone();
    let which = json!({"term": record["coordinator_term"], "id": id, "attempt": 1});
    for what in ["reclaim", "settle"] {
        post(servers[0].server.admin, &format!("/v1/volumes/root/{what}"), &which).await;
    }
    moves(&cluster, &servers, &coordinator, &mut source).await;
    stop(servers).await;
}

/// Nobody may end what can still be won: not a handoff that the anchor knows, nor a volume that its source has sealed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_36_the_next_handoff_leaves_alone_what_can_be_won() {
    for forgotten in [false, true] {
        let (cluster, servers, mut source) = cluster().await;
        let id = id();
        let coordinator = prepared_by_another(&cluster, &id).await;
        if forgotten {
            assert_eq!(source[1].ask(&id, Ask::Seal(Vec::new())).await.outcome, Outcome::Granted);
            forget(&servers, &id).await;
        }
        let before = get(servers[1].server.admin, "/v1/volumes/data/access").await;
        assert_eq!(before["record"]["phase"], if forgotten { "sealed" } else { "armed" });
        let row = coordinator.prepare(&super::support::id()).await.expect("an answer");
        assert_eq!(row["because"]["type"], "baton:handoff-in-progress", "{row:#}");
        let sentence = row["because"]["detail"].as_str().expect("a sentence");
        for part in [&*id, "journal does not know it", "baton handoff fence web --dead-host host-b"]
        {
            assert!(sentence.contains(part), "{part}: {sentence}");
        }
        let after = get(servers[1].server.admin, "/v1/volumes/data/access").await;
        assert_eq!(after["record"]["version"], before["record"]["version"], "{after:#}");
        stop(servers).await;
    }
}
