//! What the hosts' agents did by themselves, taken into the coordinator's own log
//! of events: one place to watch, which survives restarts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
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
    seq: u64,
    at_unix_us: u64,
    kind: String,
    vm: String,
    detail: String,
    #[serde(default)]
    data: Value,
}

/// What has been taken of an agent: up to this number, of this start of it. No clock is asked, which may be set back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    boot: String,
    seq: u64,
}

/// Listens to every agent for as long as the coordinator lives.
pub(super) fn listen(core: &Arc<Core>) {
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let limit = usize::try_from(EVENTS_MAX).unwrap_or(usize::MAX);
        let log = core.journal.events_after(0, limit).await;
        let mut taken = taken(&log.map(|(events, _)| events).unwrap_or_default());
        for agent in core.agents.iter() {
            let cursor = taken.remove(&agent.host.name).unwrap_or_default();
            tokio::spawn(follow(Arc::clone(&core), agent.clone(), cursor));
        }
    });
}

/// What the log has of each host already: an agent tells again what it has kept when its coordinator is started again.
fn taken(log: &[Event]) -> HashMap<String, Cursor> {
    let cursor = |event: &Event| {
        let host = event.data["host"].as_str()?.to_owned();
        Some((host, Cursor::deserialize(&event.data["agent"]).ok()?))
    };
    // The last of each host: the log has them in the order in which they were taken.
    log.iter().filter_map(cursor).collect()
}

async fn follow(core: Arc<Core>, agent: Agent, mut cursor: Cursor) {
    loop {
        let Ok(answer) = agent.events(&cursor.boot, cursor.seq, WAIT).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(told) = Told::deserialize(answer) else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let host = &agent.host.name;
        let latest = Cursor { boot: told.boot, seq: told.latest };
        let known = told.events.into_iter().filter(|tiding| KINDS.contains(&tiding.kind.as_str()));
        let events: Vec<Event> = known.map(|tiding| event(host, &latest.boot, tiding)).collect();
        for event in &events {
            let (subject, detail) = (&event.subject, &event.data["detail"]);
            tracing::warn!(host, subject, %detail, "an agent acted by itself");
        }
        if let Err(error) = write(&core, &events, &mut cursor).await {
            // What is not in it is asked for again.
            tracing::warn!(%error, host, "what an agent did is not in the journal");
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        cursor = latest;
    }
}

/// A few at a time: a transaction of etcd has a limit.
async fn write(core: &Core, events: &[Event], cursor: &mut Cursor) -> Result<(), JournalError> {
    for events in events.chunks(WRITTEN_MAX) {
        let change = Change { events: events.to_vec(), ..Change::default() };
        core.journal.write(change).await?;
        *cursor = taken(events).into_values().next().unwrap_or_default();
    }
    Ok(())
}

fn event(host: &str, boot: &str, tiding: Tiding) -> Event {
    let Tiding { seq, at_unix_us, kind, vm, detail, data } = tiding;
    let mut data = if data.is_object() { data } else { json!({}) };
    // The name that this coordinator knows the host by.
    data["host"] = host.into();
    data["vm"] = vm.as_str().into();
    data["detail"] = detail.into();
    data["agent"] = json!(Cursor { boot: boot.to_owned(), seq });
    Event { seq: 0, kind, subject: format!("vms/{vm}"), at_unix_us, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(host: &str, boot: &str, seq: u64, at_unix_us: u64) -> Event {
        let (kind, detail) = (KINDS[0].to_owned(), "ended".to_owned());
        let vm = "web".to_owned();
        event(host, boot, Tiding { seq, at_unix_us, kind, vm, detail, data: Value::Null })
    }

    #[test]
    fn what_was_taken_last_counts_whatever_the_clocks_say() {
        let of_others = Event { data: json!({"host": "host-c"}), ..told("", "", 0, 0) };
        let log = [
            told("host-a", "first", 7, 9_000_000),
            told("host-b", "only", 3, 5),
            told("host-a", "second", 1, 2_000_000),
            told("host-a", "second", 2, 1_000_000),
            of_others,
        ];
        let taken = taken(&log);
        let cursor = |boot: &str, seq| Some(Cursor { boot: boot.to_owned(), seq });
        assert_eq!(taken.get("host-a").cloned(), cursor("second", 2));
        assert_eq!(taken.get("host-b").cloned(), cursor("only", 3));
        assert_eq!(taken.len(), 2, "{taken:?}");
    }
}
