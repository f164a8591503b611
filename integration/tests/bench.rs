//! Each command of `baton-bench` runs, measures, and writes what it says it writes.

use baton_integration::baton::Backend;
use baton_integration::bench::compare::{CompareConfig, compare};
use baton_integration::bench::load::{Job, Pattern, run};
use baton_integration::bench::stack::Kind;
use baton_integration::bench::{fair, section, tenants};
use baton_integration::ceph::skip_without_ceph;
use baton_integration::workspace::{TestDir, program};
use std::fs;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use support::skip_without_storage_daemon;

mod support;

const SHORT: Duration = Duration::from_millis(100);

/// What measures has the machine for itself, as far as this program goes; see .config/nextest.toml for the others.
fn alone() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn config(kind: Kind, only: &str) -> CompareConfig {
    CompareConfig {
        a: kind,
        b: kind,
        rounds: 1,
        duration: SHORT,
        bytes: 64 << 20,
        only: Some(only.to_owned()),
        dirty_log: false,
        pinned: true,
    }
}

#[test]
fn a_comparison_has_ratios_floors_and_cpu_of_both_programs() {
    let _alone = alone();
    let report = compare(&config(Kind::Baton, "4k-d1-q1"), |_| ()).unwrap();
    assert_eq!((report.rows.len(), report.floors.len()), (2, 1));
    for pair in &report.rows[0].pairs {
        for outcome in [&pair.a, &pair.b] {
            assert!(outcome.ios > 0 && outcome.cpu_us_per_io(0) > 0.0, "{outcome:?}");
            assert!(outcome.cpu_us_per_io_of_all() > outcome.cpu_us_per_io(0), "{outcome:?}");
            assert_eq!(outcome.dirty_pages, None);
        }
    }
    let text = section::section("facts", &[report]);
    assert!(text.contains("| r4k-d1-q1 | ") && text.contains("eventfd round trip"), "{text}");
}

#[test]
fn one_that_is_not_bound_leaves_nobody_bound() {
    let _alone = alone();
    let free = CompareConfig { pinned: false, ..config(Kind::BatonNull, "r4k-d1-q1") };
    let report = compare(&free, |_| ()).unwrap();
    assert!(!report.pinned && report.rows[0].pairs.len() == 2);
    assert!(report.rows[0].pairs[0].a.ios > 0);
}

#[test]
fn a_dirty_log_is_written_and_only_where_it_is_kept() {
    let _alone = alone();
    let logged = CompareConfig { dirty_log: true, ..config(Kind::Baton, "d32-q1") };
    let report = compare(&logged, |_| ()).unwrap();
    for (row, pages_min) in report.rows.iter().zip([32, 1]) {
        for pair in &row.pairs {
            let marked = pair.a.dirty_pages.unwrap();
            assert!(marked > pages_min, "{marked} pages of {}", row.row.name);
            assert_eq!(pair.b.dirty_pages, None);
        }
    }
    let mixed = CompareConfig { b: Kind::BatonFile, ..logged };
    assert!(compare(&mixed, |_| ()).is_err(), "a log and nothing to compare it with");
}

#[test]
fn queues_and_tenants_have_figures_of_their_own() {
    let _alone = alone();
    let fair = fair::measure(Kind::Baton, 1, SHORT, 64 << 20, |_| ()).unwrap();
    for outcome in fair.reads.iter().chain(&fair.writes) {
        assert_eq!(outcome.by_queue.len(), 4);
        assert_eq!(outcome.by_queue.iter().map(|queue| queue.ios).sum::<u64>(), outcome.ios);
        assert!(fair::tail(&outcome.by_queue) >= 1.0, "{outcome:?}");
    }
    assert!(fair::table(&fair).contains("| random writes | "));

    let only = Some("reads beside writes of 128");
    // The neighbour gives way to everybody on the machine, and may get nothing for a while.
    let rows = [2, 8, 32, 128]
        .into_iter()
        .map(|times| tenants::measure(1, SHORT * times, only, |_| ()))
        .find_map(|rows| rows.inspect_err(|error| eprintln!("again: {error:#}")).ok())
        .expect("one of them");
    assert_eq!((rows.len(), rows[0].pairs.len()), (1, 2));
    for pair in &rows[0].pairs {
        assert!(pair.neighbour.ios > 0 && pair.alone.ios > 0 && pair.beside.ios > 0, "{pair:?}");
        assert!(pair.server_busy() > 0.0, "{pair:?}");
    }
    let error = tenants::measure(1, SHORT, Some("r4k"), |_| ()).unwrap_err().to_string();
    assert!(error.contains("no row is called like that"), "{error}");
}

#[test]
fn peers_without_a_server_are_there() {
    let _alone = alone();
    if skip_without_storage_daemon("peers_without_a_server_are_there") {
        return;
    }
    for (a, b) in [(Kind::BatonNull, Kind::QsdNull), (Kind::BatonFile, Kind::QsdFileUring)] {
        let config = CompareConfig { b, ..config(a, "r4k-d32-q1") };
        let report = compare(&config, |_| ()).unwrap();
        for outcome in report.rows[0].pairs.iter().flat_map(|pair| [&pair.a, &pair.b]) {
            assert!(outcome.ios > 0 && outcome.usage.processes_s.len() == 1, "{outcome:?}");
        }
    }
}

#[test]
fn engines_of_others_are_compared_with_their_own_servers() {
    let _alone = alone();
    const NAME: &str = "engines_of_others_are_compared_with_their_own_servers";
    if skip_without_storage_daemon(NAME) || skip_without_ceph(NAME) {
        return;
    }
    for (a, b) in [
        (Kind::BatonNbd, Kind::QsdNbdkit),
        (Kind::BatonNbdUnix, Kind::QsdNbdkitUnix),
        (Kind::BatonRbd, Kind::QsdRbd),
    ] {
        let config = CompareConfig { b, ..config(a, "w4k-d32-q1") };
        let report = compare(&config, |_| ()).unwrap();
        for outcome in report.rows[0].pairs.iter().flat_map(|pair| [&pair.a, &pair.b]) {
            assert!(outcome.ios > 0 && outcome.cpu_us_per_io(1) > 0.0, "{outcome:?}");
        }
        let text = section::section("facts", &[report]);
        assert!(text.contains("| w4k-d32-q1 |") && text.contains("(at most 0.7)"), "{text}");
    }
}

#[test]
fn a_document_is_only_written_when_it_is_asked_for() {
    let _alone = alone();
    let dir = TestDir::new("bench-docs").unwrap();
    let document = dir.join("performance.md");
    let before = "x\n<!-- bench-dirty-log: begin -->\nold\n<!-- bench-dirty-log: end -->\ny\n";
    fs::write(&document, before).unwrap();
    let bench = |more: &[&str]| {
        let short = ["--rounds", "1", "--seconds", "0.05", "--size", "64M", "--only", "r4k-d1-q1"];
        let mut command = Command::new(program("baton-bench").unwrap());
        let done = command.arg("dirty-log").args(short).args(more).output().unwrap();
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (good, said) = bench(&[]);
    assert!(good && fs::read_to_string(&document).unwrap() == before, "{said}");
    let path = document.to_str().unwrap();
    let (good, said) = bench(&["--write-docs", path, "--commit", "abc"]);
    assert!(good, "{said}");
    let after = fs::read_to_string(&document).unwrap();
    assert!(after.contains("commit abc") && after.contains("| r4k-d1-q1 |"), "{after}");
    assert!(after.starts_with("x\n") && after.ends_with("-->\ny\n") && !after.contains("old"));
    assert!(dir.join("bench-dirty-log.svg").is_file() && dir.join("bench-dirty-log.png").is_file());
    fs::write(&document, "no markers").unwrap();
    let (good, said) = bench(&["--write-docs", path]);
    assert!(!good && said.contains("there is no line"), "{said}");
}

#[test]
fn somebody_elses_back_end_keeps_a_log_too() {
    let _alone = alone();
    if skip_without_storage_daemon("somebody_elses_back_end_keeps_a_log_too") {
        return;
    }
    let dir = TestDir::new("bench-log").unwrap();
    let (_daemon, socket) = support::storage_daemon(&dir, 1);
    let job = Job {
        socket,
        pattern: Pattern::RandRead,
        block_bytes: 4096,
        depth: 8,
        queues: 1,
        thread_per_queue: false,
        warmup: Duration::ZERO,
        duration: SHORT,
        verify: false,
        span_bytes: None,
        stride_bytes: None,
        dirty_log: true,
        seed: 1,
        pids: Vec::new(),
    };
    let outcome = run(&job).unwrap();
    assert!(outcome.dirty_pages.unwrap() > 8, "{outcome:?}");
}

#[test]
fn blocks_may_lie_apart() {
    const STRIDE: usize = 1 << 20;
    let _alone = alone();
    let dir = TestDir::new("bench-stride").unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 16 * STRIDE]).unwrap();
    let uri = format!("file://{}", image.display());
    let backend = Backend::start(dir.path(), "vm", &uri, &[]).unwrap();
    let job = Job {
        socket: backend.socket.clone(),
        pattern: Pattern::Write,
        block_bytes: 4096,
        depth: 4,
        queues: 1,
        thread_per_queue: false,
        warmup: Duration::ZERO,
        duration: SHORT,
        verify: true,
        span_bytes: None,
        stride_bytes: Some(STRIDE as u64),
        dirty_log: false,
        seed: 1,
        pids: Vec::new(),
    };
    assert_eq!(run(&job).unwrap().errors, 0);
    let data = fs::read(&image).unwrap();
    let written = |n: usize| data[n * STRIDE..][..4096].iter().any(|byte| *byte != 0);
    assert!((0..16).any(written), "nothing was written");
    let between = |n: usize| data[n * STRIDE..][4096..STRIDE].iter().any(|byte| *byte != 0);
    assert_eq!((0..16).find(|n| between(*n)), None, "something was written between the blocks");
    let overlapping = Job { stride_bytes: Some(2048), ..job };
    assert!(run(&overlapping).unwrap_err().to_string().contains("overlap"));
}
