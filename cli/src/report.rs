//! The page of `baton vm migrate --report`: one file, no scripts, nothing from
//! elsewhere, light and dark, readable on a phone.
//!
//! Plots are SVG that stretches with the page; their words are HTML beside them,
//! so that they keep their size. Everything from the network is escaped.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use crate::phases::{self, Phase, duration};

const STYLE: &str = include_str!("report/style.css");
/// Shown of the guest's I/O on each side of the switch, microseconds.
const AROUND_US: u64 = 10_000_000;
/// The backends count in slices of this length.
const SLICE_US: u64 = 100_000;
/// Most points of a line; more would be less than a pixel each.
const POINTS_MAX: usize = 2_000;

/// The page of a migration.
pub(crate) fn page(row: &Value) -> String {
    let mut out = String::with_capacity(16 << 10);
    let word = |key: &str| escape(&crate::view::text(&row[key]));
    let moved = row["outcome"] == "destination";
    let title = format!("{}: {} to {}", word("vm"), word("from"), word("to"));
    let (verdict, class) = if moved {
        (format!("moved to {}", word("to")), "good")
    } else {
        (format!("did not move: {}", word("owner")), "bad")
    };
    // Writing to a string does not fail.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title>\n<style>{STYLE}</style>\n<main>\n\
         <h1>{title}</h1>\n<p class=\"verdict {class}\">{verdict}</p>\n"
    );
    let error = &row["migration"]["error"]["detail"];
    if !error.is_null() {
        let _ = writeln!(out, "<p>Because {}.</p>", escape(&crate::view::text(error)));
    }
    let phases = phases::phases(row);
    headline(&mut out, row, &phases);
    timeline(&mut out, &phases);
    backends(&mut out, row);
    latency(&mut out, row, &phases);
    footer(&mut out, row);
    out
}

/// Whose clocks the page goes by, and what a number leaves out.
fn footer(out: &mut String, row: &Value) {
    let id = escape(&crate::view::text(&row["id"]));
    let _ = write!(
        out,
        "<footer>Handoff {id}. Phases are by the coordinator's clock, what a backend measured by its own. \
         The clocks of the hosts are compared where the two halves of the guest's I/O lie side by side"
    );
    if phases::stood_still_us(row).is_some() {
        let _ = write!(out, ", and in “{}”", phases::STOOD_STILL);
    }
    out.push_str(": that is as good as they are synchronised.");
    if slowest_us(row).is_some() {
        out.push_str(
            " A request that waits while the guest moves is timed at the destination from the start of its \
             rings: the slowest request leaves out the standstill itself.",
        );
    }
    out.push_str("</footer>\n</main></html>\n");
}

/// The numbers that matter.
fn headline(out: &mut String, row: &Value, phases: &[Phase]) {
    let mut tiles: Vec<(String, &str)> = Vec::new();
    if let (Some(first), Some(last)) = (phases.first(), phases.last()) {
        tiles.push((duration(last.to_us - first.from_us), "in all"));
    }
    for (_, what, us) in phases::timings(row) {
        if what.starts_with("seal sent") || what.starts_with("asked the anchor") {
            tiles.push((duration(us), what));
        }
    }
    if let Some(still) = phases::stood_still_us(row) {
        tiles.push((duration(still), phases::STOOD_STILL));
    }
    if let Some(slowest) = slowest_us(row) {
        tiles.push((duration(slowest), "slowest request of the guest, without the standstill"));
    }
    if tiles.is_empty() {
        return;
    }
    out.push_str("<div class=\"tiles\">");
    for (value, what) in tiles {
        let _ = write!(out, "<div><b>{value}</b><span>{what}</span></div>");
    }
    out.push_str("</div>\n");
}

fn timeline(out: &mut String, phases: &[Phase]) {
    out.push_str("<h2>Phases</h2>\n");
    let (Some(first), Some(last)) = (phases.first(), phases.last()) else {
        out.push_str("<p class=\"none\">The coordinator noted no phases.</p>\n");
        return;
    };
    let whole = (last.to_us - first.from_us).max(1);
    out.push_str("<div class=\"phases\">\n");
    for phase in phases {
        let left = percent(phase.from_us - first.from_us, whole);
        let width = percent(phase.to_us - phase.from_us, whole).max(0.4);
        let still = matches!(phase.name, "switch" | "activate");
        let _ = writeln!(
            out,
            "<div><span class=\"name\">{}</span><span class=\"took\">{}</span>\
             <span class=\"bar\"><i class=\"{}\" style=\"left:{left:.2}%;width:{width:.2}%\"></i></span>\
             <span class=\"what\">{}</span></div>",
            phase.name,
            duration(phase.to_us - phase.from_us),
            if still { "still" } else { "" },
            phase.what
        );
    }
    out.push_str("</div>\n");
}

/// What the two backends did, by their own clocks.
fn backends(out: &mut String, row: &Value) {
    out.push_str("<h2>The volumes</h2>\n");
    let timings = phases::timings(row);
    if timings.is_empty() {
        out.push_str("<p class=\"none\">The backends gave no timings.</p>\n");
    } else {
        let longest = timings.iter().map(|(.., us)| *us).max().unwrap_or(1).max(1);
        out.push_str("<div class=\"phases\">\n");
        for (side, what, us) in timings {
            let width = percent(us, longest).max(0.4);
            let _ = writeln!(
                out,
                "<div><span class=\"name\">{side}</span><span class=\"took\">{}</span>\
                 <span class=\"bar\"><i class=\"{side}\" style=\"left:0;width:{width:.2}%\"></i></span>\
                 <span class=\"what\">{what}</span></div>",
                duration(us)
            );
        }
        out.push_str("</div>\n");
    }
    for side in ["source", "destination"] {
        let events = crate::view::items(&row["migration"]["report"][side]["events"]);
        let Some(first) = events.first().and_then(|event| event["at_unix_us"].as_u64()) else {
            continue;
        };
        let _ = write!(out, "<details><summary>Events of the {side}</summary><table>");
        for event in events {
            let at = event["at_unix_us"].as_u64().unwrap_or(first).saturating_sub(first);
            let _ = write!(
                out,
                "<tr><td>+{}</td><td>{}</td></tr>",
                duration(at),
                escape(&crate::view::text(&event["event"]))
            );
        }
        out.push_str("</table></details>\n");
    }
}

/// A tenth of a second of the guest's I/O.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at_us: u64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

/// Of all disks together: the slowest of them counts.
fn samples(row: &Value, side: &str) -> Vec<Sample> {
    let disks = row["migration"]["report"][side]["latency"].as_object();
    let mut slices: BTreeMap<u64, Sample> = BTreeMap::new();
    for slice in disks.into_iter().flat_map(|disks| disks.values()).flat_map(crate::view::items) {
        let number = |key: &str| slice[key].as_u64().unwrap_or(0);
        let at_us = number("at_unix_us") / SLICE_US * SLICE_US;
        if number("ops") == 0 || at_us == 0 {
            continue;
        }
        let sample =
            slices.entry(at_us).or_insert(Sample { at_us, p50_us: 0, p99_us: 0, max_us: 0 });
        sample.p50_us = sample.p50_us.max(number("p50_us"));
        sample.p99_us = sample.p99_us.max(number("p99_us"));
        sample.max_us = sample.max_us.max(number("max_us"));
    }
    slices.into_values().collect()
}

/// The slowest request that a backend timed. One that waits while the guest moves is timed at the destination from
/// the start of its rings.
fn slowest_us(row: &Value) -> Option<u64> {
    let all = ["source", "destination"].map(|side| samples(row, side));
    all.iter().flatten().map(|sample| sample.max_us).max()
}

fn latency(out: &mut String, row: &Value, phases: &[Phase]) {
    out.push_str("<h2>The guest's I/O</h2>\n");
    let (source, destination) = (samples(row, "source"), samples(row, "destination"));
    for (side, samples) in [("source", &source), ("destination", &destination)] {
        if samples.is_empty() {
            let _ = writeln!(
                out,
                "<p class=\"none\">No latency samples of the {side}'s backend: it kept none, or the guest did no I/O there.</p>"
            );
        }
    }
    let switch = phases.iter().find(|phase| phase.name == "switch").map(|phase| phase.from_us);
    let middle = switch.or_else(|| source.last().map(|sample| sample.at_us));
    let Some(middle) = middle else { return };
    let (from, to) = (middle.saturating_sub(AROUND_US), middle.saturating_add(AROUND_US));
    let near = |samples: Vec<Sample>| -> Vec<Sample> {
        samples
            .into_iter()
            .filter(|sample| (from..to).contains(&sample.at_us))
            .take(POINTS_MAX)
            .collect()
    };
    let (source, destination) = (near(source), near(destination));
    let all = || source.iter().chain(&destination);
    let (Some(first), Some(last)) = (all().map(|s| s.at_us).min(), all().map(|s| s.at_us).max())
    else {
        out.push_str("<p class=\"none\">No sample is within ten seconds of the switch.</p>\n");
        return;
    };
    let plot = Plot { first, whole: (last - first).max(1), top: decades(all().map(|s| s.max_us)) };
    let _ = write!(out, "<div class=\"plot\"><div class=\"y\">");
    for decade in (1..=plot.top).rev() {
        let _ = write!(
            out,
            "<span style=\"bottom:{:.1}%\">{}</span>",
            percent(decade - 1, plot.top - 1),
            ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s"]
                [usize::try_from(decade).unwrap_or(0).min(8)]
        );
    }
    out.push_str("</div><svg viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"latency of the guest's I/O over time\">");
    for decade in 2..plot.top {
        let y = 1000.0 - 10.0 * percent(decade - 1, plot.top - 1);
        let _ = write!(out, "<path class=\"grid\" d=\"M0 {y:.1}H1000\"/>");
    }
    let still: Vec<&Phase> =
        phases.iter().filter(|phase| matches!(phase.name, "switch" | "activate")).collect();
    if let (Some(start), Some(end)) = (still.first(), still.last()) {
        let (x, end) = (plot.x(start.from_us), plot.x(end.to_us));
        let _ = write!(
            out,
            "<rect class=\"still\" x=\"{x:.1}\" y=\"0\" width=\"{:.1}\" height=\"1000\"/>",
            (end - x).max(2.0)
        );
    }
    for (side, samples) in [("source", &source), ("destination", &destination)] {
        for (line, pick) in [
            ("p50", (|s| s.p50_us) as fn(&Sample) -> u64),
            ("p99", |s| s.p99_us),
            ("max", |s| s.max_us),
        ] {
            let _ =
                write!(out, "<path class=\"{side} {line}\" d=\"{}\"/>", plot.path(samples, pick));
        }
    }
    let _ = write!(
        out,
        "</svg><div class=\"x\"><span>{}</span><span>{}</span></div></div>\n\
         <p class=\"legend\"><i class=\"source\"></i>source <i class=\"destination\"></i>destination \
         <i class=\"still\"></i>standing still; thin line: median, thick: 99 of 100, dots: slowest request, each of a tenth of a second</p>\n",
        offset(first, middle),
        offset(last, middle)
    );
}

/// From the switch, signed.
fn offset(at: u64, middle: u64) -> String {
    if at < middle {
        format!("−{}", duration(middle - at))
    } else {
        format!("+{}", duration(at - middle))
    }
}

/// Powers of ten that hold all of it; at least two.
fn decades(values: impl Iterator<Item = u64>) -> u64 {
    let longest = values.max().unwrap_or(1).max(1);
    u64::from(longest.ilog10() + 1).clamp(2, 8)
}

/// Where things are in the plot; latency is logarithmic, from 10 µs up.
struct Plot {
    first: u64,
    whole: u64,
    top: u64,
}

impl Plot {
    fn x(&self, at_us: u64) -> f64 {
        10.0 * percent(at_us.saturating_sub(self.first).min(self.whole), self.whole)
    }

    #[expect(clippy::cast_precision_loss, reason = "a picture")]
    fn y(&self, us: u64) -> f64 {
        let decades = (us.max(10) as f64).log10() - 1.0;
        1000.0 - 1000.0 * (decades / (self.top - 1) as f64).clamp(0.0, 1.0)
    }

    fn path(&self, samples: &[Sample], pick: fn(&Sample) -> u64) -> String {
        let mut path = String::new();
        for (place, sample) in samples.iter().enumerate() {
            let command = if place == 0 { 'M' } else { 'L' };
            let _ =
                write!(path, "{command}{:.1} {:.1}", self.x(sample.at_us), self.y(pick(sample)));
        }
        if samples.len() == 1 {
            // A dot.
            path.push_str("h0");
        }
        path
    }
}

#[expect(clippy::cast_precision_loss, reason = "a picture")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A migration with both halves of its samples.
    pub(super) fn example() -> Value {
        let at = 1_700_000_000_000_000_u64;
        let sample = |n: u64, side: u64| {
            let near = if n == 0 { 4 } else { 1 };
            json!({"at_unix_us": at + 2_000_000 + side * (n + 1) * 100_000 - (1 - side) * n * 100_000, "ops": 800 + n,
                "p50_us": 180 * near + (n * 37) % 60, "p99_us": 700 * near + (n * 91) % 400, "max_us": 1_900 * near * near + (n * 171) % 900})
        };
        let latency = |side| json!({"root": (0..60).map(|n| sample(n, side)).collect::<Vec<_>>()});
        json!({"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "vm": "web-1", "from": "host-a", "to": "host-b", "outcome": "destination",
            "over": true, "state": "SETTLED",
            "migration": {"step": "done",
                "at_unix_us": {"prepare": at, "incoming": at + 61_000, "precopy": at + 110_000, "switch": at + 2_000_000,
                    "activate": at + 2_009_000, "cleanup": at + 2_098_000, "done": at + 2_200_000},
                "report": {"source": {"timings": {"stop_us": 90, "drain_us": 240, "seal_us": 410}, "latency": latency(0),
                        "events": [{"at_unix_us": at, "event": "rings-stopped"}, {"at_unix_us": at + 400, "event": "sealed"}]},
                    "destination": {"timings": {"activate_us": 280, "first_io_us": 730}, "latency": latency(1)}}}})
    }

    #[test]
    fn the_page_stands_alone_and_is_whole() {
        let page = page(&example());
        for part in [
            "<svg",
            "host-a to host-b",
            "moved to host-b",
            "class=\"still\"",
            "class=\"destination p99\"",
            "rings-stopped",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for foreign in ["<script", "http://", "https://", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        if let Some(file) = std::env::var_os("REPORT_EXAMPLE") {
            std::fs::write(file, page).expect("written");
        }
    }

    /// Each number that compares two hosts' clocks says so, and what is not there is not explained.
    #[test]
    fn the_page_says_whose_clocks_and_what_is_left_out() {
        let mut row = example();
        let without = page(&row);
        assert!(!without.contains(phases::STOOD_STILL), "{without}");
        let at = row["migration"]["report"]["source"]["events"][0]["at_unix_us"].as_u64();
        let activated = json!({"at_unix_us": at.expect("a time") + 2_000, "event": "activated"});
        row["migration"]["report"]["destination"]["events"] = json!([activated]);
        let page = page(&row);
        let footer = page.split_once("<footer>").expect("a footer").1;
        assert_eq!(page.matches(phases::STOOD_STILL).count(), 2, "a tile, and the footer: {page}");
        assert!(footer.contains("as good as they are synchronised"), "{footer}");
        assert!(!page.contains("are not compared"), "{footer}");
        assert!(page.contains("slowest request of the guest, without the standstill"));
        assert!(footer.contains("leaves out the standstill"), "{footer}");
    }

    #[test]
    fn what_is_missing_is_said() {
        let text = page(&json!({"vm": "<script>", "outcome": "source"}));
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script>"));
        assert!(
            text.contains("noted no phases") && text.contains("No latency samples of the source"),
            "{text}"
        );
        let _ = page(&Value::Null);
        let mut odd = example();
        odd["migration"]["report"]["source"]["latency"] = json!({"a": [{"at_unix_us": u64::MAX, "ops": 1}, {"at_unix_us": 0, "ops": 1, "max_us": u64::MAX}, 7], "b": 3});
        let _ = page(&odd);
    }
}
