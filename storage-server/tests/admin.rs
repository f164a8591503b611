//! The admin API over HTTP.

mod common;

use baton_protocol::{AccessMode, Opcode, Status};
use common::{Client, Fixture, greeting, http, http_whole, json};

const SIZE: u64 = 64 << 20;

fn problem(fixture: &Fixture, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let (head, text) = http_whole(fixture.admin, method, path, body);
    assert!(
        head.to_ascii_lowercase().contains("content-type: application/problem+json"),
        "{method} {path}: {head}"
    );
    let document = json(&text);
    let status = document["status"].as_u64().and_then(|s| u16::try_from(s).ok()).expect("status");
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    let text = |key: &str| document[key].as_str().expect(key).to_owned();
    assert!(!text("title").is_empty());
    (status, text("type"), text("detail"))
}

#[test]
fn volumes_are_made_shown_grown_and_deleted() {
    let fixture = Fixture::start();
    let (head, text) =
        http_whole(fixture.admin, "POST", "/v1/volumes", r#"{"name":"d","size_bytes":1048576}"#);
    assert!(head.starts_with("HTTP/1.1 201"), "{head}");
    assert!(head.to_ascii_lowercase().contains("location: /v1/volumes/d"), "{head}");
    let made = json(&text);
    assert_eq!(made["size_bytes"], 1 << 20);
    assert_eq!(made["access"]["phase"], "free");
    assert_eq!(json(&http(fixture.admin, "GET", "/v1/volumes/d", "").1), made);
    let list = json(&http(fixture.admin, "GET", "/v1/volumes", "").1);
    assert_eq!(list["volumes"].as_array().map(Vec::len), Some(1));
    assert_eq!(list["volumes"][0], made);
    let (status, text) =
        http(fixture.admin, "POST", "/v1/volumes/d/resize", r#"{"size_bytes":2097152}"#);
    assert_eq!((status, json(&text)["size_bytes"].as_u64()), (200, Some(2 << 20)));
    assert_eq!(http(fixture.admin, "DELETE", "/v1/volumes/d", ""), (204, String::new()));
    assert_eq!(problem(&fixture, "GET", "/v1/volumes/d", "").0, 404);
    // The name is free again, the id is not.
    fixture.create("d", SIZE);
    let again = json(&http(fixture.admin, "GET", "/v1/volumes/d", "").1);
    assert_ne!(again["id"], made["id"]);
}

#[test]
fn each_mistake_has_its_own_type_and_says_what_to_do() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let long = format!(r#"{{"name":"{}","size_bytes":512}}"#, "x".repeat(65));
    let huge = format!(r#"{{"name":"x","size_bytes":512,"note":"{}"}}"#, "x".repeat(20_000));
    for (method, path, body, status, kind, names) in [
        (
            "POST",
            "/v1/volumes",
            r#"{"name":"d","size_bytes":512}"#,
            409,
            "baton:volume-exists",
            "d",
        ),
        (
            "POST",
            "/v1/volumes",
            r#"{"name":"../d","size_bytes":512}"#,
            400,
            "baton:bad-name",
            "letter",
        ),
        ("POST", "/v1/volumes", long.as_str(), 400, "baton:bad-name", "64"),
        ("POST", "/v1/volumes", r#"{"name":"e","size_bytes":513}"#, 400, "baton:bad-size", "512"),
        ("POST", "/v1/volumes", r#"{"name":"e","size_bytes":0}"#, 400, "baton:bad-size", "512"),
        ("POST", "/v1/volumes", r#"{"name":"e"}"#, 400, "baton:bad-request", "size_bytes"),
        (
            "POST",
            "/v1/volumes",
            r#"{"name":"e","size_bytes":512,"x":1}"#,
            400,
            "baton:bad-request",
            "x",
        ),
        ("POST", "/v1/volumes", "{", 400, "baton:bad-request", "JSON"),
        ("POST", "/v1/volumes", huge.as_str(), 400, "baton:bad-request", ""),
        ("GET", "/v1/volumes/none", "", 404, "baton:no-such-volume", "none"),
        ("DELETE", "/v1/volumes/none", "", 404, "baton:no-such-volume", "none"),
        ("DELETE", "/v1/volumes/d?farce=true", "", 400, "baton:bad-request", "farce"),
        (
            "POST",
            "/v1/volumes/none/resize",
            r#"{"size_bytes":512}"#,
            404,
            "baton:no-such-volume",
            "none",
        ),
        (
            "POST",
            "/v1/volumes/d/resize",
            r#"{"size_bytes":512}"#,
            409,
            "baton:shrink-refused",
            "shrink",
        ),
        (
            "POST",
            "/v1/volumes/d/resize",
            r#"{"size_bytes":67108865}"#,
            400,
            "baton:bad-size",
            "512",
        ),
        (
            "POST",
            "/v1/volumes/none/fence",
            r#"{"reason":"r"}"#,
            404,
            "baton:no-such-volume",
            "none",
        ),
        ("POST", "/v1/volumes/d/fence", r#"{"reason":" "}"#, 400, "baton:bad-request", "reason"),
        ("POST", "/v1/volumes/d/fence", r#"{"nominee":"b"}"#, 400, "baton:bad-request", "reason"),
        (
            "POST",
            "/v1/volumes/d/fence",
            r#"{"reason":"r","nominee":""}"#,
            400,
            "baton:bad-request",
            "name",
        ),
        ("GET", "/nothing", "", 404, "baton:no-such-route", "openapi"),
        ("PUT", "/v1/volumes/d", "", 405, "baton:method", "openapi"),
    ] {
        let (got, got_kind, detail) = problem(&fixture, method, path, body);
        let what = format!("{method} {path} {body:.60}: {detail}");
        assert_eq!((got, got_kind.as_str()), (status, kind), "{what}");
        assert!(detail.contains(names), "{what}");
    }
    let list = json(&http(fixture.admin, "GET", "/v1/volumes", "").1);
    assert_eq!(list["volumes"].as_array().map(Vec::len), Some(1), "nothing half-made");
}

#[test]
fn a_volume_in_use_is_not_deleted() {
    let fixture = Fixture::start();
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "host-a/vm", 1);
    for path in ["/v1/volumes/d", "/v1/volumes/d?force=true"] {
        let (status, kind, detail) = problem(&fixture, "DELETE", path, "");
        assert_eq!((status, kind.as_str()), (409, "baton:volume-in-use"));
        assert!(detail.contains("host-a/vm") && detail.contains("fence"), "{detail}");
    }
    assert_eq!(owner.write(0, &[1; 512]), Status::Ok, "and goes on");
    let view = json(&http(fixture.admin, "GET", "/v1/volumes/d", "").1);
    assert_eq!(view["access"]["owner"], "host-a/vm");
    assert_eq!(view["sessions"][0]["mode"], "owner");
    assert_eq!(view["sessions"][0]["queue"], "0");
    let (status, _) = http(fixture.admin, "POST", "/v1/volumes/d/fence", r#"{"reason":"going"}"#);
    assert_eq!(status, 200);
    let mut hello = greeting("d", "reader", 2);
    hello.mode = AccessMode::ReadOnly;
    let (mut reader, welcome) = Client::greet(fixture.data, &hello).expect("welcomed");
    let (status, _, detail) = problem(&fixture, "DELETE", "/v1/volumes/d", "");
    assert_eq!(status, 409);
    assert!(detail.contains("reader") && detail.contains("force"), "{detail}");
    let parked = reader.send(Opcode::Event, welcome.event_id, 0);
    assert_eq!(http(fixture.admin, "DELETE", "/v1/volumes/d?force=true", "").0, 204);
    assert_eq!(reader.answer(parked).0, Status::Ok, "told");
    assert_eq!(reader.call(Opcode::Read, 0, 512).0, Status::Gone);
    assert_eq!(owner.call(Opcode::Read, 0, 512).0, Status::Gone);
    let (status, _) = Client::greet(fixture.data, &greeting("d", "h", 3)).err().expect("gone");
    assert_eq!(status, Status::NoSuchVolume);
}

#[test]
fn health_metrics_pool_and_document_are_served() {
    let fixture = Fixture::with(&["--pool-size", "8M"], |_| ());
    fixture.create("d", SIZE);
    let mut owner = fixture.owner("d", "h", 1);
    assert_eq!(owner.write(0, &[1; 4096]), Status::Ok);
    assert_eq!(owner.read(0, 4096), [1; 4096]);
    assert_eq!(owner.call(Opcode::Flush, 0, 0).0, Status::Ok);
    assert_eq!(http(fixture.admin, "GET", "/healthz", ""), (200, "ok\n".to_owned()));
    let pool = json(&http(fixture.admin, "GET", "/v1/pool", "").1);
    assert_eq!(pool["capacity_bytes"], 8 << 20);
    assert_eq!(pool["allocated_bytes"], 1 << 20);
    let (_, page) = http(fixture.admin, "GET", "/metrics", "");
    for line in [
        "baton_requests_total{opcode=\"read\",status=\"ok\"} 1",
        "baton_requests_total{opcode=\"write\",status=\"ok\"} 1",
        "baton_stale_requests_total 0",
        "baton_read_bytes_total 4096",
        "baton_written_bytes_total 4096",
        "baton_connections 1",
        "baton_inflight_requests 0",
        "baton_pool_allocated_bytes 1048576",
        "baton_flush_seconds_count 1",
        "baton_flush_seconds_bucket{le=\"+Inf\"} 1",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }
    // Every sample has its HELP and TYPE.
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().expect("a name");
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end).filter(|n| *n == "baton_flush_seconds"))
            .unwrap_or(name);
        assert!(page.contains(&format!("# TYPE {family} ")), "{family}");
    }
    let document = json(&http(fixture.admin, "GET", "/openapi.json", "").1);
    let responses = &document["paths"]["/v1/volumes/{name}/fence"]["post"]["responses"];
    assert_eq!(responses["409"]["$ref"], "#/components/responses/Problem");
    let sent_as = document["components"]["responses"]["Problem"]["content"].as_object();
    assert!(sent_as.expect("a body").keys().eq(["application/problem+json"]), "{document}");
}
