//! Against a small server that answers as the published API description says.

use std::sync::Mutex;

use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::routing::any;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::Notify;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// What the pretended monitor does.
#[derive(Debug)]
struct Pretender {
    /// `None` is a monitor without a machine.
    state: Mutex<Option<&'static str>>,
    /// Commands with their bodies.
    heard: Mutex<Vec<String>>,
    /// A migration ends when this is told, with this status.
    land: Notify,
    outcome: StatusCode,
}

impl Pretender {
    fn start(
        state: Option<&'static str>,
        outcome: StatusCode,
    ) -> (Arc<Self>, CloudHypervisor, TempDir) {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("ch.sock");
        let this = Arc::new(Self {
            state: Mutex::new(state),
            heard: Mutex::default(),
            land: Notify::new(),
            outcome,
        });
        let listener = UnixListener::bind(&path).expect("bind");
        let router =
            Router::new().route("/api/v1/{command}", any(answer)).with_state(Arc::clone(&this));
        tokio::spawn(async move { axum::serve(listener, router).await });
        (this, CloudHypervisor::new(path, LIMIT), dir)
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().expect("lock").clone()
    }
}

async fn answer(
    State(this): State<Arc<Pretender>>,
    method: Method,
    UrlPath(command): UrlPath<String>,
    body: String,
) -> (StatusCode, String) {
    this.heard.lock().expect("lock").push(format!("{method} {command} {body}").trim().to_owned());
    let state = *this.state.lock().expect("lock");
    let empty = |status| (status, String::new());
    match (command.as_str(), state) {
        ("vm.info", Some(state)) => {
            (StatusCode::OK, json!({"config": {}, "state": state}).to_string())
        }
        ("vm.receive-migration" | "vm.send-migration", _) => {
            this.land.notified().await;
            if this.outcome.is_success() {
                let landed = (command == "vm.receive-migration").then_some("Running");
                *this.state.lock().expect("lock") = landed;
                return empty(StatusCode::NO_CONTENT);
            }
            (this.outcome, json!(["Error from API", "the peer is gone"]).to_string())
        }
        ("vm.info" | "vm.pause" | "vm.resume", None) => empty(StatusCode::NOT_FOUND),
        ("vm.pause", Some("Running")) => {
            *this.state.lock().expect("lock") = Some("Paused");
            empty(StatusCode::NO_CONTENT)
        }
        ("vm.resume", Some("Paused")) => {
            *this.state.lock().expect("lock") = Some("Running");
            empty(StatusCode::NO_CONTENT)
        }
        ("vmm.shutdown", _) => empty(StatusCode::NO_CONTENT),
        _ => empty(StatusCode::METHOD_NOT_ALLOWED),
    }
}

fn outgoing(pause: bool) -> Outgoing {
    Outgoing {
        uri: "unix:/m".to_owned(),
        pause_before_switchover: pause,
        max_bandwidth_bytes_per_s: None,
        downtime_limit_ms: Some(50),
    }
}

#[tokio::test]
async fn stops_and_resumes() {
    let (pretender, vmm, _dir) = Pretender::start(Some("Running"), StatusCode::NO_CONTENT);
    assert_eq!(vmm.status().await.expect("status").run, RunState::Running);
    vmm.stop().await.expect("stopped");
    assert_eq!(vmm.status().await.expect("status").run, RunState::Paused);
    let refused = vmm.stop().await.expect_err("stopped already");
    assert!(matches!(refused, VmmError::Refused { command: "vm.pause", .. }), "{refused}");
    assert!(refused.to_string().contains("not in a state"), "{refused}");
    vmm.resume().await.expect("resumed");
    vmm.quit().await.expect("quit");
    let heard = pretender.heard();
    assert_eq!(heard.last().expect("heard"), "PUT vmm.shutdown");
    assert!(heard.iter().filter(|line| line.contains("vm.info")).all(|l| l.starts_with("GET")));
}

#[tokio::test]
async fn a_migration_is_watched_to_its_end() {
    let (there, destination, _d) = Pretender::start(None, StatusCode::NO_CONTENT);
    let (here, source, _s) = Pretender::start(Some("Running"), StatusCode::NO_CONTENT);
    assert_eq!(destination.status().await.expect("status").run, RunState::Gone);
    let incoming = Incoming { uri: "unix:/m".to_owned(), pause_before_switchover: false };
    destination.incoming(&incoming).await.expect("listens");
    assert_eq!(destination.status().await.expect("status").run, RunState::Incoming);
    source.migrate(&outgoing(false)).await.expect("started");
    let status = source.status().await.expect("status");
    assert_eq!((status.run, status.migration.phase), (RunState::Running, MigrationPhase::Active));
    let twice = source.migrate(&outgoing(false)).await.expect_err("one at a time");
    assert!(matches!(twice, VmmError::Refused { .. }));
    here.land.notify_one();
    there.land.notify_one();
    let moved = destination.wait(LIMIT).await.expect("status");
    assert_eq!((moved.run, moved.migration.phase), (RunState::Running, MigrationPhase::Completed));
    let left = source.wait(LIMIT).await.expect("status");
    assert_eq!((left.run, left.migration.phase), (RunState::Gone, MigrationPhase::Completed));
    let told = r#"PUT vm.send-migration {"destination_url":"unix:/m","downtime_ms":50}"#;
    assert!(here.heard().iter().any(|line| line == told), "{:?}", here.heard());
    let told = r#"PUT vm.receive-migration {"receiver_url":"unix:/m"}"#;
    assert!(there.heard().iter().any(|line| line == told), "{:?}", there.heard());
}

#[tokio::test]
async fn a_failure_keeps_its_reason_and_the_source() {
    let (pretender, vmm, _dir) =
        Pretender::start(Some("Running"), StatusCode::INTERNAL_SERVER_ERROR);
    vmm.migrate(&outgoing(false)).await.expect("started");
    pretender.land.notify_one();
    let status = vmm.wait(LIMIT).await.expect("status");
    assert_eq!((status.run, status.migration.phase), (RunState::Running, MigrationPhase::Failed));
    let error = status.migration.error.expect("a reason");
    assert!(error.contains("the peer is gone"), "{error}");
    // And may be tried again.
    vmm.migrate(&outgoing(false)).await.expect("started");
}

#[tokio::test]
async fn what_it_cannot_do_is_said_before_anything_is_done() {
    let (pretender, vmm, _dir) = Pretender::start(Some("Running"), StatusCode::NO_CONTENT);
    for refused in [vmm.migrate(&outgoing(true)).await, vmm.proceed().await, vmm.cancel().await] {
        assert!(matches!(refused, Err(VmmError::Unsupported { .. })), "{refused:?}");
    }
    assert!(pretender.heard().is_empty());
}

#[tokio::test]
async fn a_hung_or_absent_monitor_is_told_apart() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("s");
    let absent = CloudHypervisor::new(path.clone(), LIMIT);
    assert_eq!(absent.status().await.expect("status").run, RunState::Gone);
    assert!(matches!(absent.stop().await, Err(VmmError::Unreachable { .. })));
    // Accepts nothing; the kernel completes the connection all the same.
    let _listener = UnixListener::bind(&path).expect("bind");
    let hung = CloudHypervisor::new(path, Duration::from_millis(50));
    assert!(matches!(hung.status().await, Err(VmmError::Silent { command: "vm.info", .. })));
}

#[test]
fn a_refusal_says_something_whatever_came() {
    let refusal = |body: &[u8]| refusal(StatusCode::INTERNAL_SERVER_ERROR, body);
    assert_eq!(refusal(br#"["a","b"]"#), "a: b");
    assert_eq!(refusal(b"plain words"), "plain words");
    assert!(refusal(b"").contains("500"));
    assert!(refusal(b"\xff\xfe").contains('\u{fffd}'));
}
