//! From an accepted socket to a welcomed connection at a worker.
//!
//! ```text
//!   accept -> HELLO within 5 s -> record: claim or rejoin -> durable -> gate drained
//!          -> the queue's old connection is dead and drained -> WELCOME, at a worker
//! ```
//!
//! A task per connection. Bounded: connections that are silent (the oldest is
//! dropped for a new one, so honest clients get through a flood), and all others
//! by a permit. Does not know how requests are served.

mod decide;
mod silent;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use baton_protocol::frame::{PAYLOAD_BYTES_MAX, REQUEST_HEADER_BYTES, WINDOW_REQUESTS};
use baton_protocol::message::HELLO_BYTES_MAX;
use baton_protocol::units::SECTOR_BYTES;
use baton_protocol::window::Window;
use baton_protocol::{
    AccessMode, Epoch, Features, Opcode, QueueId, ReplyHeader, RequestHeader, Seq, Status,
    VolumeId, Welcome,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::log::Sometimes;
use crate::metrics::AcceptMetrics;
use crate::session::Identity;
use crate::store::EXTENT_BYTES;
use crate::volumes::{Connection, RunningVolume, Volumes};
use crate::worker::{Mailbox, Message, Newcomer, Place, Presence};

use decide::{Opening, Refusal, Role, Wanted};
pub(crate) use silent::{SilentList, SilentSeat};

/// How long a connection may wait for an old one, or for a change of the record,
/// before it is told to try again.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a refused peer may take to read why.
const GOODBYE: Duration = Duration::from_secs(1);

/// A socket that can be handed to a worker.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {
    /// Takes it out of the runtime and sets what data connections need.
    fn into_fd(self) -> std::io::Result<OwnedFd>;
}

/// A worker as the handshake sees it.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) load: Arc<AtomicUsize>,
}

/// What all handshakes share.
#[derive(Debug)]
pub(crate) struct Lobby {
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) desks: Vec<Desk>,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) hello_timeout: Duration,
    pub(crate) metrics: Arc<AcceptMetrics>,
    pub(crate) next_id: AtomicU64,
}

/// A queue's weight in the choice of a worker: queues carry the I/O.
const QUEUE_WEIGHT: usize = 1000;

impl Lobby {
    /// Takes a new connection through the handshake.
    pub(crate) async fn greet<S: Socket>(&self, mut socket: S, peer: String, silent: SilentSeat) {
        let heard = tokio::select! {
            heard = timeout(self.hello_timeout, hear(&mut socket)) => heard,
            () = silent.evicted() => return self.was_silent(),
        };
        drop(silent);
        let (header, body) = match heard {
            Err(_) | Ok(Err(Deaf::Gone)) => return self.was_silent(),
            Ok(Err(Deaf::Refused(opcode, seq, refusal))) => {
                return self.refuse(socket, opcode, seq, Epoch(0), &refusal, &peer).await;
            }
            Ok(Ok(heard)) => heard,
        };
        let epoch = |volume: &Option<Arc<RunningVolume>>| {
            volume.as_ref().map_or(Epoch(0), |volume| volume.epoch())
        };
        let mut volume = None;
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let result = match permit {
            Err(_) => Err(Refusal::new(
                Status::Busy,
                "the server has all the connections it may have; close some or raise [limits] connections",
            )),
            Ok(permit) => self.seat(&header, &body, &mut volume, &peer, permit).await,
        };
        match result {
            Err(refusal) => {
                let epoch = epoch(&volume);
                self.refuse(socket, Opcode::Hello, header.seq, epoch, &refusal, &peer).await;
            }
            Ok(ready) => self.hand_over(socket, ready),
        }
    }

    async fn seat(
        &self,
        header: &RequestHeader,
        body: &[u8],
        found: &mut Option<Arc<RunningVolume>>,
        peer: &str,
        permit: OwnedSemaphorePermit,
    ) -> Result<Ready, Refusal> {
        let wanted = decide::wanted(header, body)?;
        let name = &wanted.hello.volume;
        let volume = self.volumes.get(name).ok_or_else(|| {
            let text = format!("there is no volume `{name}` on this server; create it first");
            Refusal::new(Status::NoSuchVolume, text)
        })?;
        *found = Some(Arc::clone(&volume));
        let too_slow = |_| {
            Refusal::new(
                Status::Busy,
                "the volume's last change of owner is still waiting for the disk; try again",
            )
        };
        let place = timeout(PATIENCE, self.place(&volume, header, &wanted));
        let (place, epoch, event_id) = place.await.map_err(too_slow)??;
        let takes_part = wanted.hello.features.contains(Features::HANDOFF)
            && wanted.hello.mode != AccessMode::ReadOnly;
        // A process that comes again, perhaps to a server that has forgotten it, has no
        // successor by that.
        let is_new = wanted.hello.resume_from.0 <= 1;
        if takes_part && is_new {
            volume.incarnations.came(&wanted.hello.owner, header.session);
        }
        let desk = self.choose(header.queue, volume.id());
        let weight = if header.queue == QueueId::CONTROL { 1 } else { QUEUE_WEIGHT };
        desk.load.fetch_add(weight, Ordering::Relaxed);
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let presence = Presence {
            id,
            owner: Arc::from(wanted.hello.owner.as_str()),
            volume: Arc::clone(&volume),
            load: desk.load,
            weight,
            _permit: permit,
        };
        volume.connected(
            id,
            Connection {
                owner: wanted.hello.owner.clone(),
                session: header.session,
                queue: header.queue,
                mode: wanted.hello.mode,
                epoch,
                peer: peer.to_owned(),
            },
        );
        // After it is listed: a deletion either saw it in the list, or we see the deletion.
        if volume.is_deleted() {
            return Err(Refusal::new(Status::NoSuchVolume, "the volume was deleted"));
        }
        let identity = Identity {
            session: header.session,
            queue: header.queue,
            mode: wanted.hello.mode,
            features: wanted.hello.features.common(Features::HANDOFF),
        };
        tracing::debug!(
            volume = volume.data.name(), owner = wanted.hello.owner, session = %header.session,
            queue = %header.queue, mode = ?identity.mode, %epoch, peer, "welcomed"
        );
        let welcome = self.welcome(&volume, header, &wanted, epoch, event_id);
        Ok(Ready { mailbox: desk.mailbox, identity, place, presence, welcome })
    }

    /// Finds the place of the connection, under the rules of its mode. Returns
    /// with the epoch and the number of the last event before the epoch was looked at.
    async fn place(
        &self,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        wanted: &Wanted,
    ) -> Result<(Place, Epoch, u64), Refusal> {
        let resume_from = Seq(wanted.hello.resume_from.0.max(1));
        let own = || Place::Other(Box::new(Window::starting_at(resume_from)));
        match &wanted.role {
            Role::Standby => {
                let event_id = volume.events.last_id();
                Ok((own(), volume.epoch(), event_id))
            }
            Role::ReadOnly(asked) => {
                // The lock: a change of the record is either over or has not begun.
                let control = volume.control().await;
                let epoch = control.record.epoch;
                if asked.is_some_and(|asked| asked != epoch) {
                    let text = format!("the volume is at epoch {epoch}; say HELLO with epoch 0");
                    return Err(Refusal::new(Status::StaleEpoch, text));
                }
                Ok((own(), epoch, volume.events.last_id()))
            }
            Role::Owner(request) => {
                let control = volume.control().await;
                let before = control.record.epoch;
                let (mut control, record) = volume.change_locked(control, request.clone()).await?;
                if record.epoch != before {
                    tracing::info!(
                        volume = volume.data.name(), owner = wanted.hello.owner,
                        session = %header.session, epoch = %record.epoch, "claimed"
                    );
                }
                decide::may_serve(&record, header.session, header.queue)?;
                let seat = control.seat(header.queue).ok_or_else(|| {
                    let text =
                        format!("a session has at most {} queues", crate::volumes::QUEUES_MAX);
                    Refusal::new(Status::Protocol, text)
                })?;
                // Not under the lock: a fence must not wait for an old connection.
                drop(control);
                let lease = seat.take(resume_from, PATIENCE).await?;
                let event_id = volume.events.last_id();
                // The epoch may have moved with its session: a source came back.
                let record = &volume.control().await.record;
                decide::may_serve(record, header.session, header.queue)?;
                Ok((Place::Owner(lease), record.epoch, event_id))
            }
        }
    }

    fn welcome(
        &self,
        volume: &RunningVolume,
        header: &RequestHeader,
        wanted: &Wanted,
        epoch: Epoch,
        event_id: u64,
    ) -> Vec<u8> {
        let body = Welcome {
            version: wanted.version.number(),
            mode: wanted.hello.mode,
            read_only: wanted.hello.mode != AccessMode::Owner,
            block_bytes: u32::try_from(SECTOR_BYTES).expect("512"),
            volume: volume.id(),
            epoch,
            size_bytes: volume.data.size_bytes(),
            features: wanted.hello.features.common(Features::HANDOFF),
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            window_requests: u32::try_from(WINDOW_REQUESTS).expect("1024"),
            discard_bytes: u32::try_from(EXTENT_BYTES).expect("1 MiB"),
            boot_id: self.volumes.boot_id(),
            event_id,
            durability_generation: self.volumes.store().durability_generation(),
        }
        .encode();
        reply(Opcode::Hello, header.seq, epoch, Status::Ok, &body)
    }

    /// The least loaded worker; for control connections the volume's: what one of them
    /// does is news to the others.
    fn choose(&self, queue: QueueId, volume: VolumeId) -> Desk {
        if queue == QueueId::CONTROL {
            let volumes = self.desks.len() as u64;
            let n = usize::try_from(volume.0 % volumes).expect("less than there are workers");
            return self.desks[n].clone();
        }
        let least = self.desks.iter().min_by_key(|desk| desk.load.load(Ordering::Relaxed));
        least.cloned().expect("there is a worker")
    }

    fn hand_over<S: Socket>(&self, socket: S, ready: Ready) {
        let Ready { mailbox, identity, place, presence, welcome } = ready;
        let socket = match socket.into_fd() {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "a connection was lost during the handshake");
                return;
            }
        };
        self.metrics.welcomed.fetch_add(1, Ordering::Relaxed);
        let id = presence.id;
        let seat = match &place {
            Place::Owner(lease) => Some(lease.seat()),
            Place::Other(_) => None,
        };
        let newcomer = Newcomer { socket, identity, place, presence, welcome };
        let message = Message::New(Box::new(newcomer));
        match seat {
            None => mailbox.send(message),
            Some(seat) => {
                let killer = Arc::clone(&mailbox);
                seat.runs(Arc::new(move || killer.send(Message::Kill(id))), || {
                    mailbox.send(message);
                });
            }
        }
    }

    fn was_silent(&self) {
        self.metrics.silent.fetch_add(1, Ordering::Relaxed);
    }

    async fn refuse<S: Socket>(
        &self,
        mut socket: S,
        opcode: Opcode,
        seq: Seq,
        epoch: Epoch,
        refusal: &Refusal,
        peer: &str,
    ) {
        self.metrics.refused.fetch_add(1, Ordering::Relaxed);
        static REFUSED: Sometimes = Sometimes::new();
        REFUSED.say(|missed| {
            tracing::warn!(peer, status = ?refusal.status, reason = refusal.text, missed, "refused");
        });
        let bytes = reply(opcode, seq, epoch, refusal.status, refusal.text.as_bytes());
        let goodbye = async {
            socket.write_all(&bytes).await?;
            socket.shutdown().await?;
            // Unread bytes would turn the close into a reset, which may overtake
            // the reply.
            let mut scrap = [0; 1024];
            for _ in 0..64 {
                if socket.read(&mut scrap).await? == 0 {
                    break;
                }
            }
            std::io::Result::Ok(())
        };
        // Whether the peer read it is the peer's matter.
        let _ = timeout(GOODBYE, goodbye).await;
    }
}

/// A connection that may be welcomed.
struct Ready {
    mailbox: Arc<Mailbox>,
    identity: Identity,
    place: Place,
    presence: Presence,
    welcome: Vec<u8>,
}

/// Why no HELLO was heard.
enum Deaf {
    /// Closed, or not ours.
    Gone,
    /// Ours, but wrong.
    Refused(Opcode, Seq, Refusal),
}

impl From<std::io::Error> for Deaf {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

/// Reads exactly a HELLO and not a byte more.
async fn hear<S: Socket>(socket: &mut S) -> Result<(RequestHeader, Vec<u8>), Deaf> {
    let mut head = [0; REQUEST_HEADER_BYTES];
    socket.read_exact(&mut head).await?;
    match decide::opening(&head) {
        Opening::Foreign => Err(Deaf::Gone),
        Opening::Refused(opcode, seq, refusal) => Err(Deaf::Refused(opcode, seq, refusal)),
        Opening::Hello(header, len) => {
            let mut body = [0; HELLO_BYTES_MAX];
            let body = &mut body[..len];
            socket.read_exact(body).await?;
            Ok((header, body.to_vec()))
        }
    }
}

fn reply(opcode: Opcode, seq: Seq, epoch: Epoch, status: Status, body: &[u8]) -> Vec<u8> {
    let header = ReplyHeader {
        opcode,
        flags: 0,
        status,
        seq,
        epoch,
        payload_len: u32::try_from(body.len()).expect("a sentence or a WELCOME"),
        payload_crc32c: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(body);
    bytes
}
