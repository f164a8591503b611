//! Single messages, one at a time.

use super::moves::{self, start_ring};
use super::{Figures, PATIENCE, us};
use crate::blk::Request;
use crate::handoff::{Begin, Fleet, Host};
use crate::raw_wire::{Ask, Control, Mode};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Nothing comes for so long before a message of which it is said.
const SILENCE: Duration = Duration::from_millis(20);

/// Of a writer who is fenced, while the first is answered and the others are under way.
const WRITES: u64 = 8;
const WRITE_BYTES: usize = 128 << 10;

/// What single messages cost on one server; times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    /// PING and its answer.
    pub rtt: Figures,
    /// The same after [`SILENCE`], as the messages of a handoff come.
    pub rtt_idle: Figures,
    /// An overwrite of 4 KiB and fdatasync, where the server's data is.
    pub sync: Figures,
    /// FENCE of an owner, over HTTP with a connection of its own.
    pub fence: Figures,
    /// Of that, the wait for the record to be durable, as the server counted it.
    pub fence_store: Figures,
    /// Of that, the wait for requests inside the gate.
    pub fence_drain: Figures,
    /// FENCE of an owner who is writing.
    pub fence_busy: Figures,
    /// Of that, the wait for requests inside the gate.
    pub fence_busy_drain: Figures,
    /// RECLAIM after a seal.
    pub reclaim: Figures,
}

/// Measures them on the server of one volume.
pub fn messages(fleet: &Fleet, dir: &Path, runs: usize) -> Result<Messages> {
    let (server, volume) = (&fleet.servers[0], fleet.members[0].volume.as_str());
    let mut out = Messages::default();
    let file = fs::File::create(dir.join("sync"))?;
    file.write_all_at(&[1; 4096], 0)?;
    file.sync_all()?;
    let address = fleet.through.first().copied().unwrap_or(server.data_address());
    let connect = |session, mode| Control::connect(address, volume, "host-a/vm", session, mode);
    let mut standby = connect(u64::MAX, Mode::Standby)?;
    for run in 0..runs {
        out.rtt.push(timed(|| standby.ping())?);
        thread::sleep(SILENCE);
        out.rtt_idle.push(timed(|| standby.ping())?);
        out.sync.push(timed(|| Ok(file.write_all_at(&[2; 4096], 0).and(file.sync_data())?))?);
        let mut source = connect(run as u64 + 1, Mode::Owner)?;
        let attempt = fleet.arm("host-a/vm", "host-b/vm")?;
        let id = attempt.number()?;
        source.ask(id, Ask::Seal)?;
        out.reclaim.push(timed(|| source.ask(id, Ask::Reclaim).map(drop))?);
        fleet.settle(&attempt)?;
        let waited = |why| server.metric_of("baton_access_wait_seconds_total", "for", why);
        let (store, drain) = (waited("store")?, waited("drain")?);
        out.fence.push(timed(|| server.fence(volume, Some("host-a/vm")).map(drop))?);
        out.fence_store.push((waited("store")? - store) * 1e6);
        out.fence_drain.push((waited("drain")? - drain) * 1e6);
    }
    for run in 0..runs {
        let owner = format!("host-{run}/vm");
        server.fence(volume, Some(&owner))?;
        let host = Host::start(dir, &format!("writer-{run}"), &owner, fleet, Begin::Claim)?;
        host.wait_standing("serving")?;
        let mut disk = moves::connect(&host)?.pop().context("the VM has a disk")?;
        start_ring(&mut disk)?;
        for n in 0..WRITES {
            disk.queue(0).submit(&Request::Write { sector: 256 * n, data: &[3; WRITE_BYTES] })?;
        }
        disk.queue(0).kick()?;
        // They come to the server one after another.
        disk.queue(0).wait_completion(PATIENCE)?.context("no answer to a write")?.ok()?;
        let drain = server.metric_of("baton_access_wait_seconds_total", "for", "drain")?;
        out.fence_busy.push(timed(|| server.fence(volume, Some("nobody/vm")).map(drop))?);
        let waited = server.metric_of("baton_access_wait_seconds_total", "for", "drain")? - drain;
        out.fence_busy_drain.push(waited * 1e6);
    }
    Ok(out)
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(us(start.elapsed()))
}
