//! `--poll-us` on real daemons, on either side and on both: what a guest wrote is what it reads, and when it is done both
//! daemons give their cores back. Handoffs and hostile guests with it: `.ci/run polling`.

use baton_integration::baton::{Backend, Storage};
use baton_integration::bench::load::{Job, Pattern, run};
use baton_integration::workspace::TestDir;
use std::time::Duration;

const DISK_BYTES: u64 = 16 << 20;
/// The last threads go to sleep.
const A_WHILE: Duration = Duration::from_millis(150);
const WATCHED: Duration = Duration::from_secs(1);
/// Of [`WATCHED`]: a thread that spins takes more, whoever else wants the core, and a client that looks whether its
/// server is there takes less.
const BUSY: Duration = Duration::from_millis(50);

#[test]
fn what_is_written_is_read_and_then_the_cores_are_given_back() {
    for (server_us, backend_us) in [("0", "0"), ("100", "0"), ("0", "100"), ("100", "100")] {
        let dir = TestDir::new("polling").unwrap();
        let storage = Storage::start(dir.path(), &["--poll-us", server_us]).unwrap();
        storage.create("v", DISK_BYTES).unwrap();
        let flags = ["--num-queues", "2", "--poll-us", backend_us];
        let backend = Backend::start(dir.path(), "vm", &storage.uri("v", None), &flags).unwrap();
        let what = format!("server {server_us} us, backend {backend_us} us");
        for (depth, queues) in [(1, 1), (8, 2)] {
            let mut checked = 0;
            // As often as a busy machine needs.
            while checked < 20 {
                let outcome = run(&Job {
                    socket: backend.socket.clone(),
                    pattern: Pattern::RandRw,
                    block_bytes: 4096,
                    depth,
                    queues,
                    thread_per_queue: false,
                    warmup: Duration::from_millis(20),
                    duration: Duration::from_millis(100),
                    verify: true,
                    span_bytes: Some(64 * 4096),
                    stride_bytes: None,
                    seed: 3,
                    dirty_log: false,
                    pids: Vec::new(),
                })
                .unwrap();
                assert_eq!((outcome.errors, outcome.bad_reads), (0, 0), "{what}: {outcome:?}");
                checked += outcome.checked;
            }
        }
        std::thread::sleep(A_WHILE);
        let used = || [&storage.daemon, &backend.daemon].map(|daemon| daemon.cpu_time().unwrap());
        let before = used();
        std::thread::sleep(WATCHED);
        for (name, (before, after)) in ["server", "backend"].iter().zip(before.iter().zip(used())) {
            let ran = after - *before;
            assert!(ran < BUSY, "{what}: the {name} ran for {ran:?} with nothing to do");
        }
    }
}
