//! Answers of the server as tables for people.
//!
//! Fields this version does not know are left out, fields it misses are shown as `-`.

use std::collections::BTreeMap;

use baton_protocol::ByteSize;
use serde_json::Value;

/// The volumes of a server, one a line.
pub(crate) fn list(answer: &Value) -> String {
    let header = ["NAME", "SIZE", "ALLOCATED", "EPOCH", "PHASE", "OWNER"].map(str::to_owned);
    let rows = items(&answer["volumes"]).iter().map(|volume| {
        let access = &volume["access"];
        [
            text(&volume["name"]),
            size(&volume["size_bytes"]),
            size(&volume["allocated_bytes"]),
            text(&access["epoch"]),
            text(&access["phase"]),
            text(&access["owner"]),
        ]
    });
    table(std::iter::once(header).chain(rows), [Left, Right, Right, Right, Left, Left])
}

/// One volume, one fact a line, then who is connected.
pub(crate) fn show(volume: &Value) -> String {
    let access = &volume["access"];
    let mut rows = vec![
        ["name".to_owned(), text(&volume["name"])],
        ["id".to_owned(), text(&volume["id"])],
        ["size".to_owned(), with_bytes(&volume["size_bytes"])],
        ["allocated".to_owned(), with_bytes(&volume["allocated_bytes"])],
        ["phase".to_owned(), phase(access)],
        ["epoch".to_owned(), text(&access["epoch"])],
        ["owner".to_owned(), text(&access["owner"])],
    ];
    if !access["barred"].is_null() {
        let barred = format!("{} (fenced; another must claim first)", text(&access["barred"]));
        rows.push(["barred".to_owned(), barred]);
    }
    rows.extend(handoff(&access["handoff"]));
    let facts = table(rows, [Left, Left]);
    let sessions = sessions(items(&volume["sessions"]));
    if sessions.is_empty() {
        return format!("{facts}nobody is connected\n");
    }
    let header = ["SESSION", "MODE", "EPOCH", "CONNECTIONS", "OWNER"].map(str::to_owned);
    let rows = std::iter::once(header).chain(sessions);
    format!("{facts}\n{}", table(rows, [Left, Left, Right, Right, Left]))
}

/// The phase, and what it means for who may write.
fn phase(access: &Value) -> String {
    let handoff = &access["handoff"];
    let meaning = match access["phase"].as_str() {
        Some("free") => "nobody owns it",
        Some("owned") if access["session"].is_null() => "its owner has not come yet",
        Some("owned") => "its owner may write",
        Some("armed") => "a handoff is planned; the source goes on",
        Some("sealed") if handoff["abdicated"] == true => {
            "the source has stopped and the destination has given up; nobody may write"
        }
        Some("sealed") => "the source has stopped; nobody may write until one side has won",
        Some("active") => "the destination has won and may write",
        Some("reclaimed") => "the source has won and may write",
        Some("frozen") if handoff["wanted_back"] == true => {
            "the server restarted during the handoff; the source wants it back, the destination must activate or abdicate"
        }
        Some("frozen") => {
            "the server restarted during the handoff; nobody may write until a side says how it stood"
        }
        _ => return text(&access["phase"]),
    };
    format!("{} ({meaning})", text(&access["phase"]))
}

/// A handoff under way.
fn handoff(handoff: &Value) -> Vec<[String; 2]> {
    if handoff.is_null() {
        return Vec::new();
    }
    let field = |name: &str| text(&handoff[name]);
    let members = &handoff["members"]["count"];
    let volumes = match members.as_u64() {
        Some(1) => "alone".to_owned(),
        _ => format!("with all {} volumes of the VM", text(members)),
    };
    vec![
        [
            "handoff".to_owned(),
            format!("{} (attempt {}, {} mode)", field("id"), field("attempt"), field("mode")),
        ],
        ["moves".to_owned(), format!("VM {}, {volumes}", field("vm"))],
        ["from".to_owned(), field("from")],
        ["to".to_owned(), field("to")],
        ["anchor".to_owned(), format!("volume {}", field("anchor"))],
    ]
}

/// The server lists connections, one for each queue; people think in clients.
fn sessions(connections: &[Value]) -> Vec<[String; 5]> {
    let mut clients: BTreeMap<[String; 4], usize> = BTreeMap::new();
    for connection in connections {
        let client = ["session", "mode", "epoch", "owner"].map(|field| text(&connection[field]));
        *clients.entry(client).or_default() += 1;
    }
    let row = |([session, mode, epoch, owner], count): ([String; 4], usize)| {
        [session, mode, epoch, count.to_string(), owner]
    };
    clients.into_iter().map(row).collect()
}

pub(crate) fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// A size in bytes as people write it.
pub(crate) fn size(bytes: &Value) -> String {
    bytes.as_u64().map_or_else(|| text(bytes), human)
}

/// Exact where one unit says it, else with one decimal of the largest unit: `10G`, `1.5G`.
fn human(bytes: u64) -> String {
    let exact = ByteSize(bytes).to_string();
    if exact.len() <= 5 {
        return exact;
    }
    let (shift, unit) = [(40, "T"), (30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes >> shift > 0)
        .unwrap_or((0, ""));
    // Tenths, rounded down: a volume never looks larger than it is.
    let tenths = (u128::from(bytes) * 10) >> shift;
    format!("{}.{}{unit}", tenths / 10, tenths % 10)
}

fn with_bytes(bytes: &Value) -> String {
    match bytes.as_u64() {
        Some(number) => format!("{} ({number} bytes)", human(number)),
        None => text(bytes),
    }
}

/// A field, with what a terminal would take as a command replaced: owner names come from the network.
pub(crate) fn text(value: &Value) -> String {
    let raw = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    raw.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Of a column.
#[derive(Clone, Copy)]
pub(crate) enum Align {
    Left,
    Right,
}
use Align::{Left, Right};

pub(crate) fn table<const N: usize>(
    rows: impl IntoIterator<Item = [String; N]>,
    align: [Align; N],
) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut lines = String::new();
    for row in &rows {
        let cells = row.iter().zip(align).zip(widths).map(|((cell, align), width)| match align {
            Left => format!("{cell:<width$}"),
            Right => format!("{cell:>width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_short_and_never_too_large() {
        for (bytes, text) in [
            (0, "0"),
            (512, "512"),
            (1 << 20, "1M"),
            (10 << 30, "10G"),
            (1536 << 20, "1536M"),
            ((10 << 30) + 512, "10.0G"),
            ((1 << 40) - 512, "1023.9G"),
            (u64::MAX, "16777215.9T"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn a_list_is_aligned() {
        let answer = json!({"volumes": [
            {"name": "a", "size_bytes": 10_u64 << 30, "allocated_bytes": 0, "access": {"epoch": 12, "phase": "armed", "owner": "host:vm"}},
            {"name": "longer", "size_bytes": 1 << 20, "allocated_bytes": 1 << 20, "access": {"epoch": 0, "phase": "free", "owner": null}},
        ]});
        assert_eq!(
            list(&answer),
            "NAME    SIZE  ALLOCATED  EPOCH  PHASE  OWNER\n\
             a        10G          0     12  armed  host:vm\n\
             longer    1M         1M      0  free   -\n"
        );
    }

    #[test]
    fn connections_are_counted_by_client() {
        let connection = |session: &str, queue: &str, epoch: u64| json!({"session": session, "queue": queue, "mode": "owner", "epoch": epoch, "owner": "h:vm", "peer": "10.0.0.1:5"});
        let volume = json!({
            "name": "v", "id": "00ff", "size_bytes": 1 << 30, "allocated_bytes": 4096,
            "access": {"epoch": 2, "phase": "owned", "owner": "h:vm", "session": "b", "barred": null, "handoff": null},
            "sessions": [connection("b", "control", 2), connection("b", "0", 2), connection("a", "0", 1)],
        });
        assert_eq!(
            show(&volume),
            "name       v\n\
             id         00ff\n\
             size       1G (1073741824 bytes)\n\
             allocated  4K (4096 bytes)\n\
             phase      owned (its owner may write)\n\
             epoch      2\n\
             owner      h:vm\n\
             \n\
             SESSION  MODE   EPOCH  CONNECTIONS  OWNER\n\
             a        owner      1            1  h:vm\n\
             b        owner      2            2  h:vm\n"
        );
    }

    /// Every phase says who may write, and a handoff says what moves where.
    #[test]
    fn a_handoff_is_told_in_plain_words() {
        let handoff = json!({
            "id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "attempt": 2, "vm": "web1", "from": "host-a/web1", "to": "host-b/web1",
            "anchor": "00aa", "members": {"count": 3, "hash": "0"}, "mode": "fast",
            "abdicated": false, "wanted_back": false,
        });
        let volume = |phase: &str, handoff: &Value| {
            json!({"name": "v", "sessions": [],
                "access": {"epoch": 1, "phase": phase, "owner": "host-a/web1", "session": "0a", "barred": null, "handoff": handoff}})
        };
        let shown = show(&volume("sealed", &handoff));
        for line in [
            "phase      sealed (the source has stopped; nobody may write until one side has won)",
            "handoff    01ARZ3NDEKTSV4RRFFQ69G5FAV (attempt 2, fast mode)",
            "moves      VM web1, with all 3 volumes of the VM",
            "from       host-a/web1",
            "to         host-b/web1",
            "anchor     volume 00aa",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
        }
        let mut meanings: Vec<String> = ["armed", "sealed", "active", "reclaimed", "frozen"]
            .iter()
            .map(|name| phase(&volume(name, &handoff)["access"]))
            .collect();
        for (name, flag) in [("sealed", "abdicated"), ("frozen", "wanted_back")] {
            let mut handoff = handoff.clone();
            handoff[flag] = json!(true);
            meanings.push(phase(&volume(name, &handoff)["access"]));
        }
        for (n, meaning) in meanings.iter().enumerate() {
            assert!(meaning.contains(" ("), "{meaning}");
            assert!(!meanings[..n].contains(meaning), "{meaning}");
        }
        assert_eq!(phase(&json!({"phase": "of the future"})), "of the future");
    }

    #[test]
    fn a_name_from_the_network_cannot_steer_the_terminal() {
        assert_eq!(text(&json!("a\u{1b}[2Jb\n")), "a?[2Jb?");
    }
}
