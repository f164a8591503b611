//! Starts and stops one process: as a child of its own group, or as a systemd
//! unit.
//!
//! Either outlives the agent: nothing ends it when the agent ends, and the next
//! agent finds it by its record. Neither is started again by anybody else than the
//! agent, who knows as what: a unit that systemd starts again would have the
//! arguments of before, and could come between a seal and the proof of its end.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use baton_protocol::handoff::Try;
use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::process::ProcessId;

/// For systemctl, which waits for the unit.
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(90);
/// What is shown of a log.
const TAIL_BYTES: usize = 1 << 10;

/// Who keeps processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manager {
    /// The agent itself.
    Child,
    /// systemd, told by this program (`systemctl`).
    Systemd(PathBuf),
}

/// How a backend is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Of the VM; also of the unit's instance.
    pub vm: String,
    /// What is started.
    pub program: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
    /// Waits for a handoff and claims nothing.
    pub standby: bool,
    /// In one try only, if it is known.
    pub only_for: Option<Try>,
    /// Where its output goes.
    pub log: PathBuf,
    /// Read by the unit.
    pub environment: PathBuf,
}

impl Launch {
    fn arguments(&self) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        let mut arguments = vec![
            "--config".to_owned(),
            text(&self.config),
            "--control".to_owned(),
            text(&self.control),
        ];
        match self.only_for {
            _ if !self.standby => {}
            Some(attempt) => arguments.push(format!("--standby={attempt}")),
            None => arguments.push("--standby".to_owned()),
        }
        arguments
    }

    fn unit(&self) -> String {
        format!("baton-agent-backend@{}.service", self.vm)
    }
}

/// A process that was started or found.
#[derive(Debug)]
pub(super) enum Process {
    Child(Child, Option<ProcessId>),
    /// With its descriptor, if it ran when that was asked for.
    Other(ProcessId, Option<OwnedFd>),
}

impl Process {
    /// One that is no child of ours.
    pub(super) fn other(id: ProcessId) -> Self {
        let descriptor = id.descriptor();
        Self::Other(id, descriptor)
    }

    /// It may begin: whoever comes after this agent would find it.
    pub(super) async fn begin(&mut self) {
        if let Self::Child(child, _) = self
            && let Some(mut stdin) = child.stdin.take()
        {
            // One that has ended already is seen by its end.
            let _ = stdin.write_all(b"\n").await;
        }
    }

    pub(super) fn id(&self) -> Option<&ProcessId> {
        match self {
            Self::Child(_, id) => id.as_ref(),
            Self::Other(id, _) => Some(id),
        }
    }

    /// Waits for its end.
    pub(super) async fn ended(&mut self) -> Ending {
        match self {
            Self::Child(child, _) => child.wait().await.map_or(Ending::Unseen, Ending::Waited),
            Self::Other(id, descriptor) => {
                if id.ended(descriptor.as_ref()).await {
                    Ending::Told
                } else {
                    Ending::Unseen
                }
            }
        }
    }
}

/// How the end of a process was learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By waitpid(2): it was our child.
    Waited(ExitStatus),
    /// By its descriptor.
    Told,
    /// Its number was not there any more, which proves nothing.
    Unseen,
}

impl Ending {
    pub(super) fn status(self) -> Option<ExitStatus> {
        match self {
            Self::Waited(status) => Some(status),
            Self::Told | Self::Unseen => None,
        }
    }
}

impl Manager {
    pub(super) async fn start(&self, launch: &Launch) -> io::Result<Process> {
        match self {
            Self::Child => {
                let log = OpenOptions::new().create(true).append(true).open(&launch.log)?;
                let child = Command::new(&launch.program)
                    .args(launch.arguments())
                    // It waits until it is noted: one that nobody knew of would never be ended.
                    .arg("--wait-for-stdin")
                    .stdin(Stdio::piped())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .process_group(0)
                    .spawn()?;
                let id = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(ProcessId::of);
                Ok(Process::Child(child, id))
            }
            Self::Systemd(systemctl) => {
                let arguments = launch.arguments().join(" ");
                fs::write(&launch.environment, format!("BATON_ARGS={arguments}\n"))?;
                // One that ends before systemd has looked at it is a failed start, else a unit that has ended.
                if let Err(error) = tell(systemctl, &["start", &launch.unit()]).await {
                    let tail = self.tail(launch).await;
                    return Err(io::Error::other(format!(
                        "{error}; its journal ends with: {tail}"
                    )));
                }
                let shown =
                    tell(systemctl, &["show", "--property=MainPID", "--value", &launch.unit()])
                        .await?;
                let pid = shown.trim().parse().ok().filter(|pid| *pid > 0);
                if let Some(process) = pid.and_then(ProcessId::of) {
                    return Ok(Process::other(process));
                }
                let (unit, tail) = (launch.unit(), self.tail(launch).await);
                Err(io::Error::other(format!("{unit} ended at once: {tail}")))
            }
        }
    }

    /// What it said last, for a person who asks why.
    pub(super) async fn tail(&self, launch: &Launch) -> String {
        let text = match self {
            Self::Child => fs::read(&launch.log).unwrap_or_default(),
            Self::Systemd(systemctl) => {
                let of_unit = format!("_SYSTEMD_UNIT={}", launch.unit());
                let last = ["--lines=1", "--output=cat", "--quiet", of_unit.as_str()];
                let journalctl = systemctl.with_file_name("journalctl");
                // Its last words may still be on their way to the journal.
                let _ = tell(&journalctl, &["--sync"]).await;
                let said = tell(&journalctl, &last).await;
                said.unwrap_or_else(|error| format!("see its journal ({error})")).into_bytes()
            }
        };
        let tail = &text[text.len().saturating_sub(TAIL_BYTES)..];
        String::from_utf8_lossy(tail).lines().last().unwrap_or_default().trim().to_owned()
    }

    /// Asks it to end, and makes it end after `grace`.
    pub(super) async fn stop(
        &self,
        launch: &Launch,
        process: &mut Process,
        grace: Duration,
    ) -> io::Result<Ending> {
        match self {
            Self::Child => {
                if let Some(id) = process.id() {
                    id.signal(Signal::SIGTERM)?;
                }
            }
            Self::Systemd(systemctl) => {
                let unit = launch.unit();
                let stop = ["stop", unit.as_str()];
                let told = tokio::time::timeout(grace, tell(systemctl, &stop)).await;
                if let Ok(Err(error)) = told {
                    tracing::warn!(%error, "systemd does not stop a backend");
                }
            }
        }
        if let Ok(ending) = tokio::time::timeout(grace, process.ended()).await {
            return Ok(ending);
        }
        tracing::warn!(vm = launch.vm, "a backend did not end when it was asked; it is killed");
        self.kill(launch, process.id()).await?;
        Ok(process.ended().await)
    }

    /// Ends it at once.
    pub(super) async fn kill(&self, launch: &Launch, id: Option<&ProcessId>) -> io::Result<()> {
        match (self, id) {
            (Self::Child, None) => Ok(()),
            (Self::Child, Some(id)) => id.signal(Signal::SIGKILL),
            (Self::Systemd(systemctl), _) => {
                tell(systemctl, &["kill", "--signal=SIGKILL", &launch.unit()]).await.map(drop)
            }
        }
    }
}

async fn tell(program: &Path, arguments: &[&str]) -> io::Result<String> {
    let run =
        Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let name = program.display();
    let output = tokio::time::timeout(SYSTEMCTL_TIMEOUT, run)
        .await
        .map_err(|_| io::Error::other(format!("{name} did not answer")))?
        .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(io::Error::other(format!("{name} {}: {said}", arguments.join(" "))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
