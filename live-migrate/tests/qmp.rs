//! The QMP driver against real QEMU processes without a guest.
//!
//! Skipped, and said so, where there is no QEMU and none is required.

mod qemu;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton_live_migrate::vmm::{
    Incoming, MigrationPhase, Outgoing, Qemu, RunState, Verdict, Vmm, VmmError, verdict,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use qemu::skip_without_qemu;

const LIMIT: Duration = Duration::from_secs(60);

/// Killed when dropped.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.0.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("signal");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine without a guest, stopped.
async fn qemu(dir: &TempDir, name: &str, more: &[&str]) -> (Process, Qemu) {
    let socket = dir.path().join(name);
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-machine", "q35", "-m", "64M", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-S", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .args(more)
        .stdin(Stdio::null())
        .spawn()
        .expect("QEMU starts");
    let process = Process(child);
    let vmm = Qemu::new(socket, LIMIT);
    let mut tries = 0;
    while vmm.status().await.expect("status").run == RunState::Gone {
        tries += 1;
        assert!(tries < 1200, "QEMU does not listen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    (process, vmm)
}

fn uri(path: &Path) -> String {
    format!("unix:{}", path.join("migration").display())
}

fn outgoing(uri: &str) -> Outgoing {
    Outgoing {
        uri: uri.to_owned(),
        pause_before_switchover: true,
        max_bandwidth_bytes_per_s: Some(1 << 30),
        downtime_limit_ms: Some(300),
    }
}

fn incoming(uri: &str) -> Incoming {
    Incoming { uri: uri.to_owned(), pause_before_switchover: true }
}

#[tokio::test]
async fn a_running_machine_moves_after_continue() {
    if skip_without_qemu("a_running_machine_moves_after_continue") {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let uri = uri(dir.path());
    let (_one, source) = qemu(&dir, "a", &[]).await;
    let (_two, destination) = qemu(&dir, "b", &["-incoming", "defer"]).await;
    source.resume().await.expect("resumed");
    let status = source.status().await.expect("status");
    assert_eq!(status.run, RunState::Running);
    assert!(status.version.is_some_and(|version| version.split('.').count() == 3));
    assert_eq!(destination.status().await.expect("status").run, RunState::Incoming);

    destination.incoming(&incoming(&uri)).await.expect("listens");
    source.migrate(&outgoing(&uri)).await.expect("started");
    let paused = source.wait(LIMIT).await.expect("status");
    assert_eq!(paused.migration.phase, MigrationPhase::PreSwitchover, "{paused:?}");
    assert_eq!(paused.run, RunState::Switching);
    // The destination was not told to run: this QEMU has `-S`.
    source.proceed().await.expect("continues");
    let done = source.wait(LIMIT).await.expect("status");
    assert_eq!(done.migration.phase, MigrationPhase::Completed, "{done:?}");
    assert_eq!(done.run, RunState::Migrated);
    let moved = destination.wait(LIMIT).await.expect("status");
    assert_eq!(moved.migration.phase, MigrationPhase::Completed);
    // `completed` on both sides, and still nobody runs.
    let both = |s, d| verdict(Some(s), Some(d));
    assert_eq!(both(&done, &moved), Verdict::Neither);
    destination.resume().await.expect("resumed");
    assert_eq!(both(&done, &destination.status().await.expect("status")), Verdict::Moved);
    source.quit().await.expect("ended");
    source.quit().await.expect("what is gone has quit");
}

#[tokio::test]
async fn a_cancel_is_heard_while_somebody_waits() {
    if skip_without_qemu("a_cancel_is_heard_while_somebody_waits") {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let uri = uri(dir.path());
    let (_one, source) = qemu(&dir, "a", &[]).await;
    let (_two, destination) = qemu(&dir, "b", &["-incoming", "defer"]).await;
    source.resume().await.expect("resumed");
    destination.incoming(&incoming(&uri)).await.expect("listens");
    source.migrate(&outgoing(&uri)).await.expect("started");
    let paused = source.wait(LIMIT).await.expect("status");
    assert_eq!(paused.migration.phase, MigrationPhase::PreSwitchover);

    let watched = Qemu::wait(&destination, LIMIT);
    let cancelled = async {
        source.cancel().await.expect("cancelled");
        // `cancelling` first.
        loop {
            let status = source.wait(LIMIT).await.expect("status");
            if status.migration.phase == MigrationPhase::Cancelled {
                break status;
            }
        }
    };
    let (at_destination, at_source) = tokio::join!(watched, cancelled);
    assert_eq!(at_source.run, RunState::Running, "the source goes on by itself");
    // The destination's QEMU ends when its migration fails: it may say so before.
    match at_destination {
        Ok(status) => assert_eq!(status.migration.phase, MigrationPhase::Failed, "{status:?}"),
        Err(error) => assert!(matches!(error, VmmError::Broken { .. }), "{error}"),
    }
    let refused = source.proceed().await.expect_err("nothing waits for it");
    assert!(matches!(refused, VmmError::Refused { command: "migrate-continue", .. }), "{refused}");
}

#[tokio::test]
async fn a_failed_migration_says_why() {
    if skip_without_qemu("a_failed_migration_says_why") {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let (_one, source) = qemu(&dir, "a", &[]).await;
    match source.migrate(&outgoing(&uri(dir.path()))).await {
        Err(VmmError::Refused { command: "migrate", detail, .. }) => {
            assert!(detail.contains("connect"), "{detail}");
        }
        Err(error) => panic!("{error}"),
        Ok(()) => {
            let status = source.wait(LIMIT).await.expect("status");
            assert_eq!(status.migration.phase, MigrationPhase::Failed);
            assert!(status.migration.error.is_some());
        }
    }
}

/// A QEMU that tells so many clients of an event that was for the one before, and takes its time for each answer.
async fn stale(events: usize, pause: Duration) -> (TempDir, Qemu, tokio::task::JoinHandle<()>) {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let dir = tempfile::tempdir().expect("temp dir");
    let socket = dir.path().join("a");
    let listener = tokio::net::UnixListener::bind(&socket).expect("bound");
    let serve = async move {
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            if number < events {
                let event = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n";
                stream.write_all(event.as_bytes()).await.expect("written");
                continue;
            }
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            let greeting = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \"capabilities\": []}}";
            let mut answer = greeting;
            loop {
                if write.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
                    break;
                }
                let Ok(Some(question)) = lines.next_line().await else { break };
                tokio::time::sleep(pause).await;
                answer = if question.contains("query-status") {
                    "{\"return\": {\"status\": \"running\", \"running\": true}}"
                } else {
                    "{\"return\": {}}"
                };
            }
        }
    };
    (dir, Qemu::new(socket, LIMIT), tokio::spawn(serve))
}

#[tokio::test]
async fn what_was_meant_for_the_client_before_is_no_greeting() {
    let (_dir, vmm, server) = stale(2, Duration::ZERO).await;
    assert_eq!(vmm.status().await.expect("status").run, RunState::Running);
    server.abort();
    // Somebody else's socket is not called for ever.
    let (_dir, vmm, server) = stale(usize::MAX, Duration::ZERO).await;
    let refused = vmm.status().await.expect_err("no greeting");
    assert!(matches!(refused, VmmError::Broken { command: "qmp_capabilities", .. }), "{refused:?}");
    server.abort();
}

/// As a coordinator does that is killed in the middle of its question to the agent.
#[tokio::test]
async fn whoever_asks_and_goes_harms_nobody_who_asks_meanwhile() {
    let (_dir, vmm, server) = stale(0, Duration::from_millis(50)).await;
    for wait_ms in (10..200).step_by(20) {
        let gone = tokio::time::timeout(Duration::from_millis(wait_ms), vmm.status());
        let (_, meanwhile, also) = tokio::join!(gone, vmm.status(), vmm.status());
        for status in [meanwhile, also] {
            assert_eq!(status.expect("status").run, RunState::Running, "gone after {wait_ms} ms");
        }
    }
    server.abort();
}

/// A session that was silent once is not used again, not even by who waited for it.
#[tokio::test]
async fn a_silent_session_is_given_up_for_all() {
    let (dir, _, server) = stale(0, Duration::from_millis(400)).await;
    let vmm = Qemu::new(dir.path().join("a"), Duration::from_millis(600));
    let (one, two, three) = tokio::join!(vmm.status(), vmm.status(), vmm.status());
    for status in [one, two, three] {
        if let Err(error) = status {
            let told = matches!(error, VmmError::Silent { .. } | VmmError::Broken { .. });
            // Nobody's question came to a session that has one open, which ends the process in the library.
            assert!(told && !format!("{error:?}").contains("Panic"), "{error:?}");
        }
    }
    server.abort();
}

#[tokio::test]
async fn a_frozen_qemu_is_silent_and_not_a_hang() {
    if skip_without_qemu("a_frozen_qemu_is_silent_and_not_a_hang") {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let (process, patient) = qemu(&dir, "a", &[]).await;
    process.signal(Signal::SIGSTOP);
    let vmm = Qemu::new(dir.path().join("a"), Duration::from_millis(200));
    let (one, other) = tokio::join!(vmm.status(), vmm.stop());
    for result in [one.map(drop), other] {
        assert!(matches!(result, Err(VmmError::Silent { .. })), "{result:?}");
    }
    process.signal(Signal::SIGCONT);
    assert_eq!(patient.status().await.expect("thawed").run, RunState::Paused);
}
