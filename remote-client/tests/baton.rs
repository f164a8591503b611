//! Volumes and queues of the Baton driver over real sockets.

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use baton_protocol::message::{Event, EventKind};
use baton_protocol::{QueueId, Status};
use baton_remote_client::{
    IoError, Op, OpenError, OpenOptions, Tag, Timing, Volume, VolumeEvent, VolumeState, open,
};
use common::{
    Buffer, Server, TinyServer, collect, eventually, opened, options, refused, run, stamped_load,
    wait,
};

const LONG: Duration = Duration::from_secs(20);

fn listen(volume: &Arc<dyn Volume>) -> Arc<Mutex<Vec<VolumeEvent>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    volume.set_listener(Arc::new(move |event| sink.lock().expect("events").push(event)));
    events
}

fn exercise(server: &TinyServer) {
    let volume = opened(&server.uri);
    let geometry = volume.geometry();
    assert_eq!(
        (geometry.size_bytes, geometry.block_bytes, geometry.read_only),
        (8 << 20, 512, false)
    );
    assert_eq!(&geometry.id, b"0000000000000abc\0\0\0\0");
    let mut queue = volume.open_queue(0, 16).expect("queue");
    for len in [512, 4096, 16384, 131_072, (2 << 20) + 512] {
        let data: Vec<u8> =
            (0..len).map(|i| u8::try_from((i * 7 + i / 251) % 256).expect("a byte")).collect();
        assert_eq!(run(&mut *queue, Op::Write { offset: 4096 }, &mut Buffer(data.clone())), Ok(()));
        let mut back = Buffer(vec![0; len]);
        assert_eq!(run(&mut *queue, Op::Read { offset: 4096 }, &mut back), Ok(()));
        assert!(back.0 == data, "{len} bytes");
    }
    let mut none = Buffer(Vec::new());
    assert_eq!(run(&mut *queue, Op::Flush, &mut none), Ok(()));
    assert_eq!(run(&mut *queue, Op::Discard { offset: 4096, len: 4096 }, &mut none), Ok(()));
    let past = Op::WriteZeroes { offset: 8 << 20, len: 512, unmap: false };
    assert_eq!(run(&mut *queue, past, &mut none), Err(IoError::OutOfRange));
    assert_eq!(queue.in_flight(), 0);
    drop(queue);
    volume.close(true);
    assert!(server.state().server.released);
    eventually("the connections are closed", || server.state().connections() == 0);
}

#[test]
fn a_disk_over_tcp() {
    exercise(&TinyServer::tcp(Server::new(8 << 20)));
}

#[test]
fn a_disk_over_a_unix_socket() {
    let dir = tempfile::tempdir().expect("directory");
    exercise(&TinyServer::unix(Server::new(8 << 20), dir.path().join("s")));
}

/// Four queues with their own threads, stamped data, a server that is killed
/// and started over and over: no error, nothing lost, nothing mixed up.
#[test]
fn a_server_killed_under_load_is_only_a_pause() {
    const QUEUES: u16 = 4;
    let mut server = TinyServer::tcp(Server::new(8 << 20));
    let volume = opened(&server.uri);
    let events = listen(&volume);
    let deadline = Instant::now() + Duration::from_millis(1500);
    let workers = stamped_load(&volume, QUEUES, deadline);
    let mut kills = 0;
    while Instant::now() < deadline {
        thread::sleep(Duration::from_millis(100));
        server.kill();
        thread::sleep(Duration::from_millis(30));
        server.start();
        kills += 1;
    }
    for worker in workers {
        assert!(worker.join().expect("worker").1 > 4, "hardly any progress");
    }
    assert!(kills > 5);
    eventually("connected again", || volume.state() == VolumeState::Connected);
    let events = events.lock().expect("events");
    assert!(events.contains(&VolumeEvent::State(VolumeState::Reconnecting)));
    assert!(events.contains(&VolumeEvent::State(VolumeState::Connected)));
}

/// Room to send wakes the queue: neither a timer nor an answer must do it.
#[test]
fn a_write_larger_than_the_socket_goes_on_as_soon_as_there_is_room() {
    const BYTES: usize = 64 << 20;
    let dir = tempfile::tempdir().expect("directory");
    let server = TinyServer::unix(Server::new(BYTES), dir.path().join("s"));
    let timing = Timing { ping_after: LONG, dead_after: LONG, ..Timing::default() };
    let volume = open(&server.uri, &OpenOptions { timing, ..options() }).expect("open");
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    // From now on the server reads and says nothing.
    server.state().freeze();
    let mut data = Buffer(vec![6; BYTES]);
    // SAFETY: the buffer outlives the queue.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &data.iov()) };
    let start = Instant::now();
    while server.state().swallowed < BYTES {
        assert!(start.elapsed() < LONG / 2, "stuck after {} bytes", server.state().swallowed);
        queue.poll(&mut Vec::new());
        let sent_all = || server.state().swallowed >= BYTES;
        while !wait(&*queue, Duration::from_millis(50)) && !sent_all() {
            assert!(start.elapsed() < LONG / 2, "room to send woke nobody");
        }
    }
    drop(queue);
}

#[test]
fn a_silent_connection_is_replaced() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    let mut queue = volume.open_queue(0, 4).expect("queue");
    let fd = queue.wake_fd().as_raw_fd();
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    let before = server.state().accepted();
    server.state().freeze();
    let start = Instant::now();
    assert_eq!(run(&mut *queue, Op::Write { offset: 0 }, &mut Buffer(vec![5; 4096])), Ok(()));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(200), "{took:?}: before PING and its time were over");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(server.state().accepted(), before + 1);
    assert_eq!(queue.wake_fd().as_raw_fd(), fd);
    assert_eq!(server.state().server.disk[..4096], [5; 4096]);
}

#[test]
fn nothing_in_flight_wakes_nobody() {
    fn switches() -> u64 {
        let mut total = 0;
        for task in std::fs::read_dir("/proc/self/task").expect("tasks") {
            let path = task.expect("task").path();
            let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
            if name.trim() == "baton-control" {
                total += status
                    .lines()
                    .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))
                    .and_then(|n| n.trim().parse::<u64>().ok())
                    .expect("a count");
            }
        }
        total
    }
    // In a process of its own: other tests have control threads too.
    if std::env::var_os("BATON_IDLE_TEST").is_none() {
        let done = std::process::Command::new(std::env::current_exe().expect("exe"))
            .args(["--exact", "nothing_in_flight_wakes_nobody", "--nocapture"])
            .env("BATON_IDLE_TEST", "1")
            .status()
            .expect("run");
        return assert!(done.success());
    }
    let server = TinyServer::tcp(Server::new(1 << 20));
    let timing = Timing { ping_after: Duration::from_millis(50), ..common::quick() };
    let options = OpenOptions { timing, ..options() };
    let volume = open(&server.uri, &options).expect("open");
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    // Timers that were set for HELLO and for the request may fire once.
    thread::sleep(Duration::from_millis(700));
    queue.poll(&mut Vec::new());
    let before = switches();
    assert!(before > 0, "the control thread was found");
    assert!(!wait(&*queue, Duration::from_millis(400)), "an idle queue asked to be polled");
    assert_eq!(switches(), before, "the control thread woke up");
    // And the descriptor still works.
    // SAFETY: no memory is named.
    unsafe { queue.submit(Tag(9), Op::Flush, &[]) };
    queue.send(&mut Vec::new());
    assert!(wait(&*queue, LONG));
    assert_eq!(collect(&mut *queue, 1, LONG)[0].tag, Tag(9));
}

#[test]
fn an_idle_queue_notices_that_its_connection_broke() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    let mut queue = volume.open_queue(3, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    let accepted = server.state().accepted();
    server.state().cut(|queue| queue == 3);
    assert!(wait(&*queue, LONG));
    let until = Instant::now() + LONG;
    while server.state().accepted() == accepted {
        assert!(Instant::now() < until);
        collect(&mut *queue, 1, Duration::from_millis(10));
    }
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
}

#[test]
fn the_control_connection_and_the_queues_do_not_need_each_other() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    let hellos = server.state().server.hellos.len();
    server.state().cut(|queue| queue == QueueId::CONTROL.0);
    eventually("control is back", || server.state().server.hellos.len() > hellos);
    let (queue_number, epoch, _) = server.state().server.hellos[hellos];
    assert_eq!((queue_number, epoch), (QueueId::CONTROL.0, 5), "only control rejoined");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    assert_eq!(server.state().server.hellos.len(), hellos + 1);
}

/// Else the server would take the new requests for old ones, and answer writes
/// without running them.
#[test]
fn a_queue_that_is_opened_again_goes_on_with_its_numbers() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    for value in 1..4u8 {
        let mut queue = volume.open_queue(2, 4).expect("queue");
        assert!(volume.open_queue(2, 4).is_err(), "one at a time");
        assert_eq!(
            run(&mut *queue, Op::Write { offset: 0 }, &mut Buffer(vec![value; 512])),
            Ok(())
        );
        assert_eq!(server.state().server.disk[..512], [value; 512]);
    }
    assert!(volume.open_queue(u16::MAX, 4).is_err());
}

/// One thread attends to all volumes: what one listener does must not cost the others.
#[test]
fn a_listener_that_panics_or_lets_its_volume_go_does_not_disturb_other_volumes() {
    let servers = [(); 3].map(|()| TinyServer::tcp(Server::new(1 << 20)));
    let [panics, leaves, stays] = servers.each_ref().map(|server| opened(&server.uri));
    let told = listen(&stays);
    panics.set_listener(Arc::new(|_| panic!("a listener's own fault")));
    let last = Mutex::new(Some(Arc::clone(&leaves)));
    let (tell, left) = std::sync::mpsc::channel();
    leaves.set_listener(Arc::new(move |_| {
        drop(last.lock().expect("the volume").take());
        tell.send(()).expect("the test waits");
    }));
    drop(leaves);
    let grown = Event { id: 1, kind: EventKind::Resized, value: 2 << 20 };
    for server in &servers {
        server.state().tell(grown);
    }
    // It would wait three seconds for a thread that is itself.
    left.recv_timeout(Duration::from_secs(2)).expect("nobody waits for the thread in itself");
    eventually("told", || told.lock().expect("events").contains(&VolumeEvent::Resized(2 << 20)));
    // The one whose listener panicked can be closed.
    panics.close(false);
    eventually("the connections are closed", || servers[0].state().connections() == 0);
    // And a volume that comes later is attended to.
    let later = opened(&servers[0].uri);
    let told = listen(&later);
    servers[0].state().tell(Event { id: 2, value: 3 << 20, ..grown });
    eventually("told", || told.lock().expect("events").contains(&VolumeEvent::Resized(3 << 20)));
}

#[test]
fn growth_reaches_the_listener_and_the_geometry() {
    let mut server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    let events = listen(&volume);
    server.state().server.disk.resize(2 << 20, 0);
    server.state().tell(Event { id: 1, kind: EventKind::Resized, value: 2 << 20 });
    eventually("told", || !events.lock().expect("events").is_empty());
    assert_eq!(*events.lock().expect("events"), [VolumeEvent::Resized(2 << 20)]);
    assert_eq!(volume.geometry().size_bytes, 2 << 20);
    // Growth while away is told by WELCOME.
    server.kill();
    server.state().server.disk.resize(3 << 20, 0);
    server.start();
    eventually("told", || volume.geometry().size_bytes == 3 << 20);
    eventually("told", || events.lock().expect("events").contains(&VolumeEvent::Resized(3 << 20)));
}

#[test]
fn a_fence_stops_the_volume_without_an_error() {
    for in_band in [true, false] {
        let server = TinyServer::tcp(Server::new(1 << 20));
        let volume = opened(&server.uri);
        let events = listen(&volume);
        let mut queue = volume.open_queue(0, 4).expect("queue");
        assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
        server.state().server.epoch.0 += 1;
        if !in_band {
            server.state().tell(Event { id: 1, kind: EventKind::EpochChanged, value: 6 });
            eventually("fenced by the event", || volume.state() == VolumeState::Fenced);
        }
        let mut buffer = Buffer(vec![7; 512]);
        // SAFETY: the buffer outlives the queue.
        unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &buffer.iov()) };
        assert!(collect(&mut *queue, 1, Duration::from_millis(300)).is_empty());
        assert_eq!(volume.state(), VolumeState::Fenced);
        let fenced = VolumeEvent::State(VolumeState::Fenced);
        eventually("told", || events.lock().expect("events").contains(&fenced));
        assert_eq!(server.state().server.disk[..512], [0; 512]);
        assert_eq!(queue.in_flight(), 1);
        eventually("all connections are closed", || server.state().connections() == 0);
        assert!(!wait(&*queue, Duration::from_millis(200)), "a fenced queue is quiet");
        // A queue opened now is fenced too.
        let mut late = volume.open_queue(1, 4).expect("queue");
        // SAFETY: no memory is named.
        unsafe { late.submit(Tag(2), Op::Flush, &[]) };
        assert!(collect(&mut *late, 1, Duration::from_millis(200)).is_empty());
        let start = Instant::now();
        volume.close(true);
        assert!(start.elapsed() < Duration::from_secs(1), "nothing to give back");
    }
}

#[test]
fn a_volume_that_was_deleted_is_lost() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    server.state().server.refuse = Some(Status::NoSuchVolume);
    server.state().cut(|_| true);
    eventually("lost", || volume.state() == VolumeState::Lost);
}

#[test]
fn readers_and_standbys() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    server.state().server.disk[..512].fill(3);
    let reader = open(&server.uri, &OpenOptions { read_only: true, ..options() }).expect("open");
    assert!(reader.geometry().read_only);
    let mut queue = reader.open_queue(0, 4).expect("queue");
    let mut buffer = Buffer(vec![0; 512]);
    assert_eq!(run(&mut *queue, Op::Write { offset: 0 }, &mut buffer), Err(IoError::ReadOnly));
    assert_eq!(run(&mut *queue, Op::Read { offset: 0 }, &mut buffer), Ok(()));
    assert_eq!(buffer.0, [3; 512]);
    drop(queue);
    drop(reader);
    let standby = open(&server.uri, &OpenOptions { standby: true, ..options() }).expect("open");
    let error = standby.open_queue(0, 4).err().expect("refused");
    let source = std::error::Error::source(&error).expect("source").to_string();
    assert!(source.contains("standby"), "{source}");
}

/// Nothing else wakes the control thread for it: no ping is due, and nothing arrives.
#[test]
fn a_silent_server_is_left_when_its_time_to_take_the_volume_back_is_over() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let timing = Timing { ping_after: LONG * 3, dead_after: LONG * 3, ..options().timing };
    let volume = open(&server.uri, &OpenOptions { timing, ..options() }).expect("open");
    server.state().freeze();
    volume.close(true);
    eventually("its connection is closed", || server.state().connections() == 0);
}

#[test]
fn closing_waits_a_bounded_time_for_a_server_that_is_away() {
    let mut server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    server.kill();
    let start = Instant::now();
    volume.close(true);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn each_way_an_open_fails_has_its_sentence() {
    let short = Duration::from_millis(300);
    let said = |error: &OpenError, part: &str| {
        let text = error.to_string();
        assert!(text.contains(part), "{text}");
    };
    // Nobody listens.
    let port = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    let error = refused(&format!("baton://{port}/v"), short);
    assert!(matches!(error, OpenError::Unreachable { .. }), "{error:?}");
    said(&error, "check the address");
    let error = refused("baton+unix:///v?socket=/nonexistent/s", short);
    assert!(matches!(error, OpenError::Unreachable { .. }), "{error:?}");
    // A name that means nothing (RFC 6761: never resolves).
    let error = refused("baton://host.invalid:1/v", short);
    assert!(matches!(error, OpenError::Resolve { .. }), "{error:?}");
    // Another service, and a silent one.
    let web = TcpListener::bind("127.0.0.1:0").expect("bind");
    let uri = format!("baton://{}/v", web.local_addr().expect("address"));
    let error = refused(&uri, short);
    assert!(matches!(error, OpenError::Timeout { .. }), "{error:?}");
    let service = thread::spawn(move || {
        // Skips connections that the silent round left behind.
        for stream in web.incoming().flatten().take(3) {
            let mut stream = stream;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    let error = refused(&uri, Duration::from_secs(5));
    assert!(matches!(error, OpenError::NotBaton { .. }), "{error:?}");
    said(&error, "check the port");
    drop(service);
    // Refusals.
    for (status, part) in [
        (Status::NoSuchVolume, "baton volume create vol"),
        (Status::NotOwner, "owned by another client: the server says no"),
        (Status::Version, "upgrade the older side"),
        (Status::Protocol, "the server says no"),
    ] {
        let server = TinyServer::tcp(Server::new(1 << 20));
        server.state().server.refuse = Some(status);
        let start = Instant::now();
        said(&refused(&server.uri, LONG), part);
        assert!(start.elapsed() < Duration::from_secs(5), "a refusal is final");
    }
    // Busy may pass; it did not.
    let server = TinyServer::tcp(Server::new(1 << 20));
    server.state().server.refuse = Some(Status::Busy);
    said(&refused(&server.uri, short), "does not serve us now");
    // Options that make no sense.
    let both = OpenOptions { read_only: true, standby: true, ..options() };
    said(&open(&server.uri, &both).expect_err("modes"), "choose one");
    let nobody = OpenOptions { owner: String::new(), ..options() };
    said(&open(&server.uri, &nobody).expect_err("name"), "1 to 255 bytes");
}

#[test]
fn of_several_servers_the_first_that_answers_is_used() {
    let server = TinyServer::tcp(Server::new(1 << 20));
    let gone = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    let silent = TcpListener::bind("127.0.0.1:0").expect("bind");
    let silent_at = silent.local_addr().expect("address");
    let good = server.uri.trim_start_matches("baton://");
    let volume = opened(&format!("baton://{gone},{silent_at},{good}"));
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
}

/// A server that starts a moment after its client.
#[test]
fn an_open_waits_for_a_server_that_is_just_starting() {
    let mut server = TinyServer::tcp(Server::new(1 << 20));
    server.kill();
    let uri = server.uri.clone();
    let client = thread::spawn(move || opened(&uri).geometry().size_bytes);
    thread::sleep(Duration::from_millis(200));
    server.start();
    assert_eq!(client.join().expect("opened"), 1 << 20);
}

/// The server's machine goes down and comes back: what was not flushed may be gone.
#[test]
fn a_flush_after_a_power_loss_fails_once_if_there_was_something_to_lose() {
    let mut server = TinyServer::tcp(Server::new(1 << 20));
    let volume = opened(&server.uri);
    let mut queues: Vec<_> = (0..2).map(|i| volume.open_queue(i, 4).expect("queue")).collect();
    let write = Op::Write { offset: 0 };
    let data = || Buffer(vec![1; 512]);
    let mut none = Buffer(Vec::new());
    // A kill of the process alone, and a power loss after a flush, are only pauses.
    for loss in [0, 1] {
        for queue in &mut queues {
            assert_eq!(run(&mut **queue, write, &mut data()), Ok(()));
        }
        if loss == 1 {
            assert_eq!(run(&mut *queues[1], Op::Flush, &mut none), Ok(()));
        }
        server.kill();
        server.state().server.generation += loss;
        server.start();
        for queue in &mut queues {
            assert_eq!(run(&mut **queue, Op::Flush, &mut none), Ok(()), "loss {loss}");
        }
    }
    // One queue's change, another queue's flush; told once, whoever asks.
    for (writer, other) in [(0, 1), (1, 0)] {
        assert_eq!(run(&mut *queues[writer], write, &mut data()), Ok(()));
        server.kill();
        server.state().server.generation += 1;
        server.start();
        assert_eq!(run(&mut *queues[other], Op::Flush, &mut none), Err(IoError::Io));
        for queue in &mut queues {
            assert_eq!(run(&mut **queue, Op::Flush, &mut none), Ok(()));
        }
    }
    // A queue that was opened again has not forgotten.
    assert_eq!(run(&mut *queues[1], write, &mut data()), Ok(()));
    queues.pop();
    server.kill();
    server.state().server.generation += 1;
    server.start();
    let mut again = volume.open_queue(1, 4).expect("queue");
    assert_eq!(run(&mut *again, Op::Flush, &mut none), Err(IoError::Io));
    assert_eq!(run(&mut *queues[0], Op::Flush, &mut none), Ok(()));
}
