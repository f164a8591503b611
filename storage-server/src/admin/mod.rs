//! The admin API: volumes, fences, handoffs, the pool, health, metrics.
//!
//! JSON over HTTP; errors are RFC 9457 documents. The table [`ROUTES`] is the
//! router, and a test holds it against the OpenAPI document. No authentication:
//! it listens on loopback unless told otherwise.

mod handoffs;
mod metrics;
mod numbers;
mod problem;
mod record;
mod volumes;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::metrics::{AcceptMetrics, WorkerMetrics};
use crate::volumes::Volumes;
use crate::worker::Flusher;

use problem::Problem;

/// Requests are a few numbers and names.
const BODY_BYTES_MAX: usize = 16 << 10;

/// What the handlers share.
#[derive(Debug)]
pub struct Api {
    volumes: Arc<Volumes>,
    workers: Vec<Arc<WorkerMetrics>>,
    accept: Arc<AcceptMetrics>,
    flusher: Arc<Flusher>,
}

impl Api {
    pub(crate) fn new(
        volumes: Arc<Volumes>,
        workers: Vec<Arc<WorkerMetrics>>,
        accept: Arc<AcceptMetrics>,
        flusher: Arc<Flusher>,
    ) -> Arc<Self> {
        Arc::new(Self { volumes, workers, accept, flusher })
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Baton storage server",
        description = "Volumes, fences, handoffs, the pool, health and metrics."
    ),
    paths(
        volumes::list,
        volumes::create,
        volumes::show,
        volumes::delete,
        volumes::resize,
        volumes::fence,
        handoffs::access,
        handoffs::arm,
        handoffs::reclaim,
        handoffs::abdicate,
        handoffs::proof,
        handoffs::settle,
        handoffs::disarm,
        handoffs::audit,
        pool,
        health,
        metrics::metrics,
        document
    ),
    components(responses(Problem))
)]
struct Document;

type Method = fn() -> MethodRouter<Arc<Api>>;

/// Path, methods, handlers.
const ROUTES: [(&str, &[&str], Method); 16] = [
    ("/v1/volumes", &["get", "post"], || get(volumes::list).post(volumes::create)),
    ("/v1/volumes/{name}", &["get", "delete"], || get(volumes::show).delete(volumes::delete)),
    ("/v1/volumes/{name}/resize", &["post"], || post(volumes::resize)),
    ("/v1/volumes/{name}/fence", &["post"], || post(volumes::fence)),
    ("/v1/volumes/{name}/access", &["get"], || get(handoffs::access)),
    ("/v1/volumes/{name}/arm", &["post"], || post(handoffs::arm)),
    ("/v1/volumes/{name}/reclaim", &["post"], || post(handoffs::reclaim)),
    ("/v1/volumes/{name}/abdicate", &["post"], || post(handoffs::abdicate)),
    ("/v1/volumes/{name}/proof", &["get"], || get(handoffs::proof)),
    ("/v1/volumes/{name}/settle", &["post"], || post(handoffs::settle)),
    ("/v1/volumes/{name}/disarm", &["post"], || post(handoffs::disarm)),
    ("/v1/volumes/{name}/audit", &["get"], || get(handoffs::audit)),
    ("/v1/pool", &["get"], || get(pool)),
    ("/healthz", &["get"], || get(health)),
    ("/metrics", &["get"], || get(metrics::metrics)),
    ("/openapi.json", &["get"], || get(document)),
];

/// All routes.
pub(crate) fn router(api: Arc<Api>) -> Router {
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
        .with_state(api)
}

/// How full the pool is.
#[derive(Debug, Serialize, ToSchema)]
struct PoolView {
    /// Data it can hold, bytes.
    capacity_bytes: u64,
    /// Taken by volumes, bytes.
    allocated_bytes: u64,
    /// For new data, bytes.
    free_bytes: u64,
    /// Part of the free space that needs a sync before use, bytes.
    dirty_free_bytes: u64,
    /// Map changes since the last checkpoint.
    log_records: u64,
    /// They wait because the disk under the metadata is full.
    log_waits_for_room: bool,
    /// Unit of allocation, bytes.
    extent_bytes: u64,
}

/// Shows how full the pool is.
#[utoipa::path(get, path = "/v1/pool", responses((status = 200, body = PoolView)))]
async fn pool(State(api): State<Arc<Api>>) -> Json<PoolView> {
    let usage = api.volumes.store().usage();
    Json(PoolView {
        capacity_bytes: usage.capacity_bytes,
        allocated_bytes: usage.allocated_bytes,
        free_bytes: usage.free_bytes,
        dirty_free_bytes: usage.dirty_free_bytes,
        log_records: usage.log_records,
        log_waits_for_room: usage.log_waits_for_room,
        extent_bytes: crate::store::EXTENT_BYTES,
    })
}

/// `ok` while the server serves.
#[utoipa::path(get, path = "/healthz", responses((status = 200, content_type = "text/plain", body = String)))]
async fn health() -> &'static str {
    "ok\n"
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, content_type = "application/json", body = String)))]
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
}
