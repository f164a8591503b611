//! Who answers at this coordinator's door: the one that leads, or, while another
//! leads, a word about where that is.
//!
//! A follower carries nothing out and answers no question about VMs: its knowledge
//! would be older than the leader's. It redirects (307, with the leader's address
//! in `Location` and in the problem document), so that what a client asks is
//! asked of the leader, body and all.

use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::sync::watch;
use tower_service::Service as _;
use utoipa::ToSchema;

use super::etcd::campaign::Standing;
use super::etcd::chain::Leader;
use crate::door::Peer;
use crate::identity::Role;
use crate::problem::Problem;

/// What a coordinator is among the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Leadership {
    /// `leader` or `follower`.
    pub role: &'static str,
    /// Name of this instance.
    pub name: String,
    /// Its term, if it leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// Who leads, as far as this one knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader: Option<LeaderView>,
    /// Why it does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LeaderView {
    /// Name of the instance.
    pub name: String,
    /// Where its API is.
    pub api: String,
    /// Its term.
    pub term: u64,
}

/// The document with which a follower sends on.
#[derive(Serialize)]
struct NotLeader {
    #[serde(flatten)]
    problem: Problem,
    /// Where the leader's API is.
    leader: String,
}

impl From<&Leader> for LeaderView {
    fn from(Leader { name, api, term, .. }: &Leader) -> Self {
        Self { name: name.clone(), api: api.clone(), term: *term }
    }
}

/// Who leads now; replaced once, when this one does.
#[derive(Clone, Debug, Default)]
pub(super) struct Front {
    leads: Arc<RwLock<Option<Router>>>,
}

/// What a follower knows.
#[derive(Clone, Debug)]
pub(super) struct Follower {
    pub(super) name: String,
    pub(super) standing: watch::Receiver<Standing>,
}

impl Front {
    /// From now on this answers.
    pub(super) fn lead(&self, router: Router) {
        *self.leads.write().unwrap_or_else(PoisonError::into_inner) = Some(router);
    }

    /// Everything that is asked at the door.
    pub(super) fn router(self, follower: Follower) -> Router {
        let follower = followers_router(follower);
        Router::new().fallback(async move |request: Request| {
            let leads = self.leads.read().unwrap_or_else(PoisonError::into_inner).clone();
            let mut router = leads.unwrap_or_else(|| follower.clone());
            match router.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        })
    }
}

fn followers_router(follower: Follower) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/v1/leader", get(leader))
        .route("/metrics", get(metrics))
        .fallback(elsewhere)
        .with_state(Arc::new(follower))
}

/// Who is let in at all.
fn may_look(peer: &Peer) -> Result<(), Problem> {
    peer.require(&[Role::Operator, Role::Coordinator, Role::Host])
}

impl Follower {
    fn leadership(&self) -> Leadership {
        let standing = self.standing.borrow();
        Leadership {
            role: "follower",
            name: self.name.clone(),
            term: None,
            leader: standing.leader.as_ref().map(LeaderView::from),
            trouble: standing.trouble.as_ref().map(ToString::to_string),
        }
    }
}

async fn leader(
    State(follower): State<Arc<Follower>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<Leadership>, Problem> {
    may_look(&peer)?;
    Ok(Json(follower.leadership()))
}

async fn metrics(State(follower): State<Arc<Follower>>) -> String {
    let Leadership { leader, trouble, .. } = follower.leadership();
    format!(
        "# HELP baton_coordinator_leads 1 while this coordinator leads.\n\
         # TYPE baton_coordinator_leads gauge\nbaton_coordinator_leads 0\n\
         # HELP baton_coordinator_leader_known 1 while this coordinator knows who leads.\n\
         # TYPE baton_coordinator_leader_known gauge\nbaton_coordinator_leader_known {}\n\
         # HELP baton_coordinator_etcd_up 1 while etcd answers.\n\
         # TYPE baton_coordinator_etcd_up gauge\nbaton_coordinator_etcd_up {}\n",
        u8::from(leader.is_some()),
        u8::from(trouble.is_none()),
    )
}

async fn elsewhere(
    State(follower): State<Arc<Follower>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    if let Err(problem) = may_look(&peer) {
        return problem.into_response();
    }
    let known = follower.leadership();
    match (known.leader, known.trouble) {
        // Its own name is its predecessor's, or its own before it is ready: there is nobody to go to.
        (Some(leader), None) if leader.name != known.name => {
            let problem = Problem::new(
                StatusCode::TEMPORARY_REDIRECT,
                "baton:not-leader",
                "Another coordinator leads",
                format!(
                    "coordinator {} leads, at {}; ask it, or give several addresses to --coordinator",
                    leader.name, leader.api
                ),
            );
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
            let body = Json(NotLeader { problem, leader: leader.api.clone() });
            let mut response = (StatusCode::TEMPORARY_REDIRECT, body).into_response();
            let content_type = HeaderValue::from_static("application/problem+json");
            response.headers_mut().insert(CONTENT_TYPE, content_type);
            // A unix socket has no address that HTTP knows.
            if leader.api.starts_with("http")
                && let Ok(location) = HeaderValue::from_str(&format!("{}{path}", leader.api))
            {
                response.headers_mut().insert(LOCATION, location);
            }
            response
        }
        (_, trouble) => {
            let why = trouble.unwrap_or_else(|| "one is being chosen; ask again".to_owned());
            let detail = format!(
                "no coordinator leads, as far as {} knows: {why}; VMs run on where they are",
                known.name
            );
            let mut response = Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "baton:no-leader",
                "No coordinator leads",
                detail,
            )
            .into_response();
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::etcd::EtcdError;
    use axum::body::Body;
    use http_body_util::BodyExt;
    use serde_json::Value;

    async fn asked(router: &Router, path: &str) -> (StatusCode, Option<String>, Value) {
        let mut request = Request::builder().uri(path).body(Body::empty()).expect("a request");
        request.extensions_mut().insert(ConnectInfo(Peer::Loopback));
        let response = router.clone().call(request).await.expect("an answer");
        let location =
            response.headers().get(LOCATION).map(|at| at.to_str().expect("text").to_owned());
        let status = response.status();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        (status, location, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    #[tokio::test]
    async fn a_follower_says_where_the_leader_is_or_why_there_is_none() {
        let (tell, standing) = watch::channel(Standing::default());
        let front = Front::default();
        let router = front.clone().router(Follower { name: "c1".to_owned(), standing });

        let (status, _, body) = asked(&router, "/v1/vms").await;
        assert_eq!((status.as_u16(), &body["type"]), (503, &Value::from("baton:no-leader")));

        let leader = Leader {
            name: "c2".to_owned(),
            api: "https://c2:7720".to_owned(),
            term: 5,
            instance: "x".to_owned(),
        };
        tell.send_modify(|standing| standing.leader = Some(leader));
        let (status, location, body) = asked(&router, "/v1/vms?x=1").await;
        assert_eq!(status.as_u16(), 307);
        assert_eq!(location.as_deref(), Some("https://c2:7720/v1/vms?x=1"));
        assert_eq!(
            (&body["type"], &body["leader"]),
            (&"baton:not-leader".into(), &"https://c2:7720".into())
        );
        let (status, _, body) = asked(&router, "/v1/leader").await;
        assert_eq!((status.as_u16(), &body["leader"]["term"]), (200, &5.into()));
        assert_eq!(asked(&router, "/healthz").await.0.as_u16(), 200);

        // Killed and started again, it finds its own key and has nobody to name.
        let known = tell.borrow().leader.clone().expect("one");
        let own = Leader { name: "c1".to_owned(), ..known.clone() };
        tell.send_modify(|standing| standing.leader = Some(own));
        let (status, location, body) = asked(&router, "/v1/vms").await;
        assert_eq!((status.as_u16(), location), (503, None));
        assert_eq!(body["type"], "baton:no-leader");
        tell.send_modify(|standing| standing.leader = Some(known));

        // What it knew of the leader may be long ago.
        let what = "nobody answers".to_owned();
        let trouble = EtcdError::Unreachable { at: "http://e:2379".to_owned(), what };
        tell.send_modify(|standing| standing.trouble = Some(trouble));
        let (status, location, body) = asked(&router, "/v1/vms").await;
        assert_eq!((status.as_u16(), location), (503, None));
        let detail = body["detail"].as_str().expect("text");
        assert!(detail.contains("http://e:2379") && detail.contains("VMs run on"), "{detail}");

        front.lead(Router::new().route("/v1/vms", get(async || "mine")));
        assert_eq!(asked(&router, "/v1/vms").await.0.as_u16(), 200);
    }
}
