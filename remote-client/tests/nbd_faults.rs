//! The NBD driver under load against servers that fail some requests, retry, delay, answer out of order, and know
//! only the oldest way to an export; over TCP as over Unix sockets.

mod common;
mod nbd_server;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use baton_remote_client::{IoError, Op, Tag, VolumeState};
use common::{Buffer, collect, eventually, opened, run, stamped_load};
use nbd_server::{NbdServer, disk, skip_without};
use nix::sys::signal::Signal;

const BYTES: u64 = 8 << 20;
const LONG: Duration = Duration::from_secs(20);

/// Some requests fail, and only those: what was acknowledged is there, what failed is old or new, each whole.
#[test]
fn failures_under_load_are_those_requests_own() {
    const NAME: &str = "failures_under_load_are_those_requests_own";
    if skip_without(NAME, "nbdkit") {
        return;
    }
    for more in [&[][..], &["--no-sr"]] {
        let dir = tempfile::tempdir().expect("directory");
        let path = disk(dir.path(), BYTES);
        let switch = dir.path().join("errors");
        std::fs::write(&switch, "").expect("written");
        let (file, rate) = (format!("error-file={}", switch.display()), "error-rate=15%");
        let filters = ["--filter=error", "--filter=delay", "file", &path];
        let delays = ["error=ENOSPC", &file, rate, "wdelay=1ms", "rdelay=1ms"];
        let server = NbdServer::nbdkit(dir.path(), &[more, &filters, &delays].concat());
        let volume = opened(&server.uri(""));
        let mut queue = volume.open_queue(0, 32).expect("queue");
        // What each place may hold.
        let mut may_hold: HashMap<u32, Vec<u8>> = (0..32).map(|slot| (slot, vec![0])).collect();
        let mut buffers: Vec<_> = (0..32).map(|_| Buffer(vec![0; 20 << 10])).collect();
        let mut failed = [0u32; 2];
        for round in 1..=24u8 {
            if round == 21 {
                std::fs::remove_file(&switch).expect("removed");
            }
            let write = round % 2 == 1;
            for (slot, buffer) in (0u32..).zip(&mut buffers) {
                buffer.0.fill(if write { round } else { 0xee });
                let offset = u64::from(slot) << 17;
                let op = if write { Op::Write { offset } } else { Op::Read { offset } };
                // SAFETY: the buffers live until all are collected.
                unsafe { queue.submit(Tag(slot), op, &buffer.iov()) };
            }
            let done = collect(&mut *queue, 32, LONG);
            assert_eq!(done.len(), 32, "each is answered once");
            for done in done {
                let held = may_hold.get_mut(&done.tag.0).expect("a slot");
                match (write, done.result) {
                    (true, Ok(())) => *held = vec![round],
                    (true, Err(error)) => {
                        assert_eq!(error, IoError::NoSpace);
                        held.push(round);
                        failed[0] += 1;
                    }
                    (false, Ok(())) => {
                        let bytes = &buffers[done.tag.0 as usize].0;
                        let first = bytes[0];
                        assert!(held.contains(&first) && bytes.iter().all(|b| *b == first));
                        *held = vec![first];
                    }
                    (false, Err(error)) => {
                        assert_eq!(error, IoError::Io);
                        failed[1] += 1;
                    }
                }
                assert!(round < 21 || done.result.is_ok(), "the server is well again");
            }
        }
        assert!(failed[0] > 10 && failed[1] > 10, "{failed:?}");
        assert_eq!(volume.state(), VolumeState::Connected, "an error ends no connection");
    }
}

/// A server that says that it shuts down, over and over: nobody sees an error.
#[test]
fn a_server_that_shuts_down_under_load_is_only_a_pause() {
    const NAME: &str = "a_server_that_shuts_down_under_load_is_only_a_pause";
    if skip_without(NAME, "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let args = ["--filter=error", "file", &path, "error=ESHUTDOWN", "error-rate=1%"];
    let mut server = NbdServer::nbdkit(dir.path(), &args);
    let volume = opened(&server.uri(""));
    let workers = stamped_load(&volume, 2, Instant::now() + Duration::from_secs(2));
    // nbdkit 1.32 does not always outlive a client that goes with requests under way.
    while workers.iter().any(|worker| !worker.is_finished()) {
        server.revive();
        thread::sleep(Duration::from_millis(20));
    }
    let rounds: u32 = workers.into_iter().map(|w| w.join().expect("worker").1).sum();
    assert!(rounds > 10, "hardly any progress: {rounds}");
}

/// nbdkit's retry filter opens its plugin again, and is slow meanwhile.
#[test]
fn a_server_that_retries_is_only_slow() {
    if skip_without("a_server_that_retries_is_only_slow", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let filters = ["--filter=retry", "--filter=error", "file", &path];
    let settings = ["error=EIO", "error-rate=0.5%", "retry-delay=1", "retry-exponential=no"];
    let server =
        NbdServer::nbdkit(dir.path(), &[&filters[..], &settings, &["retries=50"]].concat());
    let volume = opened(&server.uri(""));
    let workers = stamped_load(&volume, 2, Instant::now() + Duration::from_secs(3));
    let rounds: u32 = workers.into_iter().map(|w| w.join().expect("worker").1).sum();
    assert!(rounds > 4, "hardly any progress: {rounds}");
    assert_eq!(volume.state(), VolumeState::Connected);
}

#[test]
fn kills_over_tcp_are_only_a_pause() {
    if skip_without("kills_over_tcp_are_only_a_pause", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let args = ["--filter=delay", "file", &path, "wdelay=3ms"];
    let mut server = NbdServer::nbdkit_tcp(dir.path(), &args);
    let volume = opened(&server.uri(""));
    let deadline = Instant::now() + Duration::from_secs(2);
    let workers = stamped_load(&volume, 2, deadline);
    while Instant::now() < deadline {
        thread::sleep(Duration::from_millis(150));
        server.kill();
        thread::sleep(Duration::from_millis(30));
        server.restart();
    }
    let mut queues: Vec<_> = workers.into_iter().map(|w| w.join().expect("worker")).collect();
    eventually("connected again", || {
        queues.iter_mut().for_each(|(queue, _)| queue.poll(&mut Vec::new()));
        volume.state() == VolumeState::Connected
    });
    let rounds: u32 = queues.iter().map(|(_, rounds)| rounds).sum();
    assert!(rounds > 10, "hardly any progress: {rounds}");
}

/// Over TCP, too, a server that stands still keeps its connection.
#[test]
fn over_tcp_a_frozen_server_is_waited_for() {
    if skip_without("over_tcp_a_frozen_server_is_waited_for", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let server = NbdServer::nbdkit_tcp(dir.path(), &["file", &path]);
    let volume = opened(&server.uri(""));
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(vec![])), Ok(()));
    server.signal(Signal::SIGSTOP);
    // More than the socket's buffers hold.
    let mut data = Buffer(vec![7; 8 << 20]);
    // SAFETY: the buffer outlives the request, which is waited for.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &data.iov()) };
    assert_eq!(collect(&mut *queue, 1, Duration::from_secs(2)), []);
    assert_eq!((queue.in_flight(), volume.state()), (1, VolumeState::Connected));
    server.signal(Signal::SIGCONT);
    assert_eq!(collect(&mut *queue, 1, LONG).len(), 1);
    let mut back = Buffer(vec![0; 8 << 20]);
    assert_eq!(run(&mut *queue, Op::Read { offset: 0 }, &mut back), Ok(()));
    assert!(back.0.iter().all(|b| *b == 7));
}

/// In front of a real server: refuses every option but the oldest, EXPORT_NAME.
fn ancient(server: &NbdServer, path: &Path) -> String {
    let inner = server.uri("").trim_start_matches("nbd://").trim_end_matches('/').to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound");
    assert!(path.exists());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let server = TcpStream::connect(&inner).expect("connected");
            thread::spawn(move || serve_anciently(stream, server));
        }
    });
    format!("nbd://{address}/")
}

fn serve_anciently(mut client: TcpStream, mut server: TcpStream) -> Option<()> {
    let mut greeting = [0; 18];
    server.read_exact(&mut greeting).ok()?;
    client.write_all(&greeting).ok()?;
    let mut flags = [0; 4];
    client.read_exact(&mut flags).ok()?;
    server.write_all(&flags).ok()?;
    loop {
        let mut head = [0; 16];
        client.read_exact(&mut head).ok()?;
        let len = u32::from_be_bytes(head[12..].try_into().expect("four"));
        let mut body = vec![0; len as usize];
        client.read_exact(&mut body).ok()?;
        if head[8..12] == [0, 0, 0, 1] {
            server.write_all(&[&head[..], &body].concat()).ok()?;
            break;
        }
        let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
        let unsupported = [0x80, 0, 0, 1, 0, 0, 0, 0];
        client.write_all(&[&magic[..], &head[8..12], &unsupported].concat()).ok()?;
    }
    let (mut from, mut to) = (server.try_clone().ok()?, client.try_clone().ok()?);
    thread::spawn(move || std::io::copy(&mut from, &mut to));
    std::io::copy(&mut client, &mut server).ok().map(|_| ())
}

/// A server without GO, and with or without the 124 zeros of old: asked by name, answered simply.
#[test]
fn a_server_that_knows_only_export_name_is_enough() {
    if skip_without("a_server_that_knows_only_export_name_is_enough", "nbdkit") {
        return;
    }
    // Bit 0: fixed newstyle. Bit 1: no zeros.
    for mask in ["--mask-handshake=3", "--mask-handshake=1"] {
        let dir = tempfile::tempdir().expect("directory");
        let path = disk(dir.path(), BYTES);
        let server = NbdServer::nbdkit_tcp(dir.path(), &[mask, "file", &path]);
        let uri = ancient(&server, Path::new(&path));
        let volume = opened(&uri);
        assert_eq!(volume.geometry().size_bytes, BYTES, "{mask}");
        let workers = stamped_load(&volume, 2, Instant::now() + Duration::from_millis(500));
        let rounds: u32 = workers.into_iter().map(|w| w.join().expect("worker").1).sum();
        assert!(rounds > 2, "{mask}: {rounds}");
    }
}
