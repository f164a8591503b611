//! An image's seat at the cluster: read, changed by comparing and swapping, and
//! what has to be done before who it names may write.
//!
//! Every call may wait for the cluster, for ever if that is away.

use std::io;
use std::sync::Arc;

use baton_fault_point as fault_point;
use baton_protocol::access::Refusal;
use baton_protocol::{SessionId, VolumeId};

use super::claim::{Step, next};
use super::image::Image;
use super::seat::{SEAT_NOTE, Seat};

/// Ten years, s. The entry of a client that may only be frozen must not end
/// before the client does: what it has queued is accepted from then on.
const FENCE_S: u32 = 315_360_000;

/// Why a seat was not changed, or not taken.
#[derive(Debug)]
pub(super) enum SeatError {
    /// The record stays as it is.
    Refused(Refusal, Box<Seat>),
    /// A client that is alive and was never let in by the record has the lock.
    InUse(String),
    /// The note is damaged, or a later version's.
    Note,
    /// Ceph failed to do something.
    Ceph(&'static str, io::Error),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SeatError {
    move |source| SeatError::Ceph(what, source)
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Register {
    image: Arc<Image>,
    id: String,
    volume: VolumeId,
    client: String,
}

impl Register {
    pub(super) fn new(image: Arc<Image>, namespace: Option<&str>) -> io::Result<Self> {
        let id = image.id()?;
        let volume = volume_id(&image.place(&id, namespace)?);
        let client = image.pool.cluster.address()?;
        Ok(Self { image, id, volume, client })
    }

    /// Unique in the pool.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// How the record names the image.
    pub(super) fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Address and nonce of this process's client.
    pub(super) fn client(&self) -> &str {
        &self.client
    }

    pub(super) fn read(&self) -> Result<Seat, SeatError> {
        self.load().map(|(_, seat)| seat)
    }

    fn load(&self) -> Result<(Option<String>, Seat), SeatError> {
        let text = self.image.note(SEAT_NOTE).map_err(failed("read the access record"))?;
        let seat = match text.as_deref() {
            None | Some("") => Seat::new(self.volume),
            Some(text) => text.parse().map_err(|_| SeatError::Note)?,
        };
        // Copied with the image's notes to another image, say.
        if seat.record.volume != self.volume {
            return Err(SeatError::Note);
        }
        Ok((text, seat))
    }

    /// Whether nobody else was faster.
    fn swap(&self, old: Option<&str>, new: &Seat) -> Result<bool, SeatError> {
        let swapped = self.image.swap_note(&self.id, SEAT_NOTE, old, &new.to_string());
        swapped.map_err(failed("change the access record"))
    }

    /// Changes the seat if it is still `seen`; whether it was.
    pub(super) fn swap_if(&self, seen: &Seat, new: &Seat) -> Result<bool, SeatError> {
        let (text, now) = self.load()?;
        Ok(now == *seen && self.swap(text.as_deref(), new)?)
    }

    /// Changes the seat as `change` says of what it is, until nobody is faster.
    /// It is durable afterwards.
    pub(super) fn change(
        &self,
        change: impl Fn(&Seat) -> Result<Seat, Refusal>,
    ) -> Result<Seat, SeatError> {
        loop {
            let (text, seat) = self.load()?;
            let changed = match change(&seat) {
                Ok(changed) => changed,
                Err(refusal) => return Err(SeatError::Refused(refusal, Box::new(seat))),
            };
            if changed == seat || self.swap(text.as_deref(), &changed)? {
                return Ok(changed);
            }
        }
    }

    /// Puts clients on the blocklist, for good, and notes that; `which` of the seat's.
    pub(super) fn keep_out(
        &self,
        which: impl Fn(&Seat) -> Vec<String>,
    ) -> Result<(Seat, Vec<String>), SeatError> {
        let mut all = Vec::new();
        loop {
            let (text, seat) = self.load()?;
            let clients = which(&seat);
            for client in &clients {
                self.blocklist(client)?;
                fault_point::at("former.listed");
            }
            all.extend(clients);
            let listed = seat.clone().with_listed(&all);
            if listed == seat || self.swap(text.as_deref(), &listed)? {
                if !all.is_empty() {
                    fault_point::at("former.noted");
                }
                return Ok((listed, all));
            }
        }
    }

    pub(super) fn blocklist(&self, client: &str) -> Result<(), SeatError> {
        tracing::warn!(client, "a Ceph client is put on the cluster's blocklist");
        let listed = self.image.pool.cluster.blocklist(client, FENCE_S);
        listed.map_err(failed("fence an earlier client"))
    }

    /// Ends the entry of a host's last client, whose process is dead, and forgets it.
    pub(super) fn bury(&self, owner: &str) -> Result<Vec<String>, SeatError> {
        let Some(dead) = self.read()?.buried(owner).cloned() else { return Ok(Vec::new()) };
        if dead.listed {
            let ended = self.image.pool.cluster.unlist(&dead.client);
            ended.map_err(failed("end a dead client's entry on the blocklist"))?;
            fault_point::at("entry.ended");
        }
        self.change(|seat| {
            let mut seat = seat.clone();
            seat.former.retain(|former| *former != dead);
            Ok(seat)
        })?;
        Ok(vec![dead.client])
    }

    /// Everything that has to be before this process, whose session the record
    /// names as the owner, may write: it is known by its client, whoever could
    /// still write is kept out, every request goes to servers that know that,
    /// and it has the lock.
    pub(super) fn enter(&self, session: SessionId) -> Result<Seat, SeatError> {
        let seat = loop {
            let (text, seat) = self.load()?;
            if seat.record.owner.as_ref().map(|owner| owner.session) != Some(session) {
                let refusal = Refusal::StaleEpoch { current: seat.record.epoch };
                return Err(SeatError::Refused(refusal, Box::new(seat)));
            }
            let loose: Vec<String> = seat.loose().map(str::to_owned).collect();
            for client in &loose {
                self.blocklist(client)?;
                fault_point::at("loose.listed");
            }
            let client = Some(self.client.clone());
            let entered = Seat { client, ..seat.clone() }.with_listed(&loose);
            if entered == seat || self.swap(text.as_deref(), &entered)? {
                break entered;
            }
        };
        self.image.pool.cluster.barrier().map_err(failed("wait for the cluster's map"))?;
        fault_point::at("map.waited");
        loop {
            let lock = self.image.lock_owner().map_err(failed("look at the lock"))?;
            if lock.as_ref() != Some(&self.client) {
                let alive = self.image.watchers().map_err(failed("look for other clients"))?;
                let before = seat.former.iter().map(|former| former.client.as_str());
                match next(before, lock.as_deref(), &alive) {
                    Step::Acquire => {}
                    Step::InUse(client) => return Err(SeatError::InUse(client)),
                    Step::TakeOver(client) => {
                        self.blocklist(&client)?;
                        let broken = self.image.break_lock(&client);
                        broken.map_err(failed("break the earlier client's lock"))?;
                        fault_point::at("lock.broken");
                    }
                }
            }
            match self.image.lock() {
                Ok(()) => {
                    fault_point::at("lock.taken");
                    return Ok(seat);
                }
                // Somebody was faster: look who.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EROFS | libc::EBUSY)) => {}
                Err(error) => return Err(failed("take the exclusive lock")(error)),
            }
        }
    }

    /// Gives the lock back; nothing of this client's may be under way.
    pub(super) fn leave(&self) -> Result<(), SeatError> {
        match self.image.unlock() {
            // It had none: it was asked before.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
            other => other.map_err(failed("give the lock back")),
        }
    }
}

/// A number for a name that nothing else has: FNV-1a, which guards against a
/// mistake, not against an enemy. Never zero.
fn volume_id(place: &str) -> VolumeId {
    let hash = place.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    VolumeId(hash.max(1))
}
