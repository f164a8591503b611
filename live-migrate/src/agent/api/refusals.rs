//! What each error becomes for the caller: one stable type, one status.

use std::borrow::Cow;

use axum::http::StatusCode;

use super::super::inventory::InventoryError;
use super::super::machine::IncomingError;
use crate::problem::{Problem, found_no_room};
use crate::supervisor::SuperviseError;
use crate::supervisor::control::ControlError;
use crate::vmm::VmmError;

impl From<VmmError> for Problem {
    fn from(error: VmmError) -> Self {
        let (status, kind, title) = match &error {
            VmmError::Unreachable { .. } => {
                (StatusCode::CONFLICT, "baton:vmm-absent", "The VM's monitor is not there")
            }
            VmmError::Silent { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, "baton:vmm-silent", "The VM's monitor hangs")
            }
            VmmError::Refused { .. } => {
                (StatusCode::CONFLICT, "baton:vmm-refused", "The VM's monitor refused")
            }
            VmmError::Broken { .. } => {
                (StatusCode::BAD_GATEWAY, "baton:vmm-broken", "The VM's monitor broke off")
            }
            VmmError::Unsupported { .. } => {
                (StatusCode::CONFLICT, "baton:vmm-unsupported", "The VM's monitor cannot do this")
            }
        };
        Self::new(status, kind, title, Self::described(&error))
    }
}

impl From<IncomingError> for Problem {
    fn from(error: IncomingError) -> Self {
        match error {
            IncomingError::Vmm(error) => error.into(),
            IncomingError::Command(_) | IncomingError::Start { .. } => Self::new(
                StatusCode::CONFLICT,
                "baton:incoming-command",
                "The command that starts a monitor is wrong",
                Self::described(&error),
            ),
            IncomingError::NotThere { .. } => Self::new(
                StatusCode::CONFLICT,
                "baton:vmm-absent",
                "The VM's monitor is not there",
                error,
            ),
        }
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let detail = Self::described(&error);
        match error {
            ControlError::Absent { .. } => Self::new(
                StatusCode::CONFLICT,
                "baton:backend-absent",
                "There is no backend",
                detail,
            ),
            ControlError::Silent { .. } => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "baton:backend-silent",
                "The backend hangs",
                detail,
            ),
            ControlError::Refused { kind, detail } => Self {
                kind: refusal_kind(&kind),
                title: "The backend refused",
                status: StatusCode::CONFLICT.as_u16(),
                detail,
            },
            ControlError::Broken { .. } => Self::new(
                StatusCode::BAD_GATEWAY,
                "baton:backend-broken",
                "The backend broke off",
                detail,
            ),
        }
    }
}

/// The backend's own word, where it is one.
fn refusal_kind(kind: &str) -> Cow<'static, str> {
    let word = kind.strip_prefix("baton:").unwrap_or(kind);
    let good = (1..=64).contains(&word.len())
        && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if good { format!("baton:{word}").into() } else { "baton:backend-refused".into() }
}

impl From<SuperviseError> for Problem {
    fn from(error: SuperviseError) -> Self {
        if let SuperviseError::Full { vm, path } = &error {
            let what = format!("the agent cannot remember the backend of {vm}, so it starts none");
            return Self::state_full(&what, path);
        }
        let (status, kind, title) = match &error {
            SuperviseError::Failed { .. } | SuperviseError::Full { .. } => {
                (StatusCode::CONFLICT, "baton:backend-failed", "The backend does not start")
            }
            SuperviseError::Slow { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, "baton:backend-slow", "The backend does not answer")
            }
            SuperviseError::EarlierMachine { .. } => {
                (StatusCode::CONFLICT, "baton:earlier-machine", "An old machine is still here")
            }
            SuperviseError::Stuck { .. } => {
                (StatusCode::CONFLICT, "baton:backend-stuck", "The backend cannot be stopped")
            }
        };
        Self::new(status, kind, title, error)
    }
}

impl From<InventoryError> for Problem {
    fn from(error: InventoryError) -> Self {
        let (status, kind, title) = match &error {
            InventoryError::Definition(_) => {
                (StatusCode::BAD_REQUEST, "baton:bad-request", "The request is wrong")
            }
            InventoryError::Configured(_) => {
                (StatusCode::CONFLICT, "baton:vm-configured", "The VM is defined on this host")
            }
            InventoryError::Full => {
                (StatusCode::CONFLICT, "baton:too-many-vms", "The host knows too many VMs")
            }
            InventoryError::Disk { path, source } if found_no_room(source) => {
                return Self::state_full("the agent cannot remember the VM", path);
            }
            InventoryError::Disk { .. } | InventoryError::Damaged { .. } => {
                tracing::error!(error = Self::described(&error), "the inventory cannot be changed");
                let title = "The agent cannot remember it";
                (StatusCode::INTERNAL_SERVER_ERROR, "baton:state-failed", title)
            }
        };
        Self::new(status, kind, title, Self::described(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backends_word_becomes_a_type_and_nothing_else_does() {
        assert_eq!(refusal_kind("lost-race"), "baton:lost-race");
        assert_eq!(refusal_kind("baton:lost-race"), "baton:lost-race");
        for odd in ["", "Lost", "a b", "x:y", &"x".repeat(65)] {
            assert_eq!(refusal_kind(odd), "baton:backend-refused", "{odd}");
        }
    }
}
