//! Storage servers and agents to coordinate: the servers hold real access
//! records behind the admin API, the agents pretend backends and machines.

mod agent;
mod storage;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{ErrorResponse, IntoResponse, Response};
use baton_protocol::SessionId;
use serde_json::{Value, json};

pub(crate) use agent::Agent;
pub(crate) use storage::Storage;

type Answer = Result<Json<Value>, ErrorResponse>;

/// Incarnation of the backend on a host.
pub(crate) fn session(host: &str) -> SessionId {
    SessionId(host.bytes().fold(17, |hash, byte| hash * 31 + u64::from(byte)))
}

fn problem(status: u16, kind: &str, detail: impl ToString) -> Response {
    let body = json!({"type": kind, "title": kind, "status": status, "detail": detail.to_string()});
    (StatusCode::from_u16(status).expect("a status"), Json(body)).into_response()
}
