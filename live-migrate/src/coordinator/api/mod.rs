//! The coordinator's HTTP API. JSON; errors are RFC 9457 documents. The table
//! [`ROUTES`] is the router, and a test holds it against the OpenAPI document.
//!
//! With certificates, operators (and orchestrators with an operator's
//! certificate) and coordinators may do everything; a host may prepare, cancel
//! and finish handoffs from or to itself, which is what a hook on it needs, and
//! look at VMs. No host may fence.

mod events;
mod handoffs;
mod metrics;
mod vms;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post, put};
use axum::{Json, Router, middleware};
use utoipa::OpenApi;

use super::config::Keep;
use super::core::Core;
use super::fault::Fault;
use super::front::{LeaderView, Leadership};
use super::sides::owner_so_far;
use crate::door::Peer;
use crate::identity::Role;
use crate::problem::{Problem, ProblemBodies};

const BODY_BYTES_MAX: usize = 64 << 10;

type Api = Arc<Core>;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Baton coordinator",
        description = "Handoffs of VMs' volumes between hosts, migrations, fences."
    ),
    paths(
        handoffs::prepare,
        handoffs::show,
        handoffs::switchover,
        handoffs::activate,
        handoffs::finish,
        handoffs::cancel,
        handoffs::list,
        vms::list,
        vms::access,
        vms::why,
        vms::fence,
        vms::migrate,
        events::events,
        metrics::metrics,
        leader,
        health,
        document
    ),
    modifiers(&ProblemBodies)
)]
struct Document;

/// Path of the router, the documented methods and paths behind it, handlers. A
/// router's segment cannot end in `:verb`, so one route takes several.
type Route = (&'static str, &'static [(&'static str, &'static str)], fn() -> MethodRouter<Api>);

const ROUTES: [Route; 13] = [
    (
        "/v1/vms/{vm}/handoffs/{id}",
        &[
            ("put", "/v1/vms/{vm}/handoffs/{id}"),
            ("get", "/v1/vms/{vm}/handoffs/{id}"),
            ("post", "/v1/vms/{vm}/handoffs/{id}:switchover"),
            ("post", "/v1/vms/{vm}/handoffs/{id}:activate"),
            ("post", "/v1/vms/{vm}/handoffs/{id}:finish"),
            ("post", "/v1/vms/{vm}/handoffs/{id}:cancel"),
        ],
        || put(handoffs::prepare).get(handoffs::show).post(handoffs::verb),
    ),
    ("/v1/handoffs", &[("get", "/v1/handoffs")], || get(handoffs::list)),
    ("/v1/vms", &[("get", "/v1/vms")], || get(vms::list)),
    ("/v1/vms/{vm}", &[("post", "/v1/vms/{vm}:fence")], || post(vms::verb)),
    ("/v1/vms/{vm}/access", &[("get", "/v1/vms/{vm}/access")], || get(vms::access)),
    ("/v1/vms/{vm}/why", &[("get", "/v1/vms/{vm}/why")], || get(vms::why)),
    ("/v1/vms/{vm}/migrations", &[("post", "/v1/vms/{vm}/migrations")], || post(vms::migrate)),
    ("/v1/events", &[("get", "/v1/events")], || get(events::events)),
    ("/v1/leader", &[("get", "/v1/leader")], || get(leader)),
    ("/metrics", &[("get", "/metrics")], || get(metrics::metrics)),
    ("/healthz", &[("get", "/healthz")], || get(health)),
    ("/openapi.json", &[("get", "/openapi.json")], || get(document)),
    ("/", &[], || get(no_route)),
];

/// All routes.
pub(super) fn router(core: Api) -> Router {
    let mut router = Router::new();
    for (path, _, methods) in ROUTES {
        router = router.route(path, methods());
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(async || {
            Fault::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "baton:method",
                "The route has no such method",
                "the routes and their methods are listed at /openapi.json",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&core), count))
        .with_state(core)
}

async fn no_route() -> Fault {
    Fault::unknown(
        "baton:no-such-route",
        "There is nothing here",
        "the routes are listed at /openapi.json",
    )
}

async fn count(State(core): State<Api>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        core.metrics.problems.fetch_add(1, Ordering::Relaxed);
    }
    response
}

/// Who may look.
fn may_look(peer: &Peer) -> Result<(), Fault> {
    Ok(peer.require(&[Role::Operator, Role::Coordinator, Role::Host])?)
}

/// Who may change what concerns any host.
fn may_order(peer: &Peer) -> Result<(), Fault> {
    Ok(peer.require(&[Role::Operator, Role::Coordinator])?)
}

/// Who may change a handoff between these hosts.
fn may_hand_off(peer: &Peer, hosts: &[&str]) -> Result<(), Fault> {
    match peer {
        Peer::Tls(identity)
            if identity.role == Role::Host && hosts.contains(&identity.name.as_str()) =>
        {
            Ok(())
        }
        Peer::Tls(identity) if identity.role == Role::Host => {
            let detail = format!(
                "you are {identity}; a host may hand over only what leaves it or comes to it: say from and to, or call as an operator"
            );
            Err(Problem::forbidden(detail).into())
        }
        _ => may_order(peer),
    }
}

/// A request about a VM that the caller may not make. Who owns the VM is told only to those
/// who may look, and from the journal: nobody is asked in the name of who is refused.
fn refused(core: &Core, peer: &Peer, vm: &str, fault: Fault) -> Fault {
    match may_look(peer) {
        Ok(()) => fault.before_all(&owner_so_far(core, vm, None)),
        Err(_) => fault,
    }
}

fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Fault> {
    body.map(|Json(value)| value).map_err(|error| Fault::bad_request(error.body_text()))
}

fn query<T>(query: Result<axum::extract::Query<T>, QueryRejection>) -> Result<T, Fault> {
    query.map(|query| query.0).map_err(|error| Fault::bad_request(error.body_text()))
}

/// Who leads. Of several coordinators every one answers this, `/healthz` and
/// `/metrics`; all else is answered by the one that leads, and by the others with
/// 307 and its address, or with 503 while there is none.
#[utoipa::path(get, path = "/v1/leader", responses((status = 200, body = Leadership), (status = 403, body = Fault)))]
async fn leader(
    State(core): State<Api>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<Leadership>, Fault> {
    may_look(&peer)?;
    let (name, api) = match &core.config.journal {
        Keep::Etcd(settings) => (settings.name.clone(), settings.advertise.to_string()),
        // The only one; whoever asks knows where it is.
        Keep::File(_) => ("coordinator".to_owned(), String::new()),
    };
    let term = core.term;
    let leader = Some(LeaderView { name: name.clone(), api, term });
    Ok(Json(Leadership { role: "leader", name, term: Some(term), leader, trouble: None }))
}

/// `ok` while the coordinator serves.
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
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")));
        let documented: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .expect("paths")
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().expect("methods").keys();
                methods.map(move |method| (method.clone(), path.clone()))
            })
            .collect();
        let routed: BTreeSet<(String, String)> = ROUTES
            .iter()
            .flat_map(|(_, documented, _)| documented.iter())
            .map(|(method, path)| ((*method).to_owned(), (*path).to_owned()))
            .collect();
        assert_eq!(documented, routed);
    }

    /// A client that is generated from the document reads and sends objects.
    #[test]
    fn only_what_is_text_is_documented_as_a_string() {
        const TEXT: [&str; 3] = ["/healthz", "/metrics", "/v1/events"];
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        let mut seen = 0;
        for (path, methods) in document["paths"].as_object().expect("paths") {
            for (method, operation) in methods.as_object().expect("methods") {
                let answers = operation["responses"].as_object().expect("responses");
                let answers = answers.iter().map(|(status, answer)| (status.as_str(), answer));
                for (status, part) in answers.chain([("asked", &operation["requestBody"])]) {
                    for (content, body) in part["content"].as_object().into_iter().flatten() {
                        let expected = match status {
                            "200" if TEXT.contains(&path.as_str()) => None,
                            status if status.parse().is_ok_and(|status: u16| status >= 400) => {
                                Some("application/problem+json")
                            }
                            _ => Some("application/json"),
                        };
                        let at = format!("{method} {path} {status}: {part}");
                        if let Some(expected) = expected {
                            assert_eq!(content, expected, "{at}");
                        }
                        assert_eq!(body["schema"]["type"] == "string", expected.is_none(), "{at}");
                        seen += usize::from(expected.is_some());
                    }
                }
            }
        }
        assert!(seen > 20, "only {seen} were found");
    }
}
