//! VMs and handoffs as text for people.

use serde_json::Value;

use crate::view::{Align::Left, Align::Right, items, table, text};

/// VMs, one line for each host that knows one.
pub(crate) fn vms(answer: &Value) -> String {
    let header = ["VM", "DISKS", "HOST", "BACKEND", "STARTED AS", "HANDOFF"].map(str::to_owned);
    let mut rows = vec![header];
    for vm in items(&answer["vms"]) {
        let handoff = match &vm["handoff"] {
            Value::Null => "-".to_owned(),
            handoff => format!("{} {}", text(&handoff["state"]), text(&handoff["id"])),
        };
        let hosts = items(&vm["hosts"]);
        let row = |host: &Value| {
            [&vm["name"], &vm["disks"], &host["host"], &host["backend"], &host["role"]].map(text)
        };
        let row = |host: &Value| {
            let [name, disks, host, backend, role] = row(host);
            [name, disks, host, backend, role, handoff.clone()]
        };
        if hosts.is_empty() {
            rows.push(row(&Value::Null));
        }
        rows.extend(hosts.iter().map(row));
    }
    let mut out = table(rows, [Left, Right, Left, Left, Left, Left]);
    for silent in items(&answer["unreachable"]) {
        out.push_str(&format!(
            "{} does not answer: {}\n",
            text(&silent["host"]),
            text(&silent["detail"])
        ));
    }
    out
}

/// Coordinators, one line each.
pub(crate) fn coordinators(answer: &Value) -> String {
    let header = ["ADDRESS", "NAME", "ROLE", "TERM", "LEADER"].map(str::to_owned);
    let (mut rows, mut troubles) = (vec![header], String::new());
    for one in items(&answer["coordinators"]) {
        let address = text(&one["address"]);
        if let Some(trouble) = one["trouble"].as_str() {
            troubles.push_str(&format!("{address}: {}\n", text(&trouble.into())));
        }
        let leader = &one["leader"]["name"];
        let [name, role, term, leader] =
            [&one["name"], &one["role"], &one["term"], leader].map(text);
        rows.push([address, name, role, term, leader]);
    }
    table(rows, [Left, Left, Left, Right, Left]) + &troubles
}

/// One handoff.
pub(crate) fn handoff(row: &Value) -> String {
    let mut facts = vec![
        ["handoff".to_owned(), text(&row["id"])],
        ["vm".to_owned(), text(&row["vm"])],
        ["from".to_owned(), text(&row["from"])],
        ["to".to_owned(), text(&row["to"])],
        ["state".to_owned(), text(&row["state"])],
        ["fence".to_owned(), fence(&row["fence"])],
        ["owner".to_owned(), text(&row["owner"])],
    ];
    for (name, value) in [("because", &row["because"]), ("trouble", &row["trouble"])] {
        if !value.is_null() {
            let fact = format!("{} ({})", text(&value["detail"]), text(&value["type"]));
            facts.push([name.to_owned(), fact]);
        }
    }
    facts.extend(timings(&row["timings"]).map(|took| ["timings".to_owned(), took]));
    if row["fence"] == "cooperative" {
        let proof = &row["proof"];
        let proof = match proof {
            Value::Null => "none yet: the source's backend may still write".to_owned(),
            proof => format!(
                "the end of process {} on {} was seen ({})",
                text(&proof["pid"]),
                text(&row["from"]),
                text(&proof["seen_by"])
            ),
        };
        facts.push(["proof".to_owned(), proof]);
        if !row["forced"].is_null() {
            facts.push(["forced".to_owned(), text(&row["forced"])]);
        }
        let volumes =
            items(&row["members"]).iter().map(|one| [text(&one["disk"]), text(&one["volume"])]);
        facts.extend(volumes.map(|[disk, volume]| [format!("disk {disk}"), volume]));
        return table(facts, [Left, Left]);
    }
    let header = ["VOLUME", "SERVER", "EPOCH", "RECORD", "PROGRESS", ""].map(str::to_owned);
    let members = items(&row["members"]).iter().map(|member| {
        let [volume, storage, epoch, mut phase, progress] =
            ["volume", "storage", "epoch", "phase", "progress"].map(|key| text(&member[key]));
        if progress == "settled" {
            // What it was seen as last is from before that; it is nobody's handoff any more.
            phase = "owned".to_owned();
        }
        let anchor = if member["anchor"] == true { "anchor" } else { "" };
        [volume, storage, epoch, phase, progress, anchor.to_owned()]
    });
    let members =
        table(std::iter::once(header).chain(members), [Left, Left, Right, Left, Left, Left]);
    format!("{}\n{members}", table(facts, [Left, Left]))
}

/// How long the parts of the switch took, as far as they were measured.
fn timings(timings: &Value) -> Option<String> {
    let part = |(key, what): (&str, &str)| {
        let us = timings[key].as_u64()?;
        Some(format!("{what} {}", crate::phases::duration(us)))
    };
    let parts: Vec<String> = [
        ("drain_us", "drain"),
        ("seal_us", "seal"),
        ("activate_us", "activate"),
        ("vmm_gap_us", "rings stopped there to started here, by the clocks of both hosts,"),
    ]
    .into_iter()
    .filter_map(part)
    .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// How the loser is kept from the volumes.
fn fence(word: &Value) -> String {
    let means = match word.as_str() {
        Some("storage") => "the storage refuses the loser's requests",
        Some("blocklist") => "the cluster refuses the loser's client",
        Some("cooperative") => {
            "nothing refuses the loser: the source's backend must be proven gone first"
        }
        _ => return text(word),
    };
    format!("{} ({means})", text(word))
}

/// Who owns a VM's volumes, and how that came to be.
pub(crate) fn why(answer: &Value) -> String {
    let access = &answer["access"];
    let vm = text(&access["vm"]);
    let mut out = match (&access["owner"], &access["barred"]) {
        (Value::Null, Value::Null) => {
            format!("Nobody owns the volumes of {vm}: any host may claim them.\n")
        }
        (Value::Null, barred) => format!(
            "Nobody owns the volumes of {vm}. {} was fenced and may not claim them until another has.\n",
            text(barred)
        ),
        (owner, _) => format!("{} owns the volumes of {vm}.\n", text(owner)),
    };
    if access["fence"] == "cooperative" {
        out.push_str("Its storage keeps nobody out: that is what the agents say, and what was decided last.\n");
    } else {
        out.push_str(&format!(
            "The anchor is volume {} at {}; its record is {} at epoch {}.\n",
            text(&access["anchor"]["volume"]),
            text(&access["anchor"]["storage"]),
            text(&access["phase"]),
            text(&access["epoch"])
        ));
        out.push_str(phase_in_words(access["phase"].as_str().unwrap_or_default()));
    }
    if !access["decided_by"].is_null() {
        let decided = &access["decided_by"];
        out.push_str(&format!(
            "The last handoff was {}; the {} won.\n",
            text(&decided["handoff"]),
            text(&decided["winner"])
        ));
    }
    for member in items(&access["members"]) {
        if member["error"].is_string() {
            out.push_str(&format!(
                "Volume {} cannot be asked: {}\n",
                text(&member["volume"]),
                text(&member["error"])
            ));
        } else if items(&answer["forgotten"]).contains(&member["handoff"]) {
            out.push_str(&forgotten(member));
        } else if member["owner"] != access["owner"] {
            out.push_str(&format!(
                "Volume {} is {} and belongs to {}: it has not learnt of the decision yet.\n",
                text(&member["volume"]),
                text(&member["phase"]),
                text(&member["owner"])
            ));
        }
    }
    if !answer["handoff"].is_null() {
        let row = &answer["handoff"];
        out.push_str(&format!(
            "\nHandoff {} from {} to {} is {}: {}.\n",
            text(&row["id"]),
            text(&row["from"]),
            text(&row["to"]),
            text(&row["state"]),
            text(&row["owner"])
        ));
        if !row["because"].is_null() {
            out.push_str(&format!("It was given up: {}.\n", text(&row["because"]["detail"])));
        }
    }
    for audit in items(&answer["audit"]) {
        out.push_str(&format!("\n{} at {}\n", text(&audit["volume"]), text(&audit["storage"])));
        if audit["error"].is_string() {
            out.push_str(&format!("  no audit trail: {}\n", text(&audit["error"])));
            continue;
        }
        let entries = items(&audit["entries"]).iter().map(|entry| {
            let [version, epoch, phase, what, who] =
                ["version", "epoch", "phase", "what", "who"].map(|key| text(&entry[key]));
            [
                clock(&entry["at_unix_us"]),
                format!("v{version}"),
                format!("epoch {epoch}"),
                phase,
                what,
                who,
            ]
        });
        out.push_str(&table(entries, [Left, Right, Left, Left, Left, Left]));
    }
    out
}

/// A volume in a handoff that the one which decides it does not know any more.
fn forgotten(member: &Value) -> String {
    let [volume, phase, owner] = ["volume", "phase", "owner"].map(|key| text(&member[key]));
    let id = text(&member["handoff"]["id"]);
    let goes_on = format!(
        "{owner} goes on, and the VM's next handoff ends this one here; so does `baton handoff fence` of the host that has not got it"
    );
    let then = match phase.as_str() {
        "armed" => format!("nobody can win it. {goes_on}"),
        "active" | "reclaimed" => format!("it is won. {goes_on}"),
        _ => "nothing can decide it: once the VM stands still, `baton handoff fence` ends it"
            .to_owned(),
    };
    format!(
        "Volume {volume} is still {phase} for handoff {id}, which the volume that decides it does not know any more: {then}.\n"
    )
}

fn phase_in_words(phase: &str) -> &'static str {
    match phase {
        "armed" => "A handoff is prepared; the owner goes on writing.\n",
        "sealed" => {
            "The source has stopped and nobody writes: the destination may take over, or the source come back.\n"
        }
        "active" => "The destination won and writes.\n",
        "reclaimed" => "The source came back and writes.\n",
        "frozen" => {
            "The server restarted during a handoff: nobody writes until source or destination says how it stood.\n"
        }
        _ => "",
    }
}

/// Hours, minutes, seconds of the day, UTC.
fn clock(at: &Value) -> String {
    let Some(us) = at.as_u64() else { return "-".to_owned() };
    let s = us / 1_000_000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:06}Z", s / 3600, s / 60 % 60, s % 60, us % 1_000_000)
}

/// A VM that was fenced.
pub(crate) fn fenced(answer: &Value) -> String {
    let header = ["VOLUME", "SERVER", "EPOCH", ""].map(str::to_owned);
    let rows = items(&answer["volumes"])
        .iter()
        .map(|volume| ["volume", "storage", "epoch", "detail"].map(|key| text(&volume[key])));
    let (host, vm) = (text(&answer["dead_host"]), text(&answer["vm"]));
    let next = match others(answer, None).as_slice() {
        [] => "it may be started elsewhere".to_owned(),
        [owner] => format!("it belongs to {owner} and may run nowhere else"),
        more => format!("its volumes belong to {}: see `baton handoff why {vm}`", more.join(", ")),
    };
    format!(
        "{}nothing on {host} can reach the volumes of {vm} any more; {next}\n",
        table(std::iter::once(header).chain(rows), [Left, Left, Right, Left]),
    )
}

/// Whose the volumes are that were not the dead host's, but for the nominated host.
pub(crate) fn others(answer: &Value, nominee: Option<&str>) -> Vec<String> {
    let nominee = nominee.map(|host| format!("{host}/{}", text(&answer["vm"])));
    let mut owners: Vec<String> = items(&answer["volumes"])
        .iter()
        .filter_map(|volume| volume["belongs_to"].as_str().map(str::to_owned))
        .filter(|owner| Some(owner) != nominee.as_ref())
        .collect();
    owners.dedup();
    owners
}

/// A rehearsal.
pub(crate) fn drill(answer: &Value) -> String {
    let (ready, after) = (&answer["ready"], &answer["after"]);
    let vm = text(&ready["vm"]);
    let from_to = format!("{} to {}", text(&ready["from"]), text(&ready["to"]));
    if answer["passed"] == true {
        let reached = &ready["reached_unix_us"];
        let took = match (reached["PREPARING"].as_u64(), reached["READY"].as_u64()) {
            (Some(from), Some(to)) => {
                format!(" after {}", crate::phases::duration(to.saturating_sub(from)))
            }
            _ => String::new(),
        };
        format!(
            "{vm} could move from {from_to}: all {} volumes armed and the backend stood by{took}\ncancelled again; {}\n",
            items(&ready["members"]).len(),
            text(&after["owner"])
        )
    } else {
        let why = [&after["because"], &ready["because"], &ready["trouble"]];
        let why = why.into_iter().find(|why| !why.is_null()).unwrap_or(&Value::Null);
        format!(
            "{vm} could not move from {from_to}: {} ({})\n{}\n",
            text(&why["detail"]),
            text(&why["type"]),
            text(&after["owner"])
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn why_says_who_owns_and_how_it_came() {
        let answer = json!({"access": {"vm": "web", "owner": "host-b/web", "phase": "owned", "epoch": 4,
            "anchor": {"volume": "root", "storage": "s:1"}, "decided_by": {"handoff": "ID", "winner": "destination"},
            "members": [{"volume": "data", "phase": "armed", "owner": "host-a/web"}]},
            "audit": [{"volume": "root", "storage": "s:1", "entries": [
                {"at_unix_us": 3_723_000_004_u64, "version": 2, "epoch": 1, "phase": "armed", "what": "arm", "who": "c"}]}],
            "handoff": null});
        let text = why(&answer);
        for part in
            ["host-b/web owns", "the destination won", "data is armed", "01:02:03.000004Z", "v2"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn why_says_what_a_forgotten_handoff_has_left() {
        let told = |phase: &str| {
            let handoff = json!({"id": "ID", "attempt": 1});
            let member = json!({"volume": "data", "phase": phase, "owner": "host-a/web", "handoff": handoff});
            why(
                &json!({"access": {"vm": "web", "owner": "host-a/web", "phase": "owned", "members": [member]},
                "forgotten": [handoff], "handoff": null}),
            )
        };
        assert!(told("armed").contains("data is still armed for handoff ID"), "{}", told("armed"));
        assert!(told("armed").contains("nobody can win it. host-a/web goes on"));
        assert!(told("reclaimed").contains("it is won. host-a/web goes on"));
        assert!(told("sealed").contains("nothing can decide it"), "{}", told("sealed"));
    }

    #[test]
    fn a_handoff_shows_what_was_measured_of_it() {
        let shown = handoff(
            &json!({"timings": {"drain_us": 210, "seal_us": 1_300, "activate_us": null, "vmm_gap_us": 700}}),
        );
        assert!(shown.contains("drain 210 µs; seal 1.30 ms; rings stopped there"), "{shown}");
        assert!(!handoff(&json!({"timings": {"drain_us": null}})).contains("timings"));
    }

    #[test]
    fn a_settled_member_is_not_shown_as_armed() {
        let member = json!({"volume": "data", "phase": "armed", "progress": "settled"});
        let shown = handoff(&json!({"members": [member]}));
        assert!(shown.contains("owned") && !shown.contains("armed"), "{shown}");
    }

    #[test]
    fn an_empty_answer_is_no_reason_to_panic() {
        for view in [vms, handoff, why, fenced, drill] {
            let _ = (view(&json!({})), view(&Value::Null));
        }
    }
}
