//! What is done at the storage: arming, watching, deciding, settling.

use baton_fault_point as fault_point;

use super::{Patience, Work};
use crate::coordinator::clients;
use crate::coordinator::fault::while_storage_is_away;
use crate::coordinator::plan::{Input, Member, Trouble};
use crate::coordinator::storages::{Reclaimed, StorageError};

impl Work {
    /// A failure that is nobody's answer: wait, or end the coordinator.
    async fn endure(&self, patience: &mut Patience, error: StorageError) {
        match error {
            StorageError::StaleTerm(_) => {
                self.reports.tell(Input::StaleTerm).await;
                std::future::pending::<()>().await;
            }
            StorageError::Unreachable(Trouble { kind, detail }) => {
                let detail = format!("{detail}; {}", while_storage_is_away(&self.row));
                patience.wait(&self.reports, Some(&Trouble { kind, detail })).await;
            }
            StorageError::Refused { trouble } => {
                patience.wait(&self.reports, Some(&trouble)).await;
            }
        }
    }

    pub(super) async fn arm(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        loop {
            let armed = match self.core.storages.of(member) {
                Ok(server) => server.arm(&self.row, member, self.core.term).await,
                Err(error) => Err(error),
            };
            fault_point::at("arm.sent");
            let input = match armed {
                Ok(()) => Input::Armed(place),
                Err(StorageError::Refused { trouble }) => match trouble.kind.as_str() {
                    // Armed before, and gone on since: the watch says how.
                    "baton:no-such-handoff" => Input::Armed(place),
                    "baton:handoff-in-progress"
                        if trouble.detail.contains(&self.row.id.to_string()) =>
                    {
                        // The same plan is granted again while it is armed.
                        match self.is_foreign(member).await {
                            Ok(false) => Input::Armed(place),
                            Ok(true) => Input::CannotArm(place, self.with_volume(member, trouble)),
                            Err(error) => {
                                self.endure(&mut patience, error).await;
                                continue;
                            }
                        }
                    }
                    "baton:handoff-in-progress" => {
                        let trouble = self.in_another(member, trouble).await;
                        Input::CannotArm(place, self.with_volume(member, trouble))
                    }
                    _ => Input::CannotArm(place, self.with_volume(member, trouble)),
                },
                Err(error) => {
                    self.endure(&mut patience, error).await;
                    continue;
                }
            };
            return self.reports.tell(input).await;
        }
    }

    /// Another coordinator armed it under the same id, with a key of its own.
    async fn is_foreign(&self, member: &Member) -> Result<bool, StorageError> {
        let server = self.core.storages.of(member)?;
        let (_, record) = server.access(&member.volume, None).await?;
        Ok(record.phase == "armed")
    }

    /// The volume is in another handoff. One that the journal does not know can be neither
    /// cancelled nor finished, whatever the storage proposes.
    async fn in_another(&self, member: &Member, trouble: Trouble) -> Trouble {
        let record = match self.core.storages.of(member) {
            Ok(server) => server.access(&member.volume, None).await,
            Err(error) => Err(error),
        };
        let other = record.ok().and_then(|(_, record)| record.handoff);
        let known = |id: &str| id.parse().is_ok_and(|id| self.core.handoff(id).is_some());
        let Some(other) = other.filter(|other| !known(&other.id)) else { return trouble };
        let vm = &self.row.vm;
        let host = other.to.split('/').next().unwrap_or_default();
        let detail = format!(
            "handoff {} (attempt {}) to {} is under way there, and this coordinator's journal does not know it, so it can be neither cancelled nor finished: `baton handoff why {vm}` says who owns the volumes, and `baton handoff fence {vm} --dead-host {host} --reason TEXT` ends it, also while {host} lives",
            other.id, other.attempt, other.to
        );
        Trouble { detail, ..trouble }
    }

    fn with_volume(&self, member: &Member, trouble: Trouble) -> Trouble {
        let kind = match trouble.kind.as_str() {
            "baton:no-such-volume" => "baton:unknown-volume".to_owned(),
            _ => trouble.kind,
        };
        Trouble {
            kind,
            detail: format!("volume `{}` at {}: {}", member.volume, member.storage, trouble.detail),
        }
    }

    pub(super) async fn watch(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        let mut known = None;
        loop {
            let seen = match self.core.storages.of(member) {
                Ok(server) => server.access(&member.volume, known.as_ref()).await,
                Err(error) => Err(error),
            };
            match seen {
                Ok((_, record)) if record.coordinator_term > self.core.term => {
                    return self.reports.tell(Input::StaleTerm).await;
                }
                Ok((boot, record)) => {
                    let now = Some((boot, record.version));
                    if now != known {
                        let seen = record.seen(&self.row);
                        self.reports.tell(Input::Seen(place, seen, record.epoch)).await;
                    }
                    known = now;
                    patience = Patience::new();
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    pub(super) async fn reclaim(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => {
                    server.reclaim(self.row.attempt(), &anchor.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(Reclaimed::Source(grant)) => {
                    return self.reports.tell(Input::Reclaimed(grant)).await;
                }
                Ok(Reclaimed::Lost) => return self.reports.tell(Input::ReclaimLost).await,
                Ok(Reclaimed::Foreign) => return self.reports.tell(Input::ReclaimForeign).await,
                Ok(Reclaimed::Unknown) => {
                    self.reports.tell(Input::ReclaimUnknown).await;
                    patience.wait(&self.reports, None).await;
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    pub(super) async fn abdicate(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => {
                    server.abdicate(self.row.attempt(), &anchor.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(()) => return self.reports.tell(Input::Abdicated).await,
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    pub(super) async fn prove(&self) {
        let Some(anchor) = self.row.anchor() else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(anchor) {
                Ok(server) => server.proof(self.row.attempt(), &anchor.volume).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(Some(grant)) => return self.reports.tell(Input::Proved(grant)).await,
                Ok(None) => patience.wait(&self.reports, None).await,
                // Settled before a restart of ours, and armed for another since.
                Err(error) if error.refusal() == "baton:no-such-handoff" => {
                    return self.reports.tell(Input::Settled(0, None)).await;
                }
                Err(error) => self.endure(&mut patience, error).await,
            }
        }
    }

    pub(super) async fn settle(&self, place: usize) {
        let Some(member) = self.member(place) else { return };
        let mut patience = Patience::new();
        loop {
            let answer = match self.core.storages.of(member) {
                Ok(server) => {
                    let proof = self.row.proof.as_ref();
                    server.settle(self.row.attempt(), proof, &member.volume, self.core.term).await
                }
                Err(error) => Err(error),
            };
            fault_point::at("settle.sent");
            match answer {
                Ok(next_epoch) => {
                    if let Err(error) =
                        clients::keep_former_out(&self.core, &self.row, member).await
                    {
                        self.endure(&mut patience, error).await;
                        continue;
                    }
                    return self.reports.tell(Input::Settled(place, next_epoch)).await;
                }
                Err(error) => match error.refusal() {
                    // Fenced, or deleted: nothing is armed there.
                    "baton:no-such-handoff" | "baton:no-such-volume" => {
                        return self.reports.tell(Input::Settled(place, None)).await;
                    }
                    "baton:bad-proof" => return self.reports.tell(Input::ProofStale).await,
                    _ => self.endure(&mut patience, error).await,
                },
            }
        }
    }
}
