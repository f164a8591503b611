//! Ceph clusters as the coordinator uses them: the access records of images, and
//! the blocklist. The same words as a storage server's admin API, answered here:
//! there is no server of ours in front of the images, so this process changes
//! the record itself, by comparing and swapping.
//!
//! A client of the cluster lives for one call. Calls of the library wait, so
//! each is on a thread of its own, and ends by the library's own time-outs.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use baton_protocol::access::{AccessRecord, By, Input, Refusal, Seen};
use baton_protocol::handoff::{Key, Mode, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, VolumeId};
use baton_remote_client::rbd::{ImageRecord, RbdError, RecordError, Seat};
use baton_remote_client::uri::RbdUri;

use super::plan::{Grant, Row, Trouble, Winner, hex_of};
use super::storages::{
    DecidedView, HandoffView, OwnerView, Reclaimed, RecordView, StorageError, VolumeView,
};

/// Between two looks at a record that is watched.
const LOOK: Duration = Duration::from_millis(20);
/// Records on images are never frozen: they have one incarnation.
const BOOT_ID: &str = "0000000000000001";

/// A cluster.
#[derive(Clone, Debug)]
pub struct Ceph {
    /// Its configuration, the same path as in the volumes' URIs.
    pub conf: PathBuf,
    /// The coordinator's own user there, without `client.`.
    pub id: String,
    /// For one request.
    pub timeout: Duration,
}

/// As a member's storage: the cluster of a URI.
#[must_use]
pub fn place(uri: &RbdUri) -> (String, String) {
    let mut volume = uri.pool.clone();
    for part in uri.namespace.iter().chain([&uri.image]) {
        volume.push('/');
        volume.push_str(part);
    }
    let conf = uri.conf.as_deref().unwrap_or(std::path::Path::new("/etc/ceph/ceph.conf"));
    (name_of(conf), volume)
}

/// How a cluster is told of.
#[must_use]
pub fn name_of(conf: &std::path::Path) -> String {
    format!("ceph:{}", conf.display())
}

impl Ceph {
    fn uri(&self, volume: &str) -> RbdUri {
        let mut parts: Vec<&str> = volume.split('/').collect();
        let image = parts.pop().unwrap_or_default().to_owned();
        let namespace = (parts.len() > 1).then(|| parts[1].to_owned());
        RbdUri {
            pool: parts.first().copied().unwrap_or_default().to_owned(),
            image,
            snapshot: None,
            namespace,
            conf: Some(self.conf.clone()),
            id: Some(self.id.clone()),
            direct_reads: true,
        }
    }

    async fn with<T: Send + 'static>(
        &self,
        volume: &str,
        call: impl FnOnce(&ImageRecord) -> Result<T, RecordError> + Send + 'static,
    ) -> Result<T, StorageError> {
        let (uri, timeout) = (self.uri(volume), self.timeout);
        let done = tokio::task::spawn_blocking(move || {
            let record = ImageRecord::connect(&uri, timeout)?;
            call(&record)
        });
        match done.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(judge(error)),
            Err(error) => Err(unreachable(error.to_string())),
        }
    }

    /// See [`super::storages::StorageServer::show`].
    ///
    /// # Errors
    /// [`StorageError`], here and below.
    pub async fn show(&self, volume: &str) -> Result<VolumeView, StorageError> {
        self.with(volume, |image| {
            let Seat { record, .. } = image.read()?;
            Ok(VolumeView {
                id: record.volume.0,
                owner: record.owner.map(|owner| owner.name),
                barred: record.barred,
                phase: record.phase.name().to_owned(),
                epoch: record.epoch.0,
                next_epoch: record.next_epoch.0,
            })
        })
        .await
    }

    /// The record, as soon as it differs from the version that is known.
    pub async fn access(
        &self,
        volume: &str,
        known: Option<u64>,
        within: Duration,
    ) -> Result<(String, RecordView), StorageError> {
        // Gone when nobody waits for the answer any more.
        let wanted = Arc::new(());
        let still: Weak<()> = Arc::downgrade(&wanted);
        let read = self.with(volume, move |image| {
            let until = Instant::now() + within;
            loop {
                let record = image.read()?.record;
                let over = Instant::now() >= until || still.strong_count() == 0;
                if over || known != Some(record.version) {
                    return Ok((BOOT_ID.to_owned(), view(&record)));
                }
                std::thread::sleep(LOOK);
            }
        });
        let read = read.await;
        drop(wanted);
        read
    }

    /// ARM.
    pub async fn arm(
        &self,
        row: &Row,
        (volume, next_epoch): (&str, u64),
        term: u64,
    ) -> Result<(), StorageError> {
        let plan = Plan {
            attempt: row.attempt(),
            vm: row.vm.clone(),
            from: row.from_owner(),
            to: row.to_owner_name(),
            anchor: VolumeId(row.anchor().map_or(0, |anchor| anchor.id)),
            members: row.members_digest(),
            mode: if row.fast { Mode::Fast } else { Mode::Base },
            key: Key(bytes(&row.key).ok_or_else(|| unreachable("the row has no key".to_owned()))?),
        };
        self.with(volume, move |image| {
            let next_epoch = Epoch(next_epoch);
            image.change(Input::Arm { plan: &plan, term, next_epoch, generation: 0 }).map(drop)
        })
        .await
    }

    /// RECLAIM, at the anchor.
    pub async fn reclaim(
        &self,
        of: Try,
        volume: &str,
        term: u64,
    ) -> Result<Reclaimed, StorageError> {
        let by = By::Coordinator { term };
        let reclaimed = self.with(volume, move |image| {
            let seat = image.change(Input::Reclaim { attempt: of, by })?;
            Ok(grant(&seat.record, of))
        });
        match reclaimed.await {
            Ok(Some(grant)) => Ok(Reclaimed::Source(grant)),
            Ok(None) => Ok(Reclaimed::Unknown),
            Err(error) => match error.refusal() {
                "baton:lost-race" => Ok(Reclaimed::Lost),
                "baton:no-such-handoff" => Ok(Reclaimed::Foreign),
                _ => Err(error),
            },
        }
    }

    /// ABDICATE, at the anchor, for a destination that is dead.
    pub async fn abdicate(&self, of: Try, volume: &str, term: u64) -> Result<(), StorageError> {
        let by = By::Coordinator { term };
        self.with(volume, move |image| image.change(Input::Abdicate { attempt: of, by }).map(drop))
            .await
    }

    /// DISARM, at a member that nothing decides any more.
    pub async fn disarm(&self, of: Try, volume: &str, term: u64) -> Result<(), StorageError> {
        self.with(volume, move |image| image.change(Input::Disarm { attempt: of, term }).map(drop))
            .await
    }

    /// The anchor's proof; `None`: it has not decided.
    pub async fn proof(&self, of: Try, volume: &str) -> Result<Option<Grant>, StorageError> {
        self.with(volume, move |image| {
            let record = image.read()?.record;
            let under_way = record.handoff.as_ref().filter(|handoff| handoff.plan.attempt == of);
            match (grant(&record, of), under_way) {
                (_, Some(handoff)) if handoff.plan.anchor != record.volume => {
                    Err(RecordError::Refused(Refusal::NotAnchor { anchor: handoff.plan.anchor }))
                }
                (Some(grant), _) => Ok(Some(grant)),
                (None, Some(_)) => Ok(None),
                (None, None) => Err(RecordError::Refused(Refusal::NoSuchHandoff(of))),
            }
        })
        .await
    }

    /// SETTLE; the record's next epoch then.
    pub async fn settle(
        &self,
        of: Try,
        proof: Option<&Grant>,
        volume: &str,
        term: u64,
    ) -> Result<Option<u64>, StorageError> {
        let shown = |grant: &Grant| {
            let side = Side::from(grant.winner);
            let mac = bytes(&grant.mac)?;
            Some((grant.session(), Proof { side, grant: grant.grant, mac }))
        };
        let proof = proof.and_then(shown);
        self.with(volume, move |image| {
            let seat = image.change(Input::Settle { attempt: of, term, proof })?;
            Ok(Some(seat.record.next_epoch.0))
        })
        .await
    }

    /// FENCE: answered when every client that had the image is on the blocklist.
    pub async fn fence(
        &self,
        volume: &str,
        term: u64,
        nominee: Option<&str>,
        seen: &RecordView,
    ) -> Result<u64, StorageError> {
        let nominee = nominee.map(str::to_owned);
        let owner = seen.owner.as_ref().map(|owner| owner.name.clone());
        let next_epoch = Epoch(seen.next_epoch);
        self.with(volume, move |image| {
            let seen = Some(Seen { owner: owner.as_deref(), next_epoch });
            let nominee = nominee.as_deref();
            let seat = image.fence(Input::Fence { term: Some(term), nominee, seen })?;
            Ok(seat.record.epoch.0)
        })
        .await
    }

    /// Puts the clients that had the image before on the blocklist; which were not yet.
    pub async fn keep_former_out(&self, volume: &str) -> Result<Vec<String>, StorageError> {
        self.with(volume, ImageRecord::keep_former_out).await
    }

    /// Ends the entry of an owner's last client, if it had sealed, when its process is
    /// proven dead; whose that was.
    pub async fn bury(&self, volume: &str, owner: &str) -> Result<Vec<String>, StorageError> {
        let owner = owner.to_owned();
        self.with(volume, move |image| image.bury(&owner)).await
    }
}

fn view(record: &AccessRecord) -> RecordView {
    RecordView {
        volume: record.volume.to_string(),
        version: record.version,
        epoch: record.epoch.0,
        next_epoch: record.next_epoch.0,
        phase: record.phase.name().to_owned(),
        owner: record.owner.as_ref().map(|owner| OwnerView {
            name: owner.name.clone(),
            session: owner.session.to_string().into(),
        }),
        barred: record.barred.clone(),
        coordinator_term: record.coordinator_term,
        handoff: record.handoff.as_ref().map(|handoff| HandoffView {
            id: handoff.plan.attempt.id.to_string(),
            attempt: handoff.plan.attempt.attempt,
            to: handoff.plan.to.clone(),
            anchor: handoff.plan.anchor.to_string(),
            sealed: handoff.sealed,
        }),
        decided: record.decided.as_ref().map(|decided| DecidedView {
            id: decided.attempt.id.to_string(),
            attempt: decided.attempt.attempt,
            winner: winner(decided.winner),
        }),
    }
}

fn winner(side: Side) -> Winner {
    match side {
        Side::Source => Winner::Source,
        Side::Destination => Winner::Destination,
    }
}

/// The decision, as the journal keeps it.
fn grant(record: &AccessRecord, of: Try) -> Option<Grant> {
    let (proof, owner) = (record.proof(of)?, record.owner.as_ref()?);
    Some(Grant {
        session: owner.session.0,
        winner: winner(proof.side),
        grant: proof.grant,
        mac: hex_of(&proof.mac),
    })
}

/// 32 bytes from 64 hexadecimal digits.
fn bytes(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}

fn unreachable(detail: String) -> StorageError {
    let kind = "baton:storage-unreachable".to_owned();
    StorageError::Unreachable(Trouble { kind, detail })
}

fn judge(error: RecordError) -> StorageError {
    let detail = error.to_string();
    let refused = |kind: &str, detail| StorageError::Refused {
        trouble: Trouble { kind: kind.to_owned(), detail },
    };
    match error {
        RecordError::Refused(Refusal::StaleTerm { .. }) => StorageError::StaleTerm(detail),
        RecordError::Refused(refusal) => refused(kind(&refusal), detail),
        RecordError::Rbd(RbdError::NoImage(_) | RbdError::NoPool(_)) => {
            refused("baton:no-such-volume", detail)
        }
        RecordError::Rbd(error @ (RbdError::Key { .. } | RbdError::Denied { .. })) => {
            refused("baton:storage-refused", error.to_string())
        }
        RecordError::Rbd(_) => unreachable(detail),
    }
}

/// The problem types of a storage server's admin API, for the same refusals.
fn kind(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::BadName | Refusal::BadPlan(_) => "baton:bad-request",
        Refusal::NoSuchHandoff(_) => "baton:no-such-handoff",
        Refusal::StaleTerm { .. } => "baton:stale-term",
        Refusal::HandoffInProgress(_) | Refusal::InHandoff(_) => "baton:handoff-in-progress",
        Refusal::StalePlan { .. } => "baton:stale-plan",
        Refusal::StaleFence { .. } => "baton:stale-fence",
        Refusal::NotOwner { .. } | Refusal::Barred { .. } => "baton:not-owner",
        Refusal::Lost { .. } => "baton:lost-race",
        Refusal::Undecided => "baton:undecided",
        Refusal::UnknownFrozen => "baton:unknown-frozen",
        Refusal::NotAnchor { .. } => "baton:not-anchor",
        Refusal::CannotDisarm(_) => "baton:cannot-disarm",
        Refusal::TooLate => "baton:too-late",
        Refusal::BadProof => "baton:bad-proof",
        Refusal::StaleEpoch { .. }
        | Refusal::NotNominated
        | Refusal::NotSealed
        | Refusal::CannotUnfreeze => "baton:refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_named_back_as_it_was() {
        let ceph = Ceph {
            conf: "/etc/ceph/ceph.conf".into(),
            id: "coordinator".to_owned(),
            timeout: Duration::from_secs(1),
        };
        for (pool, namespace, image, name) in
            [("rbd", None, "v", "rbd/v"), ("p", Some("n"), "v", "p/n/v")]
        {
            let namespace = namespace.map(str::to_owned);
            let (pool, image, id) = (pool.to_owned(), image.to_owned(), Some("vm".to_owned()));
            let (conf, snapshot) = (None, None);
            let uri = RbdUri { pool, image, namespace, id, conf, snapshot, direct_reads: true };
            assert_eq!(place(&uri), ("ceph:/etc/ceph/ceph.conf".to_owned(), name.to_owned()));
            let id = Some("coordinator".to_owned());
            let conf = Some(ceph.conf.clone());
            assert_eq!(ceph.uri(name), RbdUri { id, conf, ..uri });
        }
    }

    #[test]
    fn a_decision_reads_as_it_was_written() {
        let mac = [7; 32];
        assert_eq!(bytes(&hex_of(&mac)), Some(mac));
        for wrong in ["", "07", &"zz".repeat(32), &"é".repeat(32)] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }
}
