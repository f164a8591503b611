//! Errors of the HTTP APIs: RFC 9457 problem documents.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::openapi::RefOr;
use utoipa::{Modify, ToSchema};

/// An error document (RFC 9457).
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// Stable name of the kind of problem; programs go by it.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub kind: Cow<'static, str>,
    /// The kind in words.
    pub title: &'static str,
    /// HTTP status.
    pub status: u16,
    /// What happened here and what to do.
    pub detail: String,
}

impl Problem {
    /// The caller is known and may not do this.
    #[must_use]
    pub fn forbidden(detail: impl ToString) -> Self {
        let title = "The caller may not do this";
        Self::new(StatusCode::FORBIDDEN, "baton:forbidden", title, detail)
    }

    /// One of a kind.
    #[must_use]
    pub fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl ToString,
    ) -> Self {
        let kind = Cow::Borrowed(kind);
        Self { kind, title, status: status.as_u16(), detail: detail.to_string() }
    }

    /// The caller made a mistake.
    pub fn bad_request(detail: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "baton:bad-request", "The request is wrong", detail)
    }

    /// The agent's disk is full: `what` was not done, and nothing in its place.
    pub fn state_full(what: &str, path: &Path) -> Self {
        Self::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "baton:state-full",
            "The agent's disk is full",
            format!(
                "{what}: the disk under {} is full; nothing was started or changed here, and the VM goes on where it is; make room there and ask again",
                path.display()
            ),
        )
    }

    /// An error and its causes in one sentence.
    #[must_use]
    pub fn described(error: &(dyn std::error::Error + 'static)) -> String {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        text
    }
}

/// Whatever is answered from 400 on is a problem document, and is documented with its content type.
#[derive(Debug)]
pub struct ProblemBodies;

impl Modify for ProblemBodies {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for item in document.paths.paths.values_mut() {
            let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete];
            for operation in operations.into_iter().flatten() {
                for (status, response) in &mut operation.responses.responses {
                    if let RefOr::T(response) = response
                        && status.as_str() >= "400"
                        && let Some(body) = response.content.swap_remove("application/json")
                    {
                        response.content.insert("application/problem+json".to_owned(), body);
                    }
                }
            }
        }
    }
}

/// There was no room for what was to be written.
#[must_use]
pub fn found_no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let content_type = header::HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}
