//! A storage server: its process, and its volumes with their gates.
//!
//! The access record is the product's own. What is around it is this glue,
//! which does what the product's server does: it stores a change as durably as
//! the step says, closes the gate and drains it, and only then tells anybody.
//!
//! | module | noun |
//! |---|---|
//! | [`disk`] | the data of a volume |
//! | [`job`] | changes of a volume's record, one after the other |

mod disk;
mod job;

use std::collections::{BTreeMap, VecDeque};

use baton_protocol::access::{AccessRecord, Owner, Phase};
use baton_protocol::handoff::{Answer, Count, Outcome, Proof, Try};
use baton_protocol::window::{Arrival, Window};
use baton_protocol::{Epoch, QueueId, Seq, SessionId, VolumeId};

use crate::agenda::{MS, Time};
use crate::bug::Bug;
use crate::fault::Point;
use crate::history::Kind;
use crate::stage::{Event, Stage, ToClient, ToServer, note};
use disk::Disk;
use job::{Current, Job};

/// The owner name of the VM's backend on a host.
pub(crate) fn owner_name(host: usize) -> String {
    format!("host-{host}/vm")
}

/// The host in an owner name.
fn host_of(name: &str) -> usize {
    usize::from(name == "host-1/vm")
}

/// A server's process.
#[derive(Debug, Default)]
pub(crate) struct Server {
    pub(crate) up: bool,
    pub(crate) boot: u64,
    pub(crate) frozen_until: Time,
    pub(crate) slow_until: Time,
}

/// A connection as the server sees it.
#[derive(Debug)]
struct Peer {
    host: usize,
    session: SessionId,
    queue: QueueId,
    owner: bool,
    resume_from: Seq,
    /// What came behind an OPEN that is not carried out yet.
    behind_open: Option<VecDeque<ToServer>>,
    /// ACCESS waits for a record other than this.
    watches: Option<(u64, u64)>,
}

/// A queue of the owner's session.
#[derive(Debug)]
struct Seat {
    session: SessionId,
    connection: usize,
    window: Window,
    /// Highest number let in.
    arrived: Seq,
}

/// A request inside the gate.
#[derive(Debug)]
struct Running {
    connection: usize,
    session: SessionId,
    seq: Seq,
    epoch: Epoch,
    kind: Kind,
}

/// A seal that waits for what the source sent.
#[derive(Debug)]
struct WaitingSeal {
    connection: usize,
    attempt: Try,
    session: SessionId,
    counts: Vec<Count>,
}

/// One volume at its server.
#[derive(Debug)]
pub(crate) struct Volume {
    number: usize,
    pub(crate) server: usize,
    pub(crate) record: AccessRecord,
    durable: AccessRecord,
    /// Which epoch is let in.
    gate: Option<Epoch>,
    disk: Disk,
    peers: BTreeMap<usize, Peer>,
    seats: BTreeMap<QueueId, Seat>,
    /// Connections that take a seat when the one before them has drained.
    arriving: Vec<usize>,
    running: BTreeMap<u64, Running>,
    tokens: u64,
    seals: Vec<WaitingSeal>,
    jobs: VecDeque<Job>,
    current: Option<Current>,
}

impl Volume {
    pub(crate) fn new(number: usize, servers: usize, sectors: usize) -> Self {
        let record = AccessRecord::new(VolumeId(number as u64 + 1));
        Self {
            number,
            server: number % servers,
            durable: record.clone(),
            record,
            gate: None,
            disk: Disk::new(sectors),
            peers: BTreeMap::new(),
            seats: BTreeMap::new(),
            arriving: Vec::new(),
            running: BTreeMap::new(),
            tokens: 0,
            seals: Vec::new(),
            jobs: VecDeque::new(),
            current: None,
        }
    }

    /// It was fenced for this owner name, who has not claimed it yet.
    pub(crate) fn is_nominated(&self, name: &str) -> bool {
        let nominee = Owner { name: name.to_owned(), session: SessionId(0) };
        self.record.phase == Phase::Owned && self.record.owner.as_ref() == Some(&nominee)
    }

    /// The server's process ends. What its kernel has of a request may still
    /// reach the disk; nothing does after the next process has started.
    pub(crate) fn crash(&mut self, stage: &mut Stage, power: bool) {
        for (_, running) in std::mem::take(&mut self.running) {
            if stage.chance(0.5) {
                stage.watch.took_effect(self.number, running.epoch);
                self.disk.run(running.kind, stage.has(Bug::FlushForgotten));
                stage.carried_out(running.kind);
            }
        }
        if power {
            self.disk.lose_power(&mut stage.rng);
            stage.history.lose_power(self.number);
        }
        for connection in std::mem::take(&mut self.peers).into_keys() {
            stage.send_to_client(connection, ToClient::End);
            stage.network.connections[connection].server_open = false;
        }
        self.seats.clear();
        self.arriving.clear();
        self.seals.clear();
        self.jobs.clear();
        self.current = None;
        self.gate = None;
    }

    /// The server's process has started.
    pub(crate) fn start(&mut self, stage: &mut Stage) {
        self.record = if stage.has(Bug::FrozenForgotten) {
            self.durable.clone()
        } else {
            self.durable.clone().after_restart()
        };
        self.gate = self.record.admits().owner;
        note!(stage, "volume {} starts as {}", self.number, self.record.phase.name());
        if self.record.phase == Phase::Frozen {
            stage.reached(Point::Frozen);
        }
    }

    /// A message arrives on a connection.
    pub(crate) fn hear(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        message: ToServer,
    ) {
        if let Some(peer) = self.peers.get_mut(&connection)
            && let Some(behind) = &mut peer.behind_open
            && matches!(message, ToServer::Io { .. } | ToServer::Open(_))
        {
            behind.push_back(message);
            return;
        }
        match message {
            ToServer::Hello { greeting, resume_from } => {
                let known = &stage.network.connections[connection];
                let peer = Peer {
                    host: known.host,
                    session: known.session,
                    queue: known.queue,
                    owner: false,
                    resume_from,
                    behind_open: None,
                    watches: None,
                };
                self.peers.insert(connection, peer);
                self.jobs.push_back(Job::Greet { connection, greeting });
            }
            ToServer::Io { seq, epoch, kind } => {
                self.io(stage, server, connection, (seq, epoch), kind);
            }
            ToServer::Access { boot_id, version } => {
                if let Some(peer) = self.peers.get_mut(&connection) {
                    peer.watches = Some((boot_id, version));
                    self.tell(stage, server);
                }
            }
            ToServer::Handoff { asked, request } => {
                job::arrived(stage, asked);
                self.jobs.push_back(Job::Ask { connection, asked, request });
            }
            ToServer::Open(open) => {
                if let Some(peer) = self.peers.get_mut(&connection) {
                    peer.behind_open = Some(VecDeque::new());
                    stage.reached(Point::OpenArrived);
                    self.jobs.push_back(Job::Open { connection, open });
                }
            }
            ToServer::End => self.part(stage, connection),
        }
        self.work(stage, server);
    }

    /// A request has been carried out.
    pub(crate) fn executed(&mut self, stage: &mut Stage, server: &Server, token: u64) {
        let Some(running) = self.running.remove(&token) else { return };
        stage.watch.took_effect(self.number, running.epoch);
        let read = self.disk.run(running.kind, stage.has(Bug::FlushForgotten));
        stage.carried_out(running.kind);
        let seat = self.seats.values_mut().find(|seat| seat.connection == running.connection);
        if let Some(seat) = seat
            && !matches!(running.kind, Kind::Read { .. })
            && !stage.has(Bug::WindowForgotten)
        {
            seat.window.complete(running.seq);
        }
        stage.send_to_client(running.connection, ToClient::Done { seq: running.seq, read });
        self.work(stage, server);
    }

    fn io(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        (seq, epoch): (Seq, Epoch),
        kind: Kind,
    ) {
        let Some(peer) = self.peers.get(&connection) else { return };
        let (host, session, queue) = (peer.host, peer.session, peer.queue);
        let sealed = self.record.phase == Phase::Sealed && epoch == self.record.epoch;
        let admitted = (peer.owner && self.gate == Some(epoch))
            || (stage.has(Bug::EpochIgnored) && self.current.is_none())
            || (stage.has(Bug::NoReclaim) && sealed && self.current.is_none());
        if !admitted {
            note!(stage, "volume {} refuses seq {} of epoch {epoch}", self.number, seq.0);
            stage.send_to_client(connection, ToClient::Stale { seq });
            return;
        }
        if let Some(seat) = self.seats.get_mut(&queue).filter(|seat| seat.connection == connection)
        {
            seat.arrived = seat.arrived.max(seq);
            match seat.window.arrive(seq) {
                Arrival::New => {}
                Arrival::Done => {
                    stage.send_to_client(connection, ToClient::Done { seq, read: 0 });
                    return;
                }
                // It waited behind an OPEN in the network while the client had given
                // this connection up and had its answer on another.
                Arrival::TooOld if !stage.network.connections[connection].client_open => {
                    self.part(stage, connection);
                    return;
                }
                arrival => {
                    let what = format!("volume {} answers {arrival:?} to {}", self.number, seq.0);
                    stage.watch.broken("I10", what);
                    return;
                }
            }
        } else if !stage.has(Bug::EpochIgnored) {
            return;
        }
        if self.peers.get(&connection).is_some_and(|peer| !peer.owner) {
            stage.watch.standby_admitted(self.number);
        }
        let others = self.running.values().map(|running| running.session);
        stage.watch.admitted((self.number, host), epoch, session, others);
        note!(stage, "volume {} runs seq {} of epoch {epoch}: {kind:?}", self.number, seq.0);
        self.tokens += 1;
        let running = Running { connection, session, seq, epoch, kind };
        self.running.insert(self.tokens, running);
        let slow = stage.now < server.slow_until;
        let delay = if slow { stage.between(MS, 12 * MS) } else { stage.between(20, 250) };
        let (volume, boot, token) = (self.number, server.boot, self.tokens);
        stage.after(delay, Event::Executed { volume, boot, token });
    }

    /// Gives a seat to the connections whose predecessors have drained.
    pub(super) fn seat_arriving(&mut self, stage: &mut Stage, server: &Server) -> bool {
        let waiting = std::mem::take(&mut self.arriving);
        let before = waiting.len();
        for connection in waiting {
            let Some(peer) = self.peers.get(&connection) else { continue };
            let (queue, session, first) = (peer.queue, peer.session, peer.resume_from);
            let old = self.seats.get(&queue).map(|seat| seat.connection);
            let old = old.filter(|old| *old != connection);
            if old.is_some_and(|old| self.running.values().any(|run| run.connection == old)) {
                self.arriving.push(connection);
                continue;
            }
            if let Some(old) = old {
                self.part(stage, old);
            }
            match self.seats.get_mut(&queue).filter(|seat| seat.session == session) {
                Some(seat) => {
                    seat.connection = connection;
                    seat.window.forget_below(first);
                }
                None => {
                    let window = Window::starting_at(first);
                    let seat = Seat { session, connection, window, arrived: Seq(0) };
                    self.seats.insert(queue, seat);
                }
            }
            let Some(peer) = self.peers.get_mut(&connection) else { continue };
            peer.owner = true;
            let epoch = self.record.epoch;
            match peer.behind_open.take() {
                Some(behind) => {
                    stage.send_to_client(connection, ToClient::Opened(Some(epoch)));
                    self.run_behind(stage, server, connection, behind);
                }
                None => stage.send_to_client(connection, ToClient::Welcome { epoch, owner: true }),
            }
        }
        self.arriving.len() != before
    }

    /// What waited behind an OPEN is carried out, or refused.
    pub(super) fn run_behind(
        &mut self,
        stage: &mut Stage,
        server: &Server,
        connection: usize,
        behind: VecDeque<ToServer>,
    ) {
        for message in behind {
            match message {
                ToServer::Io { seq, epoch, kind } => {
                    self.io(stage, server, connection, (seq, epoch), kind);
                }
                ToServer::Open(open) => self.jobs.push_back(Job::Open { connection, open }),
                _ => {}
            }
        }
    }

    /// The server's end of a connection is over.
    fn part(&mut self, stage: &mut Stage, connection: usize) {
        self.peers.remove(&connection);
        stage.send_to_client(connection, ToClient::End);
        stage.network.connections[connection].server_open = false;
    }

    /// Answers those who wait for a change of the record.
    fn tell(&mut self, stage: &mut Stage, server: &Server) {
        let now = (server.boot, self.record.version);
        for (connection, peer) in &mut self.peers {
            if peer.watches.is_some_and(|known| known != now) {
                peer.watches = None;
                let answer = answer(server.boot, &self.record, Outcome::Granted, None);
                stage.send_to_client(*connection, ToClient::Access(Box::new(answer)));
            }
        }
    }
}

fn answer(boot_id: u64, record: &AccessRecord, outcome: Outcome, proof: Option<Proof>) -> Answer {
    Answer { outcome, boot_id, proof, record: record.without_keys() }
}
