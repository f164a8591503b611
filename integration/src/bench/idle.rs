//! What backends with attached guests that do nothing cost a host.

use crate::baton::{Backend, Storage};
use crate::daemon::Daemon;
use crate::raw_frontend::{Options, RawFrontend};
use crate::workspace::TestDir;
use anyhow::{Context, Result};
use serde::Serialize;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 1 << 30;

/// Requests of a guest before it falls idle: the backend has the memory of one that was used.
const REQUESTS_BEFORE: u64 = 200;

/// Until what follows a request has ended: within 10 s a client looks once more whether a silent server is there.
const SETTLE: Duration = Duration::from_secs(13);

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    /// Backends, each with its own volume, its own guest, and this many queues.
    pub backends: usize,
    /// Queues of each.
    pub queues: u16,
    /// How long nobody did anything, in seconds.
    pub seconds: f64,
    /// CPU time of all backends in that time, in percent of one core.
    pub backends_cpu_pct: f64,
    /// CPU time of the storage server, in percent of one core.
    pub server_cpu_pct: f64,
    /// Times that a thread of a backend ran in that time, all together.
    pub backends_wakeups: u64,
    /// Proportional set size of a backend in bytes: shared pages are divided among their users. Median and largest.
    pub backend_pss_bytes: [u64; 2],
    /// Of the server, in bytes.
    pub server_pss_bytes: u64,
}

/// Starts a server and `backends` backends, lets a guest work at each for a moment, and watches them do nothing.
pub fn measure(backends: usize, queues: u16, time: Duration) -> Result<Idle> {
    let dir = TestDir::in_memory("idle")?;
    let storage = Storage::start(dir.path(), &[])?;
    let mut all = Vec::new();
    let queues_text = queues.to_string();
    for number in 0..backends {
        let name = format!("vm{number}");
        storage.create(&name, VOLUME_BYTES)?;
        let more = ["--num-queues", &queues_text];
        let backend = Backend::start(dir.path(), &name, &storage.uri(&name, None), &more)?;
        let options = Options { queues, memory_bytes: 2 << 20, ..Options::default() };
        let mut guest = RawFrontend::connect(&backend.socket, options)?;
        for at in 0..REQUESTS_BEFORE {
            let queue = guest.queue(u16::try_from(at % u64::from(queues))?);
            queue.write(at * 8, &[1; 4096]).with_context(|| format!("the guest of {name}"))?;
        }
        all.push((backend, guest));
    }
    std::thread::sleep(SETTLE);
    let cpu = |daemons: &mut dyn Iterator<Item = &Daemon>| -> Result<Duration> {
        daemons.map(|daemon| daemon.cpu_time()).sum()
    };
    let wakeups = || all.iter().map(|(backend, _)| backend.daemon.context_switches()).sum();
    let started = Instant::now();
    let before = cpu(&mut all.iter().map(|(backend, _)| &backend.daemon))?;
    let server_before = storage.daemon.cpu_time()?;
    let wakeups_before: Result<u64> = wakeups();
    std::thread::sleep(time);
    let seconds = started.elapsed().as_secs_f64();
    let after = cpu(&mut all.iter().map(|(backend, _)| &backend.daemon))?;
    let server_after = storage.daemon.cpu_time()?;
    let wakeups_after: Result<u64> = wakeups();
    let pct = |before: Duration, after: Duration| (after - before).as_secs_f64() / seconds * 100.0;
    let mut pss = Vec::new();
    for (backend, _) in &all {
        pss.push(backend.daemon.pss_bytes()?);
    }
    pss.sort_unstable();
    Ok(Idle {
        backends,
        queues,
        seconds,
        backends_cpu_pct: pct(before, after),
        server_cpu_pct: pct(server_before, server_after),
        backends_wakeups: wakeups_after? - wakeups_before?,
        backend_pss_bytes: [
            pss.get(pss.len() / 2).copied().unwrap_or(0),
            pss.last().copied().unwrap_or(0),
        ],
        server_pss_bytes: storage.daemon.pss_bytes()?,
    })
}

/// The measurement, for people.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "for people")]
pub fn table(idle: &Idle) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let Idle { backends, queues, seconds, backends_cpu_pct, server_cpu_pct, .. } = idle;
    let [median, largest] = idle.backend_pss_bytes;
    format!(
        "{backends} backends with an attached, idle guest of {queues} queues each, {seconds:.0} s:\n\n\
         | what | measured | target |\n|---|---|---|\n\
         | CPU of all backends, of one core | {backends_cpu_pct:.4} % | 0.1 % |\n\
         | times a thread of a backend ran | {} | |\n\
         | memory of a backend (PSS), median and largest | {:.2} and {:.2} MB | 10 MB |\n\
         | CPU of the server, of one core | {server_cpu_pct:.4} % | |\n\
         | memory of the server (PSS), and for each volume | {:.1} and {:.3} MB | |\n",
        idle.backends_wakeups,
        mb(median),
        mb(largest),
        mb(idle.server_pss_bytes),
        mb(idle.server_pss_bytes) / (*backends).max(1) as f64,
    )
}
