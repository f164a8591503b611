//! Queues that share a thread, because the backend may use fewer CPUs than it has queues: they serve the disk as with a
//! thread each, also when the storage comes back and when one of them is stopped.

use baton_integration::baton::{Backend, Storage, wait_until};
use baton_integration::bench::cpu::{on_own_thread, pin_this_thread};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const QUEUES: u16 = 4;
const SOON: Duration = Duration::from_secs(20);

/// With a backend that may use one CPU only, as this test then.
fn confined(dir: &TestDir, uri: &str, test: impl FnOnce(&Backend) + Send) {
    let queues = QUEUES.to_string();
    on_own_thread(|| {
        pin_this_thread(0).unwrap();
        test(&Backend::start(dir.path(), "vm", uri, &["--num-queues", &queues]).unwrap());
    });
}

/// Threads of the backend that serve queues. A thread has its name when it has run.
fn queue_threads(backend: &Backend) -> usize {
    let tasks =
        fs::read_dir(format!("/proc/{}/task", backend.daemon.pid())).unwrap().map(Result::unwrap);
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap();
    tasks.map(name).filter(|name| name.contains("-q")).count()
}

fn connect(backend: &Backend) -> RawFrontend {
    let options = Options { queues: QUEUES, ..Options::default() };
    RawFrontend::connect(&backend.socket, options).unwrap()
}

#[test]
fn queues_on_one_cpu_share_a_thread_and_serve_the_disk_through_a_kill_of_the_server() {
    let dir = TestDir::new("threads").unwrap();
    let mut storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 << 20).unwrap();
    let uri = storage.uri("v", None);
    confined(&dir, &uri, |backend| serve_through_kills(backend, &mut storage));
}

fn serve_through_kills(backend: &Backend, storage: &mut Storage) {
    let mut front_end = connect(backend);
    let queues: Vec<_> = (0..QUEUES).map(|index| front_end.take_queue(index)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0_u8..)
            .zip(queues)
            .map(|(index, mut queue)| {
                let over = &over;
                scope.spawn(move || {
                    let sector = u64::from(index) * 4096;
                    let mut round = 0_u8;
                    while !over.load(Ordering::Relaxed) {
                        round = round.wrapping_add(1);
                        let data = vec![index ^ round; 8192];
                        queue.write(sector, &data).unwrap();
                        assert_eq!(queue.read(sector, 8192).unwrap(), data);
                    }
                    round
                })
            })
            .collect();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            storage.kill_and_restart().unwrap();
        }
        std::thread::sleep(Duration::from_millis(300));
        over.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
    });
    assert_eq!(queue_threads(backend), 1);
}

/// A ring that is stopped is nobody else's matter, and the next front-end finds all of them.
#[test]
fn a_queue_that_is_stopped_leaves_the_others_of_its_thread_running() {
    let dir = TestDir::new("threads").unwrap();
    let storage = Storage::start(dir.path(), &[]).unwrap();
    storage.create("v", 64 << 20).unwrap();
    confined(&dir, &storage.uri("v", None), |backend| {
        for round in 0..3 {
            let mut front_end = connect(backend);
            for stopped in 0..QUEUES {
                front_end.get_vring_base(stopped).unwrap();
                for index in stopped + 1..QUEUES {
                    let (sector, queue) = (u64::from(index) * 8, front_end.queue(index));
                    let data = vec![round * 16 + u8::try_from(index).unwrap(); 4096];
                    queue.write(sector, &data).unwrap();
                    assert_eq!(queue.read(sector, 4096).unwrap(), data);
                }
            }
        }
        assert_eq!(queue_threads(backend), 1);
    });
}

/// Requests of a local file hold up the thread that does them.
#[test]
fn queues_of_a_local_file_have_a_thread_each() {
    let dir = TestDir::new("threads").unwrap();
    let path = dir.join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    confined(&dir, &format!("file://{}", path.display()), |backend| {
        let each = || queue_threads(backend) == usize::from(QUEUES);
        wait_until("each queue has its thread", SOON, each).unwrap();
    });
}
