//! The agent as a program: what it promises of backends and monitors.

mod api;
mod backends;
mod cooperative;
mod full;
mod monitors;
#[path = "../qemu/mod.rs"]
mod qemu;
#[path = "../../../storage-server/tests/common/small_disk.rs"]
mod small_disk;
mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::json;

/// Not a test: the backend that the other tests have the agent start. It answers
/// on its control socket and is drained when a file says so.
#[test]
#[ignore = "run as a process by the other tests"]
fn pretended_backend() {
    let Ok(arguments) = std::env::var("PRETENDED_ARGUMENTS") else { return };
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let after = |flag| {
        let at = arguments.iter().position(|argument| *argument == flag)?;
        arguments.get(at + 1).copied()
    };
    let config: toml::Table = toml::from_str(
        &std::fs::read_to_string(after("--config").expect("--config")).expect("read"),
    )
    .expect("TOML");
    let control = Path::new(after("--control").expect("--control"));
    let names: Vec<&str> = config["disk"]
        .as_array()
        .expect("disks")
        .iter()
        .filter_map(|disk| disk["name"].as_str())
        .collect();
    let _ = std::fs::remove_file(control);
    let listener = UnixListener::bind(control).expect("bind");
    for stream in listener.incoming() {
        let mut stream = stream.expect("accept");
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line).expect("question");
        let question: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        if question["cmd"] == "status" {
            let asked = control.with_extension("asked");
            let count = std::fs::read(&asked).map_or(0, |count| count.len());
            std::fs::write(&asked, vec![b'x'; count + 1]).expect("written");
        }
        let handoff = std::fs::read(control.with_extension("handoff")).unwrap_or_default();
        let handoff: serde_json::Value = serde_json::from_slice(&handoff).unwrap_or_default();
        let drained = control.with_extension("drained").exists();
        let front_end = std::fs::read_to_string(control.with_extension("front-end"));
        let front_end: Option<i32> = front_end.ok().and_then(|pid| pid.parse().ok());
        let answer = match question["cmd"].as_str() {
            Some("status") => json!({
                "pid": std::process::id(),
                "handoff": handoff,
                "owner": config["owner"].as_str(),
                "standby": arguments.iter().any(|argument| argument.starts_with("--standby")),
                "only_for": arguments.iter().find_map(|argument| argument.strip_prefix("--standby=")),
                "disks": names.iter().map(|name| json!({"name": name, "drained": drained, "front_end": front_end})).collect::<Vec<_>>(),
            }),
            // One whose storage keeps nobody out.
            Some("seal") if question["try"].is_string() => {
                let starts = question["starts"].to_string();
                std::fs::write(control.with_extension("sealed"), starts).expect("written");
                if std::fs::remove_file(control.with_extension("hangs")).is_ok() {
                    nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).expect("stopped");
                }
                match std::fs::read_to_string(control.with_extension("refuses")) {
                    Ok(kind) => json!({"error": {"type": kind, "detail": "as told"}}),
                    Err(_) => json!({"ok": true, "pid": std::process::id()}),
                }
            }
            Some("permit") => {
                std::fs::write(
                    control.with_extension("permitted"),
                    question["try"].as_str().unwrap_or_default(),
                )
                .expect("written");
                json!({"ok": true})
            }
            Some(command @ ("seal" | "activate" | "abdicate")) => {
                json!({"ok": true, "did": command})
            }
            Some("reclaim") => {
                json!({"error": {"type": "lost-race", "detail": "the destination owns the volumes"}})
            }
            _ => json!({"error": {"type": "unknown-command", "detail": "what?"}}),
        };
        let _ = stream.write_all(format!("{answer}\n").as_bytes());
    }
}
