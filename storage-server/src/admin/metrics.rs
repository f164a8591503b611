//! The metrics page, in Prometheus's text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use baton_protocol::{Opcode, Status};

use super::Api;
use crate::metrics::{self, FLUSH_BUCKETS_US, WorkerMetrics};

/// Metrics in Prometheus's text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page(&api))
}

/// The page under construction.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{line}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        self.line(format_args!("{name} {value}"));
    }
}

fn page(api: &Api) -> String {
    let mut page = Page(String::with_capacity(4096));
    page.family("baton_build_info", "gauge", "Version of the server.");
    page.line(format_args!("baton_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));

    let answers = metrics::answers(api.workers.iter().map(Arc::as_ref));
    page.family("baton_requests_total", "counter", "Requests answered.");
    for (opcode, status, count) in &answers {
        let (opcode, status) = (opcode_label(*opcode), status_label(*status));
        page.line(format_args!(
            "baton_requests_total{{opcode=\"{opcode}\",status=\"{status}\"}} {count}"
        ));
    }
    let stale = answers.iter().filter(|(_, status, _)| *status == Status::StaleEpoch);
    page.single(
        "baton_stale_requests_total",
        "counter",
        "Requests refused because their sender was fenced.",
        stale.map(|(_, _, count)| count).sum(),
    );
    workers(&mut page, api);
    accept(&mut page, api);
    flush(&mut page, api);
    access(&mut page, api);

    let usage = api.volumes.store().usage();
    page.single("baton_volumes", "gauge", "Volumes.", api.volumes.list().len() as u64);
    for (name, help, value) in [
        ("baton_pool_capacity_bytes", "Data the pool can hold.", usage.capacity_bytes),
        ("baton_pool_allocated_bytes", "Space taken by volumes.", usage.allocated_bytes),
        ("baton_pool_free_bytes", "Space for new data.", usage.free_bytes),
        (
            "baton_pool_dirty_free_bytes",
            "Part of the free space that needs a sync before use.",
            usage.dirty_free_bytes,
        ),
        ("baton_pool_journal_records", "Map changes since the last checkpoint.", usage.log_records),
        (
            "baton_pool_journal_waits_for_room",
            "1 while they cannot be applied because the disk under the metadata is full.",
            usage.log_waits_for_room.into(),
        ),
    ] {
        page.single(name, "gauge", help, value);
    }
    page.0
}

fn workers(page: &mut Page, api: &Api) {
    type Pick = fn(&WorkerMetrics) -> &AtomicU64;
    let all: [(&str, &str, &str, Pick); 8] = [
        ("baton_read_bytes_total", "counter", "Bytes read by clients.", |w| &w.read_bytes),
        ("baton_written_bytes_total", "counter", "Bytes written by clients.", |w| &w.written_bytes),
        (
            "baton_mapped_reads_total",
            "counter",
            "Large reads that were sent from the page cache without a copy in between.",
            |w| &w.mapped_reads,
        ),
        (
            "baton_piped_writes_total",
            "counter",
            "Large writes that went from the socket to the file without a copy in between.",
            |w| &w.piped_writes,
        ),
        ("baton_cold_reads_total", "counter", "Reads that had to wait for the disk.", |w| {
            &w.cold_reads
        }),
        (
            "baton_protocol_violations_total",
            "counter",
            "Connections closed because the peer broke the protocol.",
            |w| &w.violations,
        ),
        ("baton_connections", "gauge", "Welcomed connections.", |w| &w.connections),
        ("baton_inflight_requests", "gauge", "Requests waiting for the disk or a flush.", |w| {
            &w.inflight
        }),
    ];
    for (name, kind, help, pick) in all {
        let sum = api.workers.iter().map(|w| pick(w).load(Ordering::Relaxed)).sum();
        page.single(name, kind, help, sum);
    }
}

fn accept(page: &mut Page, api: &Api) {
    let accept = &api.accept;
    for (name, help, counter) in [
        ("baton_accepted_total", "Connections accepted.", &accept.accepted),
        ("baton_welcomed_total", "Connections welcomed.", &accept.welcomed),
        ("baton_refused_total", "Connections refused with a reason.", &accept.refused),
        ("baton_silent_total", "Connections that never said HELLO.", &accept.silent),
    ] {
        page.single(name, "counter", help, counter.load(Ordering::Relaxed));
    }
}

fn flush(page: &mut Page, api: &Api) {
    let flush = &api.flusher.metrics;
    let name = "baton_flush_seconds";
    page.family(name, "histogram", "Time of one sync, which answers all FLUSHes that wait.");
    for (bound, count) in FLUSH_BUCKETS_US.iter().zip(flush.cumulative()) {
        page.line(format_args!("{name}_bucket{{le=\"{}\"}} {count}", seconds(*bound)));
    }
    let syncs = flush.syncs.load(Ordering::Relaxed);
    page.line(format_args!("{name}_bucket{{le=\"+Inf\"}} {syncs}"));
    page.line(format_args!("{name}_sum {}", seconds(flush.total_us.load(Ordering::Relaxed))));
    page.line(format_args!("{name}_count {syncs}"));
    let requests = flush.requests.load(Ordering::Relaxed);
    let help = "FLUSH requests answered by syncs.";
    page.single("baton_flush_requests_total", "counter", help, requests);
}

fn access(page: &mut Page, api: &Api) {
    let metrics = api.volumes.metrics();
    let name = "baton_access_steps_total";
    page.family(name, "counter", "What was asked of access records.");
    for (step, result, count) in metrics.steps() {
        let (step, result) = (step.name(), result.name());
        page.line(format_args!("{name}{{step=\"{step}\",result=\"{result}\"}} {count}"));
    }
    let name = "baton_access_stores_total";
    page.family(name, "counter", "Times access records were made durable.");
    for (when, count) in [("first", &metrics.stored_first), ("later", &metrics.stored_later)] {
        let count = count.load(Ordering::Relaxed);
        page.line(format_args!("{name}{{when=\"{when}\"}} {count}"));
    }
    let name = "baton_access_wait_seconds_total";
    page.family(name, "counter", "Time that changes of access records waited.");
    for (why, us) in [("store", &metrics.storing_us), ("drain", &metrics.draining_us)] {
        let time = seconds(us.load(Ordering::Relaxed));
        page.line(format_args!("{name}{{for=\"{why}\"}} {time}"));
    }
    let name = "baton_volumes_in_phase";
    page.family(name, "gauge", "Volumes by the phase of their access record.");
    let mut phases = BTreeMap::new();
    for volume in api.volumes.list() {
        *phases.entry(volume.record().phase.name()).or_insert(0u64) += 1;
    }
    for (phase, count) in phases {
        page.line(format_args!("{name}{{phase=\"{phase}\"}} {count}"));
    }
}

fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

fn opcode_label(opcode: Opcode) -> &'static str {
    match opcode {
        Opcode::Hello => "hello",
        Opcode::Read => "read",
        Opcode::Write => "write",
        Opcode::Flush => "flush",
        Opcode::Discard => "discard",
        Opcode::WriteZeroes => "write_zeroes",
        Opcode::Ping => "ping",
        Opcode::Event => "event",
        Opcode::Release => "release",
        Opcode::Access => "access",
        Opcode::Handoff => "handoff",
        Opcode::Open => "open",
    }
}

fn status_label(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Protocol => "protocol",
        Status::StaleEpoch => "stale_epoch",
        Status::NotOwner => "not_owner",
        Status::NotPermitted => "not_permitted",
        Status::NoSuchVolume => "no_such_volume",
        Status::Version => "version",
        Status::OutOfRange => "out_of_range",
        Status::NoSpace => "no_space",
        Status::Io => "io",
        Status::Checksum => "checksum",
        Status::Busy => "busy",
        Status::Gone => "gone",
        Status::InHandoff => "in_handoff",
    }
}
