//! Handoffs over HTTP: the coordinator's way in. Every call may be repeated.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use baton_protocol::access::{AccessRecord, Refusal};
use baton_protocol::handoff::{Key, Members, Mode, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::numbers::{Hex64, Hex256, Ulid, hex64};
use super::problem::Problem;
use super::record::{ProofView, RecordView, side_name};
use super::volumes::{Body, body, find};
use crate::volumes::{Asker, ChangeError, Entry, Request, RunningVolume};

/// Longest wait of one request.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What the asker of an access record knows.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    boot_id: Option<String>,
    version: Option<u64>,
    #[serde(default)]
    wait_ms: u64,
}

/// An access record and the server that says it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AccessAnswer {
    /// The server's incarnation, 16 hexadecimal digits.
    boot_id: String,
    /// The record.
    record: RecordView,
}

/// A handoff to arm.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arm {
    /// Term of the coordinator; refused when a higher one has spoken.
    term: u64,
    /// `next_epoch` of the access record when the handoff was planned; refused
    /// when the record has given out an epoch since.
    next_epoch: u64,
    /// The plan, the same at every member.
    plan: PlanBody,
}

/// A plan.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PlanBody {
    /// ULID.
    #[schema(value_type = String)]
    id: Ulid,
    /// From 1.
    attempt: u32,
    /// The VM, for people.
    vm: String,
    /// Owner name of the source; it must own the volume.
    from: String,
    /// Owner name of the destination.
    to: String,
    /// The volume that decides, 16 hexadecimal digits.
    #[schema(value_type = String)]
    anchor: Hex64,
    /// All volumes that move.
    members: MembersBody,
    /// `fast`: nothing is written to disk inside the blackout.
    mode: ModeName,
    /// Random, the same at every member, 64 hexadecimal digits.
    #[schema(value_type = String)]
    key: Hex256,
}

/// Volumes that move together.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MembersBody {
    /// How many.
    count: u16,
    /// Of their ids, 16 hexadecimal digits.
    #[schema(value_type = String)]
    hash: Hex64,
}

/// What is on disk inside the blackout.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Fast,
    Base,
}

/// Which handoff, and who says so.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Term of the coordinator; refused when a higher one has spoken.
    term: u64,
    /// ULID.
    #[schema(value_type = String)]
    id: Ulid,
    /// From 1.
    attempt: u32,
}

/// A handoff that is over.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Settle {
    /// Term of the coordinator; refused when a higher one has spoken.
    term: u64,
    /// ULID.
    #[schema(value_type = String)]
    id: Ulid,
    /// From 1.
    attempt: u32,
    /// The winner's session, 16 hexadecimal digits; with `proof`.
    #[schema(value_type = Option<String>)]
    session: Option<Hex64>,
    /// The anchor's decision, for a member that the winner has not opened.
    proof: Option<ProofBody>,
}

/// The anchor's decision.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ProofBody {
    side: SideName,
    grant: u64,
    /// 64 hexadecimal digits.
    #[schema(value_type = String)]
    mac: Hex256,
}

/// Who won.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum SideName {
    Source,
    Destination,
}

/// How a reclaim ended.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Reclaimed {
    /// `source`: it owns the volumes. `unknown`: the server restarted and cannot
    /// say; the destination has to activate or to abdicate first.
    outcome: &'static str,
    /// The source's session, 16 hexadecimal digits.
    session: Option<String>,
    /// For the other members.
    proof: Option<ProofView>,
    /// As it stands now.
    record: RecordView,
}

/// How a handoff was decided.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Decision {
    /// `source` or `destination`.
    winner: &'static str,
    /// Its session, 16 hexadecimal digits.
    session: String,
    /// For the other members.
    proof: ProofView,
}

/// Which handoff, in a query.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    id: Ulid,
    attempt: u32,
}

/// The last changes of an access record.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AuditTrail {
    /// Oldest first; begins again with the server.
    entries: Vec<Entry>,
}

impl PlanBody {
    fn plan(self) -> Plan {
        Plan {
            attempt: Try { id: self.id.0, attempt: self.attempt },
            vm: self.vm,
            from: self.from,
            to: self.to,
            anchor: VolumeId(self.anchor.0),
            members: Members { count: self.members.count, hash: self.members.hash.0 },
            mode: match self.mode {
                ModeName::Fast => Mode::Fast,
                ModeName::Base => Mode::Base,
            },
            key: Key(self.key.0),
        }
    }
}

impl ProofBody {
    fn proof(&self) -> Proof {
        let side = match self.side {
            SideName::Source => Side::Source,
            SideName::Destination => Side::Destination,
        };
        Proof { side, grant: self.grant, mac: self.mac.0 }
    }
}

/// The owner's session: after a decision, the winner's.
fn winner_session(record: &AccessRecord) -> Option<String> {
    record.owner.as_ref().map(|owner| owner.session.to_string())
}

/// Shows the access record, as soon as it differs from the one that is known.
#[utoipa::path(get, path = "/v1/volumes/{name}/access", params(("name" = String, Path),
    ("boot_id" = Option<String>, Query, description = "The server's incarnation as known, 16 hexadecimal digits."),
    ("version" = Option<u64>, Query, description = "The record's version as known."),
    ("wait_ms" = Option<u64>, Query, description = "Longest wait for another one, milliseconds, at most 60000.")),
    responses((status = 200, body = AccessAnswer), (status = 400, response = Problem), (status = 404, response = Problem)))]
pub(super) async fn access(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    known: Result<Query<Known>, QueryRejection>,
) -> Result<Json<AccessAnswer>, Problem> {
    let Query(known) = known.map_err(|error| Problem::bad_request(error.body_text()))?;
    let boot_id = match &known.boot_id {
        None => None,
        Some(text) => Some(
            hex64(text)
                .ok_or_else(|| Problem::bad_request("`boot_id` is not 16 hexadecimal digits"))?,
        ),
    };
    let wait = Duration::from_millis(known.wait_ms);
    if wait > WAIT_MAX {
        let text = format!("`wait_ms` is more than {}", WAIT_MAX.as_millis());
        return Err(Problem::bad_request(text));
    }
    let volume = find(&api, &name)?;
    let mut watch = volume.watch();
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let record = Arc::clone(&watch.borrow_and_update());
        if volume.is_deleted() {
            return Err(ChangeError::Deleted.into());
        }
        let is_known = boot_id == Some(volume.boot_id()) && known.version == Some(record.version);
        let changed = tokio::time::timeout_at(deadline, watch.changed());
        if !is_known || changed.await.is_err() {
            let boot_id = format!("{:016x}", volume.boot_id());
            return Ok(Json(AccessAnswer { boot_id, record: record.as_ref().into() }));
        }
    }
}

/// Arms a handoff. The source goes on; nobody else may write.
#[utoipa::path(post, path = "/v1/volumes/{name}/arm", params(("name" = String, Path)), request_body = Arm,
    responses((status = 200, body = RecordView), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn arm(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<Arm>,
) -> Result<Json<RecordView>, Problem> {
    let Arm { term, next_epoch, plan } = body(request)?;
    let next_epoch = Epoch(next_epoch);
    let plan = Box::new(plan.plan());
    let volume = find(&api, &name)?;
    let (id, attempt, to) = (plan.attempt.id, plan.attempt.attempt, plan.to.clone());
    let record = volume.change(Request::Arm { plan, term, next_epoch }).await?;
    tracing::info!(volume = name, handoff = %id, attempt, to, term, "armed");
    Ok(Json((&record).into()))
}

/// Decides for the source, at the anchor, if the destination has not won.
#[utoipa::path(post, path = "/v1/volumes/{name}/reclaim", params(("name" = String, Path)), request_body = Which,
    responses((status = 200, body = Reclaimed), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn reclaim(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<Which>,
) -> Result<Json<Reclaimed>, Problem> {
    let Which { term, id, attempt } = body(request)?;
    let volume = find(&api, &name)?;
    let attempt = Try { id: id.0, attempt };
    let request = Request::Reclaim { attempt, by: Asker::Coordinator { term } };
    let record = match volume.change(request).await {
        Ok(record) => record,
        // Asked for before, and still not known.
        Err(ChangeError::Refused(Refusal::UnknownFrozen)) => volume.record().as_ref().clone(),
        Err(error) => return Err(error.into()),
    };
    let won = record.winner(attempt) == Some(Side::Source);
    tracing::info!(volume = name, handoff = %id.0, won, term, "reclaimed by the coordinator");
    Ok(Json(Reclaimed {
        outcome: if won { "source" } else { "unknown" },
        session: winner_session(&record).filter(|_| won),
        proof: record.proof(attempt).as_ref().filter(|_| won).map(ProofView::from),
        record: (&record).into(),
    }))
}

/// Says, at the anchor, that the destination never activated and never will.
/// Only when its backend is proven dead.
#[utoipa::path(post, path = "/v1/volumes/{name}/abdicate", params(("name" = String, Path)), request_body = Which,
    responses((status = 200, body = RecordView), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn abdicate(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<Which>,
) -> Result<Json<RecordView>, Problem> {
    let Which { term, id, attempt } = body(request)?;
    let volume = find(&api, &name)?;
    let attempt = Try { id: id.0, attempt };
    let request = Request::Abdicate { attempt, by: Asker::Coordinator { term } };
    let record = volume.change(request).await?;
    tracing::warn!(volume = name, handoff = %id.0, term, "abdicated by the coordinator");
    Ok(Json((&record).into()))
}

/// Shows how the anchor decided, for the other members.
#[utoipa::path(get, path = "/v1/volumes/{name}/proof", params(("name" = String, Path),
    ("id" = String, Query, description = "ULID of the handoff."),
    ("attempt" = u32, Query, description = "From 1.")),
    responses((status = 200, body = Decision), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn proof(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<Decision>, Problem> {
    let Query(asked) = asked.map_err(|error| Problem::bad_request(error.body_text()))?;
    let volume = find(&api, &name)?;
    let attempt = Try { id: asked.id.0, attempt: asked.attempt };
    Ok(Json(decision(&volume, attempt)?))
}

fn decision(volume: &RunningVolume, attempt: Try) -> Result<Decision, ChangeError> {
    let record = volume.record();
    let under_way = record.handoff.as_ref().filter(|handoff| handoff.plan.attempt == attempt);
    if let Some(handoff) = under_way
        && handoff.plan.anchor != volume.id()
    {
        return Err(Refusal::NotAnchor { anchor: handoff.plan.anchor }.into());
    }
    match (record.winner(attempt), record.proof(attempt), winner_session(&record)) {
        (Some(winner), Some(proof), Some(session)) => {
            Ok(Decision { winner: side_name(winner), session, proof: (&proof).into() })
        }
        _ if under_way.is_some() => Err(Refusal::Undecided.into()),
        _ => Err(Refusal::NoSuchHandoff(attempt).into()),
    }
}

/// Ends a handoff that is decided. A member that the winner has not opened needs
/// the anchor's proof.
#[utoipa::path(post, path = "/v1/volumes/{name}/settle", params(("name" = String, Path)), request_body = Settle,
    responses((status = 200, body = RecordView), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn settle(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<Settle>,
) -> Result<Json<RecordView>, Problem> {
    let Settle { term, id, attempt, session, proof } = body(request)?;
    let proof = match (session, proof) {
        (Some(session), Some(proof)) => Some((SessionId(session.0), proof.proof())),
        (_, None) => None,
        (None, Some(_)) => return Err(Problem::bad_request("a `proof` needs its `session`")),
    };
    let volume = find(&api, &name)?;
    let attempt = Try { id: id.0, attempt };
    let record = volume.change(Request::Settle { attempt, term, proof }).await?;
    tracing::info!(volume = name, handoff = %id.0, epoch = %record.epoch, term, "settled");
    Ok(Json((&record).into()))
}

/// Ends a handoff that the volume which decides it does not know any more, so that it
/// can never be decided: the owner goes on, under its epoch. Refused at that volume
/// itself, and once the source may have sealed this one.
#[utoipa::path(post, path = "/v1/volumes/{name}/disarm", params(("name" = String, Path)), request_body = Which,
    responses((status = 200, body = RecordView), (status = 400, response = Problem),
    (status = 404, response = Problem), (status = 409, response = Problem)))]
pub(super) async fn disarm(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    request: Body<Which>,
) -> Result<Json<RecordView>, Problem> {
    let Which { term, id, attempt } = body(request)?;
    let volume = find(&api, &name)?;
    let attempt = Try { id: id.0, attempt };
    let record = volume.change(Request::Disarm { attempt, term }).await?;
    tracing::warn!(volume = name, handoff = %id.0, term, "disarmed: the volume that decides has forgotten it");
    Ok(Json((&record).into()))
}

/// Shows the last changes of the access record.
#[utoipa::path(get, path = "/v1/volumes/{name}/audit", params(("name" = String, Path)),
    responses((status = 200, body = AuditTrail), (status = 404, response = Problem)))]
pub(super) async fn audit(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
) -> Result<Json<AuditTrail>, Problem> {
    Ok(Json(AuditTrail { entries: find(&api, &name)?.audit() }))
}

/// The one table from a refusal of the record to a problem.
impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (kind, title) = match &refusal {
            Refusal::BadName | Refusal::BadPlan(_) => return Self::bad_request(refusal),
            Refusal::NoSuchHandoff(_) => {
                return Self::new(
                    StatusCode::NOT_FOUND,
                    "baton:no-such-handoff",
                    "There is no such handoff",
                    refusal,
                );
            }
            Refusal::StaleTerm { .. } => ("baton:stale-term", "A newer coordinator has spoken"),
            Refusal::HandoffInProgress(attempt) | Refusal::InHandoff(attempt) => {
                let (kind, title) =
                    ("baton:handoff-in-progress", "Another handoff of the volume is under way");
                let id = attempt.id.to_string();
                return Self::new(StatusCode::CONFLICT, kind, title, &refusal).of_handoff(id);
            }
            Refusal::StalePlan { .. } => {
                ("baton:stale-plan", "The volume has changed since the handoff was planned")
            }
            Refusal::StaleFence { .. } => {
                ("baton:stale-fence", "The volume has changed hands since")
            }
            Refusal::NotOwner { .. } | Refusal::Barred { .. } => {
                ("baton:not-owner", "Another owns the volume")
            }
            Refusal::Lost { .. } => ("baton:lost-race", "The other side has won"),
            Refusal::Undecided => ("baton:undecided", "The handoff is not decided"),
            Refusal::UnknownFrozen => ("baton:unknown-frozen", "Nobody knows who has the volume"),
            Refusal::NotAnchor { .. } => ("baton:not-anchor", "Another volume decides"),
            Refusal::TooLate => ("baton:too-late", "The handoff is decided"),
            Refusal::BadProof => ("baton:bad-proof", "The anchor has not decided so"),
            Refusal::CannotDisarm(_) => ("baton:cannot-disarm", "The handoff may be decided"),
            Refusal::StaleEpoch { .. }
            | Refusal::NotNominated
            | Refusal::NotSealed
            | Refusal::CannotUnfreeze => ("baton:refused", "The access record does not allow it"),
        };
        Self::new(StatusCode::CONFLICT, kind, title, refusal)
    }
}
