//! The NBD driver against real servers that fail, stall, die and come back.

mod common;
mod nbd_server;

use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use baton_remote_client::{IoError, Op, OpenOptions, Tag, VolumeEvent, VolumeState, open};
use common::{Buffer, collect, eventually, opened, options, refused, run, stamped_load};
use nbd_server::{NbdServer, disk, skip_without};
use nix::sys::signal::Signal;

const LONG: Duration = Duration::from_secs(20);
const BYTES: u64 = 8 << 20;

/// Queues with their own threads, stamped data, and a server that is killed with
/// SIGKILL and started again over and over: no error, and nothing lost or mixed up.
fn survives_kills(server: &mut NbdServer, export: &str, queues: u16) {
    let volume = opened(&server.uri(export));
    assert!(volume.queues_max() >= queues);
    let deadline = Instant::now() + Duration::from_secs(3);
    let workers = stamped_load(&volume, queues, deadline);
    let mut kills = 0;
    while Instant::now() < deadline {
        thread::sleep(Duration::from_millis(150));
        server.kill();
        thread::sleep(Duration::from_millis(30));
        server.restart();
        kills += 1;
    }
    let mut queues: Vec<_> = workers.into_iter().map(|w| w.join().expect("worker")).collect();
    assert!(kills > 5);
    // Each queue notices by itself when it is polled.
    eventually("connected again", || {
        queues.iter_mut().for_each(|(queue, _)| queue.poll(&mut Vec::new()));
        volume.state() == VolumeState::Connected
    });
    let rounds: u32 = queues.iter().map(|(_, rounds)| rounds).sum();
    assert!(rounds > 20, "hardly any progress: {rounds}");
}

#[test]
fn kills_of_nbdkit_under_load_are_only_a_pause() {
    if skip_without("kills_of_nbdkit_under_load_are_only_a_pause", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let mut server =
        NbdServer::nbdkit(dir.path(), &["--filter=delay", "file", &path, "wdelay=3ms"]);
    survives_kills(&mut server, "", 4);
}

#[test]
fn kills_of_qemu_nbd_under_load_are_only_a_pause() {
    if skip_without("kills_of_qemu_nbd_under_load_are_only_a_pause", "qemu-nbd") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let mut server = NbdServer::qemu(dir.path(), &["--shared=8", &path]);
    survives_kills(&mut server, "disk", 2);
}

/// A server that ends with its last client, and one place only.
#[test]
fn one_connection_is_enough() {
    if skip_without("one_connection_is_enough", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let args = ["--filter=exitlast", "--filter=noparallel", "--filter=multi-conn", "file"];
    let args = [&args[..], &[&path, "multi-conn-mode=disable", "serialize=connections"]].concat();
    let server = NbdServer::nbdkit(dir.path(), &args);
    let volume = opened(&server.uri(""));
    assert_eq!(volume.queues_max(), 1);
    for _ in 0..3 {
        let mut queue = volume.open_queue(0, 4).expect("queue");
        volume.open_queue(1, 4).map(|_| ()).expect_err("one connection, one queue");
        assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(vec![])), Ok(()));
    }
    assert_eq!(volume.state(), VolumeState::Connected, "it has not ended meanwhile");
    volume.close(false);
    drop(volume);
    eventually("the server has ended with its client", || !server.listens());
}

/// A server that stands still is waited for: its old connection is not given up, for
/// its requests could be done after those of a new one.
#[test]
fn a_frozen_server_is_waited_for() {
    if skip_without("a_frozen_server_is_waited_for", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let server = NbdServer::nbdkit(dir.path(), &["file", &path]);
    let volume = opened(&server.uri(""));
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(vec![])), Ok(()));
    server.signal(Signal::SIGSTOP);
    let mut data = Buffer(vec![7; 1 << 20]);
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &data.iov()) };
    // Several times what `quick` gives any step.
    assert_eq!(collect(&mut *queue, 1, Duration::from_secs(2)), []);
    assert_eq!((queue.in_flight(), volume.state()), (1, VolumeState::Connected));
    server.signal(Signal::SIGCONT);
    assert_eq!(collect(&mut *queue, 1, LONG).len(), 1);
}

/// While the server is away requests wait, the state says so, and nothing keeps the
/// process from ending.
#[test]
fn a_dead_server_parks_requests_and_holds_up_nobody() {
    if skip_without("a_dead_server_parks_requests_and_holds_up_nobody", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let mut server = NbdServer::nbdkit(dir.path(), &["file", &path]);
    let volume = opened(&server.uri(""));
    let (told, events) = std::sync::mpsc::channel();
    volume.set_listener(Arc::new(move |event| {
        let _ = told.send(event);
    }));
    let mut queue = volume.open_queue(0, 4).expect("queue");
    server.kill();
    let mut data = Buffer(vec![7; 4096]);
    // SAFETY: the buffer outlives the queue.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &data.iov()) };
    assert_eq!(collect(&mut *queue, 1, Duration::from_millis(500)), []);
    assert_eq!(volume.state(), VolumeState::Reconnecting);
    assert_eq!(events.try_recv(), Ok(VolumeEvent::State(VolumeState::Reconnecting)));
    let begun = Instant::now();
    drop(queue);
    volume.close(true);
    drop(volume);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn what_the_server_fails_the_guest_sees() {
    if skip_without("what_the_server_fails_the_guest_sees", "nbdkit") {
        return;
    }
    for (errno, write, zero, read) in [
        ("EIO", IoError::Io, IoError::Io, IoError::Io),
        ("ENOSPC", IoError::NoSpace, IoError::NoSpace, IoError::Io),
        ("EPERM", IoError::ReadOnly, IoError::ReadOnly, IoError::Io),
        ("EINVAL", IoError::Io, IoError::Io, IoError::Io),
    ] {
        for more in [&[][..], &["--no-sr"]] {
            let dir = tempfile::tempdir().expect("directory");
            let path = disk(dir.path(), BYTES);
            let (error, rate) = (format!("error={errno}"), "error-rate=100%");
            let args = [more, &["--filter=error", "file", &path, &error, rate]].concat();
            let server = NbdServer::nbdkit(dir.path(), &args);
            let volume = opened(&server.uri(""));
            let mut queue = volume.open_queue(0, 4).expect("queue");
            let mut data = Buffer(vec![1; 4096]);
            let zeroes = Op::WriteZeroes { offset: 0, len: 4096, unmap: true };
            assert_eq!(run(&mut *queue, Op::Write { offset: 0 }, &mut data), Err(write));
            assert_eq!(run(&mut *queue, zeroes, &mut Buffer(vec![])), Err(zero));
            assert_eq!(run(&mut *queue, Op::Read { offset: 0 }, &mut data), Err(read));
            assert_eq!(volume.state(), VolumeState::Connected, "an error ends no connection");
        }
    }
}

#[test]
fn a_read_only_export_and_a_read_only_access() {
    if skip_without("a_read_only_export_and_a_read_only_access", "nbdkit") {
        return;
    }
    // Nobody has to permit what nobody may write.
    for (export_is, standby) in [(true, false), (true, true), (false, false)] {
        let dir = tempfile::tempdir().expect("directory");
        let path = disk(dir.path(), BYTES);
        let read_only: &[&str] = if export_is { &["-r"] } else { &[] };
        let server = NbdServer::nbdkit(dir.path(), &[read_only, &["file", &path]].concat());
        let options = OpenOptions { read_only: !export_is, standby, ..options() };
        let volume = open(&server.uri(""), &options).expect("open");
        assert!(volume.geometry().read_only);
        let mut queue = volume.open_queue(0, 4).expect("queue");
        let mut data = Buffer(vec![1; 512]);
        assert_eq!(run(&mut *queue, Op::Read { offset: 0 }, &mut data), Ok(()));
        let written = run(&mut *queue, Op::Write { offset: 0 }, &mut data);
        assert_eq!(written, Err(IoError::ReadOnly));
        assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(vec![])), Ok(()));
    }
}

/// An export that grew while the server was away is a larger disk, one that shrank
/// another disk.
#[test]
fn growth_is_told_and_a_smaller_export_is_lost() {
    if skip_without("growth_is_told_and_a_smaller_export_is_lost", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let mut server = NbdServer::nbdkit(dir.path(), &["file", &path]);
    let volume = opened(&server.uri(""));
    let mut queue = volume.open_queue(0, 4).expect("queue");
    for (bytes, state) in [(2 * BYTES, VolumeState::Connected), (BYTES, VolumeState::Lost)] {
        server.kill();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(bytes))
            .expect("size");
        server.restart();
        eventually("noticed", || {
            collect(&mut *queue, 1, Duration::from_millis(5));
            volume.state() == state && volume.geometry().size_bytes == 2 * BYTES
        });
    }
    let mut data = Buffer(vec![7; 4096]);
    // SAFETY: the buffer outlives the queue.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &data.iov()) };
    assert_eq!(collect(&mut *queue, 1, Duration::from_millis(300)), []);
}

#[test]
fn what_cannot_be_opened_has_its_sentence() {
    if skip_without("what_cannot_be_opened_has_its_sentence", "nbdkit")
        || skip_without("what_cannot_be_opened_has_its_sentence", "qemu-nbd")
    {
        return;
    }
    let short = Duration::from_millis(300);
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let none = format!("nbd+unix:///?socket={}", dir.path().join("none").display());
    assert!(refused(&none, short).to_string().contains("check the address"));
    for (args, part) in [
        (&["-o", "file", &path][..], "only the old style"),
        (&["--mask-handshake=0", "file", &path], "only the old style"),
        (&["memory", "0"], "less than one block of 512"),
        (&["memory", "511"], "has 511 bytes"),
        (
            &[
                "--filter=blocksize-policy",
                "memory",
                "1M",
                "blocksize-minimum=8192",
                "blocksize-preferred=8192",
            ],
            "cannot serve export `` as a disk",
        ),
    ] {
        let dir = tempfile::tempdir().expect("directory");
        let server = NbdServer::nbdkit(dir.path(), args);
        let error = refused(&server.uri(""), short);
        assert!(error.to_string().contains(part), "{args:?}: {error}");
    }
    let server = NbdServer::qemu(dir.path(), &["--shared=1", &path]);
    let error = refused(&server.uri("other"), short);
    assert!(error.to_string().contains("no export `other`"), "{error}: {:?}", error.source());
}

fn is_readable(queue: &dyn baton_remote_client::VolumeQueue) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(queue.wake_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) == Ok(1)
}

/// The connection of a queue that was dropped is kept for the next one, and its end is no news to whoever waited for the
/// first.
#[test]
fn what_a_queue_leaves_behind_wakes_nobody() {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
    const NOBODY: [u64; 0] = [];
    if skip_without("what_a_queue_leaves_behind_wakes_nobody", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let mut server = NbdServer::nbdkit(dir.path(), &["file", &path]);
    let volume = opened(&server.uri(""));
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    let woken = |timeout: u16| {
        let mut events = [EpollEvent::empty(); 4];
        let n = epoll.wait(&mut events, EpollTimeout::from(timeout)).expect("a wait");
        events[..n].iter().map(EpollEvent::data).collect::<Vec<_>>()
    };
    for (data, write) in [(7, 1), (8, 2)] {
        let mut queue = volume.open_queue(0, 4).expect("queue");
        queue.watch_in(&epoll, data).expect("watched");
        let mut buffer = Buffer(vec![write; 4096]);
        let mut done = Vec::new();
        // SAFETY: the buffer outlives the request.
        unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &buffer.iov()) };
        queue.poll(&mut done);
        while done.is_empty() {
            let woken = woken(10_000);
            assert!(!woken.is_empty() && woken.iter().all(|by| *by == data), "{woken:?}");
            queue.poll(&mut done);
        }
        drop(queue);
        assert_eq!(woken(0), NOBODY);
        server.kill();
        assert_eq!(woken(200), NOBODY, "by a connection that nobody uses");
        server.restart();
    }
}

/// At a server with one place: who stands by leaves it after a look, and takes it when the one before has shut its
/// gate, which closes the connection.
#[test]
fn a_gate_keeps_back_what_a_host_would_send() {
    if skip_without("a_gate_keeps_back_what_a_host_would_send", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let server = NbdServer::nbdkit(dir.path(), &["--filter=limit", "file", &path, "limit=1"]);
    let standby = OpenOptions { standby: true, ..options() };
    let there = open(&server.uri(""), &standby).expect("a look");
    assert_eq!(there.geometry().size_bytes, BYTES);
    let says = baton_remote_client::Engine::Nbd.capabilities();
    assert_eq!((says.handoff, there.gate().is_some()), (true, true));
    let mut there_queue = there.open_queue(0, 4).expect("queue");
    let here = opened(&server.uri(""));
    let mut here_queue = here.open_queue(0, 4).expect("queue");
    let mut buffer = Buffer(vec![7; 4096]);
    assert_eq!(run(&mut *here_queue, Op::Write { offset: 0 }, &mut buffer), Ok(()));

    // Shut, nothing happens, not even what the driver could answer by itself.
    let mut read = Buffer(vec![0; 4096]);
    let mut done = Vec::new();
    // SAFETY: the buffer outlives the request.
    unsafe { there_queue.submit(Tag(1), Op::Read { offset: 0 }, &read.iov()) };
    // SAFETY: no buffer.
    unsafe { there_queue.submit(Tag(2), Op::Read { offset: 2 * BYTES }, &[]) };
    for _ in 0..20 {
        there_queue.poll(&mut done);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(done.is_empty() && there.gate().expect("a gate").is_shut());
    assert_eq!(there_queue.in_flight(), 2);

    here.gate().expect("a gate").shut();
    there.gate().expect("a gate").open();
    assert!(is_readable(&*here_queue) && is_readable(&*there_queue), "their threads are woken");
    here_queue.poll(&mut done);
    done.extend(collect(&mut *there_queue, 2, LONG));
    assert_eq!(done.iter().find(|d| d.tag == Tag(1)).expect("read").result, Ok(()));
    assert_eq!(read.0, [7; 4096]);

    // Too late: this stays here.
    // SAFETY: the buffer outlives the request.
    unsafe { here_queue.submit(Tag(3), Op::Write { offset: 0 }, &buffer.iov()) };
    done.clear();
    for _ in 0..20 {
        here_queue.send(&mut done);
        here_queue.poll(&mut done);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(done.is_empty());
    assert!(!is_readable(&*here_queue), "a thread of a shut queue sleeps");
}

#[test]
fn something_else_is_no_nbd_server() {
    let server = common::TinyServer::tcp(common::Server::new(1 << 20));
    let address = server.uri.strip_prefix("baton://").and_then(|rest| rest.split('/').next());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let other = listener.local_addr().expect("address");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = std::io::Write::write_all(&mut stream, b"SSH-2.0-OpenSSH_9\r\n");
            thread::sleep(Duration::from_secs(1));
        }
    });
    let short = Duration::from_millis(300);
    let error = refused(&format!("nbd://{other}/"), short).to_string();
    assert!(error.contains("is not an NBD server"), "{error}");
    // A Baton server waits for its client to speak.
    let error = refused(&format!("nbd://{}/", address.expect("address")), short).to_string();
    assert!(error.contains("no answer from") && error.contains("NBD"), "{error}");
}
