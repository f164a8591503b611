//! The running coordinator: alone with a file, or one of several on etcd.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::agents::Agents;
use super::config::{Config, Keep};
use super::core::{Core, Down};
use super::etcd::EtcdError;
use super::etcd::campaign::{Campaign, Lease, Standing};
use super::etcd::chain::{self, Keys, Lead, Leader};
use super::etcd::client::Client;
use super::etcd::election::Input;
use super::etcd::settings::Settings;
use super::etcd::store::EtcdStore;
use super::front::{Follower, Front};
use super::journal::{Found, Journal, JournalError};
use super::storages::Storages;
use super::{api, migrate, tidings};
use crate::door::{Address, Door, DoorError, Peer};
use crate::identity::{Identity, Role};
use crate::tls::{Credentials, CredentialsError};

/// Between two tries to read the journal.
const READ_AGAIN: Duration = Duration::from_millis(200);

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
    /// etcd, in a way that waiting does not help against.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// A row that cannot be kept.
    #[error("a handoff of the journal cannot be taken up")]
    Row(#[source] super::keeper::AskError),
}

/// A coordinator that serves.
#[derive(Debug)]
pub struct Coordinator {
    /// Where.
    pub address: Address,
    /// Of this start; `None` while it follows.
    pub term: watch::Receiver<Option<u64>>,
    down: watch::Receiver<Option<Down>>,
    serving: JoinHandle<std::io::Result<()>>,
    election: Option<(mpsc::Sender<Input>, JoinHandle<()>)>,
}

impl Coordinator {
    /// Why it must end, once it must.
    #[must_use]
    pub fn down(&self) -> watch::Receiver<Option<Down>> {
        self.down.clone()
    }

    /// Answers nobody any more, and gives the lead back if it has it. Handoffs go on
    /// without it.
    pub async fn stop(self) {
        self.serving.abort();
        let _ = self.serving.await;
        if let Some((tell, election)) = self.election {
            let _ = tell.send(Input::Stop).await;
            let _ = election.await;
        }
    }
}

/// Whom a coordinator calls, and as whom.
struct Outside {
    config: Config,
    credentials: Option<Arc<Credentials>>,
    storages: Storages,
}

impl Outside {
    /// Highest term that anybody out there has heard.
    async fn term_seen(&self) -> u64 {
        let agents = Agents::term_seen(&self.config, self.credentials.as_ref());
        let (servers, agents) = tokio::join!(self.storages.term_seen(), agents);
        servers.max(agents)
    }
}

/// Starts: alone it takes a new term, takes up every handoff of the journal and
/// serves; of several it follows, and does the same once it leads.
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
    // The door first: an address in use must not cost the other one its term.
    let door = Door::open(&config.listen, credentials.as_deref()).await?;
    let outside = Outside { config, credentials, storages };
    match outside.config.journal.clone() {
        Keep::File(path) => alone(outside, door, &path).await,
        Keep::Etcd(settings) => one_of_several(outside, door, *settings).await,
    }
}

async fn alone(
    outside: Outside,
    door: Door,
    path: &std::path::Path,
) -> Result<Coordinator, StartError> {
    let address = door.address().clone();
    // A new journal must not lag behind a lost one.
    let seen = outside.term_seen().await;
    let (journal, found) = Journal::open(path, seen.saturating_add(1), outside.config.death)?;
    let term = found.term;
    let (core, app) = take_up(outside, journal, found).await?;
    let app = app.into_make_service_with_connect_info::<Peer>();
    let serving = tokio::spawn(async move { axum::serve(door, app).await });
    let (_, term) = watch::channel(Some(term));
    Ok(Coordinator { address, term, down: core.down(), serving, election: None })
}

/// Takes up every handoff of the journal.
async fn take_up(
    outside: Outside,
    journal: Journal,
    found: Found,
) -> Result<(Arc<Core>, axum::Router), StartError> {
    let Outside { config, credentials, storages } = outside;
    let Found { term, rows, vms, .. } = found;
    let agents = Agents::new(&config, credentials.as_ref(), term);
    let mut superseded = agents.superseded();
    let core = Arc::new(Core::new(config, term, journal, (storages, agents), vms));
    tracing::info!(term, handoffs = rows.len(), "taking up the journal");
    let watched = Arc::clone(&core);
    tokio::spawn(async move {
        if superseded.wait_for(|it| *it).await.is_ok() {
            watched.step_down("an agent has heard a higher term");
        }
    });
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
    let app = api::router(Arc::clone(&core));
    Ok((core, app))
}

async fn one_of_several(
    outside: Outside,
    door: Door,
    settings: Settings,
) -> Result<Coordinator, StartError> {
    let address = door.address().clone();
    let client = Arc::new(Client::new(&settings)?);
    let keys = Keys::under(&settings.prefix);
    match client.txn(&chain::look(&keys)).await.and_then(|answer| chain::looked(&answer)) {
        Ok(_) => {}
        // It comes back, or its majority does.
        Err(error @ EtcdError::Unreachable { .. }) => tracing::warn!(%error, "waiting for etcd"),
        Err(error) => return Err(error.into()),
    }
    // The counter of an etcd that is new, or was restored, must not lag behind.
    let seen = outside.term_seen().await;
    let who = Leader {
        name: settings.name.clone(),
        api: settings.advertise.to_string(),
        term: 0,
        instance: instance(),
    };
    let (campaign, standing) = Campaign::new(
        Arc::clone(&client),
        keys.clone(),
        who,
        Lease { ttl: settings.lease_ttl, ignored: settings.ignore_lease },
        seen.saturating_add(1),
    );
    let front = Front::default();
    let follower = Follower { name: settings.name.clone(), standing: standing.clone() };
    let app = front.clone().router(follower).into_make_service_with_connect_info::<Peer>();
    let serving = tokio::spawn(async move { axum::serve(door, app).await });
    let (tell, told) = mpsc::channel(4);
    let election = tokio::spawn(campaign.run(told));
    let (show_term, term) = watch::channel(None);
    let (down, downed) = watch::channel(None);
    let leading = Leading { client, keys, settings, standing, tell: tell.clone(), down, show_term };
    tokio::spawn(leading.run(outside, front));
    Ok(Coordinator { address, term, down: downed, serving, election: Some((tell, election)) })
}

/// What becomes of a follower once it leads.
struct Leading {
    client: Arc<Client>,
    keys: Keys,
    settings: Settings,
    standing: watch::Receiver<Standing>,
    tell: mpsc::Sender<Input>,
    down: watch::Sender<Option<Down>>,
    show_term: watch::Sender<Option<u64>>,
}

impl Leading {
    async fn run(mut self, outside: Outside, front: Front) {
        let decided = self.standing.wait_for(|it| it.lead.is_some() || it.over.is_some()).await;
        let Some(lead) = decided.ok().and_then(|standing| standing.lead) else { return };
        // From the first moment on: the end of the lease does not wait for the journal.
        let mut over = self.standing.clone();
        let down = self.down.clone();
        tokio::spawn(async move {
            let why = over.wait_for(|it| it.over.is_some()).await.ok().and_then(|it| it.over);
            if let Some(why) = why {
                down.send_replace(Some(Down { why: why.sentence(), again: true }));
            }
        });
        match self.lead(outside, lead).await {
            Ok((core, app)) => {
                self.show_term.send_replace(Some(lead.term));
                front.lead(app);
                let mut down = core.down();
                if down.wait_for(Option::is_some).await.is_ok() {
                    // Its lease is given back, too.
                    let _ = self.tell.send(Input::HigherTerm).await;
                }
            }
            Err(error) => {
                tracing::error!(%error, "cannot lead");
                let _ = self.tell.send(Input::WriteRefused).await;
            }
        }
    }

    async fn lead(
        &self,
        outside: Outside,
        lead: Lead,
    ) -> Result<(Arc<Core>, axum::Router), StartError> {
        let (lost, mut is_lost) = watch::channel(false);
        let (store, found) = loop {
            let (client, keys) = (Arc::clone(&self.client), self.keys.clone());
            let patience = self.settings.lease_ttl / 2;
            match EtcdStore::open(client, keys, lead, patience, lost.clone()).await {
                // For as long as the lease lasts.
                Err(error @ EtcdError::Unreachable { .. }) => {
                    tracing::warn!(%error, "the journal is not read yet");
                    tokio::time::sleep(READ_AGAIN).await;
                }
                opened => break opened?,
            }
        };
        let tell = self.tell.clone();
        tokio::spawn(async move {
            if is_lost.wait_for(|it| *it).await.is_ok() {
                let _ = tell.send(Input::WriteRefused).await;
            }
        });
        let journal = Journal::of(Arc::new(store), found.seq, outside.config.death)?;
        take_up(outside, journal, found).await
    }
}

/// Of this process and no other: not even one with its number on another host.
fn instance() -> String {
    let mut random = [0_u8; 16];
    let read = std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut random));
    if read.is_err() {
        // Never seen; the time of the start is different enough.
        let now = super::core::unix_us().to_be_bytes();
        random[..8].copy_from_slice(&now);
    }
    let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}-{}", std::process::id())
}
