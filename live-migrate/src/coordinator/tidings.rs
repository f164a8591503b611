//! What the hosts' agents did by themselves, taken into the coordinator's own log
//! of events: one place to watch, which survives restarts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::agents::Agent;
use super::core::Core;
use super::journal::{Change, EVENTS_MAX, Event, JournalError};

/// One long poll.
const WAIT: Duration = Duration::from_secs(20);
/// Events of one write.
const WRITTEN_MAX: usize = 64;
/// After an agent that does not answer.
const PAUSE: Duration = Duration::from_secs(5);
/// Kinds that are taken over; others are of an agent of the future.
const KINDS: [&str; 2] = ["baton.vm.stopped", "baton.vm.not-stopped"];

/// An agent's answer.
#[derive(Debug, Deserialize)]
struct Told {
    boot: String,
    latest: u64,
    events: Vec<Tiding>,
}

#[derive(Debug, Deserialize)]
struct Tiding {
    at_unix_us: u64,
    kind: String,
    vm: String,
    detail: String,
    #[serde(default)]
    data: Value,
}

/// Listens to every agent for as long as the coordinator lives.
pub(super) fn listen(core: &Arc<Core>) {
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let known = known(&core).await;
        for agent in core.agents.iter() {
            let since = known.get(&agent.host.name).copied().unwrap_or(0);
            tokio::spawn(follow(Arc::clone(&core), agent.clone(), since));
        }
    });
}

/// Time of the last event of each host that is in the log already: an agent tells
/// again what it has kept when its coordinator is started again.
async fn known(core: &Core) -> HashMap<String, u64> {
    let limit = usize::try_from(EVENTS_MAX).unwrap_or(usize::MAX);
    let read = core.journal.events_after(0, limit).await;
    let mut last: HashMap<String, u64> = HashMap::new();
    for event in read.map(|(events, _)| events).unwrap_or_default() {
        if KINDS.contains(&event.kind.as_str())
            && let Some(host) = event.data["host"].as_str()
        {
            let at = last.entry(host.to_owned()).or_default();
            *at = event.at_unix_us.max(*at);
        }
    }
    last
}

async fn follow(core: Arc<Core>, agent: Agent, mut taken_until: u64) {
    let (mut boot, mut since) = (String::new(), 0);
    loop {
        let Ok(answer) = agent.events(&boot, since, WAIT).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(told) = serde_json::from_value::<Told>(answer) else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let new = |tiding: &Tiding| {
            tiding.at_unix_us > taken_until && KINDS.contains(&tiding.kind.as_str())
        };
        let host = &agent.host.name;
        let events: Vec<Event> =
            told.events.into_iter().filter(new).map(|tiding| event(host, tiding)).collect();
        if !events.is_empty() {
            for event in &events {
                let (subject, detail) = (&event.subject, &event.data["detail"]);
                tracing::warn!(host, subject, %detail, "an agent acted by itself");
            }
            if let Err(error) = write(&core, events, &mut taken_until).await {
                // Asked for again.
                tracing::warn!(%error, host, "what an agent did is not in the journal");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        }
        (boot, since) = (told.boot, told.latest);
    }
}

/// A few at a time: a transaction of etcd has a limit.
async fn write(core: &Core, events: Vec<Event>, taken_until: &mut u64) -> Result<(), JournalError> {
    for events in events.chunks(WRITTEN_MAX) {
        let last = events.iter().map(|event| event.at_unix_us).max().unwrap_or(0);
        let change = Change { events: events.to_vec(), ..Change::default() };
        core.journal.write(change).await?;
        *taken_until = last.max(*taken_until);
    }
    Ok(())
}

fn event(host: &str, tiding: Tiding) -> Event {
    let Tiding { at_unix_us, kind, vm, detail, data } = tiding;
    let mut data = if data.is_object() { data } else { json!({}) };
    // The name that this coordinator knows the host by.
    data["host"] = host.into();
    data["vm"] = vm.as_str().into();
    data["detail"] = detail.into();
    Event { seq: 0, kind, subject: format!("vms/{vm}"), at_unix_us, data }
}
