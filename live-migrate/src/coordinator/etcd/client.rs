//! etcd's v3 API by its JSON gateway: one connection an exchange, any member.
//!
//! The gateway needs nothing but HTTP, JSON and TLS, which are here anyway; the
//! gRPC crates need a protobuf compiler on every machine that builds. All that is
//! asked here may be carried out twice, so what one member did not answer is
//! asked of the next.

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::EtcdError;
use super::settings::{Member, Settings};
use super::tls::Tls;
use super::txn::{Answer, Kv, Txn, encode, number};
use crate::http::{self, ExchangeError, Header};
use crate::problem::Problem;
use crate::tls::{CredentialsError, HandshakeError};

/// A page of rows is below; what is longer is not for us.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Keys of one page: rows of a hundred volumes still fit.
const PAGE: usize = 200;

/// Calls etcd.
#[derive(Debug)]
pub struct Client {
    members: Vec<Member>,
    /// The one that answered last.
    good: AtomicUsize,
    prefix: String,
    user: Option<(String, String)>,
    token: Mutex<Option<String>>,
    tls: Option<Tls>,
    timeout: Duration,
}

impl Client {
    /// Of the configuration: reads password and certificates, calls nobody.
    ///
    /// # Errors
    /// A file.
    pub fn new(settings: &Settings) -> Result<Self, CredentialsError> {
        let user = match &settings.user {
            None => None,
            Some((user, file)) => Some((user.clone(), password(file)?)),
        };
        Ok(Self {
            members: settings.members.clone(),
            good: AtomicUsize::new(0),
            prefix: settings.prefix.clone(),
            user,
            token: Mutex::default(),
            tls: Tls::load(settings)?,
            timeout: settings.call_timeout,
        })
    }

    /// A transaction.
    ///
    /// # Errors
    /// [`EtcdError`]; after [`EtcdError::Unreachable`] it may be done all the same,
    /// now or later.
    pub async fn txn(&self, txn: &Txn) -> Result<Answer, EtcdError> {
        Answer::of(&self.call("/v3/kv/txn", &txn.json()).await?)
    }

    /// A lease of so many seconds: its id, and the seconds that were granted.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn grant(&self, ttl: Duration) -> Result<(i64, Duration), EtcdError> {
        let body = json!({"TTL": ttl.as_secs().to_string()});
        let answer = self.call("/v3/lease/grant", &body).await?;
        Ok((number(&answer["ID"]), seconds(&answer["TTL"])))
    }

    /// Keeps a lease alive; for how long from now, at most.
    ///
    /// # Errors
    /// [`EtcdError::LeaseGone`], and others.
    pub async fn keep_alive(&self, lease: i64) -> Result<Duration, EtcdError> {
        let body = json!({"ID": lease.to_string()});
        let answer = self.call("/v3/lease/keepalive", &body).await?;
        let left = seconds(&answer["result"]["TTL"]);
        // It is not there any more.
        if left.is_zero() { Err(EtcdError::LeaseGone) } else { Ok(left) }
    }

    /// Gives a lease back, and what goes with it. It may be gone already.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn revoke(&self, lease: i64) -> Result<(), EtcdError> {
        match self.call("/v3/lease/revoke", &json!({"ID": lease.to_string()})).await {
            Ok(_) | Err(EtcdError::LeaseGone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// At most `limit` keys from the first on, before the second, in their order.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn range(
        &self,
        from: &str,
        before: &str,
        limit: usize,
    ) -> Result<Vec<Kv>, EtcdError> {
        let body =
            json!({"key": encode(from), "range_end": encode(before), "limit": limit.to_string()});
        let answer = self.call("/v3/kv/range", &body).await?;
        answer["kvs"].as_array().map_or(&[][..], Vec::as_slice).iter().map(Kv::of).collect()
    }

    /// All keys that begin with this, which ends with a slash. Read in pages: for a
    /// part of the store that nobody else writes meanwhile.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn all(&self, prefix: &str) -> Result<Vec<Kv>, EtcdError> {
        let before = end(prefix);
        let (mut from, mut all) = (prefix.to_owned(), Vec::new());
        loop {
            let page = self.range(&from, &before, PAGE).await?;
            let more = page.len() == PAGE;
            if let Some(last) = page.last() {
                // The next name there can be.
                from = format!("{}\0", last.key);
            }
            all.extend(page);
            if !more {
                return Ok(all);
            }
        }
    }

    /// Asks one member after the other until one answers.
    async fn call(&self, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let first = self.good.load(Ordering::Relaxed);
        let mut worst: Option<EtcdError> = None;
        for turn in 0..self.members.len() {
            let place = (first + turn) % self.members.len();
            match self.call_at(&self.members[place], path, body).await {
                Err(
                    error @ (EtcdError::Unreachable { .. }
                    | EtcdError::Distrust { .. }
                    | EtcdError::Foreign { .. }),
                ) => {
                    // What no patience helps against is worth more than a silence.
                    if worst.as_ref().is_none_or(|w| matches!(w, EtcdError::Unreachable { .. })) {
                        worst = Some(error);
                    }
                }
                answer => {
                    self.good.store(place, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        Err(match worst {
            Some(EtcdError::Unreachable { what, .. }) => {
                let at: Vec<String> = self.members.iter().map(Member::to_string).collect();
                EtcdError::Unreachable { at: at.join(", "), what }
            }
            Some(other) => other,
            None => EtcdError::Unreachable { at: String::new(), what: "there is none".to_owned() },
        })
    }

    async fn call_at(&self, member: &Member, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let Some((user, password)) = &self.user else {
            return self.ask(member, path, None, body).await.map_err(|error| self.named(error));
        };
        // A token lives five minutes, and at one member only.
        for fresh in [false, true] {
            let known = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let token = match known.filter(|_| !fresh) {
                Some(token) => token,
                None => {
                    let who = json!({"name": user, "password": password});
                    let answer = self.ask(member, "/v3/auth/authenticate", None, &who).await;
                    let answer = answer.map_err(|error| self.named(error))?;
                    let token = answer["token"].as_str().unwrap_or_default().to_owned();
                    *self.token.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(token.clone());
                    token
                }
            };
            match self.ask(member, path, Some(&token), body).await {
                Err(Refusal::Token) => {}
                answer => return answer.map_err(|error| self.named(error)),
            }
        }
        Err(EtcdError::Credentials { user: user.clone() })
    }

    async fn ask(
        &self,
        member: &Member,
        path: &str,
        token: Option<&str>,
        body: &Value,
    ) -> Result<Value, Refusal> {
        let away = |what: String| EtcdError::Unreachable { at: member.to_string(), what };
        let within = tokio::time::timeout(self.timeout, self.exchange(member, path, token, body));
        let (status, bytes) = match within.await {
            Ok(answer) => answer?,
            Err(_) => {
                let what =
                    format!("{member} did not answer within {} ms", self.timeout.as_millis());
                return Err(away(what).into());
            }
        };
        let foreign = |what: String| EtcdError::Foreign { at: member.to_string(), what };
        let answer: Value = serde_json::from_slice(&bytes)
            .map_err(|_| foreign(format!("status {status} and no JSON")))?;
        if status.is_success() {
            return if answer.is_object() {
                Ok(answer)
            } else {
                Err(foreign("no object".to_owned()).into())
            };
        }
        let Some(why) = answer["error"].as_str().or_else(|| answer["message"].as_str()) else {
            return Err(foreign(format!("status {status} without a reason")).into());
        };
        Err(Refusal::judge(member, why, answer["code"].as_i64().unwrap_or(0)))
    }

    async fn exchange(
        &self,
        member: &Member,
        path: &str,
        token: Option<&str>,
        body: &Value,
    ) -> Result<(StatusCode, hyper::body::Bytes), EtcdError> {
        let away = |what: String| EtcdError::Unreachable { at: member.to_string(), what };
        let authority = member.authority.as_str();
        let headers: Vec<Header<'_>> =
            token.map(|token| ("authorization", token)).into_iter().collect();
        let limits = (self.timeout, ANSWER_BYTES_MAX);
        let what = (Method::POST, path);
        let stream = TcpStream::connect(authority)
            .await
            .map_err(|error| away(format!("{member}: {error}")))?;
        let _ = stream.set_nodelay(true);
        let answer = match (&self.tls, member.tls) {
            (Some(tls), true) => {
                let stream =
                    tls.connect(authority, stream).await.map_err(|error| failed(member, &error))?;
                http::exchange_with(stream, authority, what, &headers, Some(body), limits).await
            }
            _ => http::exchange_with(stream, authority, what, &headers, Some(body), limits).await,
        };
        answer.map_err(|error| match error {
            ExchangeError::Silent(_) | ExchangeError::Request(_) | ExchangeError::Body(_) => {
                away(format!("{member}: {error}"))
            }
            ExchangeError::Connection(ref inner) if inner.is_parse() => EtcdError::Foreign {
                at: member.to_string(),
                what: "it does not speak HTTP".to_owned(),
            },
            error @ ExchangeError::Connection(_) => failed(member, &error),
        })
    }

    /// With the names of the configuration.
    fn named(&self, refusal: Refusal) -> EtcdError {
        let user = self.user.as_ref().map(|(user, _)| user.clone());
        match refusal {
            Refusal::Etcd(error) => error,
            Refusal::Token => EtcdError::NoUser,
            Refusal::Password => EtcdError::Credentials { user: user.unwrap_or_default() },
            Refusal::Permission => EtcdError::Forbidden {
                who: user.map_or_else(|| "us".to_owned(), |user| format!("user `{user}`")),
                prefix: self.prefix.clone(),
            },
        }
    }
}

/// What a member said.
enum Refusal {
    Etcd(EtcdError),
    Token,
    Password,
    Permission,
}

impl From<EtcdError> for Refusal {
    fn from(error: EtcdError) -> Self {
        Self::Etcd(error)
    }
}

impl Refusal {
    /// By etcd's own words (`api/v3rpc/rpctypes/error.go`), which have been the
    /// same since 3.4, and gRPC's code.
    fn judge(member: &Member, why: &str, code: i64) -> Self {
        const UNAVAILABLE: i64 = 14;
        const DEADLINE: i64 = 4;
        let has = |part: &str| why.contains(part);
        if has("invalid auth token") || has("auth store is old") {
            return Self::Token;
        }
        if has("invalid user ID or password") || has("user name not found") {
            return Self::Password;
        }
        if has("permission denied") {
            return Self::Permission;
        }
        if has("user name is empty") {
            return EtcdError::NoUser.into();
        }
        if has("lease not found") {
            return EtcdError::LeaseGone.into();
        }
        if has("database space exceeded") || has("no space") {
            return EtcdError::NoSpace.into();
        }
        let transient =
            ["no leader", "leader changed", "timed out", "too many requests", "stopped"];
        if code == UNAVAILABLE || code == DEADLINE || transient.iter().any(|part| has(part)) {
            let (at, what) = (member.to_string(), format!("{member}: {why}"));
            return EtcdError::Unreachable { at, what }.into();
        }
        EtcdError::Refused(why.to_owned()).into()
    }
}

fn failed(member: &Member, error: &(dyn std::error::Error + 'static)) -> EtcdError {
    let at = member.to_string();
    match HandshakeError::within(error) {
        // Closed, or plain text where TLS is expected: who knows what is there.
        Some(HandshakeError::Broken(what)) if !what.contains("unexpected EOF") => {
            EtcdError::Distrust { at, what }
        }
        Some(refused) if !matches!(refused, HandshakeError::Broken(_)) => {
            EtcdError::Distrust { at, what: refused.to_string() }
        }
        _ => EtcdError::Unreachable { what: format!("{at}: {}", Problem::described(error)), at },
    }
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs(u64::try_from(number(value)).unwrap_or(0))
}

/// The first name behind all that begin with this.
fn end(prefix: &str) -> String {
    // `0` comes behind `/`.
    format!("{}0", prefix.strip_suffix('/').unwrap_or(prefix))
}

fn password(file: &Path) -> Result<String, CredentialsError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |source: std::io::Error| CredentialsError::File {
        what: "the password for etcd",
        path: file.to_owned(),
        source: source.into(),
    };
    let mode = std::fs::metadata(file).map_err(failed)?.permissions().mode();
    if mode & 0o007 != 0 {
        return Err(CredentialsError::PublicKey(file.to_owned()));
    }
    Ok(std::fs::read_to_string(file).map_err(failed)?.trim_end_matches(['\r', '\n']).to_owned())
}
