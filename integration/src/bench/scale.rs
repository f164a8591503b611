//! What a request costs as the work grows: more queues, more volumes on a server, larger volumes; and the server's memory.
//!
//! The cost is the processor time of backends and server together, divided by the requests: its inverse is the requests
//! per second that a core can do. It is set against the first row of its group.

use crate::baton::{Backend, Storage};
use crate::bench::cpu::{hold_cpus_awake, pin_this_thread};
use crate::bench::load::{Job, Pattern, run};
use crate::bench::stack::fill_every;
use crate::blk::Request;
use crate::raw_frontend::{Options, RawFrontend};
use crate::workspace::TestDir;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

const QUEUES: [u16; 5] = [1, 2, 4, 8, 16];
const VOLUMES: [usize; 4] = [1, 4, 16, 64];
/// In MiB, up to 1 TiB.
const SIZES_MIB: [u64; 4] = [1, 1 << 10, 64 << 10, 1 << 20];
/// Requests in flight on each queue; with many volumes, on each volume.
const DEPTH: u16 = 32;
const DEPTH_OF_MANY: u16 = 8;
/// What is read, on all disks together: the first bytes of each. However many there are it is the same amount, or what
/// they cost would be the processor's cache, which holds what one reads and not what all do.
const SPAN_BYTES: u64 = 512 << 20;
/// The same of volumes of any size, in blocks as far apart as the volume's size allows: what the smallest one has.
const SCATTERED_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: usize = 4096;
/// Extents that get data for the server's memory per GiB mapped.
const MAPPED_MIB: u64 = 4 << 10;
/// How much dearer a request may be than in the first row.
const DEARER_MAX: f64 = 1.15;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// What grew: "queues", "volumes", "MiB".
    pub of: &'static str,
    /// To what.
    pub amount: u64,
    /// Processor time of backends and server per request, in µs; the median of the rounds.
    pub cpu_us: f64,
    /// The server's part of it.
    pub server_us: f64,
    /// Rounds in which others took more than 8 % of the CPUs.
    pub noisy: u32,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Scale {
    /// Random reads of 4 KiB.
    pub points: Vec<Point>,
    /// Measurements of each point.
    pub rounds: u32,
    /// Memory of the server (PSS) for each attached volume, in bytes.
    pub bytes_per_volume: f64,
    /// Memory of the server (PSS) for each GiB of extents that hold data, in bytes.
    pub bytes_per_gib: f64,
}

/// Measures; `progress` is told what is being done.
pub fn measure(rounds: u32, time: Duration, mut progress: impl FnMut(&str)) -> Result<Scale> {
    if rounds == 0 {
        bail!("nothing to measure: --rounds must be at least 1");
    }
    let _awake = hold_cpus_awake();
    let mut points = Vec::new();
    for queues in QUEUES {
        progress(&format!("{queues} queues"));
        let work = Work::of(1, queues, DEPTH, SPAN_BYTES);
        points.push(point("queues", queues.into(), work, rounds, time)?);
    }
    for disks in VOLUMES {
        progress(&format!("{disks} volumes"));
        let work = Work::of(disks, 1, DEPTH_OF_MANY, SPAN_BYTES / disks as u64);
        points.push(point("volumes", disks as u64, work, rounds, time)?);
    }
    for mib in SIZES_MIB {
        progress(&format!("a volume of {mib} MiB"));
        let stride_bytes = (mib << 20) / (SCATTERED_BYTES / BLOCK_BYTES as u64);
        let work = Work { stride_bytes, ..Work::of(1, 1, DEPTH, mib << 20) };
        points.push(point("MiB", mib, work, rounds, time)?);
    }
    progress("the server's memory");
    let (bytes_per_volume, bytes_per_gib) = memory()?;
    Ok(Scale { points, rounds, bytes_per_volume, bytes_per_gib })
}

/// The same load on each of some disks.
#[derive(Clone, Copy)]
struct Work {
    disks: usize,
    queues: u16,
    depth: u16,
    disk_bytes: u64,
    /// From one block that is read to the next.
    stride_bytes: u64,
}

impl Work {
    /// On whole disks.
    fn of(disks: usize, queues: u16, depth: u16, disk_bytes: u64) -> Self {
        Self { disks, queues, depth, disk_bytes, stride_bytes: BLOCK_BYTES as u64 }
    }

    fn fill(self, backend: &Backend) -> Result<()> {
        let side_by_side = self.stride_bytes == BLOCK_BYTES as u64;
        let (chunk, stride) =
            if side_by_side { (1 << 20, 1 << 20) } else { (BLOCK_BYTES, self.stride_bytes) };
        fill_every(&backend.socket, self.disk_bytes, chunk, stride)
    }
}

fn point(of: &'static str, amount: u64, work: Work, rounds: u32, time: Duration) -> Result<Point> {
    let dir = TestDir::in_memory("scale")?;
    // Processes have the affinity of the thread that starts them.
    pin_this_thread(1)?;
    let storage = Storage::start(dir.path(), &[])?;
    let backends = backends(dir.path(), &storage, work)?;
    pin_this_thread(0)?;
    for backend in &backends {
        work.fill(backend)?;
    }
    let mut pids: Vec<u32> = backends.iter().map(|backend| backend.daemon.pid()).collect();
    pids.push(storage.daemon.pid());
    let (mut all, mut servers, mut noisy) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds {
        let cost = round_of(&backends, &pids, work, time, round)?;
        all.push(cost.all_us);
        servers.push(cost.server_us);
        noisy += u32::from(cost.noisy);
    }
    Ok(Point { of, amount, cpu_us: median(all), server_us: median(servers), noisy })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn backends(dir: &Path, storage: &Storage, work: Work) -> Result<Vec<Backend>> {
    let queues = work.queues.to_string();
    let start = |n: usize| {
        let name = format!("vm{n}");
        storage.create(&name, work.disk_bytes)?;
        Backend::start(dir, &name, &storage.uri(&name, None), &["--num-queues", &queues])
    };
    (0..work.disks).map(start).collect()
}

/// Processor time per request in µs, and whether others took part in it.
struct Cost {
    all_us: f64,
    server_us: f64,
    noisy: bool,
}

/// The server is the last of the processes. All disks are busy from before the first is
/// measured until after the last: the processes' time is looked at once, by the first disk's job.
#[allow(clippy::cast_precision_loss, reason = "counts of requests of a short measurement")]
fn round_of(
    backends: &[Backend],
    pids: &[u32],
    work: Work,
    time: Duration,
    round: u32,
) -> Result<Cost> {
    let job = |n: usize, backend: &Backend| Job {
        socket: backend.socket.clone(),
        pattern: Pattern::RandRead,
        block_bytes: BLOCK_BYTES,
        depth: work.depth,
        queues: work.queues,
        thread_per_queue: false,
        warmup: time / 4,
        duration: time,
        verify: false,
        span_bytes: None,
        stride_bytes: Some(work.stride_bytes),
        dirty_log: false,
        seed: u64::from(round) << 16 | n as u64,
        pids: if n == 0 { pids.to_vec() } else { Vec::new() },
    };
    let outcomes: Result<Vec<_>> = std::thread::scope(|scope| {
        let jobs = backends.iter().enumerate().map(|(n, backend)| job(n, backend));
        let threads: Vec<_> = jobs.map(|job| scope.spawn(move || run(&job))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic in a load")).collect()
    });
    let outcomes = outcomes?;
    if outcomes.iter().any(|outcome| outcome.errors > 0) {
        bail!("the disk failed requests");
    }
    let usage = &outcomes[0].usage;
    // By rate: the disks' times are not quite the same ones.
    let iops: f64 = outcomes.iter().map(|outcome| outcome.iops).sum();
    let us = |seconds: f64| 1e6 * seconds / usage.seconds / iops;
    let server = usage.processes_s.last().context("there is a server")?;
    Ok(Cost {
        all_us: us(usage.processes_s.iter().sum()),
        server_us: us(*server),
        noisy: usage.is_noisy(),
    })
}

/// Bytes of the server's memory per attached volume, and per GiB that holds data.
#[allow(clippy::cast_precision_loss, reason = "sizes of memory")]
fn memory() -> Result<(f64, f64)> {
    let dir = TestDir::new("scale-memory")?;
    let storage = Storage::start(dir.path(), &[])?;
    let pss = || storage.daemon.pss_bytes().map(|bytes| bytes as f64);
    let work = Work::of(64, 1, 1, MAPPED_MIB << 20);
    let one = backends(dir.path(), &storage, Work { disks: 1, ..work })?;
    let mut guest = RawFrontend::connect(
        &one[0].socket,
        Options { memory_bytes: 2 << 20, ..Options::default() },
    )?;
    let before = pss()?;
    for mib in 0..MAPPED_MIB {
        let queue = guest.queue(0);
        queue.submit(&Request::Write { sector: mib << 11, data: &[1; 512] })?;
        queue.kick()?;
        let done = queue.wait_completion(Duration::from_secs(20))?.context("no answer")?;
        done.ok().context("mapping an extent")?;
    }
    let per_gib = (pss()? - before) / (MAPPED_MIB as f64 / 1024.0);
    drop((guest, one));
    let before = pss()?;
    let more: Vec<Backend> = (1..work.disks)
        .map(|n| {
            let name = format!("vm{n}");
            storage.create(&name, work.disk_bytes)?;
            Backend::start(dir.path(), &name, &storage.uri(&name, None), &["--num-queues", "1"])
        })
        .collect::<Result<_>>()?;
    let per_volume = (pss()? - before) / more.len() as f64;
    Ok((per_volume, per_gib))
}

/// For people, and for docs/performance.md.
#[must_use]
pub fn table(scale: &Scale) -> String {
    let mut text = format!(
        "Random reads of 4 KiB, {} rounds each, backends and server on one CPU and the front-end on the other.\n\n\
         | work | CPU per request, backends and server | against the first | target | the server's part | against the first |\n|---|---|---|---|---|---|\n",
        scale.rounds
    );
    let mut first: Option<&Point> = None;
    for point in &scale.points {
        let base = first.filter(|first| first.of == point.of).unwrap_or(point);
        first = Some(base);
        let noisy =
            if point.noisy > 0 { format!(" ({} noisy)", point.noisy) } else { String::new() };
        text.push_str(&format!(
            "| {} {} | {:.2} us{noisy} | {:.2} | at most {DEARER_MAX} | {:.2} us | {:.2} |\n",
            point.amount,
            point.of,
            point.cpu_us,
            point.cpu_us / base.cpu_us,
            point.server_us,
            point.server_us / base.server_us
        ));
    }
    text.push_str(&format!(
        "\nMemory of the server (PSS): {:.0} KiB for each attached volume, {:.0} KiB for each GiB of extents with data.\n",
        scale.bytes_per_volume / 1024.0,
        scale.bytes_per_gib / 1024.0
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_is_set_against_its_first() {
        let point = |of, amount, cpu_us: f64, noisy| Point {
            of,
            amount,
            cpu_us,
            server_us: cpu_us.sqrt(),
            noisy,
        };
        let points = vec![
            point("queues", 1, 4.0, 0),
            point("queues", 2, 5.0, 1),
            point("volumes", 1, 2.0, 0),
            point("volumes", 4, 1.0, 0),
        ];
        let scale = Scale { points, rounds: 3, bytes_per_volume: 2048.0, bytes_per_gib: 1024.0 };
        let text = table(&scale);
        for line in [
            "| 1 queues | 4.00 us | 1.00 |",
            "| 2 queues | 5.00 us (1 noisy) | 1.25 | at most 1.15 | 2.24 us | 1.12 |",
            "| 1 volumes | 2.00 us | 1.00 |",
            "| 4 volumes | 1.00 us | 0.50 |",
            "2 KiB for each attached volume, 1 KiB for each GiB",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
