//! The load generator on somebody else's backend: it must count, verify, and find planted damage.

use baton_integration::bench::load::{Job, Pattern, run};
use baton_integration::workspace::TestDir;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use support::{skip_without_storage_daemon, storage_daemon};

mod support;

fn job(socket: &Path, pattern: Pattern, queues: u16) -> Job {
    Job {
        socket: socket.to_path_buf(),
        pattern,
        block_bytes: 4096,
        depth: 8,
        queues,
        thread_per_queue: false,
        warmup: Duration::from_millis(20),
        duration: Duration::from_millis(300),
        verify: true,
        span_bytes: Some(4 << 20),
        stride_bytes: None,
        dirty_log: false,
        seed: 3,
        pids: Vec::new(),
    }
}

#[test]
fn counts_verifies_and_measures() {
    if skip_without_storage_daemon("counts_verifies_and_measures") {
        return;
    }
    let dir = TestDir::new("load").unwrap();
    let (daemon, socket) = storage_daemon(&dir, 2);
    for thread_per_queue in [false, true] {
        let pids = vec![daemon.pid()];
        let outcome =
            run(&Job { thread_per_queue, pids, ..job(&socket, Pattern::RandRw, 2) }).unwrap();
        assert_eq!((outcome.errors, outcome.bad_reads), (0, 0), "{:?}", outcome.findings);
        assert!(outcome.ios > 100 && outcome.checked > 20, "{outcome:?}");
        assert!(
            outcome.p50_us > 0.0
                && outcome.p50_us <= outcome.p99_us
                && outcome.p99_us <= outcome.max_us
        );
        assert!(outcome.cpu_us_per_io(0) > 0.1, "the backend worked: {:?}", outcome.usage);
    }
    for pattern in [Pattern::Read, Pattern::Write, Pattern::RandRead, Pattern::RandWrite] {
        let outcome =
            run(&Job { verify: false, span_bytes: None, ..job(&socket, pattern, 1) }).unwrap();
        assert!(outcome.errors == 0 && outcome.ios > 100, "{outcome:?}");
    }
    let error = run(&job(&socket, Pattern::Read, 3)).unwrap_err().to_string();
    assert!(error.contains("has 2 queues"), "{error}");
}

#[test]
fn damage_behind_its_back_is_found() {
    if skip_without_storage_daemon("damage_behind_its_back_is_found") {
        return;
    }
    let dir = TestDir::new("load").unwrap();
    let (_daemon, socket) = storage_daemon(&dir, 1);
    let disk = dir.join("disk.img");
    let outcome = std::thread::scope(|scope| {
        let vandal = scope.spawn(|| {
            let file = File::options().write(true).open(&disk).unwrap();
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(10));
                file.write_all_at(&vec![0; 4 << 20], 0).unwrap();
            }
        });
        let outcome = run(&job(&socket, Pattern::RandRw, 1)).unwrap();
        vandal.join().unwrap();
        outcome
    });
    assert!(outcome.bad_reads > 0, "{outcome:?}");
    assert!(
        outcome.findings[0].contains("Zero") || outcome.findings[0].contains("Torn"),
        "{:?}",
        outcome.findings
    );
}
