//! The phases of a migration, from what coordinator and backends noted.
//!
//! Times of different hosts are compared only where nothing else is there, and that is
//! said beside them: each backend's own durations come from its own clock.

use serde_json::Value;

use crate::view;

/// Steps of a migration, in order, and what they are to a person.
const STEPS: [(&str, &str); 7] = [
    ("prepare", "arming volumes, starting the standby backend"),
    ("incoming", "starting the destination's machine"),
    ("precopy", "copying memory"),
    ("switch", "the VM stands still, volumes are sealed"),
    ("activate", "the destination takes over"),
    ("cleanup", "cleaning up behind it"),
    ("done", "done"),
];

/// What else is in a step when the guest's I/O is timed for a report.
const STEPS_WATCHED: [(&str, &str); 2] = [
    ("prepare", "arming volumes, starting the standby backend; 3 s of timing the guest's I/O"),
    ("cleanup", "cleaning up behind it; 3 s of timing the guest's I/O"),
];

/// A phase that took time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) from_us: u64,
    pub(crate) to_us: u64,
}

/// Nothing is left to do.
pub(crate) fn is_over(row: &Value) -> bool {
    let step = row["migration"]["step"].as_str();
    row["over"] == true && (step.is_none() || matches!(step, Some("done" | "rolled-back")))
}

/// One line while it runs.
pub(crate) fn progress(row: &Value) -> String {
    let step = row["migration"]["step"].as_str().unwrap_or("prepare");
    let what = match step {
        "rolling-back" => "rolling back",
        "rolled-back" => "rolled back",
        _ => STEPS.iter().find(|(name, _)| *name == step).map_or(step, |(_, what)| what),
    };
    let state = row["state"].as_str().unwrap_or("-");
    let trouble = match &row["trouble"]["detail"] {
        Value::Null => String::new(),
        detail => format!(" ({})", view::text(detail)),
    };
    format!("{state:<9} {what}{trouble}")
}

/// The phases that are over.
pub(crate) fn phases(row: &Value) -> Vec<Phase> {
    let at = |step: &str| row["migration"]["at_unix_us"][step].as_u64();
    let mut phases = Vec::new();
    let watched = row["migration"]["watch_io"] == true;
    for (place, (name, what)) in STEPS.iter().enumerate() {
        let more = STEPS_WATCHED.iter().find(|(step, _)| watched && step == name);
        let (_, what) = more.unwrap_or(&(*name, *what)).to_owned();
        let next = STEPS[place + 1..].iter().find_map(|(next, _)| at(next));
        let next = next.or_else(|| at("rolling-back")).or_else(|| at("rolled-back"));
        if let (Some(from_us), Some(to_us)) = (at(name), next)
            && *name != "done"
        {
            phases.push(Phase { name, what, from_us, to_us: to_us.max(from_us) });
        }
    }
    if let (Some(from_us), Some(to_us)) = (at("rolling-back"), at("rolled-back")) {
        phases.push(Phase {
            name: "rolling-back",
            what: "giving the volumes back",
            from_us,
            to_us,
        });
    }
    phases
}

/// What a backend measured, with its name for people.
pub(crate) fn timings(row: &Value) -> Vec<(&'static str, &'static str, u64)> {
    const TIMINGS: [(&str, &str, &str); 5] = [
        ("source", "stop_us", "rings stopped to drained and sealed"),
        ("source", "drain_us", "requests in flight drained"),
        ("source", "seal_us", "seal sent to all volumes sealed"),
        ("destination", "activate_us", "asked the anchor, answered"),
        ("destination", "first_io_us", "rings started to the first request"),
    ];
    let report = &row["migration"]["report"];
    let found = TIMINGS.iter().filter_map(|(side, key, what)| {
        let value = report[*side]["timings"][*key].as_u64()?;
        Some((*side, *what, value))
    });
    found.collect()
}

/// [`stood_still_us`] for people.
pub(crate) const STOOD_STILL: &str =
    "rings stopped there to volumes served here, by the clocks of both hosts";

/// How long no host served the guest's disks, in µs: from the stop of the rings at the source to the grant of the
/// volumes at the destination, by the two hosts' clocks: as good as these are synchronised.
pub(crate) fn stood_still_us(row: &Value) -> Option<u64> {
    let last = |side: &str, moment: &str| {
        let events = row["migration"]["report"][side]["events"].as_array()?;
        events.iter().rev().find(|event| event["event"] == moment)?["at_unix_us"].as_u64()
    };
    let stopped = last("source", "rings-stopped")?;
    last("destination", "activated")?.checked_sub(stopped)
}

/// A duration as people read it.
pub(crate) fn duration(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{}.{:02} ms", us / 1000, us % 1000 / 10),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// The report of a migration that is over.
pub(crate) fn text(row: &Value) -> String {
    let word = |key: &str| view::text(&row[key]);
    let mut out = match row["outcome"].as_str() {
        Some("destination") => {
            format!("{} moved from {} to {}\n", word("vm"), word("from"), word("to"))
        }
        _ => format!("{} did not move to {}: {}\n", word("vm"), word("to"), word("owner")),
    };
    let error = &row["migration"]["error"]["detail"];
    if !error.is_null() {
        out.push_str(&format!("  because {}\n", view::text(error)));
    }
    for Phase { name, what, from_us, to_us } in phases(row) {
        out.push_str(&format!("  {name:<12} {:>12}  {what}\n", duration(to_us - from_us)));
    }
    let timings = timings(row);
    if !timings.is_empty() {
        out.push_str("the volumes, by the backends' clocks\n");
        for (side, what, us) in timings {
            out.push_str(&format!("  {side:<12} {:>12}  {what}\n", duration(us)));
        }
        if let Some(us) = stood_still_us(row) {
            out.push_str(&format!("  {:<12} {:>12}  {STOOD_STILL}\n", "both", duration(us)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row() -> Value {
        json!({"vm": "web", "from": "a", "to": "b", "state": "SETTLED", "outcome": "destination", "over": true,
            "migration": {"step": "done", "at_unix_us": {"prepare": 1_000, "incoming": 51_000, "precopy": 61_000,
                "switch": 2_061_000, "activate": 2_066_000, "cleanup": 2_100_000, "done": 2_150_000},
                "report": {"source": {"timings": {"seal_us": 310, "stop_us": null}, "events": [
                        {"at_unix_us": 100, "event": "rings-stopped"}, {"at_unix_us": 5_000, "event": "rings-stopped"}]},
                    "destination": {"timings": {"activate_us": 1_204}, "events": [
                        {"at_unix_us": 7_000, "event": "activated"}, {"at_unix_us": 7_500, "event": "opened"},
                        {"at_unix_us": 9_000, "event": "first-request"}]}}}})
    }

    #[test]
    fn the_disks_stand_still_from_the_last_stop_to_the_grant() {
        assert_eq!(stood_still_us(&row()), Some(2_000));
        let text = text(&row());
        assert!(text.contains("2.00 ms") && text.contains("by the clocks of both hosts"), "{text}");
        let mut skewed = row();
        skewed["migration"]["report"]["destination"]["events"] =
            json!([{"at_unix_us": 4_000, "event": "activated"}]);
        assert_eq!(stood_still_us(&skewed), None, "clocks that disagree tell nothing");
        assert_eq!(stood_still_us(&json!({})), None);
    }

    #[test]
    fn phases_follow_each_other() {
        let phases = phases(&row());
        let names: Vec<_> = phases.iter().map(|phase| phase.name).collect();
        assert_eq!(names, ["prepare", "incoming", "precopy", "switch", "activate", "cleanup"]);
        for pair in phases.windows(2) {
            assert_eq!(pair[0].to_us, pair[1].from_us);
        }
        assert!(text(&row()).contains("310 µs") && text(&row()).contains("1.20 ms"));
    }

    #[test]
    fn the_time_that_a_report_takes_is_said_to_be_of_the_report() {
        let mut row = row();
        assert!(!text(&row).contains("timing"));
        row["migration"]["watch_io"] = true.into();
        assert_eq!(text(&row).matches("timing the guest's I/O").count(), 2);
    }

    #[test]
    fn a_rolled_back_migration_says_why() {
        let row = json!({"vm": "web", "to": "b", "outcome": "source", "over": true, "owner": "the source a owns it",
            "migration": {"step": "rolled-back", "error": {"detail": "no room"},
            "at_unix_us": {"prepare": 1, "incoming": 2, "rolling-back": 3, "rolled-back": 9}}});
        let text = text(&row);
        assert!(text.contains("because no room") && text.contains("rolling-back"), "{text}");
        assert!(is_over(&row));
    }

    #[test]
    fn an_empty_answer_is_no_reason_to_panic() {
        for row in [
            json!({}),
            Value::Null,
            json!({"migration": {"at_unix_us": {"prepare": 9, "incoming": 1}}}),
        ] {
            let _ = (text(&row), progress(&row), is_over(&row));
        }
    }
}
