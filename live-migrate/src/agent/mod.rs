//! The host agent: what it is told in its configuration and over its API, and
//! what it does with backends and monitors of this host.

mod api;
pub mod config;
mod cooperative;
pub mod definition;
mod events;
mod facts;
mod inventory;
pub(crate) mod ledger;
mod machine;
mod term;
mod zombie;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_protocol::handoff::Try;

use axum::http::StatusCode;

use crate::door::{Address, Door, DoorError, Peer};
use crate::problem::{Problem, found_no_room};
use crate::supervisor::{Launch, Role, Settings, Supervisor};
use crate::tls::{Credentials, CredentialsError};

use config::Config;
use definition::{Doors, VmDefinition};
use facts::HostFacts;
use inventory::{Inventory, InventoryError};

/// Why the agent does not run.
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
        "the certificate is {found}'s, and this host is configured as {host}; give the agent its own host's certificate"
    )]
    WrongHost {
        /// In the certificate.
        found: crate::identity::Identity,
        /// In the configuration.
        host: String,
    },
    /// What was remembered.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A directory.
    #[error("cannot make directory {}", path.display())]
    Directory {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct Agent {
    config: Config,
    facts: HostFacts,
    inventory: Inventory,
    terms: term::Terms,
    supervisor: Supervisor,
    machines: machine::Machines,
    events: events::Events,
    zombies: zombie::Told,
    cooperative: cooperative::Notes,
    /// Held while a backend's configuration is replaced: callers that ask at once use the same new file.
    configuring: Mutex<()>,
}

/// A running agent. Dropping it leaves backends and monitors running.
#[derive(Debug)]
pub struct Running {
    /// Where its API is.
    pub address: Address,
    task: tokio::task::JoinHandle<()>,
    zombies: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Ends the API; backends and monitors stay.
    pub async fn stop(self) {
        self.zombies.abort();
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Starts the agent: takes over what an agent before it left running, and serves
/// its API.
///
/// # Errors
/// [`StartError`]; nothing runs that did not before.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let credentials = config.tls.as_ref().map(Credentials::load).transpose()?;
    if let Some(credentials) = &credentials {
        let found = credentials.identity();
        if found.role != crate::identity::Role::Host || found.name != config.host {
            let (found, host) = (found.clone(), config.host.clone());
            return Err(StartError::WrongHost { found, host });
        }
    }
    let [launch, vmm] =
        [definition::LAUNCH_DIR, definition::VMM_DIR].map(|dir| config.run_dir.join(dir));
    for path in [&config.state_dir, &config.run_dir, &launch, &vmm] {
        std::fs::create_dir_all(path)
            .map_err(|source| StartError::Directory { path: path.clone(), source })?;
    }
    let inventory = Inventory::open(&config)?;
    let terms = term::Terms::open(&config.state_dir)?;
    let door = Door::open(&config.listen, credentials.as_ref()).await?;
    let address = door.address().clone();
    let (hear, heard) = tokio::sync::mpsc::channel(zombie::HEARD_MAX);
    let supervisor = Supervisor::new(Settings {
        manager: config.manager.clone(),
        state_dir: config.state_dir.clone(),
        start_limit: config.start_limit,
        stop_grace: config.stop_grace,
        hang: config.hang,
        heard: Some(hear),
    });
    let facts = HostFacts::gather(&config.host).await;
    let machines = machine::Machines::default();
    let (events, zombies) = (events::Events::new(), zombie::Told::default());
    let cooperative = cooperative::Notes::new(config.state_dir.clone());
    let configuring = Mutex::default();
    let agent = Arc::new(Agent {
        config,
        facts,
        inventory,
        terms,
        supervisor,
        machines,
        events,
        zombies,
        cooperative,
        configuring,
    });
    let zombies = tokio::spawn(zombie::watch(Arc::clone(&agent), heard));
    agent.take_over();
    let service = api::router(agent).into_make_service_with_connect_info::<Peer>();
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(door, service).await {
            tracing::error!(%error, "the API ended");
        }
    });
    Ok(Running { address, task, zombies })
}

impl Agent {
    fn take_over(&self) {
        for vm in self.inventory.list() {
            let Some((role, only_for)) = self.supervisor.remembered(&vm.name) else { continue };
            if let Err(why) = self.cooperative.may_be_kept(&vm.name, role) {
                tracing::error!(vm = vm.name, why, "a backend is not taken over");
                continue;
            }
            match self.launch(&vm, role, only_for) {
                Ok(launch) => self.supervisor.adopt(launch),
                Err(error) => {
                    tracing::error!(vm = vm.name, %error, "cannot take over a backend");
                }
            }
        }
    }

    /// [`Self::launch`], its failure for people.
    fn to_launch(
        &self,
        vm: &VmDefinition,
        role: Role,
        only_for: Option<Try>,
    ) -> Result<Launch, Problem> {
        self.launch(vm, role, only_for).map_err(|error| {
            let (name, dir) = (&vm.name, &self.config.run_dir);
            if found_no_room(&error) {
                let what = format!("the agent cannot write what the backend of {name} needs");
                return Problem::state_full(&what, dir);
            }
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "baton:state-failed",
                "The agent cannot write what the backend needs",
                format!("cannot write in {}: {error}", dir.display()),
            )
        })
    }

    /// Writes a backend's configuration and says how to start it.
    fn launch(&self, vm: &VmDefinition, role: Role, only_for: Option<Try>) -> io::Result<Launch> {
        // A unit of systemd has its directory made by systemd, for its own user.
        if self.config.manager == crate::supervisor::Manager::Child {
            std::fs::create_dir_all(self.config.vm_dir(&vm.name))?;
        }
        let at = |suffix: &str| {
            self.config.run_dir.join(definition::LAUNCH_DIR).join(format!("{}.{suffix}", vm.name))
        };
        let toml = vm.backend_toml(
            &self.config.host,
            &self.config.run_dir,
            Doors {
                mode: self.config.socket_mode.as_deref(),
                group: self.config.socket_group.as_deref(),
            },
        );
        let config = at("toml");
        let new = at("toml.new");
        let _alone = self.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::write(&new, toml)?;
        std::fs::rename(&new, &config)?;
        Ok(Launch {
            vm: vm.name.clone(),
            program: self.config.backend_program.clone(),
            config,
            control: self.config.control_socket(&vm.name),
            standby: role == Role::Standby,
            only_for,
            log: self.config.state_dir.join(format!("{}.backend.log", vm.name)),
            environment: at("env"),
        })
    }
}

/// For a status that a person waits for.
const STATUS_LIMIT: Duration = Duration::from_secs(1);
/// For a command that may have to wait for storage: a seal waits for what is in flight.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
