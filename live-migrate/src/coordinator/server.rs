//! The running coordinator.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::agents::Agents;
use super::config::Config;
use super::core::Core;
use super::journal::{Found, Journal, JournalError};
use super::storages::Storages;
use super::{api, migrate, tidings};
use crate::door::{Address, Door, DoorError, Peer};
use crate::identity::{Identity, Role};
use crate::tls::{Credentials, CredentialsError};

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nobody could connect.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// The certificates.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// They are another's.
    #[error(
        "the certificate is {0}'s, and no agent obeys that one; give the coordinator its own, baton://coordinator/NAME"
    )]
    WrongRole(Identity),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A row that cannot be kept.
    #[error("a handoff of the journal cannot be taken up")]
    Row(#[source] super::keeper::AskError),
}

/// A coordinator that serves.
#[derive(Debug)]
pub struct Coordinator {
    /// Where.
    pub address: Address,
    /// Of this start.
    pub term: u64,
    core: Arc<Core>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Coordinator {
    /// Why it must end, once it must.
    #[must_use]
    pub fn down(&self) -> watch::Receiver<Option<&'static str>> {
        self.core.down()
    }

    /// Answers nobody any more. Handoffs go on without it.
    pub async fn stop(self) {
        self.serving.abort();
        let _ = self.serving.await;
    }
}

/// Starts: takes a new term, takes up every handoff of the journal, serves.
///
/// # Errors
/// [`StartError`]; nothing was started.
pub async fn start(config: Config) -> Result<Coordinator, StartError> {
    let credentials = match &config.tls {
        Some(files) => Some(Arc::new(Credentials::load(files)?)),
        None => None,
    };
    if let Some(credentials) = &credentials
        && credentials.identity().role != Role::Coordinator
    {
        return Err(StartError::WrongRole(credentials.identity().clone()));
    }
    let storages = Storages::new(&config, credentials.as_ref());
    let agents = Agents::new(&config, credentials.as_ref());
    // The door first: an address in use must not cost the other one its term.
    let door = Door::open(&config.listen, credentials.as_deref()).await?;
    let address = door.address().clone();
    // A new journal must not lag behind a lost one.
    let seen = storages.term_seen().await;
    let (journal, Found { term, rows, vms }) =
        Journal::open(&config.journal, seen.saturating_add(1), config.death)?;
    let core = Arc::new(Core::new(config, term, journal, (storages, agents), vms));
    tracing::info!(term, handoffs = rows.len(), "taking up the journal");
    for row in rows {
        let unfinished = row
            .driven
            .as_ref()
            .is_some_and(|note| !matches!(note["step"].as_str(), Some("done" | "rolled-back")));
        let handle = core.keep(row).await.map_err(StartError::Row)?;
        if unfinished {
            migrate::drive(&core, handle, true);
        }
    }
    tidings::listen(&core);
    let app = api::router(Arc::clone(&core)).into_make_service_with_connect_info::<Peer>();
    let serving = tokio::spawn(async move { axum::serve(door, app).await });
    Ok(Coordinator { address, term, core, serving })
}
