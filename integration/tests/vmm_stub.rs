//! The stub of a VMM: it moves its guest, and its histories tell good storage from bad.

use baton_integration::baton::Backend;
use baton_integration::daemon::Daemon;
use baton_integration::faults::history::{Event, Judge, What};
use baton_integration::faults::stub::Stub;
use baton_integration::qsd::raw_file;
use baton_integration::workspace::TestDir;
use std::path::PathBuf;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

/// Backends of a host, each for one file; both hosts have the same files and the last one must be gone.
fn host(dir: &TestDir, name: &str, disks: usize) -> (Vec<Daemon>, Vec<PathBuf>) {
    (0..disks)
        .map(|disk| {
            let file = dir.join(&format!("disk-{disk}.img"));
            if !file.exists() {
                raw_file(&file, 16 << 20).unwrap();
            }
            let uri = format!("file://{}", file.display());
            let backend = Backend::start(dir.path(), &format!("{name}-{disk}"), &uri, &[]).unwrap();
            (backend.daemon, backend.socket)
        })
        .unzip()
}

fn stub(dir: &TestDir, number: u64, sockets: &[PathBuf]) -> Stub {
    let mut stub = Stub::start(dir.path(), number, sockets).unwrap();
    stub.wait_ready().unwrap();
    stub
}

fn completions(events: &[Event]) -> usize {
    events.iter().filter(|event| event.what == What::Complete).count()
}

#[test]
fn a_guest_moves_with_what_it_knows_and_a_second_copy_of_it_is_found_out() {
    let dir = TestDir::new("stub").unwrap();
    let (mut backends, sockets) = host(&dir, "a", 2);
    let source = stub(&dir, 1, &sockets);
    source.order("run").unwrap();
    source.wait_progress(50, SOON).unwrap();
    source.order("log").unwrap();
    source.order("stop").unwrap();
    let saved = dir.join("saved");
    source.save(&saved).unwrap();
    drop(backends.drain(..));

    let (mut backends, sockets) = host(&dir, "b", 2);
    let destination = stub(&dir, 2, &sockets);
    destination.load(&saved).unwrap();
    destination.order("run").unwrap();
    destination.wait_progress(50, SOON).unwrap();
    destination.sweep(SOON).unwrap();

    let mut judge = Judge::default();
    judge.follow(&source.history().unwrap()).unwrap();
    judge.follow(&destination.history().unwrap()).unwrap();
    assert_eq!(judge.unanswered(), 0);
    drop(backends.drain(..));
    assert!(judge.completed() >= 200, "{}", judge.completed());

    // The same guest once more, from where it stopped: it sees what it cannot have written.
    let (_more, sockets) = host(&dir, "c", 2);
    let copy = stub(&dir, 3, &sockets);
    copy.load(&saved).unwrap();
    copy.sweep(SOON).unwrap();
    let mut judge = Judge::default();
    judge.follow(&source.history().unwrap()).unwrap();
    let error = judge.follow(&copy.history().unwrap()).unwrap_err().to_string();
    assert!(error.contains("it may hold"), "{error}");
}

#[test]
fn a_guest_outlives_its_backend_and_is_not_served_twice() {
    let dir = TestDir::new("stub").unwrap();
    let file = dir.join("disk.img");
    raw_file(&file, 16 << 20).unwrap();
    let uri = format!("file://{}", file.display());
    let mut backend = Backend::start(dir.path(), "a", &uri, &[]).unwrap();
    let guest = stub(&dir, 1, std::slice::from_ref(&backend.socket));
    guest.order("run").unwrap();
    for _ in 0..3 {
        guest.wait_progress(30, SOON).unwrap();
        backend.kill_and_restart().unwrap();
    }
    guest.wait_progress(30, SOON).unwrap();
    guest.sweep(SOON).unwrap();
    let events = guest.history().unwrap();
    let mut judge = Judge::default();
    judge.follow(&events).unwrap();
    assert_eq!(judge.completed(), completions(&events) as u64);
}
