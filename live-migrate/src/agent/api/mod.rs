//! The agent's API: this host, its VMs, their backends and monitors.
//!
//! JSON over HTTP; errors are RFC 9457 documents. The table [`ROUTES`] is the
//! router, and a test holds it against the OpenAPI document. Coordinators and
//! operators are let in, and those of this host who reach the socket.

mod backends;
mod cooperative;
mod monitors;
mod refusals;
mod resume;
mod vms;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post, put};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use super::Agent;
use super::definition::VmDefinition;
use super::events::EventList;
use super::facts::HostFacts;
use crate::client::TERM_HEADER;
use crate::door::Peer;
use crate::identity::Role;
use crate::problem::{Problem, ProblemBodies};

/// A definition of 256 disks fits.
const BODY_BYTES_MAX: usize = 256 << 10;
/// A caller that waits longer asks again.
const WAIT_MS_MAX: u64 = 60_000;
/// Who may.
const CALLERS: [Role; 2] = [Role::Coordinator, Role::Operator];

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Baton host agent",
        description = "One host: its VMs, the backends of their disks, their monitors."
    ),
    paths(
        host,
        vms::list,
        vms::show,
        vms::define,
        vms::forget,
        backends::start,
        backends::stop,
        backends::seal,
        backends::activate,
        backends::abdicate,
        backends::reclaim,
        backends::latency,
        cooperative::end,
        cooperative::keep,
        cooperative::dismiss,
        cooperative::permit,
        monitors::status,
        monitors::incoming,
        monitors::migrate,
        monitors::proceed,
        monitors::cancel,
        resume::resume,
        monitors::stop,
        monitors::quit,
        events,
        health,
        document
    ),
    modifiers(&ProblemBodies)
)]
struct Document;

type Method = fn() -> MethodRouter<Arc<Agent>>;

/// Path, methods, handlers.
const ROUTES: [(&str, &[&str], Method); 24] = [
    ("/v1/host", &["get"], || get(host)),
    ("/v1/vms", &["get"], || get(vms::list)),
    ("/v1/vms/{vm}", &["get", "put", "delete"], || {
        get(vms::show).put(vms::define).delete(vms::forget)
    }),
    ("/v1/vms/{vm}/backend", &["put", "delete"], || put(backends::start).delete(backends::stop)),
    ("/v1/vms/{vm}/backend/seal", &["post"], || post(backends::seal)),
    ("/v1/vms/{vm}/backend/activate", &["post"], || post(backends::activate)),
    ("/v1/vms/{vm}/backend/abdicate", &["post"], || post(backends::abdicate)),
    ("/v1/vms/{vm}/backend/reclaim", &["post"], || post(backends::reclaim)),
    ("/v1/vms/{vm}/backend/latency", &["post"], || post(backends::latency)),
    ("/v1/vms/{vm}/backend/end", &["post"], || post(cooperative::end)),
    ("/v1/vms/{vm}/backend/keep", &["post"], || post(cooperative::keep)),
    ("/v1/vms/{vm}/backend/dismiss", &["post"], || post(cooperative::dismiss)),
    ("/v1/vms/{vm}/backend/permit", &["post"], || post(cooperative::permit)),
    ("/v1/vms/{vm}/vmm", &["get"], || get(monitors::status)),
    ("/v1/vms/{vm}/vmm/incoming", &["post"], || post(monitors::incoming)),
    ("/v1/vms/{vm}/vmm/migrate", &["post"], || post(monitors::migrate)),
    ("/v1/vms/{vm}/vmm/continue", &["post"], || post(monitors::proceed)),
    ("/v1/vms/{vm}/vmm/cancel", &["post"], || post(monitors::cancel)),
    ("/v1/vms/{vm}/vmm/resume", &["post"], || post(resume::resume)),
    ("/v1/vms/{vm}/vmm/stop", &["post"], || post(monitors::stop)),
    ("/v1/vms/{vm}/vmm/quit", &["post"], || post(monitors::quit)),
    ("/v1/events", &["get"], || get(events)),
    ("/healthz", &["get"], || get(health)),
    ("/openapi.json", &["get"], || get(document)),
];

/// All routes.
pub(super) fn router(agent: Arc<Agent>) -> Router {
    let mut router = Router::new();
    for (path, _, methods) in ROUTES {
        router = router.route(path, methods());
    }
    router
        .fallback(async || {
            Problem::new(
                StatusCode::NOT_FOUND,
                "baton:no-such-route",
                "There is nothing here",
                "the routes are listed at /openapi.json",
            )
        })
        .method_not_allowed_fallback(async || {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "baton:method",
                "The route has no such method",
                "the routes and their methods are listed at /openapi.json",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&agent), let_in))
        .with_state(agent)
}

async fn let_in(
    State(agent): State<Arc<Agent>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let may = peer.require(&CALLERS).and_then(|()| match term_of(&request)? {
        Some(term) => agent.terms.hear(term),
        // An operator.
        None => Ok(()),
    });
    if let Err(problem) = may {
        let detail = &problem.detail;
        tracing::warn!(%peer, method = %request.method(), path = request.uri().path(), detail, "refused");
        return problem.into_response();
    }
    if request.method() != axum::http::Method::GET {
        tracing::info!(%peer, method = %request.method(), path = request.uri().path(), "asked");
    }
    next.run(request).await
}

/// Of the coordinator that calls, if it is one.
fn term_of(request: &Request) -> Result<Option<u64>, Problem> {
    let Some(term) = request.headers().get(TERM_HEADER) else { return Ok(None) };
    let term = term.to_str().ok().and_then(|term| term.parse().ok());
    term.map(Some).ok_or_else(|| Problem::bad_request(format!("{TERM_HEADER} is no term")))
}

fn body<T>(request: Result<Json<T>, JsonRejection>) -> Result<T, Problem> {
    request.map(|Json(value)| value).map_err(|rejection| {
        Problem::bad_request(format!("the body is not what is expected: {}", rejection.body_text()))
    })
}

fn find(agent: &Agent, name: &str) -> Result<VmDefinition, Problem> {
    agent.inventory.find(name).ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            "baton:no-such-vm",
            "There is no such VM here",
            format!(
                "host {} knows no VM `{name}`; add it to the configuration, or send it with PUT /v1/vms/{{vm}}",
                agent.config.host
            ),
        )
    })
}

/// A host.
#[derive(Debug, Serialize, ToSchema)]
struct HostView {
    #[serde(flatten)]
    facts: HostFacts,
    /// Highest term of a coordinator that was heard here.
    coordinator_term: u64,
}

/// Shows what this host is.
#[utoipa::path(get, path = "/v1/host", responses((status = 200, body = HostView)))]
async fn host(State(agent): State<Arc<Agent>>) -> Json<HostView> {
    Json(HostView { facts: agent.facts.clone(), coordinator_term: agent.terms.highest() })
}

/// Which events.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsOptions {
    /// Of which start of the agent the cursor is.
    #[serde(default)]
    boot: String,
    /// The last event seen.
    #[serde(default)]
    since: u64,
    /// At most this long while there is none, milliseconds.
    #[serde(default)]
    wait_ms: u64,
}

/// What the agent did by itself: `baton.vm.stopped`, `baton.vm.not-stopped`.
#[utoipa::path(get, path = "/v1/events", params(("boot" = Option<String>, Query), ("since" = Option<u64>, Query),
    ("wait_ms" = Option<u64>, Query, description = "at most 60000")),
    responses((status = 200, body = EventList), (status = 400, body = Problem)))]
async fn events(
    State(agent): State<Arc<Agent>>,
    options: Result<Query<EventsOptions>, QueryRejection>,
) -> Result<Json<EventList>, Problem> {
    let Query(EventsOptions { boot, since, wait_ms }) =
        options.map_err(|rejection| Problem::bad_request(rejection.body_text()))?;
    if wait_ms > WAIT_MS_MAX {
        return Err(Problem::bad_request(format!("wait_ms is at most {WAIT_MS_MAX}")));
    }
    Ok(Json(agent.events.after(&boot, since, Duration::from_millis(wait_ms)).await))
}

/// `ok` while the agent serves.
#[utoipa::path(get, path = "/healthz", responses((status = 200, content_type = "text/plain", body = String)))]
async fn health() -> &'static str {
    "ok\n"
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_document_lists_every_route_and_nothing_else() {
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        let documented: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .expect("paths")
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().expect("methods").keys();
                methods.map(move |method| (path.clone(), method.clone()))
            })
            .collect();
        let routed: BTreeSet<(String, String)> = ROUTES
            .iter()
            .flat_map(|(path, methods, _)| {
                methods.iter().map(move |method| ((*path).to_owned(), (*method).to_owned()))
            })
            .collect();
        assert_eq!(documented, routed);
    }

    #[test]
    fn errors_are_documented_as_what_they_are_sent_as() {
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        let mut seen = 0;
        for methods in document["paths"].as_object().expect("paths").values() {
            for operation in methods.as_object().expect("methods").values() {
                for (status, answer) in operation["responses"].as_object().expect("responses") {
                    if status.as_str() >= "400" {
                        let content = answer["content"].as_object().expect("a problem");
                        assert!(content.keys().eq(["application/problem+json"]), "{answer}");
                        seen += 1;
                    }
                }
            }
        }
        assert!(seen > 20, "only {seen} were found");
    }
}
