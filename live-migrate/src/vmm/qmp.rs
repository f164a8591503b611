//! QEMU, over its control protocol (QMP).
//!
//! A monitor socket has one client at a time, so a session is shared by the
//! calls that overlap (a `wait` must not keep a `cancel` out) and closed with
//! the last one. QEMU answers nothing while its main loop waits for a vhost-user
//! back-end; a session that was silent once is given up.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{self, MigrationCapability, MigrationStatus, QmpCommand};
use qapi::{Command, ExecuteError};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;

use super::{Incoming, Migration, MigrationPhase, Outgoing, RunState, Vmm, VmmError, VmmStatus};

use crate::unix;

const NAME: &str = "QEMU";
/// How often a wait looks without having been told. Events tell at once; this
/// is for one that came before the session did.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// QEMU may greet a client with an event that its last client, who has left, was to
/// have; the greeting comes behind it. So often it is called again.
const GREETING_TRIES: u32 = 4;

/// Between looks at a change that is under way, of which no event tells.
const SETTLE: Duration = Duration::from_millis(5);

/// A QEMU process.
#[derive(Debug)]
pub struct Qemu {
    socket: PathBuf,
    timeout: Duration,
    session: Mutex<Weak<Session>>,
}

struct Session {
    service: QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>,
    /// One command at a time: the answers of a server that knows no out-of-band
    /// commands carry no number.
    turn: Mutex<()>,
    /// Of migrations.
    news: Arc<Notify>,
    reader: JoinHandle<()>,
    /// No more commands: what comes next may be the answer to an earlier one.
    given_up: AtomicBool,
    version: String,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Session {
    /// `None`: no answer in time. A session that failed is given up.
    async fn execute<C>(&self, command: C, limit: Duration) -> Option<Result<C::Ok, ExecuteError>>
    where
        C: QmpCommand + Command + Send + Sync,
        C::Ok: Send,
    {
        let run = async {
            let _turn = self.turn.lock().await;
            if self.is_given_up() {
                return Err(ExecuteError::Io(io::ErrorKind::BrokenPipe.into()));
            }
            // An answer to this may come after the next command's question, and the turn ends with this.
            let unless_answered = GiveUp(self);
            let answer = self.service.execute(command).await;
            if !matches!(answer, Err(ExecuteError::Io(_))) {
                std::mem::forget(unless_answered);
            }
            answer
        };
        let answer = tokio::time::timeout(limit, run).await.ok();
        if answer.is_none() {
            drop(GiveUp(self));
        }
        answer
    }

    fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst) || self.reader.is_finished()
    }
}

/// Ends a session, at its own end.
struct GiveUp<'a>(&'a Session);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.given_up.store(true, Ordering::SeqCst);
        self.0.reader.abort();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qemu {
    /// One that listens on `socket`; `timeout` is for each command.
    #[must_use]
    pub fn new(socket: PathBuf, timeout: Duration) -> Self {
        Self { socket, timeout, session: Mutex::new(Weak::new()) }
    }

    fn silent(&self, command: &'static str) -> VmmError {
        VmmError::Silent { vmm: NAME, socket: self.socket.clone(), command, after: self.timeout }
    }

    fn broken(
        &self,
        command: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> VmmError {
        let source = source.into();
        VmmError::Broken { vmm: NAME, socket: self.socket.clone(), command, source }
    }

    async fn session(&self) -> Result<Arc<Session>, VmmError> {
        let open = async {
            let mut slot = self.session.lock().await;
            if let Some(session) = slot.upgrade()
                && !session.is_given_up()
            {
                return Ok(session);
            }
            let session = Arc::new(self.connect().await?);
            *slot = Arc::downgrade(&session);
            Ok(session)
        };
        match tokio::time::timeout(self.timeout, open).await {
            Ok(session) => session,
            Err(_) => Err(self.silent("qmp_capabilities")),
        }
    }

    async fn connect(&self) -> Result<Session, VmmError> {
        let mut tries = 1..=GREETING_TRIES;
        let negotiation = loop {
            let last = tries.next().is_none_or(|n| n == GREETING_TRIES);
            let unreachable = |source| {
                let socket = self.socket.clone();
                VmmError::Unreachable { vmm: NAME, socket, source }
            };
            let stream = unix::connect(&self.socket).await.map_err(unreachable)?;
            match QmpStreamTokio::open(stream).await {
                Ok(negotiation) => break negotiation,
                // What it says first is not its greeting.
                Err(error) if error.kind() == io::ErrorKind::InvalidData && !last => {
                    tracing::debug!(%error, "QMP did not begin with a greeting; connecting again");
                }
                Err(source) => return Err(self.broken("qmp_capabilities", source)),
            }
        };
        let qemu = &negotiation.capabilities.QMP.version.qemu;
        let version = format!("{}.{}.{}", qemu.major, qemu.minor, qemu.micro);
        let stream = negotiation
            .negotiate()
            .await
            .map_err(|source| self.broken("qmp_capabilities", source))?;
        let (service, events) = stream.into_parts();
        let news = Arc::new(Notify::new());
        let reader = tokio::spawn(read(events, Arc::clone(&news)));
        let (turn, given_up) = (Mutex::new(()), AtomicBool::new(false));
        Ok(Session { service, turn, news, reader, given_up, version })
    }

    /// Whoever asked may be gone before QEMU has answered, so a task of its own waits for that: a session whose answer
    /// nobody waited for is of no use to the next command.
    async fn execute<C>(&self, session: &Arc<Session>, command: C) -> Result<C::Ok, VmmError>
    where
        C: QmpCommand + Command + Send + Sync + 'static,
        C::Ok: Send + 'static,
    {
        let name = C::NAME;
        let (theirs, limit) = (Arc::clone(session), self.timeout);
        let run = tokio::spawn(async move { theirs.execute(command, limit).await });
        match run.await {
            Ok(Some(Ok(answer))) => Ok(answer),
            Ok(Some(Err(ExecuteError::Qapi(error)))) => {
                Err(VmmError::Refused { vmm: NAME, command: name, detail: error.desc })
            }
            Ok(Some(Err(ExecuteError::Io(source)))) => Err(self.broken(name, source)),
            Ok(None) => Err(self.silent(name)),
            Err(ended) => Err(self.broken(name, ended)),
        }
    }

    async fn command<C>(&self, command: C) -> Result<C::Ok, VmmError>
    where
        C: QmpCommand + Command + Send + Sync + 'static,
        C::Ok: Send + 'static,
    {
        let session = self.session().await?;
        self.execute(&session, command).await
    }

    async fn look(&self, session: &Arc<Session>) -> Result<VmmStatus, VmmError> {
        // In this order, so that the machine's state is not older than the phase.
        let migration = self.execute(session, qmp::query_migrate {}).await?;
        let run = self.execute(session, qmp::query_status {}).await?.status;
        Ok(VmmStatus {
            run: run_state(run),
            detail: qapi::Enum::name(&run).to_owned(),
            migration: Migration {
                phase: migration.status.map_or(MigrationPhase::None, phase),
                error: migration.error_desc,
                transferred_bytes: migration.ram.as_ref().and_then(|ram| bytes(ram.transferred)),
                remaining_bytes: migration.ram.as_ref().and_then(|ram| bytes(ram.remaining)),
                downtime_ms: migration.downtime.and_then(bytes),
            },
            version: Some(session.version.clone()),
        })
    }

    async fn capabilities(&self, session: &Arc<Session>, pause: bool) -> Result<(), VmmError> {
        let set = |capability, state| qmp::MigrationCapabilityStatus { capability, state };
        let capabilities = vec![
            set(MigrationCapability::events, true),
            set(MigrationCapability::return_path, true),
            set(MigrationCapability::pause_before_switchover, pause),
        ];
        self.execute(session, qmp::migrate_set_capabilities { capabilities }).await?;
        Ok(())
    }
}

/// Carries answers to the service and tells of migration events.
async fn read(
    mut events: qapi::futures::QapiEvents<QmpStreamTokio<ReadHalf<UnixStream>>>,
    news: Arc<Notify>,
) {
    loop {
        match next(&mut events).await {
            Some(Ok(qmp::Event::MIGRATION { .. } | qmp::Event::RESUME { .. })) => {
                news.notify_waiters();
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(%error, "QMP ended");
                return;
            }
            None => return,
        }
    }
}

/// The next event. `QapiEvents` is a stream and, by another rule, a future.
async fn next(
    events: &mut qapi::futures::QapiEvents<QmpStreamTokio<ReadHalf<UnixStream>>>,
) -> Option<io::Result<qmp::Event>> {
    use futures_util::StreamExt;
    StreamExt::next(events).await
}

#[async_trait]
impl Vmm for Qemu {
    async fn status(&self) -> Result<VmmStatus, VmmError> {
        let session = match self.session().await {
            Err(VmmError::Unreachable { source, .. }) if nobody(&source) => return Ok(gone()),
            session => session?,
        };
        self.look(&session).await
    }

    async fn incoming(&self, incoming: &Incoming) -> Result<(), VmmError> {
        let session = self.session().await?;
        self.capabilities(&session, incoming.pause_before_switchover).await?;
        let uri = Some(incoming.uri.clone());
        let listen = qmp::migrate_incoming { channels: None, exit_on_error: None, uri };
        self.execute(&session, listen).await?;
        Ok(())
    }

    async fn migrate(&self, outgoing: &Outgoing) -> Result<(), VmmError> {
        let session = self.session().await?;
        self.capabilities(&session, outgoing.pause_before_switchover).await?;
        if outgoing.max_bandwidth_bytes_per_s.is_some() || outgoing.downtime_limit_ms.is_some() {
            let parameters = qmp::MigrateSetParameters {
                max_bandwidth: outgoing.max_bandwidth_bytes_per_s,
                downtime_limit: outgoing.downtime_limit_ms,
                ..Default::default()
            };
            self.execute(&session, qmp::migrate_set_parameters(parameters)).await?;
        }
        let uri = Some(outgoing.uri.clone());
        let go = qmp::migrate { channels: None, detach: None, resume: None, uri };
        self.execute(&session, go).await?;
        Ok(())
    }

    async fn wait(&self, limit: Duration) -> Result<VmmStatus, VmmError> {
        let session = self.session().await?;
        let until = tokio::time::Instant::now() + limit;
        loop {
            // Before the look, so that what happens during it is not missed.
            let news = session.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            let status = self.look(&session).await?;
            let now = tokio::time::Instant::now();
            let settling = is_settling(&status);
            if (status.migration.phase.is_decided() && !settling) || now >= until {
                return Ok(status);
            }
            let pause = if settling { SETTLE } else { LOOK_EVERY };
            let _ = tokio::time::timeout_at(until.min(now + pause), news).await;
        }
    }

    async fn proceed(&self) -> Result<(), VmmError> {
        let session = self.session().await?;
        let state = MigrationStatus::pre_switchover;
        self.execute(&session, qmp::migrate_continue { state }).await?;
        // QEMU answers before it goes on, and somebody who waits next must not be
        // told that it still waits.
        let left = async {
            while self.look(&session).await?.migration.phase == MigrationPhase::PreSwitchover {
                tokio::time::sleep(SETTLE).await;
            }
            Ok(())
        };
        match tokio::time::timeout(self.timeout, left).await {
            Ok(left) => left,
            Err(_) => Err(self.silent(qmp::migrate_continue::NAME)),
        }
    }

    async fn cancel(&self) -> Result<(), VmmError> {
        self.command(qmp::migrate_cancel {}).await?;
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.command(qmp::cont {}).await?;
        Ok(())
    }

    async fn stop(&self) -> Result<(), VmmError> {
        self.command(qmp::stop {}).await?;
        Ok(())
    }

    async fn quit(&self) -> Result<(), VmmError> {
        match self.command(qmp::quit {}).await {
            // It may be gone before its answer is.
            Ok(_) | Err(VmmError::Broken { .. }) => Ok(()),
            Err(VmmError::Unreachable { source, .. }) if nobody(&source) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The migration is over and the machine's state does not show it yet.
fn is_settling(status: &VmmStatus) -> bool {
    status.run == RunState::Switching
        && status.migration.phase != MigrationPhase::PreSwitchover
        && status.migration.phase.is_decided()
}

/// No process has the socket open, or the one that had it is ending.
fn nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

fn gone() -> VmmStatus {
    VmmStatus {
        run: RunState::Gone,
        detail: "nobody listens on the control socket".to_owned(),
        migration: Migration::default(),
        version: None,
    }
}

fn bytes(value: i64) -> Option<u64> {
    u64::try_from(value).ok()
}

fn run_state(state: qmp::RunState) -> RunState {
    use qmp::RunState as Q;
    match state {
        // A suspended guest can wake up by itself.
        Q::running | Q::suspended => RunState::Running,
        Q::inmigrate => RunState::Incoming,
        Q::finish_migrate => RunState::Switching,
        Q::postmigrate => RunState::Migrated,
        Q::shutdown => RunState::Shutdown,
        Q::debug
        | Q::internal_error
        | Q::io_error
        | Q::paused
        | Q::prelaunch
        | Q::restore_vm
        | Q::save_vm
        | Q::watchdog
        | Q::guest_panicked
        | Q::colo => RunState::Paused,
    }
}

fn phase(status: MigrationStatus) -> MigrationPhase {
    use MigrationStatus as Q;
    match status {
        Q::none => MigrationPhase::None,
        Q::setup | Q::wait_unplug => MigrationPhase::Setup,
        Q::active => MigrationPhase::Active,
        Q::pre_switchover => MigrationPhase::PreSwitchover,
        Q::device => MigrationPhase::Device,
        Q::completed => MigrationPhase::Completed,
        Q::failed => MigrationPhase::Failed,
        Q::cancelling => MigrationPhase::Cancelling,
        Q::cancelled => MigrationPhase::Cancelled,
        Q::postcopy_active
        | Q::postcopy_paused
        | Q::postcopy_recover_setup
        | Q::postcopy_recover
        | Q::colo => MigrationPhase::Other,
    }
}
