//! The metrics page, in Prometheus's text format.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use super::Api;
use crate::coordinator::plan::State as HandoffState;

/// Metrics in Prometheus's text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(core): State<Api>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page(&core))
}

fn page(core: &Api) -> String {
    let mut page = String::with_capacity(2048);
    let mut family = |name: &str, kind: &str, help: &str, lines: &[(String, u64)]| {
        // Writing to a string does not fail.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in lines {
            let _ = writeln!(page, "{name}{labels} {value}");
        }
    };
    let plain = |value: u64| [(String::new(), value)];
    let label = |state: HandoffState| format!("{{state=\"{}\"}}", state.name());
    let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    family("baton_build_info", "gauge", "Version of the coordinator.", &[(version, 1)]);
    family("baton_coordinator_leads", "gauge", "1 while this coordinator leads.", &plain(1));
    family("baton_coordinator_term", "gauge", "Term of this start.", &plain(core.term));
    let reached: Vec<_> =
        core.metrics.all_reached().map(|(state, count)| (label(state), count)).collect();
    family(
        "baton_handoffs_reached_total",
        "counter",
        "Handoffs that reached a state since the start.",
        &reached,
    );
    let rows = core.rows();
    let now: Vec<_> = HandoffState::ALL
        .into_iter()
        .map(|state| {
            let count = rows.iter().filter(|row| row.state == state).count();
            (label(state), count as u64)
        })
        .collect();
    family("baton_handoffs", "gauge", "Handoffs kept, by state.", &now);
    let unknown = rows.iter().filter(|row| row.unknown).count() as u64;
    family(
        "baton_handoffs_unknown",
        "gauge",
        "Handoffs whose owner nobody can say: a human may have to look.",
        &plain(unknown),
    );
    let hindered = rows.iter().filter(|row| row.trouble.is_some() && !row.state.is_over()).count();
    family(
        "baton_handoffs_hindered",
        "gauge",
        "Handoffs that something hinders.",
        &plain(hindered as u64),
    );
    let fences = core.metrics.fences.load(Ordering::Relaxed);
    family("baton_fences_total", "counter", "VMs fenced.", &plain(fences));
    let problems = core.metrics.problems.load(Ordering::Relaxed);
    family(
        "baton_problems_total",
        "counter",
        "Requests answered with a problem.",
        &plain(problems),
    );
    family(
        "baton_journal_commits_total",
        "counter",
        "Commits of the journal.",
        &plain(core.journal.writes()),
    );
    let last = *core.journal.latest().borrow();
    family("baton_events_last", "gauge", "Number of the last event.", &plain(last));
    page
}
