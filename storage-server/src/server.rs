//! Puts the parts together: listeners, handshakes, workers, store; and takes
//! them apart again in the right order.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_protocol::EventKind;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::admin;
use crate::config::Config;
use crate::handshake::{Desk, Lobby, SilentList, Socket};
use crate::log::Sometimes;
use crate::metrics::{AcceptMetrics, WorkerMetrics};
use crate::net::{self, BindError, UnixSocket};
use crate::store::{OpenError, PoolConfig, PoolError, Store};
use crate::volumes::{Announce, DamagedRecord, Volumes};
use crate::worker::{self, Flusher, Mailbox, Message, Pool};

/// How long a stop may take before it is called a failure: clients get five
/// seconds for their last answers, the rest is for the disk.
const STOP_LIMIT: Duration = Duration::from_secs(45);
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nobody could connect.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No pool.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A volume that cannot be served.
    #[error(transparent)]
    Record(#[from] DamagedRecord),
    /// The system gave no threads or descriptors.
    #[error("cannot start the server's threads; raise the limits of processes and open files")]
    System(#[from] io::Error),
}

/// Why it did not end well. Nothing acknowledged is lost: the next start recovers.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The last flush or checkpoint failed.
    #[error("the pool could not be closed")]
    Pool(#[from] PoolError),
    /// The disk does not answer.
    #[error("the disk did not answer for {} seconds; the server ends without it", STOP_LIMIT.as_secs())]
    Stuck,
}

/// A running server.
pub struct Server {
    /// Where clients connect.
    pub data: SocketAddr,
    /// Where the admin API is.
    pub admin: SocketAddr,
    /// Where clients of this host connect.
    pub unix: Option<PathBuf>,
    volumes: Arc<Volumes>,
    parts: Parts,
}

struct Parts {
    accepting: JoinSet<()>,
    mailboxes: Vec<Arc<Mailbox>>,
    workers: Vec<JoinHandle<()>>,
    flusher: Arc<Flusher>,
    pool: Arc<Pool>,
    helpers: Vec<JoinHandle<()>>,
    _socket: Option<UnixSocket>,
}

/// Starts everything. The addresses are bound before the data directory is
/// touched, so that a port in use leaves nothing behind.
///
/// # Errors
/// [`StartError`]; nothing runs then.
pub async fn start(config: Config) -> Result<Server, StartError> {
    net::raise_file_limit();
    let data = net::bind("listen", config.listen).await?;
    let admin = net::bind("admin listen", config.admin_listen).await?;
    let (data_address, admin_address) = (data.local_addr()?, admin.local_addr()?);
    let unix = config.listen_unix.as_deref().map(net::bind_unix).transpose()?;
    let (unix, socket) = unix.unzip();

    let pool = PoolConfig { capacity_bytes: config.pool_bytes, ..PoolConfig::default() };
    let dir = config.data_dir.clone();
    let store = tokio::task::spawn_blocking(move || Store::open(&dir, pool))
        .await
        .map_err(io::Error::other)??;

    let mailboxes = (0..config.workers)
        .map(|_| Mailbox::new())
        .collect::<nix::Result<Vec<_>>>()
        .map_err(io::Error::from)?;
    let announce: Announce = {
        let mailboxes = mailboxes.clone();
        Arc::new(move |worker: usize, volume| mailboxes[worker].send(Message::News(volume)))
    };
    let volumes = Arc::new(Volumes::new(Arc::clone(&store), config.workers, boot_id()?, announce)?);

    let io_uring = config.io_uring && io_uring_works(&store);
    let flusher = Arc::new(Flusher::default());
    let disk = Arc::new(Pool::default());
    let metrics: Vec<_> = mailboxes.iter().map(|_| Arc::new(WorkerMetrics::default())).collect();
    let mut parts = Parts {
        accepting: JoinSet::new(),
        mailboxes: mailboxes.clone(),
        workers: Vec::new(),
        flusher: Arc::clone(&flusher),
        pool: Arc::clone(&disk),
        helpers: disk.start()?,
        _socket: socket,
    };
    parts.helpers.push(flusher.start(Arc::clone(&store))?);
    for (number, (mailbox, metrics)) in mailboxes.iter().zip(&metrics).enumerate() {
        parts.workers.push(worker::start(worker::Setup {
            number,
            mailbox: Arc::clone(mailbox),
            metrics: Arc::clone(metrics),
            store: Arc::clone(&store),
            flusher: Arc::clone(&flusher),
            pool: Arc::clone(&disk),
            runtime: tokio::runtime::Handle::current(),
            io_uring,
            cold_reads: config.cold_reads,
            mapped_reads: config.mapped_reads,
            piped_writes: config.piped_writes && store.takes_pipes(),
            short_slice: config.short_slice,
            poll_us: config.poll_us,
        })?);
    }

    let accept_metrics = Arc::new(AcceptMetrics::default());
    let desk = |mailbox: &Arc<Mailbox>| Desk {
        mailbox: Arc::clone(mailbox),
        load: Arc::new(AtomicUsize::new(0)),
    };
    let lobby = Arc::new(Lobby {
        volumes: Arc::clone(&volumes),
        desks: mailboxes.iter().map(desk).collect(),
        permits: Arc::new(Semaphore::new(config.connections_max)),
        hello_timeout: config.hello_timeout,
        metrics: Arc::clone(&accept_metrics),
        next_id: AtomicU64::new(1),
    });
    let silent = SilentList::new(config.silent_max);
    parts.accepting.spawn(accept_tcp(data, Arc::clone(&lobby), Arc::clone(&silent)));
    if let Some(listener) = unix {
        parts.accepting.spawn(accept_unix(listener, lobby, silent));
    }
    let api = admin::Api::new(Arc::clone(&volumes), metrics, accept_metrics, flusher);
    parts.accepting.spawn(async move {
        if let Err(error) = axum::serve(admin, admin::router(api)).await {
            tracing::error!(%error, "the admin API ended");
        }
    });
    if !admin_address.ip().is_loopback() {
        tracing::warn!(
            address = %admin_address,
            "the admin API has no authentication and is reachable from other hosts"
        );
    }
    Ok(Server {
        data: data_address,
        admin: admin_address,
        unix: config.listen_unix,
        volumes,
        parts,
    })
}

impl Server {
    /// What it serves.
    #[must_use]
    pub fn volumes(&self) -> &Arc<Volumes> {
        &self.volumes
    }

    /// Ends: no new connections, clients told, what was admitted is answered,
    /// everything durable.
    ///
    /// # Errors
    /// [`StopError`] when the disk fails or hangs.
    pub async fn stop(self) -> Result<(), StopError> {
        let Self { volumes, mut parts, .. } = self;
        parts.accepting.abort_all();
        while parts.accepting.join_next().await.is_some() {}
        for volume in volumes.list() {
            volume.publish(EventKind::GoingAway, 0);
        }
        for mailbox in &parts.mailboxes {
            mailbox.send(Message::Stop);
        }
        let last = tokio::task::spawn_blocking(move || {
            let joined = |threads: Vec<JoinHandle<()>>| {
                for thread in threads {
                    // A thread that panicked has said so.
                    let _ = thread.join();
                }
            };
            joined(parts.workers);
            parts.pool.stop();
            parts.flusher.stop();
            joined(parts.helpers);
            volumes.keep_all();
            volumes.store().sync()?;
            volumes.store().close()
        });
        match tokio::time::timeout(STOP_LIMIT, last).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(_)) | Err(_) => Err(StopError::Stuck),
        }
    }
}

async fn accept_tcp(listener: TcpListener, lobby: Arc<Lobby>, silent: Arc<SilentList>) {
    let next = async || {
        let (socket, peer) = listener.accept().await?;
        Ok((socket, peer.to_string()))
    };
    accept(next, lobby, silent).await;
}

async fn accept_unix(listener: UnixListener, lobby: Arc<Lobby>, silent: Arc<SilentList>) {
    let next = async || {
        let (socket, _) = listener.accept().await?;
        let pid = socket.peer_cred().ok().and_then(|cred| cred.pid());
        Ok((socket, pid.map_or_else(|| "unix".to_owned(), |pid| format!("unix pid {pid}"))))
    };
    accept(next, lobby, silent).await;
}

async fn accept<S, F>(next: impl Fn() -> F, lobby: Arc<Lobby>, silent: Arc<SilentList>)
where
    S: Socket + 'static,
    F: Future<Output = io::Result<(S, String)>>,
{
    loop {
        match next().await {
            Ok((socket, peer)) => {
                lobby.metrics.accepted.fetch_add(1, Ordering::Relaxed);
                let seat = silent.enter();
                let lobby = Arc::clone(&lobby);
                tokio::spawn(async move { lobby.greet(socket, peer, seat).await });
            }
            Err(error) => {
                static ACCEPT: Sometimes = Sometimes::new();
                ACCEPT.say(|missed| {
                    tracing::warn!(%error, missed, "a connection could not be accepted");
                });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn io_uring_works(store: &Store) -> bool {
    match worker::probe_io_uring(store) {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(%error, "io_uring cannot be used here; plain threads read instead");
            false
        }
    }
}

fn boot_id() -> io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes) | 1)
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("data", &self.data).finish_non_exhaustive()
    }
}
