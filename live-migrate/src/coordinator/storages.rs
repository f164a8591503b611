//! The storage servers' admin API, as the coordinator uses it, and Ceph clusters
//! behind the same calls.

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::handoff::Try;
use baton_remote_client::VolumeUri;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ceph::{self, Ceph};
use super::config::Config;
use super::plan::{Grant, Member, Row, Trouble, Winner};
pub use super::record::{DecidedView, HandoffView, OwnerView, RecordView, VolumeView};
use crate::client::{CallError, Client, Method};
use crate::identity::{Identity, Role};
use crate::problem::Problem;
use crate::tls::Credentials;

/// A long poll of an access record.
const WATCH: Duration = Duration::from_secs(20);

/// Why a server did not do what it was told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    /// No answer, or it failed: it may be tried again.
    #[error("{}", .0.detail)]
    Unreachable(Trouble),
    /// A newer coordinator has spoken.
    #[error("{0}")]
    StaleTerm(String),
    /// It understood and refused.
    #[error("{}", .trouble.detail)]
    Refused {
        /// Type and sentence.
        trouble: Trouble,
    },
}

impl StorageError {
    /// Stable type of a refusal; empty otherwise.
    #[must_use]
    pub fn refusal(&self) -> &str {
        match self {
            Self::Refused { trouble } => &trouble.kind,
            Self::Unreachable(_) | Self::StaleTerm(_) => "",
        }
    }
}

/// A storage server.
#[derive(Clone, Debug)]
pub struct StorageServer {
    /// As it is told of.
    pub name: String,
    data: Vec<String>,
    way: Way,
    timeout: Duration,
}

/// How a storage is spoken to.
#[derive(Clone, Debug)]
enum Way {
    /// A storage server's admin API.
    Admin(Client),
    /// A cluster of Ceph, through its own library.
    Ceph(Ceph),
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Storages(Vec<StorageServer>);

#[derive(Debug, Deserialize)]
struct ProofView {
    side: Winner,
    grant: u64,
    mac: String,
}

/// What RECLAIM was answered.
#[derive(Clone, Debug)]
pub enum Reclaimed {
    /// The source has the volumes.
    Source(Grant),
    /// The destination has them.
    Lost,
    /// The anchor cannot say.
    Unknown,
    /// It does not know the handoff.
    Foreign,
}

/// Server and name of a volume, from its URI.
///
/// # Errors
/// A sentence when the volume cannot move.
pub fn place_of(uri: &str) -> Result<(Vec<String>, String), String> {
    if let Some(rest) = uri.strip_prefix("baton://") {
        let (servers, volume) = rest.split_once('/').unwrap_or((rest, ""));
        return Ok((servers.split(',').map(str::to_owned).collect(), volume.to_owned()));
    }
    if let Some(rest) = uri.strip_prefix("baton+unix:///")
        && let Some((volume, query)) = rest.split_once('?')
        && let Some(socket) = query.split('&').find_map(|pair| pair.strip_prefix("socket="))
    {
        return Ok((vec![format!("unix:{socket}")], volume.to_owned()));
    }
    if let Ok(VolumeUri::Rbd(image)) = uri.parse()
        && image.snapshot.is_none()
    {
        let (cluster, volume) = ceph::place(&image);
        return Ok((vec![cluster], volume));
    }
    Err(format!("`{uri}` is not on a storage server and cannot move with its VM"))
}

impl Storages {
    /// Of the configuration.
    #[must_use]
    pub fn new(config: &Config, credentials: Option<&Arc<Credentials>>) -> Self {
        let server = |storage: &super::config::Storage| {
            // Storage servers have no certificates of their own yet: who ends TLS before one shows its host's.
            let who = Identity { role: Role::Host, name: storage.host.clone() };
            StorageServer {
                name: storage.data.first().cloned().unwrap_or_default(),
                data: storage.data.clone(),
                way: Way::Admin(Client::new(
                    who,
                    storage.admin.clone(),
                    credentials.cloned(),
                    config.call_timeout,
                )),
                timeout: config.call_timeout,
            }
        };
        let servers = config.storages.iter().map(server);
        let clusters = config.cephs.iter().map(|cluster| {
            let name = ceph::name_of(&cluster.conf);
            let (conf, id) = (cluster.conf.clone(), cluster.id.clone());
            let timeout = config.call_timeout;
            let way = Way::Ceph(Ceph { conf, id, timeout });
            StorageServer { data: vec![name.clone()], name, way, timeout }
        });
        Self(servers.chain(clusters).collect())
    }

    /// The one that serves at one of these addresses.
    #[must_use]
    pub fn at(&self, data: &[String]) -> Option<&StorageServer> {
        self.0.iter().find(|server| data.iter().any(|data| server.data.contains(data)))
    }

    /// The one of a member.
    ///
    /// # Errors
    /// It is not configured any more.
    pub fn of(&self, member: &Member) -> Result<&StorageServer, StorageError> {
        let found = self.0.iter().find(|server| server.data.contains(&member.storage));
        found.ok_or_else(|| {
            StorageError::Unreachable(Trouble {
                kind: "baton:storage-unreachable".to_owned(),
                detail: format!(
                    "the storage server {} of volume `{}` is not in the configuration any more; add it",
                    member.storage, member.volume
                ),
            })
        })
    }

    /// Highest term any reachable server has heard. All are asked at once.
    pub async fn term_seen(&self) -> u64 {
        // Nobody can tell which images a cluster of Ceph has records for.
        let servers = self.0.iter().filter(|server| server.ceph().is_none());
        let terms = servers.map(StorageServer::term_seen);
        futures_util::future::join_all(terms).await.into_iter().max().unwrap_or(0)
    }
}

impl StorageServer {
    /// Highest term it has heard; 0 if it does not answer.
    async fn term_seen(&self) -> u64 {
        match self.call(Method::GET, "/v1/volumes", None).await {
            Ok(list) => {
                let volumes = list["volumes"].as_array().map_or(&[][..], Vec::as_slice);
                let terms = volumes.iter().filter_map(|v| v["access"]["coordinator_term"].as_u64());
                terms.max().unwrap_or(0)
            }
            Err(error) => {
                tracing::warn!(storage = self.name, %error, "cannot ask for its term");
                0
            }
        }
    }

    fn ceph(&self) -> Option<&Ceph> {
        match &self.way {
            Way::Ceph(ceph) => Some(ceph),
            Way::Admin(_) => None,
        }
    }

    fn admin(&self) -> Result<&Client, StorageError> {
        match &self.way {
            Way::Admin(client) => Ok(client),
            Way::Ceph(_) => Err(self.foreign("nothing, since it is a cluster of Ceph")),
        }
    }

    /// Shows a volume.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn show(&self, volume: &str) -> Result<VolumeView, StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.show(volume).await;
        }
        let answer = self.call(Method::GET, &format!("/v1/volumes/{volume}"), None).await?;
        let access = &answer["access"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let id = answer["id"].as_str().and_then(|id| u64::from_str_radix(id, 16).ok());
        Ok(VolumeView {
            id: id.ok_or_else(|| self.foreign("a volume without an id"))?,
            owner: text(&access["owner"]).or_else(|| text(&access["owner"]["name"])),
            barred: text(&access["barred"]),
            phase: text(&access["phase"]).unwrap_or_default(),
            epoch: access["epoch"].as_u64().unwrap_or(0),
            next_epoch: access["next_epoch"].as_u64().unwrap_or(0),
        })
    }

    /// The record, as soon as it differs from what is known.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn access(
        &self,
        volume: &str,
        known: Option<&(String, u64)>,
    ) -> Result<(String, RecordView), StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.access(volume, known.map(|(_, version)| *version), WATCH).await;
        }
        let (query, more) = match known {
            Some((boot, version)) => {
                (format!("?boot_id={boot}&version={version}&wait_ms={}", WATCH.as_millis()), WATCH)
            }
            None => (String::new(), Duration::ZERO),
        };
        let path = format!("/v1/volumes/{volume}/access{query}");
        let within = self.timeout + more;
        let answer = self.admin()?.call_within(Method::GET, &path, None, within).await;
        let answer = answer.map_err(|error| self.judge(error))?;
        let boot = answer["boot_id"].as_str().unwrap_or_default().to_owned();
        Ok((boot, self.record(answer["record"].clone())?))
    }

    /// ARM.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn arm(&self, row: &Row, member: &Member, term: u64) -> Result<(), StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.arm(row, (&member.volume, member.next_epoch), term).await;
        }
        let members = row.members_digest();
        let anchor = row.anchor().map_or(0, |anchor| anchor.id);
        let plan = json!({
            "id": row.id.to_string(),
            "attempt": row.attempt,
            "vm": row.vm,
            "from": row.from_owner(),
            "to": row.to_owner_name(),
            "anchor": format!("{anchor:016x}"),
            "members": {"count": members.count, "hash": format!("{:016x}", members.hash)},
            "mode": if row.fast { "fast" } else { "base" },
            "key": row.key,
        });
        let body = json!({"term": term, "next_epoch": member.next_epoch, "plan": plan});
        self.post(&member.volume, "arm", &body).await.map(drop)
    }

    /// RECLAIM, at the anchor.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn reclaim(
        &self,
        of: Try,
        volume: &str,
        term: u64,
    ) -> Result<Reclaimed, StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.reclaim(of, volume, term).await;
        }
        match self.post(volume, "reclaim", &attempt(of, term)).await {
            Ok(answer) if answer["outcome"] == "source" => {
                Ok(Reclaimed::Source(self.grant(&answer)?))
            }
            Ok(_) => Ok(Reclaimed::Unknown),
            Err(error) => match error.refusal() {
                "baton:lost-race" => Ok(Reclaimed::Lost),
                "baton:unknown-frozen" => Ok(Reclaimed::Unknown),
                "baton:no-such-handoff" => Ok(Reclaimed::Foreign),
                _ => Err(error),
            },
        }
    }

    /// ABDICATE, at the anchor, for a destination that is dead.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn abdicate(&self, of: Try, volume: &str, term: u64) -> Result<(), StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.abdicate(of, volume, term).await;
        }
        self.post(volume, "abdicate", &attempt(of, term)).await.map(drop)
    }

    /// The anchor's proof; `None`: it has not decided.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn proof(&self, of: Try, volume: &str) -> Result<Option<Grant>, StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.proof(of, volume).await;
        }
        let path = format!("/v1/volumes/{volume}/proof?id={}&attempt={}", of.id, of.attempt);
        match self.call(Method::GET, &path, None).await {
            Ok(answer) => self.grant(&answer).map(Some),
            Err(error) if error.refusal() == "baton:undecided" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// SETTLE; the record's next epoch then.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn settle(
        &self,
        of: Try,
        proof: Option<&Grant>,
        volume: &str,
        term: u64,
    ) -> Result<Option<u64>, StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.settle(of, proof, volume, term).await;
        }
        let mut body = attempt(of, term);
        if let Some(grant) = proof {
            body["session"] = format!("{:016x}", grant.session).into();
            body["proof"] =
                json!({"side": grant.winner.name(), "grant": grant.grant, "mac": grant.mac});
        }
        Ok(self.post(volume, "settle", &body).await?["next_epoch"].as_u64())
    }

    /// DISARM, at another member than the anchor, which has forgotten the handoff.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn disarm(&self, of: Try, volume: &str, term: u64) -> Result<(), StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.disarm(of, volume, term).await;
        }
        self.post(volume, "disarm", &attempt(of, term)).await.map(drop)
    }

    /// FENCE: answered when nothing of the old owner can reach the volume any more.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn fence(
        &self,
        volume: &str,
        term: u64,
        reason: &str,
        nominee: Option<&str>,
        seen: &RecordView,
    ) -> Result<u64, StorageError> {
        if let Some(ceph) = self.ceph() {
            return ceph.fence(volume, term, nominee, seen).await;
        }
        let owner = seen.owner.as_ref().map(|owner| owner.name.as_str());
        let seen = json!({"owner": owner, "next_epoch": seen.next_epoch});
        let mut body = json!({"term": term, "reason": reason, "seen": seen});
        if let Some(nominee) = nominee {
            body["nominee"] = nominee.into();
        }
        let answer = self.post(volume, "fence", &body).await?;
        Ok(answer["access"]["epoch"].as_u64().or(answer["record"]["epoch"].as_u64()).unwrap_or(0))
    }

    /// The last changes of a record.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn audit(&self, volume: &str) -> Result<Value, StorageError> {
        if self.ceph().is_some() {
            // An image keeps its record and no history of it.
            return Ok(json!({"entries": []}));
        }
        self.call(Method::GET, &format!("/v1/volumes/{volume}/audit"), None).await
    }

    /// Keeps those out for good that had the volume before, where the storage does not
    /// do so by itself; whom.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn keep_former_out(&self, volume: &str) -> Result<Vec<String>, StorageError> {
        match self.ceph() {
            Some(ceph) => ceph.keep_former_out(volume).await,
            None => Ok(Vec::new()),
        }
    }

    /// Forgets an owner's last process, which is proven dead, where they are kept out one
    /// by one; whom.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn bury(&self, volume: &str, owner: &str) -> Result<Vec<String>, StorageError> {
        match self.ceph() {
            Some(ceph) => ceph.bury(volume, owner).await,
            None => Ok(Vec::new()),
        }
    }

    async fn post(&self, volume: &str, what: &str, body: &Value) -> Result<Value, StorageError> {
        self.call(Method::POST, &format!("/v1/volumes/{volume}/{what}"), Some(body)).await
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, StorageError> {
        self.admin()?.call(method, path, body).await.map_err(|error| self.judge(error))
    }

    fn judge(&self, error: CallError) -> StorageError {
        match error {
            CallError::Refused { kind, detail, .. } if kind == "baton:stale-term" => {
                StorageError::StaleTerm(detail)
            }
            // An answer, though the caller is not to blame: it has no room to record anything.
            CallError::Refused { status, kind, detail, .. }
                if status < 500 || kind == "baton:metadata-full" =>
            {
                StorageError::Refused { trouble: Trouble { kind, detail } }
            }
            other => StorageError::Unreachable(Trouble {
                kind: "baton:storage-unreachable".to_owned(),
                detail: format!("storage server {}: {}", self.name, Problem::described(&other)),
            }),
        }
    }

    fn record(&self, value: Value) -> Result<RecordView, StorageError> {
        serde_json::from_value(value).map_err(|_| self.foreign("an access record it cannot read"))
    }

    fn grant(&self, answer: &Value) -> Result<Grant, StorageError> {
        let proof: Result<ProofView, _> = serde_json::from_value(answer["proof"].clone());
        let session = answer["session"].as_str().and_then(|s| u64::from_str_radix(s, 16).ok());
        match (proof, session) {
            (Ok(ProofView { side, grant, mac }), Some(session)) => {
                Ok(Grant { session, winner: side, grant, mac })
            }
            _ => Err(self.foreign("a proof it cannot read")),
        }
    }

    fn foreign(&self, what: &str) -> StorageError {
        StorageError::Unreachable(Trouble {
            kind: "baton:storage-unreachable".to_owned(),
            detail: format!(
                "storage server {} answered with {what}; are the versions the same?",
                self.name
            ),
        })
    }
}

fn attempt(of: Try, term: u64) -> Value {
    json!({"term": term, "id": of.id.to_string(), "attempt": of.attempt})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_volumes_are() {
        let two = (vec!["a:1".to_owned(), "b:2".to_owned()], "v".to_owned());
        assert_eq!(place_of("baton://a:1,b:2/v"), Ok(two));
        let unix = (vec!["unix:/s".to_owned()], "v".to_owned());
        assert_eq!(place_of("baton+unix:///v?socket=/s"), Ok(unix));
        let image = (vec!["ceph:/c".to_owned()], "rbd/v".to_owned());
        assert_eq!(place_of("rbd://rbd/v?conf=/c&id=vm"), Ok(image));
        assert!(place_of("rbd://rbd/v@snap").is_err());
        assert!(place_of("file:///x").is_err());
        assert!(place_of("").is_err());
    }
}
