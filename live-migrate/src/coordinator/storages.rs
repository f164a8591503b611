//! The storage servers' admin API, as the coordinator uses it.

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::handoff::Try;
use serde::Deserialize;
use serde_json::{Value, json};

use super::config::Config;
use super::plan::{Grant, Member, Row, Seen, Trouble, Winner};
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
    client: Client,
    timeout: Duration,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Storages(Vec<StorageServer>);

/// An access record, as the API shows it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RecordView {
    /// Id of the volume, as `anchor` names it.
    #[serde(default)]
    pub volume: String,
    /// Counts changes.
    #[serde(default)]
    pub version: u64,
    /// Only requests with it are admitted.
    #[serde(default)]
    pub epoch: u64,
    /// The next that nobody had.
    #[serde(default)]
    pub next_epoch: u64,
    /// Where it stands.
    #[serde(default)]
    pub phase: String,
    /// Who owns the volume.
    pub owner: Option<OwnerView>,
    /// Who may not claim.
    pub barred: Option<String>,
    /// Highest term seen.
    #[serde(default)]
    pub coordinator_term: u64,
    /// Under way.
    pub handoff: Option<HandoffView>,
    /// The last one that is over.
    pub decided: Option<DecidedView>,
}

/// Owner of a volume.
#[derive(Clone, Debug, Deserialize)]
pub struct OwnerView {
    /// Host and VM.
    pub name: String,
    /// Incarnation.
    #[serde(default)]
    pub session: Value,
}

/// A handoff under way.
#[derive(Clone, Debug, Deserialize)]
pub struct HandoffView {
    /// Which.
    pub id: String,
    /// Which try.
    pub attempt: u32,
    /// Owner name of the destination.
    #[serde(default)]
    pub to: String,
    /// Id of the volume that decides.
    #[serde(default)]
    pub anchor: String,
    /// Its seal is known.
    #[serde(default)]
    pub sealed: bool,
}

/// A handoff that is over.
#[derive(Clone, Debug, Deserialize)]
pub struct DecidedView {
    /// Which.
    pub id: String,
    /// Which try.
    pub attempt: u32,
    /// How it ended.
    pub winner: Winner,
}

#[derive(Debug, Deserialize)]
struct ProofView {
    side: Winner,
    grant: u64,
    mac: String,
}

/// A volume and who may use it.
#[derive(Clone, Debug)]
pub struct VolumeView {
    /// Never used again.
    pub id: u64,
    /// Owner name.
    pub owner: Option<String>,
    /// Barred name.
    pub barred: Option<String>,
    /// Of the record.
    pub phase: String,
    /// Of the record.
    pub epoch: u64,
    /// Of the record: what an ARM that is planned now shows.
    pub next_epoch: u64,
}

impl RecordView {
    /// What it says of this try.
    #[must_use]
    pub fn seen(&self, row: &Row) -> Seen {
        let id = row.id.to_string();
        if let Some(decided) = &self.decided
            && (&decided.id, decided.attempt) == (&id, row.attempt)
        {
            return match decided.winner {
                Winner::Source => Seen::OverSource,
                Winner::Destination => Seen::OverDestination,
            };
        }
        match &self.handoff {
            Some(handoff) if (&handoff.id, handoff.attempt) == (&id, row.attempt) => {
                match self.phase.as_str() {
                    "armed" => Seen::Armed,
                    "sealed" => Seen::Sealed,
                    "active" => Seen::Active,
                    "reclaimed" => Seen::Reclaimed,
                    "frozen" if handoff.sealed => Seen::FrozenSealed,
                    "frozen" => Seen::Frozen,
                    _ => Seen::Nothing,
                }
            }
            _ => Seen::Nothing,
        }
    }
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
    Err(format!("`{uri}` is not on a storage server and cannot move with its VM"))
}

impl Storages {
    /// Of the configuration.
    #[must_use]
    pub fn new(config: &Config, credentials: Option<&Arc<Credentials>>) -> Self {
        let server = |storage: &super::config::Storage| {
            // Storage servers have no certificates of their own yet; behind TLS
            // they are their host's.
            let who = Identity { role: Role::Host, name: "storage".to_owned() };
            StorageServer {
                name: storage.data.first().cloned().unwrap_or_default(),
                data: storage.data.clone(),
                client: Client::new(
                    who,
                    storage.admin.clone(),
                    credentials.cloned(),
                    config.call_timeout,
                ),
                timeout: config.call_timeout,
            }
        };
        Self(config.storages.iter().map(server).collect())
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
        let terms = self.0.iter().map(StorageServer::term_seen);
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

    /// Shows a volume.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn show(&self, volume: &str) -> Result<VolumeView, StorageError> {
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
        let (query, more) = match known {
            Some((boot, version)) => {
                (format!("?boot_id={boot}&version={version}&wait_ms={}", WATCH.as_millis()), WATCH)
            }
            None => (String::new(), Duration::ZERO),
        };
        let path = format!("/v1/volumes/{volume}/access{query}");
        let within = self.timeout + more;
        let answer = self.client.call_within(Method::GET, &path, None, within).await;
        let answer = answer.map_err(|error| self.judge(error))?;
        let boot = answer["boot_id"].as_str().unwrap_or_default().to_owned();
        Ok((boot, self.record(answer["record"].clone())?))
    }

    /// ARM.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn arm(&self, row: &Row, member: &Member, term: u64) -> Result<(), StorageError> {
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
        self.post(volume, "abdicate", &attempt(of, term)).await.map(drop)
    }

    /// The anchor's proof; `None`: it has not decided.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn proof(&self, of: Try, volume: &str) -> Result<Option<Grant>, StorageError> {
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
        let mut body = attempt(of, term);
        if let Some(grant) = proof {
            body["session"] = format!("{:016x}", grant.session).into();
            body["proof"] =
                json!({"side": grant.winner.name(), "grant": grant.grant, "mac": grant.mac});
        }
        Ok(self.post(volume, "settle", &body).await?["next_epoch"].as_u64())
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
        self.call(Method::GET, &format!("/v1/volumes/{volume}/audit"), None).await
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
        self.client.call(method, path, body).await.map_err(|error| self.judge(error))
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
        assert!(place_of("file:///x").is_err());
        assert!(place_of("").is_err());
    }
}
