//! The monitors of this host's VMs: a driver for each, and the start of one for
//! an incoming migration.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::process::{Child, Command};

use super::Agent;
use super::definition::{DefinitionError, Paths, VmDefinition, VmmKind};
use crate::vmm::{CloudHypervisor, Incoming, Qemu, RunState, Vmm, VmmError};

/// Between two looks at a monitor that starts.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Drivers, by VM. One lives as long as its sockets stay where they are: it
/// holds what is known of a migration under way.
#[derive(Debug, Default)]
pub(super) struct Machines(Mutex<HashMap<String, Known>>);

/// A driver, and the definition it was made for.
type Known = (VmDefinition, Arc<dyn Vmm>);

/// Why a monitor does not listen for a migration.
#[derive(Debug, thiserror::Error)]
pub(super) enum IncomingError {
    /// It was told and refused, or is not there.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The command is wrong.
    #[error(transparent)]
    Command(#[from] DefinitionError),
    /// The program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended, or never listened.
    #[error("{program} did not open its control socket within {} ms; see {log}", after.as_millis())]
    NotThere {
        /// Which.
        program: String,
        /// Its output.
        log: String,
        /// How long it had.
        after: Duration,
    },
}

/// A monitor that does not answer yet. Half-made is worse than not made: it is
/// killed if whoever asked for it gives up, or goes away, before it answers. By its
/// handle: a number could be another's by then.
struct HalfMade(Option<Child>);

impl HalfMade {
    /// It ended.
    async fn ended(&mut self) {
        match &mut self.0 {
            // However it ended, it is not there.
            Some(child) => drop(child.wait().await),
            None => std::future::pending().await,
        }
    }

    /// It outlives the agent, as a monitor should.
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Fails only for one that has ended.
            let _ = child.start_kill();
        }
    }
}

impl Agent {
    /// The driver of a VM's monitor; `None` when it is somebody else's business.
    pub(super) fn vmm(&self, vm: &VmDefinition) -> Option<Arc<dyn Vmm>> {
        let paths = Paths { vm, run_dir: &self.config.run_dir };
        let mut all = self.machines.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, vmm)) = all.get(&vm.name)
            && (known.vmm, &known.qmp, &known.api_socket) == (vm.vmm, &vm.qmp, &vm.api_socket)
        {
            return Some(Arc::clone(vmm));
        }
        let timeout = self.config.vmm_timeout;
        let vmm: Arc<dyn Vmm> = match vm.vmm {
            VmmKind::Qemu => Arc::new(Qemu::new(paths.qmp(), timeout)),
            VmmKind::CloudHypervisor => Arc::new(CloudHypervisor::new(paths.api(), timeout)),
            VmmKind::None => return None,
        };
        all.insert(vm.name.clone(), (vm.clone(), Arc::clone(&vmm)));
        Some(vmm)
    }

    /// Makes the monitor listen for a migration; starts it first where it is not
    /// there and a command for that is known.
    pub(super) async fn incoming(
        &self,
        vm: &VmDefinition,
        vmm: &dyn Vmm,
        incoming: &Incoming,
    ) -> Result<(), IncomingError> {
        let command = vm.incoming_command.as_ref().or(self.config.incoming_command.as_ref());
        if let Some(command) = command
            && vmm.status().await?.run == RunState::Gone
        {
            self.start_monitor(vm, vmm, command).await?;
        }
        Ok(vmm.incoming(incoming).await?)
    }

    async fn start_monitor(
        &self,
        vm: &VmDefinition,
        vmm: &dyn Vmm,
        command: &[String],
    ) -> Result<(), IncomingError> {
        let command = Paths { vm, run_dir: &self.config.run_dir }.fill(command)?;
        let (program, arguments) = command.split_first().ok_or(DefinitionError::Command)?;
        let log = self.config.state_dir.join(format!("{}.vmm.log", vm.name));
        let start = || -> io::Result<Child> {
            let out = OpenOptions::new().create(true).append(true).open(&log)?;
            Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(out.try_clone()?)
                .stderr(out)
                .process_group(0)
                .spawn()
        };
        let child =
            start().map_err(|source| IncomingError::Start { program: program.clone(), source })?;
        let mut half_made = HalfMade(Some(child));
        let after = self.config.start_limit;
        let there = async {
            loop {
                if vmm.status().await?.run != RunState::Gone {
                    return Ok::<_, VmmError>(());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let there = tokio::select! {
            there = tokio::time::timeout(after, there) => there,
            () = half_made.ended() => Ok(Err(VmmError::Refused {
                vmm: "the monitor",
                command: "start",
                detail: format!("it ended at once; see {}", log.display()),
            })),
        };
        match there {
            Ok(there) => {
                there?;
                half_made.keep();
                Ok(())
            }
            Err(_) => {
                let (program, log) = (program.clone(), log.display().to_string());
                Err(IncomingError::NotThere { program, log, after })
            }
        }
    }
}
