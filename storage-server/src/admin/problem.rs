//! Errors of the admin API: RFC 9457 problem documents.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::{ToResponse, ToSchema};

use crate::store::VolumeError;
use crate::volumes::{ChangeError, CreateError, DeleteError};

/// An error document (RFC 9457).
#[derive(Clone, Debug, Serialize, ToSchema, ToResponse)]
#[response(description = "It was not done.", content_type = "application/problem+json")]
pub(super) struct Problem {
    /// Stable name of the kind of problem; programs go by it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The kind in words.
    pub title: &'static str,
    /// HTTP status.
    pub status: u16,
    /// What happened here and what to do.
    pub detail: String,
    /// ULID of the handoff that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handoff: Option<String>,
}

impl Problem {
    pub(super) fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl ToString,
    ) -> Self {
        Self { kind, title, status: status.as_u16(), detail: detail.to_string(), handoff: None }
    }

    pub(super) fn of_handoff(mut self, id: String) -> Self {
        self.handoff = Some(id);
        self
    }

    pub(super) fn bad_request(detail: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "baton:bad-request", "The request is wrong", detail)
    }

    fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "baton:stopping",
            "The server is going away",
            "the server is going away; try again when it is back",
        )
    }
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

impl From<VolumeError> for Problem {
    fn from(error: VolumeError) -> Self {
        let (status, kind, title) = match &error {
            VolumeError::Exists { .. } => {
                (StatusCode::CONFLICT, "baton:volume-exists", "The volume exists already")
            }
            VolumeError::NotFound { .. } | VolumeError::UnknownId { .. } => {
                (StatusCode::NOT_FOUND, "baton:no-such-volume", "There is no such volume")
            }
            VolumeError::BadName { .. } => {
                (StatusCode::BAD_REQUEST, "baton:bad-name", "The name cannot be used")
            }
            VolumeError::BadSize { .. } => {
                (StatusCode::BAD_REQUEST, "baton:bad-size", "The size cannot be used")
            }
            VolumeError::ShrinkRefused { .. } => {
                (StatusCode::CONFLICT, "baton:shrink-refused", "A volume does not shrink")
            }
            VolumeError::Full(_) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a change found no room");
                (StatusCode::INSUFFICIENT_STORAGE, "baton:metadata-full", "The disk is full")
            }
            _ => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a change of volumes failed"
                );
                (StatusCode::INTERNAL_SERVER_ERROR, "baton:pool-failed", "The pool failed")
            }
        };
        Self::new(status, kind, title, error)
    }
}

impl From<CreateError> for Problem {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::Volume(error) => error.into(),
            CreateError::Stopped => Self::stopping(),
        }
    }
}

impl From<DeleteError> for Problem {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::InUse { .. } => Self::new(
                StatusCode::CONFLICT,
                "baton:volume-in-use",
                "The volume is in use",
                error,
            ),
            DeleteError::Volume(error) => error.into(),
            DeleteError::Stopped => Self::stopping(),
        }
    }
}

impl From<ChangeError> for Problem {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Refused(refusal) => refusal.into(),
            ChangeError::Store(error) => error.into(),
            ChangeError::Deleted => Self::new(
                StatusCode::NOT_FOUND,
                "baton:no-such-volume",
                "There is no such volume",
                error,
            ),
            ChangeError::Stopped => Self::stopping(),
        }
    }
}
