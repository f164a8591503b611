//! A handoff by raw wire: a source and a destination, and the coordinator's calls.

use std::net::SocketAddr;

use baton_protocol::handoff::{
    Answer, Ask, Count, HandoffId, HandoffRequest, Members, Open, Outcome, Proof, Try,
};
use baton_protocol::{AccessMode, Opcode, QueueId, Seq, Status, VolumeId};

use super::{Client, create, greeting, http, json};

pub const SOURCE: &str = "host-a/vm";
pub const DESTINATION: &str = "host-b/vm";
pub const S: u64 = 0xa;
pub const D: u64 = 0xb;
pub const TRY: Try = Try { id: HandoffId(0x1234), attempt: 1 };

/// A volume that moves.
#[derive(Clone)]
pub struct Member {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    pub name: String,
    pub id: u64,
}

impl Member {
    pub fn create(data: SocketAddr, admin: SocketAddr, name: &str) -> Self {
        create(admin, name, 64 << 20);
        let view = json(&http(admin, "GET", &format!("/v1/volumes/{name}"), "").1);
        let id = u64::from_str_radix(view["id"].as_str().expect("an id"), 16).expect("hex");
        Self { data, admin, name: name.to_owned(), id }
    }

    pub fn post(&self, what: &str, body: &serde_json::Value) -> (u16, serde_json::Value) {
        let path = format!("/v1/volumes/{}/{what}", self.name);
        let (status, text) = http(self.admin, "POST", &path, &body.to_string());
        (status, json(&text))
    }

    pub fn get(&self, what: &str) -> (u16, serde_json::Value) {
        let (status, text) =
            http(self.admin, "GET", &format!("/v1/volumes/{}/{what}", self.name), "");
        (status, json(&text))
    }

    pub fn record(&self) -> serde_json::Value {
        self.get("access").1["record"].take()
    }

    /// Body of an ARM that is planned now.
    pub fn arming(&self, term: u64, plan: &serde_json::Value) -> serde_json::Value {
        let next_epoch = &self.record()["next_epoch"];
        serde_json::json!({"term": term, "next_epoch": next_epoch, "plan": plan})
    }

    pub fn phase(&self) -> String {
        self.record()["phase"].as_str().expect("a phase").to_owned()
    }

    /// Of this session, at its control connection.
    pub fn control(&self, owner: &str, session: u64, mode: AccessMode, epoch: u64) -> Client {
        let mut hello = greeting(&self.name, owner, session);
        (hello.queue, hello.mode, hello.epoch) = (QueueId::CONTROL.0, mode, epoch);
        Client::greet(self.data, &hello).expect("welcomed").0
    }

    /// The source, with queue 0.
    pub fn source(&self) -> Backend {
        let control = self.control(SOURCE, S, AccessMode::Owner, 0);
        let mut hello = greeting(&self.name, SOURCE, S);
        hello.epoch = control.epoch.0;
        let queue = Client::greet(self.data, &hello).expect("welcomed").0;
        Backend { control, queue }
    }

    /// The destination, with queue 0.
    pub fn destination(&self) -> Backend {
        self.standby(DESTINATION, D)
    }

    pub fn standby(&self, owner: &str, session: u64) -> Backend {
        let control = self.control(owner, session, AccessMode::Standby, 0);
        let mut hello = greeting(&self.name, owner, session);
        hello.mode = AccessMode::Standby;
        let queue = Client::greet(self.data, &hello).expect("welcomed").0;
        Backend { control, queue }
    }
}

/// The plan of a handoff from source to destination; the first member is the anchor.
pub fn plan(members: &[&Member], mode: &str, attempt: Try) -> serde_json::Value {
    let digest = Members::of(members.iter().map(|member| VolumeId(member.id)));
    serde_json::json!({
        "id": attempt.id.to_string(), "attempt": attempt.attempt, "vm": "vm",
        "from": SOURCE, "to": DESTINATION, "anchor": format!("{:016x}", members[0].id),
        "members": {"count": digest.count, "hash": format!("{:016x}", digest.hash)},
        "mode": mode, "key": "5a".repeat(32),
    })
}

pub fn arm(members: &[&Member], mode: &str) {
    arm_try(members, mode, TRY);
}

pub fn arm_try(members: &[&Member], mode: &str, attempt: Try) {
    let plan = plan(members, mode, attempt);
    for member in members {
        let (status, record) = member.post("arm", &member.arming(1, &plan));
        assert_eq!((status, record["phase"].as_str()), (200, Some("armed")), "{record}");
    }
}

pub fn which(term: u64) -> serde_json::Value {
    which_try(term, TRY)
}

pub fn which_try(term: u64, attempt: Try) -> serde_json::Value {
    serde_json::json!({"term": term, "id": attempt.id.to_string(), "attempt": attempt.attempt})
}

/// A backend's connections to one volume.
pub struct Backend {
    pub control: Client,
    pub queue: Client,
}

impl Backend {
    /// What it sent on queue 0, all of it answered.
    pub fn drained(&self) -> Vec<Count> {
        vec![count(0, self.queue.seq, self.queue.seq + 1)]
    }

    pub fn seal(&mut self) -> Answer {
        let counts = self.drained();
        self.control.ask(Ask::Seal(counts))
    }

    /// Both connections go on under the proof.
    pub fn open(&mut self, proof: Proof) {
        assert_eq!(self.queue.open(TRY, proof), Status::Ok);
        assert_eq!(self.control.open(TRY, proof), Status::Ok);
    }
}

pub fn count(queue: u16, last: u64, lowest: u64) -> Count {
    Count { queue: QueueId(queue), last: Seq(last), lowest: Seq(lowest) }
}

impl Client {
    pub fn send_body(&mut self, opcode: Opcode, body: &[u8]) -> u64 {
        let mut header = self.header(opcode, 0, 0);
        header.payload_len = u32::try_from(body.len()).expect("short");
        self.raw(&[&header.encode()[..], body].concat());
        self.seq
    }

    pub fn send_ask(&mut self, ask: Ask) -> u64 {
        self.send_ask_of(TRY, ask)
    }

    pub fn send_ask_of(&mut self, attempt: Try, ask: Ask) -> u64 {
        self.send_body(Opcode::Handoff, &HandoffRequest { attempt, ask }.encode())
    }

    pub fn ask(&mut self, ask: Ask) -> Answer {
        self.ask_of(TRY, ask)
    }

    pub fn ask_of(&mut self, attempt: Try, ask: Ask) -> Answer {
        let seq = self.send_ask_of(attempt, ask);
        self.told(seq)
    }

    /// The body of an answer that is ok.
    pub fn told(&mut self, seq: u64) -> Answer {
        let (status, body) = self.answer(seq);
        assert_eq!(status, Status::Ok);
        Answer::decode(&body).expect("an answer")
    }

    /// HANDOFF that is granted with the decision.
    pub fn wins(&mut self, ask: Ask) -> Proof {
        let answer = self.ask(ask);
        assert_eq!(answer.outcome, Outcome::Granted, "{answer:?}");
        answer.proof.expect("the winner's proof")
    }

    pub fn send_open(&mut self, attempt: Try, proof: Proof) -> u64 {
        self.send_body(Opcode::Open, &Open { attempt, proof }.encode())
    }

    /// OPEN; from then on under the epoch it grants.
    pub fn open(&mut self, attempt: Try, proof: Proof) -> Status {
        let seq = self.send_open(attempt, proof);
        let (header, body) = self.reply();
        assert_eq!((header.seq, header.opcode, body.len()), (Seq(seq), Opcode::Open, 0));
        if header.status == Status::Ok {
            self.epoch = header.epoch;
        }
        header.status
    }

    /// Parks an ACCESS that is answered when the record is another one.
    pub fn watch(&mut self, known: &Answer) -> u64 {
        self.send(Opcode::Access, known.record.version, known.boot_id)
    }

    /// The record now.
    pub fn access(&mut self) -> Answer {
        let seq = self.send(Opcode::Access, 0, 0);
        self.told(seq)
    }
}
