//! Single messages, one at a time.

use super::{Figures, id, us};
use crate::handoff::Fleet;
use crate::raw_wire::{Ask, Control, Mode};
use anyhow::Result;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Nothing comes for so long before a message of which it is said.
const SILENCE: Duration = Duration::from_millis(20);

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
        let id = id(&attempt.id)?;
        source.ask(id, Ask::Seal)?;
        out.reclaim.push(timed(|| source.ask(id, Ask::Reclaim).map(drop))?);
        fleet.settle(&attempt)?;
        let waited = |why| server.metric_of("baton_access_wait_seconds_total", "for", why);
        let (store, drain) = (waited("store")?, waited("drain")?);
        out.fence.push(timed(|| server.fence(volume, Some("host-a/vm")).map(drop))?);
        out.fence_store.push((waited("store")? - store) * 1e6);
        out.fence_drain.push((waited("drain")? - drain) * 1e6);
    }
    Ok(out)
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(us(start.elapsed()))
}
