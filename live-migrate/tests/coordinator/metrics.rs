//! The metrics page, over HTTP.

use baton_live_migrate::client::Method;
use serde_json::json;

use super::support::{Cluster, id, raw};

/// Of `docs/operations.md`, which has a table of them.
const DOCUMENT: &str = include_str!("../../../docs/operations.md");

async fn page(cluster: &Cluster) -> String {
    let (head, body) = raw(cluster, "GET /metrics HTTP/1.1").await;
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain"), "{head}");
    body
}

fn value(page: &str, series: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {page}")).parse().expect("a number")
}

#[tokio::test]
async fn what_happens_is_counted() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let counted = [
        "baton_handoffs_reached_total{state=\"READY\"}",
        "baton_handoffs_reached_total{state=\"SETTLED\"}",
        "baton_handoffs{state=\"READY\"}",
        "baton_handoffs{state=\"SETTLED\"}",
        "baton_fences_total",
        "baton_problems_total",
    ];
    let values = async || {
        let page = page(&cluster).await;
        counted.map(|series| value(&page, series))
    };
    let first = page(&cluster).await;
    assert_eq!(value(&first, "baton_coordinator_term"), 1);
    assert_eq!(values().await, [0; 6]);
    let id = id();
    coordinator.prepare(&id).await.expect("READY");
    assert_eq!(values().await, [1, 0, 1, 0, 0, 0]);
    coordinator.post(&id, "cancel").await.expect("cancelled");
    coordinator.over(&id).await;
    coordinator.call(Method::GET, "/nowhere", json!(null)).await.expect_err("nothing is there");
    let fence = json!({"dead_host": "host-a", "reason": "a test", "force": true});
    coordinator.call(Method::POST, "/v1/vms/web:fence", fence).await.expect("fenced");
    assert_eq!(values().await, [1, 1, 0, 1, 1, 1]);
    let last = page(&cluster).await;
    for series in ["baton_journal_commits_total", "baton_events_last"] {
        assert!(value(&last, series) > value(&first, series), "{series}");
    }
    for series in ["baton_handoffs_unknown", "baton_handoffs_hindered"] {
        assert_eq!(value(&last, series), 0, "{series}");
    }
    // As the manual has them: all, and no others.
    let names = |line: &str| {
        line.strip_prefix("# TYPE ").map(|rest| rest.split(' ').next().expect("a name").to_owned())
    };
    let told: Vec<String> = last.lines().filter_map(names).collect();
    let (_, table) = DOCUMENT.split_once("| metric of the coordinator |").expect("a table");
    let (table, _) = table.split_once("\n\n").expect("its end");
    let row = |line: &str| Some(line.strip_prefix("| `")?.split(['`', '{']).next()?.to_owned());
    let documented: Vec<String> = table.lines().filter_map(row).collect();
    assert_eq!(documented, told);
}
