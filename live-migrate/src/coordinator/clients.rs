//! Processes that had a volume before, where the storage keeps each of them out by name:
//! put on its list once a handoff is decided, and taken off when they are proven dead.
//! Both are in the journal.

use baton_remote_client::Fence;

use super::core::{Core, unix_us};
use super::journal::{Change, Event};
use super::plan::{self, Member, Row};
use super::storages::StorageError;

/// The volume's earlier processes can do nothing any more: by now the storage knows
/// that by itself, or each of them is kept out by name, for good.
pub(super) async fn keep_former_out(
    core: &Core,
    row: &Row,
    member: &Member,
) -> Result<(), StorageError> {
    let server = core.storages.of(member)?;
    let clients = server.keep_former_out(&member.volume).await?;
    note(core, row, "baton.clients.fenced", member, clients).await;
    Ok(())
}

/// The process of a source that has lost, and whose agent has seen its end, is dead: what
/// keeps it out is not needed any more. A destination that lost never had the image; what
/// is noted of that host is of an earlier process, whose end this is not.
pub(super) async fn bury(core: &Core, row: &Row, host: &str) {
    if row.fence() != Fence::Blocklist || host != row.from {
        return;
    }
    let owner = plan::owner(host, &row.vm);
    for member in &row.members {
        let buried = match core.storages.of(member) {
            Ok(server) => server.bury(&member.volume, &owner).await,
            Err(error) => Err(error),
        };
        match buried {
            Ok(clients) => note(core, row, "baton.clients.dead", member, clients).await,
            // It costs a line of the cluster's list, and nothing else.
            Err(error) => tracing::warn!(
                volume = member.volume, owner, %error,
                "the entries of dead processes stay on the blocklist"
            ),
        }
    }
}

async fn note(core: &Core, row: &Row, kind: &str, member: &Member, clients: Vec<String>) {
    if clients.is_empty() {
        return;
    }
    tracing::info!(volume = member.volume, ?clients, kind, "Ceph clients");
    let event = Event {
        seq: 0,
        kind: kind.to_owned(),
        subject: format!("vms/{}/handoffs/{}", row.vm, row.id),
        at_unix_us: unix_us(),
        data: serde_json::json!({
            "volume": member.volume, "storage": member.storage, "clients": clients,
        }),
    };
    let change = Change { events: vec![event], ..Change::default() };
    if let Err(error) = core.journal.write(change).await {
        tracing::error!(%error, "what was done to Ceph's blocklist is not in the journal");
    }
}
