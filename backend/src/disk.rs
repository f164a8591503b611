//! One disk: its volume, its queues, and its front-ends, one after another.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_remote_client::{Volume, VolumeEvent, VolumeState};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::handoff::MemberHandle;
use crate::inflight::MadeHere;
use crate::log_limit::LogLimit;
use crate::queue::Disk;
use crate::queue::mailbox::QueueHandle;
use crate::socket::FrontEnds;
use crate::status::DiskStatus;
use crate::vhost_user::connection::{Connection, ConnectionError};
use crate::vhost_user::message::has_own_answer;
use crate::vhost_user::session::{DrainLimit, Reply, Session};

/// How long requests are waited for when the front-end is gone, the process
/// ends or the storage does not answer.
const DRAIN_GRACE: Duration = Duration::from_secs(5);

/// What is fixed about a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Names the disk in the log.
    pub name: String,
    /// Queues offered.
    pub num_queues: u16,
    /// Ring size the front-end is expected to use; bounds `seg_max`.
    pub queue_size: u16,
    /// Changes are refused, whatever the volume allows.
    pub read_only: bool,
    /// Longest time that a queue looks for more work before it sleeps, in us; 0: it
    /// sleeps at once.
    pub poll_us: u64,
}

/// Ends disks: readable for ever once set.
#[derive(Debug)]
pub struct Shutdown(EventFd);

impl Shutdown {
    /// Not set.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Sets it.
    pub fn set(&self) {
        let _ = self.0.write(1);
    }

    /// Whether it is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        is_readable(self.0.as_fd(), PollFlags::POLLIN)
    }
}

fn is_readable(fd: std::os::fd::BorrowedFd<'_>, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, events)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// A disk ready to be served.
#[derive(Debug)]
pub struct DiskServer {
    disk: Arc<Disk>,
    queues: Vec<QueueHandle>,
    queue_size: u16,
    /// Written by the volume's events.
    news: Arc<EventFd>,
}

impl DiskServer {
    /// Starts the threads of a disk's queues on an open volume.
    ///
    /// # Errors
    /// When the process is out of threads or descriptors.
    pub fn new(
        volume: Arc<dyn Volume>,
        options: &DiskOptions,
        member: Option<MemberHandle>,
    ) -> io::Result<Self> {
        let geometry = volume.geometry();
        let num_queues = options.num_queues.min(volume.queues_max());
        if num_queues < options.num_queues {
            tracing::warn!(
                disk = options.name,
                asked = options.num_queues,
                num_queues,
                "the storage serves fewer queues than asked for; give the VMM no more than these"
            );
        }
        let news = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let disk = Arc::new(Disk {
            name: options.name.clone(),
            volume,
            size_bytes: AtomicU64::new(geometry.size_bytes),
            read_only: options.read_only || geometry.read_only,
            id: geometry.id,
            inflight_made: MadeHere::default(),
            status: DiskStatus::new(num_queues),
            member,
        });
        let (weak, waker) = (Arc::downgrade(&disk), Arc::clone(&news));
        disk.volume.set_listener(Arc::new(move |event| {
            if let Some(disk) = weak.upgrade() {
                on_event(&disk, &waker, event);
            }
        }));
        // It may have grown before the listener was there.
        disk.size_bytes.fetch_max(disk.volume.geometry().size_bytes, Ordering::Relaxed);
        // More threads than may run at once would only take turns, and cost a switch for each request.
        let threads = match disk.volume.blocks() {
            true => usize::from(num_queues),
            false => {
                std::thread::available_parallelism().map_or(usize::from(num_queues), usize::from)
            }
        };
        let queues = QueueHandle::spawn_all(&disk, num_queues, threads, options.poll_us)?;
        // Connections stand before rings start: the guest of a move or of a restarted backend is waiting then.
        if disk.volume.handoff().is_some() {
            for queue in &queues {
                queue.prepare(usize::from(options.queue_size));
            }
        }
        Ok(Self { disk, queues, queue_size: options.queue_size, news })
    }

    /// The disk, for who only looks at it.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Serves front-ends until `shutdown` is set, or the only one is gone.
    /// Gives the volume back when no guest was at it; a guest that is there
    /// will want it from the process that replaces this one.
    pub fn run(mut self, mut front_ends: FrontEnds, shutdown: &Shutdown) {
        let mut guest_waits = false;
        while let Some(listener) = front_ends.as_fd() {
            if !wait_readable(listener, shutdown) {
                break;
            }
            match front_ends.accept().and_then(Connection::new) {
                Ok(connection) => guest_waits = self.serve(connection, shutdown),
                Err(error) => {
                    tracing::warn!(disk = self.disk.name, %error, "a front-end could not be accepted");
                    // Out of descriptors, most likely; do not spin on it.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            if shutdown.is_set() {
                break;
            }
        }
        drop(front_ends);
        self.queues.clear();
        self.disk.volume.close(!guest_waits);
    }

    /// Serves one front-end to its end. True: its guest was running.
    fn serve(&mut self, mut connection: Connection, shutdown: &Shutdown) -> bool {
        tracing::info!(disk = self.disk.name, "front-end connected");
        self.disk.status.set_front_end(connection.peer());
        let mut session = Session::new(&self.disk, &self.queues, self.queue_size);
        let mut refusals = LogLimit::default();
        let ended = loop {
            match wait_session(&connection, shutdown, &self.news) {
                Wake::Shutdown => break None,
                Wake::News => {
                    let _ = self.news.read();
                    session.config_changed();
                }
                Wake::Message => {
                    let exchanged =
                        self.exchange(&mut connection, &mut session, shutdown, &mut refusals);
                    if let Err(error) = exchanged {
                        break Some(error);
                    }
                }
            }
        };
        if !matches!(ended, None | Some(ConnectionError::Closed)) {
            session.forget_stop();
        }
        let was_running = session.is_running();
        session.end(DrainLimit { hurry: &|| true, grace: DRAIN_GRACE });
        self.disk.status.set_front_end(None);
        match ended {
            None => tracing::info!(
                disk = self.disk.name,
                "shutting down; requests in flight are answered"
            ),
            Some(ConnectionError::Closed) => {
                tracing::info!(disk = self.disk.name, "front-end disconnected")
            }
            Some(error) => {
                tracing::warn!(disk = self.disk.name, "front-end dropped: {}", chain(&error))
            }
        }
        was_running
    }

    fn exchange(
        &self,
        connection: &mut Connection,
        session: &mut Session<'_>,
        shutdown: &Shutdown,
        refusals: &mut LogLimit,
    ) -> Result<(), ConnectionError> {
        let (header, request) = connection.receive()?;
        let answer = {
            let hung_up =
                || is_readable(connection.as_fd(), PollFlags::POLLHUP) || shutdown.is_set();
            session.handle(request, DrainLimit { hurry: &hung_up, grace: DRAIN_GRACE })
        };
        // Before the answer: whoever asks after it must find it so.
        session.show_status();
        let number = header.request;
        match answer {
            Ok(Reply::Ack) if !header.need_reply => {}
            Ok(Reply::Ack) => connection.reply(number, &0u64.to_le_bytes(), None)?,
            Ok(Reply::Number(value)) => connection.reply(number, &value.to_le_bytes(), None)?,
            Ok(Reply::Bytes(body)) => connection.reply(number, &body, None)?,
            Ok(Reply::WithFd(body, fd)) => connection.reply(number, &body, Some(fd.as_fd()))?,
            Err(refused) if has_own_answer(number) || refused.ends_connection() => {
                return Err(refused.into());
            }
            Err(refused) => {
                if let Some(suppressed) = refusals.permit() {
                    tracing::warn!(disk = self.disk.name, suppressed, "{}", chain(&refused));
                }
                if header.need_reply {
                    connection.reply(number, &1u64.to_le_bytes(), None)?;
                }
            }
        }
        Ok(())
    }
}

fn on_event(disk: &Disk, news: &EventFd, event: VolumeEvent) {
    match event {
        VolumeEvent::Resized(size_bytes) => {
            let old = disk.size_bytes.fetch_max(size_bytes, Ordering::Relaxed);
            if size_bytes > old {
                tracing::info!(
                    disk = disk.name,
                    old,
                    new = size_bytes,
                    "the volume grew; the guest is told"
                );
                let _ = news.write(1);
            }
        }
        VolumeEvent::State(VolumeState::Connected) => {
            tracing::info!(disk = disk.name, "storage answers")
        }
        VolumeEvent::State(VolumeState::Reconnecting) => {
            tracing::warn!(disk = disk.name, "storage does not answer; guest I/O waits");
        }
        // Said once for all disks, and why.
        VolumeEvent::State(VolumeState::Fenced)
            if disk.member.as_ref().is_some_and(MemberHandle::is_parked) => {}
        VolumeEvent::State(VolumeState::Fenced) => {
            tracing::error!(
                disk = disk.name,
                "fenced: the volume was given to another owner; guest I/O is parked and no request is sent any more"
            );
        }
        VolumeEvent::State(VolumeState::Lost) => {
            tracing::error!(
                disk = disk.name,
                "the volume is gone or is another one than before; guest I/O is parked, nothing is sent any more"
            );
        }
    }
}

enum Wake {
    Shutdown,
    News,
    Message,
}

/// Waits until `fd` is readable (true) or `shutdown` is set.
pub(crate) fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, shutdown: &Shutdown) -> bool {
    loop {
        let mut fds = [
            PollFd::new(shutdown.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(fd, PollFlags::POLLIN),
        ];
        // Interrupted or woken: look again.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let [stop, ready] = fds.map(|fd| fd.any().unwrap_or(false));
        if stop {
            return false;
        }
        if ready {
            return true;
        }
    }
}

fn wait_session(connection: &Connection, shutdown: &Shutdown, news: &EventFd) -> Wake {
    loop {
        let mut fds = [
            PollFd::new(shutdown.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(news.as_fd(), PollFlags::POLLIN),
            PollFd::new(connection.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        match fds.map(|fd| fd.any().unwrap_or(false)) {
            [true, _, _] => return Wake::Shutdown,
            [_, true, _] => return Wake::News,
            [_, _, true] => return Wake::Message,
            _ => {}
        }
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
